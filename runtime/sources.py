"""What is compiled for a model: the C of its step, and a file of its weights and tokens."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from backend.rendered import N_CHUNKS, rendered
from runtime.kernels import Kernels
from runtime.tables import tables
from tokenizers import TOKENIZERS, Tokenizer

MIN_SHARED_BYTES = 4 << 20  # with fewer, waking a core costs more than it gives


def write_sources(decoder, tokenizer: Tokenizer, help: str, folder: Path) -> Kernels:
    """Writes, of a step of inference's Decoder, kernels.c, with one.c and many.c, which call these
    for one token and for many; model.h, sizes and help; and model.bin, the weights and tokens."""
    steps = {"one": 1, "many": decoder.chunk}
    calls = [rendered(decoder.step, decoder.ids[n], **decoder.ranges[n]) for n in steps.values()]
    kernels = Kernels(decoder.weights)
    for name, calls_of_step in zip(steps, calls, strict=True):
        (folder / f"{name}.c").write_text(kernels.calls(calls_of_step), encoding="utf-8")
    (folder / "kernels.c").write_text(kernels.source(), encoding="utf-8")

    sizes = {
        "CONTEXT_LENGTH": decoder.context_length,
        "VOCAB_SIZE": tokenizer.vocab_size,
        "CHUNK": decoder.chunk,
        "N_CHUNKS": N_CHUNKS,
        "ID": kernels.place_of(decoder.ids[1]),
        "IDS": kernels.place_of(decoder.ids[decoder.chunk]),
        "LOGITS": kernels.place_of(decoder.logits),
        "TOKENIZER": list(TOKENIZERS).index(tokenizer.name),
        "UNKNOWN": -1 if tokenizer.unknown is None else tokenizer.unknown,
        "END": -1 if tokenizer.end is None else tokenizer.end,
        "N_TOKENS": len(tokenizer.tokens),
        "LONGEST_TOKEN": max(map(len, tokenizer.tokens)),
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
    header = f"enum {{\n{''.join(lines)}}};\n#define HELP {json.dumps(help)}\n"
    header += f"#define IS_END(id) ({is_one_of(tokenizer.ends)})\n"
    header += f"#define IS_EXCLUDED(id) ({is_one_of(tokenizer.excluded)})\n"
    (folder / "model.h").write_text(header, encoding="utf-8")
    with (folder / "model.bin").open("wb") as file:
        kernels.write(file)
    return kernels


def is_one_of(ids: Sequence[int]) -> str:
    """C for whether `id` is one of these, of which many may follow one another."""
    ids = np.sort(np.array(ids, int))
    runs = np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1) if len(ids) else []
    return " || ".join(f"((id) >= {run[0]} && (id) <= {run[-1]})" for run in runs) or "0"
