"""Elastic Mistral models in JAX: one checkpoint, several precision modes, compiled ahead of time.

Names are imported when first used, so that `import elastic_jax` costs nothing and loads no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_jax.async_elastic import AsyncElasticMistral
    from elastic_jax.checkpoint import Checkpoint
    from elastic_jax.elastic import ElasticMistral
    from elastic_jax.errors import ElasticError
    from elastic_jax.generation import Generation, Piece
    from elastic_jax.plan import Plan
    from elastic_jax.scoring import Score

__all__ = [
    "AsyncElasticMistral",
    "Checkpoint",
    "ElasticError",
    "ElasticMistral",
    "Generation",
    "Piece",
    "Plan",
    "Score",
]

_HOMES = {
    "AsyncElasticMistral": "async_elastic",
    "Checkpoint": "checkpoint",
    "ElasticError": "errors",
    "ElasticMistral": "elastic",
    "Generation": "generation",
    "Piece": "generation",
    "Plan": "plan",
    "Score": "scoring",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
