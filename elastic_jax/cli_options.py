"""What the commands share: their options, and how they tell what they do."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Precision = Literal["int8", "bf16"]
Dtype = Literal["bfloat16", "float32"]
Kv = Literal["full", "int8"]

CheckpointArgument = Annotated[Path, typer.Argument(help="An Elastic checkpoint.", show_default=False)]
CheckpointOrIdArgument = Annotated[
    str, typer.Argument(help="An Elastic checkpoint, or the Hub id owner/name of one.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]
ModeOption = Annotated[str, typer.Option("--mode", "-m", help="A mode of the checkpoint: XL, L, M, S.")]
ModesOption = Annotated[list[str] | None, typer.Option("--mode", "-m", help="A mode; repeat for more. All if none.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Compute type; float32 is for checks.")]
KvOption = Annotated[
    Kv, typer.Option("--kv", help="Precision of the KV cache: the compute type, or int8, which takes half as much.")
]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Threads; one per processor core, 16 at most, by default.")
]
SourceArgument = Annotated[
    str, typer.Argument(help="A Hugging Face folder, a .gguf file, or a Hub id owner/name.", show_default=False)
]
DestinationArgument = Annotated[Path, typer.Argument(help="The checkpoint to write.", show_default=False)]
OnlyOption = Annotated[Precision | None, typer.Option(help="Store the weights in this precision alone.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what the destination holds.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
TokenOption = Annotated[str | None, typer.Option(help="Hub token for private models.", envvar="HF_TOKEN")]


@contextlib.contextmanager
def progress_bar(quiet: bool) -> Iterator[Any]:
    """A progress display on standard error, which its `start` shows; the same object, silent, where JSON is wanted."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), disable=quiet)
    try:
        yield bar
    finally:
        if bar.live.is_started:
            bar.stop()


def note(message: str, quiet: bool) -> None:
    """Tells people something on standard error."""
    if not quiet:
        typer.echo(message, err=True)


def print_value(values: Any, as_json: bool, text: Callable[[], str]) -> None:
    """Prints a command's result."""
    typer.echo(json.dumps(values) if as_json else text())


def hide_hub_progress(quiet: bool) -> None:
    """Silences the progress displays of the Hub's client, where JSON is wanted."""
    if quiet:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
