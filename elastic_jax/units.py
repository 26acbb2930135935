"""The units of a mode: every function that runs at inference, flat and ready to be lowered.

A unit takes one flat list of arrays, because passing NNX state costs milliseconds a call; the module is put together
inside the traced function. Nothing runs on the device at inference that is not one of these: a stray operation outside
would compile.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from aot_cache.identity import source_digest
from aot_cache.unit import Unit
from elastic_jax import kernels
from elastic_jax import step as steps
from elastic_jax.config import ModelConfig
from elastic_jax.model import Mistral
from elastic_jax.plan import Plan
from elastic_jax.step import Bucket, StepConfig
from elastic_jax.weights import abstract_weights, flatten

SCALAR = jax.ShapeDtypeStruct((), jnp.int32)

START = "start"
"""The unit that makes the state."""


def step_name(bucket: Bucket, variant: steps.Variant) -> str:
    """Name of the unit that runs one bucket."""
    return f"step.d{bucket.generated}.p{bucket.prompt}.{variant}"


def top_name(outputs: int) -> str:
    """Name of the unit that finds the most likely tokens of as many outputs."""
    return f"top.r{outputs}"


def build_model(config: ModelConfig, weights: dict[str, Any], step: StepConfig) -> Mistral:
    """The module over given weights: arrays, or shapes."""
    attention, dot = kernels.attention(step.attention), kernels.dot(step.dot)
    decode = kernels.decode(step.decode)
    return Mistral(config, weights, attention=attention, dot=dot, decode=decode, dtype=jnp.dtype(step.dtype))


def make_units(config: ModelConfig, plan: Plan, step: StepConfig) -> list[Unit]:
    """Every unit of a mode, from shapes alone.

    Raises:
        PlanError: the plan is for another model.
        ConfigError: the step names an implementation that there is not.
    """
    return units_of(build_model(config, abstract_weights(config, plan, step.dtype), step), step)


def units_of(abstract: Mistral, step: StepConfig) -> list[Unit]:
    """Every unit that runs a model, given its module over shapes."""
    config = abstract.config
    leaves, graph, tree = flatten(abstract)
    choose = kernels.sampling(step.sampling)
    state = steps.abstract_state(config, step)
    sampling = steps.abstract_sampling(config, step)

    def model(weights: list[Any]) -> Mistral:
        return nnx.merge(graph, jax.tree.unflatten(tree, weights))

    def greedy(weights: Any, state: Any, inputs: Any) -> Any:
        return steps.step(model(weights), state, inputs, None, step, choose)

    def sampled(weights: Any, state: Any, inputs: Any, sampling: Any) -> Any:
        return steps.step(model(weights), state, inputs, sampling, step, choose)

    def top(logits: Any) -> Any:
        return steps.top(logits, step.top_n)

    def score(weights: Any, kv: Any, inputs: Any, target: Any, top_wanted: Any) -> Any:
        return steps.score(model(weights), kv, inputs, target, top_wanted, step)

    def copy_page(kv: Any, source: Any, destination: Any) -> Any:
        return steps.copy_page(kv, source, destination, step.page_size)

    def start() -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)

    units = []
    for bucket in step.buckets:
        inputs = steps.abstract_inputs(bucket, step)
        sizes = {"generated": bucket.generated, "prompt": bucket.prompt}
        units.append(_unit(step_name(bucket, "greedy"), greedy, (leaves, state, inputs), 1, sizes))
        arguments = (leaves, state, inputs, sampling)
        units.append(_unit(step_name(bucket, "sampling"), sampled, arguments, 1, sizes))
        if not bucket.generated:
            target = jax.ShapeDtypeStruct((bucket.prompt,), jnp.int32)
            arguments = (leaves, state.kv, inputs, target, SCALAR)
            units.append(_unit(step_name(bucket, "score"), score, arguments, 1, sizes))
    for outputs in sorted({bucket.outputs(step.rows) for bucket in step.buckets}):
        logits = jax.ShapeDtypeStruct((outputs, config.vocab_size), jnp.float32)
        units.append(_unit(top_name(outputs), top, (logits,), None, {"outputs": outputs}))
    mask = state.rows.prompt_mask
    prompt = jax.ShapeDtypeStruct(mask.shape[1:], mask.dtype)
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    units.append(_unit("admit", steps.admit, (state.rows, SCALAR, key, prompt, SCALAR, SCALAR), 0, {}))
    units.append(_unit("copy_page", copy_page, (state.kv, SCALAR, SCALAR), 0, {}))
    units.append(_unit(START, start, (), None, {}))
    return units


def _unit(
    name: str, function: Callable[..., Any], arguments: tuple[Any, ...], donate: int | None, sizes: dict[str, int]
) -> Unit:
    """Flattens a function of pytrees; `donate` is the number of the pytree whose buffers are taken over."""
    flat, tree = jax.tree.flatten(arguments)
    starts = [0]
    for argument in arguments:
        starts.append(starts[-1] + len(jax.tree.leaves(argument)))

    def flattened(*leaves: Any) -> tuple[Any, ...]:
        return tuple(jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves))))

    donated = () if donate is None else tuple(range(starts[donate], starts[donate + 1]))
    variant = name.split(".")[0] if name.startswith("top.") else name.rsplit(".", 1)[-1]
    return Unit(name, flattened, tuple(flat), donated, {"variant": variant, **sizes})


def traced_source_digest() -> str:
    """sha256 over the sources that decide what is traced: executables made from other sources are refused."""
    package = Path(__file__).parent
    names = ("batch", "model", "quantization", "sampling", "step", "units", "weights", "groups")
    files = [package / f"{name}.py" for name in names] + sorted(
        path for path in (package / "kernels").rglob("*") if path.suffix in (".py", ".json", ".so")
    )
    return source_digest(files, relative_to=package)
