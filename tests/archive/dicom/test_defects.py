"""The defects of archives, one by one: each ends in a right volume or in a refusal with its code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medssl.archive.codes import CODES
from medssl.archive.dicom.group import GroupResult, group
from medssl.archive.dicom.header import read_header
from medssl.archive.dicom.model import DicomHeader, DicomVolume
from medssl.archive.dicom.pixels import load
from tests.archive.dicom import series as s


def outcome(paths: list[Path], geometry: str = "strict") -> GroupResult:
    """Group files and check that each is in exactly one place and every code is documented."""
    headers = [read_header(path) for path in paths]
    for header in headers:
        assert repr(DicomHeader.from_json(header.to_json())) == repr(header)
    result = group(headers, geometry)  # type: ignore[arg-type]
    ends = (
        {path for volume in result.volumes for path in volume.paths},
        {path for path, _ in result.related},
        {path for path, _, _ in result.refused},
    )
    assert sum(len(end) for end in ends) == len(paths)
    assert set.union(*ends) == {str(path) for path in paths}
    used = {code for _, code, _ in result.refused} | {kind for _, kind in result.related}
    for volume in result.volumes:
        used |= {volume.geometry, *volume.flags}
        assert DicomVolume.from_json(volume.to_json()) == volume
    assert used <= set(CODES)
    shuffled = group(headers[::-1], geometry)  # type: ignore[arg-type]
    assert shuffled == result
    return result


def codes(result: GroupResult) -> set[str]:
    return {code for _, code, _ in result.refused}


def only_volume(result: GroupResult) -> DicomVolume:
    assert len(result.volumes) == 1, (result.volumes, result.refused)
    return result.volumes[0]


@pytest.mark.parametrize("orientation", [s.AXIAL, s.CORONAL, s.SAGITTAL, (0.8, 0.6, 0.0, -0.48, 0.64, -0.6)])
def test_a_clean_series_lies_where_its_affine_says(tmp_path: Path, orientation: tuple[float, ...]) -> None:
    result = outcome(s.write(tmp_path, s.stack(orientation=orientation)))
    volume = load(only_volume(result))
    assert volume.shape == (1, 12, s.ROWS, s.COLUMNS)
    assert volume.spacing_mm == pytest.approx((2.0, *s.SPACING))
    assert s.world_error(volume) < s.QUANTUM
    assert volume.geometry == "regular" and not volume.flags and not result.refused


def test_row_and_column_spacing_are_not_exchanged(tmp_path: Path) -> None:
    plan = only_volume(outcome(s.write(tmp_path, s.stack(spacing=(0.5, 3.0)))))
    assert plan.spacing_mm == pytest.approx((2.0, 0.5, 3.0))
    assert np.linalg.norm(np.array(plan.affine)[:3, 0]) == pytest.approx(3.0)


def test_instance_numbers_and_names_do_not_order_slices(tmp_path: Path) -> None:
    slices = s.stack()
    for number, dataset in zip(np.random.default_rng(0).permutation(12), slices, strict=True):
        dataset.InstanceNumber = int(number)
    volume = load(only_volume(outcome(s.write(tmp_path, np.random.default_rng(1).permutation(slices)))))
    assert s.world_error(volume) < s.QUANTUM


@pytest.mark.parametrize("lost", [1, 6, 10])
def test_a_missing_slice_is_refused_or_interpolated(tmp_path: Path, lost: int) -> None:
    slices = s.stack()
    del slices[lost]
    paths = s.write(tmp_path, slices)
    assert codes(outcome(paths)) == {"missing_slices"}
    repaired = load(only_volume(outcome(paths, "repair")))
    assert repaired.shape[1] == 12 and repaired.geometry == "gap_interpolated"
    assert s.world_error(repaired) < 2 * s.QUANTUM  # the field is linear: interpolation gives it back


def test_two_slices_missing_side_by_side_are_never_invented(tmp_path: Path) -> None:
    slices = s.stack(20)
    del slices[8:10]
    paths = s.write(tmp_path, slices)
    assert codes(outcome(paths)) == codes(outcome(paths, "repair")) == {"missing_slices"}


def test_many_gaps_are_never_invented(tmp_path: Path) -> None:
    slices = [dataset for number, dataset in enumerate(s.stack(24)) if number not in (4, 9, 14, 19)]
    assert codes(outcome(s.write(tmp_path, slices), "repair")) == {"missing_slices"}


def test_a_copied_slice_is_dropped_and_flagged(tmp_path: Path) -> None:
    slices = s.stack()
    copy = s.stack()[5]
    copy.SOPInstanceUID, copy.InstanceNumber = s.uid("sent again"), 99
    result = outcome(s.write(tmp_path, [*slices, copy, s.stack()[3]]))
    volume = load(only_volume(result))
    assert volume.shape[1] == 12 and s.world_error(volume) < s.QUANTUM
    assert "duplicates_dropped" in volume.flags
    assert [kind for _, kind in result.related] == ["duplicate_slice"] * 2


def test_another_image_at_the_place_of_one_slice_is_refused(tmp_path: Path) -> None:
    slices = [*s.stack(), s.image((-10.0, -20.0, 40.0), 50, add=7.0)]
    paths = s.write(tmp_path, slices)
    assert codes(outcome(paths)) == codes(outcome(paths, "repair")) == {"position_repeated"}


@pytest.mark.parametrize("degrees", [-20.0, 1.5, 15.0])
def test_gantry_tilt_is_refused_or_resampled_onto_right_angles(tmp_path: Path, degrees: float) -> None:
    paths = s.write(tmp_path, s.stack(orientation=s.tilted(degrees), direction=(0, 0, 1)))
    assert codes(outcome(paths)) == {"gantry_tilt"}
    plan = only_volume(outcome(paths, "repair"))
    volume = load(plan)
    assert plan.geometry == "tilt_resampled"
    axes = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    assert np.allclose(axes.T @ axes, np.eye(3), atol=1e-9)
    inside = volume.array[0] > -1024
    z, y, x = np.nonzero(inside)
    points = np.stack([x, y, z], -1) @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    assert np.abs(volume.array[0][inside] - s.field(points)).max() < 2 * s.QUANTUM
    # Only voxels beside the displaced planes are empty: in each slice at least all but two rows of a plane are there.
    assert inside.sum(axis=(1, 2)).min() >= (s.ROWS - 2) * s.COLUMNS


def test_tilt_with_a_gap_is_repaired_in_both_ways(tmp_path: Path) -> None:
    slices = s.stack(orientation=s.tilted(12), direction=(0, 0, 1))
    del slices[4]
    volume = load(only_volume(outcome(s.write(tmp_path, slices), "repair")))
    assert volume.geometry == "tilt_resampled+gap_interpolated" and volume.shape[1] == 12


def test_changing_spacing_is_refused(tmp_path: Path) -> None:
    heights = [0, 2, 4, 6, 8, 10, 15, 20, 25, 30, 35, 40]
    paths = s.write(tmp_path, [s.image((0, 0, height), number) for number, height in enumerate(heights)])
    assert codes(outcome(paths)) == codes(outcome(paths, "repair")) == {"varying_spacing"}


@pytest.mark.parametrize("far", [2.5, 2.2, 1.8])
def test_one_displaced_slice_is_refused(tmp_path: Path, far: float) -> None:
    slices = s.stack()
    slices[6] = s.image((-10.0, -20.0, 30.0 + 10 + far), 7)
    assert outcome(s.write(tmp_path, slices)).volumes == []


def test_written_positions_may_be_rounded(tmp_path: Path) -> None:
    slices = s.stack(step=0.625)
    for dataset in slices:
        dataset.ImagePositionPatient = [round(float(part), 1) for part in dataset.ImagePositionPatient]
    volume = load(only_volume(outcome(s.write(tmp_path, slices))))
    assert volume.spacing_mm[0] == pytest.approx(0.625, abs=0.01) and volume.flags == ("position_jitter",)


@pytest.mark.parametrize("where", [0, 5])
def test_a_sagittal_slice_among_axial_ones_is_set_apart(tmp_path: Path, where: int) -> None:
    slices = s.stack(11)
    slices.insert(where, s.image((3, 4, 5), 77, orientation=s.SAGITTAL))
    result = outcome(s.write(tmp_path, slices))
    volume = load(only_volume(result))
    assert volume.shape[1] == 11 and s.world_error(volume) < s.QUANTUM
    assert volume.flags == ("series_partly_refused",)
    assert codes(result) == {"mixed_orientation"}


def test_a_series_of_single_orientations_is_no_volume(tmp_path: Path) -> None:
    slices = [s.image((0, 0, 0), n, orientation=o) for n, o in enumerate((s.AXIAL, s.CORONAL, s.SAGITTAL))]
    assert codes(outcome(s.write(tmp_path, slices))) == {"mixed_orientation"}


def test_a_localiser_is_related(tmp_path: Path) -> None:
    scout = s.image((3, 4, 5), 77, orientation=s.CORONAL, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    result = outcome(s.write(tmp_path, [*s.stack(), scout]))
    assert [kind for _, kind in result.related] == ["localiser"]
    assert only_volume(result).flags == ()


def test_a_derived_image_beside_the_stack_is_set_apart(tmp_path: Path) -> None:
    odd = s.image((-10, -20, 100.3), 77, ImageType=["DERIVED", "SECONDARY", "MIP"])
    result = outcome(s.write(tmp_path, [*s.stack(), odd]))
    assert only_volume(result).shape[1] == 12 and codes(result) == {"mixed_type"}


def test_kinds_that_alternate_do_not_hide_a_gap(tmp_path: Path) -> None:
    slices = s.stack(12)
    for number, dataset in enumerate(slices):
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL", "A" if number % 2 else "B"]
    assert only_volume(outcome(s.write(tmp_path / "whole", slices))).shape[1] == 12
    twice = [*slices, s.image((-10.0, -20.0, 40.0), 50, add=7.0, ImageType=slices[5].ImageType)]
    assert codes(outcome(s.write(tmp_path / "twice", twice))) == {"position_repeated"}
    del slices[5]
    assert codes(outcome(s.write(tmp_path / "gap", slices))) == {"missing_slices"}


def test_a_slice_of_another_size_is_set_apart(tmp_path: Path) -> None:
    odd = s.image((-10, -20, 54), 77, rows=10)
    result = outcome(s.write(tmp_path, [*s.stack(), odd]))
    assert only_volume(result).shape[1:] == (12, s.ROWS, s.COLUMNS) and codes(result) == {"mixed_size"}


def test_a_slice_of_another_pixel_spacing_is_set_apart(tmp_path: Path) -> None:
    odd = s.image((-10, -20, 54), 77, spacing=(1.1, 1.1))
    assert codes(outcome(s.write(tmp_path, [*s.stack(), odd]))) == {"mixed_spacing"}


@pytest.mark.parametrize(("count", "geometry", "code"), [(1, "strict", True), (1, "repair", True), (2, "strict", True)])
def test_too_few_slices_are_refused(tmp_path: Path, count: int, geometry: str, code: bool) -> None:
    assert codes(outcome(s.write(tmp_path, s.stack(count)), geometry)) == {"too_few_slices"}


def test_two_slices_that_lie_close_are_taken_under_repair(tmp_path: Path) -> None:
    volume = load(only_volume(outcome(s.write(tmp_path / "close", s.stack(2)), "repair")))
    assert volume.flags == ("few_slices",) and s.world_error(volume) < s.QUANTUM
    far = s.write(tmp_path / "far", s.stack(2, step=40))
    assert codes(outcome(far, "repair")) == {"too_few_slices"}


def test_images_at_one_place_are_no_volume(tmp_path: Path) -> None:
    images = [s.image((0, 0, 0), n, add=float(n), AcquisitionNumber=n) for n in range(4)]
    assert codes(outcome(s.write(tmp_path, images))) == {"single_position"}


def test_series_in_one_folder_stay_apart(tmp_path: Path) -> None:
    paths = [p for n in "123" for p in s.write(tmp_path, s.stack(8, series=n), name=n + "-{:02d}")]
    result = outcome(paths)
    assert [volume.shape[1] for volume in result.volumes] == [8, 8, 8]
    assert all(s.world_error(load(volume)) < s.QUANTUM for volume in result.volumes)


@pytest.mark.parametrize("count", [6, 4])
def test_a_series_copied_to_another_folder_stays_whole_in_each(tmp_path: Path, count: int) -> None:
    paths = s.write(tmp_path / "a", s.stack(6)) + s.write(tmp_path / "b", s.stack(6)[:count])
    result = outcome(paths)
    assert [volume.shape[1] for volume in result.volumes] == [6, count]
    assert all(volume.flags == ("copy_in_other_folder",) for volume in result.volumes)
    assert all(len({Path(path).parent for path in volume.paths}) == 1 for volume in result.volumes)


def test_a_series_spread_over_folders_is_one_volume(tmp_path: Path) -> None:
    slices = s.stack(12)
    paths = [path for n in range(4) for path in s.write(tmp_path / str(n), slices[n * 3 : n * 3 + 3])]
    assert only_volume(outcome(paths)).shape[1] == 12
    paths += s.write(tmp_path / "more", slices[5:7])
    assert only_volume(outcome(paths)).flags == ("duplicates_dropped",)


def test_two_stacks_in_one_series_are_two_volumes(tmp_path: Path) -> None:
    slices = [*s.stack(6), *s.stack(5, orientation=s.CORONAL, series="1")]
    result = outcome(s.write(tmp_path, slices))
    assert sorted(volume.shape[1] for volume in result.volumes) == [5, 6]
    assert all(volume.flags == ("series_split",) for volume in result.volumes)


def test_frames_of_reference_are_not_mixed(tmp_path: Path) -> None:
    slices = s.stack(12)
    for dataset in slices[6:]:
        dataset.FrameOfReferenceUID = s.uid("moved")
    assert [volume.shape[1] for volume in outcome(s.write(tmp_path, slices)).volumes] == [6, 6]


def test_blank_uids_fall_back_to_the_folder(tmp_path: Path) -> None:
    for name in "ab":
        slices = s.stack(6, SOPInstanceUID="", SOPClassUID="", SeriesInstanceUID="", StudyInstanceUID="")
        s.write(tmp_path / name, slices)
    result = outcome(sorted(path for path in tmp_path.rglob("*") if path.is_file()))
    assert [volume.shape for volume in result.volumes] == [(1, 6, s.ROWS, s.COLUMNS)] * 2


@pytest.mark.parametrize(
    "change",
    [
        {"PatientID": "P2"},
        {"PatientBirthDate": "19990101"},
        {"PatientBirthDate": "", "PatientName": "Roe^Richard"},
        {"IssuerOfPatientID": "elsewhere"},
    ],
)
def test_a_series_of_two_patients_is_refused(tmp_path: Path, change: dict[str, str]) -> None:
    slices = s.stack(6, IssuerOfPatientID="here")
    slices += s.stack(6, origin=(-10, -20, 42), **{"IssuerOfPatientID": "here", **change})
    result = outcome(s.write(tmp_path, slices))
    assert codes(result) == {"series_of_two_patients"} and len(result.refused) == 12
    assert not any(word in detail for _, _, detail in result.refused for word in ("P1", "P2", "Doe", "Roe", "1999"))


def test_a_name_written_in_another_way_is_no_second_patient(tmp_path: Path) -> None:
    slices = s.stack(6) + s.stack(6, origin=(-10, -20, 42), PatientName="DOE^JANE ANN")
    assert only_volume(outcome(s.write(tmp_path, slices))).shape[1] == 12


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"PixelSpacing": [0, 1]}, "spacing_invalid"),
        ({"PixelSpacing": None}, "spacing_invalid"),
        ({"PixelSpacing": [-1, 1]}, "spacing_invalid"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0.5, 0]}, "orientation_invalid"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "orientation_invalid"),
        ({"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]}, "orientation_invalid"),
        ({"ImageOrientationPatient": [1, 0, 0]}, "position_invalid"),
        ({"ImagePositionPatient": None}, "position_missing"),
        ({"ImageOrientationPatient": None}, "position_missing"),
        ({"RescaleSlope": 0}, "rescale_invalid"),
    ],
)
def test_invalid_geometry_and_rescale_are_named(tmp_path: Path, change: dict[str, object], code: str) -> None:
    assert codes(outcome(s.write(tmp_path, s.stack(4, **change)))) == {code}


@pytest.mark.parametrize("text", ["nan", "inf", "twelve"])
def test_positions_that_are_no_numbers_are_refused(tmp_path: Path, text: str) -> None:
    paths = s.write(tmp_path, s.stack(4, origin=(-10.5, -20.5, 30.5)))
    for path in paths:
        content = path.read_bytes()
        place = content.index(b"-20.5")
        path.write_bytes(content[:place] + text.ljust(5).encode()[:5] + content[place + 5 :])
    assert codes(outcome(paths)) == {"position_invalid"}


def test_one_bad_slice_marks_the_rest_of_its_series(tmp_path: Path) -> None:
    slices = s.stack()
    slices[11].PixelData = slices[11].PixelData[:100]
    result = outcome(s.write(tmp_path, slices))
    assert codes(result) == {"truncated"}
    assert only_volume(result).flags == ("series_partly_refused",)


def test_slightly_wrong_directions_are_mended_under_repair(tmp_path: Path) -> None:
    paths = s.write(tmp_path, s.stack(4, ImageOrientationPatient=[1.01, 0, 0, 0, 1, 0.01]))
    assert codes(outcome(paths)) == {"orientation_invalid"}
    assert "orientation_orthonormalised" in only_volume(outcome(paths, "repair")).flags
