"""Answers of the original model: transformers on the source weights, asked the same by lm-eval as the modes are.

It runs in an environment of its own (Python 3.11 or later) with torch, transformers, accelerate and uv.lock's lm-eval:

    python benches/original.py MODEL_FOLDER --data DIR --tasks piqa,mmlu --limit piqa=1838,mmlu=300 \
        --out CHECKPOINT/evaluation

MODEL_FOLDER is a Hugging Face folder or a Hub id. Answers go to OUT/Original/<task>.jsonl, in the format of
`elastic_jax/evaluation/answers.py`; what is there already is not asked again. `elastic-jax eval` compares the modes
with them, and refuses them if they are answers to other questions.

Method: lm-eval's own model class (`HFLM`), without a chat template, greedy. Weights are what is stored, arithmetic is
float32: bfloat16's rounding of logits and of log-probabilities, which lm-eval adds up in the model's type by default,
would be as large as what is measured.
"""

import argparse
import hashlib
import importlib.metadata
import json
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # instead of this folder, whose `kernels` is not the package that transformers looks for

from elastic_jax.evaluation import answering, answers, items, tasks  # noqa: E402  (found by the line above)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face folder, or a Hub id")
    parser.add_argument("--tasks", default=",".join(items.SOURCES))
    parser.add_argument("--limit", help="most items of every task, or of each by name: piqa=1838,mmlu=300")
    parser.add_argument("--data", type=Path, help="local items; the Hub's data sets without")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the evaluation")
    parser.add_argument("--text-windows", type=int, default=answering.TEXT_WINDOWS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()

    names = arguments.tasks.split(",")
    limits = tasks.parse_limit(arguments.limit, names)
    loaded = tasks.load(names, arguments.data)
    text = items.text(arguments.data) if arguments.text_windows else ""

    import torch
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=arguments.model, dtype=arguments.dtype, batch_size=arguments.batch, device=arguments.device)
    whose = {"mode": "Original", "weights": digest(arguments.model), "dtype": arguments.dtype}
    facts = {
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "lm_eval")},
        "python": platform.python_version(),
        "device": "cpu" if arguments.device == "cpu" else torch.cuda.get_device_name(),
    }
    started = time.monotonic()

    def progress(done, total, name):
        print(f"{time.monotonic() - started:6.0f} s  {name} {done} of {total}", file=sys.stderr, flush=True)

    def writer(name, asked, identity):
        return answers.Writer(answers.path_of(arguments.out, "Original", name), asked, identity, whose, facts)

    if arguments.text_windows:
        windows = answering.text_windows(model.tok_encode(text), arguments.text_windows, answering.TEXT_LENGTH)
        identity = answering.text_identity(answering.TEXT, text, answering.TEXT_LENGTH)
        to = writer(answering.TEXT, answering.window_digests(windows), identity)
        answering.answer_text(windows, model, to, progress)
    for task in loaded:
        asked = task.requests(limits[task.name])
        to = writer(task.name, tasks.digests(asked), task.identity())
        answering.answer_task(task, asked, model, to, progress)


def digest(model):
    """sha256 of the weights' files, or the Hub id."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    if not files:
        return str(model)
    found = {}
    for file in files:
        with file.open("rb") as opened:
            found[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    main()
