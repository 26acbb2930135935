from pathlib import Path

import pytest
from typer.testing import CliRunner

from elastic_jax import cli
from elastic_jax.cli_bench import BenchError, run_bench

SCRIPT = """
import os, sys
from pathlib import Path
Path(sys.argv[1]).write_text(" ".join(sys.argv[2:]) + "|" + os.environ["PYTHONPATH"].split(os.pathsep)[0])
sys.exit(3)
"""


def test_a_bench_gets_its_arguments_and_the_repository_and_gives_its_status(tmp_path: Path):
    folder = tmp_path / "benches"
    folder.mkdir()
    (folder / "latency.py").write_text(SCRIPT)
    status = run_bench("latency", [str(tmp_path / "seen"), "--modes", "S", "-x"], folder)
    assert status == 3
    assert (tmp_path / "seen").read_text() == f"--modes S -x|{tmp_path}"


def test_absent_benches_are_one_clear_error(tmp_path: Path):
    with pytest.raises(BenchError, match=r"not of the installed package; run this in a checkout"):
        run_bench("kernels", [], tmp_path / "benches")


@pytest.mark.parametrize("name", ["latency", "startup", "kernels", "cpu"])
def test_options_after_the_name_are_the_benchs(monkeypatch: pytest.MonkeyPatch, name: str):
    seen = []
    monkeypatch.setattr("elastic_jax.cli_bench.run_bench", lambda *arguments: seen.append(arguments) or 0)
    done = CliRunner().invoke(cli.app, ["bench", name, "--help", "--modes", "S"])
    assert done.exit_code == 0
    assert seen == [(name, ["--help", "--modes", "S"])]


def test_every_bench_of_the_command_exists():
    from elastic_jax.cli_bench import BENCHES

    assert [name for name in ("latency", "startup", "kernels", "cpu") if not (BENCHES / f"{name}.py").is_file()] == []


def test_an_unknown_bench_is_refused():
    assert CliRunner().invoke(cli.app, ["bench", "speed"]).exit_code == 2
