#!/usr/bin/env python3
"""Follows docs/start.md literally, as a new user would: a copy of the sources, a fresh environment, an empty cache.

    make new-user                            # or: python3 scripts/new_user.py [--keep] [--page docs/start.md]

Every block that is not marked `not run` is run in the order of the page, in one shell, so what one block leaves is
there for the next. Nothing is taken from this checkout's environment or from its caches; the installer's own cache of
downloads is not used either. Prints a table of seconds a block, and ends with the status of the first block that
failed.

Needs Python 3.12 or later, git, and a network.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

from doc_blocks import Block, blocks_of  # noqa: E402  (found by the line above)

MARK = "@@ block "
"""Begins the line that tells which block begins."""

LIMIT_SECONDS = 1800


def script_of(blocks: list[Block]) -> str:
    """One shell script of all blocks, which tells where it is on descriptor 3."""
    lines = ["set -eu"]
    for number, block in enumerate(blocks):
        lines += [f"echo '{MARK}{number}' >&3", block.shell]
    return "\n".join([*lines, f"echo '{MARK}{len(blocks)}' >&3"])


def fresh_environment(home: Path) -> dict[str, str]:
    """The caller's variables without those of Python environments and caches; a home of its own."""
    dropped = ("ELASTIC_JAX_CACHE", "VIRTUAL_ENV", "PYTHONPATH", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "UV")
    kept = {name: value for name, value in os.environ.items() if name not in dropped and not name.startswith("JAX_")}
    environment = Path(sys.prefix) / "bin"
    path = [folder for folder in kept["PATH"].split(os.pathsep) if Path(folder) != environment]
    return kept | {"HOME": str(home), "PATH": os.pathsep.join(path), "PIP_NO_CACHE_DIR": "1", "XDG_CACHE_HOME": ""}


def follow(page: Path, folder: Path) -> tuple[int, list[tuple[Block, float]]]:
    """Runs a page in `folder`.

    Returns:
        the status, and each block that was begun with its seconds.
    """
    sources, home = folder / "elastic-jax", folder / "home"
    home.mkdir(parents=True)
    sources.mkdir()
    # What is committed and what is not yet, without what git ignores.
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    existing = b"\0".join(name for name in names.split(b"\0") if name and (ROOT / os.fsdecode(name)).exists())
    packed = subprocess.run(
        ["tar", "--create", "--null", "--files-from=-"], cwd=ROOT, input=existing, capture_output=True, check=True
    ).stdout
    subprocess.run(["tar", "--extract"], cwd=sources, input=packed, check=True)
    blocks = [block for block in blocks_of(page) if block.not_run is None]
    read, write = os.pipe()
    command = ["timeout", "--signal=INT", str(LIMIT_SECONDS), "bash", "-c", f"exec 3>&{write}; {script_of(blocks)}"]
    process = subprocess.Popen(
        command, cwd=sources, env=fresh_environment(home), stdin=subprocess.DEVNULL, pass_fds=[write]
    )
    os.close(write)
    times: list[tuple[Block, float]] = []
    with os.fdopen(read) as marks:
        begun: tuple[Block, float] | None = None
        for line in marks:
            number = int(line.removeprefix(MARK))
            now = time.monotonic()
            if begun is not None:
                times.append((begun[0], now - begun[1]))
            begun = None
            if number < len(blocks):
                begun = (blocks[number], now)
                print(f"\n--- {blocks[number].where}\n{blocks[number].text}\n---", flush=True)
        if begun is not None:
            times.append((begun[0], time.monotonic() - begun[1]))
    return process.wait(), times


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "start.md")
    parser.add_argument("--keep", action="store_true", help="leave the folder, and say where it is")
    parser.add_argument("--limit", type=float, help="seconds that all blocks together may take")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="new-user.", delete=not arguments.keep) as folder:
        status, times = follow(arguments.page.resolve(), Path(folder))
        if arguments.keep:
            print(f"kept: {shlex.quote(folder)}")
    total = sum(seconds for _, seconds in times)
    print("\nseconds  block")
    for block, seconds in times:
        print(f"{seconds:7.1f}  {block.where}: {block.text.splitlines()[0]}")
    print(f"{total:7.1f}  in all")
    if status:
        sys.exit(f"{times[-1][0].where} failed with status {status}")
    if arguments.limit is not None and total > arguments.limit:
        sys.exit(f"{total:.0f} s in all, and at most {arguments.limit:.0f} s are allowed")


if __name__ == "__main__":
    main()
