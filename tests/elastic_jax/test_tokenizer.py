"""Token ids, texts and conversations equal transformers'; folders that cannot be right are refused with the reason."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from elastic_jax.errors import RequestError, TokenizerError
from elastic_jax.mistral_pattern import TEKKEN_PATTERN
from elastic_jax.tokenizer import Tokenizer

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
TINY = ("tiny_mistral", "tiny_llama")
LLAMA3_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
USER = [{"role": "user", "content": "Hello"}]


def load_module(file: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(file.stem, file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def read(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    maker = load_module(FIXTURES / "make_smollm2_folder.py")
    folder = tmp_path_factory.mktemp("smollm2")
    maker.write_tokenizer(maker.read_fields(maker.GGUFReader(smollm2_gguf)), folder)
    return Tokenizer.load(folder)


def tiny(name: str) -> Tokenizer:
    return Tokenizer.load(FIXTURES / name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a tokenizer's files, to be changed."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(FIXTURES / "tiny_mistral" / name, tmp_path / name)
    return tmp_path


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def check_against_reference(tokenizer: Tokenizer, reference: dict[str, Any]) -> None:
    for case in reference["encodings"]:
        assert tokenizer.encode(case["text"], add_special_tokens=True) == case["ids"]
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids_without_special"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["decoded"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decoded_skip_special"]
        for skip, key in ((False, "decoded"), (True, "decoded_skip_special")):
            stream = tokenizer.detokenizer(skip_special_tokens=skip)
            assert stream.feed(case["ids"]) + stream.flush() == case[key]
    for case in reference["chats"]:
        arguments = (case["messages"], case["add_generation_prompt"])
        assert tokenizer.render_chat(*arguments) == case["text"]
        assert tokenizer.apply_chat_template(*arguments) == case["ids"]


@pytest.mark.parametrize("name", TINY)
def test_tiny_tokenizers_equal_transformers(name):
    check_against_reference(tiny(name), read("tiny_reference.json")["tokenizers"][name])


def test_smollm2_equals_transformers(smollm2):
    reference = read("smollm2_reference.json")
    check_against_reference(smollm2, reference["tokenizer"])
    for prompt in reference["prompts"]:
        assert smollm2.encode(prompt["rendered"], add_special_tokens=True) == prompt["ids"]
        assert smollm2.decode(prompt["greedy_ids"], skip_special_tokens=False) == prompt["greedy_text"]
    for pair in reference["scores"]:
        assert smollm2.encode_pair(pair["context"], pair["continuation"]) == (
            pair["context_ids"],
            pair["continuation_ids"],
        )
    assert smollm2.eos_token_ids == (reference["model"]["eos_token_id"],)
    assert (smollm2.bos_token_id, smollm2.pad_token_id, smollm2.vocab_size) == (1, 2, 49152)


@pytest.mark.parametrize(
    "changes",
    [
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_eos_token": True},
        {"bos_token": {"__type": "AddedToken", "content": "</s>", "special": True}},
        {"pad_token": "a"},
        {"chat_template": "{{ bos_token }}{{ unk_token }}{{ pad_token }}{{ messages | tojson }}{{ tools }}"},
    ],
)
def test_configurations_equal_transformers(folder, changes):
    from transformers import AutoTokenizer

    edit(folder / "tokenizer_config.json", **changes)
    if "chat_template" in changes:
        (folder / "chat_template.jinja").unlink()
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    for text in ("Hello a 12 <s> b", ""):
        assert ours.encode(text, add_special_tokens=True) == theirs(text)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
    messages = [{"role": "user", "content": "Is 1 < 2 & 'é'?"}]
    assert ours.render_chat(messages, True) == theirs.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    ids = [*range(0, 320, 7), 1, 2]
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.bos_token_id, ours.pad_token_id) == (theirs.bos_token_id, theirs.pad_token_id)


def test_template_features_equal_transformers():
    from transformers.utils.chat_template_utils import render_jinja_template

    from elastic_jax.chat_template import ChatTemplate

    source = """
    {%- set counter = namespace(value=0) %}
    {% for message in messages %}
        {%- if message.role == 'tool' %}{% continue %}{% endif %}
        {%- set counter.value = counter.value + 1 %}
    {{ message['content'] | trim }}
        {% generation %}<{{ counter.value }}>{% endgeneration %}
    {%- endfor %}
    {{ tools | tojson(indent=2) }}{{ tools is none }}{{ undefined_name }}{{ strftime_now('%Y') | length }}
    {% if add_generation_prompt %}{{ dict(a=1) }}{% endif %}
    """
    messages = [
        {"role": "user", "content": " <é> "},
        {"role": "tool", "content": "x"},
        {"role": "user", "content": "b"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": "<'é'>"}}}]
    for given_tools in (None, tools):
        (expected,), _ = render_jinja_template(
            [messages], tools=given_tools, chat_template=source, add_generation_prompt=True
        )
        assert ChatTemplate(source, "test", {}).render(messages, True, given_tools) == expected


@pytest.mark.parametrize("name", TINY)
@given(context=st.text(alphabet="ab 1\n日"), continuation=st.text(alphabet="ab 1\n日"))
def test_pairs_together_are_the_encoding_of_the_text(name, context, continuation):
    tokenizer = tiny(name)
    own = tokenizer.encode(context.rstrip(), add_special_tokens=True)
    whole = tokenizer.encode(context + continuation, add_special_tokens=True)
    if len(whole) <= len(own):
        with pytest.raises(RequestError, match="no token of its own"):
            tokenizer.encode_pair(context, continuation)
        return
    context_ids, continuation_ids = tokenizer.encode_pair(context, continuation)
    assert context_ids + continuation_ids == whole
    assert len(context_ids) == len(own)


def test_trailing_space_moves_to_the_continuation():
    tokenizer = tiny("tiny_mistral")
    assert tokenizer.encode_pair("the ", "cat") == tokenizer.encode_pair("the", " cat")


def test_empty_context_begins_with_the_first_token_there_is(folder):
    edit(folder / "tokenizer.json", post_processor=None)
    assert Tokenizer.load(folder).encode_pair("", "a")[0] == [1]
    assert Tokenizer.load(folder).encode_pair("a", "b")[0] == Tokenizer.load(folder).encode(
        "a", add_special_tokens=False
    )
    edit(folder / "tokenizer_config.json", bos_token=None)
    assert Tokenizer.load(folder).encode_pair(" ", "a")[0] == [2]
    edit(folder / "tokenizer_config.json", eos_token=None)
    (folder / "generation_config.json").unlink()
    with pytest.raises(RequestError, match="no token to begin with"):
        Tokenizer.load(folder).encode_pair("", "a")


def test_end_of_sequence_mark_is_no_part_of_a_pair(folder):
    expected = Tokenizer.load(folder).encode_pair("the", " cat")
    marks = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    edit(folder / "tokenizer.json", post_processor=json.loads(marks.__getstate__()))
    assert Tokenizer.load(folder).encode("the", add_special_tokens=True)[-1] == 2
    assert Tokenizer.load(folder).encode_pair("the", " cat") == expected


def test_eos_ids(folder):
    edit(folder / "generation_config.json", eos_token_id=[2, 7])
    assert Tokenizer.load(folder).eos_token_ids == (2, 7)
    (folder / "generation_config.json").unlink()
    assert Tokenizer.load(folder).eos_token_ids == (2,)
    edit(folder / "tokenizer_config.json", eos_token=None)
    assert Tokenizer.load(folder).eos_token_ids == ()


def test_special_ids():
    assert tiny("tiny_mistral").special_ids == frozenset(range(5))
    assert tiny("tiny_llama").special_ids == frozenset(range(3))


def test_template_is_found_in_every_place(folder):
    def rendered() -> str:
        return Tokenizer.load(folder).render_chat(USER, False)

    edit(folder / "tokenizer_config.json", chat_template="config")
    assert rendered() == "<s>[INST]Hello[/INST]"
    (folder / "chat_template.jinja").unlink()
    assert rendered() == "config"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "named"}]
    edit(folder / "tokenizer_config.json", chat_template=named)
    assert rendered() == "named"
    edit(folder / "tokenizer_config.json", chat_template=None)
    (folder / "chat_template.json").write_text('{"chat_template": "processor"}')
    assert rendered() == "processor"
    (folder / "chat_template.json").unlink()
    with pytest.raises(TokenizerError, match="no chat template"):
        rendered()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ([{"content": "Hello"}], "message 0: expected a role"),
        ([USER[0], {"role": "assistant"}], r"message 1 \(assistant\): expected content"),
        ([{"role": "user", "content": ["Hello"]}], "expected content: text, or parts"),
        ([{"role": "user", "content": b"Hello"}], "expected content"),
        ([{"role": "pirate", "content": "Hello"}], "unknown role pirate"),
        ([{"role": "user", "content": "a", "when": {1, 2}}], "plain JSON"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "refuses these messages"),
    ],
)
def test_malformed_conversations_are_refused(messages, message):
    with pytest.raises(RequestError, match=message):
        tiny("tiny_mistral").render_chat(messages, True)


def test_message_that_is_no_mapping_is_refused():
    """In a process of its own, since here the type checker of the tests would refuse it first."""
    code = """
from elastic_jax.chat_template import ChatTemplate
try:
    ChatTemplate("", "test", {}).render(["Hello"], True)
except ValueError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "chat message 0: expected a mapping with role and content, found str"


def test_template_cannot_reach_out_of_its_sandbox(folder):
    (folder / "chat_template.jinja").write_text("{{ messages.__class__.__base__.__subclasses__() }}")
    with pytest.raises(RequestError, match="refuses"):
        Tokenizer.load(folder).render_chat(USER, True)


def tekken_like(folder: Path, pattern: str, special: str) -> None:
    """A tokenizer of single bytes whose tokens show how the pattern splits digits."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [f"{first}{second}" for first in "123456789" for second in "123456789"]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *pairs])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[(pair[0], pair[1]) for pair in pairs]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([special])
    backend.save(str(folder / "tokenizer.json"))


def number_of_tokens(folder: Path) -> int:
    return len(Tokenizer.load(folder).encode("a 1234", add_special_tokens=False))


def test_wrong_mistral_digits_are_refused_or_corrected(tmp_path):
    tekken_like(tmp_path, LLAMA3_PATTERN, "[INST]")
    with pytest.raises(TokenizerError, match="digits in threes"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"fix_mistral_regex": false}')
    kept = number_of_tokens(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"fix_mistral_regex": true}')
    corrected = number_of_tokens(tmp_path)
    assert (kept, corrected) == (5, 6)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tekken.json").write_text(json.dumps({"config": {"pattern": TEKKEN_PATTERN}}))
    assert number_of_tokens(tmp_path) == corrected


def test_digits_in_threes_are_right_for_others(tmp_path):
    tekken_like(tmp_path, LLAMA3_PATTERN, "<|begin_of_text|>")
    assert number_of_tokens(tmp_path) == 5


def test_corrected_pattern_equals_transformers(tmp_path):
    """transformers applies its own correction only to large vocabularies of checkpoints that say they are Mistral's."""
    from transformers import PreTrainedTokenizerFast

    tekken_like(tmp_path, LLAMA3_PATTERN, "[INST]")
    (tmp_path / "tokenizer_config.json").write_text('{"fix_mistral_regex": true}')
    (tmp_path / "config.json").write_text('{"model_type": "mistral3", "transformers_version": "4.50.0"}')
    theirs = PreTrainedTokenizerFast._patch_mistral_regex(
        tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
        str(tmp_path),
        is_local=True,
        fix_mistral_regex=True,
    )
    ours = Tokenizer.load(tmp_path)
    for case in read("smollm2_reference.json")["tokenizer"]["encodings"]:
        assert ours.encode(case["text"], add_special_tokens=False) == theirs.encode(case["text"]).ids


def test_missing_files_are_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"expected tokenizer\.json, found nothing"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"found tekken\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match="found no folder"):
        Tokenizer.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "cannot be read as a tokenizer"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: expected JSON"),
        ("generation_config.json", "[]", r"generation_config\.json: expected a JSON object"),
        ("tokenizer_config.json", '{"bos_token": "<none>"}', "lacks '<none>'.*bos_token"),
        ("chat_template.jinja", "{% if %}", "not valid Jinja"),
    ],
)
def test_malformed_files_are_refused(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(folder)


def test_other_models_are_refused(tmp_path):
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="expected a BPE model, found WordLevel"):
        Tokenizer.load(tmp_path)


def test_impossible_requests_are_refused():
    tokenizer = tiny("tiny_mistral")
    with pytest.raises(RequestError, match="lone surrogate at character 1"):
        tokenizer.encode("a\ud800", add_special_tokens=True)
    with pytest.raises(RequestError, match="found -3"):
        tokenizer.decode([5, -3], skip_special_tokens=True)


def test_truncation_and_padding_are_ignored(folder):
    expected = Tokenizer.load(folder).encode("the harbour", add_special_tokens=True)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    backend.save(str(folder / "tokenizer.json"))
    assert Tokenizer.load(folder).encode("the harbour", add_special_tokens=True) == expected
