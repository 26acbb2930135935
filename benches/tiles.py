"""Measured sizes of kernels, as data in the package: a bench replaces what it measured, and keeps the rest."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_tiles(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Adds entries to a file, one a line; an entry with the same device and work as a new one gives way to it."""

    def key(entry: dict[str, Any]) -> str:
        return json.dumps({name: value for name, value in entry.items() if name != "tiles"}, sort_keys=True)

    old = json.loads(path.read_text()) if path.exists() else []
    merged = {key(entry): entry for entry in (*old, *entries)}
    path.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in merged.values()) + "\n]\n")
