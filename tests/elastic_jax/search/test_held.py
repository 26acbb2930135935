"""Weights that come and go: what is kept, what is counted, and what waits for what."""

import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.search import held
from elastic_jax.search.held import PartlyHeld

LAYERS, SIZE = 6, 4 * 100
KINDS = ("a", "b")


class Source:
    """Reads weights that can be counted, however long they live."""

    def __init__(self):
        self.reads, self.threads, self.alive, self.most = [], [], 0, 0
        self.lock = threading.Lock()
        self.fails = set()

    def read(self, key):
        if key in self.fails:
            raise OSError(f"{key} is damaged")
        array = jnp.full(100, len(self.reads), jnp.float32)
        with self.lock:
            self.reads.append(key)
            self.threads.append(threading.current_thread().name)
            self.alive += SIZE
            self.most = max(self.most, self.alive)
        weakref.finalize(array, self.gone)
        return array

    def gone(self):
        with self.lock:
            self.alive -= SIZE


def keys(precision):
    return [(f"layers.{layer}.{kind}", precision) for layer in range(LAYERS) for kind in KINDS]


SIZES = dict.fromkeys([*keys("bf16"), *keys("int8"), ("lm_head", "int8")], SIZE)


def weights(source, room, passing=4):
    return PartlyHeld(SIZES, source.read, budget=room * SIZE, always={}, fixed=0, passing=passing * SIZE)


def walk(store, precision, first=0, other=None, ahead=True):
    """All layers from one on, one group of which may be in the other precision."""
    for layer in range(first, LAYERS):
        for kind in KINDS:
            name = f"layers.{layer}.{kind}"
            chosen = "int8" if precision == "bf16" else "bf16"
            store.used_by(store.get(name, chosen if name == other else precision) + 1)
        if ahead and layer + 1 < LAYERS:
            store.expect((f"layers.{layer + 1}.{kind}", precision) for kind in KINDS)


def test_nothing_is_read_twice_where_everything_fits():
    source = Source()
    store = weights(source, len(SIZES) + 4)
    for precision in ("bf16", "int8", "bf16"):
        walk(store, precision)
    assert sorted(source.reads) == sorted([*keys("bf16"), *keys("int8")])


@pytest.mark.parametrize("ahead", [False, True])
def test_a_cycle_larger_than_the_memory_reads_only_what_does_not_fit(ahead):
    """Least recently used would read all of them every time."""
    source = Source()
    store = weights(source, 9)  # of 12, and 4 of them are for what passes
    walk(store, "bf16", ahead=ahead)
    for _ in range(3):
        before = len(source.reads)
        walk(store, "bf16", ahead=ahead)
        assert 12 - 9 <= len(source.reads) - before <= 12 - 5
    assert store.peak <= 9 * SIZE
    assert source.most <= 9 * SIZE


def test_one_group_in_the_other_precision_displaces_none_of_the_base():
    source = Source()
    store = weights(source, 16)
    walk(store, "bf16")
    for layer in range(LAYERS):
        before = len(source.reads)
        walk(store, "bf16", first=layer, other=f"layers.{layer}.b")
        assert source.reads[before:] == [(f"layers.{layer}.b", "int8")]
    assert store.peak <= 16 * SIZE


def test_another_base_takes_the_place_of_the_one_before():
    source = Source()
    store = weights(source, 16)
    walk(store, "bf16")
    walk(store, "int8")
    before = len(source.reads)
    walk(store, "int8")
    walk(store, "int8")
    assert len(source.reads) - before <= 4
    assert source.most <= 16 * SIZE


@pytest.mark.parametrize("room", [2, 3, 4, 7])
def test_bytes_never_exceed_the_budget_whatever_is_asked_for(room):
    source = Source()
    store = weights(source, room, passing=min(4, room))
    random = np.random.default_rng(0)
    for _ in range(30):
        walk(
            store, str(random.choice(["bf16", "int8"])), int(random.integers(LAYERS)), f"layers.{random.integers(6)}.a"
        )
        store.expect([("lm_head", "int8"), *keys("int8")])
        assert store.peak <= room * SIZE
    assert source.most <= room * SIZE


def test_the_next_layer_is_read_by_another_thread():
    source = Source()
    store = weights(source, 6)
    walk(store, "bf16")
    by = dict(zip(source.reads, source.threads, strict=False))
    assert not by["layers.0.a", "bf16"].startswith("ahead")
    assert all(by[key].startswith("ahead") for key in keys("bf16")[2:])
    assert list(by) == keys("bf16")


def test_what_the_reading_thread_meets_reaches_the_caller_and_can_be_tried_again():
    source = Source()
    store = weights(source, 6)
    source.fails.add(("layers.3.a", "bf16"))
    with pytest.raises(OSError, match=r"layers.3.a.* is damaged"):
        walk(store, "bf16")
    source.fails.clear()
    walk(store, "bf16")
    assert source.most <= 6 * SIZE


def test_what_was_read_in_vain_makes_room_even_if_reading_failed():
    source = Source()
    store = weights(source, 4)
    source.fails.add(("layers.5.a", "bf16"))
    store.get("layers.0.a", "bf16")
    store.used_by(jnp.zeros(1))
    store.expect([("layers.5.a", "bf16"), ("layers.5.b", "bf16")])
    store.expect([])
    walk(store, "int8", first=1)
    assert store.peak <= 4 * SIZE


class Mark:
    """Stands for a computation that is done when somebody has waited for it."""

    def __init__(self):
        self.waited = False

    def is_ready(self):
        return self.waited

    def block_until_ready(self):
        self.waited = True
        return self


def test_memory_counts_until_the_computation_that_used_it_is_done(monkeypatch):
    marks = []

    def mark(_):
        marks.append(Mark())
        return marks[-1]

    monkeypatch.setattr(held, "_mark", mark)
    monkeypatch.setattr(jax, "block_until_ready", lambda mark: mark.block_until_ready())
    store = weights(Source(), 3, passing=3)
    for number in range(3):
        store.get(f"layers.{number}.a", "bf16")
        store.used_by(jnp.zeros(1))
    assert not any(each.waited for each in marks)
    store.get("layers.3.a", "bf16")
    assert [each.waited for each in marks] == [True, False, False]
    store.used_by(jnp.zeros(1))
    store.get("layers.4.a", "bf16")
    assert [each.waited for each in marks] == [True, True, False, False]


def test_what_is_in_use_is_not_let_go_and_a_computation_that_needs_more_is_a_mistake_that_shows():
    store = weights(Source(), 2, passing=2)
    store.get("layers.0.a", "bf16")
    store.get("layers.0.b", "bf16")
    with pytest.raises(RuntimeError, match="while all others are in use"):
        store.get("layers.1.a", "bf16")
    store.used_by(jnp.zeros(1))
    store.get("layers.1.a", "bf16")


def test_what_is_always_there_is_given_as_it_is():
    head = jnp.zeros(3)
    store = PartlyHeld({}, Source().read, budget=12, always={("lm_head", "bf16"): head}, fixed=12, passing=0)
    assert store.get("lm_head", "bf16") is head
    store.expect([("lm_head", "bf16")])
    assert store.peak == 12
