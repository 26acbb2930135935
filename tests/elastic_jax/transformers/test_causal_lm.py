"""The drop-in's model as a user meets it: arrays in and out, devices, sampling, streaming, and what it refuses."""

import re
import subprocess
import sys
import threading
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from elastic_jax import memory
from elastic_jax.errors import CheckpointError, ConfigError, ElasticError, RequestError
from elastic_jax.transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ElasticForCausalLM,
    GenerationConfig,
    TextIteratorStreamer,
    TextStreamer,
)
from elastic_jax.transformers.arrays import HostTensor

IDS = np.array([[1, 100, 53, 211]])


# -- arrays ------------------------------------------------------------------------------------------------------------


def test_arrays_come_back_as_what_they_came_as(model: ElasticForCausalLM) -> None:
    expected = model.generate(IDS, max_new_tokens=4)
    assert type(expected) is np.ndarray
    assert expected.dtype == IDS.dtype
    host = model.generate(IDS.view(HostTensor), max_new_tokens=4)
    assert type(host) is HostTensor
    array = model.generate(jax.device_put(IDS.astype(np.int32), jax.devices()[3]), max_new_tokens=4)
    assert isinstance(array, jax.Array)
    assert array.devices() == {jax.devices()[3]}
    for found in (host, array):
        assert np.asarray(found).tolist() == expected.tolist()
    assert isinstance(model(jax.device_put(IDS.astype(np.int32))).logits, jax.Array)


def test_torch_tensors_come_back_as_torch_tensors(model: ElasticForCausalLM) -> None:
    torch = pytest.importorskip("torch")
    ids = torch.tensor(IDS)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.int64
    assert found.tolist() == model.generate(IDS, max_new_tokens=4).tolist()
    assert isinstance(model(ids).logits, torch.Tensor)
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32


def test_inputs_may_have_either_name_and_none_begins_with_bos(model: ElasticForCausalLM) -> None:
    expected = model.generate(np.array([[1]]), max_new_tokens=4).tolist()
    assert model.generate(input_ids=np.array([[1]]), max_new_tokens=4).tolist() == expected
    assert model.generate(max_new_tokens=4).tolist() == expected


# -- generating --------------------------------------------------------------------------------------------------------


def test_equal_seeds_draw_equal_answers(model: ElasticForCausalLM) -> None:
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 12, "num_return_sequences": 3}
    first = model.generate(IDS, seed=5, **options)
    assert first.tolist() == model.generate(IDS, seed=5, **options).tolist()
    assert first.tolist() != model.generate(IDS, seed=6, **options).tolist()
    assert len({tuple(row) for row in first.tolist()}) == 3


def test_what_is_drawn_has_a_finite_score(model: ElasticForCausalLM) -> None:
    out = model.generate(
        np.repeat(IDS, 3, axis=0), do_sample=True, max_new_tokens=16, temperature=1.3, top_k=7, top_p=0.9,
        repetition_penalty=1.3, seed=1, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    for step, scores in enumerate(out.scores):
        chosen = out.sequences[:, IDS.shape[1] + step]
        assert np.isfinite(scores[np.arange(3), chosen]).all()
        assert (np.isfinite(scores).sum(axis=1) <= 7).all()


def test_parameters_come_from_the_call_then_its_config_then_the_models(model: ElasticForCausalLM) -> None:
    own = model.generation_config
    try:
        model.generation_config = GenerationConfig(max_new_tokens=3, eos_token_id=2)
        assert model.generate(IDS).shape == (1, 7)
        assert model.generate(IDS, GenerationConfig(max_new_tokens=5)).shape == (1, 9)
        assert model.generate(IDS, GenerationConfig(max_new_tokens=5), max_new_tokens=2).shape == (1, 6)
    finally:
        model.generation_config = own


def test_the_default_length_is_said(model: ElasticForCausalLM) -> None:
    with pytest.warns(UserWarning, match="20 tokens"):
        assert model.generate(IDS).shape == (1, 24)


def test_text_streams_as_it_comes(model: ElasticForCausalLM, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model.elastic.checkpoint.path)
    out = model.generate(IDS, max_new_tokens=12, streamer=TextStreamer(tokenizer, skip_prompt=True))
    expected = tokenizer.decode(out[0, 4:])
    assert capsys.readouterr().out == expected + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {"input_ids": IDS, "max_new_tokens": 12, "streamer": streamer}
    thread = threading.Thread(target=model.generate, kwargs=options)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == expected
    assert len(pieces) > 1


def test_a_streamer_is_ended_when_generating_fails(model: ElasticForCausalLM) -> None:
    ended = []

    class Bad:
        def put(self, value: np.ndarray) -> None:
            if value.ndim == 1:
                raise OSError("gone")

        def end(self) -> None:
            ended.append(True)

    with pytest.raises(OSError, match="gone"):
        model.generate(IDS, max_new_tokens=12, streamer=Bad())
    assert ended
    engine = model.elastic.engine
    while engine.busy:
        engine.step()
    assert engine.pages.free == engine.pages.pages


def test_logits_of_a_long_prompt_are_those_its_tokens_were_chosen_from(model: ElasticForCausalLM) -> None:
    prompt = np.random.default_rng(0).integers(3, 320, (1, 150))
    out = model.generate(prompt, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    logits = model(out.sequences[:, :-1]).logits[0]
    for step, expected in enumerate(out.logits):
        np.testing.assert_allclose(logits[149 + step], expected[0], atol=1e-4)


def test_logits_wait_for_room_and_leave_none_behind(model: ElasticForCausalLM) -> None:
    engine = model.elastic.engine
    expected = model(IDS).logits
    stream = model.elastic.generate([[5, 6]] * 6, max_new_tokens=20, ignore_end=True, stream=True)
    next(stream)  # every row is taken, and two prompts wait
    np.testing.assert_allclose(model(IDS).logits, expected, atol=1e-4)
    answers = [piece.generation for piece in stream if piece.generation is not None]
    alone = model.elastic.generate([5, 6], max_new_tokens=20, ignore_end=True)
    assert {answer.token_ids for answer in answers} == {alone.token_ids}
    assert len(answers) == 6
    while engine.busy:
        engine.step()
    assert engine.pages.free == engine.pages.pages


FRESH = """
import sys
import elastic_jax.transformers as dropin
assert not {"jax", "torch", "transformers"} & sys.modules.keys(), "importing the package imports too much"
from aot_cache.guard import CompileCounter, forbid_compilation
forbid_compilation()
import jax
import numpy as np
with CompileCounter() as counter:
    model = dropin.AutoModelForCausalLM.from_pretrained(sys.argv[1], mode="XL", dtype="float32", compile="never")
    ids = jax.device_put(np.array([[1, 100, 53]], np.int32))
    out = model.generate(ids, max_new_tokens=5, min_new_tokens=2, repetition_penalty=1.1, return_dict_in_generate=True,
                         output_scores=True)
    logits = model(ids).logits
print(out.sequences.shape, logits.shape, counter.count())
"""


def test_nothing_is_traced_or_compiled_in_a_fresh_process(model: ElasticForCausalLM) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(model.elastic.checkpoint.path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(1, 8) (1, 3, 320) 0"


# -- what it is --------------------------------------------------------------------------------------------------------


def test_it_says_what_it_is(model: ElasticForCausalLM) -> None:
    assert model.eval() is model
    assert model.config.vocab_size == 320
    assert model.config.num_key_value_heads == 2
    assert model.generation_config.eos_token_id == 2
    assert model.mode == "XL"
    assert model.can_generate()
    if "torch" not in sys.modules:
        assert str(model.device) == "cpu"
        assert (model.device.type, model.device.index) == ("cpu", None)
        assert model.dtype == np.float32


def test_it_goes_where_it_is_and_nowhere_else(model: ElasticForCausalLM) -> None:
    for place in ("cpu", jax.devices()[0], np.float32, "float32", None):
        assert model.to(place) is model
    assert model.cpu() is model
    assert model.train(False) is model
    for place, message in (
        ("cuda", "device cuda was asked for, and JAX has none"),
        ("cpu:1", "the model is on cpu, and was compiled for it"),
        ("cpu:99", "JAX sees"),
        ("tpu", "device 'tpu' is unknown"),
        (ml_dtypes.bfloat16, "computes in float32"),
        ("float16", "not supported"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            model.to(place)
    with pytest.raises(ConfigError, match="cannot be trained"):
        model.train()


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "num_beams=4 is not supported"),
        ({"logits_processor": [max]}, "logits_processor=.* is not supported"),
        ({"stopping_criteria": [max]}, "stopping_criteria=.* is not supported"),
        ({"assistant_model": object()}, "assistant_model=.* is not supported"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2 is not supported"),
        ({"output_attentions": True}, "output_attentions=True is not supported"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5 is not supported"),
        ({"max_tokens": 3}, "max_tokens=3 is not supported"),
        ({"num_return_sequences": 2}, "without do_sample=True would give 2 times"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be above 0"),
        ({"do_sample": True, "top_p": 1.5}, r"top_p must be in \(0, 1\]"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, found 0"),
        ({"max_length": 3, "max_new_tokens": None}, "4 tokens, padding included, and max_length is 3"),
        ({"do_sample": True, "num_return_sequences": 10**9}, "1000000000 answers to one prompt .* at most 4096"),
        ({"max_new_tokens": 5000}, "5000 new ones need a context of 5004"),
        ({"repetition_penalty": "high"}, "repetition_penalty must be a number"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id must be a token id"),
        ({"pad_token_id": "</s>"}, "pad_token_id must be a token id"),
        ({"stop_strings": [""]}, "at least one character"),
        ({"inputs": IDS, "input_ids": IDS}, "two names for one argument"),
        ({"inputs": [[1, 2]]}, "must be an array of NumPy, JAX or PyTorch, found list"),
        ({"inputs": IDS[0]}, r"must be integers \[batch, tokens\]"),
        ({"inputs": IDS * 1.0}, "must be integers"),
        ({"inputs": IDS[:, :0]}, "input_ids are empty"),
        ({"inputs": {"input_ids": IDS}}, r"generate\(\*\*inputs\)"),
        ({"inputs": np.array([[1, 9999]])}, "token 9999, outside the vocabulary of 320"),
        ({"inputs": IDS, "attention_mask": IDS[:, :2]}, "attention_mask has shape"),
        ({"inputs": IDS, "attention_mask": np.array([[1, 1, 1, 0]])}, "padding must be on the left"),
        ({"inputs": IDS, "attention_mask": IDS * 0}, "all padding"),
        ({"inputs": np.repeat(IDS, 2, 0), "streamer": object()}, "a streamer takes one answer, and 2"),
    ],
)
def test_what_generate_refuses_it_names(model: ElasticForCausalLM, options: dict[str, Any], message: str) -> None:
    given = {"max_new_tokens": 4, **({} if "inputs" in options else {"inputs": IDS}), **options}
    with pytest.raises(RequestError, match=message):
        model.generate(**given)


def test_logits_that_the_host_cannot_hold_are_refused(
    model: ElasticForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = np.repeat(IDS, 50, 0)
    needed = 4 * 50 * 4 * 320
    monkeypatch.setattr(memory, "_available_host_memory", lambda: needed - 1)
    with pytest.raises(RequestError, match=r"logits \[50, 4, 320\] take .* free: pass fewer or shorter prompts"):
        model(batch)
    with pytest.raises(RequestError, match=r"50 answers of up to 4 tokens over 320 take .* leave output_scores"):
        model.generate(batch, max_new_tokens=4, return_dict_in_generate=True, output_scores=True)
    assert model.generate(batch, max_new_tokens=4).shape == (50, 8)  # more than run together: the rest waits


def test_what_asks_for_nothing_is_accepted(model: ElasticForCausalLM) -> None:
    neutral = {
        "num_beams": 1,
        "use_cache": True,
        "output_attentions": False,
        "logits_processor": None,
        "typical_p": 1.0,
    }
    plain = model.generate(IDS, max_new_tokens=4)
    assert model.generate(IDS, max_new_tokens=4, **neutral).tolist() == plain.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": IDS}, "labels=.* is not supported"),
        ({"input_ids": None}, "needs input_ids"),
        ({"attention_mask": np.array([[1, 0, 1, 1]])}, "padding must be on the left"),
        ({"input_ids": np.ones((1, 300), int)}, "300 prompt tokens need a context of 300 tokens"),
    ],
)
def test_what_a_call_refuses_it_names(model: ElasticForCausalLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        model(**({"input_ids": IDS} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_8bit": True}, "load_in_8bit=True is not supported here: choose a mode instead"),
        ({"dtype": "float16"}, "dtype 'float16' is not supported"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "its old name"),
        ({"attn_implementation": "paged"}, "attn_implementation must be one of"),
        ({"device_map": {"a": 0, "b": 1}}, "the whole model runs on one device"),
        ({"device_map": "mps"}, "device 'mps' is unknown"),
        ({"compile": "maybe"}, 'must be "once" or "never"'),
        ({"device_map": "cuda:3"}, "device cuda:3 was asked for, and JAX has none: it sees cpu"),
        ({"device_map": 7}, "device cuda:7 was asked for"),
        ({"mode": "XXL"}, "XXL"),
        ({"mode": 0.5, "compile": "never"}, "0.5.*elastic-jax search"),
        ({"mode": "max-loss=1%", "compile": "never"}, "max-loss=1%.*elastic-jax search"),
        ({"kv": "int4"}, 'kv must be "full" or "int8"'),
        ({"kv": "int8", "mode": "XL", "dtype": "float32", "compile": "never"}, "--kv int8"),
        ({"mode": "M", "compile": "never"}, "no compiled executables"),
        ({"revision": "main"}, "no Hub id"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_what_loading_refuses_it_names(model: ElasticForCausalLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ElasticError, match=message):
        AutoModelForCausalLM.from_pretrained(model.elastic.checkpoint.path, **options)


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(CheckpointError, match="there is no file or folder nowhere"):
        AutoModelForCausalLM.from_pretrained("nowhere")
    with pytest.raises(TypeError, match="from_pretrained"):
        AutoModelForCausalLM()
