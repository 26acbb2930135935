"""Hub ids, against a Hub that is a folder: no test reaches the network."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from converters.locate import locate
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.errors import CheckpointError, ConversionError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass
class FakeHub:
    """Stands for the Hub and its cache.

    Attributes:
        folder: the repository's files at COMMIT.
        cache: where downloads go.
        downloads: keyword arguments of every download.
        tokens: every token that was used.
        failure: raised instead of answering.
    """

    folder: Path
    cache: Path
    downloads: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    tokens: list[str | None] = dataclasses.field(default_factory=list)
    failure: Exception | None = None

    def model_info(self, repository: str, *, revision: str | None, files_metadata: bool) -> SimpleNamespace:
        if self.failure is not None:
            raise self.failure
        assert (repository, revision, files_metadata) == ("owner/name", "v1", True)
        files = [
            SimpleNamespace(rfilename=path.relative_to(self.folder).as_posix(), size=path.stat().st_size)
            for path in self.folder.rglob("*")
            if path.is_file()
        ]
        return SimpleNamespace(sha=COMMIT, siblings=files)

    def api(self, token: str | None) -> "FakeHub":
        self.tokens.append(token)
        return self

    def snapshot_download(self, repository: str, **options: Any) -> str:
        if self.failure is not None:
            raise self.failure
        assert repository == "owner/name"
        self.downloads.append(options)
        snapshot = self.cache / "snapshots" / COMMIT
        if options["local_files_only"]:
            return str(snapshot)
        snapshot.mkdir(parents=True, exist_ok=True)
        for name in options["allow_patterns"]:
            shutil.copy(self.folder / name, snapshot / name)
        return str(snapshot)


@pytest.fixture
def hub(monkeypatch, write_folder, config, weights, tmp_path) -> FakeHub:
    """A Hub that holds `owner/name`, and things beside it that are not needed."""
    folder = write_folder(config, weights, name="repository", shards=2)
    for name in ("README.md", "consolidated.safetensors", "pytorch_model.bin", "original.pth", "tekken.json"):
        (folder / name).write_text("{}")
    hub = FakeHub(folder, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return hub


def test_one_commit_serves_every_file_and_only_needed_files_are_fetched(hub, convert_to, tmp_path):
    checkpoint = convert_to("owner/name", tmp_path / "out", revision="v1", token="secret")
    assert checkpoint.verify() == []
    assert checkpoint.manifest.source["repository"] == "owner/name"
    assert checkpoint.manifest.source["commit"] == COMMIT
    (download,) = hub.downloads
    assert download["revision"] == COMMIT
    assert download["token"] == "secret"
    assert hub.tokens == ["secret"]
    assert download["allow_patterns"] == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tekken.json",
        "tokenizer.json",
    ]
    assert b"secret" not in (tmp_path / "out" / "elastic.json").read_bytes()


def test_a_complete_checkpoint_of_the_commit_is_not_downloaded_again(hub, convert_to, tmp_path):
    convert_to("owner/name", tmp_path / "out", revision="v1")
    shutil.rmtree(hub.cache)
    hub.downloads.clear()
    convert_to("owner/name", tmp_path / "out", revision="v1")
    assert hub.downloads == []


@pytest.mark.usefixtures("hub")
def test_an_interrupted_conversion_names_the_commit(convert_to, tmp_path):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, ConversionError)):
        convert_to("owner/name", tmp_path / "out", revision="v1", progress=stop)
    with pytest.raises(CheckpointError, match=f"convert-weights owner/name .*out --revision {COMMIT}"):
        Checkpoint.open(tmp_path / "out")


def test_offline_the_cache_is_used(hub, convert_to, tmp_path, monkeypatch):
    convert_to("owner/name", tmp_path / "online", revision="v1")
    hub.downloads.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    checkpoint = convert_to("owner/name", tmp_path / "out")
    assert checkpoint.manifest.source["commit"] == COMMIT
    assert all(download["local_files_only"] for download in hub.downloads)


def test_what_exists_locally_is_never_looked_for_on_the_hub(hub, convert_to, tmp_path):
    shutil.copytree(hub.folder, tmp_path / "owner" / "name")
    (tmp_path / "owner" / "name" / "consolidated.safetensors").unlink()
    hub.failure = AssertionError("the Hub was asked")
    assert convert_to("owner/name", tmp_path / "out").manifest.source["repository"] is None


def response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (lambda: errors.GatedRepoError("x", response=response(403)), "gated.*--token"),
        (lambda: errors.RevisionNotFoundError("x", response=response(404)), "no such revision"),
        (
            lambda: errors.RepositoryNotFoundError("x", response=response(404)),
            "no local folder or file owner/name, and",
        ),
        (lambda: errors.HfHubHTTPError("boom", response=response(500)), "failed .boom.*run the same command again"),
        (lambda: ConnectionError("unreachable"), "failed .unreachable.*no local folder of this name"),
        (lambda: errors.LocalEntryNotFoundError("not there"), "cannot be reached"),
    ],
)
def test_errors_say_what_to_do(hub, failure, message):
    hub.failure = failure()
    with pytest.raises(ConversionError, match=message):
        locate("owner/name", revision="v1", token=None)


def test_offline_without_a_cache_both_readings_are_named(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.failure = errors.LocalEntryNotFoundError("not there")
    with pytest.raises(ConversionError, match=r"no local folder or file owner/name.*HF_HUB_OFFLINE"):
        locate("owner/name", revision=None, token=None)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ("pytorch_model.bin", "pickle can run any code"),
        ("model.Q8_0.gguf", r"GGUF files.*hf download owner/name model\.Q8_0\.gguf"),
        ("README.md", "neither model.safetensors nor"),
    ],
)
def test_repositories_without_safetensors_are_refused_before_a_download(hub, kept, message):
    for path in hub.folder.iterdir():
        path.unlink()
    (hub.folder / kept).write_text("")
    with pytest.raises(ConversionError, match=message):
        locate("owner/name", revision="v1", token=None)
    assert hub.downloads == []


def test_space_for_the_download_is_checked(hub, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    location = locate("owner/name", revision="v1", token=None)
    with pytest.raises(ConversionError, match="HF_HUB_CACHE"):
        location.open()
    assert hub.downloads == []
