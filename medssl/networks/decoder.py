"""The first blocks of a U-Net's decoder, run on their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medssl.errors import UsageError
from medssl.networks.encoder import Encoder


class DecoderBlocks(nn.Module):
    """Runs the first blocks of a U-Net's decoder without owning their weights.

    Args:
        encoder: Access to the U-Net's encoder.
        count: Blocks, from the coarsest.

    Attributes:
        count: How many blocks run.
        width: Channels of the last one's features.
        stride: How much coarser than the input's their grid is, per axis.

    Raises:
        UsageError: If the decoder has fewer blocks.
    """

    def __init__(self, encoder: Encoder, count: int) -> None:
        super().__init__()
        blocks = len(encoder.widths) - 1
        if not 1 <= count <= blocks:
            raise UsageError(f"The decoder of this network has {blocks} blocks; {count} were asked for.")
        object.__setattr__(self, "_decoder", encoder.unet.decoder)
        self.count = count
        self.width = encoder.widths[-1 - count]
        self.stride = encoder.strides[-1 - count]

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Return the features of the last of the blocks.

        Args:
            stages: Features of all stages of the encoder, fine to coarse.

        Returns:
            Shape: (B, width, *grid).
        """
        decoder: nn.Module = self._decoder  # type: ignore[assignment]
        features = stages[-1]
        for number in range(self.count):
            raised = decoder.transpconvs[number](features)  # type: ignore[index, operator]
            features = decoder.stages[number](torch.cat([raised, stages[-2 - number]], dim=1))  # type: ignore[index, operator]
        return features

    def freeze_rest(self) -> None:
        """Take the gradient from the later blocks and from all output layers, which nothing reaches."""
        decoder: nn.Module = self._decoder  # type: ignore[assignment]
        for name in ("stages", "transpconvs"):
            getattr(decoder, name)[self.count :].requires_grad_(False)
        decoder.seg_layers.requires_grad_(False)
