"""The command line. A command prints for people, or with `--json` one JSON value; an error is one message, status 1.

Everything heavy is imported inside a command, so that `--help` is quick.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from elastic_jax import cli_plan, plugin_log
from elastic_jax.cli_batch import batch
from elastic_jax.cli_bench import bench
from elastic_jax.cli_cache import cache_app
from elastic_jax.cli_chat import chat
from elastic_jax.cli_doctor import doctor
from elastic_jax.cli_eval import evaluate
from elastic_jax.cli_frontier import cost, frontier, search
from elastic_jax.cli_generate import generate
from elastic_jax.cli_help import Commands
from elastic_jax.cli_options import (
    CheckpointArgument,
    CheckpointOrIdArgument,
    DestinationArgument,
    DtypeOption,
    JsonOption,
    KvOption,
    ModesOption,
    OnlyOption,
    OverwriteOption,
    RevisionOption,
    SourceArgument,
    TokenOption,
    WorkersOption,
    hide_hub_progress,
    note,
    print_value,
    progress_bar,
)
from elastic_jax.cli_search import calibrate
from elastic_jax.device_memory import explained
from elastic_jax.errors import ElasticError
from elastic_jax.offline import go_offline
from elastic_jax.system_errors import describe as describe_error
from elastic_jax.workers import default_workers

app = typer.Typer(
    name="elastic-jax",
    no_args_is_help=True,
    cls=Commands,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def options(
    offline: Annotated[
        bool, typer.Option("--offline", help="Download nothing: what the caches hold must do. Before the command.")
    ] = False,
) -> None:
    """Elastic Mistral models in JAX: one checkpoint, several precision modes, compiled ahead of time."""
    if offline:
        go_offline()


# -- convert -----------------------------------------------------------------------------------------------------------


@app.command()
def convert(
    source: SourceArgument,
    destination: DestinationArgument,
    only: OnlyOption = None,
    overwrite: OverwriteOption = False,
    revision: RevisionOption = None,
    token: TokenOption = None,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an Elastic checkpoint; an interrupted conversion continues where it was."""
    from converters import convert as run
    from elastic_jax.memory import gib

    with progress_bar(as_json) as bar:
        task = bar.add_task("converting", total=None)

        def progress(done: int, total: int, name: str, /) -> None:
            bar.start()
            bar.update(task, completed=done, total=total, description=name)

        checkpoint = run(
            source,
            destination,
            only=only,
            overwrite=overwrite,
            revision=revision,
            token=token,
            workers=workers or default_workers(),
            progress=progress,
        )
        bar.update(task, description="converted")
    size = sum(folder.nbytes for folder in checkpoint.manifest.folders.values())
    modes = {}
    for name, plan in checkpoint.plans().items():
        with contextlib.suppress(ElasticError):
            modes[name] = checkpoint.weight_bytes(plan)
    print_value(
        {"path": str(checkpoint.path), "bytes": size, "modes": modes},
        as_json,
        lambda: (
            f"{checkpoint.path}: {gib(size)}; modes "
            + ", ".join(f"{name} ({gib(count)})" for name, count in modes.items())
        ),
    )


# -- compile -----------------------------------------------------------------------------------------------------------


@app.command("compile")
def compile_modes(
    checkpoint: CheckpointArgument,
    mode: ModesOption = None,
    dtype: DtypeOption = "bfloat16",
    kv: KvOption = "full",
    kv_slots: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Tokens of the KV pool, all sequences together; repeat for more pools. On a GPU by default the "
            "largest of a ladder up to 131072 that fits; 16384 on a CPU.",
        ),
    ] = None,
    max_context: Annotated[int | None, typer.Option(min=1, help="Longest context of a sequence, in tokens.")] = None,
    target: Annotated[
        str | None,
        typer.Option(help="A GPU that need not be here: a name of `targets`, or a file of `dump-target`."),
    ] = None,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compile modes for this machine's device, or for a described one, and store the executables in the checkpoint."""
    from elastic_jax.checkpoint import Checkpoint
    from elastic_jax.device import device_to_compile_for
    from elastic_jax.executables import ModeStore, default_step_config
    from elastic_jax.kernels.measured import unmeasured
    from elastic_jax.memory import available_memory
    from elastic_jax.pools import default_pool

    opened = Checkpoint.open(checkpoint)
    device, options = device_to_compile_for(target)
    results = []
    plans = [opened.plan(name) for name in mode] if mode else opened.stored_plans()
    for plan in plans:
        opened.folders(plan)  # executables would be of no use without the weights
    platform, available = device.platform, available_memory(device)
    steps = [
        (plan, default_step_config(opened.config, platform, dtype, kv_slots=pool, max_context=max_context, kv=kv))
        for plan in plans
        for pool in kv_slots
        or [default_pool(opened, plan, dtype, platform, available=available, max_context=max_context, kv=kv)]
    ]
    if steps and (message := unmeasured(steps[0][1], device)):
        note(message, as_json)
    for plan, step in steps:
        store = ModeStore(opened, plan, dtype, device, kv)

        def progress(name: str, seconds: float | None, done: int, total: int, mode: str = plan.name) -> None:
            if seconds is not None:
                note(f"{mode}  {done:3d}/{total}  {name:28s} {seconds:6.1f} s", as_json)

        manifest = store.compile(
            step, workers=workers or default_workers(), progress=progress, compiler_options=options
        )
        records = manifest.units.values()
        results.append(
            {
                "mode": plan.name,
                "folder": str(store.pool_folder(step.kv_slots)),
                "kv_slots": step.kv_slots,
                "max_context": step.max_context,
                "units": len(manifest.units),
                "bytes": sum(record.size for record in records),
                "compile_seconds": round(sum(record.compile_seconds for record in records), 1),
            }
        )
    print_value(results, as_json, lambda: "\n".join(_compiled(result) for result in results))


def _compiled(result: dict[str, Any]) -> str:
    size = result["bytes"] / 1e6
    return (
        f"{result['mode']}: {result['units']} executables, {size:.1f} MB, KV pool of {result['kv_slots']} tokens, "
        f"in {result['folder']}"
    )


@app.command("targets")
def list_targets(as_json: JsonOption = False) -> None:
    """List the GPUs that `compile --target` knows; none of them need be here."""
    from aot_cache.targets import names

    known = names()
    print_value(known, as_json, lambda: "\n".join(f"{name:12s} {title}" for name, title in known.items()))


@app.command("dump-target")
def dump_target(
    out: Annotated[Path | None, typer.Option(help="The file to write; standard output if none.")] = None,
) -> None:
    """Describe the GPU at hand, so that `compile --target FILE` can compile for it elsewhere."""
    from aot_cache.targets import Description
    from elastic_jax.checkpoint_io import write_file
    from elastic_jax.device import default_device

    text = json.dumps(Description.of(default_device()).to_json(), indent=1)
    if out is None:
        typer.echo(text)
    else:
        write_file(out, f"{text}\n".encode())


# -- verify ------------------------------------------------------------------------------------------------------------


@app.command()
def verify(checkpoint: CheckpointArgument, as_json: JsonOption = False) -> None:
    """Check every file of a checkpoint and of its executables against its digest; nothing is loaded."""
    from aot_cache import store
    from elastic_jax.checkpoint import Checkpoint
    from elastic_jax.executables import store_folders

    opened = Checkpoint.read(checkpoint)  # `open` would stop at the first missing files
    folders = store_folders(checkpoint)
    problems = opened.verify() + [problem for folder in folders for problem in store.verify(folder)]
    files = sum(len(folder.files) for folder in opened.manifest.folders.values())
    print_value(
        {"path": str(checkpoint), "files": files, "stores": len(folders), "problems": problems},
        as_json,
        lambda: (
            "\n".join(problems) or f"{checkpoint}: {files} weight files and {len(folders)} executable stores are whole"
        ),
    )
    if problems:
        raise typer.Exit(1)


# -- info --------------------------------------------------------------------------------------------------------------


@app.command()
def info(
    checkpoint: CheckpointOrIdArgument,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the plans into this SVG file.", metavar="FILE.svg", show_default=False)
    ] = None,
    revision: RevisionOption = None,
    token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a checkpoint: its model, modes and executables. Of one on the Hub, no weights are fetched."""
    from elastic_jax.info import describe_opened, open_described, render

    hide_hub_progress(as_json)
    opened = open_described(checkpoint, revision=revision, token=token)
    described = describe_opened(opened, checkpoint)
    if plot is not None:
        from elastic_jax.info_plot import plot as draw

        draw(opened, plot, checkpoint)
        described["plot"] = str(plot)
    print_value(described, as_json, lambda: render(described))


# -- generate ----------------------------------------------------------------------------------------------------------

app.command()(generate)

# -- commands in files of their own ------------------------------------------------------------------------------------

for _command in (chat, batch, cli_plan.plan, cli_plan.modes, doctor, calibrate, cost, search, frontier):
    app.command()(_command)
app.command("eval")(evaluate)
app.add_typer(cache_app, name="cache")


# -- bench -------------------------------------------------------------------------------------------------------------

# What follows the bench's name is passed on, options too.
app.command(context_settings={"allow_interspersed_args": False})(bench)
# -- push --------------------------------------------------------------------------------------------------------------


@app.command()
def push(
    checkpoint: CheckpointArgument,
    repository: Annotated[str, typer.Argument(help="A Hub id owner/name.", show_default=False)],
    mode: ModesOption = None,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    no_executables: Annotated[bool, typer.Option("--no-executables", help="Push no executables.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch; made if there is none.")] = None,
    token: TokenOption = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Push a checkpoint and its executables to the Hugging Face Hub, in one commit."""
    from elastic_jax.hub_push import push as run

    hide_hub_progress(as_json)
    pushed = run(
        checkpoint,
        repository,
        modes=mode,
        executables=not no_executables,
        private=private,
        revision=revision,
        token=token,
        message=message,
        say=lambda text: note(text, as_json),
    )
    print_value(
        dataclasses.asdict(pushed),
        as_json,
        lambda: f"{pushed.url}: modes {', '.join(pushed.modes)}, {pushed.stores} executable stores",
    )


# -- demo --------------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    directory: Annotated[Path | None, typer.Option(help="Where the checkpoint goes; the cache by default.")] = None,
    fetch: Annotated[
        Path | None, typer.Option(help="Only fetch the model, and copy it to this .gguf file.", metavar="FILE")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch a small real model, convert it, compile every mode, and generate with each in a fresh process."""
    from elastic_jax.demo import fetch_model, run_demo

    if fetch is not None:
        size = fetch_model(fetch)
        print_value({"path": str(fetch), "bytes": size}, as_json, lambda: f"{fetch}: {size / 1e6:.1f} MB")
        return
    results = run_demo(directory, lambda message: note(message, as_json))
    if as_json:
        typer.echo(json.dumps(results))


# -- entry points ------------------------------------------------------------------------------------------------------


def _run(command: Callable[[], Any]) -> None:
    """Runs a command; an expected error becomes one message and status 1."""
    plugin_log.keep(lambda message: note(message, quiet=False))
    try:
        with explained():
            command()
    except ElasticError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except OSError as error:  # no permission, no space, no such device: the system's words are the message
        typer.echo(f"error: {describe_error(error)}", err=True)
        sys.exit(1)


def main() -> None:
    """The `elastic-jax` program."""
    _run(app)


def convert_weights() -> None:
    """The `convert-weights` program: `elastic-jax convert` under its own name."""
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    single.command(name="convert-weights")(convert)
    _run(single)
