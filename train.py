"""Trains a GPT on a text: python train.py -t my.txt."""

import argparse
import codecs
import copy
import csv
import io
import json
import math
import os
import signal
import sys
import time
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from tinygrad import Tensor
from tqdm import tqdm

import checkpoint
import command_line
import distributed
import resume
import steps
import tokenizers
from command_line import bold, number
from generation import Generator, sample
from gpt_tiny import (
    GPT,
    AdamW,
    GPTConfig,
    initial_weights,
)
from memory import get, put, zeros

MAX_MEGA_BYTES = 999
CORPUS = Path(".data/corpus.txt")


def parse_arguments(words: list[str], settings: argparse.Namespace | None = None):
    """The settings that `words` give; for others, those in `settings` or the defaults."""
    parser = command_line.ArgumentParser("Train a GPT on a text.")
    size, rate = number(int, 1, 2**31), number(float, 0)
    add = parser.add_argument_group("model").add_argument
    add("-c", "--context-length", type=size, help="tokens that the model sees (default: 64)")
    add("-d", "--d-model", type=size, default=64, help="width of the model")
    add("-l", "--n-layers", type=size, default=2, help="number of blocks")
    add("-h", "--n-heads", type=size, default=2, help="attention heads in a block")
    add("--tokenizer", default="char", help="char, vowel, or a folder with GPT-2's vocab.json")
    add("--vocab-size", type=size, default=2000, help="tokens of the vowel tokenizer")
    add("--init-from", type=Path, metavar="PATH", help="model to start from, and its tokenizer")
    add = parser.add_argument_group("training").add_argument
    add("-n", "--n-steps", type=size, default=50, help=f"steps of {steps.BATCHES_PER_STEP} batches")
    add("-b", "--batch-size", type=size, default=32, help="windows in a batch")
    add("--accumulate", type=size, default=1, help="parts to compute a batch in, to save memory")
    add("-r", "--learning-rate", type=rate, default=0.003, help="of AdamW")
    add("--warmup", type=number(int, 0), default=0, help="batches in which the rate rises to that")
    add("--decay", choices=["none", "cosine"], default="none", help="how the rate falls after it")
    add("--min-learning-rate", type=rate, default=0.0, help="where the decay ends")
    add("--weight-decay", type=rate, default=1e-4, help="of AdamW")
    add("--grad-clip", type=rate, help="the longest that a gradient may be (default: any length)")
    add("--dropout", type=number(float, 0, 1), help="share of values dropped (default: 0.2)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of matrix products")
    add("--validation-size", type=size, default=128, help="windows for the validation loss")
    add("-s", "--seed", type=number(int, 0, 2**63), default=0, help="of all random numbers")
    add("--workers", type=workers, metavar="N", help="processes that share a batch, or auto")
    add = parser.add_argument_group("files").add_argument
    add("-t", "--text-corpus", type=Path, default=CORPUS, help="text to train on, in UTF-8")
    add("-m", "--n-mega-bytes", type=size, help="use only the first N MiB of the text")
    add("-o", "--output-path", type=Path, help="folder for the model (default: a new one in .data)")
    add("-x", "--no-save", action="store_true", help="keep neither the model nor checkpoints")
    add("--format", choices=["tiny", "burn"], default="tiny", help="burn: a model for gpt-burn")
    add("--checkpoint-every", type=size, default=10, help="steps from one checkpoint to the next")
    add("--resume", type=Path, metavar="PATH", help="checkpoint to go on from, or a folder of them")
    arguments = parser.parse_args(words, copy.copy(settings))
    for whole, part in (("d_model", "n_heads"), ("batch_size", "accumulate")):
        if vars(arguments)[whole] % vars(arguments)[part]:
            parser.error(f"{flag(arguments, whole)} is not divisible by {flag(arguments, part)}")
    return arguments


def workers(text: str) -> int:
    return number(int, 1, 2**16)(str(distributed.count_workers(text)))


def flag(arguments: argparse.Namespace, name: str) -> str:
    return f"--{name.replace('_', '-')} {vars(arguments)[name]}"


def main() -> int:
    arguments = parse_arguments(sys.argv[1:])
    command_line.check_backend()
    world = distributed.World()
    if (arguments.workers or 1) > 1 and not world.is_under_mpi:
        return distributed.launch(arguments.workers, sys.argv)
    with world:
        return train(arguments, world)


def train(arguments: argparse.Namespace, world: distributed.World) -> int:
    resumed = source = tokenizer = None
    if arguments.resume:
        resumed = resume.load(arguments.resume) if world.rank == 0 else None
        # but for the tensors, which `copy_first` hands on
        light = world.from_first(resumed and replace(resumed, weights={}, moments={}))
        resumed = resumed or light
        tokenizer = resumed.tokenizer
        arguments = resumed_arguments(resumed.state["arguments"])
    if world.rank > 0:
        arguments.no_save = True
    elif arguments.output_path and not arguments.no_save and not resumed:
        checkpoint.check_destination(arguments.output_path)
    if arguments.init_from and not resumed:
        source, tokenizer = checkpoint.load(arguments.init_from)
    ids, tokenizer = read_corpus(arguments, tokenizer)
    if resumed:
        model_config = GPTConfig(**resumed.config["model"])
    else:
        model_config = make_model_config(arguments, tokenizer, source)
    if model_config.gpt2 and arguments.format == "burn":
        raise ValueError("--format burn: gpt-burn has no GPT-2")
    arguments.context_length = model_config.context_length
    config = make_config(arguments, model_config, tokenizer)
    check_sizes(arguments, model_config, ids)
    world.share(arguments.batch_size, "--batch-size", arguments.accumulate)
    corpus = checksum(ids)
    world.check_same(code=distributed.code(), corpus=corpus, command=sys.argv[1:])
    if resumed:
        resume.check(resumed, config, corpus)
        state, weights, latest = resumed.state, resumed.weights, resumed.folder
    else:
        state, latest = first_state(corpus), None
        weights = first_weights(model_config, source, arguments.seed) if world.rank == 0 else {}
        if not arguments.no_save:
            state["output_path"] = str(output_folder(arguments, model_config))
    state["arguments"] = [*state["arguments"], *sys.argv[1:]]
    if world.rank > 0:
        state["output_path"] = ""
    metrics = state["output_path"] and Metrics(Path(state["output_path"]), state["step"])
    print(bold("start training"), "- parameters:", model_config.n_parameters)
    print(json.dumps(config, indent=2), flush=True)

    model = GPT(model_config)
    parameters = steps.flat_parameters(model)
    optimizer = AdamW(parameters.whole, weight_decay=arguments.weight_decay)
    if world.rank == 0:
        parameters.write([weights[name] for name in model.parameters()])
        if resumed:
            steps.write_moments(optimizer, parameters, resumed.moments)
    source = weights = resumed = None  # their memory is needed
    world.copy_first([*parameters.whole, *optimizer.moments_1, *optimizer.moments_2])
    n_batches = steps.BATCHES_PER_STEP
    losses = zeros(n_batches)  # this rank's shares of them
    if world.rank == 0:
        put(losses, np.pad(np.float32(state["losses"]), (0, n_batches - state["batch"])))
    training_ids, validation_ids = np.split(ids, [len(ids) * 9 // 10])
    train_batch = steps.capture_training(
        model, optimizer, parameters, training_ids, losses, arguments, world
    )
    validation_loss = steps.capture_validation(model, validation_ids, arguments, world)

    def save(folder: Path, resumable: bool = False) -> None:
        nonlocal latest
        arrays = dict(zip(model.parameters(), parameters.read(), strict=True))
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError(diverged(latest))
        if not resumable:
            checkpoint.save(folder, config, arrays, tokenizer, arguments.format)
            return
        state["seconds"] = time.time() - started
        moments = steps.read_moments(optimizer, parameters, list(arrays))
        resume.save(folder, config, arrays, tokenizer, state, moments)
        if latest:
            resume.forget(latest)  # the newest one alone keeps what it takes to go on
        latest = folder

    started = time.time() - state["seconds"]
    with Interrupt(world) as interrupt:
        for step in range(state["step"], arguments.n_steps):
            # All random numbers come from the seed and the step: they have no state to be kept.
            rng = np.random.default_rng([arguments.seed, step])
            plan = steps.make_plan(arguments, optimizer, step, len(training_ids), rng, world)
            if state["batch"] == 0:
                state["validation_loss"] = validation_loss(rng)
                is_best = step > 0 and not state["validation_loss"] >= state["best_loss"]
                if state["output_path"] and is_best:
                    state["best_loss"] = state["validation_loss"]
                    save(Path(state["output_path"]) / "best")

            step_started, first, signal_number = time.time(), state["batch"], 0
            for batch in progress(range(first, n_batches), step, arguments, losses, world):
                train_batch(*plan, batch=batch)
                state["batch"] = batch + 1
                if signal_number := world.any(interrupt.signal):
                    break
            if signal_number:
                state["losses"] = world.sum(get(losses))[: state["batch"]].tolist()
                if not arguments.no_save:
                    save(resume.new_folder(step), resumable=True)
                    print(f"{bold('interrupted; to go on:')} python train.py --resume {latest}")
                return 128 + signal_number

            train_loss = float(world.sum(get(losses)).mean())
            if not math.isfinite(train_loss):
                raise ValueError(diverged(latest))
            elapsed = time.time() - started
            total = elapsed / (step + 1) * arguments.n_steps
            print(
                f"step {step + 1:>3}/{arguments.n_steps}: train loss: {train_loss:.4f}, "
                f"val loss: {state['validation_loss']:.4f} ({clock(elapsed)}/{clock(total)})",
                flush=True,
            )
            if metrics:
                tokens_per_batch = arguments.batch_size * arguments.context_length
                n_tokens, last = (n_batches - first) * tokens_per_batch, (step + 1) * n_batches
                metrics.append(
                    step=step + 1,
                    batch=last,
                    tokens=last * tokens_per_batch,
                    train_loss=train_loss,
                    validation_loss=state["validation_loss"],
                    learning_rate=steps.learning_rate(arguments, last),
                    tokens_per_second=n_tokens / (time.time() - step_started),
                    seconds=elapsed,
                )
            state.update(step=step + 1, batch=0, losses=[])
            if (step + 6) % arguments.checkpoint_every == 0 and not arguments.no_save:
                folder = resume.new_folder(step)
                print(bold(f"store checkpoint model to: {folder}"), flush=True)
                save(folder, resumable=True)

    if not arguments.no_save:
        print(bold(f"store trained model to: {state['output_path']}"), flush=True)
        save(Path(state["output_path"]))
        metrics.plot()
    print(bold("generate example text"), flush=True)
    if world.rank == 0:
        print_example(model, tokenizer, arguments.seed)
    return 0


def resumed_arguments(words: list[str]) -> argparse.Namespace:
    """The settings that a training began with, which those given now may only prolong."""
    began = parse_arguments(words)
    merged = parse_arguments(sys.argv[1:], began)
    for name, value in vars(merged).items():
        if name not in ("resume", "n_steps", "workers") and value != vars(began)[name]:
            raise ValueError(
                f"{flag(merged, name)} contradicts the training to go on with: "
                f"it has {flag(began, name)}"
            )
    if merged.n_steps < began.n_steps:
        raise ValueError(f"{flag(merged, 'n_steps')} is less than the {began.n_steps} of before")
    return merged


def read_corpus(arguments: argparse.Namespace, tokenizer=None):
    """The ids of the corpus, in the smallest dtype that holds them, and their tokenizer."""
    path = arguments.text_corpus
    size = min(arguments.n_mega_bytes or MAX_MEGA_BYTES, MAX_MEGA_BYTES) << 20
    if path == CORPUS and not path.exists():
        from pydoc_data.topics import topics

        print(f"{path} is missing: using the text of Python's own help", file=sys.stderr)
        file = io.BytesIO("\n\n".join(topics[name] for name in sorted(topics)).encode())
    else:
        if not path.exists():
            raise ValueError(f"there is no {path}: name a text with --text-corpus")
        file = path.open("rb")
    with file:
        if tokenizer is None and arguments.tokenizer == "vowel":
            tokenizer = tokenizers.SimpleVowelTokenizer.train(file, size, arguments.vocab_size)
            file.seek(0)
        elif tokenizer is None and arguments.tokenizer == "char":
            tokenizer = tokenizers.CharTokenizer()
        elif tokenizer is None:
            if not Path(arguments.tokenizer).is_dir():
                raise ValueError(
                    f"{flag(arguments, 'tokenizer')} is not known: "
                    "name char, vowel, or a folder with GPT-2's vocab.json and merges.txt"
                )
            tokenizer = tokenizers.BytePairTokenizer.load(Path(arguments.tokenizer))
        return tokenizer.encode_file(file, size), tokenizer


def checksum(ids: np.ndarray) -> int:
    return zlib.crc32(ids)


def make_model_config(arguments: argparse.Namespace, tokenizer, source: GPT | None) -> GPTConfig:
    """The sizes of the model, from the settings or those of the model to start from."""
    if source is None:
        return GPTConfig(
            context_length=arguments.context_length or 64,
            vocab_size=tokenizer.vocab_size,
            n_layers=arguments.n_layers,
            n_heads=arguments.n_heads,
            d_model=arguments.d_model,
            d_hidden=4 * arguments.d_model,
            dropout=0.2 if arguments.dropout is None else arguments.dropout,
        )
    longest = source.config.context_length
    if (arguments.context_length or 1) > longest:
        raise ValueError(f"{flag(arguments, 'context_length')} is beyond the model's {longest}")
    dropout = source.config.dropout if arguments.dropout is None else arguments.dropout
    return replace(
        source.config, context_length=arguments.context_length or longest, dropout=dropout
    )


def first_weights(config: GPTConfig, source: GPT | None, seed: int) -> dict[str, np.ndarray]:
    if source is None:
        return initial_weights(config, seed)
    weights = {n: p.numpy().astype(np.float32) for n, p in source.parameters().items()}
    positions = "positional_embedding.weight"
    weights[positions] = weights[positions][: config.context_length]
    return weights


def make_config(arguments: argparse.Namespace, model: GPTConfig, tokenizer) -> dict:
    """What `config.json` holds: gpt-burn's keys, and the tokenizer."""
    return {
        "n_steps": arguments.n_steps,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "batches_per_step": steps.BATCHES_PER_STEP,
        "validation_size": arguments.validation_size,
        "seed": arguments.seed,
        "model": {key: value for key, value in asdict(model).items() if value is not False},
        "optimizer": {
            "grad_clipping": arguments.grad_clip and {"Norm": arguments.grad_clip},
            "beta_1": 0.9,
            "beta_2": 0.999,
            "epsilon": 1e-5,
            "weight_decay": arguments.weight_decay,
        },
        "tokenizer": tokenizer.name,
    }


def check_sizes(arguments: argparse.Namespace, config: GPTConfig, ids: np.ndarray) -> None:
    """ValueError where the corpus is too short, or where the system would run out of memory, and
    end the training without a word."""
    n_validation = len(ids) - len(ids) * 9 // 10
    if n_validation <= config.context_length:
        raise ValueError(
            f"{arguments.text_corpus} is too short: its last tenth, {n_validation} tokens, is "
            f"for validation and has to exceed --context-length {config.context_length}"
        )
    activations = 16 * config.d_model + 3 * config.d_hidden  # floats a token and block
    activations += 4 * config.n_heads * config.context_length
    n_tokens = arguments.batch_size // arguments.accumulate * config.context_length
    n_floats = 4 * config.n_parameters  # with their gradients and two moments
    n_floats += n_tokens * (config.n_layers * activations + 4 * config.vocab_size)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * n_floats > memory:
        raise ValueError(
            f"training {config.n_parameters:,} parameters on {n_tokens:,} tokens at a time takes "
            f"about {4 * n_floats / 2**30:,.0f} GiB of memory, and there are "
            f"{memory / 2**30:,.0f}: choose a smaller model, --context-length or --batch-size"
        )


def first_state(corpus_checksum: int) -> dict:
    """Where a training stands, in numbers that JSON can hold."""
    return {
        "step": 0,
        "batch": 0,  # within the step
        "losses": [],  # of the batches of this step
        "validation_loss": 0.0,
        "best_loss": sys.float_info.max,
        "seconds": 0.0,
        "output_path": "",
        "corpus_checksum": corpus_checksum,
        "arguments": [],
    }


def output_folder(arguments: argparse.Namespace, config: GPTConfig) -> Path:
    if arguments.output_path:
        arguments.output_path.mkdir(parents=True, exist_ok=True)
        return arguments.output_path
    name = f"gpt_{config.n_parameters >> 10}k_{config.context_length}context_{int(time.time())}"
    return resume.claim(Path(".data") / name)


def progress(batches: range, step: int, arguments: argparse.Namespace, losses: Tensor, world):
    """The batches, with a bar on a terminal."""
    is_shown = world.rank == 0 and (sys.stderr.isatty() or world.columns)
    bar = tqdm(
        batches,
        f"step {step + 1}/{arguments.n_steps}",
        total=steps.BATCHES_PER_STEP,
        initial=batches.start,
        disable=not is_shown,
        leave=False,
        ncols=world.columns,
        dynamic_ncols=not world.columns,
        bar_format="{desc} {bar} {n_fmt}/{total_fmt}{postfix}",
    )
    started = shown = time.time()
    for batch in bar:
        yield batch
        if not bar.disable and (now := time.time()) > shown + 0.5:  # a look at the loss waits
            shown, n_batches = now, batch + 1 - batches.start
            rate = n_batches * arguments.batch_size * arguments.context_length / (now - started)
            loss = get(losses)[batch] * world.size  # of this rank's share
            bar.set_postfix_str(f"loss {loss:.4f} {rate:,.0f} tokens/s", refresh=False)


class Metrics:
    """A training's `metrics.csv`, a row a step, and `loss.png` where matplotlib is installed."""

    columns = "step,batch,tokens,train_loss,validation_loss,learning_rate,tokens_per_second,seconds"

    def __init__(self, folder: Path, n_steps: int):
        """Keeps the rows of the first `n_steps` steps, if there are any."""
        self.path = folder / "metrics.csv"
        rows = self.path.read_text().splitlines()[1 : n_steps + 1] if n_steps else []
        checkpoint.write_file(self.path, "\n".join([self.columns, *rows, ""]).encode())

    def append(self, **row: float) -> None:
        with self.path.open("a") as file:
            file.write(",".join(f"{row[column]:.6g}" for column in self.columns.split(",")) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def plot(self) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        with self.path.open() as file:
            rows = list(csv.DictReader(file))
        axes = (figure := Figure()).add_subplot(xlabel="tokens", ylabel="loss (nats a token)")
        for column in ("train_loss", "validation_loss"):
            axes.plot(*([float(row[name]) for row in rows] for name in ("tokens", column)))
        axes.legend(["training", "validation"])
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        checkpoint.write_file(self.path.with_name("loss.png"), picture.getvalue())


class Interrupt:
    """Notes Ctrl-C and SIGTERM, for the batch in flight to end first; a second one ends at once,
    but for workers, whom only all together can end."""

    def __init__(self, world: distributed.World):
        self.world = world

    def __enter__(self):
        self.signal = 0
        self.previous = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame) -> None:
        self.signal = number
        if self.world.size == 1:
            self.__exit__()

    def __exit__(self, *exception) -> None:
        for interrupt, handler in self.previous.items():
            signal.signal(interrupt, handler)


def diverged(latest: Path | None) -> str:
    return (
        "the loss or a parameter is no longer a finite number: try a lower --learning-rate, or "
        f"--grad-clip 1; the last good checkpoint: {latest or 'none'}"
    )


def print_example(model: GPT, tokenizer, seed: int) -> None:
    rng = np.random.default_rng(seed)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    prompt = tokenizer.encode("\n")[None].astype(np.int32)
    for new in Generator(model)(prompt, 200, lambda logits: sample(logits, 1.0, rng)):
        print(decoder.decode(tokenizer.token_bytes(int(new[0]))), end="", flush=True)
    print(decoder.decode(b"", final=True))


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"


if __name__ == "__main__":
    command_line.run(main)
