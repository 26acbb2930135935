"""`ElasticMistral`: one mode of an Elastic checkpoint on one device, ready to generate and to score."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import jax
import numpy as np

from aot_cache.target import Device, Target
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.engine import Engine
from elastic_jax.errors import ConfigError, ExecutableError, MismatchError, RequestError
from elastic_jax.executables import ModeStore, default_step_config
from elastic_jax.generation import AnswerText, Piece
from elastic_jax.memory import MemoryPlan, available_memory, check_memory, plan_memory
from elastic_jax.plan import Plan
from elastic_jax.requests import GenerateRequest, Grammar, SamplingParams, ScoreEvent, ScoreRequest, TokenEvent
from elastic_jax.runner import Runner
from elastic_jax.step import ComputeDtype, StepConfig
from elastic_jax.tokenizer import Tokenizer
from elastic_jax.weights import abstract_weights, load_weights

type Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text, token ids, or the messages of a chat."""

type OnMissing = Literal["error", "compile"]
type Say = Callable[[str], None]

DEFAULT_NEW_TOKENS = 256
"""Most tokens of an answer unless told otherwise; fewer where the context ends before."""


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a continuation is after a context.

    Attributes:
        log_probability: of the whole continuation, nats.
        token_log_probabilities: of each of its tokens, nats.
        is_greedy: whether each of its tokens is the most likely one.
        token_ids: the continuation's tokens.
    """

    log_probability: float
    token_log_probabilities: tuple[float, ...]
    is_greedy: bool
    token_ids: tuple[int, ...]


class ElasticMistral:
    """One mode of a checkpoint, loaded. Make it with `load`.

    Attributes:
        checkpoint: where it came from.
        plan: how each group is computed.
        tokenizer: the model's.
        engine: what runs requests; `generate` and `score` use it, and so may you.
        memory: what it takes on the device.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, tokenizer: Tokenizer, engine: Engine, memory: MemoryPlan
    ) -> None:
        self.checkpoint = checkpoint
        self.plan = plan
        self.tokenizer = tokenizer
        self.engine = engine
        self.memory = memory

    @classmethod
    def load(
        cls,
        path: str | Path,
        mode: str = "M",
        *,
        on_missing: OnMissing = "error",
        dtype: ComputeDtype | None = None,
        max_context: int | None = None,
        device: Device | None = None,
        trust: bool = False,
        workers: int | None = None,
        say: Say | None = None,
    ) -> Self:
        """Loads a mode: its arrays, and its executables for this device. Nothing is traced or compiled.

        Args:
            path: an Elastic checkpoint.
            mode: one of its modes.
            on_missing: what to do without fitting executables: raise, or compile and store them, and say so.
            dtype: compute type, bfloat16 by default; float32 is for checks.
            max_context: longest context of a sequence in tokens; by default what the executables were compiled for.
            device: the device; JAX's first by default.
            trust: load executables that somebody else may have written. They are native code.
            workers: threads for reading and loading; by default one per processor core, 16 at most.
            say: is told what is being compiled; prints to standard error by default.

        Raises:
            CheckpointError: there is no complete checkpoint, or it lacks what the mode reads.
            PlanError: there is no such mode.
            ExecutableError: executables are missing, damaged, made for something else (`MismatchError`), or not to be
                trusted (`TrustError`).
            MemoryPlanError: the mode does not fit on the device.
        """
        if on_missing not in ("error", "compile"):
            raise ConfigError(f'on_missing must be "error" or "compile", found {on_missing!r}')
        if dtype not in (None, "bfloat16", "float32"):
            raise ConfigError(f'dtype must be "bfloat16" or "float32", found {dtype!r}')
        checkpoint = Checkpoint.open(path)
        plan = checkpoint.plan(mode)
        device = device if device is not None else jax.devices()[0]
        threads = workers if workers is not None else min(os.cpu_count() or 1, 16)
        store = ModeStore(checkpoint, plan, dtype or "bfloat16", device)
        step = cls._step_config(store, on_missing, max_context, threads, say or _say)
        _check_context(max_context, step)

        weights = abstract_weights(checkpoint.config, plan, store.dtype)
        memory = plan_memory(checkpoint.config, weights, step, store.memory().values())
        others = {p.name: sum(_weight_bytes(checkpoint, p, store.dtype)) for p in checkpoint.plans().values()}
        check_memory(memory, available_memory(device), mode=mode, alternatives=others)

        units = store.load(step, trust=trust, workers=threads)
        loaded = load_weights(checkpoint, plan, store.dtype, device, workers=threads, progress=None)
        runner = Runner(checkpoint.config, step, units, loaded, device)
        engine = Engine(runner, max_context or step.max_context)
        return cls(checkpoint, plan, Tokenizer.load(checkpoint.tokenizer_path), engine, memory)

    @staticmethod
    def _step_config(
        store: ModeStore, on_missing: OnMissing, max_context: int | None, workers: int, say: Say
    ) -> StepConfig:
        """The sizes of the stored executables; where the caller allows it, compiles what is missing or does not fit."""
        if on_missing == "error":
            return store.stored_step()
        problem = _problem(store)
        if problem is None:
            return store.stored_step()
        step = default_step_config(
            store.checkpoint.config, store.device.platform, store.dtype, kv_slots=None, max_context=max_context
        )
        say(f"compiling mode {store.plan.name} for {Target.of(store.device).folder}, because {problem}")

        def progress(name: str, seconds: float | None, done: int, total: int) -> None:
            if seconds is not None:
                say(f"compiled {name} in {seconds:.1f} s ({done} of {total})")

        store.compile(step, workers=workers, progress=progress)
        return step

    # -- generating ----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        top_log_probabilities: int = 0,
        stop: str | Sequence[str] = (),
        choices: int = 1,
        ignore_end: bool = False,
        grammar: Grammar | None = None,
        stream: bool = False,
    ) -> Any:
        """Continues prompts. Many prompts run together, whatever their lengths.

        Args:
            prompts: a text, token ids, or chat messages; or a list of such prompts.
            max_new_tokens: most tokens an answer may have; by default 256, or fewer where the context ends.
            temperature: 0 takes the most likely token.
            top_k: samples among the k most likely tokens; 0 among all.
            top_p: samples among the most likely tokens that together have this probability.
            min_p: samples among tokens at least this probable relative to the most likely one.
            repetition_penalty: above 1 makes tokens seen in prompt or answer less likely.
            presence_penalty: subtracted from the logits of tokens in the answer.
            frequency_penalty: subtracted once per occurrence in the answer.
            logit_bias: added to the logits of some token ids.
            seed: equal seeds give equal answers. With several prompts, prompt i draws from seed + i.
            top_log_probabilities: report this many most likely tokens with each token.
            stop: strings that end an answer; they are not part of its text.
            choices: answers to each prompt.
            ignore_end: go on after the model's end token.
            grammar: restricts the answers.
            stream: give pieces as they come, instead of finished answers.

        Returns:
            a `Generation` for one prompt, a list for a list of prompts; with `choices` above 1 a list of each prompt's
            answers in its place. With `stream`, an iterator of `Piece`s.

        Raises:
            RequestError: a prompt is empty or too long, or an argument is out of range. Nothing has run then.
        """
        many, listed = _list_prompts(prompts)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        requests = []
        for index, prompt in enumerate(listed):
            tokens = self._tokenize(prompt)
            sampling = SamplingParams(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                presence_penalty=presence_penalty,
                frequency_penalty=frequency_penalty,
                logit_bias=dict(logit_bias or {}),
                seed=None if seed is None else (seed + index) % 2**64,
                top_log_probabilities=top_log_probabilities,
            )
            most = max_new_tokens
            if most is None:
                most = max(1, min(DEFAULT_NEW_TOKENS, self.engine.max_context - len(tokens)))
            end = frozenset[int]() if ignore_end else frozenset(self._end_tokens())
            requests.append(GenerateRequest(tokens, most, sampling, end, choices, grammar))
        for request in requests:
            self.engine.check(request)
        pieces = self._run(requests, stops)
        if stream:
            return pieces
        answers = {(p.prompt, p.choice): p.generation for p in pieces if p.generation is not None}
        results = [[answers[i, c] for c in range(choices)] for i in range(len(requests))]
        flat = [group if choices > 1 else group[0] for group in results]
        return flat if many else flat[0]

    def _run(self, requests: Sequence[GenerateRequest], stops: Sequence[str]) -> Iterator[Piece]:
        texts: dict[tuple[int, int], AnswerText] = {}
        numbers = []
        try:
            for index, request in enumerate(requests):
                number = self.engine.submit(request)
                numbers.append(number)
                for choice in range(request.choices):
                    texts[number, choice] = AnswerText(
                        self.tokenizer.detokenizer(skip_special_tokens=True),
                        stops,
                        prompt=index,
                        choice=choice,
                        prompt_tokens=len(request.prompt),
                    )
            while texts:
                for event in self.engine.step():
                    answer = texts.get((event.request, event.choice)) if isinstance(event, TokenEvent) else None
                    if answer is None or not isinstance(event, TokenEvent):
                        continue
                    piece, verdict = answer.feed(event)
                    if verdict != "going":
                        del texts[event.request, event.choice]
                    if verdict == "stopped":
                        self.engine.cancel(event.request, event.choice)
                    yield piece
        finally:
            # A consumer that stops listening must not leave its answers running.
            for number in numbers:
                self.engine.cancel(number)

    def _tokenize(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt, add_special_tokens=True))
        if isinstance(prompt, np.ndarray) or not len(prompt) or _is_integer(prompt[0]):
            return tuple(_token(token) for token in prompt)
        messages: Any = prompt
        return tuple(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True))

    def _end_tokens(self) -> set[int]:
        return {*self.checkpoint.config.eos_token_ids, *self.tokenizer.eos_token_ids}

    # -- scoring -------------------------------------------------------------------------------------------------------

    def score(self, pairs: Sequence[tuple[str | Sequence[int], str | Sequence[int]]]) -> list[Score]:
        """Log-probabilities of continuations after contexts.

        Texts are encoded as a whole and cut at the context's own length, with BOS as the tokenizer does
        (`Tokenizer.encode_pair`); token ids are taken as they are.

        Args:
            pairs: (context, continuation), both texts or both token ids.

        Raises:
            RequestError: a pair is empty, too long, or mixes text and token ids. Nothing has run then.
        """
        requests = [self._score_request(*pair) for pair in pairs]
        for request in requests:
            self.engine.check(request)
        numbers = [self.engine.submit(request) for request in requests]
        events: dict[int, ScoreEvent] = {}
        try:
            while len(events) < len(numbers):
                for event in self.engine.step():
                    if isinstance(event, ScoreEvent) and event.request in numbers:
                        events[event.request] = event
        finally:
            for number in numbers:
                self.engine.cancel(number)
        return [_score(request, events[number]) for request, number in zip(requests, numbers, strict=True)]

    def _score_request(self, context: str | Sequence[int], continuation: str | Sequence[int]) -> ScoreRequest:
        if isinstance(context, str) and isinstance(continuation, str):
            before, after = self.tokenizer.encode_pair(context, continuation)
        elif not isinstance(context, str) and not isinstance(continuation, str):
            before, after = [_token(t) for t in context], [_token(t) for t in continuation]
        else:
            raise RequestError("a pair to score must be two texts or two lists of token ids, not one of each")
        if not before or not after:
            raise RequestError("a pair to score needs at least one token of context and one of continuation")
        return ScoreRequest((*before, *after), len(before), 0)

    # -- telling -------------------------------------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """What is loaded: mode, plan, bytes, what each group runs, executables, KV capacity; JSON-ready."""
        step = self.engine.config
        store = ModeStore(self.checkpoint, self.plan, step.dtype, self.engine.runner.device)
        return {
            "path": str(self.checkpoint.path),
            "mode": self.plan.name,
            "provisional": self.plan.provisional,
            "note": self.plan.note,
            "choices": self.plan.counts(),
            "groups": dict(self.plan.choices),
            "dtype": step.dtype,
            "device": self.engine.runner.device.device_kind,
            "target": Target.of(self.engine.runner.device).folder,
            "bytes": dataclasses.asdict(self.memory) | {"total": self.memory.total},
            "executables": {"folder": str(store.folder), "units": sorted(store.memory())},
            "attention": step.attention,
            "kv_capacity_tokens": step.kv_slots,
            "rows": step.rows,
            "max_context": self.engine.max_context,
        }


def _say(message: str) -> None:
    import sys

    print(message, file=sys.stderr, flush=True)


def _problem(store: ModeStore) -> str | None:
    """Why stored executables cannot be used, found without loading them; None if they can."""
    if not store.exists:
        return "there are no executables for it"
    try:
        step = store.stored_step()
        store.check(step)
    except MismatchError as error:
        return f"those stored do not fit: {error}"
    except ExecutableError as error:
        return str(error)
    return None


def _check_context(max_context: int | None, step: StepConfig) -> None:
    if max_context is not None and not 1 <= max_context <= step.max_context:
        raise RequestError(
            f"max_context {max_context} was asked for, and the executables were compiled for 1 to {step.max_context} "
            "tokens: compile with --max-context for more"
        )


def _weight_bytes(checkpoint: Checkpoint, plan: Plan, dtype: ComputeDtype) -> Iterator[int]:
    for leaf in jax.tree.leaves(abstract_weights(checkpoint.config, plan, dtype)):
        yield leaf.size * leaf.dtype.itemsize


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _token(value: Any) -> int:
    if not _is_integer(value):
        raise RequestError(f"a token id must be an integer, found {value!r}")
    return int(value)


def _list_prompts(prompts: Any) -> tuple[bool, list[Any]]:
    """Whether many prompts were given, and all of them."""
    if isinstance(prompts, str):
        return False, [prompts]
    if isinstance(prompts, np.ndarray):
        return (True, list(prompts)) if prompts.ndim == 2 else (False, [prompts])
    if not isinstance(prompts, Sequence):
        raise RequestError(f"a prompt must be text, token ids or chat messages, found {type(prompts).__name__}")
    if not prompts:
        raise RequestError("no prompt was given: the list is empty")
    if _is_integer(prompts[0]) or isinstance(prompts[0], Mapping):
        return False, [prompts]
    for prompt in prompts:
        if not isinstance(prompt, str | np.ndarray | Sequence):
            raise RequestError(f"a prompt must be text, token ids or chat messages, found {type(prompt).__name__}")
    return True, list(prompts)


def _score(request: ScoreRequest, event: ScoreEvent) -> Score:
    if not event.finite:
        raise RequestError("the model's logits are not finite for this text: check the checkpoint with `verify`")
    wanted = np.asarray(request.tokens[request.first :])
    return Score(
        log_probability=float(event.log_probabilities.astype(np.float64).sum()),
        token_log_probabilities=tuple(float(value) for value in event.log_probabilities),
        is_greedy=bool((event.argmax == wanted).all()),
        token_ids=request.tokens[request.first :],
    )
