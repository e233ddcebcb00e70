"""Time points, echoes, directions and phases become frames of one volume; enhanced images and mosaics are unfolded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileDataset
from pydicom.sequence import Sequence as Items

from medssl.archive.dicom.pixels import load
from medssl.archive.volume import Volume
from tests.archive.dicom import series as s
from tests.archive.dicom.test_defects import codes, only_volume, outcome

STEP = 50.0  # added to each further frame


def assert_frames(volume: Volume, count: int, step: float = STEP) -> None:
    assert volume.channels == "frames" and volume.shape[0] == count
    for channel in range(count):
        assert s.world_error(volume, channel, channel * step) < s.QUANTUM, channel


def times(count: int = 3, slices: int = 5, **by_time: list[object]) -> list[FileDataset]:
    """Return a series of several time points; each keyword gives an element's value at each time."""
    result = []
    for time in range(count):
        for dataset in s.stack(slices, modality="MR", add=time * STEP):
            for name, values in by_time.items():
                s.put(dataset, name, values[time])
            dataset.InstanceNumber = time * slices + dataset.InstanceNumber
            result.append(dataset)
    return result


@pytest.mark.parametrize(
    "by_time",
    [
        {"TemporalPositionIdentifier": [1, 2, 3]},
        {"EchoTime": [4.6, 9.2, 13.8], "EchoNumbers": [1, 2, 3]},
        {"AcquisitionNumber": [1, 2, 3]},
        {"AcquisitionTime": ["101010.5", "101012.5", "101014.5"]},
        {"TriggerTime": [0.0, 33.3, 66.6]},
        {"InversionTime": [100, 900, 1800]},
        {"DiffusionBValue": [0.0, 500.0, 1000.0]},
        {"FrameReferenceTime": [1000, 3000, 9000]},
    ],
    ids=lambda value: next(iter(value)),
)
def test_one_volume_with_frames_in_their_order(tmp_path: Path, by_time: dict[str, list[object]]) -> None:
    slices = times(**by_time)
    order = np.random.default_rng(2).permutation(len(slices))
    assert_frames(load(only_volume(outcome(s.write(tmp_path, [slices[number] for number in order])))), 3)


@pytest.mark.parametrize("by_place", [False, True])
def test_instance_numbers_tell_frames_apart_only_if_nothing_else_does(tmp_path: Path, by_place: bool) -> None:
    slices = times()
    if by_place:
        for number, dataset in enumerate(slices):
            dataset.InstanceNumber = (number % 5) * 3 + number // 5
    volume = load(only_volume(outcome(s.write(tmp_path, slices))))
    assert_frames(volume, 3)
    assert volume.flags == ("frames_by_number",)


def test_frames_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    slices = times()
    for dataset, number in zip(slices, np.random.default_rng(0).permutation(len(slices)), strict=True):
        dataset.InstanceNumber = int(number)
    assert codes(outcome(s.write(tmp_path, slices), "repair")) == {"position_repeated"}


def test_heart_phases_may_start_at_other_times_in_each_slice(tmp_path: Path) -> None:
    slices = times(TriggerTime=[0, 30, 60])
    for number, dataset in enumerate(slices):
        dataset.TriggerTime = float(dataset.TriggerTime) + number % 5 * 1.7
        dataset.InstanceNumber = None
    assert_frames(load(only_volume(outcome(s.write(tmp_path, slices)))), 3)


def test_directions_of_one_b_value_are_kept_in_the_order_of_acquisition(tmp_path: Path) -> None:
    slices = times(4, DiffusionBValue=[0.0, 1000.0, 1000.0, 0.0], AcquisitionNumber=[1, 2, 3, 4])
    directions = [None, [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], None]
    for number, dataset in enumerate(slices):
        s.put(dataset, "DiffusionGradientOrientation", directions[number // 5])
    assert_frames(load(only_volume(outcome(s.write(tmp_path, slices)))), 4)


def test_siemens_b_values_are_read_from_their_private_elements(tmp_path: Path) -> None:
    slices = times(3)
    for number, dataset in enumerate(slices):
        dataset.InstanceNumber = 1
        dataset.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0C, "IS", [0, 400, 800][number // 5])
    assert_frames(load(only_volume(outcome(s.write(tmp_path, slices)))), 3)


def test_a_time_point_that_lacks_slices_is_left_out(tmp_path: Path) -> None:
    slices = times(3, AcquisitionNumber=[1, 2, 3])[:-2]
    result = outcome(s.write(tmp_path, slices))
    volume = load(only_volume(result))
    assert_frames(volume, 2)
    assert codes(result) == {"incomplete_frame"} and "series_partly_refused" in volume.flags


def test_overlapping_stations_are_two_volumes(tmp_path: Path) -> None:
    slices = s.stack(10, AcquisitionNumber=1) + s.stack(8, origin=(-10, -20, 44), AcquisitionNumber=2, add=5.0)
    volumes = [load(volume) for volume in outcome(s.write(tmp_path, slices)).volumes]
    assert sorted(volume.shape[1] for volume in volumes) == [8, 10]
    assert max(s.world_error(volume, add=5.0 * (volume.shape[1] == 8)) for volume in volumes) < s.QUANTUM


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ImageType", [["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"], ["ORIGINAL", "PRIMARY", "R"]]),
        ("ImageType", [["DERIVED", "PRIMARY", "W"], ["DERIVED", "PRIMARY", "F"], ["DERIVED", "PRIMARY", "IP"]]),
        ("ConvolutionKernel", ["B30", "B70", "B10"]),
    ],
)
def test_other_kinds_of_images_are_other_volumes(tmp_path: Path, name: str, values: list[object]) -> None:
    volumes = outcome(s.write(tmp_path, times(3, **{name: values}))).volumes
    assert [volume.shape[:2] for volume in volumes] == [(1, 5)] * 3
    errors = [min(s.world_error(load(volume), add=time * STEP) for volume in volumes) for time in range(3)]
    assert max(errors) < s.QUANTUM
    assert {volume.flags for volume in volumes} == {("series_split",)}


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_an_enhanced_image_is_ordered_by_place(tmp_path: Path, modality: str) -> None:
    planes = s.stack(7, orientation=s.SAGITTAL, modality=modality)
    shuffled = [planes[number] for number in np.random.default_rng(0).permutation(7)]
    volume = load(only_volume(outcome(s.write(tmp_path, [s.enhanced(shuffled)]))))
    assert volume.shape == (1, 7, s.ROWS, s.COLUMNS) and s.world_error(volume) < s.QUANTUM


def test_slope_and_intercept_of_each_enhanced_frame_are_used(tmp_path: Path) -> None:
    planes = [
        s.image((0, 0, 2.0 * number), number, slope=0.05 * (number + 1), intercept=-1024.0 - 8 * number)
        for number in range(5)
    ]
    volume = load(only_volume(outcome(s.write(tmp_path, [s.enhanced(planes)]))))
    assert s.world_error(volume) < 0.05 * 5 / 2 + 1e-3


@pytest.mark.parametrize("kind", ["temporal", "echo", "b_value", "trigger", "dimension"])
def test_frames_of_an_enhanced_image(tmp_path: Path, kind: str) -> None:
    planes = [plane for time in range(3) for plane in s.stack(4, modality="MR", add=time * STEP)]

    def change(item: Dataset, number: int) -> None:
        time, detail = number // 4, Dataset()
        if kind == "temporal":
            item.FrameContentSequence[0].TemporalPositionIndex = time + 1
        elif kind == "echo":
            detail.EffectiveEchoTime = 5.0 * (time + 1)
            item.MREchoSequence = Items([detail])
        elif kind == "b_value":
            detail.DiffusionBValue = 400.0 * time
            item.MRDiffusionSequence = Items([detail])
        elif kind == "trigger":
            detail.NominalCardiacTriggerDelayTime = 30.0 * time
            item.CardiacSynchronizationSequence = Items([detail])
        else:
            item.FrameContentSequence[0].DimensionIndexValues = [1, number % 4 + 1, time + 1]

    pointers = []
    for tag in (0x00209056, 0x00209057, 0x00189087):
        pointer = Dataset()
        pointer.DimensionIndexPointer = tag
        pointers.append(pointer)
    order = np.random.default_rng(4).permutation(12)
    whole = s.enhanced(
        [planes[n] for n in order], lambda item, n: change(item, int(order[n])), DimensionIndexSequence=Items(pointers)
    )
    assert_frames(load(only_volume(outcome(s.write(tmp_path, [whole])))), 3)


def test_stacks_of_an_enhanced_image_are_volumes(tmp_path: Path) -> None:
    planes = [*s.stack(4, modality="MR"), *s.stack(5, orientation=s.CORONAL, modality="MR")]

    def change(item: Dataset, number: int) -> None:
        place = Dataset()
        place.ImageOrientationPatient = list(s.AXIAL if number < 4 else s.CORONAL)
        item.PlaneOrientationSequence = Items([place])
        item.FrameContentSequence[0].StackID = "1" if number < 4 else "2"

    result = outcome(s.write(tmp_path, [s.enhanced(planes, change)]))
    volumes = [load(volume) for volume in result.volumes]
    assert sorted(volume.shape[1] for volume in volumes) == [4, 5]
    assert max(s.world_error(volume) for volume in volumes) < s.QUANTUM


def test_parallel_stacks_with_a_gap_between_them_are_told_apart(tmp_path: Path) -> None:
    planes = [*s.stack(4), *s.stack(4, origin=(-10, -20, 99))]

    def change(item: Dataset, number: int) -> None:
        item.FrameContentSequence[0].StackID = str(number // 4)

    result = outcome(s.write(tmp_path, [s.enhanced(planes, change)]))
    assert [volume.shape[1] for volume in result.volumes] == [4, 4]


def test_time_points_in_enhanced_files_of_one_series_are_frames(tmp_path: Path) -> None:
    files = []
    for time in range(3):

        def change(item: Dataset, number: int, time: int = time) -> None:
            item.FrameContentSequence[0].TemporalPositionIndex = time + 1

        files.append(s.enhanced(s.stack(4, modality="MR", add=time * STEP), change, InstanceNumber=time + 1))
    assert_frames(load(only_volume(outcome(s.write(tmp_path, files)))), 3)


def test_an_enhanced_image_with_too_few_groups_is_refused(tmp_path: Path) -> None:
    image = s.enhanced(s.stack(4))
    image.PerFrameFunctionalGroupsSequence = image.PerFrameFunctionalGroupsSequence[:3]
    assert codes(outcome(s.write(tmp_path, [image]))) == {"multiframe_invalid"}


def test_many_frames_without_positions_are_refused(tmp_path: Path) -> None:
    image = s.enhanced(s.stack(4))
    del image.PerFrameFunctionalGroupsSequence, image.SharedFunctionalGroupsSequence
    assert codes(outcome(s.write(tmp_path, [image]))) == {"multiframe_invalid"}


@pytest.mark.parametrize("orientation", [s.AXIAL, s.SAGITTAL, (0.8, 0.6, 0.0, -0.48, 0.64, -0.6)])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_mosaic_is_unfolded_where_its_slices_lie(
    tmp_path: Path, orientation: tuple[float, ...], reverse: bool
) -> None:
    normal = s.normal_of(orientation) * (-1 if reverse else 1)
    planes = s.stack(7, step=3.0, orientation=orientation, direction=normal, modality="MR")
    volume = load(only_volume(outcome(s.write(tmp_path, [s.mosaic(planes, normal=normal, step=3.0)]))))
    assert volume.shape == (1, 7, s.ROWS, s.COLUMNS)
    assert s.world_error(volume) < s.QUANTUM and not volume.flags


def test_mosaics_of_a_series_are_time_points(tmp_path: Path) -> None:
    files = [
        s.mosaic(s.stack(5, modality="MR", add=time * STEP), time=time + 1, normal=(0, 0, 1), step=2.0)
        for time in range(4)
    ]
    assert_frames(load(only_volume(outcome(s.write(tmp_path, files[::-1])))), 4)


def test_a_mosaic_without_the_direction_of_its_slices(tmp_path: Path) -> None:
    axial = s.mosaic(s.stack(5, modality="MR"), normal=None, step=2.0)
    volume = load(only_volume(outcome(s.write(tmp_path / "axial", [axial]))))
    assert volume.flags == ("mosaic_normal_assumed",) and s.world_error(volume) < s.QUANTUM
    sagittal = s.mosaic(s.stack(5, orientation=s.SAGITTAL, modality="MR"), normal=None, step=2.0)
    assert codes(outcome(s.write(tmp_path / "sagittal", [sagittal]))) == {"mosaic_invalid"}


def test_a_mosaic_that_cannot_be_unfolded_is_refused(tmp_path: Path) -> None:
    image = s.mosaic(s.stack(5, modality="MR"), normal=(0, 0, 1), step=2.0)
    image.SpacingBetweenSlices = None
    assert codes(outcome(s.write(tmp_path, [image]))) == {"mosaic_invalid"}
