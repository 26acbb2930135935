"""Nothing but the classes that executables need can come out of a blob."""

import hashlib
import io
import os
import pickle

import jax
import jax.numpy as jnp
import pytest

from aot_cache import payload
from elastic_jax.errors import ExecutableError


class Evil:
    def __reduce__(self):
        return os.system, ("touch /nonexistent/owned",)


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


def test_round_trip():
    blob = payload.to_bytes(compiled(lambda x: (x * 2,), jnp.arange(3.0)), name="double")
    loaded = payload.from_bytes(blob, jax.devices()[0], source="double.xla")
    (result,) = loaded(jnp.arange(3.0))
    assert result.tolist() == [0.0, 2.0, 4.0]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int4, jnp.uint4, jnp.uint32, jnp.bool_, jnp.float16])
def test_dtypes(dtype):
    same = compiled(lambda x: (jnp.roll(x, 1),), jax.ShapeDtypeStruct((3,), dtype))
    loaded = payload.from_bytes(payload.to_bytes(same, name="same"), jax.devices()[0], source="same.xla")
    (result,) = loaded(jnp.array([1, 0, 1], dtype))
    assert result.tolist() == jnp.array([1, 1, 0], dtype).tolist()


def test_what_could_not_be_loaded_is_not_stored():
    keys = compiled(lambda key: (jax.random.split(key)[0],), jax.random.key(0))
    with pytest.raises(ExecutableError, match=r"unit keys: its arguments or results need jax\..*jax.random.key_data"):
        payload.to_bytes(keys, name="keys")


def test_unsafe_class_is_named_and_not_called(monkeypatch):
    blob = pickle.dumps(Evil())
    monkeypatch.setattr(os, "system", lambda _: pytest.fail("the pickle ran a command"))
    with pytest.raises(ExecutableError, match=r"evil.xla refers to posix.system, which no executable needs"):
        payload.from_bytes(blob, jax.devices()[0], source="evil.xla")


def test_unsafe_class_in_a_store_with_matching_digests(checkpoint):
    """A forger can make the digests right; the allow-list still holds, even for a trusted store."""
    blob = pickle.dumps(Evil())
    checkpoint.blob().write_bytes(blob)
    record = {"size": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
    checkpoint.edit_manifest(lambda manifest: manifest["units"]["step.d2.p0.greedy"].update(record))
    with pytest.raises(ExecutableError, match=r"d2.p0.greedy.xla refers to posix.system, which no executable needs"):
        checkpoint.load(trust=True)


@pytest.mark.parametrize(
    "name", ["builtins.eval", "builtins.getattr", "functools.partial", "jax._src.core.jaxpr_as_fun"]
)
def test_builtins_and_neighbours_of_allowed_classes_are_refused(name):
    module, _, function = name.rpartition(".")
    blob = b"\x80\x04" + f"c{module}\n{function}\n.".encode()
    with pytest.raises(ExecutableError, match=f"refers to {name}"):
        payload.from_bytes(blob, jax.devices()[0], source="blob.xla")


def test_unknown_persistent_object_is_refused():
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer)
    pickler.persistent_id = lambda obj: ("file", "/etc/passwd") if obj == 1 else None
    pickler.dump(1)
    with pytest.raises(ExecutableError, match="unknown object"):
        payload.from_bytes(buffer.getvalue(), jax.devices()[0], source="blob.xla")


def test_damaged_bytes_are_an_error_of_ours():
    with pytest.raises(ExecutableError, match=r"blob.xla cannot be loaded on .*UnpicklingError"):
        payload.from_bytes(b"not a pickle", jax.devices()[0], source="blob.xla")


def test_constants_outside_the_executable_are_refused():
    """JAX keeps none by default; were it to, an executable without them would compute with the wrong arguments."""
    add = compiled(lambda x: (x + x,), jnp.arange(3.0))
    add._params = add._params._replace(const_args=[jnp.arange(3.0)])
    with pytest.raises(ExecutableError, match="unit add closes over arrays: pass them as arguments"):
        payload.to_bytes(add, name="add")


def test_several_devices_are_refused():
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("model",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    argument = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding)
    with pytest.raises(ExecutableError, match="unit wide spans 2 devices"):
        payload.to_bytes(compiled(lambda x: (x + x,), argument), name="wide")
