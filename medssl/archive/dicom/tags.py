"""Tags that are read, and values taken from raw elements without building pydicom's value objects.

Converting each element through pydicom costs several times what finding it costs, and a malformed value raises. Here a
value that is absent is None, and a number that is no number is NaN, so that the checks downstream name it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

CHARACTER_SET = 0x00080005
IMAGE_TYPE = 0x00080008
SOP_CLASS = 0x00080016
SOP_INSTANCE = 0x00080018
SERIES_DATE, SERIES_TIME = 0x00080021, 0x00080031
ACQUISITION_DATE, ACQUISITION_DATETIME, ACQUISITION_TIME = 0x00080022, 0x0008002A, 0x00080032
CONTENT_TIME = 0x00080033
MODALITY = 0x00080060
PATIENT_NAME, PATIENT_ID, ISSUER, BIRTH_DATE, SEX = 0x00100010, 0x00100020, 0x00100021, 0x00100030, 0x00100040
WEIGHT = 0x00101030
BODY_PART = 0x00180015
SLICE_THICKNESS, KVP, ECHO_TIME, INVERSION_TIME, ECHO_NUMBER = (
    0x00180050,
    0x00180060,
    0x00180081,
    0x00180082,
    0x00180086,
)
BETWEEN_SLICES = 0x00180088
DOSE_START_TIME, DOSE_TOTAL, HALF_LIFE, DOSE_START_DATETIME = 0x00181072, 0x00181074, 0x00181075, 0x00181078
TRIGGER_TIME, IMAGER_SPACING, KERNEL, FLIP_ANGLE, NOMINAL_SPACING = (
    0x00181060,
    0x00181164,
    0x00181210,
    0x00181314,
    0x00182010,
)
US_REGIONS, US_FORMAT, US_UNITS_X, US_UNITS_Y, US_DELTA_X, US_DELTA_Y = (
    0x00186011,
    0x00186012,
    0x00186024,
    0x00186026,
    0x0018602C,
    0x0018602E,
)
FRAME_ACQUISITION_DATETIME = 0x00189074
GRADIENT_SEQUENCE, ECHO_TIME_EFFECTIVE, B_VALUE, GRADIENT = 0x00189076, 0x00189082, 0x00189087, 0x00189089
MR_ECHO, MR_DIFFUSION, CARDIAC_SYNC, CT_KERNEL_SEQUENCE = 0x00189114, 0x00189117, 0x00189118, 0x00189314
STUDY_UID, SERIES_UID, SERIES_NUMBER, ACQUISITION_NUMBER, INSTANCE_NUMBER = (
    0x0020000D,
    0x0020000E,
    0x00200011,
    0x00200012,
    0x00200013,
)
POSITION, ORIENTATION, FRAME_OF_REFERENCE, TEMPORAL = 0x00200032, 0x00200037, 0x00200052, 0x00200100
FRAME_CONTENT, PLANE_POSITION, PLANE_ORIENTATION = 0x00209111, 0x00209113, 0x00209116
STACK_ID, IN_STACK, TEMPORAL_INDEX, FRAME_ACQUISITION_NUMBER, DIMENSION_VALUES = (
    0x00209056,
    0x00209057,
    0x00209128,
    0x00209156,
    0x00209157,
)
TRIGGER_DELAY, DIMENSION_POINTER, DIMENSION_INDEX, CARDIAC_PERCENT = 0x00209153, 0x00209165, 0x00209222, 0x00209241
SAMPLES, PHOTOMETRIC, PLANAR, FRAMES, ROWS, COLUMNS, SPACING = (
    0x00280002,
    0x00280004,
    0x00280006,
    0x00280008,
    0x00280010,
    0x00280011,
    0x00280030,
)
BITS_ALLOCATED, BITS_STORED, HIGH_BIT, SIGNED, PADDING, PADDING_LIMIT = (
    0x00280100,
    0x00280101,
    0x00280102,
    0x00280103,
    0x00280120,
    0x00280121,
)
CORRECTED_IMAGE = 0x00280051
BURNED_IN, INTERCEPT, SLOPE, RESCALE_TYPE, LOSSY, MODALITY_LUT = (
    0x00280301,
    0x00281052,
    0x00281053,
    0x00281054,
    0x00282110,
    0x00283000,
)
PIXEL_MEASURES, VALUE_TRANSFORMATION = 0x00289110, 0x00289145
REAL_WORLD, REAL_WORLD_INTERCEPT, REAL_WORLD_SLOPE, MEASUREMENT_UNITS, CODE_VALUE = (
    0x00409096,
    0x00409224,
    0x00409225,
    0x004008EA,
    0x00080100,
)
DECAY_DATETIME, DECAY_CORRECTED, ATTENUATION_CORRECTED = 0x00189701, 0x00189758, 0x00189759
RADIOPHARMACEUTICAL, PET_UNITS, DECAY_CORRECTION, SUV_TYPE, FRAME_REFERENCE_TIME = (
    0x00540016,
    0x00541001,
    0x00541102,
    0x00541006,
    0x00541300,
)
FRAME_TYPE_TAG, COMPLEX_COMPONENT = 0x00089007, 0x00089208
MR_FRAME_TYPE, CT_FRAME_TYPE, PET_FRAME_TYPE = 0x00189226, 0x00189329, 0x00189751
SHARED_GROUPS, PER_FRAME_GROUPS = 0x52009229, 0x52009230
# What a SEG or a structure set belongs to.
REFERENCED_SERIES, RT_FRAMES, RT_STUDIES, RT_SERIES = 0x00081115, 0x30060010, 0x30060012, 0x30060014
# Private, each used only beside its creator: Siemens mosaics and b-values, GE and Philips b-values.
SIEMENS_CREATOR, MOSAIC_COUNT, SIEMENS_B, SIEMENS_GRADIENT = 0x00190010, 0x0019100A, 0x0019100C, 0x0019100E
CSA_CREATOR, CSA_IMAGE = 0x00290010, 0x00291010
GE_CREATOR, GE_B = 0x00430010, 0x00431039
GE_ACQUISITION_GRADIENT = (0x001910BB, 0x001910BC, 0x001910BD)
PHILIPS_CREATOR, PHILIPS_B = 0x20010010, 0x20011003

OFFSETS, OFFSET_LENGTHS = 0x7FE00001, 0x7FE00002
FLOAT_PIXELS, DOUBLE_PIXELS, PIXEL_DATA = 0x7FE00008, 0x7FE00009, 0x7FE00010

_BINARY = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d", "AT": "H"}


class Tags:
    """Values of a data set by tag.

    Args:
        dataset: As pydicom read it, elements still raw.
    """

    __slots__ = ("_dataset", "_elements")

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._elements: dict[int, Any] = dict(dataset.items())

    def __contains__(self, tag: int) -> bool:
        return tag in self._elements

    def text(self, tag: int) -> str:
        """Return a text value without its padding; empty where absent."""
        value, _, _ = self._raw(tag)
        if value is None:
            return ""
        if isinstance(value, bytes):
            return value.decode("latin-1").strip(" \0")
        if isinstance(value, (list, tuple)) or hasattr(value, "extend"):
            return "\\".join(str(part) for part in value)
        return str(value)

    def texts(self, tag: int) -> tuple[str, ...]:
        """Return the parts of a text value."""
        text = self.text(tag)
        return tuple(part.strip() for part in text.split("\\")) if text else ()

    def numbers(self, tag: int, binary: str = "") -> tuple[float, ...]:
        """Return the numbers of a value; a part that is no number is NaN.

        Args:
            tag: Which value.
            binary: `US`, `SS`, `UL`, `FD`, ... where the dictionary says so; text (DS, IS) if empty.
        """
        value, vr, order = self._raw(tag)
        if value is None:
            return ()
        if not isinstance(value, bytes):
            parts: Any = value if isinstance(value, (list, tuple)) or hasattr(value, "extend") else (value,)
            return tuple(_number(str(part)) for part in parts)
        kind = (
            _BINARY.get(vr, "") if vr in _BINARY else (_BINARY[binary] if binary and vr in (None, "UN", "OB") else "")
        )
        if kind:
            size = struct.calcsize(kind)
            count = len(value) // size
            return tuple(float(part) for part in struct.unpack(f"{order}{count}{kind}", value[: count * size]))
        if binary and vr not in ("DS", "IS", "LO", "SH", "CS"):
            return (math.nan,)
        return (
            tuple(_number(part) for part in value.decode("latin-1").strip(" \0").split("\\")) if value.strip() else ()
        )

    def number(self, tag: int, binary: str = "") -> float | None:
        """Return the first number of a value, None where absent."""
        numbers = self.numbers(tag, binary)
        return numbers[0] if numbers else None

    def integer(self, tag: int, binary: str = "US") -> int | None:
        """Return an integer, None where absent or no integer."""
        value = self.number(tag, binary)
        return int(value) if value is not None and math.isfinite(value) and value == int(value) else None

    def sequence(self, tag: int) -> list[Tags]:
        """Return the items of a sequence."""
        if tag not in self._elements:
            return []
        value = self._dataset[tag].value
        return [Tags(item) for item in value] if value is not None and not isinstance(value, (bytes, str)) else []

    def item(self, tag: int) -> Tags | None:
        """Return the first item of a sequence."""
        items = self.sequence(tag)
        return items[0] if items else None

    def binary(self, tag: int) -> bytes:
        """Return the bytes of a value."""
        value, _, _ = self._raw(tag)
        return value if isinstance(value, bytes) else b""

    def _raw(self, tag: int) -> tuple[Any, str | None, str]:
        element = self._elements.get(tag)
        if element is None:
            return None, None, "<"
        order = "<" if getattr(element, "is_little_endian", True) else ">"
        return element.value, element.VR, order


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def top_level() -> Iterator[int]:
    """Yield every tag that a header needs."""
    for name, value in globals().items():
        if not name.isupper() or name.startswith("_"):
            continue
        for tag in value if isinstance(value, tuple) else (value,):
            if isinstance(tag, int) and tag < OFFSETS:
                yield tag
