"""Defective DICOM series. Positions, order, gaps, identities, quantities, frames, encodings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence as Items
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian, JPEG2000Lossless

from tests.archive.dicom import series as s
from tests.defects.truth import Colours, Defect, Field, series

ORIGIN = (-10.0, -20.0, 30.0)
NOTHING_IS_RIGHT = Field(slices=())
TIMES = Field(slices=(6,), frames=(0.0, 50.0, 100.0))
#: 70 kg, 350 MBq of F-18, one hour before the scan.
SUV = 70_000 / 3.5e8 * 2 ** (3600 / 6586.2)


def without(*lost: int, **settings: Any) -> list[FileDataset]:
    """Return a series that lacks slices."""
    return [dataset for index, dataset in enumerate(s.stack(**settings)) if index not in lost]


def shuffled() -> list[FileDataset]:
    """Return a series whose instance numbers do not tell the order."""
    slices = s.stack()
    for dataset, number in zip(slices, np.random.default_rng(0).permutation(12), strict=True):
        dataset.InstanceNumber = int(number) + 1
    return slices


def jitter() -> list[FileDataset]:
    """Return a series whose positions were rounded."""
    slices = s.stack()
    for dataset, offset in zip(slices, np.random.default_rng(0).uniform(-0.01, 0.01, 12), strict=True):
        x, y, z = (float(part) for part in dataset.ImagePositionPatient)
        dataset.ImagePositionPatient = [x, y, round(z + offset, 4)]
    return slices


def slopes() -> list[FileDataset]:
    """Return a series that is scaled slice by slice."""
    return [s.image((-10, -20, 30 + 2.0 * n), n + 1, slope=0.02 * (n + 1), intercept=-1024.0) for n in range(12)]


def frames(count: int = 3, **by_frame: list[Any]) -> list[FileDataset]:
    """Return a series of several frames; each keyword gives an element's value in each frame."""
    slices = []
    for frame in range(count):
        for dataset in s.stack(6, modality="MR", add=50.0 * frame):
            for name, values in by_frame.items():
                s.put(dataset, name, values[frame])
            dataset.InstanceNumber = frame * 6 + dataset.InstanceNumber
            slices.append(dataset)
    return slices


def copied(**changes: Any) -> list[FileDataset]:
    """Return a series with one slice sent twice."""
    copy = s.stack()[5]
    copy.SOPInstanceUID, copy.InstanceNumber = s.uid("again"), 13
    for name, value in changes.items():
        s.put(copy, name, value)
    return [*s.stack(), copy]


def _dimensions(*tags: int) -> Items:
    pointers = []
    for tag in tags:
        pointer = Dataset()
        pointer.DimensionIndexPointer, pointer.FunctionalGroupPointer = tag, 0x00209111
        pointers.append(pointer)
    return Items(pointers)


def scrambled(count: int = 12, **settings: Any) -> list[FileDataset]:
    """Return one enhanced image whose frames are in an odd order, and which says so."""
    planes = s.stack(count, **settings)
    order = np.random.default_rng(0).permutation(count)

    def change(item: Dataset, number: int) -> None:
        content = item.FrameContentSequence[0]
        content.StackID, content.InStackPositionNumber = "1", int(order[number]) + 1
        content.DimensionIndexValues = [1, int(order[number]) + 1]

    dimensions = _dimensions(0x00209056, 0x00209057)
    return [s.enhanced([planes[number] for number in order], change, DimensionIndexSequence=dimensions)]


def enhanced_echoes() -> list[FileDataset]:
    """Return an enhanced image of three echoes, frames in an odd order."""
    planes = [plane for echo in range(3) for plane in s.stack(6, modality="MR", add=50.0 * echo)]
    order = np.random.default_rng(4).permutation(18)

    def change(item: Dataset, number: int) -> None:
        time, place = divmod(int(order[number]), 6)
        echo, content = Dataset(), item.FrameContentSequence[0]
        echo.EffectiveEchoTime = 5.0 * (time + 1)
        item.MREchoSequence = Items([echo])
        content.StackID, content.InStackPositionNumber = "1", place + 1
        content.DimensionIndexValues = [1, place + 1, time + 1]

    dimensions = _dimensions(0x00209056, 0x00209057, 0x00189082)
    return [s.enhanced([planes[number] for number in order], change, DimensionIndexSequence=dimensions)]


def enhanced_slopes() -> list[FileDataset]:
    """Return an enhanced image that is scaled frame by frame."""
    return [s.enhanced(slopes())]


def enhanced_short() -> list[FileDataset]:
    """Return an enhanced image that lacks the groups of its last frame."""
    image = scrambled()[0]
    image.PerFrameFunctionalGroupsSequence = Items(list(image.PerFrameFunctionalGroupsSequence)[:-1])
    return [image]


def pet(slope: Callable[[int], float] = lambda number: 0.05, **changes: Any) -> list[FileDataset]:
    """Return a PET of 70 kg, 350 MBq of F-18 injected one hour before the scan."""
    slices = [
        s.image((-10, -20, 30 + 2.0 * n), n + 1, modality="PT", slope=slope(n), intercept=0.0, add=0.0)
        for n in range(12)
    ]
    for dataset in slices:
        tracer = Dataset()
        tracer.RadionuclideTotalDose, tracer.RadionuclideHalfLife = 3.5e8, 6586.2
        tracer.RadiopharmaceuticalStartTime = "090000"
        dataset.RadiopharmaceuticalInformationSequence = Items([tracer])
        dataset.Units, dataset.DecayCorrection, dataset.PatientWeight = "BQML", "START", 70
        dataset.CorrectedImage = ["DECY", "ATTN", "SCAT"]
        dataset.SeriesDate = dataset.AcquisitionDate = "20240229"
        dataset.SeriesTime = dataset.AcquisitionTime = "100000"
        for name, value in changes.items():
            s.put(tracer if name.startswith("Radio") else dataset, name, value)
    return slices


def padded() -> list[FileDataset]:
    """Return a CT with a round field of view whose outside has the declared padding value."""
    slices = s.stack(intercept=-3000.0, PixelPaddingValue=0)
    y, x = np.mgrid[: s.ROWS, : s.COLUMNS]
    outside = np.hypot(y - s.ROWS / 2, x - s.COLUMNS / 2) > 6.5
    for dataset in slices:
        stored = np.frombuffer(dataset.PixelData, "<u2").reshape(s.ROWS, s.COLUMNS).copy()
        stored[outside] = 0
        dataset.PixelData = stored.tobytes()
    return slices


def unused_bits() -> list[FileDataset]:
    """Return 12-bit slices with an overlay in the four bits above, as old scanners wrote them."""
    slices = [s.image((-10, -20, 30 + 2.0 * n), n + 1, modality="MR", slope=0.1, intercept=0.0) for n in range(12)]
    for dataset in slices:
        dataset.BitsStored, dataset.HighBit = 12, 11
        stored = np.frombuffer(dataset.PixelData, "<u2") | (np.arange(s.ROWS * s.COLUMNS) % 16 << 12).astype("<u2")
        dataset.PixelData = stored.astype("<u2").tobytes()
    return slices


def ultrasound(count: int) -> tuple[list[FileDataset], np.ndarray]:
    """Return a colour ultrasound picture or film, and its true pixels."""
    pixels = np.random.default_rng(count).integers(0, 256, (count, 10, 20, 3), np.uint8)
    picture = s.base(modality="US", SOPInstanceUID="1.2.9", Rows=10, Columns=20, SamplesPerPixel=3)
    picture.SOPClassUID = "1.2.840.10008.5.1.4.1.1." + ("3.1" if count > 1 else "6.1")
    picture.PhotometricInterpretation, picture.PlanarConfiguration, picture.InstanceNumber = "RGB", 0, 1
    if count > 1:
        picture.NumberOfFrames = count
    picture.BitsAllocated = picture.BitsStored = 8
    picture.HighBit, picture.PixelData = 7, pixels.tobytes()
    return [picture], pixels


def _encoded(syntax: Any) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        slices = s.stack()
        for dataset in slices:
            dataset.file_meta.TransferSyntaxUID = syntax
            if syntax == ExplicitVRBigEndian:
                dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
        s.write(folder, slices, name="{:03d}.dcm")

    return write


def _damaged_code_stream() -> list[FileDataset]:
    slices = s.stack()
    for dataset in slices:
        dataset.PixelData = encapsulate([b"\xff\x4f\xff\x51" + b"\7" * 60])
        dataset["PixelData"].is_undefined_length = True
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    return slices


def _position_text(text: bytes) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        for path in s.write(folder, s.stack(origin=(-10.5, -20.5, 30.5)), name="{:03d}.dcm"):
            path.write_bytes(path.read_bytes().replace(b"-20.5", text.ljust(5), 1))

    return write


def _one_cut_file(folder: Path) -> None:
    path = s.write(folder, s.stack(), name="{:03d}.dcm")[-1]
    path.write_bytes(path.read_bytes()[:-100])


def _two_folders(folder: Path) -> None:
    for name in "ab":
        blank = s.stack(6, SOPInstanceUID="", SOPClassUID="", SeriesInstanceUID="", StudyInstanceUID="")
        s.write(folder / name, blank, name="{:03d}.dcm")


def _screenshot() -> list[FileDataset]:
    shot = s.image(
        (0, 0, 0), 99, ImagePositionPatient=None, ImageOrientationPatient=None, SOPClassUID=s.SECONDARY_CAPTURE
    )
    return [*s.stack(), shot]


def _uneven() -> list[FileDataset]:
    heights = [0, 2, 4, 6, 8, 10, 15, 20, 25, 30, 35, 40]
    return [s.image((-10, -20, 30.0 + height), number + 1) for number, height in enumerate(heights)]


def _two_patients(series_of_second: str = "1") -> list[FileDataset]:
    second = s.stack(6, origin=(-10, -20, 42), series=series_of_second, PatientID="P2", PatientName="Roe^Richard")
    return s.stack(6) + second


def _aside() -> list[FileDataset]:
    slices = s.stack()
    slices[5] = s.image((-3.0, -20.0, 40.0), 6)
    return slices


def _mosaic() -> list[FileDataset]:
    image = s.mosaic(s.stack(7, modality="MR"), normal=(0, 0, 1), step=2.0)
    image.Manufacturer = "SIEMENS"
    return [image]


def _lacking_time() -> list[FileDataset]:
    return frames(TemporalPositionIdentifier=[1, 2, 3])[:-2]


TILT = {"orientation": s.tilted(15), "direction": (0, 0, 1)}
PICTURE, PICTURE_PIXELS = ultrasound(1)
FILM, FILM_PIXELS = ultrasound(5)

DICOM = [
    # The table of readers in the reference
    Defect("clean", series(s.stack)),
    Defect("one slice missing", series(lambda: without(6)), "missing_slices", "right"),
    Defect("one slice twice", series(copied), flags=("duplicates_dropped",)),
    Defect("instance numbers shuffled", series(shuffled)),
    Defect("gantry tilt 15 degrees", series(lambda: s.stack(**TILT)), "gantry_tilt", "right"),
    Defect("spacing 2 then 5 mm", series(_uneven), "varying_spacing", truth=NOTHING_IS_RIGHT),
    Defect(
        "sagittal localiser inside",
        series(lambda: [*s.stack(11), s.image((3, 4, 5), 77, orientation=s.SAGITTAL)]),
        truth=Field((11,)),
        flags=("series_partly_refused",),
    ),
    Defect("slope of each slice", series(slopes)),
    Defect("jitter 0.01 mm", series(jitter), truth=Field(tolerance=0.5)),
    Defect("one slice", series(lambda: s.stack(1)), "too_few_slices", truth=Field((1,))),
    Defect("two slices", series(lambda: s.stack(2)), "too_few_slices", "right", Field((2,)), flags=("few_slices",)),
    Defect(
        "three series in a folder",
        series(lambda: [d for n in "123" for d in s.stack(8, series=n, SeriesNumber=int(n))]),
        truth=Field((8, 8, 8)),
    ),
    # Positions and directions
    Defect("oblique", series(lambda: s.stack(orientation=(0.8, 0.6, 0.0, -0.48, 0.64, -0.6)))),
    Defect("coronal, unequal pixels", series(lambda: s.stack(orientation=s.CORONAL, spacing=(0.5, 3.0)))),
    Defect(
        "gantry tilt and one slice missing",
        series(lambda: without(6, **TILT)),
        "missing_slices",
        "right",
    ),
    Defect(
        "gantry tilt and a gap of two", series(lambda: without(5, 6, **TILT)), "missing_slices", truth=NOTHING_IS_RIGHT
    ),
    Defect("a gap of two slices", series(lambda: without(5, 6)), "missing_slices", truth=NOTHING_IS_RIGHT),
    Defect("one slice beside the line", series(_aside), "irregular_positions", truth=NOTHING_IS_RIGHT),
    Defect(
        "two orientations, one series",
        series(lambda: [*s.stack(6), *s.stack(5, orientation=s.CORONAL)]),
        truth=Field((5, 6)),
        flags=("series_split",),
    ),
    Defect(
        "another size inside",
        series(lambda: [*s.stack(), s.image((-10, -20, 54), 77, rows=10)]),
        flags=("series_partly_refused",),
    ),
    Defect(
        "zero pixel spacing", series(lambda: s.stack(PixelSpacing=[0, 0])), "spacing_invalid", truth=NOTHING_IS_RIGHT
    ),
    Defect(
        "directions not at right angles",
        series(lambda: s.stack(ImageOrientationPatient=[1, 0, 0, 0.5, 0.8, 0])),
        "orientation_invalid",
        truth=NOTHING_IS_RIGHT,
    ),
    Defect(
        "directions of length zero",
        series(lambda: s.stack(ImageOrientationPatient=[0, 0, 0, 0, 0, 0])),
        "orientation_invalid",
        truth=NOTHING_IS_RIGHT,
    ),
    Defect(
        "no positions", series(lambda: s.stack(ImagePositionPatient=None)), "position_missing", truth=NOTHING_IS_RIGHT
    ),
    Defect("a position that is nan", _position_text(b"nan"), "position_invalid", truth=NOTHING_IS_RIGHT),
    # Identities
    Defect("two patients in one series", series(_two_patients), "series_of_two_patients", truth=NOTHING_IS_RIGHT),
    Defect("two patients in one folder", series(lambda: _two_patients("2")), truth=Field((6, 6))),
    Defect("blank UIDs", series(lambda: s.stack(SOPInstanceUID="", SOPClassUID="", SeriesInstanceUID=""))),
    Defect("blank UIDs in two folders", _two_folders, truth=Field((6, 6))),
    Defect("one instance UID for all slices", series(lambda: s.stack(SOPInstanceUID="1.2.3"))),
    Defect(
        "other image at one place",
        series(lambda: [*s.stack(), s.image((-10, -20, 40), 13, add=7.0)]),
        "position_repeated",
        truth=NOTHING_IS_RIGHT,
    ),
    Defect("screenshot in the series", series(_screenshot)),
    # Frames
    Defect("three time points", series(lambda: frames(TemporalPositionIdentifier=[1, 2, 3])), truth=TIMES),
    Defect("three echoes", series(lambda: frames(EchoTime=[4.6, 9.2, 13.8], EchoNumbers=[1, 2, 3])), truth=TIMES),
    Defect("three b-values", series(lambda: frames(DiffusionBValue=[0.0, 500.0, 1000.0])), truth=TIMES),
    Defect(
        "a time point lacks slices",
        series(_lacking_time),
        truth=Field((6,), frames=(0.0, 50.0)),
        flags=("series_partly_refused",),
    ),
    Defect("enhanced CT, frames scrambled", series(scrambled)),
    Defect("enhanced MR, sagittal, frames scrambled", series(lambda: scrambled(orientation=s.SAGITTAL, modality="MR"))),
    Defect("enhanced, three echoes scrambled", series(enhanced_echoes), truth=TIMES),
    Defect("enhanced, slope of each frame", series(enhanced_slopes)),
    Defect(
        "enhanced, groups of one frame missing", series(enhanced_short), "multiframe_invalid", truth=NOTHING_IS_RIGHT
    ),
    Defect(
        "mosaic",
        series(_mosaic),
        truth=Field((7,)),
    ),
    # Quantities
    Defect("PET with all SUV facts", series(pet), truth=Field(scales=(1.0, SUV))),
    Defect(
        "PET, slope of each slice",
        series(lambda: pet(lambda number: 0.01 * (number + 1))),
        truth=Field(scales=(1.0, SUV)),
    ),
    Defect("PET without weight", series(lambda: pet(PatientWeight=None)), "suv_unavailable"),
    Defect("PET without dose", series(lambda: pet(RadionuclideTotalDose=None)), "suv_unavailable"),
    Defect("PET in counts", series(lambda: pet(Units="CNTS")), "suv_unavailable"),
    Defect(
        "CT without rescale",
        series(lambda: s.stack(RescaleSlope=None, RescaleIntercept=None)),
        "hu_unavailable",
        truth=NOTHING_IS_RIGHT,
    ),
    Defect("rescale slope zero", series(lambda: s.stack(RescaleSlope=0)), "rescale_invalid", truth=NOTHING_IS_RIGHT),
    Defect("padding outside a round field", series(padded), flags=("padding_replaced",)),
    Defect(
        "MONOCHROME1 in HU",
        series(lambda: s.stack(PhotometricInterpretation="MONOCHROME1")),
        flags=("monochrome1_kept",),
    ),
    Defect("overlay in unused bits", series(unused_bits)),
    # Pictures
    Defect("colour ultrasound picture", series(lambda: PICTURE), truth=Colours(PICTURE_PIXELS)),
    Defect("colour ultrasound film", series(lambda: FILM), truth=Colours(FILM_PIXELS), flags=("colour_to_grey",)),
    Defect(
        "text burnt in, declared", series(lambda: s.stack(BurnedInAnnotation="YES")), flags=("burned_in_annotation",)
    ),
    # Files
    Defect("one file cut off", _one_cut_file, truth=Field((11,)), flags=("series_partly_refused",)),
    Defect("damaged JPEG 2000", series(_damaged_code_stream), "decode_failed", truth=NOTHING_IS_RIGHT),
    Defect("implicit VR", _encoded(ImplicitVRLittleEndian)),
    Defect("big endian", _encoded(ExplicitVRBigEndian)),
    Defect("deflated", _encoded(DeflatedExplicitVRLittleEndian)),
    Defect("no preamble", lambda folder: s.write(folder, s.stack(), name="{:03d}.dcm", preamble=False)),
]
