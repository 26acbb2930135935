"""A few items of every task in local files: real fields, made-up content, short enough for the tiny models."""

import json
from pathlib import Path

WORDS = ("stone", "river", "lamp", "cloud", "bread", "glass", "road", "tree", "salt", "wind", "door", "rope")


def _word(number: int) -> str:
    return WORDS[number % len(WORDS)]


ITEMS = {
    "arc_challenge_test.jsonl": [
        {
            "id": f"made-{n}",
            "question": f"What is a {_word(n)}?",
            "choices": {"text": [_word(n + k) for k in range(4)], "label": list("ABCD")},
            "answerKey": "ABCD"[n % 4],
        }
        for n in range(6)
    ],
    "gsm8k_test.jsonl": [{"question": f"{n} and {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(3)],
    "gsm8k_fewshot_train.jsonl": [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(6)],
    "mmlu_test_few.jsonl": [
        {"question": f"Which {_word(n)}?", "subject": subject, "choices": [_word(n + k) for k in range(4)], "answer": 1}
        for subject in ("anatomy", "virology")
        for n in range(3)
    ],
    "mmlu_dev_fewshot.jsonl": [
        {"question": "Which?", "subject": subject, "choices": list("wxyz"), "answer": 2}
        for subject in ("anatomy", "virology")
    ],
    "piqa_valid.jsonl": [
        {"goal": f"Use a {_word(n)}", "sol1": f"with a {_word(n + 1)}", "sol2": _word(n + 2), "label": n % 2}
        for n in range(8)
    ],
    "winogrande_xl_valid.jsonl": [
        {
            "sentence": f"The {_word(n)} met a {_word(n + 1)} as _ fell.",
            "option1": "it",
            "option2": "she",
            "answer": "2",
        }
        for n in range(4)
    ],
    "wikitext2_few.jsonl": [{"text": f"A {_word(n)} is near the {_word(3 * n)} . \n"} for n in range(200)],
}


def write_items(folder: Path) -> Path:
    """Writes all files, and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in ITEMS.items():
        (folder / name).write_text("".join(json.dumps(item) + "\n" for item in items), "utf-8")
    return folder
