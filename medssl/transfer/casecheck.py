"""Looks at the voxels of one case: grid, label values, numbers that are none. Says what is wrong and what to do."""

from __future__ import annotations

import logging
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from medssl.errors import DataError
from medssl.transfer.raw import Case, RawDataset

logger = logging.getLogger(__name__)

# Corners of image and mask may lie so far apart, in voxels. Writers round affines to float32 or to 6 decimals.
QUIET_VOXELS = 0.01
ALLOWED_VOXELS = 0.1


def check_case(dataset: RawDataset, case: Case) -> tuple[int, ...]:
    """Check that a case can be used.

    Args:
        dataset: Its data set.
        case: The case.

    Returns:
        Shape of the image in the order of the file.

    Raises:
        DataError: If a file cannot be read, the grids differ, an image has values that are not numbers, or the mask has
            values that `dataset.json` does not know.
    """
    if dataset.is_nifti:
        images = [_load_nifti(case.name, path) for path in case.images]
        mask, mask_affine = _load_nifti(case.name, case.label)
        _check_grids(case, [(array.shape, affine) for array, affine in images], mask.shape, mask_affine)
        arrays = [array for array, _ in images]
    else:
        arrays, mask = _load_other(dataset, case)
    for path, array in zip(case.images, arrays, strict=False):
        if not np.all(np.isfinite(array)):
            count = int(np.count_nonzero(~np.isfinite(array)))
            raise DataError(
                f"{case.name}: {path.name} has {count} voxels that are NaN or infinite. Replace them by the "
                "background's value."
            )
    if not any(np.any(array) for array in arrays):
        raise DataError(f"{case.name}: the image is zero everywhere. Replace it, or leave the case out.")
    _check_values(dataset, case, mask)
    return tuple(int(edge) for edge in arrays[0].shape)


def _load_nifti(name: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        image: Any = nibabel.load(path)
        array = np.asanyarray(image.dataobj)
    except (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(
            f"{name}: {path.name} cannot be read: {str(error) or type(error).__name__}. Get a fresh copy, or "
            "leave the case out."
        ) from error
    if array.ndim != 3:
        raise DataError(
            f"{name}: {path.name} has {array.ndim} axes {tuple(array.shape)}; nnU-Net takes 3D volumes. Write each "
            f"channel or frame as its own file ({name}_0000, {name}_0001, ...)."
        )
    affine = np.asarray(image.affine, dtype=np.float64)
    if abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise DataError(
            f"{name}: {path.name} has a voxel size of zero (affine {affine[:3, :3].tolist()}). Mend its header."
        )
    return array, affine


def _check_grids(
    case: Case, images: list[tuple[tuple[int, ...], np.ndarray]], mask_shape: tuple[int, ...], mask_affine: np.ndarray
) -> None:
    shape, affine = images[0]
    others = [(path.name, other, grid) for path, (other, grid) in zip(case.images[1:], images[1:], strict=True)]
    for name, other_shape, other_affine in [*others, (case.label.name, mask_shape, mask_affine)]:
        if tuple(other_shape) != tuple(shape):
            raise DataError(
                f"{case.name}: {name} has the shape {tuple(other_shape)}, the image {case.images[0].name} has "
                f"{tuple(shape)}. "
                "Resample one onto the other's grid, or replace the wrong file."
            )
        distance = _corner_distance(shape, affine, other_affine)
        if distance > ALLOWED_VOXELS:
            raise DataError(
                f"{case.name}: the affine of {name} differs from that of {case.images[0].name}: corners lie "
                f"{distance:.2f} voxels "
                f"apart (spacings {_spacing(other_affine)} and {_spacing(affine)} mm, origins "
                f"{_origin(other_affine)} and {_origin(affine)}). "
                "Resample onto the image's grid, or copy its header if the voxels already match."
            )
        if distance > QUIET_VOXELS:
            logger.warning(
                "%s: corners of %s and of the image lie %.3f voxels apart; taken as one grid.",
                case.name,
                name,
                distance,
            )


def _corner_distance(shape: tuple[int, ...], first: np.ndarray, second: np.ndarray) -> float:
    corners = np.array(
        [[x, y, z, 1] for x in (0, shape[0] - 1) for y in (0, shape[1] - 1) for z in (0, shape[2] - 1)],
        dtype=np.float64,
    )
    apart = np.linalg.norm((corners @ (first - second).T)[:, :3], axis=1).max()
    return float(apart / np.linalg.norm(first[:3, :3], axis=0).min())


def _spacing(affine: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in np.linalg.norm(affine[:3, :3], axis=0)]


def _origin(affine: np.ndarray) -> list[float]:
    return [round(float(value), 2) for value in affine[:3, 3]]


def _check_values(dataset: RawDataset, case: Case, mask: np.ndarray) -> None:
    found = np.unique(mask)
    known = dataset.label_values
    if np.all(np.isin(found, known)):
        return
    strange = [_plain(value) for value in found if value not in known]
    shown = ", ".join(str(_plain(value)) for value in found[:12]) + (", ..." if len(found) > 12 else "")
    ignore = "" if "ignore" in dataset.content["labels"] else f' (ignore: "ignore": {max(known) + 1})'
    raise DataError(
        f"{case.name}: label has values {{{shown}}}; dataset.json knows {{{', '.join(map(str, known))}}}. "
        f'Fix the mask or add {strange[0]} to "labels"{ignore}.'
    )


def _plain(value: Any) -> float | int:
    number = float(value)
    return int(number) if number.is_integer() else number


def _load_other(dataset: RawDataset, case: Case) -> tuple[list[np.ndarray], np.ndarray]:
    from medssl.transfer.nnunet import reader_of

    reader = reader_of(dataset)()
    try:
        image, facts = reader.read_images([str(path) for path in case.images])
        mask, mask_facts = reader.read_seg(str(case.label))
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        raise DataError(
            f"{case.name} cannot be read: {str(error) or type(error).__name__}. Get a fresh copy, or leave the "
            "case out."
        ) from error
    if len(image) != len(dataset.channel_names):
        raise DataError(
            f"{case.name} has {len(image)} channels; dataset.json knows {len(dataset.channel_names)} "
            f"({', '.join(dataset.channel_names)}). Mend channel_names or the files."
        )
    if image.shape[1:] != mask.shape[1:]:
        raise DataError(
            f"{case.name}: {case.label.name} has the shape {tuple(mask.shape[1:])}, the image "
            f"{case.images[0].name} has "
            f"{tuple(image.shape[1:])}. Resample one onto the other's grid, or replace the wrong file."
        )
    if not np.allclose(facts["spacing"], mask_facts["spacing"], rtol=1e-3):
        raise DataError(
            f"{case.name}: {case.label.name} has the spacing {list(mask_facts['spacing'])} mm, the image has "
            f"{list(facts['spacing'])}. Resample onto the image's grid, or copy its header if the voxels already match."
        )
    _check_direction(case, facts)
    return list(image), mask


def _check_direction(case: Case, facts: dict[str, Any]) -> None:
    """Refuse volumes whose axes are not (z, y, x): readers other than nibabel's keep the axes of the file."""
    if "sitk_stuff" not in facts:
        return
    direction = np.asarray(facts["sitk_stuff"]["direction"], dtype=np.float64).reshape(3, 3)
    if not np.array_equal(np.abs(direction).argmax(axis=0), [0, 1, 2]):
        raise DataError(
            f"{case.name}: the axes of {case.images[0].name} are turned (direction {np.round(direction, 2).tolist()}), "
            "and nnU-Net reads this format in the file's order: left and right would be mixed up. Write NIfTI; "
            "`medssl convert` does."
        )
    if not np.array_equal(np.sign(np.diag(direction)), [-1, -1, 1]):
        logger.warning(
            "%s: %s does not run right, forward and up as pretrained kernels expect; NIfTI would be turned.",
            case.name,
            case.images[0].name,
        )
