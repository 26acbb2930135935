"""How far each mode is from the original model on a text: KL, perplexity, top-1 flips.

Method. The text is encoded as a whole, cut into windows of --window tokens, and each window is run through the model
by itself (with BOS where the tokenizer adds one). The reference is mode XL computed in float32. KL is
KL(reference || mode) of the next-token distributions in nats, averaged over all positions; perplexity is exp of the
mean negative log-likelihood of each window's tokens after its first; a flip is a position whose most likely token
differs.
Quantized modes are measured twice: with all tokens in the prompt's arithmetic, and with all in the generated tokens'
(the products of a generated token; attention is the same). Tracing and compiling are allowed here.

It does not measure tasks; a small distance proposes a plan and certifies nothing.

    uv run python benches/fidelity.py CHECKPOINT --text FILE --tokens 8192 --out benches/results/<device>/fidelity.json
"""

import argparse
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from environment import report

from elastic_jax import kernels
from elastic_jax.batch import TokenBatch
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.model import Mistral
from elastic_jax.plan import MODES, Plan
from elastic_jax.tokenizer import Tokenizer
from elastic_jax.weights import load_weights

PAGE = 64


def logits_function(checkpoint: Checkpoint, plan: Plan, dtype: str, role: str) -> Any:
    config = checkpoint.config
    device = jax.devices()[0]
    weights = load_weights(checkpoint, plan, dtype, device, workers=2, progress=None)
    attention, dot = kernels.default_names(config, device.platform)

    def prompt_attention(query: Any, kv: Any, batch: TokenBatch) -> Any:
        """Attention of prompt tokens, whatever role their products have."""
        return kernels.attention(attention)(query, kv, dataclasses.replace(batch, generated=0))

    @jax.jit
    def logits(weights: Any, tokens: Any) -> Any:
        n = tokens.shape[0]
        slots = -(-n // PAGE) * PAGE
        cache = jnp.zeros((slots, 2, config.num_kv_heads, config.head_dim), jnp.dtype(dtype))
        place = jnp.arange(n, dtype=jnp.int32)
        batch = TokenBatch(
            row=jnp.zeros(n, jnp.int32),
            position=place,
            slot=place,
            block_table=jnp.arange(slots // PAGE, dtype=jnp.int32)[None, :],
            context_length=jnp.full(1, n, jnp.int32),
            generated=n if role == "generated" else 0,
            page_size=PAGE,
        )
        model = Mistral(config, weights, attention=prompt_attention, dot=kernels.dot(dot), dtype=jnp.dtype(dtype))
        x, _ = model(tokens, (cache,) * config.num_layers, batch)
        return model.logits(x)

    return lambda tokens: np.asarray(logits(weights, tokens))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


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
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    checkpoint = Checkpoint.open(arguments.checkpoint)
    tokenizer = Tokenizer.load(checkpoint.tokenizer_path)
    ids = tokenizer.encode(read_text(arguments.text), add_special_tokens=True)[: arguments.tokens]
    windows = [np.asarray(ids[i : i + arguments.window], np.int32) for i in range(0, len(ids), arguments.window)]
    windows = [window for window in windows if len(window) == arguments.window]

    plans = checkpoint.plans()
    variants = [(mode, "bfloat16", role) for mode in MODES for role in ("prompt", "generated")]
    variants.remove(("XL", "bfloat16", "generated"))  # XL has one arithmetic for both
    original = logits_function(checkpoint, plans["XL"], "float32", "prompt")
    references = [log_softmax(original(window)).astype(np.float32) for window in windows]
    rows = [{"mode": "XL", "dtype": "float32", "role": "prompt"} | measure(references, references, windows)]
    for mode, dtype, role in variants:
        function = logits_function(checkpoint, plans[mode], dtype, role)
        found = (log_softmax(function(window)).astype(np.float32) for window in windows)
        rows.append({"mode": mode, "dtype": dtype, "role": role} | measure(references, found, windows))
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
    }
    report(rows, facts, arguments.out)


def measure(references: Any, found: Any, windows: list[np.ndarray]) -> dict[str, float]:
    kl, flips, likelihood, positions, predicted = 0.0, 0, 0.0, 0, 0
    for reference, mode, window in zip(references, found, windows, strict=True):
        kl += float((np.exp(reference, dtype=np.float64) * (reference - mode)).sum())
        flips += int((reference.argmax(axis=-1) != mode.argmax(axis=-1)).sum())
        likelihood += float(mode[np.arange(len(window) - 1), window[1:]].sum())
        positions += len(window)
        predicted += len(window) - 1
    return {
        "kl": kl / positions,
        "perplexity": float(np.exp(-likelihood / predicted)),
        "flips": flips / positions,
    }


if __name__ == "__main__":
    main()
