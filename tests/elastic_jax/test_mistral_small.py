"""The 24-billion-parameter shape, without a single weight."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from tiny import MISTRAL_SMALL

from elastic_jax.executables import default_step_config
from elastic_jax.groups import model_groups
from elastic_jax.plan import MODES, provisional_plans
from elastic_jax.quantization import QArray
from elastic_jax.step import Bucket, StepInputs, abstract_inputs, abstract_state
from elastic_jax.units import make_units, step_name, top_name
from elastic_jax.weights import abstract_weights, weight_bytes

VOCAB, HIDDEN, LAYERS = 131072, 5120, 40
PLANS = provisional_plans(MISTRAL_SMALL)
DEFAULT = default_step_config(MISTRAL_SMALL, "gpu", "bfloat16", kv_slots=131072, max_context=None)
# Pallas's kernels are traced for a GPU only; they change no shape.
STEP = dataclasses.replace(DEFAULT, attention="xla", dot="xla", decode="xla", sampling="xla")


@functools.cache
def units(mode, layers=LAYERS):
    config = dataclasses.replace(MISTRAL_SMALL, num_layers=layers)
    return {unit.name: unit for unit in make_units(config, provisional_plans(config)[mode], STEP)}


def weights(mode):
    return abstract_weights(MISTRAL_SMALL, PLANS[mode], "bfloat16")


def test_parameters():
    assert len(model_groups(MISTRAL_SMALL)) == 161
    # Mistral-Small-3.1's language model: 23.57 billion.
    assert sum(leaf.size for leaf in jax.tree.leaves(weights("XL"))) == 23_572_403_200


@pytest.mark.parametrize(
    ("mode", "gigabytes"),
    [("XL", 47.14), ("L", 24.25), ("M", 24.25), ("S", 24.25)],
)
def test_bytes_of_each_mode(mode, gigabytes):
    assert math.isclose(weight_bytes(weights(mode)) / 1e9, gigabytes, abs_tol=0.01)


def test_bytes_read_for_a_token():
    # All but the embedding, of which a token reads one row.
    embedding = 2 * VOCAB * HIDDEN
    assert math.isclose((weight_bytes(weights("XL")) - embedding) / 1e9, 45.8, abs_tol=0.05)
    assert math.isclose((weight_bytes(weights("S")) - embedding) / 1e9, 22.9, abs_tol=0.05)


def test_integer_weights_are_one_byte_and_a_scale_a_row():
    integer = weights("S")
    for name, group in model_groups(MISTRAL_SMALL).items():
        q = integer[name]
        assert isinstance(q, QArray)
        assert (q.values.dtype, q.scales.dtype) == (jnp.int8, jnp.float32)
        assert (q.values.size, q.scales.size) == (group.parameters, group.out_size)


def test_cache():
    kv = abstract_state(MISTRAL_SMALL, STEP).kv
    assert len(kv) == LAYERS
    assert sum(layer.size * 2 for layer in kv) / STEP.kv_slots == 160 * 1024  # bytes a token in bf16


@pytest.mark.parametrize("bucket", [Bucket(1, 0), Bucket(64, 0), Bucket(0, 4096), Bucket(64, 1024)])
def test_what_the_host_sends_for_contexts_of_128k(bucket):
    step = dataclasses.replace(DEFAULT, max_context=131072)
    sizes = {
        field.name: getattr(abstract_inputs(bucket, step), field.name).size * 4
        for field in dataclasses.fields(StepInputs)
    }
    # The table is sent only when it changes; the rest does not depend on the longest context.
    assert sizes.pop("block_table") == 512 * 1024
    assert sum(sizes.values()) <= 4 * (4 * bucket.tokens + 2 * step.rows + bucket.outputs(step.rows))


@pytest.mark.parametrize(("mode", "count"), [("XL", 295), ("S", 456)])
def test_arguments_of_a_step(mode, count):
    # Weights: embedding, 81 norms and 161 groups, with a scale each where they are integers. Then caches, row state,
    # and inputs; sampling adds its parameters.
    groups = 161 if mode == "XL" else 2 * 161
    assert count == 1 + 81 + groups + LAYERS + 5 + 7
    assert len(units(mode)["step.d1.p0.greedy"].arguments) == count
    assert len(units(mode)["step.d1.p0.sampling"].arguments) == count + 11


def test_units_of_the_gpu_buckets():
    names = set(units("S"))
    assert len(STEP.buckets) == 12
    expected = {step_name(b, v) for b in STEP.buckets for v in ("greedy", "sampling")}
    expected |= {step_name(b, "score") for b in STEP.buckets if not b.generated}
    expected |= {top_name(outputs) for outputs in (1, 2, 4, 8, 16, 32, 64, 128)}
    assert names == expected | {"admit", "copy_page", "start"}


# Tracing forty layers takes seconds; one step of each variant has them all, the others two.
TRACED = [
    ("XL", Bucket(1, 0), "greedy", 2),
    ("XL", Bucket(64, 1024), "sampling", LAYERS),
    ("S", Bucket(1, 0), "sampling", 2),
    ("S", Bucket(64, 0), "greedy", LAYERS),
    ("S", Bucket(64, 1024), "greedy", 2),
    ("S", Bucket(0, 4096), "score", LAYERS),
    ("M", Bucket(16, 0), "greedy", 2),
    ("L", Bucket(0, 256), "greedy", 2),
]


@pytest.mark.parametrize(("mode", "bucket", "variant", "layers"), TRACED)
def test_steps_trace(mode, bucket, variant, layers):
    unit = units(mode, layers)[step_name(bucket, variant)]
    out = jax.eval_shape(unit.function, *unit.arguments)
    state = [unit.arguments[number] for number in unit.donate]
    # What is donated comes back first, in the same order: so its buffers are taken over.
    assert [(x.shape, x.dtype) for x in out[: len(state)]] == [(x.shape, x.dtype) for x in state]
    rest = [(x.shape, x.dtype.name) for x in out[len(state) :]]
    rows = bucket.prompt if variant == "score" else bucket.outputs(STEP.rows)
    if variant == "score":
        top = [((rows, 20), "int32"), ((rows, 20), "float32")]
        assert rest == [((rows,), "float32"), ((rows,), "int32"), *top, ((rows,), "bool")]
    else:
        assert rest == [((rows,), "int32"), ((rows,), "float32"), ((rows,), "bool"), ((rows, VOCAB), "float32")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["admit", "copy_page", "start"])
def test_auxiliary_units_trace(mode, name):
    unit = units(mode)[name]
    state = jax.tree.leaves(abstract_state(MISTRAL_SMALL, STEP))
    donated = state if name == "start" else [unit.arguments[number] for number in unit.donate]
    out = jax.eval_shape(unit.function, *unit.arguments)
    assert [(x.shape, x.dtype) for x in out] == [(x.shape, x.dtype) for x in donated]
