"""Files of answers: what one mode (or the original model) said to the items of one task.

`FOLDER/<mode>/<task>.jsonl`: the first line says of which task and which model, each further line is one item:

* `id`: the item, `<lm-eval's task>/<number>`; `asked`: a digest of the prompts it makes;
* `right`: 1 or 0, by the task's metric; `metrics`: all that lm-eval computed;
* `answer` and `target`: the choice taken and the right one, or the texts that were compared;
* `log_probabilities`: of each choice, nats; or `text`: what was generated.

Windows of a text have `log_probability` and `tokens` instead. Lines are appended as answers come: a later run goes on
where one ended, or asks for more items than it. Answers to other prompts, or of another model, are not used.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from elastic_jax.errors import EvaluationError

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Answers:
    """What one mode said to one task.

    Attributes:
        task: what answers must agree on to be comparable: items, examples, metric (`tasks.TaskSet.identity`).
        model: whose they are: the mode, its plan and weights, the device.
        facts: how they were made: versions.
        items: as above.
    """

    task: dict[str, Any]
    model: dict[str, Any]
    facts: dict[str, Any]
    items: list[dict[str, Any]]

    def only(self, asked: Mapping[str, str]) -> "Answers | None":
        """The answers to some items (id -> digest), in their order; None if one of them is not answered."""
        by_id = {item["id"]: item for item in self.items}
        if any(name not in by_id or by_id[name]["asked"] != digest for name, digest in asked.items()):
            return None
        return dataclasses.replace(self, items=[by_id[name] for name in asked])


def digest_of(values: Any) -> str:
    """A short digest of what was asked, JSON-ready."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def path_of(folder: Path, mode: str, task: str) -> Path:
    """Where the answers of a mode to a task are."""
    return folder / mode / f"{task}.jsonl"


def read(file: Path) -> Answers | None:
    """The answers in a file, complete or not; None if there is none.

    Raises:
        EvaluationError: the file is something else.
    """
    try:
        lines = file.read_text("utf-8").split("\n")[:-1]  # what follows the last line's end was interrupted
        if not lines:
            return None
        head = json.loads(lines[0])
        if head["format"] != FORMAT:
            raise ValueError(f"format {head['format']!r}, expected {FORMAT}")
        items = [json.loads(line) for line in lines[1:]]
        if any("id" not in item or "asked" not in item for item in items):
            raise ValueError("an item has no id")
        return Answers(head["task"], head["model"], head["facts"], items)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{file} holds no answers ({error!r}): remove it, and they are asked for again") from None


class Writer:
    """Appends the answers of one mode to one task.

    Args:
        file: where they go.
        asked: what is asked for: id -> digest.
        task: see `Answers`.
        model: see `Answers`.
        facts: see `Answers`; those of the run that began stay.

    Attributes:
        replaced: whether there were answers to something else, which are gone.

    Raises:
        EvaluationError: the file is something else.
    """

    def __init__(
        self,
        file: Path,
        asked: Mapping[str, str],
        task: Mapping[str, Any],
        model: Mapping[str, Any],
        facts: Mapping[str, Any],
    ) -> None:
        self._file, self._asked = file, dict(asked)
        found = read(file)
        same = found is not None and found.task == dict(task) and found.model == dict(model)
        old = found.items if found is not None and same else []
        kept = [item for item in old if self._asked.get(item["id"], item["asked"]) == item["asked"]]
        self.replaced = found is not None and len(kept) < len(found.items)
        self._done = {item["id"] for item in kept} & self._asked.keys()
        if found is None or not same or self.replaced:
            file.parent.mkdir(parents=True, exist_ok=True)
            head = {"format": FORMAT, "task": dict(task), "model": dict(model), "facts": dict(facts)}
            file.write_text("".join(_line(values) for values in (head, *kept)), "utf-8")
        else:
            os.truncate(file, file.read_bytes().rfind(b"\n") + 1)  # an interruption may have left a line's beginning

    @property
    def done(self) -> int:
        """How many of the items are answered."""
        return len(self._done)

    @property
    def missing(self) -> list[str]:
        """The items that are not answered."""
        return [name for name in self._asked if name not in self._done]

    def append(self, items: Iterable[dict[str, Any]]) -> None:
        """Adds answers to items that were asked for; they are on disk when this returns."""
        added = [{"id": item["id"], "asked": self._asked[item["id"]]} | item for item in items]
        with self._file.open("a", encoding="utf-8") as file:
            file.writelines(_line(item) for item in added)
            file.flush()
            os.fsync(file.fileno())
        self._done |= {item["id"] for item in added}


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"
