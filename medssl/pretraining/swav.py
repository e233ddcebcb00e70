"""SwAV: the cluster of one view is guessed from the other, and samples spread evenly over the clusters.

Caron et al., "Unsupervised learning of visual features by contrasting cluster assignments", NeurIPS 2020. Clusters are
prototypes, a linear layer without bias whose rows have length 1. Codes are made by Sinkhorn-Knopp in float32 from the
batch over all ranks, and from a queue too once that is full.

Deviations: two views and no small extra crops; a tenth of the paper's prototypes and queue (300 of 3000, 384 of 3840):
in both the queue holds more samples than there are prototypes, since fewer cannot be spread evenly over them; the
queue is used as soon as it is full, where theirs waits for epoch 15.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from medssl.augmentation.policy import Policy
from medssl.data.batch import Views
from medssl.losses.clustering import swav
from medssl.losses.precision import at_least_float32
from medssl.losses.similarity import product, unit_rows
from medssl.pretraining.heads import scaled_gradient
from medssl.pretraining.joint import JointEmbedding, JointSettings, joint_health
from medssl.training.method import Step
from medssl.training.queue import Queue


class SwAVSettings(JointSettings):
    """Settings of SwAV.

    Args:
        stages: Which stages of the encoder are pooled, `all` or the `last` one.
        overlap: Smallest and largest part of a crop that both views show; None draws them apart, within the policy's
            shift.
        projector: The head whose output is clustered; it is thrown away.
        embedding_norm: How the length of embeddings is controlled.
        prototypes: Clusters.
        queue: Samples of earlier steps that codes are spread over too; 0 for none.
        temperature: Cosines to prototypes are divided by it when they predict.
        epsilon: Entropy of the codes; smaller is harder.
        iterations: Rounds of Sinkhorn-Knopp.
        hold: Part of the run, from its start on, in which the prototypes stand still (the paper: one epoch).
    """

    prototypes: int = Field(default=300, ge=2)
    queue: int = Field(default=384, ge=0)
    temperature: float = Field(default=0.1, gt=0)
    epsilon: float = Field(default=0.05, gt=0)
    iterations: int = Field(default=3, ge=1)
    hold: float = Field(default=0.01, ge=0, le=1)


class SwAV(JointEmbedding):
    """Predicts each view's spread-out assignment to prototypes from the other view.

    Args:
        network: U-Net; only its encoder learns.
        policy: Augmentation for contrastive views.
        settings: See `SwAVSettings`.
    """

    settings: SwAVSettings

    def __init__(self, network: nn.Module, policy: Policy, settings: SwAVSettings) -> None:
        super().__init__(network, policy, settings)
        width = self.projector.width
        self.prototypes = nn.Linear(width, settings.prototypes, bias=False)
        self._normalise()
        # Both views of a sample side by side: the codes of each view are spread on their own.
        self.queue = Queue(settings.queue, 2 * width) if settings.queue else None

    def objective(self, projections: list[Tensor], views: Views, step: Step) -> dict[str, Tensor]:
        """Return the error of guessing each view's codes from the other, as `assignment`; offers rows to the queue."""
        settings = self.settings
        rows = [unit_rows(projection) for projection in projections]
        weight = scaled_gradient(self.prototypes.weight, 0.0 if step.fraction < settings.hold else 1.0)
        first, second = (product(of_view, weight.T) for of_view in rows)
        loss = partial(
            swav,
            first,
            second,
            temperature=settings.temperature,
            epsilon=settings.epsilon,
            iterations=settings.iterations,
        )
        if self.queue is None:
            return {"assignment": loss()}
        earlier = [self._scores(of_view) for of_view in self.queue.rows.chunk(2, dim=1)]
        # Both are computed: to ask whether the queue is full would make the host wait.
        assignment = torch.where(self.queue.full, loss(queue_a=earlier[0], queue_b=earlier[1]), loss())
        self.queue.offer(torch.cat(rows, dim=1))
        return {"assignment": assignment}

    def after_step(self, step: Step) -> None:
        """Bring the prototypes back to length 1, and put the step's projections into the queue."""
        self._normalise()
        if self.queue is not None:
            self.queue.take_in()

    def health(self, views: Views) -> dict[str, float]:
        """Return whether samples are told apart, and whether the prototypes are used.

        Beyond `joint_health`: `prototypes_used`, how many prototypes are the nearest of a view or of an entry of the
        queue, relative to the most there could be; `prototype_entropy` of the mean prediction, relative to that of an
        even one (0 where all samples have one cluster); `prediction_entropy`, the mean of that of single samples (1
        where no cluster is preferred); and `queue_filled`.
        """
        features = self.features(views[0])
        first, second = self.projector(features), self.project(views[1])
        rows = [unit_rows(at_least_float32(first)), unit_rows(second)]
        figures: dict[str, float] = {}
        if self.queue is not None:
            rows += self.queue.rows[self.queue.filled].chunk(2, dim=1)
            figures["queue_filled"] = float(self.queue.filled.float().mean())
        scores = self._scores(torch.cat(rows))
        return joint_health(features, first, second) | usage_figures(scores, self.settings.temperature) | figures

    def _scores(self, rows: Tensor) -> Tensor:
        """Return the cosine of each row to each prototype, without gradient. Shape: (N, K)."""
        return product(rows, self.prototypes.weight.detach().T)

    @torch.no_grad()
    def _normalise(self) -> None:
        weight = self.prototypes.weight
        weight.copy_(F.normalize(weight, dim=1))


def usage_figures(scores: Tensor, temperature: float) -> dict[str, float]:
    """Return how evenly samples use prototypes, as `SwAV.health` names it; waits for the device.

    Args:
        scores: Cosine of each sample to each prototype. Shape: (N, K), K >= 2.
        temperature: Scores are divided by it.
    """
    predictions = torch.softmax(scores / temperature, dim=1)
    even = torch.full_like(predictions[0], 1 / scores.shape[1])
    entropies = torch.stack([_entropy(predictions.mean(dim=0)), _entropy(predictions).mean()]) / _entropy(even)
    used = len(scores.argmax(dim=1).unique()) / min(scores.shape)
    return {"prototypes_used": used} | dict(
        zip(("prototype_entropy", "prediction_entropy"), entropies.tolist(), strict=True)
    )


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(dim=-1)
