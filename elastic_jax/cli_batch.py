"""The `batch` command."""

import dataclasses
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elastic_jax.cli_load import KvSlotsOption, MaxContextOption, OnMissingOption, TrustOption, load_model
from elastic_jax.cli_options import (
    CheckpointOrIdArgument,
    DtypeOption,
    JsonOption,
    KvOption,
    ModeOption,
    RevisionOption,
    TokenOption,
    note,
    print_value,
)
from elastic_jax.errors import RequestError

if TYPE_CHECKING:
    from elastic_jax.elastic import ElasticMistral


def batch(
    checkpoint: CheckpointOrIdArgument,
    source: Annotated[Path, typer.Argument(help="Requests in OpenAI's batch format; a pipe too.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The answers; continued if it is there.", show_default=False)],
    mode: ModeOption = "M",
    on_missing: OnMissingOption = "error",
    trust: TrustOption = False,
    dtype: DtypeOption = "bfloat16",
    kv: KvOption = "full",
    kv_slots: KvSlotsOption = None,
    max_context: MaxContextOption = None,
    revision: RevisionOption = None,
    token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a file of requests. The same command continues after an interruption; bad lines get an error each."""
    from elastic_jax.batch_run import read_done, rereadable

    if not source.exists() or source.is_dir():
        raise RequestError(f"there is no file {source}: give one with a request in OpenAI's batch format a line")
    if out.exists() and not out.is_file():
        raise RequestError(f"{out} is no file: answers go to one, so that a later run can continue it")
    if out.exists() and out.samefile(source):
        raise RequestError(f"{out} is the file of requests itself: name another for the answers")
    again = shlex.join(["elastic-jax", *sys.argv[1:]]) if source.is_file() else "the same command and requests"
    with rereadable(source) as requests:
        read_done(requests, out)  # what is refused is refused before anything is loaded
        model = load_model(
            checkpoint,
            mode,
            on_missing=on_missing,
            dtype=dtype,
            kv=kv,
            kv_slots=kv_slots,
            max_context=max_context,
            trust=trust,
            revision=revision,
            token=token,
            preload=True,
            as_json=as_json,
        )
        _answer(model, requests, out, again, as_json)


def _answer(model: "ElasticMistral", requests: Path, out: Path, again: str, as_json: bool) -> None:
    """Answers what is not answered yet, and tells; `again` is what continues after Ctrl-C."""
    from elastic_jax.batch_run import run_batch

    stop = threading.Event()
    previous = signal.signal(signal.SIGINT, lambda *_: stop.set())
    start = time.perf_counter()
    try:
        result = run_batch(
            model,
            requests,
            out,
            stop=stop,
            progress=lambda r: note(f"{r.done + r.answered + r.failed} lines, {r.failed} bad", as_json),
        )
    finally:
        signal.signal(signal.SIGINT, previous)
    seconds = time.perf_counter() - start
    values = dataclasses.asdict(result) | {"out": str(out), "interrupted": stop.is_set(), "seconds": round(seconds, 3)}
    print_value(
        values,
        as_json,
        lambda: (
            f"{out}: {result.answered} answered, {result.failed} bad, {result.done} were done before; "
            f"{result.new_tokens} tokens, {result.new_tokens / seconds:.1f} tok/s"
        ),
    )
    if stop.is_set():
        note(f"interrupted: continue with {again}", as_json)
        raise typer.Exit(130)
