"""Plans: which choice computes each group. A mode is a named plan, and nothing else in the project asks for a mode."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

from elastic_jax.config import ModelConfig
from elastic_jax.errors import PlanError
from elastic_jax.groups import LM_HEAD, Group, model_groups

Choice = Literal["bf16", "w8a16", "w8a8b", "w8a8"]
"""How a group is computed.

* `bf16`: bfloat16 weights and activations.
* `w8a16`: int8 weights, 16-bit activations for every token.
* `w8a8b`: as `w8a8`, with a scale for each token and block of the contraction (`quantization.activation_blocks`).
* `w8a8`: int8 weights; 8-bit activations for prompt tokens, 16-bit for generated ones.
"""

Precision = Literal["bf16", "int8"]
"""How a group's weights are stored."""

CHOICES: tuple[Choice, ...] = get_args(Choice)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
MODES = ("XL", "L", "M", "S")
"""The modes that every checkpoint has, from the original to the fastest."""

PROVISIONAL = "provisional: written by hand, its quality has not been measured on this model"


def stored_precision(choice: Choice) -> Precision:
    """The stored weights that a choice reads."""
    return "bf16" if choice == "bf16" else "int8"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A choice for every group.

    Attributes:
        name: the mode's name.
        choices: group name -> choice, for every group of the model.
        note: where the plan comes from, shown wherever the plan is.
        provisional: whether the plan was written by hand rather than found by a search.
        measured: what was measured for it (quality, latency, data, versions); empty if nothing was.
    """

    name: str
    choices: Mapping[str, Choice]
    note: str
    provisional: bool
    measured: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Refuses what no model can run.

        Raises:
            PlanError: an unknown choice, or 8-bit activations for the language-model head.
        """
        for group, choice in self.choices.items():
            if choice not in CHOICES:
                raise PlanError(f"plan {self.name!r}: group {group}: unknown choice {choice!r}; known: {list(CHOICES)}")
        if (choice := self.choices.get(LM_HEAD)) in ("w8a8", "w8a8b"):
            raise PlanError(f"plan {self.name!r}: {LM_HEAD} keeps 16-bit activations: use bf16 or w8a16, not {choice}")

    def check(self, config: ModelConfig) -> None:
        """Checks that the plan covers exactly the groups of a model.

        Raises:
            PlanError: groups are missing or unknown.
        """
        expected = set(model_groups(config))
        if set(self.choices) != expected:
            missing, unknown = sorted(expected - set(self.choices)), sorted(set(self.choices) - expected)
            raise PlanError(
                f"plan {self.name!r} does not fit this model: missing groups {missing[:5]}, unknown {unknown[:5]}"
            )

    def digest(self) -> str:
        """sha256 of the choices alone: what an executable depends on."""
        return hashlib.sha256(json.dumps(dict(self.choices), sort_keys=True).encode()).hexdigest()

    def counts(self) -> dict[str, int]:
        """Number of groups by choice."""
        return {choice: n for choice in CHOICES if (n := list(self.choices.values()).count(choice))}

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        values = dataclasses.asdict(self)
        return values | {"choices": dict(self.choices), "measured": dict(self.measured)}

    @classmethod
    def from_json(cls, values: Any, *, source: str) -> Self:
        """Reads what `to_json` wrote; `source` names the file in errors.

        Raises:
            PlanError: keys are missing or unknown, or the plan is not valid.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            found = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise PlanError(f"{source} is not a plan: expected keys {sorted(names)}, found {found}")
        types = {"name": str, "choices": dict, "note": str, "provisional": bool, "measured": dict}
        for key, expected in types.items():
            if not isinstance(values[key], expected):
                raise PlanError(f"{source} is not a plan: {key} must be a {expected.__name__}, found {values[key]!r}")
        return cls(**values)


def read_plan(path: Path) -> Plan:
    """Reads a plan file.

    Raises:
        PlanError: the file is missing or is not a plan.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        found = sorted(p.stem for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        raise PlanError(f"no plan {path}: modes found there: {found}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PlanError(f"{path} is not a plan: {error}") from None
    return Plan.from_json(values, source=str(path))


def provisional_plans(config: ModelConfig) -> dict[str, Plan]:
    """The four plans that ship with a checkpoint until a search replaces them.

    XL is all bf16; L all w8a16; M w8a8 except `down` and `lm_head`, which are w8a16; S w8a8 except `lm_head`.
    """
    rules: dict[str, Callable[[Group], Choice]] = {
        "XL": lambda _: "bf16",
        "L": lambda _: "w8a16",
        "M": lambda group: "w8a16" if group.kind in ("down", LM_HEAD) else "w8a8",
        "S": lambda group: "w8a16" if group.kind == LM_HEAD else "w8a8",
    }
    groups = model_groups(config)
    return {
        mode: Plan(mode, {name: rule(group) for name, group in groups.items()}, PROVISIONAL, True, {})
        for mode, rule in rules.items()
    }
