"""The corrected pattern against mistral-common, on the real vocabulary (tests/fixtures/README.md)."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tekken import TEKKEN, fetch_tekken, write_wrong_tokenizer
from tiny import exclusive

from elastic_jax.demo_model import CACHE_VARIABLE
from elastic_jax.errors import TokenizerError
from elastic_jax.mistral_pattern import correct_pattern, has_wrong_pattern
from elastic_jax.tokenizer import Tokenizer
from elastic_jax.transformers import AutoTokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
REFERENCE: dict[str, Any] = json.loads((REPOSITORY / "tests" / "fixtures" / "tekken_reference.json").read_text("utf-8"))


@pytest.fixture(scope="session")
def small_folder(shared_folder: Path) -> Path:
    """A tokenizer like Small-3.1's: the wrong pattern, and tekken.json beside it."""
    folder = shared_folder / "tekken"
    with exclusive(shared_folder / "tekken.lock"):
        if not (folder / "tekken.json").is_file():
            folder.mkdir()
            cache = Path(os.environ.get(CACHE_VARIABLE) or REPOSITORY / ".cache" / "elastic-jax")
            write_wrong_tokenizer(fetch_tekken(cache), folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(small_folder: Path) -> Tokenizer:
    return Tokenizer.load(small_folder)


def test_the_reference_is_of_this_vocabulary() -> None:
    assert REFERENCE["vocabulary"]["sha256"] == TEKKEN.sha256
    assert {case["kind"] for case in REFERENCE["cases"]} >= {
        "digits", "accents", "scripts", "emoji", "code", "whitespace",
    }  # fmt: skip


@pytest.mark.parametrize("case", REFERENCE["cases"], ids=lambda case: f"{case['kind']} {case['text'][:20]!r}")
def test_corrected_ids_are_those_of_mistral_common(tokenizer: Tokenizer, case: dict[str, Any]) -> None:
    assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"]
    assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["text"]


def test_uncorrected_ids_are_others(small_folder: Path, tmp_path: Path) -> None:
    """Or the test above would prove nothing."""
    (tmp_path / "tokenizer.json").symlink_to(small_folder / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"fix_mistral_regex": false}')
    kept = Tokenizer.load(tmp_path)
    wrong = {
        case["kind"]
        for case in REFERENCE["cases"]
        if kept.encode(case["text"], add_special_tokens=False) != case["ids"]
    }
    assert wrong >= {"apostrophes", "code", "scripts"}  # its digits are single tokens either way


def test_transformers_tokenizer_is_corrected_too(small_folder: Path) -> None:
    ours = AutoTokenizer.from_pretrained(small_folder)
    for case in REFERENCE["cases"]:
        assert ours.encode(case["text"], add_special_tokens=False) == case["ids"]
    kept = AutoTokenizer.from_pretrained(small_folder, fix_mistral_regex=False)
    assert kept.encode("Don'ts", add_special_tokens=False) != ours.encode("Don'ts", add_special_tokens=False)


@given(text=st.text(max_size=60), cuts=st.lists(st.integers(0, 60), max_size=4))
@settings(max_examples=60)
def test_pieces_of_real_tokens_join_to_the_text(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    places = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    detokenizer = tokenizer.detokenizer(skip_special_tokens=False)
    pieces = [detokenizer.feed(ids[a:b]) for a, b in itertools.pairwise(places)]
    assert "".join(pieces) + detokenizer.flush() == text


def test_the_wrong_pattern_is_detected_and_corrected_once(small_folder: Path, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(small_folder / "tokenizer.json"))
    assert has_wrong_pattern(backend)
    with pytest.raises(TokenizerError, match="here: splits digits in threes"):
        correct_pattern(backend, tmp_path, None, "here")
    assert correct_pattern(backend, tmp_path, True, "here")
    assert not has_wrong_pattern(backend)
    assert not correct_pattern(backend, tmp_path, True, "here")


def test_a_damaged_tekken_json_is_named(small_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to(small_folder / "tokenizer.json")
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tekken\.json: expected a JSON object with config\.pattern"):
        Tokenizer.load(tmp_path)
