"""Wrong uses of the program: each ends with one clear message, no result, no traceback, and nothing left behind."""

import contextlib
import io
import json
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny import FIXTURES, CompiledTiny, tiny_step_config

from elastic_jax import cli, executables
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.step import Bucket


class Wrong(NamedTuple):
    """A wrong use. `{name}` stands for a path of the fixture `places`.

    Attributes:
        command: the arguments.
        status: 2 where the command line itself is wrong, 1 for all else.
        words: what the message must say.
        stdin: standard input.
        environment: variables that are set.
        limit: bytes that a file may have, so that writing more fails as on a full disk.
    """

    command: str
    status: int
    words: tuple[str, ...]
    stdin: bytes = b""
    environment: tuple[tuple[str, str], ...] = ()
    limit: int | None = None


LOAD = "--mode XL --dtype float32"
"""What the compiled checkpoint is compiled for."""

READ_ONLY = "/sys"
"""Nobody can make files there, whatever the rights."""

WRONG = [
    # the command line
    Wrong("bogus", 2, ("bogus",)),
    Wrong("generate", 2, ("Missing argument 'checkpoint'",)),
    Wrong("generate {good} --temperature hot", 2, ("--temperature", "number")),
    Wrong("generate {good} --dtype int4", 2, ("--dtype", "int4")),
    Wrong("generate {good} --max-new-tokens 0", 2, ("--max-new-tokens",)),
    Wrong("generate {good} --nonsense", 2, ("--nonsense",)),
    Wrong("chat {good} --kv-slots -3", 2, ("--kv-slots",)),
    Wrong("chat {good} --on-missing guess", 2, ("--on-missing",)),
    Wrong("compile {good} --workers 0", 2, ("--workers",)),
    Wrong("convert {source}", 2, ("Missing argument 'destination'",)),
    Wrong("convert {source} {new} --only int4", 2, ("--only", "int4")),
    Wrong("batch {good} {requests}", 2, ("Missing argument 'out'",)),
    Wrong("plan", 2, ("Missing argument 'source'",)),
    Wrong("plan {good} --max-context 0", 2, ("--max-context",)),
    Wrong("cache bogus", 2, ("bogus",)),
    # checkpoints
    Wrong("info {absent}", 1, ("absent",)),
    Wrong("modes {absent}", 1, ("absent",)),
    Wrong("verify {absent}", 1, ("absent",)),
    Wrong("generate {absent} -p x", 1, ("absent",)),
    Wrong("chat {absent}", 1, ("absent",)),
    Wrong("info {source}", 1, ("convert",)),
    Wrong("info {good} --plot {absent}/x.svg", 1, ("absent/x.svg: No such file",)),
    Wrong("info {damaged}", 1, ("damaged", "Copy the checkpoint again")),
    Wrong("generate {damaged} -p x", 1, ("damaged",)),
    Wrong("generate {garbled} -p x", 1, ("elastic.json",)),
    Wrong("generate {good} --mode Q -p x", 1, ("Q", "XL")),
    Wrong("chat {good} --mode Q", 1, ("Q", "XL")),
    Wrong("generate {good} --mode XL -p x", 1, ("elastic-jax compile",)),
    Wrong("chat {good} --mode XL", 1, ("elastic-jax compile",)),
    Wrong("batch {good} {requests} {new} --mode XL", 1, ("elastic-jax compile",)),
    Wrong("generate {good} --max-context 100000 -p x", 1, ("100000", "positions")),
    Wrong("generate {good} --revision main -p x", 1, ("main", "no Hub id")),
    Wrong("chat {good} --temperature -1", 1, ("temperature",)),
    Wrong("chat {good} --top-p 2", 1, ("top_p",)),
    Wrong("generate {good} --mode XL", 1, ("UTF-8",), b"\xff\xfe"),
    # converting and compiling
    Wrong("convert {absent} {new}", 1, ("absent", "check the path")),
    Wrong("convert {text} {new}", 1, ("should be a Hugging Face folder",)),
    Wrong("convert {empty} {new}", 1, ("empty",)),
    Wrong("compile {good} --mode Q", 1, ("Q", "XL")),
    Wrong("compile {good} --target b9000", 1, ("b9000", "h100")),
    Wrong("dump-target", 1, ("not a GPU",)),
    # the rest
    Wrong("plan {text}", 1, ("check the path",)),
    Wrong("plan {good} --target {text}", 1, ("no target",)),
    Wrong("batch {good} {absent} {new}", 1, ("absent", "batch format")),
    Wrong("batch {good} {requests} {requests}", 1, ("file of requests itself",)),
    Wrong("batch {good} {empty} {new}", 1, ("empty", "batch format")),
    Wrong("batch {good} {requests} {empty}", 1, ("empty is no file",)),
    Wrong("batch {good} {requests} /dev/null", 1, ("/dev/null is no file",)),
    Wrong("batch {good} {requests} {text}", 1, ("name another file",)),
    Wrong("cache rm", 1, ("--all",)),
    Wrong("cache rm nothing", 1, ("nothing", "cache ls")),
    Wrong("--offline info owner/model", 1, ("owner/model",)),
    Wrong("push {good} nonsense", 1, ("nonsense", "owner/name")),
    Wrong("push {absent} owner/name", 1, ("absent",)),
    Wrong("frontier {good}", 1, ("no frontier", "elastic-jax search")),
    Wrong("frontier {good} max-loss=low", 1, ("no frontier",)),
    Wrong("generate {good} --mode 0.5 -p x", 1, ("0.5", "elastic-jax search")),
    Wrong("search {good} --target b9000", 1, ("b9000", "h100")),
    Wrong("plan {source} --max-context 1000000", 1, ("1000000", "positions")),
    Wrong("compile {good} --max-context 1000000", 1, ("1000000", "positions")),
    Wrong("demo --fetch {text}", 1, ("is there already",)),
    Wrong(
        "demo --fetch {new}",
        1,
        (f"{READ_ONLY}/cache", "ELASTIC_JAX_CACHE"),
        environment=(("ELASTIC_JAX_CACHE", f"{READ_ONLY}/cache"),),
    ),
    # what a loaded mode cannot do
    Wrong(f"generate {{compiled}} {LOAD} -p {{long}}", 1, ("need a context of", "the longest here is 256")),
    Wrong(f"generate {{compiled}} {LOAD} -p x --max-new-tokens 300", 1, ("need a context of", "256")),
    Wrong(f"generate {{compiled}} {LOAD} -p x --max-context 512", 1, ("up to 256 tokens", "--max-context 512")),
    Wrong(f"generate {{compiled}} {LOAD} -p x --kv-slots 4096", 1, ("pool of 4096 tokens", "--kv-slots 4096")),
    Wrong(f"generate {{compiled}} {LOAD} -p x --top-p 2", 1, ("top_p",)),
    Wrong(f"generate {{compiled}} {LOAD} -p x --top-k -1", 1, ("top_k",)),
    Wrong(f"generate {{compiled}} {LOAD} -p x --seed -1", 1, ("seed",)),
    Wrong(f"chat {{compiled}} {LOAD}", 1, ("the context holds 256", "/clear"), b"word " * 300),
    Wrong(f"batch {{compiled}} {{requests}} {{absent}}/out {LOAD}", 1, ("absent/out", "No such file")),
    Wrong(f"generate {{broken}} {LOAD} -p x", 1, ("was cut short", "elastic-jax compile")),
    Wrong(f"generate {{shared}} {LOAD} -p x", 1, ("written by somebody else", "trust=True")),
    # no space, and places that cannot be written
    Wrong(f"batch {{compiled}} {{requests}} {{new}} {LOAD}", 1, ("new: File too large", "free some space"), limit=99),
    Wrong("convert {source} /sys/new.elastic", 1, (f"{READ_ONLY}/new.elastic",)),
]


@pytest.fixture
def places(
    checkpoint_of: Callable[[str], Checkpoint],
    compiled_tiny: Callable[..., CompiledTiny],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: Wrong,
) -> dict[str, Any]:
    monkeypatch.setenv("ELASTIC_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for switch in ("HF_HUB_OFFLINE", "UV_OFFLINE", "PIP_NO_INDEX"):
        monkeypatch.setenv(switch, "1")  # so that what --offline sets is undone
    names = ("good", "damaged", "garbled", "absent", "new", "text", "empty", "requests")
    places: dict[str, Any] = {name: tmp_path / name for name in names} | {"source": FIXTURES / "tiny_llama"}
    places["long"] = "x" * 1000
    for name in ("compiled", "broken", "shared"):
        if f"{{{name}}}" in wrong.command:
            places[name] = tmp_path / name
            shutil.copytree(compiled_tiny("XL", "float32", "tiny_llama").checkpoint.path, places[name])
    if "broken" in places:
        blob = next((places["broken"] / "executables").glob("*/XL.float32/*/step*"))
        blob.write_bytes(blob.read_bytes()[:-1])
    if "shared" in places:
        places["shared"].chmod(0o777)
    for name in ("good", "damaged", "garbled"):
        shutil.copytree(checkpoint_of("tiny_llama").path, places[name], ignore=shutil.ignore_patterns("executables"))
    next(path for path in sorted((places["damaged"] / "weights").rglob("*")) if path.is_file()).unlink()
    (places["garbled"] / "elastic.json").write_text("{")
    places["text"].write_text("text\n")
    places["empty"].mkdir()
    body = {"prompt": "x", "max_tokens": 1}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    places["requests"].write_text(json.dumps(line) + "\n")
    return places


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def largest_file(size: int | None) -> Iterator[None]:
    """Writing more than this fails, in C++ too; Python ignores the signal that comes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["elastic-jax", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("wrong", WRONG, ids=[wrong.command for wrong in WRONG])
def test_a_wrong_use_is_one_message(
    wrong: Wrong,
    places: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [word.format_map({name: str(path) for name, path in places.items()}) for word in wrong.command.split()]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(wrong.stdin)))
    for name, value in wrong.environment:
        monkeypatch.setenv(name, value)
    before = everything(tmp_path)
    with largest_file(wrong.limit):
        status = run(arguments, monkeypatch)
    out, err = capsys.readouterr()
    assert status == wrong.status, err
    assert out == ""
    assert "Traceback" not in err
    if wrong.status == 1:
        assert err.startswith("error: ")
        assert err.count("error: ") == 1
    for word in wrong.words:
        assert word in err
    assert everything(tmp_path) == before


def test_a_conversion_without_space_continues_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is finished stays, and is no checkpoint yet."""
    source, destination = str(FIXTURES / "tiny_llama"), tmp_path / "new.elastic"
    with largest_file(4096):
        assert run(["convert", source, str(destination)], monkeypatch) == 1
    err = capsys.readouterr().err
    assert "cannot be written" in err
    assert "the same command continues" in err
    assert err.count("error: ") == 1
    assert not (destination / "elastic.json").exists()
    assert not list(destination.rglob("*.partial"))
    assert run(["info", str(destination)], monkeypatch) == 1
    assert "unfinished" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["elastic-jax", "convert", source, str(destination)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert Checkpoint.open(destination).verify() == []


def test_compiling_without_space_leaves_no_store(
    checkpoint_of: Callable[[str], Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny.elastic"
    shutil.copytree(checkpoint_of("tiny_llama").path, folder, ignore=shutil.ignore_patterns("executables"))
    step = tiny_step_config(buckets=(Bucket(1, 0), Bucket(0, 16)), rows=1)
    monkeypatch.setattr(executables, "default_step_config", lambda *_, **__: step)
    with largest_file(2048):
        assert run(["compile", str(folder), "--mode", "XL", "--dtype", "float32"], monkeypatch) == 1
    assert [path for path in (folder / "executables").rglob("*") if path.is_file()] == []


def test_the_table_is_long_enough() -> None:
    assert len({wrong.command for wrong in WRONG}) >= 70
