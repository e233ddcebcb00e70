"""What every semi-supervised method has: labelled and unlabelled views, networks that predict, one supervised error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from medssl.augmentation.policy import Policy
from medssl.config import Settings
from medssl.data.batch import Batch, Views
from medssl.data.draw import Draw
from medssl.networks.encoder import Encoder
from medssl.semisupervised.batch import PairedBatch, SemiView
from medssl.semisupervised.ramp import RampSettings
from medssl.semisupervised.task import Task
from medssl.training.distributed import mean_across_ranks
from medssl.training.method import Method, Needs, Step


class SemiSupervisedSettings(Settings):
    """What every semi-supervised method is told.

    Args:
        unlabelled: Weight of what is learnt without labels, and how it rises.
        labelled_policy: Augmentation of the labelled samples: `fine-tuning` as in supervised training, `weak`, or
            `strong`.
    """

    unlabelled: RampSettings = RampSettings()
    labelled_policy: Literal["fine-tuning", "weak", "strong"] = "fine-tuning"


class SemiSupervised(Method):
    """A method that learns from both parts of a `PairedBatch`.

    It is built as `method(networks, task, policy, settings)`. The first network is the one that is exported, unless
    the method keeps a teacher that predicts. Labelled and unlabelled samples go through a network apart from each
    other, so that a weight of 0 leaves a supervised run, bit for bit.

    Args:
        networks: As many as `network_count` says, each built and started on its own.
        task: Segmentation or classification.
        policy: The policy `weak`, which knows the others.
        settings: Its own.

    Attributes:
        network_count: Networks that are trained.
        tasks: Names of the tasks that the method is for.
        uses_unlabelled: Whether unlabelled images change anything.
    """

    needs: ClassVar[Needs] = Needs(views=1, policy="weak", labels=True)
    trains_decoder: ClassVar[bool] = True
    network_count: ClassVar[int] = 1
    tasks: ClassVar[tuple[str, ...]] = ("segmentation", "classification")
    uses_unlabelled: ClassVar[bool] = True
    settings: SemiSupervisedSettings

    def __init__(
        self, networks: Sequence[nn.Module], task: Task, policy: Policy, settings: SemiSupervisedSettings
    ) -> None:
        super().__init__()
        if len(networks) != self.network_count:
            raise ValueError(f"{type(self).__name__} trains {self.network_count} networks, got {len(networks)}")
        self.networks = nn.ModuleList(networks)
        self.task, self.policy, self.settings = task, policy, settings

    @classmethod
    def purposes(cls, settings: Settings) -> tuple[str, ...]:
        """Return every policy that a view may be made by; the first builds the others."""
        return ("weak", "strong", "fine-tuning")

    @property
    def network(self) -> nn.Module:  # type: ignore[override]
        """U-Net of the first network."""
        return self.task.unet_of(self.networks[0])

    @property
    def encoder(self) -> Encoder:  # type: ignore[override]
        """Its encoder."""
        return Encoder(self.network)

    @property
    def predictor(self) -> nn.Module:
        """The network that predicts after training."""
        return self.networks[0]

    def views(self, batch: PairedBatch, draw: Draw) -> Views:  # type: ignore[override]
        """Return the labelled view, and then those of the unlabelled samples."""
        labelled = self.labelled_view(batch.labelled, draw.child("labelled"))
        if not self.uses_unlabelled or batch.unlabelled is None:
            return [labelled]
        return [labelled, *self.unlabelled_views(batch.unlabelled, unlabelled_draw(draw, batch.unlabelled))]

    def labelled_view(self, batch: Batch, draw: Draw) -> SemiView:
        """Return the labelled samples, augmented as the settings say."""
        return self.task.labelled(self.of_purpose(self.settings.labelled_policy).view(batch, draw), batch)

    def unlabelled_views(self, batch: Batch, draw: Draw) -> list[SemiView]:
        """Return the views of the unlabelled samples; by default one, weakly augmented."""
        return [SemiView(**vars(self.of_purpose("weak").view(batch, draw.child("weak"))))]

    def weak_and_strong(self, batch: Batch, draw: Draw, count: int = 1) -> list[SemiView]:
        """Return a weak view and some strong ones of the same voxels."""
        names = [("weak", "weak"), *(("strong", f"strong {number}") for number in range(count))]
        # A stream goes on where it was left: each view needs that of the place from its start.
        views = [
            self.of_purpose(purpose).view(batch, draw.child(name), place=draw.child("place")) for purpose, name in names
        ]
        return [SemiView(**vars(view)) for view in views]

    def of_purpose(self, purpose: str) -> Policy:
        """Return the policy of a purpose."""
        if not hasattr(self, "_policies"):
            self._policies = {self.policy.purpose: self.policy}
        if purpose not in self._policies:
            self._policies[purpose] = self.policy.sibling(purpose)
        return self._policies[purpose]

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        """Return the supervised terms, and what is learnt without labels times its weight at the step."""
        labelled, *unlabelled = views
        assert isinstance(labelled, SemiView)
        terms = self.supervised(labelled)
        if not self.uses_unlabelled:
            return terms
        weight = self.settings.unlabelled.at(step)
        return terms | {name: weight * term for name, term in self.unsupervised(unlabelled, step).items()}  # type: ignore[arg-type]

    def supervised(self, view: SemiView) -> dict[str, Tensor]:
        """Return the error on the labelled samples, the mean over the networks."""
        found = [self.task.supervised(network(view.image), view) for network in self.networks]
        return {name: torch.stack([terms[name] for terms in found]).mean() for name in found[0]}

    def unsupervised(self, views: list[SemiView], step: Step) -> dict[str, Tensor]:
        """Return the terms on the unlabelled samples, before their weight; their names differ from the supervised."""
        raise NotImplementedError

    def counted(self, view: SemiView) -> tuple[Tensor | None, Tensor | None]:
        """Return where a view counts and the mean number of such places over ranks, for `medssl.losses.consistency`."""
        where = self.task.where(view)
        return where, None if where is None else mean_across_ranks(where.sum().float())

    def health(self, views: Views) -> dict[str, float]:
        """Return how sure the first network is on unlabelled samples, and how even its classes are.

        `confidence` is the mean probability of the likeliest class. `class_entropy`, the entropy of the mean prediction
        as a part of its largest value, falls to 0 where all places become one class. `probability_std` is the spread of
        the probabilities over samples and places.
        """
        view = views[-1]
        probabilities = self.networks[0](view.image).float().softmax(dim=1).movedim(1, -1).flatten(0, -2)
        mean = probabilities.mean(dim=0)
        classes = torch.tensor(float(probabilities.shape[1]))
        return {
            "confidence": float(probabilities.amax(dim=1).mean()),
            "class_entropy": float(-torch.xlogy(mean, mean).sum() / classes.log()),
            "probability_std": float(probabilities.std(dim=0).mean()),
        }

    def pictures(self, views: Views) -> dict[str, Tensor]:
        """Return the last view of the unlabelled samples and what the first network makes of it (dense tasks)."""
        view = views[-1]
        shown = {"unlabelled": view.image[:, :1]}
        if self.task.is_dense:
            logits = self.networks[0](view.image)
            shown["prediction"] = logits.argmax(dim=1, keepdim=True).float() / max(logits.shape[1] - 1, 1)
        return shown


def unlabelled_draw(draw: Draw, batch: Batch) -> Draw:
    """Return the stream of numbers of the unlabelled samples, which have numbers of their own."""
    return Draw(draw.seed, batch.sample_index, ("unlabelled",))
