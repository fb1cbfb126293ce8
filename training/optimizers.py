"""How gradients change the parameters: AdamW, and the learning rate over a training."""

import math
from collections.abc import Iterable, Mapping

import numpy as np
from tinygrad import Tensor

from backend.memory import Flat
from training.settings import OptimizerConfig, TrainingConfig


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2017), on every parameter alike."""

    def __init__(self, parameters: Flat, config: OptimizerConfig):
        self.parameters, self.config = parameters, config
        self.moments_1, self.moments_2 = (Flat(parameters.shapes) for _ in range(2))
        self.state = [*self.moments_1.whole, *self.moments_2.whole]

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
        if config.grad_clipping is not None:
            gradients = clipped(gradients, config.grad_clipping)
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

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """The moments of the parameters of these names, each under a name of its own."""
        arrays = [*self.moments_1.read(), *self.moments_2.read()]
        return dict(zip(moment_names(names), arrays, strict=True))

    def write(self, moments: Mapping[str, np.ndarray]) -> None:
        """What `read` gave, in its order."""
        arrays = list(moments.values())
        self.moments_1.write(arrays[: len(arrays) // 2])
        self.moments_2.write(arrays[len(arrays) // 2 :])


def moment_names(names: Iterable[str]) -> list[str]:
    """Names for the first moments of all parameters, then for the second ones."""
    names = list(names)
    return [f"{kind}.{name}" for kind in ("moments_1", "moments_2") for name in names]


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
