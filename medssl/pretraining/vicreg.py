"""VICReg: two views agree, while features vary over the batch and differ from each other (Bardes et al., ICLR 2022).

Variance and covariance are those of the batch over all ranks. Deviation: the projector is 512 wide and not 8192.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from medssl.data.batch import Views
from medssl.losses.decorrelation import vicreg_terms
from medssl.pretraining.decorrelation import Decorrelation, DecorrelationSettings
from medssl.training.method import Step


class VICRegSettings(DecorrelationSettings):
    """Settings of VICReg.

    Args:
        stages: Which stages of the encoder are pooled, `all` or the `last` one.
        overlap: Smallest and largest part of a crop that both views show; None draws them apart, within the policy's
            shift.
        projector: The head whose features are regularised; it is thrown away.
        embedding_norm: How the length of embeddings is controlled.
        invariance_weight: Weight of the mean squared difference of two views.
        variance_weight: Weight of what is missing from a standard deviation of 1.
        covariance_weight: Weight of the covariance of different features.
    """

    invariance_weight: float = Field(default=25.0, ge=0)
    variance_weight: float = Field(default=25.0, ge=0)
    covariance_weight: float = Field(default=1.0, ge=0)


class VICReg(Decorrelation):
    """Draws two views together on mean, and keeps features varying and apart.

    Args:
        network: U-Net; only its encoder learns.
        policy: Augmentation for contrastive views.
        settings: See `VICRegSettings`.
    """

    settings: VICRegSettings

    def objective(self, projections: list[Tensor], views: Views, step: Step) -> dict[str, Tensor]:
        """Return `invariance`, `variance` and `covariance`, each times its weight."""
        first, second = projections
        weights = {
            "invariance": self.settings.invariance_weight,
            "variance": self.settings.variance_weight,
            "covariance": self.settings.covariance_weight,
        }
        return {name: weights[name] * term for name, term in vicreg_terms(first, second).items()}
