"""Every real series is right or refused with a code; volumes equal the expected NIfTI in voxels and affine."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pydicom.data
import pytest
from pydicom import dcmread

from medssl.archive.codes import CODES
from medssl.archive.dicom import header as header_module
from medssl.archive.dicom.decode import StoredFrames
from medssl.archive.dicom.group import group
from medssl.archive.dicom.header import read_header
from medssl.archive.dicom.model import DicomHeader
from medssl.archive.dicom.pixels import load
from medssl.archive.dicom.reading import open_header
from medssl.archive.dicom.series import plan_series, read_series
from medssl.archive.dicom.tags import Tags
from medssl.archive.volume import Volume
from medssl.errors import InputRefused
from tests.archive.dicom.test_defects import codes, outcome

WITH_TRUTH = [
    "anatomical/001",
    "anatomical/001_implicit",
    "generic/anatomical/001",
    "generic/anatomical/001_implicit",
    "generic/anatomical/002_non_isotropic",
    "generic/compressed/001",
    "generic/compressed_j2k/001",
    "generic/compressed_jpeg/001",
    "generic/compressed_jpegls/001",
    "generic/compressed_rle/001",
    "generic/rgb/001",
    "hyperfine/anatomical/001",
    "siemens_multiframe/anatomical/001",
]
#: (series, code under strict, code under repair or the repair's name)
FAILING = [
    ("gantrytilting/001", "gantry_tilt", "tilt_resampled"),
    ("notavolume/001", "single_position", "single_position"),
    ("slicecount/001", "too_few_slices", "regular"),
    ("sliceincrement/001", "missing_slices", "gap_interpolated"),
    ("sliceincrement/002", "missing_slices", "tilt_resampled+gap_interpolated"),
    ("sliceorientation/001", "mixed_orientation", "regular"),
]


@pytest.fixture(scope="module")
def dicom(data_folder: Path) -> Path:
    return data_folder / "dicom"


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".gz", ".nrrd"))


def canonical(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return voxels (x, y, z[, colour]) and affine in nearest RAS+ order."""
    if array.dtype.names:
        array = np.stack([array[name] for name in "RGB"], -1)
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(array, affine))
    return np.asanyarray(image.dataobj), image.affine


def as_nifti(volume: Volume) -> np.ndarray:
    """Return the voxels as (x, y, z), or (x, y, z, colour)."""
    array = np.transpose(volume.array, (3, 2, 1, 0))
    return array if volume.channels == "colour" else array[..., 0]


def assert_equal_to_truth(volume: Volume, path: Path) -> None:
    truth = nibabel.load(path)
    expected, expected_affine = canonical(np.asanyarray(truth.dataobj), truth.affine)
    found, affine = canonical(as_nifti(volume), volume.affine)
    assert found.shape == expected.shape
    np.testing.assert_allclose(affine, expected_affine, atol=5e-4)
    np.testing.assert_allclose(found.astype(float), expected.astype(float), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("series", WITH_TRUTH)
@pytest.mark.parametrize("suffix", ["_ground_truth.nii.gz", "_ground_truth_reoriented.nii.gz"])
def test_a_real_series_equals_its_expected_volume(dicom: Path, series: str, suffix: str) -> None:
    (one,) = read_series(dicom / series)
    assert_equal_to_truth(one.volume, (dicom / series).with_name(Path(series).name + suffix))


def test_blank_uids_of_a_real_ct_make_one_volume_on_the_grid_of_its_segmentation(dicom: Path) -> None:
    (one,) = read_series(dicom / "ct_jpeg2000")
    segmentation = nibabel.load(dicom / "ct_jpeg2000_segmentation.nii.gz")
    labels, grid = canonical(np.asanyarray(segmentation.dataobj), segmentation.affine)
    voxels, affine = canonical(as_nifti(one.volume), one.volume.affine)
    assert one.volume.shape == (1, 20, 512, 512) and voxels.shape == labels.shape
    np.testing.assert_allclose(affine, grid, atol=1e-6)
    # The labels lie on what they name: soft tissue of the liver (5) in HU, not air.
    assert 40 < voxels[labels == 5].mean() < 130
    assert voxels.min() == -1024


@pytest.mark.parametrize(("series", "strict", "repair"), FAILING)
def test_a_failing_series_has_its_code_and_its_repair(dicom: Path, series: str, strict: str, repair: str) -> None:
    paths = files_of(dicom / "failing" / series)
    result = outcome(paths)
    assert not result.volumes and codes(result) == {strict}
    result = outcome(paths, "repair")
    assert codes(result) == {repair} or {volume.geometry for volume in result.volumes} == {repair}
    for plan in result.volumes:
        load(plan)


def test_two_real_slices_under_repair_equal_their_expected_volume(dicom: Path) -> None:
    (one,) = read_series(dicom / "failing/slicecount/001", "repair")
    assert_equal_to_truth(one.volume, dicom / "failing/slicecount/001_ground_truth.nii.gz")


@pytest.mark.parametrize("series", ["gantrytilting/001", "sliceincrement/002"])
def test_a_repaired_tilt_keeps_every_acquired_voxel_where_it_was(dicom: Path, series: str) -> None:
    """Sampled at the true places of the stored pixels, the repaired volume gives their values back.

    Interpolating twice smooths noise, so values are compared relative to what one pixel beside the true place
    gives; the slice that is not displaced by a fraction of a pixel must be equal.
    """
    from scipy.ndimage import map_coordinates

    (one,) = read_series(dicom / "failing" / series, "repair")
    inverse = np.linalg.inv(one.volume.affine)
    errors = []
    for path in files_of(dicom / "failing" / series):
        dataset = dcmread(path)
        values = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
        y, x = np.mgrid[: dataset.Rows, : dataset.Columns]
        orientation = np.array(dataset.ImageOrientationPatient, float)
        points = np.array(dataset.ImagePositionPatient, float) + (
            x[..., None] * orientation[:3] * dataset.PixelSpacing[1]
            + y[..., None] * orientation[3:] * dataset.PixelSpacing[0]
        )
        places = (points * [-1, -1, 1]) @ inverse[:3, :3].T + inverse[:3, 3]
        assert np.abs(places[..., 2] - np.rint(places[..., 2])).max() < 1e-6  # on the acquired planes
        tissue = values > -900
        errors.append([])
        for beside in (0.0, -1.0, 1.0):
            at = (places + [0, beside, 0])[..., ::-1].transpose(2, 0, 1)
            sampled = map_coordinates(one.volume.array[0].astype(float), at, order=1, mode="nearest")
            errors[-1].append(np.sqrt(np.mean((sampled - values)[tissue] ** 2)))
    for true, before, after in errors:
        assert true < 0.7 * min(before, after), errors
    assert min(true for true, _, _ in errors) < 1e-6


def test_a_repaired_tilt_and_gap_agrees_with_the_expected_volume_in_the_patient(dicom: Path) -> None:
    """The expected volume (dicom2nifti) lies on another grid: it steps the table's feed along the slices' normal and

    starts before the first slice. The two are compared where both have data, at the same points of the patient. Both
    are resampled, so noise differs: the median difference stays below 6 HU on acquired slices, while neighbouring
    slices of this head differ by more than 20 HU.
    """
    from scipy.ndimage import map_coordinates

    (one,) = read_series(dicom / "failing/sliceincrement/002", "repair")
    truth = nibabel.load(dicom / "failing/sliceincrement/002_ground_truth.nii.gz")
    expected = np.asanyarray(truth.dataobj).astype(float)
    indices = np.stack(np.meshgrid(*map(np.arange, expected.shape), indexing="ij"), -1)
    points = indices @ truth.affine[:3, :3].T + truth.affine[:3, 3]
    inverse = np.linalg.inv(one.volume.affine)
    places = points @ inverse[:3, :3].T + inverse[:3, 3]
    found = map_coordinates(
        as_nifti(one.volume).astype(float), np.moveaxis(places, -1, 0), order=1, mode="constant", cval=np.nan
    )
    compared = 0
    for number in (1, 2, 4):
        both = np.isfinite(found[..., number]) & (found[..., number] > -900) & (expected[..., number] > -900)
        if both.sum() > 10_000:
            compared += 1
            assert np.median(np.abs(found - expected)[..., number][both]) < 6
    assert compared >= 2


def test_every_real_file_ends_in_one_place(dicom: Path) -> None:
    for folder in sorted({path.parent for path in files_of(dicom)}):
        paths = [path for path in files_of(folder) if path.parent == folder]
        for geometry in ("strict", "repair"):
            result = outcome(paths, geometry)
            if "failing" not in folder.parts and folder.name != "dicom_seg":
                assert len(result.volumes) == 1 and not result.refused, folder


def test_a_study_of_four_series_is_four_volumes(dicom: Path) -> None:
    plans = plan_series(dicom / "brain_mr_study")
    assert len(plans) == 4 and {plan.shape for plan in plans} == {(1, 22, 320, 280)}
    assert {tuple(round(length, 2) for length in plan.spacing_mm) for plan in plans} == {(6.5, 0.69, 0.69)}


def test_an_enhanced_perfusion_series_is_one_volume_with_frames(dicom: Path) -> None:
    (one,) = read_series(dicom / "agfa_enhanced")
    assert one.volume.shape == (4, 25, 64, 64) and one.volume.channels == "frames"
    for time, path in enumerate(files_of(dicom / "agfa_enhanced")):
        assert np.array_equal(one.volume.array[time], dcmread(path).pixel_array)
    np.testing.assert_allclose(one.volume.affine[:3, 3], [105, 105, -79.6])


def test_segmentations_are_related(dicom: Path) -> None:
    result = outcome(files_of(dicom / "dicom_seg"))
    assert sorted(kind for _, kind in result.related) == ["segmentation", "segmentation"]
    assert [volume.shape for volume in result.volumes] == [(1, 3, 512, 512)]


def _pydicom_files() -> list[Path]:
    # The folder itself: pydicom's own function would try to download further files.
    return sorted(path for path in (Path(pydicom.data.__file__).parent / "test_files").rglob("*") if path.is_file())


def test_every_odd_file_of_pydicom_ends_in_one_place() -> None:
    headers, refused = [], []
    files = _pydicom_files()
    assert len(files) > 100
    for path in files:
        try:
            headers.append(read_header(path))
        except InputRefused as error:
            assert error.code in CODES
            refused.append(path)
    for geometry in ("strict", "repair"):
        result = group(headers, geometry)  # type: ignore[arg-type]
        ends = [{path for volume in result.volumes for path in volume.paths}, {path for path, _ in result.related}]
        ends.append({path for path, _, _ in result.refused})
        assert sum(map(len, ends)) == len(headers) == len(set.union(*ends))
        for plan in result.volumes:
            assert load(plan).array.size


def test_pixels_of_odd_files_equal_those_of_pydicom() -> None:
    """Also of secondary captures, which are no volumes: our decoders and our reading of the attributes are compared."""
    compared = 0
    for path in _pydicom_files():
        header = _header_with_pixels(path)
        if header is None or header.photometric == "PALETTE COLOR":  # pydicom's array is the index into the palette
            continue
        dataset = dcmread(path, force=True)
        try:
            expected = dataset.pixel_array
        except Exception:  # noqa: BLE001  (many of these files are damaged on purpose)
            continue
        found = np.stack(list(StoredFrames.open(path, header).frames())).astype(np.int64)
        expected = expected.reshape(found.shape).astype(np.int64)
        if header.samples == 1:
            stored = 2**header.bits_stored - 1
            assert np.array_equal(found & stored, expected & stored), path.name
        else:
            assert np.abs(found - expected).max() <= 2, path.name  # JPEG decoders round in other places
        compared += 1
    assert compared > 40


def _header_with_pixels(path: Path) -> DicomHeader | None:
    try:
        header = read_header(path)
        if header.related == "secondary_capture":
            opened = open_header(path)
            facts = header_module.pixel_format(Tags(opened.dataset), opened)
            return DicomHeader(str(path), transfer_syntax=opened.transfer_syntax, **facts)  # type: ignore[arg-type]
    except InputRefused:
        return None
    return None if header.related or header.problem else header
