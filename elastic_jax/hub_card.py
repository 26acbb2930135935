"""The model card of a pushed checkpoint: what it was made from, its modes, and how to load it."""

from collections.abc import Sequence

from elastic_jax.checkpoint import Checkpoint
from elastic_jax.memory import gib
from elastic_jax.plan import Plan


def model_card(checkpoint: Checkpoint, plans: Sequence[Plan], repository: str) -> str:
    """A README.md with the metadata that the Hub reads. It claims no license: that is the source's."""
    source = checkpoint.manifest.source.get("repository")
    header = ["library_name: elastic-jax", "tags:", "- elastic-jax", "- jax"]
    header += [f"base_model: {source}"] if source else []
    origin = f"made from [{source}](https://huggingface.co/{source})" if source else "made from a local model"
    commit = checkpoint.manifest.source.get("commit")
    notes = sorted({plan.note for plan in plans if plan.provisional})
    modes = [
        f"| {plan.name} | {gib(checkpoint.weight_bytes(plan))} | "
        f"{', '.join(f'{count} {choice}' for choice, count in plan.counts().items())} |"
        for plan in plans
    ]
    return "\n".join(
        [
            "---",
            *header,
            "---",
            "",
            f"# {repository.split('/')[-1]}",
            "",
            f"An Elastic checkpoint for elastic-jax, {origin}{f' at commit `{commit}`' if commit else ''}. It stores",
            "the weights once in every precision; a mode reads only what it needs. The license is that of the model it",
            "was made from.",
            "",
            "| mode | weights | matrix products |",
            "|---|---|---|",
            *modes,
            "",
            *(line for note in notes for line in (note, "")),
            "```python",
            "from elastic_jax import ElasticMistral",
            "",
            f'model = ElasticMistral.load("{repository}", mode="{plans[0].name}")',
            "```",
            "",
            "This compiles the mode once. Executables in this repository are native code: `trust=True` loads those for",
            "your device instead.",
            "",
        ]
    )
