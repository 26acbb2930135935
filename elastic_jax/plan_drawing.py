"""Draws plans as SVG: layers by groups, coloured by choice, and beside them how sensitive each group is.

Written by hand rather than with a plotting library, which the base installation does not have.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape

from elastic_jax.config import ModelConfig
from elastic_jax.groups import LM_HEAD, Group, model_groups
from elastic_jax.plan import CHOICES, Choice, Plan

COLOURS: Mapping[Choice, str] = {"bf16": "#1f4e79", "w8a16": "#3d9970", "w8a8b": "#f2a33a", "w8a8": "#d1495b"}
"""From the original to the fastest."""

_ABSENT = "#d0d7de"
_LIGHT, _DARK = (255, 247, 236), (127, 39, 4)
"""The ends of the scale of sensitivities, red, green and blue."""

_ROW, _LABEL, _GAP, _HEAD, _MARGIN = 16.0, 64.0, 36.0, 24.0, 20.0
"""Pixels: height of a row, width of its name, between panels, height of a panel's title, round everything."""

_WIDEST_GRID, _WIDEST_CELL = 560.0, 18.0


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """How much the model suffers if one group alone is quantized.

    Attributes:
        title: what was measured.
        kl: group -> KL(original || model), nats.
    """

    title: str
    kl: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Where cells lie: a column a layer, a row a kind of group, and `lm_head` apart at the right.

    Attributes:
        layers: number of columns.
        kinds: the rows, in the order of computing.
        cell: width of a column, pixels.
    """

    layers: int
    kinds: Sequence[str]
    cell: float

    @classmethod
    def of(cls, config: ModelConfig) -> "_Grid":
        kinds = dict.fromkeys(group.kind for group in model_groups(config).values() if group.kind != LM_HEAD)
        return cls(config.num_layers, tuple(kinds), min(_WIDEST_CELL, _WIDEST_GRID / config.num_layers))

    @property
    def width(self) -> float:
        return _LABEL + self.layers * self.cell + 12 + max(self.cell, 12.0) + 52

    @property
    def height(self) -> float:
        return _HEAD + len(self.kinds) * _ROW + 18

    def place(self, group: Group) -> tuple[float, float, float, float]:
        """x, y, width and height of a group's cell, from the panel's corner."""
        if group.kind == LM_HEAD:
            return _LABEL + self.layers * self.cell + 12, _HEAD, max(self.cell, 12.0), len(self.kinds) * _ROW
        layer = int(group.name.split(".")[1])
        return _LABEL + layer * self.cell, _HEAD + self.kinds.index(group.kind) * _ROW, self.cell, _ROW


def draw_plans(config: ModelConfig, plans: Sequence[Plan], sensitivities: Sequence[Sensitivity], title: str) -> str:
    """An SVG document.

    Args:
        config: the model.
        plans: a panel each, below each other.
        sensitivities: a panel each, beside the plans; none where nothing was measured.
        title: of the whole.
    """
    grid = _Grid.of(config)
    left = [_plan_panel(config, grid, plan) for plan in plans]
    right = [_sensitivity_panel(config, grid, one) for one in sensitivities]
    rows = max(len(left), len(right), 1)
    width = 2 * _MARGIN + grid.width * (2 if right else 1) + (_GAP if right else 0)
    top = _MARGIN + 52
    height = top + rows * (grid.height + 8) + _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="system-ui, sans-serif" font-size="11" fill="#1b1f24">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
        f'<text x="{_MARGIN:g}" y="{_MARGIN + 12:g}" font-size="15" font-weight="600">{escape(title)}</text>',
        *_legend(plans),
    ]
    for column, panels in enumerate((left, right)):
        x = _MARGIN + column * (grid.width + _GAP)
        for row, panel in enumerate(panels):
            parts.append(f'<g transform="translate({x:g} {top + row * (grid.height + 8):g})">{panel}</g>')
    return "\n".join([*parts, "</svg>\n"])


def _legend(plans: Sequence[Plan]) -> Iterator[str]:
    used = {choice for plan in plans for choice in plan.choices.values()}
    x = _MARGIN
    shown: list[Choice] = [choice for choice in CHOICES if choice in used]
    for choice in shown:
        yield f'<rect x="{x:g}" y="{_MARGIN + 24:g}" width="12" height="12" fill="{COLOURS[choice]}"/>'
        yield f'<text x="{x + 17:g}" y="{_MARGIN + 34:g}">{choice}</text>'
        x += 70


def _plan_panel(config: ModelConfig, grid: _Grid, plan: Plan) -> str:
    counts = ", ".join(f"{count} {choice}" for choice, count in plan.counts().items())
    title = f"{plan.name}: {counts}" + (" (provisional)" if plan.provisional else "")
    return _panel(
        config,
        grid,
        title,
        lambda name: COLOURS[plan.choices[name]] if name in plan.choices else _ABSENT,
        lambda name: str(plan.choices.get(name, "no choice")),
    )


def _sensitivity_panel(config: ModelConfig, grid: _Grid, one: Sensitivity) -> str:
    """A logarithmic scale: sensitivities of one model lie decades apart."""
    logarithms = [math.log10(kl) for kl in one.kl.values() if kl > 0]
    low, high = min(logarithms, default=0.0), max(logarithms, default=0.0)

    def colour(name: str) -> str:
        kl = one.kl.get(name)
        if kl is None:
            return _ABSENT
        place = 0.0 if kl <= 0 else (math.log10(kl) - low) / (high - low) if high > low else 1.0
        mixed = (round(light + place * (dark - light)) for light, dark in zip(_LIGHT, _DARK, strict=True))
        return "#" + "".join(f"{part:02x}" for part in mixed)

    title = one.title + (f", {10**low:.1e} (light) to {10**high:.1e} (dark)" if logarithms else "")
    return _panel(
        config,
        grid,
        title,
        colour,
        lambda name: f"KL {one.kl[name]:.2e}" if name in one.kl else "not measured",
    )


def _panel(
    config: ModelConfig, grid: _Grid, title: str, colour: Callable[[str], str], told: Callable[[str], str]
) -> str:
    parts = [f'<text x="0" y="14" font-weight="600">{escape(title)}</text>']
    for row, kind in enumerate(grid.kinds):
        parts.append(f'<text x="{_LABEL - 6:g}" y="{_HEAD + row * _ROW + 12:g}" text-anchor="end">{kind}</text>')
    for name, group in model_groups(config).items():
        x, y, width, height = grid.place(group)
        parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{colour(name)}" stroke="#ffffff" '
            f'stroke-width="0.8"><title>{name}: {escape(told(name))}</title></rect>'
        )
    bottom = _HEAD + len(grid.kinds) * _ROW + 12
    step = max(1, math.ceil(28 / grid.cell))
    for layer in range(0, grid.layers, step):
        x = _LABEL + (layer + 0.5) * grid.cell
        parts.append(f'<text x="{x:g}" y="{bottom:g}" text-anchor="middle" fill="#57606a">{layer}</text>')
    head = _LABEL + grid.layers * grid.cell + 12 + max(grid.cell, 12.0) + 4
    parts.append(f'<text x="{head:g}" y="{_HEAD + len(grid.kinds) * _ROW / 2 + 4:g}">{LM_HEAD}</text>')
    return "".join(parts)
