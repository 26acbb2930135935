"""The parts of a mode, loaded at the same time: executables, weights, tokenizer."""

import dataclasses
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from aot_cache.store import Executable
from elastic_jax.executables import ModeStore
from elastic_jax.phases import Phases
from elastic_jax.step import StepConfig
from elastic_jax.tokenizer import Tokenizer
from elastic_jax.weights import Weights, load_weights


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a runner and a conversation need.

    Attributes:
        units: executables by name.
        weights: on the device.
        tokenizer: the model's.
    """

    units: Mapping[str, Executable]
    weights: Weights
    tokenizer: Tokenizer


def load_parts(
    store: ModeStore, step: StepConfig, *, trust: bool, preload: bool, workers: int, phases: Phases
) -> Parts:
    """Loads everything at once; the first error ends it all, and leaves no weights on the device.

    Args:
        store: the mode's.
        step: which of its stores.
        trust: as in `ModeStore.load`.
        preload: as in `ModeStore.load`.
        workers: threads, for executables and for weights each.
        phases: is given `executables`, `weights` and `tokenizer`.

    Raises:
        ExecutableError: an executable cannot be loaded.
        CheckpointError: weights cannot be read.
        TokenizerError: the tokenizer cannot be read.
    """
    checkpoint, stop = store.checkpoint, threading.Event()

    def executables() -> Mapping[str, Executable]:
        with phases.measure("executables"):
            return store.load(step, trust=trust, workers=workers, preload=preload)

    def weights() -> Weights:
        with phases.measure("weights", nbytes=checkpoint.weight_bytes(store.plan)):
            return load_weights(
                checkpoint, store.plan, store.dtype, store.device, workers=workers, progress=None, stop=stop
            )

    def tokenizer() -> Tokenizer:
        with phases.measure("tokenizer"):
            return Tokenizer.load(checkpoint.tokenizer_path)

    return Parts(*_together([executables, weights, tokenizer], stop))


def _together(tasks: list[Callable[[], Any]], stop: threading.Event) -> list[Any]:
    """The results of tasks that run at the same time; if one fails, `stop` is set and its error is raised.

    Of errors at the same moment that of the first task counts.
    """
    with ThreadPoolExecutor(len(tasks), thread_name_prefix="load") as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            errors = [error for future in futures if future.done() and (error := future.exception()) is not None]
        finally:  # whatever ended the waiting, a keyboard's interrupt too
            if any(not future.done() or future.exception() for future in futures):
                stop.set()
    if errors:
        futures.clear()  # whoever keeps the error's traceback must not keep the weights
        raise errors[0]
    return [future.result() for future in futures]
