"""What is planned for a model is what converting and loading it then take."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import FIXTURES, MISTRAL_SMALL

from elastic_jax.checkpoint import Checkpoint
from elastic_jax.errors import CheckpointError, ConversionError, ExecutableError
from elastic_jax.plan import provisional_plans
from elastic_jax.sizing import Place, checkpoint_bytes, describe_model, place, size_mode


@pytest.mark.parametrize("name", ["tiny_mistral", "tiny_llama"])
def test_a_plan_made_before_converting_is_the_checkpoints(
    checkpoint_of: Callable[[str], Checkpoint], name: str
) -> None:
    checkpoint = checkpoint_of(name)
    before, after = (
        describe_model(str(path), revision=None, token=None) for path in (FIXTURES / name, checkpoint.path)
    )
    assert [plan.digest() for plan in before.plans] == [
        {p.name: p for p in after.plans}[plan.name].digest() for plan in before.plans
    ]
    stored = sum(folder.nbytes for folder in checkpoint.manifest.folders.values())
    assert checkpoint_bytes(before.config) == stored
    where = Place("here", "cpu", 1 << 30, None)
    for plan in before.plans:
        sized = size_mode(before.config, plan, where, "bfloat16", max_context=None)
        assert sized["weight_bytes"] == checkpoint.weight_bytes(checkpoint.plan(plan.name))
        assert sized["decode_tokens_per_second_at_most"] is None


def test_mistral_small_on_a_described_gpu_needs_no_plugin() -> None:
    where = place("h100")
    plans = provisional_plans(MISTRAL_SMALL)
    sized = {name: size_mode(MISTRAL_SMALL, plan, where, "bfloat16", max_context=None) for name, plan in plans.items()}
    assert sized["S"]["kv_bytes_per_token"] == 160 * 1024
    assert sized["S"]["kv_tokens"] > sized["XL"]["kv_tokens"] >= 0
    assert sized["S"]["decode_tokens_per_second_at_most"] > sized["XL"]["decode_tokens_per_second_at_most"] > 40


def test_what_does_not_fit_is_said() -> None:
    small = Place("small", "gpu", 8 << 30, None)
    sized = size_mode(MISTRAL_SMALL, provisional_plans(MISTRAL_SMALL)["S"], small, "bfloat16", max_context=None)
    assert not sized["fits"]
    assert sized["kv_tokens"] == 0


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="check the path"):
        describe_model(str(tmp_path), revision=None, token=None)
    with pytest.raises(CheckpointError, match="no Hub id"):
        describe_model(str(FIXTURES / "tiny_mistral"), revision="main", token=None)
    with pytest.raises(ExecutableError, match="no target"):
        place("b9000")
