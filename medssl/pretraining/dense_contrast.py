"""DenseCL: MoCo on whole crops and on places of them at once (Wang et al., CVPR 2021, arXiv 2011.09157).

The global term is `moco`. In the dense term the query is the student's embedding of a place in one view, its key the
teacher's embedding of the same place in the other view, and the negatives are a second queue of crops, each the mean
of a crop's dense keys.

Deviations: the same place is known from what moved the views (`correspondence: geometric`), where the paper takes the
position whose backbone features are most similar (`features`), which in homogeneous tissue may be any; a place that the
other view does not show is left out; queries are drawn places, interpolated in the map, and not all of its positions,
so that the cost does not grow with the map. Queues, negatives, symmetry and momentum as in `medssl.pretraining.moco`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from medssl.augmentation.policy import Policy
from medssl.data.batch import Batch, View, Views
from medssl.data.draw import Draw
from medssl.losses.key_contrast import queue_contrast
from medssl.losses.precision import at_least_float32
from medssl.losses.similarity import product, unit_rows
from medssl.networks.pooling import chosen_stages
from medssl.pretraining.embedding_norm import balanced_gradient, cut_weights
from medssl.pretraining.heads import Projector
from medssl.pretraining.health import feature_std
from medssl.pretraining.local_contrast import LocalHeadSettings
from medssl.pretraining.masked_distillation import mostly
from medssl.pretraining.moco import MoCo, MoCoSettings
from medssl.pretraining.places import (
    Places,
    draw_places,
    features_at,
    image_agreement,
    place_error,
    places_of,
    similarity_map,
)
from medssl.pretraining.teacher import Teacher
from medssl.training.distributed import gather, mean_across_ranks, rank, world_size
from medssl.training.method import Step
from medssl.training.queue import NO_VOLUME, Queue


class DenseCLSettings(MoCoSettings):
    """Settings of DenseCL.

    Args:
        stages: Which stages of the encoder are pooled for the global term, `all` or the `last` one.
        overlap: Smallest and largest part of a crop that both views show; None draws them apart, within the policy's
            shift.
        projector: The head on pooled features; it is thrown away.
        embedding_norm: How the length of global embeddings is controlled.
        same_volume: What other crops of a query's volume are to it, `left-out` or `negative`; those in the queues too.
        queue: Keys that are kept of the global term, any number.
        temperature: Cosines of both terms are divided by it.
        symmetric: Whether each view asks the other; if not, the first alone asks, as in the paper, in half the time.
        teacher: How the teacher follows.
        dense_part: Weight of the dense term; the global one has the rest (the paper's lambda).
        dense_stage: Stage of the encoder whose features are compared at places, negative from the coarsest.
        dense_projector: The head on the features of a place; it is thrown away.
        dense_queue: Mean dense keys that are kept, any number.
        places: Places of each crop, drawn evenly.
        correspondence: How the key of a place is found: `geometric`, the same place of the other view, or `features`,
            the position of the other view whose features are most similar.
    """

    dense_part: float = Field(default=0.5, ge=0, le=1)
    dense_stage: int = -1
    dense_projector: LocalHeadSettings = LocalHeadSettings()
    dense_queue: int = Field(default=1024, ge=1)
    places: int = Field(default=64, ge=2)
    correspondence: Literal["geometric", "features"] = "geometric"


class DenseCL(MoCo):
    """Tells crops, and places of crops, from the keys of earlier steps.

    Args:
        network: U-Net; only its encoder learns.
        policy: Augmentation for contrastive views.
        settings: See `DenseCLSettings`.

    Raises:
        UsageError: If the dense stage does not exist.
    """

    settings: DenseCLSettings

    def __init__(self, network: nn.Module, policy: Policy, settings: DenseCLSettings) -> None:
        super().__init__(network, policy, settings)
        (self.dense_stage,) = chosen_stages(self.encoder, (settings.dense_stage,))
        self.dense_projector = Projector(self.encoder.widths[self.dense_stage], settings.dense_projector)
        cut_weights(settings.embedding_norm, self.dense_projector)
        self.teacher = Teacher(
            settings.teacher, encoder=self.encoder, projector=self.projector, dense_projector=self.dense_projector
        )
        self.dense_queue = Queue(settings.dense_queue, self.dense_projector.width)

    def views(self, batch: Batch, draw: Draw) -> Views:
        """Make two views of each crop, and draw places in the first."""
        views = super().views(batch, draw)
        draw_places(views[0], draw.child("places"), self.settings.places)
        return views

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        """Return the `global` and the `dense` term, weighed by `dense_part`; offers the keys to the queues."""
        volumes, places = self.volumes(views[0]), places_of(*views)
        directions = ((0, 1), (1, 0)) if self.settings.symmetric else ((0, 1),)
        student = {asked: self.encoder.stages(views[asked].image) for asked, _ in directions}
        teacher = {answered: self._teachers_stages(views[answered]) for _, answered in directions}
        whole, dense = [], []
        for asked, answered in directions:
            query = gather(balanced_gradient(self.settings.embedding_norm, self._global_query(student[asked])))
            key = gather(self._global_key(teacher[answered]))
            whole.append(self._contrast(query, key, volumes))
            self.queue.offer(key, volumes)
            mean_key = gather(self._mean_dense_key(teacher[answered]))
            dense_query, dense_key = self._dense_pairs(views, places, student, teacher, asked, answered)
            dense.append(self._dense_contrast(dense_query, dense_key, places, mean_key, volumes))
            self.dense_queue.offer(mean_key, volumes)
        part = self.settings.dense_part
        return {"global": (1 - part) * torch.stack(whole).mean(), "dense": part * torch.stack(dense).mean()}

    def after_step(self, step: Step) -> None:
        """Let the teacher follow, and put the keys of the step into both queues."""
        super().after_step(step)
        self.dense_queue.take_in()

    def health(self, views: Views) -> dict[str, float]:
        """Return the figures of MoCo, and whether places are told apart and are the right ones.

        `dense_std`: of the queries of all places, 0 on collapse. `place_error`: how far from the truth the most similar
        key of the crop lies, 0 where all are found and about 1 by chance; `match_error`: the same by the features of
        the encoder, which `correspondence: features` goes by. `agreement`: correlation of the two images at the places,
        near 0 if they are not the same. `usable`: part of the places that both views show. `dense_queue_filled`: from 0
        to 1.
        """
        places = places_of(*views)
        student, teacher = self.encoder.stages(views[0].image), self._teachers_stages(views[1])
        size = views[0].image.shape[2:]
        ours = features_at(student[self.dense_stage], places.first, size)
        theirs = features_at(teacher[self.dense_stage], places.second, size)
        query, key = self.dense_projector(ours), self.teacher["dense_projector"](theirs)
        figures = {
            "dense_std": feature_std(query.flatten(0, 1)),
            "place_error": place_error(query, key, places),
            "match_error": place_error(ours, theirs, places),
            "agreement": image_agreement(views[0], views[1], places),
            "usable": places.usable.float().mean(),
            "dense_queue_filled": self.dense_queue.filled.float().mean(),
        }
        return super().health(views) | {name: float(value) for name, value in figures.items()}

    def pictures(self, views: Views) -> dict[str, Tensor]:
        """Return both views, and how similar each position of the second is to the middle of the first."""
        student, teacher = self.encoder.stages(views[0].image), self._teachers_stages(views[1])
        size = views[0].image.shape[2:]
        middle = torch.zeros(len(views[0].image), 1, 3, device=views[0].image.device)
        middle[:, 0, 3 - len(size) :] = torch.tensor([(edge - 1) / 2 for edge in size], device=middle.device)
        query = self.dense_projector(features_at(student[self.dense_stage], middle, size))[:, 0]
        embedded = self.teacher["dense_projector"](teacher[self.dense_stage].movedim(1, -1)).movedim(-1, 1)
        return {
            "first": views[0].image,
            "second": views[1].image,
            "similarity": similarity_map(query, embedded, size),
        }

    @torch.no_grad()
    def _teachers_stages(self, view: View) -> list[Tensor]:
        return self.teacher.encoder.stages(view.image)

    def _global_query(self, stages: Sequence[Tensor]) -> Tensor:
        return at_least_float32(self.projector(self._pooled(stages)))

    @torch.no_grad()
    def _global_key(self, stages: Sequence[Tensor]) -> Tensor:
        return unit_rows(at_least_float32(self.teacher["projector"](self._pooled(stages))))

    @torch.no_grad()
    def _mean_dense_key(self, stages: Sequence[Tensor]) -> Tensor:
        """Return the mean of the dense keys of a crop, of length 1. Shape: (B, D)."""
        positions = at_least_float32(stages[self.dense_stage]).flatten(2).mT
        return unit_rows(at_least_float32(self.teacher["dense_projector"](positions)).mean(dim=1))

    def _pooled(self, stages: Sequence[Tensor]) -> Tensor:
        chosen = chosen_stages(self.encoder, self.settings.stages)
        return torch.cat([at_least_float32(stages[stage]).flatten(2).mean(dim=2) for stage in chosen], dim=1)

    def _dense_pairs(
        self,
        views: Views,
        places: Places,
        student: dict[int, list[Tensor]],
        teacher: dict[int, list[Tensor]],
        asked: int,
        answered: int,
    ) -> tuple[Tensor, Tensor]:
        """Return the query and the key of each place. Shape of each: (B, N, D)."""
        size, voxels = views[0].image.shape[2:], (places.first, places.second)
        ours, theirs = student[asked][self.dense_stage], teacher[answered][self.dense_stage]
        features = features_at(ours, voxels[asked], size)
        with torch.no_grad():
            if self.settings.correspondence == "geometric":
                found = features_at(theirs, voxels[answered], size)
            else:
                found = most_similar(features, theirs, views[answered].inside)
            key = at_least_float32(self.teacher["dense_projector"](found))
        return at_least_float32(self.dense_projector(features)), key

    def _dense_contrast(self, query: Tensor, key: Tensor, places: Places, mean_key: Tensor, volumes: Tensor) -> Tensor:
        """Return the contrast of the places of this rank with the mean keys of all, their mean over all ranks' places.

        Args:
            query: Shape: (B, N, D).
            key: Shape: (B, N, D).
            places: Of this rank.
            mean_key: Of the samples of all ranks. Shape: (world * B, D).
            volumes: Of the samples of all ranks. Shape: (world * B,).
        """
        mine = torch.arange(len(query), device=query.device) * world_size() + rank()
        if self.settings.same_volume == "left-out":
            groups, of_queue = volumes, self.dense_queue.volumes
        else:
            groups = torch.arange(len(mean_key), device=query.device)
            of_queue = torch.full_like(self.dense_queue.volumes, NO_VOLUME)
        loss = queue_contrast(
            query.flatten(0, 1),
            key.flatten(0, 1),
            torch.cat([self.dense_queue.rows, mean_key]),
            self.settings.temperature,
            valid=torch.cat([self.dense_queue.filled, torch.ones_like(volumes, dtype=torch.bool)]),
            groups=groups[mine].repeat_interleave(query.shape[1]),
            queue_groups=torch.cat([of_queue, groups]),
            counted=places.usable.flatten(),
        )
        count = places.usable.sum().float()
        return loss * (count / mean_across_ranks(count).clamp(min=1))


def most_similar(features: Tensor, other: Tensor, inside: Tensor) -> Tensor:
    """Return, for each place, the features of that position of the other view which resemble its own most.

    Args:
        features: At the places of one view. Shape: (B, N, C).
        other: Map of the other view. Shape: (B, C, *grid).
        inside: Where the other view shows tissue of the volume; positions that show mostly padding are not matched.
            Shape: (B, 1, *spatial), bool.

    Returns:
        Shape: (B, N, C).
    """
    rows = at_least_float32(other).flatten(2).mT
    stride = [edge // cells for edge, cells in zip(inside.shape[2:], other.shape[2:], strict=True)]
    outside = ~mostly(inside, stride).flatten(1)
    cosines = product(F.normalize(features, dim=2), F.normalize(rows, dim=2).mT).masked_fill(
        outside[:, None], -torch.inf
    )
    best = cosines.argmax(dim=2)
    return rows.gather(1, best[:, :, None].expand(-1, -1, rows.shape[2]))
