"""Scores of a run: read where they were written, else measured from its validation masks."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from medssl.errors import DataError, UsageError
from medssl.evaluation.masks import find_labels, mask_files
from medssl.evaluation.overlap import METRICS
from medssl.evaluation.segmentation import SegmentationResult, evaluate_segmentation, measure

Values = dict[str, dict[str, dict[str, float]]]


def run_scores(run: Path, references: Path | None = None) -> Values:
    """Return `scores[metric][label][case]`, NaN where a metric is undefined.

    Looked for, in this order: `metrics.json` of `medssl evaluate segmentation` in `run` or `run/validation`, unless a
    mask beside it is newer; masks in
    `run/validation` (or `run`) measured against `references`, or against what `run/validation/references.json` names.

    Args:
        run: A segmentation RUN, a folder of `evaluate segmentation --out`, or a folder of masks.
        references: Folder of reference masks.

    Raises:
        UsageError: If `run` is not there or is of another kind, or nothing says what to compare its masks with.
        DataError: If its `metrics.json` is damaged.
    """
    if not run.exists():
        raise UsageError(f"{run} does not exist.")
    _require_segmentation(run)
    written = None if references is not None else written_scores(run)
    return _read(written) if written is not None else values_of(measure_run(run, references))


def written_scores(run: Path) -> Path | None:
    """Return the `metrics.json` of a run or evaluation folder, unless a mask beside it is newer."""
    for folder in (run, run / "validation"):
        path = folder / "metrics.json"
        if path.is_file():
            newest = max((mask.stat().st_mtime for mask in mask_files(folder).values()), default=0.0)
            return path if path.stat().st_mtime >= newest else None
    return None


def measure_run(
    run: Path, references: Path | None = None, *, largest_component: bool = False, quiet: bool = True
) -> SegmentationResult:
    """Measure the validation masks of a run; a validation case without a mask counts as missed.

    Args:
        run: A segmentation RUN or a folder of masks.
        references: Folder of reference masks; by default what the RUN's own files name.
        largest_component: Keep of each predicted label its largest connected part alone.
        quiet: Show no progress.

    Raises:
        UsageError: If there are no masks or nothing says what to compare them with.
    """
    masks = run / "validation" if (run / "validation").is_dir() else run
    found = mask_files(masks)
    if not found:
        raise UsageError(
            f"{run} has neither metrics.json nor masks in validation/. Give a finished segmentation RUN, or the --out "
            "folder of `medssl evaluate segmentation`."
        )
    if references is not None:
        return evaluate_segmentation(
            masks, references, cases=sorted(found), largest_component=largest_component, quiet=quiet
        )
    wanted = {name: case.label for name, case in validation_cases(run).items()}
    if not wanted:
        raise UsageError(
            f"{run} does not say where its reference masks are, or they are no longer there. Measure it first: medssl "
            f"evaluate segmentation --predictions {masks} --references DATASET/labelsTr --out {masks}"
        )
    folder = next(iter(wanted.values())).parent
    labels, ignore = find_labels(None, run / "validation", folder)
    if labels is None:
        raise UsageError(f"{run} has no dataset.json that names its labels. Give a whole segmentation RUN.")
    return measure(found, wanted, labels, ignore, largest_component=largest_component, quiet=quiet)


@dataclass(frozen=True)
class ValidationCase:
    """Where a validation case lies.

    Args:
        label: Its reference mask.
        images: Its channels.
    """

    label: Path
    images: tuple[Path, ...]


def validation_cases(run: Path) -> dict[str, ValidationCase]:
    """Return the validation cases of a RUN whose references are still where its files say.

    Raises:
        DataError: If `validation/references.json` is damaged.
    """
    listed = run / "validation" / "references.json"
    if not listed.is_file():
        return {}
    try:
        content = json.loads(listed.read_text())
        folder = Path(content["folder"])
        cases = {
            str(name): ValidationCase(folder / entry["label"], tuple(folder / image for image in entry["images"]))
            for name, entry in content["cases"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{listed} does not name the references: {error!r}.") from error
    return {name: case for name, case in cases.items() if case.label.is_file()}


def values_of(result: SegmentationResult) -> Values:
    """Return the scores of a result as `run_scores` does."""
    values: Values = {metric: {label: {} for label in result.labels} for metric in METRICS}
    for row in result.rows:
        for metric in METRICS:
            values[metric][row.label][row.case] = getattr(row.scores, metric)
    return values


def _require_segmentation(run: Path) -> None:
    """Refuse a RUN or an evaluation of another kind by its own name.

    Raises:
        UsageError: Naming what it is and what to do with it.
    """
    name = run.resolve().name
    kinds = {_kind(path) for path in (run / "run.json", run / "metrics.json")}
    if kinds & {"classification", "classification evaluation"}:
        raise UsageError(
            f"{name} is a classification RUN; compare takes segmentation RUNs; for classification use "
            "`medssl protocol`."
        )
    if "pretraining" in kinds:
        raise UsageError(f"{name} is a pretraining RUN: fine-tune it first, then compare the fine-tuned RUNs.")


def _kind(path: Path) -> str | None:
    """Return the kind that a JSON file names; None where there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return str(content["kind"]) if isinstance(content, dict) and "kind" in content else None


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
