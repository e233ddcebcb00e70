"""How the intensities of a volume are stored: as they are, or in fewer bits with an error that is measured.

The integers are even steps from the smallest to the largest value of each channel of each volume: no value is clipped,
and none is further than half a step from what is read, but for the rounding of float32 itself. Which codec is worth it,
and with which parameters of blosc2, is measured by `pipelines/benchmarks/store_reading.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.errors import InputRefused, unknown_name

LOSSLESS = "lossless"
CODECS: dict[str, str] = {
    LOSSLESS: "float32, every bit is kept",
    "float16": "3 significant digits in 2 bytes, for values up to 65504",
    "int16": "65536 even steps in 2 bytes",
    "int8": "256 even steps in 1 byte",
}
_INTEGERS: dict[str, type[np.unsignedinteger[Any]]] = {"int16": np.uint16, "int8": np.uint8}
_LARGEST_FLOAT16 = float(np.finfo(np.float16).max)
#: Voxels that are converted at once: in double precision they would take twice the memory of the volume.
_PART = 1 << 20


@dataclass(frozen=True)
class Encoding:
    """What turns the stored numbers of one volume into intensities: offset + step * number.

    Attributes:
        name: A key of `CODECS`.
        offset: Intensity of the number 0, by channel; empty where floats are stored.
        step: Intensity from one number to the next, by channel; 0 in a constant channel.
        largest_error: Largest difference between what was given and what is read, in normalised intensities.
        rms_error: Root mean square of the differences.
    """

    name: str = LOSSLESS
    offset: tuple[float, ...] = ()
    step: tuple[float, ...] = ()
    largest_error: float = 0.0
    rms_error: float = 0.0

    @staticmethod
    def of_facts(facts: Mapping[str, Any]) -> Encoding:
        """Return what the facts of a volume say; those of schema 1 say nothing and hold floats.

        Raises:
            KeyError, TypeError, ValueError: If they are damaged.
        """
        known = facts.get("codec")
        if known is None:
            return Encoding()
        offset, step = (tuple(float(value) for value in known[key]) for key in ("offset", "step"))
        return Encoding(str(known["name"]), offset, step, float(known["largest_error"]), float(known["rms_error"]))

    def to_json(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)

    def decode(self, stored: NDArray[Any], channels: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Return the intensities of stored numbers.

        Args:
            stored: Shape: (C, ...).
            channels: Which channels of the volume they are; all, in order, by default.
        """
        if not self.step:
            return stored.astype(np.float32, copy=False)
        chosen = range(stored.shape[0]) if channels is None else channels
        out = stored.astype(np.float32)
        for values, channel in zip(out, chosen, strict=True):
            values *= np.float32(self.step[channel])
            values += np.float32(self.offset[channel])
        return out

    def nearest(self, value: float) -> float:
        """Return what a value of the first channel is read as; a value that the codec cannot hold is left as it is.

        The background of a volume goes this way, so that padding equals the stored voxels around it.
        """
        if self.name == "float16" and abs(value) <= _LARGEST_FLOAT16:
            return float(np.float16(value))
        if not self.step:
            return value
        dtype, step = _INTEGERS[self.name], self.step[0]
        number = np.rint((value - self.offset[0]) / step) if step else 0.0
        stored = np.full((1, 1), np.clip(number, 0, np.iinfo(dtype).max)).astype(dtype)
        read = float(self.decode(stored, [0])[0, 0])
        return read if abs(read - value) <= 0.51 * step + 1e-6 * abs(value) else value


def check_codec(name: str) -> None:
    """Refuse a codec that does not exist.

    Raises:
        UsageError: With the known ones.
    """
    if name not in CODECS:
        raise unknown_name("codec", name, CODECS)


def encode(array: NDArray[Any], codec: str) -> tuple[NDArray[Any], Encoding]:
    """Return what is stored of a volume, and how it is read.

    Args:
        array: Normalised intensities. Shape: (C, Z, Y, X).
        codec: A key of `CODECS`.

    Raises:
        UsageError: If there is no such codec.
        InputRefused: If the codec cannot hold a value.
    """
    check_codec(codec)
    array = np.ascontiguousarray(array, dtype=np.float32)
    if codec == LOSSLESS:
        return array, Encoding()
    limits = [(float(channel.min()), float(channel.max())) for channel in array]
    if not np.isfinite(limits).all():
        raise InputRefused("not_finite", "some voxels are not finite")
    if codec == "float16":
        largest = max(abs(value) for pair in limits for value in pair)
        if largest > _LARGEST_FLOAT16:
            raise InputRefused("float16_overflow", f"a value of {largest:g} after normalisation")
        stored = array.astype(np.float16)
        return stored, _measured(array, stored, Encoding(codec))
    dtype = _INTEGERS[codec]
    steps = tuple(_step(low, high, int(np.iinfo(dtype).max)) for low, high in limits)
    encoding = Encoding(codec, tuple(low for low, _ in limits), steps)
    stored = np.zeros(array.shape, dtype)
    for values, numbers, (low, _), step in zip(array, stored, limits, steps, strict=True):
        if step:
            for part, target in zip(_parts(values), _parts(numbers), strict=True):
                # In double precision: a rounding of float32 would be 1/256 of an int16 step.
                target[...] = np.rint((part.astype(np.float64) - low) / step)
    return stored, _measured(array, stored, encoding)


def _step(low: float, high: float, levels: int) -> float:
    """Return the step as a float32 that is not too small: the largest value must not need one number more."""
    exact = (high - low) / levels
    step = np.float32(exact)
    return float(step if float(step) >= exact else np.nextafter(step, np.float32(np.inf)))


def _measured(array: NDArray[np.float32], stored: NDArray[Any], encoding: Encoding) -> Encoding:
    largest, squares = 0.0, 0.0
    for channel in range(array.shape[0]):
        for values, numbers in zip(_parts(array[channel]), _parts(stored[channel]), strict=True):
            error = encoding.decode(numbers[None], [channel])[0].astype(np.float64) - values
            largest = max(largest, float(np.abs(error).max()))
            squares += float(np.vdot(error, error))
    return Encoding(encoding.name, encoding.offset, encoding.step, largest, math.sqrt(squares / array.size))


def _parts(channel: NDArray[Any]) -> list[NDArray[Any]]:
    """Return views of a channel that follow each other; it must be contiguous."""
    flat = channel.reshape(-1)
    return [flat[start : start + _PART] for start in range(0, flat.size, _PART)]
