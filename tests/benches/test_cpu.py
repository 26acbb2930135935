import cpu
import pytest


def runs(first: list[float], step: list[float], new: int = 11) -> list[dict]:
    return [{"first_s": a, "steps_s": [b] * (new - 1)} for a, b in zip(first, step, strict=True)]


def test_rows_are_medians_and_ratios_are_within_a_repeat():
    # The machine is half as fast in the second repeat, for everybody.
    times = {
        "ours-S": runs([0.1, 0.2, 0.1], [0.01, 0.02, 0.01]),
        "transformers": runs([0.2, 0.4, 0.2], [0.03, 0.06, 0.03]),
    }
    ours, peer = cpu.rows_of(times, prompt=256, new=11)
    assert ours["prefill_tok_s"] == pytest.approx(2560)
    assert ours["decode_tok_s"] == pytest.approx(100)
    assert ours["decode_spread"] == pytest.approx(1)
    assert ours["decode_to_transformers"] == pytest.approx(3)
    assert peer["S_prefill_to_it"] == pytest.approx(2)
    assert peer["S_decode_to_it"] == pytest.approx(3)


def test_a_runtime_that_gives_another_number_of_tokens_is_told():
    with pytest.raises(ValueError, match="gave 11 tokens, expected 12"):
        cpu.rows_of({"ours-S": runs([0.1], [0.01])}, prompt=256, new=12)


def test_an_environment_without_its_mark_is_not_there(tmp_path):
    (tmp_path / "openvino" / "bin").mkdir(parents=True)
    (tmp_path / "openvino" / "bin" / "python").touch()
    assert not cpu.installed(tmp_path, "openvino")
    (tmp_path / "openvino" / "installed").touch()
    assert cpu.installed(tmp_path, "openvino")
