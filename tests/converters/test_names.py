import dataclasses

import pytest

from converters.names import GROUP_PARTS, PARTS, list_names, match_names
from elastic_jax.errors import ConversionError
from elastic_jax.groups import LM_HEAD, model_groups


@dataclasses.dataclass(frozen=True)
class Tensor:
    shape: tuple[int, ...]


@pytest.fixture
def found(weights):
    return {name: Tensor(array.shape) for name, array in weights.items()}


def match(found, model):
    return match_names(found, model, lambda part: part.hugging_face, source="folder")


def test_every_weight_is_found_under_its_own_name(found, model):
    matched = match(found, model)
    assert matched["layers.1.gate"] is found["model.layers.1.mlp.gate_proj.weight"]
    assert len(matched) == len(found) == 2 + 1 + 9 * model.num_layers


def test_parts_add_up_to_the_groups(model):
    shapes = {part.name: part.shape(model) for part in PARTS}
    for name, group in model_groups(model).items():
        parts = [shapes[f"layers.{{}}.{part}"] for part in GROUP_PARTS[group.kind]] if name != LM_HEAD else []
        parts = parts or [shapes[LM_HEAD]]
        assert sum(rows for rows, _ in parts) == group.out_size
        assert {columns for _, columns in parts} == {group.in_size}


def test_all_kinds_of_problems_are_listed_together(found, model):
    found["model.layers.0.self_attn.q_proj.bias"] = Tensor((32,))
    del found["model.layers.1.mlp.up_proj.weight"]
    found["model.norm.weight"] = Tensor((8,))
    with pytest.raises(ConversionError) as error:
        match(found, model)
    message = str(error.value)
    assert "1 unknown tensors: model.layers.0.self_attn.q_proj.bias" in message
    assert "1 missing tensors: model.layers.1.mlp.up_proj.weight" in message
    assert "model.norm.weight should be [16], is [8]" in message


def test_layers_beyond_the_config_are_unknown(found, model):
    with pytest.raises(ConversionError, match=r"9 unknown tensors: model\.layers\.1\."):
        match(found, dataclasses.replace(model, num_layers=1))


def test_a_tied_head_may_be_there_or_not_and_is_left_out(found, model):
    tied = dataclasses.replace(model, tie_word_embeddings=True)
    assert LM_HEAD not in match(found, tied)
    del found["lm_head.weight"]
    assert LM_HEAD not in match(found, tied)
    with pytest.raises(ConversionError, match=r"missing tensors: lm_head\.weight"):
        match(found, model)


def test_long_lists_are_cut():
    assert list_names(str(i) for i in range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
