import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_jax.errors import MemoryPlanError
from elastic_jax.pages import PageAllocator


def test_pages_are_handed_out_once_and_come_back() -> None:
    pool = PageAllocator(4)
    first, second = pool.allocate(3), pool.allocate(1)
    assert sorted(first + second) == [0, 1, 2, 3]
    assert pool.free == 0
    pool.release(first)
    assert pool.free == 3


def test_a_shared_page_is_free_after_its_last_holder() -> None:
    pool = PageAllocator(2)
    pages = pool.allocate(1)
    pool.share(pages)
    pool.release(pages)
    assert pool.free == 1
    pool.release(pages)
    assert pool.free == 2


def test_too_many_are_refused_and_nothing_is_taken() -> None:
    pool = PageAllocator(2)
    with pytest.raises(MemoryPlanError, match="3 KV pages wanted, 2 of 2 free"):
        pool.allocate(3)
    assert pool.free == 2


def test_misuse_is_noticed() -> None:
    pool = PageAllocator(2)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(ValueError, match="released twice"):
        pool.release(pages)
    with pytest.raises(ValueError, match="free and cannot be shared"):
        pool.share(pages)


@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 5)), max_size=60))
def test_no_page_has_two_owners_or_is_lost(actions: list[tuple[str, int]]) -> None:
    pool = PageAllocator(8)
    held: list[list[int]] = []
    for action, number in actions:
        if action == "allocate" and number <= pool.free:
            new = pool.allocate(number)
            assert not {page for pages in held for page in pages} & set(new)
            held.append(new)
        elif action == "share" and held:
            pages = held[number % len(held)]
            pool.share(pages)
            held.append(list(pages))
        elif action == "release" and held:
            pool.release(held.pop(number % len(held)))
        assert pool.free == 8 - len({page for pages in held for page in pages})
