"""What sensitivity measurements found, in a file: saved as they come, resumed, and merged from several machines."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from elastic_jax.checkpoint import Checkpoint
from elastic_jax.checkpoint_io import write_json
from elastic_jax.errors import ConfigError
from elastic_jax.loading import Say
from elastic_jax.plan import Choice
from elastic_jax.search.forward import Role
from elastic_jax.search.texts import Text

SCORES = "search/scores.json"
"""Where a search keeps them, below the checkpoint."""

FAST_SCORES = "search/scores-fast.json"
"""Where those of one pass are kept."""

FORMAT = 1
"""Of the file; raised by every change that makes old scores mean something else."""

End = Literal["alone", "last"]
"""From which end a group is measured: it alone is not bf16, or it alone differs from the fastest choice of all."""


@dataclasses.dataclass(frozen=True)
class Score:
    """Distance of a model's next-token distributions from the original's, averaged over a text.

    Attributes:
        kl: KL(original || model), nats.
        flips: fraction of positions whose most likely token differs; None where only KL was estimated.
    """

    kl: float
    flips: float | None


class Scores:
    """Scores by end, role, group and choice. A base, all groups at the fastest choice, has the group `*`.

    Args:
        identity: what the scores are of (`identify`): only equal ones may be put together.
    """

    def __init__(self, identity: Mapping[str, Any]) -> None:
        self.identity = dict(identity)
        self._scores: dict[str, Score] = {}

    def add(self, end: End, role: Role, group: str, choice: Choice, score: Score) -> None:
        """Adds one score, or replaces it."""
        self._scores["/".join((end, role, group, choice))] = score

    def get(self, end: End, role: Role, group: str, choice: Choice) -> Score:
        """One score.

        Raises:
            ConfigError: it was not measured.
        """
        key = "/".join((end, role, group, choice))
        if key not in self._scores:
            raise ConfigError(f"the score {key} was not measured: run the search again, it measures what is missing")
        return self._scores[key]

    @property
    def ends(self) -> tuple[End, ...]:
        """From which ends groups were scored: from both if they were measured, from one if one pass scored them."""
        return ("alone",) if "method" in self.identity else ("alone", "last")

    def has(self, end: End, role: Role, group: str, choices: Iterable[Choice]) -> bool:
        """Whether a group was measured with every one of these choices."""
        return all("/".join((end, role, group, choice)) in self._scores for choice in choices)

    def merge(self, other: "Scores") -> None:
        """Takes what another measured and this one lacks.

        Raises:
            ConfigError: the two are not of the same weights, text and arithmetic.
        """
        if other.identity != self.identity:
            different = sorted(
                k for k in self.identity | other.identity if self.identity.get(k) != other.identity.get(k)
            )
            raise ConfigError(
                f"scores of one search must be of the same {', '.join(different)}, but these are not: "
                f"{[other.identity.get(k) for k in different]} against {[self.identity.get(k) for k in different]}"
            )
        self._scores = other._scores | self._scores

    @classmethod
    def resume(cls, path: Path, identity: Mapping[str, Any], say: Say) -> Self:
        """Scores of an interrupted search of the same weights and text; empty ones if there are none.

        Raises:
            ConfigError: the file is damaged.
        """
        if not path.exists():
            return cls(identity)
        found = cls.read(path)
        if found.identity == dict(identity):
            say(f"continuing with {len(found)} scores of {path}")
            return found
        say(f"{path} is of other weights or text: measuring anew, and replacing it")
        return cls(identity)

    def __len__(self) -> int:
        return len(self._scores)

    def save(self, path: Path) -> None:
        """Writes everything, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        scores = {key: dataclasses.asdict(score) for key, score in sorted(self._scores.items())}
        write_json(path, {"format": FORMAT, "identity": self.identity, "scores": scores})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            ConfigError: the file cannot be read, or is something else.
        """
        try:
            values = json.loads(path.read_text("utf-8"))
            if values["format"] != FORMAT:
                raise ValueError(f"format {values['format']!r}, expected {FORMAT}")
            scores = cls(values["identity"])
            scores._scores = {
                key: Score(float(s["kl"]), None if s["flips"] is None else float(s["flips"]))
                for key, s in values["scores"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} is no file of scores: {error!r}; delete it, and the search begins anew"
            ) from None
        return scores


def identify(checkpoint: Checkpoint, text: Text, kernel: str, *, method: str | None = None) -> dict[str, Any]:
    """What scores are of: the weights, the text, the dot that was used, and how, unless they were measured."""
    files = {name: record.sha256 for name, record in sorted(checkpoint.files().items()) if name.startswith("weights/")}
    weights = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    found = {"weights": weights, "text": text.digest, "windows": list(text.windows.shape), "dot": kernel}
    return found if method is None else found | {"method": method}
