"""Reads a Hugging Face config.json, and refuses every key that would change what is computed and is not implemented.

Keys are in one of three tables: read, harmless, or accepted only with values that change nothing. A key in none of them
is refused by its name, because nobody has decided that it is harmless.
"""

from collections.abc import Callable, Mapping
from typing import Any

from elastic_jax.config import ModelConfig
from elastic_jax.errors import ConfigError

TEXT_ARCHITECTURES = ("MistralForCausalLM", "LlamaForCausalLM")
MULTIMODAL_ARCHITECTURE = "Mistral3ForConditionalGeneration"

_DEFAULT_ROPE_THETA = 10000.0  # of transformers, for configs older than the key


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_READ = _words(
    "architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim rms_norm_eps rope_theta rope_scaling rope_parameters max_position_embeddings "
    "tie_word_embeddings bos_token_id eos_token_id pad_token_id sliding_window layer_types"
)

# Training, bookkeeping, output format, other tasks' heads, or how (not what) transformers computes.
_HARMLESS = _words(
    "_name_or_path _attn_implementation _attn_implementation_autoset _commit_hash transformers_version torch_dtype "
    "dtype use_cache return_dict return_dict_in_generate output_attentions output_hidden_states output_scores "
    "torchscript attention_dropout hidden_dropout resid_pdrop embd_pdrop initializer_range pretraining_tp "
    "is_decoder is_llama_config id2label label2id problem_type finetuning_task task_specific_params "
    "chunk_size_feed_forward gradient_checkpointing unk_token_id sep_token_id decoder_start_token_id prefix "
    "tokenizer_class transformers.js_config unsloth_fixed unsloth_version use_bfloat16 tf_legacy_loss "
    "tie_encoder_decoder "
    # The defaults of transformers.generate, which older versions kept here: the caller's choice, not the model's.
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k "
    "top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
    "bad_words_ids num_return_sequences remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens forced_bos_token_id forced_eos_token_id"
)

# Of a multimodal config: the vision tower and the projector, which are not converted.
_VISION = _words(
    "vision_config image_token_index image_token_id projector_hidden_act vision_feature_layer "
    "multimodal_projector_bias spatial_merge_size"
)

_NOTHING = (None, False)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": _NOTHING,
    "mlp_bias": _NOTHING,
    "quantization_config": (None,),
    "rope_interleaved": _NOTHING,
    "partial_rotary_factor": (None, 1.0),
    "is_encoder_decoder": _NOTHING,
    "add_cross_attention": _NOTHING,
    "cross_attention_hidden_size": (None,),
    "pruned_heads": (None, {}),
    "auto_map": (None, {}),
}

_WHY = {
    "quantization_config": "the weights are quantized already; convert the original weights",
    "auto_map": "the model runs its own code",
    "hidden_act": "only SwiGLU with silu is implemented",
}


def parse_config(
    values: Mapping[str, Any], generation: Mapping[str, Any] | None, *, lm_head_stored: bool, source: str
) -> ModelConfig:
    """Reads config.json as transformers 4 or 5 writes it.

    Args:
        values: config.json.
        generation: generation_config.json, or None. Its end-of-sequence tokens are added.
        lm_head_stored: whether the weights hold a language-model head of their own.
        source: names the file in errors.

    Raises:
        ConfigError: keys are missing, malformed, unknown, or ask for what is not implemented. All are named at once.
    """
    architectures = values.get("architectures") or []
    known = (*TEXT_ARCHITECTURES, MULTIMODAL_ARCHITECTURE)
    if len(architectures) != 1 or architectures[0] not in known:
        raise ConfigError(f"{source}: architectures should be one of {list(known)}, found {architectures}")
    problems: list[str] = []
    multimodal = architectures[0] == MULTIMODAL_ARCHITECTURE
    text = values
    if multimodal:
        text = values.get("text_config")
        if not isinstance(text, Mapping):
            raise ConfigError(f"{source}: {MULTIMODAL_ARCHITECTURE} should have a text_config, found {text!r}")
        outer = {key: value for key, value in values.items() if key not in _VISION | {"text_config"}}
        _refuse_unknown(outer, problems)
    _refuse_unknown(text, problems)
    is_mistral = multimodal or architectures[0] == "MistralForCausalLM"
    read = _Reader(text, problems)
    heads = read.size("num_attention_heads")
    hidden_size = read.size("hidden_size")
    max_positions = read.size("max_position_embeddings")
    _refuse_window(text, max_positions, is_mistral, problems)
    rope_theta = _rope_theta(text, problems)
    grouped = is_mistral or text.get("num_key_value_heads") is not None
    kv_heads = read.size("num_key_value_heads") if grouped else heads
    head_dim = read.size("head_dim") if text.get("head_dim") is not None else hidden_size // max(heads, 1)
    eps = read.number("rms_norm_eps")
    sizes = {name: read.size(name) for name in ("vocab_size", "intermediate_size", "num_hidden_layers")}
    places = [place for place in (text, values if multimodal else None, generation) if place is not None]
    tokens = _special_tokens(places, sizes["vocab_size"], problems)
    # A multimodal config's own flag is a class default that published checkpoints contradict: their weights decide.
    flags = [bool(place.get("tie_word_embeddings", False)) for place in (text, values)]
    tied = not lm_head_stored and any(flags) if multimodal else flags[0]
    if problems:
        raise ConfigError(f"{source} cannot be converted: " + "; ".join(problems))
    return ModelConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=hidden_size,
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=eps,
        rope_theta=rope_theta,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        **tokens,
    )


class _Reader:
    """Reads numbers, and notes what is missing or malformed instead of stopping at the first."""

    def __init__(self, values: Mapping[str, Any], problems: list[str]) -> None:
        self._values, self._problems = values, problems

    def size(self, name: str) -> int:
        """A positive integer; 0 if there is none."""
        value = self._values.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        self._problems.append(f"{name} should be a positive integer, found {value!r}")
        return 0

    def number(self, name: str) -> float:
        """A positive number; 0 if there is none."""
        value = self._values.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return float(value)
        self._problems.append(f"{name} should be a positive number, found {value!r}")
        return 0.0


def _refuse_unknown(values: Mapping[str, Any], problems: list[str]) -> None:
    for key, value in values.items():
        if key in _NEUTRAL:
            if value not in _NEUTRAL[key]:
                why = f" ({_WHY[key]})" if key in _WHY else ""
                problems.append(f"{key} = {value!r} is not implemented{why}")
        elif key not in _READ | _HARMLESS:
            problems.append(f"unknown key {key} = {value!r}, which may change what is computed")


def _refuse_window(text: Mapping[str, Any], max_positions: int, is_mistral: bool, problems: list[str]) -> None:
    # transformers gives a Mistral config without the key a window of 4096.
    window = text.get("sliding_window", 4096 if is_mistral else None)
    if window is not None and not (isinstance(window, int) and window >= max_positions):
        absent = " (the default where the key is absent)" if "sliding_window" not in text else ""
        problems.append(
            f"sliding_window = {window!r}{absent} is not implemented; "
            f"only null, or no less than max_position_embeddings ({max_positions})"
        )
    if windowed := sorted({str(kind) for kind in text.get("layer_types") or []} - {"full_attention"}):
        problems.append(f"layer_types {windowed} are not implemented; only full_attention")


def _rope_theta(text: Mapping[str, Any], problems: list[str]) -> float:
    """The rotary base, as transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`) spells it."""
    found = {} if text.get("rope_theta") is None else {"rope_theta": text["rope_theta"]}
    neutral: dict[str, Callable[[Any], bool]] = {
        "rope_type": lambda value: value == "default",
        "type": lambda value: value == "default",
        "partial_rotary_factor": lambda value: value in (None, 1.0),
    }
    for name in ("rope_scaling", "rope_parameters"):
        for key, value in (text.get(name) or {}).items():
            if key == "rope_theta":
                found[f"{name}.rope_theta"] = value
            elif key not in neutral or not neutral[key](value):
                problems.append(f"{name}.{key} = {value!r} is not implemented; only the default rotary embedding")
    if len(set(found.values())) > 1:
        problems.append(f"rotary bases contradict each other: {found}")
    theta = next(iter(found.values()), _DEFAULT_ROPE_THETA)
    if isinstance(theta, int | float) and theta > 0:
        return float(theta)
    problems.append(f"rope_theta should be a positive number, found {theta!r}")
    return 0.0


def _special_tokens(places: list[Mapping[str, Any]], vocab_size: int, problems: list[str]) -> dict[str, Any]:
    """bos and pad of the first place that names them; the eos tokens of all places together."""

    def ids(place: Mapping[str, Any], key: str) -> list[int]:
        value = place.get(key)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        # Some old configs write "no padding token" as -1.
        listed = [token for token in listed if token != -1]
        if not all(isinstance(token, int) and 0 <= token < vocab_size for token in listed):
            problems.append(f"{key} = {value!r} is not a token of a vocabulary of {vocab_size}")
            return []
        return listed

    def first(key: str) -> int | None:
        return next((token for place in places for token in ids(place, key)), None)

    eos = dict.fromkeys(token for place in places for token in ids(place, "eos_token_id"))
    return {"bos_token_id": first("bos_token_id"), "eos_token_ids": tuple(eos), "pad_token_id": first("pad_token_id")}
