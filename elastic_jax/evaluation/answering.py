"""Asking a model: all items of a task that are not answered yet, some at a time, through lm-eval's interface of models.

Nothing here knows which model it is: the modes, the control and transformers (`benches/original.py`) are asked by this.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from elastic_jax.errors import EvaluationError
from elastic_jax.evaluation.answers import Writer, digest_of
from elastic_jax.evaluation.tasks import TaskSet, by_item

CHUNK = 128
"""Items asked for at a time: enough to keep a model busy, few enough that little is lost by an interruption."""

TEXT = "wikitext2"
"""What answers to the text are called."""

TEXT_WINDOWS, TEXT_LENGTH = 32, 512
"""Windows of the text, and tokens of each, unless told otherwise."""

Progress = Callable[[int, int, str], None]
"""Called with how many items are answered, how many there are, and of what."""


def answer_task(
    tasks: TaskSet, asked: Sequence[Any], model: Any, writer: Writer, progress: Progress, chunk: int = CHUNK
) -> None:
    """Asks a model for what `writer` lacks.

    Args:
        tasks: the task.
        asked: what `tasks.requests` gave.
        model: an lm-eval model.
        writer: is given the answers.
        progress: is told after every chunk.
        chunk: items asked for at a time.
    """
    if repeated := [instance for instance in asked if (instance.repeats or 1) > 1]:
        raise EvaluationError(f"task {tasks.name!r} asks {repeated[0].repeats} times, which is not done here")
    instances_of = by_item(list(asked))
    missing = writer.missing
    total = len(instances_of)
    progress(writer.done, total, tasks.name)
    for start in range(0, len(missing), chunk):
        names = missing[start : start + chunk]
        instances = [instance for name in names for instance in instances_of[name]]
        for kind in sorted({instance.request_type for instance in instances}):
            same = [instance for instance in instances if instance.request_type == kind]
            for instance, response in zip(same, getattr(model, kind)(same), strict=True):
                instance.resps = [response]
        writer.append(_judge(tasks, name, instances_of[name]) for name in names)
        progress(writer.done, total, tasks.name)


def _judge(tasks: TaskSet, name: str, instances: list[Any]) -> dict[str, Any]:
    """What lm-eval says of the responses to one item."""
    task, doc = tasks.parts[instances[0].task_name], instances[0].doc
    metric, chosen = tasks.metric
    for pipeline in task._filters:
        pipeline.apply(instances)
    by_filter = {
        key: task.process_results(doc, [instance.filtered_resps[key] for instance in instances])
        for key in instances[0].filtered_resps
    }
    if chosen not in by_filter:
        raise EvaluationError(f"task {tasks.name!r} has filters {sorted(by_filter)}, expected {chosen!r}")
    metrics = {
        found if key == "none" else f"{found},{key}": float(value)
        for key, values in by_filter.items()
        for found, value in values.items()
        if isinstance(value, int | float)
    }
    item: dict[str, Any] = {"id": name, "right": int(by_filter[chosen][metric])}
    if instances[0].request_type == "loglikelihood":
        found = [round(float(instance.resps[0][0]), 6) for instance in instances]
        lengths = [len(choice) for choice in task.doc_to_choice(doc)] if metric == "acc_norm" else [1] * len(found)
        item["answer"] = max(range(len(found)), key=lambda choice: found[choice] / lengths[choice])
        item["target"] = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        item["log_probabilities"] = found
    else:
        item["answer"] = str(instances[0].filtered_resps[chosen])
        item["target"] = str(task.doc_to_target(doc)).split("####")[-1].strip()
        item["text"] = str(instances[0].resps[0])
    return item | {"metrics": metrics}


def text_windows(tokens: Sequence[int], count: int, length: int) -> list[list[int]]:
    """The first windows of a text, cut from its encoding as a whole; each is read by itself.

    Raises:
        EvaluationError: the text is too short for one.
    """
    windows = [list(tokens[start : start + length]) for start in range(0, len(tokens) - length + 1, length)][:count]
    if not windows:
        raise EvaluationError(f"the text whose perplexity is measured has {len(tokens)} tokens, expected {length}")
    return windows


def text_identity(name: str, text: str, length: int) -> dict[str, Any]:
    """What log-probabilities of windows must agree on, beside their tokens."""
    return {"task": name, "length": length, "source_sha256": hashlib.sha256(text.encode()).hexdigest()}


def window_digests(windows: Sequence[Sequence[int]]) -> dict[str, str]:
    """Window -> digest of its token ids."""
    return {f"window/{number}": digest_of(list(window)) for number, window in enumerate(windows)}


def answer_text(
    windows: Sequence[Sequence[int]], model: Any, writer: Writer, progress: Progress, chunk: int = 8
) -> None:
    """The log-probability of every token of the windows but each one's first."""
    missing = writer.missing
    progress(writer.done, len(windows), TEXT)
    for start in range(0, len(missing), chunk):
        names = missing[start : start + chunk]
        some = [windows[int(name.split("/")[1])] for name in names]
        found = model._loglikelihood_tokens([(("", ""), list(w[:1]), list(w[1:])) for w in some])
        writer.append(
            {"id": name, "log_probability": round(float(value[0]), 6), "tokens": len(window) - 1}
            for name, window, value in zip(names, some, found, strict=True)
        )
        progress(writer.done, len(windows), TEXT)
