"""Rotation, scaling, elastic deformation, mirroring, quarter turns, shift and cropping to the patch in one resampling.

A sample that drew neither rotation, scaling nor deformation is cropped, mirrored and turned by quarters bit for bit.
Rotation happens in mm: with anisotropic voxels a turn in voxel space would shear the anatomy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from medssl.augmentation.elastic import control_shape, displacement_mm, largest_shift_mm
from medssl.augmentation.geometry import (
    PLANES,
    box_mask,
    crop,
    is_resampled,
    positions_inside,
    valid_box,
    view_to_crop,
    wholly_inside,
)
from medssl.augmentation.mirror import AXES, Axis
from medssl.augmentation.resampling import resample
from medssl.augmentation.transform import Facts, Parameters, TransformSettings, broadcast, ranges_are_ordered, to_device
from medssl.config import Settings
from medssl.data.batch import Batch
from medssl.data.draw import Draw
from medssl.data.sampling import margin_before

# nnU-Net's threshold: beyond it a turn out of the plane would show neighbouring slices through a handful of samples.
ANISOTROPIC = 3.0
# Largest ratio of two voxel sizes that a quarter turn may exchange.
SAME_SPACING = 1.01


class Rotation(TransformSettings):
    """Turns about the axes.

    Args:
        degrees: Largest angle about each axis.
        in_plane_degrees: Largest angle in 2D and for anisotropic patches, which turn in the plane only.
    """

    degrees: float = Field(default=30.0, ge=0, le=180)
    in_plane_degrees: float = Field(default=30.0, ge=0, le=180)


class Scale(TransformSettings):
    """Zoom. A factor of 1.4 shows 1.4 times as much anatomy, smaller (nnU-Net's sense); all axes share it."""

    range: tuple[float, float] = (0.7, 1.4)

    _ordered = field_validator("range")(ranges_are_ordered)

    @field_validator("range")
    @classmethod
    def _positive(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] <= 0:
            raise ValueError(f"a scale is positive, got {value}")
        return value


class Elastic(TransformSettings):
    """Smooth deformation.

    Args:
        cells: Cells of the control grid across the patch.
        strength: Part of the largest displacement that cannot fold.
    """

    cells: int = Field(default=4, ge=1, le=32)
    strength: tuple[float, float] = (0.2, 0.8)

    _ordered = field_validator("strength")(ranges_are_ordered)

    @field_validator("strength")
    @classmethod
    def _at_most_all(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] < 0 or value[1] > 1:
            raise ValueError(f"strength is a part of the fold-free maximum, in [0, 1]; got {value}")
        return value


class Mirror(TransformSettings):
    """Mirroring; each axis is drawn on its own.

    Args:
        axes: Which axes may be mirrored, before the laterality policy has its say.
    """

    probability: float = Field(default=0.5, ge=0, le=1)
    axes: tuple[Axis, ...] = AXES


class Rot90(TransformSettings):
    """Quarter turns, exact. A sample is turned once, twice or three times in one plane, drawn among those whose two
    edges and voxel sizes are equal; if there is none, it is not turned.

    Args:
        axes: Axes across which the plane of the turn may lie.
    """

    axes: tuple[Axis, ...] = AXES


class SpatialSettings(Settings):
    """Everything that moves anatomy.

    Args:
        rotation: Turns.
        scale: Zoom.
        elastic: Smooth deformation.
        mirror: Mirroring.
        rot90: Quarter turns.
        shift: How far the patch is moved at most along each axis, in patch sizes; whole voxels. Two views of one crop
            lie up to twice as far apart.
    """

    rotation: Rotation = Rotation()
    scale: Scale = Scale()
    elastic: Elastic = Elastic()
    mirror: Mirror = Mirror(probability=0.0)
    rot90: Rot90 = Rot90()
    shift: float = Field(default=0.0, ge=0, le=1)


@dataclass
class Placed:
    """A batch that was moved: see `View` for the fields."""

    image: Tensor
    inside: Tensor
    to_source_mm: Tensor
    displacement_mm: Tensor | None
    label: Tensor | None


class Spatial:
    """The one spatial transform of a policy.

    Args:
        by_modality: Settings of each modality that the policy meets, mirror axes already restricted by laterality.
        patch_size: Spatial size of the views.
        label_mode: `nearest`, or `linear`: each class is interpolated on its own and the largest wins, as in nnU-Net.
        classes: Number of classes, for `linear`.
    """

    def __init__(
        self,
        by_modality: Mapping[str, SpatialSettings],
        patch_size: tuple[int, ...],
        *,
        label_mode: Literal["nearest", "linear"] = "nearest",
        classes: int = 0,
    ) -> None:
        self.by_modality = dict(by_modality)
        self.patch_size = patch_size
        self.label_mode = label_mode
        self.classes = classes

    def draw(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw the spatial parameters of each sample.

        Returns:
            `angle_degrees` (B, 3) about (z, y, x), `scale` (B, 3), `mirror` (B, 3) bool, `shift` (B, 3) in voxels,
            `elastic_strength` (B,); where any modality may have them, `elastic_control` (B, 3, ...) in [-1, 1] and
            `quarter_turns` (B, 3) in the planes across (z, y, x).
        """
        chosen = [self.by_modality[modality] for modality in facts.modality]
        edges = torch.tensor(self._patch)
        flat = self._in_plane_only(facts)

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32)

        turns = rng.child("rotation").uniform(0, 1) < column([s.rotation.probability for s in chosen])
        degrees = column([s.rotation.degrees for s in chosen])
        in_plane = column([s.rotation.in_plane_degrees for s in chosen])
        largest = torch.where(flat, in_plane, degrees)[:, None] * torch.where(
            flat[:, None], torch.tensor([1.0, 0, 0]), 1.0
        )
        angle = largest * turns[:, None] * rng.child("angle").uniform(-1, 1, (3,))

        zooms = rng.child("scaling").uniform(0, 1) < column([s.scale.probability for s in chosen])
        low, high = column([s.scale.range[0] for s in chosen]), column([s.scale.range[1] for s in chosen])
        factor = torch.where(zooms, low + (high - low) * rng.child("scale").uniform(0, 1), 1.0)
        scale = factor[:, None].repeat(1, 3)
        scale[flat, 0] = 1.0

        flips = rng.child("mirror").uniform(0, 1, (3,)) < column([s.mirror.probability for s in chosen])[:, None]
        may = torch.tensor([[axis in s.mirror.axes for axis in AXES] for s in chosen])
        may &= edges > 1

        reach = self.reach(facts)
        shift = torch.floor(rng.child("shift").uniform(0, 1, (3,)) * (2 * reach + 1)) - reach

        bends = rng.child("elastic").uniform(0, 1) < column([s.elastic.probability for s in chosen])
        weak, strong = (column([s.elastic.strength[end] for s in chosen]) for end in (0, 1))
        strength = torch.where(bends, weak + (strong - weak) * rng.child("strength").uniform(0, 1), 0.0)
        parameters = {
            "angle_degrees": angle,
            "scale": scale,
            "mirror": flips & may,
            "shift": shift.long(),
            "elastic_strength": strength,
        }
        if self.has_rot90:
            parameters["quarter_turns"] = self._quarter_turns(facts, rng.child("rot90"))
        if self.has_elastic:
            control = rng.child("control").uniform(-1, 1, (3, *control_shape(edges.tolist(), self._cells)))
            control[:, 0] *= ~flat.reshape(-1, 1, 1, 1)
            parameters["elastic_control"] = control * (strength > 0).reshape(-1, 1, 1, 1, 1)
        return parameters

    def apply(self, batch: Batch, parameters: Parameters) -> Placed:
        """Cut the views out of a batch; the batch is not modified."""
        # Inside, slices and images have one slice along Z, so that there is one way for both.
        flat = batch.dimensions == 2
        source = batch.image.unsqueeze(2) if flat else batch.image
        source_label = None if batch.label is None else batch.label.reshape(len(batch), 1, *source.shape[2:])
        device, patch = source.device, self._patch
        offset = margin_before(source.shape[2:], patch)
        matrix = view_to_crop(parameters, batch.spacing_mm, offset, patch)
        resampled = is_resampled(parameters)
        elastic = self._displacement(parameters, batch)

        box = valid_box(batch.valid, parameters, offset, patch)
        box[resampled] = torch.tensor([[0, edge] for edge in patch])
        inside = box_mask(box, patch, device)
        image = crop(source, parameters, offset, ~resampled, batch.background, patch)
        label = None
        if source_label is not None:
            label = crop(source_label, parameters, offset, ~resampled, torch.zeros(len(batch)), patch)

        rows = resampled.nonzero()[:, 0]
        if len(rows):
            everyone = len(rows) == len(batch)
            index = to_device(rows, device)
            in_voxels = None
            if elastic is not None:
                spacing = to_device(batch.spacing_mm[rows], device).reshape(-1, 3, 1, 1, 1)
                in_voxels = elastic.index_select(0, index) / spacing
            moved = self._resampled(
                source if everyone else source.index_select(0, index), matrix[rows], in_voxels, flat
            )
            moved_label = None
            if source_label is not None:
                moved_label = self._resampled_label(
                    source_label if everyone else source_label.index_select(0, index), matrix[rows], in_voxels, flat
                )
            bent = parameters["elastic_strength"][rows] > 0
            if not bool((wholly_inside(matrix[rows], batch.valid[rows], patch) & ~bent).all()):
                seen = positions_inside(matrix[rows], batch.valid[rows], patch, in_voxels, device)
                # In place: new memory of this size costs more than the work.
                torch.where(seen, moved, broadcast(batch.background[rows], moved), out=moved)
                moved_label = None if moved_label is None else moved_label.mul_(seen)
                inside.index_copy_(0, index, seen)
            image = moved if everyone else image.index_copy_(0, index, moved)
            if label is not None and moved_label is not None:
                label = moved_label if everyone else label.index_copy_(0, index, moved_label)

        to_mm = matrix * batch.spacing_mm.double()[:, :, None]
        to_mm[:, :, 3] += batch.origin_mm.double()
        return Placed(
            image=image.squeeze(2) if flat else image,
            inside=inside.squeeze(2) if flat else inside,
            to_source_mm=to_device(to_mm.float(), device),
            displacement_mm=elastic.squeeze(2) if flat and elastic is not None else elastic,
            label=None if label is None else label.reshape(len(batch), *self.patch_size),
        )

    @property
    def has_elastic(self) -> bool:
        """Whether any modality may be deformed; only then are control points drawn."""
        return any(settings.elastic.probability > 0 for settings in self.by_modality.values())

    @property
    def has_rot90(self) -> bool:
        """Whether any modality may be turned by quarters; only then are they drawn."""
        return any(settings.rot90.probability > 0 for settings in self.by_modality.values())

    def reach(self, facts: Facts) -> Tensor:
        """Return how many voxels each sample may be shifted either way. Shape: (B, 3), float32."""
        edges = torch.tensor(self._patch)
        part = torch.tensor([self.by_modality[modality].shift for modality in facts.modality])
        return torch.floor(part[:, None] * edges * (edges > 1))

    @property
    def _patch(self) -> tuple[int, int, int]:
        z, y, x = (1, *self.patch_size) if len(self.patch_size) == 2 else self.patch_size
        return z, y, x

    @property
    def _cells(self) -> int:
        return max(settings.elastic.cells for settings in self.by_modality.values())

    def _in_plane_only(self, facts: Facts) -> Tensor:
        """Tell which samples turn, zoom and bend within their slices only. Shape: (B,), bool."""
        z, y, x = self._patch
        if max(y, x) / z > ANISOTROPIC:
            return torch.ones(len(facts), dtype=torch.bool)
        return facts.spacing_mm[:, 0] / facts.spacing_mm[:, 1:].amin(dim=1) > ANISOTROPIC

    def _quarter_turns(self, facts: Facts, rng: Draw) -> Tensor:
        chosen = [self.by_modality[modality].rot90 for modality in facts.modality]
        turns = rng.uniform(0, 1) < torch.tensor([settings.probability for settings in chosen])
        may = torch.tensor([[axis in settings.axes for axis in AXES] for settings in chosen])
        for axis, (a, b) in enumerate(PLANES):
            two = facts.spacing_mm[:, [a, b]]
            may[:, axis] &= two.amax(dim=1) <= SAME_SPACING * two.amin(dim=1)
            may[:, axis] &= self._patch[a] == self._patch[b] > 1
        across = torch.where(may, rng.uniform(0, 1, (3,)), -1.0).argmax(dim=1)
        count = rng.integers(1, 4) * turns * may.any(dim=1)
        return torch.zeros(len(facts), 3, dtype=torch.int64).scatter_(1, across[:, None], count[:, None])

    def _displacement(self, parameters: Parameters, batch: Batch) -> Tensor | None:
        if "elastic_control" not in parameters:
            return None
        bound = largest_shift_mm(self._patch, batch.spacing_mm.double(), self._cells)
        # The affine map may shrink distances by the scale: what folds is relative to that.
        bound = bound * parameters["scale"].double().amin(dim=1).clamp(max=1) * parameters["elastic_strength"].double()
        control = parameters["elastic_control"] * bound.float().reshape(-1, 1, 1, 1, 1)
        return displacement_mm(control, self._patch, batch.image.device)

    def _resampled(
        self, image: Tensor, matrix: Tensor, offset: Tensor | None, flat: bool, mode: str = "bilinear"
    ) -> Tensor:
        if not flat:
            return resample(image, matrix, self._patch, offset=offset, mode=mode)
        moved = None if offset is None else offset[:, 1:, 0]
        return resample(image[:, :, 0], matrix[:, 1:, 1:], self._patch[1:], offset=moved, mode=mode)[:, :, None]

    def _resampled_label(self, label: Tensor, matrix: Tensor, offset: Tensor | None, flat: bool) -> Tensor:
        if self.label_mode == "nearest":
            return self._resampled(label, matrix, offset, flat, "nearest")
        best = self._resampled((label == 0).float(), matrix, offset, flat)
        result = torch.zeros_like(best, dtype=label.dtype)
        for value in range(1, self.classes):
            share = self._resampled((label == value).float(), matrix, offset, flat)
            result[share > best] = value
            best = torch.maximum(best, share)
        return result
