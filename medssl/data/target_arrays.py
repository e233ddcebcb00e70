"""Targets of a MedMNIST .npz: train_images, train_labels, val_images and so on."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.data.targets import SPLIT_NAMES, Case, Targets, few
from medssl.errors import DataError, UsageError


def read_npz(path: Path, kind: str, classes: Sequence[str] | None) -> tuple[Targets, bool]:
    """Return the targets of a .npz, and whether it is split.

    Raises:
        DataError: If it is damaged, holds pickled objects, or its arrays do not fit together.
        UsageError: If kind or classes do not fit its labels.
    """
    found: list[tuple[str, int, NDArray[Any]]] = []
    with opened_npz(path) as content:
        prefixes = [prefix for prefix in ("train", "val", "test") if f"{prefix}_images" in content]
        if not prefixes:
            raise DataError(
                f"{path} holds {few(sorted(content))}; MedMNIST's files hold train_images, train_labels, val_images "
                "and so on."
            )
        for prefix in prefixes:
            if f"{prefix}_labels" not in content:
                raise DataError(f"{path}: there are {prefix}_images and no {prefix}_labels.")
            values = np.asarray(content[f"{prefix}_labels"])
            count = npz_shape(path, f"{prefix}_images")[0]
            if len(values) != count:
                raise DataError(f"{path}: {count} {prefix}_images, {len(values)} {prefix}_labels.")
            values = values.reshape(count, -1)
            if values.dtype.kind not in "iub":
                raise DataError(f"{path}: {prefix}_labels are {values.dtype}; they must be whole numbers.")
            found += [(prefix, number, row) for number, row in enumerate(values)]
    width = {len(row) for _, _, row in found}
    if len(width) != 1:
        raise DataError(f"{path}: the parts have labels of different lengths {sorted(width)}.")
    several = width.pop() > 1
    if kind == "auto":
        kind = "multilabel" if several else "multiclass"
    if several != (kind == "multilabel"):
        raise UsageError(f"{path.name} has {'several labels' if several else 'one label'} an image: not {kind}.")
    if several:
        count = len(found[0][2])
        names = tuple(classes) if classes is not None else tuple(str(number) for number in range(count))
        if len(names) != count:
            raise UsageError(f"--classes names {len(names)} labels, {path.name} has {count}.")
    else:
        largest = max(int(row[0]) for _, _, row in found)
        names = tuple(classes) if classes is not None else tuple(str(number) for number in range(largest + 1))
    cases = []
    for position, (prefix, number, row) in enumerate(found, start=1):
        where = f"{path.name} {prefix}_labels[{number}]"
        least, most = int(row.min()), int(row.max())
        if least < 0 or most >= (2 if several else len(names)):
            raise DataError(f"{where}: the label {row.tolist()} is none of 0 to {1 if several else len(names) - 1}.")
        name = f"{prefix}-{number:06d}"
        cases.append(
            Case(
                name=name,
                target=tuple(int(value) for value in row) if several else int(row[0]),
                patient_key=name,
                split=SPLIT_NAMES[prefix],
                row=position,
                where=where,
                array=(f"{prefix}_images", number),
                shuffle_key=name,
            )
        )
    return Targets(kind, names, tuple(cases), "npz"), len(prefixes) > 1


def read_npz_images(path: Path) -> Targets:
    """Return the images of a .npz without a class; its labels, if it has some, are not looked at.

    Raises:
        DataError: If it is damaged, holds pickled objects or no images.
    """
    with opened_npz(path) as content:
        prefixes = [prefix for prefix in ("train", "val", "test") if f"{prefix}_images" in content]
    if not prefixes:
        raise DataError(f"{path} holds no train_images, val_images or test_images.")
    cases: list[Case] = []
    for prefix in prefixes:
        for number in range(npz_shape(path, f"{prefix}_images")[0]):
            name, where = f"{prefix}-{number:06d}", f"{path.name} {prefix}_images[{number}]"
            cases.append(
                Case(name, (), name, SPLIT_NAMES[prefix], len(cases) + 1, where, array=(f"{prefix}_images", number))
            )
    return Targets("multiclass", (), tuple(cases), "npz")


@contextmanager
def opened_npz(path: Path) -> Iterator[Any]:
    """Open a .npz without ever running code that it may hold.

    Raises:
        DataError: If it is damaged, or holds pickled objects.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            yield content
    except (
        ValueError,
        OSError,
        EOFError,
        KeyError,
        zipfile.BadZipFile,
        zlib.error,
        AttributeError,
        TypeError,
    ) as error:
        if "pickle" in str(error).lower():
            raise DataError(
                f"{path} holds pickled objects, which could run code: it is refused. Ask for arrays of numbers, saved "
                "with numpy.savez."
            ) from error
        raise DataError(f"{path} cannot be read as .npz ({error}). Get a fresh copy of the file.") from error


def npz_shape(path: Path, name: str) -> tuple[int, ...]:
    """Return the shape of an array of a .npz from its header alone.

    Raises:
        DataError: If it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as handle:
            version = np.lib.format.read_magic(handle)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(handle)
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: {name} cannot be read ({error}). Get a fresh copy of the file.") from error
    if dtype.hasobject:
        raise DataError(
            f"{path}: {name} holds pickled objects, which could run code: it is refused. Ask for arrays of numbers, "
            "saved with numpy.savez."
        )
    if len(shape) not in (3, 4, 5) or 0 in shape:
        raise DataError(f"{path}: {name} has shape {shape}; images are (N, Y, X), (N, Y, X, 3) or (N, Z, Y, X).")
    return tuple(int(edge) for edge in shape)
