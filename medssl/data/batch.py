"""What travels from the loader to a method: a batch of crops with the facts of each sample."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

BatchT = TypeVar("BatchT", bound="_OnDevice")


class _OnDevice:
    """Moves the tensor fields of a dataclass, except those that are only read to draw parameters."""

    stay_on_cpu: ClassVar[frozenset[str]] = frozenset()

    def to(self: BatchT, device: torch.device | str, *, non_blocking: bool = False) -> BatchT:
        """Return a copy on `device`; facts that parameters are drawn from stay where they are."""
        changes = {
            item.name: value.to(device, non_blocking=non_blocking)
            for item in dataclasses.fields(self)  # type: ignore[arg-type]
            if isinstance(value := getattr(self, item.name), Tensor) and item.name not in self.stay_on_cpu
        }
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


@dataclass
class Batch(_OnDevice):
    """Crops of one size and what is known of each.

    Spatial axes are (Z, Y, X) in 3D and (Y, X) in 2D; every fact with three components keeps the order (Z, Y, X)
    also in 2D. Image and label move with `to`; the facts stay on the CPU, where parameters are drawn from them: read
    from a GPU, each of them would make the host wait for the device.

    Args:
        image: Intensities as stored, float32. Shape: (B, C, Z, Y, X) or (B, C, Y, X).
        sample_index: Position in the endless stream; with the seed it fixes every random choice. Shape: (B,), int64.
        sample_id: Stable number of the volume in its store. Shape: (B,), int64.
        origin_mm: Position of the crop's first voxel from the volume's first voxel. Shape: (B, 3), float32.
        spacing_mm: Voxel size. Shape: (B, 3), float32.
        valid: Start and stop of the part of the crop that lies inside the volume, in voxels of the crop; the rest is
            padding. Shape: (B, 3, 2), int64.
        background: Value that padding has, per sample. Shape: (B,), float32.
        modality: One name per sample, for example "CT" or "MR".
        patient_key: One pseudonym per sample.
        label: Class of each voxel, or None. Shape: (B, Z, Y, X) or (B, Y, X), int64.
        rescale: Intercept and slope of each sample, as DICOM means them: intercept + slope * image is in the unit of
            the modality, HU in CT and SUVbw in PET. NaN where it is not known; None where it is for no sample.
            Shape: (B, 2), float32.
        extent_mm: Size of the whole volume that a crop comes from, or None where it is not known. Shape: (B, 3),
            float32.
    """

    stay_on_cpu: ClassVar[frozenset[str]] = frozenset(
        {"sample_index", "sample_id", "origin_mm", "spacing_mm", "valid", "background", "rescale", "extent_mm"}
    )

    image: Tensor
    sample_index: Tensor
    sample_id: Tensor
    origin_mm: Tensor
    spacing_mm: Tensor
    valid: Tensor
    background: Tensor
    modality: tuple[str, ...]
    patient_key: tuple[str, ...]
    label: Tensor | None = None
    rescale: Tensor | None = None
    extent_mm: Tensor | None = None

    def __len__(self) -> int:
        return self.image.shape[0]

    @property
    def dimensions(self) -> int:
        """2 or 3."""
        return self.image.ndim - 2


@dataclass
class View(_OnDevice):
    """What a network is shown of a batch, and what it is asked for.

    Args:
        image: Input. Shape: (B, C, Z, Y, X) or (B, C, Y, X).
        inside: Where the input shows tissue of the volume and not padding. Shape: (B, 1, Z, Y, X), bool.
        to_source_mm: Map from voxel index (z, y, x, 1) of the view to mm from the volume's first voxel, order
            (z, y, x). Shape: (B, 3, 4), float32. Exact for affine views; a displacement comes on top of it.
        displacement_mm: Elastic part of the map, added to the affine one, or None. Shape: (B, 3, Z, Y, X).
        target: What a reconstruction has to restore, or None.
        mask: True where a masked method hides the input, or None. Shape: (B, 1, Z, Y, X), bool.
        label: Warped label, or None. Shape: (B, Z, Y, X), int64.
        parameters: What was drawn, by transform and name, for logs and replay.
        sample_id: Stable number of the volume that is seen, or None. Shape: (B,), int64, on the image's device.
        extent_mm: Size of that volume, or None where it is not known. Shape: (B, 3), float32, on the image's device.
    """

    image: Tensor
    inside: Tensor
    to_source_mm: Tensor
    displacement_mm: Tensor | None = None
    target: Tensor | None = None
    mask: Tensor | None = None
    label: Tensor | None = None
    parameters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    sample_id: Tensor | None = None
    extent_mm: Tensor | None = None


Views = list[View]


def stack(batches: list[Batch]) -> Batch:
    """Concatenate batches along their first axis.

    Raises:
        ValueError: If there are none, or only some carry labels.
    """
    if not batches:
        raise ValueError("Nothing to stack: the list of batches is empty")
    labels = [batch.label for batch in batches if batch.label is not None]
    if labels and len(labels) != len(batches):
        raise ValueError("Some batches carry labels and some do not: keep labelled and unlabelled samples apart")
    if any(batch.rescale is not None for batch in batches):
        unknown = torch.tensor([float("nan")] * 2)
        batches = [
            batch if batch.rescale is not None else dataclasses.replace(batch, rescale=unknown.repeat(len(batch), 1))
            for batch in batches
        ]
    changes: dict[str, object] = {}
    for item in dataclasses.fields(Batch):
        values = [getattr(batch, item.name) for batch in batches]
        if any(value is None for value in values):
            changes[item.name] = None
        elif isinstance(values[0], Tensor):
            changes[item.name] = torch.cat(values)
        elif isinstance(values[0], tuple):
            changes[item.name] = sum(values, ())
        else:
            changes[item.name] = None
    return Batch(**changes)  # type: ignore[arg-type]
