"""Pictures of measurements: panels side by side, both axes logarithmic, as SVG that is the same for the same numbers.

Flat colours that stand out on white and on black. Every series is named at its right end, and names never overlap;
values are read where the mouse rests on a point.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

INK = "#768390"
HUES = ("#2f81f7", "#d55e00", "#2da44e", "#a371f7", "#bf8700", "#cf222e")
WIDTH, HEIGHT = 330.0, 300.0  # of the area inside the axes
LEFT, RIGHT, TOP, BOTTOM = 64.0, 136.0, 44.0, 48.0  # around it
LINE = 13.0  # pixels from one name to the next
GAP = 34.0  # and from one size on the x axis to the next


class Series(NamedTuple):
    """Points (x, y) joined by a line, one alone where there is one; series of one group share a colour.

    faint   belongs to the background: thin and grey, as a limit is
    """

    name: str
    points: tuple[tuple[float, float], ...]
    group: str = ""
    faint: bool = False


class Panel(NamedTuple):
    title: str
    x: str
    y: str
    series: tuple[Series, ...]


class _Axis(NamedTuple):
    """A logarithmic scale from `low` to `high` on `length` pixels."""

    low: float
    high: float
    length: float

    @classmethod
    def over(cls, values: Sequence[float], length: float) -> "_Axis":
        """A little wider than the values, and at least from one to ten."""
        low, high = min(values), max(values)
        spread = max(0.06 * math.log(high / low), 0.5 * (math.log(10) - math.log(high / low)), 0.06)
        return cls(low * math.exp(-spread), high * math.exp(spread), length)

    def at(self, value: float) -> float:
        return self.length * math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        """Powers of ten, with 2 and 5 between them where those are few."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5)):
            found = [digit * 10.0**power for power in powers for digit in digits]
            inside = [value for value in found if self.low <= value <= self.high]
            if len(inside) >= 3:
                break
        return inside


def draw(panels: Sequence[Panel]) -> str:
    """The panels as one SVG."""
    groups = list(dict.fromkeys(s.group or s.name for panel in panels for s in panel.series if not s.faint))
    hues = {group: HUES[i % len(HUES)] for i, group in enumerate(groups)}
    step = LEFT + WIDTH + RIGHT
    parts = [part for i, panel in enumerate(panels) for part in _panel(panel, i * step + LEFT, TOP, hues)]
    title = escape("; ".join(panel.title for panel in panels))
    size = f"{step * len(panels):g} {TOP + HEIGHT + BOTTOM:g}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, f"<title>{title}</title>", *parts, "</svg>"]) + "\n"


def _panel(panel: Panel, left: float, top: float, hues: dict[str, str]) -> list[str]:
    x = _Axis.over([x for series in panel.series for x, _ in series.points], WIDTH)
    y = _Axis.over([y for series in panel.series for _, y in series.points], HEIGHT)
    bottom = top + HEIGHT
    parts = [
        _text(left, top - 22, panel.title, weight="600"),
        _text(left, top - 6, panel.y),
        _text(left + WIDTH / 2, bottom + 38, panel.x, anchor="middle"),
        f'<path d="M{left:.1f} {top:.1f} V{bottom:.1f} H{left + WIDTH:.1f}" stroke="{INK}" fill="none"/>',
    ]
    for value in _sizes(panel, x) or x.ticks():
        parts.append(_text(left + x.at(value), bottom + 18, number(value), anchor="middle"))
    for value in y.ticks():
        height = bottom - y.at(value)
        parts.append(_text(left - 8, height + 4, number(value), anchor="end"))
        parts.append(f'<path d="M{left:.1f} {height:.1f} h{WIDTH:g}" stroke="{INK}" stroke-opacity="0.25"/>')
    ends = []
    for series in panel.series:
        placed = [(left + x.at(a), bottom - y.at(b)) for a, b in series.points]
        hue = INK if series.faint else hues[series.group or series.name]
        parts += _line(series, placed, hue)
        ends.append((placed[-1][1], series.name, hue, placed[-1][0]))
    return parts + _names(ends, left + WIDTH + 14, bottom)


def _sizes(panel: Panel, x: _Axis) -> list[float]:
    """Powers of two on the x axis where all points sit at such, as many as fit; else none."""
    values = sorted({x for series in panel.series for x, _ in series.points})
    if any(value < 2 or math.log2(value) % 1 for value in values):
        return []
    found: list[float] = []
    edge = math.inf
    for value in reversed(values):
        if edge - x.at(value) >= GAP:
            found.append(value)
            edge = x.at(value)
    return found


def _line(series: Series, placed: Sequence[tuple[float, float]], hue: str) -> list[str]:
    path = " L".join(f"{a:.1f} {b:.1f}" for a, b in placed)
    if series.faint:
        return [f'<path d="M{path}" stroke="{hue}" stroke-dasharray="5 4" fill="none"/>']
    parts = [f'<path d="M{path}" stroke="{hue}" stroke-width="2" fill="none"/>'] if len(placed) > 1 else []
    for (a, b), (x, y) in zip(placed, series.points, strict=True):
        hint = escape(f"{series.name}: {number(y)} at {number(x)}")
        parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{hue}"><title>{hint}</title></circle>')
    return parts


def _names(ends: list[tuple[float, str, str, float]], x: float, bottom: float) -> list[str]:
    """The series' names beside their last points, moved apart where they would overlap."""
    heights: list[float] = []
    for end, *_ in sorted(ends):
        heights.append(max(end, heights[-1] + LINE) if heights else end)
    limit = bottom
    for i in reversed(range(len(heights))):  # those at the bottom up again
        heights[i] = min(heights[i], limit)
        limit = heights[i] - LINE
    parts = []
    for height, (end, name, hue, begin) in zip(heights, sorted(ends), strict=True):
        line = f"M{begin + 5:.1f} {end:.1f} L{x - 3:.1f} {height:.1f}"
        parts.append(f'<path d="{line}" stroke="{hue}" stroke-width="0.5"/>')
        parts.append(_text(x, height + 4, name, fill=hue))
    return parts


def number(value: float) -> str:
    """A few digits: 16384 is 16k, 1048576 is 1M when they are powers of two, 0.002 is 0.002."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if value >= size and value % size == 0:
            return f"{value / size:g}{unit}"
    if value >= 1e4:
        exponent = math.floor(math.log10(value))
        digit = value / 10**exponent
        return f"10{_raised(exponent)}" if round(digit, 3) == 1 else f"{digit:.2g}·10{_raised(exponent)}"
    return f"{value:.3g}"


def _raised(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _text(x: float, y: float, text: str, *, fill: str = INK, anchor: str = "start", weight: str = "400") -> str:
    style = f'fill="{fill}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
