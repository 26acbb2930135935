"""Run in a process of its own: loads a mode and uses all of it, with tracing forbidden from the start.

Prints one JSON value: what JAX recorded about tracing, lowering and compiling, and the tokens of every answer.

    python fresh_generation.py CHECKPOINT MODE DTYPE
"""

import json
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.monitoring
import numpy as np

if TYPE_CHECKING:
    from elastic_jax import ElasticMistral

EVENTS: list[str] = []


def _record(event: str, *_: Any, **__: Any) -> None:
    if "compile" in event or "trace" in event:
        EVENTS.append(event)


# Not the project's own counter, and before the project is imported.
jax.monitoring.register_event_listener(_record)
jax.monitoring.register_event_duration_secs_listener(_record)
jax.config.update("jax_no_tracing", True)


class FirstHalf:
    """A grammar of the first half of the vocabulary."""

    def __init__(self, vocab: int) -> None:
        bits = np.zeros(-(-vocab // 32) * 32, np.uint8)
        bits[: vocab // 2] = 1
        self._words = np.packbits(bits, bitorder="little").view(np.uint32)

    def allowed(self, output: Sequence[int]) -> np.ndarray:
        del output
        return self._words


def use(model: "ElasticMistral") -> dict[str, Any]:
    """Everything a mode can be asked."""
    options: dict[str, Any] = {"max_new_tokens": 8, "ignore_end": True}
    long = [5 + i % 200 for i in range(100)]

    def tokens(prompt: Any, **more: Any) -> Any:
        answer = model.generate(prompt, **(options | more))
        if not isinstance(answer, list):
            return list(answer.token_ids)
        return [
            [list(a.token_ids) for a in each] if isinstance(each, list) else list(each.token_ids) for each in answer
        ]

    return {
        "greedy": tokens("Hello"),
        "sampled": tokens("Hello", temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, seed=3),
        "stream": [token for piece in model.generate("Hello", stream=True, **options) for token in piece.token_ids],
        "batch": tokens(["Hello", [5, 6, 7], long, "a", "b", "c"]),
        "chat": tokens([{"role": "user", "content": "Hello"}]),
        "choices": tokens(long, choices=3, temperature=1.0, seed=1),
        "bias": tokens("Hello", logit_bias={9: 1000.0}),
        "penalties": tokens("Hello", repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5),
        "top": tokens("Hello", top_log_probabilities=3),
        "stop": tokens("Hello", stop=["e", "a"]),
        "grammar": tokens("Hello", grammar=FirstHalf(model.checkpoint.config.vocab_size)),
        "score": [score.is_greedy for score in model.score([("Hello", " you"), (long, [5, 6]), ("a ", "b c")])],
    }


def main() -> None:
    """Loads twice, once opening every executable at once and once when it is first called; then uses a thread."""
    from elastic_jax import ElasticMistral

    path, mode, dtype = sys.argv[1:4]
    results = []
    for preload in (True, False):
        model = ElasticMistral.load(path, mode, dtype=dtype, preload=preload)  # pyright: ignore[reportArgumentType]
        results.append(use(model))
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(use(model))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = list(EVENTS)
    forbidden = False
    try:
        jax.jit(lambda x: x + 1)(np.float32(1))
    except Exception:
        forbidden = True
    print(json.dumps({"events": events, "results": [*results, *found], "forbidden": forbidden}))


if __name__ == "__main__":
    main()
