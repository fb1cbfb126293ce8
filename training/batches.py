"""What a step of training is made of: the plan of its batches, a batch as captured jits, and the
validation before it."""

from collections.abc import Callable

import numpy as np
from tinygrad import Context, Tensor, Variable

from backend.arrays import FlatBuffer, copy_in, copy_out, from_numpy, zeros
from backend.cpu.threads import largest_divisor
from backend.jit_cache import CachedJit
from gpt_tiny import Dropout
from training.optimizers import learning_rates
from training.state import Training
from training.workers import World


def make_plan(training: Training, rng: np.random.Generator, world: World) -> list[Tensor]:
    """A row for each batch of the step: this rank's windows and, for each part of the batch, a key
    for dropout; and the optimizer's rates."""
    config, step, corpus = training.config, training.position.step, training.corpus
    n_batches, length = config.batches_per_step, config.model.context_length + 1
    starts = draw_starts(rng, corpus.n_training - length + 1, (n_batches, config.batch_size))
    starts = world.shard(starts)
    windows = corpus.windows(starts.ravel(), length).reshape(*starts.shape, length)
    # their number must not change what `rng` gives next
    keys = np.random.default_rng([config.seed, step, 1])
    keys = keys.integers(2**32, size=(n_batches, config.accumulate * world.size))
    numbers = range(step * n_batches + 1, (step + 1) * n_batches + 1)
    rates = [training.optimizer.rates(*learning_rates(config, n), number=n) for n in numbers]
    plan = (windows, world.shard(keys).astype(np.uint32), np.array(rates, np.float32))
    return [from_numpy(array) for array in plan]


def draw_starts(rng: np.random.Generator, n: int, shape: tuple[int, int]) -> np.ndarray:
    dtype = np.int32 if n < 2**31 else np.int64  # which decides what is drawn
    return rng.integers(n, size=shape, dtype=dtype)


def capture_training(training: Training, world: World) -> Callable[..., None]:
    """One batch as captured jits: it takes the row `batch` of each part of the plan, updates the
    parameters and the moments, and leaves its loss, of all a share, in `training.losses`."""
    config, model, parameters = training.config, training.model, training.parameters
    optimizer, losses, gradients = training.optimizer, training.losses, parameters.like()
    n_parts = config.accumulate
    part_size = config.batch_size // world.size // n_parts

    def compute(windows: Tensor, keys: Tensor, batch: Variable) -> None:
        windows, keys = windows[batch].contiguous(), keys[batch].contiguous()
        total = None
        for part in range(n_parts):
            of_part = windows[part * part_size : (part + 1) * part_size]
            inputs, targets = of_part[:, :-1], of_part[:, 1:]
            dropout = Dropout(config.model.dropout, keys[part : part + 1])
            with Context(PRODUCT_DTYPE=config.dtype):
                loss = model.loss(inputs, targets, dropout) / (n_parts * world.size)
                of_part = loss.gradient(*parameters.views.values())
            for gradient, more in zip(gradients.views.values(), of_part, strict=True):
                gradient.assign(gradient + more if part else more)
            total = total + loss if part else loss
            # before the update changes what they depend on, and the next part takes the memory
            Tensor.realize(total, *gradients.views.values())
        losses[batch].assign(total).realize()

    def update(rates: Tensor, batch: Variable) -> None:
        optimizer.step(gradients, rates[batch].contiguous())

    def compute_and_update(windows: Tensor, keys: Tensor, rates: Tensor, batch: Variable) -> None:
        compute(windows, keys, batch)
        update(rates, batch)

    state = [*parameters.tensors, *gradients.tensors, *optimizer.state, losses]
    key = (config.model, config.optimizer, config.dtype, n_parts, part_size, world.size)
    numbers = range(config.batches_per_step)
    if world.size == 1:
        train_batch = CachedJit(compute_and_update, state, key, batch=numbers)
        # the validation, which comes first, is captured and computed meanwhile
        train_batch.begin(*make_plan(training, np.random.default_rng(0), world), batch=0)
        return train_batch
    compute, update = (CachedJit(step, state, key, batch=numbers) for step in (compute, update))
    return with_workers(compute, update, gradients, world)


def with_workers(
    compute: CachedJit, update: CachedJit, gradients: FlatBuffer, world: World
) -> Callable[..., None]:
    """A batch whose gradients all workers compute, sum, and update by."""

    def train_batch(windows: Tensor, keys: Tensor, rates: Tensor, batch: int) -> None:
        compute(windows, keys, batch=batch)
        world.all_reduce(gradients)
        update(rates, batch=batch)

    return train_batch


def capture_validation(training: Training, world: World) -> Callable[[np.random.Generator], float]:
    """A function that draws windows with a random generator and returns their mean loss."""
    config, model, corpus = training.config, training.model, training.corpus
    length = config.model.context_length + 1
    # no more memory than training takes
    limit = config.batch_size // config.accumulate // world.size
    size = largest_divisor(config.validation_size, limit)
    some, loss = from_numpy(np.zeros((size, length), np.int32)), zeros(1)

    def validate(windows: Tensor) -> None:
        with Context(PRODUCT_DTYPE=config.dtype):
            loss.assign(model.loss(windows[:, :-1], windows[:, 1:]).reshape(1)).realize()

    state = [*model.parameters().values(), loss]
    validate = CachedJit(validate, state, (config.model, size, config.dtype))

    def validation_loss(rng: np.random.Generator) -> float:
        n_starts = len(corpus.ids) - corpus.n_training - length + 1
        starts = rng.integers(n_starts, size=(config.validation_size // size, size))
        losses = np.zeros(len(starts))
        for i in range(world.rank, len(starts), world.size):
            copy_in(some, corpus.windows(corpus.n_training + starts[i], length))
            validate(some)
            losses[i] = copy_out(loss).item()
        return float(world.sum(losses).mean())

    return validation_loss
