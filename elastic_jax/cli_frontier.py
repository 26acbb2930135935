"""The commands that measure cost, search plans, and show what was found."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from elastic_jax.cli_options import CheckpointArgument, JsonOption, WorkersOption, note, print_value
from elastic_jax.cli_search import CalibrationOption, SeedOption, Steps, TasksOption
from elastic_jax.errors import ConfigError, PlanError
from elastic_jax.workers import default_workers

PromptTokensOption = Annotated[int, typer.Option(min=1, help="Of the workload: prompt tokens of a request.")]
NewTokensOption = Annotated[int, typer.Option(min=1, help="Of the workload: tokens generated for it.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Of the workload: requests at the same time.")]
TargetOption = Annotated[
    str | None,
    typer.Option(help="Predict for a GPU of `targets`, or a file of `dump-target`, instead of measuring this device."),
]


def cost(
    checkpoint: CheckpointArgument,
    out: Annotated[Path | None, typer.Option(help="Also write the costs to this file, for `search --costs`.")] = None,
    prompt_tokens: PromptTokensOption = 1024,
    new_tokens: NewTokensOption = 128,
    batch: BatchOption = 1,
    target: TargetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how long each kind of group takes by choice, on this device; or predict it for another."""
    import dataclasses

    from elastic_jax.checkpoint import Checkpoint

    opened = Checkpoint.open(checkpoint)
    costs = _costs(opened, None, (prompt_tokens, new_tokens, batch), target, as_json)
    if out is not None:
        costs.save(out)
    print_value(dataclasses.asdict(costs), as_json, lambda: _shown_costs(costs))


def _costs(opened: Any, file: Path | None, workload: tuple[int, int, int], target: str | None, quiet: bool) -> Any:
    """Costs from a file, predicted for a target, or measured here."""
    from elastic_jax.device import default_device
    from elastic_jax.executables import default_step_config
    from elastic_jax.search.cost_measured import measure_costs
    from elastic_jax.search.cost_predicted import predict_costs
    from elastic_jax.search.cost_steps import measure_step_costs
    from elastic_jax.search.workload import Costs, Workload

    if file is not None and target is not None:
        raise ConfigError("costs come from a file (--costs) or from a description (--target), not from both")
    if file is not None:
        return Costs.read(file)
    wanted = Workload(*workload)
    device = default_device()
    platform = "gpu" if target else device.platform
    step = default_step_config(opened.config, platform, "bfloat16", kv_slots=wanted.context + 64, max_context=None)
    if target is not None:
        return predict_costs(opened.config, wanted, target, step)
    note("measuring the cost of every choice on this device; anything else that runs spoils it", quiet)
    if step.decode != "xla":
        workers = default_workers()
        return measure_step_costs(opened.config, wanted, step, device, workers=workers, progress=Steps(quiet))
    return measure_costs(opened.config, wanted, step, device, progress=Steps(quiet))


def _shown_costs(costs: Any) -> str:
    w = costs.workload
    lines = [
        f"{'measured on' if costs.measured else 'predicted for'} {costs.device}; workload: {w.batch} requests of "
        f"{w.prompt_tokens} prompt tokens and {w.new_tokens} new ones",
        "microseconds a product",
    ]
    for role, kinds in costs.groups.items():
        lines.append(f"\n{role} tokens, {costs.buckets[role]} a step:")
        choices = list(next(iter(kinds.values())))
        lines.append("group    " + "".join(f"{choice:>11s}" for choice in choices))
        for kind, by_choice in kinds.items():
            lines.append(f"{kind:9s}" + "".join(f"{1e6 * by_choice[choice]:11.1f}" for choice in choices))
        lines.append(f"attention of all layers: {1e3 * costs.rest[role]:.2f} ms")
    return "\n".join(lines)


def search(
    checkpoint: CheckpointArgument,
    calibration: CalibrationOption = None,
    tasks: TasksOption = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text that groups are measured on.")] = 6,
    held_out: Annotated[int, typer.Option(min=2, help="Windows that found plans are measured on.")] = 12,
    length: Annotated[int, typer.Option(min=16, help="Tokens a window.")] = 128,
    points: Annotated[int, typer.Option(min=3, max=30, help="Plans of the frontier, about.")] = 12,
    costs: Annotated[Path | None, typer.Option(help="Costs that `cost --out` wrote; measured here if none.")] = None,
    prompt_tokens: PromptTokensOption = 1024,
    new_tokens: NewTokensOption = 128,
    batch: BatchOption = 1,
    target: TargetOption = None,
    max_gib: Annotated[float | None, typer.Option(help="Largest weights of every plan but the original.")] = None,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="Score all groups in one pass forward and backward instead of measuring each."),
    ] = False,
    merge: Annotated[list[Path] | None, typer.Option(help="Scores of the same search, measured elsewhere.")] = None,
    seed: SeedOption = 1,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find this checkpoint's plans S, M and L and its frontier; an interrupted search continues."""
    import jax

    from elastic_jax.checkpoint import Checkpoint
    from elastic_jax.device import default_device
    from elastic_jax.search.measuring import PlanMeter
    from elastic_jax.search.one_pass import METHOD, measure_fast
    from elastic_jax.search.outcome import write_outcome
    from elastic_jax.search.parallel import load, rooms
    from elastic_jax.search.sampled import check_sampling
    from elastic_jax.search.scores import FAST_SCORES, SCORES, Scores, identify
    from elastic_jax.search.search import Search
    from elastic_jax.search.sensitivity import measure
    from elastic_jax.search.texts import get_text
    from elastic_jax.search.workload import COSTS

    begun = time.monotonic(), time.process_time()
    opened, threads = Checkpoint.open(checkpoint), workers or default_workers()
    merged = [Scores.read(file) for file in merge or []]

    def say(message: str) -> None:
        note(message, as_json)

    device, devices = default_device(), jax.local_devices()
    rooms(opened.config, (max(windows, held_out), length), devices)  # before the work
    if calibration is None:
        check_sampling(opened, windows + held_out, length, device)
    known = _costs(opened, costs, (prompt_tokens, new_tokens, batch), target, as_json)
    (opened.path / COSTS).parent.mkdir(exist_ok=True)
    known.save(opened.path / COSTS)
    text = get_text(
        opened,
        windows + held_out,
        length,
        file=calibration,
        tasks=tasks or [],
        seed=seed,
        device=device,
        workers=threads,
        say=say,
    )
    first, second = text.split(windows, held_out)
    room = rooms(opened.config, (max(windows, held_out), length), devices)
    for message in dict.fromkeys(filter(None, (each.message() for each in room))):
        say(message)
    forward = load(opened, first.windows, devices, threads, room)
    identity = identify(opened, first, forward.dot_name, method=f"{METHOD}, seed {seed}" if fast else None)
    file = opened.path / (FAST_SCORES if fast else SCORES)
    scores = Scores.resume(file, identity, say)
    for other in merged:
        scores.merge(other)
    if not fast:
        if not len(scores):
            forward.compile(threads)
        measure(forward, scores, save=lambda: scores.save(file), progress=Steps(as_json))
    elif not len(scores):
        measure_fast(forward, scores, seed=seed, progress=Steps(as_json))
        scores.save(file)
    meters = PlanMeter(forward), PlanMeter(forward.over(second.windows))
    result = Search(opened.config, scores, known, *meters, say).run(
        points=points, max_bytes=None if max_gib is None else int(max_gib * 2**30)
    )
    took = {"wall_s": round(time.monotonic() - begun[0], 1), "cpu_s": round(time.process_time() - begun[1], 1)}
    frontier, plans = write_outcome(opened, result, known, first, second, scores=scores, took=took)
    print_value(frontier.to_json(), as_json, lambda: _shown(frontier, plans))


def frontier(
    checkpoint: CheckpointArgument,
    request: Annotated[
        str | None,
        typer.Argument(help="0.0 (fastest) to 1.0 (original), max-loss=1%, min-speedup=1.5, max-gib=30, or several."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw loss against speed and memory into this file, as SVG.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the plans that a search found; or which of them a request means, and why."""
    from elastic_jax.checkpoint import Checkpoint
    from elastic_jax.frontier import REQUESTS, Frontier
    from elastic_jax.frontier_plot import plot as drawn

    opened = Checkpoint.open(checkpoint)
    found = Frontier.read(opened.path)
    if found is None:
        raise PlanError(f"{checkpoint} has no frontier: `elastic-jax search {checkpoint}` finds one")
    if plot is not None:
        plot.write_text(drawn(found), "utf-8")
        note(f"drawn into {plot}", as_json)
    if request is None:
        print_value(found.to_json(), as_json, lambda: _shown(found, {}))
        return
    resolved = found.resolve(request)
    if resolved is None:
        raise PlanError(f"{request!r} is no request of a frontier; it should be one of: {REQUESTS}")
    point, why = resolved
    values = {"plan": point.name, "why": why, "loss": point.loss, "speedup": found.speedup(point)}
    print_value(values, as_json, lambda: f"{why}: {found.describe(point)}")


def _shown(found: Any, plans: Any) -> str:
    """The frontier, what each mode is, and what searched plans were compared with."""
    lines = [
        "plan  speedup  prompt ms  token ms      GiB  KL prompt            KL generated         est. loss  groups",
    ]
    for point in found.points:
        counts: dict[str, int] = {}
        for choice in point.choices.values():
            counts[choice] = counts.get(choice, 0) + 1
        kl = "  ".join(f"{point.kl[role]:.5f} ± {point.kl_stderr[role]:.5f} " for role in ("prompt", "generated"))
        lines.append(
            f"{point.name:5s} {found.speedup(point):7.3f}  {1e3 * point.step_seconds['prompt']:9.2f} "
            f"{1e3 * point.step_seconds['generated']:9.3f} {point.weight_bytes / 2**30:8.3f}  {kl} "
            f"{100 * point.loss:8.2f} %  {', '.join(f'{n} {c}' for c, n in sorted(counts.items()))}"
        )
    facts = found.facts
    lines += ["", f"costs {'measured on' if facts['costs_measured'] else 'predicted for'} {facts['device']}"]
    took = facts["took"]
    lines.append(
        f"scores: {facts['scores']}; this search took {took['wall_s']:.0f} s, {took['cpu_s']:.0f} s of processors"
    )
    lines += [f"{mode}: plan {told['plan']}, {told['why']}" for mode, told in found.modes.items()]
    lines += ["", "at equal predicted time, on held-out text (sum of both roles' KL, searched / rival):"]
    lines += [f"  {rival['rival']:22s} {rival['ratio']:.3f}" for rival in facts["rivals"]]
    if plans:
        lines += ["", "The promises are estimated: no task was evaluated. Compile the modes again before loading them."]
    return "\n".join(lines)
