"""A head that embeds points: features of several stages at a point, side by side, through a perceptron.

As vox2vec's (Goncharov et al., MICCAI 2023) without a decoder of its own. It can be saved and built again from its
weights alone, so that `medssl match` needs nothing but the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.augmentation.correspondence import values_at
from medssl.errors import CheckpointError
from medssl.losses.precision import at_least_float32
from medssl.pretraining.heads import Projector, ProjectorSettings


class VoxelHead(nn.Module):
    """Embeds points of a view.

    Args:
        widths: Channels of each stage of the encoder.
        stages: Numbers of the stages that are looked at.
        settings: The perceptron; its norm must not be over the batch.

    Attributes:
        stages: The same numbers, saved with the weights. Shape: (S,), int64.
        width: Length of an embedding.
    """

    stages: Tensor

    def __init__(self, widths: Sequence[int], stages: Sequence[int], settings: ProjectorSettings) -> None:
        super().__init__()
        self.numbers = tuple(int(stage) for stage in stages)
        self.register_buffer("stages", torch.tensor(self.numbers))
        self.layers = Projector(sum(widths[stage] for stage in self.numbers), settings)
        self.width = self.layers.width

    def forward(self, features: Sequence[Tensor], voxels: Tensor, size: Sequence[int]) -> Tensor:
        """Return embeddings of length 1; features are interpolated linearly.

        Args:
            features: Of all stages of the encoder, fine to coarse. Shape of each: (B, C, *spatial).
            voxels: Points in voxels of the view. Shape: (B, N, 3).
            size: Spatial size of the view.

        Returns:
            Shape: (B, N, D), float32 or wider.
        """
        found = [values_at(features[stage], voxels, size) for stage in self.numbers]
        rows = self.layers(torch.cat(found, dim=1).transpose(1, 2))
        return F.normalize(at_least_float32(rows), dim=2, eps=1e-8)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], widths: Sequence[int]) -> Self:
        """Build a head from its state dict.

        Args:
            state: What `state_dict` returned.
            widths: Channels of each stage of the encoder.

        Raises:
            CheckpointError: If the weights are not those of such a head on such an encoder.
        """
        try:
            linear = {name: value for name, value in state.items() if value.ndim == 2}
            outputs = [value.shape[0] for value in linear.values()]
            # A norm's shift takes the place of a bias.
            last_norm = list(linear)[-1].removesuffix("weight") + "bias" not in state
            normed = last_norm or any(name.endswith(".weight") and value.ndim == 1 for name, value in state.items())
            settings = ProjectorSettings(
                hidden=outputs[0], width=outputs[-1], layers=len(linear), norm="layer" if normed else "none",
                last_norm=last_norm,
            )  # fmt: skip
            head = cls(widths, state["stages"].tolist(), settings)
            head.load_state_dict(dict(state))
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"The voxel head of the checkpoint does not fit its encoder of widths {list(widths)} "
                f"({type(error).__name__}). Pretrain again with this version."
            ) from error
        return head
