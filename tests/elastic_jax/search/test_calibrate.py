import jax
import numpy as np
import pytest

from elastic_jax import kernels
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.errors import CheckpointError
from elastic_jax.norm import RMSNorm
from elastic_jax.plan import provisional_plans
from elastic_jax.search.calibrate import calibrate
from elastic_jax.search.forward import Forward
from elastic_jax.search.strength import STRENGTHS
from elastic_jax.search.texts import Text

DEVICE = jax.devices()[0]


def text(config, windows=6, length=24, seed=0):
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (windows, length)).astype(np.int32)
    return Text(ids, {"source": "random token ids"})


def run(checkpoint, destination):
    return calibrate(
        checkpoint,
        destination,
        text(checkpoint.config),
        strengths=STRENGTHS,
        device=DEVICE,
        workers=2,
        progress=lambda *_: None,
    )


@pytest.fixture(scope="module", params=["tiny_mistral", "tiny_llama"])
def pair(request, checkpoint_of, tmp_path_factory):
    original = checkpoint_of(request.param)
    return original, run(original, tmp_path_factory.mktemp("calibrated") / "new.elastic")


def logits(checkpoint):
    forward = Forward(checkpoint, text(checkpoint.config, seed=7).windows, DEVICE, 2)
    x = forward.run(forward.embed(), 0, provisional_plans(checkpoint.config)["XL"].choices, "prompt")
    norm = RMSNorm(forward.norm("final_norm"), checkpoint.config.rms_norm_eps)
    return np.asarray(kernels.dot("xla")(norm(x), forward.weight("lm_head", "bf16"), generated=0))


def test_the_original_stays_bit_for_bit(pair):
    original, made = pair
    assert (logits(original) == logits(made.checkpoint)).all()


def test_something_was_smoothed_and_says_so(pair):
    original, made = pair
    record = made.checkpoint.manifest.source["calibration"]["groups"]
    assert record == made.record
    assert set(record) == {name for name in provisional_plans(original.config)["XL"].choices if name != "lm_head"}
    smoothed = [name for name, found in record.items() if found["channels_scaled"]]
    assert smoothed
    for name in smoothed:
        folders = [c.restore([(name, "bf16")], DEVICE, 2)[name, "bf16"] for c in (original, made.checkpoint)]
        old, new = (np.asarray(folder["values"], np.float32) for folder in folders)
        assert (old != new).any()
    for found in record.values():
        assert found["after"]["a8"] * found["after"]["a16"] <= found["before"]["a8"] * found["before"]["a16"]


def test_the_new_checkpoint_is_whole_and_its_int8_stands_for_its_bf16(pair):
    _, made = pair
    opened = Checkpoint.open(made.checkpoint.path)
    assert opened.verify() == []
    name = "layers.1.down"
    folders = opened.restore([(name, "bf16"), (name, "int8")], DEVICE, 2)
    full = np.asarray(folders[name, "bf16"]["values"], np.float32)
    values, scales = (np.asarray(folders[name, "int8"][leaf], np.float32) for leaf in ("values", "scales"))
    assert (np.abs(values * scales - full) <= scales / 2 * 1.0001).all()


def test_a_taken_destination_is_refused(checkpoint_of, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="should be a new folder"):
        run(checkpoint_of("tiny_llama"), tmp_path)
    assert (tmp_path / "file").read_text() == "mine"
