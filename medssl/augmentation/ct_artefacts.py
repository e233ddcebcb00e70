"""Artefacts of CT that come from what the rays pass: beam hardening and metal."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import field_validator
from torch import Tensor

from medssl.augmentation.ct import CT, rescale_of, shared, within
from medssl.augmentation.intensity import Range
from medssl.augmentation.transform import Facts, Parameters, Transform, TransformSettings, broadcast
from medssl.data.draw import Draw

# What is denser than half of water is body: tissue, bone and the table, not air, and little of the lung.
BODY_HU = -500.0
# What 12 bits hold with the usual intercept of -1024.
LOWEST_HU, HIGHEST_HU = -1024.0, 3071.0


class BeamHardeningSettings(TransformSettings):
    """Cupping.

    Args:
        amplitude: By how many HU the middle of the body lies below its edge; negative where it lies above.
    """

    amplitude: Range = (-30.0, 30.0)

    _bounded = field_validator("amplitude")(within(-1000, 1000, "HU"))


class BeamHardening(Transform[BeamHardeningSettings]):
    """Cupping: a parabola across the body in the plane of Y and X, amplitude * (r^2 - mean of r^2).

    The beam gets harder on its way, so that the middle of a body looks less dense than its edge; a correction that goes
    too far does the opposite. Body is what is above -500 HU; everything else, such as air, keeps its bits. r is 1 on
    the ellipse that has the body's second moments, and no larger beyond; centre and ellipse are those of what the
    sample shows of the body, all slices together. The mean over the body stays as it was. It is an approximation: true
    cupping follows the path of each ray, and lung within the body takes part.
    """

    name: ClassVar[str] = "beam_hardening"
    settings_class = BeamHardeningSettings
    neutral: ClassVar[tuple[str, float]] = ("amplitude", 0.0)
    family: ClassVar[str] = "ct"
    modalities: ClassVar[frozenset[str] | None] = CT

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `amplitude` (B, C) in stored units; `body` (B, C) is the stored value of -500 HU."""
        intercept, slope = rescale_of(self, facts)
        amplitude = self.uniform(facts, rng, "amplitude").double() / slope[:, 0]
        body = (BODY_HU - intercept[:, 0]) / slope[:, 0]
        return {"amplitude": shared(amplitude, facts), "body": shared(body, facts)}

    def change(self, channels: Tensor, values: Parameters) -> Tensor:
        """Add the parabola to the body."""
        body = (channels > broadcast(values["body"], channels)).to(channels.dtype)
        # How many slices show body at each place of the plane. Counts are whole numbers, exact in any order of adding.
        count = body.sum(dim=1) if channels.ndim == 4 else body
        square = (_square_of_radius(count, 1) + _square_of_radius(count, 2)).clamp_(max=1)
        voxels = count.flatten(1).sum(dim=1).clamp_(min=1)
        mean = (count * square).flatten(1).sum(dim=1) / voxels
        cup = square.sub_(mean[:, None, None]).mul_(broadcast(values["amplitude"], square))
        return channels.addcmul_(body, cup[:, None] if channels.ndim == 4 else cup)


class MetalSettings(TransformSettings):
    """An implant or a filling, and its streaks.

    Args:
        density: HU of the metal.
        radius_mm: Half of its width in a slice.
        length_mm: Its extent along Z.
        streak: By how many HU one streak is at most darker or brighter, next to the metal.
        reach_mm: Distance at which a streak has fallen to 1/e.
        ray_mm: Standard deviation of a streak's profile.
    """

    density: Range = (2000.0, HIGHEST_HU)
    radius_mm: Range = (2.0, 6.0)
    length_mm: Range = (5.0, 20.0)
    streak: Range = (50.0, 400.0)
    reach_mm: Range = (20.0, 60.0)
    ray_mm: Range = (1.0, 3.0)

    _dense = field_validator("density")(within(2000, HIGHEST_HU, "HU"))
    _bounded = field_validator("streak")(within(0, 4000, "HU"))
    _small = field_validator("radius_mm", "length_mm")(within(0, 100, "mm"))
    _positive = field_validator("reach_mm", "ray_mm")(within(0.1, 1000, "mm"))


class Metal(Transform[MetalSettings]):
    """A piece of metal somewhere in the body, with dark and bright streaks through it in the slices that it touches.

    It is an ellipsoid that is round in the plane; its centre lies in a random slice, there in a voxel above -500 HU
    that is chosen evenly among all. A slice without such a voxel stays as it is. Streaks are straight, Gaussian in
    profile, go on in air, fall exponentially with the distance and are as strong as the metal is wide in their slice.
    What they change is kept in what 12 bits hold, -1024 to 3071 HU; values that were beyond stay. Where a store was
    clipped is not known here; a lower limit is what `hu_window` is for. It is a sketch of the artefact, not a
    simulation of projections; the ranges of sizes and streaks are chosen here, no paper gives them.
    """

    name: ClassVar[str] = "metal"
    settings_class = MetalSettings
    neutral: ClassVar[tuple[str, float]] = ("radius", 0.0)
    family: ClassVar[str] = "ct"
    modalities: ClassVar[frozenset[str] | None] = CT
    rays: ClassVar[int] = 8

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw the piece; lengths are in mm, densities in stored units.

        Returns:
            `radius`, `half_length`, `reach`, `ray`, `density`, `body`, `lowest` and `highest` (B, C); the slice and the
            voxel of the body in it, as fractions, `place` (B, C, 2); `angle` in radians and `streak` (B, C, rays);
            `spacing` (B, C, 3).
        """
        intercept, slope = rescale_of(self, facts)
        density = self.uniform(facts, rng, "density").double()
        hounsfield = torch.stack([density, *(torch.full_like(density, hu) for hu in (BODY_HU, LOWEST_HU, HIGHEST_HU))])
        stored = (hounsfield - intercept[:, 0]) / slope[:, 0]
        strength = self.uniform(facts, rng, "streak").double() / slope[:, 0]
        drawn = {
            "radius": self.uniform(facts, rng, "radius_mm"),
            "half_length": self.uniform(facts, rng, "length_mm") / 2,
            "reach": self.uniform(facts, rng, "reach_mm"),
            "ray": self.uniform(facts, rng, "ray_mm"),
            **dict(zip(("density", "body", "lowest", "highest"), stored, strict=True)),
            "place": rng.uniform(0, 1, (2,)),
            "angle": rng.uniform(0, math.pi, (self.rays,)),
            "streak": strength[:, None] * rng.uniform(-1, 1, (self.rays,)),
            "spacing": facts.spacing_mm,
        }
        return {name: shared(value, facts) for name, value in drawn.items()}

    def change(self, channels: Tensor, values: Parameters) -> Tensor:
        """Put one piece into each channel."""
        for row, channel in enumerate(channels):
            put_metal(channel if channel.ndim == 3 else channel[None], {name: of[row] for name, of in values.items()})
        return channels


def put_metal(volume: Tensor, drawn: Parameters) -> None:
    """Put one piece of metal into a volume, in place.

    Args:
        volume: Shape: (Z, Y, X).
        drawn: One row of what `Metal.values` draws, on the CPU.
    """
    depth, rows, columns = volume.shape
    one = {name: value.item() for name, value in drawn.items() if value.ndim == 0}
    spacing_z, spacing_y, spacing_x = drawn["spacing"].tolist()
    slice_fraction, voxel_fraction = drawn["place"].tolist()
    middle = min(int(slice_fraction * depth), depth - 1)
    index, found = _voxel_of_body(volume[middle] > one["body"], voxel_fraction)

    touched = int(one["half_length"] / spacing_z)
    first, last = max(0, middle - touched), min(depth - 1, middle + touched)
    slab = volume[first : last + 1]
    distance_z = (torch.arange(first, last + 1) - middle) * spacing_z / max(one["half_length"], spacing_z)
    # How wide the ellipsoid is in each slice, relative to its middle.
    width = broadcast((1 - distance_z.double() ** 2).clamp(min=0).sqrt(), slab)

    y = (torch.arange(rows, device=slab.device, dtype=slab.dtype) - index // columns)[:, None] * spacing_y
    x = (torch.arange(columns, device=slab.device, dtype=slab.dtype) - index % columns) * spacing_x
    distance = torch.sqrt(y.square() + x.square())
    streaks = torch.zeros_like(distance)
    for angle, strength in zip(drawn["angle"].tolist(), drawn["streak"].tolist(), strict=True):
        beside = (y * math.cos(angle) - x * math.sin(angle)) / one["ray"]
        streaks += strength * torch.exp(-0.5 * beside.square())
    streaks *= torch.exp(-distance / one["reach"]) * found
    # A voxel that the surface cuts is partly metal.
    solid = (0.5 + (one["radius"] * width - distance) / math.sqrt(spacing_y * spacing_x)).clamp_(0, 1) * found

    streaked = slab + width * streaks
    streaked = streaked.maximum(slab.clamp(max=one["lowest"])).minimum(slab.clamp(min=one["highest"]))
    slab.copy_(streaked + solid * (one["density"] - streaked))


def _square_of_radius(count: Tensor, axis: int) -> Tensor:
    """Return the part of r^2 that one axis of the plane gives: a uniform ellipse has it at 1 on its edge.

    Args:
        count: Whole numbers of body voxels. Shape: (N, Y, X).
        axis: 1 or 2.
    """
    along = count.sum(dim=3 - axis).double()
    position = torch.arange(along.shape[1], device=count.device, dtype=torch.float64)
    # Sums of whole numbers below 2^53: exact, and so the same alone and in a batch.
    total = along.sum(dim=1, keepdim=True).clamp_(min=1)
    mean = (along * position).sum(dim=1, keepdim=True) / total
    variance = (along * position.square()).sum(dim=1, keepdim=True) / total - mean.square()
    # The variance of a uniform ellipse is a quarter of its squared half-axis. A body one voxel wide has none.
    square = (position - mean).square() / (4 * variance).clamp_(min=0.25)
    return square.to(count.dtype).unsqueeze(3 - axis)


def _voxel_of_body(body: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Return the flat index of the voxel at a fraction of all True ones, and whether there is any, without a wait."""
    counted = body.flatten().cumsum(dim=0)
    total = counted[-1]
    rank = (total * fraction).long()
    index = torch.searchsorted(counted, rank[None], right=True)[0].clamp(max=counted.numel() - 1)
    return index, total > 0
