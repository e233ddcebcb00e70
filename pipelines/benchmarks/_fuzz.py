"""What `fuzz.py` runs in limited processes: damage a small file as its number says, and read it as `index` does."""

from __future__ import annotations

import gzip
import os
import struct
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY)]

#: Numbers that length, count and size fields are replaced by.
_ODD = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]
_ODD_TEXT = [b"nan", b"inf", b"-1", b"0", b"1e308", b"1e-308", b"\\\\", b"../..", b"\xff\xfe"]


@dataclass(frozen=True)
class Input:
    """One damaged input.

    Attributes:
        number: Which; with the seed it decides everything.
        seed: Seed of the run.
        folder: Where it is written.
    """

    number: int
    seed: int
    folder: str


@dataclass(frozen=True)
class Read:
    """How an input ended.

    Attributes:
        end: `volume`, `related`, or a reason code.
        fault: Empty, or what is wrong with a volume that was accepted.
        peak_mb: Largest memory of the process so far, in MiB.
        grown_mb: By how much this input raised it.
        seconds: Processor time of this input.
    """

    end: str
    fault: str
    peak_mb: float
    grown_mb: float
    seconds: float = 0.0


def read_damaged(item: Input) -> Read:
    """Write a damaged file, read it through the archive's reading path, and remove it."""
    path = Path(item.folder) / f"{os.getpid()}"
    path.write_bytes(damaged(item.seed, item.number)[1])
    before, begun = _peak_mb(), time.process_time()
    try:
        end, fault = _read(path, "strict" if item.number % 2 else "repair")
    finally:
        path.unlink()
    return Read(end, fault, _peak_mb(), _peak_mb() - before, time.process_time() - begun)


def damaged(seed: int, number: int) -> tuple[str, bytes]:
    """Return the name of the file that is damaged, and its damaged content: always the same for seed and number."""
    rng = np.random.default_rng([seed, number])
    names = list(sources())
    name = names[number % len(names)]
    content = _mutate(bytearray(sources()[name]), rng)
    if name.endswith(".gz"):
        packed = bytearray(gzip.compress(content, 1, mtime=0))
        # Damage of the stream itself, besides damage of what it holds.
        content = bytes(_mutate(packed, rng) if rng.random() < 0.3 else packed)
    return name, bytes(content)


def _mutate(content: bytearray, rng: np.random.Generator) -> bytearray:
    for _ in range(int(rng.integers(1, 5))):
        if len(content) < 16:
            return content
        # Headers come first: half of the damage falls into the first kilobyte.
        place = int(rng.integers(min(len(content), 1024) if rng.random() < 0.5 else len(content)))
        match int(rng.integers(12)):
            case 0 | 1 | 2 | 3:
                content[place] = int(rng.integers(256))
            case 4 | 5:
                content[place] ^= 1 << int(rng.integers(8))
            case 6 | 7:
                size = int(rng.choice([1, 2, 4]))
                value = int(_ODD[int(rng.integers(len(_ODD)))]) & (256**size - 1)
                content[place : place + size] = value.to_bytes(size, "little")
            case 8:
                text = _ODD_TEXT[int(rng.integers(len(_ODD_TEXT)))]
                content[place : place + len(text)] = text
            case 9:
                del content[place : place + int(rng.integers(1, 64))]
            case 10:
                other = int(rng.integers(len(content)))
                content[place:place] = content[other : other + int(rng.integers(1, 64))]
            case _:
                if rng.random() < 0.3:
                    del content[place:]
                else:
                    content[place : place + 4] = struct.pack("<f", float(rng.choice([np.nan, np.inf, -1e9, 0.0])))
    return content


def _read(path: Path, geometry: str) -> tuple[str, str]:
    from medssl.archive.tasks import FileTask, VolumeTask, load_planned, plan_series, read_file

    status = path.stat()
    stamp = (path.name, status.st_size, status.st_mtime_ns)
    root = str(path.parent)
    facts = read_file(FileTask(0, root, *stamp))
    if facts.state == "related":
        return "related", ""
    if facts.state == "image":
        return "volume", _fault(load_planned(VolumeTask("", facts.header, root, path.name, geometry, (stamp,))))
    plan = plan_series((root, geometry, [facts.header]))
    for text, _ in plan["volumes"]:
        fault = _fault(load_planned(VolumeTask("", "dicom", root, text, geometry, (stamp,))))
        if fault:
            return "volume", fault
    if plan["volumes"]:
        return "volume", ""
    return ("related", "") if plan["related"] else (str(plan["refused"][0][1]), "")


def _fault(volume: Any) -> str:
    if volume.array.dtype.kind == "f" and not np.isfinite(volume.array).all():
        return "accepted with voxels that are not finite"
    if not np.isfinite(volume.affine).all() or abs(np.linalg.det(volume.affine)) < 1e-12:
        return "accepted with an affine that is singular or not finite"
    if min(volume.spacing_mm) <= 0:
        return "accepted with a voxel size that is not positive"
    return ""


def _peak_mb() -> float:
    # ru_maxrss would count the process that started this one as well.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


@cache
def sources() -> dict[str, bytes]:
    """Return small whole files of every kind that is damaged, by name."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return {**_dicom(Path(folder)), **_nifti(Path(folder))}


def _dicom(folder: Path) -> dict[str, bytes]:
    from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless

    from tests.archive.dicom import series as s
    from tests.defects import dicom_cases as cases

    # Two slices in one file, so that an undamaged file is a volume by itself.
    small: dict[str, Any] = {
        "enhanced": s.enhanced(s.stack(3)),
        "implicit": s.enhanced(s.stack(3)),
        "big_endian": s.enhanced(s.stack(3, modality="MR")),
        "deflated": s.enhanced(s.stack(3)),
        "rle": s.enhanced(s.stack(3)),
        "echoes": cases.enhanced_echoes()[0],
        "mosaic": s.mosaic(s.stack(5, modality="MR"), normal=(0, 0, 1), step=2.0),
        "slice": s.stack(1)[0],
        "pet": cases.pet()[0],
        "film": cases.ultrasound(3)[0][0],
        "no_preamble": s.enhanced(s.stack(3)),
    }
    for name, syntax in (
        ("implicit", ImplicitVRLittleEndian),
        ("big_endian", ExplicitVRBigEndian),
        ("deflated", DeflatedExplicitVRLittleEndian),
    ):
        small[name].file_meta.TransferSyntaxUID = syntax
    small["rle"].compress(RLELossless, encoding_plugin="pydicom")
    return {
        name: s.write(folder / name, [dataset], preamble=name != "no_preamble")[0].read_bytes()
        for name, dataset in small.items()
    }


def _nifti(folder: Path) -> dict[str, bytes]:
    import nibabel as nib

    from tests.defects import image_cases as cases

    array = cases.values()[:6, :5, :4]
    nib.save(nib.Nifti2Image(array, cases.AFFINE), folder / "two.nii")
    plain = cases.nifti(folder / "plain", array).read_bytes()
    frames = cases.nifti(folder / "frames", np.stack([array, array + 9], -1)).read_bytes()
    return {
        "plain.nii": plain,
        "frames.nii": frames,
        "two.nii": (folder / "two.nii").read_bytes(),
        "plain.nii.gz": plain,
    }
