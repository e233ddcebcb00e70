"""Small heads on the features that a network already computes, and which of their predictions are to be believed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from medssl.losses.agreement import t_similarities
from medssl.networks.classifier import Classifier
from medssl.networks.decoder import DecoderBlocks
from medssl.networks.encoder import Encoder

#: Resolution of the running distribution of confidence, and the distance from 1 at which it ends.
BINS, FINEST = 512, 1e-6


def features_and_logits(network: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a network's last layer sees, and what it makes of it.

    Args:
        network: A U-Net, or a `Classifier`.
        image: Shape: (B, C, *spatial).

    Returns:
        Features (B, W, *spatial) and logits (B, K, *spatial) of a U-Net; standardised features (B, W) and logits (B, K)
        of a classifier.
    """
    if isinstance(network, Classifier):
        pooled = network.features(image)
        return (pooled - network.head.mean) / network.head.scale, network.head(pooled)
    encoder = Encoder(network)
    features = DecoderBlocks(encoder, len(encoder.widths) - 1)(encoder.stages(image))
    return features, network.decoder.seg_layers[-1](features)  # type: ignore[union-attr, index, operator]


class Ensemble(nn.Module):
    """Linear heads that share their input.

    Args:
        network: Whose last features they see.
        members: How many, at least 2.
        classes: Number of classes.
    """

    def __init__(self, network: nn.Module, members: int, classes: int) -> None:
        super().__init__()
        self.members, self.classes = members, classes
        outputs = members * classes
        if isinstance(network, Classifier):
            self.layer: nn.Module = nn.Linear(len(network.head.mean), outputs)
        else:
            last = network.decoder.seg_layers[-1]  # type: ignore[union-attr, index]
            assert isinstance(last, nn.Conv2d | nn.Conv3d)
            self.layer = type(last)(last.in_channels, outputs, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits of each member. Shape: (B, M, K, *rest), float32 or wider."""
        logits: Tensor = self.layer(features)
        return logits.float().unflatten(1, (self.members, self.classes))


def agreement(logits: Tensor) -> Tensor:
    """Return the T-similarity of each place. Shape: (B, *rest).

    Args:
        logits: Of the members. Shape: (B, M, K, *rest).
    """
    return t_similarities(logits.softmax(dim=2))


class Curriculum(nn.Module):
    """Chooses of each class the places whose confidence lies in an upper part of its running distribution.

    Small batches do not tell a quantile; the distribution over past steps does. Its bins become narrower towards
    certainty, where most places are. Of each class the same part is taken: of all places together, those of the
    background would come first (Zou et al., ECCV 2018).

    Args:
        classes: Number of classes.
        decay: Part of the past that stays at each step.
    """

    seen: Tensor

    def __init__(self, classes: int, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("seen", torch.zeros(classes, BINS))

    def bins_of(self, confidence: Tensor, guess: Tensor) -> Tensor:
        """Return the bin of each place, those of class k from k * BINS on. Shape: (B, *rest), int64.

        Args:
            confidence: In [0, 1]. Shape: (B, *rest).
            guess: Class of each place. Shape: (B, *rest), int64.
        """
        height = torch.log((1 - confidence).clamp(min=0) + FINEST) / math.log(FINEST)
        return guess * BINS + (height * BINS).long().clamp(0, BINS - 1)

    def counts_of(self, bins: Tensor, where: Tensor | None) -> Tensor:
        """Return how many places that count lie in each bin. Shape: (K, BINS), float32.

        Args:
            bins: What `bins_of` returned.
            where: Shape: (B, 1, *rest), bool.
        """
        counted = torch.ones_like(bins) if where is None else where[:, 0].long()
        flat = torch.zeros(self.seen.numel(), dtype=torch.int64, device=bins.device)
        return flat.scatter_add_(0, bins.flatten(), counted.flatten()).float().view_as(self.seen)

    def chosen(self, bins: Tensor, counts: Tensor, share: float) -> Tensor:
        """Return which places are in the upper part of their class; a bin is taken whole. Shape: (B, *rest), bool.

        Args:
            bins: What `bins_of` returned.
            counts: Of the places at hand, which are part of the distribution.
            share: The part, in [0, 1]; 0 takes none.
        """
        distribution = self.seen + counts
        above = distribution.flip(1).cumsum(dim=1).flip(1) - distribution
        allowed = above < share * distribution.sum(dim=1, keepdim=True)
        return allowed.flatten()[bins]

    @torch.no_grad()
    def follow(self, counts: Tensor) -> None:
        """Add the places of a step to the distribution, and let the past fade."""
        self.seen.mul_(self.decay).add_(counts)
