"""The text that calibration and search run on, as windows of token ids, and where it came from."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from aot_cache.target import Device
from elastic_jax.checkpoint import Checkpoint
from elastic_jax.errors import ConfigError
from elastic_jax.loading import Say
from elastic_jax.search.overlap import leave_out, task_grams
from elastic_jax.search.sampled import sample
from elastic_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Text:
    """Windows of text, each read by itself.

    Attributes:
        windows: int32 [windows, length].
        description: where they come from, JSON-ready; it goes into what is made from them.
    """

    windows: Int32[np.ndarray, "windows length"]
    description: dict[str, Any]

    @property
    def digest(self) -> str:
        """sha256 of the token ids."""
        return hashlib.sha256(np.ascontiguousarray(self.windows).tobytes()).hexdigest()

    def split(self, *counts: int) -> "list[Text]":
        """The first `counts[0]` windows, the next `counts[1]`, and so on: parts that share no window."""
        parts, start = [], 0
        for count in counts:
            parts.append(Text(self.windows[start : start + count], self.description))
            start += count
        return parts


def get_text(
    checkpoint: Checkpoint,
    count: int,
    length: int,
    *,
    file: Path | None,
    tasks: Sequence[Path],
    seed: int,
    device: Device,
    workers: int,
    say: Say,
) -> Text:
    """Windows of a file, or of text that the original model writes, without those that hold evaluation items.

    Args:
        checkpoint: whose tokenizer cuts the text, and whose bf16 weights write it.
        count: windows wanted.
        length: tokens a window.
        file: text, or JSON lines with a field `text`; None lets the model write.
        tasks: JSON lines of evaluation items; texts that share 13 words in a row with one are left out, and named.
        seed: of the drawing, or of which windows of the file are taken.
        device: where the model runs.
        workers: threads that read weights.
        say: is told what was left out.

    Raises:
        ConfigError: a file cannot be read, or there is not enough text.
        CheckpointError: the bf16 weights are not stored, or are damaged.
    """
    items = task_grams(tasks)
    tokenizer = Tokenizer.load(checkpoint.tokenizer_path)
    description: dict[str, Any] = {"seed": seed, "tasks": [path.name for path in tasks]}
    if file is None:
        windows = sample(checkpoint, tokenizer, count, length, seed=seed, device=device, workers=workers)
        texts = [tokenizer.decode(window.tolist(), skip_special_tokens=True) for window in windows]
        kept, reasons = leave_out(texts, items)
        windows = windows[kept]
        description |= {"source": "sampled from the original model at temperature 1"}
    else:
        texts = _read(file)
        kept, reasons = leave_out(texts, items)
        windows = _cut([tokenizer.encode(texts[number], add_special_tokens=True) for number in kept], length)
        windows = np.random.default_rng(seed).permutation(windows)[:count]
        description |= {"source": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    if reasons:
        say(f"{len(reasons)} texts left out: {'; '.join(reasons[:3])}{' ...' if len(reasons) > 3 else ''}")
    if len(windows) < min(count, 3) or (file is not None and len(windows) < count):
        raise ConfigError(
            f"expected text for {count} windows of {length} tokens, found {len(windows)}"
            f"{f' in {file}' if file else ''} ({len(reasons)} texts left out for evaluation items): give more text, or "
            "ask for fewer or shorter windows"
        )
    return Text(windows, description | {"left_out": len(reasons)})


def _read(file: Path) -> list[str]:
    try:
        content = file.read_text("utf-8")
        if file.suffix != ".jsonl":
            return [content]
        # Not `splitlines`: it also cuts at U+2028 and others, which JSON may hold inside a string.
        texts = [json.loads(line)["text"] for line in content.split("\n") if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"calibration text must be UTF-8, or JSON lines with a field `text` in a .jsonl file; {file}: {error!r}"
        ) from None
    if wrong := [number for number, text in enumerate(texts, 1) if not isinstance(text, str)]:
        raise ConfigError(f"{file}:{wrong[0]}: `text` must be a string")
    return texts


def _cut(documents: Sequence[Sequence[int]], length: int) -> Int32[np.ndarray, "windows length"]:
    """Documents one after another, cut into windows; the rest is dropped."""
    ids = np.asarray([token for document in documents for token in document], np.int32)
    return ids[: len(ids) // length * length].reshape(-1, length)
