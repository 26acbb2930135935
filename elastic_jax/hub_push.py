"""Pushing an Elastic checkpoint to the Hugging Face Hub: in one commit, so that nobody ever sees half of it.

The repository's folders are the checkpoint's, so that loading a mode downloads only its own.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, errors

from aot_cache import store
from aot_cache.manifest import MANIFEST as STORE_MANIFEST
from aot_cache.manifest import blob_path, read_manifest
from elastic_jax.checkpoint import Checkpoint, some_of
from elastic_jax.checkpoint_format import EXECUTABLES, MANIFEST, PLANS, TOKENIZER, WEIGHTS
from elastic_jax.errors import CheckpointError, ElasticError, ExecutableError, HubError
from elastic_jax.executables import store_folders
from elastic_jax.frontier import FRONTIER, Frontier
from elastic_jax.hub_card import model_card
from elastic_jax.hub_id import is_hub_id
from elastic_jax.loading import Say
from elastic_jax.plan import Plan
from elastic_jax.units import traced_source_digest

CARD = "README.md"
"""A repository's model card: written where there is none, never replaced."""

type _Content = Path | bytes


@dataclasses.dataclass(frozen=True)
class Pushed:
    """What a push made of a repository.

    Attributes:
        repository: `owner/name`.
        commit: the one that holds it all.
        url: of the commit.
        modes: that can be loaded from it.
        files: of the checkpoint, those that the repository held before among them.
        bytes: of these files.
        stores: executable stores among them.
    """

    repository: str
    commit: str
    url: str
    modes: tuple[str, ...]
    files: int
    bytes: int
    stores: int


def push(
    path: str | Path,
    repository: str,
    *,
    modes: Sequence[str] | None,
    executables: bool,
    private: bool,
    revision: str | None,
    token: str | None,
    message: str | None,
    say: Say,
) -> Pushed:
    """Makes a repository hold a checkpoint, after checking every file; creates it where there is none.

    Weights, plans, frontier and tokenizer in the repository become the checkpoint's; with `modes` there is no frontier,
    whose other plans would lack weights. Of its executables, those of other targets stay: they may come from another
    machine, and whoever loads them checks whether they fit.

    Args:
        path: the checkpoint.
        repository: `owner/name`.
        modes: whose weights, plans and executables to push; None for all of the checkpoint.
        executables: push the checkpoint's executables too.
        private: create a private repository; one that is there must be private.
        revision: the branch, created where there is none; None is the default branch.
        token: one that may write; None uses the one that `hf auth login` stored.
        message: of the commit; None for a plain one.
        say: is told what is going on.

    Raises:
        CheckpointError: there is no complete checkpoint, it is damaged, or lacks what a mode reads.
        PlanError: there is no such mode, or the frontier is damaged.
        ExecutableError: executables are damaged, or would not be accepted at load.
        HubError: the Hub cannot be reached, does not allow it, or the repository changed meanwhile.
    """
    if not is_hub_id(repository):
        raise HubError(f"{repository!r} is no Hub id: those are owner/name")
    checkpoint = Checkpoint.open(path)
    plans = [checkpoint.plan(mode) for mode in modes] if modes else checkpoint.stored_plans()
    if not plans:
        raise CheckpointError(f"{path} holds the weights of no mode: convert the source again without --only")
    files: dict[str, _Content] = _checkpoint_files(checkpoint, plans if modes else None)
    stores = _stores(checkpoint, plans) if executables else []
    say(f"checking {len(files)} files and {len(stores)} executable stores")
    if problems := checkpoint.verify():
        raise CheckpointError(f"{path} is damaged and was not pushed: {some_of(problems)}")
    for folder in stores:
        files |= _store_files(checkpoint, folder, plans)
    size = sum(len(content) if isinstance(content, bytes) else content.stat().st_size for content in files.values())
    api = huggingface_hub.HfApi(token=token)
    with _pushing(repository):
        api.create_repo(repository, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        there = api.model_info(repository, revision=revision)
        names = {sibling.rfilename for sibling in there.siblings or []}
        if private and not there.private:
            raise HubError(f"{repository} is public, and a private one was asked for: nothing was pushed")
        if ".gitignore" in names:
            raise HubError(f"{repository} has a .gitignore, by which the Hub would leave files out: delete it first")
        if CARD not in names:
            files[CARD] = model_card(checkpoint, plans, repository).encode()
        say(f"uploading to {repository} what it does not hold of {len(files)} files, {size / 1e9:.3f} GB")
        commit = api.create_commit(
            repository,
            operations=[
                *(CommitOperationAdd(name, content) for name, content in files.items()),
                *(CommitOperationDelete(name) for name in sorted(_outdated(names, files, plans))),
            ],
            commit_message=message or f"Elastic checkpoint with modes {', '.join(plan.name for plan in plans)}",
            revision=revision,
            parent_commit=there.sha,
        )
    modes_pushed = tuple(plan.name for plan in plans)
    return Pushed(repository, commit.oid, commit.commit_url, modes_pushed, len(files), size, len(stores))


def _checkpoint_files(checkpoint: Checkpoint, plans: Sequence[Plan] | None) -> dict[str, _Content]:
    """What of a checkpoint, without executables, is pushed: all of it, or what some plans need.

    Named one by one, so that nothing else that lies in the folder is ever published.
    """
    if plans is None:
        contents: list[str] = [MANIFEST, *checkpoint.files()]
        contents += [f"{PLANS}/{plan.name}.json" for plan in checkpoint.plans().values()]
        contents += [FRONTIER] if Frontier.read(checkpoint.path) is not None else []
        return {name: checkpoint.path / name for name in contents}
    folders = {folder for plan in plans for folder in checkpoint.folders(plan)}
    kept = {name: folder for name, folder in checkpoint.manifest.folders.items() if name in folders}
    manifest = dataclasses.replace(checkpoint.manifest, folders=kept)
    names = {name for plan in plans for name in checkpoint.files(plan)} | {f"{PLANS}/{p.name}.json" for p in plans}
    return {
        MANIFEST: (json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n").encode(),
        **{name: checkpoint.path / name for name in sorted(names)},
    }


def _stores(checkpoint: Checkpoint, plans: Iterable[Plan]) -> list[Path]:
    return [folder for folder in store_folders(checkpoint.path) if _plan_of(folder.parent.name, plans) is not None]


def _plan_of(folder: str, plans: Iterable[Plan]) -> Plan | None:
    """Whose executables a folder <mode> or <mode>.<dtype> holds."""
    return next((plan for plan in plans if folder == plan.name or folder.startswith(f"{plan.name}.")), None)


def _store_files(checkpoint: Checkpoint, folder: Path, plans: Iterable[Plan]) -> dict[str, _Content]:
    advice = "Compile it again, delete it, or push without executables (--no-executables)"
    if problems := store.verify(folder):
        raise ExecutableError(f"{some_of(problems)}. {advice}")
    plan = _plan_of(folder.parent.name, plans)
    manifest = read_manifest(folder, hint=advice)
    expected = {
        "plan_hash": plan.digest() if plan is not None else None,
        "config_hash": checkpoint.config.digest(),
        "source_hash": traced_source_digest(),
    }
    meanings = {"plan_hash": "another plan", "config_hash": "another model", "source_hash": "another elastic-jax"}
    if other := [name for name, value in expected.items() if manifest.identity.get(name) != value]:
        raise ExecutableError(f"{folder} was compiled for {meanings[other[0]]}. {advice}")
    paths = [folder / STORE_MANIFEST, *(blob_path(folder, name) for name in manifest.units)]
    return {path.relative_to(checkpoint.path).as_posix(): path for path in paths}


def _outdated(names: set[str], files: Mapping[str, _Content], plans: Sequence[Plan]) -> Iterator[str]:
    """Files of the repository that are no part of what is pushed."""
    replaced = {_place(name) for name in files if name.startswith(f"{EXECUTABLES}/")}
    for name in names - files.keys():
        top, *below = PurePosixPath(name).parts
        if top == EXECUTABLES and len(below) > 1:
            if _place(name) in replaced or _plan_of(below[1], plans) is None:
                yield name
        elif top in (WEIGHTS, PLANS, TOKENIZER, FRONTIER):
            yield name


def _place(name: str) -> tuple[str, ...]:
    """Target and mode of a file of an executable store."""
    return PurePosixPath(name).parts[1:3]


@contextlib.contextmanager
def _pushing(repository: str) -> Iterator[None]:
    """Turns the Hub's errors into messages that say what to do."""
    try:
        yield
    except ElasticError:
        raise
    except errors.OfflineModeIsEnabled:
        raise HubError("HF_HUB_OFFLINE is set: unset it to push") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise HubError(
                f"the Hub does not let you write to {repository}: check the name, and pass --token, or log in with "
                f"`hf auth login`, with a token that may write ({error})"
            ) from None
        if status == 412:
            raise HubError(f"{repository} changed while it was being pushed to: run the same command again") from None
        raise HubError(_failed(repository, error)) from None
    except Exception as error:  # of whichever HTTP library this version of huggingface_hub uses
        raise HubError(_failed(repository, error)) from None


def _failed(repository: str, error: Exception) -> str:
    reason = f"{error}: {error.__cause__}" if error.__cause__ is not None else str(error)
    return (
        f"pushing to {repository} failed ({reason}); the repository is as it was. Run the same command again: what was "
        "uploaded is not uploaded twice"
    )
