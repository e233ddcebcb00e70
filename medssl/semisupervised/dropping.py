"""Channels of a U-Net's features dropped by a mask that was drawn beforehand: nnU-Net's networks have no dropout.

A mask from a seeded draw, unlike dropout by torch's own generator, is the same after a crash.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from medssl.data.draw import Draw


def draw_kept(draw: Draw, width: int, probability: float) -> Tensor:
    """Draw the factor of each channel: 0 where it is dropped, else 1 / (1 - probability), so that its mean is 1.

    Args:
        draw: Stream of the batch.
        width: Number of channels.
        probability: How often a channel is dropped, in [0, 1).

    Returns:
        Shape: (B, width), float32, on the CPU.

    Raises:
        ValueError: If the probability is not in [0, 1).
    """
    if not 0 <= probability < 1:
        raise ValueError(f"Channels are dropped with a probability in [0, 1), got {probability}")
    return draw.happens(1 - probability, (width,)).float() / (1 - probability)


def dropped(features: Sequence[Tensor], kept: Tensor) -> list[Tensor]:
    """Return features whose channels are multiplied by what `draw_kept` drew.

    Args:
        features: Of some stages. Each has shape (B, C, *spatial).
        kept: Factors of all their channels, in their order, on their device. Shape: (B, sum of C).

    Raises:
        ValueError: If the numbers of channels differ.
    """
    widths = [stage.shape[1] for stage in features]
    if kept.shape[1] != sum(widths):
        raise ValueError(f"The features have {sum(widths)} channels, {kept.shape[1]} factors were drawn")
    factors = kept.split(widths, dim=1)
    return [
        stage * factor.to(stage.dtype).view(*factor.shape, *(1,) * (stage.ndim - 2))
        for stage, factor in zip(features, factors, strict=True)
    ]
