"""Hub ids: huggingface_hub's own client against a Hub on this machine."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer, Repository, serve_hub, use_hub
from huggingface_hub import constants

from converters.locate import locate
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.errors import CheckpointError, ConversionError, HubError

NEEDED = [
    "config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tekken.json",
    "tokenizer.json",
]


@pytest.fixture
def source(write_folder, config, weights) -> Path:
    """A model as a repository holds it, with things beside it that are not needed."""
    folder = write_folder(config, weights, name="repository", shards=2)
    for name in ("README.md", "consolidated.safetensors", "pytorch_model.bin", "original.pth", "tekken.json"):
        (folder / name).write_text(f'"{name}"')  # the cache stores equal files once
    return folder


@pytest.fixture
def hub(monkeypatch, source, tmp_path) -> Iterator[HubServer]:
    """A Hub that holds `owner/name`, whose branch `v1` is the model."""
    with serve_hub() as hub:
        repository = hub.add("owner/name", source)
        repository.branches["v1"] = repository.branches["main"]
        repository.commit({"README.md": b"the default branch has moved on"})
        use_hub(monkeypatch, hub, tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        yield hub


@pytest.fixture
def repository(hub: HubServer) -> Repository:
    return hub.repositories["owner/name"]


def test_one_commit_serves_every_file_and_only_needed_files_are_fetched(hub, repository, convert_to, tmp_path):
    repository.private = True
    checkpoint = convert_to("owner/name", tmp_path / "out", revision="v1", token=TOKEN)
    assert checkpoint.verify() == []
    assert checkpoint.manifest.source["repository"] == "owner/name"
    assert checkpoint.manifest.source["commit"] == repository.branches["v1"]
    assert sorted(hub.downloaded) == NEEDED
    assert TOKEN.encode() not in (tmp_path / "out" / "elastic.json").read_bytes()


def test_a_branch_that_moves_meanwhile_changes_nothing(hub, repository):
    location = locate("owner/name", revision="v1", token=None)
    repository.branches["v1"] = repository.branches["main"]
    source = location.open()
    assert source is not None
    assert sorted(set(hub.downloaded) - {"README.md"}) == NEEDED


def test_a_complete_checkpoint_of_the_commit_is_not_downloaded_again(hub, convert_to, tmp_path):
    convert_to("owner/name", tmp_path / "out", revision="v1")
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.forget()
    convert_to("owner/name", tmp_path / "out", revision="v1")
    assert hub.downloaded == []


def test_an_interrupted_conversion_names_the_commit(repository, convert_to, tmp_path):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, ConversionError)):
        convert_to("owner/name", tmp_path / "out", revision="v1", progress=stop)
    commit = repository.branches["v1"]
    with pytest.raises(CheckpointError, match=f"convert-weights owner/name .*out --revision {commit}"):
        Checkpoint.open(tmp_path / "out")


def test_offline_the_cache_is_used(hub, repository, convert_to, tmp_path, monkeypatch):
    convert_to("owner/name", tmp_path / "online", revision="v1")
    hub.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    checkpoint = convert_to("owner/name", tmp_path / "out", revision="v1")
    assert checkpoint.manifest.source["commit"] == repository.branches["v1"]
    assert hub.requests == []


def test_what_exists_locally_is_never_looked_for_on_the_hub(hub, source, convert_to, tmp_path):
    shutil.copytree(source, tmp_path / "owner" / "name")
    (tmp_path / "owner" / "name" / "consolidated.safetensors").unlink()
    assert convert_to("owner/name", tmp_path / "out").manifest.source["repository"] is None
    assert hub.requests == []


def test_a_gated_repository(repository):
    repository.gated = True
    with pytest.raises(HubError, match=r"gated.*--token"):
        locate("owner/name", revision="v1", token=None)


@pytest.mark.usefixtures("hub")
def test_an_unknown_revision():
    with pytest.raises(HubError, match="no such revision"):
        locate("owner/name", revision="v2", token=None)


@pytest.mark.parametrize("name", ["owner/other", "owner/name"])
def test_a_repository_that_is_not_there_or_not_shown(repository, name):
    repository.private = True
    with pytest.raises(HubError, match=f"no local folder or file {name}, and the Hub shows no repository {name}"):
        locate(name, revision="v1", token=None)


def test_a_hub_that_is_down(hub):
    hub.broken = 500
    with pytest.raises(HubError, match=r"(?s)failed .*the Hub is down.*no local folder of this name"):
        locate("owner/name", revision="v1", token=None)


@pytest.mark.usefixtures("hub")
def test_a_hub_that_is_not_there(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubError, match=r"owner/name from the Hub failed .*run the same command again"):
        locate("owner/name", revision="v1", token=None)


@pytest.mark.usefixtures("hub")
def test_offline_without_a_cache_both_readings_are_named(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"no local folder or file owner/name.*HF_HUB_OFFLINE"):
        locate("owner/name", revision=None, token=None)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ("pytorch_model.bin", "pickle can run any code"),
        ("model.Q8_0.gguf", r"GGUF files.*hf download owner/name model\.Q8_0\.gguf"),
        ("elastic.json", r"is an Elastic checkpoint already: load it"),
        ("README.md", "neither model.safetensors nor"),
    ],
)
def test_repositories_without_safetensors_are_refused_before_a_download(hub, repository, kept, message):
    repository.commit({kept: b""})
    with pytest.raises(ConversionError, match=message):
        locate("owner/name", revision=None, token=None)
    assert hub.downloaded == []


def test_space_for_the_download_is_checked(hub, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    location = locate("owner/name", revision="v1", token=None)
    with pytest.raises(HubError, match="HF_HUB_CACHE"):
        location.open()
    assert hub.downloaded == []
