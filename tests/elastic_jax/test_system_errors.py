"""Errors of the system in words."""

import errno
from pathlib import Path

import pytest

from elastic_jax.system_errors import about, describe


def test_an_error_without_a_file_gets_one() -> None:
    with pytest.raises(OSError, match="No space left on device") as caught, about(Path("there")):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == "there"
    assert describe(caught.value).startswith("there: No space left on device: free some space")


def test_an_error_with_a_file_keeps_it() -> None:
    with pytest.raises(FileNotFoundError) as caught, about(Path("there")):
        Path("absent").read_bytes()
    assert describe(caught.value) == "absent: No such file or directory"
    with pytest.raises(OSError, match=r"^words$") as caught, about(Path("there")):
        raise OSError("words")
    assert describe(caught.value) == "words"


def test_a_file_that_stands_for_another_is_called_by_its_name() -> None:
    for name, expected in (("there.partial", "there"), ("absent", "absent")):
        with pytest.raises(FileNotFoundError) as caught, about(Path("there"), instead_of=Path("there.partial")):
            Path(name).read_bytes()
        assert describe(caught.value) == f"{expected}: No such file or directory"
