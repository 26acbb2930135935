"""Runs a file of OpenAI's batch format: answers are appended as they come, and a later run goes on where one ended.

An answer's `id` is `batch_req_<line>`, by which a later run knows what is done. Lines are answered at the same time as
far as the engine has rows, and written in the order in which they end.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from elastic_jax.batch_requests import BatchRequest, completion, custom_id_of, parse_request
from elastic_jax.elastic import ElasticMistral
from elastic_jax.errors import DeviceMemoryError, ElasticError, RequestError
from elastic_jax.generation import Generation
from elastic_jax.system_errors import about

_ID = "batch_req_"


@dataclasses.dataclass
class BatchResult:
    """What a run did.

    Attributes:
        done: lines that had been answered before.
        answered: lines answered now.
        failed: lines that cannot be answered; the output says why of each.
        new_tokens: tokens generated.
    """

    done: int = 0
    answered: int = 0
    failed: int = 0
    new_tokens: int = 0


class Stopped(Exception):
    """The run is to end: this line is left for the next."""


def read_done(source: Path, out: Path) -> set[int]:
    """Numbers of the lines that are answered in `out`; what an interruption left of a line is not counted.

    Raises:
        RequestError: `out` is no output of `source`.
        OSError: a file cannot be read.
    """
    if not out.exists():
        return set()
    names = {number: custom_id_of(line) for number, line in lines(source)}
    done = set()
    for line in out.read_bytes().split(b"\n")[:-1]:
        try:
            values = json.loads(line)
            number = int(values["id"].removeprefix(_ID))
            name = values["custom_id"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RequestError(f"{out} holds something else than answers of a batch: name another file") from None
        if number not in names or names[number] != name:
            raise RequestError(
                f"{out} holds the answers to another batch (line {number} there is {name!r}, and here "
                f"{names.get(number)!r}): name another file"
            )
        done.add(number)
    return done


@contextlib.contextmanager
def rereadable(source: Path) -> Iterator[Path]:
    """`source`, or a copy for the time being of what can be read only once, as a pipe can.

    Raises:
        OSError: it cannot be read, or not be copied.
    """
    if source.is_file():
        yield source
        return
    with tempfile.NamedTemporaryFile(prefix="elastic-jax-", suffix=".jsonl") as copy:
        with source.open("rb") as pipe:
            shutil.copyfileobj(pipe, copy)
        copy.flush()
        yield Path(copy.name)


def lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, and their numbers, from 1."""
    with source.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def run_batch(
    model: ElasticMistral, source: Path, out: Path, *, stop: threading.Event, progress: Callable[[BatchResult], None]
) -> BatchResult:
    """Answers every line that is not answered yet.

    Args:
        model: who answers.
        source: the requests.
        out: is appended to.
        stop: once set, answers under way are given up, and this returns.
        progress: is told after every line.

    Raises:
        RequestError: `out` is no output of `source`.
        OSError: a file cannot be read or written.
        DeviceMemoryError: the device ran out of memory. Lines that are not answered are left for a later run.
    """
    done = read_done(source, out)
    result = BatchResult(done=len(done))
    seen: set[str] = set()
    rows = model.engine.config.rows
    # Not buffered: what could not be written must not be tried again when the file is closed.
    with out.open("ab", buffering=0) as file, concurrent.futures.ThreadPoolExecutor(rows) as pool:
        _drop_partial_line(out, file)
        running: set[concurrent.futures.Future[dict[str, Any]]] = set()

        def write_some(least: int) -> None:
            while len(running) > least:
                ended, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in ended:
                    running.discard(future)
                    if not future.cancelled() and not isinstance(future.exception(), Stopped):
                        _write(file, out, future.result(), result)
                        progress(result)

        try:
            for number, line in lines(source):
                name = custom_id_of(line)
                twice = name is not None and name in seen
                seen |= {name} if name is not None else set()
                if number in done:
                    continue
                if stop.is_set():
                    break
                running.add(pool.submit(_answer_line, model, number, name, line, twice, stop))
                write_some(2 * rows)  # so that rows are never idle, and the file is not read whole
            write_some(0)
        except BaseException:
            stop.set()  # the pool waits for its threads
            if not os.fstat(file.fileno()).st_size:
                out.unlink(missing_ok=True)
            raise
    return result


def _drop_partial_line(out: Path, file: FileIO) -> None:
    """An interruption may have left the beginning of a line."""
    text = out.read_bytes()
    file.truncate(text.rfind(b"\n") + 1)


def _write(file: FileIO, out: Path, answer: dict[str, Any], result: BatchResult) -> None:
    """Appends a whole line, or nothing."""
    line = memoryview(json.dumps(answer).encode() + b"\n")
    size = os.fstat(file.fileno()).st_size
    try:
        with about(out):
            while line:
                line = line[file.write(line) :]
    except OSError:
        file.truncate(size)
        raise
    if answer["error"] is None:
        result.answered += 1
        result.new_tokens += answer["response"]["body"]["usage"]["completion_tokens"]
    else:
        result.failed += 1


def _answer_line(
    model: ElasticMistral, number: int, name: str | None, line: bytes, twice: bool, stop: threading.Event
) -> dict[str, Any]:
    answer: dict[str, Any] = {"id": f"{_ID}{number}", "custom_id": name, "response": None, "error": None}
    try:
        request = parse_request(line)
        if twice:
            raise RequestError(f"custom_id {name!r} was used by a line before")
        body = completion(request, _generate(model, request, stop), model.plan.name)
    except DeviceMemoryError:  # no fault of the line's: it is left for the next run
        raise
    except ElasticError as error:
        code = "invalid_request" if isinstance(error, RequestError) else "failed"
        return answer | {"error": {"code": code, "message": str(error)}}
    body = {"id": f"cmpl-{number}", **body}
    return answer | {"response": {"status_code": 200, "request_id": f"req-{number}", "body": body}}


def _generate(model: ElasticMistral, request: BatchRequest, stop: threading.Event) -> list[Generation]:
    answers: dict[int, Generation] = {}
    pieces = model.generate([request.prompt], stream=True, **request.arguments)
    try:
        for piece in pieces:
            if stop.is_set():
                raise Stopped
            if piece.generation is not None:
                answers[piece.choice] = piece.generation
    finally:
        pieces.close()
    return [answers[choice] for choice in sorted(answers)]
