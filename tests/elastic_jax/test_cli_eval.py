"""The command `eval`: what it refuses, and that it passes its options on. `test_evaluate.py` evaluates."""

import json
import sys

import pytest
from tiny_items import write_items

from elastic_jax import cli


@pytest.fixture
def call(monkeypatch, capsys):
    def called(*arguments):
        monkeypatch.setattr(sys, "argv", ["elastic-jax", "eval", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return called


@pytest.fixture(scope="module")
def path(checkpoint_of):
    return checkpoint_of("tiny_mistral").path


def test_without_lm_eval_it_is_said_how_to_get_it(call, path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    status, _, err = call(path)
    assert status == 1
    assert "uv sync --extra eval" in err


def test_what_cannot_be_evaluated_is_one_message(call, path, tmp_path):
    data = write_items(tmp_path / "items")
    for arguments, message in (
        (("--kl-windows", 9, "--text-windows", 3), "9 of 3 were asked"),
        (("--data", tmp_path / "none"), "expected one file arc_challenge_*.jsonl"),
        (("--data", data, "--tasks", "piqa,hellaswag"), "no local items are known for task 'hellaswag'"),
        (("--data", data, "--modes", "XL,Q"), "no mode 'Q'"),
        (("--data", data, "--tasks", "piqa", "--limit", "mmlu=3"), "--limit names 'mmlu'"),
    ):
        status, out, err = call(path, *arguments)
        assert (status, out) == (1, "")
        assert message in err
        assert "Traceback" not in err
    assert call(tmp_path / "no.elastic", "--data", data)[0] == 1


@pytest.mark.usefixtures("task_index")
def test_options_reach_the_evaluation(call, path, tmp_path, monkeypatch):
    from elastic_jax.evaluation import evaluate

    data, seen = write_items(tmp_path / "items"), []

    def run(self):
        seen.append(self._settings)
        raise evaluate.EvaluationError("far enough")

    monkeypatch.setattr(evaluate.Evaluation, "run", run)
    arguments = ("--modes", "XL, S,W8A8", "--tasks", "piqa,mmlu", "--data", data, "--limit", "piqa=5")
    status, _, err = call(path, *arguments, "--text-windows", 0, "--kl-windows", 0, "--json")
    assert (status, err) == (1, "error: far enough\n")
    (settings,) = seen
    assert settings.modes == ["XL", "S", "W8A8"]
    assert settings.tasks == ["piqa", "mmlu"]
    assert settings.out == path / "evaluation"
    assert settings.limit == "piqa=5"
    assert json.dumps(str(settings.data)) == json.dumps(str(data))
