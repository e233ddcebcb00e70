"""A mask as DICOM SEG: the voxels of the NIfTI, on the images they belong to, in codes, and identity nowhere else."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.sr.codedict import codes as standard

from medssl.archive.load import SeriesFound, find_series
from medssl.errors import InputRefused, UsageError
from medssl.inference.dicom_seg import Algorithm, SourceImages, write_seg
from medssl.inference.predict import predict
from medssl.inference.segment_codes import GENERIC, TABLE, read_codes
from tests.archive.dicom import series as made
from tests.inference.tiny_models import make_model, write_volume

LABELS = {"Liver": (1,), "kidney_left": (2,)}
ALGORITHM = Algorithm("medssl predict", {"fold_0": "ab" * 32})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = {"background": 0, "liver": 1, "blob": 2}
    return make_model(tmp_path_factory.mktemp("model") / "model", labels=labels)


@pytest.fixture
def oblique(tmp_path: Path) -> Path:
    """A tilted-plane CT series whose files are named against the order of the slices."""
    planes = made.stack(9, orientation=made.tilted(20.0), rows=11, columns=13)
    for number, plane in enumerate(planes):
        plane.AccessionNumber, plane.StudyDate, plane.PatientID = "A77", "20200102", "P1"
        plane.InstanceNumber = 50 - number
    made.write(tmp_path / "series", reversed(planes))
    return tmp_path / "series"


def one_series(folder: Path) -> SeriesFound:
    (found,) = find_series(folder).series
    return found


def speckle(shape: tuple[int, ...], values: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, values, shape).astype(np.uint8)


def by_position(path: Path, series: SeriesFound) -> dict[str, NDArray[np.bool_]]:
    """Return each segment on the grid of a series, by pydicom, numpy and the positions of frames alone."""
    seg = pydicom.dcmread(path)
    volume = series.load()
    inverse = np.linalg.inv(np.diag([-1.0, -1, 1, 1]) @ volume.affine)
    frames = np.unpackbits(np.frombuffer(seg.PixelData, np.uint8), bitorder="little")
    frames = frames[: seg.NumberOfFrames * seg.Rows * seg.Columns].reshape(-1, seg.Rows, seg.Columns)
    names = {item.SegmentNumber: item.SegmentLabel for item in seg.SegmentSequence}
    found = {name: np.zeros(volume.shape[1:], bool) for name in names.values()}
    shared = seg.SharedFunctionalGroupsSequence[0]
    row, column = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
    down, across = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    between = float(shared.PixelMeasuresSequence[0].SpacingBetweenSlices)
    steps = [row * across, column * down, np.cross(row, column) * between]
    assert np.allclose(inverse[:3, :3] @ np.transpose(steps), np.eye(3), atol=1e-3)
    for frame, item in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        place = inverse @ [*map(float, item.PlanePositionSequence[0].ImagePositionPatient), 1.0]
        assert np.allclose(place[:2], 0, atol=1e-3) and abs(place[2] - round(place[2])) < 1e-3
        identified = "SegmentIdentificationSequence" in item
        groups = item if identified else seg.SharedFunctionalGroupsSequence[0]
        number = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        found[names[number]][round(place[2])] |= frame.astype(bool)
    return found


def written(path: Path, series: SeriesFound, mask: NDArray[Any], **options: Any) -> pydicom.Dataset:
    labels = options.pop("labels", LABELS)
    write_seg(path, mask, series.load().affine, SourceImages.of(series), labels, read_codes(), ALGORITHM, **options)
    return pydicom.dcmread(path)


def test_voxels_come_back_equal_by_highdicom_and_by_position(oblique: Path, tmp_path: Path) -> None:
    series = one_series(oblique)
    mask = speckle(series.load().shape[1:])
    written(tmp_path / "seg.dcm", series, mask)
    found = by_position(tmp_path / "seg.dcm", series)
    for name, values in LABELS.items():
        assert np.array_equal(found[name], np.isin(mask, values))
    seg = highdicom.seg.segread(tmp_path / "seg.dcm")
    images = sorted(map(pydicom.dcmread, series.files), key=lambda image: -image.InstanceNumber)
    uids = [image.SOPInstanceUID for image in images]
    pixels = seg.get_pixels_by_source_instance(uids, combine_segments=True)
    assert np.array_equal(pixels, mask)


def test_each_frame_names_the_image_at_its_place(oblique: Path, tmp_path: Path) -> None:
    series = one_series(oblique)
    seg = written(tmp_path / "seg.dcm", series, speckle(series.load().shape[1:]))
    places = {image.SOPInstanceUID: image.ImagePositionPatient for image in map(pydicom.dcmread, series.files)}
    assert seg.NumberOfFrames == 18
    for frame in seg.PerFrameFunctionalGroupsSequence:
        source = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert frame.PlanePositionSequence[0].ImagePositionPatient == places[source]
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == made.uid("series", "1")


def test_overlapping_regions_are_segments_of_their_own(oblique: Path, tmp_path: Path) -> None:
    series = one_series(oblique)
    mask = speckle(series.load().shape[1:])
    labels = {"whole": (1, 2), "core": (2,)}
    written(tmp_path / "seg.dcm", series, mask, labels=labels)
    found = by_position(tmp_path / "seg.dcm", series)
    assert np.array_equal(found["whole"], mask > 0) and np.array_equal(found["core"], mask == 2)


def test_frames_of_a_multi_frame_image_are_found_whatever_their_order(tmp_path: Path) -> None:
    planes = made.stack(7, rows=11, columns=13)
    order = [3, 0, 6, 1, 5, 2, 4]
    made.write(tmp_path / "in", [made.enhanced([planes[number] for number in order])])
    series = one_series(tmp_path / "in")
    mask = speckle(series.load().shape[1:])
    seg = written(tmp_path / "seg.dcm", series, mask)
    found = by_position(tmp_path / "seg.dcm", series)
    for name, values in LABELS.items():
        assert np.array_equal(found[name], np.isin(mask, values))
    for frame in seg.PerFrameFunctionalGroupsSequence:
        source = frame.DerivationImageSequence[0].SourceImageSequence[0]
        named = planes[order[int(source.ReferencedFrameNumber) - 1]]
        assert np.allclose(frame.PlanePositionSequence[0].ImagePositionPatient, named.ImagePositionPatient, atol=1e-4)


def test_frames_without_content_are_left_out_unless_asked_for(oblique: Path, tmp_path: Path) -> None:
    series = one_series(oblique)
    mask = np.zeros(series.load().shape[1:], np.uint8)
    mask[4, 2:5, 3:6] = 1
    assert written(tmp_path / "few.dcm", series, mask).NumberOfFrames == 1
    assert written(tmp_path / "all.dcm", series, mask, empty_frames=True).NumberOfFrames == 18
    assert np.array_equal(by_position(tmp_path / "all.dcm", series)["Liver"], mask == 1)


def test_an_empty_mask_is_a_whole_file_of_empty_frames(
    oblique: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    series = one_series(oblique)
    seg = written(tmp_path / "seg.dcm", series, np.zeros(series.load().shape[1:], np.uint8))
    assert seg.NumberOfFrames == 18 and not any(seg.PixelData) and not caplog.records


def test_segments_tell_what_they_are_and_who_made_them(oblique: Path, tmp_path: Path) -> None:
    series = one_series(oblique)
    labels = {**LABELS, "blob": (3,)}
    seg = written(tmp_path / "seg.dcm", series, speckle(series.load().shape[1:], 4), labels=labels)
    liver, kidney, blob = seg.SegmentSequence
    assert (liver.SegmentLabel, liver.SegmentedPropertyTypeCodeSequence[0].CodeValue) == ("Liver", "10200004")
    assert liver.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "91723000"
    side = kidney.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
    assert (kidney.SegmentLabel, side.CodeMeaning) == ("kidney_left", "Left")
    assert blob.SegmentLabel == "blob" and blob.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Tissue"
    assert seg.SegmentationType == "BINARY" and seg.SeriesDescription == "RESEARCH USE - not for diagnosis"
    for segment in seg.SegmentSequence:
        made_by = segment.SegmentationAlgorithmIdentificationSequence[0]
        assert segment.SegmentAlgorithmType == "AUTOMATIC" and made_by.AlgorithmName == "medssl predict"
        assert made_by.AlgorithmVersion.endswith("+model." + "ab" * 8)
        assert "ab" * 32 in made_by.AlgorithmParameters


def test_patient_and_study_of_the_source_stand_in_the_file(oblique: Path, tmp_path: Path) -> None:
    series = one_series(oblique)
    seg = written(tmp_path / "seg.dcm", series, speckle(series.load().shape[1:]))
    source = pydicom.dcmread(series.files[0])
    for name in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "AccessionNumber"):
        assert seg[name].value == source[name].value
    assert seg.StudyDate == "20200102" and seg.SeriesInstanceUID != source.SeriesInstanceUID


def test_names_in_other_scripts_and_values_of_a_wrong_form_are_no_crash(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    planes = made.stack(4, SpecificCharacterSet="ISO_IR 192", PatientSex="X", PatientBirthDate="19701399")
    for plane in planes:
        plane.PatientName = "Müller"  # one component alone: highdicom logs such names
    made.write(tmp_path / "in", planes)
    with caplog.at_level(logging.DEBUG):
        series = one_series(tmp_path / "in")
        seg = written(tmp_path / "seg.dcm", series, speckle(series.load().shape[1:]))
    assert str(seg.PatientName) == "Müller" and seg.PatientSex == "" and seg.PatientBirthDate == ""
    assert "ller" not in caplog.text


@pytest.mark.parametrize("name", ["SOPInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"])
def test_images_without_identifiers_are_refused_and_the_missing_one_is_named(tmp_path: Path, name: str) -> None:
    made.write(tmp_path / "in", made.stack(4, **{name: ""}))
    with pytest.raises(InputRefused, match=f"source_uids_missing.*{name}"):
        SourceImages.of(one_series(tmp_path / "in"))


def test_grids_that_are_not_the_images_own_are_refused(tmp_path: Path) -> None:
    planes = made.stack(9, modality="MR")
    made.write(tmp_path / "mosaic", [made.mosaic(planes, normal=(0, 0, 1), step=2.0)])
    with pytest.raises(InputRefused, match="source_not_referable"):
        SourceImages.of(one_series(tmp_path / "mosaic"))
    gap = [plane for number, plane in enumerate(made.stack(9)) if number != 4]
    made.write(tmp_path / "gap", gap)
    (series,) = find_series(tmp_path / "gap", "repair").series
    with pytest.raises(InputRefused, match="gap_interpolated"):
        SourceImages.of(series)


def test_a_failed_write_leaves_nothing(oblique: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series = one_series(oblique)
    shape = series.load().shape[1:]

    def fails(self: Any, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise ValueError("Doe^Jane cannot be written")

    monkeypatch.setattr(highdicom.seg.Segmentation, "save_as", fails)
    with pytest.raises(InputRefused, match="seg_not_written: ValueError") as caught:
        written(tmp_path / "out" / "seg.dcm", series, speckle(shape))
    assert "Jane" not in str(caught.value) and list((tmp_path / "out").iterdir()) == []


def test_every_built_in_code_is_one_that_the_standard_has() -> None:
    import yaml
    from pydicom.sr._concepts_dict import concepts

    meanings: dict[str, set[str]] = {}
    for entries in concepts["SCT"].values():
        for value, (meaning, _) in entries.items():
            meanings.setdefault(value, set()).add(meaning.lower())
    for name, entry in yaml.safe_load(TABLE.read_text()).items():
        value, scheme, meaning = entry["type"]
        assert scheme == "SCT" and meaning.lower() in meanings[value], name
    assert standard.SCT.Tissue.value == GENERIC.type.value


def test_names_are_looked_up_without_regard_to_spelling_and_the_users_file_goes_first(tmp_path: Path) -> None:
    table = read_codes()
    assert table.of("Left_Kidney") == table.of("kidney left") and table.of("right-lung").side is not None
    assert table.of("left atrium").side is None  # the code itself says left
    assert table.of("thing") is GENERIC and not table.of("thing").known
    own = tmp_path / "codes.yaml"
    own.write_text('liver: {category: ["1", 99X, Mine], type: ["2", 99X, Mine too]}\nthing: {category: tissue, '
                   'type: ["3", 99X, Thing], side: left}\n')  # fmt: skip
    mixed = read_codes(own)
    assert mixed.of("LIVER").type.scheme == "99X" and mixed.of("thing").known
    assert mixed.of("spleen") == table.of("spleen")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("liver: 3", "liver"),
        ("liver: {type: ['1', SCT, x]}", "category"),
        ("liver: {category: organ, type: ['1', SCT, x]}", "category"),
        ("liver: {category: anatomy, type: ['12345678901234567', SCT, x]}", "16"),
        ("[1, 2]", "must hold"),
        ("a: [", "YAML"),
    ],
)
def test_a_file_of_codes_that_cannot_be_used_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "codes.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_codes(tmp_path / "codes.yaml")


def test_predict_writes_a_seg_with_the_voxels_of_its_nifti(model: Path, oblique: Path, tmp_path: Path) -> None:
    nifti = predict(model, oblique, tmp_path / "nifti", device="cpu", quiet=True)
    segs = predict(model, oblique, tmp_path / "segs", device="cpu", quiet=True, format="dicom-seg")
    case = nifti.predictions[0].case
    assert segs.predictions[0].mask == f"{case}.dcm" and segs.exit_code == 0
    mask = np.asanyarray(nibabel.load(tmp_path / "nifti" / f"{case}.nii.gz").dataobj).transpose(2, 1, 0)
    assert len(np.unique(mask)) == 3
    found = by_position(tmp_path / "segs" / f"{case}.dcm", one_series(oblique))
    assert np.array_equal(found["liver"], mask == 1) and np.array_equal(found["blob"], mask == 2)
    volumes = json.loads((tmp_path / "segs" / "volumes.json").read_text())
    assert volumes == json.loads((tmp_path / "nifti" / "volumes.json").read_text()) and volumes["unit"] == "ml"
    assert volumes["cases"][case]["liver"] == pytest.approx(np.sum(mask == 1) * 0.9 * 1.3 * 2.0 / 1000, rel=1e-4)


def test_identity_is_in_the_seg_and_nowhere_else(
    model: Path, oblique: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        predict(model, oblique, tmp_path / "out", device="cpu", quiet=True, format="dicom-seg")
    others = [path for path in (tmp_path / "out").iterdir() if path.suffix != ".dcm"]
    told = caplog.text + " ".join(path.name for path in (tmp_path / "out").iterdir())
    told += "".join(path.read_text() for path in others)
    for identity in ("Doe", "Jane", "19700101", "20200102", "A77", made.uid("study"), made.uid("series", "1")):
        assert identity not in told


def test_series_that_cannot_have_a_seg_cost_one_row(model: Path, oblique: Path, tmp_path: Path) -> None:
    made.write(oblique / "blank", made.stack(4, series="2", SOPInstanceUID=""))
    summary = predict(model, oblique, tmp_path / "out", device="cpu", quiet=True, format="dicom-seg")
    assert summary.exit_code == 3 and [row.code for row in summary.refused] == ["source_uids_missing"]
    assert len(list((tmp_path / "out").glob("*.dcm"))) == 1


def test_what_is_no_dicom_and_options_that_do_not_fit_are_refused_with_the_remedy(
    model: Path, oblique: Path, tmp_path: Path
) -> None:
    image = write_volume(tmp_path / "a.nii.gz")
    with pytest.raises(UsageError, match="use --format nifti"):
        predict(model, image, tmp_path / "out", device="cpu", format="dicom-seg")
    with pytest.raises(UsageError, match="add --format dicom-seg"):
        predict(model, oblique, tmp_path / "out", device="cpu", empty_frames=True)
    with pytest.raises(UsageError, match="nifti"):
        predict(model, oblique, tmp_path / "out", device="cpu", format="dicomseg")
    assert not (tmp_path / "out").exists()


def test_dciodvfy_finds_no_error(oblique: Path, tmp_path: Path) -> None:
    program = shutil.which("dciodvfy")
    if program is None:
        pytest.skip("dciodvfy is not installed: apt-get install dicom3tools")
    series = one_series(oblique)
    mask = speckle(series.load().shape[1:])
    for name, voxels in (("full", mask), ("empty", mask * 0)):
        written(tmp_path / f"{name}.dcm", series, voxels)
        told = subprocess.run([program, tmp_path / f"{name}.dcm"], capture_output=True, text=True)
        lines = (told.stdout + told.stderr).splitlines()
        assert [line for line in lines if line.startswith("Error")] == []


def test_dcmqi_reads_the_same_voxels(oblique: Path, tmp_path: Path) -> None:
    program = shutil.which("segimage2itkimage")
    if program is None:
        pytest.skip("segimage2itkimage is not installed: pip install dcmqi")
    import SimpleITK

    series = one_series(oblique)
    mask = speckle(series.load().shape[1:])
    mask[0] = mask[-1] = 2  # dcmqi crops to the slices that have frames
    written(tmp_path / "seg.dcm", series, mask)
    (tmp_path / "nrrd").mkdir()
    command = [program, "--inputDICOM", tmp_path / "seg.dcm", "--outputDirectory", tmp_path / "nrrd"]
    subprocess.run(command, check=True, capture_output=True)
    found = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(tmp_path / "nrrd" / "2.nrrd"))
    assert np.array_equal(found > 0, mask == 2)


def test_real_ct_without_identifiers_is_refused_and_mr_is_written(data_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="source_uids_missing"):
        SourceImages.of(one_series(data_folder / "dicom" / "ct_jpeg2000"))
    series = one_series(data_folder / "dicom" / "dicom_seg" / "ct-3slice")
    mask = speckle((3, 512, 512))
    written(tmp_path / "seg.dcm", series, mask)
    assert np.array_equal(by_position(tmp_path / "seg.dcm", series)["Liver"], mask == 1)
