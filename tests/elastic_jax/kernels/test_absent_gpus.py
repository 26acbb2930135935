"""The steps of a model with Pallas's kernels, compiled for GPUs that are not there."""

import dataclasses

import jax
import pytest
from tiny import MISTRAL_SMALL, tiny_step_config

from aot_cache.compiler import compile_units
from aot_cache.targets import absent_device, find, names
from elastic_jax.plan import provisional_plans
from elastic_jax.step import Bucket
from elastic_jax.units import make_units

CONFIG = dataclasses.replace(
    MISTRAL_SMALL,
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
)

STEP = dataclasses.replace(
    tiny_step_config(dtype="bfloat16", page_size=64, buckets=(Bucket(4, 0), Bucket(0, 64), Bucket(4, 64))),
    attention="pallas",
    dot="pallas",
    decode="xla",
)


@pytest.mark.cuda_plugin
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in names() if not name.endswith("cuda12")])
def test_steps_are_compiled_with_the_kernels_inside(name, tmp_path):
    description = find(name)
    device = absent_device(description)
    every = make_units(CONFIG, provisional_plans(CONFIG)["S"], STEP)
    units = [unit for unit in every if unit.name == "step.d4.p64.greedy"]
    options = {"workers": 2, "progress": lambda *_: None, "compiler_options": description.compiler_options}
    manifest = compile_units(units, tmp_path / "store", {}, device, **options)
    assert manifest.units["step.d4.p64.greedy"].size > 0

    with jax.default_device(device):
        text = jax.jit(units[0].function).trace(*units[0].arguments).lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("attention_prompt", "attention_generated", "integer_dot_kernel", "quantize_normed_kernel"):
        assert kernel in text
    # So it is with keys and values in int8, and sampling's kernel.
    step = dataclasses.replace(STEP, kv="int8", sampling="cuda")
    unit = next(u for u in make_units(CONFIG, provisional_plans(CONFIG)["S"], step) if u.name == "step.d4.p64.sampling")
    manifest = compile_units([unit], tmp_path / "int8", {}, device, **options)
    cache = step.kv_slots * 2 * CONFIG.num_kv_heads * (CONFIG.head_dim + 4)
    assert manifest.units[unit.name].memory.aliased >= cache

    # Weights are int8 operands of the kernels, and nothing else multiplies them.
    assert "tensor<256x128xi8>" in text
    assert not [line for line in text.splitlines() if "stablehlo.dot_general" in line and "xi8>" in line]


@pytest.mark.cuda_plugin
@pytest.mark.parametrize("kv", ["full", "int8"])
@pytest.mark.parametrize("name", [name for name in names() if not name.endswith("cuda12")])
def test_decode_is_one_call_a_layer(name, kv, tmp_path):
    description = find(name)
    device = absent_device(description)
    config = dataclasses.replace(CONFIG, num_kv_heads=1, num_layers=3)
    step = dataclasses.replace(STEP, decode="cuda", kv=kv)
    unit = next(u for u in make_units(config, provisional_plans(config)["S"], step) if u.name == "step.d4.p0.greedy")
    options = {"workers": 1, "progress": lambda *_: None, "compiler_options": description.compiler_options}
    manifest = compile_units([unit], tmp_path / "store", {}, device, **options)
    # The caches are written in place.
    head = 2 * config.head_dim if kv == "full" else config.head_dim + 4
    assert manifest.units[unit.name].memory.aliased >= 3 * step.kv_slots * 2 * config.num_kv_heads * head

    with jax.default_device(device):
        text = jax.jit(unit.function).trace(*unit.arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@elastic_decode_layer") == 3
    assert text.count("@elastic_decode_head") == 1
    assert "stablehlo.dot_general" not in text
