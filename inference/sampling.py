"""The choice of the next token."""

from collections.abc import Sequence

import numpy as np


def sample(
    logits: np.ndarray,
    temperature: float,
    rng: np.random.Generator,
    top_k: int | None = None,
    top_p: float | None = None,
    excluded: Sequence[int] = (),
) -> np.ndarray:
    """logits (batch, vocab_size) -> ids (batch,), drawn from softmax(logits / temperature).

    Temperature 0 takes the likeliest token. `top_k` leaves as many of the likeliest in the draw,
    `top_p` as few of them as have that share of the probability (Holtzman et al., 2019). The ids
    `excluded` are never drawn.
    """
    if len(excluded):
        logits = logits.copy()
        logits[:, excluded] = -np.inf
    if temperature == 0:
        return logits.argmax(-1)
    weights = np.exp((logits - logits.max(-1, keepdims=True)).astype(np.float64) / temperature)
    order = np.argsort(-weights, axis=-1, kind="stable")
    weights = np.take_along_axis(weights, order, -1)  # the likeliest first
    if top_k is not None:
        weights[:, top_k:] = 0
    totals = weights.cumsum(-1)
    if top_p is not None:
        weights[:, 1:][(totals - weights >= top_p * totals[:, -1:])[:, 1:]] = 0
    totals = weights.cumsum(-1)
    places = (totals <= (rng.random(len(logits)) * totals[:, -1])[:, None]).sum(-1)
    return np.take_along_axis(order, places[:, None], -1)[:, 0]
