"""Pixels of one file, frame by frame, as stored numbers or as colours.

Decoders are named, never left to whatever is installed: JPEG 2000 by openjpeg, JPEG by gdcm, JPEG-LS by pyjpegls, run
length by pydicom itself. No GPL decoder is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID

from medssl.archive.dicom import tags as t
from medssl.archive.dicom.model import DicomHeader
from medssl.archive.dicom.reading import NATIVE, open_pixels, quiet
from medssl.archive.dicom.tags import Tags
from medssl.errors import InputRefused

_JPEG = "1.2.840.10008.1.2.4."
#: Named in the order of preference; the first one installed decodes.
_PLUGINS: dict[str, tuple[str, ...]] = {
    **{f"{_JPEG}{number}": ("gdcm",) for number in (50, 51, 57, 70)},
    **{f"{_JPEG}{number}": ("pyjpegls", "gdcm") for number in (80, 81)},
    **{f"{_JPEG}{number}": ("pylibjpeg", "gdcm") for number in (90, 91)},
    **{f"{_JPEG}{number}": ("pylibjpeg",) for number in (201, 202, 203)},
    "1.2.840.10008.1.2.5": ("pydicom",),
}
#: What a deflated file may hold beside its pixels.
_HEADER_ALLOWANCE = 64 * 2**20
_LOOKUP = (0x00281101, 0x00281102, 0x00281103, 0x00281201, 0x00281202, 0x00281203, 0x00281221, 0x00281222, 0x00281223)
_PIXEL_TAGS = sorted(
    {
        t.SOP_CLASS,
        t.SOP_INSTANCE,
        t.SAMPLES,
        t.PHOTOMETRIC,
        t.PLANAR,
        t.FRAMES,
        t.ROWS,
        t.COLUMNS,
        t.BITS_ALLOCATED,
        t.BITS_STORED,
        t.HIGH_BIT,
        t.SIGNED,
        t.MODALITY_LUT,
        t.FLOAT_PIXELS,
        t.DOUBLE_PIXELS,
        t.PIXEL_DATA,
        t.OFFSETS,
        t.OFFSET_LENGTHS,
        *_LOOKUP,
    }
)


@dataclass(frozen=True)
class StoredFrames:
    """The opened pixels of one file.

    Attributes:
        dataset: The elements of the image pixel module.
        syntax: Transfer syntax.
        header: As indexed.
    """

    dataset: Any
    syntax: str
    header: DicomHeader

    @classmethod
    def open(cls, path: Path, header: DicomHeader) -> StoredFrames:
        """Read the pixels of a file, still encoded.

        Raises:
            InputRefused: If the compression is unknown, or the file cannot be read.
        """
        if header.transfer_syntax not in NATIVE and header.transfer_syntax not in _PLUGINS:
            raise InputRefused("compression_unsupported", f"transfer syntax {header.transfer_syntax[:64]}")
        limit = max(header.pixel_length, 0) + _HEADER_ALLOWANCE
        dataset, syntax = open_pixels(path, _PIXEL_TAGS, limit)
        return cls(dataset, syntax, header)

    def frames(self) -> Iterator[NDArray[np.generic]]:
        """Yield each frame: (rows, columns) of stored numbers, or (rows, columns, 3) of red, green and blue.

        Raises:
            InputRefused: If a frame cannot be decoded.
        """
        from pydicom.pixels import get_decoder

        if self.header.bits_allocated == 64 or t.FLOAT_PIXELS in self.dataset:
            yield from self._float_frames()
            return
        colour = self.header.samples == 3
        count = 0
        try:
            with quiet():
                decoder = get_decoder(UID(self.syntax))
                plugin = _plugin(self.syntax, decoder)
                for image, _ in decoder.iter_array(self._clean(), raw=not colour, decoding_plugin=plugin):
                    yield self._as_colour(image) if self.header.colour else self._unused_bits(image)
                    count += 1
                    if count == self.header.frame_count:
                        break
        except (InputRefused, MemoryError, GeneratorExit):
            raise
        except Exception as error:  # noqa: BLE001  (decoders raise many kinds; their messages may quote values)
            raise InputRefused("decode_failed", f"frame {count}: {type(error).__name__}") from None
        if count < (1 if self.header.tiles else self.header.frame_count):
            raise InputRefused("decode_failed", f"{count} of {self.header.frame_count} frames")

    def _clean(self) -> Dataset:
        """Return the pixels with attributes as the header was understood: damaged or absent ones cannot mislead."""
        header, source = self.header, Tags(self.dataset)
        side = max(header.tiles, 1)
        result = Dataset()
        result.file_meta = FileMetaDataset()
        result.file_meta.TransferSyntaxUID = UID(self.syntax)
        result.Rows, result.Columns = header.rows * side, header.columns * side
        result.SamplesPerPixel, result.PhotometricInterpretation = header.samples, header.photometric
        result.BitsAllocated, result.BitsStored, result.HighBit = (
            header.bits_allocated,
            header.bits_stored,
            header.high_bit,
        )
        result.PixelRepresentation, result.NumberOfFrames = int(header.signed), header.frame_count
        if header.samples > 1:
            result.PlanarConfiguration = 1 if source.integer(t.PLANAR) == 1 else 0
        for tag, vr in ((t.OFFSETS, "OV"), (t.OFFSET_LENGTHS, "OV"), (t.PIXEL_DATA, "OW")):
            if tag in self.dataset:
                element = self.dataset.get_item(tag)
                value = element.value if element is not None else b""
                told = element.VR if element is not None and element.VR in ("OB", "OW", "OV") else vr
                result.add_new(tag, told, value)
        return result

    def modality_table(self, image: NDArray[np.generic]) -> NDArray[np.generic] | None:
        """Return stored numbers mapped by the file's modality lookup table, None if it has none."""
        if t.MODALITY_LUT not in self.dataset:
            return None
        from pydicom.pixels import apply_modality_lut

        try:
            with quiet():
                if not self.dataset.ModalityLUTSequence:
                    return None
                mapped: NDArray[np.generic] = apply_modality_lut(image, self.dataset)
                return mapped
        except Exception as error:  # noqa: BLE001  (a damaged table)
            raise InputRefused("rescale_invalid", f"modality lookup table: {type(error).__name__}") from None

    def _as_colour(self, image: NDArray[np.generic]) -> NDArray[np.generic]:
        if self.header.photometric == "PALETTE COLOR":
            from pydicom.pixels import apply_color_lut

            image = apply_color_lut(image, self.dataset)
            if image.shape[-1] == 4:
                image = image[..., :3]
            deep = cast("NDArray[np.uint16]", image)
            if deep.dtype == np.uint16 and not (deep & 0xFF).any():
                return (deep >> 8).astype(np.uint8)
        return image

    def _unused_bits(self, image: NDArray[np.generic]) -> NDArray[np.generic]:
        """Clear the bits beside the stored ones, where old files keep overlays, and extend the sign."""
        stored, high = self.header.bits_stored, self.header.high_bit
        bits = image.dtype.itemsize * 8
        if image.dtype.kind not in "ui" or (stored >= bits and high == stored - 1) or (bits == 8 and stored == 1):
            return image
        left = bits - 1 - high
        if left < 0:
            return image
        # Shifting up and back clears the upper bits, and on a signed type extends the sign.
        return np.right_shift(np.left_shift(image, left), bits - stored)

    def _float_frames(self) -> Iterator[NDArray[np.generic]]:
        if self.syntax not in NATIVE:
            raise InputRefused("compression_unsupported", "compressed floating-point pixels")
        tag, kind = (t.FLOAT_PIXELS, "f4") if t.FLOAT_PIXELS in self.dataset else (t.DOUBLE_PIXELS, "f8")
        element = self.dataset.get_item(tag) if tag in self.dataset else None
        count = self.header.frame_count * self.header.rows * self.header.columns
        order = ">" if element is not None and not getattr(element, "is_little_endian", True) else "<"
        if element is None or len(element.value or b"") < count * int(kind[1]):
            raise InputRefused("truncated", "floating-point pixels")
        values = np.frombuffer(element.value, order + kind, count).astype("=" + kind)
        yield from values.reshape(self.header.frame_count, self.header.rows, self.header.columns)


def _plugin(syntax: str, decoder: Any) -> str:
    """Return the name of the decoder for a transfer syntax; empty for uncompressed pixels."""
    if syntax in NATIVE:
        return ""
    for name in _PLUGINS[syntax]:
        if name in decoder.available_plugins:
            return name
    raise InputRefused(
        "compression_unsupported", f"no decoder for {syntax} is installed: {' or '.join(_PLUGINS[syntax])}"
    )
