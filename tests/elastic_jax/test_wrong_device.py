"""Devices that are not there: every command ends with one message, each in a process, since JAX chooses once in one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import FIXTURES, CompiledTiny

from elastic_jax.checkpoint import Checkpoint
from elastic_jax.elastic import ElasticMistral
from elastic_jax.errors import ConfigError

BROKEN_PLUGIN = """
def initialize():
    raise RuntimeError("Unable to load cuPTI.\\nIs it installed?")
"""


@pytest.fixture
def checkpoint(checkpoint_of: Callable[[str], Checkpoint]) -> str:
    return str(checkpoint_of("tiny_llama").path)


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python(*arguments, platforms=..., plugin=False)`: runs Python, JAX told to use these platforms, with a plugin
    for CUDA that cannot start."""

    def run(
        *arguments: str, platforms: str | None, plugin: bool = False, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ELASTIC_JAX_CACHE": str(tmp_path / "cache")}
        if platforms is not None:
            environment["JAX_PLATFORMS"] = platforms
        if plugin:
            (tmp_path / "path" / "jax_plugins" / "xla_cuda13").mkdir(parents=True)
            (tmp_path / "path" / "jax_plugins" / "xla_cuda13" / "__init__.py").write_text(BROKEN_PLUGIN)
            environment["PYTHONPATH"] = str(tmp_path / "path")
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, check=False, input=stdin, env=environment
        )

    return run


@pytest.mark.parametrize(
    ("command", "platforms"),
    [
        ("generate {checkpoint} -p x", "cuda"),
        ("convert {source} {new}", "nonsense"),
        # Each is a process, of seconds; what they share is tested above.
        pytest.param("generate {checkpoint} -p x", "nonsense", marks=pytest.mark.slow),
        pytest.param("generate {checkpoint} -p x", "tpu", marks=pytest.mark.slow),
        pytest.param("chat {checkpoint}", "nonsense", marks=pytest.mark.slow),
        pytest.param("compile {checkpoint} --mode S", "cuda", marks=pytest.mark.slow),
        pytest.param("convert {source} {new}", "cuda", marks=pytest.mark.slow),
        pytest.param("plan {source}", "cuda", marks=pytest.mark.slow),
        pytest.param("cost {checkpoint}", "nonsense", marks=pytest.mark.slow),
        pytest.param("search {checkpoint}", "cuda", marks=pytest.mark.slow),
        pytest.param("calibrate {checkpoint} {new}", "nonsense", marks=pytest.mark.slow),
        pytest.param("dump-target", "nonsense", marks=pytest.mark.slow),
    ],
)
def test_a_platform_that_is_not_there_is_one_message(
    python: Callable[..., subprocess.CompletedProcess[str]],
    checkpoint: str,
    tmp_path: Path,
    command: str,
    platforms: str,
) -> None:
    words = command.format(checkpoint=checkpoint, source=FIXTURES / "tiny_llama", new=tmp_path / "new").split()
    done = python("-m", "elastic_jax", *words, platforms=platforms)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: JAX finds no device of JAX_PLATFORMS='{platforms}'")
    assert len(done.stderr.splitlines()) == 1
    assert "install what it needs" in done.stderr
    assert "or unset JAX_PLATFORMS" in done.stderr
    assert not (tmp_path / "new").exists()


def test_what_needs_no_device_asks_for_none(
    python: Callable[..., subprocess.CompletedProcess[str]], checkpoint: str
) -> None:
    done = python("-m", "elastic_jax", "info", checkpoint, platforms="nonsense")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_doctor_names_a_platform_that_is_not_there(
    python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = python("-m", "elastic_jax", "doctor", platforms="nonsense")
    assert done.returncode == 1
    assert "WRONG  device      JAX finds no device of JAX_PLATFORMS='nonsense'" in done.stdout
    assert "-> unset JAX_PLATFORMS" in done.stdout
    assert done.stderr == ""


# -- a plugin that does not start --------------------------------------------------------------------------------------


@pytest.mark.slow  # compiles a mode in a process of its own
def test_a_plugin_that_does_not_start_is_one_line(
    python: Callable[..., subprocess.CompletedProcess[str]], compiled_tiny: Callable[..., CompiledTiny]
) -> None:
    folder = str(compiled_tiny("XL", "float32", "tiny_llama").checkpoint.path)
    command = ("generate", folder, "--mode", "XL", "--dtype", "float32", "-p", "x", "--max-new-tokens", "2")
    done = python("-m", "elastic_jax", *command, platforms=None, plugin=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stderr.splitlines()
    assert first.startswith(
        "note: JAX uses the CPU: the plugin for CUDA 13 does not start: Unable to load cuPTI. Is it"
    )
    assert second.startswith("mode XL")


def test_the_doctor_says_why_a_plugin_does_not_start(
    python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = python("-m", "elastic_jax", "doctor", platforms=None, plugin=True)
    assert done.stderr == ""
    assert "the plugin for CUDA 13 does not start: Unable to load cuPTI." in done.stdout


def test_an_error_says_why_a_plugin_does_not_start(
    python: Callable[..., subprocess.CompletedProcess[str]], checkpoint: str
) -> None:
    done = python("-m", "elastic_jax", "generate", checkpoint, "-p", "x", platforms="cuda", plugin=True)
    assert done.returncode == 1
    assert "JAX_PLATFORMS='cuda' (the plugin for CUDA 13 does not start: Unable to load cuPTI." in done.stderr
    assert len(done.stderr.splitlines()) == 1


# -- Python ------------------------------------------------------------------------------------------------------------


def test_from_python_it_is_one_exception(
    python: Callable[..., subprocess.CompletedProcess[str]], checkpoint: str
) -> None:
    """Whatever `device_map` asks for; all in one process, as importing Transformers takes most of it."""
    script = (
        "import traceback\n"
        "from elastic_jax.transformers import AutoModelForCausalLM\n"
        "for device_map in ('cuda', 'cuda:3', None):\n"
        "    try:\n"
        f"        AutoModelForCausalLM.from_pretrained({checkpoint!r}, device_map=device_map, compile='never')\n"
        "    except Exception:\n"
        "        print(traceback.format_exc(), end='---')\n"
    )
    done = python("-c", script, platforms="nonsense")
    assert done.returncode == 0, done.stderr
    *printed, rest = done.stdout.split("---")
    assert (len(printed), rest) == (3, "")
    for text in printed:
        assert text.count("Traceback") == 1
        assert "ConfigError: JAX finds no device of JAX_PLATFORMS='nonsense'" in text.splitlines()[-1]


@pytest.mark.usefixtures("unchecked_types")
def test_a_device_is_one_of_jax(checkpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"device must be one of JAX's, .* found 'cuda:3'"):
        ElasticMistral.load(checkpoint, "XL", device="cuda:3")  # pyright: ignore[reportArgumentType]  (what is wrong with it)
