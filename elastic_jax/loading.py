"""What loading a mode decides before anything is allocated: which executables serve, and whether it all fits."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal

from aot_cache.store import verify
from aot_cache.target import Target
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.errors import CheckpointError, ElasticError, ExecutableError, MismatchError, RequestError
from elastic_jax.executables import ModeStore, default_step_config
from elastic_jax.memory import MemoryPlan, available_memory, check_memory, plan_memory
from elastic_jax.step import ComputeDtype, StepConfig
from elastic_jax.weights import abstract_weights, weight_bytes

type OnMissing = Literal["error", "compile"]
"""What to do without fitting executables."""

type Say = Callable[[str], None]


def usable_sizes(
    store: ModeStore, on_missing: OnMissing, max_context: int | None, *, workers: int, say: Say
) -> StepConfig:
    """The sizes of the stored executables; where the caller allows it, compiles those that are missing or do not fit.

    Args:
        store: the mode's.
        on_missing: whether compiling is allowed.
        max_context: the longest context wanted, or None.
        workers: units compiled at once.
        say: is told why something is compiled, and what.

    Raises:
        ExecutableError: there are none, or they cannot be compiled.
        RequestError: `max_context` is longer than what was compiled.
    """
    if max_context is not None and max_context < 1:
        raise RequestError(f"max_context must be at least 1, found {max_context}")
    if on_missing == "compile" and (problem := _problem(store, max_context)):
        say(f"compiling mode {store.plan.name} for {Target.of(store.device).folder}, because {problem}")
        _compile(store, max_context, workers, say)
    step = store.stored_step(_pool(store))
    if max_context is not None and max_context > step.max_context:
        raise RequestError(
            f"max_context {max_context} was asked for, and the executables were compiled for up to {step.max_context} "
            "tokens: compile with --max-context for more"
        )
    return step


def _problem(store: ModeStore, max_context: int | None) -> str | None:
    """Why stored executables cannot be used, found without loading them; None if they can."""
    if not store.pools:
        return "there are no executables for it"
    try:
        step = store.stored_step(_pool(store))
        store.check(step)
    except MismatchError as error:
        return f"those stored do not fit: {error}"
    except ExecutableError as error:
        return str(error)
    if max_context is not None and max_context > step.max_context:
        return f"those stored were compiled for contexts of up to {step.max_context} tokens, not {max_context}"
    return "; ".join(verify(store.pool_folder(step.kv_slots))) or None


def _pool(store: ModeStore) -> int:
    """The pool whose executables are used.

    Raises:
        ExecutableError: there are no executables.
    """
    if not store.pools:
        raise ExecutableError(f"no compiled executables at {store.folder}. {store.hint}")
    return store.pools[0]


def _compile(store: ModeStore, max_context: int | None, workers: int, say: Say) -> None:
    kv_slots = None
    with contextlib.suppress(ElasticError):  # there may be no earlier store; if there is, somebody chose its pool
        stored = store.stored_step(_pool(store))
        max_context = max_context or stored.max_context
        kv_slots = max(stored.kv_slots, max_context)
    config, platform = store.checkpoint.config, store.device.platform
    step = default_step_config(config, platform, store.dtype, kv_slots=kv_slots, max_context=max_context)

    def progress(name: str, seconds: float | None, done: int, total: int) -> None:
        if seconds is not None:
            say(f"compiled {name} in {seconds:.1f} s ({done} of {total})")

    store.compile(step, workers=workers, progress=progress)


def plan_load(store: ModeStore, step: StepConfig) -> MemoryPlan:
    """What the mode will take on its device.

    Raises:
        MemoryPlanError: it does not fit; the message says what would.
    """
    checkpoint, plan = store.checkpoint, store.plan
    weights = abstract_weights(checkpoint.config, plan, store.dtype)
    memory = plan_memory(checkpoint.config, weights, step, store.memory(step.kv_slots).values())
    others = dict(_stored_weights(checkpoint, store.dtype))
    available = available_memory(store.device)
    check_memory(memory, available, mode=plan.name, alternatives=others, page_size=step.page_size)
    return memory


def _stored_weights(checkpoint: Checkpoint, dtype: ComputeDtype) -> Iterator[tuple[str, int]]:
    """The modes whose weights the checkpoint holds, and their bytes on the device."""
    for plan in checkpoint.plans().values():
        with contextlib.suppress(CheckpointError):  # converted with --only
            checkpoint.folders(plan)
            yield plan.name, weight_bytes(abstract_weights(checkpoint.config, plan, dtype))
