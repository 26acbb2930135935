"""The model by pieces, against the model's own modules."""

import jax
import numpy as np
import pytest

from elastic_jax import kernels
from elastic_jax.batch import TokenBatch
from elastic_jax.groups import model_groups
from elastic_jax.model import SelfAttention, rotation
from elastic_jax.norm import RMSNorm
from elastic_jax.plan import CHOICES
from elastic_jax.search.forward import HALVES, KINDS, Forward, _piece, run_half
from elastic_jax.search.held import AllHeld
from elastic_jax.search.parallel import Shards, load
from elastic_jax.search.products import Rounded, product

DEVICE = jax.devices()[0]


@pytest.fixture(scope="module", params=["tiny_mistral", "tiny_llama"])
def forward(request, checkpoint_of):
    checkpoint = checkpoint_of(request.param)
    ids = np.random.default_rng(1).integers(0, checkpoint.config.vocab_size, (3, 70)).astype(np.int32)
    return Forward.load(checkpoint, ids, DEVICE, 2)


@pytest.mark.parametrize("choices", [(c,) * 4 for c in CHOICES] + [CHOICES])
def test_pieces_are_the_modules_of_the_model(forward, choices):
    x = forward.embed()
    by_pieces = forward.layer(x, 1, choices, "prompt")
    for half, (_, kinds) in HALVES.items():
        weights = forward.half_weights(half, 1)
        weights |= {kind: forward.weight(f"layers.1.{kind}", choices[KINDS.index(kind)]) for kind in kinds}
        x = run_half(x, weights, half, forward.config, forward.shape, product(forward.dot_name))
    apart = np.linalg.norm(np.asarray(by_pieces) - np.asarray(x))
    # What is fused differs, and a last bit more or less decides how an activation is rounded.
    assert apart <= (1e-5 if set(choices) == {"bf16"} else 3e-3) * np.linalg.norm(np.asarray(x))


@pytest.mark.parametrize("split", [False, True])
def test_nothing_is_left_to_compile_for_layers_of_any_choice(forward, split):
    # Windows of a length of their own: no other test has compiled for them.
    own = forward.over(forward.windows[:2, : 40 + split])
    own = Shards([own.over(own.windows[:1]), own.over(own.windows[1:])]) if split else own
    own.compile(2)
    compiled = _piece._cache_size()
    x = own.embed()
    for role in ("prompt", "generated"):
        for choice in CHOICES:
            x = own.run(x, 0, dict.fromkeys(model_groups(own.config), choice), role)
    assert _piece._cache_size() == compiled


def test_generated_tokens_have_16_bit_activations_whatever_the_int8_choice(forward):
    x = forward.embed()
    outs = [np.asarray(forward.layer(x, 0, (choice,) * 4, "generated")) for choice in CHOICES[1:]]
    assert (outs[0] == outs[1]).all()
    assert (outs[0] == outs[2]).all()
    prompt = np.asarray(forward.layer(x, 0, ("w8a8",) * 4, "prompt"))
    assert (outs[0] != prompt).any()


def test_attention_is_that_of_the_paged_cache(forward):
    """The dense product against the implementation that steps use."""
    x = forward.embed()
    c, weights = forward.config, forward.half_weights("attention", 0)
    windows, length = forward.shape
    pages = -(-length // 64)
    row, position = (
        np.arange(windows * length, dtype=np.int32) // length,
        np.arange(windows * length, dtype=np.int32) % length,
    )
    table = np.arange(windows * pages, dtype=np.int32).reshape(windows, pages)
    slot, context = row * pages * 64 + position, np.full(windows, length, np.int32)
    arrays = (jax.numpy.asarray(each) for each in (row, position, slot, table, context))
    batch, slots = TokenBatch(*arrays, generated=0, page_size=64), windows * pages * 64
    cache = jax.numpy.zeros((slots, 2, c.num_kv_heads, c.head_dim), jax.numpy.float32)
    module = SelfAttention(c, weights["qkv"], weights["o"], kernels.attention("xla"), product("xla"))
    norm = RMSNorm(weights["attention_norm"], c.rms_norm_eps)
    out, _ = module(x, norm, rotation(batch.position, c.head_dim, c.rope_theta), cache, batch)
    ours = run_half(x, weights, "attention", c, forward.shape, product("xla"))
    assert np.asarray(ours) == pytest.approx(np.asarray(out), rel=1e-4, abs=1e-5)


def test_inputs_are_what_the_groups_read(forward):
    x = forward.embed()
    out, inputs = forward.inputs(x, 0)
    assert list(inputs) == list(KINDS)
    last = product("xla")(inputs["down"], forward.weight("layers.0.down", "bf16"), generated=0)
    middle = forward.inputs(x, 0)[0] - last
    attention = product("xla")(inputs["o"], forward.weight("layers.0.o", "bf16"), generated=0)
    assert np.asarray(x + attention) == pytest.approx(np.asarray(middle), rel=1e-3, abs=1e-4)
    assert np.asarray(out) == pytest.approx(np.asarray(forward.layer(x, 0, ("bf16",) * 4, "prompt")))


@pytest.mark.slow
def test_several_devices_measure_what_one_does(forward, checkpoint_of):
    """The test's process has eight CPU devices."""
    devices = jax.devices()
    assert len(devices) > 2
    name = "tiny_llama" if forward.config.tie_word_embeddings else "tiny_mistral"
    spread = load(checkpoint_of(name), forward.windows, devices, 2)
    if spread.config != forward.config:
        spread = load(
            checkpoint_of("tiny_mistral" if name == "tiny_llama" else "tiny_llama"), forward.windows, devices, 2
        )
    assert isinstance(spread, Shards)
    assert len(spread.parts) == len(forward.windows)
    used = {device for stream in spread.embed() for device in stream.devices()}
    assert len(used) == len(forward.windows)
    plans = {
        choice: {f"layers.{n}.{kind}": choice for n in range(forward.config.num_layers) for kind in KINDS}
        for choice in ("bf16", "w8a8")
    }
    found = []
    for runs in (forward, spread):
        reference = runs.reference(runs.run(runs.embed(), 0, plans["bf16"], "prompt"))
        out = runs.run(runs.embed(), 0, plans["w8a8"], "prompt")
        found.append(runs.gather(reference, runs.compare(reference, [out], "w8a16")))
    for name in ("kl", "flips", "loss"):
        one, several = (getattr(each, name) for each in found)
        assert one.shape == several.shape == (1, *forward.windows.shape)
        assert several == pytest.approx(one, rel=1e-3, abs=1e-6)


def test_weights_are_rounded_where_they_are_used_if_only_floats_are_there(forward):
    alone = Forward(forward.config, AllHeld(forward._weights._floats, None), forward.windows, DEVICE)
    x = forward.embed()
    exact, stored, rounded = (
        np.asarray(each.layer(x, 0, (choice,) * 4, "prompt"))
        for each, choice in ((forward, "bf16"), (forward, "w8a16"), (alone, "w8a16"))
    )
    # One value in a thousand is a tie that the last bit of its scale decides.
    assert np.linalg.norm(stored - rounded) < 0.3 * np.linalg.norm(stored - exact)
    assert isinstance(alone.weight("layers.0.o", "w8a8"), Rounded)
