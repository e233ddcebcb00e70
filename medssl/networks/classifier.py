"""A classifier on a U-Net's encoder: pooled stages, standardised, then dropout and one linear layer."""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.errors import UsageError
from medssl.networks.encoder import Encoder
from medssl.networks.pooling import Pooling, Stages, chosen_stages, pooled_stages, pooled_width


class OrdinalHead(nn.Module):
    """CORAL's layer: one direction shared by all thresholds, and a bias for each (Cao et al., 2020).

    The biases fall by construction (the paper proves it at the optimum only), so that the probability of a higher
    class never exceeds that of a lower one.

    Args:
        width: Length of the feature vector.
        classes: Ordered classes, at least 2.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.direction = nn.Linear(width, 1, bias=False)
        self.first = nn.Parameter(torch.zeros(1))
        self.steps = nn.Parameter(torch.zeros(classes - 2))

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits of "above class k". Shape: (B, classes - 1)."""
        biases = torch.cat([self.first, self.first - F.softplus(self.steps).cumsum(dim=0)])
        return self.direction(features) + biases


class Head(nn.Module):
    """Standardise by the statistics of the training images, drop out, and map to logits.

    Pooled features of normalised stages differ little from image to image beside their mean; standardised, one learning
    rate fits all of them. The statistics are taken once, before training, and stay: unlike batch normalisation, an
    image's result does not depend on its batch.

    Args:
        width: Length of the feature vector.
        classes: Number of classes.
        kind: `multiclass`, `multilabel` or `ordinal`.
        dropout: Part of the features that is dropped in training.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int, classes: int, kind: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.dropout = nn.Dropout(dropout)
        self.linear: nn.Module = OrdinalHead(width, classes) if kind == "ordinal" else nn.Linear(width, classes)
        # Untrained, every class is as likely as the others.
        for layer in self.linear.modules():
            if isinstance(layer, nn.Linear):
                for parameter in layer.parameters():
                    nn.init.zeros_(parameter)

    @torch.no_grad()
    def fit_scale(self, features: Tensor) -> None:
        """Take mean and standard deviation of some images' features; a feature that never varies keeps scale 1.

        Args:
            features: Shape: (N, W), N >= 1.
        """
        mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0)
        # Below a millionth of the feature's size the variation is rounding.
        varies = deviation > 1e-6 * mean.abs().clamp(min=1e-6)
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(varies, deviation, 1.0))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits. Shape: (B, classes), or (B, classes - 1) for `ordinal`."""
        return self.linear(self.dropout((features - self.mean) / self.scale))


class Classifier(nn.Module):
    """A U-Net's encoder and a head on its pooled stages.

    Args:
        network: The whole U-Net; its decoder is kept and not used.
        classes: Number of classes.
        kind: `multiclass`, `multilabel` or `ordinal`.
        stages: Stages that are pooled; see `medssl.networks.pooling.chosen_stages`.
        pooling: `mean` or `mean+max`.
        dropout: Part of the features that is dropped in training.

    Attributes:
        network: The U-Net, with nnU-Net's weight names.
        head: What maps pooled features to logits.
    """

    def __init__(
        self,
        network: nn.Module,
        classes: int,
        kind: str,
        *,
        stages: Stages = "all",
        pooling: Pooling = "mean",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.network = network
        self.encoder = Encoder(network)
        self.stages, self.pooling = chosen_stages(self.encoder, stages), pooling
        self.head = Head(pooled_width(self.encoder, self.stages, pooling), classes, kind, dropout)
        network.decoder.requires_grad_(False)
        # The decoder holds the encoder too.
        network.encoder.requires_grad_(True)

    def freeze(self, trained_stages: int | None) -> None:
        """Let only the coarsest stages of the encoder be trained.

        Args:
            trained_stages: How many; 0 freezes the encoder, None trains all of it with its stem.

        Raises:
            UsageError: If the encoder has fewer stages.
        """
        encoder = self.network.encoder
        count = len(encoder.stages)  # type: ignore[union-attr, arg-type]
        if trained_stages is None:
            encoder.requires_grad_(True)
            return
        if not 0 <= trained_stages <= count:
            raise UsageError(f"trained_stages {trained_stages}: the encoder has {count} stages.")
        encoder.requires_grad_(False)
        for stage in list(encoder.stages)[count - trained_stages :]:  # type: ignore[union-attr, arg-type]
            stage.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; frozen parts stay as in evaluation, so that batch norms and dropout in them do nothing."""
        super().train(mode)
        for part in self.network.modules():
            own = list(part.parameters())
            if own and not any(parameter.requires_grad for parameter in own):
                part.eval()
        return self

    def features(self, image: Tensor) -> Tensor:
        """Return the pooled features. Shape: (B, W), float32 or wider."""
        return pooled_stages(self.encoder, image, self.stages, self.pooling)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits of images of shape (B, C, *spatial). Shape: (B, classes), or (B, classes - 1)."""
        return self.head(self.features(image))
