"""S3D: a masked autoencoder whose encoder never touches hidden voxels.

Tian et al., SparK, ICLR 2023, on a U-Net as in Wald et al., CVPR 2025 (arXiv 2410.23132). The encoder computes on
visible voxels only, see `medssl.networks.sparse`. Before the decoder every stage is made dense: its features are
normalised over visible positions, hidden positions are filled with a learned token, and a convolution spreads them;
the coarsest stage has none, as in SparK. The decoder with its skips restores the crop, and the error counts on hidden
voxels inside the volume. Encoder and decoder transfer; what makes dense is thrown away.

Deviations: the mask's blocks may be smaller than a cell of the bottleneck (SparK's are that cell), since a tenth of a
3D patch is; `medssl.networks.sparse` says what becomes of cells that are partly hidden.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.augmentation.policy import Policy
from medssl.data.batch import View, Views
from medssl.networks.sparse import SparseEncoder, sparse_instance_norm
from medssl.pretraining.masked import MaskedRestoration, MaskedSettings


class S3DSettings(MaskedSettings):
    """Settings of S3D; hidden voxels are never seen, so that nothing fills them.

    Args:
        mask: Which blocks are hidden.
        error: How the error of a voxel counts.
    """


class Densify(nn.Module):
    """Makes the features of one stage dense for the decoder: normalise, fill with a token, convolve.

    Args:
        width: Channels of the stage.
        dimensions: 2 or 3.
        convolve: Whether a convolution follows; without one features and tokens pass as they are.
    """

    def __init__(self, width: int, dimensions: int, *, convolve: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.token = nn.Parameter(torch.empty(width))
        nn.init.trunc_normal_(self.token, std=0.02)
        kind = nn.Conv2d if dimensions == 2 else nn.Conv3d
        self.convolution = kind(width, width, kernel_size=3, padding=1) if convolve else nn.Identity()

    def forward(self, features: Tensor, visible: Tensor) -> Tensor:
        """Return dense features of the same shape.

        Args:
            features: Zero at hidden positions. Shape: (B, C, *spatial).
            visible: Shape: (B, 1, *spatial), bool.
        """
        normed = sparse_instance_norm(features, visible, self.weight, self.bias)
        token = self.token.view(1, -1, *(1,) * (features.ndim - 2)).to(normed.dtype)
        dense: Tensor = self.convolution(torch.where(visible, normed, token))
        return dense


class S3D(MaskedRestoration):
    """Hides blocks of the crop from the encoder altogether and restores them with the whole U-Net.

    Args:
        network: U-Net with as many output as input channels, with instance normalisation, without deep supervision.
        policy: Augmentation for reconstruction.
        settings: What is hidden, and how the error counts.

    Raises:
        UsageError: If the encoder holds a layer that cannot be kept from hidden voxels.
    """

    trains_decoder: ClassVar[bool] = True

    def __init__(self, network: nn.Module, policy: Policy, settings: S3DSettings) -> None:
        super().__init__(network, policy, settings)
        self.sparse_encoder = SparseEncoder(network)
        last = len(self.encoder.widths) - 1
        dimensions = len(self.encoder.strides[0])
        self.densify = nn.ModuleList(
            Densify(width, dimensions, convolve=stage < last) for stage, width in enumerate(self.encoder.widths)
        )

    def features(self, view: View) -> list[Tensor]:
        """Return the encoder's features of the visible voxels, fine to coarse; zero where nothing is visible."""
        found: list[Tensor] = self.sparse_encoder(view.image, ~self._hidden(view))
        return found

    def restore(self, view: View) -> Tensor:
        """Return the U-Net's image of the visible voxels of a view. Shape: (B, C, *spatial)."""
        masks = self.sparse_encoder.visible_stages(~self._hidden(view))
        stages = zip(self.densify, self.features(view), masks, strict=True)
        restored: Tensor = self.network.decoder(  # type: ignore[operator]
            [densify(features, visible) for densify, features, visible in stages]
        )
        return restored

    def health(self, views: Views) -> dict[str, float]:
        """Return the figures of every masked method, and two that must be 0.

        `leak` is the largest change of a feature, at any stage, when the hidden voxels are changed. `hidden_feature`
        is the largest feature of a cell whose voxels are all hidden: above 0, features spread under the mask.
        """
        (view,) = views
        hidden = self._hidden(view)
        spoilt = dataclasses.replace(view, image=torch.where(hidden, 1 - 3 * view.image, view.image))
        features = self.features(view)
        pairs = zip(features, self.features(spoilt), strict=True)
        leak = torch.stack([(first - second).abs().amax().float() for first, second in pairs]).amax()
        pool = F.max_pool2d if hidden.ndim == 4 else F.max_pool3d
        under = [
            torch.where(pool((~hidden).float(), stride) > 0, 0.0, stage.float()).abs().amax()
            for stage, stride in zip(features, self.encoder.strides, strict=True)
        ]
        return super().health(views) | {"leak": float(leak), "hidden_feature": float(torch.stack(under).amax())}
