"""Fetches a model from the Hugging Face Hub: one commit for every file, and only the files that are needed."""

import contextlib
import dataclasses
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from converters.huggingface import CONFIG, INDEX, SINGLE, TOKENIZER_FILES
from converters.names import list_names
from elastic_jax.errors import ConversionError

_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_PICKLES = (".bin", ".pt", ".pth")


@dataclasses.dataclass(frozen=True)
class HubModel:
    """A model on the Hub, resolved to a commit.

    Attributes:
        repository: `owner/name`.
        commit: of which every file is taken.
        files: name -> bytes, of the files needed; None in offline mode, where the cache holds what it holds.
    """

    repository: str
    commit: str
    files: dict[str, int] | None

    def download(self, token: str | None) -> Path:
        """Fetches the files that the Hub's cache does not hold; an interrupted download continues where it was.

        Returns:
            The folder with the files.

        Raises:
            ConversionError: the Hub cannot be reached, or the disk is too small.
        """
        if self.files is not None:
            self._check_space()
        with _translated(self.repository):
            folder = huggingface_hub.snapshot_download(
                self.repository,
                revision=self.commit,
                allow_patterns=None if self.files is None else sorted(self.files),
                token=token,
                local_files_only=self.files is None,
            )
        return Path(folder)

    def _check_space(self) -> None:
        files = self.files or {}
        absent = [
            name
            for name in files
            if not isinstance(huggingface_hub.try_to_load_from_cache(self.repository, name, revision=self.commit), str)
        ]
        cache = Path(constants.HF_HUB_CACHE)
        existing = next(path for path in (cache, *cache.parents) if path.exists())
        needed, free = sum(files[name] for name in absent), shutil.disk_usage(existing).free
        if needed > free:
            raise ConversionError(
                f"downloading {self.repository} needs {needed / 1e9:.1f} GB at {cache}, but {free / 1e9:.1f} GB are "
                "free: free some, or set HF_HUB_CACHE to a folder on another disk"
            )


def resolve(repository: str, *, revision: str | None, token: str | None) -> HubModel:
    """Finds the commit that a revision stands for now, and the files needed.

    Args:
        repository: `owner/name`.
        revision: branch, tag or commit; None is the default branch.
        token: for private or gated repositories; None uses the one that `hf auth login` stored.

    Raises:
        ConversionError: there is no such repository or revision, access is refused, the Hub cannot be reached, the
            model is not in the cache in offline mode, or its weights are in no format that is read.
    """
    with _translated(repository):
        if constants.HF_HUB_OFFLINE:
            folder = huggingface_hub.snapshot_download(
                repository, revision=revision, token=token, local_files_only=True
            )
            return HubModel(repository, Path(folder).name, None)
        info = huggingface_hub.HfApi(token=token).model_info(repository, revision=revision, files_metadata=True)
    if info.sha is None:
        raise ConversionError(f"the Hub names no commit of {repository} at revision {revision or 'main'}")
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    return HubModel(repository, info.sha, _needed(sizes, repository))


def _needed(sizes: dict[str, int], repository: str) -> dict[str, int]:
    if INDEX in sizes:
        weights = [INDEX, *(name for name in sizes if _SHARD.fullmatch(name))]
    elif SINGLE in sizes:
        weights = [SINGLE]
    else:
        raise ConversionError(_no_weights(list(sizes), repository))
    if CONFIG not in sizes:
        raise ConversionError(f"{repository} holds no {CONFIG}: it is not a model of transformers")
    wanted = [CONFIG, *weights, *(name for name in TOKENIZER_FILES if name in sizes)]
    return {name: sizes[name] for name in wanted}


def _no_weights(names: list[str], repository: str) -> str:
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


@contextlib.contextmanager
def _translated(repository: str) -> Iterator[None]:
    """Turns the Hub's errors into messages that say what to do."""
    try:
        yield
    except errors.GatedRepoError:
        raise ConversionError(
            f"{repository} is gated: ask for access at https://huggingface.co/{repository}, then pass --token, or log "
            "in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise ConversionError(f"{repository} has no such revision: check --revision") from None
    except errors.RepositoryNotFoundError:
        raise ConversionError(
            f"there is no local folder or file {repository}, and the Hub shows no repository {repository}: check the "
            "spelling; if it is private, pass --token or log in with `hf auth login`"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            raise ConversionError(
                f"there is no local folder or file {repository}, and the Hub's cache does not hold it whole "
                "(HF_HUB_OFFLINE is set): unset it, or fetch the model first with `hf download`"
            ) from None
        raise ConversionError(f"the Hub cannot be reached for {repository}: {error}") from None
    except errors.HFValidationError as error:
        raise ConversionError(f"{repository} is neither a local path nor a Hub id owner/name: {error}") from None
    except Exception as error:  # of whichever HTTP library this version of huggingface_hub uses
        raise ConversionError(
            f"fetching {repository} from the Hub failed ({error}): run the same command again to continue, or, to use "
            "what the cache holds, set HF_HUB_OFFLINE=1. (There is no local folder of this name.)"
        ) from None
