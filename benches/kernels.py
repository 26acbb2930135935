"""Each kernel against what the device can do at most, measured in the same run (`limits.py`).

Method. A case is one implementation of a kernel on one piece of work of Mistral-Small-3.1-24B's step. It is checked
against the plain-XLA reference (`error`; a wrong one ends the bench), then timed: one jitted call holds several layers
with memory of their own, so that nothing comes from the L2 cache that would not in a model; as many calls as fill 50 ms
are put in flight and waited for once, seven times after as long a warm-up. The median counts. `read_tb_s` counts what
must be read once (weights, live keys and values), `top_s` two operations for each product; `fraction_of_limit` is the
larger of the two times that the limits allow over the time taken, `bound` says which it is.

To add a kernel, add an entry to TABLE. `attention.py` and `integer_dot.py` try sizes of kernels; this one tells where
they stand.

    python benches/kernels.py --out benches/results/<device>/kernels.json [--only integer_dot]
    python benches/kernels.py --small        # a tiny model on a CPU, to check this script
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import attention as attention_bench
import jax
import jax.numpy as jnp
import numpy as np
from environment import report
from limits import dot_limit, read_limit, seconds
from random_model import MISTRAL_SMALL, SMALL

from elastic_jax import kernels
from elastic_jax.config import ModelConfig
from elastic_jax.groups import LM_HEAD, model_groups

COPIES_BYTES = 256 << 20
"""Memory that the layers of a call take at least: several times an L2 cache."""

DOT_ROWS = (2, 16, 32, 128, 4096)
"""Rows of an integer dot: two for each generated token, one for each of a prompt."""


@dataclasses.dataclass(frozen=True)
class Made:
    """A case's operands.

    Attributes:
        call: what is timed, for one layer.
        layers: its arguments for each layer; memory that is read differs.
        reference: the same for the plain reference, None where there is none.
        tolerance: of the largest difference over the largest output.
    """

    call: Callable[..., jax.Array]
    layers: Sequence[tuple[Any, ...]]
    reference: Callable[..., jax.Array] | None
    tolerance: float


@dataclasses.dataclass(frozen=True)
class Case:
    """One implementation on one piece of work.

    Attributes:
        kernel: its name, of TABLE.
        implementation: its name among the kernel's.
        work: what it does.
        read_bytes: what a layer must read.
        operations: what a layer must compute.
        arithmetic: whose limit holds for them.
        make: makes the operands on the device.
    """

    kernel: str
    implementation: str
    work: str
    read_bytes: int
    operations: int
    arithmetic: Literal["int8", "bf16"]
    make: Callable[[], Made]


def fraction(case: Case, took: float, limits: dict[str, float]) -> tuple[str, float]:
    """Which limit binds, and the time it allows over the time taken."""
    reading, computing = case.read_bytes / limits["read"], case.operations / limits[case.arithmetic]
    return ("reading" if reading >= computing else case.arithmetic), max(reading, computing) / took


# -- dots --------------------------------------------------------------------------------------------------------------


def _weights(config: ModelConfig, rows: Iterable[int]) -> Iterable[tuple[str, int, int, int]]:
    """(name, rows, out, in) of each weight's shape; a language-model head sees few tokens only."""
    shapes = {(group.out_size, group.in_size): name for name, group in model_groups(config).items()}
    for (out, contraction), name in shapes.items():
        for count in rows:
            if name != LM_HEAD or count <= 128:
                yield name.rsplit(".", 1)[-1], count, out, contraction


def _copies(size: int) -> int:
    return max(2, min(16, COPIES_BYTES // size))


def _int8(key: Any, shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), jnp.int8) // jnp.int8(2)


def integer_dots(config: ModelConfig, implementations: Sequence[str]) -> Iterable[Case]:
    for name, rows, out, contraction in _weights(config, DOT_ROWS):
        for implementation in implementations:

            def make(implementation: str = implementation, shape: Any = (rows, out, contraction)) -> Made:
                count, outputs, inputs = shape
                keys = jax.random.split(jax.random.key(0, impl="unsafe_rbg"), 3 + _copies(outputs * inputs))
                x = _int8(keys[0], (count, inputs))
                row_scales = jax.random.uniform(keys[1], (count, 1), minval=0.5)
                scales = jax.random.uniform(keys[2], (outputs, 1), minval=0.5)
                layers = [(x, row_scales, _int8(key, (outputs, inputs)), scales, None) for key in keys[3:]]
                return Made(kernels.INTEGER_DOT[implementation].multiply, layers, _exact_integer_dot, 1e-6)

            work = f"{name} [{out}, {contraction}], {rows} rows"
            operations = 2 * rows * out * contraction
            yield Case("integer_dot", implementation, work, out * contraction, operations, "int8", make)


def _exact_integer_dot(x: Any, row_scales: Any, values: Any, scales: Any, residual: None) -> jax.Array:
    """int8 is exact in float32, and so are sums below 2**24; another route than the integer dots'."""
    del residual  # products alone are measured
    exact = jnp.dot(x.astype(jnp.float32), values.T.astype(jnp.float32), precision="highest")
    return exact * row_scales * scales[:, 0][None, :]


def bf16_dots(config: ModelConfig, implementations: Sequence[str]) -> Iterable[Case]:
    del implementations  # there is XLA's alone
    for name, rows, out, contraction in _weights(config, (1, 16, 64, 4096)):

        def make(shape: Any = (rows, out, contraction)) -> Made:
            count, outputs, inputs = shape
            keys = jax.random.split(jax.random.key(0, impl="unsafe_rbg"), 1 + _copies(2 * outputs * inputs))
            x = jax.random.normal(keys[0], (count, inputs), jnp.bfloat16)
            layers = [(x, jax.random.normal(key, (outputs, inputs), jnp.bfloat16)) for key in keys[1:]]
            return Made(_bf16_dot, layers, None, 0)

        work = f"{name} [{out}, {contraction}], {rows} rows"
        yield Case("bf16_dot", "xla", work, 2 * out * contraction, 2 * rows * out * contraction, "bf16", make)


def _bf16_dot(x: Any, weight: Any) -> jax.Array:
    dimensions = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, dimensions, preferred_element_type=jnp.float32).astype(jnp.bfloat16)


# -- attention ---------------------------------------------------------------------------------------------------------

SMALL_WORKS = (
    attention_bench.repeated(2, 128, 256),
    attention_bench.Work("prefill 128", (), ((0, 128),), 256),
)


def attentions(config: ModelConfig, implementations: Sequence[str]) -> Iterable[Case]:
    works = SMALL_WORKS if config == SMALL else attention_bench.TIMED
    heads, kv_heads, dim = attention_bench.HEADS, attention_bench.KV_HEADS, attention_bench.DIM
    for work in works:
        for implementation in implementations:
            if implementation == "xla" and work.prompt and config != SMALL:
                continue  # the reference is for checking; it takes seconds

            def make(implementation: str = implementation, work: attention_bench.Work = work) -> Made:
                pages = attention_bench.pages_of(work)
                layers = int(np.clip(COPIES_BYTES // (pages * attention_bench.PAGE * 4 * kv_heads * dim), 4, 40))
                order = np.random.default_rng(0).permutation(pages * layers).reshape(layers, -1)
                batches = [attention_bench.make_batch(work, each, padding=0) for each in order]
                keys = jax.random.split(jax.random.key(0), 2)
                shape = (pages * layers * attention_bench.PAGE, 2, kv_heads, dim)
                kv = jax.random.normal(keys[0], shape, jnp.bfloat16)
                queries = jax.random.normal(keys[1], (layers, batches[0].row.shape[0], heads, dim), jnp.bfloat16)
                arguments = [(query, kv, batch) for query, batch in zip(queries, batches, strict=True)]
                return Made(kernels.ATTENTION[implementation], arguments, _exact_attention, 2e-2)

            read = sum(work.contexts) * 4 * kv_heads * dim
            yield Case("attention", implementation, work.name, read, 4 * heads * dim * work.pairs, "bf16", make)


def _exact_attention(query: Any, kv: Any, batch: Any) -> jax.Array:
    return kernels.ATTENTION["xla"](query.astype(jnp.float32), kv.astype(jnp.float32), batch)


# -- the table ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """A kernel: the names of its implementations, and its cases."""

    implementations: Iterable[str]
    cases: Callable[[ModelConfig, Sequence[str]], Iterable[Case]]


TABLE = {
    "integer_dot": Entry(kernels.INTEGER_DOT, integer_dots),
    "bf16_dot": Entry(("xla",), bf16_dots),
    "attention": Entry(kernels.ATTENTION, attentions),
}


def cases_of(config: ModelConfig, platform: str, only: Sequence[str] | None) -> list[Case]:
    """Every case that can run here; what is not plain XLA is for GPUs."""
    found = []
    for name, entry in TABLE.items():
        if only and name not in only:
            continue
        found += entry.cases(config, [i for i in entry.implementations if platform == "gpu" or i == "xla"])
    return found


def compiled(case: Case) -> tuple[Made, Any]:
    made = case.make()
    together = jax.jit(lambda layers: [made.call(*arguments) for arguments in layers])
    return made, together.lower(made.layers).compile()


def error_of(made: Made, out: Any) -> float:
    if made.reference is None:
        return 0.0
    return float(_difference(out, jax.jit(made.reference)(*made.layers[0])))


@jax.jit
def _difference(out: Any, expected: Any) -> Any:
    out, expected = out.astype(jnp.float32), expected.astype(jnp.float32)
    return jnp.max(jnp.abs(out - expected)) / jnp.max(jnp.abs(expected))


def measure(case: Case, made: Made, call: Any, limits: dict[str, float]) -> dict[str, Any]:
    error = error_of(made, call(made.layers)[0])
    if not error <= made.tolerance:
        raise SystemExit(f"{case.kernel} {case.implementation}, {case.work}: wrong by {error:.3g}")
    took = float(np.median(seconds(lambda: call(made.layers)))) / len(made.layers)
    bound, part = fraction(case, took, limits)
    return {
        "kernel": case.kernel,
        "implementation": case.implementation,
        "work": case.work,
        "us": took * 1e6,
        "read_tb_s": case.read_bytes / took / 1e12,
        "top_s": case.operations / took / 1e12,
        "bound": bound,
        "fraction_of_limit": part,
        "error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TABLE, help="these kernels")
    parser.add_argument("--threads", type=int, default=8, help="cases compiled at once")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after that")
    parser.add_argument("--small", action="store_true", help="a tiny model, to check this script")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    end = time.time() + 60 * arguments.minutes
    device = jax.devices()[0]
    limits = {"read": read_limit(device), **{kind: dot_limit(device, kind) for kind in ("int8", "bf16")}}
    print({name: f"{value / 1e12:.2f}" for name, value in limits.items()}, "TB/s, TOP/s", flush=True)
    cases = cases_of(SMALL if arguments.small else MISTRAL_SMALL, device.platform, arguments.only)
    rows: list[dict[str, Any]] = []
    left: list[str] = []
    with ThreadPoolExecutor(arguments.threads) as pool:
        for start in range(0, len(cases), arguments.threads):
            here = cases[start : start + arguments.threads]
            if time.time() >= end:
                left += [f"{case.kernel} {case.implementation} {case.work}" for case in here]
                continue
            # All are compiled before the first is timed, so that nothing else runs then.
            for case, (made, call) in zip(here, list(pool.map(compiled, here)), strict=True):
                rows.append(measure(case, made, call, limits))
                print(rows[-1], flush=True)
    facts = {
        "bench": "kernels",
        "limits": {"read_tb_s": limits["read"] / 1e12, **{f"{k}_top_s": limits[k] / 1e12 for k in ("int8", "bf16")}},
        "left_out": left,
    }
    report(rows, facts, arguments.out)


if __name__ == "__main__":
    main()
