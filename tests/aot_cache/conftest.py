"""A store of two small units, compiled once, and copies of it to damage."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from aot_cache.compiler import compile_units
from aot_cache.manifest import MANIFEST
from aot_cache.store import Executable, load
from aot_cache.unit import Unit

HINT = "Compile them: elastic-jax compile DIR --mode M"
IDENTITY = {"plan_hash": "p1", "config_hash": "c1", "source_hash": "s1", "kv_slots": 64}


def repeated_int8_dot(weight, tokens, counts, repeats):
    """int8 dots in a loop whose length is data; `counts` is meant to be donated."""

    def body(carry):
        index, total = carry
        dot = jax.lax.dot_general(tokens, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        return index + 1, total + dot

    start = (jnp.int32(0), jnp.zeros((tokens.shape[0], weight.shape[0]), jnp.int32))
    _, total = jax.lax.while_loop(lambda carry: carry[0] < repeats, body, start)
    return total, counts + jnp.float32(1)


def make_unit(rows: int) -> Unit:
    shapes = [((32, 16), jnp.int8), ((rows, 16), jnp.int8), ((64,), jnp.float32), ((), jnp.int32)]
    arguments = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes)
    properties = {"decode_rows": rows, "prompt_tokens": 0, "variant": "greedy"}
    return Unit(f"step.d{rows}.p0.greedy", repeated_int8_dot, arguments, (2,), properties)


UNITS = (make_unit(2), make_unit(4))
STEP = UNITS[0].name


class Checkpoint:
    """A folder with a store in it, loaded as the project would."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "executables" / "target" / "M"

    def compile(self, **changes: Any):
        options = {"workers": 2, "progress": lambda *_: None} | changes
        units, identity = options.pop("units", UNITS), options.pop("identity", IDENTITY)
        return compile_units(units, self.folder, identity, jax.devices()[0], **options)

    def load(self, **changes: Any) -> dict[str, Executable]:
        options = {"root": self.root, "units": None, "trust": False, "workers": 2, "hint": HINT} | changes
        identity, device = options.pop("identity", IDENTITY), options.pop("device", jax.devices()[0])
        return load(self.folder, identity, device, **options)

    def blob(self, name: str = STEP) -> Path:
        return self.folder / f"{name}.xla"

    def edit_manifest(self, edit: Callable[[dict[str, Any]], Any]) -> None:
        """Changes the manifest in place, as another version or another machine would have written it."""
        path = self.folder / MANIFEST
        values = json.loads(path.read_text())
        edit(values)
        path.write_text(json.dumps(values))


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    checkpoint = Checkpoint(tmp_path_factory.mktemp("pristine"))
    checkpoint.compile()
    return checkpoint


@pytest.fixture
def checkpoint(pristine: Checkpoint, tmp_path: Path) -> Checkpoint:
    shutil.copytree(pristine.root, tmp_path / "checkpoint")
    return Checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def empty(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path / "empty")
