from typing import Any

import pytest
from fake_runner import MODEL
from tiny import tiny_step_config

from elastic_jax.errors import RequestError
from elastic_jax.limits import Limits
from elastic_jax.requests import GenerateRequest, SamplingParams, ScoreRequest

LIMITS = Limits(MODEL, tiny_step_config(max_bias=2, top_n=3), max_context=20)


def generate(prompt: tuple[int, ...] = (1, 2, 3), new: Any = 4, choices: Any = 1, **sampling: Any) -> GenerateRequest:
    return GenerateRequest(prompt, new, SamplingParams(**sampling), frozenset(), choices, None)


def test_the_largest_requests_pass() -> None:
    LIMITS.check(generate((0,) * 19, 1))
    LIMITS.check(generate((MODEL.vocab_size - 1,), 19))
    LIMITS.check(generate(logit_bias={1: 1.0, 2: 2.0}, top_log_probabilities=3))
    LIMITS.check(ScoreRequest((0,) * 20, 19, 3))
    LIMITS.check(ScoreRequest((0, 1), 1, 0))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (generate(()), "the prompt is empty"),
        (generate((1, 1000)), "the prompt names token 1000, outside the vocabulary of 1000 tokens"),
        (generate((-1,)), "token -1"),
        (generate((0,) * 20, 1), "20 prompt tokens and 1 new ones need a context of 21 tokens.*longest here is 20"),
        (generate((0,) * 3, 18), "a context of 21 tokens"),
        (generate(new=0), "max_new_tokens must be at least 1, found 0"),
        (generate(choices=0), "choices must be at least 1, found 0"),
        (
            generate(choices=4097),
            r"4097 answers to one prompt .* at most 4096 are queued at once \(.* ask several times",
        ),
        (generate(logit_bias={1: 1.0, 2: 1.0, 3: 1.0}), "3 entries, and at most 2 were compiled"),
        (generate(logit_bias={1000: 1.0}), "logit_bias names token 1000"),
        (generate(top_log_probabilities=4), "4 top log-probabilities wanted, and at most 3 were compiled"),
        (ScoreRequest((), 1, 0), "token 1 of 0"),
        (ScoreRequest((1,), 1, 0), "token 1 of 1"),
        (ScoreRequest((1, 2), 0, 0), "token 0 of 2: it must have a token before it"),
        (ScoreRequest((1, 2), 2, 0), "token 2 of 2"),
        (ScoreRequest((0,) * 21, 1, 0), "21 tokens to score need a context of 21"),
        (ScoreRequest((1, 1000), 1, 0), "the text to score names token 1000"),
        (ScoreRequest((1, 2), 1, 4), "4 top log-probabilities"),
        (ScoreRequest((1, 2), 1, -1), "top_log_probabilities must be at least 0"),
    ],
)
def test_impossible_requests_are_refused(request_: GenerateRequest | ScoreRequest, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        LIMITS.check(request_)


@pytest.mark.usefixtures("unchecked_types")
def test_counts_are_integers() -> None:
    for request in (generate(new=2.5), generate(new=True), generate(new="4"), generate(choices=1.0)):
        with pytest.raises(RequestError, match="must be an integer"):
            LIMITS.check(request)
