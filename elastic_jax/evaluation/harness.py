"""The engine as a model of lm-eval: `elastic-jax` in its registry.

Log-likelihoods come from `score`, texts from `generate`. Where all continuations of a context are one token, as in
MMLU, the context is read once, and its last logits give all of them: a quarter of the work, and the same arithmetic.

Texts are encoded and cut as lm-eval does (`TemplateLM._encode_pair`), so that other models get the same tokens.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs

from elastic_jax.elastic import ElasticMistral
from elastic_jax.errors import EvaluationError, RequestError
from elastic_jax.requests import FailEvent, GenerateRequest, SamplingParams, ScoreEvent, ScoreRequest, TokenEvent
from elastic_jax.scoring import score_of

DEFAULT_NEW_TOKENS = 256
"""Most tokens of a text where the task does not say, as lm-eval's model of transformers."""

_WINDOW = 2048
"""Requests in the engine at a time: it looks through all of them in every step."""

_log = logging.getLogger(__name__)


class ElasticLM(TemplateLM):
    """A loaded mode as lm-eval asks it.

    Args:
        checkpoint: an Elastic checkpoint, or its Hub id; or a model that is loaded.
        mode: one of its modes, if it is not loaded yet.
        batch_size: ignored: the engine packs requests by itself.
        max_batch_size: ignored.
        device: ignored: JAX's first.
        load: arguments of `ElasticMistral.load`.
    """

    def __init__(
        self,
        checkpoint: str | ElasticMistral,
        mode: str = "M",
        # lm-eval passes these to every model.
        batch_size: Any = None,  # noqa: ARG002
        max_batch_size: Any = None,  # noqa: ARG002
        device: Any = None,  # noqa: ARG002
        **load: Any,
    ) -> None:
        super().__init__()
        loaded = isinstance(checkpoint, ElasticMistral)
        self.model = checkpoint if loaded else ElasticMistral.load(checkpoint, mode, **load)
        self.tokenizer = self.model.tokenizer  # what the base class keeps there is used by methods replaced here

    @property
    def max_length(self) -> int:
        """Most tokens of a context and its continuation."""
        return self.model.engine.limits.max_context

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        ids = self.model.tokenizer.eos_token_ids or self.model.checkpoint.config.eos_token_ids
        return ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        first = self.model.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        """Names the chat template's tokenizer in lm-eval's caches."""
        return self.model.checkpoint.path.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, with those that the tokenizer puts before one unless it begins with BOS already."""
        tokenizer = self.model.tokenizer
        if add_special_tokens is None:
            begin = tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not has_bos_prefix(string, begin)
        return tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation."""
        messages: Any = chat_history
        return self.model.tokenizer.render_chat(messages, add_generation_prompt)

    # -- log-likelihoods -----------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As the base class, without its progress bar."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether it is the most likely text) of each (anything, context, continuation)."""
        asked = [self._fitting(context, continuation) for _, context, continuation in requests]
        by_context: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
        for context, continuation in asked:
            by_context.setdefault(context, set()).add(continuation)
        found: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[float, bool]] = {}
        at_once: list[tuple[int, ...]] = []
        scored: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        for context, continuations in by_context.items():
            if len(continuations) > 1 and all(len(continuation) == 1 for continuation in continuations):
                at_once.append(context)
            else:
                scored += [(context, continuation) for continuation in sorted(continuations)]
        for start in range(0, len(at_once), _WINDOW):
            self._read_contexts(at_once[start : start + _WINDOW], by_context, found)
        for start in range(0, len(scored), _WINDOW):
            self._score(scored[start : start + _WINDOW], found)
        return [found[pair] for pair in asked]

    def _fitting(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A pair that fits into the model's context: cut on the left, as lm-eval does."""
        most = self.max_length
        if len(continuation) >= most:
            raise EvaluationError(
                f"a continuation of {len(continuation)} tokens does not fit into a context of {most}: compile the mode "
                "for a longer one (`compile --max-context`)"
            )
        if len(context) + len(continuation) > most:
            _log.warning("a context of %d tokens is cut to %d", len(context), most - len(continuation))
            context = context[len(context) + len(continuation) - most :]
        return tuple(context), tuple(continuation)

    def _read_contexts(
        self,
        contexts: Sequence[tuple[int, ...]],
        by_context: dict[tuple[int, ...], set[tuple[int, ...]]],
        found: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[float, bool]],
    ) -> None:
        greedy = SamplingParams()
        requests = [GenerateRequest(tokens, 1, greedy, frozenset(), 1, None, logits=True) for tokens in contexts]
        inbox = self.model.delivery.submit(requests)
        context_of = dict(zip(inbox.numbers, contexts, strict=True))
        try:
            while context_of:
                for event in self.model.delivery.wait(inbox):
                    if isinstance(event, FailEvent):
                        raise event.error
                    if not isinstance(event, TokenEvent) or event.logits is None:
                        continue
                    if event.finish == "not_finite":
                        raise RequestError("the model's logits are not finite for a context: check it with `verify`")
                    context = context_of.pop(event.request)
                    logits = event.logits.astype(np.float64)
                    total = logits.max() + np.log(np.exp(logits - logits.max()).sum())
                    for (token,) in by_context[context]:
                        found[context, (token,)] = float(logits[token] - total), token == event.token
        finally:
            self.model.delivery.close(inbox)

    def _score(
        self,
        pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        found: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[float, bool]],
    ) -> None:
        requests = [ScoreRequest((*context, *continuation), len(context), 0) for context, continuation in pairs]
        inbox = self.model.delivery.submit(requests)
        open_ = dict(zip(inbox.numbers, zip(pairs, requests, strict=True), strict=True))
        try:
            while open_:
                for event in self.model.delivery.wait(inbox):
                    if isinstance(event, ScoreEvent):
                        pair, request = open_.pop(event.request)
                        score = score_of(request, event)
                        found[pair] = score.log_probability, score.is_greedy
        finally:
            self.model.delivery.close(inbox)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:  # noqa: ARG002  (the base class has it)
        """Log-probability of whole texts: every token once, after as much of the text as a context holds."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            pieces = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,  # lm-eval's windows hold one token more than their context
                context_len=1,
            )
            for piece in map(utils.make_disjoint_window, pieces):
                windows.append(("", *piece))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    # -- texts ---------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:  # noqa: ARG002  (the base class has it)
        """Texts that continue contexts, up to a stop string of the task or the model's end."""
        answers: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for numbers in groups.values():
            settings = normalize_gen_kwargs(requests[numbers[0]].args[1], DEFAULT_NEW_TOKENS)
            most = settings.pop("max_gen_toks")
            end = self.model.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
            stop = [string for string in handle_stop_sequences(settings.pop("until", None), eos=end) if string]
            sampled = settings.pop("do_sample", False)
            temperature = settings.pop("temperature", 0.0)
            if unknown := sorted(settings):
                raise EvaluationError(f"the task generates with settings that are not known here: {', '.join(unknown)}")
            room = self.max_length - most
            if room < 1:
                raise EvaluationError(f"{most} new tokens leave no room in a context of {self.max_length}")
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            found = self.model.generate(
                prompts,
                max_new_tokens=most,
                temperature=(temperature or 1.0) if sampled else 0.0,
                seed=0 if sampled else None,
                stop=stop,
            )
            for number, generation in zip(numbers, found, strict=True):
                answers[number] = generation.text
        return answers


register_model("elastic-jax")(ElasticLM)  # as a decorator it would hide the class's type
