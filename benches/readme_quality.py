"""README's table of quality, and its plot, from `quality.json` (`elastic-jax eval`)."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from readme_speed import PROVISIONAL, table, where

ORDER = ("S", "M", "L", "XL", "Original", "W8A8")
"""The columns, as far as they were evaluated."""


def modes(result: Mapping[str, Any]) -> list[str]:
    present = {row["mode"] for row in result["rows"]}
    return [mode for mode in ORDER if mode in present] + sorted(present - set(ORDER))


def mean_rows(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {row["mode"]: row for row in result["rows"] if row["task"] == "mean"}


def quality(result: Mapping[str, Any]) -> str:
    columns, means = modes(result), mean_rows(result)
    by_key = {(row["mode"], row["task"]): row for row in result["rows"]}
    tasks = list(dict.fromkeys(row["task"] for row in result["rows"] if row["task"] != "mean"))
    plans = result["plans"]
    marks = {mode: PROVISIONAL if plans.get(mode, {}).get("provisional") and mode != "XL" else "" for mode in columns}
    rows = []
    for task in tasks:
        n = by_key[columns[0], task]["n"]
        left = " (not in the mean)" if task in result["left_out"] else ""
        rows.append([f"{task}{left}", str(n), *(_accuracy(by_key[mode, task]) for mode in columns)])
    rows.append(["**mean**", str(means[columns[0]]["n"] or 0), *(_accuracy(means[mode]) for mode in columns)])
    lines: dict[str, Any] = {
        "recovery": lambda r: _percent(r["recovery"], 1),
        "loss": lambda r: _percent(r["loss"], 2),
        "its 95 % bound": lambda r: _percent(r["loss_upper95"], 2),
        "promise": lambda r: "" if r["promise"] is None else f"{_percent(r['promise'], 1)}, {_status(r)}",
        "flips": lambda r: _percent(r["flips"], 1),
        "McNemar's p": lambda r: "" if r["mcnemar_p"] is None else f"{r['mcnemar_p']:.2f}",
        "KL, prompt tokens": lambda r: _number(r["kl"]),
        "KL, generated tokens": lambda r: _number(r["kl_generated"]),
        "perplexity": lambda r: "" if r["perplexity"] is None else f"{r['perplexity']:.3f}",
        "perplexity, change": lambda r: _signed(r["perplexity_change"]),
    }
    rows += [[name, "", *(show(means[mode]) for mode in columns)] for name, show in lines.items()]
    text = [
        f"{_model(result)}, {where(result)}, {_versions(result)}. Accuracy in % ± its standard error, by lm-eval's "
        f"prompts and examples; compared with {_baseline(result)} item by item. Loss = 1 - mean accuracy / mean "
        "accuracy of the original; its bound is one-sided, from a paired bootstrap. Perplexity: "
        f"{result['text']['windows']} windows of {result['text']['length']} tokens of WikiText-2; KL: "
        f"{result['kl_windows']} of them, in float32. W8A8 is plain int8 with static activation scales, a control and "
        "no mode.",
        table(["", "items", *(mode + marks[mode] for mode in columns)], rows),
    ]
    if any(marks.values()):
        text.append(f"{PROVISIONAL} The plan is provisional: no search has found it.")
    text += [f"{task} is not in the mean: {why}." for task, why in result["left_out"].items()]
    if result["differing"] is not None:
        found = ", ".join(f"{task} {each['answers']}" for task, each in result["differing"].items())
        text.append(f"Items to which XL and the original gave different answers: {found}.")
    text.append(f"![loss and its bound by mode]({plot_name(result)})")
    return "\n\n".join(text)


def _accuracy(row: Mapping[str, Any]) -> str:
    return "" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f} ± {100 * row['stderr']:.2f}"


def _percent(value: float | None, digits: int) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.2f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"


def _status(row: Mapping[str, Any]) -> str:
    return "certified" if row["certified"] else "estimated"


def _model(result: Mapping[str, Any]) -> str:
    files = result["source"].get("files") or [{"name": "a model"}]
    return files[0]["name"] + (", calibrated" if result["calibrated"] else "")


def _versions(result: Mapping[str, Any]) -> str:
    return f"lm-eval {result['environment']['versions']['lm_eval']}"


def _baseline(result: Mapping[str, Any]) -> str:
    if result["original"] is None:
        return "XL, for want of answers of transformers"
    return f"transformers {result['original']['versions']['transformers']} on the source weights"


# -- the plot ----------------------------------------------------------------------------------------------------------


def plot_name(result: Mapping[str, Any]) -> str:
    device = re.sub(r"[^a-z0-9]+", "-", result["environment"]["device"].lower()).strip("-")
    return f"docs/quality-{device}.svg"


def _shown(result: Mapping[str, Any]) -> Sequence[tuple[str, float, float, float | None]]:
    """(mode, loss, its bound, promise) of the modes and XL; the control would need another scale."""
    rows = mean_rows(result)
    return [
        (mode, rows[mode]["loss"], rows[mode]["loss_upper95"], rows[mode]["promise"])
        for mode in modes(result)
        if mode not in ("Original", "W8A8") and rows[mode]["loss"] is not None
    ]


def plot_digest(result: Mapping[str, Any]) -> str:
    """What the plot was drawn from; it is written into the plot, so that an outdated one is found."""
    return hashlib.sha256(json.dumps(_shown(result)).encode()).hexdigest()


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draws each mode's loss, the one-sided 95 % bound, and the promise."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": "quality", "svg.fonttype": "none", "font.size": 8})
    figure, axis = plt.subplots(figsize=(4.6, 2.4))
    shown = _shown(result)
    for height, (_, loss, bound, promise) in enumerate(shown):
        axis.plot([100 * loss, 100 * bound], [height, height], "-", color="C0", linewidth=1.5)
        axis.plot([100 * loss], [height], "o", color="C0", label="loss" if height == 0 else None)
        axis.plot([100 * bound], [height], "|", color="C0", label="95 % bound" if height == 0 else None, markersize=9)
        if promise is not None:
            axis.plot([100 * promise], [height], "d", color="C3", label="promise" if height == 0 else None)
    axis.axvline(0, color="0.6", linewidth=0.8)
    axis.set_yticks(range(len(shown)), [mode for mode, *_ in shown])
    axis.invert_yaxis()
    axis.set_xlabel("loss of mean accuracy against the original, %")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(frameon=False, loc="best")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Description": plot_digest(result)})
    plt.close(figure)
