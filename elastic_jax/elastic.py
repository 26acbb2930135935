"""`ElasticMistral`: one mode of an Elastic checkpoint on one device, ready to generate and to score."""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from aot_cache.target import Device, Target
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.delivery import Delivery
from elastic_jax.device import default_device
from elastic_jax.device_memory import explained
from elastic_jax.engine import Engine
from elastic_jax.errors import ConfigError, RequestError
from elastic_jax.executables import ModeStore
from elastic_jax.generation import AnswerText, Piece
from elastic_jax.hub_id import is_remote, refuse_revision
from elastic_jax.kv_cache import KvPrecision
from elastic_jax.loading import OnMissing, usable_pool
from elastic_jax.memory import MemoryPlan
from elastic_jax.parts import load_parts
from elastic_jax.phases import Phases
from elastic_jax.plan import Plan
from elastic_jax.pools import Say
from elastic_jax.prompts import Prompt, list_prompts, pair_tokens, prompt_tokens
from elastic_jax.requests import (
    FailEvent,
    GenerateRequest,
    Grammar,
    SamplingParams,
    ScoreEvent,
    ScoreRequest,
    TokenEvent,
)
from elastic_jax.runner import Runner
from elastic_jax.scoring import Score, score_of
from elastic_jax.step import ComputeDtype
from elastic_jax.tokenizer import Tokenizer
from elastic_jax.workers import default_workers

DEFAULT_NEW_TOKENS = 256
"""Most tokens of an answer unless told otherwise; fewer where the context ends before."""


class ElasticMistral:
    """One mode of a checkpoint, loaded. Make it with `load`.

    Attributes:
        checkpoint: where it came from.
        plan: how each group is computed.
        tokenizer: the model's.
        engine: what runs requests. `generate` and `score` step it; whoever steps it too takes events away from them.
        memory: what it takes on the device.
        loading: when each phase of loading began and ended, and the rate at which weights were read.

    `generate` and `score` may be called from several threads, and in the middle of a stream: all share the engine's
    steps.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        tokenizer: Tokenizer,
        engine: Engine,
        memory: MemoryPlan,
        loading: Phases,
    ) -> None:
        self.checkpoint = checkpoint
        self.plan = plan
        self.tokenizer = tokenizer
        self.engine = engine
        self.memory = memory
        self.loading = loading
        self._delivery = Delivery(engine)

    @classmethod
    def load(
        cls,
        path: str | Path,
        mode: str | float = "M",
        *,
        on_missing: OnMissing = "error",
        dtype: ComputeDtype | None = None,
        kv: KvPrecision = "full",
        kv_slots: int | None = None,
        max_context: int | None = None,
        device: Device | None = None,
        trust: bool = False,
        revision: str | None = None,
        token: str | None = None,
        preload: bool = True,
        workers: int | None = None,
        say: Say | None = None,
    ) -> Self:
        """Loads a mode: its arrays, and its executables for this device. Nothing is traced or compiled.

        Args:
            path: an Elastic checkpoint; or, where there is no such folder, a Hub id `owner/name`, of which only what
                the mode needs is downloaded.
            mode: one of its modes; or, after a search, a place on its frontier, 0.0 (the fastest) to 1.0 (the
                original), or a request such as `"max-loss=1%"` (`Frontier.resolve`).
            on_missing: what to do without fitting executables: raise, or compile and store them, and say so.
            dtype: compute type, bfloat16 by default; float32 is for checks.
            kv: precision of the KV cache, as it was compiled: `full`, the compute type, or `int8`, which takes half the
                memory for somewhat less accuracy.
            kv_slots: tokens of the KV pool, which all sequences share: one of the pools that are compiled. By default
                the largest that fits into free memory; if that is not the largest of all, it is said.
            max_context: longest context of a sequence in tokens; by default what the executables were compiled for.
            device: the device; JAX's first by default.
            trust: load executables that somebody else may have written. They are native code. Without it, a mode from
                the Hub is compiled into your own cache, whatever `on_missing` says.
            revision: branch, tag or commit of a Hub id; the default branch by default.
            token: for private repositories of the Hub; the one that `hf auth login` stored by default.
            preload: open all executables now; otherwise each is opened when it is first used, and only verified now.
            workers: threads for reading and loading; by default one per processor core, 16 at most.
            say: is told what is being compiled, and which pool is not used; prints to standard error by default.

        Raises:
            CheckpointError: there is no complete checkpoint, or it lacks what the mode reads.
            HubError: it is on the Hub, and cannot be had.
            PlanError: there is no such mode.
            ExecutableError: executables are missing, damaged, made for something else (`MismatchError`), or not to be
                trusted (`TrustError`).
            MemoryPlanError: the mode does not fit on the device.
            DeviceMemoryError: it would have, but something else has taken the memory meanwhile.
        """
        if on_missing not in ("error", "compile"):
            raise ConfigError(f'on_missing must be "error" or "compile", found {on_missing!r}')
        if dtype not in (None, "bfloat16", "float32"):
            raise ConfigError(f'dtype must be "bfloat16" or "float32", found {dtype!r}')
        if kv not in ("full", "int8"):
            raise ConfigError(f'kv must be "full" or "int8", found {kv!r}')
        if device is not None and not hasattr(device, "platform"):
            raise ConfigError(f'device must be one of JAX\'s, such as jax.devices("gpu")[0], found {device!r:.80}')
        phases = Phases()
        with phases.measure("device"):
            device = device if device is not None else default_device()
        if is_remote(path):
            from elastic_jax.hub_load import fetch_mode  # the Hub's client takes long to import

            with phases.measure("download"):
                fetched = fetch_mode(
                    str(path),
                    str(mode),
                    dtype=dtype or "bfloat16",
                    kv=kv,
                    device=device,
                    max_context=max_context,
                    on_missing=on_missing,
                    revision=revision,
                    token=token,
                    trust=trust,
                    say=say or _say,
                )
            checkpoint, on_missing = fetched.checkpoint, fetched.on_missing
        else:
            refuse_revision(path, revision)
            checkpoint = Checkpoint.open(path)
        threads = default_workers() if workers is None else workers
        with phases.measure("plan"):
            plan = checkpoint.plan(str(mode))
            checkpoint.folders(plan)  # executables would be of no use without the weights
            store = ModeStore(checkpoint, plan, dtype or "bfloat16", device, kv)
            pool = usable_pool(
                store, on_missing, kv_slots=kv_slots, max_context=max_context, workers=threads, say=say or _say
            )
        with explained():
            parts = load_parts(store, pool.step, trust=trust, preload=preload, workers=threads, phases=phases)
        with phases.measure("state"), explained():
            runner = Runner(checkpoint.config, pool.step, parts.units, parts.weights, device)
            engine = Engine(runner, max_context or pool.step.max_context)
        phases.finish()
        return cls(checkpoint, plan, parts.tokenizer, engine, pool.memory, phases)

    @property
    def delivery(self) -> Delivery:
        """What runs requests for several callers at once."""
        return self._delivery

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
        stop: str | Sequence[str] | None = None,
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
            DeviceMemoryError: the device ran out of memory. The model must be loaded again.
        """
        many, listed = list_prompts(prompts)
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if wrong := [string for string in stops if not isinstance(string, str)]:
            raise RequestError(f"a stop string must be text, found {wrong[0]!r}")
        sampling = SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias={} if logit_bias is None else logit_bias,
            seed=seed,
            top_log_probabilities=top_log_probabilities,
        )
        end = frozenset[int]() if ignore_end else frozenset(self._end_tokens())
        requests, texts = [], []
        for index, prompt in enumerate(listed):
            tokens = prompt_tokens(prompt, self.tokenizer)
            most = max_new_tokens
            if most is None:
                most = max(1, min(DEFAULT_NEW_TOKENS, self.engine.limits.max_context - len(tokens)))
            own = dataclasses.replace(sampling, seed=None if seed is None else (seed + index) % 2**64)
            requests.append(GenerateRequest(tokens, most, own, end, choices, grammar))
            self.engine.limits.check(requests[-1])
            texts.append([self._answer(stops, index, choice, len(tokens)) for choice in range(choices)])
        pieces = self._run(requests, texts)
        if stream:
            return pieces
        answers = {(p.prompt, p.choice): p.generation for p in pieces if p.generation is not None}
        results = [[answers[i, c] for c in range(choices)] for i in range(len(requests))]
        flat = [group if choices > 1 else group[0] for group in results]
        return flat if many else flat[0]

    def _answer(self, stops: Sequence[str], prompt: int, choice: int, tokens: int) -> AnswerText:
        detokenizer = self.tokenizer.detokenizer(skip_special_tokens=True)
        return AnswerText(detokenizer, stops, prompt=prompt, choice=choice, prompt_tokens=tokens)

    def _run(self, requests: Sequence[GenerateRequest], texts: Sequence[Sequence[AnswerText]]) -> Iterator[Piece]:
        inbox = self._delivery.submit(requests)
        try:
            going = {
                (number, choice): text
                for number, answers in zip(inbox.numbers, texts, strict=True)
                for choice, text in enumerate(answers)
            }
            while going:
                for event in self._delivery.wait(inbox):
                    if isinstance(event, FailEvent):
                        raise event.error
                    if not isinstance(event, TokenEvent) or (event.request, event.choice) not in going:
                        continue  # one token of an answer that was stopped came after all
                    piece, verdict = going[event.request, event.choice].feed(event)
                    if verdict != "going":
                        del going[event.request, event.choice]
                    if verdict == "stopped":
                        self._delivery.cancel(event.request, event.choice)
                    yield piece
        finally:
            # A consumer that stops listening must not leave its answers running.
            self._delivery.close(inbox)

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
        requests = []
        for pair in pairs:
            before, after = pair_tokens(pair, self.tokenizer)
            requests.append(ScoreRequest((*before, *after), len(before), 0))
        inbox = self._delivery.submit(requests)
        events: dict[int, ScoreEvent] = {}
        try:
            while len(events) < len(requests):
                for event in self._delivery.wait(inbox):
                    if isinstance(event, ScoreEvent):
                        events[event.request] = event
        finally:
            self._delivery.close(inbox)
        return [score_of(request, events[number]) for request, number in zip(requests, inbox.numbers, strict=True)]

    # -- telling -------------------------------------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """What is loaded: mode, plan, bytes, what each group runs, executables, KV capacity; JSON-ready."""
        step = self.engine.config
        store = ModeStore(self.checkpoint, self.plan, step.dtype, self.engine.runner.device, step.kv)
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
            "executables": {
                "folder": str(store.pool_folder(step.kv_slots)),
                "units": list(self.engine.runner.unit_names),
            },
            "attention": step.attention,
            "dot": step.dot,
            "decode": step.decode,
            "sampling": step.sampling,
            "kv": step.kv,
            "kv_capacity_tokens": step.kv_slots,
            "kv_pools_compiled": store.pools,
            "rows": step.rows,
            "max_context": self.engine.limits.max_context,
            "loading": self.loading.to_json(),
        }


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
