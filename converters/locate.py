"""Decides what a source is: a Hugging Face folder, a GGUF file, or a repository of the Hub."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from converters.gguf_file import open_gguf
from converters.hub import resolve
from converters.huggingface import open_folder
from converters.source import Source
from elastic_jax.errors import ConversionError
from elastic_jax.hub_id import is_hub_id

_PICKLES = (".bin", ".pt", ".pth")


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a source is.

    Attributes:
        repository: `owner/name` on the Hub; None for local sources.
        commit: of the repository.
        open: reads its headers and checks them; downloads it first if it is on the Hub.
    """

    repository: str | None
    commit: str | None
    open: Callable[[], Source]


def locate(source: str | Path, *, revision: str | None, token: str | None) -> Location:
    """Finds a source. What exists locally is never looked for on the Hub.

    Raises:
        ConversionError: there is no such source, or it is of a kind that is not read.
        HubError: it is on the Hub, and cannot be had.
    """
    path = Path(source)
    if path.exists():
        if revision is not None:
            raise ConversionError(f"a revision was asked for ({revision}), but {path} is local: leave --revision out")
        absolute = path.absolute()
        if path.is_dir():
            return Location(None, None, lambda: open_folder(absolute, repository=None, commit=None))
        _check_file(path)
        return Location(None, None, lambda: open_gguf(absolute))
    name = str(source)
    if not is_hub_id(name) or path.suffix in (".gguf", ".safetensors", *_PICKLES):
        raise ConversionError(
            f"there is no file or folder {path}, and {name!r} is no Hub id (those are owner/name) either: "
            "check the path"
        )
    model = resolve(name, revision=revision, token=token)
    commit = model.snapshot.commit
    return Location(
        name,
        commit,
        lambda: open_folder(model.download(token), repository=name, commit=commit),
    )


def _check_file(path: Path) -> None:
    if path.suffix == ".gguf":
        return
    if path.suffix in _PICKLES:
        raise ConversionError(
            f"{path}: opening a pickle can run any code, so it is not read: convert it to safetensors first, where you "
            "trust it"
        )
    if path.suffix == ".safetensors":
        raise ConversionError(f"{path} is one file of a model: name its folder, which holds the config too")
    raise ConversionError(f"{path} should be a Hugging Face folder, a .gguf file, or a Hub id owner/name")
