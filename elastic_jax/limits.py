"""What may be asked of an engine: requests are refused before they are queued, never half-way."""

import dataclasses

from elastic_jax.config import ModelConfig
from elastic_jax.errors import RequestError
from elastic_jax.requests import GenerateRequest, ScoreRequest
from elastic_jax.step import StepConfig

MOST_CHOICES = 4096
"""Answers to one prompt. All of a request's answers are queued at once, each with its text and its end in host memory,
however few rows there are; a list of prompts is as long as its caller has made it."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The largest request that a set of executables can serve.

    Attributes:
        model: its vocabulary bounds the token ids.
        step: sizes of the executables.
        max_context: longest context of a sequence in tokens, prompt and answer together.
    """

    model: ModelConfig
    step: StepConfig
    max_context: int

    def check(self, request: GenerateRequest | ScoreRequest) -> None:
        """Checks a request.

        Raises:
            RequestError: it is empty, too long, asks for more than was compiled, or names tokens that do not exist.
        """
        if isinstance(request, GenerateRequest):
            self._check_generate(request)
        else:
            self._check_score(request)

    def check_prompt(self, tokens: tuple[int, ...]) -> None:
        """Checks tokens that are to be computed and not continued.

        Raises:
            RequestError: there is none, too many, or one that does not exist.
        """
        self._check_prompt(tokens)
        self._check_length(len(tokens), f"{len(tokens)} prompt tokens")

    def _check_prompt(self, tokens: tuple[int, ...]) -> None:
        if not tokens:
            raise RequestError("the prompt is empty: give at least one token")
        self._check_tokens(tokens, "the prompt")

    def _check_generate(self, request: GenerateRequest) -> None:
        self._check_prompt(request.prompt)
        check_count("max_new_tokens", request.max_new_tokens, 1)
        check_count("choices", request.choices, 1)
        if request.choices > MOST_CHOICES:
            raise RequestError(
                f"{request.choices} answers to one prompt were asked for, and at most {MOST_CHOICES} are queued at "
                f"once ({self.step.rows} run together): ask several times"
            )
        prompt, new = len(request.prompt), request.max_new_tokens
        self._check_length(prompt + new, f"{prompt} prompt tokens and {new} new ones")
        bias = request.sampling.logit_bias
        if len(bias) > self.step.max_bias:
            raise RequestError(f"logit_bias has {len(bias)} entries, and at most {self.step.max_bias} were compiled")
        self._check_tokens(tuple(bias), "logit_bias")
        self._check_top(request.sampling.top_log_probabilities)

    def _check_score(self, request: ScoreRequest) -> None:
        self._check_tokens(request.tokens, "the text to score")
        if not 1 <= request.first < len(request.tokens):
            raise RequestError(
                f"scoring starts at token {request.first} of {len(request.tokens)}: it must have a token before it and "
                "one to score"
            )
        self._check_length(len(request.tokens), f"{len(request.tokens)} tokens to score")
        self._check_top(request.top_log_probabilities)

    def _check_tokens(self, tokens: tuple[int, ...], where: str) -> None:
        vocab = self.model.vocab_size
        if wrong := [token for token in tokens if not 0 <= token < vocab]:
            raise RequestError(f"{where} names token {wrong[0]}, outside the vocabulary of {vocab} tokens")

    def _check_length(self, needed: int, what: str) -> None:
        if needed > self.max_context:
            raise RequestError(f"{what} need a context of {needed} tokens, and the longest here is {self.max_context}")

    def _check_top(self, wanted: int) -> None:
        check_count("top_log_probabilities", wanted, 0)
        if wanted > self.step.top_n:
            raise RequestError(f"{wanted} top log-probabilities wanted, and at most {self.step.top_n} were compiled")


def check_count(name: str, value: object, least: int) -> None:
    """Checks that an argument is an integer and large enough.

    Raises:
        RequestError: it is something else; `name` says which argument.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name} must be an integer, found {value!r}")
    if value < least:
        raise RequestError(f"{name} must be at least {least}, found {value}")
