"""The negative control: plain W8A8, int8 on all linear layers with one fixed activation scale for each of them.

It is what makes int8 look bad elsewhere: the scale of a layer's activations is chosen once, from calibration text, for
all tokens and channels, prompt or generated, the language-model head's too. It is compiled in memory for an evaluation
and cannot be stored, named as a mode, or loaded: it exists to show what the modes avoid.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from aot_cache.target import Device
from elastic_jax import kernels
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.elastic import ElasticMistral
from elastic_jax.engine import Engine
from elastic_jax.executables import default_compiler_options, default_step_config
from elastic_jax.groups import LM_HEAD, model_groups
from elastic_jax.kernels import dot_xla
from elastic_jax.memory import plan_memory
from elastic_jax.model import Mistral
from elastic_jax.norm import RMSNorm
from elastic_jax.phases import Phases
from elastic_jax.plan import Plan, provisional_plans
from elastic_jax.quantization import QArray, swiglu
from elastic_jax.quantization import dot as quantized_dot
from elastic_jax.runner import Runner
from elastic_jax.search.forward import KINDS, Forward
from elastic_jax.step import ComputeDtype, StepConfig
from elastic_jax.tokenizer import Tokenizer
from elastic_jax.units import units_of
from elastic_jax.weights import Weights, load_weights

CONTROL = "W8A8"
"""What its answers and rows are called."""

_NOTE = "negative control: int8 everywhere with fixed activation scales; no mode, for evaluation alone"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StaticArray(QArray):
    """A `QArray` whose activations all have one scale.

    Attributes:
        activation_scale: float32 [1, 1].
    """

    values: Any
    scales: Any
    prompt_activations: Any = dataclasses.field(metadata={"static": True})
    activation_scale: Any


def static_dot(
    x: Float[Array, "tokens in"],
    weight: Any,
    *,
    generated: int,
    norm: RMSNorm | None = None,
    gated: bool = False,
    residual: Float[Array, "tokens out"] | None = None,
) -> Float[Array, "tokens columns"]:
    """`quantization.dot`, and for a `StaticArray` the product of activations rounded at its scale and clipped."""
    dot = dot_xla.IMPLEMENTATION
    if not isinstance(weight, StaticArray):
        return quantized_dot(x, weight, generated=generated, kernels=dot, norm=norm, gated=gated, residual=residual)
    x = (x if norm is None else norm(x)).astype(jnp.float32)
    plane = jnp.clip(jnp.round(x / weight.activation_scale), -127, 127).astype(jnp.int8)
    scale = jnp.broadcast_to(weight.activation_scale, (x.shape[0], 1))
    out = dot.multiply(plane, scale, weight.values, weight.scales, None if gated else residual)
    return swiglu(out) if gated else out


def activation_scales(
    checkpoint: Checkpoint, windows: Int32[np.ndarray, "windows length"], device: Device, workers: int
) -> dict[str, float]:
    """The largest activation / 127 that each group of the original model sees in calibration text.

    Raises:
        CheckpointError: a precision is not stored, or is damaged.
    """
    forward = Forward.load(checkpoint, windows, device, workers)
    config, x = forward.config, forward.embed()
    scales = {}
    for layer in range(config.num_layers):
        x, inputs = forward.inputs(x, layer)
        scales |= {f"layers.{layer}.{kind}": float(jnp.abs(inputs[kind]).max()) / 127 for kind in KINDS}
    normed = RMSNorm(forward.norm("final_norm"), config.rms_norm_eps)(x)
    return scales | {LM_HEAD: float(jnp.abs(normed).max()) / 127}


def control_weights(
    checkpoint: Checkpoint, scales: Mapping[str, float], dtype: ComputeDtype, device: Device, workers: int
) -> Weights:
    """The control's weights: the checkpoint's int8, each group with its activation scale.

    Raises:
        CheckpointError: a group is not stored in int8, or is damaged.
    """
    plan = provisional_plans(checkpoint.config)["L"]
    weights = load_weights(checkpoint, plan, dtype, device, workers=workers, progress=None)
    for name in model_groups(checkpoint.config):
        stored = weights[name]
        scale = jax.device_put(np.full((1, 1), max(scales[name], 1e-30), np.float32), device)
        weights[name] = StaticArray(stored.values, stored.scales, stored.prompt_activations, scale)
    return weights


def control_units(config: Any, weights: Weights, step: StepConfig, device: Device) -> dict[str, Any]:
    """The units of the control by name; each is compiled when it is called first, and never stored."""
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weights)
    model = Mistral(
        config,
        abstract,
        attention=kernels.attention(step.attention),
        dot=static_dot,
        decode=None,
        dtype=jnp.dtype(step.dtype),
    )
    options: Any = dict(default_compiler_options(device.platform))
    return {
        unit.name: functools.partial(jax.jit(unit.function, donate_argnums=unit.donate, compiler_options=options))
        for unit in units_of(model, step)
    }


def load_control(
    checkpoint: Checkpoint, scales: Mapping[str, float], *, kv_slots: int, device: Device, workers: int
) -> ElasticMistral:
    """The control behind the interface of a loaded mode.

    Args:
        checkpoint: whose int8 weights it has. The plain ones: those of a calibrated checkpoint were made for better
            activations than it has.
        scales: group -> activation scale.
        kv_slots: of the KV pool, in tokens.
        device: where it runs.
        workers: threads that read weights.

    Raises:
        CheckpointError: a group is not stored in int8, or is damaged.
    """
    config = checkpoint.config
    default = default_step_config(config, device.platform, "bfloat16", kv_slots=kv_slots, max_context=None)
    step = dataclasses.replace(default, decode="xla", dot="xla")
    weights = control_weights(checkpoint, scales, "bfloat16", device, workers)
    runner = Runner(config, step, control_units(config, weights, step, device), weights, device)
    plan = Plan(CONTROL, provisional_plans(config)["L"].choices, _NOTE, False, {})
    return ElasticMistral(
        checkpoint,
        plan,
        Tokenizer.load(checkpoint.tokenizer_path),
        Engine(runner, step.max_context),
        plan_memory(config, weights, step, []),
        Phases(),
    )
