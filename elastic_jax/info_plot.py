"""`info --plot`: a checkpoint's plans drawn into a file, with the sensitivities that a search has measured."""

from pathlib import Path

from elastic_jax.checkpoint import Checkpoint
from elastic_jax.checkpoint_io import write_file
from elastic_jax.errors import RequestError
from elastic_jax.groups import model_groups
from elastic_jax.plan import CHOICES, MODES
from elastic_jax.plan_drawing import Sensitivity, draw_plans


def plot(checkpoint: Checkpoint, path: Path, name: str) -> None:
    """Draws a checkpoint's plans.

    Args:
        checkpoint: its scores are below its folder, where a search has left them.
        path: the SVG file.
        name: of the checkpoint, for the title.

    Raises:
        RequestError: the file is to be something else than SVG.
        ConfigError: the file of scores is damaged.
        OSError: the file cannot be written.
    """
    if path.suffix != ".svg":
        raise RequestError(f"plans are drawn as SVG: name a file that ends in .svg, found {path}")
    found = checkpoint.plans()
    plans = [found.pop(mode) for mode in MODES if mode in found] + list(found.values())
    # The folder's name alone: pictures are shown to others.
    text = draw_plans(checkpoint.config, plans, sensitivities(checkpoint), Path(name).absolute().name)
    write_file(path, text.encode())


def sensitivities(checkpoint: Checkpoint) -> list[Sensitivity]:
    """What the search has measured of each group alone, by choice; nothing where there was no search.

    Scores of prompt tokens are taken: `w8a16` computes generated ones in the same way.

    Raises:
        ConfigError: the file of scores is damaged.
    """
    from elastic_jax.search.scores import SCORES, Scores

    if not (checkpoint.path / SCORES).is_file():
        return []
    scores = Scores.read(checkpoint.path / SCORES)
    found = []
    for choice in CHOICES:
        groups = [name for name in model_groups(checkpoint.config) if scores.has("alone", "prompt", name, [choice])]
        if groups and choice != "bf16":
            kl = {name: scores.get("alone", "prompt", name, choice).kl for name in groups}
            found.append(Sensitivity(f"KL in nats, one group alone in {choice}", kl))
    return found
