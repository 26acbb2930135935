"""Keeping evaluation items out of calibration text: texts that share 13 words in a row with one are left out.

The length is that of the contamination analysis of GPT-3 (Brown et al., arXiv:2005.14165, appendix C). Words are
compared without case and punctuation. An item of fewer than 13 words can not be recognized.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from elastic_jax.errors import ConfigError

WORDS = 13

type Gram = tuple[str, ...]


def grams(text: str) -> Iterator[Gram]:
    """Every run of 13 words of a text."""
    words = re.findall(r"\w+", text.casefold())
    for start in range(len(words) - WORDS + 1):
        yield tuple(words[start : start + WORDS])


def task_grams(files: Iterable[Path]) -> dict[Gram, str]:
    """Every run of 13 words of evaluation items -> where it was found first, `FILE:LINE`.

    Args:
        files: JSON lines; an item is all the text in one line, whatever its fields are called: each field by itself,
            and all of them after each other, since a question and its choices may stand in one text.

    Raises:
        ConfigError: a file cannot be read, or a line is no JSON.
    """
    found: dict[Gram, str] = {}
    for file in files:
        try:
            lines = file.read_text("utf-8").split("\n")  # `splitlines` would also cut at U+2028, inside an item
            items = [(number, json.loads(line)) for number, line in enumerate(lines, 1) if line.strip()]
        except (OSError, ValueError) as error:
            raise ConfigError(f"evaluation items must be JSON lines, but {file} cannot be read: {error}") from None
        for number, item in items:
            strings = list(_strings(item))
            for text in [*strings, " ".join(strings)]:
                for gram in grams(text):
                    found.setdefault(gram, f"{file.name}:{number}")
    return found


def leave_out(texts: Sequence[str], items: dict[Gram, str]) -> tuple[list[int], list[str]]:
    """Which texts share no 13 words with an item (their numbers), and why each other one was left out."""
    kept, reasons = [], []
    for number, text in enumerate(texts):
        where = next((items[gram] for gram in grams(text) if gram in items), None) if items else None
        if where is None:
            kept.append(number)
        else:
            reasons.append(f"text {number + 1} holds {WORDS} words in a row of {where}")
    return kept, reasons


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)
