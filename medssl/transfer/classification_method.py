"""Classification as the training loop sees it: views of whole images, one error, groups of weights with their rates."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medssl.augmentation.policy import Policy
from medssl.data.batch import Batch, View, Views
from medssl.data.draw import Draw
from medssl.data.targets import Targets
from medssl.errors import CheckpointError, DataError
from medssl.losses.classification import classification_error, effective_number_weights, positive_weights
from medssl.networks.classifier import Classifier
from medssl.networks.encoder import Encoder
from medssl.training.engine import Engine
from medssl.training.method import Method, Needs, Step
from medssl.transfer.classification_settings import ClassificationSettings
from medssl.transfer.image_batches import ImageBatch, ImageSet
from medssl.transfer.schedule import Schedule, depths_of, group_of

logger = logging.getLogger(__name__)

#: From this ratio of the most frequent class to the rarest on, the user is told of `balance`.
LARGEST_RATIO = 3
#: Images whose features standardise the head's input.
SCALE_IMAGES = 512


@dataclass
class ClassView(View):
    """A view with the class of each image in `shows`."""

    shows: Tensor | None = None


class Classification(Method):
    """Learns the class of whole images.

    Args:
        classifier: Encoder and head.
        policy: Changes training images.
        kind: `multiclass`, `multilabel` or `ordinal`.
        weights: Factor of each class, or None. Shape: (K,).
        smoothing: Part of the target that is spread over all classes.
    """

    needs: ClassVar[Needs] = Needs(views=1, policy="fine-tuning")
    class_weights: Tensor | None

    classifier: Classifier
    kind: str

    def __init__(
        self, classifier: Classifier, policy: Policy, kind: str, weights: Tensor | None = None, smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.policy, self.kind, self.smoothing = policy, kind, smoothing
        self.register_buffer("class_weights", weights)

    @property
    def network(self) -> nn.Module:  # type: ignore[override]
        """The U-Net."""
        return self.classifier.network

    @property
    def encoder(self) -> Encoder:  # type: ignore[override]
        """Its encoder."""
        return self.classifier.encoder

    def views(self, batch: Batch, draw: Draw) -> Views:
        """Augment the images; what they show goes along."""
        assert isinstance(batch, ImageBatch)
        view = self.policy.view(batch, draw.child("fine-tuning"))
        return [ClassView(**{**vars(view), "shows": batch.target})]

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        """Return the error of the batch."""
        (view,) = views
        assert isinstance(view, ClassView) and view.shows is not None
        logits = self.classifier(view.image)
        return {
            "error": classification_error(
                logits, view.shows, self.kind, weights=self.class_weights, smoothing=self.smoothing
            )
        }


def class_weights(targets: Targets, settings: ClassificationSettings) -> Tensor | None:
    """Return the factor of each class for `balance: weights`, from the training cases; None otherwise. Shape: (K,).

    Raises:
        DataError: If a class has no training case.
    """
    train = targets.of("train")
    counts = targets.counts(train)
    empty = [name for name, count in counts.items() if count == 0]
    if empty:
        raise DataError(f"Class '{empty[0]}' has no training case: use more labelled cases, or take the class out.")
    if settings.balance != "weights":
        return None
    numbers = list(counts.values())
    if targets.kind == "multilabel":
        full = [name for name, count in counts.items() if count == len(train)]
        if full:
            raise DataError(
                f"Label '{full[0]}' is carried by all {len(train)} training cases: --balance weights cannot weigh it "
                "against those without. Use more labelled cases, or --balance none."
            )
        return torch.tensor(positive_weights(numbers, len(train), settings.effective_beta))
    return torch.tensor(effective_number_weights(numbers, settings.effective_beta))


def hint_at_balance(targets: Targets) -> None:
    """Say so where the training cases of two classes, or those with and without a label, differ by a factor above 3."""
    train = targets.of("train")
    counts = targets.counts(train)
    rare, least = min(counts.items(), key=lambda item: item[1])
    frequent, most = max(counts.items(), key=lambda item: item[1])
    if targets.kind == "multilabel":
        rare, least = min(counts.items(), key=lambda item: min(item[1], len(train) - item[1]))
        least = min(least, len(train) - least)
        frequent, most = "the other side of it", len(train) - least
    if most > LARGEST_RATIO * least:
        logger.warning(
            "Training cases are unequal (%s: %d, %s: %d): --balance weights or --balance sampling keeps the rare ones "
            "from being overlooked.",
            rare, least, frequent, most,
        )  # fmt: skip


class Rates:
    """Groups of weights and the rate of each: the head first, then the encoder's levels.

    Args:
        classifier: Its weights that need a gradient are trained.
        schedule: Rates of head and encoder, by `medssl.transfer.schedule`, the head in the decoder's place.
    """

    def __init__(self, classifier: Classifier, schedule: Schedule) -> None:
        self.schedule = schedule
        depths = {name: depth for name, depth in depths_of(classifier.network).items() if name != "decoder"}
        self.depths = {"decoder": 0, **depths}
        self.groups: list[tuple[str, bool, list[nn.Parameter]]] = []
        found: dict[tuple[str, bool], list[nn.Parameter]] = {}
        named = [("head", parameter) for parameter in classifier.head.parameters()]
        named += [(name, parameter) for name, parameter in classifier.network.named_parameters()]
        for name, parameter in named:
            if parameter.requires_grad:
                found.setdefault((group_of(name), parameter.ndim > 1), []).append(parameter)
        self.groups = [(group, decays, parameters) for (group, decays), parameters in found.items()]

    def __call__(self, step: int) -> list[float]:
        """Return the rate of each group at a step."""
        rates = self.schedule.rates(step, self.depths)
        return [rates[group] for group, _, _ in self.groups]

    def optimiser(self, settings: ClassificationSettings) -> torch.optim.Optimizer:
        """Return the optimiser; norms and biases, which have one axis, do not decay."""
        groups = [
            {"params": parameters, "weight_decay": settings.weight_decay if decays else 0.0}
            for _, decays, parameters in self.groups
        ]
        every = [parameter for _, _, parameters in self.groups for parameter in parameters]
        # One pass over memory for each weight, where the device has it.
        fused = all(parameter.device.type in ("cpu", "cuda") for parameter in every)
        if settings.optimiser == "sgd":
            return torch.optim.SGD(groups, lr=settings.rate, momentum=0.9, nesterov=True, fused=fused)
        return torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.98), fused=fused)


@torch.no_grad()
def fit_head_scale(classifier: Classifier, images: ImageSet, patch: Sequence[int], size: int) -> None:
    """Standardise the head's input by the features of training images, at most `SCALE_IMAGES` spread over all.

    Raises:
        CheckpointError: If features are not finite; the image is named.
    """
    count = min(len(images), SCALE_IMAGES)
    rows = [round(number * (len(images) - 1) / max(count - 1, 1)) for number in range(count)]
    device = next(classifier.parameters()).device
    classifier.eval()
    parts = []
    for start in range(0, count, size):
        batch = images.batch(rows[start : start + size], patch)
        parts.append(classifier.features(batch.image.to(device)).float().cpu())
    features = torch.cat(parts)
    finite = features.isfinite().all(dim=1)
    if not bool(finite.all()):
        where = images.cases[rows[int((~finite).nonzero()[0])]].where
        raise CheckpointError(
            f"{where}: the encoder's features are NaN or infinite before training. The checkpoint's weights are broken "
            "or were trained on intensities of another scale: look at --normalisation, or take another checkpoint."
        )
    classifier.head.fit_scale(features)
    classifier.train()


def predict_logits(
    classifier: Classifier, images: ImageSet, patch: Sequence[int], size: int, device: torch.device
) -> NDArray[np.float64]:
    """Return the logits of all images, in order, without augmentation.

    Raises:
        DataError: If one is not finite; the image is named.
    """
    parts = [classifier(batch.image.to(device)).double().cpu() for batch in images.in_order(patch, size)]
    logits: NDArray[np.float64] = torch.cat(parts).numpy()
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        raise DataError(
            f"{images.cases[int(np.flatnonzero(~finite)[0])].where}: the classifier's output is NaN or infinite. Lower "
            "the learning rate, or use --precision float32."
        )
    return logits


def watched_logits(
    engine: Engine, classifier: Classifier, images: ImageSet, patch: Sequence[int], size: int
) -> NDArray[np.float64]:
    """Return the logits of all images while training goes on, without leaving a trace in it."""
    look = partial(predict_logits, classifier, images, patch, size, engine.fabric.device)
    result: NDArray[np.float64] = engine.watch(look)
    return result
