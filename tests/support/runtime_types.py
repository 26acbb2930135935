"""The type checker that the tests put on every function of the packages: beartype, with two gaps closed."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, Self, get_args, runtime_checkable

from beartype import BeartypeConf, FrozenDict, beartype


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, told what it cannot know.

    `Self`: jaxtyping decorates methods, and only a decorator of the class could find out which class that is.
    Protocols: beartype wants each to be `runtime_checkable`, which the packages themselves have no use for.
    """
    for hint in function.__annotations__.values():
        for part in _parts(hint):
            if Protocol in getattr(part, "__bases__", ()):
                runtime_checkable(part)
    owner, _, _ = function.__qualname__.rpartition(".")
    if not owner or "<locals>" in owner:
        return beartype(function)
    overrides = FrozenDict({Self: f"{function.__module__}.{owner}"})
    return beartype(function, conf=BeartypeConf(hint_overrides=overrides))


def _parts(hint: Any) -> Iterator[Any]:
    yield hint
    inner = hint if isinstance(hint, list) else (*get_args(hint), getattr(hint, "__bound__", None))
    for part in inner:
        if part is not None:
            yield from _parts(part)
