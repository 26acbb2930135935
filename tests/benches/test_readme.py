import json
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
import readme
import readme_speed
from latency_rows import Cell, Run, Sizes, merged, row_of, write_result

REPOSITORY = Path(__file__).resolve().parents[2]


def result(**changes: Any) -> dict[str, Any]:
    rows = []
    for mode, step in (("S", 0.006), ("XL", 0.011), ("transformers-compile", 0.016)):
        for cell in (Cell(1, 256), Cell(1, 4096), Cell(16, 1024)):
            run = Run((0.05,) * cell.batch, (step,) * 99, float(cell.batch * cell.context))
            row = row_of(mode, cell, [run] * 3, Sizes(23 * 10**9, 163840, 22 * 10**9, 4.47))
            more = {"peak_gib": 40.0, "compile_events": 0, "provisional": mode == "S"}
            rows.append({**row, **more, "busy_fraction": None if "-" in mode else 0.99})
    environment = {"device": "NVIDIA X1", "cores": 16, "versions": {"jax": "0"}, "commit": "0123456789"}
    run = {
        "id": "2026-01-02T03:04:05Z 0123456",
        "environment": environment,
        "model": "A shape",
        "limit_tb_s": 4.47,
        "anchors": {"S": [100.0, 101.0]},
        "skipped": [],
    }
    return merged(None, environment, run | changes, rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The committed results, and a latency table."""
    results = tmp_path / "results"
    for file in readme.RESULTS.glob("*/*.json"):
        if file.name == "latency.json":  # the one below is the only one
            continue
        (results / file.parent.name).mkdir(parents=True, exist_ok=True)
        (results / file.parent.name / file.name).write_bytes(file.read_bytes())
    write_result(results / "nvidia-x1" / "latency.json", result())
    return results


def test_committed_results_are_what_the_readme_says():
    text = (REPOSITORY / "README.md").read_text("utf-8")
    assert readme.rendered(text) == text
    assert readme.outdated_plots() == []


def test_what_sampling_costs_is_that_of_the_dearest_parameters():
    def row(rows: int, implementation: str, over: float) -> dict[str, Any]:
        return {"rows": rows, "implementation": implementation, "over_greedy": over, "over_greedy_us": 6000 * over}

    rows = [row(1, "cuda", 0.0), row(1, "cuda", 0.01), row(16, "cuda", 0.02), row(16, "xla", 0.5)]
    text = readme_speed.sampling({**result(), "rows": rows})
    assert "a whole step longer than greedy by at most 60 µs (1.0 %) of 1 and 120 µs (2.0 %) of 16 sequences" in text
    assert "a step of 4 layers" in readme_speed.sampling({**result(), "rows": rows, "layers": 4})
    elsewhere = readme_speed.sampling({**result(), "rows": rows, "compiled": "elsewhere"})
    assert "a whole step, compiled elsewhere, longer than greedy" in elsewhere


def test_speeds_with_an_int8_cache_stand_beside_those_without():
    rounded = result()
    rounded["rows"] = [row | {"decode_tok_s_per_seq": 150.0} for row in rounded["rows"][:2]]
    rounded["rows"][1]["context"] = 99  # of which there is no other
    fidelity = {
        "environment": {"device": "a CPU", "cores": 2, "versions": {}},
        "rows": [
            {"mode": "XL", "dtype": "float32", "kl": 0.0},
            {"mode": "XL", "dtype": "bfloat16", "kl": 0.00125},
        ],
    }
    text = readme_speed.int8_cache(rounded, result(), fidelity)
    assert "150.0 in S at 1 x 256 (in bf16 166.7); 150.0 in S at 1 x 99. Measured on 2026-01-02" in text
    assert text.endswith("XL's KL to float32 with that cache is 0.0013 nats (a CPU, 2 cores).")
    slower = result() | {"environment": result()["environment"] | {"device": "NVIDIA X0"}}
    slower["rows"] = [row | {"decode_tok_s_per_seq": 1.0} for row in slower["rows"]]
    beside = readme.latencies([slower, rounded | {"kv": "int8"}, result()])
    assert beside.index("KV cache in int8") < beside.index("one NVIDIA X0")


def test_kernels_of_the_device_that_reads_fastest_are_shown():
    def of(device: str, read: float) -> dict[str, Any]:
        environment = result()["environment"] | {"device": device}
        limits = {"read_tb_s": read, "int8_top_s": 1.0, "bf16_top_s": 1.0}
        return {"environment": environment, "limits": limits, "left_out": [], "failed": [], "rows": []}

    text = readme.kernels([of("NVIDIA X1", 3.2), of("NVIDIA X2", 4.6), of("NVIDIA X0", 1.0)])
    assert "NVIDIA X2, 16 cores" in text
    assert text.count("### Kernels") == 1


def test_a_latency_table_fills_its_section_and_the_headline(folder: Path):
    text = readme.rendered((REPOSITORY / "README.md").read_text("utf-8"), folder)
    assert "On one NVIDIA X1, " in text
    assert "167 tokens a second in mode S and 91 tokens a second in mode XL" in text
    assert "| S\\* | 1 x 256 | 166.7 | 167 |" in text
    assert "The plan is provisional" in text
    assert "Measured on 2026-01-02 at commit 0123456." in text
    assert "S 2.67 times transformers-compile at 1 x 256" in text
    assert "(docs/latency-nvidia-x1.svg)" in text
    assert readme.rendered(text, folder) == text  # nothing grows when it is run again


def test_without_a_result_an_optional_section_is_empty(folder: Path):
    (folder / "nvidia-x1" / "latency.json").unlink()
    for file in folder.glob("*/latency.json"):
        file.unlink()
    text = readme.rendered((REPOSITORY / "README.md").read_text("utf-8"), folder)
    assert "<!-- latency -->\n\n<!-- /latency -->" in text
    assert "TTFT" not in text


def test_a_section_that_must_have_a_result_says_which_is_missing(folder: Path):
    for file in folder.glob("*/context.json"):
        file.unlink()
    with pytest.raises(ValueError, match=r"context\.json.*README's section context"):
        readme.rendered((REPOSITORY / "README.md").read_text("utf-8"), folder)


def test_anchors_apart_and_what_does_not_fit_are_told():
    text = readme_speed.latency(
        result(anchors={"S": [100.0, 103.0]}, skipped=["XL 64x4096: 9 KV slots, 8 fit", "S 1x1: --minutes"]), None
    )
    assert "differed by more than 2 % among the commands of: S." in text
    assert "does not fit: XL 64x4096: 9 KV slots, 8 fit." in text
    assert "--minutes" not in text


def test_kernels_have_a_table_each_with_a_column_for_each_size():
    def row(kernel: str, implementation: str, work: str, us: float, bound: str = "reading") -> dict[str, Any]:
        names = {"kernel": kernel, "implementation": implementation, "work": work, "bound": bound}
        return names | {"us": us, "fraction_of_limit": 0.9, "read_tb_s": 1.0, "top_s": 1.0, "error": 0.0}

    rows = [
        row("decode_layer", "cuda", "int8 at 256, 1 token", 190),
        row("decode_layer", "cuda", "int8 at 256, 16 tokens", 210),
        row("decode_layer", "cuda", "bf16 at 256, 1 token", 380),
        row("integer_dot", "pallas", "o [5 x 4], 64 rows", 15),
        row("integer_dot", "cuda", "o [5 x 4] added, 4096 rows", 140, "int8"),
    ]
    limits = {"read_tb_s": 3.17, "int8_top_s": 1411.0, "bf16_top_s": 767.0}
    kernels = {"environment": result()["environment"], "limits": limits, "left_out": [], "failed": [], "rows": rows}
    text = readme_speed.kernels(kernels)
    assert "| decode_layer | by | 1 token | 16 tokens |" in text
    assert "| int8 at 256 | cuda | 190.0 (90 %) | 210.0 (90 %) |" in text
    assert "| bf16 at 256 | cuda | 380.0 (90 %) |  |" in text
    assert "| o [5 x 4] added | cuda |  | 140.0 (90 % int8) |" in text
    assert "Could not" not in text
    assert "Time did not" not in text
    more = readme_speed.kernels(kernels | {"left_out": ["a", "b"], "failed": [{"case": "attention, x", "error": "E"}]})
    assert "Could not be measured: attention, x." in more
    assert "Time did not suffice for 2 cases more." in more


def test_kl_of_the_same_device_stands_beside_the_table():
    fidelity = {
        "environment": {"commit": "89abcdef"},
        "rows": [{"mode": "S", "dtype": "bfloat16", "role": "prompt", "kl": 0.0351}],
    }
    text = readme_speed.latency(result(), fidelity)
    assert "at commit 89abcde" in text
    assert "S 0.0351 (prompt tokens)" in text


def test_the_limit_of_a_row_is_its_speed_if_reading_were_all():
    row = result()["rows"][0]
    assert readme_speed.limit_tok_s(row, 4.47) == pytest.approx(row["decode_tok_s_per_seq"] / row["fraction_of_limit"])


def test_a_plot_is_drawn_and_found_outdated_when_the_result_changes(folder: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    ((path, found),) = [
        each for each in readme.outdated_plots(folder, tmp_path) if each[0].name == "latency-nvidia-x1.svg"
    ]
    readme_speed.plot(found, path)
    text = path.read_text("utf-8")
    xml.etree.ElementTree.fromstring(text)
    assert "S (provisional plan)" in text
    assert "limit of reading" in text
    assert path not in [each for each, _ in readme.outdated_plots(folder, tmp_path)]
    readme_speed.plot(found, path)
    assert path.read_text("utf-8") == text
    file = folder / "nvidia-x1" / "latency.json"
    changed = json.loads(file.read_text())
    changed["rows"][0]["decode_tok_s_per_seq"] += 1
    file.write_text(json.dumps(changed))
    assert path in [each for each, _ in readme.outdated_plots(folder, tmp_path)]
