import math
from typing import Any

import pytest
from latency_rows import (
    ANCHOR,
    SAMPLED,
    Cell,
    Clock,
    ResultError,
    Run,
    Sizes,
    cells_of,
    merged,
    read_result,
    row_of,
    write_result,
)

SIZES = Sizes(read_bytes=10**9, kv_token_bytes=10**5, linear_weights=10**9, limit_tb_s=4.0)


def run(step: float, first: tuple[float, ...] = (0.1,), new: int = 11, live: float = 1000.0) -> Run:
    return Run(first, (step,) * (new - 1), live)


def test_formulas_of_a_row():
    row = row_of("S", Cell(2, 500), [run(0.01, (0.1, 0.3)), run(0.02, (0.2, 0.4)), run(0.04, (0.2, 0.4))], SIZES)
    assert row["decode_tok_s_per_seq"] == pytest.approx(50)  # the median run: 10 steps in 0.2 s
    assert row["decode_tok_s_total"] == pytest.approx(100)
    assert row["ttft_ms"] == pytest.approx(250)
    assert row["ttft_last_ms"] == pytest.approx(400)
    assert row["tpot_ms_p50"] == pytest.approx(20)
    assert row["tpot_ms_p99"] == pytest.approx(40)
    assert row["read_tb_s"] == pytest.approx(1.1e9 / 0.02 / 1e12)
    assert row["fraction_of_limit"] == pytest.approx(row["read_tb_s"] / 4)
    assert row["prefill_top_s"] == pytest.approx(2 * 1e9 * 1000 / 0.4 / 1e12)
    assert row["repeats"] == 3
    assert row["spread"] == pytest.approx(3)


def test_one_slow_step_counts_in_the_formula_and_in_the_percentile():
    steps = (0.01,) * 9 + (0.11,)
    row = row_of("S", ANCHOR, [Run((0.1,), steps, 0.0)], SIZES)
    assert row["decode_tok_s_per_seq"] == pytest.approx(10 / 0.2)
    assert row["tpot_ms_p50"] == pytest.approx(10)
    assert row["tpot_ms_p99"] > 100


@pytest.mark.parametrize("text", ["16", "x4", "0x16", "16x", "ax4", "-1x4"])
def test_cells_that_are_none_are_refused(text: str):
    with pytest.raises(ValueError, match="BATCHxCONTEXT"):
        Cell.parse(text)


def test_the_anchor_comes_first_and_modes_have_their_tables():
    full = cells_of("S", None, None, None)
    assert full[0] == ANCHOR
    assert len(full) == len(set(full)) == 15
    assert len(cells_of("L", None, None, None)) == 5
    assert cells_of("XL", [8, 16], [1024], None) == [ANCHOR, Cell(8, 1024), Cell(16, 1024)]
    assert cells_of("M", None, None, ["64x1024", "1x256"]) == [ANCHOR, Cell(64, 1024)]


# -- one file ----------------------------------------------------------------------------------------------------------


def command(number: int, anchors: dict[str, list[float]]) -> dict[str, Any]:
    return {"id": f"run {number}", "model": "m", "limit_tb_s": 4.0, "anchors": anchors, "skipped": []}


def row(mode: str, cell: str, tok_s: float) -> dict[str, Any]:
    parsed = Cell.parse(cell)
    return {"mode": mode, "batch": parsed.batch, "context": parsed.context, "decode_tok_s_per_seq": tok_s}


HERE = {"device": "a"}


def test_commands_share_a_file_and_later_rows_replace_earlier_ones():
    first = merged(None, HERE, command(1, {"S": [100.0]}), [row("S", "1x256", 100), row("S", "8x256", 90)])
    both = merged(first, HERE, command(2, {"S": [101.0]}), [row("XL", "1x256", 50), row("S", "1x256", 101)])
    assert [(r["mode"], r["batch"], r["decode_tok_s_per_seq"], r["run"]) for r in both["rows"]] == [
        ("S", 1, 101, "run 2"),
        ("S", 8, 90, "run 1"),
        ("XL", 1, 50, "run 2"),
    ]
    assert both["anchors"]["S"]["tok_s"] == [100.0, 101.0]
    assert both["anchors"]["S"]["within_2_percent"]


def test_a_command_that_saves_after_every_cell_counts_once():
    first = merged(None, HERE, command(1, {"S": [100.0]}), [row("S", "1x256", 100)])
    again = merged(first, HERE, command(1, {"S": [100.0, 99.0]}), [row("S", "1x256", 100), row("S", "8x256", 90)])
    assert [run["id"] for run in again["runs"]] == ["run 1"]
    assert again["anchors"]["S"]["tok_s"] == [100.0, 99.0]


def test_anchors_apart_are_told_until_no_row_of_the_old_command_is_left():
    first = merged(None, HERE, command(1, {"S": [100.0]}), [row("S", "1x256", 100), row("S", "8x256", 90)])
    faster = merged(first, HERE, command(2, {"S": [110.0]}), [row("S", "1x256", 110)])
    assert not faster["anchors"]["S"]["within_2_percent"]
    whole = merged(faster, HERE, command(3, {"S": [110.5]}), [row("S", "1x256", 110), row("S", "8x256", 95)])
    assert whole["anchors"]["S"] == {"tok_s": [110.5], "spread": 0.0, "within_2_percent": True}


def test_another_device_or_model_is_refused():
    first = merged(None, HERE, command(1, {}), [row("S", "1x256", 100)])
    with pytest.raises(ResultError, match="name another file"):
        merged(first, {"device": "b"}, command(2, {}), [])
    with pytest.raises(ResultError, match="name another file"):
        merged(first, HERE, command(2, {}) | {"model": "n"}, [])


@pytest.mark.parametrize("other", [{"kv": "int8"}, {"sampling": SAMPLED}])
def test_another_cache_or_sampling_is_another_file(other):
    usual = {"kv": "full", "sampling": "greedy"}
    plain = merged(None, HERE, command(1, {}), [row("S", "1x256", 100)])
    (name,) = other
    for before, now in ((plain, other), (merged(None, HERE, command(1, {}) | other, []), usual)):
        with pytest.raises(ResultError, match=f"{name}.*name another file"):
            merged(before, HERE, command(2, {}) | now, [row("S", "1x256", 90)])
    again = merged(plain, HERE, command(2, {}) | usual, [row("S", "1x256", 90)])
    assert (again["kv"], again["sampling"]) == ("full", "greedy")
    # What is written before there were such options is the usual.
    old = {key: value for key, value in plain.items() if key not in usual}
    assert len(merged(old, HERE, command(2, {}) | usual, [row("S", "8x256", 90)])["rows"]) == 2


def test_results_are_read_back_and_no_part_of_one_is_left(tmp_path):
    path = tmp_path / "device" / "latency.json"
    assert read_result(path) is None
    result = merged(None, HERE, command(1, {}), [row("S", "1x256", 100)])
    write_result(path, result)
    assert read_result(path) == result
    assert [file.name for file in path.parent.iterdir()] == ["latency.json"]


# -- the clock ---------------------------------------------------------------------------------------------------------


def test_a_cell_begins_only_if_it_would_end_in_time():
    clock = Clock(deadline=1000.0)
    clock.learn(Cell(1, 4096), [run(0.01, (0.4096,))])
    cell, times = Cell(16, 4096), 5
    needed = times * (16 * 4096 * 1e-4 + 100 * 0.01)
    assert clock.allows(1000 - 2 * needed, cell, 100, times)
    assert not clock.allows(1000 - needed, cell, 100, times)
    assert Clock(math.inf).allows(1e12, cell, 100, times)


def test_short_prompts_do_not_tell_what_long_ones_take():
    clock = Clock(1.0)
    before = clock.seconds(Cell(1, 4096), 2, 1)
    clock.learn(ANCHOR, [run(0.02, (1.0,))])
    assert clock.seconds(Cell(1, 4096), 2, 1) == before
