import jax
import kernels_bench as kernels
import pytest
from random_model import MISTRAL_SMALL, SMALL

LIMITS = {"read": 4e12, "int8": 1e15, "bf16": 5e14}


def case(read: int, operations: int, arithmetic: str = "int8") -> kernels.Case:
    return kernels.Case("k", "xla", "w", read, operations, arithmetic, lambda: pytest.fail("not made"))


@pytest.mark.parametrize(
    ("read", "operations", "bound", "part"),
    [(4 * 10**9, 10**11, "reading", 0.5), (4 * 10**6, 10**12, "int8", 0.5)],
)
def test_the_longer_of_two_times_is_the_limit(read: int, operations: int, bound: str, part: float):
    assert kernels.fraction(case(read, operations), 2e-3, LIMITS) == (bound, pytest.approx(part))


def test_gpus_get_every_implementation_and_cpus_the_plain_ones():
    everywhere = kernels.cases_of(MISTRAL_SMALL, "gpu", None)
    assert {c.implementation for c in everywhere} == {"xla", "pallas"}
    assert {c.kernel for c in everywhere} == set(kernels.TABLE)
    assert {c.implementation for c in kernels.cases_of(SMALL, "cpu", None)} == {"xla"}
    down = next(c for c in everywhere if c.work == "down [5120, 32768], 2 rows")
    assert (down.read_bytes, down.operations) == (5120 * 32768, 4 * 5120 * 32768)


def test_a_wrong_kernel_ends_the_bench():
    small = next(c for c in kernels.cases_of(SMALL, "cpu", ["integer_dot"]) if c.work.startswith("o "))
    made, call = kernels.compiled(small)
    row = kernels.measure(small, made, call, LIMITS)
    assert row["us"] > 0
    assert row["error"] <= 1e-6
    wrong = kernels.Made(made.call, made.layers, lambda *a: 1.01 * made.call(*a), made.tolerance)
    with jax.numpy_dtype_promotion("standard"), pytest.raises(SystemExit, match="wrong by"):
        kernels.measure(small, wrong, call, LIMITS)
