"""Where the lines of a chart lie: numbers in, positions on a drawing of WIDTH x HEIGHT units out.

The page's template draws them as inline SVG, so that colours and sizes of letters follow the reader's screen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.bootstrap import bootstrap_interval

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 84, 12, 26, 64
ROW_HEIGHT = 64
BARS_HEIGHT, MOST_BARS = 240, 512
NUM_TICKS = 5
MINUS = "\N{MINUS SIGN}"
OFF_CHART_SHARE = 1.0  # a reference line farther away than the data's own range is named, not drawn

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """A line with its interval: x, mean, low, high, each (N,) float64; low and high None where there is no interval."""

    x: Floats
    mean: Floats
    low: Floats | None = None
    high: Floats | None = None


@dataclass(frozen=True)
class Tick:
    """A number at an axis: its position in units, and its text."""

    position: float
    text: str


@dataclass(frozen=True)
class Reference:
    """A horizontal line to compare with. `position` is None where it lies far outside of the chart."""

    label: str
    kind: str
    position: float | None


@dataclass(frozen=True)
class Chart:
    """A line chart laid out; `line`, `band` and `second` (another line to compare with, or "") are SVG paths."""

    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    line: str
    band: str
    references: list[Reference]
    second: str = ""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True)
class Whisker:
    """One result on the common axis of several: positions in units."""

    label: str
    text: str
    y: float
    low: float
    mean: float
    high: float


@dataclass(frozen=True)
class IntervalChart:
    """Results above each other, on one horizontal axis."""

    ticks: list[Tick]
    whiskers: list[Whisker]
    height: int
    width: int = WIDTH
    left: int = RIGHT
    right: int = WIDTH - RIGHT
    bottom: int = 0


@dataclass(frozen=True)
class Bar:
    """A rectangle in units, and what it says when it is pointed at."""

    x: float
    y: float
    width: float
    height: float
    is_active: bool
    title: str


@dataclass(frozen=True)
class BarChart:
    """Many values beside each other, the greatest first."""

    lead: str
    ticks: list[Tick]
    bars: list[Bar]
    width: int = WIDTH
    height: int = BARS_HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP


def recent_mean(steps: Sequence[float], values: Sequence[float], *, window: int = 20, num_points: int = 60) -> Series:
    """Mean over the last `window` values at evenly spaced steps, with a 95% bootstrap interval.

    Args:
        steps: (N,) when each value was obtained, for instance the agent step at which an episode ended; N at least 1.
        values: (N,), for instance the returns of the episodes.
        window: How many values back a point looks. It starts when half as many are there.
        num_points: Greatest number of points.
    """
    order = np.argsort(steps, kind="stable")
    when, what = np.asarray(steps, float)[order], np.asarray(values, float)[order]
    first = when[min(len(when), max(1, window // 2)) - 1]
    x = np.unique(np.linspace(first, when[-1], num_points))
    ends = np.searchsorted(when, x, side="right")
    windows = [what[max(0, end - window) : end] for end in ends]
    intervals = np.array([bootstrap_interval(recent, num_resamples=1_000) for recent in windows])
    return Series(x, np.array([recent.mean() for recent in windows]), intervals[:, 0], intervals[:, 1])


def thinned(points: Sequence[tuple[float, float]], *, num_points: int = 200) -> Series:
    """Up to about `num_points` of (x, y), the last one included; N at least 1."""
    kept = np.array(points[:: -max(1, len(points) // num_points)][::-1], float)
    return Series(kept[:, 0], kept[:, 1])


def line_chart(
    series: Series,
    x_label: str,
    y_label: str,
    references: Sequence[tuple[str, str, float]] = (),
    second: Series | None = None,
) -> Chart:
    """Lays out one series, with an interval where it has one, and lines to compare with.

    Args:
        series: N at least 1.
        x_label: Title of the horizontal axis, with its unit.
        y_label: Title of the vertical axis, with its unit.
        references: (label, kind, value) of each horizontal line; `kind` becomes its CSS class.
        second: A series of the same unit, drawn without its interval.
    """
    lows, highs = zip(*(_range(shown) for shown in (series, second) if shown is not None), strict=True)
    low, high = min(lows), max(highs)
    near = [value for _, _, value in references if _is_near(value, low, high)]
    y_axis = _Axis(min([low, *near]), max([high, *near]), HEIGHT - BOTTOM, TOP)
    end = max(float(shown.x[-1]) for shown in (series, second) if shown is not None)
    x_axis = _Axis(min(0.0, float(series.x[0])), end, LEFT, WIDTH - RIGHT, is_rounded=False)
    xs = [x_axis.at(x) for x in series.x]
    return Chart(
        x_label,
        y_label,
        x_axis.ticks(),
        y_axis.ticks(),
        _path(xs, [y_axis.at(y) for y in series.mean]),
        _band(xs, series, y_axis),
        [Reference(label, kind, y_axis.at(v) if _is_near(v, low, high) else None) for label, kind, v in references],
        _path([x_axis.at(x) for x in second.x], [y_axis.at(y) for y in second.mean]) if second else "",
    )


def bar_chart(values: Sequence[tuple[str, float, bool]], lead: str) -> BarChart:
    """Lays out values from 0 on as bars, at most MOST_BARS of the greatest.

    Args:
        values: (name, value, is active) of each, at least one.
        lead: How to read it.
    """
    shown = sorted(values, key=lambda value: -value[1])[:MOST_BARS]
    axis = _Axis(0.0, max(value for _, value, _ in shown), BARS_HEIGHT - 8, TOP)
    step = (WIDTH - RIGHT - LEFT) / len(shown)
    bars = []
    for index, (name, value, is_active) in enumerate(shown):
        top = min(axis.at(max(value, 0.0)), axis.at(0.0) - 1)
        box = (round(LEFT + index * step, 2), top, round(0.8 * step, 2), round(axis.at(0.0) - top, 2))
        bars.append(Bar(*box, is_active, f"{name}: {number(value)}"))
    return BarChart(lead, axis.ticks(), bars)


def interval_chart(results: Sequence[tuple[str, float, float, float]]) -> IntervalChart:
    """Lays out results above each other.

    Args:
        results: (label, mean, low, high) of each, at least one.
    """
    axis = _Axis(
        min(low for _, _, low, _ in results), max(high for *_, high in results), RIGHT + 40, WIDTH - RIGHT - 40
    )
    whiskers = [
        Whisker(label, score(mean), row * ROW_HEIGHT + 46.0, axis.at(low), axis.at(mean), axis.at(high))
        for row, (label, mean, low, high) in enumerate(results)
    ]
    bottom = len(results) * ROW_HEIGHT + 14
    return IntervalChart(axis.ticks(), whiskers, bottom + 44, bottom=bottom)


def number(value: float) -> str:
    """A number for people: 1,234 or 12.3 or 0.0123, with a true minus sign."""
    digits = (
        0 if value == int(value) else next((d for d, least in ((0, 1000), (1, 10), (2, 1)) if abs(value) >= least), 3)
    )
    return _with_minus_sign(f"{value:,.{digits}f}")


def score(value: float) -> str:
    """A mean of raw points, with as many digits as make it comparable with the one below: 2 under 100, 1 under 1000."""
    digits = next((d for d, least in ((0, 1000), (1, 100)) if abs(value) >= least), 2)
    return _with_minus_sign(f"{value:,.{digits}f}")


def percent(share: float) -> str:
    """0.32 as 32%, with a true minus sign."""
    return _with_minus_sign(f"{share:.0%}")


def _with_minus_sign(text: str) -> str:
    """Typographic minus, and none before a number that was rounded to zero."""
    return text.replace("-", MINUS if text.strip("-0.,%") else "")


class _Axis:
    """Maps values between two positions, over a range widened to whole ticks."""

    def __init__(self, low: float, high: float, start: float, end: float, *, is_rounded: bool = True) -> None:
        if high <= low:
            low, high = low - 1, high + 1
        self._step = _round_step((high - low) / NUM_TICKS)
        self._low = math.floor(low / self._step) * self._step if is_rounded else low
        self._high = math.ceil(high / self._step) * self._step if is_rounded else high
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        share = (value - self._low) / (self._high - self._low)
        return round(float(self._start + share * (self._end - self._start)), 2)

    def ticks(self) -> list[Tick]:
        first, last = math.ceil(self._low / self._step - 1e-9), math.floor(self._high / self._step + 1e-9)
        values = [index * self._step for index in range(first, last + 1)]
        return [Tick(self.at(value), _tick_text(value, self._step)) for value in values]


def _round_step(rough: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _tick_text(value: float, step: float) -> str:
    if step >= 1_000:
        return _with_minus_sign(f"{value / 1_000:,.0f}k") if value else "0"
    return _with_minus_sign(f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}")


def _range(series: Series) -> tuple[float, float]:
    lows = series.mean if series.low is None else series.low
    highs = series.mean if series.high is None else series.high
    return float(np.min(lows)), float(np.max(highs))


def _is_near(value: float, low: float, high: float) -> bool:
    reach = OFF_CHART_SHARE * max(high - low, 1e-9)
    return low - reach <= value <= high + reach


def _path(xs: Sequence[float], ys: Sequence[float]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in zip(xs, ys, strict=True))


def _band(xs: Sequence[float], series: Series, y_axis: _Axis) -> str:
    if series.low is None or series.high is None:
        return ""
    upper = [y_axis.at(y) for y in series.high]
    lower = [y_axis.at(y) for y in series.low]
    return _path([*xs, *reversed(xs)], [*upper, *reversed(lower)]) + "Z"
