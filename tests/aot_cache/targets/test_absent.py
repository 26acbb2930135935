"""Compiling for a GPU that is not there; and what is said where it cannot be done."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax._src import lib
from jax.experimental import pallas, topologies
from jax.experimental.pallas import triton

from aot_cache.compiler import compile_units
from aot_cache.manifest import read_manifest
from aot_cache.target import Target
from aot_cache.targets import Description, absent_device, find
from aot_cache.unit import Unit
from elastic_jax.errors import ExecutableError

NAMES = ("a100", "h100", "h200", "l40s")


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Makes the CUDA plugin of some version seem installed, with ptxas; gives the folder of the tools."""

    def pretend(*cuda: str):
        known = {f"jax_plugins.xla_cuda{version}" for version in cuda}
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in known else None)
        monkeypatch.setattr(lib, "cuda_path", str(tmp_path))
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "ptxas").touch()
        return tmp_path

    return pretend


def test_without_plugin(installed):
    installed()
    with pytest.raises(ExecutableError, match=r"H200 with CUDA 13 .* not installed: install elastic-jax\[cuda13"):
        absent_device(find("h200"))


def test_with_the_other_plugin(installed):
    installed("13")
    with pytest.raises(ExecutableError, match=r"the one for CUDA 13 is.* install elastic-jax\[cuda12\]"):
        absent_device(find("h200-cuda12"))


def test_without_assembler(installed):
    (installed("13") / "bin" / "ptxas").unlink()
    with pytest.raises(ExecutableError, match=r"needs NVIDIA's assembler, ptxas, and .* has none"):
        absent_device(find("h200"))


def test_plugin_that_is_not_set_up(installed, monkeypatch):
    def refuse(**_):
        raise NotImplementedError("topology not implemented for cuda")

    installed("13")
    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(ExecutableError, match="JAX_PLATFORMS=cpu"):
        absent_device(find("h200"))


def products(x, y, weights, tokens):
    """bf16 and int8 products, a branch that depends on the platform, and a loop whose length is data."""
    wide = jax.lax.dot_general(tokens, weights, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    looped = jax.lax.while_loop(lambda c: c[0] < wide[0, 0], lambda c: (c[0] + 1, jnp.tanh(c[1])), (jnp.int32(0), x))
    marked = jax.lax.platform_dependent(looped[1], cpu=lambda v: v - 111, cuda=lambda v: v + 3)
    return marked @ y.T, wide


def kernel(x):
    """A Pallas kernel, lowered for the GPU that it asks for."""
    capability = triton.get_gpu_info().compute_capability

    def double(source, destination):
        destination[...] = source[...] * capability

    parameters = triton.CompilerParams(num_warps=4)
    return (
        pallas.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), compiler_params=parameters)(x),
    )


def shape(*size, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(size, dtype)


@pytest.mark.cuda_plugin
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_compiling_for_an_absent_gpu(name, tmp_path):
    description = find(name)
    device = absent_device(description)
    assert Target.of(device) == description.target

    arguments = (shape(64, 128), shape(256, 128), shape(256, 64, dtype=jnp.int8), shape(64, 64, dtype=jnp.int8))
    units = [Unit("products", products, arguments, (), {}), Unit("kernel", kernel, (shape(128, 64),), (), {})]
    options = {"workers": 2, "progress": lambda *_: None, "compiler_options": description.compiler_options}
    folder = tmp_path / "store"
    compile_units(units, folder, {"plan_hash": "p"}, device, **options)

    manifest = read_manifest(folder, hint="")
    assert manifest.identity["device_kind"] == description.target.device_kind
    assert manifest.identity["compiler_options"] == description.compiler_options
    assert manifest.identity["plugins"].keys() == {"jax-cuda13-plugin", "jax-cuda13-pjrt"}
    for unit in units:
        blob = (folder / f"{unit.name}.xla").read_bytes()
        assert b"\x7fELF" in blob  # machine code of the GPU
        machine = re.search(rb"site-packages|znver|skylake|icelake|sapphirerapids|/nvidia/", blob)
        assert machine is None, machine


@pytest.mark.cuda_plugin
def test_a_dumped_description_is_as_good():
    dumped = Description.of(absent_device(find("h200")))
    assert dumped.target == find("h200").target
    assert Target.of(absent_device(dumped)) == dumped.target


@pytest.mark.cuda_plugin
def test_a_description_that_xla_does_not_understand():
    broken = Description(find("h200").config + "no_such_field: 1\n", {}, source="my.json")
    with pytest.raises(ExecutableError, match=r"my\.json: XLA does not accept this description"):
        absent_device(broken)
