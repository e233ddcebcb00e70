"""Random rising curves of the intensity: a Bezier curve (Models Genesis) and displaced histogram points (MONAI).

Both act on each channel brought to its own [0, 1] and bring it back. On an image that is normalised to mean 0 the same
curve would cut off all that lies below 0 and above 1, most of the image.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from medssl.augmentation.intensity import PerChannel
from medssl.augmentation.transform import Facts, Parameters, Transform, ranges_are_ordered, to_device
from medssl.data.draw import Draw

# In HU and SUV a number means a tissue or a dose: a curve drawn for each image takes the meaning away.
NEVER = frozenset({"CT", "PT", "NM"})
KNOTS = 1024


class BezierSettings(PerChannel):
    """A Bezier curve.

    Args:
        strength: 1 draws control points anywhere; 0 leaves them on the diagonal, where the curve is the identity.
    """

    strength: float = Field(default=1.0, ge=0, le=1)


class Bezier(Transform[BezierSettings]):
    """Cubic Bezier curve from (0, 0) to (1, 1) with two random control points in the unit square.

    Zhou et al., Models Genesis, MICCAI 2019. Any such curve rises: a cubic with end points 0 and 1 and both control
    values in between never turns back. The original's falling curves are not offered: they exchange dark and
    bright, which no scanner does.
    """

    name: ClassVar[str] = "bezier"
    settings_class = BezierSettings
    never: ClassVar[frozenset[str]] = NEVER
    neutral: ClassVar[tuple[str, float]] = ("strength", 0.0)

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `points` (B, C, 2, 2): two control points, (from, to); `strength` (B, C) moves them off the diagonal."""
        strength = self.per_sample(facts, lambda settings: settings.strength)[:, None].repeat(1, facts.channels)
        return {"strength": strength, "points": rng.uniform(0, 1, (facts.channels, 2, 2))}

    def change(self, channels: Tensor, values: Parameters) -> Tensor:
        """Look each voxel up in a table of the curve."""
        diagonal = torch.tensor([[1 / 3, 1 / 3], [2 / 3, 2 / 3]], dtype=torch.float64)
        points = diagonal + values["strength"].double()[:, None, None] * (values["points"].double() - diagonal)
        return _curved(channels, list(bezier_table(points, KNOTS)))


class HistogramShiftSettings(PerChannel):
    """Displaced points of the histogram.

    Args:
        points: Number of control points with both ends, drawn for each sample; fewer points allow larger shifts.
        strength: 1 lets a point move up to its neighbours; 0 leaves all where they are.
    """

    points: tuple[int, int] = (10, 10)
    strength: float = Field(default=1.0, ge=0, le=1)

    _ordered = field_validator("points")(ranges_are_ordered)

    @field_validator("points")
    @classmethod
    def _enough(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] < 3 or value[1] > 64:
            raise ValueError(f"points counts both fixed ends, in [3, 64]; got {value}")
        return value


class HistogramShift(Transform[HistogramShiftSettings]):
    """Rising piecewise linear curve through control points at even distances, each displaced between its neighbours.

    As MONAI's RandHistogramShift defines it: from dark to bright, a point is drawn between the new place of the one
    before and the old place of the one behind. The strength is ours.
    """

    name: ClassVar[str] = "histogram_shift"
    settings_class = HistogramShiftSettings
    never: ClassVar[frozenset[str]] = NEVER
    neutral: ClassVar[tuple[str, float]] = ("strength", 0.0)

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `count` (B, C) points and their places `to` (B, C, P), of which the first `count` are used."""
        channels = facts.channels
        most = max((settings.points[1] for settings in self.by_modality.values()), default=3)
        low = self.per_sample(facts, lambda settings: settings.points[0], missing=3)
        high = self.per_sample(facts, lambda settings: settings.points[1], missing=3)
        count = torch.floor(low + (high - low + 1) * rng.uniform(0, 1)).long()[:, None].repeat(1, channels)
        strength = self.per_sample(facts, lambda settings: settings.strength)[:, None].repeat(1, channels)
        u = rng.uniform(0, 1, (channels, most)).double()
        # Points past the last one stay at 1.
        start = (torch.arange(most) / (count[:, :, None].double() - 1)).clamp_(max=1)
        to = start.clone()
        for point in range(1, most - 1):
            before, behind = to[:, :, point - 1], start[:, :, point + 1]
            moved = before + (behind - before) * u[:, :, point]
            to[:, :, point] = torch.where(point < count - 1, moved, to[:, :, point])
        return {"strength": strength, "count": count, "to": start + strength[:, :, None] * (to - start)}

    def change(self, channels: Tensor, values: Parameters) -> Tensor:
        """Look each voxel up."""
        return _curved(channels, [to[:count] for to, count in zip(values["to"], values["count"].tolist(), strict=True)])


def bezier_table(points: Tensor, knots: int) -> Tensor:
    """Return the heights of cubic Bezier curves from (0, 0) to (1, 1) at even distances.

    Args:
        points: Control points (x, y) in the unit square. Shape: (N, 2, 2), float64, on the CPU.
        knots: How many heights, from x = 0 to x = 1.

    Returns:
        Never falling, the first 0, the last 1. Shape: (N, knots), float64.
    """
    t = torch.linspace(0, 1, 4 * knots, dtype=torch.float64)
    first, second = points[:, 0, :, None], points[:, 1, :, None]
    # No matrix product: how that rounds depends on the number of curves.
    x, y = (3 * (1 - t) ** 2 * t * first + 3 * (1 - t) * t**2 * second + t**3).unbind(1)
    wanted = torch.linspace(0, 1, knots, dtype=torch.float64).expand(len(points), -1).contiguous()
    behind = torch.searchsorted(x.contiguous(), wanted).clamp_(1, len(t) - 1)
    x0, x1 = x.gather(1, behind - 1), x.gather(1, behind)
    y0, y1 = y.gather(1, behind - 1), y.gather(1, behind)
    table = y0 + (y1 - y0) * ((wanted - x0) / (x1 - x0).clamp_(min=1e-12)).clamp_(0, 1)
    table[:, 0], table[:, -1] = 0, 1
    return table


def _curved(channels: Tensor, tables: list[Tensor]) -> Tensor:
    """Send each channel through its own table between its smallest and its largest value."""
    flat = channels.flatten(1)
    low, high = flat.amin(dim=1, keepdim=True), flat.amax(dim=1, keepdim=True)
    spread = high - low
    unit = flat.sub_(low).div_(spread.clamp(min=torch.finfo(flat.dtype).tiny))
    for row, table in zip(unit, tables, strict=True):
        row.copy_(looked_up(row, table))
    # The curve stays within; only the rounding on the way back may step over an end.
    return torch.minimum(unit.mul_(spread).add_(low), high).view_as(channels)


def looked_up(unit: Tensor, table: Tensor) -> Tensor:
    """Return the piecewise linear curve through knots at even distances.

    Args:
        unit: In [0, 1]; overwritten. Shape: (V,).
        table: Heights at 0, 1 / (K - 1), ..., 1. Shape: (K,), on the CPU.
    """
    heights = to_device(torch.cat([table, table[-1:]]), unit.device, unit.dtype)
    position = unit.mul_(len(table) - 1)
    # A voxel that is not finite has no knot; an index outside would stop a GPU for good.
    knot = position.to(torch.int32).clamp_(0, len(table) - 1)
    part = position.sub_(knot)
    start = heights.index_select(0, knot)
    return start.addcmul_(part, heights.diff().index_select(0, knot))
