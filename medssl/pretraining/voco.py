"""VoCo: guess which base crops of its surroundings a crop overlaps, and by how much (Wu et al., CVPR 2024).

The patch is divided into a grid of base crops, and target crops of the same size are drawn anywhere in it. The cosine
of two embeddings has to be the part of the target's volume that lies in the base. A teacher follows the student,
without which the released code does not learn. Only the encoder transfers.

Deviations: labels are volumes of overlap along all axes, where the code takes areas in a plane of volumes that were
stretched to one size; all crops of a patch share its turn, zoom and mirroring, and only their intensities differ, where
the code mirrors and turns each by itself although its label says where it lies; the teacher's momentum rises from 0.99
to 1 (0.9 in the code); batch norm in the head is that of the batch, over all ranks. For the terms of the loss see
`medssl.losses.volume_contrast`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from medssl.augmentation.correspondence import box_overlap
from medssl.augmentation.policy import Policy
from medssl.augmentation.spatial_settings import SpatialSettings
from medssl.augmentation.transform import to_device
from medssl.config import Settings
from medssl.data.batch import Batch, View, Views
from medssl.data.draw import Draw
from medssl.errors import UsageError
from medssl.losses.precision import at_least_float32
from medssl.losses.similarity import product
from medssl.losses.volume_contrast import predicted_overlap, volume_contrast
from medssl.networks.encoder import Encoder
from medssl.networks.pooling import pooled_stages, pooled_width
from medssl.pretraining.distillation import teacher_lag
from medssl.pretraining.heads import Projector, ProjectorSettings
from medssl.pretraining.health import feature_std
from medssl.pretraining.teacher import Teacher, TeacherSettings
from medssl.training.distributed import gather
from medssl.training.method import Method, Needs, Step


class VoCoProjectorSettings(ProjectorSettings):
    """Three layers, the output normalised too; see `ProjectorSettings`."""

    width: int = Field(default=256, ge=1)
    layers: int = Field(default=3, ge=0)
    last_norm: bool = True


class VoCoSettings(Settings):
    """Settings of VoCo.

    Args:
        grid: Base crops along each axis of the patch; None takes 2 along each. A base's edges are multiples of the
            network's stride.
        targets: Crops whose overlap is to be guessed.
        projector: The head whose output is compared; it is thrown away.
        teacher: How the teacher follows.
    """

    grid: tuple[int, ...] | None = None
    targets: int = Field(default=4, ge=1)
    projector: VoCoProjectorSettings = VoCoProjectorSettings()
    teacher: TeacherSettings = TeacherSettings()

    @field_validator("grid")
    @classmethod
    def _two_or_more(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (min(value, default=0) < 1 or math.prod(value) < 2):
            raise ValueError(f"the grid needs one crop or more along each axis and two in all, got {list(value)}")
        return value

    def resolved(self, patch_size: Sequence[int]) -> Self:
        """Return the settings with two base crops along each axis where no grid is given."""
        return self if self.grid is not None else self.model_copy(update={"grid": (2,) * len(patch_size)})


class VoCo(Method):
    """Guesses the overlap of target crops with base crops.

    Args:
        network: U-Net; only its encoder learns.
        policy: Augmentation for contrastive views.
        settings: See `VoCoSettings`.

    Raises:
        UsageError: If the grid does not divide the patch into crops that the network takes.
    """

    needs: ClassVar[Needs] = Needs(views=12, policy="contrastive", whole_patch=True)

    def __init__(self, network: nn.Module, policy: Policy, settings: VoCoSettings) -> None:
        super().__init__()
        self.network = network
        self.encoder = Encoder(network)
        self.policy = policy
        self.settings = settings.resolved(policy.patch_size)
        assert self.settings.grid is not None
        self.size = base_size(policy.patch_size, self.settings.grid, self.encoder.strides[-1])
        self.projector = Projector(pooled_width(self.encoder), settings.projector)
        self.teacher = Teacher(settings.teacher, encoder=self.encoder, projector=self.projector)
        # The patch is moved as a whole, then each crop of it gets intensities of its own. What other libraries do may
        # move anatomy and is done to the patch.
        self.placing, self.changing = (
            Policy(
                policy.purpose,
                {name: own.model_copy(update=without) for name, own in policy.by_modality.items()},
                size,
                policy.settings,
            )
            for without, size in (
                ({"intensity": {}}, policy.patch_size),
                ({"spatial": SpatialSettings(), "library": ()}, self.size),
            )
        )

    @classmethod
    def needs_of(cls, settings: Settings) -> Needs:
        """Return the needs, with as many views as there are crops."""
        assert isinstance(settings, VoCoSettings)
        bases = math.prod(settings.grid) if settings.grid else 8
        return dataclasses.replace(cls.needs, views=bases + settings.targets)

    @property
    def bases(self) -> int:
        """Base crops of a patch."""
        assert self.settings.grid is not None
        return math.prod(self.settings.grid)

    def views(self, batch: Batch, draw: Draw) -> Views:
        """Cut the base crops of the grid, then target crops drawn evenly over the patch.

        Each is a view whose parameters hold its first voxel in the patch, `crop/start` (B, 3), on the image's device.
        """
        patch = self.placing.view(batch, draw.child("patch"))
        three, size = (_three(values) for values in (self.policy.patch_size, self.size))
        grid = itertools.product(*(range(0, edge, step) for edge, step in zip(three, size, strict=True)))
        starts = [torch.tensor(start).expand(len(batch), 3) for start in grid]
        room = torch.tensor(three) - torch.tensor(size)
        for number in range(self.settings.targets):
            drawn = draw.child(f"target {number}").uniform(0, 1, (3,))
            starts.append(torch.floor(drawn * (room + 1)).long())
        return [self._crop(patch, batch, start, draw.child(f"crop {row}")) for row, start in enumerate(starts)]

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        """Return the terms of the loss over the crops of all ranks; each crop is compared within its own patch."""
        target, base = self._split(self.project(views))
        teacher_target, teacher_base = self._split(self.teachers_projection(views))
        rows = (target, base, teacher_target, teacher_base, self.overlaps(views))
        return volume_contrast(*map(gather, rows))

    def after_step(self, step: Step) -> None:
        """Let the teacher follow."""
        self.teacher.follow(step)

    def project(self, views: Views) -> Tensor:
        """Return the student's embeddings of all crops. Shape: (B, M + N, D), float32."""
        features = pooled_stages(self.encoder, torch.cat([view.image for view in views]))
        return self._by_sample(self.projector(features), len(views))

    @torch.no_grad()
    def teachers_projection(self, views: Views) -> Tensor:
        """Return the teacher's embeddings of all crops. Shape: (B, M + N, D), float32."""
        features = pooled_stages(self.teacher.encoder, torch.cat([view.image for view in views]))
        return self._by_sample(self.teacher["projector"](features), len(views))

    def guess(self, views: Views) -> Tensor:
        """Return the overlap that is guessed of each target with each base. Shape: (B, N, M), float32."""
        target, base = self._split(self.project(views))
        return predicted_overlap(target, base, *self._split(self.teachers_projection(views)))

    def overlaps(self, views: Views) -> Tensor:
        """Return which part of each target's volume lies in each base. Shape: (B, N, M), float32.

        In the patch's own frame, which all crops share: no turn or mirroring changes it.
        """
        target, base = self._split(torch.stack([view.parameters["crop"]["start"] for view in views], dim=1).float())
        size = to_device(torch.tensor(_three(self.size), dtype=torch.float32), target.device)
        return box_overlap(target, size, base, size)

    def health(self, views: Views) -> dict[str, float]:
        """Return whether overlaps are guessed, and whether crops are told apart.

        `overlap_correlation`: Pearson's, of guessed and true overlap over all pairs of the batch; 0 is chance.
        `base_similarity`: mean cosine of two bases of a patch, 1 on collapse. `feature_std`: spread of the pooled
        features over crops, 0 on collapse. `teacher_lag`: 0 where the teacher is the student.
        """
        features = pooled_stages(self.encoder, torch.cat([view.image for view in views]))
        _, base = self._split(self.project(views))
        unit = torch.nn.functional.normalize(base, dim=2)
        cosines, count = product(unit, unit.transpose(1, 2)), self.bases
        others = cosines.sum() - cosines.diagonal(dim1=1, dim2=2).sum()
        figures = {
            "overlap_correlation": correlation(self.guess(views), self.overlaps(views)),
            "base_similarity": others / (len(base) * count * (count - 1)),
            "feature_std": feature_std(features),
            "teacher_lag": teacher_lag(self.teacher, self.encoder),
        }
        return dict(zip(figures, torch.stack(list(figures.values())).tolist(), strict=True))

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of targets and of bases."""
        return rows[:, self.bases :], rows[:, : self.bases]

    def _by_sample(self, rows: Tensor, crops: int) -> Tensor:
        """Bring rows that lie crop by crop into an order by sample. Shape: (K * B, D) to (B, K, D)."""
        return at_least_float32(rows).unflatten(0, (crops, -1)).transpose(0, 1)

    def _crop(self, patch: View, batch: Batch, start: Tensor, draw: Draw) -> View:
        """Cut a crop of each sample out of its patch and change its intensities."""
        size = self.size
        boxes = [
            tuple(slice(first, first + edge) for first, edge in zip(row[3 - len(size) :], size, strict=True))
            for row in start.tolist()
        ]

        def cut(values: Tensor) -> Tensor:
            return torch.stack([one[(slice(None), *box)] for one, box in zip(values, boxes, strict=True)])

        whole = torch.tensor([[0, edge] for edge in _three(size)]).expand(len(batch), 3, 2)
        content = dataclasses.replace(
            batch, image=cut(patch.image), valid=whole, origin_mm=torch.zeros(len(batch), 3), label=None
        )
        view = self.changing.view(content, draw)
        on_device = to_device(start, patch.image.device)
        to_source = patch.to_source_mm.clone()
        to_source[:, :, 3] += (to_source[:, :, :3] * on_device[:, None].float()).sum(dim=2)
        parameters = {**view.parameters, "spatial": patch.parameters["spatial"], "crop": {"start": on_device}}
        return dataclasses.replace(
            view,
            inside=cut(patch.inside),
            to_source_mm=to_source,
            displacement_mm=None if patch.displacement_mm is None else cut(patch.displacement_mm),
            parameters=parameters,
        )


def base_size(patch_size: Sequence[int], grid: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Return the size of the base crops.

    Args:
        patch_size: Size of the patch.
        grid: Base crops along each axis.
        strides: What a size must be a multiple of.

    Raises:
        UsageError: If the grid does not fit, naming grids and the nearest patch that do.
    """
    if len(grid) != len(patch_size):
        raise UsageError(f"grid {list(grid)} has {len(grid)} axes, the patch {list(patch_size)} has {len(patch_size)}.")
    size = tuple(edge // parts for edge, parts in zip(patch_size, grid, strict=True))
    if _fits(patch_size, grid, strides):
        return size
    finest = [range(1, edge // stride + 1) for edge, stride in zip(patch_size, strides, strict=True)]
    fitting = [
        list(other)
        for other in itertools.product(*(counts[:4] for counts in finest))
        if math.prod(other) > 1 and _fits(patch_size, other, strides)
    ]
    wanted = [parts * stride for parts, stride in zip(grid, strides, strict=True)]
    edges = [max(round(edge / unit), 1) * unit for edge, unit in zip(patch_size, wanted, strict=True)]
    if all(edge == unit for edge, unit in zip(edges, wanted, strict=True)):
        edges = [2 * edge for edge in edges]
    grids = " or ".join(map(str, fitting[-3:])) or "no grid"
    raise UsageError(
        f"grid {list(grid)} divides the patch {list(patch_size)} into crops that the network does not take: it needs "
        f"multiples of {list(strides)}, and more than one stride along some axis. With this patch {grids} fits; with "
        f"this grid the patch {edges} would."
    )


def correlation(guessed: Tensor, true: Tensor) -> Tensor:
    """Return Pearson's correlation of all values; 0 where one of the two does not vary. Scalar, float32 or wider."""
    first, second = (at_least_float32(values).flatten() for values in (guessed, true))
    first, second = first - first.mean(), second - second.mean()
    return (first * second).sum() / (first.norm() * second.norm()).clamp(min=1e-12)


def _fits(patch_size: Sequence[int], grid: Sequence[int], strides: Sequence[int]) -> bool:
    whole = all(edge % (parts * stride) == 0 for edge, parts, stride in zip(patch_size, grid, strides, strict=True))
    cells = math.prod(edge // (parts * stride) for edge, parts, stride in zip(patch_size, grid, strides, strict=True))
    # An instance norm needs more than one position at the coarsest stage.
    return whole and cells > 1


def _three(size: Sequence[int]) -> tuple[int, int, int]:
    z, y, x = (1,) * (3 - len(size)) + tuple(size)
    return z, y, x
