"""Scores against the number of labels: means with their intervals, seeds as dots; as SVG for a page and as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medssl.report.figures import COLOURS, INK, Figure, _canvas, _short, _to_svg

_MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Point:
    """A score at one place of a curve.

    Args:
        value: Mean.
        low: Lower end of the interval, NaN where there is none.
        high: Upper end.
        seeds: The score of each seed.
    """

    value: float
    low: float
    high: float
    seeds: Sequence[float] = ()


def interval_figure(title: str, label: str, places: Sequence[str], curves: Mapping[str, Mapping[str, Point]]) -> Figure:
    """Return curves over a few places, such as numbers of labels.

    Args:
        title: Above the figure.
        label: Of the upright axis.
        places: Names along the other axis, in order.
        curves: Points by place, by name of the curve; a place may be missing.
    """
    told = "; ".join(
        f"{name}: "
        + ", ".join(f"{curves[name][place].value:.3g} at {place}" for place in places if place in curves[name])
        for name in curves
    )
    return Figure(title, _to_svg(_drawn(label, places, curves), title), f"{title}. {told}.")


def interval_png(label: str, places: Sequence[str], curves: Mapping[str, Mapping[str, Point]]) -> bytes:
    """Return the same as a PNG on white; see `interval_figure`."""
    stream = io.BytesIO()
    _drawn(label, places, curves).savefig(stream, format="png", dpi=130, facecolor="white", metadata={"Software": None})
    return stream.getvalue()


def _drawn(label: str, places: Sequence[str], curves: Mapping[str, Mapping[str, Point]]) -> Any:
    figure, axes = _canvas(5.4, 3.4)
    for number, (name, points) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        found = [(place, points[place]) for place in places if place in points and not np.isnan(points[place].value)]
        if not found:
            continue
        # Side by side, so that intervals of one place do not hide each other.
        x = np.array([places.index(place) for place, _ in found]) + (number - (len(curves) - 1) / 2) * 0.09
        values = np.array([point.value for _, point in found])
        ends = np.array([[point.value - point.low, point.high - point.value] for _, point in found]).T
        axes.errorbar(
            x, values, np.nan_to_num(ends).clip(min=0), marker=_MARKERS[number % len(_MARKERS)], ms=5, capsize=3,
            lw=1.6, color=colour, label=_short(name),
        )  # fmt: skip
        for place, (_, point) in zip(x, found, strict=True):
            axes.plot([place] * len(point.seeds), point.seeds, ".", ms=3.5, color=colour, alpha=0.55)
    axes.set_xticks(range(len(places)), places)
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_xlabel("labelled cases")
    axes.set_ylabel(label)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8, labelcolor=INK)
    return figure
