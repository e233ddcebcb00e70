"""Style by the low frequencies: a sample keeps its phase and takes amplitudes from another sample of its batch."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import ClassVar

import torch
from pydantic import field_validator
from torch import Tensor

from medssl.augmentation.intensity import Range
from medssl.augmentation.transform import (
    Facts,
    Parameters,
    Transform,
    TransformSettings,
    ranges_are_ordered,
    to_device,
)
from medssl.data.draw import Draw

# The same index of two spectra is the same frequency only where their voxels have one size.
SPACING_TOLERANCE = 1.1
# A coefficient this many roundings of the largest one has no phase of its own.
ROUNDINGS = 32


class FourierMixSettings(TransformSettings):
    """Amplitudes of low frequencies.

    Args:
        ratio: Largest frequency that is mixed, in cycles per voxel along each axis: the box around the origin of the
            spectrum reaches to this part of each edge on either side, as Yang and Soatto define it.
        weight: Part of the partner's amplitude.
    """

    ratio: Range = (0.01, 0.1)
    weight: Range = (0.0, 1.0)

    _ordered = field_validator("ratio", "weight")(ranges_are_ordered)

    @field_validator("ratio")
    @classmethod
    def _low(cls, value: Range) -> Range:
        if value[0] < 0 or value[1] > 0.25:
            raise ValueError(f"ratio is in cycles per voxel, in [0, 0.25]; beyond lies anatomy. Got {value}")
        return value

    @field_validator("weight")
    @classmethod
    def _part(cls, value: Range) -> Range:
        if value[0] < 0 or value[1] > 1:
            raise ValueError(f"weight is the part of the partner's amplitude, in [0, 1]; got {value}")
        return value


class FourierMix(Transform[FourierMixSettings]):
    """Mix the low-frequency amplitudes with those of a partner of the same modality and voxel size; keep the phase.

    Yang and Soatto (FDA, CVPR 2020) replace amplitudes, Xu et al. (FACT, CVPR 2021) mix them with a uniform weight.
    Both work on images that are not negative, where the mean has the phase 0. Normalised images are those minus a
    constant, so here the mean is mixed with its sign: an absolute value would send it to the wrong side of zero.

    Only the low frequencies are computed, by matrix products with their cosines and sines along each axis, which is
    exact and cheaper than a transform of all frequencies; the difference is added to the image. A coefficient that is
    nothing but rounding (constant images) or not finite is left as it is. In float32 or float64.
    """

    name: ClassVar[str] = "fourier_mix"
    settings_class: ClassVar[type[FourierMixSettings]] = FourierMixSettings
    neutral: ClassVar[tuple[str, float]] = ("weight", 0.0)
    family: ClassVar[str] = "style"
    mixes_samples: ClassVar[bool] = True
    # Amplitudes of another patient would shift calibrated units.
    never: ClassVar[frozenset[str]] = frozenset({"CT", "PT", "NM"})

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `ratio` and `weight` (B, C), the same for all channels of a sample."""
        drawn = {name: self.uniform(facts, rng, name) for name in ("ratio", "weight")}
        return {name: value[:, None].repeat(1, facts.channels) for name, value in drawn.items()}

    def draw(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw also `partner` (B,), a row of the batch; a sample without a fit partner is not active."""
        drawn = super().draw(facts, rng)
        fit = _fits_together(facts)
        # In float64: a float32 below one, times a whole number, can round up to that number.
        pick = (rng.uniform(0, 1).double() * fit.sum(dim=1)).long()
        partner = (fit.cumsum(dim=1) > pick[:, None]).int().argmax(dim=1)
        return self._paired(drawn, torch.where(fit.any(dim=1), partner, torch.arange(len(facts))))

    def apply_(self, image: Tensor, parameters: Parameters) -> Tensor:
        """Change a contiguous batch in place; partners are taken as they were before."""
        active = parameters["active"].nonzero().tolist()
        partner = parameters["partner"].tolist()
        spectra: dict[tuple[int, int, tuple[int, ...]], Tensor] = {}
        with torch.autocast(image.device.type, enabled=False):
            changes = []
            for row, channel in active:
                box = box_of(image.shape[2:], float(parameters["ratio"][row, channel]))
                for of in (row, partner[row]):
                    if (of, channel, box) not in spectra:
                        spectra[of, channel, box] = low_spectrum(image[of, channel], box)
                own, other = spectra[row, channel, box], spectra[partner[row], channel, box]
                changes.append(_difference(own, other, float(parameters["weight"][row, channel])))
            for (row, channel), change in zip(active, changes, strict=True):
                add_spectrum_(image[row, channel], change)
        return image

    @staticmethod
    def _paired(drawn: Parameters, partner: Tensor) -> Parameters:
        alone = partner == torch.arange(len(partner))
        return {**drawn, "active": drawn["active"] & ~alone[:, None], "partner": partner}


class BatchStyleSettings(FourierMixSettings):
    """Amplitudes of low frequencies of one image for all.

    Args:
        weight: Part of the common amplitude; 1 replaces.
    """

    weight: Range = (1.0, 1.0)


class BatchStyle(FourierMix):
    """Give all chosen samples of a modality the low-frequency amplitudes of one of them (BSS, arXiv 2303.06088).

    The image that lends its style is drawn among all of its modality and keeps every bit; its `ratio` holds for all.
    A sample whose voxels differ in size from its is not active.
    """

    name: ClassVar[str] = "batch_style"
    settings_class: ClassVar[type[FourierMixSettings]] = BatchStyleSettings

    def draw(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw also `partner` (B,), the row that lends its style to the sample's modality."""
        drawn = Transform.draw(self, facts, rng)
        rank = rng.uniform(0, 1).tolist()
        source: dict[str, int] = {}
        for row, modality in enumerate(facts.modality):
            if modality not in source or rank[row] > rank[source[modality]]:
                source[modality] = row
        common = torch.tensor([source[modality] for modality in facts.modality])
        fit = _fits_together(facts)[torch.arange(len(facts)), common]
        drawn["ratio"] = drawn["ratio"][common]
        return self._paired(drawn, torch.where(fit, common, torch.arange(len(facts))))


def box_of(size: tuple[int, ...], ratio: float) -> tuple[int, ...]:
    """Return the largest frequency index along each axis: the whole cycles within `ratio` cycles per voxel."""
    # A ratio of 0.1 is a little less in float32, and 30 voxels are then 2.9999999 cycles.
    return tuple(min(math.floor(ratio * edge + 1e-5), (edge - 1) // 2) for edge in size)


def low_spectrum(channel: Tensor, box: tuple[int, ...]) -> Tensor:
    """Return the Fourier coefficients up to an index along each axis, as an FFT defines them.

    Args:
        channel: One image. Shape: (*spatial).
        box: Largest index along each axis.

    Returns:
        Indices along each axis in the order 0, 1, ..., b, -1, ..., -b. Shape: (2 * b + 1, ...), complex.
    """
    values = channel if channel.dtype == torch.float64 else channel.float()
    # The last axis first: it is contiguous, and what is left after it is small.
    for axis in reversed(range(values.ndim)):
        values = _along(values, _waves(channel.shape[axis], box[axis], values.dtype, values.device), axis)
    spectrum = torch.complex(values, torch.zeros_like(values))
    for axis in range(values.ndim):
        spectrum = _along(spectrum, _from_waves(box[axis], spectrum.dtype, spectrum.device), axis)
    return spectrum


def add_spectrum_(channel: Tensor, spectrum: Tensor) -> None:
    """Add the image of low-frequency coefficients in the order of `low_spectrum` to a contiguous image, in place."""
    box = tuple((count - 1) // 2 for count in spectrum.shape)
    for axis in range(spectrum.ndim):
        back = _from_waves(box[axis], spectrum.dtype, spectrum.device).conj().T.resolve_conj().contiguous()
        spectrum = _along(spectrum, back, axis)
    values = spectrum.real.div(channel.numel())
    for axis in range(values.ndim - 1):
        values = _along(values, _waves(channel.shape[axis], box[axis], values.dtype, values.device).T, axis)
    waves = _waves(channel.shape[-1], box[-1], values.dtype, values.device)
    lines = values.reshape(-1, values.shape[-1])
    if channel.dtype == values.dtype:
        channel.view(-1, channel.shape[-1]).addmm_(lines, waves)
    else:
        channel.copy_(channel + (lines @ waves).view(channel.shape))


def _difference(own: Tensor, other: Tensor, weight: float) -> Tensor:
    """Return what is added to the own coefficients."""
    amplitude = own.abs()
    rounding = ROUNDINGS * torch.finfo(amplitude.dtype).eps * amplitude.amax()
    gain = torch.where(amplitude > rounding, other.abs() / amplitude.clamp(min=torch.finfo(amplitude.dtype).tiny), 1.0)
    change = own * (weight * (gain - 1))
    origin = (0,) * own.ndim
    change[origin] = weight * (other[origin] - own[origin])
    return torch.where(torch.isfinite(change), change, 0)


def _fits_together(facts: Facts) -> Tensor:
    """Tell which two samples share modality and voxel size, none with itself. Shape: (B, B), bool."""
    spacing = facts.spacing_mm[:, -len(facts.size) :]
    larger = (spacing[:, None] / spacing[None]).amax(dim=2)
    # Differences both ways; a spacing that is not known, NaN, fits nothing.
    fit = (larger <= SPACING_TOLERANCE) & (larger.T <= SPACING_TOLERANCE)
    names = sorted(set(facts.modality))
    modality = torch.tensor([names.index(name) for name in facts.modality])
    return fit & (modality[:, None] == modality[None]) & ~torch.eye(len(facts), dtype=torch.bool)


def _along(values: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply one axis by a matrix (new, old)."""
    if axis == values.ndim - 1:
        return values @ matrix.T
    shape = values.shape
    product = matrix @ values.reshape(math.prod(shape[:axis]), shape[axis], -1)
    return product.reshape(*shape[:axis], matrix.shape[0], *shape[axis + 1 :])


@lru_cache(maxsize=256)
def _waves(edge: int, largest: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the cosines of 0 to `largest` cycles and the sines of 1 to `largest`. Shape: (2 * largest + 1, edge)."""
    # Whole turns are dropped before the angle is taken, which keeps it exact.
    turns = (torch.arange(largest + 1)[:, None] * torch.arange(edge)) % edge
    angle = turns.double() * (2 * math.pi / edge)
    return to_device(torch.cat([angle.cos(), angle[1:].sin()]), device, dtype)


@lru_cache(maxsize=256)
def _from_waves(largest: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix from products with cosines and sines to coefficients, in the order of `low_spectrum`."""
    cosine = torch.eye(largest + 1, dtype=torch.float64)
    sine = cosine[:, 1:]
    # e^-ikx = cos kx - i sin kx for positive and its conjugate for negative frequencies.
    real = torch.cat([torch.cat([cosine, cosine[1:]]), torch.zeros(2 * largest + 1, largest)], dim=1)
    imaginary = torch.cat([torch.zeros(2 * largest + 1, largest + 1), torch.cat([-sine, sine[1:]])], dim=1)
    return to_device(torch.complex(real, imaginary), device, dtype)
