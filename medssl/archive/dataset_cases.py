"""One case of a public data set: checked, and written as nnU-Net wants it. Both run in a process with limits."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medssl.archive.tasks import VolumeTask, load_file_alone, load_planned
from medssl.archive.volume import IMAGE_MODALITY, Volume
from medssl.errors import InputRefused, MedsslError
from medssl.files import atomic_path

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Two grids are one if no voxel of a corner lies further apart than this part of a voxel.
_GRID_TOLERANCE = 0.05
#: Residual of the conic on an outline of some thickness; 0.2 is a tenth of the radius.
_OUTLINE_TOLERANCE = 0.25
_NIFTI = ".nii.gz"


@dataclass(frozen=True)
class CaseTask:
    """What is needed to check or write a case.

    Attributes:
        name: The case.
        images: Image files, one for each channel, or one DICOM series.
        masks: Label (empty for a label map) and file of each mask.
        channels: Names of the channels that are expected.
        labels: Values that the written mask may have.
        values: Stored value and written value; empty where they are the same.
        outline: Whether masks are outlines of an ellipse.
        united: Whether several masks of the case are one.
        image_target: Path of the written image without channel and ending; empty to check only.
        mask_target: Path of the written mask.
        ending: How written files end.
        hardlink: Whether files that need no change are linked, not copied.
    """

    name: str
    images: tuple[str | VolumeTask, ...]
    masks: tuple[tuple[str, str], ...]
    channels: tuple[str, ...]
    labels: Mapping[str, int]
    values: Mapping[int, int]
    outline: bool = False
    united: bool = False
    image_target: str = ""
    mask_target: str = ""
    ending: str = _NIFTI
    hardlink: bool = False


def check_case(task: CaseTask) -> list[tuple[str, str, str]]:
    """Decode images and masks of a case.

    Returns:
        Kind, path and detail of each problem.
    """
    problems: list[tuple[str, str, str]] = []
    images = []
    for source in task.images:
        try:
            images.append(_load(source))
        except InputRefused as error:
            problems.append((error.code, _path(source), error.detail))
    if problems:
        return problems
    try:
        grid = _channels(task, images)[0]
        _same_grid(task, images)
    except InputRefused as error:
        return [(error.code, _path(task.images[0]), error.detail)]
    if task.masks:
        try:
            _mask(task, grid)
        except _MaskRefused as error:
            problems.append((error.code, error.path, error.detail))
    return problems


def write_case(task: CaseTask) -> str:
    """Write a case that `check_case` found whole; files that need no change are copied byte by byte.

    Returns:
        Empty, or why the disk did not take it.

    Raises:
        InputRefused: If a file changed since.
    """
    try:
        images = [_load(source) for source in task.images]
        channels = _channels(task, images)
        for number, channel in enumerate(channels):
            one_file = len(task.images) == len(channels)
            source = task.images[number] if one_file else None
            whole = images[number] if one_file else channel
            target = Path(f"{task.image_target}_{number:04d}{task.ending}")
            if isinstance(source, str) and _unchanged(source, whole, channel, task.ending):
                _pass_on(Path(source), target, task.hardlink)
            else:
                _write(channel, target)
        if task.mask_target:
            mask, changed = _mask(task, channels[0])
            target = Path(f"{task.mask_target}{task.ending}")
            if changed or not task.masks[0][1].endswith(task.ending):
                _write(replace(channels[0], array=mask[None], channels="scalar"), target)
            else:
                _pass_on(Path(task.masks[0][1]), target, task.hardlink)
    except InputRefused:
        raise
    except (MedsslError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.EXDEV:
            return f"{task.image_target} is on another disk than the source: use --files copy."
        return str(error) if isinstance(error, MedsslError) else f"{task.image_target}: {error.strerror}"
    return ""


class _MaskRefused(InputRefused):
    """A mask that cannot be used, with its path."""

    def __init__(self, code: str, detail: str, path: str) -> None:
        super().__init__(code, detail)
        self.path = path


def _load(source: str | VolumeTask) -> Volume:
    return load_file_alone((source, "strict")) if isinstance(source, str) else load_planned(source)


def _path(source: str | VolumeTask) -> str:
    return source if isinstance(source, str) else source.files[0][0]


def _channels(task: CaseTask, images: list[Volume]) -> list[Volume]:
    """Return one volume for each file that nnU-Net reads: each channel, or a whole picture."""
    if images[0].modality == IMAGE_MODALITY:
        return [_picture(image, len(task.channels)) for image in images]
    if len(images) == 1 and images[0].shape[0] > 1:
        image = images[0]
        parts = [
            replace(image, array=image.array[number : number + 1], channels="scalar")
            for number in range(image.shape[0])
        ]
    else:
        parts = images
    if len(parts) != len(task.channels) or any(part.shape[0] != 1 for part in parts):
        number = sum(part.shape[0] for part in parts)
        raise InputRefused("channels", f"{number} channels where {len(task.channels)} are expected.")
    return parts


def _picture(image: Volume, colours: int) -> Volume:
    array = image.array
    if array.shape[0] == colours:
        return image
    if array.shape[0] == 1:
        return replace(image, array=np.repeat(array, 3, axis=0), channels="colour")
    if (array == array[:1]).all():
        return replace(image, array=array[:1], channels="scalar")
    raise InputRefused("channels", "a coloured picture where grey values are expected.")


def _same_grid(task: CaseTask, images: list[Volume]) -> None:
    for source, image in zip(task.images[1:], images[1:], strict=True):
        if image.shape[1:] != images[0].shape[1:] or not _close(image.affine, images[0].affine, image.shape):
            raise InputRefused("grid", f"the channel {Path(_path(source)).name} lies on another grid.")


def _mask(task: CaseTask, grid: Volume) -> tuple[NDArray[Any], bool]:
    """Return the mask on the image's grid and whether it differs from the stored file. Shape: (Z, Y, X).

    Raises:
        _MaskRefused: If it does not fit.
    """
    merged: NDArray[Any] | None = None
    changed = task.united and len(task.masks) > 1
    # Where structures overlap, the one with the higher number wins.
    for label, path in sorted(task.masks, key=lambda entry: (task.labels.get(entry[0], 0), entry[1])):
        try:
            stored = _load(path)
            array, turned = _on_grid(stored, grid)
            mapped, mapped_differs = _mapped(task, label, array)
        except InputRefused as error:
            raise _MaskRefused(error.code, error.detail, path) from error
        changed |= turned or mapped_differs or bool(label)
        merged = mapped if merged is None else np.where(mapped > 0, mapped, merged)
    assert merged is not None
    missing = set(task.labels) - {"background"} - {label for label, _ in task.masks}
    if task.masks[0][0] and missing:
        raise _MaskRefused("no_mask", f"{len(missing)} labels have no mask: {sorted(missing)[0]}.", task.masks[0][1])
    return merged, changed


def _mapped(task: CaseTask, label: str, array: NDArray[Any]) -> tuple[NDArray[Any], bool]:
    """Return a mask with the values of `labels`, and whether any changed."""
    if array.dtype.kind == "f" and not (array == np.round(array)).all():
        raise InputRefused("label_value", "a mask with values between whole numbers.")
    found = [int(value) for value in np.unique(array)]
    dtype = np.uint8 if max(task.labels.values()) < 256 else np.uint16
    if label:
        if label not in task.labels:
            raise InputRefused("label_name", f"a mask of '{label}', which the manifest does not name.")
        if any(value not in (0, 1) for value in found):
            raise InputRefused("label_value", f"values {found[:10]} in a mask of one structure; 0 and 1 are expected.")
        return np.where(array > 0, task.labels[label], 0).astype(dtype), True
    allowed = {0: 0, **task.values} if task.values else {value: value for value in task.labels.values()}
    unknown = [value for value in found if value not in allowed]
    if unknown:
        raise InputRefused("label_value", f"values {unknown[:10]}; {sorted(allowed)} are expected.")
    mapped = array.astype(dtype)
    for stored, written in task.values.items():
        mapped[array == stored] = written
    if task.outline:
        mapped = _filled(mapped)
    return mapped, task.outline or any(allowed[value] != value for value in found)


def _filled(array: NDArray[Any]) -> NDArray[Any]:
    """Return the inside of an ellipse's outline, which may be open where the picture's edge cuts it.

    The conic a x^2 + b x y + c y^2 + d x + e y = 1 about the points' mean, which lies inside, is fitted to the points.

    Raises:
        InputRefused: If the points lie on no ellipse.
    """
    outline = array[0] > 0
    y, x = np.nonzero(outline)
    if y.size < 5:
        raise InputRefused("label_value", "an outline without points.")
    middle, scale = (y.mean(), x.mean()), max(np.ptp(y), np.ptp(x)) / 2

    def terms(y: NDArray[Any], x: NDArray[Any]) -> NDArray[np.float64]:
        v, u = (y - middle[0]) / scale, (x - middle[1]) / scale
        return np.stack([u * u, u * v, v * v, u, v], -1)

    conic = np.linalg.lstsq(terms(y, x), np.ones(y.size), rcond=None)[0]
    residual = np.abs(terms(y, x) @ conic - 1).max()
    if not (4 * conic[0] * conic[2] > conic[1] ** 2 and conic[0] > 0 and residual < _OUTLINE_TOLERANCE):
        raise InputRefused("label_value", "an outline that is no ellipse.")
    inside = terms(*np.indices(outline.shape)) @ conic <= 1
    return ((inside | outline) * array.max()).astype(array.dtype)[None]


def _on_grid(mask: Volume, grid: Volume) -> tuple[NDArray[Any], bool]:
    """Return the mask in the order of the image's voxels, and whether axes were turned. Shape: (Z, Y, X)."""
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

    array = mask.array
    if mask.channels == "colour" and (array == array[:1]).all():
        array = array[:1]
    if array.shape[0] != 1:
        raise InputRefused("dimensions_unsupported", f"a mask with {array.shape[0]} channels.")
    single = array[0]
    if grid.modality == IMAGE_MODALITY and mask.modality == IMAGE_MODALITY:
        affine = grid.affine
    else:
        affine = mask.affine
    if single.shape == grid.shape[1:] and _close(affine, grid.affine, grid.shape):
        return single, False
    turn = ornt_transform(io_orientation(mask.affine), io_orientation(grid.affine))
    xyz = single.transpose(2, 1, 0)
    turned = apply_orientation(xyz, turn).transpose(2, 1, 0)
    affine = mask.affine @ inv_ornt_aff(turn, xyz.shape)
    if turned.shape != grid.shape[1:] or not _close(affine, grid.affine, grid.shape):
        raise InputRefused(
            "grid", f"the mask (z, y, x {single.shape}) and the image {grid.shape[1:]} do not lie on one grid."
        )
    return np.ascontiguousarray(turned), True


def _close(one: NDArray[np.float64], other: NDArray[np.float64], shape: tuple[int, ...]) -> bool:
    z, y, x = shape[1:]
    corners = np.array([[i, j, k, 1] for i in (0, x - 1) for j in (0, y - 1) for k in (0, z - 1)], np.float64).T
    apart = np.linalg.norm(((one - other) @ corners)[:3], axis=0).max()
    return bool(apart <= _GRID_TOLERANCE * np.linalg.norm(other[:3, :3], axis=0).min())


def _unchanged(source: str, stored: Volume, written: Volume, ending: str) -> bool:
    same = stored.channels == written.channels and stored.array.shape == written.array.shape
    return source.endswith(ending) and same and not stored.flags


def _pass_on(source: Path, target: Path, hardlink: bool) -> None:
    if hardlink:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target)
        return
    with atomic_path(target, durable=False) as temporary:
        shutil.copyfile(source, temporary)


def _write(volume: Volume, target: Path) -> None:
    with atomic_path(target, durable=False) as temporary:
        if target.suffix == ".png":
            from PIL import Image

            pixels = volume.array[:, 0]
            Image.fromarray(pixels[0] if pixels.shape[0] == 1 else np.moveaxis(pixels, 0, -1)).save(temporary)
        else:
            from medssl.archive.convert import to_nifti

            to_nifti(volume).to_filename(temporary)
