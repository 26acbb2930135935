"""Where `from_pretrained` gets an Elastic checkpoint: what is one already, or what is converted once into the cache."""

import dataclasses
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from elastic_jax.checkpoint_format import MANIFEST
from elastic_jax.demo_model import CACHE_VARIABLE, default_cache
from elastic_jax.errors import CheckpointError, ConfigError
from elastic_jax.hub_id import is_hub_id, is_remote, refuse_revision
from elastic_jax.system_errors import describe

type Compile = Literal["once", "never"]
"""Whether a model may be converted, and a mode compiled, where that has not been done before."""

type Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Found:
    """An Elastic checkpoint.

    Attributes:
        path: its folder, or a Hub id of one.
        revision: of the Hub id.
    """

    path: str
    revision: str | None


def find_checkpoint(
    name: str | Path, *, revision: str | None, token: str | None, compile: Compile, workers: int, say: Say
) -> Found:
    """Finds a model's Elastic checkpoint; converts the model into the cache if it is none.

    Args:
        name: an Elastic checkpoint; or a Hugging Face folder, a GGUF file, or a Hub id of either kind.
        revision: branch, tag or commit of a Hub id.
        token: of the Hub, for private repositories.
        compile: "never" forbids to convert.
        workers: threads of a conversion.
        say: is told what a conversion takes, and how far it is.

    Raises:
        CheckpointError: it would have to be converted, and that is forbidden or the cache cannot be written; or there
            is no such file or folder.
        ConversionError: it cannot be converted.
        HubError: it is on the Hub, and cannot be had.
    """
    if compile not in ("once", "never"):
        raise ConfigError(f'compile must be "once" or "never", found {compile!r}')
    if is_remote(str(name)):
        return _remote(str(name), revision, token, compile, workers, say)
    refuse_revision(name, revision)
    path = Path(name)
    if (path / MANIFEST).is_file():
        return Found(str(path), None)
    if not path.exists():
        kind = "an id has the form owner/name" if not is_hub_id(str(name)) else "it has the form of a Hub id"
        raise CheckpointError(f"there is no file or folder {name}, and {kind}: check the spelling")
    from converters.locate import locate

    source = locate(path, revision=None, token=None).open()
    target = _cache_folder(path.resolve().name, source.fingerprint())
    if not (target / MANIFEST).is_file():
        _refuse_to_convert(str(name), compile)
        _convert(str(path), target, None, None, workers, say)
    return Found(str(target), None)


def _remote(name: str, revision: str | None, token: str | None, compile: Compile, workers: int, say: Say) -> Found:
    from elastic_jax import hub_access

    snapshot = hub_access.resolve(name, revision=revision, token=token)
    if snapshot.files is None:
        elastic = (snapshot.download((), token) / MANIFEST).is_file()
    else:
        elastic = MANIFEST in snapshot.files
    if elastic:
        return Found(name, revision)
    target = _cache_folder(name.replace("/", "--"), snapshot.commit)
    if not (target / MANIFEST).is_file():
        _refuse_to_convert(name, compile)
        if snapshot.files is not None:
            size = sum(count for file, count in snapshot.files.items() if file.endswith(".safetensors"))
            say(f"{name}: downloading {size / 1e9:.2f} GB of weights, unless the Hub's cache holds them")
        _convert(name, target, snapshot.commit, token, workers, say)
    return Found(str(target), None)


def _cache_folder(name: str, identity: str) -> Path:
    """One for each model and version of it: a changed source is another model."""
    short = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return default_cache() / "converted" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}-{short}.elastic"


def _refuse_to_convert(name: str, compile: Compile) -> None:
    if compile == "never":
        raise CheckpointError(
            f'{name} is no Elastic checkpoint and has not been converted on this machine, and compile is "never". '
            f"Leave compile out, or convert with: elastic-jax convert {name} model.elastic"
        )


def _convert(source: str, target: Path, revision: str | None, token: str | None, workers: int, say: Say) -> None:
    from converters import convert
    from converters.locate import locate
    from converters.units import conversion_units

    opened = locate(source, revision=revision, token=token).open()
    units = list(conversion_units(opened.config, None))
    reads = sum(unit.input_bytes(opened) for unit in units)
    writes = sum(unit.output_bytes(opened.config) for unit in units)
    say(
        f"{source} is converted once, into {target}: reads {reads / 1e9:.2f} GB, writes {writes / 1e9:.2f} GB "
        "(int8 and bf16), at some 100 to 300 MB a second. Then its mode is compiled for this device, once too"
    )
    tenths = -1

    def progress(done: int, total: int, _: str, /) -> None:
        nonlocal tenths
        if done * 10 // total > tenths:
            tenths = done * 10 // total
            say(f"converting: {tenths * 10} %")

    try:
        convert(
            source,
            target,
            only=None,
            overwrite=False,
            revision=revision,
            token=token,
            workers=workers,
            progress=progress,
        )
    except OSError as error:
        # What is wrong with the source's files is no matter of the cache.
        if error.filename is None or not Path(error.filename).is_relative_to(default_cache()):
            raise
        raise CheckpointError(
            f"cannot write to the cache {default_cache()}: {describe(error)}; set {CACHE_VARIABLE} to another folder"
        ) from error
