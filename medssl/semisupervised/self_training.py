"""Self-training with T-similarity: what an ensemble agrees on becomes a label, more of it from round to round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from medssl.augmentation.policy import Policy
from medssl.data.batch import Views
from medssl.losses.agreement import t_similarity
from medssl.losses.consistency import mean_where
from medssl.losses.segmentation import masked_cross_entropy
from medssl.pretraining.teacher import Teacher
from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.ensemble import Curriculum, Ensemble, agreement, features_and_logits
from medssl.semisupervised.mean_teacher import TeacherStudent, TeacherStudentSettings
from medssl.semisupervised.ramp import RampSettings
from medssl.semisupervised.task import Task
from medssl.training.distributed import mean_across_ranks
from medssl.training.method import Step


class SelfTrainingSettings(TeacherStudentSettings):
    """Settings of self-training.

    Args:
        unlabelled: There from the first round on; the part of the run before it has no guessed labels.
        rounds: Rounds after a first part of the run that learns from labels alone; all parts are equally long.
        selection: `curriculum` takes in round r of R the most confident r / R of the places of each class, `threshold`
            in all rounds those above a threshold.
        threshold: Of `threshold`.
        confidence: Agreement of the ensemble, or the probability of the likeliest class, as in plain self-training.
        members: Heads of the ensemble.
        diversity: Weight of what makes the heads differ on unlabelled images.
    """

    unlabelled: RampSettings = RampSettings(weight=1.0, fraction=0.0)
    rounds: int = Field(default=5, ge=1)
    selection: Literal["curriculum", "threshold"] = "curriculum"
    threshold: float = Field(default=0.8, ge=0, le=1)
    confidence: Literal["t-similarity", "probability"] = "t-similarity"
    members: int = Field(default=5, ge=2)
    diversity: float = Field(default=1.0, ge=0)

    def share_at(self, step: Step) -> float:
        """Return the part of the places of each class that is taken at a step."""
        return min(int(step.fraction * (self.rounds + 1)), self.rounds) / self.rounds


class SelfTraining(TeacherStudent):
    """Self-training with T-similarity (Odonnat, Feofanov and Redko, AISTATS 2024).

    Linear heads on the network's last features learn the labels, and to differ where there are none; how far they agree
    is how far a guess is believed, and unlike a probability it is low on images unlike the labelled ones. No gradient
    of the heads reaches the network, which learns labels and chosen guesses. Deliberate deviations: rounds are parts of
    one run, and guesses are those of the averaged network at each step and not of a frozen one; the chosen part is one
    of each class and of a running distribution, see `Curriculum`; in segmentation the network's own supervised error
    has Dice too.
    """

    settings: SelfTrainingSettings

    def __init__(
        self, networks: Sequence[nn.Module], task: Task, policy: Policy, settings: SelfTrainingSettings
    ) -> None:
        super().__init__(networks, task, policy, settings)
        self.heads = Ensemble(self.networks[0], settings.members, task.classes)
        self.curriculum = Curriculum(task.classes)
        self.teacher = Teacher(settings.teacher, network=self.networks[0], heads=self.heads)
        # Without guesses nobody asks them.
        self.heads.requires_grad_(settings.unlabelled.weight > 0)
        self._found: Tensor | None = None

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        """Return the supervised terms, `pseudo_label` times its weight, and `ensemble` and `diversity` of the heads."""
        labelled, view = views
        assert isinstance(labelled, SemiView) and isinstance(view, SemiView)
        if self.settings.unlabelled.weight == 0:
            return self.supervised(labelled)
        known, logits = features_and_logits(self.networks[0], labelled.image)
        terms = self.task.supervised(logits, labelled)
        features, logits = features_and_logits(self.networks[0], view.image)
        guess, chosen = self.chosen(view, step)
        error = F.cross_entropy(logits.float(), guess, reduction="none")
        count = mean_across_ranks(chosen.sum().float())
        where, places = self.counted(view)
        members = self.heads(features.detach()).softmax(dim=2)
        return terms | {
            "pseudo_label": self.settings.unlabelled.at(step) * mean_where(error, chosen, count),
            "ensemble": self._error_of(self.heads(known.detach()), labelled),
            "diversity": self.settings.diversity * t_similarity(members, where, count=places),
        }

    @torch.no_grad()
    def chosen(self, view: SemiView, step: Step) -> tuple[Tensor, Tensor]:
        """Return the teacher's guess of each place and whether it is learnt.

        Shapes: (B, *rest), int64, and (B, 1, *rest), bool.
        """
        settings = self.settings
        features, logits = features_and_logits(self.teacher["network"], view.image)
        best, guess = logits.float().softmax(dim=1).max(dim=1)
        by_heads = settings.confidence == "t-similarity"
        confidence = agreement(self.teacher["heads"](features)) if by_heads else best
        where, share = self.task.where(view), settings.share_at(step)
        if settings.selection == "threshold":
            taken = (confidence >= settings.threshold) & (share > 0)
        else:
            bins = self.curriculum.bins_of(confidence, guess)
            counts = mean_across_ranks(self.curriculum.counts_of(bins, where))
            taken = self.curriculum.chosen(bins, counts, share)
            if self.training:
                self._found = counts if self._found is None else self._found + counts
        return guess, taken[:, None] if where is None else taken[:, None] & where

    def after_step(self, step: Step) -> None:
        """Move the teacher towards the student, and add what was seen to the distribution of confidence."""
        super().after_step(step)
        if self._found is not None:
            self.curriculum.follow(self._found)
            self._found = None

    def student_buffers(self) -> list[Tensor]:
        """Return the buffers of what is trained; the distribution keeps what it has learnt."""
        return [*super().student_buffers(), *self.heads.buffers()]

    def _error_of(self, members: Tensor, view: SemiView) -> Tensor:
        """Return the mean cross-entropy of the heads on labelled samples."""
        label = view.label if view.shows is None else view.shows
        assert label is not None
        count = members.shape[1]
        flat, truth = members.flatten(0, 1), label.repeat_interleave(count, dim=0)
        where = self.task.where(view)
        if where is None:
            return F.cross_entropy(flat, truth)
        places = where.repeat_interleave(count, dim=0)
        return masked_cross_entropy(flat, truth, places, count=mean_across_ranks(places.sum().float()))
