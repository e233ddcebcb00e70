"""Looks at an encoder that trains: without labels, at labelled images, at labelled voxels. No random choice in any."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medssl.data.targets import Targets
from medssl.networks.encoder import Encoder
from medssl.networks.pooling import pooled_stages
from medssl.training.collapse import figures
from medssl.training.heads import Cases, Head, Neighbours, prototypes
from medssl.training.quality import alignment
from medssl.training.ranking import Floats
from medssl.training.ridge import ridge_probe
from medssl.training.scores import classification_metrics
from medssl.training.voxel_head import VoxelHead, features_at, fit_voxel_head, mean_dice

#: Images that are shown to the encoder at once.
BATCH = 8
#: Of what `medssl.training.collapse.figures` finds, what is written.
QUALITY = ("rankme", "centred_rank", "alpha", "alpha_fit", "uniformity", "norm", "norm_spread", "deviation",
           "idle_dimensions")  # fmt: skip
NEIGHBOURS = 10
SHOTS, DRAWS = 5, 10


@dataclass(frozen=True)
class QualityLook:
    """Label-free quality of the pooled last stage.

    Args:
        crops: What is looked at. Shape: (N, C, *patch), N >= 2.
        views: Two augmented views of the first of them. Shape of each: (M, C, *patch).
    """

    crops: Tensor
    views: tuple[Tensor, Tensor]

    def figures(self, encoder: Encoder, device: torch.device) -> dict[str, float]:
        """Return RankMe, alpha-ReQ, uniformity, lengths and deviations of features, and how views of a crop align."""
        found = figures(_pooled(encoder, self.crops, device, "last"))
        first, second = (_pooled(encoder, view, device, "last") for view in self.views)
        values = {name: found[name] for name in QUALITY}
        return {
            f"quality/{name}": value
            for name, value in (values | {"alignment": float(alignment(first, second))}).items()
        }


@dataclass(frozen=True)
class LabelledImages:
    """Labelled images at the size of the patch.

    Args:
        images: Shape: (N, C, *patch).
        targets: What they show, in the same order; the split says which a probe learns from.
    """

    images: Tensor
    targets: Targets


@dataclass(frozen=True)
class LabelledLook:
    """Heads on the pooled features of all stages of frozen images.

    Cheaper than `medssl evaluate probe`, which chooses settings in folds: `linear` is a ridge regression in closed
    form, `knn` has ten neighbours, `prototypes` averages ten draws of five cases of each class, or as many as there
    are.

    Args:
        labelled: The images.
        kinds: Which heads.
    """

    labelled: LabelledImages
    kinds: tuple[str, ...]

    def figures(self, encoder: Encoder, device: torch.device) -> dict[str, float]:
        """Return AUROC and balanced accuracy of each head on the validation cases."""
        targets = self.labelled.targets
        features = _pooled(encoder, self.labelled.images, device, "all").double().cpu().numpy()
        learn, judge = (self._cases(features, split) for split in ("train", "validation"))
        kind: Any = targets.kind
        values: dict[str, float] = {}
        for name in self.kinds:
            if not np.isfinite(features).all():
                scores = [(math.nan, math.nan)]
            else:
                answers = [head(judge.features) for head in self._heads(name, learn)]
                scores = [_scores(answer, judge, kind) for answer in answers]
            values[f"probe/{name}"], values[f"probe/{name}_balanced_accuracy"] = np.mean(scores, axis=0).tolist()
        return values

    def _heads(self, name: str, learn: Cases) -> Iterator[Head]:
        targets = self.labelled.targets
        kind: Any = targets.kind
        count = len(targets.classes)
        if name == "linear":
            yield ridge_probe(learn, kind, count).head
        elif name == "knn":
            yield Neighbours(learn, kind, count, NEIGHBOURS)
        else:
            shots = min(SHOTS, int(np.bincount(learn.targets, minlength=count).min()))
            for draw in range(DRAWS):
                head = prototypes(learn, kind, count, shots, draw)
                assert head is not None
                yield head

    def _cases(self, features: Floats, split: str) -> Cases:
        targets = self.labelled.targets
        rows = np.flatnonzero([case.split == split for case in targets.cases])
        return Cases(features[rows], targets.array([targets.cases[row] for row in rows]))


@dataclass(frozen=True)
class LabelledCrops:
    """Crops with masks.

    Args:
        images: Shape: (N, C, *patch).
        masks: Class of each voxel, 0 to K - 1. Shape: (N, *patch), int64.
    """

    images: Tensor
    masks: Tensor


@dataclass(frozen=True)
class VoxelLook:
    """A linear head on the stages: what a 1x1 convolution can tell of the masks.

    Args:
        learn: Crops that it learns from.
        judge: Crops that it is measured on.
        points: Voxels of each of `learn` that it learns from. Shape of each: (M, dimensions), int64.
        classes: K, with background.
    """

    learn: LabelledCrops
    judge: LabelledCrops
    points: tuple[Tensor, ...]
    classes: int

    def figures(self, encoder: Encoder, device: torch.device) -> dict[str, float]:
        """Return the Dice of the classes, of each over all crops, and of these the mean."""
        size = self.learn.images.shape[2:]
        rows, classes = [], []
        for image, mask, points in zip(self.learn.images, self.learn.masks, self.points, strict=True):
            stages = encoder.stages(image[None].to(device))
            rows.append(features_at(stages, points.to(device), size))
            classes.append(mask[tuple(points.T)])
        features = torch.cat(rows)
        if not bool(torch.isfinite(features).all()):
            return {"probe/segmentation": math.nan}
        frequency = torch.bincount(self.learn.masks.flatten(), minlength=self.classes).double()
        head = fit_voxel_head(
            features, torch.cat(classes).to(device), (frequency / frequency.sum()).to(device), encoder.widths
        )
        answers = [self._answer(head, encoder, image, device) for image in self.judge.images]
        return {"probe/segmentation": mean_dice(answers, list(self.judge.masks), self.classes)}

    @staticmethod
    def _answer(head: VoxelHead, encoder: Encoder, image: Tensor, device: torch.device) -> Tensor:
        return head(encoder.stages(image[None].to(device)), image.shape[1:])[0].argmax(dim=0).cpu()


def drawn_points(masks: Tensor, classes: int, count: int) -> tuple[Tensor, ...]:
    """Return voxels of each mask, half of them spread over its classes alike and the others over all of it.

    Args:
        masks: Shape: (N, *patch).
        classes: K.
        count: Voxels of each mask, about.

    Returns:
        The same at every call. Shape of each: (M, dimensions).
    """
    found = []
    for number, mask in enumerate(masks):
        rng = np.random.default_rng([number, count])
        flat = mask.flatten().numpy()
        drawn = [rng.choice(flat.size, min(count // 2, flat.size), replace=False)]
        for name in range(classes):
            members = np.flatnonzero(flat == name)
            drawn.append(rng.choice(members, min(count // (2 * classes), members.size), replace=False))
        places = np.unravel_index(np.unique(np.concatenate(drawn)), mask.shape)
        found.append(torch.from_numpy(np.stack(places, axis=1)))
    return tuple(found)


def _pooled(encoder: Encoder, images: Tensor, device: torch.device, stages: Any) -> Tensor:
    parts = [pooled_stages(encoder, part.to(device), stages) for part in images.split(BATCH)]
    return torch.cat(parts).float()


def _scores(probabilities: Floats, judge: Cases, kind: Any) -> tuple[float, float]:
    clipped = np.clip(probabilities, 0, 1)
    rows = clipped if kind == "multilabel" else clipped / clipped.sum(axis=1, keepdims=True)
    metrics = classification_metrics(rows, judge.targets, kind)
    return metrics["auroc"], metrics["balanced_accuracy"]
