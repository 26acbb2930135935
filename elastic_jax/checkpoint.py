"""Elastic checkpoints: one model stored once in every precision, of which each mode reads only its own part.

```
DIR/elastic.json                   the manifest: config, folders, hashes, source, tool versions
DIR/weights/<name>/<precision>/    one Orbax checkpoint each: a group, `embedding` or `norms`
DIR/plans/<mode>.json              which precision each group is computed in
DIR/frontier.json                  all plans that a search found, if there was one
DIR/tokenizer/                     the model's own tokenizer files
DIR/executables/                   compiled units; elsewhere for a checkpoint that nothing may be written to
```
"""

import json
import re
import shlex
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, Self

import jax

from elastic_jax.checkpoint_format import (
    EMBEDDING,
    EXECUTABLES,
    JOURNAL,
    MANIFEST,
    NORMS,
    PLANS,
    TOKENIZER,
    WEIGHTS,
    FileRecord,
    Folder,
    FolderName,
    Manifest,
)
from elastic_jax.checkpoint_io import describe_file
from elastic_jax.config import ModelConfig
from elastic_jax.errors import CheckpointError, PlanError
from elastic_jax.frontier import REQUESTS, Frontier
from elastic_jax.groups import LM_HEAD
from elastic_jax.plan import Plan, read_plan, stored_precision
from elastic_jax.reading import read_to_device
from elastic_jax.stored_array import DamagedArrayError, StoredArray


class Progress(Protocol):
    """Is told how far a long operation is; called by one thread at a time."""

    def __call__(self, done: int, total: int, name: str, /) -> None:
        """`done` of `total` bytes; `name` is what was just finished or is being worked on."""


class Checkpoint:
    """A complete Elastic checkpoint on disk.

    Attributes:
        path: its folder.
        config: the model.
        manifest: everything elastic.json says.
        home: the folder that its executables are below; `path`, but for one that nothing may be written to.
    """

    def __init__(self, path: Path, manifest: Manifest, *, home: Path) -> None:
        self.path = path
        self.manifest = manifest
        self.config: ModelConfig = manifest.config
        self.home = home

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Reads elastic.json, and checks that every file it names is there with its size.

        Raises:
            CheckpointError: there is no checkpoint, it is incomplete, or files are missing or of another size.
        """
        checkpoint = cls.read(path)
        if problems := checkpoint.wrong_sizes():
            raise CheckpointError(
                f"{path} is damaged: {some_of(problems)}. "
                "Copy the checkpoint again, or convert its source again with --overwrite"
            )
        return checkpoint

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Reads elastic.json and looks at no other file: a part of a checkpoint may be all that was downloaded.

        Raises:
            CheckpointError: there is no checkpoint, or it is incomplete.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise CheckpointError(_absent(path))
        return cls(path, Manifest.read(path / MANIFEST), home=path)

    def with_home(self, home: Path) -> Self:
        """The same checkpoint with its executables below another folder."""
        return type(self)(self.path, self.manifest, home=home)

    @property
    def tokenizer_path(self) -> Path:
        """Folder of the model's tokenizer files."""
        return self.path / TOKENIZER

    @property
    def executables_path(self) -> Path:
        """Folder of the executables of every mode and target."""
        return self.home / EXECUTABLES

    def folders(self, plan: Plan) -> list[FolderName]:
        """The folders that a plan reads, in the order the model computes them.

        A tied language-model head in bf16 is the embedding, and reads nothing more.

        Raises:
            PlanError: the plan is for another model.
            CheckpointError: the plan reads a precision that was not stored.
        """
        plan.check(self.config)
        wanted = [(EMBEDDING, "bf16"), (NORMS, "bf16")]
        for group, choice in plan.choices.items():
            folder = (group, stored_precision(choice))
            if folder != (LM_HEAD, "bf16") or not self.config.tie_word_embeddings:
                wanted.append(folder)
        if missing := [folder for folder in wanted if folder not in self.manifest.folders]:
            precisions = ", ".join(sorted({precision for _, precision in missing}))
            raise CheckpointError(
                f"mode {plan.name!r} reads {len(missing)} groups in {precisions}, which {self.path} does not hold "
                f"(the first: {missing[0][0]}): convert the source again without --only, or use a mode that needs "
                f"only what is stored: {[plan.name for plan in self.stored_plans()] or 'there is none'}"
            )
        return wanted

    def weight_bytes(self, plan: Plan) -> int:
        """Bytes of the arrays a plan needs in memory."""
        return sum(self._folder(*folder).nbytes for folder in self.folders(plan))

    def leaves(self, name: str, precision: str) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of one folder: `values` [out, in] (and `scales` [out, blocks]); of `norms`: `attention`, `mlp`
        [layers, hidden] and `final` [hidden].

        Raises:
            CheckpointError: the checkpoint does not hold the folder.
        """
        return {leaf: described.struct for leaf, described in self._folder(name, precision).leaves.items()}

    def restore(
        self,
        folders: Iterable[FolderName],
        device: jax.Device,  # pyright: ignore[reportInvalidTypeForm]  (jaxlib has no stub for it)
        workers: int,
        progress: Progress | None = None,
        stop: threading.Event | None = None,
    ) -> dict[FolderName, dict[str, jax.Array]]:
        """Reads folders to a device by many threads, the largest array first; traces and compiles nothing.

        Args:
            folders: what to read; nothing else is opened.
            device: where the arrays go.
            workers: threads.
            progress: is told about bytes of arrays.
            stop: ends the reading when set.

        Raises:
            CheckpointError: a folder is not stored, cannot be read, or holds something else than elastic.json says.
                Nothing is left on the device then.
            Cancelled: `stop` was set.
        """
        wanted = list(folders)
        arrays: dict[tuple[FolderName, str], StoredArray] = {}
        done = 0

        def arrived(key: tuple[FolderName, str], nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, sum(array.nbytes for array in arrays.values()), "/".join((*key[0], key[1])))

        try:
            for folder in wanted:
                path = self.path / WEIGHTS / Path(*folder)
                for name, struct in self.leaves(*folder).items():
                    arrays[folder, name] = StoredArray.open(path / name, struct)
            read = read_to_device(arrays, device, workers=workers, stop=stop or threading.Event(), arrived=arrived)
        except DamagedArrayError as error:
            raise CheckpointError(
                f"{error}; `elastic-jax verify {shlex.quote(str(self.path))}` lists the damaged files"
            ) from None
        return {folder: {name: read[folder, name] for name in self.leaves(*folder)} for folder in wanted}

    def plans(self) -> dict[str, Plan]:
        """Every plan that is stored, by name.

        Raises:
            PlanError: a plan file is damaged or is for another model.
        """
        return {path.stem: self.plan(path.stem) for path in sorted((self.path / PLANS).glob("*.json"))}

    def stored_plans(self) -> list[Plan]:
        """The plans whose weights are all stored: a conversion with `--only` leaves some without.

        Raises:
            PlanError: a plan file is damaged or is for another model.
        """
        tied = {(LM_HEAD, "bf16")} if self.config.tie_word_embeddings else set()
        stored = set(self.manifest.folders) | tied
        return [
            plan
            for plan in self.plans().values()
            if {(group, stored_precision(choice)) for group, choice in plan.choices.items()} <= stored
        ]

    def plan(self, mode: str) -> Plan:
        """The plan of a mode, or the one that a request of the frontier means (`Frontier.resolve`).

        Raises:
            PlanError: there is no such mode (the message names those there are), no plan meets the request, or a plan
                is damaged or is for another model.
        """
        modes = sorted(path.stem for path in (self.path / PLANS).glob("*.json"))
        if mode not in modes:
            frontier = Frontier.read(self.path)
            plan = None if frontier is None else frontier.plan(mode)
            if plan is None:
                searched = f", or of its frontier {REQUESTS}" if frontier else ""
                if frontier is None and re.match(r"[0-9.]|[a-z-]+=", mode):  # what only a frontier could mean
                    searched = "; others are there after `elastic-jax search`"
                raise PlanError(f"{self.path} has no mode {mode!r}; modes there: {modes}{searched}")
            plan.check(self.config)
            return plan
        plan = read_plan(self.path / PLANS / f"{mode}.json")
        if plan.name != mode:
            raise PlanError(f"{self.path / PLANS / mode}.json should hold the plan {mode!r}, found {plan.name!r}")
        plan.check(self.config)
        return plan

    def files(self, plan: Plan | None = None) -> dict[str, FileRecord]:
        """Every file that elastic.json names, or only those that a plan needs, by path below the checkpoint.

        Raises:
            PlanError: the plan is for another model.
            CheckpointError: the plan reads a precision that was not stored.
        """
        files = {f"{TOKENIZER}/{name}": record for name, record in self.manifest.tokenizer.items()}
        for folder in self.manifest.folders if plan is None else self.folders(plan):
            below = "/".join((WEIGHTS, *folder))
            files |= {f"{below}/{path}": record for path, record in self._folder(*folder).files.items()}
        return files

    def wrong_sizes(self, plan: Plan | None = None) -> list[str]:
        """Which of `files(plan)` are missing or of another size than elastic.json says, in words."""
        problems = []
        for name, record in self.files(plan).items():
            try:
                size = (self.path / name).stat().st_size
            except OSError:
                problems.append(f"{name}: missing")
                continue
            if size != record.size:
                problems.append(f"{name}: should have {record.size} bytes, has {size}")
        return problems

    def verify(self) -> list[str]:
        """Reads every file and compares its sha256 with elastic.json's; returns the problems, in words."""
        problems = self.wrong_sizes()
        damaged = {problem.split(":")[0] for problem in problems}
        for name, record in self.files().items():
            if name in damaged:
                continue
            found = describe_file(self.path / name)
            if found.sha256 != record.sha256:
                problems.append(f"{name}: sha256 should be {record.sha256}, found {found.sha256}")
        return problems

    def _folder(self, name: str, precision: str) -> Folder:
        folder = self.manifest.folders.get((name, precision))
        if folder is None:
            stored = sorted(other for stored_name, other in self.manifest.folders if stored_name == name)
            raise CheckpointError(f"{self.path} does not hold {name} in {precision}; precisions stored: {stored}")
        return folder


def some_of(problems: list[str]) -> str:
    """The first few of a list of problems, and how many more there are."""
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    return "; ".join(problems[:5]) + more


def _absent(path: Path) -> str:
    """Why there is no checkpoint here, and what to do."""
    quoted = shlex.quote(str(path))
    if not path.is_dir():
        return f"no Elastic checkpoint {path}: there is no such folder; make one with `convert-weights SOURCE {quoted}`"
    if (path / JOURNAL).is_file():
        return f"{path} is an unfinished conversion; finish it with: {_finish_command(path)}"
    if (path / "config.json").is_file():
        return f"{path} is a Hugging Face folder, not an Elastic checkpoint; convert it: `convert-weights {quoted} NEW`"
    return f"{path} is not an Elastic checkpoint: it has no {MANIFEST}; make one with `convert-weights SOURCE NEW`"


def _finish_command(path: Path) -> str:
    try:
        command = json.loads((path / JOURNAL).read_text("utf-8"))["finish"]
        return shlex.join(["convert-weights", *command["arguments"], str(path), *command["options"]])
    except (OSError, ValueError, KeyError, TypeError):
        return f"convert-weights SOURCE {shlex.quote(str(path))} (its {JOURNAL} is unreadable: add --overwrite)"
