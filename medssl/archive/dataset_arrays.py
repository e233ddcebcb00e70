"""A MedMNIST .npz: checked without ever reading a pickled object."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class ArraysTask:
    """What an .npz shall hold.

    Attributes:
        path: The file.
        dimensions: 2 or 3.
        colours: 1 or 3.
        sizes: Edge lengths that are published.
        classes: Number of classes.
        multilabel: Whether a label is one bit for each class.
        samples: Number of images of each split.
    """

    path: str
    dimensions: int
    colours: int
    sizes: tuple[int, ...]
    classes: int
    multilabel: bool
    samples: dict[str, int]


def check_arrays(task: ArraysTask) -> list[tuple[str, str, bool]]:
    """Return kind, detail and weight of each problem; True if the file cannot be used for it."""
    try:
        with np.load(Path(task.path), allow_pickle=False) as archive:
            names = set(archive.files)
            problems: list[tuple[str, str, bool]] = []
            for split in SPLITS:
                problems += _check_split(task, archive, names, split)
    except ValueError as error:
        if "allow_pickle" in str(error) or "pickle" in str(error).lower():
            return [("npz_pickled", "it holds pickled objects, which can run any program when they are read.", True)]
        return [("npz_damaged", "an array cannot be read.", True)]
    except (OSError, EOFError, zipfile.BadZipFile, KeyError):
        return [("npz_damaged", "it is no whole .npz.", True)]
    return problems


def _check_split(task: ArraysTask, archive: Any, names: set[str], split: str) -> list[tuple[str, str, bool]]:
    pair = [f"{split}_images", f"{split}_labels"]
    missing = [name for name in pair if name not in names]
    if len(missing) == 2 and split == "test":
        return [("npz_missing", f"it has no {missing[0]}: the test part is not in it.", False)]
    if missing:
        return [("npz_missing", f"it has no {' and no '.join(missing)}.", True)]
    images, labels = archive[pair[0]], archive[pair[1]]
    problems: list[tuple[str, str, bool]] = []
    shape = images.shape[1:]
    grid = shape[: task.dimensions]
    if shape[task.dimensions :] != ((3,) if task.colours == 3 else ()) or len(set(grid)) != 1:
        expected = "(N" + ", size" * task.dimensions + (", 3)" if task.colours == 3 else ")")
        problems.append(("npz_shape", f"{pair[0]} has the shape {images.shape}, expected {expected}.", True))
    elif grid[0] not in task.sizes:
        problems.append(("npz_shape", f"{pair[0]} are {grid[0]} wide; {task.sizes} are published.", False))
    if images.dtype != np.uint8:
        problems.append(("npz_type", f"{pair[0]} are {images.dtype}, expected uint8.", True))
    columns = task.classes if task.multilabel else 1
    if labels.dtype.kind not in "iu" or labels.shape != (len(images), columns):
        problems.append(
            (
                "npz_labels",
                f"{pair[1]} are {labels.dtype} {labels.shape}, expected integers ({len(images)}, {columns}).",
                True,
            )
        )
    else:
        highest = 1 if task.multilabel else task.classes - 1
        wrong = sorted({int(value) for value in np.unique(labels)} - set(range(highest + 1)))
        if wrong:
            problems.append(("label_value", f"{pair[1]} has values {wrong[:10]}, expected 0 to {highest}.", True))
    if len(images) != task.samples[split]:
        problems.append(("count", f"{len(images)} images in {pair[0]}, the release has {task.samples[split]}.", False))
    return problems
