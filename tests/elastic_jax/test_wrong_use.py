"""Wrong uses of the program: each ends with one clear message, no result, no traceback, and nothing left behind."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny import FIXTURES

from elastic_jax import cli
from elastic_jax.checkpoint import Checkpoint


class Wrong(NamedTuple):
    """A wrong use. `{name}` stands for a path of the fixture `places`.

    Attributes:
        command: the arguments.
        status: 2 where the command line itself is wrong, 1 for all else.
        words: what the message must say.
        stdin: standard input.
    """

    command: str
    status: int
    words: tuple[str, ...]
    stdin: bytes = b""


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
    Wrong("batch {good} {requests} {text}", 1, ("name another file",)),
    Wrong("cache rm", 1, ("--all",)),
    Wrong("cache rm nothing", 1, ("nothing", "cache ls")),
    Wrong("--offline info owner/model", 1, ("owner/model",)),
]


@pytest.fixture
def places(
    checkpoint_of: Callable[[str], Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Path]:
    monkeypatch.setenv("ELASTIC_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for switch in ("HF_HUB_OFFLINE", "UV_OFFLINE", "PIP_NO_INDEX"):
        monkeypatch.setenv(switch, "1")  # so that what --offline sets is undone
    names = ("good", "damaged", "garbled", "absent", "new", "text", "empty", "requests")
    places = {name: tmp_path / name for name in names} | {"source": FIXTURES / "tiny_llama"}
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


def everything(places: dict[str, Path]) -> dict[Path, bytes]:
    root = places["good"].parent
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("wrong", WRONG, ids=[wrong.command for wrong in WRONG])
def test_a_wrong_use_is_one_message(
    wrong: Wrong, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [word.format_map({name: str(path) for name, path in places.items()}) for word in wrong.command.split()]
    monkeypatch.setattr(sys, "argv", ["elastic-jax", *arguments])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(wrong.stdin)))
    before = everything(places)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert ended.value.code == wrong.status
    assert out == ""
    assert "Traceback" not in err
    if wrong.status == 1:
        assert err.startswith("error: ")
        assert err.count("error: ") == 1
    for word in wrong.words:
        assert word in err
    assert everything(places) == before


def test_the_table_is_long_enough() -> None:
    assert len({wrong.command for wrong in WRONG}) >= 40
