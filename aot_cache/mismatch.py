"""Comparing what executables were made for with what is here now, in words a user can act on."""

import json
from collections.abc import Mapping
from typing import Any

_MEANING = {
    "architecture": "the processor is of another kind, its machine code is another",
    "buckets": "the step is compiled for other numbers of rows and tokens",
    "compiler_options": "XLA was given other options",
    "compute_capability": "the GPU is of another generation",
    "config_hash": "the model's shape is another",
    "cuda": "the CUDA installed is older, or of another major version",
    "cudnn": "the cuDNN installed is older, or of another major version",
    "device_kind": "the device is of another kind",
    "dtype": "the compute type is another",
    "format": "the layout of stored executables has changed",
    "jax": "executables are only good for the JAX version that made them",
    "jax_options": "JAX is configured otherwise",
    "jaxlib": "executables are only good for the XLA (jaxlib) version that made them",
    "kv_slots": "the KV cache has another size",
    "mesh": "the devices are arranged otherwise",
    "package": "another version of elastic-jax made them",
    "plan_hash": "the plan computes some groups otherwise",
    "platform": "the device is of another kind",
    "plugins": "another CUDA plugin is installed",
    "processor_features": "the processor has other instructions",
    "rows": "the number of rows of the running batch is another",
    "source_hash": "the sources that are compiled have changed",
    "xla_flags": "XLA_FLAGS are others",
}
"""What a difference in a well-known key means; others are named without a sentence."""

_AT_LEAST = frozenset({"cuda", "cudnn"})
"""Versions that may be newer than those compiled for, within a major version: NVIDIA's libraries promise that much, and
XLA checks the same at load."""

_ABSENT = object()


def differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """One line for each key whose values do not fit, with both values; empty if all do.

    Values fit if they are equal as JSON, so a tuple fits the list it was stored as; versions of CUDA and cuDNN also if
    the current one is newer.
    """
    lines = []
    for key in sorted(stored.keys() | current.keys()):
        before, now = stored.get(key, _ABSENT), current.get(key, _ABSENT)
        if before is _ABSENT or now is _ABSENT or not _fits(key, before, now):
            meaning = f" ({_MEANING[key]})" if key in _MEANING else ""
            lines.append(f"{key}: {_contrast(before, now)}{meaning}")
    return lines


def _fits(key: str, before: Any, now: Any) -> bool:
    if key in _AT_LEAST and (least := _version(before)) and (found := _version(now)):
        return least[0] == found[0] and least <= found
    return _canonical(before) == _canonical(now)


def _version(value: Any) -> tuple[int, ...]:
    """The numbers of a version such as `9.12.0`; none if it is not one."""
    parts = value.split(".") if isinstance(value, str) else []
    return tuple(int(part) for part in parts) if all(part.isdecimal() for part in parts) else ()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _contrast(before: Any, now: Any) -> str:
    if isinstance(before, list | tuple) and isinstance(now, list | tuple):
        texts, others = [_show(item) for item in before], [_show(item) for item in now]
        removed = [text for text in texts if text not in others]
        added = [text for text in others if text not in texts]
        if removed or added:
            return (
                f"compiled with [{', '.join(removed)}] that are not here; here with [{', '.join(added)}] that were not"
            )
    return f"compiled for {_show(before)}, here {_show(now)}"


def _show(value: Any) -> str:
    if value is _ABSENT:
        return "nothing"
    return json.dumps(value, sort_keys=True)
