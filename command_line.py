"""What both command lines share: help, errors of one line, and the choice of the backend."""

import argparse
import contextlib
import errno
import functools
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

try:
    from backend import devices
    from backend.errors import UserError
except (OSError, ValueError) as error:  # of a variable, say, that tinygrad reads when imported
    sys.exit(f"error: {error}")

USER_ERRORS = (OSError, UserError, MemoryError)  # what a user can get wrong, or a machine


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show, and N or PATH for what an option takes."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or "default:" in action.help:
            return action.help
        return super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "TEXT" if action.type is None else "PATH" if action.type is Path else "N"


class ArgumentParser(argparse.ArgumentParser):
    """Errors are of one line, and a path that is empty is one: it would be the working folder."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            usage="python %(prog)s [OPTION]...",
            formatter_class=HelpFormatter,
            add_help=False,
            allow_abbrev=False,
            conflict_handler="resolve",  # train.py's -h is the number of heads
        )
        self.register("type", Path, path)
        self.add_argument("-h", "--help", action="help", help="show this help")

    def format_help(self) -> str:
        usable = devices.usable()
        others = [name for name in devices.BACKENDS if name not in usable]
        self.epilog = (
            f"The environment variable DEV chooses the backend. These open here: "
            f"{', '.join(usable)}; these do not: {', '.join(others)}. Now: {devices.in_use()}."
        )
        return super().format_help()

    def error(self, message: str):
        self.exit(2, f"error: {message}; see python {self.prog} --help\n")


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """The options of run.py that exported programs have as well."""
    count, add = number(int, 1, 2**31), parser.add_argument_group("text").add_argument
    prompt_help = "text to continue, - for standard input (default: a line break)"
    add("-p", "--prompt", default="\n", help=prompt_help)
    add("-n", "--n-new-tokens", type=count, default=1000, help="tokens to generate")
    add("--stop", metavar="TEXT", help="end a continuation where this text would come")
    add("-i", "--interactive", action="store_true", help="continue each line of standard input")
    add = parser.add_argument_group("sampling").add_argument
    add("-s", "--seed", type=number(int, 0), default=0, help="of the random numbers")
    add("--temperature", type=number(float, 0), default=1.0, help="0 takes the likeliest token")
    add("--top-k", type=count, help="draw from the K likeliest tokens only")
    add("--top-p", type=number(float, 0), help="draw from the likeliest tokens that sum up to P")
    add("--stride", type=count, default=1, help="tokens dropped when the context is full")


def program_help() -> str:
    """What an exported program shows for --help, below its usage."""
    parser = argparse.ArgumentParser(
        description="Continue a text with a trained GPT.",
        usage=argparse.SUPPRESS,
        add_help=False,
        formatter_class=functools.partial(HelpFormatter, width=80),
    )
    parser.add_argument("-h", "--help", action="help", help="show this help")
    add_text_options(parser)
    return parser.format_help()


def path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty: name a file or a folder")
    return Path(text)


def number(kind: type, lowest: float, below: float = float("inf")) -> Callable:
    """An argparse type: an int or a float that is at least `lowest` and less than `below`."""
    noun = "a whole number" if kind is int else "a number"
    limit = f" and below {below:g}" if below <= 1000 else ""  # others are no one's concern

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not lowest <= value < below:
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} of at least {lowest}{limit}")
        return value

    return parse


class LastingStream:
    """A stream that takes what a system's encoding lacks, and what is written when the terminal is
    gone: a training is not to end before the signal that says so."""

    def __init__(self, stream: IO):
        self.stream = stream
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    @property
    def buffer(self) -> "LastingStream":
        return LastingStream(self.stream.buffer)

    def write(self, data: str | bytes) -> int:
        with self.lasting():
            self.stream.write(data)
        return len(data)

    def flush(self) -> None:
        with self.lasting():
            self.stream.flush()

    @contextlib.contextmanager
    def lasting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if sys.platform == "win32" and error.errno == errno.EINVAL:
                raise BrokenPipeError from error  # which has no number of its own there
            if error.errno != errno.EIO:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def run(main: Callable[[], int | None]) -> None:
    """Ends the process with what `main` returns; what a user can get wrong is a line on stderr."""
    sys.stdout, sys.stderr = LastingStream(sys.stdout), LastingStream(sys.stderr)
    try:
        sys.exit(main())
    except BrokenPipeError:  # python run.py ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except USER_ERRORS as error:
        sys.exit(f"error: {explain(error)}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        gc.freeze()  # to look for garbage at the end would take a tenth of a second


def explain(error: BaseException) -> str:
    """One line, or for what is a fault of ours the whole traceback."""
    if not isinstance(error, USER_ERRORS):
        return "".join(traceback.format_exception(error))
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    return " ".join(str(error).split()) or "out of memory"


def bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text
