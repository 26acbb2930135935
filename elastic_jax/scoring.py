"""From score events to scores."""

import dataclasses

import numpy as np

from elastic_jax.errors import RequestError
from elastic_jax.requests import ScoreEvent, ScoreRequest


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a continuation is after a context.

    Attributes:
        log_probability: of the whole continuation, nats.
        token_log_probabilities: of each of its tokens, nats.
        is_greedy: whether each of its tokens is the most likely one.
        token_ids: the continuation's tokens.
    """

    log_probability: float
    token_log_probabilities: tuple[float, ...]
    is_greedy: bool
    token_ids: tuple[int, ...]


def score_of(request: ScoreRequest, event: ScoreEvent) -> Score:
    """What a finished event says of the continuation.

    Raises:
        RequestError: the logits were not finite.
    """
    if not event.finite:
        raise RequestError("the model's logits are not finite for this text: check the checkpoint with `verify`")
    wanted = np.asarray(request.tokens[request.first :])
    return Score(
        log_probability=float(event.log_probabilities.astype(np.float64).sum()),
        token_log_probabilities=tuple(float(value) for value in event.log_probabilities),
        is_greedy=bool((event.argmax == wanted).all()),
        token_ids=request.tokens[request.first :],
    )
