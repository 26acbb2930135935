"""Streaming gives what decoding at once gives, and stop strings what a search of the whole text gives."""

import itertools
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from elastic_jax.detokenizer import DecoderScheme, Detokenizer, StopStrings
from elastic_jax.errors import RequestError, TokenizerError

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
SOURCE = Path("tokenizer.json")


def fixture(name: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(FIXTURES / name / "tokenizer.json"))


def byte_level() -> tokenizers.Tokenizer:
    """The byte-level fixture, and added tokens that are not spelled in its alphabet, or only seem to be."""
    tokenizer = fixture("tiny_mistral")
    tokenizer.add_tokens(["two words", "日本", AddedToken("é", normalized=False)])
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    tokenizer = fixture("tiny_llama")
    tokenizer.add_tokens(["  two spaces", "日本"])
    return tokenizer


def metaspace(prepend_scheme: str) -> tokenizers.Tokenizer:
    words = ["▁", "▁▁", "a", "▁a", "a▁b", "<0xE6>", "<0x97>", "<0xA5>", "<0x41>", "<0xzz>", "日"]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme=prepend_scheme), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


TOKENIZERS = {
    "byte-level": byte_level(),
    "byte-fallback": byte_fallback(),
    "metaspace-always": metaspace("always"),
    "metaspace-never": metaspace("never"),
}


def special_ids(tokenizer: tokenizers.Tokenizer) -> frozenset[int]:
    return frozenset(index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special)


def start(tokenizer: tokenizers.Tokenizer, skip_special_tokens: bool) -> Detokenizer:
    skipped = special_ids(tokenizer) if skip_special_tokens else frozenset()
    return Detokenizer(tokenizer, DecoderScheme.of(tokenizer, SOURCE), skipped)


def chunked(items: list, cuts: list[int]) -> list[list]:
    """`items` cut at each place of `cuts`, some of them equal, so that some chunks are empty."""
    borders = [0, *sorted(cut % (len(items) + 1) for cut in cuts), len(items)]
    return [items[begin:end] for begin, end in itertools.pairwise(borders)]


@st.composite
def sequences(draw: st.DrawFn) -> tuple[tokenizers.Tokenizer, list[int]]:
    """Random ids, added tokens and ids of real text, mixed: random ids alone hardly ever make a valid character."""
    tokenizer = TOKENIZERS[draw(st.sampled_from(sorted(TOKENIZERS)))]
    # Past the end of the vocabulary too: a model's is often padded.
    random_ids = st.lists(st.integers(0, tokenizer.get_vocab_size() + 3), max_size=8)
    text_ids = st.text(alphabet="ab 日本🙂é\u0301\n", max_size=6).map(lambda text: tokenizer.encode(text).ids)
    added_ids = st.lists(st.sampled_from(sorted(tokenizer.get_added_tokens_decoder())), max_size=2)
    cut_ids = text_ids.map(lambda ids: ids[:-1])
    parts = draw(st.lists(st.one_of(random_ids, added_ids, text_ids, cut_ids), max_size=6))
    return tokenizer, [token_id for part in parts for token_id in part]


@given(sequences(), st.lists(st.integers(0, 100), max_size=8), st.booleans())
def test_pieces_join_to_the_decoded_text(case, cuts, skip_special_tokens):
    tokenizer, ids = case
    detokenizer = start(tokenizer, skip_special_tokens)
    pieces = [detokenizer.feed(chunk) for chunk in chunked(ids, cuts)]
    expected = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    assert "".join(pieces) + detokenizer.flush() == expected


@given(sequences(), st.booleans())
def test_one_token_at_a_time_joins_to_the_decoded_text(case, skip_special_tokens):
    tokenizer, ids = case
    detokenizer = start(tokenizer, skip_special_tokens)
    pieces = [detokenizer.feed([token_id]) for token_id in ids]
    expected = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    assert "".join(pieces) + detokenizer.flush() == expected


@pytest.mark.parametrize("name", ["tiny_mistral", "tiny_llama"])
@given(text=st.text())
def test_valid_text_never_shows_a_replacement_character(name, text):
    tokenizer = fixture(name)
    detokenizer = start(tokenizer, skip_special_tokens=True)
    ids = tokenizer.encode(text, add_special_tokens=True).ids
    pieces = [detokenizer.feed([token_id]) for token_id in ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback"])
def test_complete_characters_are_not_held_back(name):
    tokenizer = TOKENIZERS[name]
    detokenizer = start(tokenizer, skip_special_tokens=True)
    first, *others = tokenizer.encode("the harbour master", add_special_tokens=False).ids
    # A sentencepiece-like decoder strips the first token's space: the others are plain.
    detokenizer.feed([first])
    for token_id in others:
        token = tokenizer.id_to_token(token_id).replace("Ġ", " ").replace("▁", " ")
        assert detokenizer.feed([token_id]) == token
    assert detokenizer.flush() == ""


def test_half_a_character_waits_for_the_other_half():
    tokenizer = TOKENIZERS["byte-level"]
    detokenizer = start(tokenizer, skip_special_tokens=True)
    ids = tokenizer.encode("🙂", add_special_tokens=False).ids
    assert len(ids) == 4
    assert [detokenizer.feed([token_id]) for token_id in ids] == ["", "", "", "🙂"]
    assert detokenizer.feed(ids[:2]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_invalid_byte_run_is_not_held_back_for_ever():
    tokenizer = TOKENIZERS["byte-fallback"]
    detokenizer = start(tokenizer, skip_special_tokens=True)
    wrong = tokenizer.token_to_id("<0xFF>")
    assert [detokenizer.feed([wrong]) for _ in range(3)] == ["\ufffd"] * 3


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback"])
@pytest.mark.timeout(60)
def test_time_is_linear_even_in_one_long_run_of_bytes(name):
    tokenizer = TOKENIZERS[name]
    detokenizer = start(tokenizer, skip_special_tokens=True)
    ids = tokenizer.encode("日", add_special_tokens=False).ids[-3:] * 20_000
    text = "".join([detokenizer.feed([token_id]) for token_id in ids]) + detokenizer.flush()
    assert text == "日" * 20_000


def test_flushed_detokenizer_refuses_more():
    detokenizer = start(TOKENIZERS["byte-level"], skip_special_tokens=True)
    detokenizer.flush()
    with pytest.raises(RequestError, match="flushed"):
        detokenizer.feed([5])
    with pytest.raises(RequestError, match="flushed already"):
        detokenizer.flush()


def test_negative_id_is_refused():
    with pytest.raises(RequestError, match="found -1"):
        start(TOKENIZERS["byte-level"], skip_special_tokens=True).feed([-1])


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]),
        decoders.Replace(tokenizers.Regex("a+"), " "),
        None,
    ],
)
def test_unknown_decoder_is_refused_by_name(decoder):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if decoder is not None:
        tokenizer.decoder = decoder
    name = "no decoder" if decoder is None else json.loads(decoder.__getstate__())["type"]
    with pytest.raises(TokenizerError, match=r"expected.*byte-level|cannot be streamed") as caught:
        DecoderScheme.of(tokenizer, SOURCE)
    if name != "Sequence":
        assert name in str(caught.value)


LETTERS = st.text(alphabet="ab", max_size=20)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)


def naive_search(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Text before the stop string that is complete first, the longest of several, by trying every end."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(LETTERS, STOPS, st.lists(st.integers(0, 100), max_size=8))
@example("aabaab", ["aab", "ba"], [1, 2, 3])
@example("abab", ["bab", "abab"], [])
def test_stop_strings_equal_a_naive_search(text, stops, cuts):
    stream = StopStrings(stops)
    emitted, seen, hits = "", "", []
    for chunk in chunked(list(text), cuts):
        emitted += stream.feed("".join(chunk))
        seen += "".join(chunk)
        hits.append(stream.hit)
        if stream.hit is None:
            beginnings = [stop[:length] for stop in stops for length in range(len(stop))]
            held = max((len(beginning) for beginning in beginnings if seen.endswith(beginning)), default=0)
            assert emitted == seen[: len(seen) - held]
    expected, hit = naive_search(text, stops)
    assert emitted + stream.flush() == expected
    assert stream.hit == hit
    first = next((index for index, each in enumerate(hits) if each), len(hits))
    assert all(each is None for each in hits[:first])
    assert all(each == hit for each in hits[first:])


def test_stop_string_across_tokens():
    tokenizer = TOKENIZERS["byte-level"]
    detokenizer, stops = start(tokenizer, skip_special_tokens=True), StopStrings(["\n\nUser:", "🙂🙂"])
    ids = tokenizer.encode("Fine. 🙂 \n\nUser: and", add_special_tokens=False).ids
    assert "".join(stops.feed(detokenizer.feed([token_id])) for token_id in ids) == "Fine. 🙂 "
    assert stops.hit == "\n\nUser:"
    assert stops.feed("more") == ""
    assert stops.flush() == ""


def test_empty_stop_string_is_refused():
    with pytest.raises(RequestError, match="empty"):
        StopStrings(["a", ""])
