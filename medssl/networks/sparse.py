"""A U-Net's encoder that computes on visible voxels only (Tian et al., SparK, ICLR 2023; Wald et al., CVPR 2025).

Sparse convolution is emulated by masking: every convolution's output is set to zero where nothing is visible, and
instance normalisation takes its statistics over visible positions. The mask is an argument from the first call to the
last; nothing is kept between calls. The weights are those of the encoder that is given, under its names.

A feature grid coarser than the mask's blocks has cells that cover both visible and hidden voxels. Such a cell is
visible if any of its voxels is. Hidden voxels enter every convolution as zeros whatever the image holds there, so that
a mixed cell knows of the visible ones alone, and no feature at any stage depends on a hidden voxel. The stricter rule,
visible if all of its voxels are, would throw visible tissue away: with three quarters of the blocks hidden and eight
of them in a cell of the bottleneck, one cell in 65,000 would be left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD, StackedResidualBlocks
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU, StackedConvBlocks
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from medssl.errors import UsageError

_GROUPS = (
    nn.ModuleList, nn.Sequential, StackedConvBlocks, ConvDropoutNormReLU, StackedResidualBlocks, BasicBlockD,
    BottleneckD,
)  # fmt: skip
# Neighbours meet in these.
_SPATIAL = (_ConvNd, nn.AvgPool2d, nn.AvgPool3d)
# Voxel by voxel, and zero stays zero.
_POINTWISE = (_DropoutNd, nn.Identity, nn.LeakyReLU, nn.ReLU, nn.GELU, nn.SiLU, nn.ELU)


class SparseEncoder(nn.Module):
    """Runs a U-Net's encoder on visible voxels only, without owning its weights.

    With nothing hidden it computes what the encoder does. Average pooling on the way around a strided residual block
    is SparK's: the mean over all voxels of a cell, hidden ones being zero.

    Args:
        unet: A U-Net of dynamic-network-architectures, with instance normalisation.

    Raises:
        UsageError: If the encoder holds a layer of which it is not known how to compute on visible voxels only.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_encoder", unet.encoder)
        encoder: nn.Module = unet.encoder  # type: ignore[assignment]
        self.strides = [tuple(int(step) for step in stride) for stride in encoder.strides]  # type: ignore[union-attr]
        for name, module in encoder.named_modules():
            if name and not _is_known(module):
                raise UsageError(
                    f"The encoder's layer {name} is a {type(module).__name__}: hidden voxels can be kept out of "
                    "convolutions, average pooling, instance normalisation without running statistics, dropout and "
                    "activations that leave zero alone. Use a network of `medssl list networks`."
                )

    def visible_stages(self, visible: Tensor) -> list[Tensor]:
        """Return the mask at the resolution of each stage, fine to coarse.

        Args:
            visible: True where the image may be seen. Shape: (B, 1, *spatial), bool.

        Raises:
            ValueError: If the size is no multiple of the encoder's strides.
        """
        found: list[Tensor] = []
        for stride in self.strides:
            visible = any_visible(visible, stride)
            found.append(visible)
        return found

    def forward(self, image: Tensor, visible: Tensor) -> list[Tensor]:
        """Return the features of each stage, fine to coarse; zero where nothing is visible.

        Args:
            image: Input; what it holds at hidden voxels does not matter. Shape: (B, C, *spatial).
            visible: True where the image may be seen. Shape: (B, 1, *spatial), bool.

        Raises:
            ValueError: If the mask is not boolean or does not fit the image, or the size is no multiple of the
                encoder's strides.
        """
        if visible.dtype != torch.bool or visible.shape != (image.shape[0], 1, *image.shape[2:]):
            raise ValueError(
                f"The mask needs shape {(image.shape[0], 1, *image.shape[2:])} and bool, got {tuple(visible.shape)} "
                f"and {visible.dtype}"
            )
        encoder: nn.Module = self._encoder  # type: ignore[assignment]
        # Strides only make grids smaller: a grid's size tells which mask is its own.
        hidden = {tuple(mask.shape[2:]): ~mask for mask in (visible, *self.visible_stages(visible))}
        features = image.masked_fill(~visible, 0.0)
        stem = getattr(encoder, "stem", None)
        if stem is not None:
            features = _run(stem, features, hidden)
        found: list[Tensor] = []
        for stage in encoder.stages:  # type: ignore[union-attr]
            features = _run(stage, features, hidden)
            found.append(features)
        return found


def any_visible(visible: Tensor, stride: Sequence[int]) -> Tensor:
    """Return the mask on a coarser grid: a cell is visible if any of its voxels is.

    Args:
        visible: Shape: (B, 1, *spatial), bool.
        stride: Voxels to a cell, per axis.

    Raises:
        ValueError: If an edge is no multiple of the stride.
    """
    if all(step == 1 for step in stride):
        return visible
    size = visible.shape[2:]
    if len(size) != len(stride) or any(edge % step for edge, step in zip(size, stride, strict=True)):
        raise ValueError(f"A mask of {tuple(size)} has no cells of {tuple(stride)}: use a multiple along each axis")
    parts = [number for edge, step in zip(size, stride, strict=True) for number in (edge // step, step)]
    return visible.reshape(*visible.shape[:2], *parts).any(dim=tuple(range(3, 3 + 2 * len(size), 2)))


def sparse_instance_norm(
    features: Tensor, visible: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Normalise each sample and channel over its visible positions; the others become zero.

    Mean and variance (that of the population, as in torch's InstanceNorm) are computed in float32 or wider. A single
    visible position becomes the shift.

    Args:
        features: Shape: (B, C, *spatial).
        visible: Shape: (B, 1, *spatial), bool.
        weight: Scale. Shape: (C,).
        bias: Shift. Shape: (C,).
        eps: Added to the variance.

    Returns:
        Shape and dtype of `features`.
    """
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    axes, shape = tuple(range(2, features.ndim)), (1, -1, *(1,) * (features.ndim - 2))
    hidden = ~visible
    count = visible.sum(dim=axes, keepdim=True).clamp(min=1)
    # What stands at hidden positions is replaced and not multiplied by zero: it may be NaN.
    mean = wide.masked_fill(hidden, 0.0).sum(dim=axes, keepdim=True) / count
    centred = (wide - mean).masked_fill(hidden, 0.0)
    scale = torch.rsqrt(centred.square().sum(dim=axes, keepdim=True) / count + eps)
    if weight is not None:
        scale = scale * weight.view(shape)
    normed = centred * scale
    if bias is not None:
        normed = (normed + bias.view(shape)).masked_fill(hidden, 0.0)
    return normed.to(features.dtype)


def _run(module: nn.Module, features: Tensor, hidden: Mapping[tuple[int, ...], Tensor]) -> Tensor:
    """Return the output of a part of the encoder, zero where nothing is visible.

    Args:
        module: One that `_is_known`.
        features: Zero at hidden positions.
        hidden: True where nothing is visible, by the size of the grid.
    """
    if isinstance(module, (BasicBlockD, BottleneckD)):
        around = _run(module.skip, features, hidden) if isinstance(module.skip, nn.Module) else features
        for name in ("conv1", "conv2", "conv3"):
            if hasattr(module, name):
                features = _run(getattr(module, name), features, hidden)
        return (module.nonlin2 if isinstance(module, BasicBlockD) else module.nonlin3)(features + around)
    if isinstance(module, (StackedResidualBlocks, StackedConvBlocks, ConvDropoutNormReLU, nn.Sequential)):
        for part in _parts(module):
            features = _run(part, features, hidden)
        return features
    if isinstance(module, _InstanceNorm):
        visible = ~hidden[tuple(features.shape[2:])]
        return sparse_instance_norm(features, visible, module.weight, module.bias, module.eps)
    features = module(features)
    return features.masked_fill(hidden[tuple(features.shape[2:])], 0.0) if isinstance(module, _SPATIAL) else features


def _parts(module: nn.Module) -> nn.Sequential:
    if isinstance(module, StackedResidualBlocks):
        return module.blocks
    if isinstance(module, StackedConvBlocks):
        return module.convs
    return module.all_modules if isinstance(module, ConvDropoutNormReLU) else module  # type: ignore[return-value]


def _is_known(module: nn.Module) -> bool:
    if isinstance(module, _InstanceNorm):
        return not module.track_running_stats
    return isinstance(module, (*_GROUPS, *_SPATIAL, *_POINTWISE))
