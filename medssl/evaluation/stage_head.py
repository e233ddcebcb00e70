"""A linear head on all stages of an encoder at once, and the loss it is trained with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StageHead(nn.Module):
    """One linear layer on each stage, summed at the size of the input: a 1x1 convolution on all of them, upsampled.

    A 1x1 convolution and an interpolation can be exchanged, so that only the few classes are upsampled.

    Args:
        widths: Channels of the stages.
        classes: With background.
    """

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, classes, bias=number == 0) for number, width in enumerate(widths))
        self.means = [torch.zeros(width) for width in widths]
        self.scales = [torch.ones(width) for width in widths]
        for layer in self.layers:
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.layers[0].bias)  # type: ignore[arg-type]

    def fit_scale(self, batches: Sequence[Sequence[Tensor]]) -> None:
        """Take mean and deviation of each feature from some batches of stages."""
        for number in range(len(self.layers)):
            rows = torch.cat([stages[number].transpose(0, 1).flatten(1) for stages in batches], dim=1)
            self.means[number] = rows.mean(dim=1)
            self.scales[number] = rows.std(dim=1, correction=0).clamp(min=1e-6)

    def forward(self, stages: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Return logits. Shape: (B, classes, *size)."""
        mode = "trilinear" if len(size) == 3 else "bilinear"
        total: Tensor | None = None
        for layer, mean, scale, features in zip(self.layers, self.means, self.scales, stages, strict=True):
            moved = (features.movedim(1, -1) - mean) / scale
            logits = layer(moved).movedim(-1, 1)
            if logits.shape[2:] != tuple(size):
                logits = F.interpolate(logits, size=tuple(size), mode=mode, align_corners=False)
            total = logits if total is None else total + logits
        assert total is not None
        return total


def segmentation_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Return cross-entropy plus one minus the mean soft Dice of the foreground classes over the batch.

    Args:
        logits: Shape: (B, K, *spatial).
        label: Classes. Shape: (B, *spatial), int64.
    """
    p = logits.softmax(dim=1)
    truth = F.one_hot(label, logits.shape[1]).movedim(-1, 1).to(p.dtype)
    axes = (0, *range(2, p.ndim))
    overlap, total = (p * truth).sum(axes)[1:], (p + truth).sum(axes)[1:]
    return F.cross_entropy(logits, label) + 1 - ((2 * overlap + 1) / (total + 1)).mean()
