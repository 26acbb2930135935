"""`info --plot` on a checkpoint, before and after a search."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_jax import cli
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.errors import ConfigError, RequestError
from elastic_jax.groups import LM_HEAD, model_groups
from elastic_jax.info_plot import plot, sensitivities
from elastic_jax.search.scores import SCORES, Score, Scores


@pytest.fixture
def checkpoint(checkpoint_of: Callable[[str], Checkpoint], tmp_path: Path) -> Checkpoint:
    folder = tmp_path / "tiny.elastic"
    shutil.copytree(checkpoint_of("tiny_llama").path, folder, ignore=shutil.ignore_patterns("executables"))
    return Checkpoint.open(folder)


def write_scores(checkpoint: Checkpoint) -> None:
    scores = Scores({})
    for number, name in enumerate(model_groups(checkpoint.config)):
        scores.add("alone", "prompt", name, "w8a16", Score(1e-6 * (number + 1), 0.0))
        if name != LM_HEAD:
            scores.add("alone", "prompt", name, "w8a8", Score(1e-4 * (number + 1), 0.1))
    scores.add("last", "prompt", LM_HEAD, "bf16", Score(9.0, 0.0))
    scores.save(checkpoint.path / SCORES)


def test_without_a_search_plans_alone_are_drawn(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert sensitivities(checkpoint) == []
    plot(checkpoint, tmp_path / "plans.svg", "tiny")
    text = (tmp_path / "plans.svg").read_text()
    assert text.count("<g transform") == 4
    assert "KL in nats" not in text


def test_a_searchs_scores_are_beside_them(checkpoint: Checkpoint, tmp_path: Path) -> None:
    write_scores(checkpoint)
    found = {one.title.split()[-1]: one.kl for one in sensitivities(checkpoint)}
    assert set(found) == {"w8a16", "w8a8"}
    assert set(found["w8a16"]) == set(model_groups(checkpoint.config))
    assert LM_HEAD not in found["w8a8"]
    assert found["w8a8"]["layers.0.qkv"] == 1e-4
    plot(checkpoint, tmp_path / "plans.svg", "tiny")
    assert (tmp_path / "plans.svg").read_text().count("<g transform") == 6


def test_other_files_and_damaged_scores(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"ends in \.svg, found"):
        plot(checkpoint, tmp_path / "plans.png", "tiny")
    (checkpoint.path / "search").mkdir()
    (checkpoint.path / SCORES).write_text("{")
    with pytest.raises(ConfigError, match="no file of scores"):
        plot(checkpoint, tmp_path / "plans.svg", "tiny")
    assert not list(tmp_path.glob("plans*"))


def test_the_command(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plans.svg"
    monkeypatch.setattr(sys, "argv", ["elastic-jax", "info", str(checkpoint.path), "--plot", str(file), "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["plot"] == str(file)
    assert file.read_text().startswith("<svg")
