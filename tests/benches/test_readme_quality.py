import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
import readme_quality


def row(mode: str, task: str, **changes: Any) -> dict[str, Any]:
    values = {
        "mode": mode,
        "task": task,
        "n": 1838,
        "accuracy": 0.67,
        "stderr": 0.011,
        "recovery": 0.995,
        "loss": 0.005,
        "loss_upper95": 0.012,
        "flips": 0.03,
        "mcnemar_p": 0.4,
    }
    mean = {
        "kl": 0.0123,
        "kl_generated": 0.004,
        "perplexity": 24.5,
        "perplexity_change": 0.011,
        "promise": {"S": 0.02, "L": 0.01}.get(mode),
        "certified": {"S": True, "L": False}.get(mode),
    }
    return values | (mean if task == "mean" else {}) | changes


@pytest.fixture
def result() -> dict[str, Any]:
    rows = [row(mode, task) for mode in ("L", "S", "XL", "Original", "W8A8") for task in ("piqa", "winogrande", "mean")]
    return {
        "bench": "quality",
        "environment": {
            "device": "NVIDIA H100 80GB HBM3",
            "cores": 16,
            "versions": {"jax": "0.11.2", "lm_eval": "0.4"},
        },
        "source": {"files": [{"name": "SmolLM2.gguf"}]},
        "calibrated": True,
        "plans": {"S": {"provisional": False}, "L": {"provisional": True}, "XL": {"provisional": True}},
        "original": {"versions": {"transformers": "5.24.0"}},
        "text": {"windows": 32, "length": 512},
        "kl_windows": 8,
        "left_out": {"winogrande": "at chance level"},
        "differing": {"piqa": {"answers": 3, "rights": 2}, "winogrande": {"answers": 1, "rights": 1}},
        "rows": rows,
    }


def test_the_table_has_every_mode_and_what_the_mean_says(result):
    text = readme_quality.quality(result)
    assert r"|  | items | S | L\* | XL | Original | W8A8 |" in text
    assert "| winogrande (not in the mean) | 1838 | 67.00 ± 1.10 |" in text
    assert "| promise |  | 2.0 %, certified | 1.0 %, estimated |  |  |  |" in text
    assert "SmolLM2.gguf, calibrated, NVIDIA H100 80GB HBM3, 16 cores, jax 0.11.2, lm-eval 0.4." in text
    assert "transformers 5.24.0 on the source weights" in text
    assert "gave different answers: piqa 3, winogrande 1." in text
    assert "winogrande is not in the mean: at chance level." in text


def test_what_was_not_measured_is_empty(result):
    result["original"], result["differing"] = None, None
    for each in result["rows"]:
        if each["task"] == "mean":
            each |= dict.fromkeys(("accuracy", "loss", "loss_upper95", "recovery", "kl", "perplexity", "flips"))
            each |= {"perplexity_change": None, "kl_generated": None, "mcnemar_p": None}
    text = readme_quality.quality(result)
    assert "XL, for want of answers of transformers" in text
    assert "| loss |  |  |  |  |  |  |" in text


def test_the_plot_is_of_its_result(result, tmp_path: Path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "quality.svg"
    readme_quality.plot(result, path)
    text = path.read_text("utf-8")
    xml.etree.ElementTree.fromstring(text)
    assert readme_quality.plot_digest(result) in text
    result["rows"][5]["loss"] = 0.004
    assert readme_quality.plot_digest(result) not in text
    assert readme_quality.plot_name(result) == "docs/quality-nvidia-h100-80gb-hbm3.svg"
