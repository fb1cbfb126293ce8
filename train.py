"""Trains a GPT on a text: python train.py -t my.txt."""

import command_line  # isort: skip - first, for the time of the imports

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

import tokenizers
from backend import devices
from backend.cpu import native
from backend.errors import UserError
from command_line import bold, dim, number
from data import ids
from data.ids import Corpus
from inference.generator import Generator, sample
from inference.stream import TextStream, added_texts
from models import folders
from models.checkpoint import find_tokenizer
from training import checkpoint, metrics
from training.checkpoint import Checkpoint
from training.checks import check
from training.config import (
    DEFAULT_SETTINGS,
    DEFAULTS,
    TRAINING,
    TrainingConfig,
    as_option,
    changed,
    flat,
    merge,
)
from training.launch import count_workers, launch
from training.trainer import Trainer, output_folder
from training.workers import World

ROUNDED_ONLY = (
    "warning: --dtype bfloat16: there are no fast products of it here, so operands are rounded and "
    "multiplied in float32"
)


def main() -> int:
    parser = make_parser()
    given = parser.parse_given(sys.argv[1:])
    n_workers = given.pop("workers", 1)
    with World(command_line.explain) as world:
        start = find_start(given, parser, world)
        config = resolve(start, given, parser)
        if n_workers != 1 and not world.is_under_mpi and (n := count_workers(n_workers)) > 1:
            return launch(n, sys.argv)
        world.take_device()
        if config.files.output_path and not config.files.no_save and world.rank == 0:
            folders.check_destination(config.files.output_path, checkpoint.MARKS)
        corpus = read_corpus(config, start.tokenizer, world)
        tokenizer = corpus.tokenizer
        config = changed(config, {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size})
        check(config, corpus, world)
        with output_folder(config, world.rank) as folder:
            trainer = Trainer(config, corpus, start, folder, world)
            print_start(config)
            signal_number = trainer.train(announce, print_sample)
            return finish(trainer, signal_number)


def make_parser() -> command_line.ArgumentParser:
    parser = command_line.ArgumentParser("Train a GPT on a text.", **DEFAULT_SETTINGS)
    size, rate = number(int, 1, 2**31), number(float, 0)
    add = parser.add_argument_group("model").add_argument
    add("-c", "--context-length", type=size, help="tokens that the model sees")
    add("-d", "--d-model", type=size, help="width of the model")
    add("-l", "--n-layers", type=size, help="number of blocks")
    add("-h", "--n-heads", type=size, help="attention heads in a block")
    add("--tokenizer", help="char, vowel, bpe, or GPT-2's: a folder, or gpt2")
    vocab_help = "tokens that it learns (default: vowel 2000, bpe 4096, char all that it needs)"
    add("--vocab-size", dest="max_vocab_size", type=size, help=vocab_help)
    add("--init-from", type=Path, metavar="PATH", help="model to start from: its folder, or gpt2")
    add = parser.add_argument_group("training").add_argument
    add("-n", "--n-steps", type=size, help=f"steps of {DEFAULTS.batches_per_step} batches")
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
    clip_help = "the largest norm of a gradient (default: any)"
    add("--grad-clip", dest="grad_clipping", type=rate, help=clip_help)
    add("--dropout", type=number(float, 0, 1), help="share of values dropped")
    add("--dtype", choices=["float32", "bfloat16"], help="of matrix products")
    add("--validation-size", type=size, help="windows for the validation loss")
    add("-s", "--seed", type=number(int, 0, 2**63), help="of all random numbers")
    add("--workers", type=worker_count, metavar="N", help="processes that share a batch, or auto")
    add = parser.add_argument_group("files").add_argument
    text_help = "text in UTF-8: a file, or .jsonl with a text in each line, also .gz, .bz2 or .xz, "
    text_help += "a folder of such .txt and .jsonl, or - for standard input; several are joined "
    text_help += "(default: .data/corpus.txt)"
    add("-t", "--text-corpus", type=Path, action="append", help=text_help)
    special_help = "take <|endoftext|> for text like any other, and put none after documents"
    add("--no-special", action="store_true", help=special_help)
    add("-m", "--n-mega-bytes", type=size, help="use the first N MiB (default: 999)")
    add("-o", "--output-path", type=Path, help="folder for the model (default: a new one in .data)")
    add("-x", "--no-save", action="store_true", help="keep neither the model nor checkpoints")
    add("--format", choices=["tiny", "burn"], help="burn: a model for gpt-burn")
    add("--checkpoint-every", type=size, help="steps from one checkpoint to the next")
    add("--sample-every", type=size, help="steps from one look at what it writes to the next")
    add("--resume", type=Path, metavar="PATH", help="checkpoint to go on from, or a folder of them")
    return parser


def worker_count(text: str) -> int | str:
    return text if text == "auto" else number(int, 1, 2**16)(text)


def find_start(
    given: dict[str, object], parser: command_line.ArgumentParser, world: World
) -> Checkpoint:
    """A checkpoint, a model, or the default settings. Only rank 0 has a checkpoint's arrays, which
    the trainer broadcasts."""
    if path := given.pop("resume", None):
        saved = checkpoint.load(path, parser.parse_given) if world.rank == 0 else None
        if world.size == 1:
            return saved
        without_arrays = world.ranks.bcast(saved and replace(saved, weights={}, moments={}))
        return saved or without_arrays
    if path := given.get("init_from"):
        return checkpoint.from_model(path, given.get("context_length"))
    return Checkpoint(DEFAULTS)


def resolve(
    start: Checkpoint, given: dict[str, object], parser: command_line.ArgumentParser
) -> TrainingConfig:
    """The start's config with the given settings; UserError if these contradict the start."""
    name, before = given.get("tokenizer"), start.config
    is_path = start.tokenizer and name not in (None, before.tokenizer, *tokenizers.TOKENIZERS)
    if is_path and find_tokenizer(name).digest() == start.tokenizer.digest():
        given["tokenizer"] = before.tokenizer  # the same under another name
    settings = flat(before) | given
    for whole, part in (("d_model", "n_heads"), ("batch_size", "accumulate")):
        if settings[whole] % settings[part]:
            options = [as_option(name, settings[name]) for name in (whole, part)]
            parser.error(" is not divisible by ".join(options))
    config = merge(before, given, start.kind)
    if start.kind == TRAINING and config.n_steps < before.n_steps:
        option = as_option("n_steps", config.n_steps)
        raise UserError(f"{option} is less than the {before.n_steps} of before")
    if config.model.gpt2 and config.files.format == "burn":
        raise UserError("--format burn: gpt-burn has no GPT-2")
    if config.files.format == "burn" and not getattr(start.tokenizer, "is_gpt_burns", True):
        raise UserError("--format burn: gpt-burn has no other characters than its own")
    return config


def read_corpus(
    config: TrainingConfig, tokenizer: tokenizers.Tokenizer | None, world: World
) -> Corpus:
    """The ids of the texts, by the given tokenizer or the config's; one rank of each machine reads
    the texts for all its ranks."""
    files, name = config.files, config.tokenizer
    paths, n_bytes = files.text_corpus, files.n_mega_bytes and files.n_mega_bytes << 20
    tokenizer = tokenizer or tokenizers.TOKENIZERS.get(name) or find_tokenizer(name)
    if tokenizer is tokenizers.CharTokenizer and files.format == "burn":
        tokenizer = tokenizers.CharTokenizer()  # gpt-burn has no other characters
    options = {"keep": not files.no_save, "bar": world.bar, "special": not config.no_special}
    read = partial(ids.read, paths, n_bytes, tokenizer, config.max_vocab_size, **options)
    for _ in range(9):  # another training may drop the ids before all ranks have mapped them
        corpus = world.broadcast_on_machine(read)
        if not world.max(corpus.ids is None):
            if corpus.temporary:  # a mapped file is read on when it is deleted
                corpus.temporary.cleanup()
            return corpus
    raise UserError(f"other trainings drop all ids in {ids.FOLDER}: start this one anew")


def print_start(config: TrainingConfig) -> None:
    device, settings = devices.in_use(), json.dumps(config.to_json(), indent=2)
    is_on_cpu = device.startswith("CPU")
    if config.dtype == "bfloat16" and is_on_cpu and not (native.blas() and native.load("sbgemm")):
        print(ROUNDED_ONLY, file=sys.stderr)
    print(bold("start training"), f"- parameters: {config.model.n_parameters}, device: {device}")
    print(settings, flush=True)


def finish(trainer: Trainer, signal_number: int) -> int:
    """Saves the model and prints an example of its text, or how to resume an interrupted training;
    returns the exit status."""
    if signal_number:
        if trainer.folder:
            command = f"python train.py --resume {trainer.latest}"
            print(bold("interrupted; to go on:"), command, flush=True)
        return 128 + signal_number
    if trainer.folder:
        announce(f"store trained model to: {trainer.folder}")
        trainer.save_model(trainer.folder)
        metrics.plot(trainer.folder)
    announce("generate example text")
    if trainer.world.rank == 0:
        print_example(trainer)
    return 0


def announce(text: str) -> None:
    print(bold(text), flush=True)


def print_example(trainer: Trainer) -> None:
    for text in generate(trainer, trainer.corpus.tokenizer.encode("\n"), 200):
        print(text, end="", flush=True)
    print()


def print_sample(trainer: Trainer) -> None:
    """Prints the first tokens of the texts and the model's continuation."""
    start = trainer.corpus.ids[:16]
    texts = trainer.corpus.tokenizer.decode(start), *generate(trainer, start, 100)
    print(dim("".join(texts)), flush=True)


def generate(trainer: Trainer, prompt: np.ndarray, n_new_tokens: int) -> Iterator[str]:
    """prompt (n,) of ids -> pieces of the continuation, sampled with the training's seed."""
    tokenizer, rng = trainer.corpus.tokenizer, np.random.default_rng(trainer.config.seed)
    excluded = tokenizer.excluded
    tokens = Generator(trainer.model)(
        prompt[None].astype(np.int32),
        n_new_tokens,
        lambda logits: sample(logits, 1.0, rng, excluded=excluded),
    )
    return (text for [text] in added_texts(tokens, [TextStream(tokenizer)]))


if __name__ == "__main__":
    command_line.run(main, outlives_reader=True)
