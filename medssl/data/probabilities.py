"""The table of a classifier's answers: a row per case, a column `p_<class>` per class; torch-free, read by any tool."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medssl.errors import DataError
from medssl.files import write_text

CASE, PATIENT, TARGET, PREFIX = "case", "patient", "target", "p_"


@dataclass(frozen=True)
class Probabilities:
    """A classifier's answers.

    Args:
        cases: Name of each case.
        classes: Names; of ordinal classes in their order.
        values: Shape: (N, K), float64.
        patient_keys: Pseudonym of each case's patient, or empty.
        targets: True class, or labels with `|` between them, as text; or empty.
    """

    cases: tuple[str, ...]
    classes: tuple[str, ...]
    values: NDArray[np.float64]
    patient_keys: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()


def write_probabilities(path: Path, table: Probabilities) -> None:
    """Write a table as CSV, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    named = [(PATIENT, table.patient_keys), (TARGET, table.targets)]
    columns = [(name, values) for name, values in named if values]
    writer.writerow([CASE, *(name for name, _ in columns), *(PREFIX + name for name in table.classes)])
    for row, (case, values) in enumerate(zip(table.cases, table.values, strict=True)):
        writer.writerow([case, *(column[row] for _, column in columns), *(f"{value:.9g}" for value in values)])
    write_text(path, text.getvalue())


def read_probabilities(path: Path) -> Probabilities:
    """Read a table that `write_probabilities` wrote, or one of the same columns.

    Raises:
        DataError: If it cannot be read, has no `case` or `p_<class>` column, a case twice, or a cell that is no number;
            the line is named.
    """
    header, rows = read_csv(path)
    classes = [name for name in header if name.startswith(PREFIX)]
    if CASE not in header or not classes:
        raise DataError(
            f"{path} has the columns {', '.join(header)}; predictions need 'case' and a 'p_<class>' for each class."
        )
    values = np.empty((len(rows), len(classes)))
    for number, row in enumerate(rows):
        for column, name in enumerate(classes):
            try:
                values[number, column] = float(row[name])
            except ValueError as error:
                raise DataError(f"{path}, line {number + 2}: {name} is '{row[name]}', not a number.") from error
        if not np.isfinite(values[number]).all():
            raise DataError(f"{path}, line {number + 2}: a probability is not finite. Was the network's output NaN?")
    cases = tuple(row[CASE] for row in rows)
    refuse_repeats(path, cases)
    return Probabilities(
        cases=cases,
        classes=tuple(name.removeprefix(PREFIX) for name in classes),
        values=values,
        patient_keys=tuple(row[PATIENT] for row in rows) if PATIENT in header else (),
        targets=tuple(row[TARGET] for row in rows) if TARGET in header else (),
    )


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the header and the rows of a CSV file with a header line.

    Raises:
        DataError: If it cannot be read, is empty, or a line has more or fewer cells than the header; the line is named.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            lines = list(csv.reader(handle))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path} cannot be read as CSV: {type(error).__name__}. Give a UTF-8 file with commas."
        ) from error
    while lines and not lines[-1]:
        lines.pop()
    if len(lines) < 2:
        raise DataError(f"{path} holds no rows: it needs a header line and one line per case.")
    header = [name.strip() for name in lines[0]]
    if len(set(header)) != len(header):
        raise DataError(f"{path} has a column twice: {', '.join(header)}.")
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise DataError(f"{path}, line {number} has {len(line)} cells; the header has {len(header)}.")
    return header, [dict(zip(header, (cell.strip() for cell in line), strict=True)) for line in lines[1:]]


def refuse_repeats(path: Path, cases: Sequence[str]) -> None:
    """Refuse a table with a case twice.

    Raises:
        DataError: Naming the case and its lines.
    """
    seen: dict[str, int] = {}
    for number, case in enumerate(cases, start=2):
        if case in seen:
            raise DataError(f"{path}: '{case}' stands in lines {seen[case]} and {number}. Keep one of them.")
        seen[case] = number
