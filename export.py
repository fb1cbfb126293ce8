"""Exports a trained model as one file, a program or a page: python export.py my_model -o story."""

import command_line  # isort: skip - first, for the time of the imports

import argparse
import os
import platform
from pathlib import Path
from tempfile import TemporaryDirectory

from tinygrad import Context

from backend.errors import UserError
from backend.files import check_file
from backend.quantized import QMAX
from inference.generator import Decoder, quantize
from models import checkpoint
from runtime import build
from runtime.sources import Kernels, write_sources

MAX_PAGE_BYTES = 64 << 20  # larger weights are a file beside the page
MAX_WASM_BYTES = (4 << 30) - (32 << 20)  # WebAssembly's limit, less code and prompt


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
    arguments, help_text = parse_arguments(), command_line.program_help()
    target = build.TARGETS.get(arguments.target or this_machine())
    if target is None and not arguments.page:
        raise UserError("this machine is none of those that programs are made for: see --target")
    output = arguments.output_path or Path(f"story{'.html' if arguments.page else target.suffix}")
    check_files(files_of(output, arguments.page and output.is_dir()), arguments.model_path)
    model_folder = checkpoint.find(arguments.model_path)
    with Context(DEV="CPU"), TemporaryDirectory() as sources_folder:
        model, tokenizer = checkpoint.load(model_folder)
        if arguments.weights:
            quantize(model, arguments.weights)
        decoder, sources = Decoder(model), Path(sources_folder)
        n_weight_bytes = sum(weight.nbytes() for weight in decoder.weights)
        files = files_of(output, arguments.page and n_weight_bytes > MAX_PAGE_BYTES)
        check_files(files, model_folder)  # again, now that the model's size and folder are known
        kernels = write_sources(decoder, tokenizer, help_text, sources)
        if arguments.page:
            check_memory(kernels)
            build.write_page(arguments.model_path.resolve().name, sources, *files)
            if len(files) > 1:
                folder = files[0].parent
                print(f"{folder} is a folder for a web server: python -m http.server -d {folder}")
        else:
            build.write_program(target, sources, output)


def this_machine() -> str:
    """This machine's platform, a key of TARGETS if programs are made for it."""
    system = {"Darwin": "macos"}.get(platform.system(), platform.system().lower())
    is_arm = platform.machine().lower() in ("arm64", "aarch64") and system != "windows"
    return f"{'aarch64' if is_arm else 'x86_64'}-{system}"


def files_of(output: Path, is_folder: bool) -> list[Path]:
    """The files to write: the program or the page; in a large page's folder page and weights."""
    if not is_folder:
        return [output]
    folder = output.with_suffix("") if output.suffix == ".html" else output
    files = [folder / "index.html", folder / "model.bin"]
    if folder.exists() and not (folder.is_dir() and set(files).issuperset(folder.iterdir())):
        raise UserError(f"{folder} exists and is no page of ours: name another with -o")
    return files


def check_files(files: list[Path], model: Path) -> None:
    """UserError or OSError unless the files can be written, and none is a file of the model."""
    for file in files:
        check_file(file)
        if Path(os.path.realpath(file)) in checkpoint.files(model):
            raise UserError(f"{file} is a file of the model: name another with -o")


def check_memory(kernels: Kernels) -> None:
    """UserError if a page, with halves in single precision, needs more than a browser's memory."""
    n_bytes = kernels.n_file_bytes + 2 * kernels.n_halves + kernels.n_memory_bytes
    if n_bytes > MAX_WASM_BYTES:
        need = f"the page would need {n_bytes / 1e9:.1f} GB, and a browser gives it 4.3"
        raise UserError(f"{need}: try --weights int8, or a program")


if __name__ == "__main__":
    command_line.run(main)
