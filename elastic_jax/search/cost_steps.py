"""Costs measured as differences between whole steps of a thin model: a few layers of the real shape, random weights.

Where a step of generated tokens is one kernel for all layers, a product by itself says little of what it takes there.
What a choice costs is then how much longer or shorter a step becomes if one kind of group has it in all layers: than
those of the plan without it that are timed just before and after, since clocks wander by more than some choices. Layers
are alike, so that the time of `n` of them is taken for `n` times a layer's; what a step takes beside its layers is what
is left of the thin one's. A kind's share in what all choices have in common is by its size, and no plan depends on it.
"""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

from aot_cache.target import Device
from elastic_jax.config import ModelConfig
from elastic_jax.groups import LM_HEAD, layer_groups, model_groups
from elastic_jax.plan import CHOICES, Choice, Plan
from elastic_jax.search.calibrate import Steps
from elastic_jax.search.forward import ROLES, Role
from elastic_jax.search.timed_steps import RandomWeights, StepClock
from elastic_jax.search.workload import Costs, Workload
from elastic_jax.step import StepConfig
from elastic_jax.weights import Weights

_BYTES = 3 << 30
_FEWEST, _MOST = 3, 8
"""The thin model has as many layers as have that many bytes in bfloat16, within this."""


def thin(config: ModelConfig) -> tuple[ModelConfig, ModelConfig]:
    """The model with one layer, and with as many as are timed together."""
    layer = 2 * sum(group.parameters for group in layer_groups(config, 0))
    several = min(max(_FEWEST, min(_BYTES // layer, _MOST)), max(config.num_layers, 2))
    one, many = (dataclasses.replace(config, num_layers=count) for count in (1, several))
    return one, many


def _plan(config: ModelConfig, kind: str | None = None, choice: Choice = "bf16") -> Plan:
    choices: dict[str, Choice] = {
        name: choice if group.kind == kind else "bf16" for name, group in model_groups(config).items()
    }
    return Plan(f"{kind} {choice}", choices, "", True, {})


def measure_step_costs(
    config: ModelConfig,
    workload: Workload,
    step: StepConfig,
    device: Device,
    *,
    workers: int,
    progress: Steps,
    floats: Weights | None = None,
) -> Costs:
    """Seconds of each kind of group by choice and role.

    Args:
        config: the model.
        workload: decides which buckets, and how long contexts are.
        step: whose buckets, kernels and rows are used.
        device: is measured.
        workers: steps that are compiled at the same time.
        progress: is told about steps.
        floats: weights of mode XL to be used instead of drawing some.
    """
    one, many = thin(config)
    kinds = {group.kind: group for group in model_groups(config).values()}
    buckets = workload.buckets(step.buckets)
    groups: dict[Role, dict[str, dict[Choice, float]]] = {}
    rest: dict[Role, float] = {}
    # Generated tokens, and the head, have one arithmetic for all int8 choices.
    changed: dict[Role, list[tuple[str, Choice]]] = {
        role: [
            (kind, choice)
            for kind in kinds
            for choice in CHOICES[1:]
            if choice == "w8a16" or (role == "prompt" and kind != LM_HEAD)
        ]
        for role in ROLES
    }
    total, done = sum(len(each) + 2 for each in changed.values()), 0
    base = {each.num_layers: _plan(each) for each in (one, many)}
    plans: dict[Role, dict[tuple[str, Choice], Plan]] = {
        role: {(kind, choice): _plan(many, kind, choice) for kind, choice in changed[role]} for role in ROLES
    }
    clocks = {
        role: {each.num_layers: StepClock(each, workload, buckets[role][0], step, device) for each in (one, many)}
        for role in ROLES
    }
    for role in ROLES:  # before weights fill the device: XLA tunes in what memory is left
        progress(done, total, f"compiling {len(plans[role]) + 2} steps of {role} tokens")
        clocks[role][many.num_layers].compile([base[many.num_layers], *plans[role].values()], workers)
        clocks[role][1].compile([base[1]], workers)
    weights = {each.num_layers: RandomWeights(each, step.dtype, device, floats) for each in (one, many)}
    for role in ROLES:

        def seconds(layers: int, plan: Plan, role: Role = role) -> float:
            return clocks[role][layers].seconds(plan, weights[layers].of(plan))

        single, thick = seconds(1, base[1]), [seconds(many.num_layers, base[many.num_layers])]
        saved: dict[tuple[str, Choice], float] = {}
        for each, (key, plan) in enumerate(plans[role].items()):
            progress(done + 2 + each, total, f"{key[0]} {key[1]}, {role} tokens")
            found = seconds(many.num_layers, plan)
            thick.append(seconds(many.num_layers, base[many.num_layers]))
            saved[key] = (sum(thick[-2:]) / 2 - found) / (1 if key[0] == LM_HEAD else many.num_layers)
        single = (single + seconds(1, base[1])) / 2
        layer = max((statistics.median(thick) - single) / (many.num_layers - 1), 0.0)
        groups[role], rest[role] = _shared(kinds, layer, single - layer, saved)
        done += len(plans[role]) + 2
    progress(total, total, "done")
    return Costs.for_workload(device.device_kind, workload, step.buckets, groups, rest, measured=True)


def _shared(
    kinds: Mapping[str, Any], layer: float, beside: float, saved: Mapping[tuple[str, Choice], float]
) -> tuple[dict[str, dict[Choice, float]], float]:
    """Seconds by kind and choice, and what no plan changes.

    Each kind is given what its cheapest choice saves, and what a layer takes beyond that is shared out by size.
    """
    inside = {kind: group for kind, group in kinds.items() if kind != LM_HEAD}
    size = sum(group.parameters for group in inside.values())
    most: dict[str, float] = {
        kind: max(0.0, *(value for (k, _), value in saved.items() if k == kind)) for kind in kinds
    }
    spare = max(layer - sum(most[kind] for kind in inside), 0.0)
    bf16: dict[str, float] = {kind: most[kind] + spare * group.parameters / size for kind, group in inside.items()}
    bf16[LM_HEAD] = max(min(layer * kinds[LM_HEAD].parameters / size, beside), most[LM_HEAD])
    found: dict[str, dict[Choice, float]] = {
        kind: {
            choice: bf16[kind] - (0.0 if choice == "bf16" else saved.get((kind, choice), saved[kind, "w8a16"]))
            for choice in CHOICES
        }
        for kind in kinds
    }
    return found, max(beside - bf16[LM_HEAD], 0.0)
