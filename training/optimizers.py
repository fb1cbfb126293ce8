"""How gradients change the parameters: AdamW or Muon, and the learning rate over a training."""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from tinygrad import Tensor

from backend import einsum
from backend.arrays import Flat, Groups
from training.config import OptimizerConfig, TrainingConfig

Shapes = Mapping[str, tuple[int, ...]]  # of parameters, by name


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2017), on every parameter alike."""

    def __init__(self, parameters: Flat, config: OptimizerConfig):
        self.parameters, self.config = parameters, config
        self.moments_1, self.moments_2 = (Flat(parameters.shapes) for _ in range(2))
        self.state = [*self.moments_1.whole, *self.moments_2.whole]

    @staticmethod
    def memory(shapes: Shapes) -> Flat:
        """Memory for the parameters, laid out as `step` goes through it."""
        return Flat(list(shapes.values()))

    @staticmethod
    def state_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """The names and shapes of what `read` gives, in its order, for parameters of these."""
        kinds = ("moments_1", "moments_2")
        return {f"{kind}.{name}": shape for kind in kinds for name, shape in shapes.items()}

    def rates(self, learning_rate: float, number: int) -> list[float]:
        """What `step` needs for the update with this number, counted from 1."""
        return [
            learning_rate,
            1 / (1 - self.config.beta_1**number),  # moments start at 0: these undo the bias of that
            1 / (1 - self.config.beta_2**number),
        ]

    def step(self, gradients: list[Tensor], rates: Tensor) -> None:
        """Updates the parameters in place; `gradients` are laid out as `Flat.whole`, and `rates`
        (3,) holds the numbers of the method above."""
        config = self.config
        learning_rate, unbias_1, unbias_2 = rates.split(1)
        for p, m, v, g in zip(
            self.parameters.whole,
            self.moments_1.whole,
            self.moments_2.whole,
            gradients,
            strict=True,
        ):
            m.assign(config.beta_1 * m + (1 - config.beta_1) * g)
            v.assign(config.beta_2 * v + (1 - config.beta_2) * g.square())
            update = m * unbias_1 / ((v * unbias_2).sqrt() + config.epsilon)
            p.assign(p - learning_rate * (update + config.weight_decay * p))
        Tensor.realize(*self.parameters.whole, *self.state)

    def read(self) -> list[np.ndarray]:
        """The moments of all parameters, as `state_shapes` has them."""
        return [*self.moments_1.read(), *self.moments_2.read()]

    def write(self, moments: Iterable[np.ndarray]) -> None:
        """What `read` gave."""
        moments = list(moments)
        self.moments_1.write(moments[: len(moments) // 2])
        self.moments_2.write(moments[len(moments) // 2 :])


class Muon:
    """Muon (Jordan et al., 2024), with decoupled weight decay, on the matrices of the blocks; AdamW
    on all other parameters, which are the last group."""

    def __init__(self, parameters: Groups, config: OptimizerConfig):
        *self.matrices, others = parameters.groups
        self.config, self.adamw = config, AdamW(others, config)
        self.momenta = [Flat(group.shapes) for group in self.matrices]
        of_matrices = [tensor for momentum in self.momenta for tensor in momentum.whole]
        self.state = [*of_matrices, *self.adamw.state]

    @staticmethod
    def memory(shapes: Shapes) -> Groups:
        """Memory for the parameters, with the matrices of a shape side by side, as one batch."""
        names = list(shapes)
        return Groups(list(shapes.values()), [[names.index(n) for n in g] for g in grouped(shapes)])

    @staticmethod
    def state_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """The names and shapes of what `read` gives, in its order, for parameters of these."""
        *matrices, others = grouped(shapes)
        momenta = {f"momentum.{name}": shapes[name] for group in matrices for name in group}
        return momenta | AdamW.state_shapes({name: shapes[name] for name in others})

    def rates(self, learning_rate: float, muon_learning_rate: float, number: int) -> list[float]:
        """What `step` needs for the update with this number, counted from 1."""
        return [muon_learning_rate, *self.adamw.rates(learning_rate, number)]

    def step(self, gradients: list[Tensor], rates: Tensor) -> None:
        """Updates the parameters in place; `gradients` are laid out as `Groups.whole`, and `rates`
        (4,) holds the numbers of the method above."""
        learning_rate, decay, rest = rates[:1], self.config.weight_decay, iter(gradients)
        for matrices, momentum in zip(self.matrices, self.momenta, strict=True):
            updates = []
            of_matrices = itertools.islice(rest, len(momentum.whole))
            for m, g in zip(momentum.whole, of_matrices, strict=True):
                m.assign(m + (1 - self.config.momentum) * (g - m))
                updates.append(g + self.config.momentum * (m - g))  # Nesterov's
            update = orthogonalised(matrices.stack(updates))
            update = update * math.sqrt(max(1, update.shape[1] / update.shape[2]))
            for p, u in zip(matrices.whole, matrices.unstack(update), strict=True):
                p.assign(p - learning_rate * (u + decay * p))
            Tensor.realize(*matrices.whole, *momentum.whole)
        self.adamw.step(list(rest), rates[1:])

    def read(self) -> list[np.ndarray]:
        """The momenta of the matrices and the moments of all else, as `state_shapes` has them."""
        momenta = [array for momentum in self.momenta for array in momentum.read()]
        return [*momenta, *self.adamw.read()]

    def write(self, arrays: Iterable[np.ndarray]) -> None:
        """What `read` gave."""
        arrays = iter(arrays)
        for momentum in self.momenta:
            momentum.write(itertools.islice(arrays, len(momentum.shapes)))
        self.adamw.write(arrays)


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


def clipped(gradients: list[Tensor], longest: float) -> list[Tensor]:
    """The gradients, shortened as one vector to `longest`, as torch.nn.utils.clip_grad_norm_."""
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


def learning_rates(config: TrainingConfig, number: int) -> list[float]:
    """All that the optimizer takes for the update with this number."""
    rates = [learning_rate(config, number)]
    if config.optimizer.algorithm == "muon":
        rates.append(muon_learning_rate(config, number))
    return rates
