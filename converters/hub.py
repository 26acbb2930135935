"""Which files of a Hub repository a conversion needs."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

from converters.huggingface import CONFIG, INDEX, SINGLE, TOKENIZER_FILES, TOKENIZER_JSON
from converters.names import list_names
from converters.tekken import TEKKEN_JSON
from elastic_jax import hub_access
from elastic_jax.checkpoint_format import MANIFEST
from elastic_jax.errors import ConversionError
from elastic_jax.tokenizer import COMPLETE_TOKENIZER

_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_PICKLES = (".bin", ".pt", ".pth")


@dataclasses.dataclass(frozen=True)
class HubModel:
    """A model on the Hub, resolved to a commit.

    Attributes:
        snapshot: the repository at that commit.
        files: names of the files needed; none in offline mode, where the cache holds what it holds.
    """

    snapshot: hub_access.Snapshot
    files: tuple[str, ...]

    def download(self, token: str | None) -> Path:
        """Fetches the files that the Hub's cache does not hold; an interrupted download continues where it was.

        Returns:
            The folder with the files.

        Raises:
            HubError: the Hub cannot be reached, or the disk is too small.
        """
        return self.snapshot.download(self.files, token)


def resolve(repository: str, *, revision: str | None, token: str | None) -> HubModel:
    """Finds the commit that a revision stands for now, and the files needed.

    Args:
        repository: `owner/name`.
        revision: branch, tag or commit; None is the default branch.
        token: for private or gated repositories; None uses the one that `hf auth login` stored.

    Raises:
        HubError: there is no such repository or revision, access is refused, the Hub cannot be reached, or the model
            is not in the cache in offline mode.
        ConversionError: its weights or its tokenizer are in no format that is read.
    """
    snapshot = hub_access.resolve(repository, revision=revision, token=token)
    return HubModel(snapshot, () if snapshot.files is None else _needed(snapshot.files, repository))


def _needed(names: Iterable[str], repository: str) -> tuple[str, ...]:
    found = set(names)
    if INDEX in found:
        weights = [INDEX, *(name for name in found if _SHARD.fullmatch(name))]
    elif SINGLE in found:
        weights = [SINGLE]
    else:
        raise ConversionError(_no_weights(sorted(found), repository))
    if CONFIG not in found:
        raise ConversionError(f"{repository} holds no {CONFIG}: it is not a model of transformers")
    if TOKENIZER_JSON not in found and TEKKEN_JSON not in found:
        raise ConversionError(f"{repository} holds no {TOKENIZER_JSON}. {COMPLETE_TOKENIZER}")
    return tuple(sorted([CONFIG, *weights, *(name for name in TOKENIZER_FILES if name in found)]))


def _no_weights(names: list[str], repository: str) -> str:
    if MANIFEST in names:
        return f"{repository} is an Elastic checkpoint already: load it with ElasticMistral.load({repository!r})"
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return (
            f"{repository} holds GGUF files: {list_names(ggufs)}. Fetch one (`hf download {repository} {ggufs[0]}`) "
            "and convert the file"
        )
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        return (
            f"{repository} holds its weights as {list_names(pickles)}: opening a pickle can run any code, so these are "
            "not read. Use a repository with safetensors"
        )
    return f"{repository} holds neither {SINGLE} nor {INDEX}"
