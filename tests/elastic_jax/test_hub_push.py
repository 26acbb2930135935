"""Pushing: huggingface_hub's own client against a Hub on this machine."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, HubServer, RefusedError, serve_hub, use_hub
from huggingface_hub import constants
from tiny import CompiledTiny, write_frontier

from elastic_jax.checkpoint import Checkpoint
from elastic_jax.errors import CheckpointError, ExecutableError, HubError, PlanError
from elastic_jax.executables import store_folders
from elastic_jax.frontier import FRONTIER
from elastic_jax.hub_push import Pushed, push

# Large files go through a part of the client that calls its own HTTP library in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

NAME = "owner/tiny"


@pytest.fixture(scope="module")
def compiled(compiled_tiny: Callable[..., CompiledTiny]) -> CompiledTiny:
    return compiled_tiny("XL", "float32")


@pytest.fixture
def folder(compiled: CompiledTiny, tmp_path: Path) -> Path:
    """A copy of the checkpoint with one store, to be spoilt."""
    copy = tmp_path / "tiny.elastic"
    others = {path.name for path in compiled.checkpoint.path.glob("executables/*/*")} - {"XL.float32"}
    shutil.copytree(compiled.checkpoint.path, copy, ignore=shutil.ignore_patterns(*others, ".*.partial", ".*.old"))
    return copy


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with serve_hub() as hub:
        use_hub(monkeypatch, hub, tmp_path / "hub")
        yield hub


def run(folder: Path, **changes: Any) -> Pushed:
    options: dict[str, Any] = {"modes": None, "executables": True, "private": False, "revision": None}
    options |= {"repository": NAME, "token": TOKEN, "message": None, "say": lambda _: None}
    return push(folder, **(options | changes))


def on_disk(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pushed_files(hub: HubServer) -> dict[str, bytes]:
    """What the repository holds, without what is no part of the checkpoint."""
    return {k: v for k, v in hub.repositories[NAME].files.items() if k not in ("README.md", ".gitattributes")}


def test_the_repository_is_the_folder_in_one_commit(hub: HubServer, folder: Path) -> None:
    commits: list[int] = []
    hub.on_commit = lambda: commits.append(1)
    pushed = run(folder)
    files = on_disk(folder)
    assert pushed_files(hub) == files
    assert any(name.endswith("/.zarray") for name in files)
    assert commits == [1]
    assert hub.repositories[NAME].messages == ["Elastic checkpoint with modes L, M, S, XL"]
    assert pushed.modes == ("L", "M", "S", "XL")
    assert pushed.stores == 1
    assert pushed.commit == hub.repositories[NAME].branches["main"]
    assert pushed.files == len(files) + 1  # the model card
    assert not hub.repositories[NAME].private
    assert hub.downloaded == []


def test_only_what_belongs_to_the_checkpoint_is_published(hub: HubServer, folder: Path) -> None:
    whole = on_disk(folder)
    store = store_folders(folder)[0]
    for stray in (
        folder / "notes.txt",
        folder / "elastic.json.partial",
        folder / "conversion.json",
        folder / "weights/norms/bf16.partial/values/0.0",
        store.parent / f".{store.name}.partial" / "half.xla",
        folder / "plans" / ".hidden.json.swp",
    ):
        stray.parent.mkdir(parents=True, exist_ok=True)
        stray.write_text("not to be published")
    run(folder)
    assert pushed_files(hub) == whole


def test_what_the_hub_holds_is_not_sent_again(hub: HubServer, folder: Path) -> None:
    first = run(folder)
    assert hub.uploaded
    hub.forget()
    assert run(folder).commit == first.commit
    assert hub.uploaded == []


def test_a_mode_alone_is_a_checkpoint_of_its_own(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    run(folder, modes=["S"])
    files = pushed_files(hub)
    assert {name for name in files if name.startswith(("plans/", "executables/"))} == {"plans/S.json"}
    for name, content in files.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    copy = Checkpoint.open(tmp_path / "copy")
    assert copy.verify() == []
    assert [plan.name for plan in copy.stored_plans()] == ["S"]
    assert {precision for _, precision in copy.manifest.folders} == {"int8", "bf16"}
    assert ("layers.0.qkv", "bf16") not in copy.manifest.folders


def test_a_frontier_goes_with_the_whole_checkpoint_only(hub: HubServer, folder: Path) -> None:
    write_frontier(folder)
    run(folder)
    assert pushed_files(hub) == on_disk(folder)
    run(folder, modes=["S"])
    assert FRONTIER not in pushed_files(hub)
    (folder / FRONTIER).write_text("{}")
    with pytest.raises(PlanError, match="is no frontier"):
        run(folder)


def test_what_was_pushed_before_is_replaced_but_for_other_targets(hub: HubServer, folder: Path) -> None:
    run(folder)
    repository = hub.repositories[NAME]
    kept = {"executables/abacus/XL/kv64/manifest.json": b"1", "LICENSE": b"2", "README.md": b"3"}
    (store,) = store_folders(folder)
    here = store.parent.relative_to(folder).as_posix()
    gone = {f"{here}/kv1/manifest.json": b"4", "weights/old/bf16/x": b"5", "executables/abacus/XXS/kv64/a.xla": b"6"}
    repository.commit({**repository.files, **kept, **gone})
    run(folder)
    assert {k: v for k, v in repository.files.items() if k != ".gitattributes"} == {**on_disk(folder), **kept}
    run(folder, modes=["S"], executables=False)
    assert not any(name.startswith("executables/") for name in repository.files)


def test_without_executables_those_of_the_repository_stay(hub: HubServer, folder: Path) -> None:
    assert run(folder, executables=False).stores == 0
    assert not any(name.startswith("executables/") for name in pushed_files(hub))
    run(folder)
    run(folder, executables=False)
    assert pushed_files(hub) == on_disk(folder)


def test_a_model_card_says_what_it_is_and_how_to_load_it(hub: HubServer, folder: Path) -> None:
    values = json.loads((folder / "elastic.json").read_text())
    values["source"] |= {"repository": "mistralai/Some", "commit": "abc"}
    (folder / "elastic.json").write_text(json.dumps(values))
    run(folder)
    card = hub.repositories[NAME].files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: elastic-jax\n")
    assert "base_model: mistralai/Some" in card
    assert "at commit `abc`" in card
    assert "| XL |" in card
    assert Checkpoint.open(folder).plan("XL").note in card
    assert 'ElasticMistral.load("owner/tiny", mode=' in card
    assert str(folder) not in card


def test_a_branch_is_made_and_the_default_one_left(hub: HubServer, folder: Path) -> None:
    pushed = run(folder, revision="next", message="the next one")
    repository = hub.repositories[NAME]
    assert repository.branches["next"] == pushed.commit
    assert list(repository.files) == [".gitattributes"]
    assert repository.messages == ["the next one"]


def test_a_private_repository(hub: HubServer, folder: Path) -> None:
    run(folder, private=True)
    assert hub.repositories[NAME].private
    hub.repositories[NAME].private = False
    hub.forget()
    with pytest.raises(HubError, match="owner/tiny is public, and a private one was asked for: nothing was pushed"):
        run(folder, private=True)
    assert not any("commit" in request for request in hub.requests)


# -- refusals: nothing is sent -----------------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_sent(hub: HubServer) -> Iterator[None]:
    yield
    assert hub.requests == []


@pytest.mark.usefixtures("nothing_is_sent")
def test_a_damaged_checkpoint(folder: Path) -> None:
    name = next(name for name in on_disk(folder) if name.startswith("weights/") and name.endswith("/0.0"))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(CheckpointError, match=f"is damaged and was not pushed: {name}: sha256"):
        run(folder)


@pytest.mark.usefixtures("nothing_is_sent")
def test_damaged_executables(folder: Path) -> None:
    (store,) = store_folders(folder)
    blob = next(store.glob("*.xla"))
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(ExecutableError, match=f"(?s){blob.name}.*Compile it again.*--no-executables"):
        run(folder)


@pytest.mark.parametrize(
    ("key", "what"),
    [("plan_hash", "another plan"), ("config_hash", "another model"), ("source_hash", "another elastic-jax")],
)
@pytest.mark.usefixtures("nothing_is_sent")
def test_executables_that_nobody_could_load(folder: Path, key: str, what: str) -> None:
    (store,) = store_folders(folder)
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["identity"][key] = "0" * 64
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ExecutableError, match=f"was compiled for {what}"):
        run(folder)


@pytest.mark.usefixtures("nothing_is_sent")
def test_no_checkpoint_no_mode_and_no_id(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        run(tmp_path / "none")
    with pytest.raises(PlanError, match="no mode 'XXL'"):
        run(folder, modes=["XXL"])
    with pytest.raises(HubError, match="'tiny' is no Hub id"):
        run(folder, repository="tiny")


@pytest.mark.usefixtures("nothing_is_sent")
def test_offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set: unset it to push"):
        run(folder)


# -- refusals of the Hub -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [None, "a token that may only read"])
def test_a_token_that_may_not_write(hub: HubServer, folder: Path, token: str | None) -> None:
    with pytest.raises(HubError, match=r"does not let you write to owner/tiny.*--token.*hf auth login"):
        run(folder, token=token)
    assert hub.repositories == {}


def test_a_repository_that_changes_meanwhile_is_not_overwritten(hub: HubServer, folder: Path) -> None:
    run(folder, executables=False)
    repository = hub.repositories[NAME]

    def somebody_else() -> None:
        hub.on_commit = lambda: None
        repository.commit({"theirs": b""})

    hub.on_commit = somebody_else
    with pytest.raises(HubError, match="changed while it was being pushed to"):
        run(folder)
    assert list(repository.files) == ["theirs"]


def test_an_interrupted_push_leaves_the_repository_as_it_was(hub: HubServer, folder: Path) -> None:
    before: list[str] = []

    def refuse() -> None:
        before.extend(hub.repositories[NAME].files)
        raise RefusedError(400, "", "out of order")

    hub.on_commit = refuse
    with pytest.raises(HubError, match=r"(?s)out of order.*the repository is as it was"):
        run(folder)
    assert list(hub.repositories[NAME].files) == before == [".gitattributes"]
    hub.on_commit = lambda: None
    hub.forget()
    run(folder)
    assert hub.uploaded == []


def test_a_repository_that_ignores_files_is_refused(hub: HubServer, folder: Path) -> None:
    run(folder, executables=False)
    repository = hub.repositories[NAME]
    repository.commit({**repository.files, ".gitignore": b"*.xla"})
    with pytest.raises(HubError, match=r"has a \.gitignore"):
        run(folder)
