"""Continues a text with a trained model: python run.py model_83M -p "Once upon a time"."""

import codecs
import sys
from pathlib import Path

import command_line
from command_line import number


def parse_arguments():
    parser = command_line.ArgumentParser("Continue a text with a trained GPT.")
    add = parser.add_argument
    add("model_path", type=Path, help="folder of a model: gpt-tiny's or gpt-burn's")
    add("-p", "--prompt", default="\n", help="text to continue")
    add("-n", "--n-new-tokens", type=number(int, 1), default=1000, help="tokens to generate")
    add("-s", "--seed", type=number(int, 0), default=0, help="of the random numbers")
    add("--temperature", type=number(float, 0), default=1.0, help="0 takes the likeliest token")
    add("--stride", type=number(int, 1), default=1, help="tokens dropped when the context is full")
    arguments = parser.parse_args()
    if not arguments.prompt:
        parser.error("--prompt is empty: give at least one character")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    import numpy as np  # tinygrad and what needs it only now: --help and a wrong flag answer at once

    import checkpoint
    from gpt_tiny import Generator, sample

    command_line.open_backend()
    model, tokenizer = checkpoint.load(arguments.model_path)
    ids = tokenizer.encode(arguments.prompt)
    if n_unknown := int((ids == tokenizer.unknown).sum()):
        print(f"warning: {n_unknown} tokens of the prompt are not in the vocabulary", file=sys.stderr)
    rng = np.random.default_rng(arguments.seed)

    def choose(logits: np.ndarray) -> np.ndarray:
        logits[:, tokenizer.unknown] = -np.inf  # it stands for no text
        return sample(logits, arguments.temperature, rng)

    print(command_line.bold(arguments.prompt), end="", flush=True)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    generator = Generator(model, stride=arguments.stride)
    for new in generator(ids[None].astype(np.int32), arguments.n_new_tokens, choose):
        print(decoder.decode(tokenizer.token_bytes(int(new[0]))), end="", flush=True)
    print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    command_line.run(main)
