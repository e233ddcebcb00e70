"""SimCLR: two views of one crop are told from the views of all other crops (Chen et al., ICML 2020).

The loss is named in `objective`: NT-Xent, or one that may take its place. All see the whole batch over all ranks.

Deviations: crops of one volume are no negatives of each other, since they may show the same tissue (nnssl's SimCLR
tells even overlapping crops apart; its authors note it); the projector is 512 wide and not 2048, since encoders are
smaller than a ResNet-50.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from medssl.config import Settings
from medssl.data.batch import Views
from medssl.losses.contrast import OBJECTIVES
from medssl.pretraining.contrast import ContrastSettings, InstanceContrast
from medssl.training.method import Step

_DEFAULTS: dict[str, dict[str, float]] = {
    "nt-xent": {"temperature": 0.1},
    "dcl": {"temperature": 0.1},
    "dclw": {"temperature": 0.1, "sigma": 0.5},
    "debiased": {"temperature": 0.5, "tau_plus": 0.1},
    "additive-margin": {"temperature": 0.03, "margin": 0.1},
    "supcon": {"temperature": 0.1},
}


class ObjectiveSettings(Settings):
    """A loss by its name, with the numbers that it has; in a recipe, the name alone takes their defaults.

    Args:
        name: A key of `medssl.losses.contrast.OBJECTIVES`. `dcl` and `dclw` lose least in small batches. `supcon` has
            other crops of one volume as positives, where `same_volume` does not make them negatives.
        temperature: Cosines are divided by it; by default 0.5 for `debiased`, 0.03 for `additive-margin`, else 0.1.
        sigma: Of `dclw`: width of the weight of unlike positives, 0.5.
        tau_plus: Of `debiased`: probability that a negative shows the same as the sample, 0.1.
        margin: Of `additive-margin`: what the positive's cosine must win by, 0.1.
    """

    name: Literal["nt-xent", "dcl", "dclw", "debiased", "additive-margin", "supcon"] = "nt-xent"
    temperature: float | None = Field(default=None, gt=0)
    sigma: float | None = Field(default=None, gt=0)
    tau_plus: float | None = Field(default=None, ge=0, lt=1)
    margin: float | None = Field(default=None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _of_this_objective(cls, values: Any) -> Any:
        """Fill in the defaults of the objective that is named, and refuse numbers that it does not have."""
        if isinstance(values, str):
            values = {"name": values}
        if not isinstance(values, dict):
            return values
        given = {key: value for key, value in values.items() if value is not None}
        name = given.get("name", "nt-xent")
        own = _DEFAULTS.get(name) if isinstance(name, str) else None
        if own is None:
            return given
        foreign = [key for key in given if key in cls.model_fields and key != "name" and key not in own]
        if foreign:
            raise ValueError(f"{name} has no {', '.join(foreign)}; it has {', '.join(own)}")
        return {**own, **given}

    def numbers(self) -> dict[str, float]:
        """Return the keywords of the loss."""
        return self.model_dump(exclude={"name"}, exclude_none=True)


class SimCLRSettings(ContrastSettings):
    """Settings of SimCLR.

    Args:
        stages: Which stages of the encoder are pooled, `all` or the `last` one.
        overlap: Smallest and largest part of a crop that both views show; None draws them apart, within the policy's
            shift.
        projector: The head whose output is contrasted; it is thrown away.
        embedding_norm: How the length of embeddings is controlled.
        same_volume: What different crops of one volume are to each other, `left-out` or `negative`.
        objective: The loss.
    """

    objective: ObjectiveSettings = ObjectiveSettings()


class SimCLR(InstanceContrast):
    """Tells two views of a crop from the views of all others in the batch.

    Args:
        network: U-Net; only its encoder learns.
        policy: Augmentation for contrastive views.
        settings: See `SimCLRSettings`.
    """

    settings: SimCLRSettings

    def objective(self, projections: list[Tensor], views: Views, step: Step) -> dict[str, Tensor]:
        """Return the contrast of the two views, as `contrast`."""
        objective, first, second = self.settings.objective, *projections
        loss = OBJECTIVES[objective.name](first, second, groups=self.groups(views[0]), **objective.numbers())
        return {"contrast": loss}
