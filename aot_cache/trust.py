"""Whether an executable store can have been written by somebody else.

Loading native code is executing it, and a digest beside a file proves no origin. So a store is trusted only if this
user owns it, nobody else can write to it, and it was not downloaded. Access lists beyond the mode bits are not looked
at.
"""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from elastic_jax.errors import ExecutableError

_HUB_MARK = Path(".cache", "huggingface")  # huggingface_hub leaves it in a folder it downloads to


def reasons_for_distrust(folder: Path, files: Iterable[Path], *, root: Path) -> list[str]:
    """Why the store's files may not be this user's own work, a sentence each; empty if they are.

    Args:
        folder: the store.
        files: the files in it that would be loaded.
        root: the checkpoint the store is part of; it and every folder between are looked at too.

    Raises:
        ExecutableError: `root` does not contain `folder`, or a file is missing.
    """
    folder, root = folder.absolute(), root.absolute()
    if not folder.is_relative_to(root):
        raise ExecutableError(f"the executable store {folder} is not inside {root}")
    folders = [folder, *folder.parents]
    folders = folders[: folders.index(root) + 1]
    reasons = [reason for path in (*folders, *files) if (reason := _reason(path))]
    for path in folders:
        if (path / _HUB_MARK).exists():
            reasons.append(f"{path} was downloaded")
    return reasons


def _reason(path: Path) -> str | None:
    try:
        status = os.lstat(path)
    except OSError as error:
        raise ExecutableError(f"{path} cannot be examined: {error.strerror}") from None
    if status.st_uid != os.geteuid():
        return f"{path} belongs to user {status.st_uid}, you are user {os.geteuid()}"
    if stat.S_ISLNK(status.st_mode):
        return f"{path} is a symbolic link"
    if status.st_mode & stat.S_IWOTH:
        return f"{path} can be written by everybody (chmod o-w would end that)"
    if status.st_mode & stat.S_IWGRP:
        return f"{path} can be written by its group (chmod g-w would end that)"
    return None
