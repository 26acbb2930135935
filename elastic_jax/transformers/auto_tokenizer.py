"""`AutoTokenizer`: transformers' own tokenizers, which also give tensors where PyTorch is not installed.

Examples say `return_tensors="pt"`. Without PyTorch that gives `HostTensor`s, NumPy arrays that have `.to(device)`, and
a warning. `return_tensors="jax"`, which transformers 5 no longer has, gives JAX arrays.
"""

import functools
import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer as _AutoTokenizer
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from elastic_jax.checkpoint_format import MANIFEST, TOKENIZER
from elastic_jax.errors import TokenizerError
from elastic_jax.hub_id import is_remote
from elastic_jax.mistral_pattern import correct_pattern
from elastic_jax.transformers.arrays import HostTensor, is_array, to_numpy
from elastic_jax.transformers.sources import find_checkpoint
from elastic_jax.workers import default_workers


class AutoTokenizer:
    """Loads tokenizers; there are no instances of it."""

    def __init__(self) -> None:
        raise TypeError("use AutoTokenizer.from_pretrained(name)")

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, token: str | bool | None = None, **options: Any
    ) -> Any:
        """The tokenizer of a model.

        Args:
            name: what the model is loaded by: an Elastic checkpoint, a Hugging Face folder, a GGUF file, or a Hub id.
            revision: branch, tag or commit of a Hub id.
            token: of the Hub, for private repositories.
            options: of transformers' `AutoTokenizer.from_pretrained`.

        Returns:
            transformers' tokenizer, with Mistral's wrong pre-tokenization pattern corrected (see
            `elastic_jax.mistral_pattern`; `fix_mistral_regex=False` keeps it).

        Raises:
            TokenizerError: there is none, or it cannot be read; or its pattern is wrong and nothing says how to mend
                it.
            HubError: it is on the Hub, and cannot be had.
        """
        folder = _folder(name, revision, token if isinstance(token, str) else None)
        wanted = options.pop("fix_mistral_regex", None)
        try:
            tokenizer = _load(folder, options)
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{name}: no tokenizer can be loaded: {error}") from error
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            correct_pattern(backend, folder, wanted, str(name))
        return _with_tensors(tokenizer)


def _folder(name: str | Path, revision: str | None, token: str | None) -> Path:
    """The folder with the tokenizer's files; of a Hub id only those are fetched."""
    if is_remote(str(name)):
        from converters.huggingface import TOKENIZER_FILES
        from elastic_jax import hub_access

        snapshot = hub_access.resolve(str(name), revision=revision, token=token)
        files = [MANIFEST, f"{TOKENIZER}/*", "config.json", *TOKENIZER_FILES]
        folder = snapshot.download(files, token)
        return folder / TOKENIZER if (folder / MANIFEST).is_file() else folder
    path = Path(name)
    if (path / MANIFEST).is_file():
        return path / TOKENIZER
    if path.is_file():  # GGUF: its tokenizer is built when it is converted
        found = find_checkpoint(
            path, revision=revision, token=None, compile="once", workers=default_workers(), say=_say
        )
        return Path(found.path) / TOKENIZER
    if not path.is_dir():
        raise TokenizerError(f"there is no file or folder {name}, and it is no Hub id owner/name: check the spelling")
    return path


def _load(folder: Path, options: dict[str, Any]) -> Any:
    # Beside a checkpoint's tokenizer there is no config.json, by which transformers chooses a class.
    if folder.name == TOKENIZER and not (folder / "tokenizer_config.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(str(folder), **options)
    return _AutoTokenizer.from_pretrained(str(folder), **options)


class TensorEncoding(BatchEncoding):
    """A `BatchEncoding` whose `to` needs no PyTorch."""

    def to(self, device: Any = None, **_: Any) -> "TensorEncoding":
        """Itself: the model copies what it needs to its device."""
        del device
        return self


class _Tensors(PreTrainedTokenizerBase):
    """Mixed into a tokenizer's class: more kinds of arrays in and out."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return _tensors(super().__call__, arguments, options)

    def encode(self, *arguments: Any, **options: Any) -> Any:
        return _tensors(super().encode, arguments, options)

    def pad(self, *arguments: Any, **options: Any) -> Any:
        return _tensors(super().pad, arguments, options)

    def apply_chat_template(self, *arguments: Any, **options: Any) -> Any:
        return _tensors(super().apply_chat_template, arguments, options)

    def decode(self, token_ids: Any, *arguments: Any, **options: Any) -> Any:
        return super().decode(_plain(token_ids), *arguments, **options)

    def batch_decode(self, sequences: Any, *arguments: Any, **options: Any) -> Any:
        return super().batch_decode(_plain(sequences), *arguments, **options)


def _with_tensors(tokenizer: Any) -> Any:
    own = type(tokenizer)
    # The same name: save_pretrained writes it down.
    tokenizer.__class__ = type(own.__name__, (_Tensors, own), {"__module__": own.__module__})
    return tokenizer


def _plain(ids: Any) -> Any:
    if is_array(ids):
        return to_numpy(ids, "token_ids").tolist()
    if isinstance(ids, list | tuple) and ids and is_array(ids[0]):
        return [to_numpy(each, "token_ids").tolist() for each in ids]
    return ids


@functools.cache
def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _tensors(method: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    kind = options.get("return_tensors")
    if kind == "jax":
        import jax

        return _converted(method(*arguments, **(options | {"return_tensors": "np"})), jax.device_put)
    if kind != "pt" or _has_torch():
        return method(*arguments, **options)
    warnings.warn(
        'PyTorch is not installed: return_tensors="pt" gives NumPy arrays that have .to(device)', stacklevel=3
    )
    return _converted(method(*arguments, **(options | {"return_tensors": "np"})), lambda array: array.view(HostTensor))


def _converted(result: Any, convert: Any) -> Any:
    if isinstance(result, np.ndarray):
        return convert(result)
    if isinstance(result, BatchEncoding):
        values = {name: convert(np.asarray(value)) for name, value in result.items()}
        return TensorEncoding(values, result.encodings)
    return result


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
