"""Segmentations and structure sets of an archive become labels: voxel by voxel as drawn, or refused with a code."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import pytest
import SimpleITK
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset
from pydicom.sequence import Sequence as Items
from pydicom.sr.codedict import codes

from medssl.archive import label_dataset
from medssl.archive.codes import CODES
from medssl.archive.index import index
from medssl.archive.label_dataset import LabelDataset, dataset_from_index
from medssl.archive.load import open_index
from medssl.archive.sandbox_worker import Outcome, attempt
from medssl.errors import UsageError
from tests.archive.dicom import series as made

SHAPE = (6, made.ROWS, made.COLUMNS)
Point = tuple[float, float]


def slices(series: str = "1", **settings: Any) -> list[FileDataset]:
    """Return an oblique CT of six slices."""
    return made.stack(SHAPE[0], orientation=made.tilted(15.0), series=series, SliceThickness=2.0, **settings)


def seg_of(planes: Sequence[FileDataset], mask: NDArray[Any], names: Sequence[str], **overrides: Any) -> FileDataset:
    """Return a SEG by highdicom. `mask`: (Z, Y, X) of segment numbers or (Z, Y, X, S) of segments that may overlap."""
    sources = []
    for plane in planes:
        source = deepcopy(plane)
        for name in ("AccessionNumber", "StudyID", "StudyDate", "StudyTime"):
            made.put(source, name, plane.get(name, ""))
        sources.append(source)
    kind = overrides.pop("segmentation_type", "BINARY")
    result = highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=mask,
        segmentation_type=kind,
        segment_descriptions=[
            highdicom.seg.SegmentDescription(
                number, name, codes.SCT.Tissue, codes.SCT.Tissue, "MANUAL"
            )
            for number, name in enumerate(names, 1)
        ],
        series_instance_uid=made.uid("seg series", *names),
        series_number=7,
        sop_instance_uid=made.uid("seg", *names, mask.tobytes()),
        instance_number=1,
        manufacturer="m",
        manufacturer_model_name="m",
        software_versions="1",
        device_serial_number="1",
    )  # fmt: skip
    for name, value in overrides.items():
        made.put(result, name, value)
    return result


def structure_set(
    planes: Sequence[FileDataset],
    regions: dict[str, Iterable[tuple[float, Sequence[Point]]]],
    *,
    kind: str = "CLOSED_PLANAR",
    **overrides: Any,
) -> FileDataset:
    """Return an RTSTRUCT. Contours are (slice, corners as (column, row) in voxels), in the plane of their slice."""
    first = planes[0]
    result = made.base(modality="CT")
    result.SOPClassUID, result.Modality = "1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT"
    result.SOPInstanceUID = made.uid("structures", *regions)
    result.SeriesInstanceUID = made.uid("structures series", *regions)
    frame, study, series = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = first.SeriesInstanceUID
    study.RTReferencedSeriesSequence = Items([series])
    frame.RTReferencedStudySequence = Items([study])
    result.ReferencedFrameOfReferenceSequence = Items([frame])
    result.StructureSetROISequence, result.ROIContourSequence = Items([]), Items([])
    row, column = np.array(first.ImageOrientationPatient[:3]), np.array(first.ImageOrientationPatient[3:])
    step = np.array(planes[1].ImagePositionPatient) - np.array(first.ImagePositionPatient)
    for number, (name, contours) in enumerate(regions.items(), 1):
        region, drawn = Dataset(), Dataset()
        region.ROINumber, region.ROIName = number, name
        drawn.ReferencedROINumber, drawn.ContourSequence = number, Items([])
        for place, corners in contours:
            contour = Dataset()
            origin = np.array(first.ImagePositionPatient) + step * place
            points = [origin + row * x * made.SPACING[1] + column * y * made.SPACING[0] for x, y in corners]
            contour.ContourGeometricType, contour.NumberOfContourPoints = kind, len(points)
            contour.ContourData = [f"{value:.4f}" for point in points for value in point]
            drawn.ContourSequence.append(contour)
        result.StructureSetROISequence.append(region)
        result.ROIContourSequence.append(drawn)
    for name, value in overrides.items():
        made.put(result, name, value)
    return result


def box(low_x: float, low_y: float, high_x: float, high_y: float) -> list[Point]:
    return [(low_x, low_y), (high_x, low_y), (high_x, high_y), (low_x, high_y)]


class HerePool:
    """Stands in for the limited processes: the same calls and codes, without a start of Python for each test."""

    def __init__(self, workers: int, limits: Any) -> None: ...

    def __enter__(self) -> HerePool:
        return self

    def __exit__(self, *error: object) -> None: ...

    def map(
        self, function: Callable[[Any], Any], items: Iterable[Any], **options: Any
    ) -> Iterator[tuple[Any, Outcome]]:
        for item in items:
            yield item, attempt(function, item)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_dataset, "Pool", HerePool)


@pytest.fixture
def archive(tmp_path: Path) -> Callable[..., Path]:
    def build(planes: Sequence[FileDataset], *objects: FileDataset, geometry: str = "strict") -> Path:
        made.write(tmp_path / "in" / "ct", planes)
        made.write(tmp_path / "in" / "drawn", objects)
        with ThreadPoolExecutor(1) as executor:  # its limited process is kept from test to test
            index([tmp_path / "in"], tmp_path / "index", geometry=geometry, quiet=True, executor=executor)
        return tmp_path / "index"

    return build


def run(index_folder: Path, **options: Any) -> LabelDataset:
    return dataset_from_index(index_folder, index_folder.parent / "raw", workers=1, quiet=True, **options)


def labels_of(result: LabelDataset) -> NDArray[Any]:
    """Return the label map of the only case. Shape: (Z, Y, X)."""
    (case,) = result.voxels
    return np.asanyarray(nibabel.load(result.out / "labelsTr" / f"{case}.nii.gz").dataobj).transpose(2, 1, 0)


def codes_in(result: LabelDataset) -> list[str]:
    found = [row.code for row in result.refused]
    assert all(CODES[code].remedy for code in found)
    return found


def speckle(values: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, values, SHAPE).astype(np.uint8)


@pytest.mark.usefixtures("here")
def test_a_seg_becomes_labels_voxel_by_voxel_beside_its_image(archive: Callable[..., Path]) -> None:
    planes, mask = slices(), speckle()
    result = run(archive(planes, seg_of(planes, mask, ["Spleen", "Liver"])))
    assert result.exit_code == 0 and result.labels == {"background": 0, "Liver": 1, "Spleen": 2}
    assert np.array_equal(labels_of(result), np.array([0, 2, 1])[mask])
    (case,) = result.voxels
    image = nibabel.load(result.out / "imagesTr" / f"{case}_0000.nii.gz")
    label = nibabel.load(result.out / "labelsTr" / f"{case}.nii.gz")
    np.testing.assert_allclose(image.affine, label.affine)
    z, y, x = np.mgrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    points = np.stack([x, y, z], -1) @ image.affine[:3, :3].T + image.affine[:3, 3]
    assert np.abs(np.asanyarray(image.dataobj).transpose(2, 1, 0) - made.field(points)).max() < 0.1
    assert result.voxels[case] == {"Liver": int((mask == 2).sum()), "Spleen": int((mask == 1).sum())}
    content = json.loads((result.out / "dataset.json").read_text())
    assert content["channel_names"] == {"0": "CT"} and content["numTraining"] == 1
    row = next(iter(csv.DictReader((result.out / "cases.csv").open())))
    assert row["case"] == case and row["patient"].startswith("p")


@pytest.mark.usefixtures("here")
def test_a_label_map_seg_gives_the_same_labels(archive: Callable[..., Path]) -> None:
    planes, mask = slices(), speckle()
    result = run(archive(planes, seg_of(planes, mask, ["Spleen", "Liver"], segmentation_type="LABELMAP")))
    assert np.array_equal(labels_of(result), np.array([0, 2, 1])[mask])


@pytest.mark.usefixtures("here")
def test_a_seg_with_turned_axes_lands_on_the_same_voxels(archive: Callable[..., Path]) -> None:
    planes, mask = slices(), speckle(2)
    seg = seg_of(planes, np.ascontiguousarray(mask[:, ::-1, ::-1]), ["Liver"])
    for frame in seg.PerFrameFunctionalGroupsSequence:
        place = np.array(frame.PlanePositionSequence[0].ImagePositionPatient)
        shared = seg.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0]
        row, column = np.array(planes[0].ImageOrientationPatient).reshape(2, 3)
        place = place + row * (SHAPE[2] - 1) * made.SPACING[1] + column * (SHAPE[1] - 1) * made.SPACING[0]
        frame.PlanePositionSequence[0].ImagePositionPatient = [f"{value:.6f}" for value in place]
        shared.ImageOrientationPatient = [f"{value:.8f}" for value in (*-row, *-column)]
    assert np.array_equal(labels_of(run(archive(planes, seg))), mask)


@pytest.mark.usefixtures("here")
def test_the_index_relates_objects_to_their_series_and_volume(archive: Callable[..., Path]) -> None:
    planes = slices()
    known = open_index(
        archive([*planes, *slices("2", StudyInstanceUID=made.uid("other study"))],
                seg_of(planes, speckle(), ["a", "b"]), structure_set(planes, {"r": [(1, box(1, 1, 4, 4))]}))
    )  # fmt: skip
    volumes = {row["volume_id"]: row for row in known.rows().iter_rows(named=True)}
    rows = list(known.related().iter_rows(named=True))
    assert sorted(row["kind"] for row in rows) == ["segmentation", "structure_set"] and len(volumes) == 2
    for row in rows:
        (volume,) = row["volume_ids"]
        assert row["referenced_series_keys"] == [volumes[volume]["series_key"]]
        assert volumes[volume]["study_key"] == row["study_key"]


@pytest.mark.usefixtures("here")
def test_an_object_of_a_series_that_is_not_there_is_related_to_nothing(archive: Callable[..., Path]) -> None:
    planes, lost = slices(), slices("lost")
    known = archive(planes, seg_of(lost, speckle(), ["a", "b"]), seg_of(planes, speckle(2), ["c"]))
    result = run(known)
    assert codes_in(result) == ["label_without_volume"] and result.exit_code == 3 and list(result.labels) == [
        "background", "c",
    ]  # fmt: skip


@pytest.mark.usefixtures("here")
def test_contours_are_filled_with_holes_and_nothing_between_slices(archive: Callable[..., Path]) -> None:
    planes = slices()
    regions = {
        "ring": [(1, box(1.5, 1.5, 10.5, 8.5)), (1, box(4.5, 3.5, 7.5, 6.5)), (3, box(1.5, 1.5, 3.5, 3.5))],
        "two parts": [(4, box(0.5, 0.5, 2.5, 2.5)), (4, box(8.5, 8.5, 10.5, 10.5))],
    }
    result = run(archive(planes, structure_set(planes, regions)))
    expected = np.zeros(SHAPE, int)
    expected[1, 2:9, 2:11] = 1
    expected[1, 4:7, 5:8] = 0
    expected[3, 2:4, 2:4] = 1
    expected[4, 1:3, 1:3] = expected[4, 9:11, 9:11] = 2
    assert result.labels == {"background": 0, "ring": 1, "two parts": 2}
    assert np.array_equal(labels_of(result), expected)


@pytest.mark.usefixtures("here")
def test_a_keyhole_contour_has_a_hole_and_a_circle_its_area(archive: Callable[..., Path]) -> None:
    planes = slices()
    outer, inner = box(0.5, 0.5, 9.5, 9.5), box(3.5, 3.5, 6.5, 6.5)
    keyhole = [*outer, outer[0], inner[0], *inner[::-1], outer[0]]
    angles = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    circle = [(8 + 5.3 * np.cos(angle), 6 + 5.3 * np.sin(angle)) for angle in angles]
    result = run(archive(planes, structure_set(planes, {"hole": [(0, keyhole)], "disc": [(2, circle)]})))
    found = labels_of(result)
    expected = np.zeros(SHAPE[1:], bool)
    expected[1:10, 1:10] = True
    expected[4:7, 4:7] = False
    assert np.array_equal(found[0] == 2, expected)
    y, x = np.mgrid[: SHAPE[1], : SHAPE[2]]
    assert np.array_equal(found[2] == 1, (x - 8.0) ** 2 + (y - 6.0) ** 2 < 5.3**2)


@pytest.mark.usefixtures("here")
def test_points_and_lines_are_no_labels(archive: Callable[..., Path]) -> None:
    planes = slices()
    markers = structure_set(planes, {"isocentre": [(1, [(3, 3)])]}, kind="POINT")
    regions = structure_set(planes, {"organ": [(1, box(1.5, 1.5, 4.5, 4.5))]})
    result = run(archive(planes, markers, regions))
    assert result.labels == {"background": 0, "organ": 1} and codes_in(result) == ["structure_set_invalid"]


@pytest.mark.parametrize(
    ("contour", "code"),
    [
        ((1.5, box(1, 1, 4, 4)), "contour_off_slice"),
        ((9.0, box(1, 1, 4, 4)), "contour_off_slice"),
        ((-1.0, box(1, 1, 4, 4)), "contour_off_slice"),
        ((1.0, [(1, 1), (4, 4)]), "contour_invalid"),
        ((1.0, [(1, 1), (4, 4), (float("nan"), 2)]), "contour_invalid"),
    ],
)
@pytest.mark.usefixtures("here")
def test_contours_that_mean_no_area_of_a_slice_are_refused(
    archive: Callable[..., Path], contour: tuple[float, Sequence[Point]], code: str
) -> None:
    planes = slices()
    result = run(archive(planes, structure_set(planes, {"r": [contour]})))
    assert codes_in(result) == [code] and result.exit_code == 4
    assert not (result.out / "dataset.json").exists() and not (result.out / "imagesTr").exists()


@pytest.mark.usefixtures("here")
def test_a_number_of_points_that_lies_is_refused(archive: Callable[..., Path]) -> None:
    planes = slices()
    drawn = structure_set(planes, {"r": [(1, box(1, 1, 4, 4))]})
    drawn.ROIContourSequence[0].ContourSequence[0].NumberOfContourPoints = 2_000_000_000
    assert codes_in(run(archive(planes, drawn))) == ["contour_invalid"]


@pytest.mark.usefixtures("here")
def test_overlaps_are_refused_or_settled_by_the_stated_order(archive: Callable[..., Path]) -> None:
    planes = slices()
    both = np.zeros((*SHAPE, 2), np.uint8)
    both[2, 2:6, 2:6, 0] = both[2, 4:9, 4:9, 1] = 1
    known = archive(planes, seg_of(planes, both, ["inner", "outer"]))
    refused = run(known)
    assert codes_in(refused) == ["segments_overlap"] and "4 voxels" in refused.refused[0].detail
    first = labels_of(run(known, priority=["inner"], overwrite=True))
    last = labels_of(run(known, priority=["outer", "inner"], overwrite=True))
    assert (first[2, 4:6, 4:6] == 1).all() and (last[2, 4:6, 4:6] == 2).all()
    assert np.array_equal(first > 0, both.any(-1)) and np.array_equal(last > 0, both.any(-1))
    alone = labels_of(run(known, labels=["outer"], overwrite=True))
    assert np.array_equal(alone, both[..., 1])


@pytest.mark.usefixtures("here")
def test_a_label_that_was_not_drawn_is_not_taken_for_absent_unless_told(archive: Callable[..., Path]) -> None:
    one, two = slices(), slices("2", PatientID="P2", PatientName="Roe^Rick")
    known = archive([*one, *two], seg_of(one, speckle(), ["liver", "spleen"]), seg_of(two, speckle(2), ["liver"]))
    strict = run(known)
    assert codes_in(strict) == ["label_missing"] and len(strict.voxels) == 1 and strict.exit_code == 3
    told = run(known, missing="background", overwrite=True)
    assert len(told.voxels) == 2 and sorted(row["spleen"] > 0 for row in told.voxels.values()) == [False, True]
    assert len(run(known, labels=["liver"], overwrite=True).voxels) == 2


@pytest.mark.usefixtures("here")
def test_two_objects_of_a_volume_are_united_and_the_same_label_twice_is_refused(archive: Callable[..., Path]) -> None:
    planes = slices()
    mask = np.zeros(SHAPE, np.uint8)
    mask[0, :3, :3] = 1
    drawn = structure_set(planes, {"box": [(3, box(1.5, 1.5, 4.5, 4.5))]})
    known = archive(planes, seg_of(planes, mask, ["a"]), drawn)
    united = labels_of(run(known))
    assert np.array_equal(united == 1, mask == 1) and (united[3, 2:5, 2:5] == 2).all() and (united == 2).sum() == 9


@pytest.mark.usefixtures("here")
def test_the_same_label_in_two_objects_is_refused(archive: Callable[..., Path]) -> None:
    planes = slices()
    drawn = structure_set(planes, {"a": [(3, box(1.5, 1.5, 4.5, 4.5))]})
    assert codes_in(run(archive(planes, seg_of(planes, speckle(2), ["a"]), drawn))) == ["label_repeated"]


def shifted(seg: FileDataset, by: float) -> FileDataset:
    for frame in seg.PerFrameFunctionalGroupsSequence:
        place = frame.PlanePositionSequence[0].ImagePositionPatient
        frame.PlanePositionSequence[0].ImagePositionPatient = [f"{float(place[0]) + by:.4f}", place[1], place[2]]
    return seg


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda seg: shifted(seg, 0.65), "label_grid_differs"),  # half a voxel
        (lambda seg: shifted(seg, 13.0), "label_grid_differs"),  # ten voxels: out of the image
        (lambda seg: made.put(seg, "PatientID", "P2"), "label_other_patient"),
        (lambda seg: made.put(seg, "SegmentationType", "FRACTIONAL"), "segmentation_unsupported"),
        (lambda seg: made.put(seg.SegmentSequence[0], "SegmentNumber", 2), "segmentation_invalid"),
        (lambda seg: made.put(seg.SegmentSequence[0], "SegmentLabel", "Jane left kidney"), "label_names_patient"),
        (lambda seg: seg.PerFrameFunctionalGroupsSequence.pop(), "multiframe_invalid"),
        (lambda seg: made.put(seg, "Rows", 60000), "truncated"),
        (lambda seg: made.put(seg, "PixelData", seg.PixelData[:20]), "truncated"),
        (lambda seg: made.put(seg, "NumberOfFrames", 900_000_000), "multiframe_invalid"),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_seg_that_does_not_fit_or_is_damaged_is_refused(
    archive: Callable[..., Path], damage: Callable[[FileDataset], Any], code: str
) -> None:
    planes = slices()
    seg = seg_of(planes, speckle(), ["one", "two"])
    damage(seg)
    result = run(archive(planes, seg))
    assert codes_in(result) == [code]
    assert "Jane" not in (result.out / "labels.json").read_text()


@pytest.mark.usefixtures("here")
def test_images_that_were_repaired_or_have_frames_carry_no_labels(archive: Callable[..., Path]) -> None:
    planes = made.stack(9, SliceThickness=2.0)
    seg = seg_of(planes, np.ones((9, made.ROWS, made.COLUMNS), np.uint8), ["a"])
    known = archive([plane for number, plane in enumerate(planes) if number != 4], seg, geometry="repair")
    assert codes_in(run(known)) == ["label_image_unsuitable"]


@pytest.mark.usefixtures("here")
def test_what_cannot_work_is_named(archive: Callable[..., Path], tmp_path: Path) -> None:
    planes = slices()
    known = archive(planes, seg_of(planes, speckle(2), ["liver"]))
    with pytest.raises(UsageError, match="Known: liver"):
        run(known, labels=["livr"])
    with pytest.raises(UsageError, match="priority"):
        run(known, priority=["spleen"])
    with pytest.raises(UsageError, match="twice"):
        run(known, labels=["liver", "liver"])
    with pytest.raises(UsageError, match="missing"):
        run(known, missing="maybe")  # type: ignore[arg-type]
    assert not (tmp_path / "raw").exists()
    run(known)
    with pytest.raises(UsageError, match="--overwrite"):
        run(known)


@pytest.mark.usefixtures("here")
def test_an_index_without_labels_is_named(archive: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="no DICOM SEG"):
        run(archive(slices()))


@pytest.mark.slow
def test_labels_of_a_real_ct_are_those_of_the_expected_nrrd(data_folder: Path, tmp_path: Path) -> None:
    index([data_folder / "dicom" / "dicom_seg"], tmp_path / "index", workers=1, quiet=True)
    result = run(tmp_path / "index", labels=["Liver"])
    expected = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(data_folder / "dicom" / "dicom_seg" / "liver_seg.nrrd"))
    assert expected.sum() == 107098 and np.array_equal(labels_of(result), expected)
    assert codes_in(run(tmp_path / "index", missing="background", overwrite=True)) == ["segments_overlap"]
    order = ["GREEN", "ORANGE", "PURPLE", "LIGHT_BLUE", "DARK_BLUE", "Liver"]
    settled = run(tmp_path / "index", priority=order, overwrite=True)
    found = labels_of(settled)
    seg = highdicom.seg.segread(data_folder / "dicom" / "dicom_seg" / "partial_overlaps.dcm")
    names = {number: seg.get_segment_description(number).segment_label for number in seg.segment_numbers}
    volume = seg.get_volume(combine_segments=False)
    for number, name in names.items():
        if name == "GREEN":  # the first of the order is whole
            assert (found == settled.labels[name]).sum() == volume.array[..., number - 1].sum()
