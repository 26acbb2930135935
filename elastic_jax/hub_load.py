"""Fetching one mode of an Elastic checkpoint from the Hugging Face Hub: its arrays, and this device's executables.

Downloaded executables are native code of somebody else's, so they are fetched only for who trusts them. Otherwise the
mode is compiled here. The Hub's cache belongs to the Hub's client: what is compiled is kept in a folder of its own.
"""

import dataclasses
from pathlib import Path

from aot_cache.manifest import MANIFEST as STORE_MANIFEST
from aot_cache.store import verify
from aot_cache.target import Device, Target
from elastic_jax import hub_access
from elastic_jax.checkpoint import Checkpoint, some_of
from elastic_jax.checkpoint_format import EXECUTABLES, MANIFEST, PLANS, TOKENIZER, WEIGHTS
from elastic_jax.demo_model import default_cache
from elastic_jax.errors import CheckpointError, ExecutableError, HubError
from elastic_jax.executables import ModeStore
from elastic_jax.frontier import FRONTIER
from elastic_jax.hub_access import Snapshot
from elastic_jax.kv_cache import KvPrecision
from elastic_jax.loading import OnMissing, Say
from elastic_jax.plan import Plan
from elastic_jax.step import ComputeDtype


@dataclasses.dataclass(frozen=True)
class FetchedMode:
    """One mode, ready to be loaded.

    Attributes:
        checkpoint: in the Hub's cache, where only the files of some modes are. Its executables are there too, or in
            this user's own cache.
        on_missing: whether executables that are missing may be compiled; never into the Hub's cache.
    """

    checkpoint: Checkpoint
    on_missing: OnMissing


def fetch_description(repository: str, *, revision: str | None, token: str | None) -> Checkpoint:
    """Fetches what says what a checkpoint holds, and nothing that it holds.

    Raises:
        HubError: the repository cannot be had.
        CheckpointError: it is no Elastic checkpoint.
    """
    snapshot = hub_access.resolve(repository, revision=revision, token=token)
    return _read(snapshot, [MANIFEST, FRONTIER, f"{PLANS}/*", f"{EXECUTABLES}/*/{STORE_MANIFEST}"], token)


def fetch_mode(
    repository: str,
    mode: str,
    *,
    dtype: ComputeDtype,
    kv: KvPrecision = "full",
    device: Device,
    max_context: int | None,
    on_missing: OnMissing,
    revision: str | None,
    token: str | None,
    trust: bool,
    say: Say,
) -> FetchedMode:
    """Fetches what a mode reads, as far as the Hub's cache does not hold it; all of one commit.

    Args:
        repository: `owner/name`.
        mode: one of the checkpoint's, or a request of its frontier.
        dtype: compute type.
        kv: precision of the KV cache.
        device: whose executables are wanted.
        max_context: the longest context wanted, or None.
        on_missing: with `trust`, what to do if the repository's executables are missing or do not fit.
        revision: branch, tag or commit; None is the default branch.
        token: for private or gated repositories; None uses the one that `hf auth login` stored.
        trust: use the repository's executables. Without it they are not fetched, and compiling is allowed.
        say: is told why executables are not used.

    Raises:
        HubError: the repository cannot be had.
        CheckpointError: it is no Elastic checkpoint, lacks what the mode reads, or files of it are damaged.
        PlanError: there is no such mode.
        ExecutableError: with `trust` and `on_missing="error"`, there are no executables that fit.
    """
    snapshot = hub_access.resolve(repository, revision=revision, token=token)
    checkpoint = _read(snapshot, [MANIFEST, FRONTIER, f"{PLANS}/*", f"{TOKENIZER}/*"], token)
    plan = checkpoint.plan(mode)
    folders = checkpoint.folders(plan)
    store = ModeStore(checkpoint, plan, dtype, device, kv)
    own = dataclasses.replace(store, checkpoint=checkpoint.with_home(compiled_folder(snapshot)))
    if own.pools and _problem(own, max_context) is None:
        fetched = FetchedMode(own.checkpoint, on_missing if trust else "compile")
    elif trust:
        fetched = _trusted(snapshot, store, own, max_context, on_missing, token, say)
    else:
        if _offered(snapshot, store):
            say(
                f"{repository} holds executables of mode {mode} for this device. They are native code that somebody "
                "else made, and are not used without trust=True (--trust): compiling here instead"
            )
        fetched = FetchedMode(own.checkpoint, "compile")
    snapshot.download([f"{WEIGHTS}/{name}/{precision}/*" for name, precision in folders], token)
    _check_whole(snapshot, checkpoint, plan)
    return fetched


def compiled_folder(snapshot: Snapshot) -> Path:
    """Where executables are kept that were compiled here for a repository's commit."""
    return default_cache() / "compiled" / snapshot.repository.replace("/", "--") / snapshot.commit


def _read(snapshot: Snapshot, patterns: list[str], token: str | None) -> Checkpoint:
    if snapshot.files is not None and MANIFEST not in snapshot.files:
        convert = "; convert it: `convert-weights {} NEW`" if "config.json" in snapshot.files else ""
        raise CheckpointError(
            f"{snapshot.repository} is not an Elastic checkpoint: it has no {MANIFEST}"
            + convert.format(snapshot.repository)
        )
    path = snapshot.download(patterns, token)
    if not (path / MANIFEST).is_file():
        raise HubError(
            f"the Hub's cache holds no {MANIFEST} of {snapshot.repository}, and HF_HUB_OFFLINE is set: unset it"
        )
    return Checkpoint.read(path)


def _trusted(
    snapshot: Snapshot,
    store: ModeStore,
    own: ModeStore,
    max_context: int | None,
    on_missing: OnMissing,
    token: str | None,
    say: Say,
) -> FetchedMode:
    """The repository's executables if they fit; else the caller's choice."""
    snapshot.download([f"{_below(store)}/*"], token)
    problem = _problem(store, max_context)
    if problem is None:
        return FetchedMode(store.checkpoint, "error")
    problem = f"the executables of {snapshot.repository} cannot be used: {problem}"
    if on_missing == "error":
        raise ExecutableError(f"{problem}\n{own.hint}")
    say(problem)
    return FetchedMode(own.checkpoint, on_missing)


def _below(store: ModeStore) -> str:
    """The mode's folder of executables, by its path in the repository."""
    return store.folder.relative_to(store.checkpoint.path).as_posix()


def _offered(snapshot: Snapshot, store: ModeStore) -> bool:
    return bool(snapshot.select([f"{_below(store)}/*"]) or store.pools)


def _problem(store: ModeStore, max_context: int | None) -> str | None:
    """Why a mode's executables do not serve; None if they do."""
    if not store.pools:
        return f"there are none of mode {store.plan.name} for {Target.of(store.device).folder}"
    longest = 0
    for pool in store.pools:
        try:
            step = store.stored_step(pool)
            store.check(step)
        except ExecutableError as error:
            return str(error).removesuffix(store.hint).strip()
        if damage := verify(store.pool_folder(pool)):
            return some_of(damage)
        longest = max(longest, step.max_context)
    if max_context is not None and max_context > longest:
        return f"they were compiled for contexts of up to {longest} tokens, not {max_context}"
    return None


def _check_whole(snapshot: Snapshot, checkpoint: Checkpoint, plan: Plan) -> None:
    problems = checkpoint.wrong_sizes(plan)
    if not problems:
        return
    if snapshot.files is None:
        raise HubError(
            f"the Hub's cache does not hold mode {plan.name} of {snapshot.repository} whole, and HF_HUB_OFFLINE is set "
            f"({some_of(problems)}): unset it"
        )
    raise CheckpointError(
        f"what was downloaded of {snapshot.repository} is damaged: {some_of(problems)}. Remove it from the cache "
        f"(`hf cache rm model/{snapshot.repository}`) and load it again; if that changes nothing, the repository is "
        "damaged: push it again"
    )
