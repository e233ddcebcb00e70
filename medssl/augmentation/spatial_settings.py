"""What a policy can say about everything that moves anatomy."""

from __future__ import annotations

from pydantic import Field, field_validator

from medssl.augmentation.mirror import AXES, Axis
from medssl.augmentation.transform import TransformSettings, ranges_are_ordered
from medssl.config import Settings


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
