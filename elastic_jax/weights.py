"""A plan's weights by name, as shapes or as arrays on a device: what the model is built from."""

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from elastic_jax.checkpoint import Checkpoint, Progress
from elastic_jax.checkpoint_format import EMBEDDING, NORMS
from elastic_jax.config import ModelConfig
from elastic_jax.groups import LM_HEAD, model_groups
from elastic_jax.plan import Choice, Plan, stored_precision
from elastic_jax.quantization import Activations, QArray
from elastic_jax.step import ComputeDtype

type Weights = dict[str, Any]
"""`embedding`, `final_norm`, `layers.<i>.attention_norm`, `layers.<i>.mlp_norm`, and every group by its name; a tied
language-model head in bf16 is left out."""

PROMPT_ACTIVATIONS: dict[Choice, Activations] = {"w8a16": "a16", "w8a8b": "a8b", "w8a8": "a8"}
"""How a choice of int8 weights rounds prompt tokens' activations."""


def _norm_names(config: ModelConfig) -> Iterator[tuple[str, str, int | None]]:
    """(weight's name, leaf of the stored norms, line of that leaf)."""
    for layer in range(config.num_layers):
        yield f"layers.{layer}.attention_norm", "attention", layer
        yield f"layers.{layer}.mlp_norm", "mlp", layer
    yield "final_norm", "final", None


def _is_embedding(config: ModelConfig, name: str, choice: Choice) -> bool:
    return name == LM_HEAD and choice == "bf16" and config.tie_word_embeddings


def abstract_weights(config: ModelConfig, plan: Plan, dtype: ComputeDtype) -> Weights:
    """Shapes of everything a plan needs; no real weights are involved.

    Args:
        config: the model.
        plan: a choice for each of its groups.
        dtype: type of unquantized weights.

    Raises:
        PlanError: the plan is for another model.
    """
    plan.check(config)

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    weights: Weights = {"embedding": floats(config.vocab_size, config.hidden_size)}
    for name, _, _ in _norm_names(config):
        weights[name] = floats(config.hidden_size)
    for name, group in model_groups(config).items():
        choice = plan.choices[name]
        if stored_precision(choice) == "int8":
            values = jax.ShapeDtypeStruct((group.out_size, group.in_size), jnp.int8)
            scales = jax.ShapeDtypeStruct((group.out_size, 1), jnp.float32)
            weights[name] = QArray(values, scales, PROMPT_ACTIVATIONS[choice])
        elif not _is_embedding(config, name, choice):
            weights[name] = floats(group.out_size, group.in_size)
    return weights


def weight_bytes(weights: Weights) -> int:
    """Bytes that weights take on the device."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))


def load_weights(
    checkpoint: Checkpoint,
    plan: Plan,
    dtype: ComputeDtype,
    device: jax.Device,  # pyright: ignore[reportInvalidTypeForm]  (jaxlib has no stub for it)
    *,
    workers: int,
    progress: Progress | None,
    stop: threading.Event | None = None,
) -> Weights:
    """Reads what a plan needs, and only that, onto a device. Traces and compiles nothing.

    Raises:
        CheckpointError: the checkpoint lacks a precision the plan reads, or is damaged.
        PlanError: the plan is for another model.
        Cancelled: `stop` was set.
    """
    config = checkpoint.config
    folders = checkpoint.restore(checkpoint.folders(plan), device, workers, progress, stop)

    def floats(array: Any) -> Any:
        return as_floats(array, dtype, device)

    weights: Weights = {"embedding": floats(folders[EMBEDDING, "bf16"]["values"])}
    weights |= norm_weights(config, folders[NORMS, "bf16"], dtype, device)
    for name in model_groups(config):
        choice = plan.choices[name]
        if stored_precision(choice) == "int8":
            stored = folders[name, "int8"]
            weights[name] = QArray(stored["values"], stored["scales"], PROMPT_ACTIVATIONS[choice])
        elif not _is_embedding(config, name, choice):
            weights[name] = floats(folders[name, "bf16"]["values"])
    _check(weights, abstract_weights(config, plan, dtype))
    return weights


def as_floats(array: Any, dtype: ComputeDtype, device: Any) -> Any:
    """An unquantized weight as it is computed with: a stored array in another float type. Compiles nothing."""
    if array.dtype == jnp.dtype(dtype):
        return array
    return jax.device_put(np.asarray(array).astype(dtype), device)


def norm_weights(config: ModelConfig, stored: Mapping[str, Any], dtype: ComputeDtype, device: Any) -> Weights:
    """Every norm's weight by name, of the leaves that the checkpoint stores them as."""
    norms = {leaf: np.asarray(array) for leaf, array in stored.items()}
    return {
        name: jax.device_put((norms[leaf] if line is None else norms[leaf][line]).astype(dtype), device)
        for name, leaf, line in _norm_names(config)
    }


def _check(weights: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, struct in expected.items():
        for leaf, want in zip(jax.tree.leaves(weights[name]), jax.tree.leaves(struct), strict=True):
            if (leaf.shape, leaf.dtype) != (want.shape, want.dtype):
                raise ValueError(f"weight {name}: expected {want.dtype}{want.shape}, found {leaf.dtype}{leaf.shape}")


def flatten(model: nnx.Module) -> tuple[list[Any], nnx.GraphDef, Any]:
    """A module's leaves in a fixed order, and what puts them back: a compiled call takes flat arrays, not NNX state."""
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    return leaves, graph, tree
