"""A mode's executables: where they are stored, what they must match, how they are compiled and loaded."""

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aot_cache import compiler, store
from aot_cache.compiler import Progress
from aot_cache.identity import CompilerOptions
from aot_cache.manifest import Manifest, Memory, read_manifest
from aot_cache.store import Executable
from aot_cache.target import Device, Target
from elastic_jax import kernels
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.checkpoint_format import EXECUTABLES
from elastic_jax.config import ModelConfig
from elastic_jax.errors import ConfigError, ExecutableError
from elastic_jax.kv_cache import KvPrecision
from elastic_jax.plan import Plan
from elastic_jax.step import Bucket, ComputeDtype, StepConfig
from elastic_jax.units import START, make_units, traced_source_digest

_POOL = "kv"
"""What the name of a store's folder begins with; the slots of its pool follow."""

_BUCKETS = {
    "cpu": (Bucket(1, 0), Bucket(4, 0), Bucket(16, 0), Bucket(0, 64), Bucket(0, 512)),
    "gpu": (
        *(Bucket(d, 0) for d in (1, 2, 4, 8, 16, 32, 64)),
        *(Bucket(0, p) for p in (64, 256, 1024, 4096)),
        Bucket(64, 1024),
    ),
}
"""Steps compiled by default. On CPU a step's time grows with its tokens, so mixed and larger ones save nothing."""

_COMPILER_OPTIONS: dict[str, CompilerOptions] = {"cpu": {"xla_allow_excess_precision": False}, "gpu": {}}
"""XLA options of every compilation. XLA may leave out a rounding to bf16 between operations that it fuses, and on CPU
does: results would depend on the bucket, and mode XL would be nearer to float32 than on a GPU (see
`fidelity-excess-precision.json` among the benches' results)."""

_LOAD_COMPILING = 'load with on_missing="compile", --on-missing compile'

PAGE_SIZE = 64
_TOP_N = 20
_MAX_BIAS = 300
"""Reported tokens and biased tokens at most, as in OpenAI's API."""


def default_step_config(
    model: ModelConfig,
    platform: str,
    dtype: ComputeDtype,
    *,
    kv_slots: int,
    max_context: int | None,
    kv: KvPrecision = "full",
) -> StepConfig:
    """The sizes that a mode is compiled for unless told otherwise.

    Args:
        model: its longest context bounds `max_context`.
        platform: `cpu` or `gpu`.
        dtype: compute type.
        kv_slots: KV slots of the pool, in tokens, rounded up to whole pages; `pools.default_pool` chooses.
        max_context: longest context in tokens; None for as much as model and pool allow.
        kv: precision of the KV cache.

    Raises:
        ConfigError: the platform is unknown, or the sizes contradict each other.
    """
    if platform not in _BUCKETS:
        raise ConfigError(f"no step sizes are known for platform {platform!r}; known: {sorted(_BUCKETS)}")
    slots = whole_pages(kv_slots)
    if max_context is not None and max_context > model.max_position_embeddings:
        raise ConfigError(
            f"max_context {max_context} is more than the {model.max_position_embeddings} positions of the model"
        )
    buckets = _BUCKETS[platform]
    attention, dot, decode = kernels.default_names(model, platform, dtype)
    return StepConfig(
        rows=max(bucket.generated for bucket in buckets),
        page_size=PAGE_SIZE,
        kv_slots=slots,
        max_context=min(slots, model.max_position_embeddings) if max_context is None else max_context,
        top_n=min(_TOP_N, model.vocab_size),
        max_bias=_MAX_BIAS,
        dtype=dtype,
        buckets=buckets,
        attention=attention,
        dot=dot,
        decode=decode,
        sampling=kernels.default_sampling(platform),
        kv=kv,
    )


def default_compiler_options(platform: str) -> CompilerOptions:
    """XLA options for every unit of a platform, so that what is computed depends on the program alone."""
    return _COMPILER_OPTIONS[platform]


def whole_pages(tokens: int) -> int:
    """The KV slots of as many pages as hold some tokens."""
    return -(-tokens // PAGE_SIZE) * PAGE_SIZE


def store_folders(checkpoint: Path) -> list[Path]:
    """Every executable store of a checkpoint, whole or not; those being written are hidden folders."""
    folders = (checkpoint / EXECUTABLES).glob("*/*/*")
    return sorted(folder for folder in folders if folder.is_dir() and not folder.name.startswith("."))


@dataclasses.dataclass(frozen=True)
class ModeStore:
    """The executables of one mode for one device: a store for each KV pool that they were compiled for.

    Attributes:
        checkpoint: whose mode it is.
        plan: the mode's plan.
        dtype: compute type.
        device: the device.
        kv: precision of the KV cache.
    """

    checkpoint: Checkpoint
    plan: Plan
    dtype: ComputeDtype
    device: Device
    kv: KvPrecision = "full"

    @property
    def folder(self) -> Path:
        """Where the stores are; those of float32 and of a KV cache in int8 stand beside the ordinary ones."""
        name = self.plan.name if self.dtype == "bfloat16" else f"{self.plan.name}.{self.dtype}"
        name = name if self.kv == "full" else f"{name}.kv-{self.kv}"
        return self.checkpoint.executables_path / Target.of(self.device).folder / name

    @property
    def hint(self) -> str:
        """What to do if the store cannot be used."""
        if self.checkpoint.home != self.checkpoint.path:
            return f"To compile instead, {_LOAD_COMPILING}"
        return f"Compile with: {self.compile_command()}   (or {_LOAD_COMPILING})"

    def compile_command(self, **sizes: int | None) -> str:
        """The command that compiles the mode; `sizes` are further options and their values, without those of None."""
        words = ["elastic-jax", "compile", str(self.checkpoint.path), "--mode", self.plan.name]
        words += [] if self.dtype == "bfloat16" else ["--dtype", self.dtype]
        words += [] if self.kv == "full" else ["--kv", self.kv]
        for name, value in sizes.items():
            words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
        return shlex.join(words)

    def pool_folder(self, kv_slots: int) -> Path:
        """Where the store for a pool of so many slots is."""
        return self.folder / f"{_POOL}{kv_slots}"

    @property
    def pools(self) -> list[int]:
        """KV slots of every pool that there is a store for, whole or not; the largest first."""
        names = (folder.name.removeprefix(_POOL) for folder in self.folder.glob(f"{_POOL}*") if folder.is_dir())
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def identity(self, step: StepConfig) -> dict[str, Any]:
        """What must match at load, beside device and versions; one JSON value a key."""
        sizes = dataclasses.asdict(step)
        buckets = [[bucket.generated, bucket.prompt] for bucket in step.buckets]
        return {
            **(sizes | {"buckets": buckets}),
            "plan_hash": self.plan.digest(),
            "config_hash": self.checkpoint.config.digest(),
            "source_hash": traced_source_digest(),
            "mesh": [1],
        }

    def stored_step(self, kv_slots: int) -> StepConfig:
        """The sizes that the store for a pool was compiled for.

        Raises:
            ExecutableError: there is no such store, or its manifest does not say.
        """
        folder = self.pool_folder(kv_slots)
        step = _read_step(read_manifest(folder, hint=self.hint), folder, self.hint)
        if step.kv_slots != kv_slots:
            raise ExecutableError(f"{folder}: the manifest describes a pool of {step.kv_slots} slots. {self.hint}")
        return step

    def memory(self, kv_slots: int) -> Mapping[str, Memory]:
        """What each unit of the store for a pool needs beside the state, by name.

        Without the one that makes the state: what it returns is the state.
        """
        manifest = read_manifest(self.pool_folder(kv_slots), hint=self.hint)
        return {name: record.memory for name, record in manifest.units.items() if name != START}

    def compile(
        self,
        step: StepConfig,
        *,
        workers: int,
        progress: Progress,
        compiler_options: CompilerOptions | None = None,
    ) -> Manifest:
        """Compiles every unit of the mode into the store for the step's pool; an equal, undamaged one is kept.

        The device need not be there (`aot_cache.targets.absent_device`); `compiler_options` are XLA's, beside those of
        `default_compiler_options`.

        Raises:
            ExecutableError: a unit cannot be compiled, or the store cannot be written.
        """
        units = make_units(self.checkpoint.config, self.plan, step)
        try:
            return compiler.compile_units(
                units,
                self.pool_folder(step.kv_slots),
                self.identity(step),
                self.device,
                workers=workers,
                progress=progress,
                compiler_options={**default_compiler_options(self.device.platform), **(compiler_options or {})},
            )
        except OSError as error:
            raise ExecutableError(
                f"the executables cannot be written to {self.pool_folder(step.kv_slots)}: {error.strerror or error}"
            ) from error

    def check(self, step: StepConfig) -> None:
        """Checks that the store for the step's pool is whole and fits here, without loading or hashing it.

        Raises:
            ExecutableError: it is missing or incomplete.
            MismatchError: it was made for something else.
        """
        store.check(self.pool_folder(step.kv_slots), self.identity(step), self.device, hint=self.hint)

    def load(self, step: StepConfig, *, trust: bool, workers: int, preload: bool) -> dict[str, Executable]:
        """Loads every unit from the store for the step's pool; compiles nothing.

        Without `preload` a unit is opened by its first call.

        Raises:
            ExecutableError: the store is missing, incomplete or damaged.
            MismatchError: it was made for something else.
            TrustError: somebody else may have written it, and `trust` is False.
        """
        kernels.prepare_to_load(step.attention, step.dot, step.decode, step.sampling)
        return store.load(
            self.pool_folder(step.kv_slots),
            self.identity(step),
            self.device,
            root=self.checkpoint.home,
            units=None,
            trust=trust,
            workers=workers,
            hint=self.hint,
            preload=preload,
        )


def _read_step(manifest: Manifest, folder: Path, hint: str) -> StepConfig:
    identity = manifest.identity
    try:
        values = {field.name: identity[field.name] for field in dataclasses.fields(StepConfig)}
        buckets = tuple(Bucket(*bucket) for bucket in values.pop("buckets"))
        return StepConfig(**values, buckets=buckets)
    except (KeyError, TypeError, ConfigError) as error:
        raise ExecutableError(f"{folder}: the manifest does not describe a step ({error}). {hint}") from None
