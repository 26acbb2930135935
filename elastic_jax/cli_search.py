"""The commands that improve a checkpoint's int8 and find its plans."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from elastic_jax.cli_options import (
    CheckpointArgument,
    DestinationArgument,
    JsonOption,
    WorkersOption,
    note,
    print_value,
)
from elastic_jax.errors import ConfigError
from elastic_jax.workers import default_workers

CalibrationOption = Annotated[
    Path | None,
    typer.Option(help="Text, or JSON lines with a field `text`. By default the model itself writes what is read."),
]
TasksOption = Annotated[
    list[Path] | None,
    typer.Option(help="JSON lines of evaluation items: text that shares 13 words in a row with one is left out."),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Of drawing the text.")]


class Steps:
    """Tells people how far a long measurement is, at most every few seconds, and how long it will still take."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._start, self._told, self._first = quiet, time.monotonic(), 0.0, 0

    def __call__(self, done: int, total: int, name: str) -> None:
        """`done` of `total` steps are done, and `name` comes next."""
        now = time.monotonic()
        if not self._told:
            self._start, self._first = now, done  # what a resumed run finds done took no time
        if now - self._told < 10 and done < total and self._told:
            return
        self._told = now
        speed = (done - self._first) / (now - self._start) if now > self._start else 0.0
        left = f", {_minutes((total - done) / speed)} left" if speed > 0 and done < total else ""
        note(f"{100 * done / max(total, 1):3.0f} %  {name}{left}", self._quiet)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def calibrate(
    source: CheckpointArgument,
    destination: DestinationArgument,
    calibration: CalibrationOption = None,
    tasks: TasksOption = None,
    windows: Annotated[int, typer.Option(min=3, help="Windows of text: two thirds for factors, one to choose.")] = 24,
    length: Annotated[int, typer.Option(min=16, help="Tokens a window.")] = 256,
    rounding: Annotated[
        str, typer.Option(help="`nearest`, or `gptq`: error-compensated, where that is better on held-out windows.")
    ] = "nearest",
    seed: SeedOption = 0,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a new checkpoint whose int8 loses less, and whose mode XL stays the original, bit for bit."""
    from elastic_jax.checkpoint import Checkpoint
    from elastic_jax.device import default_device
    from elastic_jax.search.calibrate import calibrate as run
    from elastic_jax.search.calibrate import calibration_room, check_destination
    from elastic_jax.search.rounding import ROUNDINGS, Rounding
    from elastic_jax.search.sampled import check_sampling
    from elastic_jax.search.strength import STRENGTHS
    from elastic_jax.search.texts import get_text

    named: dict[str, Rounding] = {name: name for name in ROUNDINGS}
    way = named.get(rounding)
    if way is None:
        raise ConfigError(f"--rounding should be one of {', '.join(ROUNDINGS)}, found {rounding!r}")
    check_destination(destination)  # before the work
    opened, device, threads = Checkpoint.open(source), default_device(), workers or default_workers()
    calibration_room(opened.config, (windows, length), device, rounding=way)  # before the work
    if calibration is None:
        check_sampling(opened, windows, length, device)
        note(f"the model writes {windows} windows of {length} tokens", as_json)
    text = get_text(
        opened,
        windows,
        length,
        file=calibration,
        tasks=tasks or [],
        seed=seed,
        device=device,
        workers=threads,
        say=lambda message: note(message, as_json),
    )
    room = calibration_room(opened.config, text.windows.shape, device, rounding=way)
    if told := room.message():
        note(told, as_json)
    made = run(
        opened,
        destination,
        text,
        strengths=STRENGTHS,
        rounding=way,
        device=device,
        workers=threads,
        progress=Steps(as_json),
        room=room,
    )
    values = {"path": str(destination), "summary": made.summary(), "groups": made.record}
    print_value(values, as_json, lambda: _calibrated(values))


def _calibrated(values: dict[str, Any]) -> str:
    lines = [
        f"{values['path']}: calibrated",
        "error of a group's output, after / before (squared, geometric mean over layers, on held-out text)",
        "group    smoothed     8-bit  16-bit activations",
    ]
    for kind, found in values["summary"].items():
        smoothed = f"{found['smoothed']} of {found['groups']}"
        compensated = f"; compensated rounding / to nearest: {found['rounding']:.2f}" if "rounding" in found else ""
        lines.append(f"{kind:8s} {smoothed:11s} {found['a8']:6.2f}  {found['a16']:6.2f}{compensated}")
    return "\n".join(lines)
