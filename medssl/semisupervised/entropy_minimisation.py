"""Entropy minimisation: predictions on unlabelled images must be decided, whatever they say."""

from __future__ import annotations

from torch import Tensor

from medssl.losses.consistency import entropy
from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.method import SemiSupervised, SemiSupervisedSettings
from medssl.semisupervised.ramp import RampSettings
from medssl.training.method import Step


class EntropyMinimisationSettings(SemiSupervisedSettings):
    """Settings of entropy minimisation.

    Args:
        unlabelled: The weight is that of the field's code for segmentation; larger ones soon decide wrongly.
    """

    unlabelled: RampSettings = RampSettings(weight=0.1)


class EntropyMinimisation(SemiSupervised):
    """Entropy minimisation (Grandvalet and Bengio, NIPS 2004), as a part of the largest entropy, log K.

    Deliberate deviation from the field's code for segmentation: the labelled images, whose labels are known, have no
    entropy term, so that a weight of 0 leaves a supervised run.
    """

    settings: EntropyMinimisationSettings

    def unsupervised(self, views: list[SemiView], step: Step) -> dict[str, Tensor]:
        """Return `entropy`, in [0, 1]."""
        (view,) = views
        where, count = self.counted(view)
        return {"entropy": entropy(self.networks[0](view.image), where, count=count)}
