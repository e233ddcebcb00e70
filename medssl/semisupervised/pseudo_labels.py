"""Pseudo-labels: the network's own sure predictions are labels for itself."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from medssl.losses.consistency import confident_cross_entropy
from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.method import SemiSupervised, SemiSupervisedSettings
from medssl.training.method import Step


class PseudoLabelsSettings(SemiSupervisedSettings):
    """Settings of pseudo-labels.

    Args:
        threshold: Least probability of the likeliest class for a prediction to become a label; 0 takes all, as the
            paper does.
    """

    threshold: float = Field(default=0.95, ge=0, le=1)


class PseudoLabels(SemiSupervised):
    """Pseudo-labels (Lee, ICML workshop 2013): the likeliest class of the same image, by the same weights.

    Deliberate deviation: a threshold. Places below it are ignored; they become background nowhere.
    """

    settings: PseudoLabelsSettings

    def unsupervised(self, views: list[SemiView], step: Step) -> dict[str, Tensor]:
        """Return `pseudo_label`."""
        (view,) = views
        where, count = self.counted(view)
        logits = self.networks[0](view.image)
        guess = logits.detach().float().softmax(dim=1)
        return {"pseudo_label": confident_cross_entropy(logits, guess, self.settings.threshold, where, count=count)}
