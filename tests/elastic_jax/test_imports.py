"""What importing the package and asking for help cost: neither may load JAX. Each in a fresh process."""

import os
import subprocess
import sys

import pytest

from elastic_jax import cli

HEAVY = {"jax", "jaxlib", "numpy", "flax", "orbax", "tokenizers", "transformers", "huggingface_hub", "rich"}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONPATH")}

TIMED = """
import sys, time
start = time.process_time()
{statement}
print(time.process_time() - start, *({heavy!r} & set(sys.modules)))
"""


def run_fresh(statement: str, heavy: set[str]) -> tuple[float, list[str]]:
    """Processor seconds, which do not depend on what else runs here, and the heavy modules that were loaded."""
    script = TIMED.format(statement=statement, heavy=heavy)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    seconds, *loaded = done.stdout.split("\n")[-2].split()
    return float(seconds), loaded


def test_importing_the_package_is_quick_and_loads_no_jax() -> None:
    seconds, loaded = run_fresh("import elastic_jax", HEAVY)
    assert loaded == []
    assert seconds < 0.3


@pytest.mark.parametrize("name", ["elastic_jax.cli", "elastic_jax.cli_doctor", "elastic_jax.doctor"])
def test_the_command_line_and_the_doctor_load_no_jax(name: str) -> None:
    _, loaded = run_fresh(f"import {name}", HEAVY - {"rich"})
    assert loaded == []


def test_help_takes_less_than_half_a_second_of_processor_time() -> None:
    statement = (
        "from elastic_jax import cli\nsys.argv = ['elastic-jax', '--help']\ntry: cli.main()\nexcept SystemExit: pass"
    )
    seconds, loaded = run_fresh(statement, HEAVY)
    assert loaded == []
    assert seconds < 0.5


def test_names_are_there_once_asked_for() -> None:
    _, loaded = run_fresh("import elastic_jax\nassert elastic_jax.ElasticMistral.load", {"jax"})
    assert loaded == ["jax"]


def test_the_list_of_commands_has_whole_summaries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["elastic-jax", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    listed = " ".join(capsys.readouterr().out.partition("Commands:")[2].split())
    assert "batch Answer a file of requests." in listed
    assert "verify Check every file of a checkpoint and of its executables against its digest; nothing is" in listed
    assert "..." not in listed
