"""The part of a report that only a classification RUN has: scores, confusion, reliability and ROC curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medssl.evaluation.classification_result import OVERALL
from medssl.report.facts import RunFacts, public_text
from medssl.report.figures import COLOURS, INK, Figure, _canvas, _short, _to_svg

PER_CLASS = ("auroc", "aupr", "sensitivity", "specificity")
MOST_NUMBERS = 12  # classes up to which each cell of the confusion matrix holds its number
MOST_NAMED = 30  # classes up to which its axes hold names
Cell = tuple[str, str]


@dataclass(frozen=True)
class Scores:
    """Scores of a classification RUN.

    Args:
        headline: The main figure in one line.
        count: Number of validation cases.
        rows: Per metric over all classes its name, value and interval.
        classes: Per class its name, number of cases, and a value and interval for each of `PER_CLASS`.
        note: How intervals and metrics are defined.
        figures: Confusion, reliability and ROC.
    """

    headline: str
    count: int
    rows: tuple[tuple[str, Cell], ...]
    classes: tuple[tuple[str, int, tuple[Cell, ...]], ...]
    note: str
    figures: tuple[Figure, ...]


def describe_classification(facts: RunFacts) -> Scores | None:
    """Read `validation/metrics.json` as `medssl evaluate classification` writes it; what fails is named in `facts`."""
    folder = facts.folder / "validation"
    kind = facts.run.get("target_kind")
    remedy = "Make it: medssl evaluate classification --predictions RUN --out RUN/validation" + (
        f" --kind {kind}." if kind else "."
    )
    path, table = folder / "metrics.json", folder / "probabilities.csv"
    if not path.is_file():
        missing = "" if table.is_file() else " It needs validation/probabilities.csv, which a finished run has."
        facts.missing.append(f"validation/metrics.json is missing: there are no scores. {remedy}{missing}")
        return None
    try:
        scores = _scores(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        facts.missing.append(f"validation/metrics.json is damaged: there are no scores. {remedy}")
        return None
    if table.is_file() and table.stat().st_mtime > path.stat().st_mtime:
        facts.missing.append(f"validation/metrics.json is older than probabilities.csv: it may be of others. {remedy}")
    return scores


def _scores(content: Mapping[str, Any]) -> Scores:
    metrics, counts = content["metrics"], content["classes"]
    names = {name: public_text(name) for name in counts}
    main = next((name for name in ("auroc", "balanced_accuracy") if metrics[name]["value"] is not None), None)
    conventions = content["conventions"]
    note = " ".join(f"{name[0].upper()}{name[1:]}: {text}." for name, text in conventions.items())
    return Scores(
        headline="" if main is None else " ".join((_title(main), *_cell(metrics[main]))).strip(),
        count=int(content["cases"]),
        rows=tuple((_title(name), _cell(metrics[name])) for name in OVERALL if name in metrics),
        classes=tuple(
            (shown, int(counts[name]), tuple(_cell(metrics[f"{metric}/{name}"]) for metric in PER_CLASS))
            for name, shown in names.items()
        ),
        note=note,
        figures=(
            _confusion(content["confusion"], list(names.values()), content["target_kind"] == "multilabel"),
            _reliability(content["reliability"]),
            _roc({shown: content["roc"][name] for name, shown in names.items()}),
        ),
    )


def _title(metric: str) -> str:
    if metric in ("auroc", "aupr", "ece", "nll"):
        return metric.upper()
    return metric.replace("_", " ").capitalize()


def _cell(interval: Mapping[str, float | None]) -> Cell:
    """Return the value and its interval as text."""
    if interval["value"] is None:
        return "–", ""
    ends = "" if interval["low"] is None else f"[{interval['low']:.3f}, {interval['high']:.3f}]"
    return f"{interval['value']:.3f}", ends


def _confusion(tables: Sequence[Any], names: Sequence[str], multilabel: bool) -> Figure:
    """Return counts, coloured by their share of the cases with the same truth."""
    from matplotlib.colors import LinearSegmentedColormap

    counts = np.asarray(tables, dtype=np.float64)
    if counts.shape != ((len(names), 2, 2) if multilabel else (len(names), len(names))):
        raise ValueError(f"a confusion table of shape {counts.shape} for {len(names)} classes")
    share = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    answers = list(names)
    if multilabel:
        counts, share = counts.reshape(len(names), 4), share.reshape(len(names), 4)
        answers = ["true negative", "false positive", "false negative", "true positive"]
    rows, columns = counts.shape
    figure, axes = _canvas(min(1.6 + 0.6 * columns, 8.0), min(1.4 + 0.45 * rows, 8.0))
    axes.grid(False)
    shades = LinearSegmentedColormap.from_list("share", [f"{COLOURS[0]}00", f"{COLOURS[0]}c0"])
    axes.pcolormesh(share, cmap=shades, vmin=0, vmax=1)
    axes.invert_yaxis()
    if rows <= MOST_NUMBERS:
        for (row, column), count in np.ndenumerate(counts):
            axes.text(column + 0.5, row + 0.5, f"{count:.0f}", ha="center", va="center", fontsize=9, color=INK)
    _name_axis(axes.set_xticks, answers, rotation=35, ha="right")
    _name_axis(axes.set_yticks, names)
    axes.set_xlabel("" if multilabel else "answer")
    axes.set_ylabel("label" if multilabel else "true class")
    kept = counts[:, [0, 3]].sum() if multilabel else np.trace(counts)
    alt = f"Confusion matrix of {len(names)} classes: {kept:.0f} of {counts.sum():.0f} decisions are right."
    return Figure("Confusion matrix", _to_svg(figure, "Confusion matrix"), alt)


def _reliability(bins: Sequence[Mapping[str, float]]) -> Figure:
    figure, axes = _canvas(4.3, 3.4)
    sure, came_true = ([entry[name] for entry in bins] for name in ("confidence", "frequency"))
    cases = np.array([entry["cases"] for entry in bins], dtype=np.float64)
    axes.plot([0, 1], [0, 1], color=INK, lw=1, ls="--", alpha=0.5)
    axes.plot(sure, came_true, color=COLOURS[0], lw=1.6)
    axes.scatter(sure, came_true, s=12 + 90 * cases / max(cases.max(initial=0), 1), color=COLOURS[0], alpha=0.8, lw=0)
    _unit_square(axes, "confidence", "frequency of being right")
    told = ", ".join(f"{a:.2f} came true {b:.2f}" for a, b in zip(sure, came_true, strict=True))
    alt = f"Confidence and how often it came true, larger points for more decisions: {told}."
    return Figure("Reliability", _to_svg(figure, "Reliability"), alt)


def _roc(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    figure, axes = _canvas(4.3, 3.4)
    axes.plot([0, 1], [0, 1], color=INK, lw=1, ls="--", alpha=0.5)
    drawn = {name: rates for name, rates in curves.items() if rates["true_positive_rate"]}
    for place, (name, rates) in enumerate(drawn.items()):
        axes.plot(
            rates["false_positive_rate"], rates["true_positive_rate"], lw=1.6, label=_plain(name),
            color=COLOURS[place % len(COLOURS)],
        )  # fmt: skip
    if 0 < len(drawn) <= len(COLOURS):
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower right")
    _unit_square(axes, "false positive rate", "true positive rate")
    alt = f"ROC curves, each class against the rest: {', '.join(drawn) or 'none is defined'}."
    return Figure("ROC curves", _to_svg(figure, "ROC curves"), alt)


def _unit_square(axes: Any, across: str, up: str) -> None:
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel(across)
    axes.set_ylabel(up)


def _name_axis(set_ticks: Any, names: Sequence[str], **text: Any) -> None:
    if len(names) > MOST_NAMED:
        set_ticks([])
    else:
        set_ticks(np.arange(len(names)) + 0.5, [_plain(name) for name in names], **text)


def _plain(name: str) -> str:
    """Return a class name that is drawn as it is: no formula, and no underscore that hides it from a legend."""
    return _short(name).replace("$", r"\$").lstrip("_")
