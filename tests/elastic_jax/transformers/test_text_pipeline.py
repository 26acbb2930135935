"""The pipeline against transformers' own (tests/fixtures/README.md), and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TextStreamer

from elastic_jax.errors import ConfigError, RequestError
from elastic_jax.transformers import AutoTokenizer, ElasticForCausalLM, TextGenerationPipeline, pipeline

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
REFERENCE = json.loads((FIXTURES / "dropin_reference.json").read_text("utf-8"))["models"]
CASES = [(name, index) for name in REFERENCE for index in range(len(REFERENCE[name]["pipeline"]))]
CHAT = [{"role": "user", "content": "Hello"}]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def pipe_of(model_of: Callable[[str], ElasticForCausalLM]) -> Callable[[str], TextGenerationPipeline]:
    def make(name: str) -> TextGenerationPipeline:
        model = model_of(name)
        tokenizer = AutoTokenizer.from_pretrained(model.elastic.checkpoint.path)
        tokenizer.pad_token = tokenizer.eos_token
        return pipeline("text-generation", model=model, tokenizer=tokenizer)

    return make


@pytest.fixture
def pipe(pipe_of: Callable[[str], TextGenerationPipeline]) -> TextGenerationPipeline:
    return pipe_of("tiny_mistral")


@pytest.mark.parametrize(("name", "index"), CASES, ids=str)
def test_it_gives_what_transformers_gives(
    pipe_of: Callable[[str], TextGenerationPipeline], name: str, index: int
) -> None:
    case = REFERENCE[name]["pipeline"][index]
    assert pipe_of(name)(case["inputs"], **case["arguments"]) == case["outputs"], case["name"]


def test_options_of_the_pipeline_serve_every_call_and_those_of_a_call_go_before(model: ElasticForCausalLM) -> None:
    pipe = pipeline(model=model, return_full_text=False, **GREEDY)
    short = pipe("Hello", max_new_tokens=2)[0]["generated_text"]
    long = pipe("Hello")[0]["generated_text"]
    assert long.startswith(short)
    assert len(long) > len(short)
    assert pipe("Hello", return_full_text=True)[0]["generated_text"] == "Hello" + long


def test_a_generator_gives_an_iterator(pipe: TextGenerationPipeline) -> None:
    texts = ["Hello", "you"]
    answers = pipe((text for text in texts), **GREEDY)
    assert next(answers) == pipe("Hello", **GREEDY)
    assert list(answers) == [pipe("you", **GREEDY)]


def test_a_streamer_is_given_one_answer_after_the_other(
    pipe: TextGenerationPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["Hello", "you"]
    expected = pipe(texts, **GREEDY, return_full_text=False)
    streamer = TextStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True)
    assert pipe(texts, **GREEDY, return_full_text=False, streamer=streamer) == expected
    assert capsys.readouterr().out == "".join(f"{answer[0]['generated_text']}\n" for answer in expected)
    for wrong, words in (({"num_return_sequences": 2}, "one answer a prompt"), ({"streamer": 5}, "put and end")):
        with pytest.raises(RequestError, match=words):
            pipe("Hello", max_new_tokens=2, **{"streamer": streamer, **wrong})


def test_it_samples_256_tokens_by_default_and_a_seed_repeats_them(pipe: TextGenerationPipeline) -> None:
    prompt = {"return_tensors": True, "max_length": 40}
    first = pipe("Hello", seed=3, **prompt)
    assert first == pipe("Hello", seed=3, **prompt)
    assert first != pipe("Hello", seed=4, **prompt)
    with pytest.raises(RequestError, match="256 new ones need a context of"):
        pipe("Hello")  # 256 do not fit into this model's 256 positions beside a prompt


def test_total_lengths_are_each_prompts_own(pipe: TextGenerationPipeline) -> None:
    texts = ["Hello", "The quick brown fox"]
    options = {"do_sample": False, "max_length": 24, "return_tensors": True}
    together = pipe(texts, **options)
    assert together == [pipe(text, **options) for text in texts]
    assert [len(answers[0]["generated_token_ids"]) for answers in together] == [24, 24]


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (7, {}, "takes a text, a chat, or a list of them; found int"),
        ([], {}, "an empty list"),
        ([{"role": "user"}], {}, "messages with role and content"),
        (["Hello", 3], {}, "found 3"),
        ("Hello", {"return_tensors": True, "return_text": True}, "exclude each other"),
        ("Hello", {"handle_long_generation": "hole"}, "handle_long_generation is not supported"),
        ("Hello", {"num_beams": 4}, "num_beams=4 is not supported"),
        ("Hello", {"colour": "red"}, "colour='red' is not supported"),
    ],
)
def test_what_is_wrong_is_said(
    pipe: TextGenerationPipeline, inputs: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        pipe(inputs, **options)


def test_what_cannot_be_made_is_said(model: ElasticForCausalLM) -> None:
    with pytest.raises(ConfigError, match='the one task is "text-generation"'):
        pipeline("image-classification", model=model)
    with pytest.raises(ConfigError, match="needs a model"):
        pipeline("text-generation")
    with pytest.raises(ConfigError, match="loaded already: mode"):
        pipeline(model=model, mode="S")
    with pytest.raises(ConfigError, match="loaded already: kv"):
        pipeline(model=model, kv="int8")
    with pytest.raises(RequestError, match="num_beams=2"):
        pipeline(model=model, num_beams=2)
