"""Importing the package and asking for help load nothing heavy, which makes them quick (benches/imports.py)."""

import os
import subprocess
import sys

import pytest

from elastic_jax import cli

HEAVY = {"jax", "jaxlib", "numpy", "flax", "orbax", "tokenizers", "transformers", "huggingface_hub", "rich"}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONPATH")}

SCRIPT = """
import sys
{statement}
print(*({heavy!r} & set(sys.modules)))
"""


def loaded_by(statement: str, heavy: set[str]) -> list[str]:
    """The heavy modules that a fresh process has loaded."""
    script = SCRIPT.format(statement=statement, heavy=heavy)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    return done.stdout.split("\n")[-2].split()


def test_importing_the_package_loads_no_jax() -> None:
    assert loaded_by("import elastic_jax", HEAVY) == []


@pytest.mark.parametrize("name", ["elastic_jax.cli", "elastic_jax.cli_doctor", "elastic_jax.doctor"])
def test_the_command_line_and_the_doctor_load_no_jax(name: str) -> None:
    assert loaded_by(f"import {name}", HEAVY - {"rich"}) == []


def test_help_loads_no_jax() -> None:
    statement = (
        "from elastic_jax import cli\nsys.argv = ['elastic-jax', '--help']\ntry: cli.main()\nexcept SystemExit: pass"
    )
    assert loaded_by(statement, HEAVY) == []


def test_names_are_there_once_asked_for() -> None:
    assert loaded_by("import elastic_jax\nassert elastic_jax.ElasticMistral.load", {"jax"}) == ["jax"]


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
