"""Writes the numbers of README.md from the committed results, between `<!-- NAME -->` and `<!-- /NAME -->`.

uv run python benches/readme.py           # rewrites README.md
uv run python benches/readme.py --check   # status 1 if it would change
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "results"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def where(result: dict[str, Any]) -> str:
    environment = result["environment"]
    return f"{environment['device']}, {environment['cores']} cores, jax {environment['versions']['jax']}"


def fidelity(results: list[dict[str, Any]]) -> str:
    first = results[0]
    rows = [
        [
            row["mode"],
            "any" if row["mode"] == "XL" else row["role"],
            *(f"{result['rows'][number]['kl']:.5f}" for result in results),
            f"{100 * row['perplexity_change']:+.2f} %",
            f"{100 * row['flips']:.1f} %",
        ]
        for number, row in enumerate(first["rows"])
        if row["dtype"] != "float32"
    ]
    for result in results:
        same = ("text_sha256", "tokens", "window", "source")
        if any(result[key] != first[key] for key in same) or len(result["rows"]) != len(first["rows"]):
            raise ValueError("results of the fidelity bench are of different texts, windows or models")
    columns = [f"KL, {result['environment']['device']}" for result in results]
    model = first["source"]["files"][0]["name"]
    return (
        f"{model}, {first['tokens']} tokens of {first['text_name']} in windows of {first['window']} "
        f"(`benches/fidelity.py`; KL in nats, perplexity and flips from the first column's device):\n\n"
        + table(["mode", "tokens' role", *columns, "perplexity", "top-1 flips"], rows)
    )


def context(result: dict[str, Any]) -> str:
    contexts = " and ".join(str(row["max_context"]) for row in result["rows"])
    times = " and ".join(f"{row['step_ms']:.1f} ms" for row in result["rows"])
    return (
        f"Compiled for contexts of {contexts} tokens, a step with {result['rows'][0]['live_tokens']} live tokens takes "
        f"{times}: a ratio of {result['ratio']:.3f} (mode {result['mode']}, {where(result)}; `benches/context.py`)."
    )


def convert(result: dict[str, Any]) -> str:
    (row,) = result["rows"]
    return (
        f"Converting {row['source_gb']:.1f} GB of sharded bf16 safetensors into int8 and bf16 runs at "
        f"{row['input_mb_per_s']:.0f} MB/s of input with a peak of {row['peak_rss_gib']:.2f} GiB of memory "
        f"({where(result)}; `benches/convert.py`). Killed {row['kills']} times and continued, it leaves "
        f"{'the same files, byte for byte' if row['identical'] else 'OTHER FILES'}."
    )


def steps(results: list[dict[str, Any]]) -> str:
    """One table: speeds of executables compiled on the device, and beside them of those compiled elsewhere."""
    here, elsewhere = (next(r for r in results if r["compiled"] == place) for place in ("here", "elsewhere"))
    others = {(row["mode"], row["what"], row["batch"], row["context"]): row for row in elsewhere["rows"]}
    names = {"decode": "decode, {batch} x {context}", "prompt": "a prompt of {context}"}
    rows = []
    for row in here["rows"]:
        other = others.get((row["mode"], row["what"], row["batch"], row["context"]))
        digits = 1 if row["what"] == "decode" else 0
        rows.append(
            [
                row["mode"],
                names[row["what"]].format(**row),
                f"{row['step_ms']:.2f} ms",
                f"{row['tok_s']:.{digits}f}",
                f"{row['read_tb_s']:.2f} TB/s" if row["read_tb_s"] else f"{row['top_s']:.0f} TOP/s",
                f"{other['tok_s']:.{digits}f}" if other else "",
            ]
        )
    head = ["mode", "work, batch x context", "step", "tok/s per sequence", "rate", "tok/s, compiled without a GPU"]
    facts = [
        f"- mode {name}, compiled {place}: {mode['units']} executables of {mode['bytes'] / 1e6:.0f} MB, "
        f"{mode['compile_unit_seconds'] / mode['units']:.0f} s of compiling each, all loaded in "
        f"{mode['load_seconds']:.1f} s, compile events: {mode['compile_events']}"
        for result, place in ((here, "on the device"), (elsewhere, "without a GPU"))
        for name, mode in result["modes"].items()
    ]
    return f"{where(here)}; `benches/steps.py`:\n\n{table(head, rows)}\n\n" + "\n".join(facts)


def headline(results: list[dict[str, Any]]) -> str:
    """The first thing a reader sees: batch 1 at a context of 256, and the time to start."""
    speeds = next(result for result in results if result["bench"] == "steps")
    start = next(result for result in results if result["bench"] == "loading")
    rows = [row for row in speeds["rows"] if (row["what"], row["batch"], row["context"]) == ("decode", 1, 256)]
    each_mode = " and ".join(f"{row['tok_s']:.0f} tokens a second in mode {row['mode']}" for row in rows)
    seconds = max(row["process_to_token_s"] for row in start["rows"])
    return (
        f"On one {speeds['environment']['device']}, Mistral-Small-3.1-24B's shape generates {each_mode}, and a new "
        f"process gives its first token in mode {start['mode']} after {seconds:.0f} s ([how](#measured))."
    )


def loading(result: dict[str, Any]) -> str:
    seconds = [row["process_to_token_s"] for row in result["rows"]]
    rate = min(row["weights_gb_per_s"] for row in result["rows"])
    return (
        f"Mode {result['mode']}, {result['weights_gb']:.1f} GB of weights in the page cache: from the start of the "
        f"process to the first token {min(seconds):.1f} to {max(seconds):.1f} s in {len(seconds)} runs, weights read "
        f"at {rate:.1f} GB/s or more ({where(result)}; `benches/loading.py`)."
    )


def greedy(result: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['mode']}, {row['dtype']}",
            f"{row['equal_before_parting']} of {row['tokens']}",
            f"{row['largest_margin_at_parting']:.3f}",
        ]
        for row in result["rows"]
    ]
    head = ["mode", "equal greedy tokens before texts part", "largest margin (nats) where they do"]
    return f"{where(result)} against {result['against']} (`benches/greedy.py`):\n\n{table(head, rows)}"


@dataclasses.dataclass(frozen=True)
class Section:
    """Which results a section shows, as patterns below `benches/results`, and how."""

    files: tuple[str, ...]
    render: Callable[[list[dict[str, Any]]], str]


def each(render: Callable[[dict[str, Any]], str]) -> Callable[[list[dict[str, Any]]], str]:
    """One result after the other."""
    return lambda results: "\n\n".join(render(result) for result in results)


SECTIONS = {
    "headline": Section(("*/steps.json", "*/loading.json"), headline),
    "fidelity": Section(("cpu-*/fidelity.json", "nvidia-*/fidelity.json"), fidelity),
    "context": Section(("*/context.json",), each(context)),
    "convert": Section(("*/convert.json",), each(convert)),
    "steps": Section(("*/steps.json", "*/steps-cross.json"), steps),
    "loading": Section(("*/loading.json",), each(loading)),
    "greedy": Section(("nvidia-*/greedy.json",), each(greedy)),
}


def rendered(text: str) -> str:
    """README's text with every section replaced by what the results say.

    Raises:
        ValueError: a result has no section, or a section no result.
    """
    for name, section in SECTIONS.items():
        files = [file for pattern in section.files for file in sorted(RESULTS.glob(pattern))]
        if not files:
            raise ValueError(f"no result {section.files} for README's section {name}")
        body = section.render([json.loads(file.read_text()) for file in files])
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, body=body: f"{match[1]}\n{body}\n\n{match[2]}", text)
        if count != 1:
            raise ValueError(f"README.md has {count} sections <!-- {name} -->, expected one")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text("utf-8")
    after = rendered(before)
    if arguments.check and before != after:
        sys.exit("README.md differs from the results: run `python benches/readme.py`")
    readme.write_text(after, "utf-8")


if __name__ == "__main__":
    main()
