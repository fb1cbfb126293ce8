"""Makes one file of a trained model, a program or a page: python export.py my_model -o story."""

import argparse
import json
import os
import shutil
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import command_line
import run
from backend import devices
from backend.errors import UserError
from backend.files import check_file, replacing_file, write_file
from backend.quantized import QMAX
from backend.rendered import N_SHARES, rendered
from inference.generator import Generator
from models import checkpoint
from runtime import build
from runtime.kernels import Kernels
from runtime.tables import tables
from tokenizers import TOKENIZERS, Tokenizer

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
    parser.add_argument("--weights", choices=QMAX, help=weights_help)
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
    check(files_of(output, arguments.page and output.is_dir()), arguments.model_path)
    model_folder = checkpoint.find(arguments.model_path)
    with devices.default_to_cpu(), TemporaryDirectory() as folder:
        model, tokenizer = checkpoint.load(model_folder)
        generator = Generator(model, weights=arguments.weights)
        n_weight_bytes = sum(p.nbytes() for p in generator.model.parameters().values())
        files = files_of(output, arguments.page and n_weight_bytes > MAX_PAGE_BYTES)
        check(files, model_folder)  # again, now that the model's size and place are known
        kernels = write_sources(generator, tokenizer, sources := Path(folder))
        if arguments.page:
            # half precision becomes single there
            n_bytes = kernels.n_file_bytes + 2 * kernels.n_halves + kernels.n_memory_bytes
            if n_bytes > MAX_WASM_BYTES:
                need = f"the page would need {n_bytes / 1e9:.1f} GB, and a browser gives it 4.3"
                raise UserError(f"{need}: try --weights int8, or a program")
            write_page(arguments.model_path.resolve().name, sources, files)
        else:
            with replacing_file(output) as new:
                build.program(target, sources, new)


def files_of(output: Path, is_folder: bool) -> list[Path]:
    """What is written: one file or, of a large page, the weights and the page in a folder."""
    if not is_folder:
        return [output]
    folder = output.with_suffix("") if output.suffix == ".html" else output
    files = [folder / "model.bin", folder / "index.html"]
    if folder.exists() and not (folder.is_dir() and set(files).issuperset(folder.iterdir())):
        raise UserError(f"{folder} exists and is no page of ours: name another with -o")
    return files


def check(files: list[Path], model: Path) -> None:
    """UserError or OSError unless these can be written, and none is a file of the model."""
    for file in files:
        check_file(file)
        if Path(os.path.realpath(file)) in checkpoint.files(model):
            raise UserError(f"{file} is a file of the model: name another with -o")


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
        "TOKENIZER": list(TOKENIZERS).index(tokenizer.name),
        "UNKNOWN": -1 if tokenizer.unknown is None else tokenizer.unknown,
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
    is_end = " || ".join(f"(id) == {end}" for end in tokenizer.ends) or "0"
    header = f"enum {{\n{''.join(lines)}}};\n#define IS_END(id) ({is_end})\n#define HELP {text}\n"
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
    parser.add_argument("-h", "--help", action="help", help="show this help")
    run.add_text_options(parser)
    return parser.format_help()


def write_page(title: str, sources: Path, files: list[Path]) -> None:
    """To one file, or to those of the weights and the page."""
    *weights, index = files
    page = build.page(title, sources, address="model.bin" if weights else "")
    for path in weights:
        with replacing_file(path) as new:
            shutil.copyfile(sources / "model.bin", new)
    write_file(index, page.encode())
    if weights:
        folder = index.parent
        print(f"{folder} is a folder for a web server: python -m http.server -d {folder}")


if __name__ == "__main__":
    command_line.run(main)
