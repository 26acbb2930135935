"""README's tables of searched plans, from `search.json`, and of the search at the 24B shape, from `search_24b.json`."""

from collections.abc import Mapping
from typing import Any

from readme_speed import table, where


def plans(result: Mapping[str, Any]) -> str:
    """Modes and what they are compared with, on text that neither calibration nor search has seen."""
    by = {(row["plan"], row["role"]): row for row in result["rows"]}
    xl = by["XL", "prompt"]["seconds"]
    rows = []
    for name in dict.fromkeys(row["plan"] for row in result["rows"]):
        prompt, generated = by[name, "prompt"], by[name, "generated"]
        rows.append(
            [
                name,
                f"{xl / prompt['seconds']:.2f}",
                f"{prompt['kl']:.4f} ± {prompt['kl_stderr']:.4f}",
                f"{generated['kl']:.4f} ± {generated['kl_stderr']:.4f}",
                f"{100 * prompt['perplexity_change']:+.2f} %",
                f"{100 * generated['perplexity_change']:+.2f} %",
                f"{100 * prompt['flips']:.1f} %",
            ]
        )
    search, ranks, bars = result["search"], result["rank_correlation"], result["bars"]
    took, workload = search["took"], search["workload"]
    rounding = {"gptq": " with `--rounding gptq`"}.get(result["rounding"], "")
    head = ["plan", "speed", "KL, prompt", "KL, generated", "perplexity, prompt", "generated", "flips"]
    lines = [
        f"{result['source']['files'][0]['name']}, calibrated{rounding}; {result['tokens']} tokens of "
        f"{result['text_name']} in windows of {result['window']} ({where(result)}; `benches/search.py`). Speed is "
        f"times XL's by costs {'measured' if search['costs_measured'] else 'predicted'} for {search['device']}, "
        f"{workload['prompt_tokens']} prompt and {workload['new_tokens']} new tokens; KL in nats ± its standard error:",
        table(head, rows),
        f"The search ({search['scores']}) took {took['wall_s'] / 60:.0f} minutes, {took['cpu_s'] / 60:.0f} of "
        f"processors. Predicted and measured KL of {len(result['unseen'])} plans "
        f"that it never measured have rank correlations of {ranks['prompt']:.2f} (prompt) and "
        f"{ranks['generated']:.2f} (generated). {result['solver']['budgets']} budgets of "
        f"{result['solver']['groups']} groups with {result['solver']['choices']} choices are solved in "
        f"{result['solver_seconds']:.1f} s.",
    ]
    if "S_kl_over_uniform_w8a8" in bars:
        lines.append(
            f"S has {bars['S_kl_over_uniform_w8a8']:.2f} times the KL of uniform w8a8 on prompts at "
            f"{100 * (bars['S_seconds_over_uniform_w8a8'] - 1):+.1f} % of its predicted time, and "
            f"{bars['S_generated_kl_over_w8a16']:.2f} times that of uniform w8a16 on generated tokens."
        )
    lines += [f"{mode}: plan {told['plan']}, {told['why']}." for mode, told in result["modes"].items()]
    return "\n\n".join(lines)


def shape_24b(result: Mapping[str, Any]) -> str:
    """Times of the search's parts, and steps of plans against what their costs say."""
    lines = [f"At Mistral-Small-3.1-24B's shape, random weights ({where(result)}; `benches/search_24b.py`):"]
    if "sensitivity" in result:
        found = result["sensitivity"]
        lines.append(
            f"- sensitivity of {found['groups']} groups, all choices, both ends, {result['tokens']} tokens: "
            f"{found['extrapolated_seconds'] / 60:.0f} minutes, extrapolated from {found['measured_groups']} groups "
            f"measured in {found['measured_seconds']:.0f} s, after {found['compile_and_first_run_seconds']:.0f} s of "
            f"compiling and first runs; peak {result['peak_gib_until_sensitivity']:.1f} GiB"
        )
    if "fast" in result:
        found = result["fast"]
        lines.append(
            f"- `--fast`, all groups: {found['seconds']:.0f} s after {found['compile_and_first_part_seconds']:.0f} s "
            f"of compiling and a first part; peak {result['peak_gib_until_fast']:.1f} GiB"
        )
    text = "\n".join(lines)
    if "rows" not in result:
        return text
    rows = [
        [
            row["plan"],
            row["role"],
            f"{row['predicted_ms']:.2f}",
            f"{row['measured_ms']:.2f}",
            f"{100 * row['error']:+.1f} %",
        ]
        for row in result["rows"]
    ]
    return f"{text}\n\n{table(['plan', 'tokens', 'predicted, ms a step', 'measured', 'apart'], rows)}"


def both(results: list[dict[str, Any]]) -> str:
    """Whichever of the two there are."""
    render = {"search": plans, "search_24b": shape_24b}
    return "\n\n".join(render[result["bench"]](result) for result in results)
