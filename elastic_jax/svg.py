"""Plots as SVG text, without a plotting library: panels of points, lines and intervals on linear or logarithmic axes.

What it does not do: bars, areas, dates, text that wraps.
"""

import dataclasses
import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#666666")
"""Told apart with any colour vision (Okabe and Ito, 2008)."""

_WIDTH, _HEIGHT = 360.0, 270.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 16.0, 30.0, 44.0
_LINE = 16.0


@dataclasses.dataclass(frozen=True)
class Series:
    """Points of one colour.

    Attributes:
        name: in the legend; series of one name share a colour and an entry. Empty for none.
        points: (x, y), in the units of the axes.
        low: lower ends of vertical intervals, one a point; None for no intervals.
        high: upper ends.
        labels: text beside each point, one a point; None for none.
        line: whether the points are joined.
        dashed: whether that line is dashed.
        marked: whether the points themselves are drawn.
    """

    name: str
    points: Sequence[tuple[float, float]]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    labels: Sequence[str] | None = None
    line: bool = False
    dashed: bool = False
    marked: bool = True


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: above it.
        x_label: below it, with a unit.
        y_label: beside it, with a unit.
        series: what it shows.
        log_x: whether x is logarithmic.
        log_y: whether y is logarithmic.
        from_zero: whether a linear y begins at 0.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = True


@dataclasses.dataclass(frozen=True)
class _Axis:
    """Numbers to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high, at = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        found = _log_ticks(self.low, self.high) if self.log else []
        return found if len(found) >= 2 else linear_ticks(self.low, self.high)


def linear_ticks(low: float, high: float) -> list[float]:
    """About five round numbers from `low` to `high`."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= min((m for m in (1, 2, 2.5, 5, 10) if (high - low) / (step * m) <= 5), default=10)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5)):
        ticks = [d * 10.0**p for p in powers for d in digits]
        ticks = [t for t in ticks if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]
        if len(ticks) >= 4:
            break
    return ticks


def _axis(values: Sequence[float], start: float, end: float, *, log: bool, from_zero: bool) -> _Axis:
    """Raises ValueError if a logarithmic axis is given a number that is not positive."""
    if log and min(values) <= 0:
        raise ValueError(f"a logarithmic axis needs positive numbers, found {min(values)}")
    low, high = min(values), max(values)
    if log:
        spread = max((high / low) ** 0.06, 1.05)
        return _Axis(low / spread, high * spread, start, end, log)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low = 0.0 if from_zero and low >= 0 else low - margin
    return _Axis(low, high + margin, start, end, log)


def draw(panels: Sequence[Panel], *, description: str) -> str:
    """The panels beside each other, with one legend below, as the text of an SVG file.

    Args:
        panels: each with at least one point.
        description: what the file says of itself to those who cannot see it, or look for what it was made from.

    Raises:
        ValueError: a panel has no points, or a logarithmic axis is given a number that is not positive.
    """
    names = list(dict.fromkeys(s.name for panel in panels for s in panel.series if s.name))
    colors = {name: COLORS[number % len(COLORS)] for number, name in enumerate(names)}
    width = _WIDTH * len(panels)
    legend, height = _legend(names, colors, width)
    body = [line for number, panel in enumerate(panels) for line in _panel(panel, number * _WIDTH, colors)]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="sans-serif" font-size="11" fill="#222222">',
        f"<desc>{escape(description)}</desc>",
        f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
        *body,
        *legend,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _text(x: float, y: float, text: str, anchor: str = "middle", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def _panel(panel: Panel, offset: float, colors: dict[str, str]) -> list[str]:
    xs = [x for s in panel.series for x, _ in s.points]
    ys = [y for s in panel.series for y in (*(y for _, y in s.points), *(s.low or ()), *(s.high or ()))]
    if not xs:
        raise ValueError(f"the panel {panel.title!r} has no points")
    left, right, top, bottom = offset + _LEFT, offset + _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM
    x_axis = _axis(xs, left, right, log=panel.log_x, from_zero=False)
    y_axis = _axis(ys, bottom, top, log=panel.log_y, from_zero=panel.from_zero)
    lines = [_text((left + right) / 2, 18.0, panel.title, extra=' font-weight="bold"')]
    for tick in x_axis.ticks():
        x = x_axis(tick)
        lines.append(f'<path d="M{x:.1f} {top:g}V{bottom:g}" stroke="#e4e4e4"/>')
        lines.append(_text(x, bottom + 15, f"{tick:g}"))
    for tick in y_axis.ticks():
        y = y_axis(tick)
        lines.append(f'<path d="M{left:.1f} {y:.1f}H{right:.1f}" stroke="#e4e4e4"/>')
        lines.append(_text(left - 6, y + 4, f"{tick:g}", "end"))
    lines.append(f'<path d="M{left:.1f} {top:g}V{bottom:g}H{right:.1f}" stroke="#222222" fill="none"/>')
    lines.append(_text((left + right) / 2, bottom + 34, panel.x_label))
    x, y = offset + 14, (top + bottom) / 2
    lines.append(_text(x, y, panel.y_label, extra=f' transform="rotate(-90 {x:.1f} {y:.1f})"'))
    for series in panel.series:
        lines += _series(series, x_axis, y_axis, colors.get(series.name, COLORS[0]))
    return lines


def _series(series: Series, x_axis: _Axis, y_axis: _Axis, color: str) -> list[str]:
    places = [(x_axis(x), y_axis(y)) for x, y in series.points]
    lines = []
    if series.line:
        dash = ' stroke-dasharray="4 3"' if series.dashed else ""
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        lines.append(f'<polyline points="{joined}" fill="none" stroke="{color}"{dash}/>')
    if series.low is not None and series.high is not None:
        for (x, _), low, high in zip(places, series.low, series.high, strict=True):
            ends = f"M{x:.1f} {y_axis(low):.1f}V{y_axis(high):.1f}"
            lines.append(f'<path d="{ends}" stroke="{color}" stroke-opacity="0.5" stroke-width="3"/>')
    if series.marked:
        lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places]
    for (x, y), label in zip(places, series.labels or (), strict=False):
        lines.append(_text(x + 6, y - 5, label, "start", ' font-weight="bold"'))
    return lines


def _legend(names: Sequence[str], colors: dict[str, str], width: float) -> tuple[list[str], float]:
    """The entries, in as many rows as their widths need, and the height of the whole plot."""
    lines, x, y = [], 16.0, _HEIGHT + 4
    for name in names:
        needed = 26 + 6.4 * len(name)
        if x + needed > width and x > 16:
            x, y = 16.0, y + _LINE
        lines.append(f'<circle cx="{x + 4:.1f}" cy="{y:g}" r="4" fill="{colors[name]}"/>')
        lines.append(_text(x + 13, y + 4, name, "start"))
        x += needed
    return lines, y + 12
