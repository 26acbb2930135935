"""From the arguments of transformers' `generate` to what is run: merged, checked, and refused by name where not there.

Precedence, defaults and their meaning are those of transformers 5: an argument goes before the `generation_config`
argument, that before the model's, and that before `generate`'s own defaults (`max_length` of 20 new tokens, `top_k` of
50). Generation parameters are documented there:
https://huggingface.co/docs/transformers/main_classes/text_generation
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from elastic_jax.errors import RequestError
from elastic_jax.requests import SamplingParams, is_integer

_TINY_MASS = 1e-6
"""Stands for `top_p=0`, which transformers takes for the likeliest token alone."""

_USED = {
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p",
    "min_p", "repetition_penalty", "num_return_sequences", "eos_token_id", "pad_token_id", "bos_token_id",
    "stop_strings", "return_dict_in_generate", "output_scores", "output_logits",
}  # fmt: skip

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "diversity_penalty": (0,),
    "guidance_scale": (1,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "logits_processor": ([],),
    "stopping_criteria": ([],),
}
"""What is not there, and the values that ask for nothing; None and False always do."""

_WITHOUT_EFFECT = {
    "use_cache", "early_stopping", "length_penalty", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size",
    "disable_compile", "compile_config", "transformers_version", "tokenizer",
}  # fmt: skip
"""What changes no result by itself: parts of what is refused by its own name, and how other implementations run."""


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """What one call of `generate` asks for, resolved for its batch.

    Attributes:
        max_new_tokens: most tokens of each answer.
        min_new_tokens: tokens before which no end may come; 0 for none.
        sampling: how tokens are chosen, without a seed.
        choices: answers to each prompt.
        end_tokens: what ends an answer, in the order given.
        pad_token: fills rows that have ended; None where nothing ends one.
        stop_strings: texts that end an answer.
        as_dict: whether a `GenerateOutput` is returned.
        scores: whether it holds processed scores.
        logits: whether it holds raw logits.
    """

    max_new_tokens: int
    min_new_tokens: int
    sampling: SamplingParams
    choices: int
    end_tokens: tuple[int, ...]
    pad_token: int | None
    stop_strings: tuple[str, ...]
    as_dict: bool
    scores: bool
    logits: bool


def merge(arguments: Mapping[str, Any], given: Any, own: Any) -> dict[str, Any]:
    """The parameters that somebody has set: arguments, then a `GenerationConfig` for the call, then the model's.

    Raises:
        RequestError: an argument is unknown, or asks for something that is not there.
    """
    merged: dict[str, Any] = {}
    for config in (own, given):
        if config is not None:
            values = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
            _refuse(values, "generation_config")
            merged |= {name: value for name, value in values.items() if value is not None}
    _refuse(arguments, "generate")
    return merged | dict(arguments)


def _refuse(values: Mapping[str, Any], where: str) -> None:
    known = _USED | _WITHOUT_EFFECT
    for name, value in values.items():
        if name in known or value is None or value is False:
            continue
        if any(isinstance(value, type(neutral)) and value == neutral for neutral in _NEUTRAL.get(name, ())):
            continue
        if name in _NEUTRAL and is_number(value) and value in _NEUTRAL[name]:
            continue
        raise RequestError(f"{where}: {name}={value!r:.80} is not supported here: leave it out")


def is_number(value: object) -> bool:
    """Whether a value is a number of Python's or NumPy's."""
    return is_integer(value) or isinstance(value, float | np.floating)


def resolve(merged: Mapping[str, Any], *, width: int, positions: int, seed: int | None) -> GenerationSettings:
    """What the parameters mean for prompts of `width` tokens, padding included.

    Args:
        merged: of `merge`.
        width: tokens of the padded prompts; `max_length` and `min_length` count them.
        positions: the model's longest context, which the default length stays within.
        seed: of what is drawn.

    Raises:
        RequestError: a value is outside its range, or values contradict each other.
    """
    most = _count(merged, "max_new_tokens", 1)
    longest = _count(merged, "max_length", 1)
    if most is None and longest is None:
        longest = min(20 + width, positions)
        warnings.warn(
            "neither max_new_tokens nor max_length is set: answers end after 20 tokens, as transformers' do by default",
            stacklevel=4,
        )
    if most is None:
        most = (longest or 0) - width
        if most < 1:
            raise RequestError(
                f"the prompts have {width} tokens, padding included, and max_length is {longest}: nothing is left to "
                "generate; raise max_length, or set max_new_tokens instead"
            )
    least = _count(merged, "min_new_tokens", 0)
    if least is None:
        least = max(0, (_count(merged, "min_length", 0) or 0) - width)
    ends = end_tokens(merged)
    pad = merged.get("pad_token_id")
    if pad is not None and not is_integer(pad):
        raise RequestError(f"pad_token_id must be a token id, found {pad!r}")
    choices = _count(merged, "num_return_sequences", 1) or 1
    sample = bool(merged.get("do_sample"))
    if choices > 1 and not sample:
        raise RequestError(
            f"num_return_sequences={choices} without do_sample=True would give {choices} times the same answer"
        )
    return GenerationSettings(
        max_new_tokens=most,
        min_new_tokens=least if ends else 0,
        sampling=_sampling(merged, sample=sample, seed=seed),
        choices=choices,
        end_tokens=ends,
        pad_token=int(pad) if pad is not None else (ends[0] if ends else None),
        stop_strings=_stop_strings(merged.get("stop_strings")),
        as_dict=bool(merged.get("return_dict_in_generate")),
        scores=bool(merged.get("output_scores")),
        logits=bool(merged.get("output_logits")),
    )


def end_tokens(merged: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end an answer: one, a list, or none.

    Raises:
        RequestError: one is no token id.
    """
    ends = merged.get("eos_token_id")
    listed = [] if ends is None else [ends] if is_integer(ends) else list(ends)
    if wrong := [end for end in listed if not is_integer(end)]:
        raise RequestError(f"eos_token_id must be a token id or a list of them, found {wrong[0]!r}")
    return tuple(int(end) for end in listed)


def _count(merged: Mapping[str, Any], name: str, least: int) -> int | None:
    value = merged.get(name)
    if value is None:
        return None
    if not is_integer(value) or value < least:
        raise RequestError(f"{name} must be an integer of at least {least}, found {value!r}")
    return int(value)


def _sampling(merged: Mapping[str, Any], *, sample: bool, seed: int | None) -> SamplingParams:
    penalty = _number(merged, "repetition_penalty", 1.0)
    if not sample:
        return SamplingParams(repetition_penalty=penalty, seed=seed)
    temperature, top_p = _number(merged, "temperature", 1.0), _number(merged, "top_p", 1.0)
    if temperature <= 0:
        raise RequestError(
            f"temperature must be above 0 where do_sample=True, found {temperature}; do_sample=False takes the "
            "likeliest token"
        )
    top_k = merged.get("top_k", 50)
    return SamplingParams(
        temperature=temperature,
        top_k=0 if top_k is None else top_k,
        top_p=_TINY_MASS if top_p == 0 else top_p,
        min_p=_number(merged, "min_p", 0.0),
        repetition_penalty=penalty,
        seed=seed,
    )


def _number(merged: Mapping[str, Any], name: str, default: float) -> float:
    value = merged.get(name)
    if value is None:
        return default
    if not is_number(value):
        raise RequestError(f"{name} must be a number, found {value!r}")
    return float(value)


def _stop_strings(stops: str | Sequence[str] | None) -> tuple[str, ...]:
    listed = (stops,) if isinstance(stops, str) else tuple(stops or ())
    if wrong := [stop for stop in listed if not isinstance(stop, str) or not stop]:
        raise RequestError(f"stop_strings must be texts of at least one character, found {wrong[0]!r}")
    return listed
