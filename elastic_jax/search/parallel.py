"""Windows spread over several forwards: one on each device, or one after another where a device cannot hold them all.

Every device has all weights and its own windows, so nothing is exchanged between them but the distances at the end.
Work is dispatched to all devices before any is waited for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from aot_cache.target import Device
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.config import ModelConfig
from elastic_jax.plan import Choice
from elastic_jax.search.distances import Distances
from elastic_jax.search.forward import Forward, Role
from elastic_jax.search.room import Room, searching_bytes

type Stream = Any
"""One residual stream, or a tuple of one a part."""


class Shards:
    """Forwards over parts of the windows, in order; what a `Forward` does, on tuples of streams.

    Args:
        parts: of one model and one length of windows.
    """

    def __init__(self, parts: Sequence[Forward]) -> None:
        self.parts = tuple(parts)
        self.config, self.dot_name = self.parts[0].config, self.parts[0].dot_name

    @property
    def windows(self) -> Int32[np.ndarray, "windows length"]:
        """Of all parts."""
        return np.concatenate([part.windows for part in self.parts])

    def over(self, windows: Int32[np.ndarray, "windows length"]) -> "Shards":
        """The same forwards over other text."""
        split = np.array_split(windows, min(len(self.parts), len(windows)))
        return Shards([part.over(own) for part, own in zip(self.parts, split, strict=False)])

    def compile(self, workers: int) -> None:
        """Compiles what the parts need, side by side; parts of one size on one device need the same.

        Args:
            workers: threads; each may need the memory of one group's output.
        """
        for part in {(part.device, part.shape): part for part in self.parts}.values():
            part.compile(workers)

    def embed(self) -> Stream:
        """The residual stream before the first layer."""
        return tuple(part.embed() for part in self.parts)

    def run(self, x: Stream, first: int, plan: Mapping[str, Choice], role: Role) -> Stream:
        """The residual stream after the last layer, from the one before layer `first` on."""
        for layer in range(first, self.config.num_layers):
            x = self.run_layer(x, layer, plan, role)
        return x

    def run_layer(self, x: Stream, layer: int, plan: Mapping[str, Choice], role: Role) -> Stream:
        """The residual stream after one layer of a plan."""
        return tuple(part.run_layer(own, layer, plan, role) for part, own in zip(self.parts, x, strict=True))

    def reference(self, stream: Stream) -> Any:
        """The original model's distributions, from its residual stream after the last layer."""
        return tuple(part.reference(own) for part, own in zip(self.parts, stream, strict=True))

    def compare(self, reference: Any, candidates: Sequence[Stream], head: Choice) -> Any:
        """Begins to compare candidates' last residual streams with the reference."""
        return tuple(
            part.compare(its, [candidate[number] for candidate in candidates], head)
            for number, (part, its) in enumerate(zip(self.parts, reference, strict=True))
        )

    def gather(self, reference: Any, found: Any) -> Distances:
        """What `compare` began, of all windows."""
        each = [part.gather(own, its) for part, own, its in zip(self.parts, reference, found, strict=True)]
        kl, flips, loss = (
            np.concatenate([getattr(one, name) for one in each], axis=1) for name in ("kl", "flips", "loss")
        )
        return Distances(kl, flips, loss)


type Forwards = Forward | Shards
"""Whatever runs windows through a model."""


def rooms(config: ModelConfig, shape: tuple[int, int], devices: Sequence[Device]) -> list[Room]:
    """What fits on each of the devices that windows are spread over.

    Args:
        config: the model.
        shape: the most windows that run, and tokens of each.
        devices: as for `load`.

    Raises:
        MemoryPlanError: a device has no room for one layer.
    """
    used = list(devices)[: shape[0]]
    beside = searching_bytes(config, -(-shape[0] // len(used)), shape[1], used[0].platform)
    sharing = len(used) if used[0].platform == "cpu" else 1
    return [Room.of(config, device, beside=beside, sharing=sharing) for device in used]


def load(
    checkpoint: Checkpoint,
    windows: Int32[np.ndarray, "windows length"],
    devices: Sequence[Device],
    workers: int,
    room: Sequence[Room] | None = None,
) -> Forwards:
    """A model on every device that gets a window, each with about as many windows as the others.

    Args:
        checkpoint: must hold every group in bf16 and in int8.
        windows: int32 [windows, length].
        devices: where they run.
        workers: threads that read weights.
        room: what fits on each device (`rooms`); None holds everything on each.

    Raises:
        CheckpointError: a precision is not stored, or is damaged.
    """
    each = [None] * len(devices) if room is None else room
    split = np.array_split(windows, min(len(devices), len(windows)))
    parts = [
        Forward.load(checkpoint, own, device, workers, its)
        for own, device, its in zip(split, devices, each, strict=False)
    ]
    return parts[0] if len(devices) == 1 else Shards(parts)
