"""The evaluation of a checkpoint: every mode is asked what it has not answered yet, then all are compared.

`OUT/<mode>/<task>.jsonl` are the answers (`answers.py`), `OUT/<mode>/divergence.json` the distance from the original,
`OUT/quality.json` the table.
"""

import dataclasses
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aot_cache.target import Device
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.checkpoint_io import write_json
from elastic_jax.elastic import ElasticMistral
from elastic_jax.errors import EvaluationError
from elastic_jax.evaluation import answering, answers, items, promise, tasks
from elastic_jax.evaluation.answers import Answers, Writer
from elastic_jax.evaluation.control import CONTROL, activation_scales, control_weights, load_control, static_dot
from elastic_jax.evaluation.divergence import DivergenceMeter
from elastic_jax.evaluation.quality import ORIGINAL, Quality, assess
from elastic_jax.plan import Plan
from elastic_jax.search.forward import ROLES
from elastic_jax.search.texts import get_text
from elastic_jax.tokenizer import Tokenizer
from elastic_jax.weights import load_weights

DIVERGENCE = "divergence.json"
QUALITY = "quality.json"

PACKAGES = ("elastic-jax", "jax", "jaxlib", "lm_eval", "datasets", "numpy", "tokenizers")

_CONTROL_TEXT = (18, 128, 1)
"""Windows, their length and the seed of the text that the control is calibrated on: those of `search` by default."""

_CONTROL_KV_SLOTS = 16384


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to evaluate.

    Attributes:
        modes: of the checkpoint; `W8A8` is the control.
        tasks: lm-eval's names.
        data: a folder of local items; None for the Hub.
        limit: task -> most items.
        out: the folder of the evaluation.
        text_windows: windows that perplexity is measured on; 0 for none.
        text_length: tokens of each window.
        kl_windows: of these, how many KL is measured on; 0 for none.
        control: the checkpoint that the control is made from; None for the one that is evaluated.
        calibration: text for the control; None for what the original model writes.
        workers: threads.
    """

    modes: Sequence[str]
    tasks: Sequence[str]
    data: Path | None
    limit: str | None
    out: Path
    text_windows: int
    text_length: int
    kl_windows: int
    control: Path | None
    calibration: Path | None
    workers: int


class Evaluation:
    """Evaluates one checkpoint on one device.

    Args:
        checkpoint: what is evaluated.
        settings: how.
        device: where.
        load: loads a mode by its name.
        say: is told what is done.
        progress: is told how many items of a task are answered.

    Raises:
        EvaluationError: a task, its items or the settings are wrong; nothing has run then.
        PlanError: there is no such mode.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: Settings,
        device: Device,
        load: Callable[[str], ElasticMistral],
        say: Callable[[str], None],
        progress: answering.Progress,
    ) -> None:
        self._checkpoint, self._settings, self._device = checkpoint, settings, device
        self._load, self._say, self._progress = load, say, progress
        names = list(settings.tasks)
        self._plans: dict[str, Plan] = {}
        for mode in settings.modes:
            if mode == ORIGINAL or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.,=%-]*", mode):
                raise EvaluationError(
                    f"{mode!r} is no mode; answers of the original are made by `benches/original.py`, and compared if "
                    f"they are in {settings.out / ORIGINAL}"
                )
            if mode != CONTROL:
                self._plans[mode] = checkpoint.plan(mode)
        if repeated := sorted({mode for mode in settings.modes if list(settings.modes).count(mode) > 1}):
            raise EvaluationError(f"a mode is asked for twice: {', '.join(repeated)}")
        self._control = checkpoint if settings.control is None else Checkpoint.open(settings.control)
        limits = tasks.parse_limit(settings.limit, names)
        self._tasks = tasks.load(names, settings.data)
        self._text = items.text(settings.data) if settings.text_windows else ""
        self._windows: list[list[int]] = []
        if settings.text_windows:
            tokenizer = Tokenizer.load(checkpoint.tokenizer_path)
            ids = tokenizer.encode(self._text, add_special_tokens=True)
            self._windows = answering.text_windows(ids, settings.text_windows, settings.text_length)
        self._asked = {task.name: task.requests(limits[task.name]) for task in self._tasks}
        self._digests = {name: tasks.digests(asked) for name, asked in self._asked.items()}
        self._scales: dict[str, float] | None = None
        self._meters: dict[Path, DivergenceMeter] = {}

    def run(self) -> Quality:
        """Asks what is missing, compares, and writes the table and the plans' promises.

        Raises:
            EvaluationError: what is stored cannot be compared.
            ElasticError: a mode cannot be loaded.
        """
        for mode in self._settings.modes:
            self._ask(mode)
        divergences = {mode: self._divergence(mode) for mode in self._settings.modes if self._settings.kl_windows}
        names = [*self._settings.modes]
        if (self._settings.out / ORIGINAL).is_dir():
            names.append(ORIGINAL)
        found = {mode: {task.name: self._read(mode, task.name) for task in self._tasks} for mode in names}
        text = {mode: self._read(mode, answering.TEXT) for mode in names if self._windows}
        quality = assess(found, text, divergences)
        return self._finish(quality, found)

    # -- asking --------------------------------------------------------------------------------------------------------

    def _whose(self, mode: str) -> dict[str, Any]:
        """Whose answers they are: what a mode's answers depend on."""
        checkpoint = self._control if mode == CONTROL else self._checkpoint
        whose: dict[str, Any] = {
            "mode": mode,
            "weights": weights_digest(checkpoint),
            "device": device_name(self._device),
        }
        if mode != CONTROL:
            return whose | {"plan": self._plans[mode].digest()}
        calibration = self._settings.calibration
        return whose | {"calibration": calibration.name if calibration else list(_CONTROL_TEXT)}

    def _writer(self, mode: str, task: tasks.TaskSet) -> Writer:
        file = answers.path_of(self._settings.out, mode, task.name)
        return Writer(file, self._digests[task.name], task.identity(), self._whose(mode), {"versions": versions()})

    def _ask(self, mode: str) -> None:
        writers = {task.name: self._writer(mode, task) for task in self._tasks}
        if self._windows:
            file = answers.path_of(self._settings.out, mode, answering.TEXT)
            identity = answering.text_identity(answering.TEXT, self._text, self._settings.text_length)
            digests, facts = answering.window_digests(self._windows), {"versions": versions()}
            writers[answering.TEXT] = Writer(file, digests, identity, self._whose(mode), facts)
        if replaced := [name for name, writer in writers.items() if writer.replaced]:
            self._say(f"{mode}: stored answers to {', '.join(replaced)} are to other prompts or of another plan: anew")
        if not any(writer.missing for writer in writers.values()):
            self._say(f"{mode}: everything is answered")
            return
        from elastic_jax.evaluation.harness import ElasticLM  # registers itself with lm-eval, which is large

        self._say(f"{mode}: loading")
        model = ElasticLM(self._load_control() if mode == CONTROL else self._load(mode))

        def progress(done: int, total: int, name: str) -> None:
            self._progress(done, total, f"{mode}, {name}")

        if self._windows:
            answering.answer_text(self._windows, model, writers[answering.TEXT], progress)
        for task in self._tasks:
            answering.answer_task(task, self._asked[task.name], model, writers[task.name], progress)
        del model
        gc.collect()  # the device's memory is for the next mode

    def _read(self, mode: str, name: str) -> Answers:
        found = answers.read(answers.path_of(self._settings.out, mode, name))
        digests = answering.window_digests(self._windows) if name == answering.TEXT else self._digests[name]
        asked = found.only(digests) if found is not None else None
        if asked is None:
            state = "are missing" if found is None else "lack items, or are to other prompts"
            how = "`benches/original.py` makes them" if mode == ORIGINAL else "run the same command again"
            raise EvaluationError(f"the answers of {mode} to {name} {state}: {how}")
        return asked

    # -- the control ---------------------------------------------------------------------------------------------------

    def _control_scales(self) -> Mapping[str, float]:
        if self._scales is None:
            count, length, seed = _CONTROL_TEXT
            self._say(f"{CONTROL}: calibrating its activation scales")
            text = get_text(
                self._control,
                count,
                length,
                file=self._settings.calibration,
                tasks=[],
                seed=seed,
                device=self._device,
                workers=self._settings.workers,
                say=self._say,
            )
            self._scales = activation_scales(self._control, text.windows, self._device, self._settings.workers)
        return self._scales

    def _load_control(self) -> ElasticMistral:
        return load_control(
            self._control,
            self._control_scales(),
            kv_slots=_CONTROL_KV_SLOTS,
            device=self._device,
            workers=self._settings.workers,
        )

    # -- divergence ----------------------------------------------------------------------------------------------------

    def _divergence(self, mode: str) -> dict[str, Any]:
        """The stored distances of a mode, measured if they are missing or of something else."""
        windows = self._windows[: self._settings.kl_windows]
        identity = {**self._whose(mode), "token_ids": answering.window_digests(windows)}
        file = self._settings.out / mode / DIVERGENCE
        if file.is_file():
            stored = json.loads(file.read_text("utf-8"))
            if stored.get("identity") == identity:
                return stored["found"]
        self._say(f"{mode}: KL on {len(windows)} windows of {self._settings.text_length} tokens")
        found = self._measure(mode, windows)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"identity": identity, "found": found})
        return found

    def _measure(self, mode: str, windows: Sequence[Sequence[int]]) -> dict[str, Any]:
        if mode != CONTROL and set(self._plans[mode].choices.values()) == {"bf16"}:
            return {role: {"kl": 0.0, "stderr": 0.0, "flips": 0.0} for role in ROLES}
        threads, device = self._settings.workers, self._device
        checkpoint = self._control if mode == CONTROL else self._checkpoint
        meter = self._meters.get(checkpoint.path)
        if meter is None:
            original = load_weights(
                checkpoint, checkpoint.plan("XL"), "float32", device, workers=threads, progress=None
            )
            meter = self._meters[checkpoint.path] = DivergenceMeter(checkpoint.config, original, windows, device)
        if mode == CONTROL:
            weights = control_weights(checkpoint, self._control_scales(), "float32", device, threads)
            return {"prompt": dataclasses.asdict(meter.measure(weights, "prompt", static_dot))}
        weights = load_weights(checkpoint, self._plans[mode], "float32", device, workers=threads, progress=None)
        return {role: dataclasses.asdict(meter.measure(weights, role)) for role in ROLES}

    # -- finishing -----------------------------------------------------------------------------------------------------

    def _finish(self, quality: Quality, found: Mapping[str, Mapping[str, Answers]]) -> Quality:
        """Adds to the rows what the plans say of unseen items, and writes everything."""
        sources = {task.name: task.data for task in self._tasks}
        files = [sources[task].get("file", sources[task].get("dataset", task)) for task in quality.counted]
        rows = []
        for row in quality.rows:
            plan = self._plans.get(row["mode"])
            if row["task"] == "mean" and plan is not None and row["promise"] is not None:
                row = promise.apply(row, promise.seen_by(self._checkpoint, plan, files))
                evidence = {
                    "baseline": quality.baseline,
                    "items": {task: sources[task] for task in quality.counted},
                    "left_out": quality.left_out,
                    "device": device_name(self._device),
                    "versions": versions(),
                }
                promise.record(self._checkpoint, plan, row, evidence)
            rows.append(row)
        quality = dataclasses.replace(quality, rows=rows)
        source = self._checkpoint.manifest.source
        values = {
            "environment": environment(self._device),
            "bench": "quality",
            "source": {key: value for key, value in source.items() if key != "calibration"},
            "calibrated": "calibration" in source,
            "tokenizer": {name: record.sha256 for name, record in sorted(self._checkpoint.manifest.tokenizer.items())},
            "plans": {
                mode: {"counts": plan.counts(), "provisional": plan.provisional, "digest": plan.digest()}
                for mode, plan in self._plans.items()
            },
            "baseline": quality.baseline,
            "original": found[ORIGINAL][self._tasks[0].name].facts if ORIGINAL in found else None,
            "tasks": {task.name: task.identity() for task in self._tasks},
            "text": {"windows": len(self._windows), "length": self._settings.text_length},
            "kl_windows": self._settings.kl_windows,
            "counted": quality.counted,
            "left_out": quality.left_out,
            "differing": quality.differing,
            "rows": quality.rows,
        }
        write_json(self._settings.out / QUALITY, values)
        return quality


def weights_digest(checkpoint: Checkpoint) -> str:
    """sha256 over the weights' files."""
    files = {name: record.sha256 for name, record in sorted(checkpoint.files().items()) if name.startswith("weights/")}
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def device_name(device: Device) -> str:
    """The device's kind; of a CPU, the processor's name."""
    if device.platform != "cpu":
        return device.device_kind
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    """Of the packages that answers depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def environment(device: Device) -> dict[str, Any]:
    """Where and of what the evaluation was made."""
    return {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "platform": device.platform,
        "python": platform.python_version(),
        "versions": versions(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
