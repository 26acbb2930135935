"""Every code block of the documentation runs, or says why not; and what the pages quote is there.

The slow tests run each page in a folder of its own, as its reader would, beside a tiny random model: `ORG/MODEL` is its
Hugging Face folder, `model.elastic` a checkpoint of it with mode M compiled. The Hub is the one of tests/support.
scripts/new_user.py runs the start page on a real model.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_blocks import BlockError, blocks_of
from hub_server import TOKEN, HubServer, serve_hub

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
WITH_CODE = [page for page in PAGES if any(block.not_run is None for block in blocks_of(page))]

NOT_RUN = {
    "README.md": 3,
    "evaluation.md": 2,
    "install.md": 1,
    "start.md": 2,
    "targets.md": 2,
}
"""Page -> how many of its blocks are not run. A block that is left out is counted here, so that none is by accident."""

UV = """#!/bin/sh
# The environment is there already: syncing is not needed, and what is run, runs in it.
case "$1" in
    sync) ;;
    run) shift; exec "$@" ;;
    *) echo "uv $1: not expected in the documentation" >&2; exit 1 ;;
esac
"""


def test_every_block_says_what_it_is() -> None:
    left_out = Counter(page.name for page in PAGES for block in blocks_of(page) if block.not_run is not None)
    assert dict(left_out) == NOT_RUN
    assert sum(block.not_run is None for page in PAGES for block in blocks_of(page)) > 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```\nls\n```\n", "p.md:1: a fence must be one of"),
        ("```bash\nls\n", "p.md:1: this fence is not closed"),
        ("<!-- not run: no time -->\n```bash\nls\n```\n", "p.md:2: a block may be left out for one of"),
    ],
)
def test_blocks_that_say_nothing_of_themselves(tmp_path: Path, text: str, message: str) -> None:
    page = tmp_path / "p.md"
    page.write_text(text)
    with pytest.raises(BlockError, match=re.escape(message)):
        blocks_of(page)


def test_blocks_and_their_marks(tmp_path: Path) -> None:
    page = tmp_path / "p.md"
    page.write_text(
        "```text\nno code\n```\n```python\nprint(1)\n```\n\n<!-- run: fresh (it installs) -->\n```bash\npip\n```\n"
        "- in a list\n\n  <!-- not run: needs Docker, and time -->\n  ```bash\n  docker \\\n    build\n  ```\n"
    )
    python, fresh, docker = blocks_of(page)
    assert (python.where, python.text, python.fresh, python.not_run) == ("p.md:4", "print(1)", False, None)
    assert python.shell == "python - <<'END-OF-BLOCK'\nprint(1)\nEND-OF-BLOCK"
    assert (fresh.shell, fresh.fresh) == ("pip", True)
    assert (docker.text, docker.not_run) == ("docker \\\n  build", "needs Docker, and time")


def test_messages_that_are_explained_are_in_the_sources() -> None:
    """Each heading of the troubleshooting page is a piece of a message: words between values."""
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text("utf-8")
    headings = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    sources = "\n".join(
        path.read_text("utf-8")
        for package in ("elastic_jax", "converters", "aot_cache")
        for path in (REPOSITORY / package).rglob("*.py")
    )
    # A message may be split among literals, and a value may stand where the page has one.
    words = re.sub(r'"\s*\n\s*f?"', "", sources)
    assert len(headings) > 20
    assert [heading for heading in headings if heading not in words] == []


def test_every_page_is_reached_from_the_index() -> None:
    index = (REPOSITORY / "docs" / "index.md").read_text("utf-8")
    listed = {line for line in index.splitlines() if re.fullmatch(r"[a-z-]+", line)}
    assert {f"{name}.md" for name in listed} <= {page.name for page in PAGES}
    assert "*" in index.splitlines()  # whatever is not listed by name


# -- running -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with serve_hub() as server:
        yield server


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, hub: HubServer) -> dict[str, str]:
    """The environment of the blocks: the programs of this one, caches of their own."""
    folder = tmp_path_factory.mktemp("reader")
    programs = folder / "bin"
    programs.mkdir()
    (programs / "uv").write_text(UV)
    (programs / "uv").chmod(0o755)
    dropped = ("XLA_FLAGS", "HF_HUB_OFFLINE", "HF_HOME", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    # The demo's model, which one page fetches, is there from other tests.
    cache = Path(os.environ.get("ELASTIC_JAX_CACHE") or REPOSITORY / ".cache" / "elastic-jax")
    own = folder / "cache"
    own.mkdir()
    for model in cache.glob("*.gguf"):
        (own / model.name).symlink_to(model.resolve())
    return kept | {
        "PATH": path,
        "ELASTIC_JAX_CACHE": str(own),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hub"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "JAX_PLATFORMS": "cpu",
    }


def run(script: str, folder: Path, environment: dict[str, str]) -> None:
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-6000:]}"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, reader: dict[str, str]) -> Path:
    """A folder with `ORG/MODEL` and `model.elastic`."""
    folder = tmp_path_factory.mktemp("compiled")
    shutil.copytree(REPOSITORY / "tests" / "fixtures" / "tiny_mistral", folder / "ORG" / "MODEL")
    run("elastic-jax convert ORG/MODEL model.elastic; elastic-jax compile model.elastic --mode M", folder, reader)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", WITH_CODE, ids=[page.name for page in WITH_CODE])
def test_the_blocks_of_a_page_run(page: Path, compiled: Path, reader: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "reader"
    shutil.copytree(compiled, folder)
    blocks = [block for block in blocks_of(page) if block.not_run is None and not block.fresh]
    lines = [line for block in blocks for line in (f"echo '--- {block.where}' >&2", block.shell)]
    run("\n".join(lines), folder, reader)
