"""Reads targets: a CSV, a folder for each class, a MedMNIST .npz, or an INDEX or STORE with a CSV of labels."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medssl.archive.pseudonym import Pseudonyms, open_user_key
from medssl.archive.sniff import sniff
from medssl.data.target_arrays import read_npz, read_npz_images
from medssl.data.target_table import NONE, SEPARATOR, Row, parse_target, read_table, the_kind
from medssl.data.targets import (
    NAMED,
    SPLIT_NAMES,
    Case,
    Targets,
    carried,
    check,
    check_kind,
    class_numbers,
    few,
    split_by_patient,
    split_into_folds,
)
from medssl.errors import DataError, InputRefused, UsageError

logger = logging.getLogger(__name__)

_JUNK = {"thumbs.db", "desktop.ini"}


def read_targets(
    dataset: Path,
    *,
    labels: Path | None = None,
    kind: str = "auto",
    classes: Sequence[str] | None = None,
    folds: int | None = None,
    fold: int = 0,
    ignore_unlabelled: bool = False,
) -> Targets:
    """Read and check the targets of a data set; nothing but tables and first bytes of files is read.

    Without a split in the data set, 20 % of the patients validate, chosen by a hash of each. An INDEX or a STORE brings
    patients and split with it; a CSV's column `split` wins.

    Args:
        dataset: A CSV (columns path, label, and optionally patient and split), a folder with a folder of images for
            each class (in folders train, val and test, or not), a MedMNIST .npz, an INDEX, or a STORE.
        labels: CSV (columns volume_id, label, and optionally split) for an INDEX or a STORE.
        kind: `multiclass`, `multilabel`, `ordinal`, or `auto`: multilabel where the labels show it, else multiclass.
        classes: Names of the classes in order; by default those found.
        folds: Deal training and validation out anew into so many folds by patient and class.
        fold: Which of them validates.
        ignore_unlabelled: Leave out images without a label instead of refusing the data set.

    Raises:
        UsageError: If the options do not fit together.
        DataError: If the data set cannot be used; the row is named.
    """
    dataset = Path(dataset)
    check_kind(kind)
    if not dataset.exists():
        raise UsageError(f"--dataset {dataset} does not exist.")
    needs_labels = dataset.is_dir() and _is_volumes(dataset)
    if needs_labels != (labels is not None):
        raise UsageError(
            f"{dataset} is an INDEX or a STORE: give --labels CSV with the columns volume_id and label."
            if needs_labels
            else "--labels belongs to an INDEX or a STORE; other data sets hold their labels."
        )
    if needs_labels and labels is not None:
        targets, has_split = _of_volumes(dataset, Path(labels), kind, classes, ignore_unlabelled)
    elif dataset.is_dir():
        targets, has_split = _of_folders(dataset, kind, classes)
    elif dataset.suffix.lower() == ".npz":
        targets, has_split = read_npz(dataset, kind, classes)
    else:
        targets, has_split = _of_csv(dataset, kind, classes, ignore_unlabelled)
    if folds is not None:
        targets = split_into_folds(targets, folds, fold)
    elif not has_split:
        targets = split_by_patient(targets)
    return check(targets)


def read_unlabelled(dataset: Path) -> Targets:
    """Return the images of a data set whose class is not looked at.

    Args:
        dataset: A CSV with the column path, a .npz, an INDEX, a STORE, or a folder of images at any depth.

    Raises:
        UsageError: If there is nothing of that name.
        DataError: If it holds no image, or the row that is named cannot be used.
    """
    if not dataset.exists():
        raise UsageError(f"--unlabelled {dataset} does not exist.")
    if dataset.suffix.lower() == ".npz":
        return read_npz_images(dataset)
    if not dataset.is_dir():
        return read_images(dataset)[0]
    if _is_volumes(dataset):
        cases = [
            Case(name, (), str(row["patient_key"]), str(row["split"]), number, name, volume_id=name)
            for number, (name, row) in enumerate(sorted(_volumes(dataset).items()), start=1)
        ]
        return Targets("multiclass", (), tuple(cases), "volumes")
    files = _files(dataset)
    if not files:
        raise DataError(f"--unlabelled {dataset} holds no image.")
    _refuse_strange({file.relative_to(dataset).as_posix(): file for file in files})
    pseudonyms = open_user_key()
    named = [(file, file.relative_to(dataset).as_posix()) for file in files]
    cases = [
        Case(pseudonyms.of("image", text), (), pseudonyms.of("patient", text), "train", number, text, file)
        for number, (file, text) in enumerate(named, start=1)
    ]
    return Targets("multiclass", (), tuple(cases), "folder")


def read_images(dataset: Path, labels: Path | None = None) -> tuple[Targets, tuple[str, ...]]:
    """Read which images a data set has, and the label of each as text, `|` between several; a CSV needs none.

    Args:
        dataset: As for `read_targets`; a CSV may do without labels, in some rows or in all.
        labels: CSV of labels for an INDEX or a STORE.

    Returns:
        The cases with their patients and splits, and one text each, empty where the label is not known. Of a CSV the
        cases have no target.

    Raises:
        UsageError: If the options do not fit together.
        DataError: If the data set cannot be used; the row is named.
    """
    if dataset.is_dir() or dataset.suffix.lower() == ".npz" or not dataset.exists():
        targets = read_targets(dataset, labels=labels)
        return targets, tuple(SEPARATOR.join(targets.classes[n] for n in carried(case)) for case in targets.cases)
    if labels is not None:
        raise UsageError("--labels belongs to an INDEX or a STORE; a CSV of paths holds its labels.")
    table = read_table(dataset, "path", labelled=False)
    files = _files_of(dataset, table.rows)
    first = {row.key: row.number for row in reversed(table.rows)}
    _refuse(
        [
            f"{row.where}: {row.key} stands in line {first[row.key]}"
            for row in table.rows
            if first[row.key] < row.number
        ],
        "Keep one of the rows.",
    )
    pseudonyms = open_user_key()
    cases = [_case(row, files[row.number], (), pseudonyms) for row in table.rows]
    if not table.has_split:
        cases = [dataclasses.replace(case, split="") for case in cases]
    texts = tuple(SEPARATOR.join(name for name in row.labels if name != NONE) for row in table.rows)
    return Targets("multilabel", (), tuple(cases), "csv"), texts


def _of_csv(path: Path, kind: str, classes: Sequence[str] | None, ignore_unlabelled: bool) -> tuple[Targets, bool]:
    table = read_table(path, "path")
    rows = _labelled(table.rows, ignore_unlabelled)
    files = _files_of(path, rows)
    if not ignore_unlabelled:
        _refuse_unlisted(path, [path.parent / row.key for row in table.rows])
    if not table.has_patients:
        logger.warning("%s has no column patient: every image counts as a patient of its own.", path.name)
    pseudonyms = open_user_key()
    kind = the_kind(kind, rows, table.label_columns)
    names = class_numbers(_names_of(rows), kind, classes)
    cases = [_case(row, files[row.number], parse_target(row, names, kind), pseudonyms) for row in rows]
    return Targets(kind, names, tuple(cases), "csv"), table.has_split


def _files_of(path: Path, rows: Sequence[Row]) -> dict[int, Path]:
    """Return the file of each row by its number; one that is missing or no image is refused."""
    files = {row.number: path.parent / row.key for row in rows}
    _refuse(
        [f"{row.where}: there is no file {row.key}" for row in rows if not files[row.number].is_file()],
        "Mend the column path (it starts at the CSV's folder), or remove the rows.",
    )
    _refuse_strange({row.where: files[row.number] for row in rows})
    return files


def _case(row: Row, file: Path, target: int | tuple[int, ...], pseudonyms: Pseudonyms) -> Case:
    return Case(
        name=pseudonyms.of("image", row.key),
        target=target,
        patient_key=pseudonyms.of("patient", row.patient or row.key),
        split=_split(row),
        row=row.number,
        where=row.where,
        path=file,
        shuffle_key=row.patient or row.key,
    )


def _of_volumes(
    dataset: Path, labels: Path, kind: str, classes: Sequence[str] | None, ignore_unlabelled: bool
) -> tuple[Targets, bool]:
    table = read_table(labels, "volume_id")
    rows = _labelled(table.rows, ignore_unlabelled)
    known = _volumes(dataset)
    _refuse(
        [f"{row.where}: {dataset.name} has no volume {row.key}" for row in rows if row.key not in known],
        "Look at its refused.parquet or failed.json for the reason, or remove the rows.",
    )
    unlisted = sorted(known.keys() - {row.key for row in table.rows})
    if unlisted and not ignore_unlabelled:
        raise DataError(
            f"{len(unlisted)} of {len(known)} volumes have no row in {labels.name}: {few(unlisted)}. Add them, or "
            "leave them out with --ignore-unlabelled."
        )
    kind = the_kind(kind, rows, table.label_columns)
    names = class_numbers(_names_of(rows), kind, classes)
    cases = [
        Case(
            name=row.key,
            target=parse_target(row, names, kind),
            patient_key=str(known[row.key]["patient_key"]),
            split=_split(row) if table.has_split else str(known[row.key]["split"]),
            row=row.number,
            where=row.where,
            volume_id=row.key,
            shuffle_key=str(known[row.key]["patient_key"]),
        )
        for row in rows
    ]
    return Targets(kind, names, tuple(cases), "volumes"), True


def _of_folders(root: Path, kind: str, classes: Sequence[str] | None) -> tuple[Targets, bool]:
    if kind not in ("auto", "multiclass", "ordinal"):
        raise UsageError("A folder for each class gives each image one class; several labels need a CSV.")
    kind = "multiclass" if kind == "auto" else kind
    parts = _subfolders(root)
    by_split = bool(parts) and all(part.name.lower() in SPLIT_NAMES for part in parts)
    folders: list[tuple[str, Path]] = []
    for part in parts:
        if by_split:
            folders += [(SPLIT_NAMES[part.name.lower()], folder) for folder in _subfolders(part)]
        else:
            folders.append(("train", part))
    if not folders:
        raise DataError(
            f"{root} has no folder for each class. Give a CSV, a .npz, or a folder whose sub-folders are the classes."
        )
    files = [(split, folder.name, file) for split, folder in folders for file in _files(folder)]
    empty = [folder.relative_to(root).as_posix() for _, folder in folders if not _files(folder)]
    if empty:
        raise DataError(f"The class folder {few(empty)} of {root} holds no image. Fill or remove it.")
    _refuse_strange({file.relative_to(root).as_posix(): file for _, _, file in files})
    names = class_numbers([name for _, name, _ in files], kind, classes)
    pseudonyms = open_user_key()
    cases = []
    for number, (split, name, file) in enumerate(sorted(files, key=lambda row: row[2]), start=1):
        text = file.relative_to(root).as_posix()
        cases.append(
            Case(
                name=pseudonyms.of("image", text),
                target=names.index(name),
                patient_key=pseudonyms.of("patient", text),
                split=split,
                row=number,
                where=text,
                path=file,
                shuffle_key=text,
            )
        )
    logger.warning("%s says nothing of patients: every image counts as a patient of its own.", root.name)
    return Targets(kind, names, tuple(cases), "folder"), by_split


def _labelled(rows: Sequence[Row], ignore_unlabelled: bool) -> list[Row]:
    without = [row for row in rows if not row.labels]
    if without and not ignore_unlabelled:
        raise DataError(
            f"{len(without)} rows have no label: {few([row.where for row in without])}. Fill them (several labels: - "
            "for none), remove them, or leave them out with --ignore-unlabelled."
        )
    kept = [row for row in rows if row.labels]
    if not kept:
        raise DataError("No row has a label.")
    return kept


def _split(row: Row) -> str:
    if row.split is None:
        return "train"
    if row.split.lower() not in SPLIT_NAMES:
        raise DataError(
            f"{row.where}: the split is '{row.split}'; it takes train, validation (or val) and test. Fill every row, "
            "or leave the column out to have the patients split."
        )
    return SPLIT_NAMES[row.split.lower()]


def _names_of(rows: Sequence[Row]) -> list[str]:
    names = [name for row in rows for name in row.labels if name != NONE]
    # Columns of 0 and 1 name their labels even where no row carries one.
    return names + [name for row in rows[:1] for name in row.columns]


def _volumes(dataset: Path) -> Mapping[str, Mapping[str, Any]]:
    if (dataset / "volumes.parquet").is_file():
        from medssl.archive.load import open_index

        rows = open_index(dataset).rows().select("volume_id", "patient_key", "split").iter_rows(named=True)
        return {str(row["volume_id"]): row for row in rows}
    from medssl.preprocessing.store import Store

    store = Store.open(dataset)
    return {name: store.row(name) for name in store.ids}


def _is_volumes(dataset: Path) -> bool:
    return any((dataset / name).is_file() for name in ("volumes.parquet", "store.json", "unfinished.json"))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.name.lower() not in _JUNK
    )


def _refuse_unlisted(path: Path, listed: Sequence[Path]) -> None:
    """Refuse images that lie beside those of a CSV and have no row in it."""
    known = {file.resolve() for file in listed}
    endings = {_ending(file) for file in listed}
    folders = {file.parent for file in known} - {path.parent.resolve()}
    unlisted = sorted(
        file.name
        for folder in folders
        for file in _files_directly(folder)
        if _ending(file) in endings and file not in known
    )
    if unlisted:
        raise DataError(
            f"{len(unlisted)} images have no row in {path.name}: {few(unlisted)}. Add them, or leave them out with "
            "--ignore-unlabelled."
        )


def _files_directly(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]


def _ending(file: Path) -> str:
    return ".nii.gz" if file.name.lower().endswith(".nii.gz") else file.suffix.lower()


def _refuse_strange(files: Mapping[str, Path]) -> None:
    """Refuse files whose first bytes are those of no image; whether they decode is found when they are read."""
    found = []
    for where, file in files.items():
        try:
            sniff(file)
        except InputRefused as error:
            found.append(f"{where}: {error.code}, {error.detail}")
        except OSError as error:
            found.append(f"{where}: {error.strerror}")
    _refuse(found, "Mend or remove them.")


def _refuse(problems: Sequence[str], remedy: str) -> None:
    if problems:
        more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise DataError(f"{'; '.join(problems[:NAMED])}{more}. {remedy}")
