"""README's tables of speed from committed results, and the plot of latency."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PROVISIONAL = "\\*"
"""Marks modes whose plan no search has found."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def where(result: Mapping[str, Any]) -> str:
    environment = result["environment"]
    jax = environment["versions"].get("jax")
    return f"{environment['device']}, {environment['cores']} cores" + (f", jax {jax}" if jax else "")


def _mode(row: Mapping[str, Any]) -> str:
    return row["mode"] + (PROVISIONAL if row["provisional"] else "")


def plot_name(result: Mapping[str, Any]) -> str:
    device = re.sub(r"[^a-z0-9]+", "-", result["environment"]["device"].lower()).strip("-")
    return f"docs/latency-{device}.svg"


def plot_digest(result: Mapping[str, Any]) -> str:
    """What a plot was drawn from; it is written into the plot, so that an outdated one is found."""
    shown = ("mode", "batch", "context", "decode_tok_s_per_seq", "read_tb_s", "provisional")
    data = [[row[name] for name in shown] for row in result["rows"]], result["limit_tb_s"]
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def limit_tok_s(row: Mapping[str, Any], limit_tb_s: float) -> float:
    """Tokens a second of a sequence if the step read at the device's limit."""
    return row["decode_tok_s_per_seq"] * limit_tb_s / row["read_tb_s"]


def latency(result: Mapping[str, Any], fidelity: Mapping[str, Any] | None) -> str:
    rows = [
        [
            _mode(row),
            f"{row['batch']} x {row['context']}",
            f"{row['decode_tok_s_per_seq']:.1f}",
            f"{row['decode_tok_s_total']:.0f}",
            f"{row['ttft_ms']:.1f}",
            f"{row['tpot_ms_p50']:.2f} / {row['tpot_ms_p99']:.2f}",
            f"{row['read_tb_s']:.2f}",
            f"{100 * row['fraction_of_limit']:.0f} %",
            f"{row['prefill_top_s']:.0f}",
            f"{row['peak_gib']:.1f}",
            "" if row["busy_fraction"] is None else f"{100 * row['busy_fraction']:.1f} %",
            str(row["compile_events"]),
        ]
        for row in result["rows"]
    ]
    head = ["mode", "batch x context", "tok/s per sequence", "tok/s in all", "TTFT, ms", "TPOT p50 / p99, ms"]
    head += ["TB/s read", "of the limit", "prompt TOP/s", "peak GiB", "busy", "compile events"]
    lines = [
        f"{result['model']} with random weights on one {where(result)}; 100 new tokens, medians of "
        f"{min(row['repeats'] for row in result['rows'])} runs or more after 2 warm-ups, other prompts every time "
        f"(`benches/latency.py`, `benches/peers.py`; `benches/latency_rows.py` has every formula). "
        "tok/s per sequence = (new tokens - 1) / (time of all - time of the first). The limit is "
        f"{result['limit_tb_s']:.2f} TB/s of reading. {_when(result)}",
        table(head, rows),
        f"![tok/s against context]({plot_name(result)})",
    ]
    if any(row["provisional"] for row in result["rows"]):
        lines.insert(2, f"{PROVISIONAL} The plan is provisional: no search has found it.")
    peers = _against_peers(result["rows"])
    lines += [peers] if peers else []
    apart = [mode for mode, anchor in result["anchors"].items() if not anchor["within_2_percent"]]
    if apart:
        lines.append(f"The anchor 1 x 256 differed by more than 2 % among the commands of: {', '.join(apart)}.")
    if fidelity is not None:
        lines.append(_kl(fidelity))
    left = [line for run in result["runs"] for line in run["skipped"] if "KV slots" in line]
    lines += [f"Left out, since it does not fit: {line}." for line in dict.fromkeys(left)]
    return "\n\n".join(lines)


def int8_cache(result: Mapping[str, Any], full: Mapping[str, Any], fidelity: Mapping[str, Any] | None) -> str:
    """What a KV cache in int8 changes: speeds beside those with one in bf16, and XL's distance to float32."""
    others = {_cell(row): row["decode_tok_s_per_seq"] for row in full["rows"]}
    told = [
        f"{row['decode_tok_s_per_seq']:.1f} in {row['mode']} at {row['batch']} x {row['context']}"
        + (f" (in bf16 {others[_cell(row)]:.1f})" if _cell(row) in others else "")
        for row in result["rows"]
    ]
    text = (
        f"Tokens a second of a sequence with the KV cache in int8 ({where(result)}): {'; '.join(told)}. {_when(result)}"
    )
    if fidelity is not None:
        kl = next(row["kl"] for row in fidelity["rows"] if row["mode"] == "XL" and row["dtype"] != "float32")
        text += f" XL's KL to float32 with that cache is {kl:.4f} nats ({where(fidelity)})."
    return text


def _cell(row: Mapping[str, Any]) -> tuple[str, int, int]:
    return row["mode"], row["batch"], row["context"]


def _when(result: Mapping[str, Any]) -> str:
    """Days and commits of a table's commands."""
    runs = sorted({(run["id"][:10], run["environment"]["commit"][:7]) for run in result["runs"]})
    return "Measured on " + ", ".join(f"{day} at commit {commit}" for day, commit in runs) + "."


def _against_peers(rows: Sequence[Mapping[str, Any]]) -> str:
    speeds = {_cell(row): row["decode_tok_s_per_seq"] for row in rows}
    told = [
        f"{mode} {ours / theirs:.2f} times {peer} at {batch} x {context}"
        for (peer, batch, context), theirs in speeds.items()
        if peer.startswith("transformers")
        for mode in ("S", "XL")
        if (ours := speeds.get((mode, batch, context))) is not None
    ]
    return f"Tokens a second of a sequence: {'; '.join(told)}." if told else ""


def _kl(fidelity: Mapping[str, Any]) -> str:
    kl = {row["mode"]: [] for row in fidelity["rows"] if row["dtype"] != "float32"}
    for row in fidelity["rows"]:
        if row["dtype"] != "float32":
            kl[row["mode"]].append(f"{row['kl']:.4f} ({row['role']} tokens)")
    told = "; ".join(f"{mode} {', '.join(values)}" for mode, values in kl.items())
    commit = fidelity["environment"]["commit"][:7]
    return f"KL in nats to float32 on the same device at commit {commit}, SmolLM2-135M-Instruct: {told}."


def startup(result: Mapping[str, Any]) -> str:
    """Also of results from before the bench was called so."""
    seconds = [row["process_to_token_s"] for row in result["rows"]]
    rate = min(row["weights_gb_per_s"] for row in result["rows"])
    text = (
        f"Mode {result['mode']}, {result['weights_gb']:.1f} GB of weights in the page cache: from the start of the "
        f"process to the first token {min(seconds):.1f} to {max(seconds):.1f} s in {len(seconds)} runs, weights read "
        f"at {rate:.1f} GB/s or more ({where(result)}; `benches/startup.py`)."
    )
    opened = [row for row in result["rows"] if "all_units_s" in row]
    if opened:
        units = max(row["all_units_s"] for row in opened)
        step = max(row["first_step_s"] for row in opened)
        text += (
            f" All {opened[0]['units']} executables are open after {units:.1f} s, the first step takes {step:.2f} s."
        )
    return text


def sampling(result: Mapping[str, Any]) -> str:
    """What sampling costs, of the implementation that GPUs get."""
    found = [row for row in result["rows"] if row["implementation"] == "cuda"]
    batches = sorted({row["rows"] for row in found})
    most = [
        max((row for row in found if row["rows"] == rows), key=lambda row: row["over_greedy_us"]) for rows in batches
    ]
    costs = " and ".join(
        f"{row['over_greedy_us']:.0f} µs ({100 * row['over_greedy']:.1f} %) of {row['rows']}" for row in most
    )
    layers = result.get("layers")
    step = f"a step of {layers} layers" if layers else "a whole step"
    compiled = f", compiled {result['compiled']}," if "compiled" in result else ""
    return (
        f"Sampling, with any of temperature, top-k, top-p, penalties and bias, makes {step}{compiled} longer than "
        f"greedy by at most {costs} sequences ({where(result)}; `benches/sampling.py`)."
    )


def kernels(result: Mapping[str, Any]) -> str:
    """A table for each kernel, with a column for each size: what stands after the last comma of a case's work."""
    limits = result["limits"]
    parts = [
        f"### Kernels\n\n{where(result)}; limits measured in the same run: {limits['read_tb_s']:.2f} TB/s of reading, "
        f"{limits['int8_top_s']:.0f} TOP/s in int8, {limits['bf16_top_s']:.0f} in bf16. Each case is checked against a "
        "reference, then timed with memory of its own for every layer: µs a layer, and what the limit that binds would "
        "take in % of it; that is reading, or arithmetic where the type stands behind (`benches/kernels.py` has the "
        "method, the committed JSON TB/s, TOP/s and errors)."
    ]
    for kernel in dict.fromkeys(row["kernel"] for row in result["rows"]):
        cells: dict[tuple[str, str], dict[str, str]] = {}
        for row in result["rows"]:
            if row["kernel"] == kernel:
                work, _, size = row["work"].rpartition(", ")
                bound = "" if row["bound"] == "reading" else f" {row['bound']}"
                text = f"{row['us']:.1f} ({100 * row['fraction_of_limit']:.0f} %{bound})"
                cells.setdefault((work, row["implementation"]), {})[size] = text
        sizes = list(dict.fromkeys(size for line in cells.values() for size in line))
        lines = [[*key, *(line.get(size, "") for size in sizes)] for key, line in cells.items()]
        parts.append(table([kernel, "by", *sizes], lines))
    if result.get("failed"):
        parts.append(f"Could not be measured: {'; '.join(entry['case'] for entry in result['failed'])}.")
    if result["left_out"]:
        parts.append(f"Time did not suffice for {len(result['left_out'])} cases more.")
    return "\n\n".join(parts)


def cpu(result: Mapping[str, Any]) -> str:
    """`S / it` are medians of ratios within a repeat."""
    rows = [
        [
            row["runtime"],
            f"{row['prefill_tok_s']:.0f}",
            f"{row['decode_tok_s']:.1f}",
            "" if row["runtime"] == "ours-S" else f"{row['S_prefill_to_it']:.2f}",
            "" if row["runtime"] == "ours-S" else f"{row['S_decode_to_it']:.2f}",
        ]
        for row in result["rows"]
    ]
    return (
        f"### On a CPU\n\nSmolLM2-135M-Instruct, {result['prompt']} prompt and {result['new_tokens']} new tokens, "
        f"greedy, {result['repeats']} repeats in turn; ratios are medians within a repeat ({where(result)}; "
        "`benches/cpu.py`). The plan of S is provisional.\n\n"
        + table(["runtime", "prompt tok/s", "decode tok/s", "S / it, prompt", "S / it, decode"], rows)
    )


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draws tok/s against context, a panel for each batch, with each mode's limit as a line."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": "latency", "svg.fonttype": "none", "font.size": 8})
    batches = sorted({row["batch"] for row in result["rows"]})
    figure, axes = plt.subplots(1, len(batches), figsize=(2.6 * len(batches) + 0.6, 2.9), squeeze=False, sharey=True)
    modes = list(dict.fromkeys(row["mode"] for row in result["rows"]))
    for axis, batch in zip(axes[0], batches, strict=True):
        for number, mode in enumerate(modes):
            rows = [row for row in result["rows"] if (row["mode"], row["batch"]) == (mode, batch)]
            if not rows:
                continue
            contexts, color = [row["context"] for row in rows], f"C{number}"
            name = mode + (" (provisional plan)" if rows[0]["provisional"] else "")
            speeds = [row["decode_tok_s_per_seq"] for row in rows]
            axis.plot(contexts, speeds, "o-", color=color, label=name, markersize=3)
            if not mode.startswith("transformers"):
                limits = [limit_tok_s(row, result["limit_tb_s"]) for row in rows]
                axis.plot(contexts, limits, "_:", color=color, label=f"{mode}, limit of reading")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({row["context"] for row in result["rows"]}))
        axis.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axis.set_title(f"batch {batch}")
        axis.set_xlabel("context")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("tok/s per sequence")
    handles: dict[str, Any] = {}
    for axis in axes[0]:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.06 * (1 + len(handles) // 4), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Description": plot_digest(result)})
    plt.close(figure)
