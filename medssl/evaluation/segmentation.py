"""Segmentation measured per case and label, with every failure counted."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medssl.errors import DataError
from medssl.evaluation.bootstrap import LEVEL, RESAMPLES, Estimate, estimate
from medssl.evaluation.masks import (
    Labels,
    find_labels,
    mask_files,
    read_mask,
    require_known,
    require_same_grid,
)
from medssl.evaluation.overlap import METRICS, Scores, scores
from medssl.files import write_json, write_text
from medssl.progress import progress

SCHEMA_VERSION = 1
NO_PREDICTION = "no prediction"


@dataclass(frozen=True)
class CaseScores:
    """One label of one case.

    Args:
        case: Its name.
        label: The label's name.
        scores: What was measured.
        failed: The case has no prediction; it counts as an empty one.
    """

    case: str
    label: str
    scores: Scores
    failed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain types, None where a metric is undefined."""
        values = {name: _plain(value) for name, value in vars(self.scores).items()}
        return {"case": self.case, "label": self.label, "failed": self.failed, **values}


@dataclass(frozen=True)
class SegmentationResult:
    """Scores of every case and label, and their means.

    Args:
        labels: Values by label name.
        rows: One per case and label.
        missing: Cases without a prediction.
        extra: Predictions without a reference; they are not measured.
        seed: Of the bootstrap.
    """

    labels: Labels
    rows: tuple[CaseScores, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    seed: int

    @property
    def cases(self) -> tuple[str, ...]:
        """Names of all cases, sorted."""
        return tuple(sorted({row.case for row in self.rows}))

    def per_label(self, label: str, metric: str) -> Estimate:
        """Return a metric's mean over the cases where it is defined."""
        return estimate([getattr(row.scores, metric) for row in self.rows if row.label == label], seed=self.seed)

    def per_case(self, metric: str) -> dict[str, float]:
        """Return for each case the mean over its labels, NaN where none is defined."""
        return case_means((row.case, getattr(row.scores, metric)) for row in self.rows)

    def counts(self, label: str) -> dict[str, int]:
        """Return how often a label was in both masks, missed, spurious, or absent from both."""
        outcomes = [row.scores.outcome for row in self.rows if row.label == label]
        return {outcome: outcomes.count(outcome) for outcome in ("both", "missed", "spurious", "absent")}

    def to_json(self) -> dict[str, Any]:
        """Return the content of `metrics.json`."""
        overall = {
            metric: estimate(list(self.per_case(metric).values()), seed=self.seed).to_json() for metric in METRICS
        }
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "segmentation evaluation",
            "conventions": {
                "both masks empty": "every metric undefined, left out of the means, counted as absent",
                "one mask empty": "Dice and Jaccard 0; distances undefined, left out of the means, counted",
                "no prediction": "as an empty prediction, and counted in missing_predictions",
                "overall": "mean over cases of the mean over the labels defined in the case",
                "interval": f"percentile bootstrap over cases, {LEVEL:.0%}, {RESAMPLES} resamples, seed {self.seed}",
            },
            "labels": {
                label: {
                    "values": list(values),
                    "counts": self.counts(label),
                    **{metric: self.per_label(label, metric).to_json() for metric in METRICS},
                }
                for label, values in self.labels.items()
            },
            "overall": overall,
            "missing_predictions": list(self.missing),
            "extra_predictions": list(self.extra),
            "cases": [row.to_json() for row in self.rows],
        }

    def __rich__(self) -> Any:
        """Return a table for the terminal."""
        from rich.console import Group
        from rich.table import Table

        table = Table(title=f"Segmentation of {len(self.cases)} cases (mean over cases, {LEVEL:.0%} interval)")
        for name in ("label", "Dice", "Jaccard", "HD95 [mm]", "ASSD [mm]", "found", "missed", "spurious"):
            table.add_column(name, justify="left" if name == "label" else "right")
        for label in self.labels:
            counts = self.counts(label)
            table.add_row(
                label,
                *(show(self.per_label(label, metric), metric) for metric in METRICS),
                *(str(counts[outcome]) for outcome in ("both", "missed", "spurious")),
            )
        if len(self.labels) > 1:
            means = (estimate(list(self.per_case(metric).values()), seed=self.seed) for metric in METRICS)
            table.add_row("all labels", *(show(mean, metric) for mean, metric in zip(means, METRICS, strict=True)))
        notes = []
        if self.missing:
            notes.append(f"{len(self.missing)} without a prediction count as missed: {', '.join(self.missing[:5])}")
        if self.extra:
            notes.append(f"{len(self.extra)} predictions have no reference and are not measured.")
        return Group(table, *notes)


def evaluate_segmentation(
    predictions: Path,
    references: Path,
    out: Path | None = None,
    *,
    labels: Mapping[str, int | Sequence[int]] | None = None,
    cases: Sequence[str] | None = None,
    largest_component: bool = False,
    seed: int = 0,
    quiet: bool = False,
) -> SegmentationResult:
    """Measure Dice, Jaccard, HD95 and ASSD in mm per case and label; write `metrics.json` and `cases.csv` to `out`.

    Every reference counts: one without a prediction is scored as an empty prediction. How empty masks are treated is
    said in `medssl.evaluation.overlap` and in the output.

    Args:
        predictions: Folder of masks (`<case>.nii.gz`), one mask, or a segmentation RUN (its `validation`).
        references: Folder of masks of the same names, one mask, or an nnU-Net raw data set (its `labelsTr`).
        out: Where to write, or None to only return.
        labels: Value, or values of a region, by name. By default those of `dataset.json` in or beside either folder,
            else every value that the references hold.
        cases: Only these cases; for a RUN its validation cases.
        largest_component: Keep of each predicted label its largest connected part alone.
        seed: Of the bootstrap.
        quiet: Show no progress.

    Raises:
        DataError: If masks cannot be read, do not lie on one grid, or hold unknown values, or no case is left.
    """
    if cases is None:
        cases = _listed_cases(predictions)
    if (predictions / "run.json").is_file() or (predictions / "validation" / "references.json").is_file():
        predictions = predictions / "validation"
    references = references / "labelsTr" if (references / "labelsTr").is_dir() else references
    found, wanted = mask_files(predictions), mask_files(references)
    if predictions.is_file() and references.is_file() and len(found) == len(wanted) == 1:
        found = dict(zip(wanted, found.values(), strict=True))
    if cases is not None:
        absent = sorted(set(cases) - set(wanted))
        if absent:
            raise DataError(f"{references} has no mask of {', '.join(absent[:5])}. Check the names of the cases.")
        wanted = {name: path for name, path in wanted.items() if name in set(cases)}
        found = {name: path for name, path in found.items() if name in set(cases)}
    if not wanted:
        raise DataError(f"{references} holds no mask (NIfTI, NRRD, MetaImage or MGH). Give the folder of references.")
    if not set(found) & set(wanted):
        raise DataError(
            f"No prediction in {predictions} has the name of a reference in {references} "
            f"(for example {next(iter(wanted))}). Check the two folders."
        )
    named, ignore = find_labels(labels, predictions, references)
    if named is None:
        named = _labels_of(list(wanted.values()))
    result = measure(found, wanted, named, ignore, largest_component=largest_component, seed=seed, quiet=quiet)
    if out is not None:
        write_result(result, out)
    return result


def measure(
    predictions: Mapping[str, Path],
    references: Mapping[str, Path],
    labels: Labels,
    ignore: int | None = None,
    *,
    largest_component: bool = False,
    seed: int = 0,
    quiet: bool = False,
) -> SegmentationResult:
    """Measure masks given by case name; see `evaluate_segmentation`.

    Args:
        predictions: Masks; a reference without one counts as missed.
        references: Masks.
        labels: Values of each label or region.
        ignore: Reference value whose voxels count for nobody.
        largest_component: Keep of each predicted label its largest connected part alone.
        seed: Of the bootstrap.
        quiet: Show no progress.
    """
    rows: list[CaseScores] = []
    with progress("Evaluating", len(references), quiet=quiet) as advance:
        for name, path in sorted(references.items()):
            rows.extend(_case(name, predictions.get(name), path, labels, ignore, largest_component))
            advance(1, name)
    missing = tuple(sorted(set(references) - set(predictions)))
    extra = tuple(sorted(set(predictions) - set(references)))
    return SegmentationResult(labels, tuple(rows), missing, extra, seed)


def write_result(result: SegmentationResult, out: Path) -> None:
    """Write `metrics.json` and `cases.csv`."""
    write_json(out / "metrics.json", result.to_json())
    text = io.StringIO()
    rows = [row.to_json() for row in result.rows]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / "cases.csv", text.getvalue())


def case_means(values: Any) -> dict[str, float]:
    """Return the mean of each case's defined values, NaN where there are none.

    Args:
        values: Pairs of a case's name and a value.
    """
    collected: dict[str, list[float]] = {}
    for case, value in values:
        collected.setdefault(case, []).append(value)
    return {case: _nanmean(numbers) for case, numbers in sorted(collected.items())}


def show(value: Estimate, metric: str) -> str:
    """Return an estimate as text: Dice and Jaccard with three decimals, millimetres with two."""
    if value.mean is None:
        return "-"
    digits = 2 if metric.endswith("_mm") else 3
    text = f"{value.mean:.{digits}f}"
    return text if value.low is None else f"{text} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def _case(
    name: str, prediction: Path | None, reference: Path, labels: Labels, ignore: int | None, largest_component: bool
) -> list[CaseScores]:
    truth = read_mask(reference)
    require_known(name, "reference", truth, labels, ignore)
    if prediction is None:
        made = np.zeros_like(truth.labels)
    else:
        mask = read_mask(prediction)
        require_same_grid(name, mask, truth)
        require_known(name, "prediction", mask, labels, ignore)
        made = mask.labels
    if ignore is not None:
        made = np.where(truth.labels == ignore, 0, made)
    rows = []
    for label, values in labels.items():
        predicted = np.isin(made, values)
        if largest_component:
            predicted = largest_part(predicted)
        measured = scores(predicted, np.isin(truth.labels, values), truth.spacing_mm)
        rows.append(CaseScores(name, label, measured, prediction is None))
    return rows


def largest_part(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the largest part of a mask whose voxels touch by faces, edges or corners; of equal ones the first."""
    parts, count = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
    if count < 2:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    largest: NDArray[np.bool_] = parts == sizes.argmax()
    return largest


def _listed_cases(predictions: Path) -> list[str] | None:
    """Return the validation cases that a RUN names, so that those it was trained on do not count as missed."""
    for folder in (predictions, predictions / "validation"):
        try:
            return sorted(json.loads((folder / "references.json").read_text())["cases"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _labels_of(references: Sequence[Path]) -> Labels:
    values: set[int] = set()
    for path in references:
        values.update(int(value) for value in np.unique(read_mask(path).labels))
    values.discard(0)
    if not values:
        raise DataError("All references are empty: there is nothing to measure. Check that these are the labels.")
    return {f"label {value}": (value,) for value in sorted(values)}


def _nanmean(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
