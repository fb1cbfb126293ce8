"""What is to be seen of a training: a bar, a line a step, `metrics.csv` and `loss.png`."""

import csv
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from backend.arrays import copy_out
from backend.files import write_file
from training.optimizers import learning_rate
from training.state import Training
from training.workers import World

COLUMNS = "step,batch,tokens,train_loss,validation_loss,learning_rate,tokens_per_second,seconds"


def progress(training: Training, world: World) -> Iterator[int]:
    """The batches that are left of a step, with a bar on a terminal."""
    config, position = training.config, training.position
    first = position.batch
    bar = tqdm(
        range(first, config.batches_per_step),
        f"step {position.step + 1}/{config.n_steps}",
        total=config.batches_per_step,
        initial=first,
        bar_format="{desc} {bar} {n_fmt}/{total_fmt}{postfix}",
        **world.bar(),
    )
    started = shown = time.time()
    for batch in bar:
        yield batch
        if not bar.disable and (now := time.time()) > shown + 0.5:  # a look at the loss waits
            shown, n_tokens = now, (batch + 1 - first) * config.tokens_per_batch
            loss = copy_out(training.losses)[batch] * world.size  # of this rank's share
            rate = n_tokens / (now - started)
            bar.set_postfix_str(f"loss {loss:.4f} {rate:,.0f} tokens/s", refresh=False)


def step_line(training: Training, train_loss: float) -> str:
    """What gpt-burn prints after a step."""
    position, n_steps = training.position, training.config.n_steps
    step, elapsed = position.step + 1, position.seconds
    return (
        f"step {step:>3}/{n_steps}: train loss: {train_loss:.4f}, val loss: "
        f"{position.validation_loss:.4f} ({clock(elapsed)}/{clock(elapsed / step * n_steps)})"
    )


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"


def begin_metrics(training: Training) -> None:
    """A `metrics.csv` with the rows of the steps that were before, if there are any."""
    path, n_steps = metrics_file(training), training.position.step
    text = path.read_text(encoding="utf-8") if n_steps and path.exists() else ""
    rows = text.splitlines()
    write_file(path, "\n".join([COLUMNS, *rows[1 : n_steps + 1], ""]).encode())


def append_metrics(training: Training, train_loss: float, tokens_per_second: float) -> None:
    """The row of the step that has ended."""
    config, position = training.config, training.position
    n_batches = (position.step + 1) * config.batches_per_step
    row = [position.step + 1, n_batches, n_batches * config.tokens_per_batch]
    row += [train_loss, position.validation_loss, learning_rate(config, n_batches)]
    row += [tokens_per_second, position.seconds]
    with metrics_file(training).open("a", encoding="utf-8", newline="\n") as file:
        file.write(",".join(f"{number:.6g}" for number in row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def metrics_file(training: Training) -> Path:
    return Path(training.position.output_path) / "metrics.csv"


def plot(training: Training) -> None:
    """Draws `metrics.csv` as `loss.png`, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    path = metrics_file(training)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    axes = (figure := Figure()).add_subplot(xlabel="tokens", ylabel="loss (nats a token)")
    for column in ("train_loss", "validation_loss"):
        axes.plot(*([float(row[name]) for row in rows] for name in ("tokens", column)))
    axes.legend(["training", "validation"])
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_file(path.with_name("loss.png"), picture.getvalue())
