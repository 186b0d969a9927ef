"""Charts as plain geometry: numbers in, ticks and SVG paths out.

The plot is a square of 1000 units that the page stretches to any size, while labels and dots are
HTML placed in percent: so text keeps its size on a phone, and lines keep their width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_SIDE = 1000.0
_MOST_POINTS = 600
_MOST_BARS = 60


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line: ``y`` [N] over ``x`` [N], ``x`` ascending; ``tone`` picks its colour.

    ``smooth`` draws the points faintly and their running mean over them; ``marks`` puts a dot on
    every point, for what was measured now and then.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    tone: int = 0
    dashed: bool = False
    smooth: bool = False
    marks: bool = False

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"series {self.name!r}: {len(self.y)} values for {len(self.x)} places")


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A label ``at`` percent from the left or from the top."""

    label: str
    at: float


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is drawn of a series: SVG path data in the unit square, empty when there is none."""

    name: str
    tone: int
    last: str
    dashed: bool = False
    line: str = ""
    faint: str = ""
    dots: str = ""
    area: str = ""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawn chart.  ``readout`` is what the page's script needs to answer a pointer."""

    title: str
    note: str
    x_name: str
    shapes: list[Shape]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    summary: str
    readout: dict[str, Any] = field(repr=False)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_name: str,
    note: str = "",
    spec: str = ".1f",
    from_zero: bool = False,
    most_y_ticks: int = 4,
) -> Chart | None:
    """Lines over a common x axis; None when no series has a point.

    ``spec`` formats the values that are read out; ``from_zero`` starts the y axis at 0.
    """
    thinned = [_thin(one) for one in series if len(one.x)]
    if not thinned:
        return None
    x_low, x_high = _range(np.concatenate([one.x for one in thinned]), margin=0.0)
    y_low, y_high = _range(np.concatenate([one.y for one in thinned]), from_zero=from_zero)

    def place(x: Sequence[float], y: Sequence[float] | Array) -> Array:
        across = (np.asarray(x, float) - x_low) / (x_high - x_low)
        down = (y_high - np.asarray(y, float)) / (y_high - y_low)
        return np.stack([across, down], axis=1)

    shapes, readings = [], []
    for one in thinned:
        points = place(one.x, one.y)
        mean = running_mean(one.y) if one.smooth else np.asarray(one.y, float)
        smoothed = not np.array_equal(mean, one.y)
        shapes.append(
            Shape(
                name=one.name,
                tone=one.tone,
                last=number(one.y[-1], spec),
                dashed=one.dashed,
                line=_path(place(one.x, mean)),
                faint=_path(points) if smoothed else "",
                dots=_dots(points) if one.marks or len(points) == 1 else "",
            )
        )
        readings.append(_reading(one.x, points[:, 1], [number(y, spec) for y in one.y]))
    return Chart(
        title=title,
        note=note,
        x_name=x_name,
        shapes=shapes,
        x_ticks=_ticks(x_low, x_high, most=5),
        y_ticks=_ticks(y_low, y_high, most=most_y_ticks, downwards=True),
        summary="; ".join(_in_words(one, x_name, spec) for one in series if len(one.x)),
        readout={"low": x_low, "high": x_high, "x_name": x_name, "series": readings},
    )


def bar_chart(
    title: str,
    x: Sequence[float],
    parts: Mapping[str, Sequence[float]],
    *,
    x_name: str,
    note: str = "",
    spec: str = ".2f",
) -> Chart | None:
    """Stacked bars of ``parts`` (each [N]) over ``x`` [N]; None without parts or points.

    More than 60 points are drawn as means of neighbours, equally many in all bars but the last.
    """
    if not len(x) or not parts:
        return None
    size = -(-len(x) // _MOST_BARS)
    groups = [np.arange(len(x))[i : i + size] for i in range(0, len(x), size)]
    centres = np.array([np.mean(np.asarray(x, float)[group]) for group in groups])
    heights = {
        name: np.array([np.mean(np.asarray(values, float)[group]) for group in groups])
        for name, values in parts.items()
    }
    top = max(float(np.sum(list(heights.values()), axis=0).max()), 1e-9)
    half = (centres[1] - centres[0]) / 2 if len(centres) > 1 else 0.5
    low, high = float(centres[0] - half), float(centres[-1] + half)
    total = sum(float(np.sum(values)) for values in parts.values())
    below = np.zeros(len(centres))
    shapes, readings = [], []
    for tone, (name, height) in enumerate(heights.items()):
        above = below + height
        left, right = (centres - half - low) / (high - low), (centres + half - low) / (high - low)
        shapes.append(
            Shape(
                name=name,
                tone=tone,
                last=f"{100 * float(np.sum(parts[name])) / max(total, 1e-9):.0f} %",
                area=_bars(left, right, 1 - above / top, 1 - below / top),
            )
        )
        values = [number(value, spec) for value in height]
        readings.append(_reading(centres.tolist(), 1 - above / top, values))
        below = above
    return Chart(
        title=title,
        note=note,
        x_name=x_name,
        shapes=shapes,
        x_ticks=_ticks(low, high, most=5),
        y_ticks=_ticks(0.0, top, most=4, downwards=True),
        summary="; ".join(f"{shape.name} {shape.last}" for shape in shapes),
        readout={"low": low, "high": high, "x_name": x_name, "series": readings},
    )


def number(value: float, spec: str) -> str:
    """A number as print sets it: a true minus sign, no zeros that pad an exponent.

    >>> number(-2e-6, ".1e"), number(3.25, "+.1f")
    ('−2.0e−6', '+3.2')
    """
    mantissa, e, exponent = f"{value:{spec}}".partition("e")
    return f"{mantissa}{e}{int(exponent) if exponent else ''}".replace("-", "−")


def running_mean(values: Sequence[float]) -> Array:
    """Mean over a centred window of about a twentieth of the values, shorter at both ends."""
    array = np.asarray(values, float)
    reach = len(array) // 40
    if reach == 0:
        return array
    sums = np.concatenate([[0.0], np.cumsum(array)])
    index = np.arange(len(array))
    start, end = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(array))
    return (sums[end] - sums[start]) / (end - start)


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` + 1 round numbers in [low, high]; 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _ticks(low: float, high: float, *, most: int, downwards: bool = False) -> list[Tick]:
    values = nice_ticks(low, high, most)
    gap = values[1] - values[0] if len(values) > 1 else high - low
    digits = max(0, -math.floor(math.log10(gap) + 1e-9))
    spec = f",.{digits}f" if digits <= 4 else ".0e"
    places = [100 * (value - low) / (high - low) for value in values]
    return [
        Tick(
            label=number(value, spec) if value else "0", at=round(100 - at if downwards else at, 3)
        )
        for value, at in zip(values, places, strict=True)
    ]


def _range(values: Array, *, margin: float = 0.06, from_zero: bool = False) -> tuple[float, float]:
    """The ends of an axis: the data with a margin, never empty."""
    low, high = float(values.min()), float(values.max())
    if from_zero and low == high == 0:
        return 0.0, 1.0
    if low == high:
        around = max(abs(low) * 0.1, 1e-3) if margin else 0.5
        low, high = low - around, high + around
    space = (high - low) * margin
    return (min(0.0, low) if from_zero else low - space), high + space


def _thin(series: Series) -> Series:
    """The series with at most 600 points, each the mean of its neighbours."""
    if len(series.x) <= _MOST_POINTS:
        return series
    groups = np.array_split(np.arange(len(series.x)), _MOST_POINTS)
    x, y = np.asarray(series.x, float), np.asarray(series.y, float)
    return Series(
        name=series.name,
        x=[float(x[group].mean()) for group in groups],
        y=[float(y[group].mean()) for group in groups],
        tone=series.tone,
        dashed=series.dashed,
        smooth=series.smooth,
        marks=False,
    )


def _path(points: Array) -> str:
    return "M" + "L".join(f"{x * _SIDE:.1f} {y * _SIDE:.1f}" for x, y in points)


def _dots(points: Array) -> str:
    """Lines of no length: a round cap makes each a dot, whatever the page's stretch."""
    return "".join(f"M{x * _SIDE:.1f} {y * _SIDE:.1f}h0" for x, y in points)


def _bars(left: Array, right: Array, top: Array, bottom: Array) -> str:
    rows = np.stack([left, top, right, bottom], axis=1) * _SIDE
    return "".join(f"M{x0:.1f} {y0:.1f}H{x1:.1f}V{y1:.1f}H{x0:.1f}Z" for x0, y0, x1, y1 in rows)


def _reading(x: Sequence[float], down: Array, values: Sequence[str]) -> dict[str, Any]:
    """What the pointer reads: places on the x axis, percent from the top, values as text."""
    return {
        "x": [round(float(value), 4) for value in x],
        "y": [round(float(value) * 100, 2) for value in down],
        "text": list(values),
    }


def _in_words(series: Series, x_name: str, spec: str) -> str:
    first, last = number(series.y[0], spec), number(series.y[-1], spec)
    return (
        f"{series.name}: {first} at {x_name} {series.x[0]:g}, {last} at {x_name} {series.x[-1]:g}"
    )
