"""`AutoModelForCausalLM` and the model it gives: transformers' way to load and to generate, on one Elastic mode."""

import functools
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from elastic_jax.elastic import ElasticMistral
from elastic_jax.errors import ConfigError, RequestError
from elastic_jax.kv_cache import KvPrecision
from elastic_jax.memory import check_host_memory
from elastic_jax.transformers import generating, placement, settings
from elastic_jax.transformers.arrays import like, to_numpy
from elastic_jax.transformers.configuration import generation_config, model_config
from elastic_jax.transformers.outputs import CausalLMOutput, GenerateOutput
from elastic_jax.transformers.sources import Compile, Say, find_checkpoint
from elastic_jax.workers import default_workers

_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""One and the same function under different names of PyTorch's kernels; ours is part of the executables."""

_WITHOUT_EFFECT = {"trust_remote_code", "low_cpu_mem_usage", "use_safetensors", "local_files_only"}


class AutoModelForCausalLM:
    """Loads models; there are no instances of it."""

    def __init__(self) -> None:
        raise TypeError("use AutoModelForCausalLM.from_pretrained(name)")

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> "ElasticForCausalLM":
        """As `ElasticForCausalLM.from_pretrained`."""
        return ElasticForCausalLM.from_pretrained(name, **options)


class ElasticForCausalLM:
    """One mode of a model, with the methods of a causal language model of transformers.

    Attributes:
        elastic: the loaded mode, for everything that transformers has no name for.
        name_or_path: what it was loaded by.
        generation_config: transformers' `GenerationConfig`; change it to change what `generate` does by default.
    """

    main_input_name = "input_ids"
    training = False

    def __init__(self, elastic: ElasticMistral, name_or_path: str) -> None:
        self.elastic = elastic
        self.name_or_path = name_or_path
        self.generation_config = generation_config(elastic.checkpoint)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        mode: str | float = "S",
        token: str | bool | None = None,
        revision: str | None = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        attn_implementation: str | None = None,
        device_map: Any = None,
        compile: Compile = "once",
        kv: KvPrecision = "full",
        max_context: int | None = None,
        kv_slots: int | None = None,
        trust: bool = False,
        say: Say | None = None,
        **others: Any,
    ) -> Self:
        """Loads a mode; converts and compiles first where that has not been done on this machine.

        Args:
            name: an Elastic checkpoint; or a Hugging Face folder, a GGUF file or a Hub id, converted once into the
                cache (`ELASTIC_JAX_CACHE`, by default ~/.cache/elastic-jax).
            mode: of the checkpoint: XL is the original model, S the fastest; after a search also a number or a request
                such as "max-loss=1%" (see `ElasticMistral.load`).
            token: of the Hub, for private repositories.
            revision: branch, tag or commit of a Hub id.
            dtype: compute type: bfloat16 (also for None and "auto"), or float32 for checks.
            torch_dtype: the same under its old name.
            attn_implementation: names of transformers' are accepted; all are the same function, and the attention
                that runs is the one compiled (`model.elastic.info()["attention"]`).
            device_map: "auto", "cpu", "cuda", "cuda:0", a number, or `{"": one of these}`.
            compile: "never" refuses to convert or to compile.
            kv: precision of the KV cache: "full", the compute type, or "int8", which takes half as much memory.
            max_context: longest context in tokens.
            kv_slots: tokens of the KV pool.
            trust: load executables that somebody else may have written.
            say: is told what is converted and compiled, and why; prints to standard error by default.
            others: refused by name, but for a few that change nothing here.

        Raises:
            ConfigError: an argument is unknown or asks for what is not there.
            ElasticError: as `ElasticMistral.load` and conversion raise.
        """
        for option, value in others.items():
            if option not in _WITHOUT_EFFECT and value is not None and value is not False:
                hint = "choose a mode instead" if "load_in" in option or "quant" in option else "leave it out"
                raise ConfigError(f"from_pretrained: {option}={value!r:.80} is not supported here: {hint}")
        if attn_implementation not in _ATTENTION:
            raise ConfigError(f"attn_implementation must be one of {_ATTENTION[1:]}, found {attn_implementation!r}")
        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise ConfigError(f"dtype is {dtype!r} and torch_dtype, its old name, {torch_dtype!r}: give one")
        compute = placement.compute_dtype(dtype if dtype is not None else torch_dtype)
        device = placement.find_device(device_map)
        secret = token if isinstance(token, str) else None
        found = find_checkpoint(
            name, revision=revision, token=secret, compile=compile, workers=default_workers(), say=say or _say
        )
        elastic = ElasticMistral.load(
            found.path,
            mode,
            on_missing="error" if compile == "never" else "compile",
            dtype=compute,
            kv=kv,
            device=device,
            revision=found.revision,
            token=secret,
            max_context=max_context,
            kv_slots=kv_slots,
            trust=trust,
            say=say,
        )
        return cls(elastic, str(name))

    # -- what it is ----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def config(self) -> Any:
        """The model's shape as transformers' `MistralConfig`, whatever the family it was published as."""
        return model_config(self.elastic.checkpoint, self.name_or_path)

    @property
    def mode(self) -> str:
        """The mode that is loaded."""
        return self.elastic.plan.name

    @property
    def device(self) -> Any:
        """Where inputs may be: a `torch.device` if PyTorch is imported, else its name."""
        return placement.inputs_device(self.elastic.engine.runner.device)

    @property
    def dtype(self) -> Any:
        """The compute type: PyTorch's if that is imported, else NumPy's."""
        return placement.user_dtype(self.elastic.engine.config.dtype)

    def can_generate(self) -> bool:
        """It can."""
        return True

    def eval(self) -> Self:
        """Itself: there is nothing to train."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Itself for `train(False)`.

        Raises:
            ConfigError: training is asked for.
        """
        if mode:
            raise ConfigError("an Elastic mode is compiled for inference and cannot be trained")
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Itself for `requires_grad_(False)`.

        Raises:
            ConfigError: gradients are asked for.
        """
        return self.train(requires_grad)

    def to(self, *places: Any, device: Any = None, dtype: Any = None, non_blocking: bool = False) -> Self:
        """Itself, where it is on that device and of that type already.

        Raises:
            ConfigError: it is not: it was loaded and compiled for another device or type.
        """
        del non_blocking
        for place in (*places, device, dtype):
            if place is None:
                continue
            if placement.is_dtype(place):
                wanted, own = placement.compute_dtype(place), self.elastic.engine.config.dtype
                if wanted != own:
                    raise ConfigError(f"the model computes in {own}: load it with from_pretrained(dtype={wanted!r})")
                continue
            found, here = placement.find_device(place), self.elastic.engine.runner.device
            whichever = str(place) in ("cuda", "gpu") and here.platform == "gpu"
            if found is not None and found != here and not whichever:
                raise ConfigError(
                    f"the model is on {placement.device_name(here)}, and was compiled for it: load it with "
                    f"from_pretrained(device_map={str(place)!r})"
                )
        return self

    def cuda(self, device: Any = None) -> Self:
        """As `to("cuda")`."""
        return self.to("cuda" if device is None else device)

    def cpu(self) -> Self:
        """As `to("cpu")`."""
        return self.to("cpu")

    # -- what it does --------------------------------------------------------------------------------------------------

    def generate(
        self,
        inputs: Any = None,
        generation_config: Any = None,
        *,
        input_ids: Any = None,
        attention_mask: Any = None,
        streamer: Any = None,
        seed: int | None = None,
        **arguments: Any,
    ) -> Any:
        """Continues token ids, as transformers' `generate` does: greedily, or sampling with `do_sample=True`.

        Args:
            inputs: token ids [batch, tokens] of NumPy, JAX or PyTorch, padded on the left; BOS if there are none.
            generation_config: a `GenerationConfig` for this call.
            input_ids: the same as `inputs`.
            attention_mask: [batch, tokens], 0 on padding.
            streamer: is given the prompt and every token as they come (`put`, `end`); for one answer.
            seed: equal seeds give equal draws; not in transformers, whose global seed means nothing here. Prompt i
                draws from seed + i.
            arguments: max_length, max_new_tokens, min_length, min_new_tokens, do_sample, temperature, top_k, top_p,
                min_p, repetition_penalty, num_return_sequences, eos_token_id, pad_token_id, stop_strings,
                return_dict_in_generate, output_scores, output_logits, with transformers' meaning and defaults. All
                else is refused by name.

        Returns:
            [batch * num_return_sequences, tokens], prompts and answers, of the inputs' library; a `GenerateOutput`
            with `return_dict_in_generate=True`.

        Raises:
            RequestError: an argument is unknown, not supported or out of range. Nothing has run then.
        """
        merged = settings.merge(arguments, generation_config, self.generation_config)
        given = _either(inputs, input_ids)
        ids = self._beginning(merged) if given is None else _token_ids(given)
        mask = None if attention_mask is None else to_numpy(attention_mask, "attention_mask")
        config = self.elastic.checkpoint.config
        wanted = settings.resolve(merged, width=ids.shape[1], positions=config.max_position_embeddings, seed=seed)
        prompts = generating.without_padding(ids, mask, pad=merged.get("pad_token_id"), ends=wanted.end_tokens)
        if streamer is not None and len(prompts) * wanted.choices > 1:
            raise RequestError(
                f"a streamer takes one answer, and {len(prompts) * wanted.choices} were asked for: pass one prompt"
            )
        back = like(given)

        run = functools.partial(
            generating.run, self.elastic.delivery, self.elastic.tokenizer, prompts, wanted, config.vocab_size
        )
        rows = run() if streamer is None else generating.streamed(run, streamer, ids, back)
        sequences = back(generating.assemble(ids, rows, wanted))
        if not wanted.as_dict:
            return sequences
        scores = generating.by_step([row.scores for row in rows]) if wanted.scores else None
        logits = generating.by_step([row.logits for row in rows]) if wanted.logits else None
        return GenerateOutput(
            sequences,
            None if scores is None else tuple(back(each) for each in scores),
            None if logits is None else tuple(back(each) for each in logits),
        )

    def _beginning(self, merged: Mapping[str, Any]) -> np.ndarray:
        bos = merged.get("bos_token_id")
        if bos is None:
            raise RequestError("generate was given no input_ids, and the model has no token to begin with (BOS)")
        return np.array([[bos]], np.int64)

    def __call__(
        self, input_ids: Any = None, attention_mask: Any = None, *, return_dict: bool | None = None, **others: Any
    ) -> Any:
        """The logits after every token, by the arithmetic of prompt tokens.

        Args:
            input_ids: token ids [batch, tokens] of NumPy, JAX or PyTorch, padded on the left.
            attention_mask: [batch, tokens], 0 on padding; without it nothing is padding.
            return_dict: False gives a tuple.
            others: refused by name.

        Returns:
            a `CausalLMOutput` with float32 logits [batch, tokens, vocab], of the inputs' library.

        Raises:
            RequestError: inputs are missing, empty, too long or padded elsewhere, or an argument is not supported.
        """
        for name, value in others.items():
            if name not in ("use_cache",) and value is not None and value is not False:
                raise RequestError(f"calling the model: {name}={value!r:.80} is not supported here: leave it out")
        if input_ids is None:
            raise RequestError("calling the model needs input_ids")
        ids = _token_ids(input_ids)
        mask = np.ones(ids.shape, bool) if attention_mask is None else to_numpy(attention_mask, "attention_mask")
        prompts = generating.without_padding(ids, mask, pad=None, ends=())
        shape = (*ids.shape, self.elastic.checkpoint.config.vocab_size)
        check_host_memory(4 * math.prod(shape), f"float32 logits {list(shape)}", "pass fewer or shorter prompts")
        logits = np.zeros(shape, np.float32)
        for index, prompt in enumerate(prompts):
            logits[index, mask[index] != 0] = self.elastic.delivery.prompt_logits(prompt)
        output = CausalLMOutput(like(input_ids)(logits))
        return output.to_tuple() if return_dict is False else output

    forward = __call__


def _either(inputs: Any, input_ids: Any) -> Any:
    if inputs is not None and input_ids is not None:
        raise RequestError("inputs and input_ids are two names for one argument: pass one")
    given = inputs if inputs is not None else input_ids
    if isinstance(given, Mapping):
        raise RequestError("generate takes token ids: pass what a tokenizer returns as generate(**inputs)")
    return given


def _token_ids(value: Any) -> np.ndarray:
    ids = to_numpy(value, "input_ids")
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise RequestError(f"input_ids must be integers [batch, tokens], found {ids.dtype}{list(ids.shape)}")
    if not ids.size:
        raise RequestError(f"input_ids are empty: {list(ids.shape)}; give at least one prompt of at least one token")
    return ids.view(np.ndarray)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
