"""Files of answers: what one mode (or the original model) said to every item of one task.

`FOLDER/<mode>/<task>.jsonl`: the first line says what was asked and of which model, each further line is one item:

* `id`: the item, `<lm-eval's task>/<number>`;
* `right`: 1 or 0, by the task's metric; `metrics`: all that lm-eval computed;
* `answer` and `target`: the choice taken and the right one, or the texts that were compared;
* `log_probabilities`: of each choice, nats; or `text`: what was generated.

Windows of a text have `log_probability` and `tokens` instead. Lines are appended as answers come, and a later run goes
on where one ended. Answers to other questions, or of another model, are not mixed with them: they are replaced.
"""

import dataclasses
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
        asked: what answers must agree on to be comparable: items, prompts, metric (`tasks.TaskSet.identity`).
        model: whose they are: the mode, its plan and weights, the arithmetic.
        facts: how they were made: versions, device.
        items: as above, in the order of the requests.
    """

    asked: dict[str, Any]
    model: dict[str, Any]
    facts: dict[str, Any]
    items: list[dict[str, Any]]

    @property
    def complete(self) -> bool:
        """Whether every item was answered."""
        return len(self.items) == self.asked["items"]


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
        if any("id" not in item for item in items):
            raise ValueError("an item has no id")
        return Answers(head["asked"], head["model"], head["facts"], items)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{file} holds no answers ({error!r}): remove it, and they are asked for again") from None


class Writer:
    """Appends the answers of one mode to one task.

    Args:
        file: where they go.
        asked: see `Answers`.
        model: see `Answers`.
        facts: see `Answers`; those of the run that began stay.

    Raises:
        EvaluationError: the file is something else.
    """

    def __init__(
        self, file: Path, asked: Mapping[str, Any], model: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> None:
        self.file, self.asked = file, dict(asked)
        found = read(file)
        same = found is not None and found.asked == dict(asked) and found.model == dict(model)
        self.replaced = found is not None and not same
        """Whether there were answers to something else."""
        self.items: list[dict[str, Any]] = found.items if found is not None and same else []
        if not same:
            file.parent.mkdir(parents=True, exist_ok=True)
            head = {"format": FORMAT, "asked": dict(asked), "model": dict(model), "facts": dict(facts)}
            file.write_text(json.dumps(head) + "\n", "utf-8")
        else:
            whole = file.read_bytes()
            os.truncate(file, whole.rfind(b"\n") + 1)  # an interruption may have left the beginning of a line

    @property
    def done(self) -> set[str]:
        """The items that are answered."""
        return {item["id"] for item in self.items}

    def append(self, items: Iterable[dict[str, Any]]) -> None:
        """Adds answers; they are on disk when this returns."""
        added = list(items)
        with self.file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in added)
            file.flush()
            os.fsync(file.fileno())
        self.items += added
