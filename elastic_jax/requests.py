"""What the engine is asked and what it answers."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Float32, Int32, UInt32

from elastic_jax.errors import RequestError

type FinishReason = Literal["stop", "length", "not_finite"]
"""`stop`: an end token came; `length`: `max_new_tokens` came; `not_finite`: the model's logits were not all finite."""

MIN_TEMPERATURE = 1e-5
"""Logits are divided by it in float32, whose range they must not leave."""

MAX_BIAS = 1000.0
"""Largest size of a logit bias, for the same reason; it outweighs any logit."""

_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def is_integer(value: object) -> bool:
    """Whether a value can be a token id or a count: Python's or NumPy's integers, but no bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return is_integer(value) or isinstance(value, float | np.floating)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; the defaults take the most likely one.

    Attributes:
        temperature: 0 takes the most likely token; else at least `MIN_TEMPERATURE`.
        top_k: keeps the k most likely tokens; 0 keeps all.
        top_p: keeps the most likely tokens with together at least this probability; in (0, 1].
        min_p: keeps tokens at least this probable relative to the most likely; in [0, 1].
        repetition_penalty: divides the positive logits of tokens seen in prompt or output, multiplies negative
            ones; in [0.001, 1000].
        presence_penalty: subtracted from the logit of a token in the output; in [-2, 2].
        frequency_penalty: subtracted once per occurrence in the output; in [-2, 2].
        logit_bias: added to the logits of some tokens; -inf forbids one, else at most `MAX_BIAS` in size.
        seed: equal seeds give equal draws; None draws one from the operating system.
        top_log_probabilities: how many most likely tokens are reported with each token.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    top_log_probabilities: int = 0

    def __post_init__(self) -> None:
        """Checks every range.

        Raises:
            RequestError: a value lies outside its range.
        """
        for name in ("top_k", "top_log_probabilities", "seed"):
            value = getattr(self, name)
            self._require(name, is_integer(value) or (name == "seed" and value is None), "an integer")
        for name in ("temperature", "top_p", "min_p", *_PENALTIES):
            self._require(name, _is_number(getattr(self, name)), "a number")
        cold = self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < math.inf
        self._require("temperature", cold, f"0, or finite and at least {MIN_TEMPERATURE}")
        self._require("top_k", self.top_k >= 0, "at least 0 (0 keeps all)")
        self._require("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        self._require("min_p", 0 <= self.min_p <= 1, "in [0, 1]")
        self._require("repetition_penalty", 0.001 <= self.repetition_penalty <= 1000, "in [0.001, 1000]")
        self._require("presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2]")
        self._require("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2]")
        self._require("top_log_probabilities", self.top_log_probabilities >= 0, "at least 0")
        self._require("seed", self.seed is None or 0 <= self.seed < 2**64, "None or in [0, 2**64)")
        self._require("logit_bias", isinstance(self.logit_bias, Mapping), "a mapping from token ids to numbers")
        for token, bias in self.logit_bias.items():
            if not is_integer(token):
                raise RequestError(f"logit_bias must have token ids as keys, found {token!r}")
            if not _is_number(bias) or not (abs(bias) <= MAX_BIAS or bias == -math.inf):
                raise RequestError(
                    f"logit_bias of token {token} must be -inf or in [{-MAX_BIAS}, {MAX_BIAS}], found {bias!r}"
                )
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))  # the caller may change its own meanwhile

    def _require(self, name: str, satisfied: bool, expected: str) -> None:
        if not satisfied:
            raise RequestError(f"{name} must be {expected}, found {getattr(self, name)!r}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken by the model's own logits, so that the greedy step serves."""
        neutral = (self.temperature, self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return neutral == (0, 1, 0, 0) and not self.logit_bias


class Grammar(Protocol):
    """Restricts an answer to a language, token by token."""

    def allowed(self, output: Sequence[int]) -> UInt32[np.ndarray, " words"]:
        """Bits of the tokens that may follow `output`: bit v % 32 of word v // 32 for token v.

        An exception ends the request (`FailEvent`), and so do bits that allow no token.
        """
        ...


@dataclasses.dataclass(frozen=True)
class GenerateRequest:
    """Tokens to continue.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: most tokens an answer may have.
        sampling: how tokens are chosen.
        end_tokens: tokens that end an answer.
        choices: answers to give; they share the prompt's pages and differ in what they draw.
        grammar: restricts the answers; None allows every token.
        logits: report the logits that each token was chosen from. They cross from the device, so they cost time.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams
    end_tokens: frozenset[int]
    choices: int
    grammar: Grammar | None
    logits: bool = False


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
    """Tokens whose log-probabilities are wanted, given those before them.

    Attributes:
        tokens: at least two.
        first: index of the first token to be scored, at least 1.
        top_log_probabilities: how many most likely tokens are reported at each place.
    """

    tokens: tuple[int, ...]
    first: int
    top_log_probabilities: int


@dataclasses.dataclass(frozen=True)
class TokenEvent:
    """One token of one answer.

    Attributes:
        request: the request's number.
        choice: the answer's number among the request's.
        token: the token's id.
        log_probability: by the model itself: before penalties, bias, mask and temperature; nats.
        top: the most likely tokens and their log-probabilities, as many as were asked for.
        finish: why the answer ends with this token, or None.
        logits: float32 [vocab], by the model itself, if the request asked for them.
    """

    request: int
    choice: int
    token: int
    log_probability: float
    top: tuple[tuple[int, float], ...]
    finish: FinishReason | None
    logits: Float32[np.ndarray, " vocab"] | None = dataclasses.field(default=None, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class FailEvent:
    """A request that ended because its grammar failed; other requests go on.

    Attributes:
        request: the request's number.
        error: what the grammar raised, or a RequestError about what it returned.
    """

    request: int
    error: Exception


@dataclasses.dataclass(frozen=True)
class ScoreEvent:
    """A finished score.

    Attributes:
        request: the request's number.
        log_probabilities: float32 [scored], nats.
        argmax: int32 [scored], the most likely token at each place.
        top: per place the most likely tokens and their log-probabilities.
        finite: whether every logit on the way was finite.
    """

    request: int
    log_probabilities: Float32[np.ndarray, " scored"]
    argmax: Int32[np.ndarray, " scored"]
    top: tuple[tuple[tuple[int, float], ...], ...]
    finite: bool
