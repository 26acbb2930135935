import pytest

from converters.config import parse_config
from elastic_jax.errors import ConfigError


def parse(values, generation=None, *, lm_head_stored=True):
    return parse_config(values, generation, lm_head_stored=lm_head_stored, source="config.json")


def test_reads_every_hyper_parameter(config, model):
    assert parse(config) == model


def test_version_5_spelling_means_the_same(config):
    expected = parse(config | {"rope_theta": 1e6})
    del config["rope_theta"]
    config["rope_parameters"] = {"rope_theta": 1e6, "rope_type": "default", "partial_rotary_factor": 1.0}
    assert parse(config | {"dtype": "bfloat16"}) == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", None),
        ("rope_scaling", {"type": "default"}),
        ("hidden_act", "swish"),
        ("attention_bias", False),
        ("mlp_bias", None),
        ("quantization_config", None),
        ("sliding_window", 64),
        ("layer_types", ["full_attention", "full_attention"]),
        ("rope_interleaved", False),
        ("pretraining_tp", 1),
        ("_name_or_path", "somewhere"),
        ("transformers_version", "4.50"),
    ],
)
def test_values_that_change_nothing_are_accepted(config, model, key, value):
    assert parse(config | {key: value}) == model


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_theta": 1e4, "rope_type": "yarn"}),
        ("rope_parameters", {"rope_theta": 5e5, "rope_type": "default"}),  # contradicts rope_theta
        ("partial_rotary_factor", 0.5),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("quantization_config", {"quant_method": "fp8"}),
        ("sliding_window", 32),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("auto_map", {"AutoModel": "x.Y"}),
        ("logit_scale", 0.5),  # unknown
        ("num_experts", 8),  # unknown
        ("vocab_size", None),
        ("vocab_size", True),
        ("hidden_size", "16"),
        ("rms_norm_eps", 0),
        ("rope_theta", "large"),
        ("num_key_value_heads", None),
        ("eos_token_id", 40),
        ("bos_token_id", "<s>"),
    ],
)
def test_what_would_change_the_computation_is_refused_by_name(config, key, value):
    with pytest.raises(ConfigError, match=r"config\.json cannot be converted") as error:
        parse(config | {key: value})
    assert key in str(error.value) or "rope" in key


def test_every_problem_is_named_at_once(config):
    with pytest.raises(ConfigError) as error:
        parse(config | {"attention_bias": True, "hidden_act": "relu", "strange": 1})
    assert all(name in str(error.value) for name in ("attention_bias", "hidden_act", "strange"))


def test_a_mistral_config_without_a_window_has_transformers_default_window(config, model):
    del config["sliding_window"]
    assert parse(config) == model  # 4096 >= 64 positions
    with pytest.raises(ConfigError, match=r"sliding_window = 4096 \(the default"):
        parse(config | {"max_position_embeddings": 8192})
    assert parse(config | {"max_position_embeddings": 8192, "architectures": ["LlamaForCausalLM"]})


def test_head_dim_follows_from_the_width_where_it_is_missing(config):
    del config["head_dim"]
    assert parse(config).head_dim == 4


def test_llama_without_grouped_heads_has_as_many_kv_heads(config):
    config |= {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": None}
    assert parse(config).num_kv_heads == 4


@pytest.mark.parametrize("architectures", [None, [], ["MixtralForCausalLM"], ["MistralForCausalLM", "Other"]])
def test_other_architectures_are_refused(config, architectures):
    with pytest.raises(ConfigError, match="architectures should be one of"):
        parse(config | {"architectures": architectures})


def test_end_of_sequence_tokens_of_both_files_are_joined(config):
    parsed = parse(config | {"eos_token_id": [2, 5]}, {"eos_token_id": [5, 7], "bos_token_id": 3, "pad_token_id": 9})
    assert parsed.eos_token_ids == (2, 5, 7)
    assert (parsed.bos_token_id, parsed.pad_token_id) == (1, 9)


def test_special_tokens_may_be_missing(config):
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        del config[key]
    parsed = parse(config | {"pad_token_id": -1})
    assert (parsed.bos_token_id, parsed.eos_token_ids, parsed.pad_token_id) == (None, (), None)


def multimodal(config, **outer):
    text = {key: value for key, value in config.items() if key != "architectures"}
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "image_token_index": 10,
        "projector_hidden_act": "gelu",
        "vision_config": {"hidden_act": "gelu"},
        "text_config": text,
    } | outer


def test_a_multimodal_config_is_its_text_config(config, model):
    assert parse(multimodal(config)) == model


def test_a_multimodal_config_is_refused_for_unknown_keys_inside_and_outside(config):
    with pytest.raises(ConfigError, match="strange"):
        parse(multimodal(config, strange=1))
    with pytest.raises(ConfigError, match="strange"):
        parse(multimodal(config | {"strange": 1}))
    with pytest.raises(ConfigError, match="text_config"):
        parse(multimodal(config, text_config=None))


def test_a_multimodal_config_is_tied_only_without_a_head_of_its_own(config):
    del config["tie_word_embeddings"]
    values = multimodal(config, tie_word_embeddings=True)
    assert not parse(values, lm_head_stored=True).tie_word_embeddings
    assert parse(values, lm_head_stored=False).tie_word_embeddings
