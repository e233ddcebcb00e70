"""From the source's voxels to the network's input, as nnU-Net's preprocessor does it, within a budget of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medssl.inference.model import SegmentationModel
from medssl.inference.resampling import Scheme, resample_channel
from medssl.inference.workspace import Workspace

ELEMENTWISE = ("CTNormalization", "NoNormalization", "RGBTo01Normalization")
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Prepared:
    """The network's input and what is needed to go back.

    Args:
        data: Shape: (C, Z', Y', X'), float32, axes in nnU-Net's transposed order.
        shape_before_cropping: Shape of the whole volume in the transposed order.
        bbox: Half-open ranges of the crop to non-zero voxels, per axis.
        spacing: Source spacing in mm in the transposed order.
    """

    data: Array
    shape_before_cropping: tuple[int, int, int]
    bbox: tuple[tuple[int, int], ...]
    spacing: tuple[float, ...]

    @property
    def cropped_shape(self) -> tuple[int, int, int]:
        """Shape after cropping and before resampling."""
        sides = [high - low for low, high in self.bbox]
        return sides[0], sides[1], sides[2]

    def target_spacing(self, model: SegmentationModel) -> list[float]:
        """Return the spacing of `data` in mm; a 2D configuration keeps the distance of the slices."""
        return _target_spacing(model, self.spacing)


def prepare(image: Array, spacing: Sequence[float], model: SegmentationModel, workspace: Workspace) -> Prepared:
    """Transpose, crop to non-zero, normalise and resample.

    `image` is changed. Within the budget every step is nnU-Net's own function on the whole volume, so the result is
    bit-equal to nnU-Net's. Beyond it the image is worked on in slabs: z-score statistics are summed in float64
    instead of float32 (a relative difference near 1e-6), and resampling differs in the last digit of float32.

    Args:
        image: Shape: (C, Z, Y, X), float32, C-contiguous, of `workspace`.
        spacing: In mm, (z, y, x).
        model: Whose plans to follow.
        workspace: Gives large arrays.
    """
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

    forward = model.plans.transpose_forward
    turned = image.transpose([0, *[axis + 1 for axis in forward]])
    spacing = [float(spacing[axis]) for axis in forward]
    shape = tuple(int(side) for side in turned.shape[1:])
    bbox = _nonzero_box(turned)
    cropped = turned[(slice(None), *[slice(low, high) for low, high in bbox])]
    _normalise(cropped, model, workspace)

    target = _target_spacing(model, spacing)
    new_shape = [int(side) for side in compute_new_shape(cropped.shape[1:], spacing, target)]
    if tuple(new_shape) == cropped.shape[1:]:
        data = cropped
    else:
        data = _resample(cropped, new_shape, spacing, target, model, workspace)
        workspace.release(image)
    return Prepared(data, (shape[0], shape[1], shape[2]), bbox, tuple(spacing))


def _target_spacing(model: SegmentationModel, spacing: Sequence[float]) -> list[float]:
    target = [float(side) for side in model.configuration.spacing]
    return [float(spacing[0]), *target] if len(target) < len(spacing) else target


def _nonzero_box(image: Array) -> tuple[tuple[int, int], ...]:
    """Return the box of non-zero voxels of any channel; filling holes, as nnU-Net does, cannot change it."""
    along = [np.zeros(side, bool) for side in image.shape[1:]]
    for row in range(image.shape[1]):
        plane = (image[:, row] != 0).any(axis=0)
        along[0][row] = plane.any()
        along[1] |= plane.any(axis=1)
        along[2] |= plane.any(axis=0)
    if not along[0].any():
        return tuple((0, side) for side in image.shape[1:])
    return tuple((int(np.argmax(hits)), len(hits) - int(np.argmax(hits[::-1]))) for hits in along)


def _normalise(image: Array, model: SegmentationModel, workspace: Workspace) -> None:
    """Normalise each channel in place with nnU-Net's schemes."""
    configuration = model.configuration
    outside = _outside(image) if any(configuration.use_mask_for_norm) else None
    for channel, scheme in enumerate(configuration.normalization_schemes):
        masked = bool(configuration.use_mask_for_norm[channel])
        normaliser = _scheme(scheme)(
            use_mask_for_norm=masked,
            intensityproperties=model.plans.foreground_intensity_properties_per_channel[str(channel)],
        )
        voxels = image[channel]
        if scheme in ELEMENTWISE:
            for row in voxels:
                row[...] = normaliser.run(row, None)
        elif scheme == "ZScoreNormalization" and not masked and not workspace.fits(voxels.nbytes):
            _z_score_by_rows(voxels)
        else:
            voxels[...] = normaliser.run(voxels, outside)


def _outside(image: Array) -> Array:
    """Return nnU-Net's map that is -1 outside the filled non-zero region and 0 inside. Shape: (Z, Y, X)."""
    from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask

    return np.where(create_nonzero_mask(image), np.int8(0), np.int8(-1))


def _z_score_by_rows(voxels: Array) -> None:
    mean = sum(row.sum(dtype=np.float64) for row in voxels) / voxels.size
    variance = sum(np.square(row - mean, dtype=np.float64).sum() for row in voxels) / voxels.size
    deviation = np.float32(max(np.sqrt(variance), 1e-8))
    for row in voxels:
        row -= np.float32(mean)
        row /= deviation


def _scheme(name: str) -> Any:
    from pathlib import Path

    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = Path(nnunetv2.__path__[0]) / "preprocessing" / "normalization"
    return recursive_find_python_class(str(folder), name, "nnunetv2.preprocessing.normalization")


def _resample(
    image: Array,
    new_shape: Sequence[int],
    spacing: Sequence[float],
    target: Sequence[float],
    model: SegmentationModel,
    workspace: Workspace,
) -> Array:
    settings = model.configuration.configuration
    scheme = Scheme.of(settings["resampling_fn_data"], settings["resampling_fn_data_kwargs"], spacing, target)
    out = workspace.empty((image.shape[0], *new_shape), np.float32)
    # float64: the input, its padded and its filtered copy, and the output; float32: nnU-Net's own copy of the result.
    whole = 24.0 * np.prod(image.shape[1:]) + 12.0 * np.prod(new_shape)
    for channel in range(image.shape[0]):
        if scheme.by_rows and not workspace.fits(whole):
            resample_channel(image[channel], new_shape, scheme, out[channel], workspace)
        else:
            one = image[channel : channel + 1]
            out[channel] = np.asarray(model.configuration.resampling_fn_data(one, new_shape, spacing, target))[0]
    return out
