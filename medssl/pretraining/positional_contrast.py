"""Contrast by position: crops that lie equally high in the body resemble each other, whoever they come from.

Chaitanya et al., "Contrastive learning of global and local features", NeurIPS 2020 (arXiv 2006.10511), global loss GD.
Volumes of one region that are oriented alike and cover the same part of the body show the same anatomy at the same
fraction of their extent. Both must hold: in a store of mixed regions, of volumes that are cut differently or turned
over, positives are false. `position_error` among the health figures then stays near 1.

Deviations: the paper cuts volumes into four partitions, whose borders part neighbours and join what lies a quarter of
the volume apart. Here the position is continuous and a pair weighs exp(-d^2 / (2 sigma^2)); see
`medssl.losses.weighted_contrast`, also for the denominator. The position of each view is known by itself, through what
moved it. Crops instead of slices make it a method for 3D too, where a position may have several axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from medssl.augmentation.correspondence import to_source_mm
from medssl.augmentation.policy import Policy
from medssl.augmentation.transform import to_device
from medssl.config import Settings
from medssl.data.batch import Batch, View, Views
from medssl.data.draw import Draw
from medssl.errors import UsageError
from medssl.losses.precision import at_least_float32
from medssl.losses.similarity import product, unit_rows
from medssl.losses.weighted_contrast import position_weights, weighted_rows
from medssl.pretraining.heads import ProjectorSettings
from medssl.pretraining.joint import JointEmbedding, JointSettings
from medssl.training.distributed import gather
from medssl.training.method import Needs, Step

Axis = Literal["z", "y", "x"]
AXES: tuple[Axis, ...] = ("z", "y", "x")
NAME = "position"


class PositionContrastSettings(JointSettings):
    """Settings of contrast by position.

    Args:
        stages: Which stages of the encoder are pooled, `all` or the `last` one.
        overlap: Smallest and largest part of a crop that both views show; None draws them apart, within the policy's
            shift.
        projector: The head whose output is contrasted; it is thrown away.
        embedding_norm: How the length of embeddings is controlled.
        axes: Axes of the volume along which positions are compared.
        sigma: Distance, as a part of the volume's extent, at which a pair weighs exp(-1/2). With 0.1 the positives
            weigh together what a partition of a quarter holds: sigma sqrt(2 pi) = 1/4.
        reach: Distance in sigmas beyond which a pair is a negative alone; 2.5 sigmas of 0.1 are the paper's quarter.
        temperature: Cosines are divided by it.
    """

    projector: ProjectorSettings = ProjectorSettings(hidden=512, width=128)
    axes: tuple[Axis, ...] = ("z",)
    sigma: float = Field(default=0.1, gt=0, le=1)
    reach: float = Field(default=2.5, gt=0)
    temperature: float = Field(default=0.1, gt=0)

    @field_validator("axes")
    @classmethod
    def _named_once(cls, value: tuple[Axis, ...]) -> tuple[Axis, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError(f"name one or more of z, y, x, each once; got {value}")
        return value


class PositionContrast(JointEmbedding):
    """Draws crops together that lie at one position of different volumes, and the others apart.

    Args:
        network: U-Net; only its encoder learns.
        policy: Augmentation for contrastive views.
        settings: See `PositionContrastSettings`.
    """

    needs: ClassVar[Needs] = Needs(views=2, policy="contrastive", least_batch=2, least_volumes=2)
    settings: PositionContrastSettings

    def __init__(self, network: nn.Module, policy: Policy, settings: PositionContrastSettings) -> None:
        super().__init__(network, policy, settings)
        self.axes = [AXES.index(axis) for axis in settings.axes]

    @classmethod
    def misfit(cls, settings: Settings, patch_size: Sequence[int], shapes: Sequence[Sequence[int]]) -> str | None:
        """Return why positions tell crops of these volumes nothing, or None."""
        assert isinstance(settings, PositionContrastSettings)
        patch = (1,) * (3 - len(patch_size)) + tuple(patch_size)
        named, axes = ", ".join(settings.axes), [AXES.index(axis) for axis in settings.axes]
        if all(shape[axis] == 1 for shape in shapes for axis in axes):
            return (
                f"position-contrast compares positions along {named}, where every volume of this store has one slice. "
                "SimCLR needs no position."
            )
        # From the first to the last place of a patch, the largest along any of the axes.
        spread = sorted(max(max(shape[axis] - patch[axis], 0) / shape[axis] for axis in axes) for shape in shapes)
        middle = spread[len(spread) // 2]
        if middle < settings.sigma:
            return (
                f"patch_size {list(patch_size)}: position-contrast compares positions along {named}, and in the median "
                f"volume the middles of patches lie at most {middle:.2f} of it apart, less than sigma "
                f"{settings.sigma:g}: all would be one position. Lower patch_size along {named}."
            )
        return None

    def views(self, batch: Batch, draw: Draw) -> Views:
        """Make two views of each crop, each with its position as `parameters["position"]["fraction"]`, (B, 3).

        Raises:
            UsageError: If it is not known how large the volumes are.
        """
        views = super().views(batch, draw)
        for view in views:
            view.parameters[NAME] = {"fraction": position_in_volume(view, batch.spacing_mm)}
        return views

    def objective(self, projections: list[Tensor], views: Views, step: Step) -> dict[str, Tensor]:
        """Return the contrast of all views of the batch, weighed by their distance, as `contrast`."""
        rows, weights = at_least_float32(torch.cat(projections)), self.weights(self.positions(views))
        return {"contrast": weighted_rows(rows, weights, self.settings.temperature)}

    def positions(self, views: Views) -> Tensor:
        """Return the positions of all views over all ranks along the chosen axes. Shape: (V * N, P)."""
        return torch.cat([gather(view.parameters[NAME]["fraction"][:, self.axes]) for view in views])

    def weights(self, positions: Tensor) -> Tensor:
        """Return how far each pair of rows is positive.

        Args:
            positions: Of the first views, then of the second. Shape: (2N, P).

        Returns:
            1 for two views of one sample; 0 beyond the reach. Shape: (2N, 2N), float32.
        """
        settings = self.settings
        weights = position_weights(positions, sigma=settings.sigma)
        distance = torch.cdist(positions, positions, compute_mode="donot_use_mm_for_euclid_dist")
        near = torch.where(distance <= settings.reach * settings.sigma, weights, 0.0)
        own = torch.eye(len(positions) // 2, dtype=torch.bool, device=positions.device).repeat(2, 2)
        return near.masked_fill(own, 1.0)

    def health(self, views: Views) -> dict[str, float]:
        """Return the figures of `joint_health`, and whether embeddings know where they come from.

        `position_error`: mean distance along the axes from the most similar first view of another volume, over the
        mean distance from all of them; 1 by chance, less where alike means near. `near_similarity` and
        `far_similarity`: mean cosine of different samples within and beyond the reach, 0 where there are none.
        `positives`: weight of the positives of a row beside its own sample's; where it is 0 the method is SimCLR.
        """
        rows = unit_rows(torch.cat([gather(self.project(view)) for view in views]))
        positions = self.positions(views)
        weights, count = self.weights(positions), len(positions) // 2
        others = ~torch.eye(count, dtype=torch.bool, device=rows.device).repeat(2, 2)
        near, cosines = weights > 0, product(rows, rows.T)
        figures = {
            "positives": (weights * others).sum(dim=1).mean(),
            "near_similarity": _mean_where(cosines, near & others),
            "far_similarity": _mean_where(cosines, ~near & others),
            "position_error": position_error(rows[:count], positions[:count], _volumes(views[0])),
        }
        return super().health(views) | {name: float(value) for name, value in figures.items()}


def position_in_volume(view: View, spacing_mm: Tensor) -> Tensor:
    """Return where the middle of a view lies in its volume: 0 at its first face along an axis, 1 at its last.

    Args:
        view: Views with `extent_mm`.
        spacing_mm: Voxel size of the volume. Shape: (B, 3).

    Returns:
        Fractions (z, y, x). Shape: (B, 3), float32, on the view's device.

    Raises:
        UsageError: If the extent is not known.
    """
    if view.extent_mm is None:
        raise UsageError(
            "position-contrast asks how high a crop lies in its volume, and this batch does not say how large volumes "
            "are: fill Batch.extent_mm, or use --method simclr."
        )
    size = view.image.shape[2:]
    edges = (1,) * (3 - len(size)) + tuple(size)
    middle = torch.tensor([[(edge - 1) / 2 for edge in edges]]).expand(len(view.image), 1, 3)
    device = view.image.device
    # Positions count from the middle of the first voxel, half a voxel behind the face.
    from_face = to_source_mm(view, to_device(middle, device))[:, 0] + to_device(spacing_mm, device) / 2
    return from_face / view.extent_mm


def position_error(rows: Tensor, positions: Tensor, volumes: Tensor) -> Tensor:
    """Return how far, along the axes, the most similar row of another volume lies, over the mean of all of them.

    Args:
        rows: Embeddings of length 1. Shape: (N, D).
        positions: Shape: (N, P).
        volumes: The volume of each. Shape: (N,). If all are one, other rows of it take the place of other volumes'.

    Returns:
        Scalar; about 1 where similarity does not depend on the position.
    """
    distance = torch.cdist(positions, positions, compute_mode="donot_use_mm_for_euclid_dist")
    foreign = volumes[:, None] != volumes
    foreign = torch.where(foreign.any(), foreign, ~torch.eye(len(rows), dtype=torch.bool, device=rows.device))
    nearest = product(rows, rows.T).masked_fill(~foreign, -torch.inf).argmax(dim=1, keepdim=True)
    some = foreign.any(dim=1)
    found = torch.where(some, distance.gather(1, nearest)[:, 0], 0.0).sum()
    usual = (torch.where(foreign, distance, 0.0).sum(dim=1) / foreign.sum(dim=1).clamp(min=1)).sum()
    return found / usual.clamp(min=1e-12)


def _volumes(view: View) -> Tensor:
    if view.sample_id is None:
        return torch.zeros(len(gather(view.to_source_mm)), dtype=torch.int64, device=view.image.device)
    return gather(view.sample_id)


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, values, 0.0).sum() / where.sum().clamp(min=1)
