"""Whole plans, measured in both roles on one text; what was measured once is not measured again."""

import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from elastic_jax.groups import LM_HEAD, model_groups
from elastic_jax.plan import Choice
from elastic_jax.search.forward import ROLES, Role
from elastic_jax.search.parallel import Forwards
from elastic_jax.search.rivals import uniform


class Measured:
    """One plan's distances from the original.

    Attributes:
        kl: role -> nats, averaged over all positions.
        kl_stderr: role -> its standard error over windows, 0 for a single one.
        flips: role -> fraction of positions.
        perplexity: role -> of the text's own tokens.
    """

    def __init__(self) -> None:
        self.kl: dict[Role, float] = {}
        self.kl_stderr: dict[Role, float] = {}
        self.flips: dict[Role, float] = {}
        self.perplexity: dict[Role, float] = {}

    @property
    def worst_kl(self) -> float:
        """Of both roles."""
        return max(self.kl.values())


class Meter(Protocol):
    """Whatever measures plans."""

    def measure(self, choices: Mapping[str, Choice]) -> Measured:
        """The distances of one plan."""
        ...


class PlanMeter:
    """Measures plans over the text of a forward."""

    def __init__(self, forward: Forwards) -> None:
        self._forward = forward
        groups = list(model_groups(forward.config))
        self._start = forward.embed()
        self._reference: Any = forward.reference(forward.run(self._start, 0, uniform(groups, "bf16"), "prompt"))
        self._found: dict[str, dict[str, Any]] = {}

    def measure(self, choices: Mapping[str, Choice]) -> Measured:
        """The distances of one plan."""
        measured = Measured()
        for role in ROLES:
            # To a generated token all int8 choices are one.
            same: dict[str, Choice] = {
                g: "w8a16" if role == "generated" and c != "bf16" else c for g, c in choices.items()
            }
            key = json.dumps([role if set(same.values()) - {"bf16", "w8a16"} else "any", sorted(same.items())])
            if key not in self._found:
                self._found[key] = self._measure(same, role)
            for name, value in self._found[key].items():
                getattr(measured, name)[role] = value
        return measured

    def _measure(self, choices: Mapping[str, Choice], role: Role) -> dict[str, float]:
        x = self._forward.run(self._start, 0, choices, role)
        begun = self._forward.compare(self._reference, [x], choices[LM_HEAD])
        found = self._forward.gather(self._reference, begun)
        windows = found.kl[0].astype(np.float64).mean(axis=1)
        spread = float(windows.std(ddof=1) / np.sqrt(len(windows))) if len(windows) > 1 else 0.0
        targets = found.loss.shape[1] * (found.loss.shape[2] - 1)
        return {
            "kl": float(windows.mean()),
            "kl_stderr": spread,
            "flips": float(found.flips.mean()),
            "perplexity": float(np.exp(found.loss.astype(np.float64).sum() / targets)),
        }
