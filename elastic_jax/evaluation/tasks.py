"""The tasks, as lm-eval defines them: prompts, few-shot examples and metrics are its own.

Without local items a task reads the Hub's data sets. With them the task's definition stays as it is, and only where its
items come from is replaced.
"""

import contextlib
import dataclasses
import importlib.metadata
import io
import logging
import re
from pathlib import Path
from typing import Any

from elastic_jax.errors import EvaluationError
from elastic_jax.evaluation import items
from elastic_jax.evaluation.answers import digest_of

SEED = 1234
"""Of drawing few-shot examples: lm-eval's own default."""

METRICS = {"arc_challenge": ("acc_norm", "none"), "gsm8k": ("exact_match", "strict-match")}
"""Task -> the metric and the filter that count; `acc` for others. These are those of the Open LLM Leaderboard."""

_DEFAULT_METRICS = (("acc", "none"), ("exact_match", "none"))


@dataclasses.dataclass(frozen=True)
class TaskSet:
    """A task, or a group of tasks that count as one.

    Attributes:
        name: as it was asked for.
        parts: lm-eval's task objects by name, one or (for MMLU) many.
        metric: which metric says whether an answer is right, and the filter that it is taken after.
        data: what the items are, for the record: a local file and its digest, or the Hub's data set.
    """

    name: str
    parts: dict[str, Any]
    metric: tuple[str, str]
    data: dict[str, str]

    @property
    def fewshot(self) -> int:
        """Examples in each prompt."""
        return max(task.config.num_fewshot or 0 for task in self.parts.values())

    def requests(self, limit: int | None) -> list[Any]:
        """What a model is asked: lm-eval's instances, those of an item one after another.

        Args:
            limit: most items, the first ones; of a group, as many of each part as that makes, rounded up.
        """
        each = None if limit is None else -(-limit // len(self.parts))
        asked = []
        for task in self.parts.values():
            task.set_fewshot_seed(seed=SEED)  # the examples depend on how often they were drawn
            with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each part
                task.build_all_requests(limit=each)
            asked += task.instances
        return asked

    def identity(self) -> dict[str, Any]:
        """What answers must agree on to be comparable, beside the prompts."""
        return {
            "task": self.name,
            "data": self.data,
            "fewshot": self.fewshot,
            "metric": list(self.metric),
            "lm_eval": importlib.metadata.version("lm_eval"),
        }


def by_item(asked: list[Any]) -> dict[str, list[Any]]:
    """The instances of each item, by its id."""
    found: dict[str, list[Any]] = {}
    for instance in asked:
        found.setdefault(f"{instance.task_name}/{instance.doc_id}", []).append(instance)
    return found


def digests(asked: list[Any]) -> dict[str, str]:
    """Item -> digest of its prompts."""
    return {
        name: digest_of([[str(argument) for argument in instance.args] for instance in instances])
        for name, instances in by_item(asked).items()
    }


def load(names: list[str], data: Path | None) -> list[TaskSet]:
    """Tasks with their items.

    Args:
        names: lm-eval's names.
        data: a folder of local items; None for the Hub.

    Raises:
        EvaluationError: lm-eval is missing, a task is unknown, or its items cannot be had.
    """
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise EvaluationError(f"a task is asked for twice: {', '.join(repeated)}")
    if not names:
        raise EvaluationError(f"no task is asked for; with local items there are {', '.join(items.SOURCES)}")
    local = {name: items.read_task(data, name) for name in names} if data is not None else {}
    manager = _manager()
    known = set(manager.all_tasks)
    if unknown := [name for name in names if name not in known]:
        raise EvaluationError(f"lm-eval has no task {unknown[0]!r}; `lm-eval ls tasks` lists them")
    found = []
    for name in names:
        if data is None:
            parts, source = _from_hub(manager, name)
        else:
            parts = _from_items(manager, name, local[name])
            file = items.find(data, items.SOURCES[name][0])
            source = {"file": file.name, "sha256": items.digest(local[name])}
        for task in parts.values():
            if task.config.num_fewshot is None:
                task.set_config(key="num_fewshot", value=0)
        found.append(TaskSet(name, parts, _metric(name, parts), source))
    return found


def parse_limit(text: str | None, names: list[str]) -> dict[str, int | None]:
    """Most items of each task: from nothing (all), a number for every task, or `TASK=NUMBER,...`.

    Raises:
        EvaluationError: it is neither, or names another task.
    """
    limits: dict[str, int | None] = dict.fromkeys(names)
    if text is None:
        return limits
    pairs = [part.strip().split("=") for part in text.split(",")]
    for pair in pairs:
        alone = len(pairs) == 1 and len(pair) == 1
        if not re.fullmatch("[1-9][0-9]*", pair[-1]) or (len(pair) != 2 and not alone):
            raise EvaluationError(f"--limit must be a number of items, or TASK=NUMBER,...; found {text!r}")
        if len(pair) == 2 and pair[0] not in limits:
            raise EvaluationError(f"--limit names {pair[0]!r}, which is not evaluated: {', '.join(names)}")
        limits |= dict.fromkeys(names, int(pair[0])) if len(pair) == 1 else {pair[0]: int(pair[1])}
    return limits


def _manager() -> Any:
    """lm-eval's index of tasks."""
    try:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # 57 parts of MMLU warn one after the other
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluationError(
            f"evaluation needs lm-eval, which is not installed ({error}): `uv sync --extra eval`, or "
            '`pip install "elastic-jax[eval]"`'
        ) from None
    return TaskManager()


def _from_items(manager: Any, name: str, splits: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    if name != "mmlu":
        return _load_group(manager, [{"task": name, **_given(splits)}])
    subjects = sorted({item["subject"] for item in splits["test"]})
    specs = []
    for subject in subjects:
        own = {split: [item for item in listed if item["subject"] == subject] for split, listed in splits.items()}
        if f"mmlu_{subject}" not in manager.all_tasks:
            raise EvaluationError(f"lm-eval's MMLU has no subject {subject!r}")
        if not own["dev"]:
            raise EvaluationError(f"MMLU's examples (mmlu_dev*.jsonl) have none of the subject {subject!r}")
        specs.append({"task": f"mmlu_{subject}", **_given(own)})
    return _load_group(manager, specs)


def _load_group(manager: Any, specs: list[dict[str, Any]]) -> dict[str, Any]:
    """lm-eval's own tasks with some settings replaced: it merges them for members of a group alone."""
    return dict(manager.load([{"group": "elastic_jax_local_items", "task": specs}])["tasks"])


def _given(splits: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The settings that replace a task's data set: where it comes from, and the splits that there are not."""

    def dataset(**_: Any) -> dict[str, Any]:  # it is passed whatever else the task's definition says of its data set
        import datasets

        return {split: datasets.Dataset.from_list(listed) for split, listed in splits.items()}

    settings = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
    absent = {setting: None for setting, split in settings.items() if split not in splits}
    return {"custom_dataset": dataset, **absent}


def _from_hub(manager: Any, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        parts = dict(manager.load([name])["tasks"])
    except Exception as error:  # `datasets` raises whatever its transports raise
        raise EvaluationError(
            f"the data set of task {name!r} cannot be read from the Hub: {type(error).__name__}: {error}. Without a "
            "network, name a folder of local items with --data"
        ) from error
    first = next(iter(parts.values()))
    return parts, {"dataset": str(first.config.dataset_path), "name": str(first.config.dataset_name)}


def _metric(name: str, parts: dict[str, Any]) -> tuple[str, str]:
    offered = set(next(iter(parts.values()))._metric_fn_list)
    candidates = [METRICS[name]] if name in METRICS else _DEFAULT_METRICS
    for metric, chosen in candidates:
        if metric in offered:
            return metric, chosen
    raise EvaluationError(
        f"task {name!r} has none of the metrics that say of each item whether it is right: expected "
        f"{' or '.join(metric for metric, _ in candidates)}, found {', '.join(sorted(offered)) or 'none'}"
    )
