"""Folders with tekken.json alone: the tokenizer made of it against mistral-common's."""

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from tekken import fetch_tekken

from converters.huggingface import open_folder
from converters.tekken import build_tokenizer, last_merge
from elastic_jax.demo_model import CACHE_VARIABLE
from elastic_jax.errors import ConversionError
from elastic_jax.mistral_pattern import TEKKEN_PATTERN
from elastic_jax.tokenizer import Tokenizer
from elastic_jax.transformers import AutoTokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
REFERENCE: dict[str, Any] = json.loads((REPOSITORY / "tests" / "fixtures" / "tekken_reference.json").read_text("utf-8"))

WORDS = (b" a", b"in", b"ing", b"\xc3\xa9", b"12")
RESERVED = 30


def document(words: tuple[bytes, ...] = WORDS, version: str = "v7") -> dict[str, Any]:
    tokens = [*(bytes([byte]) for byte in range(256)), *words]
    vocab = [{"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for i, t in enumerate(tokens)]
    config = {
        "pattern": TEKKEN_PATTERN,
        "num_vocab_tokens": len(tokens),
        "default_vocab_size": len(tokens) + RESERVED,
        "default_num_special_tokens": RESERVED,
        "version": version,
    }
    return {"config": config, "vocab": vocab}


def built(document: dict[str, Any], folder: Path, vocab_size: int = 400) -> Tokenizer:
    files = build_tokenizer(json.dumps(document).encode(), vocab_size=vocab_size, source="tekken.json")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return Tokenizer.load(folder)


def test_ids_are_ranks_after_the_special_tokens(tmp_path: Path) -> None:
    tokenizer = built(document(), tmp_path)
    words = {word: RESERVED + 256 + index for index, word in enumerate(WORDS)}
    assert tokenizer.encode(" aing", True) == [1, words[b" a"], words[b"ing"]]
    # Digits are single pieces, whatever the vocabulary holds.
    assert tokenizer.encode("12", False) == [RESERVED + ord("1"), RESERVED + ord("2")]
    text = "é\n🌍 <s>[INST]<SPECIAL_29>"
    assert tokenizer.encode(text, False)[-3:] == [1, 3, 29]
    assert tokenizer.decode(tokenizer.encode(text, False), skip_special_tokens=False) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.pad_token_id) == (1, (2,), 11)
    assert tokenizer.vocab_size == RESERVED + 256 + len(WORDS)


def test_special_tokens_that_are_listed(tmp_path: Path) -> None:
    listed = document(version="v13")
    names = ["<unk>", "<s>", "</s>", "<pad>", "[THINK]"]
    listed["special_tokens"] = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)]
    tokenizer = built(listed, tmp_path)
    assert tokenizer.encode("[THINK]<SPECIAL_5>", False) == [4, 5]
    assert tokenizer.pad_token_id == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("config"), "is no Tekken vocabulary: KeyError"),
        (lambda d: d["vocab"].pop(7), "each single byte among them"),
        (lambda d: d["vocab"][3].update(token_bytes="*"), "is no Tekken vocabulary"),
        (lambda d: d["config"].update(version="v13"), "of version 'v13' must list its special_tokens"),
        (lambda d: d["config"].update(default_num_special_tokens=5), "should hold|special tokens"),
        (lambda d: d.update(special_tokens=[{"rank": 0, "token_str": "<unk>"}]), "are missing, or outside"),
        (lambda d: d["vocab"].__setitem__(258, d["vocab"][257]), "different tokens"),
        (lambda d: d["vocab"][256].update(token_bytes=base64.b64encode(b"<s>").decode()), "cannot be made|like an ord"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    wrong = document()
    change(wrong)
    with pytest.raises(ConversionError, match=message):
        built(wrong, tmp_path)


def test_another_models_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="holds 291 tokens, and the model has 100"):
        built(document(), tmp_path, vocab_size=100)


def test_a_token_that_others_do_not_make(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="cannot be made of others of lower rank"):
        built(document((b"abc",)), tmp_path)


def test_the_pair_that_makes_a_token_last() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"in": 256, b"ng": 257, b"ing": 258}
    assert last_merge(b"in", ranks) == (b"i", b"n")
    assert last_merge(b"ing", ranks) == (b"in", b"g")


def test_a_folder_without_tokenizer_json(write_folder, config, weights) -> None:
    folder = write_folder(config | {"vocab_size": 40}, weights)
    (folder / "tokenizer.json").unlink()
    (folder / "tekken.json").write_text(json.dumps(document()))
    with pytest.raises(ConversionError, match="holds 291 tokens, and the model has 40"):
        open_folder(folder, repository=None, commit=None)
    small = document(())
    small["config"] |= {"default_vocab_size": 40, "default_num_special_tokens": 20}
    (folder / "tekken.json").write_text(json.dumps(small))
    with pytest.raises(ConversionError, match="each single byte among them"):
        open_folder(folder, repository=None, commit=None)


@pytest.mark.slow
def test_the_real_vocabulary_gives_the_ids_of_mistral_common(tmp_path: Path) -> None:
    cache = Path(os.environ.get(CACHE_VARIABLE) or REPOSITORY / ".cache" / "elastic-jax")
    content = fetch_tekken(cache).read_bytes()
    (tmp_path / "tekken.json").write_bytes(content)
    for name, made in build_tokenizer(content, vocab_size=131072, source="tekken.json").items():
        (tmp_path / name).write_bytes(made)
    tokenizer, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.vocab_size == 131072
    for case in REFERENCE["cases"]:
        assert tokenizer.encode(case["text"], False) == case["ids"]
        assert tokenizer.decode(case["ids"], False) == case["text"]
        assert theirs.encode(case["text"], add_special_tokens=False) == case["ids"]
