"""A linear head on the stages of an encoder that tells the classes of voxels apart, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

#: Part of the pooled covariance that is replaced by its mean variance.
SHRINKAGE = 1e-3


@dataclass(frozen=True)
class VoxelHead:
    """Logits that are linear in the features of a voxel; what a 1x1 convolution on upsampled stages computes.

    Args:
        weights: For each stage. Shape: (widths[s], K).
        bias: Shape: (K,).
    """

    weights: tuple[Tensor, ...]
    bias: Tensor

    def __call__(self, stages: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Return logits. A 1x1 convolution and an interpolation can be exchanged, so that few channels are upsampled.

        Args:
            stages: Features of the stages. Shape of each: (B, widths[s], *coarser).
            size: Of the image, 2 or 3 numbers.

        Returns:
            Shape: (B, K, *size), float32.
        """
        total = self.bias.reshape(1, -1, *(1,) * len(size))
        for weight, features in zip(self.weights, stages, strict=True):
            logits = torch.einsum("bc...,ck->bk...", features.float(), weight)
            if logits.shape[2:] != tuple(size):
                mode = "trilinear" if len(size) == 3 else "bilinear"
                logits = F.interpolate(logits, size=tuple(size), mode=mode, align_corners=False)
            total = total + logits
        return total


def fit_voxel_head(features: Tensor, classes: Tensor, priors: Tensor, widths: Sequence[int]) -> VoxelHead:
    """Return Fisher's linear discriminant: Gaussian classes of one covariance, weighed by how frequent they are.

    Computed in float64. A direction in which no feature varies gets no weight.

    Args:
        features: Of drawn voxels, all stages side by side. Shape: (N, sum of widths).
        classes: Class of each voxel, 0 to K - 1. Shape: (N,), int64.
        priors: Frequency of each class among all voxels; one of 0 is never answered. Shape: (K,).
        widths: Channels of each stage.

    Raises:
        ValueError: If shapes do not fit, or a class that is answered has no voxel.
    """
    if features.ndim != 2 or features.shape != (len(classes), sum(widths)):
        raise ValueError(
            f"Features of {tuple(features.shape)} do not fit {len(classes)} voxels of {sum(widths)} channels"
        )
    rows, count = features.double(), len(priors)
    members = F.one_hot(classes, count).double()
    sizes = members.sum(dim=0)
    if bool(((sizes == 0) & (priors.to(sizes.device) > 0)).any()):
        raise ValueError("A class with a prior above 0 has no voxel to learn from")
    centre, scale = rows.mean(dim=0), rows.std(dim=0, correction=0)
    scale = torch.where(scale > 1e-6 * centre.abs().clamp(min=1e-6), scale, torch.inf)
    rows = (rows - centre) / scale
    means = members.T @ rows / sizes.clamp(min=1)[:, None]
    within = rows - means[classes]
    covariance = within.T @ within / max(len(rows) - count, 1)
    width = covariance.shape[0]
    ridge = (SHRINKAGE * covariance.diagonal().mean()).clamp(min=1e-12)
    covariance = covariance + ridge * torch.eye(width, dtype=covariance.dtype, device=covariance.device)
    directions = torch.linalg.solve(covariance, means.T)
    bias = priors.to(means).log() - 0.5 * (means * directions.T).sum(dim=1)
    weights = directions / scale[:, None]
    bias = bias - centre @ weights
    return VoxelHead(tuple(part.float() for part in weights.split(list(widths))), bias.float())


def features_at(stages: Sequence[Tensor], points: Tensor, size: Sequence[int]) -> Tensor:
    """Return the features at some voxels of one image, as if each stage were upsampled to it.

    Args:
        stages: Features of one image. Shape of each: (1, widths[s], *coarser).
        points: Voxels, in the order of the axes. Shape: (N, 2 or 3), int64.
        size: Of the image.

    Returns:
        Shape: (N, sum of widths), float32.
    """
    edges = torch.tensor(list(size), dtype=torch.float32, device=points.device)
    # From -1 to 1 over the image's outer edges, the last axis first: what `grid_sample` asks for.
    places = ((2 * points.float() + 1) / edges - 1).flip(-1)
    grid = places.reshape(1, *(1,) * (len(size) - 1), -1, len(size))
    found = [
        F.grid_sample(features.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        for features in stages
    ]
    return torch.cat([values.flatten(2)[0].T for values in found], dim=1)


def mean_dice(answers: Sequence[Tensor], truths: Sequence[Tensor], classes: int) -> float:
    """Return the Dice of each foreground class over all images together, and of these the mean.

    Args:
        answers: Classes of the voxels of each image.
        truths: The same, of the label.
        classes: K, with background.

    Returns:
        NaN if no class is in label or answer.
    """
    answer, truth = (torch.cat([part.flatten() for part in parts]) for parts in (answers, truths))
    hit = torch.bincount(truth[answer == truth], minlength=classes)[1:]
    total = (torch.bincount(answer, minlength=classes) + torch.bincount(truth, minlength=classes))[1:]
    here = total > 0
    return float((2 * hit[here] / total[here]).mean()) if bool(here.any()) else float("nan")
