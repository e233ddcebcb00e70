"""PNG, JPEG and TIFF: pictures of one or, for TIFF, several pages."""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medssl.archive.formats.common import Geometry, Layout, check_bytes, check_dimensions, finish
from medssl.archive.volume import IMAGE_MODALITY, Channels, Volume
from medssl.errors import InputRefused

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

_MOST_PIXELS = 2**29
_BYTES = {
    "1": 1,
    "L": 1,
    "P": 1,
    "LA": 2,
    "PA": 2,
    "I": 4,
    "F": 4,
    "RGB": 3,
    "RGBA": 4,
    "RGBX": 4,
    "CMYK": 4,
    "YCbCr": 3,
}
_GREY = ("1", "L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_EXIF_ORIENTATION = 274
#: Print resolutions that programs write when they know nothing; not physical.
_DEFAULT_DPI = (1, 72, 75, 90, 96, 100, 120, 144, 150, 180, 200, 220, 240, 300, 350, 360, 400, 600, 1200, 2400)
_UNIT_MM = {"mm": 1.0, "cm": 10.0, "inch": 25.4, "um": 1e-3, "micron": 1e-3, "\\u00b5m": 1e-3, "µm": 1e-3}


def check(path: Path) -> Layout:
    """Read and check the header.

    Raises:
        InputRefused: If the picture is damaged, too large, or its pages are no stack.
    """
    with _opened(path) as image:
        return Layout(_shape(path, image))


def load(path: Path, geometry: Geometry = "strict") -> Volume:
    """Read the picture; a TIFF whose pages agree is stacked along z.

    Raises:
        InputRefused: If it cannot be used.
    """
    flags: set[str] = set()
    with _opened(path) as image:
        shape = _shape(path, image)
        spacing = _spacing(image, flags)
        if _deep_colour(path, image):
            pixels = _with_simpleitk(path, image.format or "")
            if image.mode in ("RGBA", "LA") or pixels.shape[-1] in (2, 4):
                flags.add("alpha_dropped")
                pixels = pixels[..., : pixels.shape[-1] - 1]
            array = np.moveaxis(pixels, -1, 0)[:, None]
        else:
            pages = [_page(image, page, flags) for page in range(shape[1])]
            array = np.stack(pages, axis=1)
        if getattr(image, "n_frames", 1) > 1:
            flags.add("stack_of_pages" if image.format == "TIFF" else "first_picture_only")
    z, y, x = spacing
    channels: Channels = "colour" if array.shape[0] == 3 else "scalar"
    return finish(
        array,
        np.diag([x, y, z, 1.0]),
        geometry=geometry,
        channels=channels,
        flags=sorted(flags | {"orientation_unknown"}),
        modality=IMAGE_MODALITY,
    )


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture; Pillow's errors become codes."""
    from PIL import Image, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = _MOST_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=("PNG", "JPEG", "TIFF")) as image:
                yield image
    except UnidentifiedImageError as error:
        raise _unreadable(path) from error
    except Image.DecompressionBombError as error:
        raise InputRefused("too_large", f"more than {_MOST_PIXELS} pixels") from error
    except (SyntaxError, struct.error, EOFError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputRefused("decode_failed", f"{type(error).__name__} while reading the picture") from error
    except OSError as error:
        if error.errno is not None:
            raise
        text = str(error)
        if "truncated" in text or "not enough" in text or "unrecognized data stream" in text:
            raise InputRefused("truncated", "the picture's data end early") from error
        if "compression" in text or "decoder" in text:
            raise InputRefused("compression_unsupported", "no decoder for the picture's compression") from error
        raise InputRefused("decode_failed", "the picture's data are damaged") from error


def _unreadable(path: Path) -> InputRefused:
    # Pillow knows no TIFF with 16 bits of colour at all; it says the same of a file that ends in its header.
    if path.stat().st_size < 64:
        return InputRefused("truncated", "the picture ends in its header")
    return InputRefused("header_invalid", "the picture's header cannot be read, or its pixel type is not supported")


def _shape(path: Path, image: Image.Image) -> tuple[int, int, int, int]:
    width, height = image.size
    count = getattr(image, "n_frames", 1)
    if image.format != "TIFF":
        if count > 1 and image.format == "PNG":
            raise InputRefused("dimensions_unsupported", f"an animation of {count} pictures")
        count = 1
    if image.mode not in _BYTES and not image.mode.startswith("I;16"):
        raise InputRefused("dtype_unsupported", f"pixels of mode {image.mode}")
    if count > 1:
        if count > 100_000:
            raise InputRefused("too_large", f"{count} pages")
        for page in range(count):
            image.seek(page)
            if image.size != (width, height):
                raise InputRefused("pages_differ", f"page {page} is {image.size}, the first is {(width, height)}")
        image.seek(0)
    exif = image.getexif().get(_EXIF_ORIENTATION, 1) if image.format != "TIFF" or count == 1 else 1
    if exif in (5, 6, 7, 8):
        width, height = height, width
    colours = 1 if image.mode in (*_GREY, "LA") or _grey_palette(image) else 3
    check_dimensions((count, height, width))
    check_bytes((colours, count, height, width), 4 if image.mode in ("I", "F") else 2)
    # Deflate and LZW stay below 1:1500; JPEG's blocks of 64 pixels may need a single bit: 1:512 per channel.
    if count * width * height > (path.stat().st_size + 1024) * 8192:
        raise InputRefused("truncated", f"{count} x {height} x {width} pixels in {path.stat().st_size} bytes")
    return colours, count, height, width


def _page(image: Image.Image, page: int, flags: set[str]) -> NDArray[Any]:
    """Return one page. Shape: (C, Y, X)."""
    from PIL import ImageOps

    if getattr(image, "n_frames", 1) > 1:
        image.seek(page)
    mode = image.mode
    turned: Image.Image = image
    if image.getexif().get(_EXIF_ORIENTATION, 1) not in (0, 1):
        flags.add("exif_rotated")
        turned = ImageOps.exif_transpose(image)
    if mode in ("P", "PA"):
        flags.add("palette_expanded")
        if "transparency" in image.info or mode == "PA":
            flags.add("alpha_dropped")
        turned = turned.convert("L" if _grey_palette(image) else "RGB")
    elif mode == "LA":
        flags.add("alpha_dropped")
        turned = turned.getchannel(0)
    elif mode == "RGBA":
        flags.add("alpha_dropped")
        turned = turned.convert("RGB")
    elif mode in ("RGBX", "CMYK", "YCbCr"):
        turned = turned.convert("RGB")
    array = np.asarray(turned)
    if mode == "1":
        array = array.astype(np.uint8)
    elif mode.startswith("I;16"):
        array = array.astype(np.uint16)
    elif mode == "I" and array.min() >= 0 and array.max() < 2**16:
        array = array.astype(np.uint16)  # Pillow widens 16-bit PNG
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def _grey_palette(image: Image.Image) -> bool:
    palette = image.getpalette("RGB") if image.mode in ("P", "PA") else None
    if palette is None:
        return False
    colours = np.array(palette, np.uint8).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all())


def _deep_colour(path: Path, image: Image.Image) -> bool:
    """Tell whether Pillow would silently cut 16 bits of colour, or of grey with opacity, to 8."""
    if image.format != "PNG":
        return False
    with path.open("rb") as handle:
        head = handle.read(26)
    return head[24] == 16 and head[25] in (2, 4, 6)


def _with_simpleitk(path: Path, kind: str) -> NDArray[Any]:
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO(f"{kind}ImageIO")
    reader.SetFileName(str(path))
    try:
        return SimpleITK.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise InputRefused("decode_failed", "SimpleITK could not read the picture") from error


def _spacing(image: Image.Image, flags: set[str]) -> tuple[float, float, float]:
    """Return (z, y, x) in mm: ImageJ's own, else a resolution that is not a program's default, else 1 mm."""
    if image.format == "TIFF":
        found = _imagej(image) or _resolution(image)
    elif image.format == "PNG":
        found = _dpi(image.info.get("dpi"))
    else:
        found = None  # JFIF's density is about print
    if found is None or not all(1e-6 < size < 500 for size in found[1:]):
        flags.add("spacing_unknown")
        return 1.0, 1.0, 1.0
    flags.add("spacing_from_resolution")
    return found


def _imagej(image: Image.Image) -> tuple[float, float, float] | None:
    tags: Any = getattr(image, "tag_v2", {})
    text = str(tags.get(270, ""))
    if not text.startswith("ImageJ="):
        return None
    unit = re.search(r"^unit=(.+)$", text, re.MULTILINE)
    factor = _UNIT_MM.get(unit.group(1).strip()) if unit else None
    horizontal, vertical = float(tags.get(282, 0)), float(tags.get(283, 0))
    if factor is None or horizontal <= 0 or vertical <= 0:
        return None
    between = re.search(r"^spacing=([0-9.eE+-]+)$", text, re.MULTILINE)
    depth = abs(float(between.group(1))) if between else 1.0
    return depth * factor or 1.0, factor / vertical, factor / horizontal


def _resolution(image: Image.Image) -> tuple[float, float, float] | None:
    tags: Any = getattr(image, "tag_v2", {})
    unit = {2: 25.4, 3: 10.0}.get(tags.get(296, 2))
    horizontal, vertical = float(tags.get(282, 0) or 0), float(tags.get(283, 0) or 0)
    if unit is None or not (horizontal > 0 and vertical > 0):
        return None
    return _dpi((horizontal * 25.4 / unit, vertical * 25.4 / unit))


def _dpi(dpi: tuple[float, float] | None) -> tuple[float, float, float] | None:
    if dpi is None or not all(np.isfinite(value) and value > 0 for value in dpi):
        return None
    if any(abs(dpi[0] - default) < 0.51 for default in _DEFAULT_DPI):
        return None
    return 1.0, 25.4 / float(dpi[1]), 25.4 / float(dpi[0])
