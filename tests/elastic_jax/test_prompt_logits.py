"""Logits of whole prompts: what `score` says of the same tokens, and what they leave behind."""

from collections.abc import Callable

import numpy as np
import pytest
from tiny import CompiledTiny

from elastic_jax import ElasticMistral
from elastic_jax.errors import RequestError
from elastic_jax.prompt_logits import prompt_logits


@pytest.fixture(scope="module")
def model(compiled_tiny: Callable[..., CompiledTiny]) -> ElasticMistral:
    return ElasticMistral.load(compiled_tiny("XL", "float32").checkpoint.path, "XL", dtype="float32")


@pytest.mark.parametrize("length", [2, 16, 17, 100])
def test_their_log_probabilities_are_the_scores(model: ElasticMistral, length: int) -> None:
    tokens = np.random.default_rng(length).integers(3, 320, length).tolist()
    logits = model.delivery.prompt_logits(tokens).astype(np.float64)
    table = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    (score,) = model.score([(tokens[:1], tokens[1:])])
    found = table[np.arange(length - 1), tokens[1:]]
    np.testing.assert_allclose(found.sum(), score.log_probability, atol=1e-3)


def test_without_room_there_are_none_and_nothing_is_kept(model: ElasticMistral) -> None:
    engine = model.engine
    borrowed = [engine.borrow(16) for _ in range(engine.config.rows)]
    assert engine.borrow(1) is None
    assert prompt_logits(engine, [5, 6]) is None
    for row, pages in filter(None, borrowed):
        engine.give_back(row, pages)
    assert prompt_logits(engine, [5, 6]) is not None
    assert engine.pages.free == engine.pages.pages
    assert sorted(engine._free_rows) == list(range(engine.config.rows))


def test_impossible_prompts_are_refused(model: ElasticMistral) -> None:
    for tokens, message in (([], "the prompt is empty"), ([400], "token 400"), ([5] * 257, "a context of 257 tokens")):
        with pytest.raises(RequestError, match=message):
            model.delivery.prompt_logits(tokens)
