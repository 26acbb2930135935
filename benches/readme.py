"""Writes the numbers of README.md from the committed results, between `<!-- NAME -->` and `<!-- /NAME -->`.

uv run python benches/readme.py           # rewrites README.md
uv run python benches/readme.py --check   # status 1 if it would change
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import readme_quality
import readme_search
import readme_speed
from readme_speed import table, where

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "results"


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


def headline(results: list[dict[str, Any]]) -> str:
    """The first thing a reader sees: batch 1 at a context of 256 on the fastest device, and the time to start."""

    def at_anchor(result: dict[str, Any]) -> dict[str, float]:
        found = [row for row in result["rows"] if (row["batch"], row["context"]) == (1, 256)]
        return {row["mode"]: row["decode_tok_s_per_seq"] for row in found}

    latency = [result for result in results if result["bench"] == "latency"]
    if not latency:
        return ""
    speeds = max(latency, key=_fastest)
    tok_s, device = at_anchor(speeds), speeds["environment"]["device"]
    each_mode = " and ".join(f"{tok_s[mode]:.0f} tokens a second in mode {mode}" for mode in ("S", "XL"))
    if (peer := tok_s.get("transformers-compile")) is not None:
        each_mode += f" ({peer:.0f} with transformers and torch.compile)"
    starts = [result for result in results if result["bench"] in ("startup", "loading")]
    start = next((result for result in starts if result["environment"]["device"] == device), starts[0])
    seconds = max(row["process_to_token_s"] for row in start["rows"])
    started = start["environment"]["device"]
    where_started = "a new process" if started == device else f"on one {started} a new process"
    return (
        f"On one {device}, Mistral-Small-3.1-24B's shape generates {each_mode}, and {where_started} "
        f"gives its first token in mode {start['mode']} after {seconds:.0f} s ([how](#measured))."
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
    """Which results a section shows, as patterns below `benches/results`, and how.

    An optional section is empty while its first pattern finds nothing.
    """

    files: tuple[str, ...]
    render: Callable[[list[dict[str, Any]]], str]
    optional: bool = False


def each(render: Callable[[dict[str, Any]], str]) -> Callable[[list[dict[str, Any]]], str]:
    """One result after the other."""
    return lambda results: "\n\n".join(render(result) for result in results)


def latencies(results: list[dict[str, Any]]) -> str:
    """Each device's table, the fastest first, with what an int8 KV cache changes and the distances measured on it."""
    full, rounded = ([r for r in results if (r.get("kv") == "int8") == int8] for int8 in (False, True))
    distances = [r for r in full if r["bench"] != "latency"]
    distance = next((r for r in rounded if r["bench"] != "latency"), None)
    told = ["### Latency"]
    for device in sorted((r for r in full if r["bench"] == "latency"), key=_fastest, reverse=True):
        told.append(readme_speed.latency(device, _of_device(device, distances)))
        if int8 := _of_device(device, [r for r in rounded if r["bench"] == "latency"]):
            told.append(readme_speed.int8_cache(int8, device, distance))
    return "\n\n".join(told)


def _of_device(result: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """That of the same device."""
    device = result["environment"]["device"]
    return next((other for other in results if other["environment"]["device"] == device), None)


def kernels(results: list[dict[str, Any]]) -> str:
    """Of the device that reads fastest alone: the tables are long."""
    return readme_speed.kernels(max(results, key=lambda result: result["limits"]["read_tb_s"]))


def _fastest(latency: dict[str, Any]) -> float:
    return max(row["decode_tok_s_per_seq"] for row in latency["rows"])


SECTIONS = {
    "headline": Section(("*/latency.json", "*/startup.json"), headline),
    "latency": Section(
        ("*/latency.json", "*/latency-kv-int8.json", "nvidia-*/fidelity.json", "*/fidelity-kv-int8.json"),
        latencies,
        optional=True,
    ),
    "sampling": Section(("*/sampling*.json",), each(readme_speed.sampling), optional=True),
    "kernels": Section(("*/kernels.json",), kernels, optional=True),
    "cpu": Section(("*/cpu.json",), each(readme_speed.cpu), optional=True),
    "search": Section(("*/search*.json",), readme_search.both, optional=True),
    "quality": Section(("*/quality.json",), each(readme_quality.quality), optional=True),
    "fidelity": Section(("cpu-*/fidelity.json", "nvidia-*/fidelity.json"), fidelity),
    "context": Section(("*/context.json",), each(context)),
    "convert": Section(("*/convert.json",), each(convert)),
    "startup": Section(("*/startup.json",), each(readme_speed.startup)),
    "greedy": Section(("nvidia-*/greedy.json",), each(greedy)),
}


PLOTS: dict[str, Any] = {"latency": readme_speed, "quality": readme_quality}
"""Result file -> the module that draws its plot."""


def rendered(text: str, folder: Path = RESULTS) -> str:
    """README's text with every section replaced by what the results say.

    Raises:
        ValueError: a result has no section, or a section that must have one has no result.
    """
    for name, section in SECTIONS.items():
        files = [file for pattern in section.files for file in sorted(folder.glob(pattern))]
        missing = not any(folder.glob(section.files[0])) if section.optional else not files
        if missing and not section.optional:
            raise ValueError(f"no result {section.files} for README's section {name}")
        body = "" if missing else section.render([json.loads(file.read_text()) for file in files])
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        inside = f"\n{body}\n\n" if body else "\n"
        text, count = pattern.subn(lambda match, inside=inside: f"{match[1]}{inside}{match[2]}", text)
        if count != 1:
            raise ValueError(f"README.md has {count} sections <!-- {name} -->, expected one")
    return text


def outdated_plots(folder: Path = RESULTS, root: Path = ROOT) -> list[tuple[Path, dict[str, Any]]]:
    """The plots that are missing, or drawn from other results, and what to draw them from."""
    found = []
    for kind, drawn in PLOTS.items():
        for file in sorted(folder.glob(f"*/{kind}.json")):
            result = json.loads(file.read_text())
            path = root / drawn.plot_name(result)
            if not path.exists() or drawn.plot_digest(result) not in path.read_text("utf-8"):
                found.append((path, result))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text("utf-8")
    after = rendered(before)
    plots = outdated_plots()
    if arguments.check and (before != after or plots):
        names = ["README.md"] * (before != after) + [str(path.relative_to(ROOT)) for path, _ in plots]
        sys.exit(f"{', '.join(names)}: not what the results say; run `python benches/readme.py`")
    for path, result in plots:
        PLOTS[result["bench"]].plot(result, path)
    readme.write_text(after, "utf-8")


if __name__ == "__main__":
    main()
