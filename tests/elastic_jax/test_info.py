import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import FIXTURES, CompiledTiny

import converters
from elastic_jax.errors import CheckpointError
from elastic_jax.info import describe, render


@pytest.fixture
def folder(compiled_tiny: Callable[..., CompiledTiny], tmp_path: Path) -> Path:
    """A copy of a checkpoint with executables of one mode."""
    hidden = shutil.ignore_patterns(".*.partial", ".*.old", "S", "M", "L")
    shutil.copytree(compiled_tiny("XL", "float32").checkpoint.path, tmp_path / "copy", ignore=hidden)
    return tmp_path / "copy"


def test_everything_about_a_checkpoint_is_json(folder: Path) -> None:
    info: dict[str, Any] = json.loads(json.dumps(describe(folder)))
    assert info["path"] == str(folder)
    assert info["model"]["num_layers"] == 3
    assert info["model"]["eos_token_ids"] == [2]
    modes = {mode["mode"]: mode for mode in info["modes"]}
    assert sorted(modes) == ["L", "M", "S", "XL"]
    assert all(mode["provisional"] and "provisional" in mode["note"] for mode in modes.values())
    assert modes["XL"]["choices"] == {"bf16": 13}
    assert modes["M"]["choices"] == {"w8a16": 4, "w8a8": 9}
    assert modes["XL"]["weight_bytes"] > modes["L"]["weight_bytes"] == modes["S"]["weight_bytes"]
    (store,) = info["executables"]
    assert (store["mode"], store["dtype"], store["problem"]) == ("XL.float32", "float32", None)
    assert (store["kv_slots"], store["max_context"]) == (1024, 256)
    assert store["units"] == len(list(folder.glob("executables/*/*/*/*.xla")))
    assert store["bytes"] == sum(path.stat().st_size for path in folder.glob("executables/*/*/*/*.xla"))


def test_people_see_modes_their_size_and_that_they_are_provisional(folder: Path) -> None:
    text = render(describe(folder))
    lines = text.splitlines()
    assert "3 layers, hidden 64" in lines[0]
    for mode in ("XL", "L", "M", "S"):
        (line,) = [line for line in lines if line.startswith(f"{mode} ")]
        assert "GiB" in line
        assert line.endswith("(provisional)")
    assert sum("has not been measured" in line for line in lines) == 1
    assert any("mode XL.float32: " in line and "context up to 256" in line for line in lines)


def test_what_is_not_stored_is_said(tmp_path: Path) -> None:
    options: dict[str, Any] = {"overwrite": False, "revision": None, "token": None, "workers": 1, "progress": None}
    converters.convert(FIXTURES / "tiny_mistral", tmp_path / "new", only="int8", **options)
    info = describe(tmp_path / "new")
    assert [mode["mode"] for mode in info["modes"] if mode["weight_bytes"] is None] == ["XL"]
    text = render(info)
    assert "XL    not stored" in text
    assert f"no executables: compile with `elastic-jax compile {tmp_path / 'new'}`" in text


@pytest.mark.parametrize("content", ["", '{"format": 1, "identity": {}, "units": {}}'])
def test_a_damaged_store_does_not_hide_the_rest(folder: Path, content: str) -> None:
    (manifest,) = folder.glob("executables/*/*/*/manifest.json")
    manifest.write_text(content)
    info = describe(folder)
    (store,) = info["executables"]
    assert "manifest" in store["problem"]
    assert f"mode XL.float32: {store['problem']}" in render(info)


def test_there_must_be_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not an Elastic checkpoint"):
        describe(tmp_path)
