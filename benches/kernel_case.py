"""What a case of `kernels.py` is, and what the cases of several kernels share."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from elastic_jax import kernels
from elastic_jax.config import ModelConfig
from elastic_jax.kernels import decode_cuda

COPIES_BYTES = 256 << 20
"""Memory that the layers of a call take at least: several times an L2 cache."""

FIRST, THEN, LAST = 0, 1, 2
"""When a case's turn comes (`Case.turn`)."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One implementation on one piece of work. Nothing of it is on a device until `operands` is run.

    Attributes:
        kernel: its name in `kernels.TABLE`.
        implementation: `xla`, or what the kernels are written in.
        work: what it does and, after the last comma, at which size: README's tables have a column for each size.
        turn: FIRST of what tells most; LAST of the plain references.
        read_bytes: what a layer must move through memory at least.
        operations: what a layer must compute, two for each product.
        arithmetic: whose limit holds for them.
        layers: how many a call holds.
        operands: (random numbers) -> (what is only read, what is updated in place); traced.
        call: (both operands) -> (results, what was updated).
        outcome: (results, what was updated) -> what is compared with the reference's.
        reference: (both operands) -> what `outcome` should give.
        error: (outcome, expected) -> a number.
        tolerance: of the error.
    """

    kernel: str
    implementation: str
    work: str
    turn: int
    read_bytes: int
    operations: int
    arithmetic: Literal["int8", "bf16"]
    layers: int
    operands: Callable[["Random"], tuple[Any, Any]]
    call: Callable[[Any, Any], tuple[Any, Any]]
    outcome: Callable[[Any, Any], Any]
    reference: Callable[[Any, Any], Any]
    error: Callable[[Any, Any], Any]
    tolerance: float

    @property
    def name(self) -> str:
        return f"{self.kernel}, {self.implementation}: {self.work}"

    def draw(self, seed: Any) -> tuple[Any, Any]:
        """`operands` of a seed, a uint32; traced."""
        return self.operands(Random(seed))


class Random:
    """Random numbers that cost neither time nor compiling: a hash of each number's place (lowbias32 of
    github.com/skeeto/hash-prospector). JAX's generators take seconds to compile for a case's many arrays.

    Args:
        seed: uint32, traced, so that nothing is computed while compiling.
    """

    def __init__(self, seed: Any) -> None:
        self._seed, self._drawn = seed, 0

    def bits(self, shape: tuple[int, ...]) -> jax.Array:
        """uint32, other ones at every call."""
        self._drawn += 1
        start = self._seed + jnp.uint32(self._drawn * 0x9E3779B9 % 2**32)
        x = jax.lax.iota(jnp.uint32, int(np.prod(shape))).reshape(shape) * jnp.uint32(0x9E3779B1) + start
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ (x >> shift)) * jnp.uint32(factor)
        return x ^ (x >> 16)

    def int8(self, shape: tuple[int, ...]) -> jax.Array:
        """In [-64, 63], of a standard deviation of 37."""
        return (self.bits(shape) >> 25).astype(jnp.int8) - jnp.int8(64)

    def uniform(self, shape: tuple[int, ...], low: float, high: float) -> jax.Array:
        """float32."""
        return low + (high - low) * (self.bits(shape) >> 8).astype(jnp.float32) / 2**24

    def normal(self, shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.Array:
        """Nearly so, of a deviation of one: the sum of four bytes, with a fraction so that few are equal."""
        x, fraction = self.bits(shape), self.uniform(shape, -0.5, 0.5)
        total = sum(((x >> shift) & 0xFF).astype(jnp.float32) for shift in (0, 8, 16, 24))
        return ((total - 510.0 + fraction) / 147.8).astype(dtype)

    def weight(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """A model's weight: int8, its scales, a norm, or one of a deviation of 0.02."""
        if dtype == jnp.int8:
            return self.int8(shape)
        if len(shape) == 1:
            return self.uniform(shape, 0.5, 1.5).astype(dtype)
        if shape[1] == 1:
            return self.uniform(shape, 0.5, 1.5) * 0.02 / 37
        return (0.02 * self.normal(shape, jnp.float32)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Place:
    """What cases are made for.

    Attributes:
        config: the model whose shapes are measured.
        platform: `cpu` or `gpu`.
        capability: the GPU's compute capability, ten times its number; 0 of a CPU.
        multiprocessors: the GPU's; 0 of a CPU.
        references: whether the plain-XLA implementations are measured beside what is the default here.
    """

    config: ModelConfig
    platform: str
    capability: int
    multiprocessors: int
    references: bool

    @staticmethod
    def of(device: Any, config: ModelConfig, *, references: bool) -> "Place":
        """For a device, which need not be there."""
        if device.platform != "gpu":
            return Place(config, device.platform, 0, 0, references)
        capability = int(device.compute_capability.replace(".", ""))
        return Place(config, device.platform, capability, device.core_count, references)

    @functools.cached_property
    def defaults(self) -> dict[str, str]:
        """Kind of kernel -> the name of its default implementation."""
        attention, dot, decode = kernels.default_names(self.config, self.platform, "bfloat16")
        sampling = kernels.default_sampling(self.platform)
        return {"attention": attention, "dot": dot, "decode": decode, "sampling": sampling}

    @property
    def fused_tokens(self) -> int:
        """Generated tokens of a step up to which decode's own kernels run."""
        if self.defaults["decode"] != "cuda":
            return 0
        many = decode_cuda.streams(self.capability, decode_cuda.MOST_TOKENS)
        return decode_cuda.MOST_TOKENS if many else decode_cuda.MOST_PACKED

    def implementations(self, kind: str) -> list[str]:
        """The default, and the plain reference if it is wanted."""
        return list(dict.fromkeys([self.defaults[kind], *(["xla"] if self.references else [])]))

    def turn(self, kind: str, name: str, *, telling: bool) -> int:
        """When a case's turn comes: `telling` ones of the default implementation first."""
        if name != self.defaults[kind]:
            return LAST
        return FIRST if telling else THEN


def copies(size: int) -> int:
    """How many layers of so many bytes a call takes, so that none comes from the L2 cache."""
    return max(2, min(16, COPIES_BYTES // size))


def each_layer(function: Callable[..., Any]) -> Callable[[Any, Any], tuple[Any, Any]]:
    """A call of one kernel for each layer; what is only read is (arguments that all share, those of each)."""

    def call(given: Any, state: Any) -> tuple[Any, Any]:
        shared, layers = given
        results = jax.lax.optimization_barrier([function(*shared, *own) for own in layers])
        # The host takes microseconds for every array that is returned, which short kernels would wait for. So it is the
        # first layer's, and one number that needs all others.
        ends = [leaf.ravel()[0].astype(jnp.float32) for leaf in jax.tree.leaves(results)]
        return (results[0], sum(ends, start=jnp.float32(0))), state

    return call


def first_layer(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    """A reference of the first layer alone, of the same arguments."""
    return lambda given, _: function(*given[0], *given[1][0])


def first_result(results: Sequence[Any], state: Any) -> Any:
    """The outcome that belongs to it."""
    del state
    return results[0]


def difference(found: Any, expected: Any) -> jax.Array:
    """The largest difference of any leaf over the largest number of that leaf."""

    def of_leaf(mine: Any, reference: Any) -> jax.Array:
        mine, reference = mine.astype(jnp.float32), reference.astype(jnp.float32)
        # Where something is NaN, so is the maximum, and no tolerance allows it.
        return jnp.max(jnp.abs(mine - reference)) / jnp.max(jnp.abs(reference))

    return largest(map(of_leaf, jax.tree.leaves(found), jax.tree.leaves(expected)))


def largest(values: Iterable[Any]) -> jax.Array:
    return jnp.max(jnp.stack([jnp.asarray(value, jnp.float32) for value in values]))


def fraction(case: Case, took: float, limits: dict[str, float]) -> tuple[str, float]:
    """Which limit binds, and the time it allows over the seconds that a layer took."""
    reading, computing = case.read_bytes / limits["read"], case.operations / limits[case.arithmetic]
    return ("reading" if reading >= computing else case.arithmetic), max(reading, computing) / took


def bytes_of(*shapes: tuple[tuple[int, ...], Any]) -> int:
    """Of arrays of (shape, type)."""
    return sum(int(np.prod(shape)) * jnp.dtype(dtype).itemsize for shape, dtype in shapes)
