"""What an evaluation says of a mode's promise, and writing it into the mode's plan.

A promise is *certified* when the one-sided 95 % bound of the loss is under it, on items that neither the search nor the
calibration has seen, and *estimated* otherwise. The plan's choices do not change, so its executables stay valid; a new
search writes a new plan, which is estimated again.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from elastic_jax.checkpoint import Checkpoint
from elastic_jax.checkpoint_format import PLANS
from elastic_jax.checkpoint_io import write_json
from elastic_jax.plan import Plan

_SAMPLED = "sampled from the original model"
"""How the description of text begins that the model wrote itself (`search.texts`)."""


def seen_by(checkpoint: Checkpoint, plan: Plan, files: Sequence[str]) -> str | None:
    """Why items may have been seen by what made a plan or its weights; None if they were not.

    Text that the model wrote by itself holds no items. Text from a file was compared with the items, 13 words in a row,
    if their files were named to the command (`--tasks`).

    Args:
        checkpoint: whose `source` tells of its calibration.
        plan: found by a search, or written by hand, from no text.
        files: names of the items' files; of data sets on the Hub, their names.
    """
    calibration = checkpoint.manifest.source.get("calibration")
    texts = {"calibration": calibration.get("text") if isinstance(calibration, Mapping) else None}
    if not plan.provisional:
        texts["search"] = plan.measured.get("held_out")
    for what, described in texts.items():
        if described is None:
            if what == "search":
                return "the plan does not say which text the search read"
            continue
        source = str(described.get("source", "unknown text"))
        if source.startswith(_SAMPLED):
            continue
        unknown = [name for name in files if name not in described.get("tasks", ())]
        if unknown:
            return (
                f"the {what} read {source}, which was not compared with {', '.join(unknown)}: name the items to it "
                "with --tasks"
            )
    return None


def apply(row: dict[str, Any], seen: str | None) -> dict[str, Any]:
    """A mean row with its status: why it is not certified, if it is not."""
    if row["promise"] is None:
        return row
    if row["loss_upper95"] is None:
        why = "the original is at chance level in every task"
    elif row["loss_upper95"] >= row["promise"]:
        why = (
            f"the loss is below {100 * row['loss_upper95']:.2f} % with 95 % confidence, which is not under "
            f"{100 * row['promise']:.1f} %"
        )
    else:
        why = seen
    return row | {"certified": why is None, "why_not": why}


def record(checkpoint: Checkpoint, plan: Plan, row: Mapping[str, Any], evidence: Mapping[str, Any]) -> Plan:
    """Writes into a mode's plan what was found, and returns the plan.

    Args:
        checkpoint: whose plan it is; a mode that is only a request of the frontier has no file, and is not written.
        plan: the plan that was evaluated.
        row: its mean row, with its status.
        evidence: the items, tasks, versions and device that it rests on.
    """
    promise = {
        "largest_loss": row["promise"],
        "status": "certified" if row["certified"] else "estimated",
        "why_not": row["why_not"],
        **{key: row[key] for key in ("loss", "loss_upper95", "accuracy", "recovery", "n")},
        **evidence,
    }
    changed = dataclasses.replace(plan, measured={**plan.measured, "promise": promise})
    file = checkpoint.path / PLANS / f"{plan.name}.json"
    if file.is_file():
        write_json(file, changed.to_json())
    return changed
