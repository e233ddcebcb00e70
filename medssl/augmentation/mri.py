"""What all transforms of magnetic resonance share, the bias field of the coils, and the noise of a magnitude image.

Both act on the signal, which is zero in air and never negative, while normalised images are centred on the tissue. So
the signal is measured from the value of air: the background that the volume's normalisation recorded, or the smallest
value of the channel where that is less or where no background is known. The second covers folders whose background is
only what they pad with, such as nnU-Net's 0, and the channels after the first, whose own background is not recorded.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from medssl.augmentation.intensity import PerChannel
from medssl.augmentation.spatial import ANISOTROPIC
from medssl.augmentation.transform import (
    Facts,
    Parameters,
    SettingsT,
    Transform,
    TransformSettings,
    ranges_are_ordered,
    to_device,
)
from medssl.data.draw import Draw

Fraction = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=2)]


class MagneticResonance(Transform[SettingsT]):
    """Base of the transforms that imitate the physics of MR.

    Channels are changed one by one: each is a scan of its own with its own parameters, and the result does not depend
    on how many travel together. Half precision is computed in float32, as it would be noise in a spectrum.
    """

    family: ClassVar[str] = "mri"
    modalities: ClassVar[frozenset[str] | None] = frozenset({"MR"})

    def change(self, channels: Tensor, values: Parameters) -> Tensor:
        """Change one channel after the other."""
        for number, channel in enumerate(channels):
            own = {name: value[number] for name, value in values.items()}
            result = self.change_one(channel.to(torch.promote_types(channel.dtype, torch.float32)), own)
            if result is not channel:
                channel.copy_(result)
        return channels

    def change_one(self, channel: Tensor, values: Parameters) -> Tensor:
        """Return the changed channel; the given one may be overwritten.

        Args:
            channel: float32 or float64. Shape: (Z, Y, X) or (Y, X).
            values: What was drawn for it, on the CPU.
        """
        raise NotImplementedError

    def whole(self, facts: Facts, rng: Draw, name: str) -> Tensor:
        """Draw a whole number from the range, both ends included, that the settings call `name`. Shape: (B, C)."""
        low, high = self._range(facts, name, (facts.channels,))
        return (low + torch.floor((high - low + 1) * rng.uniform(0, 1, (facts.channels,)))).minimum(high).long()

    def largest(self, name: str) -> int:
        """Return the upper end of a range over all modalities, which sizes the parameters whatever is in the batch."""
        return max((getattr(settings, name)[1] for settings in self.by_modality.values()), default=1)


class BiasFieldSettings(PerChannel):
    """Uneven sensitivity of the receiving coils.

    Args:
        strength: Range of the largest coefficient of the logarithm of the field. The standard deviation of a field of
            order 3 in a cube is about as large. TorchIO's 0.5 makes a corner of half of all cubes five times as bright.
        order: Order of the polynomial.
    """

    strength: tuple[Strength, Strength] = (0.0, 0.3)
    order: int = Field(default=3, ge=1, le=6)

    _ordered = field_validator("strength")(ranges_are_ordered)


class BiasField(MagneticResonance[BiasFieldSettings]):
    """Smooth field that multiplies the signal: the exponential of a polynomial (Van Leemput et al., 1999).

    Order and coefficients are those of TorchIO. Three things differ. The mean of the field is one, so that it
    redistributes brightness and adds none. Coordinates run from -1 to 1 along the longest edge of the view in mm and
    proportionally less along the others: a coil is as smooth across thick slices as within them. The signal is measured
    from air, so that air stays air; whatever equals the background, such as padding, keeps every bit.
    """

    name: ClassVar[str] = "bias_field"
    settings_class = BiasFieldSettings
    neutral: ClassVar[tuple[str, float]] = ("strength", 0.0)

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `strength` (B, C) and `coefficients` (B, C, order + 1, ...), an axis for the powers of each coordinate.

        With the largest coordinate along each axis `extent` (B, C, D), `background` and `air` (B, C) from the facts.
        """
        strength = self.uniform(facts, rng, "strength", (facts.channels,))
        order = self.per_sample(facts, lambda settings: settings.order)
        dimensions = len(facts.size)
        powers = torch.arange(max((settings.order for settings in self.by_modality.values()), default=1) + 1)
        degree = torch.stack(torch.meshgrid(*[powers] * dimensions, indexing="ij")).sum(dim=0)
        leading = (..., *([None] * dimensions))
        coefficients = strength[leading] * rng.uniform(-1, 1, (facts.channels, *degree.shape))
        # The constant term would cancel when the mean is made one.
        coefficients *= (degree > 0) & (degree <= order[:, None][leading])
        length = (torch.tensor(facts.size) - 1) * facts.spacing_mm[:, -dimensions:]
        extent = length / length.amax(dim=1, keepdim=True).clamp(min=1e-12)
        return {
            "strength": strength,
            "coefficients": coefficients,
            "extent": extent[:, None].repeat(1, facts.channels, 1),
            "background": _background_of(facts),
            "air": air_of(facts),
        }

    def change_one(self, channel: Tensor, values: Parameters) -> Tensor:
        """Multiply the signal."""
        air = zero_of_signal(channel, values["air"])
        field = polynomial(values["coefficients"], values["extent"], channel)
        # The largest exponent is made zero first: the mean takes it out again, and nothing overflows.
        field = field.sub_(field.amax()).exp_()
        field.div_(field.mean())
        background = float(values["background"])
        # Elsewhere the background is air, which keeps every bit, or unknown; to ask a GPU takes longer than to do it.
        if channel.device.type != "cpu" or float(air) < background < math.inf:
            # Comparing in place is several times faster than making a mask.
            field.sub_(1).mul_(channel.clone().ne_(background)).add_(1)
        return torch.lerp(air, channel, field, out=channel)


class RicianSettings(TransformSettings):
    """Noise of a magnitude image.

    Args:
        std: Standard deviation of the noise of either part of the complex image, in units of the normalised image.
    """

    std: tuple[Strength, Strength] = (0.0, 0.1)

    _ordered = field_validator("std")(ranges_are_ordered)


class Rician(MagneticResonance[RicianSettings]):
    """Magnitude of a complex image with Gaussian noise in both parts (Gudbjartsson and Patz, 1995).

    With s the signal measured from air it is sqrt((s + n1)^2 + n2^2). Where s is large, the noise is Gaussian and the
    mean rises by std^2 / (2 s); in air the mean is the Rician floor std sqrt(pi / 2). That shift is what distinguishes
    Rician from Gaussian noise, so mean and deviation are not restored afterwards; batchgeneratorsv2 restores them, and
    uses what it calls a variance as a standard deviation. One strength for all channels of a sample. Padding cannot be
    told from air and gets the floor as well.
    """

    name: ClassVar[str] = "rician"
    settings_class = RicianSettings
    neutral: ClassVar[tuple[str, float]] = ("std", 0.0)

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `std` (B, C), and the `seed` (B, C) that the noise comes from; with `air` (B, C) from the facts."""
        std = self.uniform(facts, rng, "std")[:, None].repeat(1, facts.channels)
        return {"std": std, "seed": rng.integers(0, 2**62, (facts.channels,)), "air": air_of(facts)}

    def change_one(self, channel: Tensor, values: Parameters) -> Tensor:
        """Add the noise; its numbers are made on the image's device and differ between CPU and CUDA."""
        air, std = zero_of_signal(channel, values["air"]), float(values["std"])
        generator = torch.Generator(device=channel.device).manual_seed(int(values["seed"]))
        noise = torch.empty_like(channel).normal_(generator=generator)
        channel.sub_(air).add_(noise, alpha=std).square_()
        # The memory of the noise of the real part serves the imaginary one: new memory costs as much as the arithmetic.
        noise.normal_(generator=generator)
        return channel.addcmul_(noise, noise, value=std**2).sqrt_().add_(air)


def air_of(facts: Facts) -> Tensor:
    """Return the value of air, or infinity: only the background of the first channel is recorded. Shape: (B, C)."""
    air = _background_of(facts)
    air[:, 1:] = math.inf
    return air


def encoded_axes(facts: Facts) -> Tensor:
    """Tell along which axes k-space was read: any of them may be the direction of phase encoding. Shape: (B, D), bool.

    Not along an axis with one voxel, nor with voxels more than `ANISOTROPIC` times the smallest: those are slices that
    were excited one by one.
    """
    several = torch.tensor(facts.size) > 1
    spacing = facts.spacing_mm[:, -len(facts.size) :].double()
    smallest = torch.where(several, spacing, math.inf).amin(dim=1, keepdim=True)
    return several & (spacing <= ANISOTROPIC * smallest)


def one_of(allowed: Tensor, u: Tensor) -> Tensor:
    """Return one of the allowed axes for each number in [0, 1). Shapes: (B, D), (B, C); of the result: (B, C)."""
    count = allowed.sum(dim=1, keepdim=True)
    number = torch.minimum(torch.floor(u * count), count - 1)
    rank = allowed.long().cumsum(dim=1) - 1
    return (allowed[:, None] & (rank[:, None] == number[..., None])).long().argmax(dim=2)


def zero_of_signal(channel: Tensor, air: Tensor) -> Tensor:
    """Return the value that the signal of a channel is measured from: air or the minimum, whichever is less.

    Args:
        channel: Shape: (Z, Y, X) or (Y, X).
        air: One number on the CPU, infinity where it is not known.

    Returns:
        One number on the channel's device.
    """
    return channel.amin().clamp(max=float(air))


def polynomial(coefficients: Tensor, extent: Tensor, like: Tensor) -> Tensor:
    """Evaluate a polynomial at every voxel.

    The sum over the powers of all axes but the last is made of small matrices; the last goes by Horner's rule, with one
    operation as large as the image for each power.

    Args:
        coefficients: Of the product of the powers of the coordinates. Shape: (order + 1, ...), an axis per axis of the
            image, on the CPU.
        extent: The coordinate runs from minus this to this along each axis. Shape: (D,), on the CPU.
        like: Image that gives size, dtype and device.

    Returns:
        New memory. Shape: (Z, Y, X) or (Y, X).
    """
    axes = [
        torch.linspace(-1, 1, edge, dtype=torch.float64) * reach if edge > 1 else torch.zeros(1, dtype=torch.float64)
        for edge, reach in zip(like.shape, extent.tolist(), strict=True)
    ]
    power = torch.arange(len(coefficients))
    planes = coefficients.double()
    for axis in axes[:-1]:
        planes = torch.tensordot(planes, axis[:, None] ** power, dims=([0], [1]))
    planes = to_device(planes, like.device, like.dtype)[..., None]
    last = to_device(axes[-1], like.device, like.dtype)
    result = planes[-1] * last
    for number in range(len(planes) - 2, 0, -1):
        result.add_(planes[number]).mul_(last)
    return result.add_(planes[0])


def _background_of(facts: Facts) -> Tensor:
    """Return what padding has in every channel, infinity where it is not known. Shape: (B, C)."""
    if facts.background is None:
        return torch.full((len(facts), facts.channels), math.inf)
    known = facts.background.float()
    return torch.where(known.isfinite(), known, math.inf)[:, None].repeat(1, facts.channels)
