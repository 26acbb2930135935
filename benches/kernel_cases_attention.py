"""Attention over pages: generated tokens of more sequences than decode's kernels take, prompts, and both."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import attention as attention_bench
import jax
import jax.numpy as jnp
import numpy as np
from attention import Work, repeated
from kernel_case import COPIES_BYTES, Case, Place, Random, difference, each_layer, first_layer, first_result
from random_model import SMALL

from elastic_jax import kernels
from elastic_jax.kv_cache import KvPrecision, QuantizedCache
from elastic_jax.model import Attention

SMALL_WORKS = (
    repeated(2, 128, 256),
    Work("prefill 128", (), ((0, 128),), 256),
)

TELLING = ("decode 64 x 1024, max 32768", "prefill 4096")

WORKS = (repeated(32, 4096, 32768), *attention_bench.TIMED)


def attentions(place: Place) -> Iterable[Case]:
    for work in SMALL_WORKS if place.config == SMALL else WORKS:
        if not work.prompt and len(work.generated) <= place.fused_tokens:
            continue  # decode's kernels have their own
        for implementation in place.implementations("attention"):
            if implementation == "xla" and work.prompt and place.config != SMALL:
                continue  # the reference is for checking; it takes seconds
            for precision in ("full", "int8"):
                yield _attention(place, implementation, work, precision)


def _attention(place: Place, implementation: str, work: Work, precision: KvPrecision) -> Case:
    config = place.config
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    pages = attention_bench.pages_of(work)
    head_bytes = 2 * dim if precision == "full" else dim + 4
    layers = int(np.clip(COPIES_BYTES // (pages * attention_bench.PAGE * 2 * kv_heads * head_bytes), 4, 16))
    order = np.random.default_rng(0).permutation(pages * layers).reshape(layers, -1)

    def operands(random: Random) -> tuple[Any, Any]:
        batches = [attention_bench.make_batch(work, each, padding=0) for each in order]
        shape = (pages * layers * attention_bench.PAGE, 2, kv_heads, dim)
        if precision == "full":
            kv: Any = random.normal(shape)
        else:
            kv = QuantizedCache(random.int8(shape), random.uniform(shape[:-1], 0.5, 1.5) / 37, "bfloat16")
        shape = batches[0].row.shape[0], heads, dim
        return ((kv, batches[0]), [(random.normal(shape), batch.block_table) for batch in batches]), ()

    def by(attend: Attention) -> Any:
        # Only pages differ between layers: which program has which work is computed once, as in a model's step.
        return lambda kv, batch, query, pages: attend(query, kv, dataclasses.replace(batch, block_table=pages))

    name = work.name.replace(", max", " of at most")
    return Case(
        kernel="attention",
        implementation=implementation,
        work=f"{name}, {'bf16' if precision == 'full' else 'int8'} KV",
        turn=place.turn("attention", implementation, telling=work.name in TELLING),
        read_bytes=sum(work.contexts) * 2 * kv_heads * head_bytes,
        operations=4 * heads * dim * work.pairs,
        arithmetic="bf16",
        layers=layers,
        operands=operands,
        call=each_layer(by(kernels.ATTENTION[implementation])),
        outcome=first_result,
        reference=first_layer(by(exact_attention)),
        error=difference,
        tolerance=2e-2,
    )


def exact_attention(query: Any, kv: Any, batch: Any) -> jax.Array:
    """The plain reference in float32."""
    quantized = isinstance(kv, QuantizedCache)
    kv = dataclasses.replace(kv, compute="float32") if quantized else kv.astype(jnp.float32)
    return kernels.ATTENTION["xla"](query.astype(jnp.float32), kv, batch)
