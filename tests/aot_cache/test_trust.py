"""A store that somebody else may have written is loaded only when asked to."""

import os

import pytest

from aot_cache.trust import reasons_for_distrust
from elastic_jax.errors import ExecutableError, TrustError


def refused(checkpoint, match):
    with pytest.raises(TrustError, match=match) as caught:
        checkpoint.load()
    assert "trust=True" in str(caught.value)
    assert len(checkpoint.load(trust=True)) == 2


def test_own_store_is_trusted(checkpoint):
    assert reasons_for_distrust(checkpoint.folder, [checkpoint.blob()], root=checkpoint.root) == []


def test_another_owner(checkpoint, monkeypatch):
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    refused(checkpoint, rf"belongs to user {own}, you are user {own + 1}")


def test_world_writable_store(checkpoint):
    checkpoint.folder.chmod(0o777)
    refused(checkpoint, r"M can be written by everybody")


def test_world_writable_blob(checkpoint):
    checkpoint.blob().chmod(0o666)
    refused(checkpoint, r"d2.p0.greedy.xla can be written by everybody")


def test_group_writable_manifest(checkpoint):
    (checkpoint.folder / "manifest.json").chmod(0o664)
    refused(checkpoint, r"manifest.json can be written by its group \(chmod g-w")


def test_world_writable_parent(checkpoint):
    checkpoint.folder.parent.chmod(0o777)
    refused(checkpoint, r"target can be written by everybody")


def test_world_writable_root(checkpoint):
    checkpoint.root.chmod(0o777)
    refused(checkpoint, r"checkpoint can be written by everybody")


def test_symbolic_link(checkpoint):
    target = checkpoint.root / "elsewhere.xla"
    checkpoint.blob().rename(target)
    checkpoint.blob().symlink_to(target)
    refused(checkpoint, r"d2.p0.greedy.xla is a symbolic link")


def test_folder_written_by_the_hub_client(checkpoint):
    (checkpoint.root / ".cache" / "huggingface").mkdir(parents=True)
    refused(checkpoint, r"checkpoint was downloaded")


def test_root_must_contain_the_store(checkpoint, tmp_path):
    with pytest.raises(ExecutableError, match="is not inside"):
        checkpoint.load(root=tmp_path / "other")
