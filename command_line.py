"""Shared by the commands: options and help, output streams, signals, and errors of one line."""

import gc
import os
import signal
import sys

if None in (sys.stdin, sys.stdout, sys.stderr):  # closed: the next file would take its number
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - until the process ends
            os.set_inheritable(getattr(sys, name).fileno(), True)

# The imports of a command take most of a second: garbage collection waits until they end, and
# Ctrl-C is as silent as in `run`.
if os.path.dirname(os.path.realpath(sys.argv[0])) == os.path.dirname(os.path.realpath(__file__)):
    gc.disable()
    if callable(signal.getsignal(signal.SIGINT)):  # not ignored, as in the background
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import errno
import functools
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO

try:
    from backend import devices
    from backend.errors import UserError
except (OSError, ValueError) as error:  # an environment variable that tinygrad cannot parse, say
    sys.exit(f"error: {error}")

# errors of a write whose reader has gone: of a pipe, a socket, a terminal, or a pipe on Windows
READER_GONE = {errno.EPIPE, errno.ECONNRESET, errno.EIO, errno.EINVAL}
USER_ERRORS = (OSError, UserError, MemoryError)  # caused by the user or the machine


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that are set, and N, PATH or TEXT for an option's value."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or "default:" in action.help:
            return action.help
        return super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "TEXT" if action.type is None else "PATH" if action.type is Path else "N"


class ArgumentParser(argparse.ArgumentParser):
    """Prints errors in one line, and refuses empty paths, which would be the working folder."""

    def __init__(self, description: str, **defaults: object):
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
        self.set_defaults(**defaults)

    def parse_given(self, argv: list[str]) -> dict[str, object]:
        """Options on the command line by destination, without defaults; repeated ones as tuples."""
        absent = argparse.Namespace(**dict.fromkeys(vars(self.parse_args([]))))
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in vars(self.parse_args(argv, absent)).items()
            if value is not None
        }

    def format_help(self) -> str:
        usable = devices.usable()
        unusable = [name for name in devices.BACKENDS if name not in usable]
        self.epilog = (
            f"The environment variable DEV chooses the backend. These open here: "
            f"{', '.join(usable)}; these do not: {', '.join(unusable)}. Now: {devices.in_use()}."
        )
        return super().format_help()

    def error(self, message: str):
        self.exit(2, f"error: {message}; see python {self.prog} --help\n")


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that run.py and exported programs share."""
    count, add = number(int, 1, 2**31), parser.add_argument_group("text").add_argument
    prompt_help = "text to continue, - for standard input (default: a line break)"
    add("-p", "--prompt", default="\n", help=prompt_help)
    add("-n", "--n-new-tokens", type=count, default=1000, help="tokens to generate")
    add("--stop", metavar="TEXT", help="end a continuation where this text would come")
    add("-i", "--interactive", action="store_true", help="continue each line of standard input")
    special_help = "take special tokens, as <|endoftext|>, for text like any other"
    add("--no-special", action="store_true", help=special_help)
    add = parser.add_argument_group("sampling").add_argument
    add("-s", "--seed", type=number(int, 0), default=0, help="of the random numbers")
    add("--temperature", type=number(float, 0), default=1.0, help="0 takes the likeliest token")
    add("--top-k", type=count, help="draw from the K likeliest tokens only")
    add("--top-p", type=number(float, 0), help="draw from the likeliest tokens that sum up to P")
    add("--stride", type=count, default=1, help="tokens dropped when the context is full")


def program_help() -> str:
    """The --help text of an exported program, below its usage."""
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
    """An argparse type: an int or a float, at least `lowest` and less than `below`."""
    noun = "a whole number" if kind is int else "a number"
    limit = f" and below {below:g}" if below <= 1000 else ""  # larger limits are technical

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not lowest <= value < below:
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} of at least {lowest}{limit}")
        return value

    return parse


class Output:
    """Standard output or error. When its reader or terminal is gone, the process ends quietly or,
    with `outlives_reader`, goes on and its output is discarded."""

    def __init__(self, stream: IO, outlives_reader: bool):
        self.stream, self.outlives_reader = stream, outlives_reader
        if hasattr(stream, "reconfigure") and not stream.errors.endswith(("replace", "ignore")):
            stream.reconfigure(errors="replace")  # characters that the encoding lacks

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    @property
    def buffer(self) -> "Output":
        return Output(self.stream.buffer, self.outlives_reader)

    def write(self, data: str | bytes) -> None:
        self._attempt(self.stream.write, data)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, action: Callable, *arguments: str | bytes) -> None:
        try:
            action(*arguments)
        except OSError as error:
            # the buffer's content goes to the null device: no second error when the process ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if error.errno not in READER_GONE:
                raise
            if not self.outlives_reader:
                sys.exit()


def run(main: Callable[[], int | None], outlives_reader: bool = False) -> None:
    """Exits with the status that `main` returns; prints a user's error as one line on stderr."""
    sys.stdout, sys.stderr = Output(sys.stdout, outlives_reader), Output(sys.stderr, True)
    sys.unraisablehook = interrupt_again
    gc.freeze()  # imported objects stay: collections skip them
    gc.enable()
    if callable(handler := signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            sys.exit(main())
        finally:
            sys.stdout.flush()
    except USER_ERRORS as error:
        sys.exit(f"error: {explain(error)}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if callable(handler):
            signal.signal(signal.SIGINT, handler)
        gc.freeze()  # a last collection would take a tenth of a second


def interrupt_again(unraisable) -> None:
    """Repeats a Ctrl-C that came during a destructor, where Python drops exceptions; each of
    tinygrad's thousands of nodes has a destructor."""
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(0.01, signal.raise_signal, [signal.SIGINT]).start()
    else:
        sys.__unraisablehook__(unraisable)


def explain(error: BaseException) -> str:
    """One line for a user's error, the whole traceback for a fault of the program."""
    if not isinstance(error, USER_ERRORS):
        return "".join(traceback.format_exception(error))
    if isinstance(error, OSError):
        prefix = f"{error.filename}: " if error.filename else ""
        return f"{prefix}{error.strerror or error}"
    return " ".join(str(error).split()) or "out of memory"


def bold(text: str) -> str:
    return styled(text, 1)


def dim(text: str) -> str:
    return styled(text, 2)


def styled(text: str, code: int) -> str:
    is_plain = os.environ.get("TERM") == "dumb" or os.environ.get("NO_COLOR")
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() and not is_plain else text
