"""Classification measured from probabilities: ranking, decisions and calibration, with intervals over cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.data.probabilities import Probabilities, read_probabilities
from medssl.data.targets import KINDS, Kind
from medssl.errors import DataError, UsageError
from medssl.evaluation.bootstrap import LEVEL, resampled_counts
from medssl.evaluation.classification_result import ClassificationResult, Interval, resamples_for
from medssl.evaluation.references import Reference, read_references, table_targets
from medssl.files import write_json
from medssl.training.ranking import Floats, Ranking
from medssl.training.scores import (
    BINS,
    HIGHER_IS_BETTER,
    Scores,
    bin_of,
    classification_metrics,
    confidences,
    confusion,
)
from medssl.training.temperature import fit_temperature, probabilities_of
from medssl.transfer.classification_files import target_kind
from medssl.transfer.classifier_files import is_classification

__all__ = [
    "HIGHER_IS_BETTER",
    "ClassificationResult",
    "Interval",
    "classification_metrics",
    "evaluate_classification",
    "fit_temperature",
    "measure_classification",
    "metric_differences",
    "probabilities_of",
]

MOST_POINTS = 200


def evaluate_classification(
    predictions: Path,
    references: Path | None = None,
    out: Path | None = None,
    *,
    kind: str = "auto",
    split: str | None = None,
    common_cases: bool = False,
    seed: int = 0,
) -> ClassificationResult:
    """Measure a table of probabilities against the truth; write `metrics.json` to `out`.

    Args:
        predictions: CSV with `case` and `p_<class>` columns, or a classification RUN (its `validation`).
        references: CSV with the true label of each case, see `medssl.evaluation.references`; None takes the
            predictions' own `target` column.
        out: Folder to write to, or None.
        kind: `multiclass`, `multilabel` or `ordinal` (classes in the order of the columns); `auto` takes `multiclass`
            where each row sums to 1, else `multilabel`, and what a RUN says of itself.
        split: Only references of this split, where they have such a column.
        common_cases: Measure the cases that both tables have.
        seed: Of the bootstrap.

    Raises:
        UsageError: If there is no such kind, or nothing says what is true.
        DataError: If a table cannot be used, or the two hold different cases.
    """
    if kind not in (*KINDS, "auto"):
        raise UsageError(f"There is no kind of target '{kind}': use auto, {', '.join(KINDS)}.")
    path = predictions / "validation" / "probabilities.csv" if predictions.is_dir() else predictions
    if not path.is_file():
        raise UsageError(f"{path} does not exist: give a CSV of probabilities or a finished classification RUN.")
    table = read_probabilities(path)
    if kind == "auto" and is_classification(predictions):
        kind = target_kind(predictions)
    chosen: Any = kind if kind != "auto" else _kind_of(table)
    if references is not None:
        known = read_references(references, split)
        table = _joined(table, known, path, references, common_cases)
    elif not table.targets:
        raise UsageError(f"{path} has no 'target' column: give the true labels as CSV with --references.")
    result = measure_classification(table, chosen, seed=seed)
    if out is not None:
        write_json(out / "metrics.json", result.to_json())
    return result


def measure_classification(table: Probabilities, kind: Kind, *, seed: int = 0) -> ClassificationResult:
    """Measure a table that holds its own targets.

    Intervals are over cases, drawn within each class, so that a rare class is in every resample: they say how other
    cases of the same classes would do, not how many there would be of each. Where a patient has several cases,
    patients are drawn instead, and a resample in which a metric is undefined does not count for it.

    Raises:
        DataError: If a target is no class, or a row holds no probabilities.
    """
    targets = table_targets(table, kind)
    try:
        scores = Scores(table.values, targets, kind, table.classes)
    except ValueError as error:
        raise DataError(f"The table of probabilities cannot be measured: {error}.") from error
    samples = _resampled(scores, table, seed)
    metrics = {name: _interval(float(value[0]), samples[name]) for name, value in scores.weighted(None).items()}
    counts = {name: int(column.sum()) for name, column in zip(table.classes, scores.truth.T, strict=True)}
    return ClassificationResult(
        kind=kind,
        classes=table.classes,
        cases=table.cases,
        counts=counts,
        patients=len(set(table.patient_keys)) if table.patient_keys else None,
        metrics=metrics,
        confusion=_confusion(scores),
        reliability=reliability(scores.probabilities, scores.targets, kind),
        curves={
            name: _curve(p, t) for name, p, t in zip(table.classes, scores.probabilities.T, scores.truth.T, strict=True)
        },
        seed=seed,
    )


def metric_differences(
    run: Probabilities, baseline: Probabilities, kind: Kind, *, seed: int = 0
) -> dict[str, Interval]:
    """Return `run` minus `baseline` in every metric, from the same resamples of the same cases.

    `p` is the two-sided bootstrap test: twice the smaller share of resamples on either side of 0, with one added to
    both counts (Davison and Hinkley, 1997), so that it is never 0.

    Raises:
        DataError: If the two have different cases, classes or targets, or cannot be measured.
    """
    if (run.cases, run.classes, run.targets) != (baseline.cases, baseline.classes, baseline.targets):
        order = {case: row for row, case in enumerate(run.cases)}
        if set(order) != set(baseline.cases) or run.classes != baseline.classes:
            raise DataError("The two tables have different cases or classes: give both the same validation cases.")
        run = _rows(run, [order[case] for case in baseline.cases])
        if run.targets != baseline.targets:
            raise DataError("The two tables disagree on the true label of a case: measure both with one reference.")
    targets = table_targets(baseline, kind)
    try:
        both = [Scores(table.values, targets, kind, table.classes) for table in (run, baseline)]
    except ValueError as error:
        raise DataError(f"The tables of probabilities cannot be compared: {error}.") from error
    points = [scores.weighted(None) for scores in both]
    samples = [_resampled(scores, baseline, seed) for scores in both]
    found = {}
    for name in points[0]:
        gaps = samples[0][name] - samples[1][name]
        gaps = gaps[~np.isnan(gaps)]
        interval = _interval(float(points[0][name][0] - points[1][name][0]), gaps)
        sides = min(int((gaps <= 0).sum()), int((gaps >= 0).sum())) + 1
        p = None if math.isnan(interval.low) else min(1.0, 2 * sides / (gaps.size + 1))
        found[name] = Interval(interval.value, interval.low, interval.high, p)
    return found


def reliability(probabilities: Floats, targets: NDArray[np.int64], kind: str) -> list[dict[str, float]]:
    """Return for each bin that is not empty how sure the classifier was and how often that came true."""
    pairs = confidences(probabilities, targets, kind)
    confidence = np.concatenate([pair[0] for pair in pairs])
    right = np.concatenate([pair[1] for pair in pairs])
    place = bin_of(confidence)
    return [
        {
            "low": number / BINS,
            "high": (number + 1) / BINS,
            "cases": int((place == number).sum()),
            "confidence": float(confidence[place == number].mean()),
            "frequency": float(right[place == number].mean()),
        }
        for number in np.unique(place).tolist()
    ]


def _resampled(scores: Scores, table: Probabilities, seed: int) -> dict[str, Floats]:
    """Return each metric in each resample. Shape: (resamples,) each."""
    counts = resampled_counts(
        len(table.cases),
        strata=None if scores.kind == "multilabel" else scores.targets.tolist(),
        groups=table.patient_keys or None,
        seed=seed,
        resamples=resamples_for(len(table.cases)),
    )
    parts, varied = [], False
    for weights in counts:
        parts.append(scores.weighted(weights))
        varied = varied or bool((weights != 1).any())
    if not varied:
        # One case of each class cannot be drawn otherwise: there is no interval, and none of width 0.
        return {name: np.full(1, np.nan) for name in parts[0]}
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _interval(value: float, samples: Floats) -> Interval:
    known = samples[~np.isnan(samples)]
    # Of few resamples in which the metric is defined, the interval would be about those alone.
    if math.isnan(value) or known.size < samples.size / 2 or not known.size:
        return Interval(value, math.nan, math.nan)
    low, high = np.percentile(known, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(value, float(low), float(high))


def _kind_of(table: Probabilities) -> str:
    sums_to_one = len(table.classes) > 1 and bool((np.abs(table.values.sum(axis=1) - 1) < 1e-3).all())
    return "multiclass" if sums_to_one else "multilabel"


def _confusion(scores: Scores) -> list[Any]:
    if scores.kind != "multilabel":
        table = confusion(scores.probabilities.argmax(axis=1), scores.targets, len(scores.classes))[0]
        return table.astype(int).tolist()
    said = (scores.probabilities >= 0.5).astype(np.int64)
    return [confusion(s, t, 2)[0].astype(int).tolist() for s, t in zip(said.T, scores.targets.T, strict=True)]


def _curve(probabilities: Floats, truth: NDArray[np.bool_]) -> tuple[list[float], list[float]]:
    """Return a ROC curve of at most `MOST_POINTS` points, empty where it is not defined."""
    alarms, hits = Ranking(probabilities, truth).curve()
    if np.isnan(alarms).any() or np.isnan(hits).any():
        return [], []
    index = np.unique(np.linspace(0, len(hits) - 1, min(len(hits), MOST_POINTS)).round().astype(int))
    return alarms[index].tolist(), hits[index].tolist()


def _joined(
    table: Probabilities, known: dict[str, Reference], path: Path, references: Path, common: bool
) -> Probabilities:
    unknown = [case for case in table.cases if case not in known]
    unpredicted = sorted(set(known) - set(table.cases))
    if not common and (unknown or unpredicted):
        odd, there, absent = (unknown, path, references) if unknown else (unpredicted, references, path)
        raise DataError(
            f"'{odd[0]}' (and {len(odd) - 1} more) stands in {there} and not in {absent}: every case counts. Give the "
            "split that was predicted with --split, or use --common-cases to measure those that both have."
        )
    table = _rows(table, [row for row, case in enumerate(table.cases) if case in known])
    if not table.cases:
        raise DataError(f"{path} and {references} share no case: check the names in their first columns.")
    found = [known[case] for case in table.cases]
    patients = tuple(each.patient for each in found)
    return Probabilities(
        cases=table.cases,
        classes=table.classes,
        values=table.values,
        patient_keys=patients if all(patients) else table.patient_keys,
        targets=tuple(each.label for each in found),
    )


def _rows(table: Probabilities, rows: Sequence[int]) -> Probabilities:
    return Probabilities(
        cases=tuple(table.cases[row] for row in rows),
        classes=table.classes,
        values=table.values[list(rows)],
        patient_keys=tuple(table.patient_keys[row] for row in rows) if table.patient_keys else (),
        targets=tuple(table.targets[row] for row in rows) if table.targets else (),
    )
