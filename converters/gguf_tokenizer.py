"""Rebuilds a Hugging Face tokenizer from a GGUF file's metadata.

GGUF stores the vocabulary and the merges, but of the rule that splits text before merging only a name. The rules
here are those that the named models' own tokenizer.json files state; a name that is not here is refused, because a
wrong rule gives wrong tokens and no error.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from elastic_jax.config import ModelConfig
from elastic_jax.errors import ConfigError

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_SPACE = "\u2581"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class _Split:
    """How a byte-level tokenizer splits text before merging.

    Attributes:
        regex: its own rule, or None for GPT-2's.
        single_digits: whether digits are split one by one first.
        whole_words: whether a word that is a token is taken without merging.
        add_bos: whether a text begins with the bos token where the file does not say.
    """

    regex: str | None
    single_digits: bool
    whole_words: bool
    add_bos: bool


_GPT2 = _Split(None, single_digits=False, whole_words=False, add_bos=False)
_SPLITS = {
    "gpt-2": _GPT2,
    "default": _GPT2,  # files older than the names: GPT-2's rule was then the only one
    "smollm": _Split(None, single_digits=True, whole_words=False, add_bos=False),
    "llama-bpe": _Split(_LLAMA3, single_digits=False, whole_words=True, add_bos=True),
    "tekken": _Split(_TEKKEN, single_digits=False, whole_words=True, add_bos=True),
}


def build_tokenizer(metadata: Mapping[str, Any], config: ModelConfig, *, source: str) -> dict[str, bytes]:
    """Makes the tokenizer files of a Hugging Face folder.

    Args:
        metadata: the file's `tokenizer.*` keys.
        config: the model; its end-of-sequence tokens become generation_config.json.
        source: names the file in errors.

    Returns:
        File name -> content.

    Raises:
        ConfigError: the tokenizer is missing or malformed, or is of a kind that is not implemented.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not tokens or (types is not None and len(types) != len(tokens)) or len(tokens) > config.vocab_size:
        raise ConfigError(f"{source}: tokenizer.ggml.tokens should hold up to {config.vocab_size} tokens with types")
    if len(set(tokens)) != len(tokens):
        raise ConfigError(f"{source}: tokenizer.ggml.tokens holds a token twice")
    types = types or [1] * len(tokens)
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level(metadata, tokens, source)
    elif kind == "llama":
        tokenizer, add_bos = _sentencepiece(metadata, tokens, source)
    else:
        raise ConfigError(f"{source}: tokenizer.ggml.model should be 'gpt2' or 'llama', found {kind!r}")
    # Ids stay what they are, because every added token is in the vocabulary already.
    tokenizer.add_special_tokens(_added(tokens, types, _CONTROL, special=True))
    tokenizer.add_tokens(_added(tokens, types, _USER_DEFINED, special=False))
    ids = {
        "bos_token": config.bos_token_id,
        "eos_token": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token": config.pad_token_id,
        "unk_token": metadata.get("tokenizer.ggml.unknown_token_id"),
    }
    if any(index is not None and index >= len(tokens) for index in ids.values()):
        raise ConfigError(f"{source}: special tokens {ids} should be below {len(tokens)}")
    names = {name: tokens[index] for name, index in ids.items() if index is not None}
    if metadata.get("tokenizer.ggml.add_bos_token", add_bos) and "bos_token" in names:
        _begin_with(tokenizer, names["bos_token"], ids["bos_token"])
    return _files(tokenizer, names, metadata, config)


def _added(tokens: Sequence[str], types: Sequence[int], wanted: int, *, special: bool) -> list[AddedToken]:
    return [
        AddedToken(token, special=special, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind == wanted
    ]


def _begin_with(tokenizer: Tokenizer, bos: str, index: int | None) -> None:
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, index)]
    )
    byte_level = tokenizer.post_processor
    tokenizer.post_processor = processors.Sequence([byte_level, template]) if byte_level else template


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], source: str) -> tuple[Tokenizer, bool]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    split = _SPLITS.get(name)
    if split is None:
        raise ConfigError(f"{source}: tokenizer.ggml.pre should be one of {sorted(_SPLITS)}, found {name!r}")
    merges = [merge.split(" ", 1) for merge in metadata.get("tokenizer.ggml.merges") or []]
    if not merges or any(len(merge) != 2 for merge in merges):
        raise ConfigError(f"{source}: tokenizer.ggml.merges is missing or malformed")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in merges]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=split.whole_words))
    except Exception as error:  # tokenizers raises no class of its own
        raise ConfigError(f"{source}: the tokenizer's vocabulary and merges do not fit: {error}") from None
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.single_digits else []
    if split.regex is not None:
        steps.append(pre_tokenizers.Split(Regex(split.regex), behavior="isolated", invert=False))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.regex is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.add_bos


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], source: str) -> tuple[Tokenizer, bool]:
    """A byte-fallback BPE. SentencePiece stores scores: any two tokens that make a third merge, best score first."""
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise ConfigError(f"{source}: tokenizer.ggml.scores should hold one score a token")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    candidates = [
        (-scores[index], vocabulary[token[:cut]], vocabulary[token[cut:]])
        for token, index in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    pairs = [(tokens[left], tokens[right]) for _, left, right in sorted(candidates)]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=pairs, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    )
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer, True


def _files(
    tokenizer: Tokenizer, names: Mapping[str, str], metadata: Mapping[str, Any], config: ModelConfig
) -> dict[str, bytes]:
    settings = {
        **names,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json(settings),
        "special_tokens_map.json": _json(names),
        "generation_config.json": _json(generation),
    }


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
