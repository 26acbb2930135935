"""What a model takes before anything of it is downloaded or converted: disk, memory by mode, and context that fits."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from aot_cache import target_config
from aot_cache.targets import Description, find
from converters.config import parse_config
from converters.gguf_file import open_gguf
from converters.huggingface import CONFIG, read_json
from converters.units import conversion_units
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.checkpoint_format import MANIFEST
from elastic_jax.config import ModelConfig
from elastic_jax.device import default_device
from elastic_jax.errors import CheckpointError, ConfigError, ConversionError
from elastic_jax.executables import PAGE_SIZE, default_step_config
from elastic_jax.hub_id import is_hub_id
from elastic_jax.kv_cache import KvPrecision
from elastic_jax.memory import JAX_FRACTION, available_memory, estimated_workspace, plan_memory
from elastic_jax.plan import Plan, provisional_plans
from elastic_jax.pools import CPU_SLOTS
from elastic_jax.search.workload import Workload
from elastic_jax.step import ComputeDtype, StepConfig
from elastic_jax.time_estimates import estimate_times, measured_reading
from elastic_jax.weights import abstract_weights, weight_bytes


@dataclasses.dataclass(frozen=True)
class Described:
    """A model whose weights need not be here.

    Attributes:
        config: its configuration.
        plans: its modes; those that every conversion gets, where it is not converted yet.
        download: bytes that would be downloaded for converting it; 0 for what is local.
    """

    config: ModelConfig
    plans: list[Plan]
    download: int


def describe_model(source: str, *, revision: str | None, token: str | None) -> Described:
    """Finds out about a model without its weights: of a Hub id only its configuration is fetched.

    Args:
        source: an Elastic checkpoint, a Hugging Face folder, a .gguf file, or a Hub id of either of the former.
        revision: branch, tag or commit of a Hub id.
        token: for private repositories.

    Raises:
        ConfigError: the configuration asks for what is not implemented.
        ConversionError, CheckpointError, HubError: there is no such model, or it cannot be read.
    """
    path = Path(source)
    if not path.exists() and is_hub_id(source):
        return _describe_remote(source, revision, token)
    if revision is not None:
        raise CheckpointError(f"revision {revision!r} was asked for, but {source} is no Hub id: leave it out")
    if path.is_file() and path.suffix == ".gguf":
        config = open_gguf(path).config
    elif (path / MANIFEST).is_file():
        checkpoint = Checkpoint.read(path)
        return Described(checkpoint.config, list(checkpoint.plans().values()), 0)
    elif (path / CONFIG).is_file():
        config = _read_config(path)
    else:
        raise ConversionError(
            f"{source} is no Elastic checkpoint, Hugging Face folder (with {CONFIG}), .gguf file, or Hub id owner/name:"
            " check the path"
        )
    return Described(config, list(provisional_plans(config).values()), 0)


def _describe_remote(repository: str, revision: str | None, token: str | None) -> Described:
    from converters.hub import resolve
    from elastic_jax import hub_access
    from elastic_jax.hub_load import fetch_description

    snapshot = hub_access.resolve(repository, revision=revision, token=token)
    if snapshot.files is not None and MANIFEST in snapshot.files:
        checkpoint = fetch_description(repository, revision=revision, token=token)
        return Described(checkpoint.config, list(checkpoint.plans().values()), 0)
    model = resolve(repository, revision=revision, token=token)
    folder = snapshot.download([CONFIG], token)
    if not (folder / CONFIG).is_file():
        raise ConversionError(f"the Hub's cache holds no {CONFIG} of {repository}: run without --offline")
    config = _read_config(folder)
    files = snapshot.files or {}
    download = sum(files.get(name, 0) for name in model.files)
    return Described(config, list(provisional_plans(config).values()), download)


def _read_config(folder: Path) -> ModelConfig:
    values = read_json(folder / CONFIG)
    text = values.get("text_config") if isinstance(values.get("text_config"), dict) else values
    tied = bool((text or {}).get("tie_word_embeddings", values.get("tie_word_embeddings", False)))
    return parse_config(values, None, lm_head_stored=not tied, source=str(folder / CONFIG))


def checkpoint_bytes(config: ModelConfig) -> int:
    """Bytes of the weights of an Elastic checkpoint in both precisions."""
    return sum(unit.output_bytes(config) for unit in conversion_units(config, None))


@dataclasses.dataclass(frozen=True)
class Place:
    """A device that a model is planned for.

    Attributes:
        name: for people.
        platform: `cpu` or `gpu`.
        available: bytes that can be allocated; None if it does not say.
        bandwidth: bytes a second of its memory: a GPU's by its maker, a CPU's as measured; None if not known.
        description: of a GPU; times are predicted from it.
    """

    name: str
    platform: str
    available: int | None
    bandwidth: int | None
    description: Description | None = None


def place(target: str | None) -> Place:
    """The device at hand, or the GPU of that description, which need not be here; nor does JAX's plugin for it.

    Raises:
        ConfigError: JAX cannot use the platform that it was told to use.
        ExecutableError: there is no such target.
    """
    if target is None:
        device = default_device()
        available = available_memory(device)
        if device.platform != "gpu":
            return Place(device.device_kind, device.platform, available, round(measured_reading()))
        here = Description.of(device)
        return Place(device.device_kind, device.platform, available, _bandwidth(here.config), here)
    description = find(target)
    config = description.config
    memory = target_config.memory_bytes(config, source=f"target {target}")
    kind = target_config.device_kind(config, source=f"target {target}")
    return Place(kind, "gpu", int(JAX_FRACTION * memory), _bandwidth(config), description)


def _bandwidth(config: str) -> int | None:
    found = re.search(r"\bmemory_bandwidth:\s*(\d+)", config)
    return int(found[1]) if found else None


def size_mode(
    config: ModelConfig,
    plan: Plan,
    where: Place,
    dtype: ComputeDtype,
    *,
    max_context: int | None,
    kv: KvPrecision = "full",
    workload: Workload | None = None,
) -> dict[str, Any]:
    """What one mode takes on a device, JSON-ready; bytes, and tokens.

    `kv_tokens` is the largest KV pool that fits beside the weights, `decode_tokens_per_second_at_most` what reading
    the weights once a token allows for one sequence; the measured rate is lower. `estimate` is what a workload takes
    (`TimeEstimate`); None where nothing is predicted.

    Args:
        config: the model.
        plan: the mode's.
        where: the device.
        dtype: compute type.
        max_context: longest context in tokens, or None.
        kv: precision of the KV cache.
        workload: what times are estimated for, or None.

    Raises:
        ConfigError: the sizes contradict each other.
    """
    step = default_step_config(
        config, where.platform, dtype, kv_slots=max(CPU_SLOTS, max_context or 1), max_context=max_context, kv=kv
    )
    weights = abstract_weights(config, plan, dtype)
    memory = plan_memory(config, weights, step, [estimated_workspace(config, step)])
    available = where.available
    tokens = None
    if available is not None:
        tokens = max(0, (available - memory.weights - memory.rows - memory.workspace) // memory.kv_token)
        tokens -= tokens % PAGE_SIZE
    read = weight_bytes(weights) - weight_bytes({"embedding": weights["embedding"]})
    if config.tie_word_embeddings and "lm_head" not in weights:
        read = weight_bytes(weights)  # the embedding is the head, and is read whole
    return {
        "mode": plan.name,
        "provisional": plan.provisional,
        "weight_bytes": memory.weights,
        "row_bytes": memory.rows,
        "workspace_bytes": memory.workspace,
        "kv_bytes_per_token": memory.kv_token,
        "available_bytes": available,
        "fits": available is None or (tokens is not None and tokens >= max(PAGE_SIZE, max_context or 1)),
        "kv_tokens": tokens,
        "decode_tokens_per_second_at_most": round(where.bandwidth / read, 1) if where.bandwidth else None,
        "estimate": _estimate(config, plan, where, workload, step),
    }


def _estimate(
    config: ModelConfig, plan: Plan, where: Place, workload: Workload | None, step: StepConfig
) -> dict[str, float] | None:
    if where.description is None or workload is None:
        return None
    try:
        return dataclasses.asdict(estimate_times(config, plan, workload, where.description, step))
    except ConfigError:
        return None  # older than what is predicted; sizes are told all the same
