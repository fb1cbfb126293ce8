"""What is looked at before a training begins, so that it does not fail after hours."""

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
BYTES_OF_PROGRAM = 72 << 20  # Python, with what is imported, and its compiled kernels


def check(config: TrainingConfig, corpus: Corpus, world: World) -> None:
    """UserError for a training that can't be: a corpus that is too short, too little memory, a
    batch that workers can't share, or workers that differ."""
    check_sizes(config, corpus, world)
    if world.size > 1:
        world.share(config.batch_size, "--batch-size", config.accumulate)
        code = sources(), version("tinygrad"), version("numpy")
        world.check_same(code=code, corpus=corpus.checksum, command=flat(config))


def check_sizes(config: TrainingConfig, corpus: Corpus, world: World) -> None:
    """UserError where the corpus is too short, or where the system would run out of memory, and
    end the training without a word."""
    model, n_validation = config.model, len(corpus.ids) - corpus.n_training
    if n_validation <= model.context_length:
        raise UserError(
            f"{corpus.name} is too short: its last tenth, {n_validation} tokens, is "
            f"for validation and has to exceed --context-length {model.context_length}"
        )
    n_tokens = config.batch_size // config.accumulate // world.size * model.context_length
    of_scores, n_bytes = (world.n_on_machine * n for n in memory_taken(config, n_tokens))
    is_on_cpu = devices.in_use().startswith("CPU")
    memory = machine.memory() if is_on_cpu else machine.physical_memory()  # a GPU has its own
    taken = f"{n_bytes / GIB:,.1f} GiB of memory"
    if n_bytes > memory:
        raise UserError(
            f"training {model.n_parameters:,} parameters on {world.n_on_machine * n_tokens:,} "
            f"tokens at a time takes about {taken}, and there are {memory / GIB:,.1f}: choose a "
            "smaller model, --context-length or --batch-size"
        )
    if of_scores > max(n_bytes / 2, 2 * GIB):
        print(
            f"warning: attention over --context-length {model.context_length} takes "
            f"{of_scores / GIB:,.1f} of about {taken}: a shorter one, a smaller --batch-size or a "
            "higher --accumulate takes less",
            file=sys.stderr,
        )


def memory_taken(config: TrainingConfig, n_tokens: int) -> tuple[int, int]:
    """The bytes that attention's scores take in a process that trains on so many tokens at a time,
    and those of all. The counts of floats are fitted to what trainings on a CPU took."""
    model = config.model
    scores = model.n_heads * model.context_length  # of a token in a block
    if has_attention_kernel(devices.in_use(), model.d_model // model.n_heads):
        scores = 0  # which are never in memory
    # of a small vocabulary there are one-hot rows, too, beside the logits and their gradient
    logits = model.vocab_size * (3 if model.vocab_size <= 1024 else 2)
    of_block = 3 * scores + 11 * model.d_model + 2 * model.d_hidden
    n_floats = n_tokens * (model.n_layers * of_block + max(scores, logits) + 4 * model.d_model)
    # gradients take the place of activations; and there are the parameters, their stored gradients
    # and two moments
    n_floats = max(n_floats, model.n_parameters) + 4 * model.n_parameters
    n_validated = min(n_tokens, config.validation_size * model.context_length)
    n_floats += n_validated * (max(3 * scores, logits) + 8 * model.d_model)
    n_scores = scores * (n_tokens * (3 * model.n_layers + 1) + 3 * n_validated)
    return 4 * n_scores, 4 * n_floats + BYTES_OF_PROGRAM
