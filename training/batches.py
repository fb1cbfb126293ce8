"""What a step of training is made of: the plan of its batches, a batch as captured jits, and the
validation before it."""

from collections.abc import Callable

import numpy as np
from tinygrad import Context, Tensor, Variable

from backend.bfloat16 import functions
from backend.capture import Captured
from backend.cores import largest_divisor
from backend.memory import filled, get, put, zeros
from gpt_tiny import Dropout
from training.distributed import World
from training.optimizers import clipped, learning_rates
from training.state import Training


def make_plan(training: Training, rng: np.random.Generator, world: World) -> list[Tensor]:
    """A row for each batch of the step: this rank's starts of windows and, for each part of the
    batch, a key for dropout; and the optimizer's rates."""
    config, step = training.config, training.position.step
    n_batches = config.batches_per_step
    n_starts = len(training.training_ids) - config.model.context_length
    starts = rng.integers(n_starts, size=(n_batches, config.batch_size), dtype=np.int32)
    # their number must not change what `rng` gives next
    keys = np.random.default_rng([config.seed, step, 1])
    keys = keys.integers(2**32, size=(n_batches, config.accumulate * world.size))
    numbers = range(step * n_batches + 1, (step + 1) * n_batches + 1)
    rates = [training.optimizer.rates(*learning_rates(config, n), number=n) for n in numbers]
    plan = (world.part(starts), world.part(keys).astype(np.uint32), np.array(rates, np.float32))
    return [filled(array) for array in plan]


def capture_training(training: Training, world: World) -> Callable[..., None]:
    """One batch as captured jits: it takes the row `batch` of each part of the plan, updates the
    parameters and the moments, and leaves its loss, of all a share, in `training.losses`."""
    config, model, parameters = training.config, training.model, training.parameters
    optimizer, losses, gradients = training.optimizer, training.losses, parameters.like()
    ids = filled(training.training_ids)
    n_parts = config.accumulate
    part_size = config.batch_size // world.size // n_parts

    def compute(starts: Tensor, keys: Tensor, batch: Variable) -> None:
        starts, keys = starts[batch].contiguous(), keys[batch].contiguous()
        total = None
        for part in range(n_parts):
            part_starts = starts[part * part_size : (part + 1) * part_size]
            inputs, targets = windows(ids, part_starts, config.model.context_length)
            dropout = Dropout(config.model.dropout, keys[part : part + 1])
            with Context(PRODUCT_DTYPE=config.dtype):
                loss = model.loss(inputs, targets, dropout) / (n_parts * world.size)
                of_part = loss.gradient(*parameters.parts)
            for gradient, more in zip(gradients.parts, of_part, strict=True):
                gradient.assign(gradient + more if part else more)
            total = total + loss if part else loss
            # before the update changes what they depend on, and the next part takes the memory
            Tensor.realize(total, *gradients.parts)
        losses[batch].assign(total).realize()

    def update(rates: Tensor, batch: Variable) -> None:
        whole, longest = gradients.whole, config.optimizer.grad_clipping
        if longest is not None:
            whole = clipped(whole, longest)
        optimizer.step(whole, rates[batch].contiguous())

    def compute_and_update(starts: Tensor, keys: Tensor, rates: Tensor, batch: Variable) -> None:
        compute(starts, keys, batch)
        update(rates, batch)

    state = [*parameters.parts, *gradients.parts, *optimizer.state, ids, losses]
    state += functions(config.dtype)
    if parameters.is_one:
        state += [*parameters.whole, *gradients.whole]
    key = (config.model, config.optimizer, config.dtype, n_parts, part_size, world.size)
    numbers = range(config.batches_per_step)
    if world.size == 1:
        train_batch = Captured(compute_and_update, state, key, batch=numbers)
        # the validation, which comes first, is captured and computed meanwhile
        train_batch.begin(*make_plan(training, np.random.default_rng(0), world), batch=0)
        return train_batch
    compute, update = (Captured(step, state, key, batch=numbers) for step in (compute, update))

    def train_batch(starts: Tensor, keys: Tensor, rates: Tensor, batch: int) -> None:
        compute(starts, keys, batch=batch)
        world.sum_parts(gradients)
        update(rates, batch=batch)

    return train_batch


def capture_validation(training: Training, world: World) -> Callable[[np.random.Generator], float]:
    """A function that draws windows with a random generator and returns their mean loss."""
    config, model = training.config, training.model
    ids = filled(training.validation_ids)
    # no more memory than training takes
    limit = config.batch_size // config.accumulate // world.size
    size = largest_divisor(config.validation_size, limit)
    row, loss = filled(np.zeros(size, np.int32)), zeros(1)

    def validate(starts: Tensor) -> None:
        inputs, targets = windows(ids, starts, config.model.context_length)
        with Context(PRODUCT_DTYPE=config.dtype):
            loss.assign(model.loss(inputs, targets).reshape(1)).realize()

    state = [*model.parameters().values(), ids, loss, *functions(config.dtype)]
    validate = Captured(validate, state, (config.model, size, config.dtype))

    def validation_loss(rng: np.random.Generator) -> float:
        n_starts = ids.shape[0] - config.model.context_length
        starts = rng.integers(n_starts, size=(config.validation_size // size, size))
        losses = np.zeros(len(starts))
        for i in range(world.rank, len(starts), world.size):
            put(row, starts[i].astype(np.int32))
            validate(row)
            losses[i] = get(loss).item()
        return float(world.sum(losses).mean())

    return validation_loss


def windows(ids: Tensor, starts: Tensor, context_length: int) -> tuple[Tensor, Tensor]:
    """starts (batch,) -> the ids from there on, and those one token later: (batch, time) each."""
    positions = starts.unsqueeze(-1) + Tensor.arange(context_length + 1)
    with Context(SPLIT_REDUCEOP=0):  # else tinygrad looks an id up by a sum over all of them
        cut = ids[positions].realize()
    return cut[:, :-1], cut[:, 1:]
