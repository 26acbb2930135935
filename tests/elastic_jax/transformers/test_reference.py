"""The drop-in against transformers itself: what make_dropin_reference.py wrote down (tests/fixtures/README.md)."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic_jax.transformers import ElasticForCausalLM

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
REFERENCE = json.loads((FIXTURES / "dropin_reference.json").read_text("utf-8"))["models"]
CASES = [(name, index) for name in REFERENCE for index in range(len(REFERENCE[name]["cases"]))]
STOPS = [(name, index) for name in REFERENCE for index in range(len(REFERENCE[name]["stops"]))]


@pytest.fixture(scope="module")
def arrays() -> Any:
    return np.load(FIXTURES / "dropin_reference.npz")


def run(model: ElasticForCausalLM, case: dict[str, Any]) -> Any:
    mask = case["attention_mask"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the default length
        return model.generate(
            input_ids=np.array(case["input_ids"]),
            attention_mask=None if mask is None else np.array(mask),
            **case["arguments"],
        )


def test_there_are_enough_cases() -> None:
    assert all(len(reference["cases"]) >= 40 for reference in REFERENCE.values())


@pytest.mark.parametrize(("name", "index"), CASES, ids=lambda value: str(value))
def test_generate_gives_what_transformers_gives(
    model_of: Callable[[str], ElasticForCausalLM], arrays: Any, name: str, index: int
) -> None:
    case = REFERENCE[name]["cases"][index]
    found = run(model_of(name), case)
    arguments = case["arguments"]
    sequences = found.sequences if arguments.get("return_dict_in_generate") else found
    assert list(sequences.shape) == case["shape"], case["name"]
    if case["sequences"] is not None:
        assert sequences.tolist() == case["sequences"], case["name"]
    for kind in ("scores", "logits"):
        if not arguments.get(f"output_{kind}"):
            continue
        expected = arrays[f"{name}/{index}/{kind}"]
        width = len(case["input_ids"][0])
        for step, scores in enumerate(getattr(found, kind)):
            for row in range(len(scores)):
                answer = sequences[row, width:].tolist()
                if arguments.get("pad_token_id") in answer[: step + 1]:
                    assert not scores[row].any()  # it has ended
                    continue
                np.testing.assert_array_equal(np.isinf(scores[row]), np.isinf(expected[step, row]))
                np.testing.assert_allclose(scores[row], expected[step, row], atol=2e-4)
        assert len(getattr(found, kind)) == len(expected)


@pytest.mark.parametrize(("name", "index"), STOPS, ids=lambda value: str(value))
def test_stop_strings_end_where_those_of_transformers_do(
    model_of: Callable[[str], ElasticForCausalLM], name: str, index: int
) -> None:
    case = REFERENCE[name]["stops"][index]
    assert run(model_of(name), case).tolist() == case["sequences"]


@pytest.mark.parametrize("name", REFERENCE)
def test_a_streamer_is_given_what_transformers_gives_it(
    model_of: Callable[[str], ElasticForCausalLM], name: str
) -> None:
    calls: list[Any] = []

    class Recorder:
        def put(self, value: np.ndarray) -> None:
            calls.append(value.tolist())

        def end(self) -> None:
            calls.append("end")

    streamed = REFERENCE[name]["streamed"]
    model_of(name).generate(np.array(streamed["input_ids"]), max_new_tokens=5, streamer=Recorder())
    assert calls == streamed["calls"]


@pytest.mark.parametrize("name", REFERENCE)
def test_logits_of_a_call_are_those_of_transformers(
    model_of: Callable[[str], ElasticForCausalLM], arrays: Any, name: str
) -> None:
    forward = REFERENCE[name]["forward"]
    mask = np.array(forward["attention_mask"])
    output = model_of(name)(np.array(forward["input_ids"]), attention_mask=mask)
    np.testing.assert_allclose(output.logits[mask == 1], arrays[f"{name}/forward"][mask == 1], atol=2e-4)
    assert not output.logits[mask == 0].any()
    (logits,) = model_of(name)(np.array(forward["input_ids"]), attention_mask=mask, return_dict=False)
    assert logits.tolist() == output["logits"].tolist() == output[0].tolist()
