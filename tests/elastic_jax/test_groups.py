import dataclasses

import pytest
from tiny import MISTRAL_SMALL

from elastic_jax.groups import LM_HEAD, Group, layer_groups, model_groups


def test_mistral_small_has_161_groups_in_the_order_of_computation():
    groups = model_groups(MISTRAL_SMALL)
    assert len(groups) == 161
    names = list(groups)
    assert names[:5] == ["layers.0.qkv", "layers.0.o", "layers.0.gate_up", "layers.0.down", "layers.1.qkv"]
    assert names[-2:] == ["layers.39.down", LM_HEAD]
    assert all(group.name == name for name, group in groups.items())


@pytest.mark.parametrize(
    ("kind", "out_size", "in_size"),
    [("qkv", 6144, 5120), ("o", 5120, 4096), ("gate_up", 65536, 5120), ("down", 5120, 32768), (LM_HEAD, 131072, 5120)],
)
def test_shapes_of_mistral_small(kind, out_size, in_size):
    found = {(g.out_size, g.in_size) for g in model_groups(MISTRAL_SMALL).values() if g.kind == kind}
    assert found == {(out_size, in_size)}


def test_parameters_of_mistral_small():
    # Every matrix but the embedding: 40 layers of 555.7 million, and the head.
    assert sum(group.parameters for group in layer_groups(MISTRAL_SMALL, 0)) == 555_745_280
    assert sum(group.parameters for group in model_groups(MISTRAL_SMALL).values()) == 22_900_899_840


def test_a_tied_head_is_a_group_too():
    tied = dataclasses.replace(MISTRAL_SMALL, tie_word_embeddings=True)
    assert model_groups(tied)[LM_HEAD] == Group(LM_HEAD, LM_HEAD, 131072, 5120)


def test_layers_differ_only_in_their_name():
    first, second = (list(layer_groups(MISTRAL_SMALL, layer)) for layer in (0, 17))
    assert [dataclasses.replace(g, name=g.name.replace(".17.", ".0.")) for g in second] == first
