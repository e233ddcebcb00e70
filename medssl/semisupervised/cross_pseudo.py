"""CPS: each of two networks learns the other's predictions as labels."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from medssl.losses.consistency import confident_cross_entropy
from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.method import SemiSupervised, SemiSupervisedSettings
from medssl.training.method import Step


class CoTraining(SemiSupervised):
    """Two networks that start differently; the first one predicts after training.

    Each network has the whole supervised error, so that it learns labels as fast as one that is trained alone. That
    of the second one is logged apart from the first one's.
    """

    network_count: ClassVar[int] = 2

    def supervised(self, view: SemiView) -> dict[str, Tensor]:
        """Return the error of each network; the names of the second one's terms begin with `second_`."""
        first, second = (self.task.supervised(network(view.image), view) for network in self.networks)
        return first | {f"second_{name}": term for name, term in second.items()}


class CrossPseudoSettings(SemiSupervisedSettings):
    """Settings of CPS.

    Args:
        threshold: Least probability of the likeliest class for it to be a label; 0 takes all, as the paper does.
    """

    threshold: float = Field(default=0.0, ge=0, le=1)


class CrossPseudo(CoTraining):
    """Cross pseudo supervision (Chen et al., CVPR 2021).

    Both networks see the same image, and the likeliest class of one is the label of the other. Deliberate deviations:
    labelled images, whose labels are known, have no cross term, so that a weight of 0 leaves two supervised runs; the
    weight is 1 by default (the paper's is 1.5, the field's code for volumes has 0.1).
    """

    settings: CrossPseudoSettings

    def unsupervised(self, views: list[SemiView], step: Step) -> dict[str, Tensor]:
        """Return `first_from_second` and `second_from_first`."""
        (view,) = views
        where, count = self.counted(view)
        first, second = (network(view.image) for network in self.networks)
        guesses = [logits.detach().float().softmax(dim=1) for logits in (first, second)]
        threshold = self.settings.threshold
        return {
            "first_from_second": confident_cross_entropy(first, guesses[1], threshold, where, count=count),
            "second_from_first": confident_cross_entropy(second, guesses[0], threshold, where, count=count),
        }
