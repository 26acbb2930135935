"""One line of OpenAI's batch format: what it asks, checked before anything runs, and the body of the answer.

Chat and text completions are known. A field that is not known, or that asks for what is not there, is refused by name:
an answer that silently ignored it would look like one that did not.
"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from elastic_jax.errors import RequestError
from elastic_jax.generation import Generation
from elastic_jax.requests import is_integer

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"

_IGNORED = {"model", "user", "metadata", "store", "service_tier"}
"""Fields that change no answer."""

_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_INTEGERS = ("top_k", "seed")
"""Fields that `generate` calls the same; some are extensions that other servers have too."""

_NEW_TOKENS = ("max_tokens", "max_completion_tokens")

_MOST_CHOICES = 128  # the API's bound of n

type Kind = Literal["chat", "text"]


@dataclasses.dataclass(frozen=True)
class BatchRequest:
    """A line that can be answered.

    Attributes:
        custom_id: the caller's name for it.
        kind: which kind of completion.
        prompt: chat messages, a text, or token ids.
        arguments: of `ElasticMistral.generate`.
        model: what the line calls the model; given back.
    """

    custom_id: str
    kind: Kind
    prompt: Any
    arguments: Mapping[str, Any]
    model: str | None


def custom_id_of(line: bytes) -> str | None:
    """What a line calls itself; None if it does not say."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    found = value.get("custom_id") if isinstance(value, dict) else None
    return found if isinstance(found, str) else None


def parse_request(line: bytes) -> BatchRequest:
    """Reads a line.

    Raises:
        RequestError: it is not JSON, not of the format, or asks for what is not there.
    """
    try:
        values = json.loads(line)
        line.decode()
        json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair can be written in JSON
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the line is not JSON in UTF-8: {error}") from None
    if not isinstance(values, dict):
        raise RequestError(f"the line should be an object, found {type(values).__name__}")
    if unknown := sorted(values.keys() - {"custom_id", "method", "url", "body"}):
        raise RequestError(f"the line has unknown fields {unknown}; a line has custom_id, method, url and body")
    name, url, body = values.get("custom_id"), values.get("url"), values.get("body")
    if not isinstance(name, str) or not name:
        raise RequestError(f"custom_id should be a text, found {name!r}")
    if values.get("method") != "POST":
        raise RequestError(f'method should be "POST", found {values.get("method")!r}')
    if url not in (CHAT, TEXT):
        raise RequestError(f"url should be {CHAT} or {TEXT}, found {url!r}")
    if not isinstance(body, dict):
        raise RequestError(f"body should be an object, found {type(body).__name__}")
    kind: Kind = "chat" if url == CHAT else "text"
    source = "messages" if kind == "chat" else "prompt"
    if not _is_prompt(kind, body.get(source)):
        expected = "a list of messages" if kind == "chat" else "a text or a list of token ids"
        raise RequestError(f"body.{source} should be {expected}, found {body.get(source)!r:.80}")
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise RequestError(f"body.model should be a text, found {model!r:.80}")
    return BatchRequest(name, kind, body[source], _arguments(body, source), model)


def _is_prompt(kind: Kind, value: Any) -> bool:
    if kind == "chat":
        return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)
    return isinstance(value, str) or (isinstance(value, list) and all(map(is_integer, value)))


def _arguments(body: Mapping[str, Any], source: str) -> dict[str, Any]:
    known = {source, "n", "stop", "stream", "logit_bias", *_NEW_TOKENS, *_NUMBERS, *_INTEGERS, *_IGNORED}
    if unknown := sorted(body.keys() - known):
        raise RequestError(f"body has fields that are not implemented: {unknown}; known are {sorted(known)}")
    if body.get("stream"):
        raise RequestError("body.stream: a batch streams nothing; leave it out")
    given = {name: value for name, value in body.items() if value is not None}
    lengths = [given[name] for name in _NEW_TOKENS if name in given]
    if len(lengths) > 1:
        raise RequestError(f"body has both {_NEW_TOKENS[0]} and {_NEW_TOKENS[1]}: give one")
    # The API samples unless told otherwise.
    arguments: dict[str, Any] = {"temperature": 1.0}
    arguments |= {name: _number(given[name], f"body.{name}") for name in _NUMBERS if name in given}
    for name in _INTEGERS:
        if name in given:
            if not is_integer(given[name]):
                raise RequestError(f"body.{name} should be an integer, found {given[name]!r:.80}")
            arguments[name] = given[name]
    if lengths:
        arguments["max_new_tokens"] = lengths[0]
    if "n" in given:
        arguments["choices"] = given["n"]
    if "stop" in given:
        arguments["stop"] = given["stop"]
    if "logit_bias" in given:
        arguments["logit_bias"] = _bias(given["logit_bias"])
    for name in ("choices", "max_new_tokens"):
        value = arguments.get(name, 1)
        if not is_integer(value) or value < 1:
            raise RequestError(f"{name} should be a positive integer, found {value!r}")
    if arguments.get("choices", 1) > _MOST_CHOICES:
        raise RequestError(f"body.n is at most {_MOST_CHOICES}, found {arguments['choices']}")
    stop = arguments.get("stop", [])
    if not isinstance(stop, str) and not (isinstance(stop, list) and all(isinstance(one, str) for one in stop)):
        raise RequestError(f"body.stop should be a text or a list of texts, found {stop!r:.80}")
    return arguments


def _number(value: Any, where: str) -> float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    except OverflowError:
        pass
    raise RequestError(f"{where} should be a number, found {value!r:.80}")


def _bias(value: Any) -> dict[int, float]:
    try:
        # JSON has no integers as keys.
        return {int(token): _number(bias, "a value of body.logit_bias") for token, bias in value.items()}
    except (AttributeError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(
            f"body.logit_bias should be an object from token ids to numbers, found {value!r:.80}"
        ) from None


def completion(request: BatchRequest, answers: Sequence[Generation], model: str) -> dict[str, Any]:
    """The body of an answer, as the API gives it."""
    prompt, new = answers[0].prompt_tokens, sum(len(answer.token_ids) for answer in answers)
    chat = request.kind == "chat"
    return {
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": request.model or model,
        "choices": [
            {
                "index": index,
                **({"message": {"role": "assistant", "content": str(answer)}} if chat else {"text": str(answer)}),
                "finish_reason": answer.finish_reason,
                "logprobs": None,
            }
            for index, answer in enumerate(answers)
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new},
    }
