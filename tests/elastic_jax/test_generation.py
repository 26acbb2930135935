"""Answers as text, fed by hand with what an engine would say."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_jax.errors import RequestError
from elastic_jax.generation import AnswerText, Piece
from elastic_jax.requests import FinishReason, TokenEvent
from elastic_jax.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(fixtures_path: Path) -> Tokenizer:
    return Tokenizer.load(fixtures_path / "tiny_mistral")


def feed(
    tokenizer: Tokenizer, tokens: list[int], *stop: str, finish: FinishReason | None = "length"
) -> tuple[list[Piece], str]:
    """Every piece and the last verdict; the engine ends the answer with its last token, unless a stop string does."""
    answer = AnswerText(tokenizer.detokenizer(True), stop, prompt=1, choice=2, prompt_tokens=7)
    pieces = []
    for index, token in enumerate(tokens):
        end = finish if index == len(tokens) - 1 else None
        piece, verdict = answer.feed(TokenEvent(5, 2, token, -float(index), ((token, -1.0),), end))
        pieces.append(piece)
        if verdict != "going":
            return pieces, verdict
    return pieces, "going"


def test_pieces_add_up_to_the_text(tokenizer: Tokenizer) -> None:
    text = "one two three, 世界 and an umbrella ☂ at the end"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    pieces, verdict = feed(tokenizer, tokens)
    assert verdict == "ended"
    last = pieces[-1].generation
    assert last is not None
    assert "".join(piece.text for piece in pieces) == last.text == str(last) == text
    assert "".join(map(str, pieces)) == text
    assert all("\ufffd" not in piece.text for piece in pieces)
    assert [token for piece in pieces for token in piece.token_ids] == list(last.token_ids) == tokens
    assert last.log_probabilities == tuple(-float(i) for i in range(len(tokens)))
    assert last.top == tuple(((token, -1.0),) for token in tokens)
    assert (last.finish_reason, last.stop, last.prompt_tokens) == ("length", None, 7)
    assert all(piece.generation is None for piece in pieces[:-1])
    assert {(piece.prompt, piece.choice) for piece in pieces} == {(1, 2)}


def test_a_stop_string_may_lie_across_tokens_and_is_cut_off(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("one two three four", add_special_tokens=False)
    pieces, verdict = feed(tokenizer, tokens, "o thr")
    assert verdict == "stopped"
    last = pieces[-1].generation
    assert last is not None
    assert "".join(piece.text for piece in pieces) == last.text == "one tw"
    assert (last.finish_reason, last.stop) == ("stop", "o thr")
    assert len(last.token_ids) == len(pieces) < len(tokens)


def test_what_might_have_been_a_stop_string_is_given_at_the_end(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("one two thr", add_special_tokens=False)
    pieces, verdict = feed(tokenizer, tokens, "three")
    assert verdict == "ended"
    assert "".join(piece.text for piece in pieces) == "one two thr"
    assert pieces[-1].generation is not None
    assert pieces[-1].generation.stop is None


def test_an_end_token_is_no_text_whatever_it_is(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("one two", add_special_tokens=False)
    pieces, verdict = feed(tokenizer, tokens, finish="stop")
    last = pieces[-1].generation
    assert last is not None
    assert verdict == "ended"
    assert last.text == tokenizer.decode(tokens[:-1], True)
    assert last.token_ids == tuple(tokens)
    assert last.finish_reason == "stop"


def test_a_stop_string_in_the_last_token_is_the_engines_end(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("one two", add_special_tokens=False)
    pieces, verdict = feed(tokenizer, tokens, "o", finish="length")
    assert verdict == ("stopped" if len(pieces) < len(tokens) else "ended")
    assert pieces[-1].generation is not None
    assert pieces[-1].generation.finish_reason == "stop"


def test_half_a_character_at_the_end_is_a_replacement_character(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a☂", add_special_tokens=False)
    pieces, _ = feed(tokenizer, tokens[:-1])
    assert [piece.text for piece in pieces][-1].endswith("\ufffd")


def test_not_finite_is_said(tokenizer: Tokenizer) -> None:
    pieces, verdict = feed(tokenizer, [5, 6], finish="not_finite")
    assert verdict == "ended"
    assert pieces[-1].generation is not None
    assert pieces[-1].generation.finish_reason == "not_finite"


def test_an_empty_stop_string_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="a stop string is empty"):
        feed(tokenizer, [5], "")


@given(st.text(min_size=1, max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(tokens, True)
    pieces, _ = feed(tokenizer, tokens, *stops)
    got = "".join(piece.text for piece in pieces)
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    if not ends:
        assert got == whole
    else:
        first = min(ends)
        longest = max(len(stop) for stop in stops if whole[:first].endswith(stop))
        assert got == whole[: first - longest]
