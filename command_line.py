"""What both command lines share: help, errors of one line, and the choice of the backend."""

import os
import signal
import sys

if None in (sys.stdin, sys.stdout, sys.stderr):  # closed: what is opened next would take its number
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - until the process ends
            os.set_inheritable(getattr(sys, name).fileno(), True)

# The imports of a command take a second, in which Ctrl-C ends it as silently as later, in `run`.
if (
    os.path.dirname(os.path.realpath(sys.argv[0])) == os.path.dirname(os.path.realpath(__file__))
    and callable(signal.getsignal(signal.SIGINT))  # not ignored, as in the background
):
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import _thread
import argparse
import errno
import functools
import gc
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO

try:
    from backend import devices
    from backend.errors import UserError
except (OSError, ValueError) as error:  # of a variable, say, that tinygrad reads when imported
    sys.exit(f"error: {error}")

# what a write says when a pipe, a socket, a terminal, or on Windows a pipe, has no one behind it
GONE = {errno.EPIPE, errno.ECONNRESET, errno.EIO, errno.EINVAL}
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
        """Only what a command line gives, by destination; of a repeated option a tuple."""
        absent = argparse.Namespace(**dict.fromkeys(vars(super().parse_args([]))))
        given = vars(self.parse_args(argv, absent))
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
            if value is not None
        }

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
    special_help = "take special tokens, as <|endoftext|>, for text like any other"
    add("--no-special", action="store_true", help=special_help)
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


class Output:
    """Standard output or error. Once its reader or its terminal is gone, either what is written
    goes nowhere, for the work `outlives_reader`, or the process ends at once and quietly."""

    def __init__(self, stream: IO, outlives_reader: bool):
        self.stream, self.outlives_reader = stream, outlives_reader
        if hasattr(stream, "reconfigure") and not stream.errors.endswith(("replace", "ignore")):
            stream.reconfigure(errors="replace")  # what the encoding lacks

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    @property
    def buffer(self) -> "Output":
        return Output(self.stream.buffer, self.outlives_reader)

    def write(self, data: str | bytes) -> None:
        self.attempt(self.stream.write, data)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, action: Callable, *arguments: str | bytes) -> None:
        try:
            action(*arguments)
        except OSError as error:
            # what a buffer still holds has to go somewhere, and be no second error at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if error.errno not in GONE:
                raise
            if not self.outlives_reader:
                sys.exit()


def run(main: Callable[[], int | None], outlives_reader: bool = False) -> None:
    """Ends the process with what `main` returns; what a user can get wrong is a line on stderr."""
    sys.stdout, sys.stderr = Output(sys.stdout, outlives_reader), Output(sys.stderr, True)
    sys.unraisablehook = interrupt_anew
    if callable(at_rest := signal.getsignal(signal.SIGINT)):
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
        if callable(at_rest):
            signal.signal(signal.SIGINT, at_rest)
        gc.freeze()  # to look for garbage at the end would take a tenth of a second


def interrupt_anew(unraisable) -> None:
    """Repeats a Ctrl-C that came during a destructor, where Python drops what is raised; tinygrad's
    thousands of nodes have one each."""
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(0.01, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(unraisable)


def explain(error: BaseException) -> str:
    """One line, or for what is a fault of ours the whole traceback."""
    if not isinstance(error, USER_ERRORS):
        return "".join(traceback.format_exception(error))
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    return " ".join(str(error).split()) or "out of memory"


def bold(text: str) -> str:
    return styled(text, 1)


def dim(text: str) -> str:
    return styled(text, 2)


def styled(text: str, code: int) -> str:
    is_plain = os.environ.get("TERM") == "dumb" or os.environ.get("NO_COLOR")
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() and not is_plain else text
