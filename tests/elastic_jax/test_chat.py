"""Conversations: turns, interruption, the end of the context, and the `chat` command on a pipe."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import CompiledTiny

from elastic_jax import ElasticMistral, cli
from elastic_jax.chat import Conversation, Turn
from elastic_jax.cli_chat import _Session
from elastic_jax.errors import DeviceMemoryError, RequestError


@pytest.fixture(scope="module")
def model(compiled_tiny: Callable[..., CompiledTiny]) -> ElasticMistral:
    compiled = compiled_tiny("S", "bfloat16")
    return ElasticMistral.load(compiled.checkpoint.path, "S", on_missing="error", say=lambda _: None)


def ask(
    conversation: Conversation, model: ElasticMistral, text: str, stopped: Callable[[], bool] = lambda: False
) -> Turn:
    *pieces, turn = conversation.ask(model, text, stopped)
    assert isinstance(turn, Turn)
    assert "".join(map(str, pieces)) == turn.text
    return turn


def test_turns_follow_each_other(model: ElasticMistral) -> None:
    conversation = Conversation({"ignore_end": True}, 5)
    first, second = (ask(conversation, model, text) for text in ("one", "two"))
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert (first.new_tokens, first.finish_reason) == (5, "length")
    assert second.context_tokens > first.context_tokens
    assert "context" in str(second)
    again = Conversation({"ignore_end": True}, 5, None, conversation.messages[:2])
    assert ask(again, model, "two").text == second.text


def test_a_stopped_answer_stays_and_the_next_is_answered(model: ElasticMistral) -> None:
    conversation = Conversation({"ignore_end": True}, 50)
    turn = ask(conversation, model, "one", lambda: True)
    assert turn.finish_reason == "interrupted"
    assert turn.new_tokens == 1
    assert ask(conversation, model, "two").new_tokens == 50


def test_what_is_longer_than_the_context_was_not_said(model: ElasticMistral) -> None:
    conversation = Conversation({}, 5)
    with pytest.raises(RequestError, match="/clear"):
        ask(conversation, model, "long " * 2000)
    assert conversation.messages == []


def test_saved_conversations_are_prompts(model: ElasticMistral, tmp_path: Path) -> None:
    conversation = Conversation({"ignore_end": True}, 3)
    ask(conversation, model, "héllo")
    conversation.save(tmp_path / "saved.json")
    assert json.loads((tmp_path / "saved.json").read_text("utf-8")) == conversation.prompt
    assert list(tmp_path.iterdir()) == [tmp_path / "saved.json"]


def chat(monkeypatch: pytest.MonkeyPatch, path: Path, stdin: str, *arguments: str) -> int:
    command = ["elastic-jax", "chat", str(path), "--mode", "S", "--max-new-tokens", "4", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    status: Any = ended.value.code
    return status


def test_a_pipe_is_answered_line_by_line(
    model: ElasticMistral,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    saved = tmp_path / "saved.json"
    script = f"hello\n\n/mode S\n/clear\n/system be brief\n//slash\n/save {saved}\n/quit\nnot said\n"
    assert chat(monkeypatch, model.checkpoint.path, script, "--json") == 0
    turns = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [turn["mode"] for turn in turns] == ["S", "S"]
    said = [(message["role"], message["content"]) for message in json.loads(saved.read_text())[:2]]
    assert said == [("system", "be brief"), ("user", "/slash")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/bogus", "/help"),
        ("/mode Q", "has no mode"),
        ("/save", "name of a file"),
        ("/save /nowhere/x", "/nowhere/x: No such file"),
    ],
)
def test_a_wrong_line_of_a_pipe_ends_with_one_message(
    model: ElasticMistral,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    words: str,
) -> None:
    assert chat(monkeypatch, model.checkpoint.path, line + "\nhello\n") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert words in err


def test_a_mode_can_be_chosen_after_none_could_be_loaded(model: ElasticMistral) -> None:
    full = False

    def load(name: str) -> ElasticMistral:
        if full or name == "L":
            raise DeviceMemoryError(f"no memory for {name}")
        return model

    session = _Session(load, "S", Conversation({}, 4), as_json=True)
    with pytest.raises(DeviceMemoryError, match="mode S goes on"):
        session._handle("/mode L")
    assert session._handle("/mode S")
    full = True
    with pytest.raises(DeviceMemoryError, match="no memory for S"):
        session._handle("/mode XL")
    with pytest.raises(RequestError, match="choose one with /mode"):
        session._handle("hello")
    full = False
    assert session._handle("/mode S")
    assert session._handle("hello")
