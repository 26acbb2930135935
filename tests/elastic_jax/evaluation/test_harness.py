import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from elastic_jax.elastic import ElasticMistral
from elastic_jax.errors import EvaluationError
from elastic_jax.evaluation.harness import ElasticLM


@pytest.fixture(scope="module")
def model(compiled_tiny):
    compiled = compiled_tiny("XL", "float32")
    return ElasticMistral.load(compiled.checkpoint.path, "XL", dtype="float32")


@pytest.fixture(scope="module")
def lm(model):
    return ElasticLM(model)


def likelihoods(pairs):
    return [Instance("loglikelihood", {}, pair, n, ("task", n, 1)) for n, pair in enumerate(pairs)]


def test_it_is_in_lm_evals_registry():
    assert get_model("elastic-jax") is ElasticLM


def test_log_likelihoods_are_those_of_score(model, lm):
    pairs = [("The stone", " is round"), ("The stone", " fell"), ("A lamp", " glows at night"), ("The stone", " fell")]
    found = lm.loglikelihood(likelihoods(pairs))
    expected = model.score(pairs)
    assert [value for value, _ in found] == pytest.approx([score.log_probability for score in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [score.is_greedy for score in expected]


def test_continuations_of_one_token_are_read_off_one_context(model, lm, monkeypatch):
    context = list(range(20, 60))
    requests = [("", context, [token]) for token in (5, 6, 7, 300)]
    expected = [model.score([(context, [token])])[0] for token in (5, 6, 7, 300)]
    monkeypatch.setattr(lm, "_score", lambda *_: pytest.fail("the contexts were read one by one"))
    found = lm._loglikelihood_tokens(requests)
    assert [value for value, _ in found] == pytest.approx([score.log_probability for score in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [score.is_greedy for score in expected]


def test_a_context_of_nothing_is_the_beginning_of_a_text(model, lm):
    ((value, _),) = lm.loglikelihood(likelihoods([("", "stone")]))
    tokens = lm.tok_encode("stone", add_special_tokens=False)
    assert value == pytest.approx(model.score([([lm.prefix_token_id], tokens)])[0].log_probability, abs=1e-4)


def test_contexts_that_are_too_long_lose_their_beginning(model, lm):
    most = lm.max_length
    tokens = np.random.default_rng(0).integers(5, 300, most + 40).tolist()
    ((value, _),) = lm._loglikelihood_tokens([("", tokens, [7, 8, 9])])
    kept = tokens[len(tokens) + 3 - most :]
    assert value == pytest.approx(model.score([(kept, [7, 8, 9])])[0].log_probability, abs=1e-4)
    with pytest.raises(EvaluationError, match="does not fit into a context"):
        lm._loglikelihood_tokens([("", [5], tokens)])


def test_rolling_log_likelihoods_count_every_token_once(model, lm):
    text = "The river is near the lamp. " * 40
    tokens = lm.tok_encode(text)
    assert len(tokens) > lm.max_length
    (found,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0, ("task", 0, 1))])
    size = lm.max_length - 1
    expected, begin = 0.0, 0
    while begin < len(tokens):
        piece = tokens[begin : begin + size]
        start = begin + len(piece) - size - 1
        context = [lm.prefix_token_id] if begin == 0 else tokens[start:begin]
        expected += model.score([(context, piece)])[0].log_probability
        begin += len(piece)
    assert found == pytest.approx(expected, rel=1e-4)


def test_texts_are_generated_up_to_a_stop_string(model, lm):
    prompts = ["The stone", "A lamp in the river"]
    free = [generation.text for generation in model.generate(prompts, max_new_tokens=12)]
    stop = free[0][3:5]
    settings = {"until": [stop], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    asked = [Instance("generate_until", {}, (prompt, dict(settings)), 0, ("task", 0, 1)) for prompt in prompts]
    assert lm.generate_until(asked) == [text.split(stop)[0] for text in free]
    with pytest.raises(EvaluationError, match="settings that are not known here: beams"):
        lm.generate_until([Instance("generate_until", {}, ("x", {"beams": 3}), 0, ("task", 0, 1))])
    with pytest.raises(EvaluationError, match="leave no room"):
        lm.generate_until([Instance("generate_until", {}, ("x", {"max_gen_toks": 10**6}), 0, ("task", 0, 1))])


def test_a_beginning_that_is_written_out_is_not_added_again(lm):
    begin = lm.model.tokenizer.decode([lm.prefix_token_id], skip_special_tokens=False)
    assert lm.tok_encode(begin + "stone") == lm.tok_encode(begin + "stone", add_special_tokens=False)
