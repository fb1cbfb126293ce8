"""Trains a GPT on a text: python train.py -t my.txt."""

import argparse
import codecs
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

import command_line
from backend import devices
from backend.cpu import gemm
from backend.errors import UserError
from backend.matmul import blas
from command_line import bold, number
from inference.generator import Generator, sample
from models import checkpoint, find_tokenizer, folders
from training import resume, trainer, workers
from training.config import TrainingConfig, changed, flat
from training.metrics import plot
from training.state import MARKS, Start, Training, begin, read_corpus

DEFAULTS = TrainingConfig()
ROUNDED_ONLY = (
    "warning: --dtype bfloat16: there are no fast products of it here, so operands are rounded and "
    "multiplied in float32"
)
# what may change when a training goes on; a corpus that has moved is known by its checksum
MAY_CHANGE = {"n_steps", "text_corpus", "output_path"}


def make_parser(defaults: TrainingConfig) -> command_line.ArgumentParser:
    parser = command_line.ArgumentParser("Train a GPT on a text.")
    size, rate = number(int, 1, 2**31), number(float, 0)
    add = parser.add_argument_group("model").add_argument
    add("-c", "--context-length", type=size, help="tokens that the model sees")
    add("-d", "--d-model", type=size, help="width of the model")
    add("-l", "--n-layers", type=size, help="number of blocks")
    add("-h", "--n-heads", type=size, help="attention heads in a block")
    add("--tokenizer", help="char, vowel, or GPT-2's: a folder, or gpt2")
    add("--vocab-size", dest="max_vocab_size", type=size, help="tokens of the vowel tokenizer")
    add("--init-from", type=Path, metavar="PATH", help="model to start from: its folder, or gpt2")
    add = parser.add_argument_group("training").add_argument
    add("-n", "--n-steps", type=size, help=f"steps of {defaults.batches_per_step} batches")
    add("-b", "--batch-size", type=size, help="windows in a batch")
    add("--accumulate", type=size, help="parts to compute a batch in, to save memory")
    optimizer_help = "muon: Muon for the blocks' matrices, AdamW for all else"
    add("--optimizer", dest="algorithm", choices=["adamw", "muon"], help=optimizer_help)
    add("-r", "--learning-rate", type=rate, help="of AdamW")
    add("--warmup", type=number(int, 0), help="batches in which the rate rises to that")
    add("--decay", choices=["none", "cosine"], help="how the rate falls after it")
    add("--min-learning-rate", type=rate, help="where the decay ends")
    muon_help = "of Muon; it rises, and decays to the same share of itself, as AdamW's"
    add("--muon-learning-rate", type=rate, help=muon_help)
    add("--weight-decay", type=rate, help="of AdamW and Muon")
    clip_help = "the longest that a gradient may be (default: any length)"
    add("--grad-clip", dest="grad_clipping", type=rate, help=clip_help)
    add("--dropout", type=number(float, 0, 1), help="share of values dropped")
    add("--dtype", choices=["float32", "bfloat16"], help="of matrix products")
    add("--validation-size", type=size, help="windows for the validation loss")
    add("-s", "--seed", type=number(int, 0, 2**63), help="of all random numbers")
    add("--workers", type=worker_count, metavar="N", help="processes that share a batch, or auto")
    add = parser.add_argument_group("files").add_argument
    text_help = "text in UTF-8: a file, also .gz, .bz2 or .xz, a folder of .txt, or - for standard "
    text_help += "input; several are joined (default: .data/corpus.txt)"
    add("-t", "--text-corpus", type=Path, action=Texts, help=text_help)
    add("-m", "--n-mega-bytes", type=size, help="use the first N MiB (default: 999)")
    add("-o", "--output-path", type=Path, help="folder for the model (default: a new one in .data)")
    add("-x", "--no-save", action="store_true", help="keep neither the model nor checkpoints")
    add("--format", choices=["tiny", "burn"], help="burn: a model for gpt-burn")
    add("--checkpoint-every", type=size, help="steps from one checkpoint to the next")
    add("--resume", type=Path, metavar="PATH", help="checkpoint to go on from, or a folder of them")
    parser.set_defaults(**flat(defaults))
    return parser


class Texts(argparse.Action):
    """Gathers the texts of a command line in the place of the default."""

    def __call__(self, parser, namespace, value, flag=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, (*(() if before is self.default else before), value))


def worker_count(text: str) -> int:
    return number(int, 1, 2**16)(str(workers.count_workers(text)))


def configure(words: list[str], began: TrainingConfig | None = None) -> TrainingConfig:
    """The settings that the words give, and for others those of `began` or the defaults."""
    began = began or DEFAULTS
    parser = make_parser(began)
    settings = vars(parser.parse_args(words))
    for whole, part in (("d_model", "n_heads"), ("batch_size", "accumulate")):
        if settings[whole] % settings[part]:
            given, divisor = (flag(name, settings[name]) for name in (whole, part))
            parser.error(f"{given} is not divisible by {divisor}")
    if settings["d_model"] != began.model.d_model:
        settings["d_hidden"] = 4 * settings["d_model"]
    return changed(began, settings)


def flag(name: str, value: object) -> str:
    """A setting as one writes it."""
    given = {"grad_clipping": "grad_clip", "max_vocab_size": "vocab_size", "algorithm": "optimizer"}
    return f"--{given.get(name, name).replace('_', '-')} {value}"


def refuse_contradictions(
    config: TrainingConfig, began: TrainingConfig, names: Iterable[str], source: str
) -> None:
    """ValueError if one of these settings is not the one that `source` has."""
    now, before = flat(config), flat(began)
    for name in names:
        if now[name] != before[name]:
            raise UserError(
                f"{flag(name, now[name])} contradicts {source}: it has {flag(name, before[name])}"
            )


def main() -> int:
    words = sys.argv[1:]
    options = make_parser(DEFAULTS).parse_args(words)
    start = Start()
    if not (options.resume or options.init_from):
        config = configure(words)  # first: what is wrong ends here, and not on each of the workers
    devices.check()
    world = workers.World(command_line.explain)
    if (options.workers or 1) > 1 and not world.is_under_mpi:
        return workers.launch(options.workers, sys.argv)
    with world:
        if options.resume:
            config, start = from_checkpoint(options.resume, words, world)
        elif options.init_from:
            config, start = from_model(options.init_from, words)
        start.position.arguments += words
        if config.files.output_path and not config.files.no_save and world.rank == 0:
            folders.check_destination(config.files.output_path, MARKS)
        text = read_corpus(config, start.tokenizer, world)
        start.position.texts = list(map(str, config.files.text_corpus))
        training = begin(config.with_tokenizer(text.tokenizer), text, start, world)
        return run(training, world)


def from_checkpoint(
    path: Path, words: list[str], world: workers.World
) -> tuple[TrainingConfig, Start]:
    """The settings that a training began with, which the words may only prolong or move."""
    saved = resume.load(path) if world.rank == 0 else None
    # but for the tensors, which rank 0 hands on when there is a place for them
    light = world.broadcast(saved and replace(saved, weights={}, moments={}))
    start = saved or light
    # The model's sizes stand in its config: those in the words may be defaults, beside --init-from.
    model = start.config["model"]
    began = changed(configure(start.position.arguments, changed(DEFAULTS, model)), model)
    if texts := start.position.texts:
        began = changed(began, {"text_corpus": tuple(map(Path, texts))})
    config = configure(words, began)
    names = [name for name in flat(began) if name not in MAY_CHANGE]
    refuse_contradictions(config, began, names, "the training to go on with")
    if config.n_steps < began.n_steps:
        steps = flag("n_steps", config.n_steps)
        raise UserError(f"{steps} is less than the {began.n_steps} of before")
    return config, start


def from_model(path: Path, words: list[str]) -> tuple[TrainingConfig, Start]:
    """The model's own sizes and tokenizer, but for a shorter context; its weights in float32."""
    model, tokenizer = checkpoint.load(path)
    own = {"tokenizer": tokenizer.name, "max_vocab_size": tokenizer.vocab_size}
    began = changed(DEFAULTS, flat(model.config) | own)
    config = configure(words, began)
    if tokenizer.name == "bpe" and config.tokenizer not in ("bpe", "char", "vowel"):
        given = find_tokenizer(config.tokenizer)
        if given.tokens == tokenizer.tokens:
            config = replace(config, tokenizer=tokenizer.name)
    names = ("d_model", "n_layers", "n_heads", *own)
    refuse_contradictions(config, began, names, "the model to start from")
    longest, context_length = model.config.context_length, config.model.context_length
    if context_length > longest:
        given = flag("context_length", context_length)
        raise UserError(f"{given} is beyond the model's {longest}")
    if config.model.gpt2 and config.files.format == "burn":
        raise UserError("--format burn: gpt-burn has no GPT-2")
    weights = {name: p.numpy().astype(np.float32) for name, p in model.parameters().items()}
    positions = "positional_embedding.weight"
    weights[positions] = weights[positions][:context_length]
    return config, Start(tokenizer, weights)


def run(training: Training, world: workers.World) -> int:
    config, folder = training.config, Path(training.position.output_path)
    is_on_cpu = devices.in_use().startswith("CPU")
    if config.dtype == "bfloat16" and is_on_cpu and not (blas() and gemm.sbgemm()):
        print(ROUNDED_ONLY, file=sys.stderr)
    parameters = f"parameters: {config.model.n_parameters}, device: {devices.in_use()}"
    print(bold("start training"), "-", parameters)
    print(json.dumps(config.picture(), indent=2), flush=True)
    signal_number = trainer.train(training, world, announce)
    if signal_number:
        if training.is_kept:
            command = f"python train.py --resume {training.latest}"
            print(bold("interrupted; to go on:"), command, flush=True)
        return 128 + signal_number
    if training.is_kept:
        announce(f"store trained model to: {folder}")
        training.save_model(folder)
        plot(training)
    announce("generate example text")
    if world.rank == 0:
        print_example(training)
    return 0


def announce(text: str) -> None:
    print(bold(text), flush=True)


def print_example(training: Training) -> None:
    tokenizer, rng = training.corpus.tokenizer, np.random.default_rng(training.config.seed)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    prompt = tokenizer.encode("\n")[None].astype(np.int32)
    generator = Generator(training.model)
    for new in generator(prompt, 200, lambda logits: sample(logits, 1.0, rng)):
        print(decoder.decode(tokenizer.token_bytes(int(new[0]))), end="", flush=True)
    print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    command_line.run(main)
