"""The rules that conftest.py sets hold: each of these would pass silently without its rule."""

import os
import warnings
from collections.abc import Sequence
from typing import Protocol, Self

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from beartype.roar import BeartypeCallHintParamViolation, BeartypeCallHintReturnViolation
from runtime_types import checked

from elastic_jax.groups import Group
from elastic_jax.plan import stored_precision


def test_mixed_dtypes_raise():
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.ones(2, jnp.int8) + jnp.ones(2, jnp.float32)


def test_mixed_ranks_raise():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones(2) + jnp.ones((2, 2))


def test_warnings_raise():
    with pytest.raises(UserWarning):
        warnings.warn("a warning", stacklevel=1)


@pytest.mark.skipif(os.environ["JAX_PLATFORMS"] != "cpu", reason="a run on GPUs has its own devices")
def test_there_are_eight_devices():
    assert len(jax.devices()) == 8


def test_annotations_are_checked():
    with pytest.raises(jaxtyping.TypeCheckError):
        stored_precision(3)


@pytest.mark.usefixtures("unchecked_types")
def test_annotations_need_not_be_checked():
    assert stored_precision(3) == "int8"


class Node:
    @checked
    def copy(self) -> Self:
        return type(self)()

    @checked
    def broken(self, others: list[Self]) -> Self | None:
        return others[0] if others else 3


class Leaf(Node):
    pass


def test_self_is_checked():
    assert isinstance(Leaf().copy(), Leaf)
    assert isinstance(Node().broken([Leaf()]), Leaf)
    with pytest.raises(BeartypeCallHintReturnViolation):
        Node().broken([])
    with pytest.raises(BeartypeCallHintParamViolation):
        Node().broken([1])


class Named(Protocol):
    def name(self) -> str: ...


def test_protocols_are_checked():
    @checked
    def first[T: Named](named: Sequence[T]) -> T:
        return named[0]

    class Person:
        def name(self) -> str:
            return "Ada"

    assert first([Person()]).name() == "Ada"
    with pytest.raises(BeartypeCallHintParamViolation):
        first([1])


def test_dataclasses_are_checked():
    with pytest.raises(jaxtyping.TypeCheckError):
        Group("lm_head", "lm_head", "many", 1)
