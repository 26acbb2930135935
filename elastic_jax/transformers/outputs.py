"""What the model returns, with the access that transformers' `ModelOutput` has: by name, by key, and by number."""

import dataclasses
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Output:
    """Named values; those that are None are left out of everything but attribute access."""

    def keys(self) -> tuple[str, ...]:
        """Names of the values that are there."""
        return tuple(f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None)

    def values(self) -> tuple[Any, ...]:
        """The values that are there."""
        return tuple(getattr(self, name) for name in self.keys())

    def items(self) -> tuple[tuple[str, Any], ...]:
        """Names and values."""
        return tuple(zip(self.keys(), self.values(), strict=True))

    def to_tuple(self) -> tuple[Any, ...]:
        """As `values`."""
        return self.values()

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return dict(self.items())[key]
        return self.values()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


@dataclasses.dataclass(frozen=True)
class CausalLMOutput(Output):
    """What calling the model gives.

    Attributes:
        logits: float32 [batch, tokens, vocab]; 0 where the attention mask is 0.
    """

    logits: Any


@dataclasses.dataclass(frozen=True)
class GenerateOutput(Output):
    """What `generate(return_dict_in_generate=True)` gives.

    Attributes:
        sequences: [batch * num_return_sequences, tokens], prompts and answers.
        scores: one float32 [batch * num_return_sequences, vocab] a generated token, after all processors; None unless
            asked for. Rows that have ended have zeros, where transformers has what the model makes of padding.
        logits: the same, by the model itself.
    """

    sequences: Any
    scores: tuple[Any, ...] | None = None
    logits: tuple[Any, ...] | None = None
