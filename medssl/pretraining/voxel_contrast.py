"""Contrast of points: the same point of a volume looks the same in two views, and unlike points some mm away.

vox2vec (Goncharov et al., MICCAI 2023) and SAM (Yan et al., IEEE TMI 2022) in one sampler. Points are drawn in mm
within what both views show, on tissue. A fine head looks at all stages and tells points apart that lie some mm from
each other, as vox2vec's; a coarse head looks at the coarse stages with radii that are larger, as SAM's. Distances are
in mm through the views' own maps, so that anisotropic voxels, turns, zoom and mirroring are answered for. The encoder
transfers; the heads are saved beside it for `medssl match`.

Deviations: no decoder (vox2vec and SAM have a feature pyramid), since the encoder is what transfers; layer norm in the
heads and not batch norm, since they meet single volumes later; no mined negatives, see `medssl.losses.voxel_contrast`.
All points of the batch are compared across ranks.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from medssl.augmentation.correspondence import to_source_mm, to_view_voxels, values_at
from medssl.augmentation.policy import Policy
from medssl.augmentation.transform import to_device
from medssl.config import Settings
from medssl.data.batch import Batch, View, Views
from medssl.data.draw import Draw
from medssl.losses.similarity import product
from medssl.losses.voxel_contrast import voxel_contrast
from medssl.networks.encoder import Encoder
from medssl.networks.pooling import chosen_stages
from medssl.pretraining.heads import Norm, ProjectorSettings
from medssl.pretraining.health import effective_rank, feature_std
from medssl.pretraining.voxel_head import VoxelHead
from medssl.training.distributed import gather
from medssl.training.method import Method, Needs, Step

#: What the head's weights are called in a checkpoint.
PREFIX = "voxel."
#: Points that are drawn for each one that is wanted: not all lie in both views and on tissue.
CANDIDATES = 8


class HeadSettings(ProjectorSettings):
    """The perceptron of a head that embeds points.

    Args:
        hidden: Width of the hidden layers.
        width: Length of an embedding.
        layers: Linear layers.
        norm: Between the layers: `layer`, or `none`.
        last_norm: Whether the output is normalised too, without scale and shift.
    """

    hidden: int = Field(default=256, ge=1)
    width: int = Field(default=64, ge=1)
    layers: int = Field(default=2, ge=1)
    norm: Norm = "layer"

    @model_validator(mode="after")
    def _of_single_volumes(self) -> Self:
        if self.norm == "batch":
            raise ValueError("a head for points needs the norm layer or none: it meets single volumes later")
        return self


class VoxelContrastSettings(Settings):
    """Settings of the contrast of points.

    Args:
        points: Points of each crop.
        positive_mm: Points up to this distance are taken for the same one.
        ignore_radius_mm: Points nearer than this that are not the same are neither alike nor unlike.
        coarse_factor: By how much both radii are larger for the coarse head.
        temperature: Cosines are divided by it.
        other_volumes: Whether points of other volumes are negatives. Where all volumes show one organ, some of these
            are the same anatomy.
        tissue_margin: A point is on tissue if its normalised intensity differs by more than this from the background;
            0 takes every voxel that is not exactly background.
        overlap: Smallest and largest part of a crop that both views show; None draws them apart, within the policy's
            shift.
        stages: Stages that the fine head looks at: `all`, or numbers.
        coarse_stages: Stages of the coarse head, counted from the coarsest if negative; none leaves it out.
        head: The perceptron of both heads.
    """

    points: int = Field(default=256, ge=2)
    positive_mm: float = Field(default=2.0, ge=0)
    ignore_radius_mm: float = Field(default=6.0, ge=0)
    coarse_factor: float = Field(default=3.0, ge=1)
    temperature: float = Field(default=0.1, gt=0)
    other_volumes: bool = True
    tissue_margin: float = Field(default=0.25, ge=0)
    overlap: tuple[float, float] | None = None
    stages: tuple[int, ...] | None = None
    coarse_stages: tuple[int, ...] = (-2, -1)
    head: HeadSettings = HeadSettings()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.positive_mm > self.ignore_radius_mm:
            raise ValueError(
                f"positive_mm {self.positive_mm} lies beyond ignore_radius_mm {self.ignore_radius_mm}: same points "
                "would be neither alike nor unlike"
            )
        if self.overlap is not None and not 0 <= self.overlap[0] < self.overlap[1] <= 1:
            raise ValueError(f"the overlap is a range within 0 to 1, got {self.overlap}")
        return self


class VoxelContrast(Method):
    """Embeds points of two views alike where they are the same in mm.

    Args:
        network: U-Net; only its encoder learns.
        policy: Augmentation for contrastive views.
        settings: See `VoxelContrastSettings`.

    Raises:
        UsageError: If the encoder has no such stages.
    """

    needs: ClassVar[Needs] = Needs(views=2, policy="contrastive")

    def __init__(self, network: nn.Module, policy: Policy, settings: VoxelContrastSettings) -> None:
        super().__init__()
        self.network = network
        self.encoder = Encoder(network)
        self.policy = policy
        self.settings = settings
        stages = {"fine": chosen_stages(self.encoder, "all" if settings.stages is None else settings.stages)}
        if settings.coarse_stages:
            stages["coarse"] = chosen_stages(self.encoder, settings.coarse_stages)
        deepest = max(max(chosen) for chosen in stages.values())
        # Nothing reaches what lies below; DDP would wait for its gradients.
        self.encoder.unet.encoder.stages[deepest + 1 :].requires_grad_(False)  # type: ignore[union-attr, index]
        self.heads = nn.ModuleDict(
            {name: VoxelHead(self.encoder.widths, chosen, settings.head) for name, chosen in stages.items()}
        )

    def views(self, batch: Batch, draw: Draw) -> Views:
        """Make two views and draw points that both show; each view's parameters hold its voxels of them."""
        overlap = self.settings.overlap
        views = self.policy.two(batch, draw) if overlap is None else self.policy.pair(batch, draw, overlap)
        first, second = views
        count = self.settings.points
        size = torch.tensor((1,) * (5 - first.image.ndim) + tuple(first.image.shape[2:]))
        place = draw.child("points").uniform(0, 1, (CANDIDATES * count, 3))
        # A slice has no depth to draw from.
        voxels = to_device((place * size - 0.5) * (size > 1), first.image.device)
        positions = to_source_mm(first, voxels)
        others, seen = to_view_voxels(second, positions)
        seen = seen & _inside(first, voxels) & _inside(second, others)
        seen = seen & _on_tissue(batch, positions, self.settings.tissue_margin)
        # Those that count come first, in the order in which they were drawn.
        order = (~seen).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
        valid = seen.gather(1, order)
        three = order[:, :, None].expand(-1, -1, 3)
        for view, found in ((first, voxels), (second, others)):
            view.parameters["points"] = {
                "voxels": found.gather(1, three),
                "position_mm": positions.gather(1, three),
                "valid": valid,
            }
        return views

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        """Return the contrast of the points of the whole batch for each head."""
        settings, points = self.settings, views[0].parameters["points"]
        positions, valid = gather(points["position_mm"]).flatten(0, 1), gather(points["valid"].float()).flatten() > 0.5
        groups = _volumes(views[0], points["valid"])
        embedded = [self.embed(view) for view in views]
        terms = {}
        for name in self.heads:
            factor = settings.coarse_factor if name == "coarse" else 1.0
            first, second = (gather(of_view[name]).flatten(0, 1) for of_view in embedded)
            terms[name] = voxel_contrast(
                first,
                second,
                positions_mm=positions,
                groups=groups,
                valid=valid,
                positive_mm=factor * settings.positive_mm,
                ignore_radius_mm=factor * settings.ignore_radius_mm,
                temperature=settings.temperature,
                other_volumes=settings.other_volumes,
            )
        return terms

    def embed(self, view: View) -> dict[str, Tensor]:
        """Return each head's embeddings of a view's points. Shape of each: (B, N, D), float32, rows of length 1."""
        stages = self.encoder.stages(view.image)
        voxels, size = view.parameters["points"]["voxels"], view.image.shape[2:]
        return {name: head(stages, voxels, size) for name, head in self.heads.items()}

    def health(self, views: Views) -> dict[str, float]:
        """Return whether points are found again and told apart.

        `match_error` and `coarse_match_error`: distance in mm from a point to the one in the other view of its crop
        that looks most like it, relative to the mean distance of two points: 0 is perfect, 1 is chance. Then the mean
        cosine of a point's two views and of different points, the spread of embeddings (0 on collapse), and the part
        of the points that lie on tissue in both views.
        """
        points = views[0].parameters["points"]
        embedded = [self.embed(view) for view in views]
        valid = points["valid"]
        places = points["position_mm"]
        distance = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
        figures: dict[str, Tensor] = {}
        for name in self.heads:
            cosines = product(embedded[0][name], embedded[1][name].transpose(1, 2))
            figures["match_error" if name == "fine" else f"{name}_match_error"] = match_error(cosines, distance, valid)
        fine = product(embedded[0]["fine"], embedded[1]["fine"].transpose(1, 2))
        both = valid[:, :, None] & valid[:, None]
        same = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
        rows = embedded[0]["fine"][valid] if int(valid.sum()) > 1 else embedded[0]["fine"].flatten(0, 1)
        figures |= {
            "positive_similarity": _mean(fine, both & same),
            "negative_similarity": _mean(fine, both & ~same),
            "embedding_std": feature_std(rows),
            "effective_rank": effective_rank(rows),
            "valid_points": valid.float().mean(),
        }
        return dict(zip(figures, torch.stack(list(figures.values())).tolist(), strict=True))

    def exported_heads(self) -> dict[str, Tensor]:
        """Return the weights of both heads, for `medssl match`."""
        return {PREFIX + name: value for name, value in self.heads.state_dict().items()}


def match_error(cosines: Tensor, distance_mm: Tensor, valid: Tensor) -> Tensor:
    """Return how far the likeliest match of a point lies from it, relative to the mean distance of two points.

    Args:
        cosines: Of each point of the first view with each of the second. Shape: (B, N, N).
        distance_mm: Of the points. Shape: (B, N, N).
        valid: Which points count. Shape: (B, N), bool.

    Returns:
        Scalar: 0 where each point finds itself, 1 for chance.
    """
    found = cosines.masked_fill(~valid[:, None], -2.0).argmax(dim=2, keepdim=True)
    error = _mean(distance_mm.gather(2, found)[:, :, 0], valid)
    return error / _mean(distance_mm, valid[:, :, None] & valid[:, None]).clamp(min=1e-6)


def _volumes(view: View, valid: Tensor) -> Tensor:
    """Return the number of the volume of each point of all ranks. Shape: (world * B * N,), int64."""
    if view.sample_id is None:
        raise ValueError("The views do not say which volume they show: make them with VoxelContrast.views")
    return gather(view.sample_id)[:, None].expand(-1, valid.shape[1]).flatten()


def _inside(view: View, voxels: Tensor) -> Tensor:
    """Return whether points lie on voxels of the volume and not on padding. Shape: (B, N), bool."""
    return values_at(view.inside.float(), voxels, view.image.shape[2:], mode="nearest")[:, 0] > 0.5


def _on_tissue(batch: Batch, positions_mm: Tensor, margin: float) -> Tensor:
    """Return whether points lie on tissue, told from the crop before any change of intensity. Shape: (B, N), bool."""
    image = batch.image
    origin, spacing, background = (
        to_device(values, image.device) for values in (batch.origin_mm, batch.spacing_mm, batch.background)
    )
    voxels = (positions_mm - origin[:, None]) / spacing[:, None]
    values = values_at(image[:, :1], voxels, image.shape[2:], mode="nearest")[:, 0]
    return (values - background[:, None]).abs() > margin


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, values, 0.0).sum() / where.sum().clamp(min=1)
