"""Artefacts that MR images get while k-space is read: truncation, ghosts, motion and spikes.

Whatever depends on one coordinate of k-space is a filter along one axis of the image. Its real part is a small
symmetric matrix, so a product of matrices takes the place of two Fourier transforms: faster at common crop sizes, and
it adds to the image instead of making it anew, so that what is not filtered is not rounded. A spike is a plane wave, a
product of small vectors. The centre of k-space is never changed, and with it the mean of a channel.

Images are real parts, as in TorchIO, where a scanner takes magnitudes. A crop is treated as if it were a whole scan, as
in TorchIO and MONAI: it repeats at its borders, and ghosts are shifted by parts of the crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from medssl.augmentation.geometry import rotation_matrices
from medssl.augmentation.intensity import PerChannel
from medssl.augmentation.mri import Fraction, MagneticResonance, air_of, encoded_axes, one_of, zero_of_signal
from medssl.augmentation.resampling import resample
from medssl.augmentation.transform import Facts, Parameters, ranges_are_ordered, to_device
from medssl.data.draw import Draw


class GibbsSettings(PerChannel):
    """A coarser matrix of acquisition.

    Args:
        cutoff: Range of the largest frequency that is kept, as part of the Nyquist frequency; drawn for each axis.
    """

    cutoff: tuple[Fraction, Fraction] = (0.5, 1.0)

    _ordered = field_validator("cutoff")(ranges_are_ordered)

    @field_validator("cutoff")
    @classmethod
    def _positive(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] <= 0:
            raise ValueError(f"cutoff is a part of the Nyquist frequency, in (0, 1]; got {value}")
        return value


class Gibbs(MagneticResonance[GibbsSettings]):
    """Truncation of k-space, which leaves ringing along edges.

    The part that is kept is a box, as a scanner that fills a coarse matrix up with zeros keeps it; MONAI keeps a ball,
    half a line off the centre. Axes that are not read in k-space, see `encoded_axes`, are left alone.
    """

    name: ClassVar[str] = "gibbs"
    settings_class = GibbsSettings
    neutral: ClassVar[tuple[str, float]] = ("cutoff", 1.0)

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `cutoff` (B, C, D); 1 where the axis is not read in k-space."""
        cutoff = self.uniform(facts, rng, "cutoff", (facts.channels, len(facts.size)))
        return {"cutoff": torch.where(encoded_axes(facts)[:, None], cutoff, 1.0)}

    def change_one(self, channel: Tensor, values: Parameters) -> Tensor:
        """Remove the outer lines along one axis after the other."""
        for axis, cutoff in enumerate(values["cutoff"].tolist()):
            outer = ~_central(channel.shape[axis], cutoff)
            add_lines(channel, channel, axis, -outer.double())
        return channel


class GhostingSettings(PerChannel):
    """A signal that changes periodically while k-space is read, by breath or pulse.

    Args:
        count: Range of the period in lines, which is the number of images that lie over each other.
        intensity: Range of the part of the signal that is lost in one line of each period.
        restore: Central part of k-space that is not changed.
    """

    count: tuple[Annotated[int, Field(ge=2, le=64)], Annotated[int, Field(ge=2, le=64)]] = (4, 10)
    intensity: tuple[Fraction, Fraction] = (0.5, 1.0)
    restore: Fraction = 0.02

    _ordered = field_validator("count", "intensity")(ranges_are_ordered)


class Ghosting(MagneticResonance[GhostingSettings]):
    """Faint copies of the image, shifted along the direction of phase encoding.

    One line of k-space in every `count` loses a part of its signal, as in TorchIO, which always begins with the first
    line; here the phase of the period is drawn.
    """

    name: ClassVar[str] = "ghosting"
    settings_class = GhostingSettings
    neutral: ClassVar[tuple[str, float]] = ("intensity", 0.0)

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `axis`, `count`, `intensity` and the `first` line of the period; with `restore`. Shapes: (B, C)."""
        shape = (facts.channels,)
        encoded = encoded_axes(facts)
        count = self.whole(facts, rng, "count")
        intensity = self.uniform(facts, rng, "intensity", shape)
        return {
            "axis": one_of(encoded, rng.uniform(0, 1, shape)),
            "count": count,
            "intensity": torch.where(encoded.any(dim=1)[:, None], intensity, 0.0),
            "first": torch.floor(rng.uniform(0, 1, shape) * count).long(),
            "restore": self.per_sample(facts, lambda settings: settings.restore)[:, None].repeat(1, *shape),
        }

    def change_one(self, channel: Tensor, values: Parameters) -> Tensor:
        """Weaken the lines."""
        axis = int(values["axis"])
        edge = channel.shape[axis]
        weakened = (_frequencies(edge) - values["first"]) % values["count"] == 0
        weakened &= ~_central(edge, float(values["restore"]))
        return add_lines(channel, channel, axis, -values["intensity"].double() * weakened)


class MotionSettings(PerChannel):
    """A patient who moves during the scan.

    Args:
        degrees: Largest turn about each axis.
        mm: Largest shift along each axis.
        moves: Range of the number of movements.
        still: Central part of k-space in which nothing moves. A twentieth holds about two thirds of the variance of a
            cardiac MR image.
    """

    degrees: float = Field(default=10.0, ge=0, le=90)
    mm: float = Field(default=10.0, ge=0, le=100)
    moves: tuple[Annotated[int, Field(ge=1, le=8)], Annotated[int, Field(ge=1, le=8)]] = (1, 2)
    still: Fraction = 0.05

    _ordered = field_validator("moves")(ranges_are_ordered)


class Motion(MagneticResonance[MotionSettings]):
    """K-space composed of segments that were read in different rigid poses (Shaw et al., 2019).

    The segment with the centre of k-space keeps the pose of the label, so that the anatomy stays where the label says.
    TorchIO intends the same, but there a movement just after the centre takes the central line with it, one beside the
    centre takes half of the anatomy, and turns are about the scanner's origin. Here no movement falls into the central
    part `still`, and turns are about the centre of the view. Shaw et al. let the patient wander from pose to pose; here
    each pose is drawn about the label's, as in TorchIO. Turn and shift are made by one linear interpolation, beyond the
    border with its nearest voxel. A single slice moves within its plane.
    """

    name: ClassVar[str] = "motion"
    settings_class = MotionSettings
    neutral: ClassVar[tuple[str, float]] = ("pose", 0.0)

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw `axis` (B, C), `pose` (B, C, M, 6) and `time` (B, C, M).

        A pose is three angles in degrees about, and three shifts in mm along (z, y, x). A movement's time is the part
        of k-space, from one end to the other, that was read before it; the pose is held until then where that lies
        before the centre, and from then where it lies behind. With `still` (B, C) and, from the facts, the `matrix`
        (B, C, M, D, D + 1) from a voxel to where its content comes from.
        """
        channels, dimensions, most = facts.channels, len(facts.size), self.largest("moves")
        encoded = encoded_axes(facts)
        moves = self.whole(facts, rng, "moves")
        happens = (torch.arange(most) < moves[:, :, None]) & encoded.any(dim=1)[:, None, None]
        degrees = self.per_sample(facts, lambda settings: settings.degrees)
        mm = self.per_sample(facts, lambda settings: settings.mm)
        reach = torch.stack([degrees, mm], dim=1).repeat_interleave(3, dim=1) * _possible_motion(facts.size)
        pose = reach[:, None, None] * rng.uniform(-1, 1, (channels, most, 6)) * happens[..., None]
        still = self.per_sample(facts, lambda settings: settings.still, missing=1.0)[:, None].repeat(1, channels)
        time = rng.uniform(0, 1, (channels, most)) * (1 - still[..., None])
        time = torch.where(time < (1 - still[..., None]) / 2, time, time + still[..., None])
        # At least one line is read before and after each movement; one that does not happen does so after the end.
        axis = one_of(encoded, rng.uniform(0, 1, (channels,)))
        edge = torch.tensor(facts.size)[axis][..., None]
        time = torch.where(happens, time.clamp(1 / edge, 1 - 1.5 / edge), 1.0).sort(dim=2).values
        spacing = facts.spacing_mm[:, None, None].expand(-1, channels, most, -1)
        matrix = _pose_to_map(pose.reshape(-1, 6), spacing.reshape(-1, 3), facts.size)
        return {
            "axis": axis,
            "pose": pose,
            "time": time,
            "still": still,
            "matrix": matrix.reshape(len(facts), channels, most, dimensions, dimensions + 1),
        }

    def change_one(self, channel: Tensor, values: Parameters) -> Tensor:
        """Exchange segments of k-space for those of the moved image."""
        axis = int(values["axis"])
        edge = channel.shape[axis]
        line = 0.5 + _frequencies(edge).double() / edge
        moving = ~_central(edge, float(values["still"]))
        time = [0.0, *values["time"].tolist(), 1.0]
        result = channel.clone()
        for number, (pose, matrix) in enumerate(zip(values["pose"], values["matrix"], strict=True)):
            before, at, after = time[number : number + 3]
            start, stop = (before, at) if at < 0.5 else (at, after)
            segment = moving & (line >= start) & (line < stop)
            if bool((pose != 0).any()) and bool(segment.any()):
                moved = resample(channel[None, None], matrix[None], channel.shape)[0, 0]
                add_lines(result, moved.sub_(channel), axis, segment.double())
        return result


class SpikeSettings(PerChannel):
    """Electric discharges while k-space is read.

    Args:
        count: Range of the number of spikes.
        intensity: Range of the height of a spike, relative to the centre of k-space, its largest value.
        closest: Smallest distance from the centre as part of the Nyquist frequency; closer ones look like a bias field.
    """

    count: tuple[Annotated[int, Field(ge=1, le=16)], Annotated[int, Field(ge=1, le=16)]] = (1, 3)
    intensity: tuple[Annotated[float, Field(ge=0, le=10)], Annotated[float, Field(ge=0, le=10)]] = (0.05, 0.2)
    closest: Fraction = 0.1

    _ordered = field_validator("count", "intensity")(ranges_are_ordered)


class Spike(MagneticResonance[SpikeSettings]):
    """Stripes across the image, each from one point of k-space that is too high.

    The centre of k-space is the sum of the signal, measured from air; TorchIO takes the largest value of a spectrum
    whose centre normalisation may have made zero. A spike there has always the phase zero, here it is drawn. TorchIO's
    heights of 1 to 3 make stripes stronger than the tissue. Where slices are read one by one, see `encoded_axes`, a
    spike hits one of them.
    """

    name: ClassVar[str] = "spike"
    settings_class = SpikeSettings
    neutral: ClassVar[tuple[str, float]] = ("intensity", 0.0)

    def values(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw for each of S spikes the `intensity` and `phase` (B, C, S), `frequency` and `slice` (B, C, S, D).

        The frequency is in periods per edge; along axes that are not read in k-space it is zero, and `slice` is the
        number of the slice that is hit; elsewhere that is -1. With `air` (B, C) from the facts.
        """
        edges = torch.tensor(facts.size)
        shape = (facts.channels, self.largest("count"))
        encoded = encoded_axes(facts)[:, None, None]
        closest = self.per_sample(facts, lambda settings: settings.closest).reshape(-1, 1, 1, 1)
        place = rng.uniform(-1, 1, (*shape, len(edges))) * encoded
        distance = place.abs().amax(dim=3, keepdim=True).clamp(min=1e-6)
        place = place / distance * (closest + (1 - closest) * distance)
        frequency = torch.round(place * edges / 2).long()
        present = torch.arange(shape[1]) < self.whole(facts, rng, "count")[:, :, None]
        intensity = self.uniform(facts, rng, "intensity", shape)
        hit = torch.floor(rng.uniform(0, 1, (*shape, len(edges))) * edges).long()
        return {
            "intensity": torch.where(present & (frequency != 0).any(dim=3), intensity, 0.0),
            "phase": rng.uniform(0, 2 * math.pi, shape),
            "frequency": frequency,
            "slice": torch.where(encoded | (edges == 1), -1, hit),
            "air": air_of(facts),
        }

    def change_one(self, channel: Tensor, values: Parameters) -> Tensor:
        """Add the plane waves."""
        signal = channel.mean() - zero_of_signal(channel, values["air"])
        for number, intensity in enumerate(values["intensity"].tolist()):
            if intensity == 0:
                continue
            vectors = [
                _wave(*axis)
                for axis in zip(
                    channel.shape, values["frequency"][number].tolist(), values["slice"][number].tolist(), strict=True
                )
            ]
            first = vectors[0] * torch.polar(values["intensity"][number].double(), values["phase"][number].double())
            rest = vectors[1] if len(vectors) == 2 else vectors[1][:, None] * vectors[2]
            first = to_device(torch.view_as_real(first), channel.device, channel.dtype) * signal
            rest = to_device(torch.view_as_real(rest), channel.device, channel.dtype)
            first = first.reshape(-1, *([1] * (channel.ndim - 1)), 2)
            channel.addcmul_(first[..., 0], rest[..., 0]).addcmul_(first[..., 1], rest[..., 1], value=-1)
        return channel


def add_lines(image: Tensor, source: Tensor, axis: int, weights: Tensor) -> Tensor:
    """Add lines of one image's k-space to another image in place, and take the real part.

    Args:
        image: Changed in place. Shape: (Z, Y, X) or (Y, X).
        source: Image whose lines are added; same shape, may be the same image.
        axis: Axis along which lines are counted.
        weights: Of the lines, in the order of `torch.fft.fftfreq`. Shape: (edge,), float64, on the CPU.

    Returns:
        The given image.
    """
    if not bool(weights.any()):
        return image
    edge = len(weights)
    # The real part of the result has the mean of the weights of a frequency and of its negative.
    symmetric = (weights + weights.flip(0).roll(1)) / 2
    kernel = torch.fft.irfft(symmetric[: edge // 2 + 1].to(torch.complex128), n=edge)
    index = torch.arange(edge)
    matrix = to_device(kernel[(index[:, None] - index) % edge], image.device, image.dtype)
    # In the training's half precision a spectrum would be noise.
    with torch.autocast(image.device.type, enabled=False):
        if axis == image.ndim - 1:
            added = source.reshape(-1, edge) @ matrix
        else:
            added = matrix @ source.reshape(math.prod(source.shape[:axis]), edge, -1)
    return image.add_(added.reshape(image.shape))


def _frequencies(edge: int) -> Tensor:
    """Return whole frequencies in the order of `torch.fft.fftfreq`. Shape: (edge,), int64."""
    return torch.fft.fftfreq(edge, 1 / edge, dtype=torch.float64).round().long()


def _central(edge: int, part: float) -> Tensor:
    """Tell which frequencies lie in the central part of k-space; zero always does. Shape: (edge,), bool."""
    return _frequencies(edge).abs() <= part * edge / 2


def _possible_motion(size: Sequence[int]) -> Tensor:
    """Tell which of three turns and three shifts stay within the axes that have several voxels. Shape: (6,), bool."""
    several = [edge > 1 for edge in (*[1] * (3 - len(size)), *size)]
    turns = [all(several[:axis] + several[axis + 1 :]) for axis in range(3)]
    return torch.tensor(turns + several)


def _pose_to_map(pose: Tensor, spacing_mm: Tensor, size: Sequence[int]) -> Tensor:
    """Return the map of a rigid motion about the centre of the view, from voxel to voxel.

    Args:
        pose: Angles in degrees and shifts in mm. Shape: (N, 6).
        spacing_mm: Shape: (N, 3).
        size: Size of the view, 2 or 3 numbers.

    Returns:
        Shape: (N, D, D + 1), float64.
    """
    spacing = spacing_mm.double()
    linear = rotation_matrices(pose[:, :3]) * spacing[:, None] / spacing[:, :, None]
    centre = (torch.tensor((*[1] * (3 - len(size)), *size), dtype=torch.float64) - 1) / 2
    position = centre + pose[:, 3:].double() / spacing - linear @ centre
    matrix = torch.cat([linear, position[:, :, None]], dim=2)
    return matrix[:, 3 - len(size) :, 3 - len(size) :]


def _wave(edge: int, frequency: int, only: int) -> Tensor:
    """Return a complex wave along an axis, or the indicator of one slice. Shape: (edge,), complex128."""
    if only >= 0:
        return (torch.arange(edge) == only).to(torch.complex128)
    # Reduced before it becomes an angle, which keeps the sum over the axis zero to rounding.
    angle = (torch.arange(edge) * frequency % edge).double() * (2 * math.pi / edge)
    return torch.polar(torch.ones(edge, dtype=torch.float64), angle)
