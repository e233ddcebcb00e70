"""Files as archives hold them: odd, damaged, hostile; and what is no volume."""

from __future__ import annotations

import os
import resource
import struct
import time
from pathlib import Path

import pytest
from pydicom.dataset import Dataset, FileDataset
from pydicom.sequence import Sequence as Items

from medssl.archive.codes import CODES
from medssl.archive.dicom.group import group
from medssl.archive.dicom.header import read_header
from medssl.archive.dicom.model import DicomHeader
from medssl.archive.dicom.pixels import load
from medssl.errors import InputRefused
from tests.archive.dicom import series as s
from tests.archive.dicom.test_defects import codes, only_volume, outcome
from tests.hostile.files import deflate_bomb


def element(tag: int, vr: bytes, value: bytes) -> bytes:
    head = struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, vr)
    if vr in (b"OB", b"OW", b"SQ", b"UN", b"UT"):
        return head + struct.pack("<HI", 0, len(value)) + value
    return head + struct.pack("<H", len(value)) + value


def refusal(path: Path) -> str:
    with pytest.raises(InputRefused) as caught:
        read_header(path)
    assert caught.value.code in CODES
    return caught.value.code


def end_of(path: Path) -> str:
    """Return the code with which a file ends that is in no volume."""
    try:
        header = read_header(path)
    except InputRefused as error:
        assert error.code in CODES
        return error.code
    result = group([header])
    assert not result.volumes
    return (result.related or [(code, code) for _, code, _ in result.refused])[0][1]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty_file"),
        (b"hello world, this is a text file", "not_an_image"),
        (b"\x89PNG" + b"\0" * 500, "not_an_image"),
        (b"\0" * 128 + b"DICM", "truncated"),
        (b"\0" * 5000, "not_an_image"),
        (b"\x08\x00\x05\x00", "not_an_image"),
    ],
)
def test_what_is_no_dicom_file_is_refused(tmp_path: Path, content: bytes, code: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    assert refusal(path) == code


@pytest.mark.parametrize("part", [0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, part: float) -> None:
    path = s.write(tmp_path, s.stack(1))[0]
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    assert end_of(path) in {"truncated", "dicom_invalid", "no_pixel_data", "not_an_image", "mixed_type"}


def test_sizes_that_the_file_cannot_hold_are_refused_without_allocation(tmp_path: Path) -> None:
    slices = [*s.stack(1, Rows=65535, Columns=65535), *s.stack(1, Rows=6000, Columns=6000)]
    slices.append(s.enhanced(s.stack(2), NumberOfFrames=2_000_000))
    slices.append(s.enhanced(s.stack(2), NumberOfFrames=-3))
    slices.append(s.stack(1, Rows=0)[0])
    slices.append(s.stack(1, BitsAllocated=12)[0])
    slices.append(s.stack(1, SamplesPerPixel=4)[0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = [end_of(path) for path in s.write(tmp_path, slices)]
    assert found == [
        "too_large",
        "truncated",
        "multiframe_invalid",
        "multiframe_invalid",
        "header_invalid",
        "pixel_format_unsupported",
        "pixel_format_unsupported",
    ]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_a_forged_length_of_an_element_allocates_nothing(tmp_path: Path) -> None:
    path = s.write(tmp_path, s.stack(1))[0]
    content = path.read_bytes()
    place = content.index(b"\x18\x00\x10\x12") if b"\x18\x00\x10\x12" in content else content.index(b"\x20\x00\x0d\x00")
    forged = content[:place] + struct.pack("<HH2sHI", 0x0018, 0x1210, b"UT", 0, 0xFFFFFFF0) + content[place:]
    path.write_bytes(forged)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert end_of(path) in {"no_pixel_data", "dicom_invalid"}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize("where", ["header", "pixels"])
def test_a_deflate_bomb_is_stopped(tmp_path: Path, where: str) -> None:
    path = deflate_bomb(tmp_path, 400, in_header=where == "header")
    before, start_time = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    code = end_of(path)
    assert code == ("deflated_too_large" if where == "header" else "too_few_slices")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000
    assert time.monotonic() - start_time < 20


def test_random_damage_never_escapes(tmp_path: Path) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    sources = [path.read_bytes() for path in s.write(tmp_path / "source", [s.stack(1)[0], s.enhanced(s.stack(3))])]
    path = tmp_path / "damaged"
    for number in range(600):
        content = bytearray(sources[number % 2])
        for place in rng.integers(0, len(content), 1 + number % 5):
            content[place] = rng.integers(256)
        path.write_bytes(content)
        try:
            header = read_header(path)
            DicomHeader.from_json(header.to_json())
            for geometry in ("strict", "repair"):
                for volume in group([header], geometry).volumes:  # type: ignore[arg-type]
                    load(volume)
        except InputRefused as error:
            assert error.code in CODES


def test_a_header_longer_than_the_first_read_is_read_on(tmp_path: Path) -> None:
    slices = s.stack(4)
    for dataset in slices:
        dataset.private_block(0x0011, "TEST", create=True).add_new(1, "OB", b"\1" * 300_000)
        dataset.ImageComments = "x" * 9000
    assert s.world_error(load(only_volume(outcome(s.write(tmp_path, slices))))) < s.QUANTUM


def related(sop_class: str, modality: str) -> FileDataset:
    dataset = s.base(modality=modality)
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, "1.2.3.4"
    return dataset


@pytest.mark.parametrize(
    ("sop_class", "modality", "kind"),
    [
        ("66.4", "SEG", "segmentation"),
        ("481.3", "RTSTRUCT", "structure_set"),
        ("481.2", "RTDOSE", "rt_dose"),
        ("481.5", "RTPLAN", "rt_plan"),
        ("88.11", "SR", "structured_report"),
        ("88.67", "SR", "dose_report"),
        ("88.59", "KO", "key_object"),
        ("11.1", "PR", "presentation_state"),
        ("104.1", "DOC", "encapsulated_document"),
        ("9.1.1", "ECG", "waveform"),
        ("66.1", "REG", "registration"),
        ("66", "MR", "raw_data"),
        ("4.2", "MR", "spectroscopy"),
        ("30", "MR", "parametric_map"),
    ],
)
def test_objects_that_are_no_images_are_related(tmp_path: Path, sop_class: str, modality: str, kind: str) -> None:
    path = s.write(tmp_path, [related("1.2.840.10008.5.1.4.1.1." + sop_class, modality)])[0]
    assert end_of(path) == kind
    assert CODES[kind].group == "related"


@pytest.mark.parametrize(
    ("modality", "kind"), [("SEG", "segmentation"), ("SR", "structured_report"), ("KO", "key_object")]
)
def test_a_blank_class_leaves_the_modality_to_tell(tmp_path: Path, modality: str, kind: str) -> None:
    path = s.write(tmp_path, [related("", modality)])[0]
    content = path.read_bytes()
    assert end_of(path) == kind, content[:400]


def test_a_secondary_capture_is_related_unless_it_has_a_place(tmp_path: Path) -> None:
    shot = s.image(
        (0, 0, 0), 1, ImagePositionPatient=None, ImageOrientationPatient=None, SOPClassUID=s.SECONDARY_CAPTURE
    )
    result = outcome(s.write(tmp_path / "shot", [*s.stack(), shot]))
    assert [kind for _, kind in result.related] == ["secondary_capture"] and only_volume(result).flags == ()
    placed = only_volume(outcome(s.write(tmp_path / "placed", s.stack(5, SOPClassUID=s.SECONDARY_CAPTURE))))
    assert placed.flags == ("secondary_capture_source",)


def test_a_dicomdir_is_related(tmp_path: Path) -> None:
    dataset = Dataset()
    dataset.FileSetID = "X"
    dataset.DirectoryRecordSequence = Items([])
    whole = FileDataset("", dataset, file_meta=s.base().file_meta, preamble=b"\0" * 128)
    whole.SOPClassUID = "1.2.840.10008.1.3.10"
    path = s.write(tmp_path, [whole], name="DICOMDIR")[0]
    assert end_of(path) == "dicomdir"


@pytest.mark.parametrize(
    ("keyword", "flag"),
    [("BurnedInAnnotation", "burned_in_annotation"), ("LossyImageCompression", "lossy_compression")],
)
def test_what_is_worth_knowing_is_flagged(tmp_path: Path, keyword: str, flag: str) -> None:
    value = "YES" if keyword.startswith("Burned") else "01"
    assert only_volume(outcome(s.write(tmp_path, s.stack(4, **{keyword: value})))).flags == (flag,)


def test_no_identity_beyond_the_ids_is_in_a_header(tmp_path: Path) -> None:
    canary = "Canary"
    dataset = s.image(
        (0, 0, 0),
        1,
        PatientName=f"{canary}^A",
        PatientBirthDate="19471123",
        BodyPartExamined=f"{canary} B",
        StudyDescription=canary,
        PatientComments=canary,
        InstitutionName=canary,
        StudyDate="20240131",
        SeriesDate="20240131",
        Modality="CT",
    )
    text = read_header(s.write(tmp_path, [dataset])[0]).to_json()
    assert canary.lower() not in text.lower() and "1947" not in text and "20240131" not in text


def test_messages_do_not_quote_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    path = s.write(tmp_path, s.stack(1, origin=(-10.5, -20.5, 30.5)))[0]
    content = path.read_bytes()
    path.write_bytes(content.replace(b"-20.5", b"Canar").replace(b"19700101", b"Canary01"))
    result = group([read_header(path)])
    assert codes(result) == {"position_invalid"}
    spoken = "".join(detail for _, _, detail in result.refused) + caplog.text + "".join(capfd.readouterr())
    assert "Canar" not in spoken


def test_an_unreadable_file_is_an_oserror(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    path = s.write(tmp_path, s.stack(1))[0]
    path.chmod(0)
    with pytest.raises(OSError):
        read_header(path)
