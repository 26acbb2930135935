"""Reads lowered and compiled programs: which products they hold, of which types, and in which part of the model."""

import dataclasses
import re

_NAMED = re.compile(r'^(#loc\d*) = loc\("([^"]*)"')
_DOT = re.compile(r"stablehlo\.dot_general .* : \(tensor<(\S+)>, tensor<(\S+)>\) -> tensor<(\S+)> loc\((#loc\d*)\)")
_CONVERT = re.compile(r"stablehlo\.convert .* : \(tensor<(\S+)>\) -> tensor<(\S+)>")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Shape and StableHLO element type."""

    shape: tuple[int, ...]
    type: str

    @classmethod
    def parse(cls, text: str) -> "Tensor":
        """Of `24x64xi8`."""
        *sizes, element = text.split("x")
        return cls(tuple(int(size) for size in sizes), element)


@dataclasses.dataclass(frozen=True)
class Product:
    """One dot of a lowered program; `scope` is the path of named scopes it stands in."""

    scope: str
    left: Tensor
    right: Tensor
    out: Tensor

    @property
    def types(self) -> tuple[str, str, str]:
        return self.left.type, self.right.type, self.out.type


def products(text: str) -> list[Product]:
    """Every dot of a StableHLO program printed with debug information."""
    lines = text.splitlines()
    names = {match[1]: match[2] for line in lines if (match := _NAMED.match(line))}
    dots = [match for line in lines if (match := _DOT.search(line))]
    if len(dots) != text.count("stablehlo.dot_general "):
        raise ValueError("some dot_general is printed in another way than expected")
    return [Product(names[m[4]], Tensor.parse(m[1]), Tensor.parse(m[2]), Tensor.parse(m[3])) for m in dots]


def conversions(text: str) -> list[tuple[Tensor, Tensor]]:
    """Every conversion of element types in a StableHLO program: from, to."""
    return [(Tensor.parse(m[1]), Tensor.parse(m[2])) for m in _CONVERT.finditer(text)]
