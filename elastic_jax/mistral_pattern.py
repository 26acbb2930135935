"""The wrong pre-tokenization pattern in the tokenizer.json of several Mistral models: detected, and corrected.

Mistral's Tekken divides numbers into single digits, and words at a change of case. The tokenizer.json of Small-3.1 and
others carries Llama 3's pattern instead, with digits in threes, which gives other tokens than the model was trained on:
https://huggingface.co/mistralai/Mistral-Small-3.1-24B-Instruct-2503/discussions/84
"""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

from elastic_jax.errors import TokenizerError

WRONG_DIGITS = r"\p{N}{1,3}"
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MARK = "[INST]"
"""A token that Mistral's instructed models have and Llama 3's have not."""


def has_wrong_pattern(backend: tokenizers.Tokenizer) -> bool:
    """Whether it is a Mistral tokenizer that divides digits in threes."""
    if backend.pre_tokenizer is None or backend.token_to_id(_MARK) is None:
        return False
    state: dict[str, Any] = json.loads(backend.pre_tokenizer.__getstate__())
    steps: list[dict[str, Any]] = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    pattern = steps[0].get("pattern", {}).get("Regex", "") if steps and steps[0]["type"] == "Split" else ""
    return WRONG_DIGITS in pattern


def correct_pattern(backend: tokenizers.Tokenizer, folder: Path, wanted: bool | None, source: str) -> bool:
    """Puts Tekken's pattern where a Mistral tokenizer has Llama 3's.

    Args:
        backend: is changed.
        folder: where the model's tekken.json is, if it has one: the authority on the pattern.
        wanted: False keeps the wrong pattern, True corrects it without tekken.json; None asks for tekken.json.
        source: the tokenizer's name, for messages.

    Returns:
        Whether the pattern was corrected.

    Raises:
        TokenizerError: the pattern is wrong, and nothing says what to do; or tekken.json names no pattern.
    """
    if wanted is False or not has_wrong_pattern(backend):
        return False
    right = _tekken_pattern(folder)
    if right is None and not wanted:
        raise TokenizerError(
            f"{source}: splits digits in threes, as Llama 3 does and no Mistral model was trained. Add the model's "
            'tekken.json, or "fix_mistral_regex": true to tokenizer_config.json (false to keep it)'
        )
    split = pre_tokenizers.Split(tokenizers.Regex(right or TEKKEN_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return True


def _tekken_pattern(folder: Path) -> str | None:
    file = folder / "tekken.json"
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))["config"]["pattern"]
    except (ValueError, KeyError, TypeError) as error:
        raise TokenizerError(f"{file}: expected a JSON object with config.pattern: {error!r}") from error
