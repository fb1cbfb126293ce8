"""Checks before a training begins, so that it does not fail after hours."""

import socket
import sys
from importlib.metadata import version

from backend import devices, machine
from backend.errors import UserError
from backend.functional import has_attention_kernel
from backend.jit_cache import sources
from data.ids import Corpus
from training.config import TrainingConfig, flat
from training.workers import World

GIB = 1 << 30
PROGRAM_BYTES = 72 << 20  # Python, imported modules and compiled kernels


def check(config: TrainingConfig, corpus: Corpus, world: World) -> None:
    """UserError for a training that cannot run: a corpus that is too short, too little memory, a
    batch that the workers cannot divide, or workers that differ."""
    check_sizes(config, corpus, world)
    if world.size > 1:
        check_batch_size(config, world.size)
        code = sources(), version("tinygrad"), version("numpy")
        facts = {"code": code, "corpus": corpus.checksum, "command": flat(config)}
        gathered = world.ranks.allgather((socket.gethostname(), facts))
        for rank, (host, theirs) in enumerate(gathered):
            for name, fact in gathered[0][1].items():
                if theirs[name] != fact:
                    raise UserError(f"rank {rank} on {host} has another {name} than rank 0")


def check_batch_size(config: TrainingConfig, n_workers: int) -> None:
    """UserError if a batch, in its parts, cannot be divided evenly among the workers."""
    size, unit = config.batch_size, n_workers * config.accumulate
    if size % unit:
        fitting = " or ".join(str(n) for n in (size // unit * unit, (size // unit + 1) * unit) if n)
        message = f"--batch-size {size} can't be shared by {n_workers} workers: try {fitting}"
        raise UserError(message)


def check_sizes(config: TrainingConfig, corpus: Corpus, world: World) -> None:
    """UserError if the corpus is too short or the memory too small: the system would end a training
    that runs out of memory without a message."""
    model, n_validation = config.model, len(corpus.ids) - corpus.n_training
    if n_validation <= model.context_length:
        raise UserError(
            f"{corpus.name} is too short: its last tenth, {n_validation} tokens, is "
            f"for validation and has to exceed --context-length {model.context_length}"
        )
    n_tokens = config.batch_size // config.accumulate // world.size * model.context_length
    score_bytes, n_bytes = (world.n_on_machine * n for n in memory_taken(config, n_tokens))
    is_on_cpu = devices.in_use().startswith("CPU")
    memory = machine.memory() if is_on_cpu else machine.physical_memory()  # a GPU has its own
    taken = f"{n_bytes / GIB:,.1f} GiB of memory"
    if n_bytes > memory:
        raise UserError(
            f"training {model.n_parameters:,} parameters on {world.n_on_machine * n_tokens:,} "
            f"tokens at a time takes about {taken}, and there are {memory / GIB:,.1f}: choose a "
            "smaller model, --context-length or --batch-size"
        )
    if score_bytes > max(n_bytes / 2, 2 * GIB):
        print(
            f"warning: attention over --context-length {model.context_length} takes "
            f"{score_bytes / GIB:,.1f} of about {taken}: a shorter one, a smaller --batch-size or "
            "a higher --accumulate takes less",
            file=sys.stderr,
        )


def memory_taken(config: TrainingConfig, n_tokens: int) -> tuple[int, int]:
    """Bytes of attention scores, and of all memory, in a process that trains on `n_tokens` tokens
    at a time. The counts of floats are fitted to trainings on a CPU."""
    model = config.model
    scores = model.n_heads * model.context_length  # a token, in a block
    if has_attention_kernel(devices.in_use(), model.d_model // model.n_heads):
        scores = 0  # never in memory
    # beside logits and their gradient, a small vocabulary has one-hot rows
    logits = model.vocab_size * (3 if model.vocab_size <= 1024 else 2)
    block = 3 * scores + 11 * model.d_model + 2 * model.d_hidden
    n_floats = n_tokens * (model.n_layers * block + max(scores, logits) + 4 * model.d_model)
    # gradients take the place of activations; then parameters, stored gradients and two moments
    n_floats = max(n_floats, model.n_parameters) + 4 * model.n_parameters
    n_validated = min(n_tokens, config.validation_size * model.context_length)
    n_floats += n_validated * (max(3 * scores, logits) + 8 * model.d_model)
    n_scores = scores * (n_tokens * (3 * model.n_layers + 1) + 3 * n_validated)
    return 4 * n_scores, 4 * n_floats + PROGRAM_BYTES
