"""Decides what a source is: a Hugging Face folder, a GGUF file, or a repository of the Hub."""

import re
from pathlib import Path

from converters.gguf_file import open_gguf
from converters.huggingface import open_folder
from converters.source import Source
from elastic_jax.errors import ConversionError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_PICKLES = (".bin", ".pt", ".pth")


def open_source(source: str | Path, *, revision: str | None, token: str | None) -> Source:
    """Opens a source and checks its headers; a Hub id is downloaded first.

    Raises:
        ConversionError: there is no such source, or it cannot be converted.
        ConfigError: the model is not implemented.
    """
    path = Path(source)
    if path.exists() and revision is not None:
        raise ConversionError(f"a revision was asked for ({revision}), but {path} is local: leave --revision out")
    if path.is_dir():
        return open_folder(path.absolute(), repository=None, commit=None)
    if path.is_file():
        return _open_file(path.absolute())
    raise ConversionError(f"no source {source}")


def _open_file(path: Path) -> Source:
    if path.suffix == ".gguf":
        return open_gguf(path)
    if path.suffix in _PICKLES:
        raise ConversionError(f"{path} is a pickle, and opening one can run any code: convert it to safetensors first")
    if path.suffix == ".safetensors":
        raise ConversionError(f"{path} is one file of a model: name its folder, which has the config too")
    raise ConversionError(f"{path} should be a Hugging Face folder, a .gguf file, or a Hub id owner/name")
