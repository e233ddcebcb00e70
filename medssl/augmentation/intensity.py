"""Intensity transforms with the ranges of nnU-Net's default training; parameters per sample and channel."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from medssl.augmentation.transform import (
    Facts,
    Parameters,
    Transform,
    TransformSettings,
    broadcast,
    ranges_are_ordered,
)
from medssl.data.draw import Draw

Range = tuple[float, float]
# Keeps the division of a constant image finite.
TINY = 1e-7


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
    neutral: ClassVar[tuple[str, float]] = ("std", 0.0)

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `std` (B, C), and the `seed` (B, C) that the noise itself comes from."""
        std = self.uniform(facts, rng, "std")[:, None].repeat(1, facts.channels)
        return {"std": std, "seed": rng.integers(0, 2**62, (facts.channels,))}

    def change(self, channels: Tensor, values: Parameters) -> Tensor:
        """Add each channel's noise; its numbers are made on the image's device and differ between CPU and CUDA."""
        for channel, std, seed in zip(channels, values["std"].tolist(), values["seed"].tolist(), strict=True):
            generator = torch.Generator(device=channel.device).manual_seed(seed)
            channel.add_(torch.empty_like(channel).normal_(generator=generator), alpha=std)
        return channels


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
    neutral: ClassVar[tuple[str, float]] = ("sigma", 0.0)

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `sigma` (B, C, D)."""
        return {"sigma": self.uniform(facts, rng, "sigma", (facts.channels, len(facts.size)))}

    def change(self, channels: Tensor, values: Parameters) -> Tensor:
        """Blur along one axis after the other."""
        for axis in range(channels.ndim - 1):
            channels = blur_along(channels, axis + 1, values["sigma"][:, axis])
        return channels


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
    neutral: ClassVar[tuple[str, float]] = ("factor", 1.0)

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `factor` (B, C)."""
        return {"factor": self.around_one(facts, rng, "factor", (facts.channels,))}

    def change(self, channels: Tensor, values: Parameters) -> Tensor:
        """Multiply."""
        return channels.mul_(broadcast(values["factor"], channels))


class Contrast(Transform[FactorSettings]):
    """Spread a channel about its mean, within the range it had."""

    name: ClassVar[str] = "contrast"
    settings_class = FactorSettings
    neutral: ClassVar[tuple[str, float]] = ("factor", 1.0)

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `factor` (B, C)."""
        return {"factor": self.around_one(facts, rng, "factor", (facts.channels,))}

    def change(self, channels: Tensor, values: Parameters) -> Tensor:
        """Spread and clip."""
        factor = broadcast(values["factor"], channels)
        low, high = _range_of(channels)
        mean = _of_each(channels.flatten(1).mean(dim=1), channels)
        # factor * (x - mean) + mean, in fewer passes through memory.
        return limit_(channels.mul_(factor).add_(mean * (1 - factor)), low, high)


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
    neutral: ClassVar[tuple[str, float]] = ("zoom", 1.0)

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `zoom` (B, C)."""
        return {"zoom": self.uniform(facts, rng, "zoom", (facts.channels,))}

    def change(self, channels: Tensor, values: Parameters) -> Tensor:
        """Go there and back; the coarse images differ in size, so each channel goes alone."""
        size = channels.shape[1:]
        mode = "trilinear" if len(size) == 3 else "bilinear"
        for channel, zoom in zip(channels, values["zoom"].tolist(), strict=True):
            coarse_size = [max(1, round(zoom * edge)) for edge in size]
            coarse = F.interpolate(channel[None, None], coarse_size, mode="nearest-exact")
            channel.copy_(F.interpolate(coarse, size, mode=mode)[0, 0])
        return channels


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
    neutral: ClassVar[tuple[str, float]] = ("exponent", 1.0)
    inverted: ClassVar[bool] = False

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `exponent` (B, C)."""
        return {"exponent": self.around_one(facts, rng, "exponent", (facts.channels,))}

    def change(self, channels: Tensor, values: Parameters) -> Tensor:
        """Bring to [0, 1], apply the power, and bring mean and deviation to what they were."""
        low, high = _range_of(channels)
        std, mean = _spread_of(channels)
        spread = (high - low).clamp_(min=TINY)
        unit = torch.sub(high, channels) if self.inverted else channels.sub_(low)
        unit = unit.div_(spread).pow_(broadcast(values["exponent"], channels))
        unit_std, unit_mean = _spread_of(unit)
        factor = std / unit_std.clamp_(min=TINY)
        return unit.sub_(unit_mean).mul_(-factor if self.inverted else factor).add_(mean)


class InvertedGamma(Gamma):
    """The power law on the negative image, turned back after: stretches the bright end. Never for CT."""

    name: ClassVar[str] = "gamma_inverted"
    # A power law on the negative image exchanges the roles of air and bone: there is no such CT.
    never: ClassVar[frozenset[str]] = frozenset({"CT"})
    inverted: ClassVar[bool] = True


def blur_along(channels: Tensor, axis: int, sigma: Tensor) -> Tensor:
    """Blur along one axis with a Gaussian per channel.

    A sum of shifted images instead of a convolution: every output is made by the same operations whatever else is in
    the batch, and nothing is unfolded in memory.

    Args:
        channels: Shape: (N, *spatial).
        axis: Which axis.
        sigma: Standard deviations in voxels; 0 leaves the channel as it is. Shape: (N,), on the CPU.
    """
    edge = channels.shape[axis]
    # Beyond 3 sigma lies 0.3 % of the weight; a mirrored border can be no wider than the image.
    radius = min(math.ceil(3 * float(sigma.max())), edge - 1)
    if radius < 1:
        return channels
    distance = torch.arange(-radius, radius + 1, dtype=torch.float64)
    width = sigma.double().clamp(min=1e-6)[:, None]
    kernel = torch.exp(-0.5 * (distance / width) ** 2)
    # Each channel's own radius counts, so that its kernel does not depend on the widest of the batch.
    kernel = torch.where(distance.abs() <= torch.ceil(3 * width), kernel, 0.0)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    padded = _mirrored_border(channels, axis, radius)
    weights = broadcast(kernel[:, radius:].float().T.contiguous(), channels.unsqueeze(0))
    result = padded.narrow(axis, radius, edge) * weights[0]
    for step in range(1, radius + 1):
        pair = padded.narrow(axis, radius - step, edge) + padded.narrow(axis, radius + step, edge)
        result.addcmul_(pair, weights[step])
    return result


def filtered_inside(field: Tensor, axis: int, kernel: list[float]) -> Tensor:
    """Filter along one axis with a symmetric kernel (centre first), only where all of it lies inside the field."""
    reach = len(kernel) - 1
    edge = field.shape[axis] - 2 * reach
    result = field.narrow(axis, reach, edge) * kernel[0]
    for step in range(1, reach + 1):
        result.add_(field.narrow(axis, reach - step, edge), alpha=kernel[step])
        result.add_(field.narrow(axis, reach + step, edge), alpha=kernel[step])
    return result


def limit_(channels: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clip in place to bounds of each channel; `clamp_` with tensors is ten times slower on the CPU (torch 2.15)."""
    torch.maximum(channels, low, out=channels)
    return torch.minimum(channels, high, out=channels)


def _mirrored_border(channels: Tensor, axis: int, width: int) -> Tensor:
    edge = channels.shape[axis]
    before = channels.narrow(axis, 1, width).flip(axis)
    behind = channels.narrow(axis, edge - 1 - width, width).flip(axis)
    return torch.cat([before, channels, behind], dim=axis)


def _range_of(channels: Tensor) -> tuple[Tensor, Tensor]:
    # Two reductions: `aminmax` along an axis is fifteen times slower on the CPU (torch 2.15).
    flat = channels.flatten(1)
    return _of_each(flat.amin(dim=1), channels), _of_each(flat.amax(dim=1), channels)


def _spread_of(channels: Tensor) -> tuple[Tensor, Tensor]:
    # By the norm about the mean: `std` is fifty times slower on the CPU (torch 2.15).
    flat = channels.flatten(1)
    mean = flat.mean(dim=1, keepdim=True)
    std = torch.linalg.vector_norm(flat - mean, dim=1) / math.sqrt(flat.shape[1])
    return _of_each(std, channels), _of_each(mean, channels)


def _of_each(values: Tensor, channels: Tensor) -> Tensor:
    return values.reshape(-1, *([1] * (channels.ndim - 1)))
