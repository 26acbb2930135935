"""What installing takes, and the steps of the Dockerfiles, which are run here without Docker."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
LIMIT_MB = 250
DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.cuda")
UV_VERSION = re.compile(r"UV_VERSION=(\S+)")


@pytest.fixture(scope="module")
def install_size() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_size", REPOSITORY / "scripts" / "install_size.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["install_size"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_size(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "scripts" / "install_size.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_base_installation_is_small() -> None:
    done = run_size()
    assert done.returncode == 0, done.stderr
    *wheels, total = done.stdout.splitlines()
    sizes = [float(line.split()[0]) for line in wheels]
    assert sum(sizes) == pytest.approx(float(total.split()[0]), abs=0.01 * len(sizes))
    assert 100 < float(total.split()[0]) <= LIMIT_MB
    packages = {line.split()[2] for line in wheels}
    assert {"jax", "jaxlib", "flax", "transformers"} <= packages
    assert not {name for name in packages if "cuda" in name or name in ("torch", "mistral-common", "pytest", "sphinx")}


def test_more_than_the_limit_is_an_error() -> None:
    done = run_size("--limit-mb", "10")
    assert done.returncode == 1
    assert "more than 10 MB" in done.stderr


def test_it_agrees_with_what_uv_would_install(install_size: ModuleType) -> None:
    command = ["export", "--frozen", "--no-default-groups", "--no-emit-project", "--no-hashes", "--no-annotate"]
    done = subprocess.run(
        [str(REPOSITORY / "scripts" / "uv"), *command], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    from packaging.requirements import Requirement
    from packaging.tags import sys_tags

    wanted = [Requirement(line) for line in done.stdout.splitlines() if line and not line.startswith("#")]
    expected = {one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})}
    lock = tomllib.loads((REPOSITORY / "uv.lock").read_text("utf-8"))
    assert {wheel.package for wheel in install_size.base_wheels(lock, list(sys_tags()), {})} == expected


def test_a_lock_without_a_fitting_wheel_is_an_error(install_size: ModuleType) -> None:
    lock = {
        "package": [
            {"name": "elastic-jax", "version": "1", "dependencies": [{"name": "a"}]},
            {"name": "a", "version": "2", "wheels": [{"url": "https://example.org/a-2-py2-none-any.whl", "size": 5}]},
        ]
    }
    with pytest.raises(ValueError, match="no wheel of a 2 for this platform"):
        install_size.base_wheels(lock, [], {})


# -- Dockerfiles -------------------------------------------------------------------------------------------------------


def instructions(name: str) -> list[tuple[str, str]]:
    lines = (REPOSITORY / name).read_text("utf-8").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line and not line.startswith("#")]  # type: ignore[misc]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_dockerfile_is_whole(name: str) -> None:
    found = instructions(name)
    known = {"FROM", "ARG", "ENV", "WORKDIR", "RUN", "COPY", "ENTRYPOINT", "CMD"}
    assert {instruction for instruction, _ in found} <= known
    assert sum(instruction == "FROM" for instruction, _ in found) == 2
    ignored = (REPOSITORY / ".dockerignore").read_text("utf-8")
    for instruction, rest in found:
        if instruction == "COPY" and not rest.startswith("--from="):
            for source in rest.split()[:-1]:
                assert (REPOSITORY / source).exists(), source
                assert f"!{source}\n" in ignored
    version = UV_VERSION.search((REPOSITORY / "scripts" / "uv").read_text("utf-8"))
    assert version is not None
    assert ("RUN", f"pip install --no-cache-dir uv=={version[1]}") in found
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    sync = next(rest for instruction, rest in found if rest.startswith("uv sync"))
    arguments = dict(rest.split("=") for instruction, rest in found if instruction == "ARG")
    for extra in re.findall(r"--extra (\S+)", sync):
        assert arguments.get(extra.removeprefix("$"), extra) in extras


@pytest.mark.slow
@pytest.mark.parametrize("name", DOCKERFILES)
def test_its_steps_run(name: str, tmp_path: Path) -> None:
    """In a folder that holds only what is copied. CUDA's packages are resolved, and not downloaded."""
    source, environment = tmp_path / "src", tmp_path / "environment"
    source.mkdir()
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("UV", "VIRTUAL_ENV"))}
    uv = None
    for instruction, rest in instructions(name):
        if instruction == "FROM" and not rest.endswith("AS build"):
            break
        if instruction in ("ENV", "ARG"):
            variables |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif instruction == "COPY":
            *copied, _ = rest.split()
            for each in copied:
                path = REPOSITORY / each
                if path.is_dir():
                    shutil.copytree(path, source / each, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(path, source)
        elif rest.startswith("pip install"):
            subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "pip")], check=True)
            subprocess.run([str(tmp_path / "pip" / "bin" / "python"), "-m", *shlex.split(rest)], check=True)
            uv = tmp_path / "pip" / "bin" / "uv"
        elif rest.startswith("uv sync"):
            assert uv is not None
            variables |= {"UV_PROJECT_ENVIRONMENT": str(environment), "UV_PYTHON": sys.executable}
            dry = " --dry-run" if name == "Dockerfile.cuda" else ""
            script = f"{shlex.quote(str(uv))} {rest.removeprefix('uv ')}{dry}"
            done = subprocess.run(
                ["sh", "-c", script], cwd=source, env=variables, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            assert ("jax-cuda13-plugin" in done.stderr) == (name == "Dockerfile.cuda")
    if name == "Dockerfile.cpu":
        shutil.rmtree(source)  # nothing of it is needed any more
        program = environment / "bin" / "elastic-jax"
        told = subprocess.run([str(program), "targets"], capture_output=True, text=True, check=True, cwd=tmp_path)
        assert "h100" in told.stdout
        files = list(environment.rglob("libelastic_decode.so"))
        assert len(files) == 1
