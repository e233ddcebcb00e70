"""An archive full of planted identities, and the search for them in everything that medssl writes or says."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items

from tests.archive.dicom import series as s

#: Texts in names, IDs, comments, private and nested elements; also the beginning of each file and folder name.
WORDS = ("CANARYNAME", "CANARYID", "CANARYTEXT", "CANARYPRIVATE", "CANARYNESTED", "CANARYFILE", "CANARYNIFTI")
#: Dates, times and numbers of the study that no output may show; UIDs with them.
NUMBERS = ("19231231", "20190807", "163829.123456", "1.2.826.0.1.3680043.77", "ACC77001923")
ALL = (*WORDS, *NUMBERS)
#: Folders that hold the archive's secrets by design: readable by their owner alone.
PRIVATE = "private"


def identity(number: int) -> dict[str, Any]:
    """Return elements that name a patient, each with a canary."""
    return {
        "PatientName": f"CANARYNAME^P{number}",
        "PatientID": f"CANARYID{number}",
        "IssuerOfPatientID": "CANARYID",
        "OtherPatientIDs": "CANARYID",
        "PatientBirthDate": "19231231",
        "PatientAddress": "CANARYTEXT street",
        "PatientComments": "CANARYTEXT",
        "ImageComments": "CANARYTEXT",
        "StudyDate": "20190807",
        "SeriesDate": "20190807",
        "AcquisitionDate": "20190807",
        "ContentDate": "20190807",
        "StudyTime": "163829.123456",
        "AccessionNumber": "ACC77001923",
        "StudyID": "CANARYID",
        "StudyDescription": "CANARYTEXT",
        "SeriesDescription": "CANARYTEXT",
        "ProtocolName": "CANARYTEXT",
        "InstitutionName": "CANARYTEXT",
        "StationName": "CANARYTEXT",
        "BodyPartExamined": "CANARYTEXT",
        "ReferringPhysicianName": "CANARYNAME",
        "OperatorsName": "CANARYNAME",
        "DeviceSerialNumber": "CANARYID",
    }


def datasets(number: int, count: int = 20, **more: Any) -> list[s.FileDataset]:
    """Return a CT series of a patient with canaries everywhere; noise makes each patient's voxels his own."""
    slices = s.stack(count, series=str(number), rows=28, columns=28, spacing=(2.0, 2.0), **identity(number), **more)
    rng = np.random.default_rng(number)
    root = f"1.2.826.0.1.3680043.77.{number}"
    for index, dataset in enumerate(slices):
        stored = np.full((28, 28), 240)  # air around a body
        body = (slice(5, 23), slice(5, 23))
        values = np.frombuffer(dataset.PixelData, "<u2").reshape(28, 28)
        stored[body] = values[body] + rng.integers(0, 400, (18, 18))
        dataset.PixelData = stored.astype("<u2").tobytes()
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = f"{root}.1", f"{root}.2"
        dataset.FrameOfReferenceUID, dataset.SOPInstanceUID = f"{root}.3", f"{root}.4.{index}"
        dataset.private_block(0x0011, "CANARYPRIVATE", create=True).add_new(1, "LO", "CANARYPRIVATE")
        inner, outer = Dataset(), Dataset()
        inner.PatientName, inner.TextValue = "CANARYNESTED", "CANARYNESTED"
        outer.ReferencedSOPInstanceUID, outer.ContentSequence = f"{root}.5", Items([inner])
        dataset.RequestAttributesSequence = Items([outer])
    return slices


def nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """Write a NIfTI with canaries in every free field of its header and in extensions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine)
    for name, size in (("descrip", 80), ("aux_file", 24), ("db_name", 18), ("intent_name", 16)):
        image.header[name] = f"CANARYNIFTI {name}".encode()[:size]
    for code in (4, 6, 44):
        image.header.extensions.append(nib.nifti1.Nifti1Extension(code, b"CANARYNIFTI extension"))
    nib.save(image, path)
    return path


def plant(root: Path, patients: int = 4) -> Path:
    """Write an archive whose every file and folder name is a canary too, with damaged files among the good ones."""
    for number in range(patients):
        s.write(root / f"CANARYFILE_patient{number}" / "20190807", datasets(number), name="CANARYFILE_{:03d}")
    damaged = root / "CANARYFILE_damaged"
    cut = s.write(damaged / "cut", datasets(90, 4), name="CANARYFILE_{:03d}")
    for path in cut:
        path.write_bytes(path.read_bytes()[:-60])
    for path in s.write(damaged / "position", datasets(91, 4), name="CANARYFILE_{:03d}"):
        path.write_bytes(path.read_bytes().replace(b"-10.0", b"CANAR").replace(b"19231231", b"CANARYID"))
    s.write(damaged / "gap", [one for n, one in enumerate(datasets(92, 9)) if n != 4], name="CANARYFILE_{:03d}")
    mixed = datasets(93, 3) + datasets(94, 6)[3:]
    for dataset in mixed:
        for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
            setattr(dataset, name, mixed[0].get(name))
    s.write(damaged / "two patients", mixed, name="CANARYFILE_{:03d}")
    (damaged / "CANARYFILE.txt").write_text("CANARYTEXT")
    values = np.random.default_rng(5).normal(100, 20, (24, 24, 20)).astype(np.float32)
    nifti(root / "CANARYFILE_nifti" / "CANARYFILE_scan.nii.gz", values)
    broken = nifti(damaged / "CANARYFILE_broken.nii", values)
    broken.write_bytes(broken.read_bytes()[:5000])
    return root


def run(*arguments: str | Path, cwd: Path, codes: Iterable[int] = (0, 3)) -> str:
    """Run a verb in a process of its own and return all that it said."""
    environment = {
        **os.environ,
        "XDG_CONFIG_HOME": str(cwd / "configuration"),
        "XDG_CACHE_HOME": str(cwd / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    environment.pop("MEDSSL_KEY_FILE", None)
    command = [sys.executable, "-m", "medssl", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)
    assert done.returncode in set(codes), (command, done.returncode, done.stderr[-3000:])
    return done.stdout + done.stderr


def leaks(out: Path, canaries: Iterable[str] = ALL) -> list[str]:
    """Return `file: canary` for each canary in a name or in the bytes below a folder, whatever they are packed in.

    The manifest's columns of relative paths are left out, by design, and so is the private folder of an index.
    """
    words = [canary.encode() for canary in canaries]
    found = set()
    for path in sorted([out, *out.rglob("*")]):
        place = path.relative_to(out)
        if PRIVATE in place.parts:
            continue
        contents = [str(place).encode()]
        if path.is_file():
            contents += _unpacked(path)
        found.update(f"{place}: {word.decode()}" for word in words if any(word in content for content in contents))
    return sorted(found)


def _unpacked(path: Path) -> list[bytes]:
    content = path.read_bytes()
    if path.suffix == ".parquet":
        return _table(path)
    texts = [content]
    if content[:2] == b"\x1f\x8b":
        texts.append(gzip.decompress(content))
    if path.suffix == ".b2nd":
        texts.append(_blosc(path))
    if path.suffix == ".png":
        texts += _png_texts(content)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            texts += [archive.read(name) for name in archive.namelist()]
    return texts


def _table(path: Path) -> list[bytes]:
    import polars
    import pyarrow.parquet

    table = polars.read_parquet(path)
    paths = [column for column in table.columns if column in ("relative_path", "relative_paths")]
    about = pyarrow.parquet.read_schema(path).metadata or {}
    return [str(table.drop(paths).to_dicts()).encode(), str(about).encode()]


def _blosc(path: Path) -> bytes:
    import blosc2

    array = blosc2.open(str(path), mode="r")
    return str(dict(array.schunk.vlmeta.getall())).encode()


def _png_texts(content: bytes) -> list[bytes]:
    texts, position = [], 8
    while position + 8 <= len(content):
        length = int.from_bytes(content[position : position + 4], "big")
        kind, body = content[position + 4 : position + 8], content[position + 8 : position + 8 + length]
        if kind in (b"zTXt", b"iTXt") and b"\0\0" in body:
            packed = body.split(b"\0\0", 1)[1]
            try:
                texts.append(zlib.decompress(packed))
            except zlib.error:
                texts.append(packed)
        position += length + 12
    return texts
