"""Intensity transforms with the ranges of nnU-Net's default training; parameters per sample and channel."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from medssl.augmentation.transform import (
    Facts,
    Parameters,
    Transform,
    TransformSettings,
    broadcast,
    ranges_are_ordered,
    to_device,
)
from medssl.data.draw import Draw

Range = tuple[float, float]


class PerChannel(TransformSettings):
    """Settings of a transform whose channels are drawn apart.

    Args:
        per_channel: How often a channel of a changed sample is changed.
    """

    per_channel: float = Field(default=1.0, ge=0, le=1)


class NoiseSettings(TransformSettings):
    """Gaussian noise.

    Args:
        std: Standard deviation in units of the normalised image. nnU-Net calls it variance and uses it so.
    """

    std: Range = (0.0, 0.1)

    _ordered = field_validator("std")(ranges_are_ordered)


class Noise(Transform[NoiseSettings]):
    """Gaussian noise, one strength for all channels of a sample."""

    name: ClassVar[str] = "noise"
    settings_class = NoiseSettings

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `std` (B,) and the `seed` (B,) that the noise itself comes from."""
        return {"std": self.uniform(facts, rng, "std"), "seed": rng.integers(0, 2**62)}

    def change(self, image: Tensor, values: Parameters) -> Tensor:
        """Add each sample's noise; its numbers are made on the image's device and differ between CPU and CUDA."""
        noise = torch.empty_like(image)
        for row, seed in zip(noise, values["seed"].tolist(), strict=True):
            row.normal_(generator=torch.Generator(device=image.device).manual_seed(seed))
        return noise.mul_(broadcast(values["std"], image)).add_(image)


class BlurSettings(PerChannel):
    """Gaussian blur.

    Args:
        sigma: Standard deviation of the kernel in voxels, drawn for each channel and axis.
    """

    per_channel: float = Field(default=0.5, ge=0, le=1)
    sigma: Range = (0.5, 1.0)

    _ordered = field_validator("sigma")(ranges_are_ordered)

    @field_validator("sigma")
    @classmethod
    def _small(cls, value: Range) -> Range:
        if value[0] < 0 or value[1] > 8:
            raise ValueError(f"sigma is in voxels, in [0, 8]; got {value}")
        return value


class Blur(Transform[BlurSettings]):
    """Separable Gaussian blur with a kernel per sample, channel and axis; the border is mirrored."""

    name: ClassVar[str] = "blur"
    settings_class = BlurSettings

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `sigma` (B, C, D)."""
        return {"sigma": self.uniform(facts, rng, "sigma", (facts.channels, len(facts.size)))}

    def change(self, image: Tensor, values: Parameters) -> Tensor:
        """Blur along one axis after the other."""
        for axis in range(image.ndim - 2):
            image = blur_along(image, axis + 2, values["sigma"][:, :, axis])
        return image


class FactorSettings(PerChannel):
    """A factor on the intensities.

    Args:
        factor: Range; below one is drawn as often as above.
    """

    factor: Range = (0.75, 1.25)

    _ordered = field_validator("factor")(ranges_are_ordered)


class Brightness(Transform[FactorSettings]):
    """Multiply a channel."""

    name: ClassVar[str] = "brightness"
    settings_class = FactorSettings

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `factor` (B, C)."""
        return {"factor": self.around_one(facts, rng, "factor", (facts.channels,))}

    def change(self, image: Tensor, values: Parameters) -> Tensor:
        """Multiply."""
        return image * broadcast(values["factor"], image)


class Contrast(Transform[FactorSettings]):
    """Spread a channel about its mean, within the range it had."""

    name: ClassVar[str] = "contrast"
    settings_class = FactorSettings

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `factor` (B, C)."""
        return {"factor": self.around_one(facts, rng, "factor", (facts.channels,))}

    def change(self, image: Tensor, values: Parameters) -> Tensor:
        """Spread and clip; a factor of one gives the image back exactly."""
        factor = broadcast(values["factor"], image)
        mean = _over_space(image, "mean")
        low, high = _over_space(image, "min"), _over_space(image, "max")
        # image + (factor - 1) (image - mean): exact where the factor is one.
        spread = torch.addcmul(image, image - mean, (factor - 1).expand_as(image))
        return spread.clamp_(low, high)


class LowResolutionSettings(PerChannel):
    """A coarser acquisition.

    Args:
        zoom: Size of the coarse image relative to the fine one; all axes share it.
    """

    per_channel: float = Field(default=0.5, ge=0, le=1)
    zoom: Range = (0.5, 1.0)

    _ordered = field_validator("zoom")(ranges_are_ordered)

    @field_validator("zoom")
    @classmethod
    def _smaller(cls, value: Range) -> Range:
        if value[0] <= 0 or value[1] > 1:
            raise ValueError(f"zoom is the size of the coarse image relative to the fine one, in (0, 1]; got {value}")
        return value


class LowResolution(Transform[LowResolutionSettings]):
    """Sample a channel coarsely with the nearest voxel, then linearly back (Zhou et al., 2019; nnU-Net)."""

    name: ClassVar[str] = "low_resolution"
    settings_class = LowResolutionSettings

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `zoom` (B, C)."""
        return {"zoom": self.uniform(facts, rng, "zoom", (facts.channels,))}

    def change(self, image: Tensor, values: Parameters) -> Tensor:
        """Join both steps along each axis: a fine voxel mixes two coarse ones, which are voxels of the image."""
        for axis in range(image.ndim - 2):
            lower, upper, weight = coarse_neighbours(image.shape[axis + 2], values["zoom"])
            image = _mix_along(image, axis + 2, lower, upper, weight)
        return image


class GammaSettings(PerChannel):
    """A power law.

    Args:
        exponent: Range; below one is drawn as often as above.
    """

    exponent: Range = (0.7, 1.5)

    _ordered = field_validator("exponent")(ranges_are_ordered)

    @field_validator("exponent")
    @classmethod
    def _positive(cls, value: Range) -> Range:
        if value[0] <= 0:
            raise ValueError(f"an exponent is positive, got {value}")
        return value


class Gamma(Transform[GammaSettings]):
    """Power law on each channel's own range; mean and standard deviation are restored (nnU-Net's default)."""

    name: ClassVar[str] = "gamma"
    settings_class = GammaSettings
    inverted: ClassVar[bool] = False

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `exponent` (B, C)."""
        return {"exponent": self.around_one(facts, rng, "exponent", (facts.channels,))}

    def change(self, image: Tensor, values: Parameters) -> Tensor:
        """Apply the power law; an exponent of one gives the image back exactly."""
        changed = _gamma(-image, values["exponent"]).neg_() if self.inverted else _gamma(image, values["exponent"])
        return torch.where(broadcast(values["exponent"] == 1, image), image, changed)


class InvertedGamma(Gamma):
    """The power law on the negative image, turned back after: stretches the bright end. Never for CT."""

    name: ClassVar[str] = "gamma_inverted"
    inverted: ClassVar[bool] = True


def blur_along(image: Tensor, axis: int, sigma: Tensor) -> Tensor:
    """Blur along one axis with a Gaussian per sample and channel.

    A sum of shifted images instead of a convolution: every output is made by the same operations whatever else is in
    the batch, and nothing is unfolded in memory.

    Args:
        image: Shape: (B, C, ...).
        axis: Which axis.
        sigma: Standard deviations in voxels; 0 leaves the image as it is. Shape: (B, C), on the CPU.
    """
    edge = image.shape[axis]
    # Beyond 3 sigma lies 0.3 % of the weight; a mirrored border can be no wider than the image.
    radius = min(math.ceil(3 * float(sigma.max())), edge - 1)
    if radius < 1:
        return image
    distance = torch.arange(-radius, radius + 1, dtype=torch.float64)
    width = sigma.double().clamp(min=1e-6)[:, :, None]
    kernel = torch.exp(-0.5 * (distance / width) ** 2)
    kernel[distance.abs() > torch.ceil(3 * width).expand_as(kernel)] = 0
    kernel = kernel / kernel.sum(dim=2, keepdim=True)
    padded = _mirrored_border(image, axis, radius)
    weights = broadcast(kernel.float(), image.unsqueeze(2).unsqueeze(-1)).unbind(2)
    result = padded.narrow(axis, radius, edge) * weights[radius].reshape(*sigma.shape, *([1] * (image.ndim - 2)))
    for step in range(1, radius + 1):
        pair = padded.narrow(axis, radius - step, edge) + padded.narrow(axis, radius + step, edge)
        result.addcmul_(pair, weights[radius + step].reshape(*sigma.shape, *([1] * (image.ndim - 2))).expand_as(pair))
    return result


def coarse_neighbours(edge: int, zoom: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return which voxels each voxel of a coarsely sampled axis is mixed from, and the weight of the upper one.

    The coarse axis has n = round(zoom * edge) voxels. Coarse voxel j takes the voxel under its centre (nearest); the
    way back is linear between the centres of coarse voxels.

    Args:
        edge: Length of the axis.
        zoom: Shape: (B, C), on the CPU.

    Returns:
        Lower and upper voxel, int64, and weight, float32. Shapes: (B, C, edge).
    """
    count = torch.round(zoom.double() * edge).clamp(1, edge)[:, :, None]
    position = ((torch.arange(edge, dtype=torch.float64) + 0.5) * count / edge - 0.5).clamp(min=0)
    position = torch.minimum(position, count - 1)
    lower = position.floor()
    upper = torch.minimum(lower + 1, count - 1)
    weight = position - lower

    def voxel(coarse: Tensor) -> Tensor:
        return torch.floor((coarse + 0.5) * edge / count).long().clamp(0, edge - 1)

    return voxel(lower), voxel(upper), weight.float()


def _mix_along(image: Tensor, axis: int, lower: Tensor, upper: Tensor, weight: Tensor) -> Tensor:
    shape = [*lower.shape[:2], *([1] * (image.ndim - 2))]
    shape[axis] = lower.shape[2]
    below, above = (
        image.gather(axis, to_device(index, image.device).reshape(shape).expand_as(image)) for index in (lower, upper)
    )
    return torch.lerp(below, above, to_device(weight, image.device, image.dtype).reshape(shape).expand_as(image))


def _gamma(image: Tensor, exponent: Tensor, eps: float = 1e-7) -> Tensor:
    mean, std = _over_space(image, "mean"), _over_space(image, "std")
    low, high = _over_space(image, "min"), _over_space(image, "max")
    spread = (high - low).clamp(min=eps)
    result = ((image - low) / spread).pow_(broadcast(exponent, image)).mul_(spread).add_(low)
    after_mean, after_std = _over_space(result, "mean"), _over_space(result, "std")
    return result.sub_(after_mean).mul_(std / after_std.clamp(min=eps)).add_(mean)


def _over_space(image: Tensor, what: str) -> Tensor:
    """Return a statistic of each channel, shaped to meet the image again."""
    flat = image.flatten(2)
    if what == "mean":
        value = flat.mean(dim=2)
    elif what == "std":
        value = flat.std(dim=2, correction=0)
    else:
        value = flat.amin(dim=2) if what == "min" else flat.amax(dim=2)
    return value.reshape(*value.shape, *([1] * (image.ndim - 2)))


def _mirrored_border(image: Tensor, axis: int, width: int) -> Tensor:
    edge = image.shape[axis]
    before = image.narrow(axis, 1, width).flip(axis)
    behind = image.narrow(axis, edge - 1 - width, width).flip(axis)
    return torch.cat([before, image, behind], dim=axis)


# In the order of nnU-Net's default training.
INTENSITY: dict[str, type[Transform]] = {
    transform.name: transform for transform in (Noise, Blur, Brightness, Contrast, LowResolution, InvertedGamma, Gamma)
}
