"""A U-Net's architecture read off the names and shapes of its weights, for checkpoints that do not describe it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from medssl.errors import CheckpointError
from medssl.networks.architecture import PLAIN, RESIDUAL, Architecture


def infer_architecture(weights: Mapping[str, Tensor], path: Path) -> Architecture:
    """Return the architecture whose weights have these names and shapes.

    Strides leave no trace in an encoder's weights. They are the kernels of the transposed convolutions where a decoder
    is there, and otherwise 2 from the second stage on, which is right for every network of nnssl.

    Args:
        weights: State dict with nnU-Net's names.
        path: The file, for messages.

    Raises:
        CheckpointError: If they are not the weights of a U-Net of nnU-Net.
    """
    stages = sorted({int(match.group(1)) for name in weights if (match := re.match(r"encoder\.stages\.(\d+)\.", name))})
    if stages != list(range(len(stages))) or len(stages) < 2:
        raise CheckpointError(
            f"{path} describes no network and its weights are not those of a U-Net of nnU-Net (encoder.stages.0, "
            f"encoder.stages.1, ...); it holds {', '.join(list(weights)[:4])} ..."
        )
    residual = any(".blocks." in name for name in weights)
    first = "blocks.0.conv1.conv" if residual else "0.convs.0.conv"
    shapes = [_shape(weights, f"encoder.stages.{stage}.{first}.weight", path) for stage in stages]
    dimensions = len(shapes[0]) - 2
    inside = "blocks" if residual else r"0\.convs"
    blocks = [_count(weights, rf"encoder\.stages\.{stage}\.{inside}\.(\d+)\.") for stage in stages]
    decoder = [_count(weights, rf"decoder\.stages\.{stage}\.convs\.(\d+)\.") or 1 for stage in range(len(stages) - 1)]
    bias = f"encoder.stages.0.{first}.bias" in weights
    kwargs: dict[str, Any] = {
        "n_stages": len(stages),
        "features_per_stage": [shape[0] for shape in shapes],
        "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
        "kernel_sizes": [list(shape[2:]) for shape in shapes],
        "strides": _strides(weights, len(stages), dimensions),
        ("n_blocks_per_stage" if residual else "n_conv_per_stage"): blocks,
        "n_conv_per_stage_decoder": decoder,
        "conv_bias": bias,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return Architecture(RESIDUAL if residual else PLAIN, kwargs)


def _shape(weights: Mapping[str, Tensor], name: str, path: Path) -> tuple[int, ...]:
    for found in (name, name.replace(".conv.weight", ".all_modules.0.weight")):
        if found in weights:
            return tuple(weights[found].shape)
    raise CheckpointError(
        f"{path} lacks {name}: it describes no network, and its weights are not those of a U-Net of nnU-Net."
    )


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    found = {int(match.group(1)) for name in weights if (match := re.match(pattern, name))}
    return max(found) + 1 if found else 0


def _strides(weights: Mapping[str, Tensor], stages: int, dimensions: int) -> list[list[int]]:
    strides = [[1] * dimensions]
    for stage in range(1, stages):
        # The decoder counts from the coarsest stage.
        kernel = weights.get(f"decoder.transpconvs.{stages - 1 - stage}.weight")
        strides.append(list(kernel.shape[2:]) if kernel is not None else [2] * dimensions)
    return strides
