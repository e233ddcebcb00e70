"""Defective NIfTI and NRRD files. Each voxel has the value of its place, as in the DICOM series."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from tests.archive.archive_files import patch
from tests.archive.dicom import series as s
from tests.defects.truth import Colours, Defect, Field, Stored

SHAPE = (16, 12, 8)
AFFINE = np.array([[-1.3, 0, 0, 40], [0, -0.9, 0, 50], [0, 0, 2.0, 30], [0, 0, 0, 1]])
ONE = Field((8,))
FRAMES = Field((8,), frames=(0.0, 50.0, 100.0))
NOTHING_IS_RIGHT = Field(slices=())
# Offsets in the header of NIfTI-1
DIM, PIXDIM, VOX_OFFSET, SLOPE, UNITS, CODES, QUATERN, SROWS = 40, 76, 108, 112, 123, 252, 256, 280


def values(affine: np.ndarray = AFFINE, add: float = 0.0) -> np.ndarray:
    """Return the true values on a grid. Shape: (x, y, z)."""
    places = np.stack(np.indices(SHAPE), -1) @ affine[:3, :3].T + affine[:3, 3]
    return (s.field(places) + add).astype(np.float32)


def nifti(folder: Path, array: np.ndarray | None = None, affine: np.ndarray = AFFINE, name: str = "a.nii") -> Path:
    """Write a NIfTI whose qform and sform agree."""
    folder.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(values(affine) if array is None else array, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nib.save(image, folder / name)
    return folder / name


def patched(*changes: tuple[int, bytes], packed: bool = False) -> Callable[[Path], object]:
    """Return a writer of a NIfTI with bytes of its header overwritten."""

    def write(folder: Path) -> None:
        path = nifti(folder)
        for offset, content in changes:
            patch(path, offset, content)
        if packed:
            (folder / "a.nii.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()

    return write


def _floats(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)


def _shorts(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}h", *numbers)


COLOURS = np.random.default_rng(0).integers(0, 256, (*SHAPE, 3), np.uint8)


def _colour(folder: Path) -> None:
    parts = [("R", "u1"), ("G", "u1"), ("B", "u1")]
    nifti(folder, np.ascontiguousarray(COLOURS).view(parts)[..., 0])


def _times(folder: Path) -> None:
    nifti(folder, np.stack([values(add=add) for add in FRAMES.frames], -1))


FIVE = np.random.default_rng(1).normal(size=(4, 4, 4, 2, 2)).astype(np.float32)
COMPLEX = (values() + 1j * values(add=5)).astype(np.complex64)


def _five_dimensions(folder: Path) -> None:
    nifti(folder, FIVE)


def _not_finite(folder: Path) -> None:
    array = values()
    array[:, :, :6] = np.nan
    nifti(folder, array)


def _cut(folder: Path) -> None:
    path = nifti(folder, name="a.nii.gz")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _other_forms(folder: Path) -> None:
    image = nib.load(nifti(folder))
    image.set_qform(AFFINE @ np.diag([1, -1, 1, 1]), 1)
    nib.save(nib.Nifti1Image(values(), None, image.header), folder / "a.nii")


def nrrd(space: str, signs: tuple[int, int, int] = (1, 1, 1), **fields: str) -> Callable[[Path], object]:
    """Return a writer of an NRRD in a named space; `signs` turn RAS into it."""

    def write(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        turned = np.diag([*signs, 1.0]) @ AFFINE
        columns = " ".join("({:g},{:g},{:g})".format(*turned[:3, axis]) for axis in range(3))
        header = {
            "type": "float",
            "dimension": "3",
            "space": space,
            "sizes": " ".join(map(str, SHAPE)),
            "space directions": columns,
            "kinds": "domain domain domain",
            "endian": "little",
            "encoding": "raw",
            "space origin": "({:g},{:g},{:g})".format(*turned[:3, 3]),
            **fields,
        }
        text = "NRRD0005\n" + "".join(f"{name}: {value}\n" for name, value in header.items() if value) + "\n"
        (folder / "a.nrrd").write_bytes(text.encode() + values().tobytes(order="F"))

    return write


SHEARED = AFFINE.copy()
SHEARED[0, 1] = 0.5


def _sheared(folder: Path) -> None:
    patch(nifti(folder, values(SHEARED), SHEARED), CODES, _shorts(0))


def _sheared_nrrd(folder: Path) -> None:
    nrrd("RAS", **{"space directions": "(-1.3,0,0) (0.5,-0.9,0) (0,0,2)"})(folder)
    content = (folder / "a.nrrd").read_bytes()
    (folder / "a.nrrd").write_bytes(content[: content.index(b"\n\n") + 2] + values(SHEARED).tobytes(order="F"))


IMAGES = [
    Defect("NIfTI, clean", lambda folder: nifti(folder), truth=ONE, kind="image"),
    Defect("NIfTI, qform broken", patched((QUATERN, _floats(9, 9, 9))), truth=ONE, kind="image"),
    Defect("NIfTI, sform broken", patched((SROWS, bytes(48))), truth=ONE, kind="image", flags=("qform_used",)),
    Defect(
        "NIfTI, sform and qform broken",
        patched((SROWS, bytes(48)), (QUATERN, _floats(np.nan, 0, 0))),
        "affine_invalid",
        truth=NOTHING_IS_RIGHT,
        kind="image",
    ),
    Defect("NIfTI, qform and sform differ", _other_forms, truth=ONE, kind="image", flags=("qform_sform_differ",)),
    Defect("NIfTI, sheared sform alone", _sheared, "affine_sheared", "right", Field((8,), tolerance=0.5), "image"),
    Defect(
        "NIfTI, pixdim nan, no matrix",
        patched((CODES, bytes(4)), (PIXDIM + 8, _floats(np.nan))),
        "spacing_invalid",
        truth=NOTHING_IS_RIGHT,
        kind="image",
    ),
    Defect(
        "NIfTI, pixdim zero, sform good",
        patched((PIXDIM + 4, _floats(0))),
        "spacing_invalid",
        "right",
        ONE,
        "image",
        flags=("pixdim_differs",),
    ),
    Defect(
        "NIfTI, slope infinite",
        patched((SLOPE, _floats(np.inf, 0))),
        "scaling_invalid",
        truth=NOTHING_IS_RIGHT,
        kind="image",
    ),
    Defect(
        "NIfTI, metres",
        patched(
            (UNITS, b"\x01"),
            (PIXDIM + 4, _floats(1.3e-3, 0.9e-3, 2e-3)),
            (SROWS, _floats(*(AFFINE[:3] * 1e-3).ravel())),
            (QUATERN + 12, _floats(0.04, 0.05, 0.03)),
        ),
        truth=ONE,
        kind="image",
        flags=("units_converted",),
    ),
    Defect("NIfTI, colour", _colour, truth=Colours(COLOURS.transpose(2, 1, 0, 3)), kind="image"),
    Defect("NIfTI, 4D", _times, truth=FRAMES, kind="image"),
    Defect("NIfTI, 5D", _five_dimensions, "dimensions_unsupported", truth=Stored(FIVE), kind="image"),
    Defect("NIfTI, most voxels nan", _not_finite, "not_finite", truth=NOTHING_IS_RIGHT, kind="image"),
    Defect(
        "NIfTI, 32767 x 32767 x 32767",
        patched((DIM, _shorts(3, 32767, 32767, 32767))),
        "too_large",
        truth=NOTHING_IS_RIGHT,
        kind="image",
    ),
    Defect(
        "NIfTI, gzip, larger than its voxels",
        patched((DIM, _shorts(3, 700, 700, 700)), packed=True),
        "truncated",
        truth=NOTHING_IS_RIGHT,
        kind="image",
    ),
    Defect(
        "NIfTI, voxels at -1e9",
        patched((VOX_OFFSET, _floats(-1e9))),
        "header_invalid",
        truth=NOTHING_IS_RIGHT,
        kind="image",
    ),
    Defect(
        "NIfTI, complex numbers",
        lambda folder: nifti(folder, COMPLEX),
        "dtype_unsupported",
        truth=Stored(COMPLEX),
        kind="image",
    ),
    Defect("NIfTI, gzip cut off", _cut, "truncated", truth=NOTHING_IS_RIGHT, kind="image"),
    Defect("NRRD, left-posterior-superior", nrrd("left-posterior-superior", (-1, -1, 1)), truth=ONE, kind="image"),
    Defect("NRRD, RAS", nrrd("RAS"), truth=ONE, kind="image"),
    Defect("NRRD, left-anterior-superior", nrrd("left-anterior-superior", (-1, 1, 1)), truth=ONE, kind="image"),
    Defect(
        "NRRD, no named space",
        nrrd("scanner-xyz", (-1, -1, 1)),
        truth=ONE,
        kind="image",
        flags=("orientation_unknown",),
    ),
    Defect(
        "NRRD, metres",
        nrrd(
            "RAS",
            **{
                "space directions": "(-0.0013,0,0) (0,-0.0009,0) (0,0,0.002)",
                "space origin": "(0.04,0.05,0.03)",
                "space units": '"m" "m" "m"',
            },
        ),
        truth=ONE,
        kind="image",
        flags=("units_converted",),
    ),
    Defect("NRRD, sheared", _sheared_nrrd, "affine_sheared", "right", Field((8,), tolerance=0.5), "image"),
]
