import dataclasses

import ml_dtypes
import numpy as np
import pytest
from tiny import MISTRAL_SMALL

from elastic_jax.search.smoothing import exponents, fold, share_heads

CONFIG = dataclasses.replace(
    MISTRAL_SMALL, hidden_size=8, intermediate_size=6, num_heads=4, num_kv_heads=2, head_dim=2, vocab_size=16
)


def layer(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"qkv": (16, 8), "o": (8, 8), "gate_up": (12, 8), "down": (8, 6)}
    groups = {kind: rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for kind, shape in shapes.items()}
    norms = {norm: rng.standard_normal(8).astype(ml_dtypes.bfloat16) for norm in ("attention", "mlp")}
    return groups, norms


def some_exponents(seed=1):
    rng = np.random.default_rng(seed)
    wanted = {
        kind: rng.integers(-5, 6, size).astype(np.int32) for kind, size in (("qkv", 8), ("gate_up", 8), ("down", 6))
    }
    heads = rng.integers(-5, 6, (2, 1, 2))
    return wanted | {"o": np.broadcast_to(heads, (2, 2, 2)).reshape(-1).astype(np.int32)}


def test_an_outlier_channel_is_divided_and_the_middle_is_left_alone():
    activations = np.array([1, 1, 1, 64, 1], np.float32)
    assert exponents(activations, np.ones(5, np.float32), 0.5, outliers_only=False).tolist() == [0, 0, 0, 3, 0]
    assert exponents(activations, np.ones(5, np.float32), 0.0, outliers_only=False).tolist() == [0] * 5


def test_outliers_only_never_enlarges_activations():
    activations = np.array([1 / 64, 1, 1, 64, 1], np.float32)
    both = exponents(activations, np.ones(5, np.float32), 0.5, outliers_only=False)
    assert both.tolist() == [-3, 0, 0, 3, 0]
    assert exponents(activations, np.ones(5, np.float32), 0.5, outliers_only=True).tolist() == [0, 0, 0, 3, 0]


def test_channels_without_activations_or_weights_are_left_alone():
    a, w = np.array([0, 64, 1, 1], np.float32), np.array([1, 0, 1, 1], np.float32)
    assert exponents(a, w, 0.5, outliers_only=False).tolist() == [0, 0, 0, 0]


def test_query_heads_of_a_value_head_share():
    assert share_heads(CONFIG, np.array([1, 2, 5, 0, 7, 7, 3, 9.0])).tolist() == [5, 2, 5, 2, 7, 9, 7, 9]


def test_folding_changes_no_product():
    groups, norms = layer()
    new, new_norms, used = fold(CONFIG, groups, norms, some_exponents())
    assert all((used[kind] == wanted).all() for kind, wanted in some_exponents().items())
    x = np.random.default_rng(2).standard_normal(8).astype(np.float32)

    def outputs(groups, norms):
        g = {kind: weight.astype(np.float32) for kind, weight in groups.items()}
        normed = {norm: x * weight.astype(np.float32) for norm, weight in norms.items()}
        # Each product by itself: sums of equal numbers are equal in any order that is the same.
        q_and_k = (g["qkv"] * normed["attention"])[:12]
        v = (g["qkv"] * normed["attention"])[12:].cumsum(axis=1)[:, -1]
        heads = np.broadcast_to(v.reshape(2, 1, 2), (2, 2, 2)).reshape(-1)
        gate = (g["gate_up"] * normed["mlp"])[:6]
        up = (g["gate_up"] * normed["mlp"])[6:].cumsum(axis=1)[:, -1]
        return q_and_k, g["o"] * heads, gate, g["down"] * up

    for before, after in zip(outputs(groups, norms), outputs(new, new_norms), strict=True):
        assert (before == after).all()
    assert (new["down"] != groups["down"]).any()


@pytest.mark.parametrize("kind", ["qkv", "o", "gate_up", "down"])
def test_what_bf16_cannot_hold_exactly_stays_as_it_was(kind):
    groups, norms = layer()
    column = groups[kind].copy()
    column[0, 1] = ml_dtypes.bfloat16(1e-38)  # denormal once divided
    wanted = {k: np.full_like(e, -5 if k == kind else 0) for k, e in some_exponents().items()}
    new, _, used = fold(CONFIG, groups | {kind: column}, norms, wanted)
    assert used[kind][1] == 0
    assert used[kind][0] == -5
    assert (new[kind][:, 1] == column[:, 1]).all()
