"""Reports of a training: a line a step, `metrics.csv` and `loss.png`."""

import csv
import io
import os
from pathlib import Path

from backend.files import write_file

METRICS = "metrics.csv"
COLUMNS = "step,batch,tokens,train_loss,validation_loss,learning_rate,tokens_per_second,seconds"


def step_line(
    step: int, n_steps: int, train_loss: float, validation_loss: float, seconds: float
) -> str:
    """The line that gpt-burn prints after a step, counted from 1."""
    return (
        f"step {step:>3}/{n_steps}: train loss: {train_loss:.4f}, val loss: {validation_loss:.4f} "
        f"({clock(seconds)}/{clock(seconds / step * n_steps)})"
    )


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"


def begin(folder: Path, previous: Path | None, n_steps: int) -> None:
    """Writes a `metrics.csv` with the first `n_steps` rows of the one in the folder `previous`."""
    file = previous and previous / METRICS
    text = file.read_text(encoding="utf-8") if file and file.exists() else ""
    lines = [COLUMNS, *text.splitlines()[1 : n_steps + 1], ""]
    write_file(folder / METRICS, "\n".join(lines).encode())


def append(folder: Path, row: list[float]) -> None:
    """Appends a row, with a number for each of COLUMNS."""
    with (folder / METRICS).open("a", encoding="utf-8", newline="\n") as file:
        file.write(",".join(f"{number:.6g}" for number in row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def plot(folder: Path) -> None:
    """Draws `metrics.csv` as `loss.png`, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    with (folder / METRICS).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    axes = (figure := Figure()).add_subplot(xlabel="tokens", ylabel="loss (nats a token)")
    for column in ("train_loss", "validation_loss"):
        axes.plot(*([float(row[name]) for row in rows] for name in ("tokens", column)))
    axes.legend(["training", "validation"])
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_file(folder / "loss.png", picture.getvalue())
