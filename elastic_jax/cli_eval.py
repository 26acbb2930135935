"""The `eval` command."""

from pathlib import Path
from typing import Annotated, Any

import typer

from elastic_jax.cli_load import KvSlotsOption, MaxContextOption, OnMissingOption, TrustOption, load_model
from elastic_jax.cli_options import CheckpointArgument, JsonOption, WorkersOption, note, print_value
from elastic_jax.cli_search import CalibrationOption
from elastic_jax.errors import EvaluationError
from elastic_jax.workers import default_workers

ModeNames = Annotated[
    str,
    typer.Option("--modes", help="Modes, with commas between; W8A8 is the negative control: plain, static int8."),
]


def evaluate(
    checkpoint: CheckpointArgument,
    modes: ModeNames = "XL,L,M,S",
    tasks: Annotated[
        str, typer.Option(help="lm-eval's tasks, with commas between.")
    ] = "arc_challenge,gsm8k,mmlu,piqa,winogrande",
    data: Annotated[
        Path | None, typer.Option(help="A folder of local items as JSON lines; the Hub's data sets if none.")
    ] = None,
    limit: Annotated[
        str | None, typer.Option(help="Most items of every task, or by task: piqa=500,gsm8k=50. All if none.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where answers go; CHECKPOINT/evaluation by default.")] = None,
    text_windows: Annotated[
        int, typer.Option(min=0, help="Windows of 512 tokens of WikiText-2 for perplexity; 0 for none.")
    ] = 32,
    kl_windows: Annotated[
        int, typer.Option(min=0, help="Of these, the windows for KL from the original, in float32; 0 for none.")
    ] = 8,
    control: Annotated[
        Path | None, typer.Option(help="The checkpoint that W8A8 is made from: the one before `calibrate`.")
    ] = None,
    calibration: CalibrationOption = None,
    on_missing: OnMissingOption = "error",
    trust: TrustOption = False,
    kv_slots: KvSlotsOption = None,
    max_context: MaxContextOption = None,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the modes on tasks, and what that says of their promises. What is answered is not asked again."""
    import json

    from elastic_jax.checkpoint import Checkpoint
    from elastic_jax.device import default_device

    if kl_windows > text_windows:
        raise EvaluationError(
            f"KL is measured on some of the text's windows: {kl_windows} of {text_windows} were asked"
        )
    try:
        import lm_eval  # noqa: F401  (an extra; all else of this command needs it)
    except ImportError as error:
        raise EvaluationError(
            f"evaluation needs lm-eval, which is not installed ({error}): `uv sync --extra eval`, or "
            '`pip install "elastic-jax[eval]"`'
        ) from None
    from elastic_jax.evaluation.answering import TEXT_LENGTH
    from elastic_jax.evaluation.evaluate import QUALITY, Evaluation, Settings
    from elastic_jax.evaluation.quality import render

    opened, device = Checkpoint.open(checkpoint), default_device()
    settings = Settings(
        modes=_names(modes),
        tasks=_names(tasks),
        data=data,
        limit=limit,
        out=out or checkpoint / "evaluation",
        text_windows=text_windows,
        text_length=TEXT_LENGTH,
        kl_windows=kl_windows,
        control=control,
        calibration=calibration,
        workers=workers or default_workers(),
    )

    def load(mode: str) -> Any:
        return load_model(
            str(checkpoint),
            mode,
            on_missing=on_missing,
            dtype="bfloat16",
            kv_slots=kv_slots,
            max_context=max_context,
            trust=trust,
            revision=None,
            token=None,
            preload=False,
            as_json=as_json,
        )

    evaluation = Evaluation(
        opened,
        settings,
        device,
        load,
        lambda message: note(message, as_json),
        lambda done, total, name: note(f"{name}: {done} of {total}", as_json),
    )
    quality = evaluation.run()
    shown = list(dict.fromkeys(row["mode"] for row in quality.rows))
    written = settings.out / QUALITY
    print_value(
        json.loads(written.read_text("utf-8")), as_json, lambda: f"{render(quality, shown)}\n\nwritten to {written}"
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
