"""CT transforms: window, dose, reconstruction kernel and slice thickness, in Hounsfield units and mm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import field_validator, model_validator
from torch import Tensor

from medssl.augmentation.intensity import Range, blur_along, filtered_inside
from medssl.augmentation.transform import Facts, Parameters, Transform, TransformSettings, broadcast, ranges_are_ordered
from medssl.data.draw import Draw
from medssl.errors import DataError

CT = frozenset({"CT"})


def rescale_of(transform: Transform[Any], facts: Facts) -> tuple[Tensor, Tensor]:
    """Return intercept and slope from stored values to HU of each sample; 0 and 1 for samples that are never changed.

    Returns:
        Two tensors of the shape (B, 1), float64.

    Raises:
        DataError: If a sample that the transform may change has no known rescale, or one whose slope is not positive.
    """
    rescale = torch.full((len(facts), 2), math.nan) if facts.rescale is None else facts.rescale
    needed = transform.per_sample(facts, lambda settings: settings.probability) > 0
    usable = torch.isfinite(rescale).all(dim=1) & (rescale[:, 1] > 0)
    missing = (needed & ~usable).nonzero()[:, 0].tolist()
    if missing:
        row = missing[0]
        raise DataError(
            f"The transform {transform.name} works in Hounsfield units, but how the stored values of a "
            f"{facts.modality[row]} sample (row {row} of the batch, {len(missing)} in all) become HU is not known: "
            f"intercept and slope are {rescale[row, 0]:g} and {rescale[row, 1]:g}. Run medssl preprocess again on the "
            f"original volumes, or leave the transform out of the policy with `{transform.name}: null`."
        )
    known = torch.where(needed[:, None], rescale.double(), torch.tensor([0.0, 1.0], dtype=torch.float64))
    return known[:, :1], known[:, 1:]


def within(low: float, high: float, unit: str) -> Callable[[Range], Range]:
    """Return a check that a range is ordered and lies in bounds, for `field_validator`."""

    def check(value: Range) -> Range:
        # Also true for NaN, which compares with nothing.
        if not (value[0] >= low and value[1] <= high):
            raise ValueError(f"the range {tuple(value)} leaves [{low:g}, {high:g}] {unit}")
        ranges_are_ordered(value)
        return value

    return check


def shared(value: Tensor, facts: Facts) -> Tensor:
    """Give all channels of a sample what was drawn for it. Shape: (B, ...) to (B, C, ...), float32."""
    return value.float()[:, None].repeat(1, facts.channels, *([1] * (value.ndim - 1)))


class HuWindowSettings(TransformSettings):
    """A random window.

    Args:
        low: Lower bound in HU.
        high: Upper bound in HU.
        stretch: Bring what the window left back to the range that the image had.
    """

    low: Range = (-1350.0, -1000.0)
    high: Range = (300.0, 1000.0)
    stretch: bool = False

    _bounded = field_validator("low", "high")(within(-1e5, 1e5, "HU"))

    @model_validator(mode="after")
    def _never_empty(self) -> HuWindowSettings:
        if self.low[1] >= self.high[0]:
            raise ValueError(f"low reaches {self.low[1]:g} HU and high starts at {self.high[0]:g} HU: keep them apart")
        return self


class HuWindow(Transform[HuWindowSettings]):
    """Clip to a random window; the bounds are those of vox2vec (Goncharov et al., MICCAI 2023).

    vox2vec also maps each window to [0, 1], so that one tissue has another value in every sample. Here values keep
    their unit; with `stretch` what is left is spread over the range that the image had before, so that contrast changes
    and nothing else. A window that holds the whole image changes no bit of it either way.
    """

    name: ClassVar[str] = "hu_window"
    settings_class = HuWindowSettings
    # Whether a finite window has an effect is up to the image.
    neutral: ClassVar[tuple[str, float]] = ("high", math.inf)
    family: ClassVar[str] = "ct"
    modalities: ClassVar[frozenset[str] | None] = CT

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `low` and `high` (B, C) in stored units; `stretch` (B, C) is 1 or 0."""
        intercept, slope = rescale_of(self, facts)
        bounds = torch.stack([self.uniform(facts, rng, "low"), self.uniform(facts, rng, "high")], dim=1)
        low, high = ((bounds.double() - intercept) / slope).unbind(dim=1)
        stretch = self.per_sample(facts, lambda settings: settings.stretch)
        return {"low": shared(low, facts), "high": shared(high, facts), "stretch": shared(stretch, facts)}

    def change(self, channels: Tensor, values: Parameters) -> Tensor:
        """Clip each channel, and stretch it where asked."""
        drawn = (values["low"].tolist(), values["high"].tolist(), values["stretch"].tolist())
        for channel, low, high, stretch in zip(channels, *drawn, strict=True):
            if not stretch:
                channel.clamp_(low, high)
                continue
            bottom, top = channel.amin(), channel.amax()
            channel.clamp_(low, high)
            clipped_bottom = bottom.clamp(low, high)
            spread = top.clamp(low, high) - clipped_bottom
            factor = torch.where(spread > 0, (top - bottom) / spread, 0.0)
            channel.mul_(factor).add_(bottom - clipped_bottom * factor)
        return channels


class DoseNoiseSettings(TransformSettings):
    """Noise of a lower dose.

    Args:
        std: Standard deviation in HU of the noise that is added.
        correlation: Standard deviation in voxels of the Gaussian that correlates the noise within a slice.
    """

    std: Range = (0.0, 30.0)
    correlation: Range = (0.5, 1.0)

    _bounded = field_validator("std")(within(0, 1000, "HU"))
    _small = field_validator("correlation")(within(0, 8, "voxels"))


class DoseNoise(Transform[DoseNoiseSettings]):
    """Gaussian noise that is correlated within a slice, as reconstruction leaves it; a lower dose, seen in image space.

    An approximation. Quantum noise is drawn in the projections: its deviation grows with the square root of the
    attenuation along the rays, so that it is largest in the middle of a wide body and drawn out along the wide axis.
    That needs the whole slice, and a crop is only a part of it. Here the deviation is the same everywhere, in air too,
    and the noise is white noise that was low-passed; true noise power also falls towards frequency zero. Slices are
    independent. The deviation is the asked one at every voxel, also at the border.
    """

    name: ClassVar[str] = "dose_noise"
    settings_class = DoseNoiseSettings
    neutral: ClassVar[tuple[str, float]] = ("std", 0.0)
    family: ClassVar[str] = "ct"
    modalities: ClassVar[frozenset[str] | None] = CT

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `std` in stored units, `correlation` in voxels and `seed`, each (B, C)."""
        _, slope = rescale_of(self, facts)
        std = self.uniform(facts, rng, "std").double() / slope[:, 0]
        correlation = self.uniform(facts, rng, "correlation")
        seed = rng.integers(0, 2**62, (facts.channels,))
        return {"std": shared(std, facts), "correlation": shared(correlation, facts), "seed": seed}

    def change(self, channels: Tensor, values: Parameters) -> Tensor:
        """Add each channel's noise; its numbers are made on the image's device and differ between CPU and CUDA."""
        drawn = (values["std"].tolist(), values["correlation"], values["seed"].tolist())
        for channel, std, sigma, seed in zip(channels, *drawn, strict=True):
            kernel = _blur_of_impulse(sigma)
            # A mirrored border would count the same noise twice and deviate more: a wider field needs none.
            border = len(kernel) - 1
            *slices, rows, columns = channel.shape
            field = channel.new_empty((*slices, rows + 2 * border, columns + 2 * border))
            field.normal_(generator=torch.Generator(device=channel.device).manual_seed(seed))
            for axis in (-2, -1):
                field = filtered_inside(field, axis, kernel)
            # Filtering one axis lowers the deviation by the root of the kernel's energy.
            energy = sum(weight**2 for weight in kernel) * 2 - kernel[0] ** 2
            channel.add_(field, alpha=std / energy)
        return channels


class KernelSettings(TransformSettings):
    """Another reconstruction kernel.

    Args:
        strength: -1 is a Gaussian blur, 1 doubles what the blur would remove.
        sigma_mm: Standard deviation of the Gaussian, in mm.
    """

    strength: Range = (-1.0, 1.0)
    sigma_mm: Range = (0.5, 1.0)

    _bounded = field_validator("strength")(within(-1, 30, "(-1 is the blur, 30 the strongest sharpening)"))
    _small = field_validator("sigma_mm")(within(0, 10, "mm"))


class Kernel(Transform[KernelSettings]):
    """A softer or sharper reconstruction kernel: x + strength * (x - blur(x)), within each slice.

    Negative strengths blur, positive ones are an unsharp mask, which also raises the noise, as a sharp kernel does. The
    slice is the plane of Y and X: volumes are taken to be acquired axially. MONAI's sharpening blurs its input first
    and uses strengths of 10 to 30 about it; without that blur, 1 already doubles the finest detail. Constants stay.
    """

    name: ClassVar[str] = "kernel"
    settings_class = KernelSettings
    neutral: ClassVar[tuple[str, float]] = ("strength", 0.0)
    family: ClassVar[str] = "ct"
    modalities: ClassVar[frozenset[str] | None] = CT

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `strength` (B, C) and `sigma` (B, C, 2) in voxels of Y and X."""
        strength = self.uniform(facts, rng, "strength")
        sigma = self.uniform(facts, rng, "sigma_mm")[:, None] / facts.spacing_mm[:, 1:]
        return {"strength": shared(strength, facts), "sigma": shared(sigma, facts)}

    def change(self, channels: Tensor, values: Parameters) -> Tensor:
        """Blur in the plane and go from there through the image, as far as drawn."""
        blurred = channels
        for axis in (-2, -1):
            blurred = blur_along(blurred, channels.ndim + axis, values["sigma"][:, axis])
        return torch.lerp(blurred, channels, broadcast(1 + values["strength"], channels))


class SliceThicknessSettings(TransformSettings):
    """Thicker slices.

    Args:
        thickness_mm: Width of the slice profile in mm.
    """

    thickness_mm: Range = (1.0, 5.0)

    _bounded = field_validator("thickness_mm")(within(0, 50, "mm"))


class SliceThickness(Transform[SliceThicknessSettings]):
    """Average of neighbouring slices over a box of drawn thickness; the grid stays.

    Where the box cuts a slice, the slice counts with the part that is inside. At the volume's ends the average is of
    the slices that exist. A thickness below the distance of the slices changes nothing, nor does any in 2D. What is
    averaged has a thickness already, taken to be the distance of the slices; the box comes on top of it.
    """

    name: ClassVar[str] = "slice_thickness"
    settings_class = SliceThicknessSettings
    neutral: ClassVar[tuple[str, float]] = ("width", 1.0)
    family: ClassVar[str] = "ct"
    modalities: ClassVar[frozenset[str] | None] = CT

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `width` (B, C), the thickness in slices, 1 where it is below."""
        width = (self.uniform(facts, rng, "thickness_mm") / facts.spacing_mm[:, 0]).clamp(min=1)
        if len(facts.size) == 2:
            width = torch.ones_like(width)
        return {"width": shared(width, facts)}

    def change(self, channels: Tensor, values: Parameters) -> Tensor:
        """Average along Z."""
        return average_slices(channels, values["width"])


def average_slices(channels: Tensor, width: Tensor) -> Tensor:
    """Average along Z with a centred box per channel, as a sum of shifted images.

    Args:
        channels: Shape: (N, Z, Y, X).
        width: Width of the box in slices, 1 or more. Shape: (N,), on the CPU.
    """
    edge = channels.shape[1]
    radius = min(math.ceil((float(width.max()) - 1) / 2), edge - 1)
    if radius < 1:
        return channels
    distance = torch.arange(radius + 1, dtype=torch.float64)
    # The part of the slice at a distance that is inside the box; zero beyond each channel's own box.
    part = (width.double()[:, None] / 2 + 0.5 - distance).clamp(0, 1)
    position = torch.arange(edge)
    total = part[:, :1].repeat(1, edge)
    for step in range(1, radius + 1):
        neighbours = (position >= step).double() + (position < edge - step).double()
        total += part[:, step : step + 1] * neighbours
    parts = broadcast(part.float().T.contiguous(), channels.unsqueeze(0))
    result = channels.clone()
    for step in range(1, radius + 1):
        result.narrow(1, step, edge - step).addcmul_(channels.narrow(1, 0, edge - step), parts[step])
        result.narrow(1, 0, edge - step).addcmul_(channels.narrow(1, step, edge - step), parts[step])
    return result.mul_(broadcast((1 / total).float(), channels))


def _blur_of_impulse(sigma: Tensor) -> list[float]:
    """Return the weights of a Gaussian blur from the middle outwards."""
    reach = math.ceil(3 * float(sigma))
    impulse = torch.zeros(1, 4 * reach + 1, dtype=torch.float64)
    impulse[:, 2 * reach] = 1
    weights: list[float] = blur_along(impulse, 1, sigma[None])[0, 2 * reach : 3 * reach + 1].tolist()
    return weights
