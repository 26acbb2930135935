"""Batches: every line is answered once, whatever the others are, across interruptions."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import CompiledTiny

from elastic_jax import ElasticMistral
from elastic_jax.batch_requests import CHAT, TEXT
from elastic_jax.batch_run import lines, rereadable, run_batch
from elastic_jax.errors import RequestError


@pytest.fixture(scope="module")
def model(compiled_tiny: Callable[..., CompiledTiny]) -> ElasticMistral:
    return ElasticMistral.load(compiled_tiny("S", "bfloat16").checkpoint.path, "S", say=lambda _: None)


def line(name: Any, url: str = TEXT, **body: Any) -> dict[str, Any]:
    source = {"prompt": f"text {name}"} if url == TEXT else {"messages": [{"role": "user", "content": f"{name}"}]}
    return {"custom_id": name, "method": "POST", "url": url, "body": {**source, "max_tokens": 4, "seed": 1, **body}}


GOOD = [line(f"good{i}", CHAT if i % 2 else TEXT, n=1 + i % 2) for i in range(9)]
BAD: list[bytes] = [
    b"not json",
    b"\xff\xfe",
    b"[" * 100_000,
    b"[1]",
    *(
        json.dumps(bad).encode()
        for bad in [
            {},
            line(7),
            line("get") | {"method": "GET"},
            line("url") | {"url": "/v1/embeddings"},
            line("extra") | {"priority": 1},
            line("body") | {"body": "text"},
            line("empty", prompt=[]),
            line("tokens", prompt=[1, 10**9]),
            line("prompts", prompt=["a", "b"]),
            line("messages", CHAT, messages=[1, 2]),
            line("nobody", CHAT, messages=[]),
            line("role", CHAT, messages=[{"content": "x"}]),
            line("unknown", tool_choice="auto"),
            line("stream", stream=True),
            line("hot", temperature="hot"),
            line("long", max_tokens=10**6),
            line("none", max_tokens=0),
            line("many", n=10**9),
            line("stop", stop=[1]),
            line("bias", logit_bias={"x": 1}),
            line("seed", seed=-1),
            line("half", prompt="\ud800"),
            line("both", max_completion_tokens=3),
            line("good0"),
        ]
    ),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    good = [json.dumps(one).encode() for one in GOOD]
    path.write_bytes(b"\n".join([*good[:4], *BAD, b"", *good[4:]]))
    return path


def read(out: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(answer) for answer in out.read_text().splitlines()]
    assert len({answer["id"] for answer in found}) == len(found)
    return {answer["id"]: answer for answer in found}


def texts(answers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        name: answer["error"] or [choice | {} for choice in answer["response"]["body"]["choices"]]
        for name, answer in answers.items()
    }


def run(model: ElasticMistral, source: Path, out: Path, stop: threading.Event | None = None, after: int = 0) -> Any:
    stop = stop or threading.Event()

    def progress(result: Any) -> None:
        if after and result.answered >= after:
            stop.set()

    return run_batch(model, source, out, stop=stop, progress=progress)


def test_bad_lines_stop_nothing_and_every_line_has_one_answer(model: ElasticMistral, source: Path) -> None:
    out = source.with_name("out.jsonl")
    result = run(model, source, out)
    assert (result.answered, result.failed) == (len(GOOD), len(BAD))
    answers = read(out)
    assert len(answers) == len(GOOD) + len(BAD)
    by_name = {a["custom_id"]: a for a in answers.values() if a["error"] is None}
    assert set(by_name) == {one["custom_id"] for one in GOOD}
    chat = by_name["good1"]["response"]["body"]
    assert chat["object"] == "chat.completion"
    assert [choice["index"] for choice in chat["choices"]] == [0, 1]
    assert chat["choices"][0]["message"]["role"] == "assistant"
    assert by_name["good0"]["response"]["body"]["choices"][0]["text"] is not None
    for answer in answers.values():
        assert (answer["error"] is None) != (answer["response"] is None)
        assert answer["error"] is None or answer["error"]["code"] == "invalid_request"


def test_an_interrupted_run_is_continued(model: ElasticMistral, source: Path) -> None:
    whole, out = source.with_name("whole.jsonl"), source.with_name("out.jsonl")
    run(model, source, whole)
    first = run(model, source, out, after=1)
    assert 1 <= first.answered < len(GOOD)
    with out.open("ab") as file:
        file.write(b'{"id": "batch_req_9", "cust')  # killed in the middle of a line
    second = run(model, source, out)
    assert second.done == first.answered + first.failed
    assert texts(read(out)) == texts(read(whole))
    third = run(model, source, out)
    assert (third.answered, third.failed, third.done) == (0, 0, len(GOOD) + len(BAD))


@pytest.mark.parametrize("text", ["precious\n", '{"id": "batch_req_1", "custom_id": "other"}\n', '{"id": 3}\n'])
def test_what_is_no_output_of_the_batch_is_left_alone(model: ElasticMistral, source: Path, text: str) -> None:
    out = source.with_name("out.jsonl")
    out.write_text(text)
    with pytest.raises(RequestError, match="name another file"):
        run(model, source, out)
    assert out.read_text() == text


def test_a_pipe_can_be_read_twice_too(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"one\n\ntwo\n",))
    writer.start()
    with rereadable(pipe) as copy:
        assert list(lines(copy)) == list(lines(copy)) == [(1, b"one\n"), (3, b"two\n")]
    writer.join(60)
    assert not copy.exists()
    file = tmp_path / "file"
    file.write_bytes(b"one\n")
    with rereadable(file) as same:
        assert same == file
