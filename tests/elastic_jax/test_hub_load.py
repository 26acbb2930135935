"""Loading by Hub id: huggingface_hub's own client against a Hub on this machine."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, HubServer, Repository, serve_hub, use_hub
from huggingface_hub import constants
from tiny import CompiledTiny, tiny_step_config, write_frontier

from aot_cache.guard import CompileCounter
from elastic_jax import ElasticMistral
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.demo_model import CACHE_VARIABLE
from elastic_jax.errors import CheckpointError, ExecutableError, HubError, PlanError
from elastic_jax.executables import store_folders
from elastic_jax.frontier import FRONTIER
from elastic_jax.hub_load import fetch_description
from elastic_jax.hub_push import push
from elastic_jax.step import Bucket

# Large files go through a part of the client that calls its own HTTP library in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

NAME = "owner/tiny"


@pytest.fixture(scope="module")
def compiled(compiled_tiny: Callable[..., CompiledTiny]) -> CompiledTiny:
    return compiled_tiny("XL", "float32")


@pytest.fixture(scope="module")
def tokens(compiled: CompiledTiny) -> tuple[int, ...]:
    """What the checkpoint on disk generates."""
    return generate(ElasticMistral.load(compiled.checkpoint.path, "XL", dtype="float32"))


@pytest.fixture(scope="module")
def pushed(compiled: CompiledTiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, bytes]]:
    """The files of a repository that the checkpoint was pushed to, with one mode's executables."""
    folder = tmp_path_factory.mktemp("pushed") / "tiny.elastic"
    others = {path.name for path in compiled.checkpoint.path.glob("executables/*/*")} - {"XL.float32"}
    shutil.copytree(compiled.checkpoint.path, folder, ignore=shutil.ignore_patterns(*others, ".*.partial", ".*.old"))
    with pytest.MonkeyPatch.context() as patch, serve_hub() as hub:
        use_hub(patch, hub, folder.parent / "cache")
        push(
            folder,
            NAME,
            modes=None,
            executables=True,
            private=False,
            revision=None,
            token=TOKEN,
            message=None,
            say=lambda _: None,
        )
        yield hub.repositories[NAME].files


@pytest.fixture
def hub(pushed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub that holds it, and empty caches."""
    with serve_hub() as hub:
        hub.repositories[NAME] = Repository()
        hub.repositories[NAME].commit(pushed)
        use_hub(monkeypatch, hub, tmp_path / "hub")
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "own"))
        monkeypatch.chdir(tmp_path)
        yield hub


@pytest.fixture
def repository(hub: HubServer) -> Repository:
    return hub.repositories[NAME]


def load(name: str = NAME, **options: Any) -> ElasticMistral:
    defaults: dict[str, Any] = {"mode": "XL", "dtype": "float32", "workers": 2, "preload": False}
    return ElasticMistral.load(name, **(defaults | options))


def generate(model: ElasticMistral) -> tuple[int, ...]:
    return model.generate([5, 6, 7], max_new_tokens=8, ignore_end=True).token_ids


def compile_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled here is small: the buckets that `generate` needs, as they are in what was pushed."""
    step = tiny_step_config(rows=1, buckets=(Bucket(1, 0), Bucket(0, 16)))
    monkeypatch.setattr("elastic_jax.loading.default_step_config", lambda *_, **__: step)


# -- trusted -----------------------------------------------------------------------------------------------------------


def test_a_trusted_mode_generates_the_same_without_compiling(hub: HubServer, tokens: tuple[int, ...]) -> None:
    counter = CompileCounter()
    model = load(trust=True)
    assert generate(model) == tokens
    assert counter.count() == 0
    assert Path(model.info()["executables"]["folder"]).is_relative_to(constants.HF_HUB_CACHE)
    assert hub.downloaded


@pytest.mark.usefixtures("tokens")
def test_only_the_modes_files_are_downloaded(hub: HubServer, compiled: CompiledTiny) -> None:
    path = load(trust=True).checkpoint.path
    names = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    weights = {name for name in names if name.startswith("weights/")}
    assert weights == {name for name in compiled.checkpoint.files(compiled.plan) if name.startswith("weights/")}
    assert not any("int8" in name for name in names)
    (target,) = {name.split("/")[1] for name in names if name.startswith("executables/")}
    assert {name for name in names if name.startswith("executables/")} == {
        name for name in hub.repositories[NAME].files if name.startswith(f"executables/{target}/XL.float32/")
    }
    assert {name.split("/")[0] for name in names} == {"elastic.json", "plans", "tokenizer", "weights", "executables"}
    hub.forget()
    load(trust=True)
    assert hub.downloaded == []


def test_a_request_of_the_frontier_downloads_that_plans_files(
    repository: Repository, pushed: dict[str, bytes], compiled: CompiledTiny, tmp_path: Path
) -> None:
    shutil.copytree(compiled.checkpoint.path, tmp_path / "searched", ignore=shutil.ignore_patterns("executables"))
    write_frontier(tmp_path / "searched")
    repository.commit(pushed | {FRONTIER: (tmp_path / "searched" / FRONTIER).read_bytes()})
    with pytest.raises(ExecutableError, match="there are none of mode S for"):
        load(mode="max-loss=2%", trust=True)
    with pytest.raises(PlanError, match="no plan"):
        load(mode="max-gib=0.0001", trust=True)


def test_executables_of_other_targets_and_modes_are_left_there(
    hub: HubServer, repository: Repository, pushed: dict[str, bytes]
) -> None:
    repository.commit(pushed | {"executables/abacus/XL.float32/kv1/big.xla": b"1", "executables/abacus/S/a": b"2"})
    load(trust=True)
    assert not any("abacus" in name for name in hub.downloaded)


def test_a_private_repository_needs_its_token(repository: Repository, tokens: tuple[int, ...]) -> None:
    repository.private = True
    with pytest.raises(HubError, match="the Hub shows no repository owner/tiny"):
        load(trust=True)
    assert generate(load(trust=True, token=TOKEN)) == tokens


def test_a_revision_is_one_commit(repository: Repository, tokens: tuple[int, ...]) -> None:
    repository.branches["v1"] = repository.branches["main"]
    repository.commit({"README.md": b""})
    assert generate(load(trust=True, revision="v1")) == tokens
    with pytest.raises(CheckpointError, match=r"owner/tiny is not an Elastic checkpoint: it has no elastic\.json$"):
        load()


def test_offline_the_cache_serves(hub: HubServer, tokens: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    load(trust=True)
    hub.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert generate(load(trust=True)) == tokens
    with pytest.raises(HubError, match=r"does not hold mode S of owner/tiny whole.*HF_HUB_OFFLINE is set.*weights/"):
        ElasticMistral.load(NAME, "S", dtype="float32", trust=False)
    assert hub.requests == []


# -- executables that do not serve -------------------------------------------------------------------------------------


def spoil_manifests(repository: Repository, files: dict[str, bytes], **values: Any) -> None:
    def spoilt(content: bytes) -> bytes:
        manifest = json.loads(content)
        manifest["identity"] |= values
        return json.dumps(manifest).encode()

    change = {name: spoilt(content) for name, content in files.items() if name.endswith("/manifest.json")}
    assert change
    repository.commit(files | change)


def test_executables_that_do_not_fit_are_named(repository: Repository, pushed: dict[str, bytes]) -> None:
    spoil_manifests(repository, pushed, jax="0.0.1")
    with pytest.raises(ExecutableError, match=r"(?s)of owner/tiny cannot be used.*0\.0\.1.*on_missing=.compile") as no:
        load(trust=True)
    assert "elastic-jax compile" not in str(no.value)


def test_a_damaged_executable_is_named(repository: Repository, pushed: dict[str, bytes]) -> None:
    blob = next(name for name in pushed if name.endswith(".xla"))
    repository.commit(pushed | {blob: pushed[blob][:-1] + b"?"})
    with pytest.raises(ExecutableError, match=f"(?s){blob}.*on_missing=.compile"):
        load(trust=True)


def test_no_executables_for_this_device(repository: Repository, pushed: dict[str, bytes]) -> None:
    repository.commit({name: content for name, content in pushed.items() if not name.startswith("executables/")})
    with pytest.raises(ExecutableError, match=r"there are none of mode XL for cpu"):
        load(trust=True)


def test_trusted_executables_that_do_not_fit_are_compiled_where_that_is_allowed(
    repository: Repository, pushed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_manifests(repository, pushed, jax="0.0.1")
    compile_here(monkeypatch)
    said: list[str] = []
    model = load(trust=True, on_missing="compile", say=said.append)
    assert "the executables of owner/tiny cannot be used" in said[0]
    assert Path(model.info()["executables"]["folder"]).is_relative_to(tmp_path / "own")


# -- not trusted -------------------------------------------------------------------------------------------------------


def test_untrusted_executables_are_compiled_here_once_and_that_is_said(
    hub: HubServer, tokens: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_here(monkeypatch)
    said: list[str] = []
    model = load(say=said.append)
    assert generate(model) == tokens
    assert not any(name.startswith("executables/") for name in hub.downloaded)
    assert "owner/tiny holds executables of mode XL" in said[0]
    assert "trust=True (--trust): compiling here instead" in said[0]
    assert said[1].startswith("compiling mode XL")
    assert any("compiled step" in line for line in said)
    folder = Path(model.info()["executables"]["folder"])
    assert folder.is_relative_to(
        tmp_path / "own" / "compiled" / "owner--tiny" / hub.repositories[NAME].branches["main"]
    )
    snapshots = Path(constants.HF_HUB_CACHE, "models--owner--tiny", "snapshots")
    assert not list(snapshots.glob("*/executables"))

    counter, said = CompileCounter(), []
    assert generate(load(say=said.append)) == tokens
    assert generate(load(say=said.append, trust=True)) == tokens
    assert said == []
    assert counter.count() == 0
    assert not any(name.startswith("executables/") for name in hub.downloaded)


# -- what is not there -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hub")
def test_a_repository_that_is_not_there() -> None:
    with pytest.raises(HubError, match="no local folder or file owner/other, and the Hub shows no repository"):
        ElasticMistral.load("owner/other")


def test_an_ordinary_model_says_how_to_convert_it(hub: HubServer, fixtures_path: Path) -> None:
    hub.add("owner/plain", fixtures_path / "tiny_mistral")
    with pytest.raises(
        CheckpointError, match=r"it has no elastic\.json; convert it: `convert-weights owner/plain NEW`"
    ):
        ElasticMistral.load("owner/plain")
    assert hub.downloaded == []


def test_a_mode_that_is_not_there(hub: HubServer) -> None:
    with pytest.raises(PlanError, match=r"has no mode 'XXL'; modes there: \['L', 'M', 'S', 'XL'\]"):
        ElasticMistral.load(NAME, "XXL")
    assert not any(name.startswith("weights/") for name in hub.downloaded)


def test_a_file_of_another_size_is_named(repository: Repository, pushed: dict[str, bytes]) -> None:
    name = next(name for name in pushed if name.startswith("weights/norms/") and not name.endswith((".zarray", "DATA")))
    repository.commit(pushed | {name: b"short"})
    with pytest.raises(CheckpointError, match=f"(?s){name}: should have .* has 5.*hf cache rm model/owner/tiny"):
        load(trust=True)


def test_a_file_that_was_not_pushed_is_named(repository: Repository, pushed: dict[str, bytes]) -> None:
    name = next(name for name in pushed if name.startswith("weights/norms/"))
    repository.commit({other: content for other, content in pushed.items() if other != name})
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        load(trust=True)


def test_a_plan_cannot_lead_out_of_its_folder(repository: Repository, pushed: dict[str, bytes]) -> None:
    plan = json.loads(pushed["plans/XL.json"]) | {"name": "../../../XL"}
    repository.commit(pushed | {"plans/XL.json": json.dumps(plan).encode()})
    with pytest.raises(PlanError, match=r"should hold the plan 'XL', found '\.\./\.\./\.\./XL'"):
        load()


def test_offline_without_a_cache(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        load()
    assert hub.requests == []


def test_a_folder_is_never_looked_for_on_the_hub(
    hub: HubServer, compiled: CompiledTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = compiled.checkpoint.path
    monkeypatch.chdir(path.parent.parent)
    name = f"{path.parent.name}/{path.name}"
    assert load(name).checkpoint.path == Path(name)
    assert hub.requests == []
    with pytest.raises(CheckpointError, match=f"revision 'v1' was asked for, but {name} is no Hub id"):
        load(name, revision="v1")


def test_what_is_neither_folder_nor_id(tmp_path: Path) -> None:
    for name in ("tiny", "a/b/c", str(tmp_path / "none"), Path(NAME)):
        with pytest.raises(CheckpointError, match="there is no such folder"):
            ElasticMistral.load(name)


# -- describing --------------------------------------------------------------------------------------------------------


def test_a_description_downloads_no_weights_and_no_executables(hub: HubServer, compiled: CompiledTiny) -> None:
    described = fetch_description(NAME, revision=None, token=None)
    assert described.manifest == compiled.checkpoint.manifest
    assert {name.rsplit("/", 1)[-1] for name in hub.downloaded} == {
        "elastic.json",
        "manifest.json",
        *(f"{mode}.json" for mode in ("XL", "L", "M", "S")),
    }
    assert len(store_folders(described.path)) == 1


def test_part_of_a_checkpoint_is_none_where_a_whole_one_is_wanted(hub: HubServer) -> None:
    path = load(trust=True).checkpoint.path
    assert hub.downloaded
    with pytest.raises(CheckpointError, match=r"is damaged: weights/.*int8.*: missing"):
        Checkpoint.open(path)
