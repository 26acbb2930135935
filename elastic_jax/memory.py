"""Memory is planned before anything is allocated: a load that cannot fit says so, and what would."""

import contextlib
import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path

import jax

from aot_cache.manifest import Memory
from aot_cache.target import Device, memory_bytes
from elastic_jax import step as steps
from elastic_jax.config import ModelConfig
from elastic_jax.errors import MemoryPlanError, RequestError
from elastic_jax.step import StepConfig
from elastic_jax.weights import Weights, weight_bytes

_GIB = 1 << 30

JAX_FRACTION = 0.75
"""What JAX takes of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""

_GPU_CODE = 256 << 20
"""Allowance for the machine code of a mode's units: about 30 of 5 to 7 MB; XLA reports none of it."""


def gib(count: int) -> str:
    """Bytes in GiB, for people."""
    return f"{count / _GIB:.2f} GiB"


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a loaded mode takes on its device.

    Attributes:
        weights: the plan's arrays.
        kv: the KV pool.
        rows: the state of the rows.
        workspace: the most that any executable needs for a call, and the code of all.
        kv_token: bytes of KV a token.
    """

    weights: int
    kv: int
    rows: int
    workspace: int
    kv_token: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.rows + self.workspace


def _bytes(leaves: Iterable[jax.ShapeDtypeStruct]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def plan_memory(model: ModelConfig, weights: Weights, step: StepConfig, units: Iterable[Memory]) -> MemoryPlan:
    """Adds up what a mode needs.

    Args:
        model: the model.
        weights: the plan's weights, or their shapes.
        step: sizes.
        units: XLA's analysis of each executable.
    """
    state = steps.abstract_state(model, step)
    units = list(units)
    largest = max((unit.workspace - unit.code for unit in units), default=0)
    kv = _bytes(jax.tree.leaves(state.kv))
    return MemoryPlan(
        weights=weight_bytes(weights),
        kv=kv,
        rows=_bytes(jax.tree.leaves(state.rows)),
        workspace=largest + sum(unit.code for unit in units),
        kv_token=kv // step.kv_slots,
    )


def estimated_workspace(model: ModelConfig, step: StepConfig) -> Memory:
    """What a GPU's executables will need, before they are compiled: somewhat more than XLA reports afterwards.

    The largest bucket decides: its gate and up products in 32 bits, a few copies of its residual stream, and logits.
    XLA reports 1.37 GB for Mistral-Small's (0; 4096) in mode S and 1.59 in XL (jax 0.11.2); this is 1.81 GB.
    """
    sizes = [
        bucket.tokens * (8 * model.intermediate_size + 32 * model.hidden_size)
        + 2 * 4 * bucket.outputs(step.rows) * model.vocab_size
        for bucket in step.buckets
    ]
    return Memory(arguments=0, outputs=0, aliased=0, temporaries=max(sizes), code=_GPU_CODE)


def available_memory(device: Device) -> int | None:
    """Bytes that can still be allocated on a device, or None if it does not say.

    Of a GPU that is only described, it is what JAX would take of its memory.
    """
    if device.platform == "cpu":
        return _available_host_memory()
    try:
        statistics = device.memory_stats()
    except jax.errors.JaxRuntimeError:  # it is not there
        return int(JAX_FRACTION * memory_bytes(device))
    return statistics["bytes_limit"] - statistics["bytes_in_use"] if statistics else None


def _available_host_memory() -> int | None:
    limits = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:  # not Linux
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError, KeyError):  # a container's own limit, if it has one
        limits.append(_available_in_group(Path("/sys/fs/cgroup")))
    return min(limits, default=None)


def _available_in_group(group: Path) -> int:
    """What a control group (version 2) leaves; cached files count as used there, but give way to allocations."""
    lines = (group / "memory.stat").read_text().splitlines()
    statistics = {name: int(count) for name, count in (line.split() for line in lines)}
    used = int((group / "memory.current").read_text()) - statistics["inactive_file"] - statistics["active_file"]
    return int((group / "memory.max").read_text()) - used


def check_host_memory(size: int, what: str, advice: str) -> None:
    """Refuses results that the host cannot hold, before anything runs: the system would end the process half-way.

    Args:
        size: bytes.
        what: the results.
        advice: how to ask for less.

    Raises:
        RequestError: less is free.
    """
    available = _available_host_memory()
    if available is not None and size > available:
        raise RequestError(f"{what} take {gib(size)}, and this machine has {gib(available)} free: {advice}")


def check_memory(
    plan: MemoryPlan, available: int | None, *, mode: str, alternatives: dict[str, int], page_size: int
) -> None:
    """Refuses a load that does not fit.

    Args:
        plan: what the load needs.
        available: bytes free on the device; None allows everything.
        mode: the mode's name.
        alternatives: bytes of weights of the checkpoint's other modes.
        page_size: tokens a page; a pool has whole ones.

    Raises:
        MemoryPlanError: it does not fit; the message says what would.
    """
    if available is None or plan.total <= available:
        return
    rest = plan.total - plan.weights
    fitting = sorted(name for name, weights in alternatives.items() if weights + rest <= available and name != mode)
    tokens = (available - plan.weights - plan.rows - plan.workspace) // plan.kv_token
    tokens -= tokens % page_size
    advice = []
    if fitting:
        advice.append(f"mode {' or '.join(fitting)} fits as it is")
    if tokens > 0:
        advice.append(f"mode {mode} fits with a KV pool of {tokens} tokens: compile it with --kv-slots {tokens}")
    raise MemoryPlanError(
        f"mode {mode} needs {gib(plan.total)} ({gib(plan.weights)} weights, {gib(plan.kv)} KV cache, "
        f"{gib(plan.rows)} row state, {gib(plan.workspace)} workspace), and {gib(available)} are free. "
        + ("; ".join(advice) or "No mode of this checkpoint fits on this device")
    )
