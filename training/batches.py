"""What a step of training is made of: the plan of its batches, a batch as captured jits, and the
validation before it."""

from collections.abc import Callable

import numpy as np
from tinygrad import Context, Tensor, UOp, Variable
from tinygrad.uop.ops import Ops

from backend.arrays import copy_in, copy_out, from_numpy, zeros
from backend.jit_cache import CachedJit
from data.ids import Corpus
from gpt_tiny import GPT, Dropout
from training.config import TrainingConfig
from training.optimizers import AdamW, Muon
from training.workers import World


def make_plan(
    config: TrainingConfig,
    corpus: Corpus,
    optimizer: AdamW | Muon,
    step: int,
    rng: np.random.Generator,
    world: World,
) -> list[Tensor]:
    """A row for each batch of the step: this rank's windows (batch / ranks, time + 1), a key of
    dropout for each part of the batch, and the optimizer's rates."""
    n_batches, length = config.batches_per_step, config.model.context_length + 1
    starts = draw_starts(rng, corpus.n_training - length + 1, (n_batches, config.batch_size))
    starts = world.shard(starts)  # (batches, batch / ranks)
    windows = corpus.windows(starts.ravel(), length).reshape(*starts.shape, length)
    # their number must not change what `rng` gives next
    keys = np.random.default_rng([config.seed, step, 1])
    keys = keys.integers(2**32, size=(n_batches, config.accumulate * world.size))
    updates = range(step * n_batches + 1, (step + 1) * n_batches + 1)
    rates = [optimizer.rates(n) for n in updates]
    plan = (windows, world.shard(keys).astype(np.uint32), np.array(rates, np.float32))
    return [from_numpy(array) for array in plan]


def draw_starts(rng: np.random.Generator, n: int, shape: tuple[int, int]) -> np.ndarray:
    dtype = np.int32 if n < 2**31 else np.int64  # which decides what is drawn
    return rng.integers(n, size=shape, dtype=dtype)


def capture_training(
    config: TrainingConfig, model: GPT, optimizer: AdamW | Muon, losses: Tensor, world: World
) -> Callable[..., None]:
    """One batch as captured jits: a function of the plan and of a `batch` in it, which updates the
    parameters and the moments, and leaves its loss, of all a shard, in `losses`."""

    def compute(windows: Tensor, keys: Tensor, batch: Variable) -> None:
        windows, keys = windows[batch].contiguous(), keys[batch].contiguous()
        loss = compute_gradients(config, model, optimizer, windows, keys, world.size)
        losses[batch].assign(loss).realize()

    def update(rates: Tensor, batch: Variable) -> None:
        optimizer.step(rates[batch].contiguous())

    def compute_and_update(windows: Tensor, keys: Tensor, rates: Tensor, batch: Variable) -> None:
        compute(windows, keys, batch)
        update(rates, batch)

    buffers, sizes = [*optimizer.buffers, losses], (config.batch_size, config.accumulate)
    key = (config.model, config.optimizer, config.dtype, *sizes, world.size)

    def cached(function: Callable) -> CachedJit:
        return CachedJit(function, buffers, key, batch=range(config.batches_per_step))

    if world.size == 1:
        return cached(compute_and_update)
    compute_jit, update_jit = cached(compute), cached(update)

    def train_batch(windows: Tensor, keys: Tensor, rates: Tensor, batch: int) -> None:
        compute_jit(windows, keys, batch=batch)
        optimizer.gradients.apply_in_place(world.all_reduce)
        update_jit(rates, batch=batch)

    return train_batch


def compute_gradients(
    config: TrainingConfig,
    model: GPT,
    optimizer: AdamW | Muon,
    windows: Tensor,
    keys: Tensor,
    n_shards: int,
) -> Tensor:
    """The loss of a shard's windows (n, time + 1), in a part for each key of dropout; leaves its
    gradients in the optimizer's buffer. The losses and the gradients of the shards add up."""
    parameters, gradients = (
        list(buffer.views.values()) for buffer in (optimizer.parameters, optimizer.gradients)
    )
    n_parts, total = config.accumulate, None
    size = windows.shape[0] // n_parts
    for part in range(n_parts):
        of_part = windows[part * size : (part + 1) * size]
        inputs, targets = of_part[:, :-1], of_part[:, 1:]
        dropout = Dropout(config.model.dropout, keys[part : part + 1])
        with Context(PRODUCT_DTYPE=config.dtype):
            loss = model.loss(inputs, targets, dropout) / (n_parts * n_shards)
            of_part = loss.gradient(*parameters)
        total = total + loss if part else loss
        if part:
            of_part = [of_all + more for of_all, more in zip(gradients, of_part, strict=True)]
        # before the update changes what they depend on, and the next part takes the memory
        Tensor.realize(*stored_in(gradients, of_part, total))
    return total


def stored_in(places: list[Tensor], tensors: list[Tensor], *others: Tensor) -> list[Tensor]:
    """What to realise so that the tensors are in these places, and others that depend on them."""
    stores, swapped = [], {}
    for place, tensor in zip(places, tensors, strict=True):
        if tensor.uop.base.op is Ops.AFTER and tensor.uop.has_buffer_identity(after_ok=True):
            # of a kernel that has a buffer of its own: tinygrad would copy that
            swapped[tensor.uop.base.src[0].base] = place.uop.base
            stores.append(tensor)
        else:
            stores.append(place.assign(tensor))
    sink = UOp.sink(*(tensor.uop for tensor in (*stores, *others)))
    return [Tensor(uop) for uop in sink.substitute(swapped).src]


def capture_validation(
    config: TrainingConfig, corpus: Corpus, model: GPT, world: World
) -> Callable[[np.random.Generator], float]:
    """A function that draws windows with a random generator and returns their mean loss."""
    length = config.model.context_length + 1
    # no more memory than training takes
    n_windows = config.validation_size
    limit = min(n_windows, config.batch_size // config.accumulate // world.size)
    size = max(n for n in range(1, limit + 1) if n_windows % n == 0)
    windows, loss = from_numpy(np.zeros((size, length), np.int32)), zeros(1)

    def compute_loss(windows: Tensor) -> None:
        with Context(PRODUCT_DTYPE=config.dtype):
            loss.assign(model.loss(windows[:, :-1], windows[:, 1:]).reshape(1)).realize()

    buffers = [*model.parameters().values(), loss]
    loss_jit = CachedJit(compute_loss, buffers, (config.model, size, config.dtype))

    def validate(rng: np.random.Generator) -> float:
        n_starts = len(corpus.ids) - corpus.n_training - length + 1
        starts = rng.integers(n_starts, size=(n_windows // size, size))
        losses = np.zeros(len(starts))
        for i in range(world.rank, len(starts), world.size):
            copy_in(windows, corpus.windows(corpus.n_training + starts[i], length))
            loss_jit(windows)
            losses[i] = copy_out(loss).item()
        return float(world.all_reduce(losses).mean())

    return validate
