"""The scores that transformers reports: logits after every processor that a choice went through.

The device chooses by the same rules (`elastic_jax.sampling`) and sends only the choice and, where asked, the model's
own logits. What is reported is computed from those here, for `output_scores` alone.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from elastic_jax.requests import SamplingParams


def processed_scores(
    logits: Float32[np.ndarray, " vocab"],
    seen: Sequence[int],
    forbidden: Sequence[int],
    sampling: SamplingParams,
) -> Float32[np.ndarray, " vocab"]:
    """Scores of one choice.

    Args:
        logits: by the model itself.
        seen: tokens of the prompt and of the answer so far; they are penalized.
        forbidden: tokens that may not come: ends, before the least length.
        sampling: temperature 0 means that nothing is filtered.

    Returns:
        The scores; -inf where a token cannot be chosen.
    """
    scores = logits.astype(np.float32).copy()
    if sampling.repetition_penalty != 1:
        which = np.unique(np.asarray(seen, np.int64))
        penalty, own = np.float32(sampling.repetition_penalty), scores[which]
        scores[which] = np.where(own < 0, own * penalty, own / penalty)
    scores[list(forbidden)] = -np.inf
    if sampling.temperature == 0:
        return scores
    scores /= np.float32(sampling.temperature)
    if 0 < sampling.top_k < len(scores):
        scores[scores < np.partition(scores, -sampling.top_k)[-sampling.top_k]] = -np.inf
    if sampling.top_p < 1:
        order = np.argsort(scores, kind="stable")
        mass = np.cumsum(_probabilities(scores[order]))
        dropped = mass <= 1 - sampling.top_p
        dropped[-1] = False  # the likeliest token always stays
        scores[order[dropped]] = -np.inf
    if sampling.min_p > 0:
        probabilities = _probabilities(scores)
        scores[probabilities < np.float32(sampling.min_p) * probabilities.max()] = -np.inf
    return scores


def _probabilities(scores: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()
