"""What each group adds to the distance from the original, by choice, measured from both ends.

From one end a group alone is quantized, from the other all are at the fastest choice and one alone is not. Errors of
groups do not simply add up: the first end sees them on clean inputs, the second on those that the other groups have
spoilt, and plans lie between. Prompt and generated tokens are measured apart, each in its own arithmetic; a generated
token's is the same for every int8 choice.

Only layers from the changed one on run again: groups are measured in the model's order, beside a residual stream of
what they are changed in. The model's last residual streams are compared by computing logits of both.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from elastic_jax.groups import LM_HEAD, model_groups
from elastic_jax.plan import Choice
from elastic_jax.search.calibrate import Steps
from elastic_jax.search.distances import Distances
from elastic_jax.search.forward import Role
from elastic_jax.search.parallel import Forwards
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

_TODO: tuple[tuple[End, Role], ...] = (("alone", "prompt"), ("last", "prompt"), ("last", "generated"))

BASE = "*"


def base_plan(groups: Iterable[str], end: End, role: Role) -> dict[str, Choice]:
    """The plan that one group is changed in: the original, or the fastest."""
    rest: Choice = "bf16" if end == "alone" else FASTEST[role]
    head: Choice = "bf16" if end == "alone" else "w8a16"
    return {name: head if name == LM_HEAD else rest for name in groups}


def measure(
    forward: Forwards,
    scores: Scores,
    *,
    only: Collection[str] | None = None,
    save: Callable[[], None],
    progress: Steps,
) -> None:
    """Measures every score that is missing.

    Args:
        forward: the model, over the text.
        scores: is added to.
        only: the groups that are wanted; None for all.
        save: is called after each group.
        progress: is told how much work is done, in layers run.
    """
    layers = forward.config.num_layers
    groups = list(model_groups(forward.config))
    wanted = [g for g in groups if only is None or g in only]
    costs = {(end, role, g): _cost(layers, g, _choices(end, role, g)) for end, role in _TODO for g in wanted}
    done, total = 0, sum(costs.values())
    reference: Any = None
    for end, role in _TODO:
        base = base_plan(groups, end, role)
        missing = {g for g in wanted if not scores.has(end, role, g, _choices(end, role, g))}
        done += sum(costs[end, role, g] for g in wanted if g not in missing)
        no_base = end == "last" and not scores.has(end, role, BASE, [FASTEST[role]])
        if not missing and not no_base:
            continue
        if reference is None:
            reference = forward.reference(forward.run(forward.embed(), 0, base_plan(groups, "alone", role), "prompt"))
        last = layers if no_base or LM_HEAD in missing else max(_layer(g) for g in missing)
        # The base's residual stream goes along with the groups that are measured: one is kept, not one a layer.
        x = forward.embed()
        for layer in range(layers + 1):
            for group in (g for g in wanted if g in missing and _layer(g, layers) == layer):
                progress(done, total, f"{group}, {role} tokens, {'alone' if end == 'alone' else 'last of all'}")
                choices = _choices(end, role, group)
                if group == LM_HEAD:
                    found = forward.compare(reference, [x], choices[0])
                else:
                    plans: list[dict[str, Choice]] = [{**base, group: choice} for choice in choices]
                    outs = [x] * len(plans)
                    for after in range(layer, layers):  # together: a weight that is read for one serves all
                        outs = [
                            forward.run_layer(out, after, plan, role) for out, plan in zip(outs, plans, strict=True)
                        ]
                    found = forward.compare(reference, outs, base[LM_HEAD])
                distances = forward.gather(reference, found)
                for number, choice in enumerate(choices):
                    scores.add(end, role, group, choice, mean_score(distances, number))
                done += costs[end, role, group]
                save()
            if layer == last:
                break
            x = forward.run_layer(x, layer, base, role)
        if no_base:
            distances = forward.gather(reference, forward.compare(reference, [x], base[LM_HEAD]))
            scores.add(end, role, BASE, FASTEST[role], mean_score(distances, 0))
            save()
    progress(total, total, "every group is measured")


def _layer(group: str, layers: int = 0) -> int:
    """A group's layer; the head's is the number of layers."""
    return layers if group == LM_HEAD else int(group.split(".")[1])


def mean_score(found: Distances, candidate: int) -> Score:
    """One candidate's distances, averaged over all positions."""
    return Score(float(found.kl[candidate].mean(dtype="float64")), float(found.flips[candidate].mean()))


def _choices(end: End, role: Role, group: str) -> tuple[Choice, ...]:
    return (_HEAD_OTHERS if group == LM_HEAD else _OTHERS)[end, role]


def _cost(layers: int, group: str, choices: tuple[Choice, ...]) -> int:
    """Work in layers; a head is about as much as ten of a small model's."""
    return len(choices) * (layers - _layer(group, layers) + 10)


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
