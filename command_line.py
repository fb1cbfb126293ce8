"""What both command lines share: help, errors of one line, and the choice of the backend."""

import argparse
import os
import sys
from collections.abc import Callable

BACKENDS = "CPU, CUDA, NV, METAL, AMD, CL (OpenCL), WEBGPU"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS):
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """`--help` alone asks for help, for `-h` is the number of heads; errors are of one line."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            epilog=f"The environment variable DEV chooses the backend: {BACKENDS}.",
            formatter_class=HelpFormatter,
            add_help=False,
            allow_abbrev=False,
        )
        self.add_argument("--help", action="help", help="show this help")

    def error(self, message: str):
        self.exit(2, f"error: {message}; see python {self.prog} --help\n")


def number(kind: type, lowest: float, below: float = float("inf")) -> Callable:
    """An argparse type: an int or float that is at least `lowest` and less than `below`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not lowest <= value < below:
            noun = "a whole number" if kind is int else "a number"
            limit = f" and below {below:g}" if below < float("inf") else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} of at least {lowest}{limit}")
        return value

    return parse


def run(main: Callable[[], None]) -> None:
    """Calls `main` and ends the process; what a user can get wrong becomes one line on stderr."""
    try:
        main()
    except (ValueError, OSError, MemoryError) as error:
        if os.environ.get("DEBUG"):
            raise
        sys.exit(f"error: {' '.join(str(error).split()) or type(error).__name__}")
    except KeyboardInterrupt:
        sys.exit(130)


def open_backend() -> str:
    """The name of the backend in use. ValueError if it does not open, with those that do."""
    from tinygrad import Device

    name = Device.DEFAULT
    try:
        Device[name]
    except Exception as error:  # whatever a driver raises
        usable = ", ".join(Device.get_available_devices()) or "none"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"DEV={name} does not open here ({reason:.100}); these do: {usable}"
        ) from error
    return name


def bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text
