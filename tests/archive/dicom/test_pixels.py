"""Decoded numbers: rescale, signs, colours, padding, compressions, HU and SUV."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from medssl.archive.dicom.pixels import load
from medssl.archive.dicom.series import read_series
from medssl.errors import InputRefused
from tests.archive.dicom import series as s
from tests.archive.dicom.test_defects import codes, only_volume, outcome


def test_slope_and_intercept_of_each_slice_are_used(tmp_path: Path) -> None:
    slices = [s.image((0, 0, 2.0 * n), n, slope=0.05 * (n + 1), intercept=-1024.0 - n) for n in range(6)]
    volume = load(only_volume(outcome(s.write(tmp_path, slices))))
    assert volume.array.dtype == np.float32
    assert s.world_error(volume) < 0.05 * 6 / 2 + 1e-3


def test_integers_stay_integers(tmp_path: Path) -> None:
    volume = load(only_volume(outcome(s.write(tmp_path, s.stack(4, slope=1, intercept=-1024)))))
    assert volume.array.dtype == np.int16 and s.world_error(volume) <= 0.501


def with_pixels(values: np.ndarray, **overrides: object) -> list[FileDataset]:
    """Return four slices with the given stored values."""
    slices = s.stack(4, rows=values.shape[0], columns=values.shape[1], modality="MR", slope=1, intercept=0)
    for dataset in slices:
        dataset.PixelData = values.tobytes() if values.nbytes % 2 == 0 else values.tobytes() + b"\0"
        for name, value in overrides.items():
            s.put(dataset, name, value)
    return slices


def test_signed_values_and_unused_bits(tmp_path: Path) -> None:
    true = np.arange(-100, 100, dtype=np.int16).reshape(10, 20)
    dirty = (true & 0x0FFF) | np.int16(0x5000)  # an overlay in the four upper bits
    slices = with_pixels(dirty, BitsStored=12, HighBit=11, PixelRepresentation=1)
    assert np.array_equal(load(only_volume(outcome(s.write(tmp_path / "signed", slices)))).array[0, 0], true)
    unsigned = with_pixels(dirty, BitsStored=12, HighBit=11, PixelRepresentation=0)
    assert np.array_equal(
        load(only_volume(outcome(s.write(tmp_path / "unsigned", unsigned)))).array[0, 0], true & 0xFFF
    )
    shifted = with_pixels(((true & 0xFFF) << 4).astype(np.int16), BitsStored=12, HighBit=15, PixelRepresentation=1)
    assert np.array_equal(load(only_volume(outcome(s.write(tmp_path / "shifted", shifted)))).array[0, 0], true)


def test_monochrome1_is_inverted_unless_it_is_a_quantity(tmp_path: Path) -> None:
    values = np.arange(200, dtype=np.uint16).reshape(10, 20)
    slices = with_pixels(values, BitsStored=12, HighBit=11, PhotometricInterpretation="MONOCHROME1")
    volume = load(only_volume(outcome(s.write(tmp_path / "mr", slices))))
    assert volume.flags == ("monochrome1_inverted",) and np.array_equal(volume.array[0, 0], 4095 - values)
    volume = load(only_volume(outcome(s.write(tmp_path / "ct", s.stack(4, PhotometricInterpretation="MONOCHROME1")))))
    assert volume.flags == ("monochrome1_kept",) and s.world_error(volume) < s.QUANTUM


@pytest.mark.parametrize("limit", [None, 10])
def test_padding_of_ct_becomes_air(tmp_path: Path, limit: int | None) -> None:
    slices = s.stack(4, slope=1, intercept=-3000)
    for dataset in slices:
        values = np.frombuffer(dataset.PixelData, "<u2").reshape(s.ROWS, s.COLUMNS).copy()
        values[:2] = 5
        dataset.PixelData = values.tobytes()
        dataset.add_new("PixelPaddingValue", "US", 5 if limit is None else 0)
        if limit is not None:
            dataset.add_new("PixelPaddingRangeLimit", "US", limit)
    volume = load(only_volume(outcome(s.write(tmp_path, slices))))
    assert volume.flags == ("padding_replaced",)
    assert (volume.array[0, :, :2] == -1024).all() and (volume.array[0, :, 2:] > -200).all()


def test_padding_far_above_the_image_becomes_its_smallest_value(tmp_path: Path) -> None:
    values = np.arange(100, 300, dtype=np.uint16).reshape(10, 20)
    values[0] = 60000
    slices = with_pixels(values)
    for dataset in slices:
        dataset.add_new("PixelPaddingValue", "US", 60000)
    volume = load(only_volume(outcome(s.write(tmp_path, slices))))
    assert (volume.array[0, :, 0] == 120).all() and volume.array.max() == 299


def test_zero_as_padding_of_mr_stays_zero(tmp_path: Path) -> None:
    values = np.arange(0, 200, dtype=np.uint16).reshape(10, 20)
    slices = with_pixels(values)
    for dataset in slices:
        dataset.add_new("PixelPaddingValue", "US", 0)
    volume = load(only_volume(outcome(s.write(tmp_path, slices))))
    assert not volume.flags and np.array_equal(volume.array[0, 0], values)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_encodings_of_the_data_set(tmp_path: Path, syntax: UID) -> None:
    slices = s.stack(4)
    for dataset in slices:
        dataset.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
            dataset["PixelData"].VR = "OW"
    volume = load(only_volume(outcome(s.write(tmp_path, slices))))
    assert s.world_error(volume) < s.QUANTUM


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("implicit", [False, True])
def test_files_without_preamble_and_meta(tmp_path: Path, big: bool, implicit: bool) -> None:
    for number, dataset in enumerate(s.stack(4)):
        if big:
            implicit = False  # big endian is always explicit
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
            dataset["PixelData"].VR = "OW"
        dataset.file_meta, dataset.preamble = FileMetaDataset(), None
        dcmwrite(tmp_path / str(number), dataset, implicit_vr=implicit, little_endian=not big)
    volume = load(only_volume(outcome(sorted(tmp_path.iterdir()))))
    assert s.world_error(volume) < s.QUANTUM


def _jpeg_2000(values: np.ndarray) -> bytes:
    from openjpeg.utils import encode_array

    return bytes(encode_array(values, use_mct=False))


def _jpeg_ls(values: np.ndarray) -> bytes:
    import jpeg_ls

    return bytes(jpeg_ls.encode_array(values))


def _run_length(values: np.ndarray) -> bytes:
    from pydicom.pixels.encoders import RLELosslessEncoder

    return bytes(
        RLELosslessEncoder.encode(
            values.tobytes(),
            rows=values.shape[0],
            columns=values.shape[1],
            samples_per_pixel=1,
            bits_allocated=16,
            bits_stored=16,
            pixel_representation=0,
            photometric_interpretation="MONOCHROME2",
            number_of_frames=1,
        )
    )


@pytest.mark.parametrize(
    ("syntax", "encode"),
    [(JPEG2000Lossless, _jpeg_2000), (JPEGLSLossless, _jpeg_ls), (RLELossless, _run_length)],
    ids=["jpeg2000", "jpeg-ls", "rle"],
)
@pytest.mark.parametrize("multiframe", [False, True])
def test_lossless_compressions(tmp_path: Path, syntax: UID, encode: object, multiframe: bool) -> None:
    slices = s.stack(4, rows=32, columns=48)
    whole = [s.enhanced(slices)] if multiframe else slices
    for dataset in whole:
        planes = np.frombuffer(dataset.PixelData, "<u2").reshape(-1, 32, 48)
        dataset.PixelData = encapsulate([encode(np.ascontiguousarray(plane)) for plane in planes])  # type: ignore[operator]
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
    volume = load(only_volume(outcome(s.write(tmp_path, whole))))
    assert s.world_error(volume) < s.QUANTUM


def test_an_unknown_compression_is_refused(tmp_path: Path) -> None:
    slices = s.stack(4)
    for dataset in slices:
        dataset.PixelData = encapsulate([b"\0" * 64])
        dataset["PixelData"].is_undefined_length = True
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.100")  # MPEG-2
    with pytest.raises(InputRefused, match="compression_unsupported"):
        read_series(s.write(tmp_path, slices)[0].parent)


def test_damaged_compressed_pixels_are_refused(tmp_path: Path) -> None:
    slices = s.stack(4)
    for dataset in slices:
        dataset.PixelData = encapsulate([b"\xff\x4f\xff\x51" + b"\7" * 60])
        dataset["PixelData"].is_undefined_length = True
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    with pytest.raises(InputRefused, match="decode_failed"):
        read_series(s.write(tmp_path, slices)[0].parent)


@pytest.mark.parametrize("planar", [0, 1])
def test_colours_are_three_channels(tmp_path: Path, planar: int) -> None:
    true = np.random.default_rng(0).integers(0, 256, (s.ROWS, s.COLUMNS, 3), np.uint8)
    slices = s.stack(4, modality="MR", SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=planar)
    for dataset in slices:
        dataset.BitsAllocated = dataset.BitsStored = 8
        dataset.HighBit = 7
        dataset.PixelData = (true.transpose(2, 0, 1) if planar else true).tobytes()
    volume = load(only_volume(outcome(s.write(tmp_path, slices))))
    assert volume.channels == "colour" and volume.array.dtype == np.uint8
    assert np.array_equal(volume.array[:, 2], true.transpose(2, 0, 1))


def test_palettes_become_colours(tmp_path: Path) -> None:
    index = np.random.default_rng(0).integers(0, 256, (10, 20), np.uint8)
    tables = np.random.default_rng(1).integers(0, 256, (3, 256), np.uint8)
    picture = s.base(modality="US", SOPInstanceUID="1.2.9", Rows=10, Columns=20)
    picture.SOPClassUID, picture.PhotometricInterpretation = "1.2.840.10008.5.1.4.1.1.6.1", "PALETTE COLOR"
    picture.BitsAllocated = picture.BitsStored = 8
    picture.HighBit, picture.PixelData = 7, index.tobytes()
    for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        picture.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [256, 0, 8])
        picture.add_new(f"{name}PaletteColorLookupTableData", "OW", table.tobytes())
    volume = load(only_volume(outcome(s.write(tmp_path, [picture]))))
    assert volume.shape == (3, 1, 10, 20) and volume.geometry == "picture"
    assert np.array_equal(volume.array[:, 0], tables[:, index])


def radiograph(**overrides: object) -> FileDataset:
    values = np.arange(200, dtype="<u2").reshape(10, 20)
    picture = s.base(modality="DX", SOPInstanceUID="1.2.9", Rows=10, Columns=20, **overrides)
    picture.SOPClassUID, picture.PixelData = "1.2.840.10008.5.1.4.1.1.1.1", values.tobytes()
    return picture


def test_a_radiograph_is_a_2d_image_with_its_rows_as_they_stand(tmp_path: Path) -> None:
    volume = load(only_volume(outcome(s.write(tmp_path, [radiograph(ImagerPixelSpacing=[0.2, 0.3])]))))
    assert volume.shape == (1, 1, 10, 20) and volume.modality == "DX"
    assert np.array_equal(np.diag(volume.affine), [0.3, 0.2, 1, 1])
    assert volume.flags == ("detector_spacing", "orientation_unknown")
    assert volume.array[0, 0, 1, 0] == 20


def test_radiographs_of_one_series_are_images_of_their_own(tmp_path: Path) -> None:
    second = radiograph()
    second.SOPInstanceUID = "1.2.10"
    volumes = outcome(s.write(tmp_path, [radiograph(), second])).volumes
    assert [volume.shape for volume in volumes] == [(1, 1, 10, 20)] * 2
    assert "spacing_unknown" in volumes[0].flags


def test_a_moving_picture_has_frames(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 10, 20, 3), np.uint8)
    picture = s.base(modality="US", SOPInstanceUID="1.2.9", Rows=10, Columns=20, SamplesPerPixel=3, NumberOfFrames=5)
    picture.SOPClassUID, picture.PhotometricInterpretation = "1.2.840.10008.5.1.4.1.1.3.1", "RGB"
    picture.PlanarConfiguration = 0
    picture.BitsAllocated = picture.BitsStored = 8
    picture.HighBit, picture.PixelData = 7, frames.tobytes()
    region = Dataset()
    region.RegionSpatialFormat, region.PhysicalUnitsXDirection, region.PhysicalUnitsYDirection = 1, 3, 3
    region.PhysicalDeltaX, region.PhysicalDeltaY = 0.02, 0.03
    picture.SequenceOfUltrasoundRegions = Items([region])
    volume = load(only_volume(outcome(s.write(tmp_path, [picture]))))
    assert volume.shape == (5, 1, 10, 20) and volume.channels == "frames" and "colour_to_grey" in volume.flags
    assert np.abs(volume.array[3, 0] - frames[3] @ [0.299, 0.587, 0.114]).max() < 0.51
    assert volume.spacing_mm == pytest.approx((1.0, 0.3, 0.2))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"RescaleSlope": None, "RescaleIntercept": None}, "hu_unavailable"),
        ({"RescaleType": "ED"}, "hu_unavailable"),
    ],
)
def test_ct_without_hounsfield_units_is_refused(tmp_path: Path, change: dict[str, object], code: str) -> None:
    assert codes(outcome(s.write(tmp_path, s.stack(4, **change)))) == {code}


def pet(**changes: object) -> list[FileDataset]:
    """Return a PET of 70 kg, 350 MBq of F-18 injected one hour before the scan."""
    slices = s.stack(4, modality="PT", slope=1.0, intercept=0.0, add=1000.0)
    for number, dataset in enumerate(slices):
        tracer = Dataset()
        tracer.RadionuclideTotalDose, tracer.RadionuclideHalfLife = 3.5e8, 6586.2
        tracer.RadiopharmaceuticalStartTime = "090000"
        dataset.RadiopharmaceuticalInformationSequence = Items([tracer])
        dataset.Units, dataset.DecayCorrection, dataset.PatientWeight = "BQML", "START", 70
        dataset.CorrectedImage = ["DECY", "ATTN", "SCAT"]
        dataset.SeriesDate = dataset.AcquisitionDate = "20240229"
        dataset.SeriesTime, dataset.AcquisitionTime = "100000", f"10{number:02d}00"
        for name, value in changes.items():
            s.put(tracer if name.startswith("Radio") else dataset, name, value)
    return slices


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        ({}, 70_000 / 3.5e8 * 2 ** (3600 / 6586.2)),
        ({"DecayCorrection": "ADMIN"}, 70_000 / 3.5e8),
        ({"Units": "GML"}, 1.0),
        ({"RadiopharmaceuticalStartDateTime": "20240229083000"}, 70_000 / 3.5e8 * 2 ** (5400 / 6586.2)),
        ({"SeriesTime": "150000"}, 70_000 / 3.5e8 * 2 ** (3600 / 6586.2)),
    ],
)
def test_pet_is_in_suv_by_body_weight(tmp_path: Path, change: dict[str, object], factor: float) -> None:
    volume = load(only_volume(outcome(s.write(tmp_path, pet(**change)))))
    z, y, x = np.mgrid[:4, : s.ROWS, : s.COLUMNS]
    truth = s.field(np.stack([x, y, z], -1) @ volume.affine[:3, :3].T + volume.affine[:3, 3]) + 1000
    assert np.abs(volume.array[0] / factor - truth).max() < 0.51
    assert ("suv_from_acquisition_time" in volume.flags) == ("SeriesTime" in change)


@pytest.mark.parametrize(
    "change",
    [
        {"Units": "CNTS"},
        {"Units": None},
        {"PatientWeight": None},
        {"PatientWeight": 0},
        {"RadionuclideTotalDose": None},
        {"RadionuclideTotalDose": 350},
        {"RadionuclideHalfLife": None},
        {"RadiopharmaceuticalStartTime": "110000"},
        {"RadiopharmaceuticalStartTime": None},
        {"DecayCorrection": "NONE"},
        {"CorrectedImage": ["SCAT"]},
        {"RadiopharmaceuticalInformationSequence": None},
    ],
    ids=str,
)
def test_pet_that_needs_guessing_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    slices = pet(**{name: value for name, value in change.items() if "Sequence" not in name})
    if "RadiopharmaceuticalInformationSequence" in change:
        for dataset in slices:
            del dataset.RadiopharmaceuticalInformationSequence
    assert codes(outcome(s.write(tmp_path, slices))) == {"suv_unavailable"}


def test_a_file_that_changed_after_indexing_is_refused(tmp_path: Path) -> None:
    paths = s.write(tmp_path, s.stack(4))
    plan = only_volume(outcome(paths))
    s.write(tmp_path, [s.image((0, 0, 0), 1, rows=5)])
    with pytest.raises(InputRefused, match="changed_while_read"):
        load(plan)


def test_paths_may_be_relative_to_a_root(tmp_path: Path) -> None:
    from dataclasses import replace

    plan = only_volume(outcome(s.write(tmp_path, s.stack(4))))
    relative = replace(plan, paths=tuple(Path(path).name for path in plan.paths))
    assert s.world_error(load(relative, tmp_path)) < s.QUANTUM


def enhanced_pet(code: str, reference: str = "20240229100000") -> FileDataset:
    """Return an enhanced PET whose stored values map to the units of a UCUM code."""

    def change(item: Dataset, number: int) -> None:
        del item.PixelValueTransformationSequence
        units, mapping = Dataset(), Dataset()
        units.CodeValue = code
        mapping.MeasurementUnitsCodeSequence = Items([units])
        mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept = 0.5, 0.0
        item.RealWorldValueMappingSequence = Items([mapping])

    tracer = Dataset()
    tracer.RadionuclideTotalDose, tracer.RadionuclideHalfLife = 3.5e8, 6586.2
    tracer.RadiopharmaceuticalStartDateTime = "20240229090000"
    planes = s.stack(4, modality="PT", slope=0.5, intercept=0.0, add=1000.0)
    whole = s.enhanced(planes, change, RadiopharmaceuticalInformationSequence=Items([tracer]), PatientWeight=70)
    whole.SOPClassUID = "1.2.840.10008.5.1.4.1.1.130"
    whole.DecayCorrected = whole.AttenuationCorrected = "YES"
    whole.DecayCorrectionDateTime = reference
    return whole


@pytest.mark.parametrize(
    ("code", "reference", "factor"),
    [
        ("Bq/ml", "20240229100000", 70_000 / 3.5e8 * 2 ** (3600 / 6586.2)),
        ("Bq/ml", "20240229090000", 70_000 / 3.5e8),
        ("{SUVbw}g/ml", "", 1.0),
    ],
)
def test_enhanced_pet_is_in_suv_by_body_weight(tmp_path: Path, code: str, reference: str, factor: float) -> None:
    volume = load(only_volume(outcome(s.write(tmp_path, [enhanced_pet(code, reference)]))))
    z, y, x = np.mgrid[:4, : s.ROWS, : s.COLUMNS]
    truth = s.field(np.stack([x, y, z], -1) @ volume.affine[:3, :3].T + volume.affine[:3, 3]) + 1000
    assert np.abs(volume.array[0] / factor - truth).max() < 0.26


@pytest.mark.parametrize(("code", "reference"), [("Bq/ml", ""), ("{counts}", "20240229100000")])
def test_enhanced_pet_that_needs_guessing_is_refused(tmp_path: Path, code: str, reference: str) -> None:
    assert codes(outcome(s.write(tmp_path, [enhanced_pet(code, reference)]))) == {"suv_unavailable"}


def test_enhanced_ct_without_a_value_transformation_is_refused(tmp_path: Path) -> None:
    def change(item: Dataset, number: int) -> None:
        del item.PixelValueTransformationSequence

    assert codes(outcome(s.write(tmp_path, [s.enhanced(s.stack(4), change)]))) == {"hu_unavailable"}
