"""What the lowered and compiled programs hold: integer products where they are claimed, and no copy of the cache."""

import dataclasses
import functools
import re
from math import prod

import jax
import jax.numpy as jnp
import pytest
from programs import Product, conversions, products
from tiny import tiny_step_config

from aot_cache.unit import Unit
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.errors import ConfigError, PlanError
from elastic_jax.groups import LM_HEAD, model_groups
from elastic_jax.plan import MODES
from elastic_jax.quantization import QArray
from elastic_jax.step import Bucket
from elastic_jax.units import build_model, make_units, step_name, traced_source_digest
from elastic_jax.weights import abstract_weights, weight_bytes

# The largest bucket is a mixed one; P = 1 is the one-row case that compilers treat apart.
BUCKETS = (Bucket(1, 0), Bucket(4, 0), Bucket(0, 1), Bucket(0, 16), Bucket(4, 16))
STEP = tiny_step_config(dtype="bfloat16", buckets=BUCKETS)
STEP_NAMES = [
    step_name(b, v) for b in BUCKETS for v in ("greedy", "sampling", "score") if v != "score" or not b.generated
]
INTEGER = ("i8", "i8", "i32")


@pytest.fixture(scope="module")
def tiny(checkpoint_of) -> Checkpoint:
    return checkpoint_of("tiny_mistral")


@pytest.fixture(scope="module")
def lowered(tiny):
    """`lowered(mode, unit)`: StableHLO with the names of scopes."""

    @functools.cache
    def units(mode: str) -> dict[str, Unit]:
        return {unit.name: unit for unit in make_units(tiny.config, tiny.plan(mode), STEP)}

    @functools.cache
    def text(mode: str, name: str) -> str:
        unit = units(mode)[name]
        return (
            jax.jit(unit.function, donate_argnums=unit.donate, keep_unused=True)
            .lower(*unit.arguments)
            .as_text(debug_info=True)
        )

    return text


def group_of(product: Product) -> str | None:
    """The group whose weight a product reads, by the scope it was traced in."""
    if match := re.search(r"layer_(\d+)/(qkv|o|gate_up|down)/", product.scope):
        return f"layers.{match[1]}.{match[2]}"
    if re.search(r"/(lm_head|score)/", product.scope):
        return LM_HEAD
    assert re.search(r"layer_\d+/attention/", product.scope), f"a product that belongs to no group: {product}"
    return None


def group_products(text: str) -> dict[str, Product]:
    found: dict[str, Product] = {}
    for product in products(text):
        if (name := group_of(product)) is not None:
            assert name not in found, f"{name} is computed by several products"
            found[name] = product
    return found


def expected_rows(choice: str, bucket: Bucket, outputs: int | None) -> int:
    """2D + P rows where prompt tokens have 8-bit activations, 2(D + P) where they have 16-bit ones."""
    if outputs is not None:  # the head sees the wanted tokens alone
        return 2 * outputs
    generated, prompt = bucket.generated, bucket.prompt
    return 2 * generated + (prompt if choice == "w8a8" else 2 * prompt)


def bucket_of(name: str) -> Bucket:
    _, generated, prompt, _ = name.split(".")
    return Bucket(int(generated[1:]), int(prompt[1:]))


# The sampling steps of one mode stand for those of all: before the logits they are the greedy ones.
@pytest.mark.parametrize(
    ("mode", "name"),
    [(mode, name) for mode in ("L", "M", "S") for name in STEP_NAMES if mode == "S" or not name.endswith("sampling")],
)
def test_every_group_is_one_integer_product(tiny, lowered, mode, name):
    text, plan, bucket = lowered(mode, name), tiny.plan(mode), bucket_of(name)
    found = group_products(text)
    groups = model_groups(tiny.config)
    assert found.keys() == groups.keys()
    for group, product in found.items():
        assert product.types == INTEGER, group
        outputs = None
        if group == LM_HEAD:
            outputs = bucket.prompt if name.endswith("score") else bucket.outputs(STEP.rows)
        rows = expected_rows(plan.choices[group], bucket, outputs)
        out_size, in_size = groups[group].out_size, groups[group].in_size
        assert product.left.shape == (rows, in_size), group
        assert product.right.shape == (out_size, in_size), group
        assert product.out.shape == (rows, out_size), group
    # Nothing else reads integers, and no weight becomes a float or a wider integer.
    assert sum("i8" in product.types for product in products(text)) == len(groups)
    assert not [(a, b) for a, b in conversions(text) if a.type == "i8"]


@pytest.mark.parametrize("name", STEP_NAMES)
def test_xl_has_no_integer_product(tiny, lowered, name):
    text = lowered("XL", name)
    assert "xi8>" not in text
    found = group_products(text)
    assert found.keys() == model_groups(tiny.config).keys()
    # bf16 operands, float32 sums.
    assert {product.types for product in found.values()} == {("bf16", "bf16", "f32")}


@pytest.mark.parametrize("mode", MODES)
def test_chunking_and_mixing_never_change_the_operands_of_a_token(lowered, mode):
    """In every bucket a token of one role brings each group the same number of rows of the same types."""
    kinds: dict[str, set] = {}
    rows: dict[str, dict[Bucket, int]] = {}
    for name in STEP_NAMES:
        if not name.endswith("greedy"):
            continue
        for group, product in group_products(lowered(mode, name)).items():
            kinds.setdefault(group, set()).add(product.types)
            rows.setdefault(group, {})[bucket_of(name)] = product.left.shape[0]
    assert {group for group, types in kinds.items() if len(types) != 1} == set()
    for group, of_bucket in rows.items():
        # One row alone may be brought twice: XLA:CPU has no one-row bf16 product.
        if group == LM_HEAD:
            wanted = {bucket: bucket.outputs(STEP.rows) for bucket in of_bucket}
            assert len({rows / wanted[b] for b, rows in of_bucket.items() if wanted[b] > 1}) == 1
            continue
        for role in ("generated", "prompt"):
            alone = {
                b: r / getattr(b, role) for b, r in of_bucket.items() if b.tokens == getattr(b, role) and b.tokens > 1
            }
            assert len(set(alone.values())) == 1, (group, role)
        # A mixed step has the rows of its parts.
        assert of_bucket[Bucket(4, 16)] == of_bucket[Bucket(4, 0)] + of_bucket[Bucket(0, 16)], group


@pytest.mark.parametrize("mode", ["M", "S"])
def test_score_computes_prompt_tokens_as_a_step_does(lowered, mode):
    step, score = (group_products(lowered(mode, f"step.d0.p16.{v}")) for v in ("greedy", "score"))
    layers = [group for group in step if group != LM_HEAD]
    assert {g: (step[g].left, step[g].types) for g in layers} == {g: (score[g].left, score[g].types) for g in layers}


# -- compiled ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(compiled_tiny):
    return compiled_tiny("S", "bfloat16")


@pytest.mark.parametrize("name", ["step.d1.p0.greedy", "step.d4.p16.sampling", "step.d0.p16.score"])
def test_xla_keeps_the_integer_products(compiled, name):
    text = compiled.units[name].open().as_text()
    groups = [g for g in model_groups(compiled.config).values() if g.kind != LM_HEAD]
    bodies = [body for body in re.split(r"\n\n", text) if re.search(r"= s32\[\d+,\d+\]\S* dot\(", body)]
    assert len(bodies) >= len(groups) + 1
    for body in bodies:
        assert len(re.findall(r"= s8\[\d+,\d+\]\S* parameter\(", body)) == 2, body
    # No wide copy of a weight is made anywhere, in any element type.
    for group in groups:
        wide = re.findall(rf"\b(?:f32|bf16|s32|f16)\[{group.out_size},{group.in_size}\]", text)
        assert not wide, group.name


def test_the_cache_is_written_in_place(compiled):
    for name, unit in compiled.units.items():
        if name in ("start", "admit") or name.startswith("top."):
            continue
        step = compiled.step
        shape = (step.kv_slots, 2, compiled.config.num_kv_heads, compiled.config.head_dim)
        kv_bytes = compiled.config.num_layers * prod(shape) * 2
        assert unit.memory.aliased >= kv_bytes, name
        text = unit.open().as_text()
        sizes = {
            ",".join(map(str, shape)),
            f"{step.kv_slots // step.page_size},{step.page_size}," + ",".join(map(str, shape[1:])),
        }
        copies = [
            line.strip()
            for line in text.splitlines()
            if re.search(r"= (\S+)\[(" + "|".join(sizes) + r")\]\S* copy(-start)?\(", line)
        ]
        assert not copies, (name, copies)


def test_row_state_is_donated_too(compiled):
    rows = compiled.step.rows
    vocab = compiled.config.vocab_size
    state = rows * (4 + 4 + 8 + 4 * vocab + vocab // 8)
    assert compiled.units["admit"].memory.aliased == state


# -- making units ----------------------------------------------------------------------------------------------------


def test_names_and_properties(tiny):
    units = {unit.name: unit for unit in make_units(tiny.config, tiny.plan("M"), STEP)}
    assert set(units) == {*STEP_NAMES, "top.r1", "top.r4", "top.r5", "admit", "copy_page", "start"}
    assert units["step.d4.p16.sampling"].properties == {"variant": "sampling", "generated": 4, "prompt": 16}
    assert units["admit"].properties == {"variant": "admit"}


def test_arguments_are_the_weights_then_the_state(tiny):
    units = {unit.name: unit for unit in make_units(tiny.config, tiny.plan("M"), STEP)}
    weights = len(jax.tree.leaves(abstract_weights(tiny.config, tiny.plan("M"), "bfloat16")))
    layers, rows = tiny.config.num_layers, 5
    assert units["step.d4.p0.greedy"].donate == tuple(range(weights, weights + layers + rows))
    assert units["step.d0.p16.score"].donate == tuple(range(weights, weights + layers))
    assert len(units["step.d4.p0.greedy"].arguments) == weights + layers + rows + 7
    assert len(units["step.d4.p0.sampling"].arguments) == weights + layers + rows + 7 + 11
    for unit in units.values():
        assert all(isinstance(argument, jax.ShapeDtypeStruct) for argument in unit.arguments)


def test_a_tied_head_is_no_second_argument(checkpoint_of):
    tied = checkpoint_of("tiny_llama")
    weights = abstract_weights(tied.config, tied.plan("XL"), "bfloat16")
    assert LM_HEAD not in weights
    unit = make_units(tied.config, tied.plan("XL"), STEP)[0]
    embedding = (tied.config.vocab_size, tied.config.hidden_size)
    assert [a.shape for a in unit.arguments].count(embedding) == 1
    model = build_model(tied.config, weights, STEP)
    assert model.lm_head.weight is model.embedding
    # In an integer mode the head has weights of its own.
    head = abstract_weights(tied.config, tied.plan("S"), "bfloat16")[LM_HEAD]
    assert isinstance(head, QArray)


def test_float32_changes_only_what_is_not_integer(tiny):
    plan = tiny.plan("M")
    half, full = (abstract_weights(tiny.config, plan, dtype) for dtype in ("bfloat16", "float32"))
    for name in model_groups(tiny.config):
        assert half[name] == full[name]
    assert (half["embedding"].dtype, full["embedding"].dtype) == (jnp.bfloat16, jnp.float32)
    assert weight_bytes(full) > weight_bytes(half)


def test_a_plan_for_another_model_is_refused(tiny):
    deeper = dataclasses.replace(tiny.config, num_layers=4)
    with pytest.raises(PlanError, match="does not fit this model"):
        make_units(deeper, tiny.plan("M"), STEP)


@pytest.mark.parametrize(("field", "what"), [("attention", "attention"), ("dot", "dot"), ("sampling",) * 2])
def test_an_unknown_implementation_is_refused(tiny, field, what):
    with pytest.raises(ConfigError, match=f"no {what} implementation is called 'flash'"):
        make_units(tiny.config, tiny.plan("M"), tiny_step_config(**{field: "flash"}))


def test_the_source_digest_is_reproducible():
    assert traced_source_digest() == traced_source_digest()
    assert re.fullmatch(r"[0-9a-f]{64}", traced_source_digest())
