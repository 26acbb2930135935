"""The names of transformers that people load models with, on Elastic modes: change the import, and nothing else.

    from elastic_jax.transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

transformers' tokenizers, streamers and `GenerationConfig` are used as they are; the model, `generate` and the pipeline
are this project's own and need no PyTorch. What is not there is refused by name. docs/transformers.md tells more.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig, TextIteratorStreamer, TextStreamer

    from elastic_jax.transformers.auto_tokenizer import AutoTokenizer
    from elastic_jax.transformers.causal_lm import AutoModelForCausalLM, ElasticForCausalLM
    from elastic_jax.transformers.text_pipeline import TextGenerationPipeline, pipeline

__all__ = [
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "ElasticForCausalLM",
    "GenerationConfig",
    "TextGenerationPipeline",
    "TextIteratorStreamer",
    "TextStreamer",
    "pipeline",
]

_HOMES = {
    "AutoModelForCausalLM": "elastic_jax.transformers.causal_lm",
    "AutoTokenizer": "elastic_jax.transformers.auto_tokenizer",
    "ElasticForCausalLM": "elastic_jax.transformers.causal_lm",
    "GenerationConfig": "transformers",
    "TextGenerationPipeline": "elastic_jax.transformers.text_pipeline",
    "TextIteratorStreamer": "transformers",
    "TextStreamer": "transformers",
    "pipeline": "elastic_jax.transformers.text_pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}: it has {', '.join(__all__)}; import other names from "
            "transformers itself"
        )
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
