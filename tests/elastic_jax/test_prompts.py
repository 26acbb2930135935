from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic_jax.errors import RequestError, TokenizerError
from elastic_jax.prompts import list_prompts, pair_tokens, prompt_tokens, token_ids
from elastic_jax.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def tokenizer(fixtures_path: Path) -> Tokenizer:
    return Tokenizer.load(fixtures_path / "tiny_mistral")


@pytest.mark.parametrize("prompt", ["text", "", [1, 2], (1, 2), [np.int32(1)], np.array([1, 2]), CHAT])
def test_one_prompt_is_told_from_many(prompt: Any) -> None:
    many, listed = list_prompts(prompt)
    assert not many
    assert len(listed) == 1
    assert listed[0] is prompt


@pytest.mark.parametrize(
    "prompts", [["a", "b"], ["a"], [[1], [2, 3]], [CHAT, CHAT], ["a", [1], CHAT, np.array([3])], ([1],), [[]]]
)
def test_a_list_of_prompts_may_mix_their_kinds(prompts: Any) -> None:
    many, listed = list_prompts(prompts)
    assert many
    assert listed == list(prompts)


def test_a_matrix_is_a_list_of_prompts() -> None:
    many, listed = list_prompts(np.array([[1, 2], [3, 4]]))
    assert many
    assert [row.tolist() for row in listed] == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "the list is empty"),
        (np.zeros((0, 3), np.int32), "the list is empty"),
        (b"bytes", "found bytes"),
        ([b"bytes"], "found bytes"),
        (3, "found int"),
        (None, "found NoneType"),
        ({"role": "user"}, "found dict"),
        (["a", 3], "found int"),
        (["a", {"role": "user"}], "found dict"),
        (np.array(3), "found an array of 0 dimensions"),
        (np.zeros((2, 2, 2), np.int32), "found an array of 3 dimensions"),
        ((x for x in "ab"), "found generator"),
    ],
)
def test_what_is_no_prompt_is_refused(prompts: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        list_prompts(prompts)


@pytest.mark.usefixtures("unchecked_types")
def test_every_kind_becomes_token_ids(tokenizer: Tokenizer) -> None:
    assert prompt_tokens("Hello", tokenizer) == tuple(tokenizer.encode("Hello", add_special_tokens=True))
    assert prompt_tokens(CHAT, tokenizer) == tuple(tokenizer.apply_chat_template(CHAT, add_generation_prompt=True))
    for ids in ([4, 5], (4, 5), np.array([4, 5], np.uint16), [np.int64(4), 5]):
        found = prompt_tokens(ids, tokenizer)
        assert found == (4, 5)
        assert all(type(token) is int for token in found)


@pytest.mark.parametrize("ids", [[1.0], [True], ["1"], [None], np.array([1.5]), [1, [2]]])
@pytest.mark.usefixtures("unchecked_types")
def test_token_ids_are_integers(ids: Any, tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="a token id must be an integer"):
        token_ids(ids)
    with pytest.raises(RequestError, match="a token id must be an integer"):
        prompt_tokens(ids, tokenizer)


def test_a_pair_is_text_or_token_ids(tokenizer: Tokenizer) -> None:
    before, after = pair_tokens(("ab", " cd"), tokenizer)
    assert before + after == tuple(tokenizer.encode("ab cd", add_special_tokens=True))
    assert pair_tokens([[1, 2], np.array([3])], tokenizer) == ((1, 2), (3,))


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("ab", "must be a pair"),
        (("a",), "must be a pair"),
        (("a", "b", "c"), "must be a pair"),
        (3, "must be a pair"),
        (("a", [1]), "two texts or two lists of token ids"),
        (([1], "a"), "two texts or two lists of token ids"),
        (([], [1]), "at least one token of context"),
        (([1], []), "one of continuation"),
        (("a", ""), "continuation"),
    ],
)
def test_what_is_no_pair_is_refused(pair: Any, message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=message):
        pair_tokens(pair, tokenizer)


def test_messages_without_a_template_are_refused(fixtures_path: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((fixtures_path / "tiny_mistral" / "tokenizer.json").read_bytes())
    with pytest.raises(TokenizerError, match="no chat template"):
        prompt_tokens(CHAT, Tokenizer.load(tmp_path))
