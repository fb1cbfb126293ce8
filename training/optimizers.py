"""The optimizers, AdamW and Muon, and the schedule of the learning rate."""

import functools
import math
from dataclasses import replace
from itertools import islice

from tinygrad import Tensor, UOp
from tinygrad.uop.ops import KernelInfo

from backend import einsum
from backend.arrays import FlatBuffer, Shapes
from training.config import OptimizerConfig, TrainingConfig


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2017), on every parameter alike.

    `parameters`, `gradients` and `memory`, which holds the moments, are one FlatBuffer each.
    `buffers` lists every tensor that a jit of `step` reads or writes.
    """

    def __init__(self, shapes: Shapes, config: TrainingConfig, flat_buffers=()):
        """`flat_buffers`: parameters, gradients and memory of these shapes, by default new ones."""
        state, n = self.state_shapes(shapes), len(shapes)
        flat_buffers = flat_buffers or map(FlatBuffer, (shapes, shapes, state))
        self.config, names = config, list(state)
        self.parameters, self.gradients, self.memory = flat_buffers
        self.moments_1, self.moments_2 = (self.memory.part(x) for x in (names[:n], names[n:]))
        self.state = [*self.moments_1.whole, *self.moments_2.whole]
        self.buffers = [*self.parameters.tensors, *self.gradients.tensors, *self.state]

    @staticmethod
    def state_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the moments, for parameters of these names and shapes."""
        kinds = ("moments_1", "moments_2")
        return {f"{kind}.{name}": shape for kind in kinds for name, shape in shapes.items()}

    def rates(self, number: int) -> list[float]:
        """The 3 numbers that `step` takes for an update, whose `number` counts from 1."""
        betas = self.config.optimizer.beta_1, self.config.optimizer.beta_2
        # moments start at 0: these factors undo the bias
        return [learning_rate(self.config, number), *(1 / (1 - beta**number) for beta in betas)]

    def step(self, rates: Tensor) -> None:
        """Updates the parameters in place by the gradients, at the 3 rates of an update."""
        max_norm = self.config.optimizer.grad_clipping
        self.update(clip_gradients(self.gradients.whole, max_norm), rates)

    def update(self, grads: list[Tensor], rates: Tensor) -> None:
        kernel = functools.partial(adamw_kernel, config=self.config.optimizer)
        wholes = self.parameters.whole, self.moments_1.whole, self.moments_2.whole, grads
        for tensors in zip(*wholes, strict=True):
            Tensor.realize(*Tensor.custom_kernel(*tensors, rates, fxn=kernel)[:3])


def adamw_kernel(p: UOp, m: UOp, v: UOp, g: UOp, rates: UOp, config: OptimizerConfig) -> UOp:
    """Updates parameters and moments in one pass, which takes less time than one for each."""
    i = UOp.range(p.numel(), 0)
    p, m, v, g = (x.flatten()[i] for x in (p, m, v, g))
    learning_rate, unbias_1, unbias_2 = (rates[j] for j in range(3))
    new_m = config.beta_1 * m + (1 - config.beta_1) * g
    new_v = config.beta_2 * v + (1 - config.beta_2) * g * g
    update = new_m * unbias_1 / ((new_v * unbias_2).sqrt() + config.epsilon)
    new_p = p - learning_rate * (update + config.weight_decay * p)
    stores = UOp.group(m.store(new_m), v.store(new_v), p.store(new_p))
    return stores.end(i).sink(arg=KernelInfo("adamw"))


class Muon:
    """Muon (Jordan et al., 2024), with decoupled weight decay, on the matrices of the blocks; AdamW
    on all other parameters. The attributes are AdamW's."""

    def __init__(self, shapes: Shapes, config: TrainingConfig):
        # matrices of one shape lie side by side, as one batch
        *groups, others = group_names(shapes)
        shapes = {name: shapes[name] for group in (*groups, others) for name in group}
        self.config, state = config, self.state_shapes(shapes)
        buffers = [FlatBuffer(x) for x in (shapes, shapes, state)]
        self.parameters, self.gradients, self.memory = buffers
        self.matrices = [self.parameters.part(group) for group in groups]
        self.matrix_gradients = [self.gradients.part(group) for group in groups]
        self.momenta = [self.memory.part(f"momentum.{x}" for x in group) for group in groups]
        shapes = {name: shapes[name] for name in others}
        names = (others, others, AdamW.state_shapes(shapes))
        parts = [buffer.part(x) for buffer, x in zip(buffers, names, strict=True)]
        self.adamw = AdamW(shapes, config, parts)
        self.state = [tensor for momentum in self.momenta for tensor in momentum.whole]
        self.state += self.adamw.state
        self.buffers = [*self.parameters.tensors, *self.gradients.tensors, *self.state]

    @staticmethod
    def state_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Names and shapes of momenta and moments, for parameters of these names and shapes."""
        *matrices, others = group_names(shapes)
        momenta = {f"momentum.{name}": shapes[name] for group in matrices for name in group}
        return momenta | AdamW.state_shapes({name: shapes[name] for name in others})

    def rates(self, number: int) -> list[float]:
        """The 4 numbers that `step` takes for an update, whose `number` counts from 1."""
        return [muon_learning_rate(self.config, number), *self.adamw.rates(number)]

    def step(self, rates: Tensor) -> None:
        """Updates the parameters in place by the gradients, at the 4 rates of an update."""
        config, buffers = self.config.optimizer, (*self.matrix_gradients, self.adamw.gradients)
        grads = [tensor for buffer in buffers for tensor in buffer.whole]
        grads = iter(clip_gradients(grads, config.grad_clipping))
        for matrices, momentum in zip(self.matrices, self.momenta, strict=True):
            updates = []
            for m, g in zip(momentum.whole, islice(grads, len(momentum.whole)), strict=True):
                m.assign(m + (1 - config.momentum) * (g - m))
                updates.append(g + config.momentum * (m - g))  # Nesterov's
            update = orthogonalise(matrices.stack(updates))  # (n, rows, columns)
            update = update * math.sqrt(max(1, update.shape[1] / update.shape[2]))
            for p, u in zip(matrices.whole, matrices.unstack(update), strict=True):
                p.assign(p - rates[:1] * (u + config.weight_decay * p))
            Tensor.realize(*matrices.whole, *momentum.whole)
        self.adamw.update(list(grads), rates[1:])


OPTIMIZERS = {"adamw": AdamW, "muon": Muon}


def group_names(shapes: Shapes) -> list[list[str]]:
    """A list of names for each shape of the blocks' matrices, and last all other names."""
    groups, others = {}, []
    for name, shape in shapes.items():
        is_matrix = name.startswith("blocks.") and len(shape) == 2
        (groups.setdefault(shape, []) if is_matrix else others).append(name)
    return [*groups.values(), others]


def orthogonalise(x: Tensor) -> Tensor:
    """(n, rows, columns) -> for each matrix about the nearest one with orthonormal rows, or columns
    if there are fewer columns: five Newton-Schulz steps bring its singular values near 1."""
    x = x / (x.square().sum((1, 2), keepdim=True).sqrt() + 1e-7)
    is_tall = x.shape[1] > x.shape[2]  # then in effect transposed
    identity = Tensor.eye(min(x.shape[1:]))
    for _ in range(5):
        square = einsum("bji,bjk->bik" if is_tall else "bij,bkj->bik", x, x)
        fourth = einsum("bij,bjk->bik", square, square)
        factor = 3.4445 * identity - 4.7750 * square + 2.0315 * fourth
        x = einsum("bij,bjk->bik", *((x, factor) if is_tall else (factor, x)))
    return x


def clip_gradients(grads: list[Tensor], max_norm: float | None) -> list[Tensor]:
    """Gradients scaled to a total norm of at most `max_norm`, as torch.nn.utils.clip_grad_norm_."""
    if max_norm is None:
        return grads
    norm = sum(grad.square().sum() for grad in grads).sqrt()
    scale = (max_norm / (norm + 1e-6)).minimum(1).contiguous()
    return [grad * scale for grad in grads]


def learning_rate(config: TrainingConfig, number: int) -> float:
    """The rate of an update, whose `number` counts from 1: linear warmup, then the decay."""
    rate, lowest = config.learning_rate, config.min_learning_rate
    if number <= config.warmup:
        return rate * number / config.warmup
    if config.decay == "none":
        return rate
    n_updates = config.n_steps * config.batches_per_step - config.warmup
    share = min(1, (number - config.warmup) / n_updates)
    return lowest + (rate - lowest) * (1 + math.cos(math.pi * share)) / 2


def muon_learning_rate(config: TrainingConfig, number: int) -> float:
    """Muon's rate, on AdamW's schedule: the decay ends at the same share of the rate."""
    rate = config.muon_learning_rate
    share = config.min_learning_rate / config.learning_rate if config.learning_rate else 0
    config = replace(config, learning_rate=rate, min_learning_rate=share * rate)
    return learning_rate(config, number)
