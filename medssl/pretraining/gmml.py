"""GMML: spoil groups of connected voxels and restore them.

Atito et al., "GMML is All you Need", 2022, on a U-Net. Boxes that follow no grid are laid until a drawn part of the
crop is spoilt. In half of the samples noise takes their place, in the other half what another sample of the batch
shows there (alien patches). The input is degraded besides, the target is the crop before that. The whole U-Net restores
the crop, and the error counts on spoilt voxels inside the volume. Nothing tells the network which voxels are spoilt.
Encoder and decoder transfer.

A sample with alien patches depends on its batch mate by definition, see `medssl.pretraining.partners`.

Deviations: the target has no colour jitter of its own; noise has the moments of the sample's visible voxels, not those
of a standard normal distribution; a U-Net restores in one piece what the original restores from four layers of a
transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from medssl.augmentation.masking import group_mask
from medssl.augmentation.painting import fill
from medssl.augmentation.transform import to_device
from medssl.config import Settings
from medssl.data.batch import Batch, View, Views
from medssl.data.draw import Draw
from medssl.losses.reconstruction import Kind, masked_reconstruction
from medssl.pretraining.health import local_mean
from medssl.pretraining.partners import of_partners, partner_rows
from medssl.pretraining.restoration import Restoration, RestorationSettings, draw_of
from medssl.training.method import Needs

Fill = Literal["noise", "alien", "zero", "mean"]


class GroupMaskSettings(Settings):
    """Which voxels are spoilt, and what takes their place.

    Args:
        ratio: Range of the part that is spoilt, drawn per sample.
        side: Range of the boxes' edges as part of the crop's, drawn per box and axis.
        fill: What takes the voxels' place, drawn evenly per sample from those named: `noise` with mean and standard
            deviation of the sample's visible voxels, `alien` voxels of another sample of the batch, `zero`, or the
            `mean` of the visible voxels. A name that is given twice is drawn twice as often.
        alien_ratio: The range in place of `ratio` for alien patches. Above a half nothing tells which of the two
            images is the one to restore.
    """

    ratio: tuple[float, float] = (0.5, 0.75)
    side: tuple[float, float] = (0.05, 0.3)
    fill: tuple[Fill, ...] = Field(default=("noise", "alien"), min_length=1)
    alien_ratio: tuple[float, float] = (0.0, 0.3)

    @field_validator("ratio", "side", "alien_ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] <= value[1] <= 1 or value[1] == 0:
            raise ValueError(f"a range within 0 to 1, above 0 at its end, got {value}")
        return value


class GMMLSettings(RestorationSettings):
    """Settings of GMML.

    Args:
        mask: What is spoilt.
        error: How the error of a voxel counts.
    """

    mask: GroupMaskSettings = GroupMaskSettings()
    error: Kind = "l1"


class GMML(Restoration):
    """Restores groups of voxels that show noise or another sample, in a degraded crop.

    Args:
        network: U-Net with as many output as input channels, without deep supervision.
        policy: Augmentation for restoration: its views' target is the image before changes of intensity.
        settings: What is spoilt, and how the error counts.
    """

    needs: ClassVar[Needs] = Needs(views=1, policy="restoration", least_batch=2, least_volumes=2)
    settings: GMMLSettings

    @classmethod
    def needs_of(cls, settings: Settings) -> Needs:
        """Return what must be delivered: alien patches need a second sample, of another volume."""
        assert isinstance(settings, GMMLSettings)
        return cls.needs if "alien" in settings.mask.fill else Needs(views=1, policy=cls.needs.policy)

    @classmethod
    def misfit(cls, settings: Settings, patch_size: Sequence[int], shapes: Sequence[Sequence[int]]) -> str | None:
        """Return why a patch of this size cannot be covered by the boxes, or None."""
        assert isinstance(settings, GMMLSettings)
        mask = settings.mask
        try:
            group_mask(Draw(0, [0]), patch_size, mask.ratio, mask.side)
        except ValueError:
            return (
                f"mask.side {list(mask.side)}: such boxes are too small to cover a patch {list(patch_size)}. Raise it."
            )
        return None

    def spoil(self, view: View, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        """Put something else in the place of groups of voxels; see `Restoration.spoil`.

        Raises:
            ValueError: If alien patches are asked for and there is no other sample.
        """
        settings, image = self.settings.mask, view.image
        kind = draw.child("fill").integers(0, len(settings.fill))
        other = None
        if "alien" in settings.fill:
            other = of_partners(image, partner_rows(batch, draw.child("partner"), self.policy))
        result, mask = image.clone(memory_format=torch.contiguous_format), torch.zeros_like(view.inside)
        for number, how in enumerate(settings.fill):
            chosen = (kind == number).nonzero()[:, 0]
            if len(chosen) == 0:
                continue
            rows = to_device(chosen, image.device)
            ratio = settings.alien_ratio if how == "alien" else settings.ratio
            groups = group_mask(
                draw_of(draw.child("mask"), chosen), image.shape[2:], ratio, settings.side, image.device
            )
            part = image.index_select(0, rows)
            if how == "alien":
                assert other is not None
                instead = other.index_select(0, rows)
            else:
                # What lies outside the volume tells nothing about its mean.
                unknown = groups | ~view.inside.index_select(0, rows)
                instead = fill(part, unknown, how, draw_of(draw.child("noise"), chosen))
            mask.index_copy_(0, rows, groups)
            result.index_copy_(0, rows, torch.where(groups, instead, part))
        return result, mask

    def counted(self, view: View) -> Tensor:
        """Return where the error counts: on spoilt voxels inside the volume. Shape: (B, 1, *spatial), bool."""
        return self.hidden(view) & view.inside

    def health(self, views: Views) -> dict[str, float]:
        """Return the figures of every restoring method, and `error_to_neighbours`.

        It is the squared error relative to filling in the mean of the visible voxels within a box's largest edge.
        """
        (view,) = views
        target, where = self.target(view), self.counted(view)
        reach = max(1, int(self.settings.mask.side[1] * max(target.shape[2:])))
        near = local_mean(target, view.inside & ~self.hidden(view), reach)
        error = masked_reconstruction(self.restore(view), target, where)
        to_neighbours = error / masked_reconstruction(near, target, where).clamp(min=1e-12)
        return super().health(views) | {"error_to_neighbours": float(to_neighbours)}
