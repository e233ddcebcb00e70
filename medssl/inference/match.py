"""Find points of one volume in another: the Python twin of `medssl match`."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from medssl.archive.load import find_series, read_volume
from medssl.archive.volume import UNKNOWN_MODALITY
from medssl.archive.volume import Volume as Decoded
from medssl.errors import DataError, UsageError
from medssl.files import write_json
from medssl.inference.model import resolve_device
from medssl.inference.volumes import Volume, volumes_of_arrays
from medssl.inference.voxel_search import VoxelModel, embed_points, load_voxel_model, search
from medssl.preprocessing.case import prepare
from medssl.preprocessing.survey import plan_of
from medssl.transfer.images import INPUT

Units = Literal["mm", "voxel"]
Point = tuple[float, float, float]
NOTICE = "Research use only. Not a medical device: not for diagnosis or treatment."


@dataclass(frozen=True)
class Match:
    """A point and where it was found.

    Args:
        name: Of the point.
        source_mm: Where it lies in the first volume's world: RAS mm, as the affine of NIfTI.
        target_mm: Where it was found in the second one's.
        target_voxel: The same as voxel (x, y, z) of the second volume as stored.
        similarity: Mean cosine of the embeddings, at most 1.
    """

    name: str
    source_mm: Point
    target_mm: Point
    target_voxel: tuple[int, int, int]
    similarity: float


@dataclass(frozen=True)
class Matches:
    """What was found.

    Args:
        rows: A row for each point, in the order in which they were given.
    """

    rows: list[Match] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return what a script needs."""
        return {"notice": NOTICE, "points": [vars(row) for row in self.rows]}

    def __rich__(self) -> Any:
        """Return a table for the terminal."""
        from rich.table import Table

        table = Table(title="Points found", caption=NOTICE)
        for name in ("point", "from x, y, z in mm", "found x, y, z in mm", "voxel x, y, z", "similarity"):
            table.add_column(name, justify="left" if name == "point" else "right")
        for row in self.rows:
            source, target = (", ".join(f"{at:.1f}" for at in place) for place in (row.source_mm, row.target_mm))
            voxel = ", ".join(map(str, row.target_voxel))
            table.add_row(row.name, source, target, voxel, f"{row.similarity:.3f}")
        return table


@dataclass(frozen=True)
class Placed:
    """A volume as the model is shown it, and how its grid lies.

    Args:
        volume: Oriented, normalised and resampled as those of the pretraining.
        affine: From its voxels (x, y, z) to RAS mm. Shape: (4, 4).
        stored_affine: The same of the volume as stored. Shape: (4, 4).
        stored_shape: Its voxels along (x, y, z) as stored.
    """

    volume: Volume
    affine: NDArray[np.float64]
    stored_affine: NDArray[np.float64]
    stored_shape: tuple[int, int, int]

    def to_voxel(self, mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return voxels (z, y, x) of `volume` at places in mm. Shape: (N, 3) for (N, 3)."""
        return _moved(_inverse(self.affine), mm)[:, ::-1]

    def to_mm(self, voxels: NDArray[Any]) -> NDArray[np.float64]:
        """Return places in mm of voxels (z, y, x) of `volume`. Shape: (N, 3) for (N, 3)."""
        return _moved(self.affine, np.asarray(voxels, np.float64)[:, ::-1])


def match(
    model: Path,
    source: Path,
    target: Path,
    points: Sequence[Sequence[float]] | Path,
    *,
    units: Units = "mm",
    modality: str | None = None,
    out: Path | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> Matches:
    """Find points of one volume in another.

    Both volumes are oriented, normalised and resampled as those that the model was pretrained on. A point is described
    by what the model sees around it; the place of the second volume that looks most like it is found, whether the
    anatomy is there or not: look at the similarity.

    Args:
        model: A RUN of voxel contrast, or one of its checkpoints.
        source: Volume in which the points lie: a file, or a folder with one DICOM series.
        target: Volume in which they are to be found.
        points: Rows (x, y, z), or a CSV with the columns x, y, z and perhaps name.
        units: `mm` in the source's world (RAS, as the affine of NIfTI), or `voxel` of it as stored, from 0.
        modality: Of both volumes (MR, CT, ...); by default what the files say, else what the model was pretrained on.
        out: JSON file to write as well.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        quiet: Show no progress.

    Raises:
        UsageError: If a point lies outside, or the modality, channels or dimensions do not fit the model.
        CheckpointError: If the model has no head that embeds points.
        InputRefused: If a volume cannot be used.
    """
    names, places = _read_points(points) if isinstance(points, Path) else _given(points)
    if units not in ("mm", "voxel"):
        raise UsageError(f"--units takes mm or voxel, got '{units}'.")
    loaded = load_voxel_model(model, device=resolve_device(device))
    first, second = (place_volume(loaded, path, modality) for path in (source, target))
    mm = _moved(first.stored_affine, places) if units == "voxel" else places
    found = match_points(loaded, first, second, mm, names=names, quiet=quiet)
    if out is not None:
        write_json(out, found.to_json())
    return found


def match_points(
    model: VoxelModel,
    source: Placed,
    target: Placed,
    mm: NDArray[np.float64],
    *,
    names: Sequence[str] | None = None,
    quiet: bool = True,
) -> Matches:
    """Find points of a volume that is in memory in another one; see `match`.

    Args:
        model: What `load_voxel_model` returned.
        source: Where the points lie.
        target: Where they are to be found.
        mm: Points in the source's world. Shape: (N, 3).
        names: Of the points; numbers from 1 by default.
        quiet: Show no progress.

    Raises:
        UsageError: If a point lies outside of the source or of what is left of it without the air around.
    """
    names = list(names) if names is not None else [str(number + 1) for number in range(len(mm))]
    voxels = source.to_voxel(mm)
    _check_inside(source, names, mm, voxels)
    wanted = embed_points(model, source.volume, torch.from_numpy(voxels.copy()))
    found, similarity = search(model, target.volume, wanted, quiet=quiet)
    places = target.to_mm(found.numpy())
    stored = _moved(_inverse(target.stored_affine), places).round()
    stored = np.clip(stored, 0, np.array(target.stored_shape) - 1).astype(int)
    rows = [
        Match(
            name=names[row],
            source_mm=_three(mm[row]),
            target_mm=_three(places[row]),
            target_voxel=(int(stored[row, 0]), int(stored[row, 1]), int(stored[row, 2])),
            similarity=round(float(similarity[row]), 6),
        )
        for row in range(len(mm))
    ]
    return Matches(rows)


def place_volume(model: VoxelModel, source: Path | Decoded, modality: str | None = None) -> Placed:
    """Bring a volume into the form of those that a model was pretrained on.

    Args:
        model: What `load_voxel_model` returned.
        source: A file, a folder with one DICOM series, or a volume that is decoded already.
        modality: Of the volume, in place of what it says.

    Raises:
        UsageError: If the modality or the dimensions do not fit, or it is not known how the model's volumes were made.
        DataError: If a folder holds more or less than one volume.
        InputRefused: If the volume cannot be used.
    """
    name = "the volume" if isinstance(source, Decoded) else source.name
    missing = [key for key in INPUT if key not in model.preprocessing]
    if missing:
        raise UsageError(
            f"The model was pretrained on a store that does not say how its volumes were made ({', '.join(missing)} is "
            "not known), so that no new volume can be made alike. Pretrain on a store of `medssl preprocess`."
        )
    decoded = source if isinstance(source, Decoded) else _decode(source)
    told = modality or decoded.modality
    if told == UNKNOWN_MODALITY and len(model.modalities) == 1:
        told = model.modalities[0]
    if model.modalities and told not in model.modalities:
        raise UsageError(
            f"{name} is {told}; the model was pretrained on {', '.join(model.modalities)}. Use a volume of that kind, "
            "or name the true one with --modality if the file is wrong."
        )
    prepared = prepare(decoded, plan_of(model.preprocessing), name=name, modalities=(told,))
    if prepared.array.shape[1] == 1 and model.frozen.dimensions == 3:
        raise UsageError(f"{name} is a single slice; the model is 3D. Use a model that was pretrained on slices.")
    (volume,) = volumes_of_arrays(
        [prepared.array], [name], background=float(prepared.facts["background"]), modality=told
    )
    x, y, z = reversed(decoded.shape[1:])
    return Placed(volume, np.asarray(prepared.facts["affine"], np.float64), decoded.affine, (x, y, z))


def _decode(path: Path) -> Decoded:
    if not path.is_dir():
        return read_volume(path)
    series = find_series(path).series
    if len(series) != 1:
        raise DataError(f"{path} holds {len(series)} volumes where one is needed: name one file or series' folder.")
    return series[0].load()


def _check_inside(source: Placed, names: Sequence[str], mm: NDArray[np.float64], voxels: NDArray[np.float64]) -> None:
    whole = np.array(source.stored_shape)
    stored = _moved(_inverse(source.stored_affine), mm)
    kept = np.array(source.volume.shape[1:])
    for row, name in enumerate(names):
        place = ", ".join(f"{at:g}" for at in mm[row])
        if not np.isfinite(mm[row]).all() or (stored[row] < -0.5).any() or (stored[row] > whole - 0.5).any():
            corners = _moved(source.stored_affine, np.array([np.zeros(3), whole - 1.0]))
            ends = " to ".join(f"({', '.join(f'{at:.1f}' for at in corner)})" for corner in corners)
            raise UsageError(
                f"Point {name} ({place} mm) lies outside of {source.volume.id}, which reaches from {ends} mm. Points "
                "are x, y, z in RAS mm; --units voxel takes voxels as stored."
            )
        # The crop to the content ends on whole voxels of the source: half a voxel of either grid is rounding.
        if (voxels[row] < -1).any() or (voxels[row] > kept).any():
            raise UsageError(
                f"Point {name} ({place} mm) lies in the empty surroundings of {source.volume.id}, of which a model is "
                "shown nothing. Choose a point on the anatomy."
            )


def _given(points: Sequence[Sequence[float]]) -> tuple[list[str], NDArray[np.float64]]:
    rows = [list(point) for point in points]
    if not rows or any(len(row) != 3 for row in rows):
        raise UsageError("A point is three numbers x, y, z; give at least one.")
    array = np.asarray(rows, np.float64)
    return [str(number + 1) for number in range(len(array))], array


def _read_points(path: Path) -> tuple[list[str], NDArray[np.float64]]:
    """Read a CSV with the columns x, y, z and perhaps name.

    Raises:
        DataError: If a column is missing or a value is no number; the row is named.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            rows = list(csv.DictReader(handle))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV ({type(error).__name__}). Check the path.") from error
    names, places = [], []
    for number, row in enumerate(rows, start=2):
        try:
            places.append([float(row[axis]) for axis in ("x", "y", "z")])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}, line {number}: a point needs the columns x, y and z with a number in each, and may have name."
            ) from error
        names.append(row.get("name") or str(number - 1))
    if not places:
        raise DataError(f"{path} holds no point. Write a head x,y,z and a line for each point.")
    return names, np.asarray(places, np.float64)


def _inverse(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.linalg.inv(affine).astype(np.float64)


def _moved(affine: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    moved: NDArray[np.float64] = points @ affine[:3, :3].T + affine[:3, 3]
    return moved


def _three(values: NDArray[np.float64]) -> Point:
    x, y, z = (round(float(value), 4) for value in values)
    return x, y, z
