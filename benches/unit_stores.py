"""Units of one mode in several stores, so that a command compiles only what no command before it has compiled.

`elastic-jax compile` makes one store of all units, which takes minutes for a large model. Here every command adds a
store of the units that were missing. A store made from other sources, for other sizes or by other versions is deleted:
its identity says so.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aot_cache.compiler import Progress, compile_units
from aot_cache.identity import CompilerOptions
from aot_cache.manifest import UnitRecord, read_manifest
from aot_cache.store import Executable, full_identity, load, verify
from aot_cache.target import Target
from aot_cache.unit import Unit
from elastic_jax import kernels
from elastic_jax.config import ModelConfig
from elastic_jax.plan import Plan
from elastic_jax.step import StepConfig
from elastic_jax.units import traced_source_digest


def identity_of(config: ModelConfig, plan: Plan, step: StepConfig) -> dict[str, Any]:
    """What must match, whatever buckets there are."""
    sizes = dataclasses.asdict(step)
    del sizes["buckets"]
    hashes = {"plan_hash": plan.digest(), "config_hash": config.digest(), "source_hash": traced_source_digest()}
    return sizes | hashes


def compile_missing(
    units: Sequence[Unit],
    folder: Path,
    identity: dict[str, Any],
    device: Any,
    *,
    workers: int,
    options: CompilerOptions,
    progress: Progress,
) -> dict[str, UnitRecord]:
    """Compiles the units that no store below `folder` has; returns the records of all of them."""
    current = full_identity(identity, Target.of(device), options)
    for store in _stores(folder):
        if verify(store, identity=current):
            shutil.rmtree(store)
    have = {name for store in _stores(folder) for name in read_manifest(store, hint="").units}
    missing = [unit for unit in units if unit.name not in have]
    if missing:
        number = max((int(store.name) for store in _stores(folder)), default=0) + 1
        compile_units(
            missing,
            folder / str(number),
            identity,
            device,
            workers=workers,
            progress=progress,
            compiler_options=options,
        )
    records = {
        name: record for store in _stores(folder) for name, record in read_manifest(store, hint="").units.items()
    }
    return {unit.name: records[unit.name] for unit in units}


def load_units(
    names: Sequence[str], folder: Path, identity: dict[str, Any], device: Any, *, workers: int
) -> dict[str, Executable]:
    """Loads units from the stores below `folder`; the bench made them itself, so they are trusted."""
    if device.platform == "gpu":
        kernels.prepare_to_load("pallas", "pallas", "cuda", "cuda")
    units: dict[str, Executable] = {}
    for store in _stores(folder):
        properties = {name: record.properties for name, record in read_manifest(store, hint="").units.items()}
        wanted = {name: value for name, value in properties.items() if name in names}
        if wanted:
            units |= load(
                store, identity, device, root=folder, units=wanted, trust=True, workers=workers, hint="", preload=True
            )
    if absent := sorted(set(names) - units.keys()):
        raise SystemExit(f"{folder} lacks {', '.join(absent)}: run without --no-compile")
    return units


def _stores(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("[0-9]*") if path.name.isdecimal()), key=lambda path: int(path.name))
