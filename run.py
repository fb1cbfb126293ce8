"""Continues a text with a trained model: python run.py model_83M -p "Once upon a time".

With --score it says instead how well the model predicts a text.
"""

import argparse
import codecs
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

import command_line
from backend import devices
from backend.errors import UserError
from backend.quantized import QMAX
from command_line import add_text_options, bold, number
from data.texts import Texts
from gpt_tiny import GPT
from inference.generator import Generator, quantize, sample
from inference.scoring import Score, known_ids, losses
from models import checkpoint, folders
from tokenizers import NotUTF8, Tokenizer


def parse_arguments() -> argparse.Namespace:
    parser = command_line.ArgumentParser("Continue a text with a trained GPT.")
    parser.usage = "python %(prog)s [MODEL_PATH] [OPTION]..."
    model_help = "folder of a model, or its name on the Hub, as gpt2 (default: the newest in .data)"
    add, count = parser.add_argument, number(int, 1, 2**31)
    add("model_path", type=Path, nargs="?", help=model_help)
    score_help = "say how well the model predicts a text, as train.py -t takes it, in bits per byte"
    add("--score", type=Path, metavar="TEXT_FILE", help=score_help)
    add("--n-samples", type=count, default=1, help="continuations, generated side by side")
    weights_help = "round the weights: less memory, more speed (default: as they are stored)"
    add("--weights", choices=QMAX, help=weights_help)
    add_text_options(parser)
    arguments = parser.parse_args()
    if arguments.stop == "":
        parser.error("--stop is empty: give at least one character")
    if arguments.stop is not None:
        arguments.stop = in_utf8(arguments.stop, "--stop")
    of_use = ("model_path", "score", "weights")
    for name, value in vars(arguments).items():
        if arguments.score and name not in of_use and value != parser.get_default(name):
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
    if arguments.score:
        if arguments.weights:
            quantize(model, arguments.weights)
        score(model, tokenizer, arguments.score)
    else:
        generate(model, tokenizer, arguments)


def generate(model: GPT, tokenizer: Tokenizer, arguments: argparse.Namespace) -> None:
    generator = Generator(model, arguments.n_samples, arguments.stride, arguments.weights)
    rng = np.random.default_rng(arguments.seed)

    def choose(logits: np.ndarray) -> np.ndarray:
        if tokenizer.unknown is not None:
            logits[:, tokenizer.unknown] = -np.inf  # it stands for no text
        return sample(logits, arguments.temperature, rng, arguments.top_k, arguments.top_p)

    for prompt in prompts(arguments.prompt, arguments.interactive):
        if not prompt:
            raise UserError("the prompt is empty: give at least one character")
        ids = tokenizer.encode(prompt)
        warn_of_unknown(int((ids == tokenizer.unknown).sum()), "the prompt")
        batch = np.tile(ids.astype(np.int32), (arguments.n_samples, 1))
        tokens = (new.tolist() for new in generator(batch, arguments.n_new_tokens, choose))
        continuations = [Continuation(tokenizer, arguments.stop) for _ in batch]
        shown = "" if arguments.interactive else bold(prompt)
        texts, is_one = [shown] * len(batch), len(batch) == 1
        if is_one:
            print(shown, end="", flush=True)
        for new in chain(tokens, [[None] * len(batch)]):
            added = [one.add(token) for one, token in zip(continuations, new, strict=True)]
            if is_one:
                print(added[0], end="", flush=True)
            else:
                texts = [text + more for text, more in zip(texts, added, strict=True)]
            if all(one.has_ended for one in continuations):
                break
        print("" if is_one else "\n".join(texts), flush=True)


def warn_of_unknown(n_tokens: int, source: str, what_happens: str = "") -> None:
    if n_tokens:
        warning = f"warning: {n_tokens} tokens of {source} are not in the vocabulary{what_happens}"
        print(warning, file=sys.stderr)


def prompts(prompt: str, is_interactive: bool) -> Iterator[str]:
    if hasattr(sys.stdin, "reconfigure"):  # UTF-8 and any system's line breaks, on every system
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape", newline=None)
    if not is_interactive:
        yield in_utf8(sys.stdin.read() if prompt == "-" else prompt, "the prompt")
        return
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line := line.rstrip("\n"):
            yield in_utf8(line, "the prompt")


def in_utf8(text: str, name: str) -> str:
    """The text, in which Python has half a surrogate pair for each byte that it could not decode.

    NotUTF8 where these bytes are not UTF-8.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        raise NotUTF8(error.object[error.start], error.start, name) from None
    except UnicodeEncodeError:  # Windows has such words
        raise UserError(f"{name} holds half a surrogate pair, which is no character") from None


class Continuation:
    """The text of new tokens, as far as it is certain: whole characters, and not the stop text."""

    def __init__(self, tokenizer, stop: str | None):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held, self.has_ended = "", False

    def add(self, token: int | None) -> str:
        """What is certain now that this token has come, or that none (None) will."""
        if self.has_ended:
            return ""
        self.has_ended = token is None or token in self.tokenizer.ends
        data = b"" if self.has_ended else self.tokenizer.token_bytes(token)
        text, n_held = self.held + self.decoder.decode(data, final=self.has_ended), 0
        if self.stop and self.stop in text:
            text, self.has_ended = text.partition(self.stop)[0], True
        elif self.stop and not self.has_ended:  # its beginning may be at the end of the text
            lengths = range(len(self.stop) - 1, 0, -1)
            n_held = next((n for n in lengths if text.endswith(self.stop[:n])), 0)
        cut = len(text) - n_held
        self.held = text[cut:]
        return text[:cut]


def score(model: GPT, tokenizer: Tokenizer, path: Path) -> None:
    texts = Texts([path], "--score")
    with texts.naming_errors():
        ids, n_unknown = known_ids(tokenizer, texts)
    warn_of_unknown(n_unknown, texts.name, "; they are left out")
    total = Score(tokenizer)
    with tqdm(
        desc="score",
        total=max(0, len(ids) - 1),
        unit=" tokens",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
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
