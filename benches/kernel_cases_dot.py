"""Products with weights as steps call them, of int8 and of bf16."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from kernel_case import (
    Case,
    Place,
    Random,
    copies,
    difference,
    each_layer,
    first_layer,
    first_result,
)
from random_model import SMALL

from elastic_jax import kernels
from elastic_jax.config import ModelConfig
from elastic_jax.groups import LM_HEAD, model_groups
from elastic_jax.kernels import prompt_dot_cuda
from elastic_jax.quantization import activation_blocks, swiglu

GENERATED_ROWS = (64, 128)
"""Of 32 and 64 generated tokens, two each, beside prompt tokens or where decode's own kernels do not take as many."""

PROMPT_ROWS = (1024, 4096)

BF16_ROWS = (64, 4096)

_EPILOGUES = {"qkv": "", "o": "added", "gate_up": "SwiGLU", "down": "added"}
"""What follows each product of prompt tokens."""


def _weights(config: ModelConfig) -> list[tuple[str, int, int]]:
    """(kind, out, in) of each kind of weight."""
    kinds = {group.kind: (group.out_size, group.in_size) for group in model_groups(config).values()}
    return [(kind, *shape) for kind, shape in kinds.items()]


def integer_dots(place: Place) -> Iterable[Case]:
    generated, prompt = ((4,), (32,)) if place.config == SMALL else (GENERATED_ROWS, PROMPT_ROWS)
    for name, out, contraction in _weights(place.config):
        works = [(rows, "", 1) for rows in generated]
        if name != LM_HEAD:  # which sees few tokens only
            works += [(rows, _EPILOGUES[name], 1) for rows in prompt]
            works.append((prompt[-1], _EPILOGUES[name], activation_blocks(contraction)))
        for rows, epilogue, blocks in works:
            for implementation in place.implementations("dot"):
                yield _integer_dot(place, implementation, name, (rows, out, contraction), epilogue, blocks)


def _integer_dot(
    place: Place, implementation: str, name: str, shape: tuple[int, int, int], epilogue: str, blocks: int
) -> Case:
    rows, out, contraction = shape
    count = copies(out * contraction)

    def operands(random: Random) -> tuple[Any, Any]:
        x, row_scales = random.int8((rows, contraction)), random.uniform((rows, blocks), 0.5, 1)
        # So that products are about one, where SwiGLU bends.
        scales = random.uniform((out, 1), 0.5, 1) / (37 * 37 * contraction**0.5)
        residual = random.normal((rows, out)) if epilogue == "added" else None
        return ((x, row_scales, scales, residual), [(random.int8((out, contraction)),) for _ in range(count)]), ()

    dot = kernels.DOT[implementation]

    def call(x: Any, row_scales: Any, scales: Any, residual: Any, values: Any) -> jax.Array:
        if epilogue == "SwiGLU":
            return dot.multiply_gated(x, row_scales, values, scales)
        return dot.multiply(x, row_scales, values, scales, residual)

    # The implementation called `pallas` leaves products of many rows to one in CUDA C++.
    cuda = implementation == "pallas" and prompt_dot_cuda.choose_width(
        place.capability, place.multiprocessors, *shape, blocks
    )
    extra = (f" {epilogue}" if epilogue else "") + (" w8a8b" if blocks > 1 else "")
    return Case(
        kernel="integer_dot",
        implementation="cuda" if cuda else implementation,
        work=f"{name} [{out} x {contraction}]{extra}, {rows} rows",
        turn=place.turn("dot", implementation, telling=rows >= PROMPT_ROWS[-1]),
        read_bytes=out * contraction,
        operations=2 * rows * out * contraction,
        arithmetic="int8",
        layers=count,
        operands=operands,
        call=each_layer(call),
        outcome=first_result,
        reference=first_layer(functools.partial(exact_integer_dot, epilogue=epilogue)),
        error=difference,
        tolerance=1e-2 if epilogue else 1e-5,  # results are bf16, or sums of float32 in another order
    )


def exact_integer_dot(x: Any, row_scales: Any, scales: Any, residual: Any, values: Any, *, epilogue: str) -> jax.Array:
    """int8 is exact in float32, and so are sums below 2**24: another route than that of any integer dot."""
    blocks = row_scales.shape[1]
    size = x.shape[1] // blocks
    total = jnp.zeros((), jnp.float32)
    for block in range(blocks):
        columns = slice(block * size, (block + 1) * size)
        part = jnp.dot(x[:, columns].astype(jnp.float32), values[:, columns].astype(jnp.float32).T, precision="highest")
        total = total + part * row_scales[:, block, None]
    product = total * scales[:, 0][None, :]
    if epilogue == "SwiGLU":
        return swiglu(product)
    return product if residual is None else product + residual.astype(jnp.float32)


def bf16_dots(place: Place) -> Iterable[Case]:
    for name, out, contraction in _weights(place.config):
        for rows in (1, 16) if place.config == SMALL else BF16_ROWS:
            if name == LM_HEAD and rows > GENERATED_ROWS[-1]:
                continue
            epilogue = _EPILOGUES[name] if rows >= PROMPT_ROWS[0] else ""
            by_name: dict[str, Case] = {}  # of few rows, the default is the reference
            for implementation in place.implementations("dot"):
                case = _bf16_dot(place, implementation, name, (rows, out, contraction), epilogue)
                by_name.setdefault(case.name, case)
            yield from by_name.values()


def _bf16_dot(place: Place, implementation: str, name: str, shape: tuple[int, int, int], epilogue: str) -> Case:
    rows, out, contraction = shape
    count = copies(2 * out * contraction)

    def operands(random: Random) -> tuple[Any, Any]:
        x = random.normal((rows, contraction))
        residual = random.normal((rows, out)) if epilogue == "added" else None
        # So that products are about one, where SwiGLU bends.
        weights = [(random.normal((out, contraction)) * contraction**-0.5,) for _ in range(count)]
        return ((x, residual), weights), ()

    dot = kernels.DOT[implementation]

    def call(x: Any, residual: Any, weight: Any) -> jax.Array:
        if epilogue == "SwiGLU":
            return dot.multiply_float_gated(x, weight)
        return dot.multiply_float(x, weight, residual)

    def exact(x: Any, residual: Any, weight: Any) -> jax.Array:
        x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
        product = jnp.dot(x, weight.T, precision="highest")
        if epilogue == "SwiGLU":
            return swiglu(product)
        return product if residual is None else product + residual.astype(jnp.float32)

    # The implementation called `pallas` leaves to XLA what the kernel in CUDA C++ is not for.
    cuda = implementation == "pallas" and prompt_dot_cuda.choose_width(
        place.capability, place.multiprocessors, rows, out, 2 * contraction, 1
    )
    return Case(
        kernel="bf16_dot",
        implementation="cuda" if cuda else "xla",
        work=f"{name} [{out} x {contraction}]{f' {epilogue}' if epilogue else ''}, {rows} rows",
        turn=place.turn("dot", implementation, telling=rows >= PROMPT_ROWS[-1] and name == "gate_up"),
        read_bytes=2 * out * contraction,
        operations=2 * rows * out * contraction,
        arithmetic="bf16",
        layers=count,
        operands=operands,
        call=each_layer(call),
        outcome=first_result,
        reference=first_layer(exact),
        error=difference,
        tolerance=1e-2,
    )
