"""Reads lowered and compiled programs: which products they hold, of which types, and in which part of the model."""

import dataclasses
import math
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


@dataclasses.dataclass(frozen=True)
class Use:
    """An instruction of a compiled program that reads an argument, or what is the same memory.

    Attributes:
        operation: HLO's name for it; `custom-call` with its target.
        sizes: elements of its results.
    """

    operation: str
    sizes: tuple[int, ...]


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\([^\n]*\) -> [^\n]*)?\{$", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$", re.MULTILINE)
_RESULT = re.compile(r"\b[a-z]\w*\[([\d,]*)\]")
_SAME_MEMORY = ("bitcast", "get-tuple-element", "tuple")


def argument_uses(hlo: str, number: int) -> list[Use]:
    """Who reads an argument of a compiled program, in its entry computation and in those that it calls as they are.

    Args:
        hlo: the optimized program.
        number: the argument's.
    """
    found = list(_COMPUTATION.finditer(hlo))
    bodies = {m[2]: hlo[m.end() : n.start() if n else None] for m, n in zip(found, [*found[1:], None], strict=True)}
    entry = next(m[2] for m in found if m[1])
    return _uses(bodies, entry, number)


def _uses(bodies: dict[str, str], computation: str, number: int) -> list[Use]:
    instructions = [(m[1], m[2], m[3], m[4]) for m in _INSTRUCTION.finditer(bodies[computation])]
    names = {
        name
        for name, _, operation, rest in instructions
        if (operation, rest.split(")")[0]) == ("parameter", f"{number}")
    }
    if len(names) != 1:
        raise ValueError(f"{computation} has no parameter {number}, or is printed in another way than expected")
    uses = []
    for name, result, operation, rest in instructions:
        operands = re.findall(r"%([\w.-]+)", rest.split("), ")[0])
        if not names & set(operands) or operation == "parameter":
            continue
        if operation in _SAME_MEMORY:
            names.add(name)
        elif operation == "call":
            called = re.search(r"to_apply=%([\w.-]+)", rest)
            if called is None:
                raise ValueError(f"a call without a computation: {rest}")
            for place, operand in enumerate(operands):
                if operand in names:
                    uses += _uses(bodies, called[1], place)
        else:
            target = re.search(r'custom_call_target="([^"]*)"', rest)
            sizes = tuple(_size(sizes) for sizes in _RESULT.findall(result))
            uses.append(Use(f"{operation} {target[1]}" if target else operation, sizes))
    return uses


def _size(dimensions: str) -> int:
    return math.prod(int(size) for size in dimensions.split(",") if size)
