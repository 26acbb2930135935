"""A unit: one function to compile, with the shapes it is compiled for."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from elastic_jax.errors import ExecutableError

type Properties = Mapping[str, int | str]
"""Facts about a unit that are compared at load: the bucket it was compiled for and its variant."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,119}")


def check_name(name: str, *, source: str) -> str:
    """Returns a unit's name, which is also the stem of a file; `source` names where it comes from in errors.

    Raises:
        ExecutableError: the name could leave the store's folder, or is not portable.
    """
    if not _NAME.fullmatch(name):
        raise ExecutableError(f"{source}: {name!r} is not a unit name: expected letters, digits, '.', '_' or '-'")
    return name


@dataclasses.dataclass(frozen=True)
class Unit:
    """One thing to compile.

    Attributes:
        name: e.g. `step.d4.p0.greedy`; the file is `<name>.xla`.
        function: takes the arguments positionally, each one array, and returns a flat tuple of arrays.
        arguments: shape and dtype of each argument.
        donate: numbers of the arguments whose buffers the outputs may take over.
        properties: bucket facts written to the manifest and compared at load.
    """

    name: str
    function: Callable[..., tuple[Any, ...]]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    donate: tuple[int, ...]
    properties: Properties

    def __post_init__(self) -> None:
        """Refuses what cannot be stored.

        Raises:
            ExecutableError: the name is no file name, or a donated argument does not exist.
        """
        check_name(self.name, source="unit")
        for number in self.donate:
            if not 0 <= number < len(self.arguments):
                raise ExecutableError(
                    f"unit {self.name}: argument {number} is donated, but there are {len(self.arguments)} arguments"
                )
