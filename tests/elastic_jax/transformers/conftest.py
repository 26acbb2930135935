"""The drop-in's model in mode XL, float32, loaded as a user loads it."""

from collections.abc import Callable

import pytest
from tiny import CompiledTiny

from elastic_jax.transformers import AutoModelForCausalLM, ElasticForCausalLM


@pytest.fixture(scope="session")
def model_of(compiled_tiny: Callable[..., CompiledTiny]) -> Callable[[str], ElasticForCausalLM]:
    """`model_of(name)`: a tiny model; it is shared, so leave its generation config as it is."""
    models: dict[str, ElasticForCausalLM] = {}

    def load(name: str) -> ElasticForCausalLM:
        if name not in models:
            path = compiled_tiny("XL", "float32", name).checkpoint.path
            models[name] = AutoModelForCausalLM.from_pretrained(path, mode="XL", dtype="float32", compile="never")
        return models[name]

    return load


@pytest.fixture
def model(model_of: Callable[[str], ElasticForCausalLM]) -> ElasticForCausalLM:
    """The tiny Mistral model."""
    return model_of("tiny_mistral")
