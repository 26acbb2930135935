"""What `generate` and `score` take: texts, token ids and conversations, told apart and turned into token ids."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elastic_jax.errors import RequestError
from elastic_jax.requests import is_integer
from elastic_jax.tokenizer import Tokenizer

type Prompt = str | Sequence[int] | np.ndarray | Sequence[Mapping[str, Any]]
"""A text, token ids, or the messages of a chat."""


def list_prompts(prompts: Any) -> tuple[bool, list[Any]]:
    """Whether many prompts were given, and all of them.

    Raises:
        RequestError: there is none, or something is no prompt.
    """
    if isinstance(prompts, np.ndarray):
        many = prompts.ndim == 2
    elif _is_prompt(prompts):
        many = not isinstance(prompts, str) and _holds_prompts(prompts)
    else:
        raise _no_prompt(prompts)
    listed = list(prompts) if many else [prompts]
    if many and not listed:
        raise RequestError("no prompt was given: the list is empty")
    if wrong := [prompt for prompt in listed if not _is_prompt(prompt)]:
        raise _no_prompt(wrong[0])
    return many, listed


def _is_prompt(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1
    # Bytes are a sequence of integers, but nobody who passes them means token ids.
    return isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview)


def _holds_prompts(prompts: Sequence[Any]) -> bool:
    return not prompts or not (is_integer(prompts[0]) or isinstance(prompts[0], Mapping))


def _no_prompt(value: Any) -> RequestError:
    found = type(value).__name__
    if isinstance(value, np.ndarray):
        found = f"an array of {value.ndim} dimensions"
    return RequestError(f"a prompt must be text, token ids or chat messages, found {found}")


def prompt_tokens(prompt: Prompt, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The token ids of one prompt; a text gets the special tokens that the tokenizer puts before one.

    Raises:
        RequestError: a token id is no integer, or messages are malformed.
        TokenizerError: messages were given, and the model has no chat template.
    """
    if isinstance(prompt, str):
        return tuple(tokenizer.encode(prompt, add_special_tokens=True))
    if isinstance(prompt, np.ndarray) or not len(prompt) or not isinstance(prompt[0], Mapping):
        return token_ids(prompt)
    messages: Any = prompt
    return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True))


def token_ids(values: Any) -> tuple[int, ...]:
    """Python integers of token ids.

    Raises:
        RequestError: one is no integer.
    """
    for value in values:
        if not is_integer(value):
            raise RequestError(f"a token id must be an integer, found {value!r:.80}")
    return tuple(int(value) for value in values)


def pair_tokens(pair: Any, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The token ids of a context and of its continuation (`Tokenizer.encode_pair`); token ids are taken as they are.

    Raises:
        RequestError: it is no pair, mixes text and token ids, or either half has no token.
    """
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise RequestError(f"what is scored must be a pair (context, continuation), found {pair!r:.80}")
    context, continuation = pair
    if isinstance(context, str) and isinstance(continuation, str):
        before, after = tokenizer.encode_pair(context, continuation)
    elif isinstance(context, str) or isinstance(continuation, str):
        raise RequestError("a pair to score must be two texts or two lists of token ids, not one of each")
    else:
        before, after = token_ids(context), token_ids(continuation)
    if not before or not after:
        raise RequestError("a pair to score needs at least one token of context and one of continuation")
    return tuple(before), tuple(after)
