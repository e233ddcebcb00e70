"""Models Genesis: spoil texture, intensities and whole regions of the crop and restore it.

Zhou et al., MICCAI 2019 and Medical Image Analysis 2021. Each sample draws which of three things is done to its input:
voxels are shuffled inside small windows, intensities pass a rising Bezier curve, and a few boxes inside (in-painting)
or all but a few boxes (out-painting) are replaced by noise. The whole U-Net restores the crop; the error counts on all
voxels inside the volume. Encoder and decoder transfer.

Deviations:
- The curve acts between two percentiles of each sample and channel, and goes on in a straight line beyond them: no
  voxel is cut off. The result has the mean and standard deviation that the image had. On a z-scored image, where peers
  apply the curve to [0, 1] as it is, two thirds of the voxels fall on a bound.
- Curves only rise. The original inverts half of them, which no scanner does.
- Shuffled windows do not overlap, see `medssl.augmentation.painting.local_shuffle`.
- Noise follows the range of the sample's own visible voxels.
- Flips are geometry and up to the policy, which knows about left and right; the output has no sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor

from medssl.augmentation.curves import Bezier, BezierSettings
from medssl.augmentation.painting import fill, in_painting, local_shuffle, out_painting, visible_moments
from medssl.augmentation.transform import Facts, Parameters, broadcast, to_device
from medssl.config import Settings
from medssl.data.batch import Batch, View, Views
from medssl.data.draw import Draw
from medssl.pretraining.restoration import Restoration, RestorationSettings, draw_of
from medssl.training.method import Needs

# Voxels that percentiles are taken of, spread evenly over the crop. A prime: their distance is then no whole number of
# voxels, and they do not fall on the same columns again and again.
PERCENTILE_VOXELS = 65_521
# The curve is the same in every modality: a name for all of them.
ANY = "any"


class ShuffleSettings(Settings):
    """Shuffled windows.

    Args:
        probability: How often a sample is shuffled.
        side: Largest edge of a window as part of the crop's; None takes a tenth, or on small crops two voxels.
        fraction: Part of the windows that is shuffled.
    """

    probability: float = Field(default=0.5, ge=0, le=1)
    side: float | None = Field(default=None, gt=0, le=1)
    fraction: float = Field(default=0.85, ge=0, le=1)


class CurveSettings(Settings):
    """Rising Bezier curve of the intensities, drawn for each sample and channel.

    Args:
        probability: How often a sample's intensities pass a curve.
        percentiles: What becomes 0 and 1 of the curve, in per cent of the voxels inside the volume.
    """

    probability: float = Field(default=0.9, ge=0, le=1)
    percentiles: tuple[float, float] = (0.5, 99.5)

    @field_validator("percentiles")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 100:
            raise ValueError(f"percentiles are an ordered range in [0, 100], got {value}")
        return value


class PaintSettings(Settings):
    """Regions that are painted over.

    Args:
        probability: How often a sample is painted.
        outer: How often a painted sample loses all but a few boxes, in place of a few boxes inside.
        fill: What is painted: `uniform` from the smallest to the largest visible value, `noise` with their mean and
            standard deviation, their `mean`, or `zero`.
    """

    probability: float = Field(default=0.9, ge=0, le=1)
    outer: float = Field(default=0.8, ge=0, le=1)
    fill: Literal["uniform", "noise", "mean", "zero"] = "uniform"


class GenesisSettings(RestorationSettings):
    """Settings of Models Genesis.

    Args:
        shuffle: How windows are shuffled.
        curve: How intensities are changed.
        paint: What is painted over.
        error: How the error of a voxel counts.
    """

    shuffle: ShuffleSettings = ShuffleSettings()
    curve: CurveSettings = CurveSettings()
    paint: PaintSettings = PaintSettings()

    def resolved(self, patch_size: Sequence[int]) -> Self:
        """Return the settings with the window that the patch size asks for where none is given."""
        if self.shuffle.side is not None:
            return self
        side = min(max(0.1, 2 / max(patch_size)), 1.0)
        return self.model_copy(update={"shuffle": self.shuffle.model_copy(update={"side": side})})


class Genesis(Restoration):
    """Restores a crop whose voxels are shuffled, bent in intensity and painted over.

    Args:
        network: U-Net with as many output as input channels, without deep supervision.
        policy: Augmentation for reconstruction.
        settings: What is done to the input, and how the error counts.
    """

    needs: ClassVar[Needs] = Needs(views=1, policy="reconstruction")
    settings: GenesisSettings

    @classmethod
    def misfit(cls, settings: Settings, patch_size: Sequence[int], shapes: Sequence[Sequence[int]]) -> str | None:
        """Return why windows cannot be shuffled in patches of this size, or None."""
        assert isinstance(settings, GenesisSettings)
        shuffle = settings.resolved(patch_size).shuffle
        assert shuffle.side is not None
        if shuffle.probability > 0 and int(shuffle.side * max(patch_size) + 1e-6) < 2:
            least = math.ceil(2000 / max(patch_size)) / 1000
            return (
                f"shuffle.side {shuffle.side:g}: windows of a patch {list(patch_size)} have one voxel, which cannot be "
                f"shuffled. Raise it to {least:g} or more, or set shuffle.probability=0."
            )
        return None

    def spoil(self, view: View, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        """Shuffle, bend and paint; see `Restoration.spoil`."""
        image = self._shuffled(view.image, draw.child("shuffle"))
        image = self._bent(image, view, batch, draw.child("curve"))
        return self._painted(image, view.inside, draw.child("paint"))

    def health(self, views: Views) -> dict[str, float]:
        """Return the figures of every restoring method, and whether intensities are cut off.

        `cut_off` is the part of the voxels, inside the volume and not painted, that have the smallest or the largest
        value of the input, beyond the part that has that of the target. Near 0, unless curves flatten the image.
        """
        (view,) = views
        seen = view.inside & ~self.hidden(view)
        more = _at_ends(view.image, seen) - _at_ends(self.target(view), seen)
        return super().health(views) | {"cut_off": float(more.clamp(min=0))}

    def _shuffled(self, image: Tensor, draw: Draw) -> Tensor:
        settings = self.settings.resolved(image.shape[2:]).shuffle
        assert settings.side is not None
        chosen = draw.happens(settings.probability).nonzero()[:, 0]
        if len(chosen) == 0:
            return image
        rows = to_device(chosen, image.device)
        part = local_shuffle(
            image.index_select(0, rows), draw_of(draw.child("windows"), chosen),
            side=settings.side, fraction=settings.fraction,
        )  # fmt: skip
        return image.index_copy(0, rows, part)

    def _bent(self, image: Tensor, view: View, batch: Batch, draw: Draw) -> Tensor:
        settings = self.settings.curve
        bezier = Bezier({ANY: BezierSettings(probability=settings.probability)})
        drawn = bezier.draw(Facts.of(batch, (ANY,) * len(batch), tuple(image.shape[2:])), draw)
        return bent(image, view.inside, bezier, drawn, settings.percentiles)

    def _painted(self, image: Tensor, inside: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        settings, size = self.settings.paint, image.shape[2:]
        happens = draw.child("happens").happens(settings.probability)
        outer = draw.child("outer").happens(settings.outer)
        each = (-1, *(1,) * (image.ndim - 1))
        inner_boxes, outer_boxes = in_painting(draw.child("in"), size), out_painting(draw.child("out"), size)
        painted = torch.where(outer.view(each), outer_boxes, inner_boxes) & happens.view(each)
        mask = to_device(painted, image.device)
        # What lies outside the volume tells nothing about its range.
        filled = fill(image, mask | ~inside, settings.fill, draw.child("fill"))
        return torch.where(mask, filled, image), mask


def bent(image: Tensor, inside: Tensor, bezier: Bezier, drawn: Parameters, percentiles: tuple[float, float]) -> Tensor:
    """Send intensities through a curve between two percentiles, and bring back mean and standard deviation.

    Beyond the percentiles the image goes on in a straight line from the curve's ends, which stay where they are:
    different values stay different, and their order stays.

    Args:
        image: Shape: (B, C, *spatial); not modified.
        inside: Voxels that percentiles and moments are taken of. Shape: (B, 1, *spatial), bool.
        bezier: The curve.
        drawn: What it drew for the batch; channels that are not active are left as they are.
        percentiles: In [0, 100].

    Returns:
        Shape: (B, C, *spatial).
    """
    low, high = _percentiles(image, inside, percentiles)
    between = image.clamp(low, high)
    result = bezier.apply(between, drawn).add_(image).sub_(between)
    mean, std = visible_moments(image, ~inside)
    mean_now, std_now = visible_moments(result, ~inside)
    result = (result - mean_now) * (std / std_now.clamp(min=1e-12)) + mean
    return torch.where(broadcast(drawn["active"], image), result, image)


def _percentiles(image: Tensor, inside: Tensor, percentiles: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return two percentiles of each channel inside the volume, 0 where nothing is. Each: (B, C, 1, ...)."""
    voxels = inside[0].numel()
    count = min(voxels, PERCENTILE_VOXELS)
    place = to_device(torch.arange(count) * voxels // count, image.device)
    chosen = image.flatten(2).index_select(2, place)
    chosen = torch.where(inside.flatten(2).index_select(2, place), chosen, float("nan"))
    each = (*image.shape[:2], *(1,) * (image.ndim - 2))
    low, high = (torch.nanquantile(chosen, percent / 100, dim=2).nan_to_num(0).view(each) for percent in percentiles)
    return low, high


def _at_ends(image: Tensor, seen: Tensor) -> Tensor:
    """Return the part of the seen voxels that have the smallest or the largest seen value of their channel."""
    axes = tuple(range(2, image.ndim))
    low = torch.where(seen, image, float("inf")).amin(dim=axes, keepdim=True)
    high = torch.where(seen, image, float("-inf")).amax(dim=axes, keepdim=True)
    return (((image == low) | (image == high)) & seen).sum() / (seen.sum() * image.shape[1]).clamp(min=1)
