"""MAE with self-distillation: restore hidden blocks, and say of them what a slow copy says that sees everything.

SMIT (Jiang et al., MICCAI 2022) and iBOT (Zhou et al., ICLR 2022) have the idea; here it is on a convolutional U-Net:
Alice (Jiang et al., ICCV 2023) without its matching of patients. The student sees a crop with blocks hidden; the
teacher, a running average of its encoder, sees the whole crop before changes of intensity. Three terms, each about 1
for a student that guesses the mean, so that weights of 1 are a start:

`reconstruction`: the error of hidden voxels, as in MAE. It trains the decoder too.
`dense`: the student's features at hidden positions of one or two stages, through a small predictor, have to match the
    teacher's there. Regression, as in data2vec (Baevski et al., ICML 2022), and not iBOT's sorting into prototypes,
    which needs a centre that a few crops estimate badly; against collapse reconstruction holds these features up.
    Each channel of the target is standardised over the positions of its sample, as data2vec does for sound: channels
    of a convolutional stage have means of their own, and a standard taken over channels would leave these as the
    largest part of what there is to guess. What differs from sample to sample is left to the third term.
`pooled`: BYOL (Grill et al., NeurIPS 2020) across two crops of one region: the student's pooled features of the first,
    masked, have to match the teacher's of the second, and those of the second, whole, the teacher's of the first.

The second crop has the intensities of contrastive views; those of the first are changed mildly, since a restoration
cannot know how dark a strongly changed image was. Encoder and decoder transfer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from medssl.augmentation.policy import Policy
from medssl.data.batch import Batch, View, Views
from medssl.data.draw import Draw
from medssl.losses.cosine import byol
from medssl.losses.precision import at_least_float32
from medssl.losses.reconstruction import masked_mean, masked_reconstruction
from medssl.networks.encoder import Encoder
from medssl.networks.pooling import chosen_stages, pooled_width
from medssl.pretraining.distillation import predictor_gain, teacher_lag
from medssl.pretraining.heads import Projector, ProjectorSettings, predictor
from medssl.pretraining.health import effective_rank, feature_std, rows
from medssl.pretraining.joint import joint_health
from medssl.pretraining.mae import MaskedAutoencoder, MaskedAutoencoderSettings
from medssl.pretraining.teacher import Teacher, TeacherSettings
from medssl.training.distributed import gather, mean_across_ranks
from medssl.training.method import Needs, Step

# A position counts as hidden where more than this part of its voxels is.
HIDDEN_PART = 0.5


class MaskedDistillationSettings(MaskedAutoencoderSettings):
    """Settings of MAE with self-distillation.

    Args:
        mask: What is hidden.
        error: How the error of a voxel counts.
        dense_stages: Stages whose features are matched at hidden positions, by number from the finest, negative from
            the coarsest; None takes the coarsest whose positions a hidden block covers.
        pooled_stages: Stages that are pooled, `all` or the `last` one.
        projector: The head on pooled features whose output is matched; it is thrown away.
        predictor_hidden: Width of the hidden layer of the pooled predictor.
        teacher: How the teacher follows.
    """

    dense_stages: tuple[int, ...] | None = None
    pooled_stages: Literal["all", "last"] = "last"
    projector: ProjectorSettings = ProjectorSettings(hidden=512, width=128)
    predictor_hidden: int = Field(default=512, ge=1)
    teacher: TeacherSettings = TeacherSettings()


class MaskedDistillation(MaskedAutoencoder):
    """Restores hidden blocks and matches a teacher's features of them and of the whole.

    Args:
        network: U-Net with as many output as input channels, without deep supervision.
        policy: Augmentation for contrastive views.
        settings: See `MaskedDistillationSettings`.

    Raises:
        UsageError: If a stage does not exist.
    """

    needs: ClassVar[Needs] = Needs(views=2, policy="contrastive", least_batch=2)
    settings: MaskedDistillationSettings

    def __init__(self, network: nn.Module, policy: Policy, settings: MaskedDistillationSettings) -> None:
        super().__init__(network, _mildly_changed(policy), settings)
        self.second_policy = policy
        encoder = self.encoder
        self.dense_stages = _dense_stages(encoder, settings.resolved(policy.patch_size))
        self.dense_heads = nn.ModuleList(
            _dense_head(encoder.widths[stage], len(encoder.strides[0])) for stage in self.dense_stages
        )
        self.pooled_stages = chosen_stages(encoder, settings.pooled_stages)
        self.projector = Projector(pooled_width(encoder, self.pooled_stages), settings.projector)
        self.predictor: nn.Module = predictor(self.projector.width, settings.predictor_hidden, settings.projector.norm)
        self.teacher = Teacher(settings.teacher, encoder=encoder, projector=self.projector)

    def views(self, batch: Batch, draw: Draw) -> Views:
        """Make the crop that is masked, with its target, and a second crop of its region."""
        return [*super().views(batch, draw.child("masked")), self.second_policy.view(batch, draw.child("second"))]

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        """Return the three terms."""
        masked, second = views
        student = self.encoder.stages(self.blank(masked))
        teacher = self._teachers_stages(self._target(masked))
        where = self.counted(masked)
        reconstruction = masked_reconstruction(
            self.network.decoder(student), self._target(masked), where, kind=self.settings.error,  # type: ignore[operator]
            count=mean_across_ranks(where.sum().float()),
        )  # fmt: skip
        own = self.encoder.stages(second.image)
        guesses = [gather(self.predictor(self._projection(stages))) for stages in (student, own)]
        others = (teacher, self._teachers_stages(second.image))
        targets = [gather(self._teachers_projection(stages)) for stages in others]
        return {
            "reconstruction": reconstruction,
            "dense": torch.stack(self._dense_errors(student, teacher, masked)).mean(),
            # Both directions are in it, each of 2 - 2 cos.
            "pooled": byol(*guesses, *targets) / 4,
        }

    def after_step(self, step: Step) -> None:
        """Let the teacher follow."""
        self.teacher.follow(step)

    def _dense_errors(
        self, student: list[Tensor], teacher: list[Tensor], view: View, *, guess_mean: bool = False
    ) -> list[Tensor]:
        """Return the error at hidden positions of each dense stage, or of guessing each channel's mean."""
        hidden, errors = self._hidden(view) & view.inside, []
        for stage, head in zip(self.dense_stages, self.dense_heads, strict=True):
            guess = torch.zeros_like(student[stage]) if guess_mean else head(student[stage])
            stride = self.encoder.strides[stage]
            errors.append(dense_error(guess, teacher[stage], mostly(hidden, stride), mostly(view.inside, stride)))
        return errors

    def _projection(self, stages: list[Tensor]) -> Tensor:
        return at_least_float32(self.projector(_pooled(stages, self.pooled_stages)))

    @torch.no_grad()
    def _teachers_stages(self, image: Tensor) -> list[Tensor]:
        return self.teacher.encoder.stages(image)

    @torch.no_grad()
    def _teachers_projection(self, stages: list[Tensor]) -> Tensor:
        return at_least_float32(self.teacher["projector"](_pooled(stages, self.pooled_stages)))

    def health(self, views: Views) -> dict[str, float]:
        """Return the figures of the masked autoencoder, those of both targets, and whether the mask leaks.

        `dense_error`: relative to guessing each channel's mean; 1 is no better. `dense_std` and `dense_rank`: of the
        teacher's features at all positions of the coarsest dense stage; 0 and 1 on collapse. `pooled_...`: see
        `joint_health`, of the second crop's projection and the teacher's of the first. `predictor_gain` and
        `teacher_lag` are 0 where the predictor or the slowness of the teacher is missing. `mask_leak`: largest change
        of any feature of the student when all hidden voxels are changed, 0 unless they are seen.
        """
        masked, second = views
        student = self.encoder.stages(self.blank(masked))
        teacher = self._teachers_stages(self._target(masked))
        image = torch.where(self._hidden(masked), masked.image + 1, masked.image)
        changed = self.encoder.stages(self.blank(dataclasses.replace(masked, image=image)))
        leak = torch.stack([(a - b).abs().max() for a, b in zip(student, changed, strict=True)]).max()
        error = torch.stack(self._dense_errors(student, teacher, masked)).mean()
        trivial = torch.stack(self._dense_errors(student, teacher, masked, guess_mean=True)).mean()
        dense = rows(teacher[self.dense_stages[-1]])
        own = self.encoder.stages(second.image)
        pooled, projection = _pooled(own, self.pooled_stages), self._projection(own)
        target = self._teachers_projection(teacher)
        figures = {
            "dense_error": error / trivial.clamp(min=1e-12),
            "dense_std": feature_std(dense),
            "dense_rank": effective_rank(dense),
            "mask_leak": leak.float(),
            "predictor_gain": predictor_gain(projection, self.predictor(projection), target),
            "teacher_lag": teacher_lag(self.teacher, self.encoder),
        }
        joint = {f"pooled_{name}": value for name, value in joint_health(pooled, projection, target).items()}
        return super().health([masked]) | {name: float(value) for name, value in figures.items()} | joint

    def pictures(self, views: Views) -> dict[str, Tensor]:
        """Return the pictures of the masked autoencoder, and the second crop."""
        masked, second = views
        return super().pictures([masked]) | {"second": second.image}


def dense_error(guess: Tensor, features: Tensor, where: Tensor, inside: Tensor) -> Tensor:
    """Return the error of guessed features: its square below 1, linear above (smooth L1, doubled).

    Args:
        guess: Shape: (B, D, *grid).
        features: The teacher's; each channel is standardised over the positions of its sample that lie inside the
            volume. Shape: (B, D, *grid).
        where: Positions that count. Shape: (B, 1, *grid), bool.
        inside: Positions inside the volume. Shape: (B, 1, *grid), bool.

    Returns:
        Scalar, float32 or wider: the mean over all ranks' positions. About 0.85 for a guess of 0.
    """
    features = at_least_float32(features)
    centred = features - masked_mean(features, inside)
    target = centred * torch.rsqrt(masked_mean(centred.square(), inside) + 1e-5)
    count = mean_across_ranks(where.sum().float())
    return 2 * masked_reconstruction(guess, target, where, kind="huber", count=count)


def mostly(voxels: Tensor, stride: Sequence[int]) -> Tensor:
    """Return the positions of a grid most of whose voxels are chosen.

    Args:
        voxels: Shape: (B, 1, *spatial), bool.
        stride: Voxels of a position along each axis.

    Returns:
        Shape: (B, 1, *grid), bool.
    """
    pool = F.avg_pool3d if len(stride) == 3 else F.avg_pool2d
    return pool(voxels.float(), tuple(stride)) > HIDDEN_PART


def _pooled(stages: list[Tensor], chosen: Sequence[int]) -> Tensor:
    """Return the means of some stages over space, side by side. Shape: (B, W), float32 or wider."""
    return torch.cat([at_least_float32(stages[stage]).flatten(2).mean(dim=2) for stage in chosen], dim=1)


def _mildly_changed(policy: Policy) -> Policy:
    """Return a policy with the geometry of `policy` and the intensities of restoration, whose views have a target."""
    mild = policy.sibling("restoration").by_modality
    return Policy(
        "restoration",
        {name: mild[name].model_copy(update={"spatial": own.spatial}) for name, own in policy.by_modality.items()},
        policy.patch_size,
        policy.settings,
    )


def _dense_head(width: int, dimensions: int) -> nn.Module:
    """Return the head that guesses the teacher's features of a position from the student's there."""
    convolution = nn.Conv3d if dimensions == 3 else nn.Conv2d
    return nn.Sequential(convolution(width, width, 1), nn.ReLU(), convolution(width, width, 1))


def _dense_stages(encoder: Encoder, settings: MaskedDistillationSettings) -> tuple[int, ...]:
    if settings.dense_stages is not None:
        return chosen_stages(encoder, settings.dense_stages)
    block = settings.mask.block
    assert block is not None
    blocks = [block] * len(encoder.strides[0]) if isinstance(block, int) else list(block)
    covered = [
        number
        for number, stride in enumerate(encoder.strides)
        if all(step <= edge for step, edge in zip(stride, blocks, strict=True))
    ]
    return (covered[-1],)
