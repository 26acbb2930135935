"""The `generate` command."""

import importlib
import json
import sys
from typing import Annotated

import typer

from elastic_jax.cli_load import (
    KvSlotsOption,
    MaxContextOption,
    MinPOption,
    OnMissingOption,
    RepetitionPenaltyOption,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    TrustOption,
    load_model,
)
from elastic_jax.cli_options import (
    CheckpointOrIdArgument,
    DtypeOption,
    JsonOption,
    KvOption,
    ModeOption,
    RevisionOption,
    TokenOption,
    note,
)
from elastic_jax.errors import RequestError
from elastic_jax.interrupts import interruptible


def generate(
    checkpoint: CheckpointOrIdArgument,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="The prompt; if none, standard input without its last newline."),
    ] = None,
    mode: ModeOption = "M",
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Most new tokens.")] = None,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    seed: SeedOption = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the answer; repeat for more.")] = None,
    on_missing: OnMissingOption = "error",
    trust: TrustOption = False,
    no_compile: Annotated[
        bool, typer.Option("--no-compile", help="Forbid tracing and compiling, and count it.")
    ] = False,
    dtype: DtypeOption = "bfloat16",
    kv: KvOption = "full",
    kv_slots: KvSlotsOption = None,
    max_context: MaxContextOption = None,
    revision: RevisionOption = None,
    token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt."""
    import time

    start = time.perf_counter()
    from aot_cache.guard import CompileCounter, forbid_compilation

    counter = CompileCounter()
    if no_compile:
        forbid_compilation()
    importlib.import_module("elastic_jax.elastic")  # timed apart from loading
    imported = time.perf_counter()
    text = prompt if prompt is not None else _read_standard_input()
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
        preload=False,  # one answer needs a few of them
        as_json=as_json,
    )
    loaded = time.perf_counter()
    pieces = model.generate(
        [{"role": "user", "content": text}] if chat else text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or [],
        stream=True,
    )
    first = finished = None
    with interruptible() as stopped:
        for piece in pieces:
            first = first or time.perf_counter()
            finished = piece.generation or finished
            if not as_json:
                typer.echo(piece.text, nl=False)
            if stopped():
                if not as_json:
                    typer.echo()
                note("interrupted", as_json)
                raise typer.Exit(130)
    end = time.perf_counter()
    if finished is None or first is None:
        raise RequestError("the answer ended without a token")
    new = len(finished.token_ids)
    facts = {
        "mode": model.plan.name,
        "provisional": model.plan.provisional,
        "prompt_tokens": finished.prompt_tokens,
        "new_tokens": new,
        "finish_reason": finished.finish_reason,
        "import_seconds": round(imported - start, 3),
        "load_seconds": model.loading["total"].to_json()["seconds"],
        "first_token_seconds": round(first - loaded, 3),
        "decode_tokens_per_second": round((new - 1) / (end - first), 2) if new > 1 else None,
        "compile_events": counter.count(),
        "kv_slots": model.engine.config.kv_slots,
        "loading": model.loading.to_json(),
    }
    if as_json:
        typer.echo(json.dumps({"text": finished.text, "token_ids": list(finished.token_ids), **facts}))
        return
    typer.echo()
    rate = facts["decode_tokens_per_second"]
    note(
        f"mode {facts['mode']}{' (provisional plan)' if facts['provisional'] else ''}: {new} tokens"
        + (f", {rate} tok/s" if rate else "")
        + f", loaded in {facts['load_seconds']} s, compile events: {facts['compile_events']}",
        quiet=False,
    )


def _read_standard_input() -> str:
    try:
        # Who pipes a line in means its text: the newline would be a token of the prompt.
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8 text: {error}") from None
