"""What loading a mode decides before anything is allocated: which executables serve, and whether to compile others."""

import contextlib
from typing import Literal

from aot_cache.store import verify
from aot_cache.target import Target
from elastic_jax.errors import ElasticError, ExecutableError, MemoryPlanError, MismatchError, RequestError
from elastic_jax.executables import ModeStore, default_step_config
from elastic_jax.kernels.measured import unmeasured
from elastic_jax.limits import check_count
from elastic_jax.memory import available_memory
from elastic_jax.pools import Pool, Say, choose_pool, default_pool

type OnMissing = Literal["error", "compile"]
"""What to do without fitting executables."""


def usable_pool(
    store: ModeStore,
    on_missing: OnMissing,
    *,
    kv_slots: int | None,
    max_context: int | None,
    workers: int,
    say: Say,
) -> Pool:
    """The pool whose executables are loaded; where the caller allows it, compiles those that are missing or do not fit.

    Args:
        store: the mode's executables.
        on_missing: whether compiling is allowed.
        kv_slots: the pool that is wanted, in tokens; None for the largest that fits.
        max_context: the longest context wanted, or None.
        workers: units compiled at once.
        say: is told why something is compiled, and what; and why a pool is not the largest.

    Raises:
        ExecutableError: there are none, or they cannot be compiled.
        RequestError: `max_context` is longer than what was compiled or than the model's positions, or a number is no
            positive integer.
        MemoryPlanError: the mode does not fit on the device; the message says what would.
    """
    for name, wanted in (("max_context", max_context), ("kv_slots", kv_slots), ("workers", workers)):
        if wanted is not None:
            check_count(name, wanted, 1)
    positions = store.checkpoint.config.max_position_embeddings
    if max_context is not None and max_context > positions:
        raise RequestError(f"max_context {max_context} is more than the {positions} positions of the model")
    if on_missing == "compile" and (reason := _reason_to_compile(store, kv_slots, max_context)):
        sentence, too_large = reason
        say(f"compiling mode {store.plan.name} for {Target.of(store.device).folder}, because {sentence}")
        _compile(store, None if too_large else _largest(store), kv_slots, max_context, workers, say)
    return choose_pool(store, kv_slots=kv_slots, max_context=max_context, say=say)


def _reason_to_compile(store: ModeStore, kv_slots: int | None, max_context: int | None) -> tuple[str, bool] | None:
    """Why stored executables cannot be used, and whether it is that none fits into memory; None if they can be.

    They are read, but not loaded.
    """
    if not store.pools:
        return "there are no executables for it", False
    try:
        pool = choose_pool(store, kv_slots=kv_slots, max_context=max_context, say=lambda _: None)
    except MismatchError as error:
        return f"those stored do not fit: {error}", False
    except MemoryPlanError as error:
        return str(error), True
    except (ExecutableError, RequestError) as error:
        return str(error), False
    damage = "; ".join(verify(store.pool_folder(pool.step.kv_slots)))
    return (damage, False) if damage else None


def _largest(store: ModeStore) -> int | None:
    """The largest pool with a readable store: somebody chose it."""
    for pool in store.pools:
        with contextlib.suppress(ElasticError):
            return store.stored_step(pool).kv_slots
    return None


def _compile(
    store: ModeStore,
    earlier: int | None,
    kv_slots: int | None,
    max_context: int | None,
    workers: int,
    say: Say,
) -> None:
    """Compiles in the sizes that are asked for; where none are, in those of an earlier store, or by default."""
    checkpoint, platform = store.checkpoint, store.device.platform
    if earlier is not None and kv_slots in (None, earlier):
        max_context = max_context or store.stored_step(earlier).max_context
        kv_slots = max(earlier, max_context)
    if kv_slots is None:
        available = available_memory(store.device)
        kv_slots = default_pool(
            checkpoint, store.plan, store.dtype, platform, available=available, max_context=max_context, kv=store.kv
        )
    step = default_step_config(
        checkpoint.config, platform, store.dtype, kv_slots=kv_slots, max_context=max_context, kv=store.kv
    )
    if message := unmeasured(step, store.device):
        say(message)

    def progress(name: str, seconds: float | None, done: int, total: int) -> None:
        if seconds is not None:
            say(f"compiled {name} in {seconds:.1f} s ({done} of {total})")

    store.compile(step, workers=workers, progress=progress)
