"""Mean teacher: predictions on perturbed images must agree with those of an averaged network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from medssl.augmentation.policy import Policy
from medssl.config import Settings
from medssl.data.batch import Batch
from medssl.data.draw import Draw
from medssl.losses.consistency import squared_difference
from medssl.pretraining.teacher import Teacher, TeacherSettings
from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.method import SemiSupervised, SemiSupervisedSettings
from medssl.semisupervised.task import Task
from medssl.training.method import Step


class EmaSettings(TeacherSettings):
    """The teacher of semi-supervised learning: at first it follows fast, min(1 - 1 / (t + 1), momentum)."""

    final: float = Field(default=0.99, ge=0, le=1)

    def at(self, step: Step) -> float:
        """Return the part that stays at a step."""
        return min(1 - 1 / (step.index + 1), super().at(step))


class LookAheadSettings(Settings):
    """Learning from the future (FST): the teacher follows a student that is some steps ahead.

    Args:
        steps: Virtual steps before each step; 0 takes none. A step then costs `steps` + 1 times as much.
    """

    steps: int = Field(default=0, ge=0)


class TeacherStudentSettings(SemiSupervisedSettings):
    """What a method with a teacher is told.

    Args:
        look_ahead: Virtual steps of the student that the teacher follows.
        teacher: How it follows the student.
        predict_with: Which of the two is exported. The tables of the field report the student.
    """

    look_ahead: LookAheadSettings = LookAheadSettings()
    teacher: EmaSettings = EmaSettings()
    predict_with: Literal["student", "teacher"] = "teacher"


class TeacherStudent(SemiSupervised):
    """A student that is trained and a teacher that is its running average, buffers included.

    Any method with a teacher can learn from the future (Du et al., FST, NeurIPS 2022): before each step the student
    takes some steps on the same batch, the teacher follows each of them, and the student then goes back and learns from
    that teacher. Deliberate deviation: the optimiser's state goes back too; in the published code it keeps the momentum
    of steps that were never taken.
    """

    settings: TeacherStudentSettings

    def __init__(
        self, networks: Sequence[nn.Module], task: Task, policy: Policy, settings: TeacherStudentSettings
    ) -> None:
        super().__init__(networks, task, policy, settings)
        self.teacher = Teacher(settings.teacher, network=self.networks[0])

    @property
    def look_ahead(self) -> int:  # type: ignore[override]
        """Virtual steps before each step."""
        return self.settings.look_ahead.steps

    def student_buffers(self) -> list[Tensor]:
        """Return the buffers of the networks that are trained."""
        return list(self.networks.buffers())

    @property
    def predictor(self) -> nn.Module:
        """The teacher or the student, as the settings say."""
        return self.teacher["network"] if self.settings.predict_with == "teacher" else self.networks[0]

    @torch.no_grad()
    def taught(self, image: Tensor) -> Tensor:
        """Return the teacher's probabilities, without gradient. Shape: (B, K, *rest)."""
        return self.teacher["network"](image).float().softmax(dim=1)

    def after_step(self, step: Step) -> None:
        """Move the teacher towards the student."""
        self.teacher.follow(step)


class MeanTeacherSettings(TeacherStudentSettings):
    """Settings of mean teacher.

    Args:
        noise: Standard deviation of the noise on each of the two inputs, in units of the normalised image; cut at
            twice this.
    """

    noise: float = Field(default=0.1, ge=0)


class MeanTeacher(TeacherStudent):
    """Mean teacher (Tarvainen and Valpola, NeurIPS 2017) with the squared difference of probabilities.

    Student and teacher see the same weak view with noise of their own, as in the field's code for segmentation.
    """

    settings: MeanTeacherSettings

    def unlabelled_views(self, batch: Batch, draw: Draw) -> list[SemiView]:
        """Return two views of the same voxels with noise of their own: the student's and the teacher's."""
        (view,) = super().unlabelled_views(batch, draw)
        return [noisy(view, draw.child(name), self.settings.noise) for name in ("student", "teacher")]

    def unsupervised(self, views: list[SemiView], step: Step) -> dict[str, Tensor]:
        """Return `consistency`."""
        student, teacher = views
        where, count = self.counted(student)
        probabilities = self.networks[0](student.image).float().softmax(dim=1)
        return {"consistency": squared_difference(probabilities, self.taught(teacher.image), where, count=count)}


def noisy(view: SemiView, draw: Draw, std: float) -> SemiView:
    """Return a view with normal noise on its image, cut at two standard deviations; padding stays as it is."""
    if std == 0:
        return view
    noise = (draw.noise_like(view.image) * std).clamp_(-2 * std, 2 * std)
    return SemiView(**{**vars(view), "image": torch.where(view.inside, view.image + noise, view.image)})
