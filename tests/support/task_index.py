"""lm-eval's index of its tasks: reading it from thousands of YAML files takes most of a test that loads tasks."""

import hashlib
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny import exclusive


@contextmanager
def index_read_once(folder: Path) -> Iterator[None]:
    """Within it lm-eval builds an index once for all test processes; who asks again gets a copy of their own.

    Args:
        folder: where the processes share it. It is unpickled, so nobody else may write there.
    """
    from lm_eval.tasks._index import TaskIndex

    build = TaskIndex.build

    def built_once(paths: Iterable[Path], **options: Any) -> Any:
        paths = list(paths)
        key = hashlib.sha256(repr((paths, options)).encode()).hexdigest()[:16]
        with exclusive(folder / f"tasks.{key}.lock"):
            file = folder / f"tasks.{key}.pickle"
            if not file.is_file():
                file.write_bytes(pickle.dumps(build(paths, **options)))
            return pickle.loads(file.read_bytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(built_once))
        yield
