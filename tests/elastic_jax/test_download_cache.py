"""What counts as an entry of the cache, and that nothing else is ever removed."""

from pathlib import Path

import pytest

from elastic_jax.demo_model import SMOLLM2
from elastic_jax.download_cache import CacheError, Entry, entries, remove


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    cache = tmp_path / "cache"
    for name, size in {
        SMOLLM2.file_name: 7,
        "demo.elastic/elastic.json": 3,
        "demo.elastic/weights/o/file": 4,
        "compiled/me--model/abc/executables/unit.xla": 5,
        "compiled/me--model/def/executables/unit.xla": 6,
        "precious/diary.txt": 9,
        "notes.txt": 9,
    }.items():
        file = cache / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * size)
    return cache


def test_entries_are_what_the_project_wrote(cache: Path) -> None:
    assert entries(cache) == [
        Entry(SMOLLM2.file_name, "model", 7),
        Entry("compiled/me--model/abc", "executables", 5),
        Entry("compiled/me--model/def", "executables", 6),
        Entry("demo.elastic", "checkpoint", 7),
    ]


def test_no_cache_has_no_entries(tmp_path: Path) -> None:
    assert entries(tmp_path / "absent") == []


def test_only_what_is_named_is_removed(cache: Path) -> None:
    removed = remove(cache, ["compiled/me--model/abc", "demo.elastic", "demo.elastic"])
    assert [entry.name for entry in removed] == ["compiled/me--model/abc", "demo.elastic"]
    assert [entry.name for entry in entries(cache)] == [SMOLLM2.file_name, "compiled/me--model/def"]
    remove(cache, ["compiled/me--model/def"])
    assert not (cache / "compiled" / "me--model").exists()


@pytest.mark.parametrize("name", ["precious", "notes.txt", "..", "../cache", "compiled", "compiled/me--model", ""])
def test_what_is_no_entry_is_refused_and_nothing_is_removed(cache: Path, name: str) -> None:
    before = sorted(cache.rglob("*"))
    with pytest.raises(CacheError, match="cache ls"):
        remove(cache, ["demo.elastic", name])
    assert sorted(cache.rglob("*")) == before


def test_links_are_not_followed(cache: Path, tmp_path: Path) -> None:
    (cache / "demo.elastic").rename(tmp_path / "mine.elastic")
    (cache / "link.elastic").symlink_to(tmp_path / "mine.elastic")
    assert "link.elastic" not in [entry.name for entry in entries(cache)]
