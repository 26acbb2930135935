"""Access to the Hugging Face Hub: one commit for every file, downloads into the Hub's cache, and plain errors."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects

from elastic_jax.errors import HubError


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A repository of the Hub at one commit.

    Attributes:
        repository: `owner/name`.
        revision: what was asked for: a branch, tag or commit; None is the default branch.
        commit: what the revision stands for, of which every file is taken.
        files: name -> bytes, of all files; None in offline mode, where the cache holds what it holds.
    """

    repository: str
    revision: str | None
    commit: str
    files: Mapping[str, int] | None

    def select(self, patterns: Sequence[str]) -> dict[str, int]:
        """The files that a download of `patterns` is about, with their bytes; none in offline mode."""
        files = self.files or {}
        return {name: files[name] for name in filter_repo_objects(files, allow_patterns=list(patterns))}

    def download(self, patterns: Sequence[str], token: str | None) -> Path:
        """Fetches the files that the Hub's cache does not hold; an interrupted download continues with the next file.

        In offline mode nothing is fetched, and the folder may lack files.

        Args:
            patterns: names of files, or shell patterns in which `*` stands for folders too.
            token: for private or gated repositories; None uses the one that `hf auth login` stored.

        Returns:
            The folder with the files, which are links into the cache: nothing may be written there.

        Raises:
            HubError: the Hub cannot be reached, or the disk is too small.
        """
        if self.files is None:
            return self._download(self.commit, (), token)
        self._check_space(self.select(patterns))
        # By the revision's name: the cache then remembers what it stands for, and offline mode finds it.
        folder = self._download(self.revision, patterns, token)
        # The branch may have moved since its commit was looked up.
        return folder if folder.name == self.commit else self._download(self.commit, patterns, token)

    def _download(self, revision: str | None, patterns: Sequence[str], token: str | None) -> Path:
        with translated(self.repository):
            folder = huggingface_hub.snapshot_download(
                self.repository,
                revision=revision,
                allow_patterns=list(patterns),
                token=token,
                local_files_only=self.files is None,
            )
        return Path(folder)

    def _check_space(self, files: Mapping[str, int]) -> None:
        absent = [
            name
            for name in files
            if not isinstance(huggingface_hub.try_to_load_from_cache(self.repository, name, revision=self.commit), str)
        ]
        cache = Path(constants.HF_HUB_CACHE)
        existing = next(path for path in (cache, *cache.parents) if path.exists())
        needed, free = sum(files[name] for name in absent), shutil.disk_usage(existing).free
        if needed > free:
            raise HubError(
                f"downloading {self.repository} needs {needed / 1e9:.1f} GB at {cache}, but {free / 1e9:.1f} GB are "
                "free: free some, or set HF_HUB_CACHE to a folder on another disk"
            )


def resolve(repository: str, *, revision: str | None, token: str | None) -> Snapshot:
    """Finds the commit that a revision stands for now, and its files.

    Args:
        repository: `owner/name`.
        revision: branch, tag or commit; None is the default branch.
        token: for private or gated repositories; None uses the one that `hf auth login` stored.

    Raises:
        HubError: there is no such repository or revision, access is refused, the Hub cannot be reached, or the
            repository is not in the cache in offline mode.
    """
    with translated(repository):
        if constants.HF_HUB_OFFLINE:
            # No patterns: whether what the cache holds is enough is for the caller to say.
            folder = huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=[], token=token, local_files_only=True
            )
            return Snapshot(repository, revision, Path(folder).name, None)
        info = huggingface_hub.HfApi(token=token).model_info(repository, revision=revision, files_metadata=True)
    if info.sha is None:
        raise HubError(f"the Hub names no commit of {repository} at revision {revision or 'main'}")
    files = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    return Snapshot(repository, revision, info.sha, files)


@contextlib.contextmanager
def translated(repository: str) -> Iterator[None]:
    """Turns the Hub's errors into messages that say what to do.

    Raises:
        HubError: instead of whatever huggingface_hub or its HTTP library raised.
    """
    try:
        yield
    except HubError:
        raise
    except errors.GatedRepoError:
        raise HubError(
            f"{repository} is gated: ask for access at https://huggingface.co/{repository}, then pass --token, or log "
            "in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{repository} has no such revision: check --revision") from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"there is no local folder or file {repository}, and the Hub shows no repository {repository}: check the "
            "spelling; if it is private, pass --token or log in with `hf auth login`"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            raise HubError(
                f"there is no local folder or file {repository}, and the Hub's cache does not hold it whole "
                "(HF_HUB_OFFLINE is set): unset it, or fetch the model first"
            ) from None
        raise HubError(f"the Hub cannot be reached for {repository}: {error}") from None
    except errors.HFValidationError as error:
        raise HubError(f"{repository} is neither a local path nor a Hub id owner/name: {error}") from None
    except Exception as error:  # of whichever HTTP library this version of huggingface_hub uses
        raise HubError(
            f"fetching {repository} from the Hub failed ({error}): run the same command again to continue, or, to use "
            "what the cache holds, set HF_HUB_OFFLINE=1. (There is no local folder of this name.)"
        ) from None
