"""Conversations without a chat template, by mistral-common: its own ids, where it is installed."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
from tekken import fetch_tekken
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from elastic_jax.demo_model import CACHE_VARIABLE
from elastic_jax.errors import RequestError, TokenizerError
from elastic_jax.mistral_chat import MistralChat
from elastic_jax.tokenizer import Tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
CHATS: list[dict[str, Any]] = json.loads(
    (REPOSITORY / "tests" / "fixtures" / "tekken_reference.json").read_text("utf-8")
)["chats"]


def small_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer without a chat template, and a tekken.json beside it."""
    backend = Backend(models.BPE(vocab={"a": 0, "</s>": 1}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tekken.json").write_text("{}")
    return Tokenizer.load(folder)


def test_without_mistral_common_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(TokenizerError, match=r"pip install 'elastic-jax\[mistral\]'"):
        small_tokenizer(tmp_path).apply_chat_template(CHATS[0]["messages"], add_generation_prompt=True)


def test_a_finished_conversation_needs_a_template(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no chat template"):
        small_tokenizer(tmp_path).apply_chat_template(CHATS[0]["messages"], add_generation_prompt=False)


def test_malformed_messages_are_refused_first(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="at least one message"):
        small_tokenizer(tmp_path).apply_chat_template([], add_generation_prompt=True)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> MistralChat:
    """Of the format v7."""
    pytest.importorskip("mistral_common")
    cache = Path(os.environ.get(CACHE_VARIABLE) or REPOSITORY / ".cache" / "elastic-jax")
    document = json.loads(fetch_tekken(cache).read_text("utf-8"))
    document["config"]["version"] = "v7"
    file = tmp_path_factory.mktemp("v7") / "tekken.json"
    file.write_text(json.dumps(document), "utf-8")
    return MistralChat(file)


@pytest.mark.parametrize("index", range(len(CHATS)))
def test_conversations_are_those_of_the_reference(chat: MistralChat, index: int) -> None:
    assert chat.encode(CHATS[index]["messages"], CHATS[index]["tools"]) == CHATS[index]["ids"]


def test_what_it_refuses_is_a_request_error(chat: MistralChat) -> None:
    with pytest.raises(RequestError, match="mistral-common refuses this conversation"):
        chat.encode([{"role": "assistant", "content": "I begin"}], None)
    with pytest.raises(RequestError, match="only text can be read, found a 'image_url'"):
        chat.encode([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], None)
