"""The part of a report that only a segmentation RUN has: scores, and the best, median and worst case."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medssl.errors import InputRefused, MedsslError
from medssl.evaluation.bootstrap import Estimate, estimate
from medssl.evaluation.masks import Labels, mask_files
from medssl.evaluation.overlap import METRICS
from medssl.evaluation.results import Values, measure_run, run_scores, validation_cases, values_of, written_scores
from medssl.evaluation.segmentation import case_means, show, write_result
from medssl.report.facts import RunFacts
from medssl.report.figures import Figure, score_figure
from medssl.report.overlays import LABEL_COLOURS, Overlay, load_aligned, overlays

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaseView:
    """One case on the page.

    Args:
        rank: Best, median or worst.
        name: The case.
        lines: Scores of its labels as text.
        planes: Its slices; empty where the image is not at hand.
    """

    rank: str
    name: str
    lines: tuple[str, ...]
    planes: tuple[Overlay, ...]


@dataclass
class Segments:
    """Scores of a segmentation RUN.

    Args:
        headline: The main figure in one line.
        rows: The table's rows: label, colour, and one cell per metric and count.
        figures: Strips of points.
        cases: Best, median and worst.
        legend: Label and colour.
        count: Number of validation cases.
    """

    headline: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    cases: list[CaseView] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)
    count: int = 0


def describe_segments(facts: RunFacts) -> Segments | None:
    """Measure the validation masks, unless that was done, and pick what to show; what fails is named in `facts`."""
    try:
        values = _values(facts)
    except MedsslError as error:
        facts.missing.append(f"Scores of the validation cases: {_public(error)}")
        return None
    labels = list(values["dice"])
    counted = _counts(values)
    per_case = {metric: case_means(_pairs(values[metric])) for metric in METRICS}
    overall = {metric: estimate(list(means.values())) for metric, means in per_case.items()}
    segments = Segments(count=len(per_case["dice"]))
    segments.legend = [(label, LABEL_COLOURS[place % len(LABEL_COLOURS)]) for place, label in enumerate(labels)]
    for label, colour in segments.legend:
        means = {metric: estimate(list(values[metric][label].values())) for metric in METRICS}
        segments.rows.append(_row(label, colour, means, counted[label]))
    if len(labels) > 1:
        segments.rows.append(_row("mean over labels", "", overall, {}))
    segments.headline = f"Dice {show(overall['dice'], 'dice')}" if overall["dice"].mean is not None else ""
    segments.figures = [
        score_figure(_defined(values["dice"]), "Dice per case", "Dice", 1.0),
        score_figure(_defined(values["hd95_mm"]), "HD95 per case", "mm", 0.0),
    ]
    segments.cases = _views(facts, values, per_case["dice"])
    return segments


def _values(facts: RunFacts) -> Values:
    """Return scores as they were written with the masks, else measured now and written beside them."""
    if written_scores(facts.folder) is not None:
        return run_scores(facts.folder)
    result = measure_run(facts.folder)
    masks = facts.folder / "validation"
    write_result(result, masks if masks.is_dir() else facts.folder)
    return values_of(result)


def _views(facts: RunFacts, values: Values, dice: Mapping[str, float]) -> list[CaseView]:
    ranked = sorted(
        (name for name, value in dice.items() if not math.isnan(value)), key=lambda name: (-dice[name], name)
    )
    if not ranked:
        return []
    picked = {"best": ranked[0], "median": ranked[(len(ranked) - 1) // 2], "worst": ranked[-1]}
    if len(ranked) < 3:
        picked = dict(zip(("best", "worst"), dict.fromkeys([ranked[0], ranked[-1]]), strict=False))
    labels = _labels(facts)
    return [CaseView(rank, name, _lines(values, name), _planes(facts, name, labels)) for rank, name in picked.items()]


def _planes(facts: RunFacts, name: str, labels: Labels) -> tuple[Overlay, ...]:
    try:
        where = validation_cases(facts.folder).get(name)
        if where is None or not where.images or not where.images[0].is_file() or not labels:
            facts.missing.append(f"Pictures of {name}: its image is no longer where the run found it.")
            return ()
        image = load_aligned(where.images[0])
        reference = np.rint(load_aligned(where.label).array).astype(np.int32)
        mask = mask_files(facts.folder / "validation").get(name)
        prediction = None if mask is None else np.rint(load_aligned(mask).array).astype(np.int32)
    except (InputRefused, MedsslError, OSError) as error:
        facts.missing.append(f"Pictures of {name}: {_public(error)}")
        return ()
    if reference.shape != image.array.shape or (prediction is not None and prediction.shape != image.array.shape):
        facts.missing.append(f"Pictures of {name}: image and masks lie on different grids.")
        return ()
    return tuple(overlays(image, prediction, reference, labels))


def _labels(facts: RunFacts) -> Labels:
    from medssl.evaluation.masks import find_labels

    labels, _ = find_labels(None, facts.folder / "validation", facts.folder)
    return labels or {}


def _lines(values: Values, case: str) -> tuple[str, ...]:
    lines = []
    for label, column in values["dice"].items():
        dice, distance = column.get(case, math.nan), values["hd95_mm"][label].get(case, math.nan)
        if math.isnan(dice):
            lines.append(f"{label}: in neither mask")
        else:
            lines.append(f"{label}: Dice {dice:.3f}" + ("" if math.isnan(distance) else f", HD95 {distance:.2f} mm"))
    return tuple(lines)


def _row(label: str, colour: str, means: Mapping[str, Estimate], counts: Mapping[str, int]) -> dict[str, Any]:
    return {
        "label": label,
        "colour": colour,
        "cells": [_cell(means[metric], metric) for metric in METRICS],
        "counts": [str(counts[name]) if counts else "" for name in ("found", "not found or spurious", "absent")],
    }


def _cell(value: Estimate, metric: str) -> tuple[str, str]:
    """Return the mean and its interval as text."""
    if value.mean is None:
        return "–", ""
    mean, _, interval = show(value, metric).partition(" ")
    return mean, interval


def _counts(values: Values) -> dict[str, dict[str, int]]:
    counted = {}
    for label, column in values["dice"].items():
        absent = sum(math.isnan(value) for value in column.values())
        found = sum(not math.isnan(value) for value in values["hd95_mm"][label].values())
        counted[label] = {"found": found, "not found or spurious": len(column) - absent - found, "absent": absent}
    return counted


def _pairs(columns: Mapping[str, Mapping[str, float]]) -> list[tuple[str, float]]:
    return [(case, value) for column in columns.values() for case, value in column.items()]


def _defined(columns: Mapping[str, Mapping[str, float]]) -> dict[str, list[float]]:
    return {label: [value for value in column.values() if not math.isnan(value)] for label, column in columns.items()}


def _public(error: Exception) -> str:
    from medssl.report.facts import public_text

    return public_text(str(error))
