"""Scores of a run: read where they were written, else measured from its validation masks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from medssl.errors import DataError, UsageError
from medssl.evaluation.overlap import METRICS
from medssl.evaluation.segmentation import SegmentationResult, evaluate_segmentation

Values = dict[str, dict[str, dict[str, float]]]


def run_scores(run: Path, references: Path | None = None) -> Values:
    """Return `scores[metric][label][case]`, NaN where a metric is undefined.

    Looked for, in this order: `metrics.json` of `medssl evaluate segmentation` in `run` or `run/validation`; masks in
    `run/validation` (or `run`) measured against `references`, against what `run/validation/references.json` names, or
    against `labelsTr` of the data set in `run/recipe.yaml`.

    Args:
        run: A segmentation RUN, a folder of `evaluate segmentation --out`, or a folder of masks.
        references: Folder of reference masks.

    Raises:
        UsageError: If `run` is not there, or nothing says what to compare its masks with.
        DataError: If its `metrics.json` is damaged.
    """
    if not run.exists():
        raise UsageError(f"{run} does not exist.")
    if references is None:
        for folder in (run, run / "validation"):
            if (folder / "metrics.json").is_file():
                return _read(folder / "metrics.json")
    return values_of(measure_run(run, references))


def measure_run(run: Path, references: Path | None = None, *, quiet: bool = True) -> SegmentationResult:
    """Measure the validation masks of a run.

    Raises:
        UsageError: If there are no masks or nothing says what to compare them with.
    """
    masks = run / "validation" if (run / "validation").is_dir() else run
    if not any(masks.glob("*.nii*")):
        raise UsageError(
            f"{run} has neither metrics.json nor masks in validation/. Give a finished segmentation RUN, or the --out "
            "folder of `medssl evaluate segmentation`."
        )
    where = references or _references_of(run)
    if where is None:
        raise UsageError(
            f"{run} does not say where its reference masks are. Measure it first: medssl evaluate segmentation "
            f"--predictions {masks} --references DATASET/labelsTr --out {masks}"
        )
    predicted = {path.name.removesuffix(".gz").removesuffix(".nii") for path in masks.glob("*.nii*")}
    return evaluate_segmentation(masks, where, cases=sorted(predicted), quiet=quiet)


def values_of(result: SegmentationResult) -> Values:
    """Return the scores of a result as `run_scores` does."""
    values: Values = {metric: {label: {} for label in result.labels} for metric in METRICS}
    for row in result.rows:
        for metric in METRICS:
            values[metric][row.label][row.case] = getattr(row.scores, metric)
    return values


def _read(path: Path) -> Values:
    try:
        content = json.loads(path.read_text())
        values: Values = {metric: {label: {} for label in content["labels"]} for metric in METRICS}
        for row in content["cases"]:
            for metric in METRICS:
                value = row[metric]
                values[metric][row["label"]][row["case"]] = math.nan if value is None else float(value)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no output of `medssl evaluate segmentation`: {error!r}. Measure again.") from error
    return values


def _references_of(run: Path) -> Path | None:
    """Return the folder of references that a run's own files name, if it is still there."""
    candidates: list[Any] = []
    listed = run / "validation" / "references.json"
    if listed.is_file():
        content = json.loads(listed.read_text())
        if isinstance(content, dict):
            candidates.append(content.get("folder") or content.get("references"))
    recipe = run / "recipe.yaml"
    if recipe.is_file():
        content = yaml.safe_load(recipe.read_text())
        if isinstance(content, dict) and content.get("dataset"):
            candidates.append(Path(str(content["dataset"])) / "labelsTr")
    for candidate in candidates:
        if isinstance(candidate, str | Path) and Path(candidate).is_dir():
            return Path(candidate)
    return None
