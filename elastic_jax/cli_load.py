"""What the commands that load a model share: the options of loading and of sampling, and loading itself."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from elastic_jax.cli_options import Dtype, Kv, hide_hub_progress, note
from elastic_jax.hub_id import is_remote

if TYPE_CHECKING:
    from elastic_jax.elastic import ElasticMistral

OnMissing = Literal["error", "compile"]

OnMissingOption = Annotated[OnMissing, typer.Option(help="Without executables: fail, or compile.")]
TrustOption = Annotated[bool, typer.Option("--trust", help="Run executables that somebody else made.")]
KvSlotsOption = Annotated[
    int | None, typer.Option(min=1, help="The KV pool, of those compiled; the largest that fits by default.")
]
MaxContextOption = Annotated[int | None, typer.Option(min=1, help="Longest context in tokens.")]

TemperatureOption = Annotated[float, typer.Option(help="0 takes the most likely token.")]
TopKOption = Annotated[int, typer.Option(help="Sample among the k most likely; 0 for all.")]
TopPOption = Annotated[float, typer.Option(help="Sample among the most likely with this probability.")]
MinPOption = Annotated[float, typer.Option(help="Least probability relative to the most likely token.")]
RepetitionPenaltyOption = Annotated[float, typer.Option(help="Above 1 avoids what was said.")]
SeedOption = Annotated[int | None, typer.Option(help="Equal seeds give equal answers.")]


def load_model(
    checkpoint: str,
    mode: str,
    *,
    on_missing: OnMissing,
    dtype: Dtype,
    kv: Kv = "full",
    kv_slots: int | None,
    max_context: int | None,
    trust: bool,
    revision: str | None,
    token: str | None,
    preload: bool,
    as_json: bool,
) -> "ElasticMistral":
    """`ElasticMistral.load` for a command; what it says goes to standard error, or nowhere where JSON is wanted.

    Raises:
        ElasticError: as `ElasticMistral.load`.
    """
    from elastic_jax.elastic import ElasticMistral

    if is_remote(checkpoint):
        hide_hub_progress(as_json)
    return ElasticMistral.load(
        checkpoint,
        mode,
        on_missing=on_missing,
        dtype=dtype,
        kv=kv,
        kv_slots=kv_slots,
        max_context=max_context,
        trust=trust,
        revision=revision,
        token=token,
        preload=preload,
        say=lambda message: note(message, as_json),
    )
