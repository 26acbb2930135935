import json
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from converters.gguf_tokenizer import build_tokenizer
from elastic_jax.config import ModelConfig
from elastic_jax.errors import ConfigError

TEXTS = [
    "The quick brown fox jumps over 12345 lazy dogs.",
    "Don't  stop -- it's 2024!\n\n\tIndented   text  ",
    "Grüße, 東京 and émigré 😀 1,000.50",
    "def f(x):\n    return x ** 2  # comment",
    "",
]


def config(vocab_size: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_ids=(1,),
        pad_token_id=None,
    )


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    """A byte-level tokenizer with the rule of SmolLM, trained on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


@pytest.fixture
def metadata(trained) -> dict[str, Any]:
    """What a GGUF file would say of the trained tokenizer."""
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }


def build(metadata: dict[str, Any]) -> tuple[Tokenizer, dict[str, bytes]]:
    files = build_tokenizer(metadata, config(len(metadata["tokenizer.ggml.tokens"])), source="m.gguf")
    return Tokenizer.from_str(files["tokenizer.json"].decode()), files


@pytest.mark.parametrize("text", TEXTS)
def test_the_rebuilt_tokenizer_is_the_original(trained, metadata, text):
    rebuilt, _ = build(metadata)
    assert rebuilt.encode(text).ids == trained.encode(text).ids
    assert rebuilt.decode(rebuilt.encode(text).ids) == text


def test_special_tokens_are_taken_whole_and_skipped(metadata):
    rebuilt, _ = build(metadata)
    ids = rebuilt.encode("<s>The</s>").ids
    assert (ids[0], ids[-1]) == (0, 1)
    assert rebuilt.decode(ids) == "The"


def test_user_defined_tokens_are_taken_whole_and_kept(metadata):
    metadata["tokenizer.ggml.tokens"] += ["<tool>"]
    metadata["tokenizer.ggml.token_type"] += [4]
    rebuilt, _ = build(metadata)
    ids = rebuilt.encode("a<tool>b").ids
    assert ids[1] == len(metadata["tokenizer.ggml.tokens"]) - 1
    assert rebuilt.decode(ids) == "a<tool>b"


def pieces(metadata: dict[str, Any], name: str, text: str) -> list[str]:
    rebuilt, _ = build(metadata | {"tokenizer.ggml.pre": name})
    return [text[start:end] for _, (start, end) in rebuilt.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm", ["It", "'s", " HelloWorld", " ", "1", "2", "3", "4", "!!", "\n"]),
        ("gpt-2", ["It", "'s", " HelloWorld", " 1234", "!!", "\n"]),
        ("default", ["It", "'s", " HelloWorld", " 1234", "!!", "\n"]),
        ("llama-bpe", ["It", "'s", " HelloWorld", " ", "123", "4", "!!\n"]),
        ("tekken", ["It", "'s", " Hello", "World", " ", "1", "2", "3", "4", "!!\n"]),
    ],
)
def test_each_named_rule_splits_as_its_models_do(metadata, name, expected):
    assert pieces(metadata, name, "It's HelloWorld 1234!!\n") == expected


@pytest.mark.parametrize(
    ("name", "added", "expected"),
    [
        ("smollm", None, False),
        ("smollm", True, True),
        ("tekken", None, True),
        ("llama-bpe", False, False),
    ],
)
def test_the_bos_token_is_put_first_where_the_model_does(metadata, name, added, expected):
    del metadata["tokenizer.ggml.add_bos_token"]
    if added is not None:
        metadata["tokenizer.ggml.add_bos_token"] = added
    rebuilt, _ = build(metadata | {"tokenizer.ggml.pre": name})
    assert (rebuilt.encode("The").ids[0] == 0) is expected
    assert rebuilt.encode("The", add_special_tokens=False).ids[0] != 0


def test_the_files_name_special_tokens_and_the_chat_template(metadata):
    _, files = build(metadata)
    settings = json.loads(files["tokenizer_config.json"])
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")
    assert settings["chat_template"] == "{{ messages }}"
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [1]
    assert "pad_token" not in json.loads(files["special_tokens_map.json"])


def test_transformers_opens_the_files(metadata, tmp_path):
    from transformers import AutoTokenizer

    rebuilt, files = build(metadata)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert opened(TEXTS[0])["input_ids"] == rebuilt.encode(TEXTS[0]).ids
    assert opened.eos_token_id == 1


@pytest.fixture
def sentencepiece() -> dict[str, Any]:
    """A SentencePiece vocabulary: bytes for what it lacks; the better the score, the earlier a token is merged."""
    words = ["▁t", "he", "▁the", "at", "▁c", "▁cat", "in", "▁in"]
    letters = [*"▁abcdefghijklmnopqrstuvwxyz"]
    tokens = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(words))] + [-100.0] * len(letters)
    types = [3, 3, 2] + [6] * 256 + [1] * (len(words) + len(letters))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
    }


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(sentencepiece):
    rebuilt, _ = build(sentencepiece)
    assert rebuilt.encode("the cat").tokens == ["<s>", "▁the", "▁cat"]
    assert rebuilt.encode("é").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    for text in ("the cat in the hat", "naïve 東京 12"):
        assert rebuilt.decode(rebuilt.encode(text).ids) == text


def test_sentencepiece_without_a_space_before_the_text(sentencepiece):
    rebuilt, _ = build(sentencepiece | {"tokenizer.ggml.add_space_prefix": False})
    assert rebuilt.encode("cat").tokens == ["<s>", "c", "at"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer.ggml.pre", "qwen2"),
        ("tokenizer.ggml.model", "bert"),
        ("tokenizer.ggml.tokens", None),
        ("tokenizer.ggml.tokens", ["a", "a"]),
        ("tokenizer.ggml.token_type", [1]),
        ("tokenizer.ggml.merges", []),
        ("tokenizer.ggml.merges", ["nospace"]),
    ],
)
def test_other_tokenizers_are_refused(metadata, key, value):
    metadata[key] = value
    size = len(metadata["tokenizer.ggml.tokens"] or [1])
    with pytest.raises(ConfigError, match=r"m\.gguf"):
        build_tokenizer(metadata, config(size), source="m.gguf")


def test_merges_of_unknown_tokens_are_refused(metadata):
    metadata["tokenizer.ggml.merges"] += ["qqq zzz"]
    with pytest.raises(ConfigError, match="do not fit"):
        build(metadata)


def test_sentencepiece_without_scores_is_refused(sentencepiece):
    del sentencepiece["tokenizer.ggml.scores"]
    with pytest.raises(ConfigError, match="scores"):
        build(sentencepiece)
