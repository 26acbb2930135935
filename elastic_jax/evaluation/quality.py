"""The table: what the answers of all modes say, against the original's."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from elastic_jax.errors import EvaluationError
from elastic_jax.evaluation import statistics
from elastic_jax.evaluation.answers import Answers
from elastic_jax.evaluation.statistics import Pairs
from elastic_jax.plan import MODES
from elastic_jax.search.promises import PROMISES

ORIGINAL = "Original"
"""transformers on the source weights (`benches/original.py`)."""

MEAN = "mean"


@dataclasses.dataclass(frozen=True)
class Quality:
    """Everything measured.

    Attributes:
        rows: per mode one for each task, then one for the mean of the tasks that count.
        baseline: what the modes are compared with: `Original`, or `XL` where there are no answers of it.
        counted: tasks of the mean.
        left_out: task -> why it is not in the mean.
        differing: task -> items to which XL gave another answer than the original, and of these how many are right in
            one of them alone; None without an original.
    """

    rows: list[dict[str, Any]]
    baseline: str
    counted: list[str]
    left_out: dict[str, str]
    differing: dict[str, dict[str, int]] | None

    def mean_row(self, mode: str) -> dict[str, Any]:
        """The mean of one mode."""
        return next(row for row in self.rows if row["mode"] == mode and row["task"] == MEAN)


def assess(
    answers: Mapping[str, Mapping[str, Answers]],
    text: Mapping[str, Answers],
    divergences: Mapping[str, Mapping[str, Any]],
) -> Quality:
    """Compares modes with the original.

    Args:
        answers: mode -> task -> answers, the same tasks for all.
        text: mode -> answers to the text; empty where none was measured.
        divergences: mode -> `prompt` and, where it has one, `generated` -> `kl`, `stderr`, `flips`.

    Raises:
        EvaluationError: there is nothing to compare with, or modes answered different items.
    """
    baseline = next((name for name in (ORIGINAL, "XL") if name in answers), None)
    if baseline is None:
        raise EvaluationError(
            "the modes can be compared with nothing: evaluate XL too, or transformers by `benches/original.py`"
        )
    _check_same(answers)
    _check_same({mode: {found.task["task"]: found} for mode, found in text.items()})
    original = answers[baseline]
    rights = {
        mode: {task: _rights(found, original[task]) for task, found in tasks.items()} for mode, tasks in answers.items()
    }
    left_out = {task: why for task, found in original.items() if (why := _at_chance(found)) is not None}
    counted = [task for task in original if task not in left_out]
    rows = []
    for mode in sorted(answers, key=_order):
        pairs = {task: Pairs.of(rights[mode][task], rights[baseline][task]) for task in original}
        rows += [
            {"mode": mode, "task": task, **_row({task: found}), "counted": task in counted}
            for task, found in pairs.items()
        ]
        if mode == baseline:  # it loses nothing against itself, whatever the items
            for row in rows[-len(original) :]:
                row["loss_upper95"] = 0.0 if row["loss"] is not None else None
        rows.append(
            {
                "mode": mode,
                "task": MEAN,
                **_row({task: pairs[task] for task in counted}),
                **_distance(mode, baseline, text, divergences),
                "promise": PROMISES.get(mode),
                "certified": None,
            }
        )
        if mode == baseline and rows[-1]["loss"] is not None:
            rows[-1]["loss_upper95"] = 0.0
        _certify(rows[-1])
    differing = None
    if baseline == ORIGINAL and "XL" in answers:
        differing = {task: _differing(answers["XL"][task], found) for task, found in original.items()}
    return Quality(rows, baseline, counted, left_out, differing)


def _order(mode: str) -> tuple[int, str]:
    names = [*reversed(MODES), ORIGINAL]
    return (names.index(mode) if mode in names else len(names), mode)


def _check_same(answers: Mapping[str, Mapping[str, Answers]]) -> None:
    """Refuses to compare answers to different questions."""
    first = next(iter(answers.values()), {})
    for mode, tasks in answers.items():
        for task, found in first.items():
            if task not in tasks:
                raise EvaluationError(f"{mode} has no answers to {task}")
            ours, theirs = tasks[task].task, found.task
            other = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
            if other:
                raise EvaluationError(
                    f"the modes were asked different things in {task} ({', '.join(other)}: "
                    f"{[ours.get(key) for key in other]} of {mode}, {[theirs.get(key) for key in other]} of "
                    f"{next(iter(answers))}): evaluate both with the same items and lm-eval"
                )
            if [item["asked"] for item in tasks[task].items] != [item["asked"] for item in found.items]:
                raise EvaluationError(f"{mode} and {next(iter(answers))} were asked for different items of {task}")


def _rights(found: Answers, original: Answers) -> list[int]:
    """Which items are right, in the original's order."""
    by_id = {item["id"]: item["right"] for item in found.items}
    return [by_id[item["id"]] for item in original.items]


def _at_chance(found: Answers) -> str | None:
    """Why a task says nothing of the original, if so: its accuracy is not above that of one answer to all items."""
    choices = {len(item["log_probabilities"]) for item in found.items if "log_probabilities" in item}
    targets = [str(item["target"]) for item in found.items]
    chance = statistics.constant_accuracy(targets, min(choices) if choices else None)
    right, n = sum(item["right"] for item in found.items), len(found.items)
    if statistics.above_chance(right, n, chance):
        return None
    return f"at chance level: the original has {100 * right / n:.1f} % of {n}, one answer to all {100 * chance:.1f} %"


def _row(tasks: Mapping[str, Pairs]) -> dict[str, Any]:
    """The numbers of a task, or of the mean of several; all None where no task counts."""
    names = ("n", "accuracy", "stderr", "recovery", "loss", "loss_upper95", "flips", "lost", "gained", "mcnemar_p")
    if not tasks:
        return dict.fromkeys(names)
    pairs = list(tasks.values())
    theirs = sum(p.original_accuracy for p in pairs) / len(pairs)
    accuracy = sum(p.accuracy for p in pairs) / len(pairs)
    lost, gained = sum(p.lost for p in pairs), sum(p.gained for p in pairs)
    return {
        "n": sum(p.n for p in pairs),
        "accuracy": accuracy,
        "stderr": statistics.mean_standard_error({task: (p.accuracy, p.n) for task, p in tasks.items()}),
        "recovery": accuracy / theirs if theirs else None,
        "loss": statistics.loss(pairs) if theirs else None,
        "loss_upper95": statistics.loss_upper_bound(pairs) if theirs else None,
        "flips": sum(p.flips for p in pairs) / len(pairs),
        "lost": lost,
        "gained": gained,
        "mcnemar_p": statistics.mcnemar(lost, gained),
    }


def _distance(
    mode: str, baseline: str, text: Mapping[str, Answers], divergences: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """KL and perplexity of a mode."""
    found = {"prompt": {"kl": 0.0, "stderr": 0.0}} if mode == ORIGINAL else divergences.get(mode, {})
    prompt, generated = found.get("prompt"), found.get("generated", found.get("prompt"))
    own, theirs = (perplexity(text[name]) if name in text else None for name in (mode, baseline))
    xl = perplexity(text["XL"]) if "XL" in text else None
    return {
        "kl": prompt["kl"] if prompt else None,
        "kl_stderr": prompt["stderr"] if prompt else None,
        "kl_generated": generated["kl"] if generated else None,
        "perplexity": own,
        "perplexity_change": own / theirs - 1 if own and theirs else None,
        "perplexity_change_from_xl": own / xl - 1 if own and xl else None,
    }


def perplexity(text: Answers) -> float:
    """exp of the mean negative log-likelihood of the windows' tokens."""
    total = math.fsum(item["log_probability"] for item in text.items)
    return math.exp(-total / sum(item["tokens"] for item in text.items))


def _certify(row: dict[str, Any]) -> None:
    """Whether the bound is under the promise; the items must also be new to the search (`promise.py`)."""
    if row["promise"] is not None:
        row["certified"] = row["loss_upper95"] is not None and row["loss_upper95"] < row["promise"]


def _differing(xl: Answers, original: Answers) -> dict[str, int]:
    theirs = {item["id"]: item for item in original.items}
    return {
        "answers": sum(str(item["answer"]) != str(theirs[item["id"]]["answer"]) for item in xl.items),
        "rights": sum(item["right"] != theirs[item["id"]]["right"] for item in xl.items),
    }


def render(quality: Quality, modes: Sequence[str]) -> str:
    """The tables for people: accuracy by task, then what the mean says of each mode."""
    order = [mode for mode in (*reversed(MODES), *(m for m in modes if m not in MODES)) if mode in modes]
    by_key = {(row["mode"], row["task"]): row for row in quality.rows}
    tasks = [row["task"] for row in quality.rows if row["mode"] == order[0]]
    lines = ["accuracy in %, ± its standard error", "", f"{'task':15s}" + "".join(f"{mode:>15s}" for mode in order)]
    for task in tasks:
        shown = (_percent(by_key[mode, task], "accuracy", "stderr") for mode in order)
        mark = "*" if task in quality.left_out else ""
        lines.append(f"{task + mark:15s}" + "".join(f"{text:>15s}" for text in shown))
    lines.append("")
    wanted = {
        "recovery %": lambda r: _number(r["recovery"], 100, 2),
        "loss %": lambda r: _number(r["loss"], 100, 2),
        "  95 % bound": lambda r: _number(r["loss_upper95"], 100, 2),
        "  promised": lambda r: _number(r["promise"], 100, 1),
        "status": lambda r: "" if r["promise"] is None else ("certified" if r["certified"] else "estimated"),
        "flips %": lambda r: _number(r["flips"], 100, 2),
        "McNemar p": lambda r: _number(r["mcnemar_p"], 1, 3),
        "KL, prompt": lambda r: _number(r["kl"], 1, 5),
        "KL, generated": lambda r: _number(r["kl_generated"], 1, 5),
        "perplexity": lambda r: _number(r["perplexity"], 1, 3),
        "  change %": lambda r: _number(r["perplexity_change"], 100, 2),
    }
    for name, show in wanted.items():
        lines.append(f"{name:15s}" + "".join(f"{show(by_key[mode, MEAN]):>15s}" for mode in order))
    lines += ["", f"compared with {quality.baseline}; items: " + ", ".join(_counts(by_key, order[0], tasks))]
    lines += [f"* {task} is not in the mean: {why}" for task, why in quality.left_out.items()]
    if quality.differing is not None:
        found = ", ".join(f"{task} {each['answers']}" for task, each in quality.differing.items())
        lines.append(f"items to which XL and the original gave different answers: {found}")
    return "\n".join(lines)


def _counts(by_key: Mapping[tuple[str, str], Mapping[str, Any]], mode: str, tasks: Sequence[str]) -> list[str]:
    return [f"{task} {by_key[mode, task]['n']}" for task in tasks if by_key[mode, task]["n"] is not None]


def _percent(row: Mapping[str, Any], name: str, error: str) -> str:
    return "" if row[name] is None else f"{100 * row[name]:.2f} ± {100 * row[error]:.2f}"


def _number(value: float | None, factor: int, digits: int) -> str:
    return "" if value is None else f"{factor * value:.{digits}f}"
