"""Items of the tasks from local JSON lines, in the form in which lm-eval's own task definitions expect them.

One file a task, found by its name's beginning; `docs/evaluation.md` lists the fields. Nothing is downloaded.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from elastic_jax.errors import EvaluationError


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a task in a local file.

    Attributes:
        split: what lm-eval calls it.
        pattern: of the file's name; exactly one file in the folder must match.
        fields: name -> what its value must be: `text`, `number`, `texts`, or `choices` (of ARC).
    """

    split: str
    pattern: str
    fields: Mapping[str, str]


_ARC = {"id": "text", "question": "text", "choices": "choices", "answerKey": "text"}
_GSM8K = {"question": "text", "answer": "text"}
_MMLU = {"question": "text", "subject": "text", "choices": "texts", "answer": "number"}
_PIQA = {"goal": "text", "sol1": "text", "sol2": "text", "label": "number"}
_WINOGRANDE = {"sentence": "text", "option1": "text", "option2": "text", "answer": "text"}

SOURCES: dict[str, tuple[Source, ...]] = {
    "arc_challenge": (Source("test", "arc_challenge_*.jsonl", _ARC),),
    "gsm8k": (Source("test", "gsm8k_test*.jsonl", _GSM8K), Source("train", "gsm8k_fewshot*.jsonl", _GSM8K)),
    "mmlu": (Source("test", "mmlu_test*.jsonl", _MMLU), Source("dev", "mmlu_dev*.jsonl", _MMLU)),
    "piqa": (Source("validation", "piqa_*.jsonl", _PIQA),),
    "winogrande": (Source("validation", "winogrande_*.jsonl", _WINOGRANDE),),
}
"""Task -> where its items are."""

TEXT = Source("test", "wikitext2*.jsonl", {"text": "text"})
"""The text whose perplexity is measured: its lines, one after another."""

_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("text", lambda v: isinstance(v, str)),
    "number": ("a whole number, 0 or more", lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0),
    "texts": ("a list of texts", lambda v: isinstance(v, list) and v != [] and all(isinstance(t, str) for t in v)),
    "choices": (
        "an object of two equally long lists of texts, `text` and `label`",
        lambda v: (
            isinstance(v, dict)
            and all(isinstance(v.get(k), list) and all(isinstance(t, str) for t in v[k]) for k in ("text", "label"))
            and len(v["text"]) == len(v["label"]) > 0
        ),
    ),
}

_RIGHT: dict[str, tuple[str, Callable[[Mapping[str, Any]], bool]]] = {
    "arc_challenge": (
        "answerKey must be one of the labels",
        lambda item: item["answerKey"] in item["choices"]["label"],
    ),
    "gsm8k": ("answer must end with `#### NUMBER`", lambda item: "####" in item["answer"]),
    "mmlu": ("there must be four choices, and answer 0 to 3", lambda i: len(i["choices"]) == 4 and i["answer"] < 4),
    "piqa": ("label must be 0 or 1", lambda item: item["label"] in (0, 1)),
    "winogrande": (
        "sentence must hold a `_`, and answer be 1 or 2",
        lambda item: "_" in item["sentence"] and item["answer"] in ("1", "2"),
    ),
}


def find(folder: Path, source: Source) -> Path:
    """The one file of a split.

    Raises:
        EvaluationError: there is none, or there are several.
    """
    found = sorted(folder.glob(source.pattern)) if folder.is_dir() else []
    if len(found) != 1:
        there = ", ".join(path.name for path in found) or "none"
        raise EvaluationError(
            f"expected one file {source.pattern} in {folder}, found {there}: name another folder with --data, or leave "
            "the task out"
        )
    return found[0]


def read(file: Path, source: Source, task: str | None = None) -> list[dict[str, Any]]:
    """The items of one file, with exactly the fields that are used.

    Raises:
        EvaluationError: the file cannot be read, or an item is malformed; the message names its line.
    """
    try:
        lines = file.read_text("utf-8").split("\n")  # `splitlines` would also cut at U+2028, inside an item
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{file} cannot be read as UTF-8 text: {error}") from None
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise EvaluationError(f"{file}:{number}: expected a JSON object: {error}") from None
        if not isinstance(item, dict):
            raise EvaluationError(f"{file}:{number}: expected a JSON object, found {type(item).__name__}")
        for name, kind in source.fields.items():
            expected, good = _KINDS[kind]
            if name not in item or not good(item[name]):
                found = f"found {item[name]!r:.60}" if name in item else f"found only {sorted(item)}"
                raise EvaluationError(f"{file}:{number}: field `{name}` must be {expected}, {found}")
        if task is not None and not _RIGHT[task][1](item):
            raise EvaluationError(f"{file}:{number}: {_RIGHT[task][0]}, found {item!r:.160}")
        items.append({name: item[name] for name in source.fields})
    if not items:
        raise EvaluationError(f"{file} holds no item")
    return items


def read_task(folder: Path, task: str) -> dict[str, list[dict[str, Any]]]:
    """The items of a task by split.

    Raises:
        EvaluationError: local items of the task are unknown, missing or malformed.
    """
    if task not in SOURCES:
        raise EvaluationError(
            f"no local items are known for task {task!r}, only for {', '.join(SOURCES)}: leave --data out to read it "
            "from the Hub"
        )
    return {source.split: read(find(folder, source), source, task) for source in SOURCES[task]}


def text(folder: Path | None) -> str:
    """The text whose perplexity is measured: WikiText-2's test split, from a folder or from the Hub.

    Raises:
        EvaluationError: it cannot be had, or is malformed.
    """
    if folder is not None:
        return "".join(item["text"] for item in read(find(folder, TEXT), TEXT))
    import datasets

    try:
        return "".join(datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"])
    except Exception as error:  # `datasets` raises whatever its transports raise
        raise EvaluationError(
            f"WikiText-2 cannot be read from the Hub: {type(error).__name__}: {error}. Without a network, name a "
            "folder of local items with --data, or measure no perplexity with --text-windows 0"
        ) from error


def task_files(folder: Path, tasks: list[str]) -> list[Path]:
    """The files that hold the items which tasks are evaluated on; examples for prompts are none."""
    return [find(folder, SOURCES[task][0]) for task in tasks if task in SOURCES]


def digest(items: Mapping[str, list[dict[str, Any]]]) -> str:
    """sha256 of items: answers to other items are not the same evaluation."""
    return hashlib.sha256(json.dumps(items, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
