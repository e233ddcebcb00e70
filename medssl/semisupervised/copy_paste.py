"""BCP: boxes of labelled images in unlabelled ones and the reverse, with labels that a teacher guesses."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from medssl.augmentation.boxes import box_mask_of, place_boxes
from medssl.data.batch import Batch, Views
from medssl.data.draw import Draw
from medssl.semisupervised.batch import PairedBatch, SemiView
from medssl.semisupervised.components import largest_components
from medssl.semisupervised.mean_teacher import TeacherStudent, TeacherStudentSettings
from medssl.semisupervised.method import unlabelled_draw
from medssl.semisupervised.ramp import RampSettings
from medssl.training.method import Step


class CopyPasteSettings(TeacherStudentSettings):
    """Settings of BCP.

    Args:
        unlabelled: Weight of the guessed part of a mixed image beside the labelled part, there from the first step
            after the warm-up; 0 pastes labelled images into each other for the whole run.
        box: Edges of the pasted box as parts of the image's.
        warm_up: Part of the run that pastes labelled images into each other.
        largest_component: Keep of each guessed class its largest part. It takes the place of a label that is one
            piece; without that it removes what is right.
    """

    unlabelled: RampSettings = RampSettings(weight=0.5, fraction=0.0)
    box: float = Field(default=2 / 3, gt=0, le=1)
    warm_up: float = Field(default=0.12, ge=0, le=1)
    largest_component: bool = True


class CopyPaste(TeacherStudent):
    """Bidirectional copy-paste (Bai et al., CVPR 2023).

    Each unlabelled image gives a box to one labelled image and receives the same box of another one; where a batch
    holds one labelled image, it is both. The first part of the run is supervised copy-paste, as in the paper, where it
    is a run of its own: 2,000 of 17,000 steps. Deliberate deviations: the teacher starts as the average of those steps
    and not as the checkpoint that was best on the test set; the error is the mean over the batch and not the sum of the
    two directions; each sample has a box of its own; what a box brings counts only where it is inside its volume.
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)
    settings: CopyPasteSettings

    def views(self, batch: PairedBatch, draw: Draw) -> Views:  # type: ignore[override]
        """Return the labelled view, that with boxes of other labelled images, the unlabelled view, and the two mixed.

        The first of the mixed ones are labelled images with a box of an unlabelled one, the others the reverse. `drawn`
        says which rows were mixed, and where.
        """
        assert batch.unlabelled is not None
        own = draw.child("labelled")
        labelled = self.labelled_view(batch.labelled, own)
        among = self._pasted(labelled, labelled, *_neighbours(len(batch.labelled)), self._boxes(batch.labelled, own))
        if self.settings.unlabelled.weight == 0:
            return [labelled, among]
        other = unlabelled_draw(draw, batch.unlabelled)
        (plain,) = self.unlabelled_views(batch.unlabelled, other)
        receiving, giving = partners_of(len(batch.labelled), len(batch.unlabelled))
        rows, box = torch.arange(len(batch.unlabelled)), self._boxes(batch.unlabelled, other)
        inward = self._pasted(labelled, plain, receiving, rows, box)
        outward = self._pasted(plain, labelled, rows, giving, box)
        return [labelled, among, plain, inward, outward]

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        """Return `dice` and `cross_entropy` of what is labelled, and both of what is guessed, times its weight."""
        labelled, among, *rest = views
        assert isinstance(labelled, SemiView) and isinstance(among, SemiView)
        if not rest or step.fraction < self.settings.warm_up:
            label, where = (self._mixed(each, each, among) for each in self._known(labelled))
            return self.task.supervised_on(self.networks[0](among.image), label[:, 0], where)
        weight = self.settings.unlabelled.at(step)
        known, guessed = self._bidirectional(labelled, rest)  # type: ignore[arg-type]
        return known | {f"guessed_{name}": weight * term for name, term in guessed.items()}

    def _bidirectional(self, labelled: SemiView, rest: list[SemiView]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the terms of the labelled and those of the guessed parts of the mixed images."""
        plain, inward, outward = rest
        label, counts = self._known(labelled)
        guess = self.guessed(plain)[:, None]
        logits = self.networks[0](torch.cat([inward.image, outward.image]))
        target = torch.cat([self._mixed(label, guess, inward), self._mixed(guess, label, outward)])[:, 0]
        where = torch.cat([self._mixed(counts, plain.inside, inward), self._mixed(plain.inside, counts, outward)])
        known = torch.cat([~inward.drawn["box"], outward.drawn["box"]])
        return (
            self.task.supervised_on(logits, target, where & known),
            self.task.supervised_on(logits, target, where & ~known),
        )

    def _known(self, labelled: SemiView) -> tuple[Tensor, Tensor]:
        """Return the classes of labelled images and where they count. Shapes: (B, 1, *spatial)."""
        where = self.task.where(labelled)
        assert labelled.label is not None and where is not None
        return labelled.label[:, None], where

    def guessed(self, view: SemiView) -> Tensor:
        """Return the teacher's class of each voxel; padding and, if set, small parts are background.

        Shape: (B, *spatial), int64.
        """
        classes = torch.where(view.inside[:, 0], self.taught(view.image).argmax(dim=1), 0)
        return largest_components(classes, self.task.classes) if self.settings.largest_component else classes

    def _boxes(self, batch: Batch, draw: Draw) -> Tensor:
        size = self.policy.patch_size
        sides = torch.tensor([max(1, int(self.settings.box * edge)) for edge in size]).expand(len(batch), 1, -1)
        return box_mask_of(place_boxes(draw.child("paste"), size, sides), size)

    def _pasted(self, host: SemiView, guest: SemiView, into: Tensor, of: Tensor, box: Tensor) -> SemiView:
        """Return images of `host` with boxes of `guest`; the rows of both travel with it."""
        mixed = SemiView(image=host.image, inside=host.inside, to_source_mm=host.to_source_mm)
        mixed = mixed.with_drawn(into=into, of=of, box=box)
        mixed.image = self._mixed(host.image, guest.image, mixed)
        mixed.inside = self._mixed(host.inside, guest.inside, mixed)
        mixed.to_source_mm = host.to_source_mm.index_select(0, mixed.drawn["into"])
        return mixed

    def _mixed(self, host: Tensor, guest: Tensor, mixed: SemiView) -> Tensor:
        """Mix values as the images of `mixed` were. Shape: (rows, C, *spatial)."""
        drawn = mixed.drawn
        return torch.where(drawn["box"], guest.index_select(0, drawn["of"]), host.index_select(0, drawn["into"]))


def partners_of(labelled: int, unlabelled: int) -> tuple[Tensor, Tensor]:
    """Return the labelled image that each unlabelled one gives its box to, and the one that it receives a box of.

    They differ where there are two or more, and each labelled image is used before one is used twice.

    Args:
        labelled: Number of labelled images.
        unlabelled: Number of unlabelled ones.

    Returns:
        Rows of labelled images. Shapes: (unlabelled,), int64.
    """
    row = torch.arange(unlabelled)
    # Going on where the first ones stopped would meet the same images again if these are used up evenly.
    return row % labelled, (row + unlabelled + (unlabelled % labelled == 0)) % labelled


def _neighbours(count: int) -> tuple[Tensor, Tensor]:
    row = torch.arange(count)
    return row, row.roll(-1)
