"""The `cache` commands."""

import dataclasses
from typing import Annotated, Any

import typer

from elastic_jax.cli_options import JsonOption, print_value
from elastic_jax.demo_model import default_cache
from elastic_jax.errors import RequestError

cache_app = typer.Typer(help="List, remove and locate what elastic-jax keeps in its own cache.", no_args_is_help=True)


@cache_app.command("path")
def path(as_json: JsonOption = False) -> None:
    """Print the cache's folder; `ELASTIC_JAX_CACHE` moves it."""
    print_value({"path": str(default_cache())}, as_json, lambda: str(default_cache()))


@cache_app.command("ls")
def ls(as_json: JsonOption = False) -> None:
    """List the cache's entries with their sizes."""
    from elastic_jax.download_cache import entries

    found = [dataclasses.asdict(entry) for entry in entries(default_cache())]
    total = sum(entry["nbytes"] for entry in found)
    print_value(
        {"path": str(default_cache()), "entries": found, "bytes": total},
        as_json,
        lambda: "\n".join([*map(_line, found), f"{total / 1e6:10.1f} MB  {default_cache()}"]),
    )


@cache_app.command("rm")
def rm(
    names: Annotated[list[str] | None, typer.Argument(help="Entries as `cache ls` names them.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove every entry.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove entries of the cache."""
    from elastic_jax.download_cache import entries, remove

    if everything == bool(names):
        raise RequestError("name the entries to remove (`elastic-jax cache ls` lists them), or pass --all; not both")
    wanted = [entry.name for entry in entries(default_cache())] if everything else names or []
    removed = [dataclasses.asdict(entry) for entry in remove(default_cache(), wanted)]
    freed = sum(entry["nbytes"] for entry in removed)
    print_value(
        {"removed": removed, "bytes": freed}, as_json, lambda: f"removed {len(removed)} entries, {freed / 1e6:.1f} MB"
    )


def _line(entry: dict[str, Any]) -> str:
    return f"{entry['nbytes'] / 1e6:10.1f} MB  {entry['kind']:11s}  {entry['name']}"
