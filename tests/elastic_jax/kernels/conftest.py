"""What tests of kernels on a GPU share."""

import pytest

from elastic_jax.kernels import prompt_library
from elastic_jax.kernels.pallas_device import compute_capability


@pytest.fixture(scope="session")
def hopper() -> None:
    """For tests of kernels with instructions that Hopper alone has: on another GPU there is nothing to run."""
    if (found := compute_capability("this test", "skip it")) != prompt_library.CAPABILITY:
        pytest.skip(f"the kernel is for compute capability 9.0 alone, the GPU has {found / 10}")
