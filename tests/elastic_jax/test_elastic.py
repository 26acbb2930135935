"""`ElasticMistral` as a user meets it, on tiny models in float32."""

import dataclasses
import gc
import json
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import CompiledTiny

from elastic_jax import ElasticMistral, Generation, Piece
from elastic_jax.errors import CheckpointError, ConfigError, ExecutableError, PlanError, RequestError

CHAT = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def compiled(compiled_tiny: Callable[..., CompiledTiny]) -> CompiledTiny:
    return compiled_tiny("XL", "float32")


@pytest.fixture(scope="module")
def model(compiled: CompiledTiny) -> ElasticMistral:
    return ElasticMistral.load(compiled.checkpoint.path, "XL", dtype="float32")


@pytest.fixture(autouse=True)
def nothing_is_left(model: ElasticMistral) -> Any:
    """After every test all pages are free and no answer runs."""
    yield
    engine = model.engine
    while engine.busy:  # the one step that is read late
        assert engine.step() == []
    assert engine.pages.free == engine.pages.pages
    assert sorted(engine._free_rows) == list(range(engine.config.rows))
    assert not model._delivery._inboxes


def generate(model: ElasticMistral, prompt: Any, **options: Any) -> Generation:
    answer = model.generate(prompt, **({"max_new_tokens": 8, "ignore_end": True} | options))
    assert isinstance(answer, Generation)
    return answer


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_a_text_its_ids_and_an_array_of_them_are_one_prompt(model: ElasticMistral) -> None:
    ids = model.tokenizer.encode("Hello you", add_special_tokens=True)
    answers = [generate(model, prompt) for prompt in ("Hello you", ids, tuple(ids), np.array(ids))]
    assert len({answer.token_ids for answer in answers}) == 1
    assert answers[0].prompt_tokens == len(ids)
    assert answers[0].text == str(answers[0]) == model.tokenizer.decode(answers[0].token_ids, True)


def test_a_chat_is_its_rendered_text(model: ElasticMistral) -> None:
    ids = model.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    assert generate(model, CHAT) == generate(model, ids)


def test_many_prompts_of_all_kinds_run_together_and_answer_in_order(model: ElasticMistral) -> None:
    prompts: list[Any] = ["Hello", [5, 6, 7], CHAT, np.array([9] * 70), "a", "b"]
    answers = model.generate(prompts, max_new_tokens=8, ignore_end=True)
    assert [answer.token_ids for answer in answers] == [generate(model, prompt).token_ids for prompt in prompts]
    assert isinstance(model.generate([[5, 6]], max_new_tokens=1), list)


def test_choices_stand_in_their_prompts_place(model: ElasticMistral) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "seed": 4, "ignore_end": True}
    one = model.generate("Hello", choices=3, **options)
    assert len({answer.token_ids for answer in one}) == 3
    assert one[0].token_ids == model.generate("Hello", **options).token_ids
    many = model.generate(["Hello", "you"], choices=2, **options)
    assert [len(answers) for answers in many] == [2, 2]
    assert [answer.token_ids for answer in many[0]] == [answer.token_ids for answer in one[:2]]


def test_prompts_of_one_call_draw_from_seeds_that_follow_each_other(model: ElasticMistral) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "ignore_end": True}
    many = model.generate(["Hello"] * 3, seed=2**64 - 1, **options)
    alone = [model.generate("Hello", seed=seed, **options) for seed in (2**64 - 1, 0, 1)]
    assert [answer.token_ids for answer in many] == [answer.token_ids for answer in alone]
    assert len({answer.token_ids for answer in many}) == 3


# -- how answers end ---------------------------------------------------------------------------------------------------


def test_an_answer_ends_at_its_length(model: ElasticMistral) -> None:
    answer = generate(model, "Hello", max_new_tokens=1)
    assert len(answer.token_ids) == len(answer.log_probabilities) == 1
    assert answer.finish_reason == "length"


def test_an_answer_ends_at_the_models_end_token_unless_told_otherwise(model: ElasticMistral) -> None:
    (end,) = model.checkpoint.config.eos_token_ids
    options: dict[str, Any] = {"max_new_tokens": 6, "logit_bias": {end: 1000.0}}
    answer = model.generate("Hello", **options)
    assert (answer.token_ids, answer.text, answer.finish_reason, answer.stop) == ((end,), "", "stop", None)
    assert model.generate("Hello", ignore_end=True, **options).token_ids == (end,) * 6


def test_the_whole_context_is_used_and_not_more(model: ElasticMistral) -> None:
    longest = model.engine.limits.max_context
    answer = model.generate([5] * (longest - 30), ignore_end=True)
    assert len(answer.token_ids) == 30
    assert len(generate(model, [5] * (longest - 1), max_new_tokens=1).token_ids) == 1
    assert len(model.generate([5], max_new_tokens=longest - 1, ignore_end=True).token_ids) == longest - 1
    for length, new in ((longest, 1), (longest, None), (longest - 1, 2), (1, longest)):
        with pytest.raises(RequestError, match=f"the longest here is {longest}"):
            model.generate([5] * length, max_new_tokens=new)


def test_256_tokens_are_the_default(model: ElasticMistral) -> None:
    assert model.engine.limits.max_context == 256
    assert len(model.generate([5], ignore_end=True).token_ids) == 255


@dataclasses.dataclass(frozen=True)
class Letters:
    """A grammar of some letters and spaces, so that a random model says something like text."""

    tokens: list[int]

    def allowed(self, output: Sequence[int]) -> np.ndarray:
        del output
        bits = np.zeros(320, np.uint8)
        bits[self.tokens] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)


def test_stop_strings_end_an_answer_wherever_tokens_divide_them(model: ElasticMistral) -> None:
    letters = Letters(model.tokenizer.encode("the quick brown fox jumps over it", add_special_tokens=False))
    options: dict[str, Any] = {"max_new_tokens": 24, "grammar": letters, "temperature": 1.0, "seed": 3}
    free = generate(model, "Hello", **options).text
    assert len(set(free)) > 8
    for start in range(0, len(free) - 3, 3):
        stop = free[start : start + 3]
        answer = generate(model, "Hello", stop=stop, **options)
        assert answer.text == free[: free.index(stop)]
        assert (answer.finish_reason, answer.stop) == ("stop", stop)
        pieces = model.generate("Hello", stop=stop, stream=True, ignore_end=True, **options)
        assert "".join(map(str, pieces)) == answer.text
    assert generate(model, "Hello", stop=["never said", free[9:12]], **options).stop == free[9:12]
    assert generate(model, "Hello", stop="never said", **options).text == free


# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_stream_gives_what_the_answer_is(model: ElasticMistral) -> None:
    prompts = ["Hello", [5, 6, 7], CHAT]
    options: dict[str, Any] = {"max_new_tokens": 12, "choices": 2, "temperature": 0.7, "seed": 1, "ignore_end": True}
    whole = model.generate(prompts, **options)
    pieces = list(model.generate(prompts, stream=True, **options))
    assert all(isinstance(piece, Piece) for piece in pieces)
    for index in range(3):
        for choice in range(2):
            own = [piece for piece in pieces if (piece.prompt, piece.choice) == (index, choice)]
            assert "".join(piece.text for piece in own) == whole[index][choice].text
            assert sum((piece.token_ids for piece in own), ()) == whole[index][choice].token_ids
            assert own[-1].generation == whole[index][choice]
            assert [piece.generation for piece in own[:-1]] == [None] * (len(own) - 1)


def test_pieces_come_while_the_answer_is_made(model: ElasticMistral) -> None:
    stream = model.generate([5], max_new_tokens=100, ignore_end=True, stream=True)
    next(stream)
    assert model.engine.busy
    assert sum(1 for _ in stream) == 99


def test_an_abandoned_stream_leaves_nothing_running(model: ElasticMistral) -> None:
    pages = model.engine.pages
    for leave in (lambda stream: stream.close(), lambda _: None):
        stream = model.generate([[5] * 40] * 6, max_new_tokens=100, choices=2, ignore_end=True, stream=True)
        next(stream)
        assert pages.free < pages.pages
        leave(stream)
        del stream
        gc.collect()
        assert pages.free == pages.pages
    never_started = model.generate([5], stream=True)
    del never_started
    assert pages.free == pages.pages


def test_streams_beside_each_other_and_a_score_in_between(model: ElasticMistral) -> None:
    """Whoever reads makes the engine step for all; nobody's tokens may get lost."""
    expected = [generate(model, prompt, max_new_tokens=20).token_ids for prompt in ([5, 6], [7], "Hello")]
    score = model.score([("Hello", " you")])
    streams = [model.generate(p, max_new_tokens=20, ignore_end=True, stream=True) for p in ([5, 6], [7])]
    found: list[list[int]] = [[], []]
    for first, second in zip(*streams, strict=True):
        found[0] += first.token_ids
        found[1] += second.token_ids
        if len(found[0]) in (1, 7):
            assert model.score([("Hello", " you")]) == score
            assert generate(model, "Hello", max_new_tokens=20).token_ids == expected[2]
    assert [tuple(tokens) for tokens in found] == expected[:2]


def test_threads_share_a_model(model: ElasticMistral) -> None:
    prompts = [[5 + i, 6, 7 * i % 300] for i in range(8)]
    expected = [generate(model, prompt, max_new_tokens=16).token_ids for prompt in prompts]
    score = model.score([([5, 6], [7, 8])])
    found: dict[int, Any] = {}

    def work(i: int) -> None:
        tokens = generate(model, prompts[i], max_new_tokens=16).token_ids
        found[i] = (tokens, model.score([([5, 6], [7, 8])]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [found[i][0] for i in range(8)] == expected
    for i in range(8):
        assert found[i][1][0].log_probability == pytest.approx(score[0].log_probability, abs=1e-4)


# -- what is refused, before anything runs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the list is empty"),
        ([[]], {}, "the prompt is empty"),
        (np.array([], np.int32), {}, "the prompt is empty"),
        ([320], {}, "token 320, outside the vocabulary of 320"),
        ([-1], {}, "token -1"),
        (b"abc", {}, "found bytes"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ("a", {"temperature": -1.0}, "temperature must be"),
        ("a", {"top_p": 0.0}, "top_p must be"),
        ("a", {"seed": -1}, "seed must be"),
        ("a", {"seed": 2**64}, "seed must be"),
        ("a", {"stop": ""}, "a stop string is empty"),
        ("a", {"stop": ["x", ""]}, "a stop string is empty"),
        ("a", {"choices": 0}, "choices must be at least 1"),
        ("a", {"top_log_probabilities": 9}, "at most 8 were compiled"),
        ("a", {"logit_bias": {i: 1.0 for i in range(9)}}, "at most 8 were compiled"),
        ("a", {"logit_bias": {320: 1.0}}, "logit_bias names token 320"),
        ("a", {"logit_bias": {1: math.inf}}, "logit_bias of token 1"),
        (["fine", [320]], {}, "token 320"),
        ([{"role": "user"}], {}, "expected content"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_done_is_said_at_once(
    model: ElasticMistral, prompt: Any, options: dict[str, Any], message: str, stream: bool
) -> None:
    with pytest.raises(RequestError, match=message):
        model.generate(prompt, stream=stream, **options)
    assert not model.engine._waiting
    assert not model.engine._running


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1.5},
        {"max_new_tokens": 2.5},
        {"choices": "2"},
        {"temperature": "1"},
        {"stop": [3]},
        {"logit_bias": [1]},
    ],
)
def test_arguments_of_a_wrong_type_are_said_too(model: ElasticMistral, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="must be"):
        model.generate("a", **options)


def test_an_error_in_a_grammar_reaches_its_caller_and_no_one_else(model: ElasticMistral) -> None:
    class Broken:
        def allowed(self, output: Sequence[int]) -> Any:
            if len(output) == 2:
                raise ZeroDivisionError("in the grammar")
            return np.full(10, 0xFFFFFFFF, np.uint32)

    expected = generate(model, [5], max_new_tokens=12).token_ids
    beside = model.generate([5], max_new_tokens=12, ignore_end=True, stream=True)
    tokens = list(next(beside).token_ids)
    with pytest.raises(ZeroDivisionError, match="in the grammar"):
        generate(model, [[5], [6]], choices=2, grammar=Broken())
    tokens += [token for piece in beside for token in piece.token_ids]
    assert tuple(tokens) == expected


# -- scoring -----------------------------------------------------------------------------------------------------------


def test_scores_add_up_and_know_what_is_greedy(model: ElasticMistral) -> None:
    answer = generate(model, [5, 6, 7], max_new_tokens=6)
    greedy, other = model.score([([5, 6, 7], answer.token_ids), ([5, 6, 7], [9, 9])])
    assert greedy.is_greedy
    assert not other.is_greedy
    assert greedy.token_ids == answer.token_ids
    np.testing.assert_allclose(greedy.token_log_probabilities, answer.log_probabilities, atol=1e-4)
    assert greedy.log_probability == pytest.approx(sum(greedy.token_log_probabilities))
    assert len(other.token_log_probabilities) == 2


def test_a_text_is_scored_as_its_own_encoding(model: ElasticMistral) -> None:
    before, after = model.tokenizer.encode_pair("Hello you ", "there")
    by_text, by_ids = model.score([("Hello you ", "there"), (before, after)])
    assert by_text == by_ids
    assert model.score([]) == []


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([([1], [])], "one of continuation"),
        ([([], [1])], "at least one token of context"),
        ([("a", [1])], "two texts or two lists"),
        ([([1], [320])], "token 320"),
        ([([1] * 200, [1] * 57)], "257 tokens to score"),
        ([("a", " b"), ([1], [])], "one of continuation"),
    ],
)
def test_what_cannot_be_scored_is_refused(model: ElasticMistral, pairs: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        model.score(pairs)
    assert not model.engine._waiting


@pytest.mark.usefixtures("unchecked_types")
def test_a_pair_instead_of_pairs_is_refused(model: ElasticMistral) -> None:
    with pytest.raises(RequestError, match="must be a pair"):
        model.score(("context", "continuation"))  # pyright: ignore[reportArgumentType]


# -- loading and telling -----------------------------------------------------------------------------------------------


def test_info_says_what_is_loaded(model: ElasticMistral, compiled: CompiledTiny) -> None:
    info = json.loads(json.dumps(model.info()))
    assert info["mode"] == "XL"
    assert info["provisional"] is True
    assert "not been measured" in info["note"]
    assert info["choices"] == {"bf16": 13}
    assert set(info["groups"].values()) == {"bf16"}
    assert info["dtype"] == "float32"
    parts = info["bytes"]
    assert parts["total"] == parts["weights"] + parts["kv"] + parts["rows"] + parts["workspace"]
    assert parts["kv"] == 1024 * parts["kv_token"]
    assert sorted(compiled.units) == info["executables"]["units"]
    assert Path(info["executables"]["folder"]).is_dir()
    assert (info["kv_capacity_tokens"], info["rows"], info["max_context"]) == (1024, 4, 256)
    assert (info["attention"], info["dot"]) == (compiled.step.attention, compiled.step.dot)


def test_max_context_can_be_shortened(compiled: CompiledTiny) -> None:
    short = ElasticMistral.load(compiled.checkpoint.path, "XL", dtype="float32", max_context=10)
    assert short.info()["max_context"] == 10
    assert len(short.generate([5] * 4, ignore_end=True).token_ids) == 6
    with pytest.raises(RequestError, match="the longest here is 10"):
        short.generate([5] * 10)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "XXL"}, PlanError, r"has no mode 'XXL'; modes there: \['L', 'M', 'S', 'XL'\]"),
        ({"dtype": "float16"}, ConfigError, 'dtype must be "bfloat16" or "float32", found \'float16\''),
        ({"on_missing": "ignore"}, ConfigError, 'on_missing must be "error" or "compile"'),
        ({"max_context": 257}, RequestError, r"up to 256 tokens\. Compile for more with: .* --max-context 257$"),
        ({"max_context": 513}, RequestError, "max_context 513 is more than the 512 positions of the model"),
        ({"max_context": 0}, RequestError, "max_context must be at least 1, found 0"),
        ({"max_context": 1.5}, RequestError, "max_context must be an integer, found 1.5"),
        ({"kv_slots": "5"}, RequestError, "kv_slots must be an integer, found '5'"),
        ({"kv_slots": 5000}, ExecutableError, r"pools compiled: \[1024\]. Compile with: .* --kv-slots 5000$"),
        ({"workers": 0}, RequestError, "workers must be at least 1, found 0"),
        ({"path": "/nowhere"}, CheckpointError, "no Elastic checkpoint /nowhere"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_a_load_that_cannot_work_says_why(
    compiled: CompiledTiny, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"path": compiled.checkpoint.path, "mode": "XL", "dtype": "float32"} | options
    with pytest.raises(error, match=message):
        ElasticMistral.load(**arguments)
