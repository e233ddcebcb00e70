"""Rotation, scaling, elastic deformation, mirroring, quarter turns, shift and cropping to the patch in one resampling.

A sample that drew neither rotation, scaling nor deformation is cropped, mirrored and turned by quarters bit for bit.
Rotation happens in mm: with anisotropic voxels a turn in voxel space would shear the anatomy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from medssl.augmentation.elastic import control_shape, displacement_mm, largest_shift_mm
from medssl.augmentation.geometry import (
    PLANES,
    box_mask,
    crop,
    is_resampled,
    one_by_one,
    place,
    positions_inside,
    select,
    valid_box,
    view_to_crop,
    wholly_inside,
)
from medssl.augmentation.mirror import AXES
from medssl.augmentation.resampling import resample
from medssl.augmentation.spatial_settings import SpatialSettings
from medssl.augmentation.transform import (
    MOST_COLUMNS,
    Facts,
    Parameters,
    broadcast,
    to_device,
)
from medssl.data.batch import Batch
from medssl.data.draw import Draw
from medssl.data.sampling import margin_before

# nnU-Net's threshold: beyond it a turn out of the plane would show neighbouring slices through a handful of samples.
ANISOTROPIC = 3.0
# Largest ratio of two voxel sizes that a quarter turn may exchange.
SAME_SPACING = 1.01


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
        self._kept: dict[tuple[str, ...], dict[str, Tensor]] = {}

    def draw(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw the spatial parameters of each sample.

        Returns:
            `angle_degrees` (B, 3) about (z, y, x), `scale` (B, 3), `mirror` (B, 3) bool, `shift` (B, 3) in voxels,
            `elastic_strength` (B,); where any modality may have them, `elastic_control` (B, 3, ...) in [-1, 1] and
            `quarter_turns` (B, 3) in the planes across (z, y, x).
        """
        edges = torch.tensor(self._patch)
        flat = self._in_plane_only(facts)
        known = self._columns(facts.modality)
        # One call for all: each costs more than the numbers it makes.
        turning, angles, zooming, zoom, flipping, shifting, bending, bend = rng.uniform(0, 1, (14,)).split(
            [1, 3, 1, 1, 3, 3, 1, 1], dim=1
        )
        largest = torch.where(flat[:, None], known["in_plane_degrees"], known["degrees"])
        largest = largest * torch.where(flat[:, None], torch.tensor([1.0, 0, 0]), 1.0)
        angle = largest * (turning < known["rotation"]) * (2 * angles - 1)

        scale = torch.where(zooming < known["scale"], torch.lerp(known["smallest"], known["largest"], zoom), 1.0)
        scale = scale.repeat(1, 3)
        scale[flat, 0] = 1.0

        reach = self.reach(facts)
        shift = torch.floor(shifting * (2 * reach + 1)) - reach
        strength = torch.where(bending < known["elastic"], torch.lerp(known["weak"], known["strong"], bend), 0.0)[:, 0]
        parameters = {
            "angle_degrees": angle,
            "scale": scale,
            "mirror": (flipping < known["mirror"]) & (edges > 1),
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
        source, source_label = _as_volumes(batch)
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

        moving = resampled.nonzero()[:, 0].tolist()
        for rows in [[row] for row in moving] if one_by_one(source) else [moving] if moving else []:
            self._resample(rows, batch, parameters, matrix, Placed(image, inside, matrix, elastic, label))

        to_mm = matrix * batch.spacing_mm.double()[:, :, None]
        to_mm[:, :, 3] += batch.origin_mm.double()
        return Placed(
            image=image.squeeze(2) if flat else image,
            inside=inside.squeeze(2) if flat else inside,
            to_source_mm=to_device(to_mm.float(), device),
            displacement_mm=elastic.squeeze(2) if flat and elastic is not None else elastic,
            label=None if label is None else label.reshape(len(batch), *self.patch_size),
        )

    def _resample(self, rows: list[int], batch: Batch, parameters: Parameters, matrix: Tensor, into: Placed) -> None:
        """Fill some rows of `into` by interpolation."""
        flat, patch = batch.dimensions == 2, self._patch
        source, source_label = _as_volumes(batch)
        maps, valid, in_voxels, label = matrix[rows], batch.valid[rows], None, None
        if into.displacement_mm is not None:
            spacing = to_device(batch.spacing_mm[rows], source.device).reshape(-1, 3, 1, 1, 1)
            in_voxels = select(into.displacement_mm, rows) / spacing
        image = self._resampled(select(source, rows), maps, in_voxels, flat)
        if source_label is not None:
            label = self._resampled_label(select(source_label, rows), maps, in_voxels, flat)
        bent = parameters["elastic_strength"][rows] > 0
        if not bool((wholly_inside(maps, valid, patch) & ~bent).all()):
            seen = positions_inside(maps, valid, patch, in_voxels, source.device)
            # In place: new memory of this size costs more than the work.
            torch.where(seen, image, broadcast(batch.background[rows], image), out=image)
            label = None if label is None else label.mul_(seen)
            place(into.inside, rows, seen)
        place(into.image, rows, image)
        if into.label is not None and label is not None:
            place(into.label, rows, label)

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
        # In double precision, as the size to read: 0.29 of 100 voxels is 28 there and would be 29 in single.
        part = torch.tensor([self.by_modality[modality].shift for modality in facts.modality], dtype=torch.float64)
        return torch.floor(part[:, None] * edges * (edges > 1)).float()

    def _columns(self, modality: tuple[str, ...]) -> dict[str, Tensor]:
        """Return the settings of each sample as columns; kept, as batches of one make-up follow each other.

        Shapes: (B, 1), and (B, 3) for `mirror`, whose probability is 0 along axes that may not be mirrored.
        """
        if modality not in self._kept:
            if len(self._kept) > MOST_COLUMNS:
                self._kept.clear()
            chosen = [self.by_modality[name] for name in modality]
            rows = {
                "rotation": [[s.rotation.probability] for s in chosen],
                "degrees": [[s.rotation.degrees] for s in chosen],
                "in_plane_degrees": [[s.rotation.in_plane_degrees] for s in chosen],
                "scale": [[s.scale.probability] for s in chosen],
                "smallest": [[s.scale.range[0]] for s in chosen],
                "largest": [[s.scale.range[1]] for s in chosen],
                "mirror": [[s.mirror.probability * (axis in s.mirror.axes) for axis in AXES] for s in chosen],
                "elastic": [[s.elastic.probability] for s in chosen],
                "weak": [[s.elastic.strength[0]] for s in chosen],
                "strong": [[s.elastic.strength[1]] for s in chosen],
            }
            self._kept[modality] = {name: torch.tensor(values, dtype=torch.float32) for name, values in rows.items()}
        return self._kept[modality]

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


def _as_volumes(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Return image (B, C, Z, Y, X) and label (B, 1, Z, Y, X) with one slice in 2D."""
    image = batch.image.unsqueeze(2) if batch.dimensions == 2 else batch.image
    return image, None if batch.label is None else batch.label.reshape(len(batch), 1, *image.shape[2:])
