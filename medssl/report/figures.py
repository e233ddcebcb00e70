"""Curves and score plots as inline SVG that follows the page's light or dark colours."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# Mid-tones that keep a contrast of 3:1 against white and against near-black, and differ for colour-blind readers.
COLOURS = ("#2b83ba", "#d7641c", "#3a9a5b", "#b0509e", "#8c7a1f", "#5b6fd0", "#c2374a", "#4d9a9a")
# The hues of the labels' contours (`overlays.LABEL_COLOURS`), darker so that they can be seen on white.
LABEL_INKS = ("#b58a00", "#1c86c4", "#d04478", "#3d9a3a", "#cf6d12", "#8f5bd0", "#1f9c86", "#d03c3c")
INK = "#010203"  # stands for the page's text colour
MOST_POINTS = 600
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Figure:
    """An inline figure.

    Args:
        title: Above it.
        svg: Markup.
        alt: What it shows, for readers who do not see it.
    """

    title: str
    svg: str
    alt: str


#: What is looked at beside the loss: the method's health, label-free quality, probes.
LOOKS = ("health/", "quality/", "probe/")


def curve_figures(rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Return a figure per group of a RUN's metrics: loss, its terms, learning rate, pseudo-Dice, health, throughput."""
    columns = _columns(rows)
    used = {"step", "time"}
    groups: list[tuple[str, str, list[str]]] = []

    def take(title: str, label: str, names: Sequence[str]) -> None:
        names = [name for name in names if name in columns and name not in used]
        if names:
            used.update(names)
            groups.append((title, label, names))

    take("Loss", "loss", ["loss", "validation/loss", "validation_loss"])
    take("Pseudo-Dice on validation crops", "Dice", [name for name in columns if name.startswith("pseudo_dice")])
    rate = [name for name in columns if name == "lr" or name.startswith("lr/")]
    looks = [name for name in columns if name.startswith(LOOKS)]
    other = ["steps_per_second", "waiting_for_data", "gpu_memory_gib"]
    terms = [name for name in columns if name not in {*used, *rate, *looks, *other}]
    norms = [name for name in terms if name.startswith("gradient")]
    take("Loss terms", "value", [name for name in terms if name not in norms])
    take("Gradient norm", "norm", norms)
    take("Learning rate", "rate", rate)
    for name in looks:
        kind, _, figure = name.partition("/")
        take(f"{kind.capitalize()}: {figure.replace('_', ' ')}", "value", [name])
    take("Speed", "steps a second", ["steps_per_second"])
    take("Share of time waiting for data", "share", ["waiting_for_data"])
    return [_curve(title, label, {name: columns[name] for name in names}) for title, label, names in groups]


def score_figure(label_scores: Mapping[str, Sequence[float]], title: str, unit: str, best: float) -> Figure:
    """Return a strip of points per label: one point a case, a bar at the mean.

    Args:
        label_scores: Defined scores by label.
        title: Above the figure.
        unit: On the axis.
        best: The perfect score, from which the axis starts or at which it ends.
    """
    names = list(label_scores)
    figure, axes = _canvas(5.0, 0.5 * len(names) + 0.7)
    rng = np.random.default_rng(0)
    for place, name in enumerate(names):
        values = np.asarray(label_scores[name], dtype=np.float64)
        colour = LABEL_INKS[place % len(LABEL_INKS)]
        axes.plot(values, place + rng.uniform(-0.16, 0.16, values.size), "o", color=colour, alpha=0.6, ms=4.5, mew=0)
        if values.size:
            axes.plot([values.mean()] * 2, [place - 0.3, place + 0.3], color=colour, lw=2.5)
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(unit)
    everything = [value for values in label_scores.values() for value in values]
    if best == 1.0:
        axes.set_xlim(min([0.0 if not everything else min(everything) - 0.05, 0.5]), 1.01)
    elif everything:
        axes.set_xlim(0, max(everything) * 1.05 + 1e-9)
    means = ", ".join(f"{name} {np.mean(values):.3g}" for name, values in label_scores.items() if len(values))
    return Figure(title, _to_svg(figure, title), f"{title}, one point per case. Mean: {means or 'none'}.")


def _curve(title: str, label: str, columns: Mapping[str, tuple[Numbers, Numbers]]) -> Figure:
    figure, axes = _canvas(4.3, 2.5)
    told = []
    for place, (name, (steps, values)) in enumerate(columns.items()):
        colour = COLOURS[place % len(COLOURS)]
        noisy = steps.size > 60 and not name.startswith(("lr", "validation", "pseudo"))
        shown = _short((name.partition("/")[2] if name.startswith(LOOKS) else name).replace("_", " "))
        marker = "." if steps.size <= 30 else ""
        if noisy:
            axes.plot(*_thin(steps, values), color=colour, lw=0.7, alpha=0.35)
            axes.plot(*_thin(steps, _smooth(values)), color=colour, lw=1.8, label=shown)
        else:
            axes.plot(*_thin(steps, values), color=colour, lw=1.6, marker=marker, label=shown)
        told.append(f"{shown} from {values[0]:.3g} to {values[-1]:.3g}")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    positive = all((values > 0).all() for _, values in columns.values())
    spread = [value for _, values in columns.values() for value in (values.min(), values.max())]
    if title in ("Loss", "Loss terms") and positive and max(spread) > 20 * min(spread):
        axes.set_yscale("log")
    middle = (max(spread) + min(spread)) / 2
    if max(spread) - min(spread) < 1e-3 * max(abs(middle), 1e-9):  # rounding noise is no news
        axes.set_ylim(middle - 0.5 * max(abs(middle), 1e-9), middle + 0.5 * max(abs(middle), 1e-9))
    if len(columns) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    last = max(int(steps[-1]) for steps, _ in columns.values())
    return Figure(title, _to_svg(figure, title), f"{title} over {last} steps: {'; '.join(told)}.")


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Numbers, Numbers]]:
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value):
                steps, values = found.setdefault(name, ([], []))
                steps.append(float(row["step"]))
                values.append(float(value))
    return {name: (np.asarray(steps), np.asarray(values)) for name, (steps, values) in found.items()}


def _thin(steps: Numbers, values: Numbers) -> tuple[Numbers, Numbers]:
    """Return at most `MOST_POINTS` points, the first and the last among them."""
    if steps.size <= MOST_POINTS:
        return steps, values
    index = np.linspace(0, steps.size - 1, MOST_POINTS).round().astype(int)
    return steps[index], values[index]


def _smooth(values: Numbers) -> Numbers:
    """Return a running mean over a fortieth of the points, narrower at the ends."""
    half = max(1, values.size // 80)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(values.size)
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, values.size)
    return (total[high] - total[low]) / (high - low)


def _short(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "…"


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as MatplotlibFigure

    figure = MatplotlibFigure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
        spine.set_alpha(0.5)
    axes.tick_params(colors=INK, labelsize=8.5)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    axes.ticklabel_format(useOffset=False)
    axes.grid(True, color=INK, alpha=0.12, lw=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _to_svg(figure: Any, name: str) -> str:
    """Return the markup of a figure: text as text, no file header, no date, the page's colour for ink."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"\s*xmlns(:\w+)?=\"[^\"]*\"", "", svg)  # inline SVG needs no namespace, and then no address is named
    svg = svg.replace("xlink:href", "href").replace(INK, "currentColor")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 inherit-font", svg).replace(
        "inherit-font", "system-ui, sans-serif"
    )
    # Marker and clip names are unique within a figure only; two figures share a page.
    prefix = re.sub(r"\W+", "", name)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    return re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
