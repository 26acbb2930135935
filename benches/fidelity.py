"""How far each mode is from the original model on a text: KL, perplexity, top-1 flips.

Method. The text is encoded as a whole, cut into windows of --window tokens, and each window is run through the model
by itself (with BOS where the tokenizer adds one). The reference is mode XL computed in float32. KL is
KL(reference || mode) of the next-token distributions in nats, averaged over all positions; perplexity is exp of the
mean negative log-likelihood of each window's tokens after its first; a flip is a position whose most likely token
differs.
Quantized modes are measured twice: with all tokens in the prompt's arithmetic, and with all in the generated tokens'
(the products of a generated token; attention is the same). Tracing and compiling are allowed here.

With `--kv int8` keys and values are rounded as a KV cache in int8 does; not those of the reference.

It does not measure tasks; a small distance proposes a plan and certifies nothing.

    uv run python benches/fidelity.py CHECKPOINT --text FILE --tokens 8192 --out benches/results/<device>/fidelity.json
"""

import argparse
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from environment import report

from elastic_jax import kernels
from elastic_jax.batch import TokenBatch
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.executables import default_compiler_options
from elastic_jax.kv_cache import KvPrecision, abstract_cache
from elastic_jax.model import Mistral
from elastic_jax.plan import MODES, Plan
from elastic_jax.tokenizer import Tokenizer
from elastic_jax.weights import load_weights

PAGE = 64


type LogProbabilities = Callable[[np.ndarray], Any]


def compile_mode(
    checkpoint: Checkpoint, plan: Plan, dtype: str, role: str, window: int, kv: KvPrecision
) -> LogProbabilities:
    """A function from a window's tokens to the log-probabilities [window, vocab] of what follows each."""
    config = checkpoint.config
    device = jax.devices()[0]
    weights = load_weights(checkpoint, plan, dtype, device, workers=2, progress=None)
    attention, dot, _ = kernels.default_names(config, device.platform, dtype)

    def prompt_attention(query: Any, kv: Any, batch: TokenBatch) -> Any:
        """Attention of prompt tokens, whatever role their products have."""
        return kernels.attention(attention)(query, kv, dataclasses.replace(batch, generated=0))

    def log_probabilities(weights: Any, tokens: Any) -> Any:
        slots = -(-window // PAGE) * PAGE
        cache = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            abstract_cache((slots, 2, config.num_kv_heads, config.head_dim), dtype, kv),
        )
        place = jnp.arange(window, dtype=jnp.int32)
        batch = TokenBatch(
            row=jnp.zeros(window, jnp.int32),
            position=place,
            slot=place,
            block_table=jnp.arange(slots // PAGE, dtype=jnp.int32)[None, :],
            context_length=jnp.full(1, window, jnp.int32),
            generated=window if role == "generated" else 0,
            page_size=PAGE,
        )
        model = Mistral(
            config, weights, attention=prompt_attention, dot=kernels.dot(dot), decode=None, dtype=jnp.dtype(dtype)
        )
        x, _ = model(tokens, (cache,) * config.num_layers, batch)
        return jax.nn.log_softmax(model.logits(x), axis=-1)

    tokens = jax.ShapeDtypeStruct((window,), jnp.int32)
    compiled = (
        jax.jit(log_probabilities).lower(weights, tokens).compile(dict(default_compiler_options(device.platform)))
    )
    return lambda tokens: compiled(weights, tokens)


@jax.jit
def distance(reference: Any, mode: Any, tokens: Any) -> tuple[Any, Any, Any]:
    """Per position: KL, whether the most likely token differs; and the log-probability of each token but the first."""
    kl = jnp.sum(jnp.exp(reference) * (reference - mode), axis=-1)
    flips = jnp.argmax(reference, axis=-1) != jnp.argmax(mode, axis=-1)
    return kl, flips, jnp.take_along_axis(mode[:-1], tokens[1:, None], axis=1)[:, 0]


def measure(references: list[Any], function: LogProbabilities, windows: list[np.ndarray]) -> dict[str, float]:
    found = [distance(r, function(window), window) for r, window in zip(references, windows, strict=True)]
    kl, flips, likelihood = (
        np.stack([np.asarray(part, np.float64) for part in parts]) for parts in zip(*found, strict=True)
    )
    return {"kl": kl.mean(), "perplexity": float(np.exp(-likelihood.mean())), "flips": flips.mean()}


def read_text(path: Path) -> str:
    if path.suffix == ".jsonl":
        return "".join(json.loads(line)["text"] for line in path.read_text("utf-8").splitlines())
    return path.read_text("utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="a text file, or JSON lines with a field `text`")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--kv", choices=["full", "int8"], default="full", help="precision of the KV cache")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    checkpoint = Checkpoint.open(arguments.checkpoint)
    tokenizer = Tokenizer.load(checkpoint.tokenizer_path)
    ids = tokenizer.encode(read_text(arguments.text), add_special_tokens=True)[: arguments.tokens]
    windows = [np.asarray(ids[i : i + arguments.window], np.int32) for i in range(0, len(ids), arguments.window)]
    windows = [window for window in windows if len(window) == arguments.window]

    plans = checkpoint.plans()
    variants = [("XL", "float32", "prompt")]
    variants += [(mode, "bfloat16", role) for mode in MODES for role in ("prompt", "generated")]
    variants.remove(("XL", "bfloat16", "generated"))  # XL has one arithmetic for both
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiling = [
            pool.submit(
                compile_mode, checkpoint, plans[m], d, r, arguments.window, "full" if d == "float32" else arguments.kv
            )
            for m, d, r in variants
        ]
        functions = [future.result() for future in compiling]
    references = [functions[0](window) for window in windows]
    rows: list[dict[str, Any]] = [
        {"mode": mode, "dtype": dtype, "role": role} | measure(references, function, windows)
        for (mode, dtype, role), function in zip(variants, functions, strict=True)
    ]
    reference = rows[0]["perplexity"]
    for row in rows:
        row["perplexity_change"] = row["perplexity"] / reference - 1
    facts = {
        "bench": "fidelity",
        "source": dict(checkpoint.manifest.source),
        "text_sha256": hashlib.sha256(arguments.text.read_bytes()).hexdigest(),
        "text_name": arguments.text.name,
        "tokens": sum(len(window) for window in windows),
        "window": arguments.window,
        "kv": arguments.kv,
    }
    report(rows, facts, arguments.out)


if __name__ == "__main__":
    main()
