"""What each group adds to the distance from the original, by choice, measured from both ends.

From one end a group alone is quantized, from the other all are at the fastest choice and one alone is not. Errors of
groups do not simply add up: the first end sees them on clean inputs, the second on those that the other groups have
spoilt, and plans lie between. Prompt and generated tokens are measured apart, each in its own arithmetic; a generated
token's is the same for every int8 choice.

Only layers from the changed one on run again: the residual stream before every layer is kept, for the original model
and for both bases. The model's last residual streams are compared by computing logits of both.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from elastic_jax.groups import LM_HEAD, model_groups
from elastic_jax.plan import Choice
from elastic_jax.search.calibrate import Steps
from elastic_jax.search.forward import Distances, Forward, Role
from elastic_jax.search.scores import End, Score, Scores

FASTEST: Mapping[Role, Choice] = {"prompt": "w8a8", "generated": "w8a16"}
"""The choice of every group but the head at the far end, by role."""

_OTHERS: Mapping[tuple[End, Role], tuple[Choice, ...]] = {
    ("alone", "prompt"): ("w8a16", "w8a8b", "w8a8"),
    ("last", "prompt"): ("bf16", "w8a16", "w8a8b"),
    ("last", "generated"): ("bf16",),
}
"""What a group is set to. Alone, a generated token's int8 is a prompt token's w8a16: measured once."""

_HEAD_OTHERS: Mapping[tuple[End, Role], tuple[Choice, ...]] = {
    ("alone", "prompt"): ("w8a16",),
    ("last", "prompt"): ("bf16",),
    ("last", "generated"): ("bf16",),
}

BASE = "*"


def base_plan(groups: Iterable[str], end: End, role: Role) -> dict[str, Choice]:
    """The plan that one group is changed in: the original, or the fastest."""
    rest: Choice = "bf16" if end == "alone" else FASTEST[role]
    head: Choice = "bf16" if end == "alone" else "w8a16"
    return {name: head if name == LM_HEAD else rest for name in groups}


def measure(forward: Forward, scores: Scores, *, save: Callable[[], None], progress: Steps) -> None:
    """Measures every score that is missing.

    Args:
        forward: the model, over the text.
        scores: is added to.
        save: is called after each group.
        progress: is told how much work is done, in layers run.
    """
    config = forward.config
    groups = list(model_groups(config))
    todo: list[tuple[End, Role]] = [("alone", "prompt"), ("last", "prompt"), ("last", "generated")]
    costs = {(end, role, g): _cost(config.num_layers, g, _choices(end, role, g)) for end, role in todo for g in groups}
    done, total = 0, sum(costs.values())
    original: list[Any] | None = None
    for end, role in todo:
        missing = [g for g in groups if not scores.has(end, role, g, _choices(end, role, g))]
        done += sum(costs[end, role, g] for g in groups if g not in missing)
        if not missing:
            continue
        if original is None:
            original = _inputs(forward, base_plan(groups, "alone", role), "prompt")
        base = base_plan(groups, end, role)
        inputs = original if end == "alone" else _inputs(forward, base, role)
        distances = functools.partial(forward.distances, original[-1])
        if end == "last":
            scores.add(end, role, BASE, FASTEST[role], mean_score(distances([inputs[-1]], base[LM_HEAD]), 0))
        for group in missing:
            progress(done, total, f"{group}, {role} tokens, {'alone' if end == 'alone' else 'last of all'}")
            choices = _choices(end, role, group)
            if group == LM_HEAD:
                found = distances([inputs[-1]], choices[0])
            else:
                layer = int(group.split(".")[1])
                plans: list[dict[str, Choice]] = [{**base, group: choice} for choice in choices]
                outs = [forward.run(inputs[layer], layer, plan, role) for plan in plans]
                found = distances(outs, base[LM_HEAD])
            for number, choice in enumerate(choices):
                scores.add(end, role, group, choice, mean_score(found, number))
            done += costs[end, role, group]
            save()
    progress(total, total, "every group is measured")


def mean_score(found: Distances, candidate: int) -> Score:
    """One candidate's distances, averaged over all positions."""
    return Score(float(found.kl[candidate].mean(dtype="float64")), float(found.flips[candidate].mean()))


def _choices(end: End, role: Role, group: str) -> tuple[Choice, ...]:
    return (_HEAD_OTHERS if group == LM_HEAD else _OTHERS)[end, role]


def _cost(layers: int, group: str, choices: tuple[Choice, ...]) -> int:
    """Work in layers; a head is about as much as ten of a small model's."""
    first = layers if group == LM_HEAD else int(group.split(".")[1])
    return len(choices) * (layers - first + 10)


def _inputs(forward: Forward, plan: Mapping[str, Choice], role: Role) -> list[Any]:
    """The residual stream before every layer, and after the last."""
    streams = [forward.embed()]
    for layer in range(forward.config.num_layers):
        streams.append(forward.run_layer(streams[-1], layer, plan, role))
    return streams


def contributions(
    scores: Scores, groups: Iterable[str], end: End, role: Role, choices: tuple[Choice, ...]
) -> dict[str, dict[Choice, float]]:
    """What each group adds to the KL by choice, as one end sees it; never negative, and 0 for `bf16`.

    From the far end that is what is gained by setting the group, alone, to `bf16`, less what is gained by the choice.
    """
    found = {}
    for group in groups:
        added: dict[Choice, float] = {}
        for choice in choices:
            added[choice] = max(0.0, _added(scores, group, end, role, choice))
        found[group] = added
    return found


def _added(scores: Scores, group: str, end: End, role: Role, choice: Choice) -> float:
    if choice == "bf16":
        return 0.0
    if role == "generated" or group == LM_HEAD:
        choice = "w8a16"
    if end == "alone":
        return scores.get("alone", "prompt", group, choice).kl
    base = scores.get("last", role, BASE, FASTEST[role]).kl
    gained = base - scores.get("last", role, group, "bf16").kl
    fastest = "w8a16" if group == LM_HEAD else FASTEST[role]
    return gained - (0.0 if choice == fastest else base - scores.get("last", role, group, choice).kl)
