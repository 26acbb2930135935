"""Compiled prompt steps read weights as they are stored: none is copied, transposed, padded or converted.

Programs of one layer with the widths of Mistral-Small-3.1-24B, compiled for a GPU that is not there.
"""

import dataclasses

import jax
import pytest
from jax.sharding import SingleDeviceSharding
from programs import Use, argument_uses
from tiny import MISTRAL_SMALL

from aot_cache.targets import absent_device, find
from elastic_jax.executables import default_step_config
from elastic_jax.plan import Plan, provisional_plans
from elastic_jax.step import Bucket
from elastic_jax.units import build_model, make_units, step_name
from elastic_jax.weights import abstract_weights, flatten

CONFIG = dataclasses.replace(MISTRAL_SMALL, num_layers=1)
STEP = default_step_config(CONFIG, "gpu", "bfloat16", kv_slots=4096, max_context=4096)
PRODUCTS = tuple(
    f"custom-call {target}"
    for target in (
        "elastic_prompt_dot",
        "elastic_decode_head",
        "__gpu$xla.gpu.triton",
        "__cublas$lt$matmul",
        "__cublas$gemm",
    )
)


def plan_of(mode: str) -> Plan:
    plan = provisional_plans(CONFIG)["S" if mode == "w8a8b" else mode]
    if mode != "w8a8b":
        return plan
    return dataclasses.replace(
        plan, choices={name: mode if choice == "w8a8" else choice for name, choice in plan.choices.items()}
    )


@pytest.mark.slow
@pytest.mark.cuda_plugin
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("mode", ["S", "w8a8b", "XL"])
def test_products_read_weights_as_they_are_stored(mode):
    description = find("h100")
    device, plan, bucket = absent_device(description), plan_of(mode), Bucket(0, 1024)
    assert bucket in STEP.buckets
    unit = next(u for u in make_units(CONFIG, plan, STEP) if u.name == step_name(bucket, "greedy"))
    here = SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here) for a in unit.arguments]
    with jax.default_device(device):
        traced = jax.jit(unit.function, donate_argnums=unit.donate, keep_unused=True).trace(*arguments)
        compiled = traced.lower().compile(compiler_options=dict(description.compiler_options))
    hlo = compiled.as_text()

    leaves, _, _ = flatten(build_model(CONFIG, abstract_weights(CONFIG, plan, STEP.dtype), STEP))
    weights = {i: leaf.shape for i, leaf in enumerate(leaves) if len(leaf.shape) == 2 and leaf.shape[1] > 1}
    assert len(weights) == 6
    embedding, *products = weights
    for number in products:
        uses = argument_uses(hlo, number)
        # One product reads it, once.
        assert len(uses) == 1, weights[number]
        assert uses[0].operation in PRODUCTS, weights[number]
    # Rows of the embedding are gathered, and nothing of its size is made.
    for use in argument_uses(hlo, embedding):
        assert max(use.sizes) <= bucket.tokens * CONFIG.hidden_size


HLO = """HloModule m

%called (p: s8[4,8], q: f32[2]) -> s8[8,4] {
  %p = s8[4,8]{1,0} parameter(0)
  %q = f32[2]{0} parameter(1)
  ROOT %t = s8[8,4]{1,0} transpose(%p), dimensions={1,0}
}

ENTRY %main (a.1: s8[4,8], b.2: f32[2]) -> (s8[8,4], f32[4,2]) {
  %a.1 = s8[4,8]{1,0} parameter(0)
  %b.2 = f32[2]{0} parameter(1)
  %same = s8[32]{0} bitcast(%a.1)
  %dot = (f32[4,2]{1,0}, s8[16]{0}) custom-call(%b.2, %same), custom_call_target="__cublas$lt$matmul", x={%a.1}
  %pad = s8[6,8]{1,0} pad(%a.1, %c), padding=0_2x0_0
  ROOT %call = s8[8,4]{1,0} call(%a.1, %b.2), to_apply=%called
}
"""


def test_the_reader_sees_every_use():
    expected = [Use("custom-call __cublas$lt$matmul", (8, 16)), Use("pad", (48,)), Use("transpose", (32,))]
    assert argument_uses(HLO, 0) == expected
    assert [use.operation for use in argument_uses(HLO, 1)] == ["custom-call __cublas$lt$matmul"]
    with pytest.raises(ValueError, match="no parameter 7"):
        argument_uses(HLO, 7)
