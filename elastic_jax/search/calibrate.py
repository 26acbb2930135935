"""Calibration: a new checkpoint of the same model whose int8 loses less, made from an old one.

The original is never changed. The new checkpoint appears under its name when it is complete.
"""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aot_cache.target import Device
from converters.conversion import tool_versions
from converters.quantize import quantize_int8
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.checkpoint_format import (
    MANIFEST,
    NORMS,
    PLANS,
    TOKENIZER,
    WEIGHTS,
    Folder,
    FolderName,
    Manifest,
    expected_folder,
)
from elastic_jax.checkpoint_io import new_folder, sync, write_arrays, write_json
from elastic_jax.config import ModelConfig
from elastic_jax.errors import CheckpointError
from elastic_jax.plan import provisional_plans
from elastic_jax.search.forward import KINDS, Forward
from elastic_jax.search.room import Room, calibrating_bytes
from elastic_jax.search.rounding import Rounding, round_with_compensation
from elastic_jax.search.smoothing import fold
from elastic_jax.search.strength import choose_strength
from elastic_jax.search.texts import Text

type Steps = Callable[[int, int, str], None]
"""Is told `done` of `total` steps, and what comes next."""


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """What a calibration made.

    Attributes:
        checkpoint: the new one, opened.
        record: what was done to each group; `elastic.json` holds it below `source`.
    """

    checkpoint: Checkpoint
    record: dict[str, Any]

    def summary(self) -> dict[str, dict[str, float | int]]:
        """By kind of group: how many, how many were smoothed, and how their held-out errors changed on average.

        `a8` and `a16` are the geometric mean of after / before, of smoothing alone; `rounding` that of compensated /
        nearest, where it was asked for.
        """
        found = {}
        for kind in KINDS:
            groups = [record for name, record in self.record.items() if name.endswith(f".{kind}")]
            ratios = {
                width: float(np.exp(np.mean([_log_ratio(g["after"][width], g["before"][width]) for g in groups])))
                for width in ("a8", "a16")
            }
            if all("rounding_errors" in g for g in groups):
                errors = [g["rounding_errors"] for g in groups]
                chosen = [_log_ratio(min(each.values()), each["nearest"]) for each in errors]
                ratios["rounding"] = float(np.exp(np.mean(chosen)))
            found[kind] = {"groups": len(groups), "smoothed": sum(g["strength"] > 0 for g in groups), **ratios}
        return found


def _log_ratio(after: float, before: float) -> float:
    return float(np.log(max(after, 1e-30) / max(before, 1e-30)))


def check_destination(destination: Path) -> None:
    """Refuses a destination that is taken.

    Raises:
        CheckpointError: it exists, and is not an empty folder.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(
            f"{destination} should be a new folder, but something is there: name another, or delete it"
        )


def calibration_room(
    config: ModelConfig, shape: tuple[int, int], device: Device, *, rounding: Rounding = "nearest"
) -> Room:
    """What fits on a device that calibrates with windows of a shape.

    Raises:
        MemoryPlanError: there is no room for one layer.
    """
    beside = calibrating_bytes(config, *shape, compensated=rounding != "nearest")
    return Room.of(config, device, beside=beside, precisions=("bf16",), once=True)


def calibrate(
    source: Checkpoint,
    destination: Path,
    text: Text,
    *,
    strengths: Sequence[float],
    rounding: Rounding = "nearest",
    device: Device,
    workers: int,
    progress: Steps,
    room: Room | None = None,
) -> Calibrated:
    """Smooths every group of every layer, and rounds the smoothed weights to int8.

    Factors come from the first two thirds of the text's windows, strengths are chosen on the others.

    Args:
        source: must hold all groups in bf16 and in int8.
        destination: a folder that does not exist, or is empty.
        text: at least two windows.
        strengths: that are tried.
        rounding: to nearest, or error-compensated where that is better on the other windows.
        device: where the model runs.
        workers: threads that read weights.
        progress: is told about layers.
        room: what fits on the device (`calibration_room`); None holds all weights there.

    Raises:
        CheckpointError: the destination is taken, or the source lacks a precision.
    """
    check_destination(destination)
    config = source.config
    source.folders(provisional_plans(config)["L"])  # raises if int8 is not stored: nothing here reads it
    forward = Forward.load(source, text.windows, device, workers, room)
    count, length = text.windows.shape
    split = max(1, count * 2 // 3) * length
    record: dict[str, Any] = {}
    changed: dict[FolderName, Folder] = {}
    norms = {k: np.asarray(v).copy() for k, v in _arrays(source, (NORMS, "bf16"), device, workers).items()}
    x = forward.embed()
    with new_folder(destination) as partial:
        for layer in range(config.num_layers):
            progress(layer, config.num_layers, f"layer {layer}")
            x, inputs = forward.inputs(x, layer)
            wanted = {}
            for kind in KINDS:
                name, held_out = f"layers.{layer}.{kind}", inputs[kind][split:]
                largest = np.asarray(jnp.max(jnp.abs(inputs[kind][:split]), axis=0))
                found, wanted[kind] = choose_strength(
                    config,
                    kind,
                    forward.weight(name, "bf16").astype(jnp.float32),
                    largest,
                    held_out,
                    strengths,
                    forward.dot_name,
                )
                forward.used_by(x)
                record[name] = found.to_json()
            groups = {
                kind: np.asarray(_arrays(source, (f"layers.{layer}.{kind}", "bf16"), device, workers)["values"])
                for kind in KINDS
            }
            lines = {norm: norms[norm][layer] for norm in ("attention", "mlp")}
            groups, lines, used = fold(config, groups, lines, wanted)
            for norm, line in lines.items():
                norms[norm][layer] = line
            for kind, weight in groups.items():
                name = f"layers.{layer}.{kind}"
                record[name] |= {"channels_scaled": int(np.count_nonzero(used[kind])), "channels": used[kind].size}
                if rounding == "nearest":
                    values, scales = quantize_int8(weight)
                else:
                    smoothed = inputs[kind] / jnp.exp2(jnp.asarray(used[kind], jnp.float32))[None, :]
                    exact = jnp.asarray(weight.astype(np.float32), device=device)
                    found = round_with_compensation(exact, smoothed[:split], smoothed[split:])
                    values, scales = np.asarray(found.values), np.asarray(found.scales)
                    record[name] |= found.to_json()
                for precision, leaves in (("bf16", {"values": weight}), ("int8", {"values": values, "scales": scales})):
                    files = write_arrays(partial / WEIGHTS / name / precision, leaves)
                    changed[name, precision] = expected_folder(config, name, precision, blocks=1, files=files)
        files = write_arrays(partial / WEIGHTS / NORMS / "bf16", norms)
        changed[NORMS, "bf16"] = expected_folder(config, NORMS, "bf16", blocks=1, files=files)
        _finish(
            source,
            partial,
            changed,
            {
                "rounding": rounding,
                "text": text.description | {"token_ids_sha256": text.digest},
                "groups": record,
            },
        )
    progress(config.num_layers, config.num_layers, "done")
    return Calibrated(Checkpoint.open(destination), record)


def _arrays(
    source: Checkpoint,
    folder: FolderName,
    device: Device,
    workers: int,
) -> dict[str, jax.Array]:
    return source.restore([folder], device, workers)[folder]


def _finish(source: Checkpoint, partial: Path, changed: dict[FolderName, Folder], record: dict[str, Any]) -> None:
    """Everything beside the layers' weights: what did not change is copied."""
    for name, precision in source.manifest.folders.keys() - changed.keys():
        shutil.copytree(source.path / WEIGHTS / name / precision, partial / WEIGHTS / name / precision)
    shutil.copytree(source.tokenizer_path, partial / TOKENIZER)
    (partial / PLANS).mkdir()
    for mode, plan in provisional_plans(source.config).items():
        write_json(partial / PLANS / f"{mode}.json", plan.to_json())
    old = source.manifest
    calibration = {"method": "SmoothQuant with powers of two", **record}
    manifest = Manifest(
        old.config,
        {name: changed.get(name, folder) for name, folder in old.folders.items()},
        old.tokenizer,
        {**old.source, "calibration": calibration},
        {**old.versions, **tool_versions()},
    )
    for folder in (partial / WEIGHTS).iterdir():
        sync(folder)
    write_json(partial / MANIFEST, manifest.to_json())
