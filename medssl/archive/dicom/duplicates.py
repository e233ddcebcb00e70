"""Copies of one image: found by what the headers say, confirmed by the pixels."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePath

from medssl.archive.dicom import tags as t
from medssl.archive.dicom.model import DicomHeader
from medssl.archive.dicom.reading import NATIVE, open_pixels
from medssl.archive.find import absolute
from medssl.errors import InputRefused

#: Labels that copies of one image may differ in: they were numbered or written again.
_WRITTEN_AGAIN = frozenset(("instance", "content_time", "acquisition_time"))
_MAX_BYTES = 8 * 2**30


def split_duplicates(
    headers: Sequence[DicomHeader], root: Path | None
) -> tuple[list[DicomHeader], list[tuple[DicomHeader, DicomHeader]]]:
    """Return the headers without copies, and each copy with what it is a copy of.

    Only files that claim the same place and the same circumstances are opened. Copies have equal pixels; one UID in two
    transfer syntaxes is a copy by definition (PS3.5), of which the uncompressed one is kept.

    Args:
        headers: Images of one series.
        root: Folder that the paths are relative to.
    """
    suspects: dict[tuple[object, ...], list[DicomHeader]] = defaultdict(list)
    for header in headers:
        suspects[_claim(header)].append(header)
    kept: list[DicomHeader] = []
    copies: list[tuple[DicomHeader, DicomHeader]] = []
    for group in suspects.values():
        if len(group) == 1:
            kept.append(group[0])
            continue
        group = sorted(group, key=lambda header: (header.transfer_syntax not in NATIVE, header.path))
        seen: dict[str, DicomHeader] = {}
        for header in group:
            same_image = header.sop_uid and next(
                (
                    other
                    for other in seen.values()
                    if other.sop_uid == header.sop_uid and other.transfer_syntax != header.transfer_syntax
                ),
                None,
            )
            digest = "" if same_image else pixel_digest(header, root)
            original = same_image or (seen.get(digest) if digest else None)
            if original:
                copies.append((header, original))
            else:
                seen[digest or f"unreadable {header.path}"] = header
                kept.append(header)
    return sorted(kept, key=lambda header: header.path), copies


def folder_copies(
    kept: Sequence[DicomHeader], copies: Sequence[tuple[DicomHeader, DicomHeader]]
) -> dict[str, set[str]] | None:
    """Return the folders that each hold a copy of a series, or part of one, with their paths.

    A folder that holds every image of the series is whole; another with at least two of its images was copied on
    purpose and stands for itself. Single images elsewhere, and a series spread over folders, are left to be merged.

    Args:
        kept: Images without copies.
        copies: Each copy with what it is a copy of.

    Returns:
        The paths of each folder, or None if the series is to be taken as one.
    """
    if not copies:
        return None
    images: dict[str, set[str]] = defaultdict(set)
    paths: dict[str, set[str]] = defaultdict(set)
    for header, image in [*((header, header) for header in kept), *copies]:
        folder = str(PurePath(header.path).parent)
        images[folder].add(image.path)
        paths[folder].add(header.path)
    everything = {header.path for header in kept}
    whole = [folder for folder in sorted(images) if images[folder] == everything]
    if not whole or len(images) == 1:
        return None
    parts = {folder: paths[folder] for folder in sorted(images) if len(images[folder]) > 1 or folder == whole[0]}
    for folder in images.keys() - parts.keys():
        parts[whole[0]] |= paths[folder]
    return parts if len(parts) > 1 else None


def pixel_digest(header: DicomHeader, root: Path | None) -> str:
    """Return a digest of the pixels as stored, empty if they cannot be read."""
    path = Path(header.path) if root is None else absolute(root, header.path)
    try:
        dataset, _ = open_pixels(path, [t.PIXEL_DATA, t.FLOAT_PIXELS, t.DOUBLE_PIXELS], _MAX_BYTES)
    except (InputRefused, OSError):
        return ""
    content = hashlib.sha256(f"{header.bits_allocated} {header.samples} {header.rows} ".encode())
    found = False
    for tag in (t.PIXEL_DATA, t.FLOAT_PIXELS, t.DOUBLE_PIXELS):
        element = dataset.get_item(tag) if tag in dataset else None
        if element is not None and isinstance(element.value, bytes):
            content.update(element.value)
            found = True
    return content.hexdigest() if found else ""


def _claim(header: DicomHeader) -> tuple[object, ...]:
    first = header.frames[0]
    labels = tuple(sorted((name, value) for name, value in first.labels if name not in _WRITTEN_AGAIN))
    place: tuple[object, ...] = (first.position, first.orientation)
    if header.picture:
        # Pictures have no place: only the same UID makes two of them suspects.
        place = (header.sop_uid or header.path,)
    return (
        header.rows,
        header.columns,
        header.frame_count,
        header.modality,
        place,
        first.kind,
        first.slope,
        first.intercept,
        labels,
    )
