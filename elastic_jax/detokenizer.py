"""Turns generated token ids into text piece by piece: no half characters, and stop strings wherever tokens divide them.

Decoding a growing list of ids again at every token costs time that grows with the square of the output, and cutting the
difference of two decodings is wrong where a character is spread over tokens. Here each token is read once.
"""

import codecs
import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from elastic_jax.errors import RequestError, TokenizerError

REPLACEMENT = "\ufffd"


class TextDecoder(Protocol):
    """The state of decoding one sequence of tokens."""

    def feed(self, token: str) -> str:
        """Takes the next token as it is written in the vocabulary, and returns the text that is now certain."""
        ...

    def flush(self) -> str:
        """Returns what was held back, there being no further token."""
        ...


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet, which gives each byte a printable character (the encoder.py of openai/gpt-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


class _ByteLevelDecoder:
    """Tokens spell bytes in GPT-2's alphabet; the bytes of all of them are read as UTF-8."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: str) -> str:
        alphabet = _byte_of_character()
        try:
            spelled = bytes([alphabet[character] for character in token])
        except KeyError:
            # An added token may hold any character: `tokenizers` then takes the whole token literally.
            spelled = token.encode()
        return self._utf8.decode(spelled)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _ByteRun:
    """Consecutive byte tokens, `<0xE2>`: their text if the whole run is valid UTF-8, else U+FFFD for each byte.

    That rule is `tokenizers`' ByteFallback. One wrong byte at the end changes the whole run, hence nothing of a run is
    certain before it ends or is invalid.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._valid = True
        self._pieces: list[str] = []
        self._held_bytes = 0

    def feed(self, byte: int) -> str:
        self._held_bytes += 1
        if self._valid:
            try:
                self._pieces.append(self._utf8.decode(bytes([byte])))
                return ""
            except UnicodeDecodeError:
                self._valid = False
        text, self._held_bytes = REPLACEMENT * self._held_bytes, 0
        return text

    def end(self) -> str:
        if not self._held_bytes and self._valid:
            return ""
        unfinished = bool(self._utf8.getstate()[0])
        complete = self._valid and not unfinished
        text = "".join(self._pieces) if complete else REPLACEMENT * self._held_bytes
        self._reset()
        return text


@dataclasses.dataclass(frozen=True)
class _PieceRules:
    """How tokens that are written as text become text; the steps of a sentencepiece-like decoder.

    Attributes:
        replacements: pairs of a string and what replaces it, applied to each token in order.
        dropped_from_first: a character that the first token loses wherever it is (Metaspace), or None.
        byte_fallback: whether `<0xE2>` is a byte.
        stripped: the character stripped from the beginning of the text.
        strip_count: how many of it at most.
    """

    replacements: tuple[tuple[str, str], ...] = ()
    dropped_from_first: str | None = None
    byte_fallback: bool = False
    stripped: str = ""
    strip_count: int = 0


class _PieceDecoder:
    """Tokens are text with a mark for spaces, and bytes for what the vocabulary lacks."""

    _byte_token = re.compile(r"<0x([0-9A-Fa-f]{2})>")

    def __init__(self, rules: _PieceRules) -> None:
        self._rules = rules
        self._first = True
        self._to_strip = rules.strip_count
        self._run = _ByteRun()

    def _strip(self, text: str) -> str:
        while self._to_strip and text:
            if text[0] != self._rules.stripped:
                self._to_strip = 0
                break
            text = text[1:]
            self._to_strip -= 1
        return text

    def feed(self, token: str) -> str:
        if self._first and self._rules.dropped_from_first is not None:
            token = token.replace(self._rules.dropped_from_first, "")
        self._first = False
        for old, new in self._rules.replacements:
            token = token.replace(old, new)
        byte = self._byte_token.fullmatch(token) if self._rules.byte_fallback else None
        text = self._run.feed(int(byte[1], 16)) if byte else self._run.end() + token
        return self._strip(text)

    def flush(self) -> str:
        return self._strip(self._run.end())


@dataclasses.dataclass(frozen=True)
class DecoderScheme:
    """What the `decoder` of a tokenizer.json says, as far as Mistral and Llama tokenizers use it.

    Attributes:
        pieces: rules of a sentencepiece-like decoder; None for a byte-level one.
    """

    pieces: _PieceRules | None

    def start(self) -> TextDecoder:
        """A decoder for one new sequence."""
        return _ByteLevelDecoder() if self.pieces is None else _PieceDecoder(self.pieces)

    @classmethod
    def of(cls, tokenizer: tokenizers.Tokenizer, source: Path) -> "DecoderScheme":
        """Reads the decoder of a tokenizer that was loaded from `source`.

        Raises:
            TokenizerError: the decoder is none of those implemented here.
        """
        if tokenizer.decoder is None:
            raise TokenizerError(f"{source}: has no decoder; expected a byte-level or sentencepiece-like one")
        found: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
        steps: list[dict[str, Any]] = found["decoders"] if found["type"] == "Sequence" else [found]
        if [step["type"] for step in steps] == ["ByteLevel"]:
            return cls(pieces=None)
        rules, fused = _PieceRules(), False
        for step in steps:
            match step:
                case {"type": "Replace", "pattern": {"String": old}, "content": new} if not rules.byte_fallback:
                    rules = dataclasses.replace(rules, replacements=(*rules.replacements, (old, new)))
                case {"type": "Metaspace", "replacement": mark} if rules == _PieceRules():
                    first = None if step["prepend_scheme"] == "never" else mark
                    rules = _PieceRules(replacements=((mark, " "),), dropped_from_first=first)
                case {"type": "ByteFallback"} if not fused:
                    rules = dataclasses.replace(rules, byte_fallback=True)
                case {"type": "Fuse"}:
                    fused = True
                case {"type": "Strip", "content": content, "start": count, "stop": 0} if fused and not rules.stripped:
                    rules = dataclasses.replace(rules, stripped=content, strip_count=count)
                case _:
                    names = " > ".join(each["type"] for each in steps)
                    raise TokenizerError(
                        f"{source}: the decoder {names} cannot be streamed, because of {json.dumps(step)}; expected "
                        "ByteLevel, or Replace or Metaspace > ByteFallback > Fuse > Strip"
                    )
        return cls(pieces=rules)


class Detokenizer:
    """Text of one growing sequence of token ids. Time is linear in the output, however it is divided into calls.

    The texts of all `feed` calls and of `flush`, joined, are what decoding all ids at once gives. A call returns what
    no later token can change: bytes of an unfinished character are held back.

    Args:
        tokenizer: the vocabulary. Ids that it lacks (a model's padded vocabulary) give no text, as in `tokenizers`.
        scheme: how that tokenizer decodes.
        special_ids: ids that are left out; empty to keep all.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, scheme: DecoderScheme, special_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = special_ids
        self._decoder: TextDecoder | None = scheme.start()

    def feed(self, token_ids: Sequence[int]) -> str:
        """Takes the next tokens, and returns the text that is now certain.

        Raises:
            RequestError: an id is negative, or `flush` was called before.
        """
        if self._decoder is None:
            raise RequestError("this detokenizer was flushed: make a new one for a new sequence")
        pieces = []
        for token_id in token_ids:
            if token_id < 0:
                raise RequestError(f"token ids are not negative, found {token_id}")
            if token_id in self._skipped:
                continue
            token = self._tokenizer.id_to_token(token_id)
            if token is not None:
                pieces.append(self._decoder.feed(token))
        return "".join(pieces)

    def flush(self) -> str:
        """Ends the sequence, and returns what was held back; an unfinished character becomes U+FFFD.

        Raises:
            RequestError: called twice.
        """
        if self._decoder is None:
            raise RequestError("this detokenizer was flushed already")
        text = self._decoder.flush()
        self._decoder = None
        return text


def _borders(stop: str) -> list[int]:
    """Knuth, Morris and Pratt's failure table: for each prefix, how long a proper prefix of it is also its suffix."""
    lengths = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = lengths[length - 1]
        length += stop[index] == stop[length]
        lengths[index] = length
    return lengths


class StopStrings:
    """Ends a stream of text before the first stop string in it, however the text is divided into pieces.

    The first is the one that is complete first; of several complete at the same character, the longest. Text that could
    be the beginning of a stop string is held back, and no more than that.

    Args:
        stops: the strings, none of them empty; there may be none.

    Raises:
        RequestError: one of them is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise RequestError("a stop string is empty: it would end every text before its first character")
        # Longest first, so that the first found at a character is the longest.
        self._stops = sorted(dict.fromkeys(stops), key=len, reverse=True)
        self._tables = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._held = ""
        self._hit: str | None = None

    @property
    def hit(self) -> str | None:
        """The stop string that ended the text, or None so far."""
        return self._hit

    def _advance(self, character: str) -> str | None:
        for index, (stop, table) in enumerate(zip(self._stops, self._tables, strict=True)):
            length = self._matched[index]
            while length and stop[length] != character:
                length = table[length - 1]
            length += stop[length] == character
            if length == len(stop):
                return stop
            self._matched[index] = length
        return None

    def feed(self, text: str) -> str:
        """Takes more text, and returns what is certain to come before any stop string; nothing once there was a hit."""
        if self._hit is not None:
            return ""
        if not self._stops:
            return text
        start = len(self._held)
        everything = self._held + text
        for position in range(start, len(everything)):
            self._hit = self._advance(everything[position])
            if self._hit is not None:
                self._held = ""
                return everything[: position + 1 - len(self._hit)]
        certain = len(everything) - max(self._matched)
        self._held = everything[certain:]
        return everything[:certain]

    def flush(self) -> str:
        """Returns the text held back, there being no more to come; nothing after a hit."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held
