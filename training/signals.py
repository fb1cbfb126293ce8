"""Signals that ask a training to stop."""

import contextlib
import os
import signal
from collections.abc import Iterator

from training.workers import World

HANGUP = getattr(signal, "SIGHUP", None)  # which Windows lacks
HEARD = b"stopping after the batch in flight; a second Ctrl-C or SIGTERM stops at once\n"


def stop_signals() -> list[int]:
    """Ctrl-C, SIGTERM, and the hangup of a terminal, unless nohup has it ignored."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if HANGUP and signal.getsignal(HANGUP) != signal.SIG_IGN:
        numbers.append(HANGUP)
    return numbers


@contextlib.contextmanager
def noted_signals(world: World) -> Iterator[list[int]]:
    """The signals to stop that have come so far, for the batch in flight to end first.

    The first is answered on stderr. A second one ends the process at once, but for workers, which
    only all together can end, and but for a hangup, which may come twice.
    """
    noted, previous = [], {}

    def note(number: int, frame) -> None:
        if world.rank == 0 and not noted:
            is_bar_shown = not world.bar()["disable"]
            with contextlib.suppress(OSError):  # print may be what this interrupts
                os.write(2, b"\n" * is_bar_shown + HEARD)
        noted.append(number)
        if world.size == 1 and number != HANGUP:
            restore(signal.SIGINT, signal.SIGTERM)

    def restore(*numbers: int) -> None:
        for number in numbers:
            signal.signal(number, previous[number])

    for number in stop_signals():
        previous[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        restore(*previous)
