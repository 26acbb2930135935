import math
from typing import Any

import numpy as np
import pytest

from elastic_jax.errors import ElasticError, RequestError
from elastic_jax.requests import MAX_BIAS, MIN_TEMPERATURE, SamplingParams


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (-0.1, math.nan, math.inf, MIN_TEMPERATURE / 2, "0.5", None, True)),
        ("top_k", (-1, 1.5, "3", None, True)),
        ("top_p", (0.0, -0.5, 1.01, math.nan, "1")),
        ("min_p", (-0.01, 1.01, math.nan)),
        ("repetition_penalty", (0.0, -1.0, math.inf, math.nan, 1e-4, 1e4)),
        ("presence_penalty", (-2.1, 2.1, math.nan)),
        ("frequency_penalty", (-2.1, 2.1, math.nan)),
        ("seed", (-1, 2**64, 1.0, "1", True)),
        ("top_log_probabilities", (-1, 0.5, None)),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_values_out_of_range_or_of_another_type_are_refused_by_name(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(RequestError, match=f"^{name} must be .*, found ") as refused:
            SamplingParams(**{name: value})
        assert repr(value) in str(refused.value)


@pytest.mark.usefixtures("unchecked_types")
def test_logit_bias_is_refused_by_token() -> None:
    for bias in (math.nan, math.inf, MAX_BIAS * 2, -MAX_BIAS * 2, "1"):
        with pytest.raises(RequestError, match="logit_bias of token 7 must be"):
            SamplingParams(logit_bias={7: bias})  # pyright: ignore[reportArgumentType]
    with pytest.raises(RequestError, match="must have token ids as keys, found '7'"):
        SamplingParams(logit_bias={"7": 1.0})  # pyright: ignore[reportArgumentType]


def test_the_ends_of_every_range_are_allowed() -> None:
    SamplingParams(temperature=MIN_TEMPERATURE, top_p=1.0, min_p=1.0, seed=2**64 - 1, top_k=10**12)
    SamplingParams(min_p=0.0, presence_penalty=-2.0, frequency_penalty=2.0, repetition_penalty=0.001, seed=0)
    SamplingParams(logit_bias={3: -math.inf, 4: MAX_BIAS, 5: -MAX_BIAS})


@pytest.mark.usefixtures("unchecked_types")
def test_numpy_scalars_are_numbers() -> None:
    SamplingParams(temperature=np.float32(0.5), top_k=np.int32(5), seed=np.uint64(7))  # pyright: ignore[reportArgumentType]


def test_a_request_error_is_also_a_value_error() -> None:
    assert issubclass(RequestError, ElasticError)
    assert issubclass(RequestError, ValueError)


def test_greedy_is_said_only_where_the_greedy_step_gives_the_same() -> None:
    assert SamplingParams(top_k=5, top_p=0.5, min_p=0.1, seed=3, top_log_probabilities=2).greedy
    for change in (
        {"temperature": 0.5},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"logit_bias": {1: 1.0}},
    ):
        assert not SamplingParams(**change).greedy
