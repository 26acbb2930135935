"""The commands `plan` and `modes`: what a model will take, and what its modes are."""

import dataclasses
from typing import Annotated, Any

import typer

from elastic_jax.cli_options import (
    CheckpointOrIdArgument,
    DtypeOption,
    JsonOption,
    KvOption,
    RevisionOption,
    TokenOption,
    hide_hub_progress,
    print_value,
)


def plan(
    source: Annotated[
        str,
        typer.Argument(
            help="An Elastic checkpoint, a Hugging Face folder, a .gguf file, or a Hub id owner/name.",
            show_default=False,
        ),
    ],
    target: Annotated[
        str | None,
        typer.Option(help="A GPU that need not be here: a name of `targets`, or a file of `dump-target`."),
    ] = None,
    max_context: Annotated[int | None, typer.Option(min=1, help="Longest context in tokens.")] = None,
    dtype: DtypeOption = "bfloat16",
    kv: KvOption = "full",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of a request whose time is estimated.")] = 1024,
    new_tokens: Annotated[int, typer.Option(min=1, help="Generated for it.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Requests at the same time.")] = 1,
    revision: RevisionOption = None,
    token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tell what a model takes on disk, in memory and in time, and the context that fits, before it is downloaded."""
    from elastic_jax.search.workload import Workload
    from elastic_jax.sizing import checkpoint_bytes, describe_model, place, size_mode

    hide_hub_progress(as_json)
    where = place(target)
    model = describe_model(source, revision=revision, token=token)
    workload = Workload(prompt_tokens, new_tokens, batch)
    planned = {
        "source": source,
        "device": where.name,
        "described": target is not None,
        "on_gpu": where.platform == "gpu",
        "download_bytes": model.download,
        "checkpoint_bytes": checkpoint_bytes(model.config),
        "max_position_embeddings": model.config.max_position_embeddings,
        "memory_bytes_per_second": where.bandwidth,
        "workload": dataclasses.asdict(workload),
        "modes": [
            size_mode(model.config, one, where, dtype, max_context=max_context, workload=workload, kv=kv)
            for one in model.plans
        ],
    }
    print_value(planned, as_json, lambda: _render(planned))


def _render(planned: dict[str, Any]) -> str:
    from elastic_jax.memory import gib

    lines = [f"{planned['source']} on {planned['device']}{' (described)' if planned['described'] else ''}"]
    if planned["download_bytes"]:
        lines.append(f"download for converting: {gib(planned['download_bytes'])}")
    lines += [f"Elastic checkpoint, int8 and bf16: {gib(planned['checkpoint_bytes'])}", ""]
    lines.append("mode  weights     beside     KV a token  KV tokens that fit  tok/s at most")
    for mode in planned["modes"]:
        beside = gib(mode["row_bytes"] + mode["workspace_bytes"])
        tokens = "unknown" if mode["kv_tokens"] is None else str(mode["kv_tokens"])
        fit = tokens if mode["fits"] else "does not fit"
        rate = mode["decode_tokens_per_second_at_most"] or "unknown"
        lines.append(
            f"{mode['mode']:5s} {gib(mode['weight_bytes']):11s} {beside:10s} "
            f"{mode['kv_bytes_per_token'] / 1024:6.0f} KiB  {fit:>18s}  {rate:>13}"
        )
    available = planned["modes"][0]["available_bytes"] if planned["modes"] else None
    lines += ["", f"free memory: {'unknown' if available is None else gib(available)}"]
    lines += _times(planned)
    if rate := planned["memory_bytes_per_second"]:
        whose = "the memory's" if planned["on_gpu"] else "memory can be read now at"
        lines.append(
            f"tok/s at most: one sequence, {whose} {rate / 1e9:.0f} GB/s over the weights that each token reads; less "
            "is measured"
        )
    return "\n".join(lines)


def _times(planned: dict[str, Any]) -> list[str]:
    if not any(mode["estimate"] for mode in planned["modes"]):
        return ["no times are predicted for this GPU"] if planned["on_gpu"] else []
    asked = planned["workload"]
    lines = [
        "",
        f"predicted, not measured, for {asked['batch']} x ({asked['prompt_tokens']} prompt + {asked['new_tokens']} new "
        "tokens), from reading and multiplying alone; small models take longer:",
        "mode  first token  tok/s of each  all",
    ]
    for mode in planned["modes"]:
        times = mode["estimate"]
        lines.append(
            f"{mode['mode']:5s} {times['first_token_seconds']:9.3f} s  {times['tokens_per_second']:13.1f}  "
            f"{times['seconds']:.2f} s"
        )
    return [*lines, ""]


def modes(
    checkpoint: CheckpointOrIdArgument,
    revision: RevisionOption = None,
    token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """List a checkpoint's modes: what each computes, its bytes, and for which devices it is compiled."""
    from elastic_jax.info import describe_opened, open_described
    from elastic_jax.memory import gib

    hide_hub_progress(as_json)
    described = describe_opened(open_described(checkpoint, revision=revision, token=token), checkpoint)
    listed = [
        {
            **mode,
            "compiled_for": sorted(
                {
                    store["target"]
                    for store in described["executables"]
                    if store["mode"] == mode["mode"] and not store["problem"]
                }
            ),
        }
        for mode in described["modes"]
    ]

    def line(mode: dict[str, Any]) -> str:
        size = "not stored" if mode["weight_bytes"] is None else gib(mode["weight_bytes"])
        groups = ", ".join(f"{count} {choice}" for choice, count in mode["choices"].items())
        compiled = ", ".join(mode["compiled_for"]) or "nothing yet"
        return f"{mode['mode']:4s} {size:11s} {groups}; compiled for {compiled}; {mode['note']}"

    print_value(listed, as_json, lambda: "\n".join(map(line, listed)))
