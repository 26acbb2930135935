"""Pages of the KV cache: who holds which."""

from collections.abc import Sequence

from elastic_jax.errors import MemoryPlanError


class PageAllocator:
    """Hands out pages, and counts how many sequences share each.

    Args:
        pages: number of pages in the pool.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))
        self._holders = [0] * pages

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes pages; the caller is their only holder.

        Raises:
            MemoryPlanError: fewer are free.
        """
        if count > len(self._free):
            raise MemoryPlanError(f"{count} KV pages wanted, {len(self._free)} of {self.pages} free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """Adds a holder to pages that somebody holds already."""
        for page in pages:
            if not self._holders[page]:
                raise ValueError(f"page {page} is free and cannot be shared")
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Takes a holder from each page; those without one become free."""
        for page in pages:
            if not self._holders[page]:
                raise ValueError(f"page {page} is released twice")
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)
