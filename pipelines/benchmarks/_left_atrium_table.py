"""What the literature's left-atrium protocol leaks, what is done differently here, published rows, and our rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from _common import print_table
from _left_atrium import GRAIN, HELD_OUT, METRICS

from medssl.evaluation.bootstrap import estimate

#: What runs that are compared have in common.
KIND = ("labelled", "network", "pretrained", "seed", "steps")

LEAKS = (
    "Volumes were cropped around the ground truth of the atrium by the public preprocessing, in training and testing: "
    "whoever draws the box knows where the atrium is.",
    "One labelled subset, the first N of the public list, and one seed: no table of this protocol knows its spread.",
    f"The 20 test volumes are not at hand: tested are the last {HELD_OUT} of the 80 training volumes, so that "
    f"{80 - HELD_OUT} - N are unlabelled instead of 80 - N. Rows of the literature are of other cases.",
    "Rows marked 'best on test' were chosen on the test volumes by their authors.",
)
DEVIATIONS = (
    "All methods have SGD 0.01 (momentum 0.9 in Nesterov's form, weight decay 1e-4), falling as (1 - t)^0.9, 2 "
    "labelled and 2 unlabelled crops a step; the literature has other rates, steps or batches for some of them.",
    "Quarter turns and mirrorings in the plane are drawn evenly from all eight; the literature's always mirror once.",
    "Labelled and unlabelled crops go through batch normalisation apart from each other.",
    "Unlabelled weights and their ramps are medssl's defaults. UA-MT drops channels by V-Net's own dropout, as in its "
    "code. TraCoCo draws its two crops from a window of 88 x 132 x 148 voxels, the largest that fits all volumes.",
    f"Volumes are normalised to mean 0 and standard deviation 1 after the crop and rounded to {GRAIN} of it.",
)


def _row(method: str, labelled: int, checkpoint: str, source: str, *values: float) -> dict[str, Any]:
    names = ("dice", "jaccard", "hd95", "asd")
    return {
        "method": method, "labelled": labelled, "checkpoint": checkpoint, "source": source,
        **dict(zip(names, values, strict=True)),
    }  # fmt: skip


#: Dice and Jaccard in percent, distances in voxels, of 20 test volumes, as noted from the named repositories. Left out
#: is what is known from memory alone, the supervised V-Net's row too; for mean teacher and CPS none was found.
PUBLISHED = (
    _row("UA-MT", 8, "last", "DTC's and TraCoCo's repositories", 84.25, 73.48, 13.84, 3.36),
    _row("UA-MT", 8, "not said", "repeated by CrossMatch", 85.81, 75.41, 18.25, 5.04),
    _row("MC-Net+", 8, "best on test", "its repository", 88.96, 80.25, 7.93, 1.86),
    _row("MC-Net+", 8, "not said", "repeated by CrossMatch", 87.68, 78.27, 10.35, 1.85),
    _row("BCP", 8, "not said", "repeated by CrossMatch", 89.55, 81.22, 7.10, 1.69),
    _row("TraCoCo", 8, "last", "its repository", 89.29, 80.82, 6.92, 2.28),
    _row("TraCoCo", 8, "best on test", "its repository", 89.86, 81.70, 6.81, 2.01),
    _row("UA-MT", 16, "last", "DTC's and TraCoCo's repositories", 88.88, 80.21, 7.32, 2.26),
    _row("UA-MT", 16, "not said", "repeated by CrossMatch", 88.18, 79.09, 9.66, 2.62),
    _row("MC-Net+", 16, "best on test", "its repository", 91.07, 83.67, 5.84, 1.67),
    _row("MC-Net+", 16, "not said", "repeated by CrossMatch", 90.60, 82.93, 6.27, 1.58),
    _row("BCP", 16, "not said", "repeated by CrossMatch", 90.18, 82.36, 6.64, 1.61),
    _row("TraCoCo", 16, "last", "its repository", 90.94, 83.47, 5.49, 1.79),
    _row("TraCoCo", 16, "best on test", "its repository", 91.51, 84.40, 5.63, 1.79),
)


def rows_of(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each run and post-processing, beside the supervised run with as many labels.

    Distances are means over the cases where they are defined; `undefined` counts the others.
    """
    alone = {
        (run["labelled"], run["network"], run["pretrained"]): run for run in found if run["method"] == "supervised"
    }
    rows = []
    for run in found:
        for part in ("whole", "largest part"):
            cases = {case: scores[part] for case, scores in run["cases"].items()}
            values = {
                metric: [np.nan if case[metric] is None else case[metric] for case in cases.values()]
                for metric in METRICS
            }
            row = {name: run[name] for name in ("method", *KIND)} | {"mask": part}
            row |= {metric: estimate(numbers).mean for metric, numbers in values.items()}
            row["undefined"] = int(np.isnan(values["hd95"]).sum())
            control = alone.get(_kind(run))
            if control is not None and control is not run:
                theirs = [scores[part]["dice"] for scores in control["cases"].values()]
                more = estimate([mine - other for mine, other in zip(values["dice"], theirs, strict=True)])
                row |= {"dice more": more.mean, "dice more, 95%": [more.low, more.high]}
            rows.append({**row, "s a step": run["seconds a step"]})
    return rows


def _kind(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run[name] for name in KIND)


def show(found: Sequence[dict[str, Any]]) -> None:
    """Print the rows, the published ones, and what is wrong with comparing them."""
    rows = [shown(row) for row in rows_of(found)]
    names = dict.fromkeys(name for row in rows for name in row)
    print_table([{name: row.get(name, "-") for name in names} for row in rows])
    print("\nPublished (Dice and Jaccard in percent, distances in voxels, 20 other volumes):")
    print_table(PUBLISHED)
    for title, lines in (("Leaks of this protocol", LEAKS), ("Different here", DEVIATIONS)):
        print(f"\n{title}:", *lines, sep="\n- ")


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as text."""
    return {name: _text(value) for name, value in row.items()}


def _text(value: Any) -> Any:
    if isinstance(value, list):
        return f"[{', '.join(_text(each) for each in value)}]"
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else value
