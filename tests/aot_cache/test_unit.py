"""A unit is refused when it could not be stored."""

import jax
import jax.numpy as jnp
import pytest

from aot_cache.unit import Unit
from elastic_jax.errors import ExecutableError

ARGUMENT = jax.ShapeDtypeStruct((2,), jnp.float32)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 200])
def test_names_that_are_no_file_names(name):
    with pytest.raises(ExecutableError, match="is not a unit name"):
        Unit(name, lambda x: (x,), (ARGUMENT,), (), {})


def test_donating_an_argument_that_does_not_exist():
    with pytest.raises(ExecutableError, match="argument 1 is donated, but there are 1 arguments"):
        Unit("step", lambda x: (x,), (ARGUMENT,), (1,), {})
