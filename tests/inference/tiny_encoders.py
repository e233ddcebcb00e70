"""Checkpoints of encoders with a few hundred weights, for tests of everything that looks through one."""

from __future__ import annotations

from pathlib import Path

from medssl.networks.architecture import RESIDUAL, Architecture
from medssl.networks.build import build_from_architecture
from medssl.training.checkpoint import save_checkpoint


def tiny_architecture(dimensions: int = 3, features: tuple[int, ...] = (4, 6, 8)) -> Architecture:
    """Return a residual U-Net of three small stages."""
    stages = len(features)
    kwargs = {
        "n_stages": stages,
        "features_per_stage": list(features),
        "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
        "kernel_sizes": [[3] * dimensions] * stages,
        "strides": [[1] * dimensions] + [[2] * dimensions] * (stages - 1),
        "n_blocks_per_stage": [1] * stages,
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return Architecture(RESIDUAL, kwargs)


def write_encoder(
    path: Path, *, dimensions: int = 3, channels: int = 1, patch: tuple[int, ...] | None = None, seed: int = 7
) -> Path:
    """Write a checkpoint of a tiny U-Net with weights drawn from a seed and return its path."""
    plan = tiny_architecture(dimensions)
    network = build_from_architecture(plan, channels, 1, seed=seed)
    content = {
        "network_weights": network.state_dict(),
        "medssl": {
            "architecture": {**plan.to_json(), "in_channels": channels, "dimensions": dimensions},
            "patch_size": list(patch or (16,) * dimensions),
            "spacing_mm": [1.0, 1.0, 1.0],
            "method": "mae",
            "trains_decoder": False,
        },
    }
    save_checkpoint(path, content)
    return path
