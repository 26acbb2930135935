"""`pipeline("text-generation")`: texts and conversations in, texts and conversations out, as transformers' gives them.

All prompts of a call run together, whatever `batch_size` says; answers are those of prompts run alone. With a streamer
they run one after the other, since it takes one answer at a time.
"""

import dataclasses
import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from elastic_jax.errors import ConfigError, RequestError
from elastic_jax.transformers import generating, settings
from elastic_jax.transformers.auto_tokenizer import AutoTokenizer
from elastic_jax.transformers.causal_lm import ElasticForCausalLM
from elastic_jax.transformers.generating import Row
from elastic_jax.transformers.settings import GenerationSettings

DEFAULTS = {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}
"""transformers' for this task, where neither the call, the pipeline nor the model's generation config says."""

_ENCODING = ("add_special_tokens", "truncation", "padding")
_LOADING = ("mode", "compile", "kv", "kv_slots", "max_context", "trust", "say", "attn_implementation",
            "trust_remote_code")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PipelineOptions:
    """What concerns the way in and out, apart from generating; transformers' documentation explains each.

    Attributes:
        return_full_text: whether the prompt comes back with its answer.
        return_tensors: give token ids instead of text.
        prefix: put before every text.
        continue_final_message: whether an answer goes on with the last message; None: if that is the assistant's.
        skip_special_tokens: leave them out of the text.
        clean_up_tokenization_spaces: as the tokenizer says, where None.
        encoding: options for encoding: add_special_tokens, truncation and so on.
        tools: that a chat template is given.
        documents: that a chat template is given.
    """

    return_full_text: bool = True
    return_tensors: bool = False
    prefix: str = ""
    continue_final_message: bool | None = None
    skip_special_tokens: bool = True
    clean_up_tokenization_spaces: bool | None = None
    encoding: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tools: Any = None
    documents: Any = None


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """One prompt: its text or messages, its tokens, and how many of them are the prefix."""

    given: Any
    tokens: tuple[int, ...]
    prefix: int
    continues: bool

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.given, str)


def pipeline(
    task: str | None = None,
    model: Any = None,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    device: Any = None,
    device_map: Any = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> "TextGenerationPipeline":
    """Makes a pipeline, as transformers' function of this name does.

    Args:
        task: "text-generation", which is also what None means.
        model: an `ElasticForCausalLM`, or the name of one for `from_pretrained`.
        tokenizer: a tokenizer of transformers', or a name; by default the model's own.
        revision: branch, tag or commit of a Hub id.
        token: of the Hub, for private repositories.
        device: where the model goes; as `device_map`.
        device_map: see `ElasticForCausalLM.from_pretrained`.
        dtype: see there.
        torch_dtype: the same under its old name.
        model_kwargs: more arguments of `from_pretrained`.
        options: `mode`, `compile` and others of `from_pretrained`; all else is what every call begins with.

    Raises:
        ConfigError: there is no such task, no model, or an argument is not supported.
        ElasticError: as loading raises.
    """
    if task not in (None, "text-generation"):
        raise ConfigError(f'the task {task!r} is not there: the one task is "text-generation"')
    if model is None:
        raise ConfigError("pipeline needs a model: an ElasticForCausalLM, or the name of one")
    if device is not None and device_map is not None:
        raise ConfigError("device and device_map are both given: give one")
    loading = {**(model_kwargs or {}), **{name: options.pop(name) for name in _LOADING if name in options}}
    placing = {
        "revision": revision,
        "token": token,
        "device_map": device if device_map is None else device_map,
        "dtype": dtype,
        "torch_dtype": torch_dtype,
    }
    loading |= {name: value for name, value in placing.items() if value is not None}
    if device == -1:
        loading["device_map"] = "cpu"  # transformers' number for it
    if not isinstance(model, ElasticForCausalLM):
        model = ElasticForCausalLM.from_pretrained(model, **loading)
    elif loading:
        raise ConfigError(f"the model is loaded already: {', '.join(loading)} can only be given with its name")
    if tokenizer is None or isinstance(tokenizer, str):
        name = tokenizer or model.elastic.checkpoint.path
        tokenizer = AutoTokenizer.from_pretrained(name, token=token if isinstance(tokenizer, str) else None)
    return TextGenerationPipeline(model, tokenizer, **options)


class TextGenerationPipeline:
    """Continues texts and conversations.

    Args:
        model: the model.
        tokenizer: a tokenizer of transformers'.
        options: what every call begins with.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
    """

    task = "text-generation"

    def __init__(self, model: ElasticForCausalLM, tokenizer: Any, **options: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._options = options
        _split(options)  # says at once what is wrong

    @property
    def device(self) -> Any:
        """The model's."""
        return self.model.device

    def __call__(self, text_inputs: Any, **options: Any) -> Any:
        """Continues prompts.

        Args:
            text_inputs: a text, a chat (a list of messages with role and content), or a list or generator of either.
            options: return_full_text, return_tensors, return_text, prefix, continue_final_message, tools, documents,
                skip_special_tokens, clean_up_tokenization_spaces, add_special_tokens, truncation,
                tokenizer_encode_kwargs, stop_sequence, batch_size and num_workers (without effect), `seed`, `streamer`,
                and everything that `generate` takes. The defaults are transformers': 256 new tokens, sampled at 0.7.

        Returns:
            For one prompt a list of `{"generated_text": ...}`, one an answer; for several a list of such lists; for a
            generator an iterator of them. A chat's generated text is the chat with its answer.

        Raises:
            RequestError: an input is no prompt, or an option is unknown, not supported or out of range.
        """
        way, arguments = _split({**self._options, **options})
        if isinstance(text_inputs, types.GeneratorType):
            return self._each(text_inputs, way, arguments)
        many, listed = _listed(text_inputs)
        records = self._run([self._prompt(each, way) for each in listed], way, arguments)
        return records if many else records[0]

    def _each(self, inputs: Iterator[Any], way: PipelineOptions, arguments: dict[str, Any]) -> Iterator[Any]:
        for each in inputs:
            yield self._run([self._prompt(each, way)], way, arguments)[0]

    def _prompt(self, given: Any, way: PipelineOptions) -> _Prompt:
        if isinstance(given, str):
            tokens = self.tokenizer(way.prefix + given, **way.encoding)["input_ids"]
            prefix = len(self.tokenizer(way.prefix, add_special_tokens=False)["input_ids"]) if way.prefix else 0
            if not tokens:
                tokens = self._beginning()
            return _Prompt(given, tuple(tokens), prefix, False)
        if not _is_chat(given):
            raise RequestError(f"a prompt must be a text, or messages with role and content; found {given!r:.80}")
        last = given[-1]["role"] == "assistant"
        continues = last if way.continue_final_message is None else way.continue_final_message
        encoding = {name: value for name, value in way.encoding.items() if name != "add_special_tokens"}
        encoded = self.tokenizer.apply_chat_template(
            list(given),
            add_generation_prompt=not continues,
            continue_final_message=continues,
            tools=way.tools,
            documents=way.documents,
            return_dict=True,
            **encoding,
        )
        return _Prompt(given, tuple(encoded["input_ids"]), 0, continues)

    def _beginning(self) -> list[int]:
        bos = self.model.generation_config.bos_token_id
        if bos is None:
            raise RequestError("the text is empty, and the model has no token to begin with (BOS)")
        return [bos]

    def _run(self, prompts: list[_Prompt], way: PipelineOptions, arguments: dict[str, Any]) -> list[Any]:
        arguments = dict(arguments)
        seed, streamer = arguments.pop("seed", None), arguments.pop("streamer", None)
        merged = self._with_defaults(settings.merge(arguments, arguments.pop("generation_config", None), None))
        model = self.model
        positions = model.elastic.checkpoint.config.max_position_embeddings
        wanted = [self._settings(merged, prompt, positions, seed) for prompt in prompts]
        if streamer is not None and wanted[0].choices > 1:
            raise RequestError(f"a streamer takes one answer a prompt, and {wanted[0].choices} were asked for")
        answers: list[list[Row]] = [[] for _ in prompts]
        start = 0
        while start < len(prompts):  # neighbours that ask for the same run together: all, but for total lengths
            stop = start + 1
            while streamer is None and stop < len(prompts) and wanted[stop] == wanted[start]:
                stop += 1
            choices = wanted[start].choices
            run = functools.partial(
                generating.run,
                model.elastic.delivery,
                model.elastic.tokenizer,
                [prompt.tokens for prompt in prompts[start:stop]],
                wanted[start],
                model.elastic.checkpoint.config.vocab_size,
                first=start,
            )
            ids = np.array([prompts[start].tokens])
            rows = run() if streamer is None else generating.streamed(run, streamer, ids, lambda array: array)
            for index in range(start, stop):
                answers[index] = rows[(index - start) * choices : (index - start + 1) * choices]
            start = stop
        return [self._records(*each, way) for each in zip(prompts, answers, wanted, strict=True)]

    def _with_defaults(self, merged: dict[str, Any]) -> dict[str, Any]:
        own = settings.merge({}, None, self.model.generation_config)
        together = {**own, **merged}
        added = dict(DEFAULTS)
        if together.get("max_length") is not None:
            added.pop("max_new_tokens")  # it would go before it
        if self.tokenizer.pad_token_id is not None:
            added["pad_token_id"] = self.tokenizer.pad_token_id
        return {**added, **together}

    def _settings(self, merged: dict[str, Any], prompt: _Prompt, positions: int, seed: int | None) -> Any:
        own = dict(merged)
        for name, counted in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if prompt.prefix and own.get(name) is not None and own.get(counted) is None:
                own[name] += prompt.prefix  # a total length does not count the prefix
        return settings.resolve(own, width=len(prompt.tokens), positions=positions, seed=seed)

    def _records(
        self, prompt: _Prompt, rows: Sequence[Row], wanted: GenerationSettings, way: PipelineOptions
    ) -> list[dict[str, Any]]:
        generating.cut(rows, wanted)
        longest = max(len(row.tokens) for row in rows)
        records: list[dict[str, Any]] = []
        for row in rows:
            new = row.tokens + [wanted.pad_token or 0] * (longest - len(row.tokens))
            if way.return_tensors:
                records.append({"generated_token_ids": [*prompt.tokens, *new]})
                continue
            text = self.tokenizer.decode(
                new,
                skip_special_tokens=way.skip_special_tokens,
                clean_up_tokenization_spaces=way.clean_up_tokenization_spaces,
            )
            records.append({"generated_text": _joined(prompt, text) if way.return_full_text else text})
        return records


def _joined(prompt: _Prompt, text: str) -> Any:
    if not prompt.is_chat:
        return prompt.given + text
    messages = list(prompt.given)
    if prompt.continues:
        last = messages[-1]
        return [*messages[:-1], {"role": last["role"], "content": last["content"] + text}]
    return [*messages, {"role": "assistant", "content": text}]


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value and "content" in value


def _is_chat(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(_is_message(each) for each in value)


def _listed(inputs: Any) -> tuple[bool, list[Any]]:
    """Whether several prompts were given, and all of them."""
    if isinstance(inputs, str) or _is_chat(inputs):
        return False, [inputs]
    if not isinstance(inputs, list | tuple):
        raise RequestError(f"a pipeline takes a text, a chat, or a list of them; found {type(inputs).__name__}")
    if not inputs:
        raise RequestError("a pipeline was given an empty list: give at least one prompt")
    return True, list(inputs)


def _split(options: Mapping[str, Any]) -> tuple[PipelineOptions, dict[str, Any]]:
    """What concerns the way in and out, and what is for `generate`.

    Raises:
        RequestError: options contradict each other, or are not supported.
    """
    rest = {name: value for name, value in options.items() if name not in ("batch_size", "num_workers")}
    full, tensors, text = (rest.pop(f"return_{name}", None) for name in ("full_text", "tensors", "text"))
    if sum(value is not None for value in (full, tensors, text)) > 1:
        raise RequestError("return_full_text, return_tensors and return_text exclude each other: give one")
    for name in ("handle_long_generation", "assistant_model", "return_type"):
        if rest.pop(name, None) is not None:
            raise RequestError(f"pipeline: {name} is not supported here: leave it out")
    stop = rest.pop("stop_sequence", None)
    if stop is not None:
        rest["stop_strings"] = stop
    encoding = {name: rest.pop(name) for name in _ENCODING if rest.get(name) is not None}
    encoding |= rest.pop("tokenizer_encode_kwargs", None) or {}
    fields = ("prefix", "continue_final_message", "skip_special_tokens", "clean_up_tokenization_spaces", "tools",
              "documents")  # fmt: skip
    own = {name: rest.pop(name) for name in fields if name in rest}
    own = {name: value for name, value in own.items() if value is not None}
    way = PipelineOptions(
        return_full_text=full is None or bool(full), return_tensors=bool(tensors), encoding=encoding, **own
    )
    checked = {name: value for name, value in rest.items() if name not in ("seed", "streamer")}
    settings.merge(checked, checked.pop("generation_config", None), None)
    return way, rest
