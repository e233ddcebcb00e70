"""True labels of cases, from a CSV file, as the numbers that metrics take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medssl.data.probabilities import Probabilities, read_csv, refuse_repeats
from medssl.data.target_table import SEPARATOR
from medssl.errors import DataError

CASE_COLUMNS = ("case", "volume_id", "name", "path")
LABEL_COLUMNS = ("label", "target")


@dataclass(frozen=True)
class Reference:
    """What is true of a case.

    Args:
        label: Its class, or its labels with `|` between them.
        patient: Pseudonym of its patient, or empty.
    """

    label: str
    patient: str


def read_references(path: Path, split: str | None = None) -> dict[str, Reference]:
    """Read the true labels of cases.

    The columns are `case` (or `volume_id`, `name`, or `path`, of which the file's own name without its ending counts),
    `label` (or `target`), and optionally `patient` and `split`.

    Args:
        path: The CSV file.
        split: Only rows of this split.

    Raises:
        DataError: If a column is missing, a case stands in two rows, or no row is of the split.
    """
    header, rows = read_csv(path)
    case = next((name for name in CASE_COLUMNS if name in header), None)
    label = next((name for name in LABEL_COLUMNS if name in header), None)
    if case is None or label is None:
        raise DataError(
            f"{path} has the columns {', '.join(header)}; references need one of {', '.join(CASE_COLUMNS)} and one of "
            f"{', '.join(LABEL_COLUMNS)}."
        )
    names = [_stem(row[case]) if case == "path" else row[case] for row in rows]
    refuse_repeats(path, names)
    known = {
        name: Reference(row[label], row.get("patient", ""))
        for name, row in zip(names, rows, strict=True)
        if split is None or row.get("split") == split
    }
    if not known:
        splits = sorted({row["split"] for row in rows}) if "split" in header else []
        there = f"it has {', '.join(splits)}" if splits else "it has no column 'split'"
        raise DataError(f"{path} has no row of the split '{split}'; {there}. Correct --split or leave it away.")
    return known


def table_targets(table: Probabilities, kind: str) -> NDArray[np.int64]:
    """Return the targets of a table as numbers: shape (N,), or (N, K) of zeros and ones for `multilabel`.

    A label is the name of a class; a number counts as the place of a class where no class has that name.

    Raises:
        DataError: If a label is no class; the case is named.
    """
    place = {name: number for number, name in enumerate(table.classes)}
    if kind == "multilabel":
        targets = np.zeros((len(table.cases), len(table.classes)), np.int64)
        for row, (case, text) in enumerate(zip(table.cases, table.targets, strict=True)):
            for name in filter(None, text.split(SEPARATOR)):
                targets[row, _place(name, place, case)] = 1
        return targets
    return np.array(
        [_place(name, place, case) for case, name in zip(table.cases, table.targets, strict=True)], dtype=np.int64
    )


def _place(name: str, place: dict[str, int], case: str) -> int:
    if name in place:
        return place[name]
    if name.isdigit() and int(name) < len(place) and not any(known.isdigit() for known in place):
        return int(name)
    raise DataError(
        f"{case}: its label is '{name}'; the predictions know {', '.join(place)}. Correct the label or predict again."
    )


def _stem(path: str) -> str:
    name = path.replace("\\", "/").rsplit("/", 1)[-1]
    for ending in (".nii.gz", ".mha.gz"):
        name = name.removesuffix(ending)
    return name.rsplit(".", 1)[0] if "." in name else name
