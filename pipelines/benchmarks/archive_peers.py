"""Which reader of DICOM folders is right, which refuses, which is silently wrong, on the same cases in one run?

    pip install -e '.[dev,peers]'
    python pipelines/benchmarks/archive_peers.py [--data DATA] [--only CASE]

Synthetic series carry their own truth: every voxel is a linear function of its place in the patient, so a volume is
right if each voxel has the value of the point to which its affine maps it. Real series are compared with the expected
NIfTI where there is one (made by dicom2nifti's authors: that peer has a home advantage), elsewhere with their own
files: every stored pixel must be found at its place. `right` also needs all volumes of the case; an exception or no
output is `refused`; anything else is `wrong`: a volume whose voxels lie where they do not belong, or that is not there,
without an error. Each reader is called the way its documentation does for a folder.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
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

from _archive_cases import SYNTHETIC, Found, Real, Synthetic, files_of, real_cases  # noqa: E402
from _common import print_table, write_results  # noqa: E402


def read_ours(geometry: str) -> Callable[[Path], list[Found]]:
    """Return medssl's reader under one policy."""

    def read(folder: Path) -> list[Found]:
        from medssl.archive.dicom.series import read_series

        result = []
        for one in read_series(files_of(folder), geometry):  # type: ignore[arg-type]
            array = np.transpose(one.volume.array, (3, 2, 1, 0))
            result.append((array if array.shape[3] > 1 else array[..., 0], one.volume.affine))
        return result

    return read


def read_simpleitk(folder: Path) -> list[Found]:
    """Read every series that GDCM finds in each folder."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    result = []
    for place in sorted({path.parent for path in files_of(folder)}):
        for series in SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(place)) or ("",):
            reader = SimpleITK.ImageSeriesReader()
            reader.SetFileNames(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(place), series))
            image = reader.Execute()
            dimension = image.GetDimension()
            if dimension == 4 and image.GetSize()[3] == 1:
                image, dimension = image[..., 0], 3
            affine = np.eye(4)
            direction = np.array(image.GetDirection()).reshape(dimension, dimension)[:3, :3]
            affine[:3, :3] = direction * np.array(image.GetSpacing()[:3])
            affine[:3, 3] = image.GetOrigin()[:3]
            affine[:2] *= -1
            array = SimpleITK.GetArrayFromImage(image)
            colour = image.GetNumberOfComponentsPerPixel() > 1
            result.append((np.moveaxis(array, (0, 1, 2), (2, 1, 0)) if colour else array.T, affine))
    return result


def read_monai(folder: Path) -> list[Found]:
    """Read a folder, the way MONAI's documentation shows."""
    from monai.data import PydicomReader
    from monai.transforms import LoadImage

    image = LoadImage(reader=PydicomReader(), image_only=True)(folder)
    array = np.asarray(image)
    return [(array if array.ndim > 2 else array[..., None], np.asarray(image.affine, np.float64))]


def read_dicom2nifti(folder: Path) -> list[Found]:
    """Convert a folder; its errors are logged and leave no file."""
    import dicom2nifti
    import nibabel

    result = []
    with tempfile.TemporaryDirectory() as out:
        dicom2nifti.convert_directory(str(folder), out, compression=False, reorient=False)
        for path in sorted(Path(out).rglob("*.nii")):
            image = nibabel.load(path)
            array = np.array(image.dataobj)
            array = np.stack([array[name] for name in "RGB"], -1) if array.dtype.names else array
            result.append((array, np.asarray(image.affine, np.float64)))
    return result


READERS: dict[str, Callable[[Path], list[Found]]] = {
    "medssl strict": read_ours("strict"),
    "medssl repair": read_ours("repair"),
    "SimpleITK": read_simpleitk,
    "MONAI": read_monai,
    "dicom2nifti": read_dicom2nifti,
}


def outcome(read: Callable[[Path], list[Found]], case: Synthetic | Real, folder: Path) -> tuple[str, str]:
    """Return `right`, `refused` or `wrong`, and what was said."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _stderr_silenced():
            warnings.simplefilter("ignore")
            found = read(folder)
    except Exception as error:  # noqa: BLE001  (whatever a reader raises is its refusal)
        return "refused", str(getattr(error, "code", "")) or type(error).__name__
    if not found:
        return "refused", "no output"
    shapes = "; ".join("x".join(map(str, array.shape)) for array, _ in found)
    return case.judge(found), shapes


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
    cases: list[Synthetic | Real] = [*SYNTHETIC, *real_cases(arguments.data)]
    rows, details = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for number, case in enumerate(cases):
            if arguments.only and arguments.only not in case.name:
                continue
            folder = case.folder if isinstance(case, Real) else Path(scratch) / str(number)
            if isinstance(case, Synthetic):
                case.write(folder)
            results = {name: outcome(read, case, folder) for name, read in READERS.items()}
            kind = "real" if isinstance(case, Real) else "synthetic"
            rows.append({"case": case.name, **{name: word for name, (word, _) in results.items()}})
            details.append({"case": case.name, "kind": kind, **{name: list(pair) for name, pair in results.items()}})
    print_table(rows)
    totals = {name: Counter(row[name] for row in rows) for name in READERS}
    print()
    print_table(
        [{"reader": name, **{word: totals[name][word] for word in ("right", "refused", "wrong")}} for name in READERS]
    )
    if not arguments.only:
        path = write_results(
            "archive_peers", {"cases": details, "totals": {name: dict(count) for name, count in totals.items()}}
        )
        print(f"\nWritten: {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
