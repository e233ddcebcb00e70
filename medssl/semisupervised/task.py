"""What differs between segmentation and classification in a semi-supervised method: how labels are learnt.

All else is written once, on logits (B, K, *rest): `rest` is the grid of a segmentation and empty in classification.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from medssl.data.batch import Batch, View
from medssl.losses.classification import classification_error
from medssl.losses.segmentation import dice_sums, masked_cross_entropy, soft_dice
from medssl.networks.classifier import Classifier
from medssl.semisupervised.batch import SemiView
from medssl.training.distributed import gather, mean_across_ranks


class Task(ABC):
    """A task with classes that exclude each other.

    Attributes:
        classes: How many there are, background included.
        is_dense: Whether each voxel has a class, or the whole image.
    """

    classes: int
    is_dense: bool

    @abstractmethod
    def labelled(self, view: View, batch: Batch) -> SemiView:
        """Return a view of labelled samples with what they show."""

    @abstractmethod
    def where(self, view: View) -> Tensor | None:
        """Return where an output counts. Shape: (B, 1, *rest), bool; None if it does everywhere."""

    @abstractmethod
    def supervised(self, logits: Tensor, view: SemiView) -> dict[str, Tensor]:
        """Return the terms of the error on labelled samples."""

    @abstractmethod
    def unet_of(self, predictor: nn.Module) -> nn.Module:
        """Return the U-Net inside a network that predicts."""

    def supervised_on(self, logits: Tensor, target: Tensor, where: Tensor | None) -> dict[str, Tensor]:
        """Return the terms of the error against given targets: classes (B, *rest) or probabilities (B, K, *rest)."""
        return supervised_terms(logits, target, where)


class SegmentationTask(Task):
    """Each voxel has one class.

    Args:
        classes: Number of classes with the background.
        ignore_label: Value of voxels that are not to be learnt from, or None.
    """

    is_dense = True

    def __init__(self, classes: int, ignore_label: int | None = None) -> None:
        self.classes, self.ignore_label = classes, ignore_label

    def labelled(self, view: View, batch: Batch) -> SemiView:
        """Return the view; its label was moved along with the image."""
        if view.label is None:
            raise ValueError("The labelled part of a batch has no labels.")
        return SemiView(**vars(view))

    def where(self, view: View) -> Tensor:
        """Return where the view lies inside the volume and, if it has labels, is not to be ignored."""
        if view.label is None or self.ignore_label is None:
            return view.inside
        return view.inside & (view.label != self.ignore_label)[:, None]

    def supervised(self, logits: Tensor, view: SemiView) -> dict[str, Tensor]:
        """Return `dice` and `cross_entropy` of the batch over all ranks, as nnU-Net adds them up."""
        assert view.label is not None
        return self.supervised_on(logits, view.label, self.where(view))

    def unet_of(self, predictor: nn.Module) -> nn.Module:
        """Return the network itself."""
        return predictor


class ClassificationTask(Task):
    """Each image has one class.

    Args:
        classes: Number of classes.
    """

    is_dense = False

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def labelled(self, view: View, batch: Batch) -> SemiView:
        """Return the view with the class of each image."""
        shows = getattr(batch, "target", None)
        if shows is None:
            raise ValueError("The labelled part of a batch has no classes.")
        return SemiView(**vars(view), shows=shows)

    def where(self, view: View) -> None:
        """Return None: every image counts."""
        return

    def supervised(self, logits: Tensor, view: SemiView) -> dict[str, Tensor]:
        """Return `cross_entropy`."""
        assert view.shows is not None
        return {"cross_entropy": classification_error(logits, view.shows, "multiclass")}

    def supervised_on(self, logits: Tensor, target: Tensor, where: Tensor | None) -> dict[str, Tensor]:
        """Return `cross_entropy` against classes or probabilities."""
        return {"cross_entropy": torch.nn.functional.cross_entropy(logits.float(), target)}

    def unet_of(self, predictor: nn.Module) -> nn.Module:
        """Return the U-Net whose encoder the classifier uses."""
        assert isinstance(predictor, Classifier)
        return predictor.network


def supervised_terms(logits: Tensor, target: Tensor, where: Tensor | None) -> dict[str, Tensor]:
    """Return soft Dice and cross-entropy of a whole batch, the ranks' parts taken together.

    Args:
        logits: Shape: (B, K, *spatial).
        target: Classes, int64, (B, *spatial), or probabilities, (B, K, *spatial).
        where: Voxels that count, (B, 1, *spatial), bool; None counts all. Others become background nowhere.
    """
    count = None if where is None else mean_across_ranks(where.sum().float())
    return {
        "dice": soft_dice(gather(dice_sums(logits, target, where)), background=False),
        "cross_entropy": masked_cross_entropy(logits, target, where, count=count),
    }
