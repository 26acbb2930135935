"""The demo over a tiny model; `make demo` is the same with a real one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import FIXTURES, CompiledTiny

from elastic_jax import demo
from elastic_jax.errors import ElasticError


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Runs no command; holds those that would have run."""
    called: list[tuple[str, ...]] = []

    def command(say: Callable[[str], None], *arguments: str) -> str:
        del say
        called.append(arguments)
        mode = arguments[arguments.index("--mode") + 1] if "--mode" in arguments else ""
        facts = {"new_tokens": 3, "decode_tokens_per_second": 4.0, "load_seconds": 0.5, "compile_events": 0}
        return json.dumps({"mode": mode, "provisional": True, "text": f"text of {mode}", **facts})

    monkeypatch.setattr(demo, "_command", command)
    monkeypatch.setattr(demo, "demo_model", lambda _: Path("/model.gguf"))
    return called


def test_every_mode_generates_in_a_process_that_may_not_compile(commands: list[tuple[str, ...]]) -> None:
    said: list[str] = []
    results = demo.run_demo(Path("/there"), said.append)
    assert [command[0] for command in commands] == ["convert", "compile", "info", *["generate"] * 4]
    assert commands[0][1:] == ("/model.gguf", "/there")
    for command in commands[3:]:
        assert command[1] == "/there"
        assert {"--no-compile", "--json", "--chat"} <= set(command)
    assert [result["mode"] for result in results] == ["XL", "L", "M", "S"]
    text = "\n".join(said)
    for mode in ("XL", "L", "M", "S"):
        assert f"--- {mode} (provisional plan)\ntext of {mode}" in text
        assert f"{mode}: 3 tokens, 4.0 tok/s, loaded in 0.5 s, compile events: 0" in text


def test_the_checkpoint_stays_in_the_cache(
    commands: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "default_cache", lambda: tmp_path)
    demo.run_demo(None, lambda _: None)
    assert commands[0][2] == str(tmp_path / "smollm2-135m-instruct.elastic")


def test_a_command_runs_in_a_process_of_its_own(
    compiled_tiny: Callable[..., CompiledTiny], capfd: pytest.CaptureFixture[str]
) -> None:
    path, said = str(compiled_tiny("XL", "float32").checkpoint.path), []
    assert json.loads(demo._command(said.append, "info", path, "--json"))["path"] == path
    assert said == [f"\n$ elastic-jax info {path} --json"]
    # What is not asked for as JSON goes where people look, and not between somebody's JSON.
    assert demo._command(said.append, "info", path) == ""
    out, err = capfd.readouterr()
    assert out == ""
    assert "3 layers" in err


def test_a_failed_command_ends_the_demo(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ElasticError, match="`elastic-jax info '/no where'` ended with exit status 1"):
        demo._command(lambda _: None, "info", "/no where")
    assert "no Elastic checkpoint" in capfd.readouterr().err


def test_the_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached, wanted = tmp_path / "cached.gguf", tmp_path / "new.gguf"
    cached.write_bytes(b"model")
    monkeypatch.setattr(demo, "demo_model", lambda _: cached)
    assert demo.fetch_model(wanted) == 5
    assert wanted.read_bytes() == b"model"
    with pytest.raises(ElasticError, match="is there already"):
        demo.fetch_model(wanted)
    with pytest.raises(OSError, match="No such file"):
        demo.fetch_model(tmp_path / "absent" / "new.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"cached.gguf", "new.gguf"}


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a random model, whose four modes take as long to compile as a real one's."""
    monkeypatch.setattr(demo, "demo_model", lambda _: FIXTURES / "tiny_mistral")
    results: list[dict[str, Any]] = demo.run_demo(tmp_path / "tiny.elastic", lambda _: None)
    assert [result["mode"] for result in results] == ["XL", "L", "M", "S"]
    assert all(result["compile_events"] == 0 for result in results)
