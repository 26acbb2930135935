"""KV pools: which size a mode is compiled for when nobody says, and which of those compiled is loaded.

A pool's size is part of every executable, so there is a store for each. Sizes come from a short ladder, so that two
devices with nearly equal memory share executables.
"""

import dataclasses
from collections.abc import Callable

from elastic_jax.checkpoint import Checkpoint
from elastic_jax.errors import ExecutableError, MemoryPlanError, RequestError
from elastic_jax.executables import ModeStore, default_step_config, whole_pages
from elastic_jax.kv_cache import KvPrecision
from elastic_jax.memory import (
    MemoryPlan,
    available_memory,
    check_memory,
    estimated_workspace,
    gib,
    plan_memory,
)
from elastic_jax.plan import Plan
from elastic_jax.step import ComputeDtype, StepConfig
from elastic_jax.weights import abstract_weights, weight_bytes

LADDER = (131072, 65536, 32768, 16384, 8192)
"""Slots of the pools that are compiled for GPUs. The largest is the whole context of Mistral-Small once, or 2048 tokens
for each of 64 rows; its slots take 160 KiB each, so it takes 20 GiB. More is rarely filled, and what a process takes of
a GPU's memory nobody else has: larger pools are compiled only if asked for."""

CPU_SLOTS = 16384
"""Slots of the pool that is compiled for CPUs."""

type Say = Callable[[str], None]
"""Is told, in a sentence, what is done instead of what was expected."""


@dataclasses.dataclass(frozen=True)
class Pool:
    """A compiled pool that can be loaded.

    Attributes:
        step: the sizes that it was compiled with.
        memory: what the mode takes with it.
    """

    step: StepConfig
    memory: MemoryPlan


def default_pool(
    checkpoint: Checkpoint,
    plan: Plan,
    dtype: ComputeDtype,
    platform: str,
    *,
    available: int | None,
    max_context: int | None,
    kv: KvPrecision = "full",
) -> int:
    """The pool that a mode is compiled for unless told otherwise: the largest of the ladder that will fit.

    Args:
        checkpoint: whose mode it is.
        plan: the mode's.
        dtype: compute type.
        platform: `cpu` or `gpu`.
        available: bytes for everything; None for no bound. Not asked on CPU, where memory is not the model's own.
        max_context: the pool must hold one such context.
        kv: precision of the KV cache.

    Raises:
        MemoryPlanError: none fits; the message says which modes would.
        ConfigError: the platform is unknown, or the model has no such context.
    """
    least = whole_pages(max_context or 1)
    if platform == "cpu":
        return max(CPU_SLOTS, least)
    rungs = [slots for slots in LADDER if slots >= least] or [least]
    estimates = {slots: _estimate(checkpoint, plan, dtype, platform, slots, max_context, kv) for slots in rungs}
    if available is None:
        return rungs[0]
    for slots, estimate in estimates.items():
        if estimate.total <= available:
            return slots
    needed = estimates[rungs[-1]]
    smaller = [
        other.name
        for other in checkpoint.stored_plans()
        if _estimate(checkpoint, other, dtype, platform, rungs[-1], max_context, kv).total <= available
    ]
    raise MemoryPlanError(
        f"mode {plan.name} needs about {gib(needed.total)} with a KV pool of {rungs[-1]} tokens "
        f"({gib(needed.weights)} weights, {gib(needed.kv)} KV cache, {gib(needed.rows)} row state, "
        f"{gib(needed.workspace)} workspace), and JAX would have {gib(available)} on this device. "
        + (f"What fits: mode {' or '.join(smaller)}" if smaller else "No mode of this checkpoint fits")
        + "; or name a pool with --kv-slots"
    )


def _estimate(
    checkpoint: Checkpoint,
    plan: Plan,
    dtype: ComputeDtype,
    platform: str,
    slots: int,
    max_context: int | None,
    kv: KvPrecision,
) -> MemoryPlan:
    model = checkpoint.config
    step = default_step_config(model, platform, dtype, kv_slots=slots, max_context=max_context, kv=kv)
    return plan_memory(model, abstract_weights(model, plan, dtype), step, [estimated_workspace(model, step)])


def choose_pool(store: ModeStore, *, kv_slots: int | None, max_context: int | None, say: Say) -> Pool:
    """The largest compiled pool that serves and fits.

    Args:
        store: the mode's executables.
        kv_slots: the pool that is wanted, or None.
        max_context: the longest context that is wanted, or None.
        say: is told why it is not the largest that was compiled.

    Raises:
        ExecutableError: there is no store, or none that can be used.
        RequestError: none was compiled for such contexts.
        MemoryPlanError: none fits; the message says what would.
    """
    steps = _usable(store, kv_slots, say)
    long_enough = [step for step in steps if max_context is None or step.max_context >= max_context]
    if not long_enough:
        longest = max(step.max_context for step in steps)
        raise RequestError(
            f"max_context {max_context} was asked for, and the executables were compiled for up to {longest} tokens. "
            f"Compile for more with: {store.compile_command(max_context=max_context)}"
        )
    available = available_memory(store.device)
    pools = [Pool(step, _memory(store, step)) for step in long_enough]
    for pool in pools:
        if available is None or pool.memory.total <= available:
            if pool is not pools[0] and available is not None:
                say(
                    f"mode {store.plan.name}: using a KV pool of {pool.step.kv_slots} tokens; the one of "
                    f"{pools[0].step.kv_slots} that is compiled too needs {gib(pools[0].memory.total)}, and "
                    f"{gib(available)} are free"
                )
            return pool
    others = {
        plan.name: weight_bytes(abstract_weights(store.checkpoint.config, plan, store.dtype))
        for plan in store.checkpoint.stored_plans()
    }
    smallest = pools[-1]
    page_size = smallest.step.page_size
    check_memory(smallest.memory, available, mode=store.plan.name, alternatives=others, page_size=page_size)
    return smallest  # the memory is free since the question before


def _memory(store: ModeStore, step: StepConfig) -> MemoryPlan:
    model = store.checkpoint.config
    weights = abstract_weights(model, store.plan, store.dtype)
    return plan_memory(model, weights, step, store.memory(step.kv_slots).values())


def _usable(store: ModeStore, kv_slots: int | None, say: Say) -> list[StepConfig]:
    """The sizes of every store that was made for what is here, the largest pool first."""
    pools = store.pools
    if not pools:
        raise ExecutableError(f"no compiled executables at {store.folder}. {store.hint}")
    if kv_slots is not None and whole_pages(kv_slots) not in pools:
        raise ExecutableError(
            f"mode {store.plan.name} is not compiled for a KV pool of {kv_slots} tokens; pools compiled: {pools}. "
            f"Compile with: {store.compile_command(kv_slots=kv_slots)}"
        )
    steps: list[StepConfig] = []
    refused: list[tuple[int, ExecutableError]] = []
    for pool in pools if kv_slots is None else [whole_pages(kv_slots)]:
        try:
            step = store.stored_step(pool)
            store.check(step)
            steps.append(step)
        except ExecutableError as error:
            refused.append((pool, error))
    if not steps:
        raise refused[0][1]
    for pool, error in refused:
        say(f"mode {store.plan.name}: the executables for a KV pool of {pool} tokens are not used: {error}")
    return steps
