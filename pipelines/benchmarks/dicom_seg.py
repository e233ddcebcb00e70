"""Is what `medssl predict --format dicom-seg` writes a valid DICOM SEG, and do others read the same voxels from it?

    PATH=$PATH:DCMQI/bin python pipelines/benchmarks/dicom_seg.py [--data DATA] [--quick]

Masks of real series are written as DICOM SEG and read back by highdicom, by pydicom and numpy through the positions of
the frames, and by dcmqi (`segimage2itkimage`, from `pip install dcmqi`); each column `differ` counts voxels that are
not those of the mask. `dciodvfy` (apt: dicom3tools) counts what breaks the standard. A program that is not installed
leaves `-`. Masks:

- CT: the 31 structures that come with `ct_jpeg2000`, five of them by name. Its files lack identifiers, so that
  they are refused as they are; here a copy is used whose study, series and instances have made-up ones.
- CT liver: the liver of dcmqi's own test, drawn by a person.
- MR: head and bright tissue of FLAIR by threshold.
- predicted: `medssl predict` with a small random network, as NIfTI and as DICOM SEG.

Writes `results/dicom_seg.json` and `results/dicom_seg.png`: what pydicom read, over the images.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import pydicom
import SimpleITK
from numpy.typing import NDArray
from pydicom.uid import CTImageStorage, generate_uid

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from medssl.archive.load import SeriesFound, find_series  # noqa: E402  (the checkout is put on the path first)
from medssl.archive.volume import Volume  # noqa: E402
from medssl.errors import InputRefused  # noqa: E402
from medssl.files import write_bytes  # noqa: E402
from medssl.inference.dicom_seg import Algorithm, SourceImages, write_seg  # noqa: E402
from medssl.inference.predict import predict  # noqa: E402
from medssl.inference.segment_codes import read_codes  # noqa: E402
from pipelines.benchmarks._common import RESULTS, print_table, write_results  # noqa: E402
from tests.inference.tiny_models import make_model  # noqa: E402

Mask = NDArray[np.uint8]
#: Of TotalSegmentator's values those whose place in the picture leaves no doubt.
NAMES = {1: "spleen", 5: "liver", 6: "stomach", 52: "aorta", 63: "inferior vena cava"}
#: Names that are written beside the picture.
SHOWN = 5
PROGRAMS = {"dciodvfy": "apt-get install dicom3tools", "segimage2itkimage": "pip install dcmqi"}


@dataclass(frozen=True)
class Subject:
    """A series with a mask.

    Attributes:
        name: In the table.
        series: Where it lies.
        volume: Its voxels.
        mask: Labels. Shape: (Z, Y, X).
        labels: Value of each label.
    """

    name: str
    series: SeriesFound
    volume: Volume
    mask: Mask
    labels: Mapping[str, int]


def main() -> None:
    """Write, read back by four programs, print the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data", help="folder of real data")
    parser.add_argument("--quick", action="store_true", help="the smallest series only; writes no results")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    for program, remedy in PROGRAMS.items():
        if shutil.which(program) is None:
            print(f"{program} is not installed ({remedy}): its column stays empty.")
    rows: list[dict[str, Any]] = []
    pictures: list[tuple[Subject, dict[str, NDArray[np.bool_]]]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.environ["XDG_CONFIG_HOME"] = str(work / "configuration")  # the user's own key is not touched
        refused = refusal(options.data / "dicom" / "ct_jpeg2000")
        for subject in subjects(options.data / "dicom", work, options.quick):
            for way in ("", "empty frames", "empty mask"):
                row, found = measure(subject, way, work)
                rows.append(row)
                if not way:
                    pictures.append((subject, found))
        rows.append(predicted(options.data / "dicom" / "dicom_seg" / "ct-3slice", work))
    print_table(rows)
    print(f"ct_jpeg2000 as it is: {refused}")
    if not options.quick:
        versions = {"highdicom": highdicom.__version__, "programs": [p for p in PROGRAMS if shutil.which(p)]}
        path = write_results("dicom_seg", {"rows": rows, "ct_jpeg2000_as_it_is": refused, **versions})
        draw(pictures)
        print(f"Written: {path.relative_to(REPOSITORY)} and its picture")


def subjects(data: Path, work: Path, quick: bool) -> list[Subject]:
    """Return the series with their masks."""
    liver = one(data / "dicom_seg" / "ct-3slice")
    drawn = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(data / "dicom_seg" / "liver_seg.nrrd"))
    found = [Subject("CT liver", liver, liver.load(), drawn.astype(np.uint8), {"liver": 1})]
    if quick:
        return found
    identified(data / "ct_jpeg2000", work / "ct")
    body = one(work / "ct")
    volume = body.load()
    mask = of_ct(data / "ct_jpeg2000_segmentation.nii.gz", volume)
    names = {NAMES.get(value, f"structure {value}"): int(value) for value in np.unique(mask) if value}
    found.append(Subject("CT", body, volume, mask, names))
    head = one(data / "brain_mr_study" / "36468-FLAIRreg-58706")
    volume = head.load()
    found.append(Subject("MR", head, volume, of_mr(volume), {"head": 1, "bright tissue": 2}))
    return found


def one(folder: Path) -> SeriesFound:
    """Return the largest series of a folder."""
    return max(find_series(folder).series, key=lambda series: len(series.files))


def identified(source: Path, target: Path) -> None:
    """Copy a CT without identifiers, with made-up ones."""
    target.mkdir()
    study, series = generate_uid(), generate_uid()
    for number, path in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
        image = pydicom.dcmread(path)
        image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, generate_uid()
        image.StudyInstanceUID, image.SeriesInstanceUID = study, series
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
        image.save_as(target / f"{number:03d}")


def of_ct(path: Path, volume: Volume) -> Mask:
    """Return a label file on the grid of a volume. Shape: (Z, Y, X)."""
    from nibabel.orientations import io_orientation, ornt_transform

    stored = nibabel.load(path)
    turn = ornt_transform(io_orientation(stored.affine), io_orientation(volume.affine))
    turned = stored.as_reoriented(turn)
    mask = np.asanyarray(turned.dataobj).transpose(2, 1, 0)
    if mask.shape != volume.shape[1:] or not np.allclose(turned.affine, volume.affine, atol=0.01):
        raise ValueError(f"{path.name} does not lie on the grid of its series")
    return mask.astype(np.uint8)


def of_mr(volume: Volume) -> Mask:
    """Return the head 1 and its brightest part 2. Shape: (Z, Y, X)."""
    from scipy.ndimage import binary_fill_holes
    from skimage.filters import threshold_multiotsu

    values = volume.array[0].astype(np.float32)
    low, high = threshold_multiotsu(values, 3)
    head = np.stack([binary_fill_holes(plane > low) for plane in values])
    return np.where(head, np.where(values > high, 2, 1), 0).astype(np.uint8)


def refusal(folder: Path) -> str:
    """Return what is said of a series that cannot have a SEG."""
    try:
        SourceImages.of(one(folder))
    except InputRefused as error:
        return str(error)
    return "accepted"


def measure(subject: Subject, way: str, work: Path) -> tuple[dict[str, Any], dict[str, NDArray[np.bool_]]]:
    """Write a mask one way and compare what each program reads."""
    path = work / "seg.dcm"
    mask = subject.mask * 0 if way == "empty mask" else subject.mask
    began = time.perf_counter()
    write_seg(
        path,
        mask,
        subject.volume.affine,
        SourceImages.of(subject.series),
        {name: (value,) for name, value in subject.labels.items()},
        read_codes(),
        Algorithm("benchmark", {"fold_0": "0" * 64}),
        empty_frames=way == "empty frames",
    )
    seconds = time.perf_counter() - began
    true = {name: mask == value for name, value in subject.labels.items()}
    found = by_position(path, subject.volume)
    return {
        "mask": subject.name + (f", {way}" if way else ""),
        "shape": "x".join(map(str, mask.shape)),
        **compared(path, true, found, subject.volume, work),
        "MB": round(path.stat().st_size / 1e6, 2),
        "seconds": round(seconds, 2),
    }, found


def predicted(folder: Path, work: Path) -> dict[str, Any]:
    """Predict a series as NIfTI and as SEG and compare the two."""
    labels = {"background": 0, "liver": 1, "spleen": 2}
    model = make_model(work / "model", patch=(16, 64, 64), spacing=(1.0, 3.0, 3.0), labels=labels)
    for form in ("nifti", "dicom-seg"):
        began = time.perf_counter()
        summary: Any = predict(model, folder, work / form, device="cpu", format=form, quiet=True)
        seconds = time.perf_counter() - began
    (row,) = summary.predictions
    mask = np.asanyarray(nibabel.load(work / "nifti" / f"{row.case}.nii.gz").dataobj).transpose(2, 1, 0)
    true = {name: mask == value for name, value in labels.items() if value}
    volume, path = one(folder).load(), work / "dicom-seg" / row.mask
    return {
        "mask": "predicted",
        "shape": "x".join(map(str, mask.shape)),
        **compared(path, true, by_position(path, volume), volume, work),
        "MB": round(path.stat().st_size / 1e6, 2),
        "seconds": round(seconds, 2),
    }


def compared(
    path: Path,
    true: Mapping[str, NDArray[np.bool_]],
    found: Mapping[str, NDArray[np.bool_]],
    volume: Volume,
    work: Path,
) -> dict[str, Any]:
    """Return how many voxels differ by program, and what dciodvfy finds."""
    errors, warnings = checked(path)
    dcmqi = by_dcmqi(path, volume, work)
    seg = highdicom.seg.segread(path)
    return {
        "segments": len(seg.segment_numbers),
        "frames": int(seg.NumberOfFrames),
        "labelled": sum(int(mask.sum()) for mask in true.values()),
        "differ (pydicom)": differing(true, found),
        "differ (highdicom)": differing(true, by_highdicom(seg, volume)),
        "differ (dcmqi)": "-" if dcmqi is None else differing(true, dcmqi),
        "dciodvfy errors": errors,
        "warnings": warnings,
    }


def differing(true: Mapping[str, NDArray[np.bool_]], found: Mapping[str, NDArray[np.bool_]]) -> int:
    """Return the number of voxels that are not as they should be, over all segments."""
    return sum(int((mask != found[name]).sum()) for name, mask in true.items())


def by_position(path: Path, volume: Volume) -> dict[str, NDArray[np.bool_]]:
    """Return each segment on the volume's grid, by the bits of the file and the positions of its frames."""
    seg = pydicom.dcmread(path)
    inverse = np.linalg.inv(np.diag([-1.0, -1, 1, 1]) @ volume.affine)
    bits = np.unpackbits(np.frombuffer(seg.PixelData, np.uint8), bitorder="little")
    frames = bits[: seg.NumberOfFrames * seg.Rows * seg.Columns].reshape(-1, seg.Rows, seg.Columns)
    names = {item.SegmentNumber: item.SegmentLabel for item in seg.SegmentSequence}
    found = {name: np.zeros(volume.shape[1:], bool) for name in names.values()}
    shared = seg.SharedFunctionalGroupsSequence[0]
    row, column = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
    down, across = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    steps = inverse[:3, :3] @ np.stack([row * across, column * down], 1)
    if not np.allclose(steps, np.eye(3)[:, :2], atol=1e-3):
        raise ValueError("rows and columns of the frames do not run along those of the images")
    for frame, item in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        x, y, z, _ = inverse @ [*map(float, item.PlanePositionSequence[0].ImagePositionPatient), 1.0]
        if max(abs(x), abs(y), abs(z - round(z))) > 0.1:
            raise ValueError(f"a frame lies at voxel ({x:.2f}, {y:.2f}, {z:.2f})")
        groups = item if "SegmentIdentificationSequence" in item else shared
        found[names[groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber]][round(z)] |= frame > 0
    return found


def by_highdicom(seg: Any, volume: Volume) -> dict[str, NDArray[np.bool_]]:
    """Return each segment on the volume's grid, as highdicom reads it."""
    found = {}
    lps = np.diag([-1.0, -1, 1, 1]) @ volume.affine
    grid = highdicom.VolumeGeometry(
        lps[:, [2, 1, 0, 3]], volume.shape[1:], "PATIENT", frame_of_reference_uid=seg.FrameOfReferenceUID
    )
    for number in seg.segment_numbers:
        one_segment = seg.get_volume(segment_numbers=[number], allow_missing_positions=True)
        name = seg.get_segment_description(number).segment_label
        matched = one_segment.match_geometry(grid, tol=1e-2)
        found[name] = matched.array[..., 0] > 0 if matched.array.ndim == 4 else matched.array > 0
    return found


def by_dcmqi(path: Path, volume: Volume, work: Path) -> dict[str, NDArray[np.bool_]] | None:
    """Return each segment on the volume's grid, as dcmqi reads it; None if it is not installed."""
    program = shutil.which("segimage2itkimage")
    if program is None:
        return None
    out = work / "dcmqi"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    command = [program, "--inputDICOM", path, "--outputDirectory", out]
    subprocess.run(command, check=True, capture_output=True)
    grid = SimpleITK.GetImageFromArray(np.zeros(volume.shape[1:], np.uint8))
    lps = np.diag([-1.0, -1, 1, 1]) @ volume.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    grid.SetOrigin(lps[:3, 3].tolist())
    grid.SetSpacing(spacing.tolist())
    grid.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    found = {}
    names = {item.SegmentNumber: item.SegmentLabel for item in pydicom.dcmread(path).SegmentSequence}
    for number, name in names.items():
        image = SimpleITK.ReadImage(out / f"{number}.nrrd")
        nearest = SimpleITK.Resample(image, grid, SimpleITK.Transform(), SimpleITK.sitkNearestNeighbor, 0)
        found[name] = SimpleITK.GetArrayFromImage(nearest) > 0
    return found


def checked(path: Path) -> tuple[int | str, int | str]:
    """Return the number of errors and of warnings that dciodvfy tells; dashes if it is not installed."""
    program = shutil.which("dciodvfy")
    if program is None:
        return "-", "-"
    told = subprocess.run([program, path], capture_output=True, text=True)
    lines = (told.stdout + told.stderr).splitlines()
    return tuple(sum(line.startswith(kind) for line in lines) for kind in ("Error", "Warning"))  # type: ignore[return-value]


def draw(pictures: list[tuple[Subject, dict[str, NDArray[np.bool_]]]]) -> None:
    """Draw the SEGs' outlines over a slice of their images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(pictures), 3.6), layout="constrained")
    for axes, (subject, found) in zip(figure.subplots(1, len(pictures)), pictures, strict=True):
        z = int(np.argmax(sum(mask.sum(axis=(1, 2)) for mask in found.values())))
        plane = subject.volume.array[0, z].astype(float)
        low, high = (-160, 240) if subject.volume.modality == "CT" else np.percentile(plane, (1, 99.5))
        row, column = subject.volume.spacing_mm[1:]
        axes.imshow(plane, cmap="gray", vmin=low, vmax=high, aspect=row / column, interpolation="nearest")
        named = sorted(found.items(), key=lambda pair: pair[0].startswith("structure"))
        for number, (name, mask) in enumerate(named):
            colour = f"C{number % 10}"
            if mask[z].any():
                axes.contour(mask[z], [0.5], colors=colour, linewidths=0.8)
            if number < SHOWN:
                place = (0.02, 0.98 - 0.07 * number)
                axes.text(*place, name, color=colour, transform=axes.transAxes, va="top", fontsize=8)
        axes.set_title(f"{subject.name}, slice {z}", fontsize=10)
        axes.axis("off")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=90, metadata={"Software": None})
    write_bytes(RESULTS / "dicom_seg.png", stream.getvalue())


if __name__ == "__main__":
    main()
