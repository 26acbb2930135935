"""Runs every test under the strictest rules that JAX, jaxtyping and Python offer, and makes real inputs available."""

import gc
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

FAKE_DEVICES = "--xla_force_host_platform_device_count=8"

# Read once, when JAX and huggingface_hub are imported. JAX_PLATFORMS is left to `make test-gpu` where that has set it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAKE_DEVICES}".strip()
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import jaxtyping
import pytest

PACKAGES = ["elastic_jax", "converters", "aot_cache"]
REPOSITORY = Path(__file__).resolve().parent.parent

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Shapes, dtypes and types of every call are checked; this works only on modules imported from here on.
jaxtyping.install_import_hook(PACKAGES, "runtime_types.checked")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips `gpu` tests where JAX sees no GPU, and `cuda_plugin` tests where JAX cannot compile for one.

    JAX is asked only if there are any of the former, since asking starts its backends.
    """
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        reason = "JAX's CUDA plugin is not installed; `uv sync --extra cuda13` installs it, no GPU is needed"
        for item in items:
            if item.get_closest_marker("cuda_plugin"):
                item.add_marker(pytest.mark.skip(reason=reason))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and jax.default_backend() != "gpu":
        skip = pytest.mark.skip(reason="JAX sees no GPU; `make test-gpu` runs this where there is one")
        for item in gpu_items:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps() -> Iterator[None]:
    """Drops compiled programs between files before a test process has as many as Linux lets it map.

    XLA maps every program for the CPU by itself, and at `vm.max_map_count` (65530 by default) the next one crashes.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def unchecked_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what a caller who passes a wrong type is told: users run without the type checker."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def fixtures_path() -> Path:
    """The folder of committed reference data."""
    return REPOSITORY / "tests" / "fixtures"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, a small real model; fetched once, whatever the number of test processes."""
    from elastic_jax.demo_model import CACHE_VARIABLE, demo_model

    return demo_model(Path(os.environ.get(CACHE_VARIABLE) or REPOSITORY / ".cache" / "elastic-jax"))
