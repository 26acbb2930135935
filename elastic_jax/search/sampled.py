"""Text that the original model writes itself: what it is calibrated on unless other text is given.

Nothing has to be downloaded or licensed, and the KL of a plan on such text is, by definition, how much the logarithm of
perplexity rises there.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from aot_cache.target import Device
from elastic_jax import kernels
from elastic_jax.batch import TokenBatch
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.config import ModelConfig
from elastic_jax.errors import MemoryPlanError, TokenizerError
from elastic_jax.memory import available_memory, gib
from elastic_jax.model import Mistral
from elastic_jax.plan import provisional_plans
from elastic_jax.search.prompts import PROMPTS
from elastic_jax.tokenizer import Tokenizer
from elastic_jax.weights import load_weights

_PAGE = 64


def sample(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    count: int,
    length: int,
    *,
    seed: int,
    device: Device,
    workers: int,
) -> Int32[np.ndarray, "count length"]:
    """Sequences drawn from the model at temperature 1, in bfloat16, all at once.

    Every other one begins with a prompt of `prompts.PROMPTS` in the model's chat template (as plain text where it has
    none), the others with nothing but the beginning of a sequence. A sequence goes on after an end token, as texts that
    are packed for training do.

    Raises:
        CheckpointError: the bf16 weights are not stored, or are damaged.
    """
    config = checkpoint.config
    starts = [_start(config, tokenizer, number, length) for number in range(count)]
    weights = load_weights(
        checkpoint, provisional_plans(config)["XL"], "bfloat16", device, workers=workers, progress=None
    )
    pages = -(-length // _PAGE)
    cache = (count * pages * _PAGE, 2, config.num_kv_heads, config.head_dim)
    kv = tuple(jnp.zeros(cache, jnp.bfloat16, device=device) for _ in range(config.num_layers))
    given = np.zeros((count, length), np.int32)
    for row, start in zip(given, starts, strict=True):
        row[: len(start)] = start
    given, lengths = jnp.asarray(given), jnp.asarray([len(start) for start in starts], jnp.int32)
    names, key = kernels.default_names(config, device.platform, "bfloat16"), jax.random.key(seed)
    tokens = given
    for position in range(length - 1):
        tokens, kv = _next(weights, tokens, kv, lengths, jnp.int32(position), key, config, names)
    return np.asarray(tokens)


def check_sampling(checkpoint: Checkpoint, count: int, length: int, device: Device) -> None:
    """Refuses to sample where the original model does not fit on a device as a whole.

    Args:
        checkpoint: the model.
        count: windows wanted.
        length: tokens a window.
        device: where it would run.

    Raises:
        MemoryPlanError: it does not fit.
        CheckpointError: the bf16 weights are not stored.
    """
    config, available = checkpoint.config, available_memory(device)
    slots = count * -(-length // _PAGE) * _PAGE
    weights = checkpoint.weight_bytes(provisional_plans(config)["XL"])
    cache = 2 * 2 * slots * config.num_kv_heads * config.head_dim * config.num_layers
    if available is not None and weights + cache > available:
        raise MemoryPlanError(
            f"{device.device_kind}: {gib(available)} are free, and the original model, which writes the text unless "
            f"there is other, needs {gib(weights)} for weights and {gib(cache)} for {count} windows. Give text with "
            "--calibration FILE"
        )


def _start(config: ModelConfig, tokenizer: Tokenizer, number: int, length: int) -> Sequence[int]:
    first = config.bos_token_id if config.bos_token_id is not None else config.eos_token_ids[0]
    if number % 2 == 0:
        return [first]
    prompt = PROMPTS[number // 2 % len(PROMPTS)]
    try:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    except TokenizerError:
        ids = tokenizer.encode(prompt + "\n", add_special_tokens=True)
    return list(ids)[: length // 2] or [first]


@functools.partial(jax.jit, static_argnames=("config", "names"), donate_argnums=(1, 2))
def _next(
    weights: dict[str, Any],
    tokens: Any,
    kv: tuple[Any, ...],
    lengths: Any,
    position: Any,
    key: Any,
    config: ModelConfig,
    names: tuple[str, str, str],
) -> tuple[Any, tuple[Any, ...]]:
    """Reads the tokens at a position, and draws those after it that are not given."""
    rows, length = tokens.shape
    pages = -(-length // _PAGE)
    row = jnp.arange(rows, dtype=jnp.int32)
    batch = TokenBatch(
        row=row,
        position=jnp.full(rows, position, jnp.int32),
        slot=row * (pages * _PAGE) + position,
        block_table=jnp.arange(rows * pages, dtype=jnp.int32).reshape(rows, pages),
        context_length=jnp.full(rows, position + 1, jnp.int32),
        generated=rows,
        page_size=_PAGE,
    )
    model = Mistral(
        config,
        weights,
        attention=kernels.attention(names[0]),
        dot=kernels.dot(names[1]),
        decode=kernels.decode(names[2]),
        dtype=jnp.dtype("bfloat16"),
    )
    x, kv = model(jax.lax.dynamic_index_in_dim(tokens, position, axis=1, keepdims=False), kv, batch)
    drawn = jax.random.categorical(jax.random.fold_in(key, position), model.logits(x), axis=-1).astype(jnp.int32)
    after = jax.lax.dynamic_index_in_dim(tokens, position + 1, axis=1, keepdims=False)
    chosen = jnp.where(position + 1 < lengths, after, drawn)
    return jax.lax.dynamic_update_index_in_dim(tokens, chosen, position + 1, axis=1), kv
