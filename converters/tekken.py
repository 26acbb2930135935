"""Builds a Hugging Face tokenizer from Mistral's tekken.json, for folders that hold no other.

tekken.json lists tokens as bytes by rank, as tiktoken does: bytes that are neighbours merge if they make a
token, the lowest rank first. tokenizer.json wants pairs of tokens instead; the pair that makes a token last
is found by merging its bytes with the ranks below its own. mistral-common's `Tekkenizer` is the reference,
also for names of special tokens that older files do not list.
"""

import base64
import functools
import itertools
import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from elastic_jax.errors import ConversionError

TEKKEN_JSON = "tekken.json"

_OLDER_SPECIAL_TOKENS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
"""By id, of files up to version v7 that do not list theirs."""

_LISTLESS_VERSIONS = ("v1", "v2", "v3", "v7")

_NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def build_tokenizer(content: bytes, *, vocab_size: int, source: str) -> dict[str, bytes]:
    """Makes the files that a Hugging Face folder has beside its tekken.json.

    Args:
        content: of tekken.json.
        vocab_size: of the model.
        source: names the file in errors.

    Returns:
        File name -> content: tokenizer.json and tokenizer_config.json.

    Raises:
        ConversionError: the file is malformed, or holds more tokens than the model.
    """
    try:
        document = json.loads(content)
        settings = document["config"]
        pattern, size = str(settings["pattern"]), int(settings["default_vocab_size"])
        reserved = int(settings["default_num_special_tokens"])
        entries = document["vocab"][: size - reserved]
        tokens = [base64.b64decode(entry["token_bytes"], validate=True) for entry in entries]
        specials = _special_tokens(document, reserved)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{source} is no Tekken vocabulary: {error!r}") from None
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) != size - reserved or any(bytes([byte]) not in ranks for byte in range(256)):
        raise ConversionError(
            f"{source} should hold {size - reserved} different tokens, each single byte among them; found {len(ranks)}"
        )
    if size > vocab_size:
        raise ConversionError(f"{source} holds {size} tokens, and the model has {vocab_size}: it is another model's")
    tokenizer = _byte_level(ranks, specials, pattern, source)
    values = {
        **_NAMED,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": (json.dumps(values, indent=2) + "\n").encode(),
    }


def _special_tokens(document: Mapping[str, Any], reserved: int) -> list[str]:
    """Names by id, of every reserved one."""
    listed = document.get("special_tokens")
    version = document["config"].get("version")
    if listed is None:
        if version not in _LISTLESS_VERSIONS:
            raise ValueError(f"a file of version {version!r} must list its special_tokens")
        names = dict(enumerate(_OLDER_SPECIAL_TOKENS))
    else:
        names = {int(entry["rank"]): str(entry["token_str"]) for entry in listed}
    found = [names.get(index, f"<SPECIAL_{index}>") for index in range(reserved)]
    if missing := sorted({*_NAMED.values(), *names.values()} - set(found)):
        raise ValueError(f"special tokens {missing} are missing, or outside the first {reserved} ids")
    return found


def _byte_level(ranks: Mapping[bytes, int], specials: list[str], pattern: str, source: str) -> Tokenizer:
    vocabulary = {name: index for index, name in enumerate(specials)}
    vocabulary |= {spelled(token): len(specials) + rank for token, rank in ranks.items()}
    if len(vocabulary) != len(specials) + len(ranks):
        raise ConversionError(f"{source}: a special token is written like an ordinary one, or twice")
    merges = [last_merge(token, ranks) for token in ranks if len(token) > 1]
    if any(part not in ranks for pair in merges for part in pair):
        raise ConversionError(f"{source}: some token cannot be made of others of lower rank")
    pairs = [(spelled(first), spelled(second)) for first, second in merges]
    try:
        # A piece of text that is a token is taken whole, as tiktoken does.
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=True))
    except Exception as error:  # tokenizers raises no class of its own
        raise ConversionError(f"{source}: its tokens and ranks make no tokenizer: {error}") from None
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    bos = _NAMED["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, specials.index(bos))]
    )
    return tokenizer


@functools.cache
def _alphabet() -> list[str]:
    """GPT-2's printable characters for bytes, in the order of the bytes (the encoder.py of openai/gpt-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def spelled(token: bytes) -> str:
    """A token as tokenizer.json writes it."""
    return "".join(_alphabet()[byte] for byte in token)


def last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that byte pair encoding joins last to make this one of two bytes or more."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(first + second, len(ranks)) for first, second in itertools.pairwise(parts)]
        best = min(range(len(joined)), key=joined.__getitem__)
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]
