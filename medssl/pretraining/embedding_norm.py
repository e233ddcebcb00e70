"""Controls of how long embeddings get, since losses of their direction learn the slower the longer they are.

Draganov et al., "On the importance of embedding norms in self-supervised learning", ICML 2025 (arXiv 2502.09252): the
gradient of a cosine loss shrinks with the embedding's length.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from medssl.config import Settings
from medssl.pretraining.heads import scaled_gradient
from medssl.training.distributed import mean_across_ranks


class EmbeddingNormSettings(Settings):
    """How the length of embeddings is kept from slowing a cosine loss down.

    Args:
        cut: All weights of encoder and projector are divided by this before the first step (cut-initialisation; the
            paper has 3 for SimCLR). 1 leaves them.
        gradient_power: The gradient of each embedding is multiplied by its length to this power and brought back to
            its mean size over the batch (GradScale). 1 makes the step independent of the length, 0 does nothing.
    """

    cut: float = Field(default=1.0, ge=1)
    gradient_power: float = Field(default=0.0, ge=0, le=2)


@torch.no_grad()
def cut_weights(settings: EmbeddingNormSettings, *modules: nn.Module) -> None:
    """Divide the weights of layers, not those of norms, by `settings.cut`; once, before training."""
    if settings.cut == 1:
        return
    for weight in {weight for module in modules for weight in module.parameters() if weight.ndim > 1}:
        weight.div_(settings.cut)


def balanced_gradient(settings: EmbeddingNormSettings, rows: Tensor) -> Tensor:
    """Return the rows as they are, with the gradient of each scaled by its length. Shape: (N, D)."""
    if settings.gradient_power == 0:
        return rows
    factor = rows.detach().norm(dim=1, keepdim=True).clamp(min=1e-12) ** settings.gradient_power
    return scaled_gradient(rows, factor / mean_across_ranks(factor.mean()))
