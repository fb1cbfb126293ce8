"""Makes one file of a trained model, a program or a page: python export.py my_model -o story."""

import command_line  # isort: skip - first, for the time of the imports

import argparse
import json
import os
import shutil
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import run
from backend import devices
from backend.errors import UserError
from backend.rendered import N_SHARES, rendered
from backend.rounded import GREATEST
from generation import Generator
from models import checkpoint, folders
from runtime import build
from runtime.kernels import Kernels
from runtime.tables import tables
from tokenizers import Tokenizer

MAX_PAGE_BYTES = 64 << 20  # with more, the weights are a file beside the page
MAX_WASM_BYTES = (4 << 30) - (32 << 20)  # what WebAssembly can address, less code and prompt
MIN_SHARED_BYTES = 4 << 20  # with fewer, waking a core costs more than it gives


def parse_arguments() -> argparse.Namespace:
    parser = command_line.ArgumentParser("Make one file of a trained GPT: a program, or a page.")
    parser.usage = "python %(prog)s MODEL_PATH [OPTION]..."
    model_help = "folder of a model: ours, gpt-burn's or GPT-2; or its name on the Hub: gpt2"
    parser.add_argument("model_path", type=Path, help=model_help)
    output_help = "file to write (default: story, story.exe or story.html)"
    parser.add_argument("-o", "--output-path", type=Path, help=output_help)
    target_help = "platform that a program is for (default: this machine's)"
    parser.add_argument("--target", choices=build.TARGETS, help=target_help)
    page_help = "a page for a browser; of a large model a folder, for any web server"
    parser.add_argument("--page", action="store_true", help=page_help)
    weights_help = "round the weights: a smaller, faster file (default: as they are stored)"
    parser.add_argument("--weights", choices=GREATEST, help=weights_help)
    arguments = parser.parse_args()
    if arguments.page and arguments.target:
        parser.error("a page has no --target: it is for every browser")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    target = build.TARGETS.get(arguments.target or build.this_machine())
    if target is None and not arguments.page:
        raise UserError("this machine is none of those that programs are made for: see --target")
    output = arguments.output_path or Path(f"story{'.html' if arguments.page else target.suffix}")
    with devices.on_cpu(), TemporaryDirectory() as folder:
        model, tokenizer = checkpoint.load(arguments.model_path)
        generator = Generator(model, weights=arguments.weights)
        kernels = write_sources(generator, tokenizer, sources := Path(folder))
        if arguments.page:
            # half precision becomes single there
            n_bytes = kernels.n_file_bytes + 2 * kernels.n_halves + kernels.n_memory_bytes
            if n_bytes > MAX_WASM_BYTES:
                need = f"the page would need {n_bytes / 1e9:.1f} GB, and a browser gives it 4.3"
                raise UserError(f"{need}: try --weights int8, or a program")
            write_page(arguments.model_path.resolve().name, sources, output)
        else:
            with folders.replacing_file(output) as new:
                build.program(target, sources, new)


def write_sources(generator: Generator, tokenizer: Tokenizer, folder: Path) -> Kernels:
    """Writes C to a folder: kernels.c, the kernels of the steps for one token and for many, one.c
    and many.c, the calls of them, and model.h, the sizes; and model.bin, the weights and tokens."""
    config, steps = generator.model.config, {"one": 1, "many": generator.chunk}
    kernels = Kernels(generator.model.parameters().values())
    for name, n in steps.items():
        values = {"end": range(n, config.context_length + 1), "last": range(n)}
        calls = rendered(generator.step, generator.steps[n][0], **values)
        (folder / f"{name}.c").write_text(kernels.calls(calls), encoding="utf-8")
    (folder / "kernels.c").write_text(kernels.source(), encoding="utf-8")

    sizes = {
        "CONTEXT_LENGTH": config.context_length,
        "VOCAB_SIZE": config.vocab_size,
        "CHUNK": generator.chunk,
        "N_SHARES": N_SHARES,
        "TOKENIZER": ["char", "vowel", "bpe"].index(tokenizer.name),
        "UNKNOWN": -1 if tokenizer.unknown is None else tokenizer.unknown,
        "END": -1 if tokenizer.end is None else tokenizer.end,
        "LONGEST_TOKEN": max(map(len, tokenizer.tokens)),
        "ID": kernels.place_of(generator.steps[1][0]),
        "IDS": kernels.place_of(generator.steps[generator.chunk][0]),
        "LOGITS": kernels.place_of(generator.logits),
    }
    for name, array in tables(tokenizer).items():
        sizes |= {name: kernels.add(array), f"N_{name}": len(array)}
    sizes |= {
        "N_HALVES": kernels.n_halves,
        "MODEL_BYTES": kernels.n_file_bytes,
        "MEMORY_BYTES": kernels.n_memory_bytes,
        "IS_LARGE": int(kernels.n_file_bytes > MIN_SHARED_BYTES),
    }
    lines = (f"  {name} = {size},\n" for name, size in sizes.items())
    text = json.dumps(help_of_program())
    header = f"enum {{\n{''.join(lines)}}};\n#define HELP {text}\n"
    (folder / "model.h").write_text(header, encoding="utf-8")
    with (folder / "model.bin").open("wb") as file:
        kernels.write(file)
    return kernels


def help_of_program() -> str:
    parser = argparse.ArgumentParser(
        description="Continue a text with a trained GPT.",
        usage=argparse.SUPPRESS,
        add_help=False,
        formatter_class=partial(command_line.HelpFormatter, width=80),
    )
    parser.add_argument("--help", action="help", help="show this help")
    run.add_text_options(parser)
    return parser.format_help()


def write_page(title: str, sources: Path, output: Path) -> None:
    """One file or, if the model is large, a folder with the page and the weights beside it."""
    model = sources / "model.bin"
    if model.stat().st_size <= MAX_PAGE_BYTES:
        with folders.replacing_file(output) as new:
            new.write_bytes(build.page(title, sources).encode())
        return
    folder = output.with_suffix("")
    files = {"model.bin", "index.html"}
    if folder.exists() and not (folder.is_dir() and files.issuperset(os.listdir(folder))):
        raise UserError(f"{folder} exists and is no page of ours: name another with -o")
    page = build.page(title, sources, address="model.bin")
    with folders.replacing_file(folder / "model.bin") as new:
        shutil.copyfile(model, new)
    folders.write_file(folder / "index.html", page.encode())
    print(f"{folder} is a folder for a web server: python -m http.server -d {folder}")


if __name__ == "__main__":
    command_line.run(main)
