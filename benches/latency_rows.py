"""The rows of `latency.json`: what they count, how commands share one file, and whether their anchors agree.

Formulas, which the table's readers should know (steps are those in which every sequence of the batch generates):

    decode_tok_s_per_seq   (new tokens - 1) / (time of all - time of the first); the first is there when every sequence
                           has its first token, all are there when every sequence has `new - 1` more
    decode_tok_s_total     the same times the batch
    ttft_ms                from `submit` to a sequence's first token: the median over sequences
    ttft_last_ms           until every sequence has its first token
    tpot_ms_p50, _p99      percentiles of the times between tokens, all repeats together
    read_tb_s              (weights without the embedding + live keys and values) / seconds of a step
    fraction_of_limit      read_tb_s / what the device reads at most
    prefill_top_s          2 x weights (without lm_head) x prompt tokens / time until every sequence has its first
                           token; for batch 1 that time is one step or a few, all of it counted
    busy_fraction          seconds of a step replayed 100 times without the host / seconds of a step here
    peak_gib               most memory that the process had taken on the device until then
    compile_events         JAX's, since the process began
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CONTEXTS, BATCHES = (256, 1024, 4096), (1, 8, 16, 32, 64)
PEER_CELLS = ("1x256", "1x4096", "16x1024")
FEW_CELLS = ("1x256", "1x4096", "8x1024", "16x1024", "64x1024")
"""For modes L and M."""

FULL_MODES = ("S", "XL")
MODE_ORDER = ("S", "M", "L", "XL", "transformers-compile", "transformers-eager")
ANCHOR_TOLERANCE = 0.02

SAMPLED: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 0.95,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
}
"""What every row asks with `latency.py --sampling`."""

VARIANTS = {"kv": "full", "sampling": "greedy"}
"""What all rows of a file have in common besides device and model, and what it is where a file does not say."""

READ_LIMIT_TB_S = {"NVIDIA H200": 4.47}
"""Measured by summing an array of 4.3 GB. Where a device is not listed, the bench measures its own the same way."""

COLUMNS = (
    "mode",
    "batch",
    "context",
    "decode_tok_s_per_seq",
    "decode_tok_s_total",
    "ttft_ms",
    "tpot_ms_p50",
    "tpot_ms_p99",
    "read_tb_s",
    "fraction_of_limit",
    "prefill_top_s",
    "peak_gib",
    "compile_events",
    "busy_fraction",
)


class ResultError(Exception):
    """A result file cannot take what was measured."""


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
    """`batch` sequences with prompts of `context` tokens."""

    batch: int
    context: int

    @staticmethod
    def parse(text: str) -> "Cell":
        """From `16x1024`."""
        batch, _, context = text.partition("x")
        if not (batch.isdecimal() and context.isdecimal() and int(batch) and int(context)):
            raise ValueError(f"a cell is BATCHxCONTEXT, as 16x1024; found {text!r}")
        return Cell(int(batch), int(context))

    def __str__(self) -> str:
        return f"{self.batch}x{self.context}"


ANCHOR = Cell(1, 256)


def cells_of(
    mode: str, batches: Sequence[int] | None, contexts: Sequence[int] | None, cells: Sequence[str] | None
) -> list[Cell]:
    """The cells of a mode, the anchor first, then by tokens; what is not chosen is the issue's table."""
    if cells:
        chosen = [Cell.parse(cell) for cell in cells]
    elif batches or contexts or mode in FULL_MODES:
        chosen = [Cell(batch, context) for batch in batches or BATCHES for context in contexts or CONTEXTS]
    else:
        chosen = [Cell.parse(cell) for cell in FEW_CELLS]
    rest = sorted(set(chosen) - {ANCHOR}, key=lambda cell: (cell.batch * cell.context, cell))
    return [ANCHOR, *rest]


@dataclasses.dataclass(frozen=True)
class Run:
    """One repeat of a cell.

    Attributes:
        first_s: seconds from `submit` to the first token, of each sequence.
        steps_s: seconds between tokens while every sequence generates, `new - 1` of them.
        live_tokens: mean number of tokens whose keys and values such a step reads, all sequences together.
    """

    first_s: tuple[float, ...]
    steps_s: tuple[float, ...]
    live_tokens: float


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What one step of a model reads and computes.

    Attributes:
        read_bytes: weights that every step reads: all but the embedding.
        kv_token_bytes: keys and values of one token.
        linear_weights: weights that every prompt token is multiplied with: all but lm_head.
        limit_tb_s: what the device reads at most.
    """

    read_bytes: int
    kv_token_bytes: int
    linear_weights: int
    limit_tb_s: float


def row_of(mode: str, cell: Cell, runs: Sequence[Run], sizes: Sizes) -> dict[str, Any]:
    """A row from the repeats of a cell: the run of median decode time gives speeds, all give percentiles."""
    totals = [sum(run.steps_s) for run in runs]
    run = runs[int(np.argsort(totals)[(len(totals) - 1) // 2])]  # an odd number of repeats has its median here
    step = sum(run.steps_s) / len(run.steps_s)
    together = float(np.median([max(other.first_s) for other in runs]))
    gaps = np.array([gap for other in runs for gap in other.steps_s])
    read = sizes.read_bytes + run.live_tokens * sizes.kv_token_bytes
    per_run = [len(other.steps_s) / total for other, total in zip(runs, totals, strict=True)]
    return {
        "mode": mode,
        "batch": cell.batch,
        "context": cell.context,
        "decode_tok_s_per_seq": 1 / step,
        "decode_tok_s_total": cell.batch / step,
        "ttft_ms": float(np.median([first for other in runs for first in other.first_s])) * 1e3,
        "ttft_last_ms": together * 1e3,
        "tpot_ms_p50": float(np.percentile(gaps, 50)) * 1e3,
        "tpot_ms_p99": float(np.percentile(gaps, 99)) * 1e3,
        "read_tb_s": read / step / 1e12,
        "fraction_of_limit": read / sizes.limit_tb_s / 1e12 / step,
        "prefill_top_s": 2 * sizes.linear_weights * cell.batch * cell.context / together / 1e12,
        "new_tokens": len(run.steps_s) + 1,
        "repeats": len(runs),
        "spread": max(per_run) / min(per_run) - 1,
    }


# -- one file for several commands -------------------------------------------------------------------------------------


def _key(row: Mapping[str, Any]) -> tuple[str, int, int]:
    return row["mode"], row["batch"], row["context"]


def _order(row: Mapping[str, Any]) -> tuple[int, int, int]:
    mode = row["mode"]
    return MODE_ORDER.index(mode) if mode in MODE_ORDER else len(MODE_ORDER), row["batch"], row["context"]


def merged(
    before: Mapping[str, Any] | None,
    environment: Mapping[str, Any],
    run: Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]],
) -> dict[str, Any]:
    """The result with a command's rows in it; a row of the same mode, batch and context is replaced.

    Args:
        before: the file's content, or None.
        environment: of this command.
        run: what this command says of itself: `id`, its anchors and so on; it replaces the run of the same id.
        rows: what it measured.

    Raises:
        ResultError: the file was measured on another device, for another model, with another KV cache, or with other
            sampling.
    """
    if before is not None and before["environment"]["device"] != environment["device"]:
        raise ResultError(
            f"the file holds results of {before['environment']['device']}, this is {environment['device']}: "
            "name another file with --out"
        )
    if before is not None and before["model"] != run["model"]:
        raise ResultError(f"the file holds results of {before['model']}, this is {run['model']}: name another file")
    for name, usual in VARIANTS.items():
        there, here = (before or run).get(name, usual), run.get(name, usual)
        if there != here:
            raise ResultError(f"the file holds results of {name} {there}, this is {name} {here}: name another file")
    found = {_key(row): dict(row) for row in (before or {"rows": []})["rows"]}
    found |= {_key(row): {**row, "run": run["id"]} for row in rows}
    ordered = sorted(found.values(), key=_order)
    runs = {other["id"]: other for other in (before or {"runs": []})["runs"]} | {run["id"]: dict(run)}
    used = {row["run"] for row in ordered}
    kept = [other for other in runs.values() if other["id"] in used or other["id"] == run["id"]]
    return {
        "environment": dict(environment),
        "bench": "latency",
        "model": run["model"],
        **{name: run.get(name, usual) for name, usual in VARIANTS.items()},
        "limit_tb_s": run["limit_tb_s"],
        "anchors": anchor_spreads(kept),
        "runs": kept,
        "rows": ordered,
    }


def anchor_spreads(runs: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each mode: every measurement of the anchor in tok/s, how far apart they are, and whether that is allowed."""
    speeds: dict[str, list[float]] = {}
    for run in runs:
        for mode, values in run["anchors"].items():
            speeds.setdefault(mode, []).extend(values)
    return {
        mode: {
            "tok_s": values,
            "spread": max(values) / min(values) - 1,
            "within_2_percent": max(values) / min(values) - 1 <= ANCHOR_TOLERANCE,
        }
        for mode, values in speeds.items()
        if values
    }


def read_result(path: Path) -> dict[str, Any] | None:
    """A result file, or None if there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Writes it whole or not at all: a command may be killed at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)


# -- how long it will take ---------------------------------------------------------------------------------------------


class Clock:
    """Guesses whether another cell fits before a deadline, from the cells before."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self._prompt_s, self._step_s = 1e-4, 0.02  # seconds a prompt token, seconds a step: cautious until measured

    def learn(self, cell: Cell, runs: Sequence[Run]) -> None:
        """Takes over what a cell took."""
        prompt = min(max(run.first_s) for run in runs) / (cell.batch * cell.context)
        if cell.batch * cell.context >= 1024:  # shorter prompts are not bound by their length
            self._prompt_s = prompt
        self._step_s = max(sum(run.steps_s) / len(run.steps_s) for run in runs)

    def seconds(self, cell: Cell, new: int, times: int) -> float:
        """What a cell of `times` runs may take, a quarter more than it should."""
        return 1.25 * times * (cell.batch * cell.context * self._prompt_s + new * self._step_s) + 1

    def allows(self, now: float, cell: Cell, new: int, times: int) -> bool:
        return math.isinf(self.deadline) or now + self.seconds(cell, new, times) <= self.deadline
