"""The logits of every token of a prompt, which a step does not give: it gives those of a few of its tokens.

So the prompt is computed in chunks as short as the outputs of a step, each padded to the step's size. That wastes most
of the arithmetic (the step would need a language-model head for every token otherwise, see `Bucket.outputs`), and is
meant for looking at a model, not for measuring texts: `score` does that at full speed.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from elastic_jax.engine import Engine
from elastic_jax.step import StepInputs


def prompt_logits(engine: Engine, tokens: Sequence[int]) -> Float32[np.ndarray, "tokens vocab"] | None:
    """Logits after each of some tokens, by the arithmetic of prompt tokens; nothing is traced or compiled.

    Requests in progress are not disturbed, but wait.

    Args:
        engine: what runs it; nobody else may step it meanwhile.
        tokens: at least one, and within `engine.limits`.

    Returns:
        The logits; None while the engine has no row or too few pages free.
    """
    config, runner = engine.config, engine.runner
    borrowed = engine.borrow(len(tokens))
    if borrowed is None:
        return None
    row, pages = borrowed
    try:
        alone = [bucket for bucket in config.buckets if not bucket.generated]
        bucket = min(alone, key=lambda b: (-(-len(tokens) // b.outputs(config.rows)) * b.prompt, b))
        size = bucket.outputs(config.rows)
        logits = np.empty((len(tokens), runner.config.vocab_size), np.float32)
        places = np.arange(len(tokens))
        slots = np.asarray(pages)[places // config.page_size] * config.page_size + places % config.page_size
        for start in range(0, len(tokens), size):
            here = slice(start, min(start + size, len(tokens)))
            count = here.stop - start
            inputs = StepInputs(
                token=_padded(tokens[here], bucket.prompt, 0),
                position=_padded(places[here], bucket.prompt, 0),
                row=_padded([row] * count, bucket.prompt, config.rows),
                slot=_padded(slots[here], bucket.prompt, config.kv_slots),
                block_table=np.zeros((config.rows, config.pages), np.int32),
                context_length=np.zeros(config.rows, np.int32),
                out_index=_padded(range(count), size, bucket.tokens),
            )
            inputs.block_table[row, : len(pages)] = pages
            inputs.context_length[row] = here.stop
            out = runner.step(bucket, inputs, sampling=False, top=False)
            logits[here] = np.asarray(out.logits)[:count]
        return logits
    finally:
        engine.give_back(row, pages)


def _padded(values: Sequence[int] | np.ndarray | range, size: int, fill: int) -> np.ndarray:
    array = np.full(size, fill, np.int32)
    array[: len(values)] = values
    return array
