"""Continues a text with a trained model: python run.py model_83M -p "Once upon a time".

With --score it measures how well the model predicts a text.
"""

import command_line  # isort: skip - first, for the time of the imports

import argparse
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

import tokenizers
from backend import devices
from backend.errors import UserError, not_utf8
from backend.quantized import QMAX
from command_line import add_text_options, bold, number
from gpt_tiny import GPT
from inference.generator import Generator, quantize, sample
from inference.stream import TextStream, added_texts
from models import checkpoint, folders


def parse_arguments() -> argparse.Namespace:
    parser = command_line.ArgumentParser("Continue a text with a trained GPT.")
    parser.usage = "python %(prog)s [MODEL_PATH] [OPTION]..."
    model_help = "folder of a model, or its name on the Hub, as gpt2 (default: the newest in .data)"
    add = parser.add_argument
    add("model_path", type=Path, nargs="?", help=model_help)
    score_help = "say how well the model predicts a text, as train.py -t takes it, in bits per byte"
    add("--score", type=Path, metavar="TEXT_FILE", help=score_help)
    samples_help = "continuations, generated side by side"
    add("--n-samples", type=number(int, 1, 2**31), default=1, help=samples_help)
    weights_help = "round the weights: less memory, more speed (default: as they are stored)"
    add("--weights", choices=QMAX, help=weights_help)
    add_text_options(parser)
    arguments = parser.parse_args()
    if arguments.stop == "":
        parser.error("--stop is empty: give at least one character")
    if arguments.stop is not None:
        arguments.stop = decode_surrogates(arguments.stop, "--stop")
    scoring_options = ("model_path", "score", "no_special", "weights")
    for name, value in vars(arguments).items():
        is_default = name in scoring_options or value == parser.get_default(name)
        if arguments.score and not is_default:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} is of no use beside --score, which writes no text: leave it out")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    devices.check()
    if sys.stderr.isatty():
        print(f"device: {devices.in_use()}", file=sys.stderr)
    path = arguments.model_path
    if path is None:
        path = folders.newest(Path(".data"))
        print(f"model: {path}", file=sys.stderr)
    model, tokenizer = checkpoint.load(path)
    if arguments.no_special:
        tokenizer.specials = {}
    if arguments.weights:
        quantize(model, arguments.weights)
    if arguments.score:
        score(model, tokenizer, arguments.score)
    else:
        generator = Generator(model, arguments.n_samples, arguments.stride)
        rng = np.random.default_rng(arguments.seed)
        for prompt in prompts(arguments.prompt, arguments.interactive):
            generate(prompt, generator, tokenizer, rng, arguments)


def generate(
    prompt: str,
    generator: Generator,
    tokenizer: tokenizers.Tokenizer,
    rng: np.random.Generator,
    arguments: argparse.Namespace,
) -> None:
    """Prints the prompt with one continuation token by token, or with several at the end."""
    n_samples = arguments.n_samples
    ids = np.tile(encode_prompt(prompt, tokenizer), (n_samples, 1)).astype(np.int32)
    sampling = arguments.temperature, rng, arguments.top_k, arguments.top_p, tokenizer.excluded
    tokens = generator(ids, arguments.n_new_tokens, lambda logits: sample(logits, *sampling))
    shown = "" if arguments.interactive else bold(prompt)
    streams = (TextStream(tokenizer, arguments.stop) for _ in range(n_samples))
    added = chain([[shown] * n_samples], added_texts(tokens, streams))
    if n_samples == 1:
        for [text] in added:
            print(text, end="", flush=True)
        print(flush=True)
    else:
        print("\n".join(map("".join, zip(*added, strict=True))), flush=True)


def encode_prompt(prompt: str, tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """ids (n,) of the prompt; an empty prompt begins a document, UserError if none can begin."""
    if not prompt:
        if tokenizer.end is None:
            raise UserError("the prompt is empty: give at least one character")
        return np.array([tokenizer.end])
    unknown = tokenizers.Unknown()
    ids = tokenizer.encode(prompt, unknown)
    unknown.warn("the prompt")
    return ids


def prompts(prompt: str, is_interactive: bool) -> Iterator[str]:
    """Yields the prompt ("-": all of standard input) or, interactively, each line of the input."""
    if hasattr(sys.stdin, "reconfigure"):  # UTF-8 and any system's line breaks, on every system
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape", newline=None)
    mark = "\ufeff"  # "utf-8-sig" would also drop half a byte order mark
    if not is_interactive:
        prompt = sys.stdin.read().removeprefix(mark) if prompt == "-" else prompt
        yield decode_surrogates(prompt, "the prompt")
        return
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            return
        if line := line.removeprefix(mark).rstrip("\n"):
            yield decode_surrogates(line, "the prompt")
        mark = ""


def decode_surrogates(text: str, name: str) -> str:
    """Decodes the surrogates that stand for bytes in `text`; UserError if these are not UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        raise not_utf8(error, name) from None
    except UnicodeEncodeError:  # an argument on Windows may hold one
        raise UserError(f"{name} holds half a surrogate pair, which is no character") from None


def score(model: GPT, tokenizer: tokenizers.Tokenizer, path: Path) -> None:
    # imported here: generation needs none of it, and starts faster
    from tqdm import tqdm

    from data.texts import Texts
    from inference.scoring import Score, known_ids, losses

    texts = Texts([path], "--score")
    ids, unknown = known_ids(tokenizer, texts.read(end=tokenizer.document_end))
    unknown.warn(texts.name, " and left out")
    total = Score(tokenizer)
    with tqdm(
        desc="score",
        total=max(0, len(ids) - 1),
        unit=" tokens",
        unit_scale=True,
        disable=None,  # unless standard error is a terminal
        leave=False,
        dynamic_ncols=True,
        bar_format="{desc} {bar} {percentage:.0f} % {rate_fmt}",
    ) as bar:
        for counted, nats in losses(model, ids):
            total.add(counted, nats)
            bar.update(len(counted))
    if not total.n_characters:
        raise UserError(f"{texts.name} is too short to be scored: give it two characters or more")
    print(
        f"{total.bits / total.n_bytes:.4f} bits per byte, "
        f"{total.bits / total.n_characters:.4f} bits per character, "
        f"perplexity {total.perplexity:.2f}, {total.n_tokens} tokens"
    )


if __name__ == "__main__":
    command_line.run(main)
