"""Masked autoencoder on a U-Net: hide blocks of the crop and restore them.

He et al., CVPR 2022, in the convolutional form of Wald et al., CVPR 2025 (arXiv 2410.23132): the whole U-Net with its
skips restores the crop, and the error counts on hidden voxels only. Voxels outside the volume, which padding and
rotation bring in, do not count. Encoder and decoder transfer.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from medssl.augmentation.policy import Policy
from medssl.data.batch import View
from medssl.losses.reconstruction import masked_mean
from medssl.pretraining.masked import BlockSettings, MaskedRestoration, MaskedSettings


class MaskSettings(BlockSettings):
    """Which blocks are hidden, and what takes their place.

    Args:
        block: Edge of a hidden block in voxels, one number or one per axis; None takes about a tenth of the patch
            (16 on 160, as nnssl).
        ratio: Part of the blocks that is hidden, the same number of blocks in every sample.
        fill: What hidden voxels are replaced by: a learned `token` per channel, `zero`, or the `mean` of the sample's
            visible voxels. After z-score zero is the mean; after a CT window it is a tissue of its own.
    """

    fill: Literal["token", "zero", "mean"] = "token"


class MaskedAutoencoderSettings(MaskedSettings):
    """Settings of the masked autoencoder.

    Args:
        mask: What is hidden.
        error: How the error of a voxel counts.
    """

    mask: MaskSettings = MaskSettings()


class MaskedAutoencoder(MaskedRestoration):
    """Hides blocks of the crop and restores them with the whole U-Net.

    Args:
        network: U-Net with as many output as input channels, without deep supervision.
        policy: Augmentation for reconstruction.
        settings: What is hidden, and how the error counts.
    """

    trains_decoder: ClassVar[bool] = True
    settings: MaskedAutoencoderSettings

    def __init__(self, network: nn.Module, policy: Policy, settings: MaskedAutoencoderSettings) -> None:
        super().__init__(network, policy, settings)
        self.token = nn.Parameter(torch.zeros(self.encoder.in_channels)) if settings.mask.fill == "token" else None

    def restore(self, view: View) -> Tensor:
        """Return the U-Net's image of a view with blanked voxels. Shape: (B, C, *spatial)."""
        return self.network(self.blank(view))

    def blank(self, view: View) -> Tensor:
        """Return the input with hidden voxels replaced. Shape: (B, C, *spatial)."""
        hidden = self._hidden(view)
        shape = (1, -1, *(1,) * (view.image.ndim - 2))
        if self.token is not None:
            return torch.where(hidden, self.token.view(shape).to(view.image.dtype), view.image)
        if self.settings.mask.fill == "mean":
            return torch.where(hidden, masked_mean(view.image, view.inside & ~hidden).to(view.image.dtype), view.image)
        return view.image.masked_fill(hidden, 0.0)
