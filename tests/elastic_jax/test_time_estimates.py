"""Times told before a model is downloaded: near to what was measured, and in the right order."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import FIXTURES, MISTRAL_SMALL

from aot_cache.targets import find
from elastic_jax import cli
from elastic_jax.errors import ConfigError
from elastic_jax.executables import default_step_config
from elastic_jax.plan import provisional_plans
from elastic_jax.search.workload import Workload
from elastic_jax.sizing import Place, place, size_mode
from elastic_jax.time_estimates import TimeEstimate, estimate_times, measured_reading

RESULTS = Path(__file__).resolve().parents[2] / "benches" / "results"
PLANS = provisional_plans(MISTRAL_SMALL)
STEP = default_step_config(MISTRAL_SMALL, "gpu", "bfloat16", kv_slots=16384, max_context=None)


def estimate(mode: str, workload: Workload, target: str = "h100") -> TimeEstimate:
    return estimate_times(MISTRAL_SMALL, PLANS[mode], workload, find(target), STEP)


@pytest.mark.parametrize("mode", ["XL", "S"])
def test_they_are_near_to_what_was_measured(mode: str) -> None:
    result = json.loads((RESULTS / "nvidia-h100" / "latency.json").read_text("utf-8"))
    row: dict[str, Any] = next(r for r in result["rows"] if (r["mode"], r["batch"], r["context"]) == (mode, 1, 1024))
    found = estimate(mode, Workload(1024, 100, 1))
    assert found.tokens_per_second == pytest.approx(row["decode_tok_s_per_seq"], rel=0.25)
    assert found.first_token_seconds == pytest.approx(row["ttft_ms"] / 1e3, rel=0.5)


def test_faster_modes_and_devices_are_faster() -> None:
    work = Workload(1024, 128, 1)
    assert estimate("S", work).seconds < estimate("L", work).seconds < estimate("XL", work).seconds
    assert estimate("S", work, "h200").tokens_per_second > estimate("S", work, "h100").tokens_per_second
    more = estimate("S", Workload(2048, 256, 1))
    assert more.first_token_seconds > 1.5 * estimate("S", work).first_token_seconds
    assert more.seconds == pytest.approx(2 * estimate("S", work).seconds, rel=0.1)


def test_older_gpus_are_not_predicted() -> None:
    described = find("a100")
    older = dataclasses.replace(described, config=described.config.replace("major: 8", "major: 7"))
    with pytest.raises(ConfigError, match=r"from compute capability 8\.0 on"):
        estimate_times(MISTRAL_SMALL, PLANS["S"], Workload(1, 1, 1), older, STEP)
    where = Place("older", "gpu", 1 << 36, 10**12, older)
    sized = size_mode(MISTRAL_SMALL, PLANS["S"], where, "bfloat16", max_context=None, workload=Workload(1, 1, 1))
    assert sized["fits"]
    assert sized["estimate"] is None


def test_reading_is_measured() -> None:
    assert 1e8 < measured_reading() < 1e13


def test_a_cpu_has_a_rate_and_no_estimate() -> None:
    where = place(None)
    assert where.bandwidth is not None
    sized = size_mode(MISTRAL_SMALL, PLANS["S"], where, "bfloat16", max_context=None, workload=Workload(1, 1, 1))
    assert sized["estimate"] is None
    assert sized["decode_tokens_per_second_at_most"] > 0


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_tells_them(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", str(FIXTURES / "tiny_mistral"), "--target", "h200", "--batch", "4", "--new-tokens", "7"]
    monkeypatch.setattr(sys, "argv", ["elastic-jax", *arguments, *(["--json"] if as_json else [])])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    out = capsys.readouterr().out
    if not as_json:
        assert "predicted, not measured, for 4 x (1024 prompt + 7 new tokens)" in out
        return
    planned = json.loads(out)
    assert planned["workload"] == {"prompt_tokens": 1024, "new_tokens": 7, "batch": 4}
    assert all(mode["estimate"]["seconds"] > 0 for mode in planned["modes"])
