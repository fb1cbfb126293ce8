"""What a step of training is made of: the plan of its batches, a batch as captured jits, and the
validation before it."""

import argparse
import math
from collections.abc import Callable

import numpy as np
from tinygrad import Context, Tensor, Variable

import cpu
import distributed
import resume
from capture import captured
from gpt_tiny import GPT, AdamW, Dropout
from memory import Flat, get, put, zeros

BATCHES_PER_STEP = 100


def make_plan(arguments, optimizer: AdamW, step: int, n_ids: int, rng, world) -> list[Tensor]:
    """A row for each batch of a step: this rank's starts of windows and, for each part of the
    batch, a key for dropout; and rates."""
    first = step * BATCHES_PER_STEP + 1
    shape = (BATCHES_PER_STEP, arguments.batch_size)
    starts = rng.integers(n_ids - arguments.context_length, size=shape, dtype=np.int32)
    shape = (BATCHES_PER_STEP, arguments.accumulate * world.size)
    # their number must not change what `rng` gives next
    keys = np.random.default_rng([arguments.seed, step, 1]).integers(2**32, size=shape)
    rates = [
        optimizer.rates(learning_rate(arguments, number), number)
        for number in range(first, first + BATCHES_PER_STEP)
    ]
    plan = (world.part(starts), world.part(keys).astype(np.uint32), np.array(rates, np.float32))
    return [Tensor(np.ascontiguousarray(array)).realize() for array in plan]


def learning_rate(arguments: argparse.Namespace, number: int) -> float:
    """The rate of the update with this number, counted from 1: a linear rise, then the decay."""
    rate = arguments.learning_rate
    if number <= arguments.warmup:
        return rate * number / arguments.warmup
    if arguments.decay == "none":
        return rate
    n_updates = arguments.n_steps * BATCHES_PER_STEP - arguments.warmup
    share = min(1, (number - arguments.warmup) / n_updates)
    lowest = arguments.min_learning_rate
    return lowest + (rate - lowest) * (1 + math.cos(math.pi * share)) / 2


def capture_training(
    model: GPT,
    optimizer: AdamW,
    parameters: Flat,
    ids: np.ndarray,
    losses: Tensor,
    arguments: argparse.Namespace,
    world: distributed.World,
) -> Callable:
    """One batch as captured jits: it takes the row `batch` of each part of the plan, updates the
    parameters and the moments, and leaves its loss, of all a share, in `losses`."""
    ids = Tensor(ids).realize()
    gradients = Flat(parameters.shapes)
    n_parts = arguments.accumulate
    part_size = world.share(arguments.batch_size, "--batch-size", n_parts) // n_parts

    def compute(starts: Tensor, keys: Tensor, batch: Variable) -> None:
        starts, keys = starts[batch].contiguous(), keys[batch].contiguous()
        total = None
        for part in range(n_parts):
            part_starts = starts[part * part_size : (part + 1) * part_size]
            inputs, targets = windows(ids, part_starts, arguments.context_length)
            dropout = Dropout(model.config.dropout, keys[part : part + 1])
            with Context(PRODUCT_DTYPE=arguments.dtype):
                loss = model.loss(inputs, targets, dropout) / (n_parts * world.size)
                of_part = loss.gradient(*parameters.parts)
            for gradient, more in zip(gradients.parts, of_part, strict=True):
                gradient.assign(gradient + more if part else more)
            total = total + loss if part else loss
            # before the update changes what they depend on, and the next part takes the memory
            Tensor.realize(total, *gradients.parts)
        losses[batch].assign(total).realize()

    def update(rates: Tensor, batch: Variable) -> None:
        whole = gradients.whole
        if arguments.grad_clip is not None:
            whole = clipped(whole, arguments.grad_clip)
        optimizer.step(whole, rates[batch].contiguous())

    def compute_and_update(starts: Tensor, keys: Tensor, rates: Tensor, batch: Variable) -> None:
        compute(starts, keys, batch)
        update(rates, batch)

    state = [*parameters.parts, *gradients.parts, ids, losses]
    if parameters.is_one:
        state += [*parameters.whole, *gradients.whole]
    state += [*optimizer.moments_1, *optimizer.moments_2]
    options = (n_parts, part_size, world.size, arguments.weight_decay, arguments.grad_clip)
    key, limit = (model.config, options, arguments.dtype), BATCHES_PER_STEP - 1
    if world.size == 1:
        return captured(compute_and_update, state, key, batch=limit)
    compute, update = (captured(step, state, key, batch=limit) for step in (compute, update))

    def train_batch(starts: Tensor, keys: Tensor, rates: Tensor, batch: int) -> None:
        compute(starts, keys, batch=batch)
        world.sum_parts(gradients)
        update(rates, batch=batch)

    return train_batch


def clipped(gradients: list[Tensor], longest: float) -> list[Tensor]:
    """The gradients, shortened as one vector to `longest`, as torch.nn.utils.clip_grad_norm_."""
    length = sum(gradient.square().sum() for gradient in gradients).sqrt()
    scale = (longest / (length + 1e-6)).minimum(1).contiguous()
    return [gradient * scale for gradient in gradients]


def capture_validation(
    model: GPT, ids: np.ndarray, arguments: argparse.Namespace, world: distributed.World
) -> Callable[[np.random.Generator], float]:
    """A function that draws windows with a random generator and returns their mean loss."""
    ids = Tensor(ids).realize()
    # no more memory than training takes
    limit = arguments.batch_size // arguments.accumulate // world.size
    size = cpu.largest_divisor(arguments.validation_size, limit)
    row, loss = Tensor(np.zeros(size, np.int32)).realize(), zeros(1)

    def validate(starts: Tensor) -> None:
        inputs, targets = windows(ids, starts, arguments.context_length)
        with Context(PRODUCT_DTYPE=arguments.dtype):
            loss.assign(model.loss(inputs, targets).reshape(1)).realize()

    state = [*model.parameters().values(), ids, loss]
    validate = captured(validate, state, (model.config, size, arguments.dtype))

    def validation_loss(rng: np.random.Generator) -> float:
        n_starts = ids.shape[0] - arguments.context_length
        starts = rng.integers(n_starts, size=(arguments.validation_size // size, size))
        losses = np.zeros(len(starts))
        for i in range(world.rank, len(starts), world.size):
            put(row, starts[i].astype(np.int32))
            validate(row)
            losses[i] = get(loss).item()
        return float(world.sum(losses).mean())

    return validation_loss


def windows(ids: Tensor, starts: Tensor, context_length: int) -> tuple[Tensor, Tensor]:
    """Windows of the ids from each start on, and the same one token later: (batch, time) each."""
    positions = starts.unsqueeze(-1) + Tensor.arange(context_length + 1)
    with Context(SPLIT_REDUCEOP=0):  # else tinygrad looks an id up by a sum over all of them
        cut = ids[positions].realize()
    return cut[:, :-1], cut[:, 1:]


def flat_parameters(model: GPT) -> Flat:
    """Memory for the parameters, in which the model has them from now on."""
    tensors = list(model.parameters().values())
    parameters = Flat([tensor.shape for tensor in tensors])
    for tensor, part in zip(tensors, parameters.parts, strict=True):
        tensor.replace(part)
    return parameters


def read_moments(optimizer: AdamW, parameters: Flat, names: list[str]) -> dict[str, np.ndarray]:
    arrays = []
    for moments in (optimizer.moments_1, optimizer.moments_2):
        arrays += parameters.split([get(moment) for moment in moments])
    return dict(zip(resume.moment_names(names), arrays, strict=True))


def write_moments(optimizer: AdamW, parameters: Flat, saved: dict[str, np.ndarray]) -> None:
    arrays = list(saved.values())
    half = len(arrays) // 2
    for moments, of_kind in (
        (optimizer.moments_1, arrays[:half]),
        (optimizer.moments_2, arrays[half:]),
    ):
        for moment, array in zip(moments, parameters.join(of_kind), strict=True):
            put(moment, array)
