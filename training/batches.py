"""A step of training: the plan of its batches, a batch as captured jits, and the validation."""

from collections.abc import Callable

import numpy as np
from tinygrad import Context, Tensor, UOp, Variable
from tinygrad.uop.ops import Ops

from backend.arrays import copy_out, from_numpy
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
    """Tensors with a row for each batch of the step: this rank's windows (batch / ranks, time + 1),
    a dropout key for each part of the batch, and the optimizer's rates."""
    n_batches, length = config.batches_per_step, config.model.context_length + 1
    starts = draw_starts(rng, corpus.n_training - length + 1, (n_batches, config.batch_size))
    starts = shard(starts, world)  # (batches, batch / ranks)
    windows = corpus.windows(starts.ravel(), length).reshape(*starts.shape, length)
    # not from `rng`: the number of keys must not change the validation's windows
    keys = np.random.default_rng([config.seed, step, 1])
    keys = keys.integers(2**32, size=(n_batches, config.accumulate * world.size))
    updates = range(step * n_batches + 1, (step + 1) * n_batches + 1)
    rates = np.array([optimizer.rates(n) for n in updates], np.float32)
    plan = (windows, shard(keys, world).astype(np.uint32), rates)
    return [from_numpy(array) for array in plan]


def draw_starts(rng: np.random.Generator, n: int, shape: tuple[int, int]) -> np.ndarray:
    dtype = np.int32 if n < 2**31 else np.int64  # the numbers drawn depend on the type
    return rng.integers(n, size=shape, dtype=dtype)


def shard(rows: np.ndarray, world: World) -> np.ndarray:
    """This rank's share of the columns."""
    width = rows.shape[1] // world.size
    return rows[:, world.rank * width : (world.rank + 1) * width]


def capture_training(
    config: TrainingConfig, model: GPT, optimizer: AdamW | Muon, losses: Tensor, world: World
) -> Callable[..., None]:
    """A function, of captured jits, that takes the plan and the index `batch` of a row, updates the
    parameters and the moments, and stores this rank's share of the loss in `losses`."""

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
    """Loss of a shard's windows (n, time + 1), computed in a part for each dropout key; stores the
    gradients in the optimizer's buffer. The sums over shards are those of the whole batch."""
    parameters = list(optimizer.parameters.views.values())
    gradients = list(optimizer.gradients.views.values())
    n_parts, total_loss = config.accumulate, None
    size = windows.shape[0] // n_parts
    for i in range(n_parts):
        part = windows[i * size : (i + 1) * size]
        dropout = Dropout(config.model.dropout, keys[i : i + 1])
        with Context(PRODUCT_DTYPE=config.dtype):
            loss = model.loss(part[:, :-1], part[:, 1:], dropout) / (n_parts * n_shards)
            grads = loss.gradient(*parameters)
        total_loss = total_loss + loss if i else loss
        if i:
            grads = [total + grad for total, grad in zip(gradients, grads, strict=True)]
        # now: the next part reuses the activations' memory, and the update changes the parameters
        Tensor.realize(*store_in(gradients, grads, total_loss))
    return total_loss


def store_in(buffers: list[Tensor], tensors: list[Tensor], *dependents: Tensor) -> list[Tensor]:
    """Tensors to realise so that the buffers hold `tensors`, with `dependents` computed of them."""
    stores, swapped = [], {}
    for buffer, tensor in zip(buffers, tensors, strict=True):
        if tensor.uop.base.op is Ops.AFTER and tensor.uop.has_buffer_identity(after_ok=True):
            # a custom kernel's output, which tinygrad would copy: the kernel writes to `buffer`
            swapped[tensor.uop.base.src[0].base] = buffer.uop.base
            stores.append(tensor)
        else:
            stores.append(buffer.assign(tensor))
    sink = UOp.sink(*(tensor.uop for tensor in (*stores, *dependents)))
    return [Tensor(uop) for uop in sink.substitute(swapped).src]


def capture_validation(
    config: TrainingConfig, corpus: Corpus, model: GPT, world: World
) -> Callable[[np.random.Generator], float]:
    """A function that draws windows with a random generator and returns their mean loss."""
    length, n_windows = config.model.context_length + 1, config.validation_size
    # no more memory than training takes
    limit = min(n_windows, config.batch_size // config.accumulate // world.size)
    size = max(n for n in range(1, limit + 1) if n_windows % n == 0)
    loss = from_numpy(np.zeros(1, np.float32))

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
            loss_jit(from_numpy(corpus.windows(corpus.n_training + starts[i], length)))
            losses[i] = copy_out(loss).item()
        return float(world.all_reduce(losses).mean())

    return validate
