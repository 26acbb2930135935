"""The model one layer at a time, over windows of text: what calibration and search measure with.

Layers are all of one shape, so one compiled unit serves a kind of group at one choice in all layers and plans, and a
measurement runs only the layers from the one that it changes on. The residual stream and attention are
float32 and `bf16` products have activations of 16 bits or more (`products.exact`): bfloat16's own rounding, which every
mode has, would hide what a single group adds.
"""

import copy
import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from aot_cache.target import Device
from elastic_jax import kernels
from elastic_jax.batch import TokenBatch
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.checkpoint_format import EMBEDDING
from elastic_jax.config import ModelConfig
from elastic_jax.groups import LM_HEAD
from elastic_jax.model import MLP, Dot, SelfAttention, rotate, rotation
from elastic_jax.norm import RMSNorm
from elastic_jax.plan import CHOICES, PRECISIONS, Choice, Precision, stored_precision
from elastic_jax.search.distances import Distances, Head, Reference, head_tokens
from elastic_jax.search.held import Held, Key
from elastic_jax.search.products import product
from elastic_jax.search.room import Room, held_weights
from elastic_jax.weights import PROMPT_ACTIVATIONS

Role = Literal["prompt", "generated"]
"""Whose arithmetic all tokens of a window are computed in."""

ROLES: tuple[Role, ...] = ("prompt", "generated")

KINDS = ("qkv", "o", "gate_up", "down")
"""The groups of a layer, in the order they are computed."""

HALVES = {"attention": ("attention_norm", KINDS[:2]), "mlp": ("mlp_norm", KINDS[2:])}
"""The halves of a layer -> the norm and the groups of each."""

_PAGE = 64


class Forward:
    """A model with all its precisions, and windows of text to run through it on a device.

    Args:
        config: the model's.
        weights: gives its weights, on the device.
        windows: int32 [windows, length], token ids; each window is a text of its own.
        device: where everything is, and runs.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Held,
        windows: Int32[np.ndarray, "windows length"],
        device: Device,
    ) -> None:
        self.config = config
        self.windows = windows
        self._weights, self.device = weights, device
        self.dot_name = kernels.default_names(config, device.platform, "float32")[1]

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        windows: Int32[np.ndarray, "windows length"],
        device: Device,
        workers: int,
        room: Room | None = None,
    ) -> "Forward":
        """A checkpoint's weights: floats as float32 on a CPU, which multiplies them faster, else as bfloat16.

        Args:
            checkpoint: must hold every group in bf16 and in int8, unless `room` is for bf16 alone.
            windows: int32 [windows, length].
            device: where everything runs.
            workers: threads that read weights.
            room: what fits on the device; None holds everything there.

        Raises:
            CheckpointError: a precision is not stored, or is damaged.
            MemoryPlanError: not even one layer fits.
        """
        return cls(checkpoint.config, held_weights(checkpoint, device, workers, room), windows, device)

    def over(self, windows: Int32[np.ndarray, "windows length"]) -> "Forward":
        """The same model and device over other text; weights are shared."""
        other = copy.copy(self)
        other.windows = windows
        return other

    def weight(self, group: str, choice: Choice) -> Any:
        """A group's weight as a choice reads it: a float matrix, a `QArray`, or a `Rounded`."""
        weight = self._weights.get(group, stored_precision(choice))
        if choice == "bf16":
            return weight
        return dataclasses.replace(weight, prompt_activations=PROMPT_ACTIVATIONS[choice])

    def norm(self, name: str) -> Array:
        """A norm's weight by its name in `Weights`."""
        return self._weights.get(name, "bf16")

    def expect(self, layer: int, choices: Iterable[Choice]) -> None:
        """Says that a layer's groups come next, each by every one of `choices`: they may be read meanwhile."""
        if 0 <= layer < self.config.num_layers:
            wanted = {stored_precision(choice) for choice in choices}
            precisions: list[Precision] = [each for each in PRECISIONS if each in wanted]
            keys: list[Key] = [(f"layers.{layer}.{kind}", each) for kind in KINDS for each in precisions]
            self._weights.expect(keys)

    def used_by(self, result: Array) -> None:
        """Says that what makes `result` is the last to use the weights that were asked for: they may go after it."""
        self._weights.used_by(result)

    def half_weights(self, half: str, layer: int) -> dict[str, Any]:
        """The norm and the float matrices of half a layer, by name and kind."""
        norm, kinds = HALVES[half]
        weights = {kind: self.weight(f"layers.{layer}.{kind}", "bf16") for kind in kinds}
        return weights | {norm: self.norm(f"layers.{layer}.{norm}")}

    @property
    def shape(self) -> tuple[int, int]:
        """Windows, and tokens of each."""
        return self.windows.shape

    def embed(self) -> Float32[Array, "tokens hidden"]:
        """The residual stream before the first layer."""
        x = _embed(self._weights.get(EMBEDDING, "bf16"), jax.device_put(self.windows.reshape(-1), self.device))
        self.used_by(x)
        return x

    def compile(self, workers: int) -> None:
        """Compiles every kind of group at every choice, side by side; otherwise each is when it is first used.

        Args:
            workers: threads; each may need the memory of one group's output.
        """
        tokens = self.windows.size
        x, heads, wide = (
            jnp.zeros((tokens, size), jnp.float32, device=self.device)
            for size in (
                self.config.hidden_size,
                self.config.q_size + 2 * self.config.kv_size,
                self.config.intermediate_size,
            )
        )
        given = {"qkv": None, "o": heads, "gate_up": None, "down": wide}
        norms = {kinds[0]: self.norm(f"layers.0.{norm}") for norm, kinds in HALVES.values()}
        settings = (self.config, self.shape, self.dot_name)

        def run(kind: str, weight: Any) -> Array:
            return _piece(x, given[kind], norms.get(kind), weight, kind, *settings, capture=False)[0]

        with ThreadPoolExecutor(workers) as pool:
            # Weights that come and go are for one thread: this one.
            runs = [
                pool.submit(run, kind, self.weight(f"layers.0.{kind}", choice)) for choice in CHOICES for kind in KINDS
            ]
            for done in runs:
                self.used_by(done.result().block_until_ready())

    def layer(
        self, x: Float32[Array, "tokens hidden"], layer: int, choices: Sequence[Choice], role: Role
    ) -> Float32[Array, "tokens hidden"]:
        """The residual stream after one layer, whose four groups are computed by `choices`."""
        return self._run(x, layer, choices, role, capture=False)[0]

    def inputs(
        self, x: Float32[Array, "tokens hidden"], layer: int
    ) -> tuple[Float32[Array, "tokens hidden"], dict[str, Float32[Array, "tokens in"]]]:
        """The residual stream after one layer of the original model, and the input of each of its groups by kind."""
        out, captured = self._run(x, layer, ("bf16",) * 4, "prompt", capture=True)
        self.expect(layer + 1, ("bf16",))
        return out, dict(zip(KINDS, captured, strict=True))

    def _run(
        self, x: Array, layer: int, choices: Sequence[Choice], role: Role, *, capture: bool
    ) -> tuple[Array, tuple[Array, ...]]:
        captured: tuple[Array, ...] = ()
        settings = (self.config, self.shape, self.dot_name)
        norms = {kinds[0]: self.norm(f"layers.{layer}.{norm}") for norm, kinds in HALVES.values()}
        given: Array | None = None
        for kind, choice in zip(KINDS, choices, strict=True):
            # To a generated token all int8 choices are one, and it is what prompt tokens have in `w8a16`.
            same: Choice = "w8a16" if role == "generated" and choice != "bf16" else choice
            # No variable keeps the weight: it may have to go before the next one comes.
            out, read = _piece(
                x,
                given,
                norms.get(kind),
                self.weight(f"layers.{layer}.{kind}", same),
                kind,
                *settings,
                capture=capture,
            )
            self.used_by(out)
            x, given = (out, None) if given is not None else (x, out)
            captured += read
        return x, captured

    def run(
        self, x: Float32[Array, "tokens hidden"], first: int, plan: Mapping[str, Choice], role: Role
    ) -> Float32[Array, "tokens hidden"]:
        """The residual stream after the last layer, from the one before layer `first` on."""
        for layer in range(first, self.config.num_layers):
            x = self.run_layer(x, layer, plan, role)
        return x

    def run_layer(
        self, x: Float32[Array, "tokens hidden"], layer: int, plan: Mapping[str, Choice], role: Role
    ) -> Float32[Array, "tokens hidden"]:
        """The residual stream after one layer of a plan, whose next one is expected to follow."""
        x = self.layer(x, layer, layer_choices(plan, layer), role)
        if layer + 1 < self.config.num_layers:
            names = [f"layers.{layer + 1}.{kind}" for kind in KINDS]
            keys: list[Key] = [(name, stored_precision(plan[name])) for name in names]
            self._weights.expect(keys)
        return x

    def reference(self, stream: Float32[Array, "tokens hidden"]) -> Reference:
        """The original model's distributions, from its residual stream after the last layer."""
        return Reference(stream, self.windows, self.head)

    @property
    def head(self) -> Head:
        """What makes logits of the original model."""
        tokens = head_tokens(self.device.platform)
        return Head(
            self.norm("final_norm"), self.weight(LM_HEAD, "bf16"), self.config.rms_norm_eps, self.dot_name, tokens
        )

    def compare(self, reference: Reference, candidates: Sequence[Array], head: Choice) -> Any:
        """Begins to compare candidates' last residual streams with the reference; `gather` waits for the result.

        Args:
            reference: of the original model.
            candidates: float32 [tokens, hidden] each.
            head: the candidates' choice for the language-model head.
        """
        found = reference.compare(candidates, self.weight(LM_HEAD, head))
        self.used_by(found[0])
        return found

    def gather(self, reference: Reference, found: Any) -> Distances:
        """What `compare` began."""
        return reference.gather(found)


def layer_choices(plan: Mapping[str, Choice], layer: int) -> tuple[Choice, ...]:
    """A plan's choices for one layer, in the order of `KINDS`."""
    return tuple(plan[f"layers.{layer}.{kind}"] for kind in KINDS)


@jax.jit
def _embed(embedding: Array, tokens: Array) -> Array:
    return embedding.at[tokens].get(mode="clip").astype(jnp.float32)


def _batch(shape: tuple[int, int], generated: int) -> TokenBatch:
    windows, length = shape
    pages = -(-length // _PAGE)
    row = jnp.repeat(jnp.arange(windows, dtype=jnp.int32), length)
    position = jnp.tile(jnp.arange(length, dtype=jnp.int32), windows)
    return TokenBatch(
        row=row,
        position=position,
        slot=row * (pages * _PAGE) + position,
        block_table=jnp.arange(windows * pages, dtype=jnp.int32).reshape(windows, pages),
        context_length=jnp.full(windows, length, jnp.int32),
        generated=generated,
        page_size=_PAGE,
    )


def attend(
    query: Float32[Array, "tokens heads dim"],
    keys: Float32[Array, "tokens kv_heads dim"],
    values: Float32[Array, "tokens kv_heads dim"],
    shape: tuple[int, int],
) -> Float32[Array, "tokens heads dim"]:
    """Causal attention within windows that are all of one length, from dense products, which can be differentiated."""
    (windows, length), (tokens, heads, dim) = shape, query.shape
    keys, values = (each.reshape(windows, length, -1, dim) for each in (keys, values))
    grouped = query.reshape(windows, length, keys.shape[2], -1, dim)
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("wlhgd,wmhd->whglm", grouped, keys, precision=highest) / np.float32(np.sqrt(dim))
    visible = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(visible[None, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("whglm,wmhd->wlhgd", weights, values, precision=highest).reshape(tokens, heads, dim)


def run_half(
    x: Array,
    weights: Mapping[str, Any],
    half: str,
    config: ModelConfig,
    shape: tuple[int, int],
    dot: Dot,
) -> Array:
    """The residual stream of prompt tokens after attention or MLP, by the model's own modules."""
    batch = _batch(shape, 0)

    def attention(query: Array, kv: Array, batch: TokenBatch) -> Array:
        pages = kv.reshape(batch.rows, -1, *kv.shape[1:])[:, : shape[1]]
        keys, values = (pages[:, :, n].reshape(-1, *kv.shape[2:]) for n in range(2))
        return attend(query, keys, values, shape)

    norm = RMSNorm(weights[HALVES[half][0]], config.rms_norm_eps)
    if half == "attention":
        slots = batch.block_table.size * _PAGE
        cache = jnp.zeros((slots, 2, config.num_kv_heads, config.head_dim), jnp.float32)
        angles = rotation(batch.position, config.head_dim, config.rope_theta)
        return SelfAttention(config, weights["qkv"], weights["o"], attention, dot)(x, norm, angles, cache, batch)[0]
    return MLP(weights["gate_up"], weights["down"], dot)(x, norm, generated=batch.generated)


@functools.partial(jax.jit, static_argnames=("kind", "config", "shape", "dot_name", "capture"))
def _piece(
    x: Array,
    given: Array | None,
    norm: Array | None,
    weight: Any,
    kind: str,
    config: ModelConfig,
    shape: tuple[int, int],
    dot_name: str,
    *,
    capture: bool,
) -> tuple[Array, tuple[Array, ...]]:
    """One group of a layer with what belongs to it: together they are `run_half`, compiled apart.

    Args:
        x: the residual stream.
        given: what the group before made of it; None where a half begins.
        norm: weight of the norm where a half begins.
        weight: the group's.
        kind: the group's.
        config: the model.
        shape: windows, and tokens of each.
        dot_name: the implementation of matrix products.
        capture: whether the group's input is wanted.

    Returns:
        what `given` is to the next group, or the residual stream after a half; and the input.
    """
    batch, c = _batch(shape, 0), config
    if norm is not None:
        read = RMSNorm(norm, c.rms_norm_eps)(x)
    elif kind == "o" and given is not None:
        q, k, v = jnp.split(given, (c.q_size, c.q_size + c.kv_size), axis=-1)
        angles = rotation(batch.position, c.head_dim, c.rope_theta)
        q, k = (rotate(each.reshape(x.shape[0], -1, c.head_dim), *angles) for each in (q, k))
        read = attend(q, k, v.reshape(k.shape), shape).reshape(-1, c.q_size)
    else:
        read = given
    out = product(dot_name)(read, weight, generated=0, gated=kind == "gate_up").astype(jnp.float32)
    return out if given is None else x + out, (read,) if capture and read is not None else ()
