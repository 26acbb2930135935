"""The model one layer at a time, over windows of text: what calibration and search measure with.

Layers are all of one shape, so one compiled unit serves every half of a layer (attention, MLP) that has the same
choices, and a measurement runs only the layers from the one that it changes on. The residual stream, attention and
`bf16` products are float32 here: bfloat16's own rounding, which every mode has, would hide what a single group adds.
"""

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from aot_cache.target import Device
from elastic_jax import kernels
from elastic_jax.batch import TokenBatch
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.config import ModelConfig
from elastic_jax.groups import LM_HEAD
from elastic_jax.model import MLP, SelfAttention, rotation
from elastic_jax.norm import RMSNorm
from elastic_jax.plan import Choice, Plan, provisional_plans, stored_precision
from elastic_jax.quantization import QArray
from elastic_jax.weights import PROMPT_ACTIVATIONS, Weights, load_weights

Role = Literal["prompt", "generated"]
"""Whose arithmetic all tokens of a window are computed in."""

ROLES: tuple[Role, ...] = ("prompt", "generated")

KINDS = ("qkv", "o", "gate_up", "down")
"""The groups of a layer, in the order they are computed."""

_HALVES = {"attention": ("attention_norm", KINDS[:2]), "mlp": ("mlp_norm", KINDS[2:])}
"""The halves of a layer -> the norm and the groups of each."""

_PAGE = 64
_HEAD_TOKENS = 128
"""Tokens whose logits exist at the same time: those of a whole text would be larger than the model."""


@dataclasses.dataclass(frozen=True)
class Distances:
    """How far distributions of the next token are from the reference's; each float32 [candidates, windows, length].

    Attributes:
        kl: KL(reference || candidate) in nats.
        flips: 1 where the most likely token differs, else 0.
        loss: the candidate's negative log-likelihood of the text's next token, in nats; 0 at each window's end.
    """

    kl: np.ndarray
    flips: np.ndarray
    loss: np.ndarray


class Forward:
    """A model with all its stored precisions on a device, and windows of text to run through it.

    Args:
        checkpoint: must hold every group in bf16 and in int8.
        windows: int32 [windows, length], token ids; each window is a text of its own.
        device: where everything runs.
        workers: threads that read weights.

    Raises:
        CheckpointError: a precision is not stored, or is damaged.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Int32[np.ndarray, "windows length"],
        device: Device,
        workers: int,
    ) -> None:
        self.config = checkpoint.config
        self.windows = windows
        plans = provisional_plans(self.config)
        self._float = load_weights(checkpoint, plans["XL"], "float32", device, workers=workers, progress=None)
        integer = load_weights(checkpoint, plans["L"], "float32", device, workers=workers, progress=None)
        self._integer: Weights = {name: weight for name, weight in integer.items() if isinstance(weight, QArray)}
        self._device = device
        self._names = kernels.default_names(self.config, device.platform, "float32")

    def over(self, windows: Int32[np.ndarray, "windows length"]) -> "Forward":
        """The same model and device over other text; weights are shared."""
        other = copy.copy(self)
        other.windows = windows
        return other

    @property
    def dot_name(self) -> str:
        """The implementation of integer dots that is used."""
        return self._names[1]

    def weight(self, group: str, choice: Choice) -> Any:
        """A group's weight as a choice reads it: a float32 matrix or a `QArray`."""
        if stored_precision(choice) == "bf16":
            return self._float.get(group, self._float["embedding"])  # a tied head
        return dataclasses.replace(self._integer[group], prompt_activations=PROMPT_ACTIVATIONS[choice])

    def norm(self, name: str) -> Array:
        """A norm's weight by its name in `Weights`."""
        return self._float[name]

    def embed(self) -> Float32[Array, "tokens hidden"]:
        """The residual stream before the first layer."""
        return _embed(self._float["embedding"], jax.device_put(self.windows.reshape(-1), self._device))

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
        return out, dict(zip(KINDS, captured, strict=True))

    def _run(
        self, x: Array, layer: int, choices: Sequence[Choice], role: Role, *, capture: bool
    ) -> tuple[Array, tuple[Array, ...]]:
        """The two halves of a layer, compiled apart: a plan has far fewer kinds of halves than of layers."""
        captured: tuple[Array, ...] = ()
        for half, (norm, kinds) in _HALVES.items():
            weights = {kind: self.weight(f"layers.{layer}.{kind}", choices[KINDS.index(kind)]) for kind in kinds}
            weights[norm] = self.norm(f"layers.{layer}.{norm}")
            x, found = _half(x, weights, half, self.config, self.windows.shape, role, self._names, capture=capture)
            captured += found
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
        """The residual stream after one layer of a plan."""
        return self.layer(x, layer, layer_choices(plan, layer), role)

    def distances(
        self,
        reference: Float32[Array, "tokens hidden"],
        candidates: Sequence[Float32[Array, "tokens hidden"]],
        head: Choice,
    ) -> Distances:
        """Distances of the next-token distributions that candidates' last residual streams give.

        Args:
            reference: of the original model. Its logits are computed again each time, and never all at once.
            candidates: residual streams after the last layer.
            head: the candidates' choice for the language-model head; the reference's is `bf16`.
        """
        found = _distances(
            reference,
            tuple(candidates),
            self.norm("final_norm"),
            self.weight(LM_HEAD, "bf16"),
            self.weight(LM_HEAD, head),
            jax.device_put(self.windows, self._device),
            self.config.rms_norm_eps,
            self._names[1],
        )
        shape = (len(candidates), *self.windows.shape)
        return Distances(*(np.asarray(part).reshape(shape) for part in found))

    def measure(self, plans: Sequence[Plan], reference: Array, role: Role) -> list[Distances]:
        """The distances of whole plans."""
        start = self.embed()
        return [
            self.distances(reference, [self.run(start, 0, plan.choices, role)], plan.choices[LM_HEAD]) for plan in plans
        ]


def layer_choices(plan: Mapping[str, Choice], layer: int) -> tuple[Choice, ...]:
    """A plan's choices for one layer, in the order of `KINDS`."""
    return tuple(plan[f"layers.{layer}.{kind}"] for kind in KINDS)


@jax.jit
def _embed(embedding: Array, tokens: Array) -> Array:
    return embedding.at[tokens].get(mode="clip")


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


@functools.partial(jax.jit, static_argnames=("half", "config", "shape", "role", "names", "capture"))
def _half(
    x: Array,
    weights: dict[str, Any],
    half: str,
    config: ModelConfig,
    shape: tuple[int, int],
    role: Role,
    names: tuple[str, str, str],
    *,
    capture: bool,
) -> tuple[Array, tuple[Array, ...]]:
    """The residual stream after attention or MLP (`model.Block` adds one after the other), and their groups' inputs."""
    batch = _batch(shape, shape[0] * shape[1] if role == "generated" else 0)
    named_dot, captured = kernels.dot(names[1]), []

    def attention(query: Array, kv: Array, batch: TokenBatch) -> Array:
        # As of a prompt, whatever role the products have: every position is computed at once.
        return kernels.attention(names[0])(query, kv, dataclasses.replace(batch, generated=0))

    def dot(
        x: Array,
        weight: Any,
        *,
        generated: int,
        norm: RMSNorm | None = None,
        gated: bool = False,
        residual: Array | None = None,
    ) -> Array:
        x = x if norm is None else norm(x)
        captured.append(x.astype(jnp.float32))
        return named_dot(x, weight, generated=generated, gated=gated, residual=residual)

    norm = RMSNorm(weights[_HALVES[half][0]], config.rms_norm_eps)
    if half == "attention":
        slots = batch.block_table.size * _PAGE
        cache = jnp.zeros((slots, 2, config.num_kv_heads, config.head_dim), jnp.float32)
        angles = rotation(batch.position, config.head_dim, config.rope_theta)
        x, _ = SelfAttention(config, weights["qkv"], weights["o"], attention, dot)(x, norm, angles, cache, batch)
    else:
        x = MLP(weights["gate_up"], weights["down"], dot)(x, norm, generated=batch.generated)
    return x, tuple(captured) if capture else ()


@functools.partial(jax.jit, static_argnames=("eps", "name"))
def _distances(
    reference: Array,
    candidates: tuple[Array, ...],
    norm: Array,
    reference_head: Array,
    head: Any,
    windows: Array,
    eps: float,
    name: str,
) -> tuple[Array, Array, Array]:
    """KL, flips and losses, float32 [candidates, tokens] each."""
    dot, normalize = kernels.dot(name), RMSNorm(norm, eps)
    tokens = reference.shape[0]
    target = jnp.concatenate([windows[:, 1:], jnp.full((windows.shape[0], 1), -1, jnp.int32)], axis=1).reshape(-1)

    def log_probabilities(x: Array, weight: Any) -> Array:
        return jax.nn.log_softmax(dot(normalize(x), weight, generated=x.shape[0]), axis=-1)

    def each_chunk(parts: tuple[Array, tuple[Array, ...], Array]) -> tuple[Array, Array, Array]:
        original, others, wanted = parts
        p = log_probabilities(original, reference_head)
        best = jnp.argmax(p, axis=-1)
        found = []
        for x in others:
            q = log_probabilities(x, head)
            kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
            flips = (jnp.argmax(q, axis=-1) != best).astype(jnp.float32)
            likely = jnp.take_along_axis(q, jnp.maximum(wanted, 0)[:, None], axis=1)[:, 0]
            found.append((kl, flips, jnp.where(wanted < 0, 0.0, -likely)))
        kls, flipped, losses = (jnp.stack(each) for each in zip(*found, strict=True))
        return kls, flipped, losses

    size = min(_HEAD_TOKENS, tokens)
    padded = -tokens % size

    def chunks(x: Array) -> Array:
        return jnp.pad(x, ((0, padded),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, size, *x.shape[1:])

    parts = (chunks(reference), tuple(chunks(x) for x in candidates), chunks(target))
    found = jax.lax.map(each_chunk, parts)  # chunks candidates size
    kls, flipped, losses = (jnp.swapaxes(x, 0, 1).reshape(len(candidates), -1)[:, :tokens] for x in found)
    return kls, flipped, losses
