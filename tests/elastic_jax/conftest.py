"""Tiny models for the tests of the core: converted and compiled once, whatever the number of test processes."""

import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import settings
from task_index import index_read_once
from tiny import CompiledTiny, compile_tiny, tiny_checkpoint

from aot_cache import payload
from aot_cache.target import Device
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.step import ComputeDtype

# A first example compiles, which no deadline allows for; the same examples every time, so that a failure stays one.
settings.register_profile("elastic_jax", deadline=None, derandomize=True)
settings.load_profile("elastic_jax")


@pytest.fixture(scope="session")
def opened() -> dict[tuple[bytes, str, int], jax.stages.Compiled]:
    """Executables by what they were read from, and for which device."""
    return {}


@pytest.fixture(scope="module", autouse=True)
def executables_opened_once(opened: dict[tuple[bytes, str, int], jax.stages.Compiled]) -> Iterator[None]:
    """Opens the same bytes for the same device once a process.

    On CPU opening one takes most of a second, and a hundred tests load a mode's eighteen. Files are read, checked and
    refused as ever: what is kept is XLA's answer to bytes that were found whole. `tests/aot_cache` is without this.
    """
    from_bytes = payload.from_bytes

    def opened_once(blob: bytes, device: Device, *, source: str) -> Any:
        key = hashlib.sha256(blob).digest(), device.platform, device.id
        if key not in opened:
            opened[key] = from_bytes(blob, device, source=source)
        return opened[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(payload, "from_bytes", opened_once)
        yield


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder that all processes of one test run share."""
    base = tmp_path_factory.getbasetemp()
    # A worker of pytest-xdist has its own base folder inside the run's.
    return (base.parent if hasattr(request.config, "workerinput") else base) / "shared"


@pytest.fixture(scope="session")
def checkpoint_of(shared_folder: Path) -> Callable[[str], Checkpoint]:
    """`checkpoint_of(name)`: a tiny model as an Elastic checkpoint. It is shared: copy it before changing it."""
    return functools.cache(lambda name: tiny_checkpoint(shared_folder, name))


@pytest.fixture(scope="session")
def compiled_tiny(shared_folder: Path) -> Callable[..., CompiledTiny]:
    """`compiled_tiny(mode, dtype, name)`: one mode of a tiny model, compiled, its units and weights loaded.

    The checkpoint is shared too: `ElasticMistral.load(compiled.checkpoint.path, mode, dtype=dtype)` finds the
    executables in it.
    """

    @functools.cache
    def compiled(mode: str, dtype: ComputeDtype, name: str = "tiny_mistral") -> CompiledTiny:
        return compile_tiny(shared_folder, name, mode, dtype)

    return compiled


@pytest.fixture(scope="module")
def task_index(shared_folder: Path) -> Iterator[None]:
    """For tests that load lm-eval's tasks: its index is read once."""
    with index_read_once(shared_folder):
        yield
