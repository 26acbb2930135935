import json

import jax
import numpy as np
import pytest

from elastic_jax.errors import ConfigError
from elastic_jax.search.texts import get_text

DEVICE = jax.devices()[0]


@pytest.fixture(scope="module")
def tiny(checkpoint_of):
    return checkpoint_of("tiny_mistral")


def get(tiny, count=4, length=20, file=None, tasks=(), seed=0, said=None):
    return get_text(
        tiny,
        count,
        length,
        file=file,
        tasks=list(tasks),
        seed=seed,
        device=DEVICE,
        workers=2,
        say=(said if said is not None else []).append,
    )


def test_the_model_writes_the_same_text_for_the_same_seed(tiny):
    first, again, other = get(tiny), get(tiny), get(tiny, seed=1)
    assert first.windows.shape == (4, 20)
    assert first.digest == again.digest != other.digest
    assert first.windows.min() >= 0
    assert first.windows.max() < tiny.config.vocab_size
    # Rows differ, so neither the prompts nor the draws are shared.
    assert len({tuple(window) for window in first.windows.tolist()}) == 4


def test_a_file_is_cut_into_windows(tiny, tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    text = get(tiny, file=file)
    assert text.windows.shape == (4, 20)
    assert text.description["source"] == "own.txt"
    assert (get(tiny, file=file).windows == text.windows).all()


def test_evaluation_items_are_left_out_and_named(tiny, tmp_path):
    words = " ".join(f"word{i}" for i in range(20))
    file, tasks, said = tmp_path / "own.jsonl", tmp_path / "task.jsonl", []
    file.write_text("\n".join(json.dumps({"text": text}) for text in ("Plain text. " * 60, f"so {words} there")))
    tasks.write_text(json.dumps({"question": words}))
    text = get(tiny, count=2, file=file, tasks=[tasks], said=said)
    assert text.description["left_out"] == 1
    assert said == ["1 texts left out: text 2 holds 13 words in a row of task.jsonl:1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", "a few words", "expected text for 4 windows of 20 tokens, found 0"),
        ("wrong.jsonl", '{"question": "x"}', "with a field `text`"),
        ("wrong.jsonl", '{"text": 3}', "`text` must be a string"),
        ("absent.txt", None, "absent.txt"),
    ],
)
def test_what_is_no_text_is_refused(tiny, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        get(tiny, file=tmp_path / name)


def test_separators_inside_json_strings_end_no_line(tiny, tmp_path):
    file = tmp_path / "separators.jsonl"
    words = " ".join(f"word{n}" for n in range(60))
    file.write_text(json.dumps({"text": f"{words}\u2028{words}"}, ensure_ascii=False), "utf-8")
    assert get(tiny, count=2, file=file).windows.shape == (2, 20)


def test_parts_share_no_window(tiny, tmp_path):
    file = tmp_path / "own.txt"
    file.write_text(" ".join(str(i) for i in range(1000)))
    first, second = get(tiny, count=6, file=file).split(4, 2)
    assert (len(first.windows), len(second.windows)) == (4, 2)
    assert not {tuple(w) for w in np.asarray(first.windows).tolist()} & {tuple(w) for w in second.windows.tolist()}
