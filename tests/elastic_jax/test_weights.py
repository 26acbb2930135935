import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_step_config

from elastic_jax.errors import PlanError
from elastic_jax.groups import LM_HEAD, model_groups
from elastic_jax.plan import MODES
from elastic_jax.quantization import QArray
from elastic_jax.units import build_model
from elastic_jax.weights import abstract_weights, flatten, load_weights, weight_bytes


@pytest.fixture(scope="module")
def tiny(checkpoint_of):
    return checkpoint_of("tiny_mistral")


def load(checkpoint, mode, dtype="bfloat16"):
    device = jax.devices()[0]
    return load_weights(checkpoint, checkpoint.plan(mode), dtype, device, workers=2, progress=None)


@pytest.mark.parametrize("name", ["tiny_mistral", "tiny_llama"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("mode", MODES)
def test_arrays_are_as_their_shapes_said(checkpoint_of, name, mode, dtype):
    checkpoint = checkpoint_of(name)
    weights, shapes = load(checkpoint, mode, dtype), abstract_weights(checkpoint.config, checkpoint.plan(mode), dtype)
    assert list(weights) == list(shapes)
    described = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (weights, shapes)]
    assert described[0] == described[1]
    assert weight_bytes(weights) == weight_bytes(shapes) == sum(leaf.nbytes for leaf in jax.tree.leaves(weights))


def test_each_choice_says_how_prompt_tokens_are_rounded(tiny):
    weights = abstract_weights(tiny.config, tiny.plan("M"), "bfloat16")
    widths = {name: weight.prompt_activations for name, weight in weights.items() if isinstance(weight, QArray)}
    assert widths.keys() == model_groups(tiny.config).keys()
    assert {name for name, width in widths.items() if width == "a16"} == {
        LM_HEAD,
        *(f"layers.{i}.down" for i in range(3)),
    }


def test_block_scales_are_a_choice_of_the_same_weights(tiny):
    plan = tiny.plan("S")
    blocked = dataclasses.replace(plan, choices=plan.choices | {"layers.1.down": "w8a8b"})
    weights = abstract_weights(tiny.config, blocked, "bfloat16")
    assert weights["layers.1.down"].prompt_activations == "a8b"
    assert weights["layers.0.down"].prompt_activations == "a8"
    assert tiny.weight_bytes(blocked) == tiny.weight_bytes(plan)


def test_float32_holds_the_stored_values(tiny):
    half, full = load(tiny, "XL"), load(tiny, "XL", "float32")
    for name in half:
        assert (np.asarray(half[name], np.float32) == np.asarray(full[name])).all(), name


def test_integer_weights_stand_for_the_original_ones(tiny):
    original, integer = load(tiny, "XL", "float32"), load(tiny, "L")
    for name in model_groups(tiny.config):
        matrix, q = np.asarray(original[name]), integer[name]
        values, scales = np.asarray(q.values), np.asarray(q.scales)
        assert np.abs(values.astype(int)).max(axis=1).min() == 127
        assert (np.abs(values * scales - matrix) <= scales / 2 * 1.001).all(), name


def test_norms_of_each_layer_are_their_own(tiny):
    weights = load(tiny, "XL", "float32")
    norms = [np.asarray(w) for name, w in weights.items() if name.endswith("norm")]
    assert len(norms) == 2 * tiny.config.num_layers + 1
    assert len({norm.tobytes() for norm in norms}) == len(norms)


def test_only_what_the_plan_needs_is_read(tiny, monkeypatch):
    asked = []
    restore = type(tiny).restore
    monkeypatch.setattr(
        type(tiny), "restore", lambda self, folders, *rest: asked.extend(folders) or restore(self, folders, *rest)
    )
    load(tiny, "S")
    groups = set(model_groups(tiny.config))
    assert set(asked) == {("embedding", "bf16"), ("norms", "bf16"), *((group, "int8") for group in groups)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("mode", ["XL", "S"])
def test_loading_traces_nothing(tiny, mode, dtype):
    with jax.no_tracing(True):
        weights = load(tiny, mode, dtype)
        with pytest.raises(RuntimeError, match="tracing"):
            jax.jit(lambda x: x + 1)(weights["final_norm"])


def test_flat_leaves_keep_their_order_whatever_they_are(tiny):
    step = tiny_step_config(dtype="bfloat16")
    weights = load(tiny, "M")
    shapes = abstract_weights(tiny.config, tiny.plan("M"), "bfloat16")
    leaves, graph, tree = flatten(build_model(tiny.config, weights, step))
    abstract_leaves, abstract_graph, abstract_tree = flatten(build_model(tiny.config, shapes, step))
    assert (graph, tree) == (abstract_graph, abstract_tree)
    assert [(x.shape, x.dtype) for x in leaves] == [(x.shape, x.dtype) for x in abstract_leaves]
    # And the order is the model's, not that of the dictionary.
    shuffled, _, _ = flatten(build_model(tiny.config, dict(reversed(weights.items())), step))
    assert all(a is b for a, b in zip(leaves, shuffled, strict=True))


def test_a_plan_for_another_model_is_refused(tiny):
    other = dataclasses.replace(tiny.config, num_layers=2)
    with pytest.raises(PlanError, match="does not fit this model"):
        abstract_weights(other, tiny.plan("M"), "bfloat16")


def test_types_of_what_no_plan_chooses(tiny):
    weights = abstract_weights(tiny.config, tiny.plan("S"), "float32")
    assert weights["embedding"].dtype == weights["final_norm"].dtype == jnp.float32
