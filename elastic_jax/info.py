"""What a checkpoint holds, for people and as JSON; nothing is loaded."""

import shlex
from pathlib import Path
from typing import Any

from aot_cache.manifest import read_manifest
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.errors import ElasticError
from elastic_jax.executables import store_folders
from elastic_jax.hub_id import is_remote, refuse_revision
from elastic_jax.memory import gib


def describe(path: Path) -> dict[str, Any]:
    """Model, modes and executables of a checkpoint, JSON-ready.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    return describe_opened(Checkpoint.open(path), str(path))


def open_described(name: str, *, revision: str | None, token: str | None) -> Checkpoint:
    """A checkpoint to be described: a folder, or one on the Hub, of which no weights and no executables are fetched.

    Raises:
        HubError: the repository cannot be had.
        CheckpointError: there is no complete Elastic checkpoint, or a revision was asked for of a folder.
    """
    if not is_remote(name):
        refuse_revision(name, revision)
        return Checkpoint.open(Path(name))
    from elastic_jax.hub_load import fetch_description  # the Hub's client takes long to import

    return fetch_description(name, revision=revision, token=token)


def describe_opened(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """What `describe` gives, of a checkpoint that is open, under its own name."""
    modes = []
    for plan in checkpoint.plans().values():
        try:
            size: int | None = checkpoint.weight_bytes(plan)
        except ElasticError:
            size = None  # converted with --only
        modes.append(
            {
                "mode": plan.name,
                "weight_bytes": size,
                "choices": plan.counts(),
                "provisional": plan.provisional,
                "note": plan.note,
                "promise": plan.measured.get("promise"),
            }
        )
    return {
        "path": name,
        "model": checkpoint.config.to_json(),
        "source": dict(checkpoint.manifest.source),
        "modes": modes,
        "executables": [_describe_store(folder) for folder in store_folders(checkpoint.path)],
    }


def _describe_store(folder: Path) -> dict[str, Any]:
    """What a store says of itself; `problem` if it says nothing readable."""
    described: dict[str, Any] = {
        "target": folder.parent.parent.name,
        "mode": folder.parent.name,
        "pool": folder.name,
        "problem": None,
    }
    try:
        manifest = read_manifest(folder, hint="Compile it again")
        return described | {
            "units": len(manifest.units),
            "bytes": sum(record.size for record in manifest.units.values()),
            **{name: manifest.identity[name] for name in ("jax", "dtype", "kv", "kv_slots", "max_context")},
        }
    except KeyError as error:
        return described | {"problem": f"{folder}: its manifest does not name {error}. Compile it again"}
    except ElasticError as error:
        return described | {"problem": str(error)}


def _promise(mode: str, promise: dict[str, Any]) -> str:
    """A mode's promise, whether it is certified, and on which items."""
    told = f"{mode} promises to lose less than {100 * promise['largest_loss']:.3g} %: {promise['status']}"
    if promise.get("items"):
        told += f" on {promise['n']} items of {', '.join(promise['items'])}"
    if promise.get("loss_upper95") is not None:
        told += (
            f", measured loss {100 * promise['loss']:.2f} %, below {100 * promise['loss_upper95']:.2f} % with 95 % "
            "confidence"
        )
    return told + (f" ({promise['why_not']})" if promise.get("why_not") else "")


def render(info: dict[str, Any]) -> str:
    """The same as text."""
    model = info["model"]
    lines = [
        f"{info['path']}: {model['num_layers']} layers, hidden {model['hidden_size']}, {model['num_heads']} heads "
        f"({model['num_kv_heads']} KV), vocabulary {model['vocab_size']}, context {model['max_position_embeddings']}",
        "",
        "mode  weights     groups",
    ]
    for mode in info["modes"]:
        size = gib(mode["weight_bytes"]) if mode["weight_bytes"] is not None else "not stored"
        groups = ", ".join(f"{count} {choice}" for choice, count in mode["choices"].items())
        mark = "  (provisional)" if mode["provisional"] else ""
        lines.append(f"{mode['mode']:5s} {size:11s} {groups}{mark}")
    notes = {mode["note"] if mode["provisional"] else f"{mode['mode']}: {mode['note']}" for mode in info["modes"]}
    lines += ["", *sorted(notes)] if notes else []
    lines += [_promise(mode["mode"], mode["promise"]) for mode in info["modes"] if mode["promise"]]
    lines.append("")
    if not info["executables"]:
        compiling = f"compile with `elastic-jax compile {shlex.quote(info['path'])}`"
        lines.append(f"no executables: {'loading compiles them' if is_remote(info['path']) else compiling}")
    for store in info["executables"]:
        if store["problem"]:
            lines.append(f"executables for {store['target']}, mode {store['mode']}: {store['problem']}")
            continue
        lines.append(
            f"executables for {store['target']}, mode {store['mode']}: {store['units']} units, "
            f"{store['bytes'] / 1e6:.1f} MB, context up to {store['max_context']}, "
            f"KV pool of {store['kv_slots']} tokens, jax {store['jax']}"
        )
    return "\n".join(lines)
