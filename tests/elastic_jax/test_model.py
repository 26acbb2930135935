import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import FIXTURES, TINY_MODELS, Chunk, Place, step_inputs, tiny_step_config

from elastic_jax import kernels
from elastic_jax.batch import TokenBatch
from elastic_jax.model import MLP, Linear, Mistral, rotate, rotation
from elastic_jax.norm import RMSNorm
from elastic_jax.step import Bucket
from elastic_jax.weights import load_weights

jit_rotation = jax.jit(rotation, static_argnames=("head_dim", "theta"))
jit_rotate = jax.jit(rotate)

# -- parts -----------------------------------------------------------------------------------------------------------


def exact_angles(position, head_dim, theta):
    return np.asarray(position, np.float64)[:, None] * theta ** (-np.arange(0, head_dim, 2) / head_dim)[None]


@pytest.mark.parametrize(
    ("head_dim", "theta", "largest", "error"),
    [(64, 1e4, 2047, 2e-4), (128, 1e6, 32767, 4e-3), (128, 1e9, 32767, 4e-3), (128, 1e9, 131071, 0.016)],
)
def test_angles_of_long_contexts(head_dim, theta, largest, error):
    # An angle is one float32 product, as in transformers: half a unit in its last place, and the frequency's.
    position = np.concatenate([np.arange(100), np.linspace(0, largest, 500), [largest - 1, largest]]).astype(np.int32)
    cos, sin = (np.asarray(a) for a in jit_rotation(position, head_dim=head_dim, theta=theta))
    angles = exact_angles(position, head_dim, theta)
    assert cos.shape == sin.shape == (len(position), head_dim // 2)
    assert np.abs(cos - np.cos(angles)).max() < error
    assert np.abs(sin - np.sin(angles)).max() < error
    # The fastest frequency is exactly 1, so the reduction of its large angles has to be exact.
    assert np.abs(cos[:, 0] - np.cos(position.astype(np.float64))).max() < 1e-6
    np.testing.assert_allclose(cos**2 + sin**2, 1, atol=1e-6)


def transformers_rotary(q, position, head_dim, theta):
    """`LlamaRotaryEmbedding` and `apply_rotary_pos_emb` of transformers in numpy; q is [tokens, heads, dim]."""
    inverse = (1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))).astype(np.float32)
    frequencies = position.astype(np.float32)[:, None] * inverse[None]
    embedding = np.concatenate([frequencies, frequencies], axis=-1)[:, None]
    half = head_dim // 2
    rotated_half = np.concatenate([-q[..., half:], q[..., :half]], axis=-1)
    return q * np.cos(embedding) + rotated_half * np.sin(embedding)


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e9])
def test_rotation_is_that_of_transformers(theta):
    rng = np.random.default_rng(0)
    position = np.array([0, 1, 2, 77, 510, 4095], np.int32)
    q = rng.standard_normal((6, 3, 32)).astype(np.float32)
    found = jit_rotate(q, *jit_rotation(position, head_dim=32, theta=theta))
    np.testing.assert_allclose(np.asarray(found), transformers_rotary(q, position, 32, theta), atol=2e-3)
    np.testing.assert_allclose(np.asarray(found)[:4], transformers_rotary(q, position, 32, theta)[:4], atol=5e-5)


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    rng = np.random.default_rng(1)
    q, k = (rng.standard_normal((1, 1, 32)).astype(np.float32) for _ in range(2))

    def score(query_at, key_at):
        rotated = [
            np.asarray(jit_rotate(x, *jit_rotation(np.int32([at]), head_dim=32, theta=1e4)))[0, 0]
            for x, at in ((q, query_at), (k, key_at))
        ]
        np.testing.assert_allclose(np.linalg.norm(rotated[0]), np.linalg.norm(q), rtol=1e-5)
        return rotated[0] @ rotated[1]

    assert abs(score(17, 5) - score(112, 100)) < 1e-3
    assert abs(score(17, 5) - score(17, 6)) > 1e-2
    np.testing.assert_array_equal(np.asarray(jit_rotate(q, *jit_rotation(np.int32([0]), head_dim=32, theta=1e4))), q)


def test_mlp_adds_swiglu_of_what_it_normalizes():
    rng = np.random.default_rng(3)
    x, gate_up, down = (rng.standard_normal(s).astype(np.float32) for s in ((5, 8), (24, 8), (8, 12)))
    norm = RMSNorm(jnp.asarray(rng.uniform(0.5, 2, 8), jnp.float32), 1e-5)
    out = MLP(jnp.asarray(gate_up), jnp.asarray(down), kernels.dot("xla"))(jnp.asarray(x), norm, generated=2)
    gate, up = np.split(np.asarray(norm(jnp.asarray(x)), np.float64) @ gate_up.T, 2, axis=1)
    expected = x + (gate / (1 + np.exp(-gate)) * up) @ down.T
    np.testing.assert_allclose(np.asarray(out), expected, rtol=1e-5, atol=1e-5)


def test_linear_has_one_weight_out_first():
    weight = jnp.asarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    out = Linear(weight, kernels.dot("xla"))(jnp.ones((4, 3)), generated=0)
    assert np.asarray(out).tolist() == [[3.0, 12.0]] * 4


# -- the whole model -------------------------------------------------------------------------------------------------

STEP = tiny_step_config()
BUCKET = Bucket(0, 64)


@pytest.fixture(scope="module", params=TINY_MODELS)
def whole(request, checkpoint_of):
    """A tiny model in float32, and a function that gives the logits after each of 64 prompt tokens."""
    checkpoint = checkpoint_of(request.param)
    device = jax.devices()[0]
    weights = load_weights(checkpoint, checkpoint.plan("XL"), "float32", device, workers=2, progress=None)
    config = checkpoint.config

    @jax.jit
    def logits(weights, token, batch: TokenBatch):
        model = Mistral(
            config,
            weights,
            attention=kernels.attention("xla"),
            dot=kernels.dot("xla"),
            decode=None,
            dtype=jnp.dtype("float32"),
        )
        cache = jnp.zeros((STEP.kv_slots, 2, config.num_kv_heads, config.head_dim))
        x, kv = model(token, (cache,) * config.num_layers, batch)
        return model.logits(x), kv

    def run(chunks):
        inputs = step_inputs(BUCKET, STEP, chunks=chunks)
        batch = TokenBatch(
            inputs.row, inputs.position, inputs.slot, inputs.block_table, inputs.context_length, 0, STEP.page_size
        )
        out, kv = logits(weights, inputs.token, batch)
        return np.asarray(out), kv

    return request.param, run, dict(np.load(FIXTURES / "tiny_reference.npz"))


@pytest.mark.parametrize("length", [1, 7, 24, 60])
def test_logits_at_every_position_are_those_of_transformers(whole, length):
    name, run, reference = whole
    ids, expected = reference[f"{name}/ids_{length}"], reference[f"{name}/logits_{length}"]
    found, _ = run([Chunk(Place(2, (7, 0, 30, 12)), ids.tolist(), 0)])
    error = np.abs(found[:length] - expected).max()
    assert error < 1e-3
    # Far inside the bound: what is left is the order of float32 sums.
    assert error < 5e-5


def test_sequences_side_by_side_do_not_see_each_other(whole):
    name, run, reference = whole
    lengths, places = (24, 7, 1), (Place(0, (9, 8)), Place(3, (1,)), Place(1, (40,)))
    chunks = [Chunk(place, reference[f"{name}/ids_{n}"].tolist(), 0) for n, place in zip(lengths, places, strict=True)]
    found, _ = run(chunks)
    at = 0
    for n in lengths:
        assert np.abs(found[at : at + n] - reference[f"{name}/logits_{n}"]).max() < 1e-4
        at += n


def test_only_the_sequences_slots_are_written(whole):
    name, run, reference = whole
    place = Place(1, (3, 50))
    _, kv = run([Chunk(place, reference[f"{name}/ids_24"].tolist(), 0)])
    for cache in kv:
        written = np.asarray(cache).any(axis=(1, 2, 3))
        assert sorted(np.flatnonzero(written)) == sorted(place.slots(0, 24, STEP.page_size))
