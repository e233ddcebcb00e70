"""MoCo: views are told from the keys of earlier steps, which a slow copy of the encoder made and a queue holds.

He et al., "Momentum contrast", CVPR 2020; head of MoCo v2 (arXiv 2003.04297). The number of negatives does not depend
on the batch, which suits large 3D crops.

Deviations: a queue of any length (see `medssl.training.queue`), which starts empty where theirs starts with random
vectors; entries of a query's own volume are no negatives of it, since a small archive comes round before the queue
does; the keys of the batch at hand are negatives too, so that the first steps have some; both views ask and both
answer, as in solo-learn's "MoCo v2+", with its momentum from 0.99 to 0.999. The projector has batch norm, which theirs
has not: encoders with instance norm give nearly one vector for all images before they have learned, and without the
norm they stay there long. It is over the batch of all ranks, and the encoders mix no samples: nothing to shuffle.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from medssl.augmentation.policy import Policy
from medssl.data.batch import View, Views
from medssl.losses.key_contrast import queue_contrast
from medssl.losses.precision import at_least_float32
from medssl.losses.similarity import product, unit_rows
from medssl.networks.pooling import pooled_stages
from medssl.pretraining.contrast import ContrastSettings, InstanceContrast, retrieval
from medssl.pretraining.distillation import teacher_lag
from medssl.pretraining.health import feature_std
from medssl.pretraining.joint import joint_health
from medssl.pretraining.teacher import Teacher, TeacherSettings
from medssl.training.distributed import gather
from medssl.training.method import Step
from medssl.training.queue import NO_VOLUME, Queue


class MoCoTeacherSettings(TeacherSettings):
    """How the teacher follows; it must not stand still in the end, or the queue would hold nothing new.

    Args:
        momentum: Part of the teacher that stays at the first step.
        final: Part that stays at the last one.
    """

    final: float = Field(default=0.999, ge=0, le=1)


class MoCoSettings(ContrastSettings):
    """Settings of MoCo with a queue.

    Args:
        stages: Which stages of the encoder are pooled, `all` or the `last` one.
        overlap: Smallest and largest part of a crop that both views show; None draws them apart, within the policy's
            shift.
        projector: The head whose output is contrasted; it is thrown away.
        embedding_norm: How the length of embeddings is controlled.
        same_volume: What other crops of a query's volume are to it, `left-out` or `negative`; those in the queue too.
        queue: Keys that are kept; any number. With the default and 8 samples a step, the oldest is 64 steps old, which
            a teacher of momentum 0.99 still resembles; the paper's 65,536 are as old in batches of 256 with 0.999.
        temperature: Cosines are divided by it.
        symmetric: Whether each view asks the other; if not, the first alone asks, as in the paper, in half the time.
        teacher: How the teacher follows.
    """

    queue: int = Field(default=1024, ge=1)
    temperature: float = Field(default=0.2, gt=0)
    symmetric: bool = True
    teacher: MoCoTeacherSettings = MoCoTeacherSettings()


class MoCo(InstanceContrast):
    """Tells each view from the keys of earlier steps.

    Args:
        network: U-Net; only its encoder learns.
        policy: Augmentation for contrastive views.
        settings: See `MoCoSettings`.
    """

    settings: MoCoSettings

    def __init__(self, network: nn.Module, policy: Policy, settings: MoCoSettings) -> None:
        super().__init__(network, policy, settings)
        self.teacher = Teacher(settings.teacher, encoder=self.encoder, projector=self.projector)
        self.queue = Queue(settings.queue, self.projector.width)

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        """Return the contrast of queries with their keys and the queue, as `contrast`; offers the keys to the queue."""
        volumes = self.volumes(views[0])
        asking, answering = (views, views[::-1]) if self.settings.symmetric else (views[:1], views[1:])
        losses = []
        for asked, answered in zip(asking, answering, strict=True):
            query, key = gather(self.project(asked)), gather(self.key(answered))
            losses.append(self._contrast(query, key, volumes))
            self.queue.offer(key, volumes)
        return {"contrast": torch.stack(losses).mean()}

    def after_step(self, step: Step) -> None:
        """Let the teacher follow, and put the keys of the step into the queue."""
        self.teacher.follow(step)
        self.queue.take_in()

    @torch.no_grad()
    def key(self, view: View) -> Tensor:
        """Return the teacher's projection, of length 1. Shape: (B, D), float32."""
        features = pooled_stages(self.teacher.encoder, view.image, self.settings.stages)
        return unit_rows(at_least_float32(self.teacher["projector"](features)))

    def health(self, views: Views) -> dict[str, float]:
        """Return whether queries tell their keys from others, and what the queue holds.

        Beyond `joint_health`, whose second projections are here the teacher's, and `retrieval`: `queue_filled` from 0
        to 1, `queue_similarity` (mean cosine of queries and entries; 1 on collapse), `queue_std` (0 on collapse) and
        `teacher_lag` (0 where the teacher is the student).
        """
        features, key = self.features(views[0]), self.key(views[1])
        query = self.projector(features)
        entries = self.queue.rows[self.queue.filled]
        figures = {
            "retrieval": retrieval(query, key),
            "queue_filled": self.queue.filled.float().mean(),
            "teacher_lag": teacher_lag(self.teacher, self.encoder),
        }
        if len(entries) > 1:
            figures["queue_similarity"] = product(unit_rows(at_least_float32(query)), entries.T).mean()
            figures["queue_std"] = feature_std(entries)
        return joint_health(features, query, key) | {name: float(value) for name, value in figures.items()}

    def _contrast(self, query: Tensor, key: Tensor, volumes: Tensor) -> Tensor:
        if self.settings.same_volume == "left-out":
            groups, of_queue = volumes, self.queue.volumes
        else:
            # A group of its own for each sample, so that of the batch its own key alone is left out.
            groups = torch.arange(len(query), device=query.device)
            of_queue = torch.full_like(self.queue.volumes, NO_VOLUME)
        return queue_contrast(
            query,
            key,
            torch.cat([self.queue.rows, key]),
            self.settings.temperature,
            valid=torch.cat([self.queue.filled, torch.ones(len(key), dtype=torch.bool, device=key.device)]),
            groups=groups,
            queue_groups=torch.cat([of_queue, groups]),
        )
