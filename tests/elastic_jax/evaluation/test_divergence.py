import jax
import numpy as np
import pytest

from elastic_jax.evaluation.divergence import DivergenceMeter
from elastic_jax.search.forward import Forward
from elastic_jax.search.measuring import PlanMeter
from elastic_jax.weights import load_weights

DEVICE = jax.devices()[0]


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(2).integers(5, 300, (4, 48)).astype(np.int32)


def weights(checkpoint, mode):
    return load_weights(checkpoint, checkpoint.plan(mode), "float32", DEVICE, workers=2, progress=None)


@pytest.fixture(scope="module")
def meter(checkpoint_of, windows):
    checkpoint = checkpoint_of("tiny_mistral")
    return DivergenceMeter(checkpoint.config, weights(checkpoint, "XL"), windows.tolist(), DEVICE)


def test_the_original_is_no_distance_from_itself(checkpoint_of, meter):
    found = meter.measure(weights(checkpoint_of("tiny_mistral"), "XL"), "prompt")
    assert found.kl == pytest.approx(0, abs=1e-7)
    assert found.flips == 0


@pytest.mark.parametrize("role", ["prompt", "generated"])
@pytest.mark.parametrize("mode", ["L", "S"])
def test_distances_are_those_that_the_search_measures(checkpoint_of, windows, meter, mode, role):
    checkpoint = checkpoint_of("tiny_mistral")
    expected = PlanMeter(Forward.load(checkpoint, windows, DEVICE, 2)).measure(checkpoint.plan(mode).choices)
    found = meter.measure(weights(checkpoint, mode), role)
    assert found.kl == pytest.approx(expected.kl[role], rel=2e-2)
    assert found.stderr == pytest.approx(expected.kl_stderr[role], rel=5e-2)
    assert found.flips == pytest.approx(expected.flips[role], abs=0.02)


def test_a_tied_head_is_measured_too(checkpoint_of, windows):
    checkpoint = checkpoint_of("tiny_llama")
    meter = DivergenceMeter(checkpoint.config, weights(checkpoint, "XL"), windows.tolist(), DEVICE)
    assert 0 < meter.measure(weights(checkpoint, "L"), "prompt").kl < 0.1
