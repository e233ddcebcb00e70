"""How fast is `medssl index`, against the bare cost of reading the same headers with pydicom, and in how much memory?

    python pipelines/benchmarks/index_speed.py [--files 1000,20000] [--slices 40] [--size 64] [--repeats 3]

Generates CT series without compression (the header is what an ordinary scanner writes, about 60 elements), then
measures in one run, each in a fresh process:

- pydicom: `dcmread(stop_before_pixels=True)` on every file, one process. The bare cost.
- headers: the first half of `medssl index`: find, read headers, plan volumes.
- whole: all of `medssl index`: also decode every volume for percentiles and hash, and write the manifest.
- again: `medssl index --resume` with nothing new.

Memory is the peak of the sum of proportional set sizes over the process and its children, sampled every 50 ms. Each
time is the median of the repeats; the file cache is warm in all of them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import pydicom
from _common import print_table, write_results
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

SAMPLE_SECONDS = 0.05

PROGRAMS = {
    "pydicom": (
        "import os, sys, pydicom\n"
        "for folder, _, names in os.walk(sys.argv[1]):\n"
        "    for name in names:\n"
        "        pydicom.dcmread(os.path.join(folder, name), stop_before_pixels=True)\n"
    ),
    "headers": (
        "import sys\nfrom pathlib import Path\nfrom medssl.archive.stages import Stages\n"
        "from medssl.archive.index import index\n"
        "Stages.decode = lambda self: None\n"
        "index([Path(sys.argv[1])], Path(sys.argv[2]), quiet=True, overwrite=True)\n"
    ),
    "whole": (
        "import sys\nfrom pathlib import Path\nfrom medssl.archive.index import index\n"
        "index([Path(sys.argv[1])], Path(sys.argv[2]), quiet=True, overwrite=True)\n"
    ),
    "again": (
        "import sys\nfrom pathlib import Path\nfrom medssl.archive.index import index\n"
        "summary = index([Path(sys.argv[1])], Path(sys.argv[2]), quiet=True, resume=True)\n"
        "assert summary.headers_read == summary.volumes_decoded == 0, summary\n"
    ),
}


def main() -> None:
    """Generate, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", default="1000,20000", help="numbers of files")
    parser.add_argument("--slices", type=int, default=40, help="files per series")
    parser.add_argument("--size", type=int, default=64, help="rows and columns")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for count in map(int, options.files.split(",")):
        with tempfile.TemporaryDirectory() as temporary:
            archive, out = Path(temporary) / "archive", Path(temporary) / "index"
            generate(archive, count, options.slices, options.size)
            rows += measure(archive, out, count, options.repeats)
    print_table(rows)
    path = write_results("index_speed", {"settings": vars(options), "rows": rows})
    print(f"\nWritten to {path.relative_to(Path(__file__).parents[2])}")


def measure(archive: Path, out: Path, count: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row per program; the programs take turns, so that a slow minute of the machine meets all of them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in PROGRAMS}
    for _ in range(repeats):
        for name, program in PROGRAMS.items():
            command = [sys.executable, "-c", program, str(archive), str(out / ("x" if name == "headers" else "y"))]
            runs[name].append(_run(command, environment))
        shutil.rmtree(out)
    bare = median(seconds for seconds, _ in runs["pydicom"])
    return [
        {
            "files": count,
            "what": name,
            "seconds": round(median(seconds for seconds, _ in measured), 3),
            "files_per_second": round(count / median(seconds for seconds, _ in measured)),
            "time_over_pydicom": round(median(seconds for seconds, _ in measured) / bare, 3),
            "peak_memory_mb": round(max(memory for _, memory in measured), 1),
        }
        for name, measured in runs.items()
    ]


def _run(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment)
    root = psutil.Process(process.pid)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, _memory(root))
        time.sleep(SAMPLE_SECONDS)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:2])} failed")
    return seconds, peak


def _memory(root: psutil.Process) -> float:
    total = 0
    for process in [root, *_children(root)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 2**20


def _children(root: psutil.Process) -> list[psutil.Process]:
    try:
        return root.children(recursive=True)
    except psutil.Error:
        return []


def generate(folder: Path, count: int, slices: int, size: int) -> None:
    """Write `count` CT images in series of `slices`, one folder each."""
    rng = np.random.default_rng(0)
    for number in range(count):
        series, slice_number = divmod(number, slices)
        place = folder / f"patient{series // 4:05d}" / f"series{series:05d}"
        place.mkdir(parents=True, exist_ok=True)
        path = place / f"IM{slice_number:05d}"
        pydicom.dcmwrite(path, _image(path, rng, series, slice_number, size), enforce_file_format=True)


def _image(path: Path, rng: np.random.Generator, series: int, number: int, size: int) -> FileDataset:
    root = "1.2.826.0.1.3680043.10.9999"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = f"{root}.{series}.{number + 1}"
    image = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    values: dict[str, Any] = {
        "SpecificCharacterSet": "ISO_IR 100",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "StudyDate": "20200101",
        "SeriesDate": "20200101",
        "AcquisitionDate": "20200101",
        "ContentDate": "20200101",
        "StudyTime": "101010",
        "SeriesTime": "101010",
        "AcquisitionTime": "101010",
        "ContentTime": "101010",
        "AccessionNumber": f"A{series}",
        "Modality": "CT",
        "Manufacturer": "GENERATED",
        "InstitutionName": "Generated Hospital",
        "ReferringPhysicianName": "Nobody^At^All",
        "StudyDescription": "Thorax routine",
        "SeriesDescription": "Thorax 2.0 B31f",
        "ManufacturerModelName": "Generator 64",
        "PatientName": f"Patient^Number{series // 4}",
        "PatientID": f"P{series // 4:06d}",
        "PatientBirthDate": "19500101",
        "PatientSex": "O",
        "PatientAge": "070Y",
        "BodyPartExamined": "CHEST",
        "ScanOptions": "SPIRAL",
        "SliceThickness": 2,
        "KVP": 120,
        "DataCollectionDiameter": 500,
        "DeviceSerialNumber": "12345",
        "SoftwareVersions": "syngo X",
        "ProtocolName": "Thorax",
        "ReconstructionDiameter": 350,
        "DistanceSourceToDetector": 1040,
        "DistanceSourceToPatient": 570,
        "GantryDetectorTilt": 0,
        "TableHeight": 150,
        "RotationDirection": "CW",
        "ExposureTime": 500,
        "XRayTubeCurrent": 200,
        "Exposure": 100,
        "FilterType": "0",
        "GeneratorPower": 60,
        "FocalSpots": 1.2,
        "ConvolutionKernel": "B31f",
        "PatientPosition": "HFS",
        "StudyInstanceUID": f"{root}.1.{series // 2}",
        "SeriesInstanceUID": f"{root}.2.{series}",
        "StudyID": "1",
        "SeriesNumber": series % 2 + 1,
        "AcquisitionNumber": 1,
        "InstanceNumber": number + 1,
        "ImagePositionPatient": [-175, -175, 2.0 * number],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "FrameOfReferenceUID": f"{root}.3.{series}",
        "SliceLocation": 2.0 * number,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": size,
        "Columns": size,
        "PixelSpacing": [350 / size, 350 / size],
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "WindowCenter": 40,
        "WindowWidth": 400,
        "RescaleIntercept": -1024,
        "RescaleSlope": 1,
        "RescaleType": "HU",
        "PixelData": rng.integers(0, 4096, (size, size), dtype=np.uint16).tobytes(),
    }
    for keyword, value in values.items():
        setattr(image, keyword, value)
    return image


if __name__ == "__main__":
    main()
