"""Ultrasound: speckle, depth gain, acoustic shadow and display settings; what lies outside the fan keeps every bit.

Grey values are seen as an amplitude above black. Black is the channel's smallest value or the sample's background,
whichever is less: the background may be a placeholder, as the 0 of nnU-Net's folders is. A voxel that exceeds black by
less than `DARK` of the channel's range is taken for outside of the fan.

Depth runs along y. A picture keeps its rows, so the first row is its top, next to the probe; in a volume that was
turned to the patient's axes y runs to anterior, and `probe` says which end the probe was at. All channels of a sample
(colours, or the frames of a moving picture) are changed alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from medssl.augmentation.intensity import filtered_inside
from medssl.augmentation.transform import (
    Facts,
    Parameters,
    SettingsT,
    Transform,
    TransformSettings,
    broadcast,
    ranges_are_ordered,
)
from medssl.data.draw import Draw

Std = Annotated[float, Field(ge=0, le=0.52)]
Voxels = Annotated[float, Field(ge=0, le=8)]
Exponent = Annotated[float, Field(ge=-5, le=5)]
Count = Annotated[int, Field(ge=1, le=2)]
Factor = Annotated[float, Field(ge=0, le=1)]
Width = Annotated[float, Field(gt=0, le=1)]
Spread = Annotated[float, Field(ge=0, le=10)]
Decibel = Annotated[float, Field(gt=-20, le=40)]
# Part of a channel's range: 2.5 of 255 grey values, so that what JPEG leaves in a black border counts as border.
DARK = 0.01
# Mean and standard deviation of the length of two independent standard normal numbers (Rayleigh, 1880).
RAYLEIGH_MEAN = math.sqrt(math.pi / 2)
RAYLEIGH_STD = math.sqrt(2 - math.pi / 2)


class Ultrasound(Transform[SettingsT]):
    """Base: one draw for all channels, changes inside the fan only."""

    family: ClassVar[str] = "ultrasound"
    modalities: ClassVar[frozenset[str] | None] = frozenset({"US"})

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw per sample, give each channel the same, and add `background` (B, C), infinity where it is not known."""
        drawn = self.of_sample(facts, rng)
        unknown = torch.full((len(facts),), math.inf)
        background = unknown if facts.background is None else facts.background.float()
        drawn["background"] = torch.where(background.isfinite(), background, unknown)
        return {
            name: value.repeat_interleave(facts.channels, 0).unflatten(0, (len(facts), -1))
            for name, value in drawn.items()
        }

    def of_sample(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw the parameters that all channels share. Shapes: (B, ...)."""
        raise NotImplementedError


class SpeckleSettings(TransformSettings):
    """Speckle.

    Args:
        std: Standard deviation of the factor, whose mean is 1; up to 0.52, that of fully developed speckle.
        grain: Standard deviation of the Gaussian point spread in voxels, drawn for each axis.
    """

    std: tuple[Std, Std] = (0.1, 0.3)
    grain: tuple[Voxels, Voxels] = (0.5, 1.5)

    _ordered = field_validator("std", "grain")(ranges_are_ordered)


class Speckle(Ultrasound[SpeckleSettings]):
    """Multiply by a Rayleigh field: the amplitude of many echoes of random phase within one point spread.

    The model of fully developed speckle (Goodman, J. Opt. Soc. Am. 66, 1976). Its deviation of 0.52 is reduced to
    `std`, as compounding does, by shrinking the field towards its mean instead of averaging several fields.
    """

    name: ClassVar[str] = "speckle"
    settings_class = SpeckleSettings
    neutral: ClassVar[tuple[str, float]] = ("std", 0.0)

    def of_sample(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `std` (B,), `grain` (B, D), and the `seed` (B,) that the field itself comes from."""
        return {
            "std": self.uniform(facts, rng, "std"),
            "grain": self.uniform(facts, rng, "grain", (len(facts.size),)),
            "seed": rng.integers(0, 2**62),
        }

    def change(self, channels: Tensor, values: Parameters) -> Tensor:
        """Multiply; the field is made on the image's device and differs between CPU and CUDA."""
        field, made_from = channels[0], None
        for row, seed in enumerate(values["seed"].tolist()):
            if seed != made_from:
                field = speckle_field(channels[row], values["grain"][row].tolist(), seed)
                field.mul_(float(values["std"][row]))
                made_from = seed
            one = channels[row : row + 1]
            one.copy_(_multiplied(one, field[None], values["background"][row : row + 1]))
        return channels


class DepthAttenuationSettings(TransformSettings):
    """A wrong time gain compensation.

    Args:
        mu: Attenuation from the first to the last row, as exponent; below zero it is compensated too much.
        probe: End of the y axis at the probe; `first` is the top of a picture.
    """

    mu: tuple[Exponent, Exponent] = (-0.5, 0.5)
    probe: Literal["first", "last"] = "first"

    _ordered = field_validator("mu")(ranges_are_ordered)


class DepthAttenuation(Ultrasound[DepthAttenuationSettings]):
    """Multiply by exp(-mu * depth), with depth from 0 at the probe to 1 at the other end of the patch."""

    name: ClassVar[str] = "depth_attenuation"
    settings_class = DepthAttenuationSettings
    neutral: ClassVar[tuple[str, float]] = ("mu", 0.0)

    def of_sample(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `mu` (B,); `from_last` (B,) tells where the probe is."""
        return {"mu": self.uniform(facts, rng, "mu"), "from_last": _from_last(self, facts)}

    def change(self, channels: Tensor, values: Parameters) -> Tensor:
        """Multiply."""
        depth = _depth(channels.shape[-2], values["from_last"])
        gain = torch.expm1(-values["mu"].double()[:, None] * depth).float()
        return _multiplied(channels, _along_y(gain, channels), values["background"])


class ShadowSettings(TransformSettings):
    """Acoustic shadows.

    Args:
        count: How many, 1 or 2.
        factor: What is left of the amplitude in a shadow.
        width: Width at the largest depth, relative to the image's width.
        softness: Part of the half width over which an edge fades.
        spread: How much wider the fan is at the largest depth than at the probe, relative to its width there; 0 gives
            the parallel stripes of a linear probe.
        probe: End of the y axis at the probe; `first` is the top of a picture.
    """

    count: tuple[Count, Count] = (1, 2)
    factor: tuple[Factor, Factor] = (0.1, 0.5)
    width: tuple[Width, Width] = (0.1, 0.3)
    softness: float = Field(default=0.5, gt=0, le=1)
    spread: tuple[Spread, Spread] = (0.0, 1.5)
    probe: Literal["first", "last"] = "first"

    _ordered = field_validator("count", "factor", "width", "spread")(ranges_are_ordered)


class Shadow(Ultrasound[ShadowSettings]):
    """Darken one or two bundles of beams from the probe down, with soft edges.

    The beams run apart evenly from the image's middle line: x(depth) is proportional to 1 + spread * depth. A shadow is
    drawn by the place `end` that it reaches at the largest depth, so that it does not leave the image on the way. In 3D
    it is the same in all slices, as that of a rib is.
    """

    name: ClassVar[str] = "shadow"
    settings_class = ShadowSettings
    neutral: ClassVar[tuple[str, float]] = ("factor", 1.0)

    def of_sample(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `factor`, `end` and `width` (B, 2) of two shadows; the second has factor 1 where there is one."""
        low = self.per_sample(facts, lambda settings: settings.count[0], missing=1.0)
        high = self.per_sample(facts, lambda settings: settings.count[1], missing=1.0)
        count = torch.floor(low + (high + 1 - low) * rng.uniform(0, 1))
        exists = torch.arange(2)[None] < count[:, None]
        return {
            "factor": torch.where(exists, self.uniform(facts, rng, "factor", (2,)), 1.0),
            "end": rng.uniform(-0.5, 0.5, (2,)),
            "width": self.uniform(facts, rng, "width", (2,)),
            "spread": self.uniform(facts, rng, "spread"),
            "softness": self.per_sample(facts, lambda settings: settings.softness, missing=1.0),
            "from_last": _from_last(self, facts),
        }

    def change(self, channels: Tensor, values: Parameters) -> Tensor:
        """Darken."""
        plane = channels if channels.ndim == 3 else channels[:, 0]
        rows, columns = plane.shape[1:]
        x = (torch.arange(columns, dtype=torch.float64) + 0.5) / columns - 0.5
        spread = values["spread"].double()[:, None]
        # Where the beam through each voxel meets the largest depth.
        run_on = (1 + spread) / (1 + spread * _depth(rows, values["from_last"]))
        beam = broadcast(x[None, None], plane) * broadcast(run_on, plane)
        softness = broadcast(values["softness"], plane)
        left = torch.ones_like(beam)
        for number in range(2):
            end = broadcast(values["end"][:, number], plane)
            half_width = broadcast(values["width"][:, number] / 2, plane)
            lost = broadcast(1 - values["factor"][:, number], plane)
            ramp = (1 - (beam - end).abs_().div_(half_width)).div_(softness).clamp_(0, 1)
            # A ramp without corners: its slope is zero at both ends.
            left.mul_(1 - lost * ramp.square() * (3 - 2 * ramp))
        gain = left.sub_(1)
        return _multiplied(channels, gain if channels.ndim == 3 else gain[:, None], values["background"])


class GainCompressionSettings(TransformSettings):
    """Gain and dynamic range of the display.

    Args:
        gain_db: Change of the gain.
        range_db: Change of the dynamic range; a smaller one hardens the picture.
        displayed_db: Dynamic range that the picture is taken to have been made with.
    """

    gain_db: tuple[Decibel, Decibel] = (-6.0, 6.0)
    range_db: tuple[Decibel, Decibel] = (-15.0, 15.0)
    displayed_db: float = Field(default=60.0, ge=20, le=120)

    _ordered = field_validator("gain_db", "range_db")(ranges_are_ordered)


class GainCompression(Ultrasound[GainCompressionSettings]):
    """Take the logarithmic compression back, change gain and dynamic range, and compress again.

    An amplitude E in [0, 1] is shown as u = log(1 + (e^s - 1) E) / s, with u = 0 at black, 1 at the channel's largest
    value, and a dynamic range of e^s. The 1 in the logarithm keeps black black; what exceeds the largest value
    saturates. The order of grey values is kept.
    """

    name: ClassVar[str] = "gain_compression"
    settings_class = GainCompressionSettings
    neutral: ClassVar[tuple[str, float]] = ("change_db", 0.0)

    def of_sample(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `change_db` (B, 2) of gain and dynamic range; `displayed_db` (B,) is the range before."""
        changes = [self.uniform(facts, rng, name) for name in ("gain_db", "range_db")]
        return {
            "change_db": torch.stack(changes, dim=1),
            "displayed_db": self.per_sample(facts, lambda settings: settings.displayed_db, missing=60.0),
        }

    def change(self, channels: Tensor, values: Parameters) -> Tensor:
        """Bring to [0, 1], to amplitudes, back, and to the former range."""
        before = values["displayed_db"].double() * math.log(10) / 20
        change = values["change_db"].double() * math.log(10) / 20
        after = before + change[:, 1]
        factor = torch.exp(change[:, 0]) * torch.expm1(after) / torch.expm1(before)
        black, high = _black_and_high(channels, values["background"])
        unit = (channels - black).div_((high - black).clamp_(min=1e-7))
        curve = unit.mul_(broadcast(before, channels)).expm1_().mul_(broadcast(factor, channels)).log1p_()
        curve = curve.mul_(broadcast(1 / after, channels)).mul_(high - black).add_(black)
        return torch.where(_inside(channels, black, high), torch.minimum(curve, high), channels)


def speckle_field(like: Tensor, grain: Sequence[float], seed: int) -> Tensor:
    """Return a Rayleigh field brought to mean 0 and standard deviation 1, the same everywhere up to the border.

    Args:
        like: Gives shape, dtype and device. Shape: (*spatial).
        grain: Standard deviation of the point spread along each axis, in voxels; has no effect on an axis of one voxel.
        seed: Of the echoes.
    """
    kernels = [_half_kernel(sigma if edge > 1 else 0.0) for edge, sigma in zip(like.shape, grain, strict=True)]
    # Drawn as much larger as the kernels are wide: a mirrored border would double the variance there.
    size = [edge + 2 * (len(kernel) - 1) for edge, kernel in zip(like.shape, kernels, strict=True)]
    generator = torch.Generator(device=like.device).manual_seed(seed)
    echoes = torch.empty((2, *size), dtype=like.dtype, device=like.device).normal_(generator=generator)
    for axis, kernel in enumerate(kernels, start=1):
        echoes = filtered_inside(echoes, axis, kernel)
    return torch.hypot(echoes[0], echoes[1]).sub_(RAYLEIGH_MEAN).div_(RAYLEIGH_STD)


def _half_kernel(sigma: float) -> list[float]:
    """Return one half of a Gaussian, centre first, scaled so that it keeps the variance of white noise."""
    half = [math.exp(-0.5 * (step / max(sigma, 1e-6)) ** 2) for step in range(math.ceil(3 * sigma) + 1)]
    length = math.sqrt(half[0] ** 2 + 2 * sum(weight**2 for weight in half[1:]))
    return [weight / length for weight in half]


def _multiplied(channels: Tensor, gain: Tensor, background: Tensor) -> Tensor:
    """Multiply what exceeds black by 1 + gain, inside the fan."""
    black, high = _black_and_high(channels, background)
    changed = torch.addcmul(channels, channels - black, gain)
    return torch.where(_inside(channels, black, high), changed, channels)


def _inside(channels: Tensor, black: Tensor, high: Tensor) -> Tensor:
    return channels > black + DARK * (high - black)


def _black_and_high(channels: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    flat = channels.flatten(1)
    each = (-1, *([1] * (channels.ndim - 1)))
    low, high = flat.amin(dim=1).reshape(each), flat.amax(dim=1).reshape(each)
    return torch.minimum(low, broadcast(background, channels)), high


def _from_last(transform: Transform[SettingsT], facts: Facts) -> Tensor:
    return transform.per_sample(facts, lambda settings: settings.probe == "last")


def _depth(rows: int, from_last: Tensor) -> Tensor:
    """Return the distance from the probe relative to the image's height. Shape: (N, rows), float64."""
    depth = torch.arange(rows, dtype=torch.float64) / max(rows - 1, 1)
    return torch.where(from_last[:, None] > 0, depth.flip(0), depth)


def _along_y(values: Tensor, channels: Tensor) -> Tensor:
    """Bring (N, Y) to the image's device and axes."""
    return broadcast(values, channels.flatten(1)).reshape(len(channels), *([1] * (channels.ndim - 3)), -1, 1)
