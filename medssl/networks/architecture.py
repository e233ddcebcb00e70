"""A network as data: the class, its arguments as JSON, and which of them name code. nnU-Net's plans hold the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medssl import registry
from medssl.errors import UsageError

RESIDUAL = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
PLAIN = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
NAMES_OF_CODE = ("conv_op", "norm_op", "dropout_op", "nonlin")


@dataclass(frozen=True)
class Architecture:
    """What it takes to build a U-Net again.

    Args:
        network_class_name: Dotted name of the class.
        arch_kwargs: Its arguments but for the channels and deep supervision; classes stand as dotted names.
        kw_requires_import: The arguments that are dotted names.
    """

    network_class_name: str
    arch_kwargs: dict[str, Any]
    kw_requires_import: tuple[str, ...] = field(default=NAMES_OF_CODE)

    @property
    def dimensions(self) -> int:
        """2 or 3."""
        return 2 if str(self.arch_kwargs["conv_op"]).endswith("Conv2d") else 3

    @property
    def total_stride(self) -> tuple[int, ...]:
        """Factor per axis between the input's grid and the coarsest one."""
        total = [1] * self.dimensions
        for stride in self.arch_kwargs["strides"]:
            steps = [stride] * self.dimensions if isinstance(stride, int) else stride
            total = [done * step for done, step in zip(total, steps, strict=True)]
        return tuple(total)

    @property
    def is_resenc_l(self) -> bool:
        """Whether this is exactly nnssl's ResEnc-L, so that its name alone rebuilds it."""
        return self == architecture("resenc-l", 3)

    def check_patch(self, patch_size: Sequence[int]) -> None:
        """Refuse a patch that the decoder could not put together again.

        Raises:
            UsageError: If an edge is not a multiple of the total stride, naming sizes that are, or if the coarsest
                grid would be a single voxel, which instance normalisation cannot normalise.
        """
        if len(patch_size) != self.dimensions:
            raise UsageError(
                f"patch_size {list(patch_size)} has {len(patch_size)} axes, the network has {self.dimensions}: "
                "give one edge per axis."
            )
        strides = self.total_stride
        if any(edge < 1 or edge % stride for edge, stride in zip(patch_size, strides, strict=True)):
            fits = [max(round(edge / stride), 1) * stride for edge, stride in zip(patch_size, strides, strict=True)]
            raise UsageError(
                f"patch_size {list(patch_size)} does not fit the network: it needs multiples of {list(strides)}. "
                f"The nearest is {fits}."
            )
        if all(edge == stride for edge, stride in zip(patch_size, strides, strict=True)):
            raise UsageError(
                f"patch_size {list(patch_size)} leaves one voxel at the coarsest stage, which cannot be normalised: "
                f"use at least {[2 * stride for stride in strides]} along one axis, or a network with fewer stages."
            )

    def to_json(self) -> dict[str, Any]:
        """Return the architecture under the names of nnU-Net's plans."""
        return {
            "network_class_name": self.network_class_name,
            "arch_kwargs": dict(self.arch_kwargs),
            "_kw_requires_import": list(self.kw_requires_import),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Architecture:
        """Read what `to_json`, a plans file of nnU-Net, or a checkpoint of ours holds."""
        names = values.get("_kw_requires_import", values.get("kw_requires_import", NAMES_OF_CODE))
        return cls(str(values["network_class_name"]), dict(values["arch_kwargs"]), tuple(names))


def architecture(
    name: str,
    dimensions: int,
    *,
    strides: Sequence[Sequence[int]] | None = None,
    kernel_sizes: Sequence[Sequence[int]] | None = None,
) -> Architecture:
    """Return the architecture of a network's name.

    Args:
        name: A key of `medssl.registry.NETWORKS`.
        dimensions: 2 or 3.
        strides: Stride per stage and axis, for anisotropic voxels; by default 1, then 2 everywhere.
        kernel_sizes: Kernel per stage and axis; by default 3 everywhere.

    Raises:
        UsageError: If there is no such network, or if strides or kernels do not fit its stages and axes.
    """
    entry = registry.network(name)
    if dimensions not in (2, 3):
        raise UsageError(f"A network has 2 or 3 dimensions, not {dimensions}.")
    stages = len(entry.features)
    per_stage = "n_blocks_per_stage" if entry.family == "residual" else "n_conv_per_stage"
    kwargs = {
        "n_stages": stages,
        "features_per_stage": list(entry.features),
        "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
        "kernel_sizes": _per_axis("kernel_sizes", kernel_sizes, name, stages, dimensions, [3] * stages),
        "strides": _per_axis("strides", strides, name, stages, dimensions, [1] + [2] * (stages - 1)),
        per_stage: list(entry.blocks),
        "n_conv_per_stage_decoder": [entry.decoder_convolutions] * (stages - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return Architecture(RESIDUAL if entry.family == "residual" else PLAIN, kwargs)


def _per_axis(
    what: str, given: Sequence[Sequence[int]] | None, name: str, stages: int, dimensions: int, default: list[int]
) -> list[list[int]]:
    if given is None:
        return [[value] * dimensions for value in default]
    values = [[int(value) for value in stage] for stage in given]
    if len(values) != stages or any(len(stage) != dimensions for stage in values):
        raise UsageError(f"{what} of {name} needs {stages} stages of {dimensions} numbers, got {values}.")
    if any(value < 1 for stage in values for value in stage):
        raise UsageError(f"{what} of {name} must be positive, got {values}.")
    return values
