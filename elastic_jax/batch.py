"""The tokens of one step: whose they are, where they stand, and where their keys and values go."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Flat tokens of any mix of sequences: first the generated ones, one a sequence, then the prompt's.

    A row is a sequence's place in the step's state. Its prompt tokens in one step are consecutive and in order, and
    prompt tokens leave no gap: padding comes last. A padding token has `row == rows` and `slot == slots`: reads are
    clamped, writes are dropped.

    Attributes:
        row: int32 [tokens], the row of each token.
        position: int32 [tokens], its position in its sequence.
        slot: int32 [tokens], where in the KV cache its key and value are written.
        block_table: int32 [rows, pages], the pages of each row's context in order; unused entries are 0.
        context_length: int32 [rows], tokens of context a row has once this step has written its own.
        generated: how many of the first tokens are generated ones.
        page_size: slots a page.
    """

    row: Any
    position: Any
    slot: Any
    block_table: Any
    context_length: Any
    generated: int = dataclasses.field(metadata={"static": True})
    page_size: int = dataclasses.field(metadata={"static": True})

    @property
    def rows(self) -> int:
        """Rows of the step's state."""
        return self.block_table.shape[0]
