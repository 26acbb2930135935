"""How many of a checkpoint's weights fit on a device beside the work that is done there, and bringing them onto it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax.numpy as jnp
from jaxtyping import Array

from aot_cache.target import Device
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.checkpoint_format import EMBEDDING, NORMS
from elastic_jax.config import ModelConfig
from elastic_jax.errors import MemoryPlanError
from elastic_jax.groups import LM_HEAD, layer_groups, model_groups
from elastic_jax.memory import available_memory, gib
from elastic_jax.plan import PRECISIONS, Precision, provisional_plans
from elastic_jax.quantization import QArray
from elastic_jax.search.distances import KEPT_BYTES, head_tokens
from elastic_jax.search.held import AllHeld, Held, Key, PartlyHeld
from elastic_jax.step import ComputeDtype
from elastic_jax.weights import as_floats, load_weights, norm_weights

_CODE = 512 << 20
"""Compiled pieces, and what an allocator loses between arrays."""


def float_type(device: Device) -> ComputeDtype:
    """Type of float weights in measurements: a CPU multiplies float32 faster."""
    return "float32" if device.platform == "cpu" else "bfloat16"


def weight_sizes(config: ModelConfig, device: Device, precisions: Sequence[Precision]) -> dict[Key, int]:
    """Bytes on a device of each weight in each precision, by its name in `Weights`; a tied head is the embedding."""
    item = jnp.dtype(float_type(device)).itemsize
    sizes: dict[Key, int] = {(EMBEDDING, "bf16"): item * config.vocab_size * config.hidden_size}
    for name, group in model_groups(config).items():
        if "bf16" in precisions and not (name == LM_HEAD and config.tie_word_embeddings):
            sizes[name, "bf16"] = item * group.parameters
        if "int8" in precisions:
            sizes[name, "int8"] = group.parameters + 4 * group.out_size
    for name in _norms(config):
        sizes[name, "bf16"] = item * config.hidden_size
    return sizes


def _norms(config: ModelConfig) -> list[str]:
    layers = [f"layers.{n}.{norm}" for n in range(config.num_layers) for norm in ("attention_norm", "mlp_norm")]
    return [*layers, "final_norm"]


def searching_bytes(config: ModelConfig, windows: int, length: int, platform: str) -> int:
    """What measuring plans, or scoring in one pass, takes on a device beside the weights: an estimate, rather too high.

    The widest product in 32 bits a few times, attention's scores, logits of a part of the tokens, what is kept of the
    original's, and the residual streams before all layers, which one pass keeps. For four windows of 1024 tokens of
    Mistral-Small this is 12.2 GiB; `benches/search_24b.py` measured 10.4 beside the weights (jax 0.11.2, H100).

    Args:
        config: the model.
        windows: that run at the same time on the device.
        length: tokens of each.
        platform: the device's.
    """
    tokens = windows * length
    widest = max(group.out_size for group in layer_groups(config, 0))
    streams = 4 * (config.num_layers + 8) * tokens * config.hidden_size
    products = 4 * 6 * tokens * widest + 4 * 4 * windows * config.num_heads * length**2
    logits = 4 * 10 * min(tokens, head_tokens(platform)) * config.vocab_size
    known = 4 * tokens * config.vocab_size
    kept = 3 * known if known <= KEPT_BYTES else 0
    return streams + max(products, logits) + kept + _CODE


def calibrating_bytes(config: ModelConfig, windows: int, length: int, *, compensated: bool) -> int:
    """What calibration takes on a device beside the weights: an estimate, rather too high.

    Inputs of a layer's groups, the widest product in 32 bits a few times, a group's weight in float32 as often; with
    compensated rounding also the correlations of its inputs and their factors.

    Args:
        config: the model.
        windows: of text.
        length: tokens of each.
        compensated: whether errors of rounding are.
    """
    tokens, groups = windows * length, list(layer_groups(config, 0))
    inputs = 4 * 3 * tokens * sum(group.in_size for group in groups)
    products = 4 * 6 * tokens * max(group.out_size for group in groups)
    scores = 4 * 4 * windows * config.num_heads * length**2
    weight = 4 * 5 * max(group.parameters for group in groups)
    correlations = 4 * 6 * max(group.in_size for group in groups) ** 2 if compensated else 0
    return inputs + products + scores + weight + correlations + _CODE


@dataclasses.dataclass(frozen=True)
class Room:
    """What there is for weights on one device. Made by `of`, which refuses what cannot work.

    Attributes:
        sizes: bytes of every weight in the precisions that are read.
        always: the weights that are on the device all the time.
        layer: bytes of the largest part that must be there at once: a layer in all precisions, or one large weight.
        available: bytes that are free; None if the device does not say.
        beside: bytes of it for everything but weights.
        once: whether the work reads every weight just once.
    """

    sizes: Mapping[Key, int]
    always: Sequence[Key]
    layer: int
    available: int | None
    beside: int
    once: bool

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        device: Device,
        *,
        beside: int,
        precisions: Sequence[Precision] = PRECISIONS,
        once: bool = False,
        sharing: int = 1,
        available: int | None = None,
    ) -> Self:
        """Plans the memory of a device.

        Args:
            config: the model.
            device: where it runs.
            beside: bytes for everything but weights (`searching_bytes`, `calibrating_bytes`).
            precisions: that the work reads.
            once: whether it reads every weight just once.
            sharing: devices that are parts of the same memory and each hold weights: a host's CPU devices.
            available: bytes to plan with; None asks the device what is free.

        Raises:
            MemoryPlanError: there is no room for one layer beside what is always needed.
        """
        sizes = weight_sizes(config, device, precisions)
        head = EMBEDDING if config.tie_word_embeddings else LM_HEAD
        always: list[Key] = [(name, "bf16") for name in (head, *_norms(config))]
        whole: dict[str, int] = {}
        for key in sizes.keys() - set(always):
            part = key[0].rsplit(".", 1)[0] if key[0].startswith("layers.") else "/".join(key)
            whole[part] = whole.get(part, 0) + sizes[key]
        if device.platform == "cpu":  # as a weight becomes float32 it is there twice
            beside += 2 * max(sizes.values())
        if available is None and (available := available_memory(device)) is not None:
            available //= sharing
        room = cls(sizes, always, max(whole.values()), available, beside, once)
        least = room.fixed + room.layer
        if room.available is not None and least + beside > room.available:
            raise MemoryPlanError(
                f"{device.device_kind}: {gib(room.available)} are free, and at least {gib(least + beside)} are needed: "
                f"{gib(least)} for one layer of weights in {' and '.join(precisions)} and what is used all the time, "
                f"{gib(beside)} for activations. Give fewer or shorter windows (--windows, --length), or a larger "
                "share of the memory (XLA_PYTHON_CLIENT_MEM_FRACTION on a GPU)"
            )
        return room

    @property
    def fixed(self) -> int:
        """Bytes of what is always there."""
        return sum(self.sizes[key] for key in self.always)

    @property
    def budget(self) -> int | None:
        """Bytes for weights, or None for any number."""
        return None if self.available is None else self.available - self.beside

    @property
    def everything(self) -> bool:
        """Whether all weights fit at the same time."""
        return self.budget is None or sum(self.sizes.values()) <= self.budget

    @property
    def passing(self) -> int:
        """Bytes for weights that come and go: two layers, so that one is read while the other is computed."""
        return 2 * self.layer if self.budget is None else min(2 * self.layer, self.budget - self.fixed)

    def message(self) -> str | None:
        """What does not fit, how much is read again and what that means, for people; None where everything fits."""
        if self.available is None or self.budget is None or self.everything:
            return None
        whole = {p: sum(n for (_, q), n in self.sizes.items() if q == p) for p in PRECISIONS}
        stay = self.budget - self.passing
        named = [p for p in PRECISIONS if whole[p]]
        found = (
            f"{' and '.join(f'{gib(whole[p])} of {p}' for p in named)} weights do not fit into {gib(self.available)} "
            f"with {gib(self.beside)} for activations: up to {gib(stay)} stay on the device, the others are read from "
            "the checkpoint whenever they are needed"
        )
        if self.once:
            return f"{found}, each once"
        # The head is needed in bf16 whatever the precision of the layers.
        again = {p: max(0, whole[p] - stay + (self.fixed if p == "int8" else 0)) for p in named}
        return (
            f"{found}: {' and '.join(f'{gib(again[p])} in each pass of {p}' for p in named)}, and a measured group in "
            "the other precision. This is slower than a device that holds everything"
        )


def held_weights(checkpoint: Checkpoint, device: Device, workers: int, room: Room | None) -> Held:
    """A checkpoint's weights: all on the device if there is room, else as many as there is room for.

    Args:
        checkpoint: its weights.
        device: where they go.
        workers: threads that read them.
        room: what fits; None for everything in both precisions.

    Raises:
        CheckpointError: a precision is not stored, or is damaged.
    """
    dtype = float_type(device)
    plans = provisional_plans(checkpoint.config)
    both = room is None or any(precision == "int8" for _, precision in room.sizes)
    if room is None or room.budget is None or room.everything:
        floats = load_weights(checkpoint, plans["XL"], dtype, device, workers=workers, progress=None)
        if not both:
            return AllHeld(floats, {})
        integers = load_weights(checkpoint, plans["L"], dtype, device, workers=workers, progress=None)
        return AllHeld(floats, {name: weight for name, weight in integers.items() if isinstance(weight, QArray)})
    for name in ("XL", "L") if both else ("XL",):
        checkpoint.folders(plans[name])  # raises where something is not stored
    read = _reader(checkpoint, dtype, device, workers)
    norms = checkpoint.restore([(NORMS, "bf16")], device, workers)[NORMS, "bf16"]
    by_name = norm_weights(checkpoint.config, norms, dtype, device)
    always = {key: by_name[key[0]] if key[0] in by_name else read(key) for key in room.always}
    if checkpoint.config.tie_word_embeddings:
        always[LM_HEAD, "bf16"] = always[EMBEDDING, "bf16"]
    return PartlyHeld(room.sizes, read, budget=room.budget, fixed=room.fixed, always=always, passing=room.passing)


def _reader(checkpoint: Checkpoint, dtype: ComputeDtype, device: Device, workers: int) -> Callable[[Key], Any]:
    def read(key: Key) -> Array | QArray:
        stored = checkpoint.restore([key], device, workers)[key]
        if key[1] == "int8":
            return QArray(stored["values"], stored["scales"], "a16")
        return as_floats(stored["values"], dtype, device)

    return read
