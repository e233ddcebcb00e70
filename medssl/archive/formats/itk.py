"""NRRD and MetaImage: our own look at the header first, then SimpleITK for the voxels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from medssl.archive.formats.common import (
    Geometry,
    Layout,
    check_affine,
    check_bytes,
    check_dimensions,
    check_stored,
    describe_affine,
    finish,
)
from medssl.archive.volume import Volume
from medssl.errors import InputRefused

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: LPS of ITK to RAS of nibabel.
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_HEADER_LIMIT = 2**20


@dataclass(frozen=True)
class TextHeader:
    """What NRRD and MetaImage have in common.

    Attributes:
        sizes: Spatial sizes (x, y[, z]).
        frames: Sizes of the other axes together.
        itemsize: Bytes of a stored number.
        affine: Maps (x, y, z) to RAS mm. Shape: (4, 4).
        flags: What was found.
        colour: Whether the other axis is red, green, blue (and opacity).
        compressed: Whether the voxels are deflated; `text` means numbers written out.
        files: Where the voxels are, absolute, each with the bytes before them.
        label: Whether the header says that it is a segmentation.
        reader: SimpleITK's name for the format.
    """

    sizes: tuple[int, ...]
    frames: int
    itemsize: int
    affine: NDArray[np.float64]
    flags: tuple[str, ...]
    colour: bool
    compressed: Literal["raw", "deflated", "text"]
    files: tuple[tuple[Path, int], ...]
    label: bool
    reader: str

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Return (C, Z, Y, X)."""
        x, y, z = (*self.sizes, 1, 1)[:3]
        return (3 if self.colour else self.frames), z, y, x


def layout_of(header: TextHeader, path: Path) -> Layout:
    """Check a header against the files that hold the voxels.

    Raises:
        InputRefused: If they are too large or too short.
    """
    check_dimensions((*header.sizes, header.frames))
    if len(header.sizes) not in (2, 3):
        raise InputRefused("dimensions_unsupported", f"{len(header.sizes)} spatial dimensions")
    fault = check_affine(header.affine)
    if fault not in ("", "affine_sheared"):  # that one can be repaired
        raise InputRefused(fault, describe_affine(header.affine))
    needed = check_bytes((header.frames, *header.sizes), header.itemsize)
    held = sum(max(0, _size(file) - offset) for file, offset in header.files)
    if header.compressed == "text":
        # A digit and a blank each, at least.
        check_stored(2 * (needed // header.itemsize) - 1, held, deflated=False)
    else:
        check_stored(needed, held, deflated=header.compressed == "deflated")
    companions = tuple(file for file, _ in header.files if file != path)
    return Layout(header.shape, companions, "label_map" if header.label else "")


def read_image(path: Path, header: TextHeader, geometry: Geometry) -> Volume:
    """Read the voxels with SimpleITK and put them on the grid of the header.

    Raises:
        InputRefused: If SimpleITK fails or its sizes are not those of the header.
    """
    layout_of(header, path)
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO(header.reader)  # the name's ending says nothing here
    reader.SetFileName(str(path))
    try:
        image = reader.Execute()
    except RuntimeError as error:
        text = str(error).lower()
        code = "decode_memory" if "alloc" in text or "memory" in text else "decode_failed"
        raise InputRefused(code, f"SimpleITK could not read the voxels ({header.reader})") from error
    pixels = SimpleITK.GetArrayFromImage(image)
    components = image.GetNumberOfComponentsPerPixel()
    if components > 1:
        pixels = np.moveaxis(pixels, -1, 0)
    c, z, y, x = header.shape
    if pixels.size != header.frames * z * y * x or pixels.shape[-1] != x:
        raise InputRefused("header_invalid", f"SimpleITK reads {pixels.shape}, the header says {header.shape}")
    array = pixels.reshape(header.frames, z, y, x)[:c]
    flags = [*header.flags, *(["alpha_dropped"] if header.colour and header.frames == 4 else [])]
    channels: Any = "colour" if header.colour else "scalar" if c == 1 else "frames"
    return finish(array, header.affine, geometry=geometry, channels=channels, flags=flags)


def inside(name: str, header: Path, root: Path) -> Path:
    """Return the data file that a header names, if it lies in the source folder.

    Args:
        name: As the header writes it, relative to the header.
        header: The header's path.
        root: The source folder.

    Raises:
        InputRefused: If it is missing or outside.
    """
    if "\0" in name or not name:
        raise InputRefused("header_invalid", "the name of the data file is empty or no name")
    target = header.parent / name
    resolved = target.resolve()
    if not resolved.is_relative_to(root.resolve()):
        raise InputRefused("companion_outside", "the header names a data file outside the source folder")
    if not resolved.is_file():
        raise InputRefused("companion_missing", "the data file that the header names is not there")
    return target


def expand(pattern: str, first: int, last: int, step: int) -> list[str]:
    """Return the names that a printf pattern with a range stands for.

    Raises:
        InputRefused: If it is no such pattern.
    """
    try:
        if step == 0 or abs(last - first) // abs(step) > 100_000:
            raise ValueError
        numbers = range(first, last + (1 if step > 0 else -1), step)
        return [pattern % number for number in numbers]
    except (ValueError, TypeError) as error:
        raise InputRefused("header_invalid", "the pattern of data files cannot be expanded") from error


def head_of(path: Path) -> bytes:
    """Return the first bytes of a file, enough for any text header."""
    with path.open("rb") as handle:
        return handle.read(_HEADER_LIMIT)


def numbers(text: str, count: int | None = None) -> list[float]:
    """Return the numbers in a text.

    Raises:
        InputRefused: If there is something else, or another count.
    """
    try:
        values = [float(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise InputRefused("header_invalid", "a number of the header is none") from error
    if count is not None and len(values) != count:
        raise InputRefused("header_invalid", f"{len(values)} numbers where {count} are due")
    return values


def integers(text: str, count: int | None = None) -> list[int]:
    """Return the whole numbers in a text.

    Raises:
        InputRefused: If there is something else, or another count.
    """
    values = numbers(text, count)
    if any(value != value or abs(value) > 2**62 or value != int(value) for value in values):
        raise InputRefused("header_invalid", "a whole number of the header is none")
    return [int(value) for value in values]


def affine_of(columns: Sequence[Sequence[float]], origin: Sequence[float]) -> NDArray[np.float64]:
    """Return the affine, in the space of its input, of a grid of two or three axes.

    Args:
        columns: Step in mm along x, y[, z], of two or three numbers each.
        origin: Centre of the first voxel.
    """
    size = len(columns)
    affine = np.eye(4)
    affine[:size, :size] = np.array(columns, np.float64).T
    affine[:size, 3] = origin
    return affine


def _size(path: Path) -> int:
    return path.stat().st_size
