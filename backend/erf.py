"""The error function, for exact GELU: half the time of tinygrad's, whose gradient goes through the
terms of its approximation, and no less exact."""

import math

from tinygrad import Tensor
from tinygrad.helpers import polyN

# x P(x^2) / Q(x^2), XLA's minimax approximation up to where float32 rounds to 1
LARGEST = 3.832506856900711
P = 2.2905065861350646e-4, 3.4082910107109506e-3, 5.0955695062380861e-2, 0.18520832239976145
P = *P, 1.128379143519084
Q = -1.1791602954361697e-7, 2.3547966471313185e-5, 1.0179625278914885e-3, 1.4070470171167667e-2
Q = *Q, 0.11098505178285362, 0.49746925110067538, 1


def erf(x: Tensor) -> Tensor:
    """The error function of float32 numbers, with an error of up to 3e-7."""
    clipped = x.clip(-LARGEST, LARGEST)
    y = clipped * polyN(clipped.square(), P) / polyN(clipped.square(), Q)
    derivative = (-x.square()).exp() * (2 / math.sqrt(math.pi))
    # the last term is 0, and is dropped before it is computed; its gradient is the derivative
    return y.detach() + (x - x.detach()) * derivative.detach()
