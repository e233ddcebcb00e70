"""What goes wrong in an archive: broken series, objects that are no volumes, and foreign files."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import BasicTextSRStorage, EncapsulatedPDFStorage, SecondaryCaptureImageStorage

from medssl.demo.appearance import CtLook
from medssl.demo.phantom import Grid, body, ct, grid
from medssl.demo.slices import Header, new_dataset, put_pixels, save, slice_datasets

TILT_DEGREES = 12.0
FIRST_PATIENT = 900
AXIAL = np.diag([-1.0, -1.0, 1.0])


def write_defects(archive: Path, seed: int) -> dict[str, Path]:
    """Write one study per defect into an archive.

    Args:
        archive: Folder of the archive.
        seed: Seed of the archive.

    Returns:
        The study's folder for each defect's name.
    """
    folders: dict[str, Path] = {}
    for number, (name, spoil) in enumerate(DEFECTS.items()):
        header = Header(
            seed, FIRST_PATIENT + number, 1, 1, "CT", "Abdomen", "ALPHA CT 64", stored_offset=1024,
            tilt_degrees=TILT_DEGREES if name == "gantry_tilt" else 0.0,
        )  # fmt: skip
        folders[name] = archive / "site_a" / "2023" / header.accession
        spoil(header, folders[name])
    return folders


def _scan(header: Header, where: Grid) -> list[FileDataset]:
    person = body(header.seed, header.patient)
    return slice_datasets(header, where, ct(person, where, CtLook(), header.series))


def _small_grid(slices: int = 14, tilt_degrees: float = 0.0) -> Grid:
    where = grid((slices, 64, 64), (9.0, 6.2, 6.2), AXIAL, np.array([0.0, 0.0, -40.0]))
    if not tilt_degrees:
        return where
    # The gantry leans, the table still moves along z: slices are not stacked along their normal.
    affine = where.affine.copy()
    lean = np.deg2rad(tilt_degrees)
    affine[:3, 1] = affine[1, 1] * np.array([0.0, np.cos(lean), np.sin(lean)])
    middle = (np.asarray(where.shape[::-1]) - 1) / 2
    affine[:3, 3] = np.array([0.0, 0.0, -40.0]) - affine[:3, :3] @ middle
    return Grid(where.shape, affine)


def _write(header: Header, folder: Path, datasets: list[FileDataset]) -> list[Path]:
    paths = [folder / f"IM{number:06d}" for number in range(1, len(datasets) + 1)]
    for path, dataset in zip(paths, datasets, strict=True):
        save(dataset, path, header)
    return paths


def _missing_slice(header: Header, folder: Path) -> None:
    datasets = _scan(header, _small_grid())
    _write(header, folder, datasets[:6] + datasets[7:])


def _gantry_tilt(header: Header, folder: Path) -> None:
    _write(header, folder, _scan(header, _small_grid(tilt_degrees=TILT_DEGREES)))


def _duplicate_slice(header: Header, folder: Path) -> None:
    datasets = _scan(header, _small_grid())
    again = _scan(header, _small_grid())[5]
    again.SOPInstanceUID = again.file_meta.MediaStorageSOPInstanceUID = header.uid(header.series_uid, "again")
    again.InstanceNumber = 40
    _write(header, folder, [*datasets, again])


def _truncated_file(header: Header, folder: Path) -> None:
    paths = _write(header, folder, _scan(header, _small_grid()))
    paths[8].write_bytes(paths[8].read_bytes()[:4000])


def _localiser_in_series(header: Header, folder: Path) -> None:
    side_view = np.array([[0.0, 0.0, -1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    where = grid((1, 64, 64), (10.0, 6.2, 6.2), side_view, np.array([0.0, 0.0, -40.0]))
    scout = _scan(header, where)[0]
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    scout.SOPInstanceUID = scout.file_meta.MediaStorageSOPInstanceUID = header.uid(header.series_uid, "scout")
    _write(header, folder, [*_scan(header, _small_grid()), scout])


def _uneven_spacing(header: Header, folder: Path) -> None:
    """Every third slice of a fine scan, then every fourth: 9 mm apart, then 12 mm."""
    where = grid((45, 64, 64), (3.0, 6.2, 6.2), AXIAL, np.array([0.0, 0.0, -40.0]))
    datasets = _scan(header, where)
    _write(header, folder, datasets[0:21:3] + datasets[22::4])


def _few_slices(header: Header, folder: Path) -> None:
    _write(header, folder, _scan(header, _small_grid(2)))


def _no_volumes(header: Header, folder: Path) -> None:
    """A study with a screenshot, a text report and a PDF beside a good series."""
    _write(header, folder, _scan(header, _small_grid()))
    shot_header = replace(header.as_series(80, "Screenshot"), modality="OT")
    shot = new_dataset(shot_header, SecondaryCaptureImageStorage, header.uid(header.series_uid, "shot"))
    shot.ConversionType = "WSD"
    shot.InstanceNumber = 1
    colours = np.zeros((96, 128, 3), np.uint8)
    colours[20:70, 30:90] = (200, 160, 40)
    put_pixels(shot, colours)
    save(shot, folder / "SC000001", shot_header)

    text_header = replace(header.as_series(81, "Report"), modality="SR")
    text = new_dataset(text_header, BasicTextSRStorage, header.uid(header.series_uid, "text"))
    text.InstanceNumber = 1
    text.CompletionFlag, text.VerificationFlag, text.ValueType = "COMPLETE", "UNVERIFIED", "CONTAINER"
    text.ContinuityOfContent = "SEPARATE"
    text.ConceptNameCodeSequence = DicomSequence([_code("18748-4", "LN", "Diagnostic Imaging Report")])
    line = Dataset()
    line.RelationshipType, line.ValueType, line.TextValue = "CONTAINS", "TEXT", "A phantom was examined. It is well."
    line.ConceptNameCodeSequence = DicomSequence([_code("121071", "DCM", "Finding")])
    text.ContentSequence = DicomSequence([line])
    save(text, folder / "SR000001", text_header)

    page_header = replace(header.as_series(82, "Letter"), modality="DOC")
    page = new_dataset(page_header, EncapsulatedPDFStorage, header.uid(header.series_uid, "page"))
    page.InstanceNumber = 1
    page.BurnedInAnnotation, page.DocumentTitle, page.MIMETypeOfEncapsulatedDocument = (
        "YES",
        "Letter",
        "application/pdf",
    )
    page.EncapsulatedDocument = b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n"
    save(page, folder / "DOC00001", page_header)


def _foreign_files(header: Header, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500))
    (folder / "notes.txt").write_text(f"Disc {header.study} copied without errors.\n")
    (folder / "IM000001").write_bytes(b"")
    (folder / "IM000002").write_bytes(bytes(range(256)) * 8)
    with zipfile.ZipFile(folder / "export.zip", "w") as bundle:
        bundle.writestr(zipfile.ZipInfo("readme"), "nothing to see")


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


DEFECTS: dict[str, Callable[[Header, Path], None]] = {
    "missing_slice": _missing_slice,
    "gantry_tilt": _gantry_tilt,
    "duplicate_slice": _duplicate_slice,
    "truncated_file": _truncated_file,
    "localiser_in_series": _localiser_in_series,
    "uneven_spacing": _uneven_spacing,
    "few_slices": _few_slices,
    "no_volumes": _no_volumes,
    "foreign_files": _foreign_files,
}
