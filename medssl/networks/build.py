"""U-Nets by name or architecture, through dynamic-network-architectures, so that weights bear nnU-Net's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from medssl.errors import CheckpointError
from medssl.networks.architecture import PLAIN, RESIDUAL, Architecture, architecture

# A checkpoint of a stranger names the classes it is built from; only these are looked up, never an import by its text.
_CODE: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        nn.Conv2d,
        nn.Conv3d,
        nn.InstanceNorm2d,
        nn.InstanceNorm3d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.Dropout2d,
        nn.Dropout3d,
        nn.LeakyReLU,
        nn.ReLU,
        nn.GELU,
        nn.SiLU,
        nn.ELU,
    )
}


def build_network(
    name: str,
    *,
    dimensions: int,
    in_channels: int = 1,
    out_channels: int = 1,
    deep_supervision: bool = False,
    strides: Sequence[Sequence[int]] | None = None,
    kernel_sizes: Sequence[Sequence[int]] | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Build a U-Net with He's initialisation, as nnU-Net does.

    Args:
        name: A key of `medssl.registry.NETWORKS`.
        dimensions: 2 or 3.
        in_channels: Channels of the input.
        out_channels: Channels of the output: classes, or the image's channels for a reconstruction.
        deep_supervision: Return an output per decoder stage, fine to coarse. The weights' names stay the same.
        strides: Stride per stage and axis, for anisotropic voxels.
        kernel_sizes: Kernel per stage and axis.
        seed: Draw the weights from this seed and leave torch's own generator as it was.

    Raises:
        UsageError: If there is no such network; near names are listed.
    """
    plan = architecture(name, dimensions, strides=strides, kernel_sizes=kernel_sizes)
    return build_from_architecture(plan, in_channels, out_channels, deep_supervision, seed=seed)


def build_from_architecture(
    plan: Architecture, in_channels: int, out_channels: int, deep_supervision: bool = False, *, seed: int | None = None
) -> nn.Module:
    """Build the U-Net that an architecture describes.

    Raises:
        CheckpointError: If it names a class other than nnU-Net's two U-Nets and the layers they are made of, or if
            its arguments do not build one.
    """
    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

    kinds = {RESIDUAL.rpartition(".")[2]: ResidualEncoderUNet, PLAIN.rpartition(".")[2]: PlainConvUNet}
    kind = kinds.get(plan.network_class_name.rpartition(".")[2])
    if kind is None:
        raise CheckpointError(
            f"The network class {plan.network_class_name} is not supported: medssl builds {' and '.join(kinds)}."
        )
    kwargs = {
        name: _code(value) if name in plan.kw_requires_import else value for name, value in plan.arch_kwargs.items()
    }
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            network = kind(
                input_channels=in_channels, num_classes=out_channels, deep_supervision=deep_supervision, **kwargs
            )
        except (TypeError, AssertionError, ValueError, IndexError) as error:
            raise CheckpointError(f"The architecture does not build a {kind.__name__}: {error}") from error
        network.apply(network.initialize)
    return network


def freeze_unused_outputs(network: nn.Module) -> None:
    """Take the gradient from the coarse output layers, which are not used without deep supervision.

    They stay in the network, since nnU-Net's weights name them; DDP would wait for their gradients.
    """
    for layer in network.decoder.seg_layers[:-1]:  # type: ignore[union-attr, index]
        layer.requires_grad_(False)


def freeze_decoder(network: nn.Module) -> None:
    """Take the gradient from the decoder, for methods that train the encoder alone."""
    for name in ("stages", "transpconvs", "seg_layers"):
        getattr(network.decoder, name).requires_grad_(False)


def count_parameters(network: nn.Module) -> int:
    """Return the number of weights, each counted once however many names it has."""
    return sum(parameter.numel() for parameter in network.parameters())


def _code(name: Any) -> type[nn.Module] | None:
    if name is None:
        return None
    kind = _CODE.get(str(name).rpartition(".")[2])
    if kind is None or not str(name).startswith("torch.nn."):
        raise CheckpointError(f"The layer {name} is not supported: medssl builds networks from {', '.join(_CODE)}.")
    return kind
