import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.errors import PlanError
from elastic_jax.evaluation.control import CONTROL, StaticArray, activation_scales, load_control, static_dot
from elastic_jax.evaluation.divergence import DivergenceMeter
from elastic_jax.groups import model_groups
from elastic_jax.plan import CHOICES
from elastic_jax.quantization import quantize
from elastic_jax.search.forward import Forward
from elastic_jax.weights import load_weights

DEVICE = jax.devices()[0]


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(1).integers(5, 300, (3, 32)).astype(np.int32)


@pytest.fixture(scope="module")
def scales(checkpoint_of, windows):
    return activation_scales(checkpoint_of("tiny_mistral"), windows, DEVICE, 2)


def test_the_product_has_one_scale_and_clips():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 64)).astype(np.float32)
    x[0, 0] = 50.0
    stored = quantize(jnp.asarray(rng.normal(size=(48, 64)), jnp.float32), prompt_activations="a16")
    scale = 0.02
    weight = StaticArray(stored.values, stored.scales, "a16", jnp.full((1, 1), scale, jnp.float32))
    plane = np.clip(np.round(x / np.float32(scale)), -127, 127)
    expected = (plane @ np.asarray(stored.values, np.float64).T) * scale * np.asarray(stored.scales)[:, 0]
    for generated in (0, 3, 5):
        np.testing.assert_allclose(
            static_dot(jnp.asarray(x), weight, generated=generated), expected, rtol=1e-5, atol=1e-5
        )
    gate, up = np.split(expected, 2, axis=1)
    gated = static_dot(jnp.asarray(x), weight, generated=0, gated=True)
    np.testing.assert_allclose(gated, gate / (1 + np.exp(-gate)) * up, rtol=1e-4, atol=1e-4)


def test_scales_are_the_largest_activations(checkpoint_of, windows, scales):
    checkpoint = checkpoint_of("tiny_mistral")
    assert scales.keys() == model_groups(checkpoint.config).keys()
    forward = Forward.load(checkpoint, windows, DEVICE, 2)
    _, inputs = forward.inputs(forward.embed(), 0)
    assert scales["layers.0.qkv"] == pytest.approx(float(jnp.abs(inputs["qkv"]).max()) / 127)


def test_it_scores_and_generates_as_a_loaded_mode_does(checkpoint_of, scales):
    model = load_control(checkpoint_of("tiny_mistral"), scales, kv_slots=1024, device=DEVICE, workers=2)
    tokens = list(range(20, 80))
    first, again = model.score([(tokens, [7, 8])]), model.score([(tokens, [7, 8])])
    assert first == again
    assert np.isfinite(first[0].log_probability)
    assert len(model.generate([tokens], max_new_tokens=3, ignore_end=True)[0].token_ids) == 3
    assert model.plan.name == CONTROL


def test_no_checkpoint_has_it_as_a_mode(checkpoint_of):
    with pytest.raises(PlanError, match="no mode 'W8A8'"):
        checkpoint_of("tiny_mistral").plan(CONTROL)
    assert not any("static" in choice for choice in CHOICES)


def test_a_smaller_range_is_farther_from_the_original(checkpoint_of, windows, scales):
    from elastic_jax.evaluation.control import control_weights

    checkpoint = checkpoint_of("tiny_mistral")
    original = load_weights(checkpoint, checkpoint.plan("XL"), "float32", DEVICE, workers=2, progress=None)
    meter = DivergenceMeter(checkpoint.config, original, windows.tolist(), DEVICE)
    clipped = {name: scale / 8 for name, scale in scales.items()}
    fair, poor = (
        meter.measure(control_weights(checkpoint, each, "float32", DEVICE, 2), "prompt", static_dot).kl
        for each in (scales, clipped)
    )
    assert 0 < fair < poor
