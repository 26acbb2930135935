"""SmoothQuant (Xiao et al., arXiv:2211.10438) with powers of two, folded into what comes before each group.

A channel's activations are divided by a factor that its column of the weight is multiplied by, so that outliers in the
activations, which 8 bits handle badly, become larger weights, which they handle well. The division goes where the
channel is made: into the norm before `qkv` and `gate_up`, the `up` rows before `down`, and the `v` rows before `o`,
there one factor for all query heads that share a value head. A power of two only moves the exponent, so every product
in bf16 and float32 stays what it was: the smoothed model is the original one, bit for bit.
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16, Float, Int

from elastic_jax.config import ModelConfig

_LARGEST = 12
"""Exponents are kept within this: a factor of 4096 exceeds any outlier that was seen."""


def exponents(
    activations: Float[np.ndarray, " in"], weights: Float[np.ndarray, " in"], strength: float, *, outliers_only: bool
) -> Int[np.ndarray, " in"]:
    """Exponents of the factors, rounded: log2(activations**strength / weights**(1 - strength)), with median 0.

    Args:
        activations: largest magnitude of each channel of the group's input.
        weights: largest magnitude of each column of its weight.
        strength: how much of the difference between channels goes into the weight, 0 to 1.
        outliers_only: log2(activations**strength) instead, and no channel below the median is scaled: the weight keeps
            its columns except those of outliers.

    Returns:
        int32 [in]; 0 for a channel that is zero everywhere, and all 0 for strength 0, which means no smoothing.
    """
    if strength == 0:
        return np.zeros(activations.shape, np.int32)
    live = (activations > 0) & (weights > 0)
    a, w = (np.log2(np.where(live, each, 1.0).astype(np.float64)) for each in (activations, weights))
    wanted = strength * a - (0.0 if outliers_only else (1 - strength) * w)
    if live.any():
        wanted -= np.median(wanted[live])
    wanted = np.clip(np.rint(wanted), 0 if outliers_only else -_LARGEST, _LARGEST)
    return np.where(live, wanted, 0).astype(np.int32)


def share_heads(config: ModelConfig, of_queries: Float[np.ndarray, " in"]) -> Float[np.ndarray, " in"]:
    """The largest of the channels of `o`'s input that come from one value channel, for each of them."""
    by_head = of_queries.reshape(config.num_kv_heads, -1, config.head_dim)
    return np.broadcast_to(by_head.max(axis=1, keepdims=True), by_head.shape).reshape(-1)


def fold(
    config: ModelConfig,
    groups: Mapping[str, BFloat16[np.ndarray, "_ _"]],
    norms: Mapping[str, BFloat16[np.ndarray, " hidden"]],
    wanted: Mapping[str, Int[np.ndarray, " _"]],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """One layer with its factors folded in.

    Args:
        config: the model.
        groups: the layer's four weights by kind.
        norms: `attention` and `mlp`.
        wanted: the exponents of each group's input channels; those of `o` equal within a value head (`share_heads`).

    Returns:
        groups and norms, and the exponents used: a channel where bf16 could not hold a result exactly stays as it was.
    """
    weights, norms, used = dict(groups), dict(norms), {}
    up = slice(config.intermediate_size, 2 * config.intermediate_size)
    v = slice(config.q_size + config.kv_size, config.q_size + 2 * config.kv_size)

    def divide_columns_before(kind: str, made_by: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`made_by` [channels, ...] divided, and the exponents for which that and the weight are exact."""
        e = wanted[kind]
        exact = _exact(weights[kind].T, e)
        if kind == "o":  # channels of the values, each read by several columns of `o`
            exact = exact.reshape(config.num_kv_heads, -1, config.head_dim).all(axis=1).reshape(-1)
            e = e.reshape(config.num_kv_heads, -1, config.head_dim)[:, 0].reshape(-1)
        e = np.where(exact & _exact(made_by, -e), e, 0)
        divided = _scaled(made_by, -e)
        if kind == "o":
            heads = e.reshape(config.num_kv_heads, 1, config.head_dim)
            e = np.broadcast_to(heads, (config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim))
        used[kind] = e.reshape(-1)
        weights[kind] = np.ascontiguousarray(_scaled(weights[kind].T, used[kind]).T)
        return divided, used[kind]

    for kind, norm in (("qkv", "attention"), ("gate_up", "mlp")):
        norms[norm] = divide_columns_before(kind, norms[norm][:, None])[0][:, 0]
    # The rows that make a channel are divided after their own columns were multiplied: the two do not meet.
    for kind, rows, maker in (("o", v, "qkv"), ("down", up, "gate_up")):
        changed = weights[maker].copy()
        changed[rows] = divide_columns_before(kind, weights[maker][rows])[0]
        weights[maker] = changed
    return weights, norms, used


def _scaled(rows: np.ndarray, e: np.ndarray) -> np.ndarray:
    return np.ldexp(rows.astype(np.float32), e[:, None]).astype(ml_dtypes.bfloat16)


def _exact(rows: np.ndarray, e: np.ndarray) -> np.ndarray:
    """Whether every number of a row survives scaling and scaling back."""
    back = np.ldexp(_scaled(rows, e).astype(np.float32), -e[:, None])
    with np.errstate(invalid="ignore"):
        return (back == rows.astype(np.float32)).all(axis=1)
