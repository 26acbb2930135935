"""The Pallas attention kernels on a GPU: first whether they are right, then how long they take.

Method. Correctness: for packings with odd counts, partial pages, padding and shuffled pages, with NaN in every slot
that nobody wrote, ||out - reference|| / ||reference|| against plain XLA in float32 on the same inputs. Time: one jitted
call holds several layers, each with other queries and other pages, so that nothing comes from the L2 cache that would
not in a model. As many such calls as fill 50 ms are put in flight and waited for once, which is repeated --repeats
times, after as long a warm-up (an idle device's clocks are slow); the median is divided by calls and layers. What is
equal in all layers (which program has which work) is computed once a call, as in a model's step. `read_tb_s` counts
live keys and values once; `tflop_s` counts 4 x heads x dim for each pair of a query and a key it sees, nothing else.

    uv run python benches/attention.py --out benches/results/<device>/attention.json
    uv run python benches/attention.py --sweep   # other sizes of the kernels
"""

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from environment import report

from elastic_jax.batch import TokenBatch
from elastic_jax.kernels import attention_pallas, attention_xla
from elastic_jax.kernels.attention_pallas_generated import GeneratedTiles
from elastic_jax.kernels.attention_pallas_prompt import PromptTiles

PAGE = 64
HEADS, KV_HEADS, DIM = 32, 8, 128
"""Mistral-Small-3.1-24B."""

BURST_SECONDS = 0.05

TOLERANCE = {"bfloat16": 5e-3, "float32": 1e-5}


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step attends: contexts of generated tokens, and (context before, tokens) of prompt chunks."""

    name: str
    generated: tuple[int, ...]
    prompt: tuple[tuple[int, int], ...]
    max_context: int

    @property
    def contexts(self) -> list[int]:
        return [*self.generated, *(before + tokens for before, tokens in self.prompt)]

    @property
    def pairs(self) -> int:
        return sum(self.generated) + sum(n * before + n * (n + 1) // 2 for before, n in self.prompt)


def repeated(rows: int, context: int, max_context: int) -> Work:
    return Work(f"decode {rows} x {context}, max {max_context}", (context,) * rows, (), max_context)


TIMED = (
    repeated(1, 256, 1024),
    repeated(1, 256, 32768),
    repeated(1, 4096, 32768),
    repeated(1, 32768, 32768),
    repeated(16, 1024, 32768),
    repeated(64, 1024, 32768),
    Work("decode 1 x 32768 + 15 x 256", (32768, *(256,) * 15), (), 32768),
    Work("prefill 4096", (), ((0, 4096),), 32768),
    Work("prefill 4 x 1024", (), ((0, 1024),) * 4, 32768),
    Work("prefill 1024 at 4096", (), ((4096, 1024),), 32768),
    Work("prefill 64 at 4096", (), ((4096, 64),), 32768),
    Work("64 x 1024 and prefill 1024", (1024,) * 64, ((0, 1024),), 32768),
)


def make_batch(work: Work, pages: np.ndarray, padding: int) -> TokenBatch:
    """The step of `work`, whose sequences take `pages` in order."""
    rows = len(work.contexts)
    table = np.zeros((rows, -(-work.max_context // PAGE)), np.int32)
    taken = 0
    for row, context in enumerate(work.contexts):
        n = -(-context // PAGE)
        table[row, :n] = pages[taken : taken + n]
        taken += n
    d = len(work.generated)
    row = list(range(d))
    position = [context - 1 for context in work.generated]
    for i, (before, tokens) in enumerate(work.prompt):
        row += [d + i] * tokens
        position += range(before, before + tokens)
    row += [rows] * padding
    position += [0] * padding

    def ints(values: Any) -> jax.Array:
        return jnp.asarray(np.asarray(values, np.int32))

    # Attention does not look at the slots that the step writes.
    slot = np.zeros(len(row))
    return TokenBatch(ints(row), ints(position), ints(slot), ints(table), ints(work.contexts), d, PAGE)


def pages_of(work: Work) -> int:
    return sum(-(-context // PAGE) for context in work.contexts)


def relative_error(work: Work, dtype: str, heads: int, kv_heads: int, dim: int) -> float:
    rng = np.random.default_rng(0)
    pool = pages_of(work) + 3
    batch = make_batch(work, rng.permutation(pool), padding=37 if work.prompt else 0)
    kv = np.full((pool * PAGE, 2, kv_heads, dim), np.nan, np.float32)
    for row, context in enumerate(work.contexts):
        position = np.arange(context)
        slots = np.asarray(batch.block_table)[row, position // PAGE] * PAGE + position % PAGE
        kv[slots] = rng.standard_normal((context, 2, kv_heads, dim))
    query = jnp.asarray(rng.standard_normal((batch.row.shape[0], heads, dim)), jnp.dtype(dtype))
    cache = jnp.asarray(kv, jnp.dtype(dtype))
    out = np.asarray(jax.jit(attention_pallas.attention)(query, cache, batch))
    exact = jax.jit(attention_xla.attention)(
        query.astype(jnp.float32), jnp.nan_to_num(cache.astype(jnp.float32)), batch
    )
    reference = np.asarray(exact)
    padding = np.asarray(batch.row) == batch.rows
    if not np.all(out[padding] == 0):
        raise SystemExit(f"{work.name}: padding tokens are not zero")
    return float(np.linalg.norm(out - reference) / np.linalg.norm(reference))


CHECKED = (
    Work("decode, odd", (1, 2, 17, 63, 64, 65, 1000, 4097), (), 8192),
    Work("prefill, odd", (), ((0, 1), (5, 300), (64, 129), (4000, 200), (0, 63)), 8192),
    Work("mixed", (300, 1, 2049), ((0, 257), (127, 65)), 4096),
    Work("decode 1 x 32768", (32768,), (), 32768),
    Work("prefill 4096", (), ((0, 4096),), 4096),
)


CHECKED_SHAPES = (
    ("bfloat16", HEADS, KV_HEADS, DIM),
    ("bfloat16", 9, 3, 64),
    ("float32", 9, 3, 64),
    ("bfloat16", 8, 8, 256),
)


def check() -> list[dict[str, Any]]:
    rows = []
    shapes = (
        ("bfloat16", HEADS, KV_HEADS, DIM),
        ("bfloat16", 9, 3, 64),
        ("float32", 9, 3, 64),
        ("bfloat16", 8, 8, 256),
    )
    for work, (dtype, heads, kv_heads, dim) in itertools.product(CHECKED, shapes):
        error = relative_error(work, dtype, heads, kv_heads, dim)
        rows.append({"work": work.name, "dtype": dtype, "heads": f"{heads}/{kv_heads} x {dim}", "error": error})
        if not error < TOLERANCE[dtype]:
            raise SystemExit(f"wrong: {rows[-1]}, tolerance {TOLERANCE[dtype]}")
    return rows


def seconds(work: Work, attention: Callable[..., jax.Array], repeats: int) -> float:
    """Median seconds of one layer."""
    layers = int(np.clip((1 << 31) // (pages_of(work) * PAGE * 2 * KV_HEADS * DIM * 2), 4, 40))
    layers = 8 if work.prompt else layers
    pool = pages_of(work) * layers
    order = np.random.default_rng(0).permutation(pool).reshape(layers, -1)
    batches = [make_batch(work, pages, padding=0) for pages in order]
    tables = [batch.block_table for batch in batches]
    keys = jax.random.split(jax.random.key(0), 2)
    kv = jax.random.normal(keys[0], (pool * PAGE, 2, KV_HEADS, DIM), jnp.bfloat16)
    shape = (layers, batches[0].row.shape[0], HEADS, DIM)
    queries = list(jax.random.normal(keys[1], shape, jnp.bfloat16))

    @jax.jit
    def run(queries: list[Any], kv: Any, batch: TokenBatch, tables: list[Any]) -> list[Any]:
        return [
            attention(query, kv, dataclasses.replace(batch, block_table=table))
            for query, table in zip(queries, tables, strict=True)
        ]

    def timed(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            out = run(queries, kv, batches[0], tables)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / n / layers

    timed(1)
    calls = max(int(BURST_SECONDS / layers / timed(3)), 1)
    timed(calls)
    return float(np.median([timed(calls) for _ in range(repeats)]))


def measure(
    works: Sequence[Work], name: str, attention: Callable[..., jax.Array], repeats: int
) -> list[dict[str, Any]]:
    rows = []
    for work in works:
        took = seconds(work, attention, repeats)
        read = sum(work.contexts) * 2 * KV_HEADS * DIM * 2
        rows.append(
            {
                "work": work.name,
                "kernels": name,
                "us": took * 1e6,
                "read_tb_s": read / took / 1e12,
                "tflop_s": 4 * HEADS * DIM * work.pairs / took / 1e12,
            }
        )
        print(rows[-1], flush=True)
    return rows


def sweep(repeats: int) -> list[dict[str, Any]]:
    """Other sizes: generated tokens' on three shapes of decoding, the prompt's on two of prefill."""
    rows = []
    generated, prompt = GeneratedTiles(64, 512, 4, 3), PromptTiles(128, 64, 8, 3)

    def attention(generated: GeneratedTiles, prompt: PromptTiles) -> Callable[..., jax.Array]:
        return lambda *a: attention_pallas.run(*a, generated, prompt, interpret=False)

    names = ("decode 1 x 4096", "decode 1 x 32768, ", "decode 16", "decode 64")
    decodes = [w for w in TIMED if w.name.startswith(names)]
    for block, programs, warps, stages in (
        (64, 256, 4, 3),
        (64, 512, 4, 3),
        (64, 256, 4, 4),
        (64, 512, 4, 2),
        (64, 512, 8, 3),
        (64, 512, 2, 2),
        (32, 512, 2, 4),
    ):
        tiles = GeneratedTiles(block, programs, warps, stages)
        rows += measure(decodes, str(tiles), attention(tiles, prompt), repeats)
    prefills = [w for w in TIMED if w.name in ("prefill 4096", "prefill 4 x 1024", "prefill 64 at 4096")]
    for queries, block, warps, stages in (
        (128, 64, 4, 3),
        (128, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 128, 4, 2),
        (256, 64, 8, 3),
    ):
        tiles = PromptTiles(queries, block, warps, stages)
        rows += measure(prefills, str(tiles), attention(generated, tiles), repeats)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    checks = check()
    for row in checks:
        print(row, flush=True)
    rows = measure(TIMED, "pallas", attention_pallas.attention, arguments.repeats)
    if arguments.sweep:
        rows += sweep(arguments.repeats)
    facts = {"repeats": arguments.repeats, "errors": checks}
    report(rows, facts, arguments.out)


if __name__ == "__main__":
    main()
