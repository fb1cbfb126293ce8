"""How gradients change the parameters: AdamW or Muon, and the learning rate over a training."""

import functools
import math
from dataclasses import replace
from itertools import islice

from tinygrad import Tensor, UOp
from tinygrad.uop.ops import KernelInfo

from backend import einsum
from backend.arrays import FlatBuffer, Shapes
from training.config import OptimizerConfig, TrainingConfig


class Optimizer:
    """The parameters, their gradients, laid out alike, and the state, each in one buffer."""

    parameters: FlatBuffer
    gradients: FlatBuffer
    memory: FlatBuffer  # of `state`, the tensors that `step` reads and writes
    state: list[Tensor]
    buffers: list[Tensor]  # all that a jit of `step` reads and writes


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2017), on every parameter alike."""

    def __init__(self, parameters: FlatBuffer, config: TrainingConfig, gradients=None, memory=None):
        self.parameters, self.config = parameters, config
        self.gradients = gradients or FlatBuffer(parameters.shapes)
        self.memory = memory or FlatBuffer(self.state_shapes(parameters.shapes))
        names, n = list(self.memory.shapes), len(parameters.shapes)
        self.moments_1, self.moments_2 = (self.memory.part(x) for x in (names[:n], names[n:]))
        self.state = [*self.moments_1.whole, *self.moments_2.whole]
        self.buffers = [*parameters.tensors, *self.gradients.tensors, *self.state]

    @staticmethod
    def layout(shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters in the order in which `step` goes through them."""
        return dict(shapes)

    @staticmethod
    def state_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """The names and shapes of the state, for parameters of these names and shapes."""
        kinds = ("moments_1", "moments_2")
        return {f"{kind}.{name}": shape for kind in kinds for name, shape in shapes.items()}

    def rates(self, number: int) -> list[float]:
        """What `step` needs for the update with this number, counted from 1."""
        betas = self.config.optimizer.beta_1, self.config.optimizer.beta_2
        # moments start at 0: the factors undo the bias of that
        return [learning_rate(self.config, number), *(1 / (1 - beta**number) for beta in betas)]

    def step(self, rates: Tensor) -> None:
        """Updates the parameters in place by the gradients; `rates` (3,) are those of the method
        above."""
        self.update(clipped(self.gradients.whole, self.config.optimizer.grad_clipping), rates)

    def update(self, gradients: list[Tensor], rates: Tensor) -> None:
        kernel = functools.partial(adamw_kernel, config=self.config.optimizer)
        wholes = self.parameters.whole, self.moments_1.whole, self.moments_2.whole, gradients
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


class Muon(Optimizer):
    """Muon (Jordan et al., 2024), with decoupled weight decay, on the matrices of the blocks; AdamW
    on all other parameters."""

    def __init__(self, parameters: FlatBuffer, config: TrainingConfig):
        self.parameters, self.config = parameters, config
        self.gradients = FlatBuffer(parameters.shapes)
        self.memory = FlatBuffer(self.state_shapes(parameters.shapes))
        *groups, names = grouped(parameters.shapes)
        self.matrices, self.matrix_gradients = (
            [buffer.part(group) for group in groups] for buffer in (parameters, self.gradients)
        )
        self.momenta = [self.memory.part(f"momentum.{x}" for x in group) for group in groups]
        others, gradients = parameters.part(names), self.gradients.part(names)
        state = self.memory.part(AdamW.state_shapes(others.shapes))
        self.adamw = AdamW(others, config, gradients, state)
        self.state = [tensor for momentum in self.momenta for tensor in momentum.whole]
        self.state += self.adamw.state
        self.buffers = [*parameters.tensors, *self.gradients.tensors, *self.state]

    @staticmethod
    def layout(shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters in the order in which `step` goes through them: matrices of
        one shape side by side, as one batch, and all else last."""
        return {name: shapes[name] for names in grouped(shapes) for name in names}

    @staticmethod
    def state_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """The names and shapes of the state, for parameters of these names and shapes."""
        *matrices, others = grouped(shapes)
        momenta = {f"momentum.{name}": shapes[name] for group in matrices for name in group}
        return momenta | AdamW.state_shapes({name: shapes[name] for name in others})

    def rates(self, number: int) -> list[float]:
        """What `step` needs for the update with this number, counted from 1."""
        return [muon_learning_rate(self.config, number), *self.adamw.rates(number)]

    def step(self, rates: Tensor) -> None:
        """Updates the parameters in place by the gradients; `rates` (4,) are those of the method
        above."""
        config, buffers = self.config.optimizer, (*self.matrix_gradients, self.adamw.gradients)
        wholes = [tensor for buffer in buffers for tensor in buffer.whole]
        rest = iter(clipped(wholes, config.grad_clipping))
        for matrices, momentum in zip(self.matrices, self.momenta, strict=True):
            updates = []
            for m, g in zip(momentum.whole, islice(rest, len(momentum.whole)), strict=True):
                m.assign(m + (1 - config.momentum) * (g - m))
                updates.append(g + config.momentum * (m - g))  # Nesterov's
            update = orthogonalised(matrices.stack(updates))  # (n, rows, columns)
            update = update * math.sqrt(max(1, update.shape[1] / update.shape[2]))
            for p, u in zip(matrices.whole, matrices.unstack(update), strict=True):
                p.assign(p - rates[:1] * (u + config.weight_decay * p))
            Tensor.realize(*matrices.whole, *momentum.whole)
        self.adamw.update(list(rest), rates[1:])


OPTIMIZERS = {"adamw": AdamW, "muon": Muon}


def grouped(shapes: Shapes) -> list[list[str]]:
    """The names of the blocks' matrices, a list for each shape, and last those of all else."""
    of_matrices, others = {}, []
    for name, shape in shapes.items():
        is_matrix = name.startswith("blocks.") and len(shape) == 2
        (of_matrices.setdefault(shape, []) if is_matrix else others).append(name)
    return [*of_matrices.values(), others]


def orthogonalised(x: Tensor) -> Tensor:
    """(n, rows, columns) -> for each matrix about the nearest one whose rows, or columns if they
    are fewer, are orthonormal: five Newton-Schulz steps bring its singular values near 1."""
    x = x / (x.square().sum((1, 2), keepdim=True).sqrt() + 1e-7)
    is_tall = x.shape[1] > x.shape[2]  # then in effect transposed
    identity = Tensor.eye(min(x.shape[1:]))
    for _ in range(5):
        square = einsum("bji,bjk->bik" if is_tall else "bij,bkj->bik", x, x)
        fourth = einsum("bij,bjk->bik", square, square)
        factor = 3.4445 * identity - 4.7750 * square + 2.0315 * fourth
        x = einsum("bij,bjk->bik", *((x, factor) if is_tall else (factor, x)))
    return x


def clipped(gradients: list[Tensor], longest: float | None) -> list[Tensor]:
    """The gradients, shortened as one vector to `longest`, as torch.nn.utils.clip_grad_norm_."""
    if longest is None:
        return gradients
    length = sum(gradient.square().sum() for gradient in gradients).sqrt()
    scale = (longest / (length + 1e-6)).minimum(1).contiguous()
    return [gradient * scale for gradient in gradients]


def learning_rate(config: TrainingConfig, number: int) -> float:
    """The rate of the update with this number, counted from 1: a linear rise, then the decay."""
    rate, lowest = config.learning_rate, config.min_learning_rate
    if number <= config.warmup:
        return rate * number / config.warmup
    if config.decay == "none":
        return rate
    n_updates = config.n_steps * config.batches_per_step - config.warmup
    share = min(1, (number - config.warmup) / n_updates)
    return lowest + (rate - lowest) * (1 + math.cos(math.pi * share)) / 2


def muon_learning_rate(config: TrainingConfig, number: int) -> float:
    """Muon's rate: on the schedule of AdamW's, whose decay ends at the same share of the rate."""
    rate = config.muon_learning_rate
    share = config.min_learning_rate / config.learning_rate if config.learning_rate else 0
    config = replace(config, learning_rate=rate, min_learning_rate=share * rate)
    return learning_rate(config, number)
