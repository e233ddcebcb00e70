"""Which reader is right, which refuses, which is silently wrong, on the same defective inputs in one run?

    pip install -e '.[dev,peers]'
    python pipelines/benchmarks/archive_peers.py [--data DATA] [--only CASE]

The synthetic cases are those of `tests/defects`: every voxel is a linear function of its place in the patient, so a
volume is right if each voxel has the value of the point to which its affine maps it. Real series are compared with the
expected NIfTI where there is one (made by dicom2nifti's authors: that peer has a home advantage), elsewhere with their
own files: every stored pixel must be found at its place. `right` also needs all volumes of the case; an exception or no
output is `refused`; anything else is `wrong`: a volume whose voxels lie where they do not belong, or that is not there,
without an error. `-`: the reader does not read this format. Each reader is called the way its documentation does for a
folder. Where dcm2niix writes a corrected volume (`_Eq`, `_Tilt`) beside the raw one, the corrected one is judged. What
a reader prints is no refusal, and what only ours tells of a volume (its flags) counts for nothing here.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).parent)]

from _archive_cases import Real, files_of, real_cases  # noqa: E402
from _common import print_table, write_results  # noqa: E402

from tests.defects import ours  # noqa: E402
from tests.defects.corpus import CORPUS  # noqa: E402
from tests.defects.truth import Defect, Found  # noqa: E402

#: A folder of DICOM files, or the one image file in it.
Reader = Callable[[Path, str], "list[Found]"]


class NotRead(Exception):
    """The reader does not claim to read the format."""


def read_ours(geometry: str) -> Reader:
    """Return medssl's reader under one policy."""

    def read(folder: Path, kind: str) -> list[Found]:
        return [ours.as_found(volume) for volume in ours.read(folder, kind, geometry)]

    return read


def read_simpleitk(folder: Path, kind: str) -> list[Found]:
    """Read an image file, or every series that GDCM finds in each folder."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    if kind == "image":
        return [_of_simpleitk(SimpleITK.ReadImage(str(ours.image_file(folder))))]
    result = []
    for place in sorted({path.parent for path in files_of(folder)}):
        for series in SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(place)) or ("",):
            reader = SimpleITK.ImageSeriesReader()
            reader.SetFileNames(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(place), series))
            result.append(_of_simpleitk(reader.Execute()))
    return result


def _of_simpleitk(image: Any) -> Found:
    import SimpleITK

    dimension = image.GetDimension()
    if dimension == 4 and image.GetSize()[3] == 1:
        image, dimension = image[..., 0], 3
    affine = np.eye(4)
    direction = np.array(image.GetDirection()).reshape(dimension, dimension)[:3, :3]
    affine[: len(direction), : len(direction)] = direction * np.array(image.GetSpacing()[: len(direction)])
    affine[: len(direction), 3] = image.GetOrigin()[: len(direction)]
    affine[:2] *= -1
    array = SimpleITK.GetArrayFromImage(image)
    colour = image.GetNumberOfComponentsPerPixel() > 1
    space = tuple(range(array.ndim - 1)) if colour else tuple(range(array.ndim))
    array = array.transpose(*space[::-1], *((array.ndim - 1,) if colour else ()))
    return array, affine


def read_monai(folder: Path, kind: str) -> list[Found]:
    """Read a folder or an image file, the way MONAI's documentation shows."""
    from monai.data import PydicomReader
    from monai.transforms import LoadImage

    if kind == "image":
        image = LoadImage(image_only=True)(ours.image_file(folder))
    else:
        image = LoadImage(reader=PydicomReader(), image_only=True)(folder)
    array = np.asarray(image)
    return [(array if array.ndim > 2 else array[..., None], np.asarray(image.affine, np.float64))]


def read_dicom2nifti(folder: Path, kind: str) -> list[Found]:
    """Convert a folder; its errors are logged and leave no file."""
    import dicom2nifti

    if kind == "image":
        raise NotRead
    with tempfile.TemporaryDirectory() as out:
        dicom2nifti.convert_directory(str(folder), out, compression=False, reorient=False)
        return [_of_nifti(path) for path in sorted(Path(out).rglob("*.nii"))]


def read_dcm2niix(folder: Path, kind: str) -> list[Found]:
    """Convert a folder.

    Raises:
        RuntimeError: If it ends with an error.
    """
    import dcm2niix

    if kind == "image":
        raise NotRead
    with tempfile.TemporaryDirectory() as out:
        command = [str(dcm2niix.bin), "-b", "n", "-z", "n", "-f", "%s_%u", "-o", out, str(folder)]
        process = subprocess.run(command, capture_output=True, check=False, timeout=120)
        if process.returncode:
            raise RuntimeError(f"exit status {process.returncode}")
        paths = sorted(Path(out).rglob("*.nii"))
        mended = {one.stem.rsplit(mark, 1)[0] for one in paths for mark in ("_Eq", "_Tilt") if mark in one.stem}
        last = [one for one in paths if one.stem not in mended]
        # A volume that is turned upright and then evened out has three files: the last one is meant.
        evened = {one.stem.rsplit("_Eq", 1)[0] for one in last if "_Eq" in one.stem}
        return [_of_nifti(one) for one in last if one.stem not in evened]


def _of_nifti(path: Path) -> Found:
    import nibabel

    image = nibabel.load(path)
    array = np.array(image.dataobj)
    array = np.stack([array[name] for name in "RGB"], -1) if array.dtype.names else array
    return (array if array.ndim > 2 else array[..., None]), np.asarray(image.affine, np.float64)


READERS: dict[str, Reader] = {
    "medssl strict": read_ours("strict"),
    "medssl repair": read_ours("repair"),
    "SimpleITK": read_simpleitk,
    "MONAI": read_monai,
    "dicom2nifti": read_dicom2nifti,
    "dcm2niix": read_dcm2niix,
}


def outcome(read: Reader, case: Defect | Real, folder: Path) -> tuple[str, str]:
    """Return `right`, `refused`, `wrong` or `-`, and what was said."""
    kind = case.kind if isinstance(case, Defect) else "dicom"
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _stderr_silenced():
            warnings.simplefilter("ignore")
            found = read(folder, kind)
    except NotRead:
        return "-", "format is not read"
    except Exception as error:  # noqa: BLE001  (whatever a reader raises is its refusal)
        return "refused", str(getattr(error, "code", "")) or type(error).__name__
    if not found:
        return "refused", "no output"
    shapes = "; ".join("x".join(map(str, array.shape)) for array, _ in found)
    try:
        return (case.truth if isinstance(case, Defect) else case).judge(found), shapes
    except (ValueError, IndexError):
        return "wrong", shapes  # not even the number of dimensions is that of the truth


@contextlib.contextmanager
def _stderr_silenced() -> Any:
    """Silence what libraries in C++ print."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def main() -> None:
    """Run all cases with all readers that are installed, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("MEDSSL_DATA", REPOSITORY.parent / "shared" / "data"))
    )
    parser.add_argument("--only", help="run the cases whose name contains this, write nothing")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    cases: list[Defect | Real] = [*CORPUS, *real_cases(arguments.data)]
    rows, details = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for number, case in enumerate(cases):
            if arguments.only and arguments.only not in case.name:
                continue
            folder = case.folder if isinstance(case, Real) else Path(scratch) / str(number) / "case"
            if isinstance(case, Defect):
                case.write(folder)
            results = {name: outcome(read, case, folder) for name, read in READERS.items()}
            kind = "real" if isinstance(case, Real) else "synthetic"
            rows.append({"case": case.name, **{name: word for name, (word, _) in results.items()}})
            details.append({"case": case.name, "kind": kind, **{name: list(pair) for name, pair in results.items()}})
    print_table(rows)
    totals = {name: Counter(row[name] for row in rows) for name in READERS}
    print()
    print_table(
        [
            {"reader": name, **{word: totals[name][word] for word in ("right", "refused", "wrong", "-")}}
            for name in READERS
        ]
    )
    if not arguments.only:
        path = write_results(
            "archive_peers", {"cases": details, "totals": {name: dict(count) for name, count in totals.items()}}
        )
        print(f"\nWritten: {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
