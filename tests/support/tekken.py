"""A real Tekken vocabulary, as mistral-common ships it, written as the tokenizer.json that Small-3.1 has on the Hub."""

import base64
import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from converters.tekken import last_merge, spelled
from elastic_jax.demo_model import PackagedModel, demo_model

TEKKEN = PackagedModel(
    package="mistral-common",
    version="1.13.1",
    path="mistral_common/data/tekken_240911.json",
    size=19_280_963,
    sha256="1948e2d48b0e7377f1bb5f1210f1ae5f984934e75713fc07e2452729b8365316",
)

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What the tokenizer.json of Small-3.1 carries by mistake."""


def fetch_tekken(cache: Path) -> Path:
    """The vocabulary, fetched once."""
    return demo_model(cache, TEKKEN)


def write_wrong_tokenizer(tekken: Path, folder: Path) -> None:
    """tokenizer.json with Tekken's vocabulary and Llama 3's pattern, and tekken.json beside it."""
    document: dict[str, Any] = json.loads(tekken.read_text("utf-8"))
    specials = document["config"]["default_num_special_tokens"]
    tokens = [
        base64.b64decode(entry["token_bytes"])
        for entry in document["vocab"][: document["config"]["default_vocab_size"] - specials]
    ]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<SPECIAL_{i}>" for i in range(5, specials))]
    vocabulary = {name: index for index, name in enumerate(names)}
    vocabulary |= {spelled(token): specials + rank for token, rank in ranks.items()}
    merges = [last_merge(token, ranks) for token in tokens if len(token) > 1]
    pairs = [(spelled(first), spelled(second)) for first, second in merges]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=True))
    backend.add_special_tokens(names)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (folder / "tekken.json").write_text(json.dumps({"config": document["config"]}))
