"""A CSV of labels, row by row, with what each row says as it stands."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medssl.errors import DataError, UsageError

#: Between several labels of one image.
SEPARATOR = "|"
#: Stands for "none of them" among several labels; an empty field is a missing label.
NONE = "-"
#: Columns of 0 and 1, one for each of several labels.
PREFIX = "label_"


@dataclass(frozen=True)
class Row:
    """One line of a CSV.

    Args:
        number: Its line in the file; the header is line 1.
        where: The same in words.
        key: Path or volume id.
        labels: Names of the classes; empty where the label is missing.
        columns: Names of the columns of 0 and 1, if there are any.
        patient: As written, or empty.
        split: As written, or None where there is no such column.
    """

    number: int
    where: str
    key: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    patient: str
    split: str | None


@dataclass(frozen=True)
class Table:
    """All rows, and which columns there are."""

    rows: list[Row]
    has_split: bool
    has_patients: bool
    label_columns: tuple[str, ...]


def read_table(path: Path, key: str, *, labelled: bool = True) -> Table:
    """Read a CSV of labels.

    Args:
        path: UTF-8, with a comma, semicolon or tab between fields.
        key: Name of the column that says which image: `path` or `volume_id`.
        labelled: Whether there must be a column of labels.

    Raises:
        UsageError: If it cannot be opened.
        DataError: If a column is missing, a line has too many or too few fields, or there is no row.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: save it as CSV UTF-8.") from error
    head = text.partition("\n")[0]
    delimiter = next((mark for mark in (",", ";", "\t") if mark in head), ",")
    try:
        # A quoted field may hold line breaks: the reader counts lines, not rows.
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        lines = [(reader.line_num, fields) for fields in reader]
    except csv.Error as error:
        raise DataError(f"{path} is no CSV: {error}.") from error
    header = [name.strip() for name in lines[0][1]] if lines else []
    names = [name.lower() for name in header]
    columns = tuple(name[len(PREFIX) :] for name in header if name.lower().startswith(PREFIX))
    needed = [key, "label"] if labelled and not columns else [key]
    for name in needed:
        if name not in names:
            raise DataError(
                f"{path} has the columns {', '.join(names) or 'none'}; it needs {key} and label (or {PREFIX}NAME for "
                "each of several labels)."
            )
    if len(set(names)) != len(names):
        raise DataError(f"{path}: a column stands twice in {', '.join(names)}.")
    rows = []
    for number, fields in lines[1:]:
        if not any(field.strip() for field in fields):
            continue
        where = f"{path.name} line {number}"
        if len(fields) != len(names):
            raise DataError(f"{where}: {len(fields)} fields where the header has {len(names)}.")
        values = {name: field.strip() for name, field in zip(names, fields, strict=True)}
        if not values[key]:
            raise DataError(f"{where}: the column {key} is empty.")
        rows.append(
            Row(
                number=number,
                where=where,
                key=values[key],
                labels=_from_columns(values, columns, where) if columns else _from_text(values.get("label", "")),
                columns=columns,
                patient=values.get("patient", ""),
                split=values.get("split"),
            )
        )
    if not rows:
        raise DataError(f"{path} has no row.")
    has_patients = "patient" in names
    for row in rows:
        if has_patients and not row.patient:
            raise DataError(f"{row.where}: the column patient is empty. Fill every row, or leave the column out.")
    return Table(rows, "split" in names, has_patients, columns)


def the_kind(kind: str, rows: Sequence[Row], label_columns: Sequence[str]) -> str:
    """Return the kind of target, found where it is `auto`.

    Raises:
        DataError: If an image has several labels where it may have one.
    """
    several = next((row for row in rows if len(row.labels) > 1 or row.labels == (NONE,)), None)
    if kind == "auto":
        return "multilabel" if label_columns or several else "multiclass"
    if kind != "multilabel" and (several or label_columns):
        place = several.where if several else f"{PREFIX}{label_columns[0]}"
        raise DataError(f"{place}: several labels where {kind} takes one. Use --kind multilabel, or mend the row.")
    return kind


def parse_target(row: Row, classes: Sequence[str], kind: str) -> int | tuple[int, ...]:
    """Return the target of a row as numbers."""
    if kind == "multilabel":
        return tuple(int(name in row.labels) for name in classes)
    return classes.index(row.labels[0])


def _from_text(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(SEPARATOR) if part.strip())


def _from_columns(values: dict[str, str], columns: Sequence[str], where: str) -> tuple[str, ...]:
    found = {name: values[PREFIX + name.lower()] for name in columns}
    if not all(found.values()):
        return ()
    for name, value in found.items():
        if value not in ("0", "1"):
            raise DataError(f"{where}: the column {PREFIX}{name} holds '{value}'; it takes 0 and 1.")
    return tuple(name for name, value in found.items() if value == "1") or (NONE,)
