"""What limited processes do for the index: read a header, plan a series, decode and measure a volume."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from medssl.archive.find import absolute
from medssl.archive.volume import UNKNOWN_MODALITY, Volume
from medssl.errors import InputRefused

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from medssl.archive.formats.common import Geometry

#: Voxels from which percentiles are taken; larger volumes are sampled evenly.
SAMPLED_VOXELS = 2**22
PERCENTILES = {"p00_5": 0.5, "p05": 5.0, "p50": 50.0, "p95": 95.0, "p99_5": 99.5}
_FEW_VALUES = 32


@dataclass(frozen=True, slots=True)
class FileTask:
    """One file whose header is to be read.

    Attributes:
        number: Its row in the cache.
        root: The source's root.
        path: Relative path as `path_text` gave it.
        size: Bytes when it was found.
        mtime_ns: Time of change when it was found.
    """

    number: int
    root: str
    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a header told.

    Attributes:
        state: `dicom`, `image` or `related`.
        code: Kind of related object, if it is one.
        series: The text by which files of a series sort together; empty for an image file.
        header: JSON of the DICOM header, or format of the image file.
        companions: Relative paths of files that hold the voxels.
    """

    state: str
    code: str = ""
    series: str = ""
    header: str = ""
    companions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class VolumeTask:
    """One volume to be decoded.

    Attributes:
        fingerprint: Its row in the cache.
        kind: `dicom` or the format of the image file.
        root: The source's root.
        plan: JSON of the `DicomVolume`, or the relative path.
        geometry: `strict` or `repair`.
        files: (relative path, bytes, time of change) of all files it needs.
    """

    fingerprint: str
    kind: str
    root: str
    plan: str
    geometry: str
    files: tuple[tuple[str, int, int], ...] = ()


def read_file(task: FileTask) -> FileFacts:
    """Tell what a file is and check its header.

    Raises:
        InputRefused: If it is no image or cannot be used.
        OSError: If it cannot be read.
    """
    from medssl.archive.identity import is_label_file
    from medssl.archive.sniff import sniff

    path = absolute(Path(task.root), task.path)
    check_unchanged(path, task.size, task.mtime_ns)
    kind = sniff(path)
    if kind == "dicom":
        from medssl.archive.dicom.header import read_header

        header = replace(read_header(path), path=task.path)
        facts = FileFacts("dicom", series=header.series_key, header=header.to_json())
    else:
        from medssl.archive.formats.read import check_file

        layout = check_file(path, kind, Path(task.root))
        related = layout.related or ("label_map" if is_label_file(task.path) else "")
        companions = tuple(_relative(companion, Path(task.root)) for companion in layout.companions)
        facts = FileFacts("related" if related else "image", related, header=kind, companions=companions)
    check_unchanged(path, task.size, task.mtime_ns)
    return facts


def plan_series(task: tuple[str, str, list[str]]) -> dict[str, Any]:
    """Group the headers of one series into volumes.

    Args:
        task: The source's root, geometry policy, and the headers as JSON.

    Returns:
        `volumes`: (JSON of the volume, text that names it apart from its path); `related`: (path, kind); `refused`:
        (path, code, detail).
    """
    from medssl.archive.dicom.group import group
    from medssl.archive.dicom.model import DicomHeader

    root, geometry, texts = task
    headers = [DicomHeader.from_json(text) for text in texts]
    identifiers = {header.path: header.sop_uid for header in headers}
    result = group(headers, cast("Geometry", geometry), Path(root))
    volumes = []
    for volume in result.volumes:
        # The plane that a volume begins with names it: its identifier survives when files are moved or added.
        file, frame = next(((file, frame) for file, frame in volume.slices if file >= 0), (0, 0))
        first = volume.paths[file]
        volumes.append((volume.to_json(), [identifiers.get(first) or first, str(frame)]))
    return {
        "volumes": volumes,
        "related": [tuple(entry) for entry in result.related],
        "refused": [tuple(entry) for entry in result.refused],
    }


def load_planned(task: VolumeTask) -> Volume:
    """Decode a volume; files that changed since they were indexed are refused.

    Raises:
        InputRefused: If it cannot be used.
    """
    root = Path(task.root)
    paths = [(absolute(root, path), size, mtime) for path, size, mtime in task.files]
    for path, size, mtime in paths:
        check_unchanged(path, size, mtime)
    if task.kind == "dicom":
        from medssl.archive.dicom.model import DicomVolume
        from medssl.archive.dicom.pixels import load

        plan = DicomVolume.from_json(task.plan)
        volume = load(replace(plan, paths=tuple(str(absolute(root, path)) for path in plan.paths)), None)
    else:
        from medssl.archive.formats.read import load_file

        volume = load_file(absolute(root, task.plan), cast(Any, task.kind), root, cast("Geometry", task.geometry))
        modality = image_hints(root, task.plan).get("modality") if volume.modality == UNKNOWN_MODALITY else None
        volume = replace(volume, modality=modality) if modality else volume
    for path, size, mtime in paths:
        check_unchanged(path, size, mtime)
    return volume


def load_file_alone(task: tuple[str, str]) -> Volume:
    """Read one file that is a volume by itself, be it an image or a label.

    Args:
        task: Path and geometry policy.

    Raises:
        InputRefused: If it cannot be used or holds several volumes.
        OSError: If it cannot be read.
    """
    from medssl.archive.sniff import sniff

    path, geometry = Path(task[0]), cast("Geometry", task[1])
    kind = sniff(path)
    if kind != "dicom":
        from medssl.archive.formats.read import load_file

        return load_file(path, kind, path.parent, geometry)
    from medssl.archive.dicom.series import read_series

    volumes = read_series(path, geometry)
    if len(volumes) != 1:
        raise InputRefused("dimensions_unsupported", f"the file holds {len(volumes)} volumes where one is expected")
    return volumes[0].volume


def image_hints(root: Path, path: str) -> dict[str, str]:
    """Return modality and body part that stand beside an image file."""
    from medssl.archive.hints import hints_of

    return hints_of(root, path)


def measure_volume(task: VolumeTask) -> dict[str, Any]:
    """Decode a volume and return what the manifest says of it.

    Raises:
        InputRefused: If it cannot be used.
    """
    volume = load_planned(task)
    if task.kind == "dicom":
        body_part = json.loads(task.plan).get("body_part", "")
    else:
        body_part = image_hints(Path(task.root), task.plan).get("body_part", "")
    array = volume.array
    sample = _sample(array)
    constant = bool(array.min() == array.max())
    flags = set(volume.flags)
    if constant:
        flags.add("constant")
    elif _few(sample):
        flags.add("few_values")
    return {
        "modality": volume.modality,
        "body_part": body_part,
        "shape": list(volume.shape),
        "spacing_mm": [round(size, 6) for size in volume.spacing_mm],
        "orientation": volume.orientation,
        "dtype": str(array.dtype),
        "channels": volume.channels,
        "flags": sorted(flags),
        "geometry": volume.geometry,
        "content_hash": content_hash(volume),
        **_percentiles(sample),
    }


def content_hash(volume: Volume) -> str:
    """Return the SHA-256 of shape, type and voxels: equal for copies of an image, whatever their headers say."""
    import numpy as np

    digest = hashlib.sha256(f"{volume.shape}{volume.array.dtype.str}".encode())
    for channel in volume.array:
        digest.update(np.ascontiguousarray(channel).data)
    return digest.hexdigest()


def _percentiles(sample: NDArray[Any]) -> dict[str, float]:
    import numpy as np

    values = np.percentile(sample.astype(np.float64), list(PERCENTILES.values()))
    return {name: float(value) for name, value in zip(PERCENTILES, values, strict=True)}


def _sample(array: NDArray[np.generic]) -> NDArray[Any]:
    flat = array.reshape(-1)
    if flat.size <= SAMPLED_VOXELS:
        return flat
    step = flat.size // SAMPLED_VOXELS + 1
    # No step in common with rows and slices, or whole columns would be skipped.
    while math.gcd(step, math.prod(array.shape[2:])) != 1:
        step += 1
    return flat[::step]


def _few(sample: NDArray[Any]) -> bool:
    import numpy as np

    if np.unique(sample[:65536]).size > _FEW_VALUES:
        return False
    values = np.unique(sample)
    return bool(values.size <= _FEW_VALUES and (values == np.rint(values)).all())


def check_unchanged(path: Path, size: int, mtime_ns: int) -> None:
    """Refuse a file that is not as it was found.

    Raises:
        InputRefused: If its size or time of change differ.
        OSError: If it cannot be looked at.
    """
    status = path.stat()
    if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
        raise InputRefused("changed_while_read", f"{size} bytes when found, {status.st_size} now")


def _relative(path: Path, root: Path) -> str:
    resolved = path.resolve()
    return str(resolved.relative_to(root.resolve()))
