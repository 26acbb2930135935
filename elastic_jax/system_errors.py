"""The system's own errors, made to say what they are about: `No space left on device` names no file by itself."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ADVICE = {
    **dict.fromkeys(_FULL, "free some space, or raise the limit, and run the same command again"),
    errno.EROFS: "name a place that can be written",
}


@contextlib.contextmanager
def about(path: Path, *, instead_of: Path | None = None) -> Iterator[None]:
    """Lets an error of the system that names no file name this one.

    Args:
        path: the file that the caller knows.
        instead_of: one that stands for it until it is whole; an error that names it names `path` too.

    Raises:
        OSError: as it came, with the file's name.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(instead_of)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def describe(error: OSError) -> str:
    """An error of the system in words: which file, what, and what to do where that is clear."""
    if error.errno is None or error.strerror is None:
        return str(error)
    where = "" if error.filename is None else f"{error.filename}: "
    advice = _ADVICE.get(error.errno)
    return f"{where}{error.strerror}" + (f": {advice}" if advice else "")
