"""Semi-supervised methods on a small network and batch, as their tests use them."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.data.batch import Batch, Views
from medssl.data.draw import Draw
from medssl.networks.build import build_network, freeze_unused_outputs
from medssl.networks.classifier import Classifier
from medssl.semisupervised.batch import PairedBatch, SemiView
from medssl.semisupervised.method import SemiSupervised, SemiSupervisedSettings
from medssl.semisupervised.supervised import Supervised
from medssl.semisupervised.task import ClassificationTask, SegmentationTask
from medssl.training.method import Step
from medssl.transfer.image_batches import ImageBatch

MethodT = TypeVar("MethodT", bound=SemiSupervised)
SIZES = {2: (16, 16), 3: (16, 16, 16)}
#: A step at which every ramp of the tests has risen to its height.
LATE = Step(90, 100)
IGNORED = 255
#: Names of the supervised error's terms.
SUPERVISED = ("dice", "cross_entropy")


def network_of(task: str, dimensions: int, classes: int, seed: int) -> nn.Module:
    """Return resenc-xs for a task, the same for the same seed; a classifier's head is not zero, as it is at first."""
    unet = build_network("resenc-xs", dimensions=dimensions, out_channels=classes, seed=seed)
    freeze_unused_outputs(unet)
    if task == "segmentation":
        return unet
    classifier = Classifier(unet, classes, "multiclass")
    with torch.no_grad():
        for parameter in classifier.head.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return classifier


def build(
    kind: type[MethodT],
    settings: SemiSupervisedSettings,
    task: str = "segmentation",
    *,
    dimensions: int = 2,
    classes: int = 2,
    seed: int = 0,
    overrides: dict[str, Any] | None = None,
) -> MethodT:
    """Return a method on small networks.

    Args:
        kind: The method.
        settings: Its own.
        task: `segmentation` or `classification`.
        dimensions: 2 or 3.
        classes: Number of classes.
        seed: Of the first network; the others have the next ones.
        overrides: Changes of the augmentation policies.
    """
    networks = [network_of(task, dimensions, classes, seed + number) for number in range(kind.network_count)]
    size = SIZES[dimensions]
    policy = policy_for("weak", {"MR"}, size, AugmentationSettings(overrides=overrides or {}))
    chosen = SegmentationTask(classes, IGNORED) if task == "segmentation" else ClassificationTask(classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(networks, chosen, policy, settings)


def paired(
    task: str = "segmentation",
    *,
    dimensions: int = 2,
    classes: int = 2,
    labelled: int = 2,
    unlabelled: int = 2,
    seed: int = 0,
    first: int = 0,
    margin: int = 0,
    double: bool = False,
) -> PairedBatch:
    """Return crops of noise with labels that follow the intensity, and unlabelled ones.

    Args:
        task: `segmentation` or `classification`.
        dimensions: 2 or 3.
        classes: Number of classes.
        labelled: Samples with labels.
        unlabelled: Samples without.
        seed: Of the images.
        first: Number of the first sample of each stream.
        margin: Voxels of padding along each border.
        double: Images in float64.
    """
    generator = torch.Generator().manual_seed(seed)
    size = tuple(edge + 8 for edge in SIZES[dimensions])
    parts = []
    for count in (labelled, unlabelled):
        image = torch.randn((count, 1, *size), generator=generator)
        parts.append(_facts(image.double() if double else image, dimensions, first, margin))
    if task == "segmentation":
        label = (parts[0]["image"][:, 0] > 0).long() * (classes - 1)
        return PairedBatch(Batch(**parts[0], label=label), Batch(**parts[1]))
    target = torch.arange(labelled) % classes
    return PairedBatch(ImageBatch(**parts[0], target=target), Batch(**parts[1]))


def _facts(image: Tensor, dimensions: int, first: int, margin: int) -> dict[str, Any]:
    count, size = len(image), image.shape[2:]
    whole = (1,) * (3 - dimensions) + tuple(size)
    valid = torch.tensor([[0, edge] if edge == 1 else [margin, edge - margin] for edge in whole])
    return {
        "image": image,
        "sample_index": torch.arange(first, first + count),
        "sample_id": torch.arange(count),
        "origin_mm": torch.zeros(count, 3),
        "spacing_mm": torch.ones(count, 3),
        "valid": valid.expand(count, 3, 2).clone(),
        "background": torch.zeros(count),
        "modality": ("MR",) * count,
        "patient_key": tuple(f"p{number}" for number in range(count)),
    }


@torch.no_grad()
def views_of(method: SemiSupervised, batch: PairedBatch, seed: int = 0) -> Views:
    """Return what the loop hands to `losses`."""
    return method.views(batch, Draw(seed, batch.sample_index))


def total(terms: dict[str, Tensor]) -> Tensor:
    """Return the sum of a loss's terms."""
    return torch.stack(list(terms.values())).sum()


def unsupervised_terms(method: SemiSupervised, views: Views, step: Step = LATE) -> dict[str, Tensor]:
    """Return the terms of a loss that are not the supervised error."""
    return {name: term for name, term in method.losses(views, step).items() if name not in SUPERVISED}


def weights_out_of_reach(method: SemiSupervised, batch: PairedBatch, steps: int = 3, rate: float = 0.01) -> list[str]:
    """Return the trained weights without a gradient from what is learnt without labels, after steps of descent.

    nnU-Net starts the last norm of a residual block at zero, so that what lies before it needs some steps.
    """
    for index in range(steps):
        terms = method.losses(views_of(method, batch, seed=index), LATE)
        method.zero_grad()
        total(terms).backward()
        with torch.no_grad():
            for weight in method.parameters():
                if weight.grad is not None:
                    weight -= rate * weight.grad
        method.after_step(LATE)
    method.zero_grad()
    total(unsupervised_terms(method, views_of(method, batch))).backward()
    return [
        name
        for name, weight in method.named_parameters()
        if weight.requires_grad and (weight.grad is None or weight.grad.abs().max() == 0)
    ]


def gradients_of(method: SemiSupervised, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of each weight of the networks; zero where there is none."""
    method.zero_grad()
    total(terms).backward()
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in method.networks.named_parameters()
    }


def equals_supervised_at_weight_zero(method: SemiSupervised, batch: PairedBatch) -> bool:
    """Tell whether the gradients of a method whose weight is 0 are, bit for bit, those of the labelled samples alone.

    Args:
        method: With one network and `unlabelled.weight` 0.
        batch: What both see.
    """
    assert method.settings.unlabelled.weight == 0
    control = Supervised([method.networks[0]], method.task, method.policy, SemiSupervisedSettings())
    mine = gradients_of(method, method.losses(views_of(method, batch), LATE))
    alone = gradients_of(control, control.losses(views_of(control, batch), LATE))
    return same_gradients(mine, alone)


def answer(network: Any, *biases: float) -> None:
    """Make a network put out the same logits everywhere, whatever it sees."""
    layer = network.head.linear if isinstance(network, Classifier) else network.decoder.seg_layers[-1]
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor(biases))


def few(batch: Batch, count: int) -> Batch:
    """Return the first samples of a batch."""
    parts = {
        item.name: value[:count] if isinstance(value := getattr(batch, item.name), (Tensor, tuple)) else value
        for item in dataclasses.fields(batch)
    }
    return type(batch)(**parts)


def with_other_unlabelled(batch: PairedBatch, seed: int = 99) -> PairedBatch:
    """Return a batch with the same labelled samples and other unlabelled images."""
    assert batch.unlabelled is not None
    image = torch.randn(batch.unlabelled.image.shape, generator=torch.Generator().manual_seed(seed))
    return PairedBatch(batch.labelled, dataclasses.replace(batch.unlabelled, image=image))


def same_gradients(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Tell whether two sets of gradients are the same to the bit."""
    return all(torch.equal(first[name], second[name]) for name in first)


def same_views(first: Views, second: Views, rows: slice = slice(None)) -> bool:
    """Tell whether the images of two lists of views, and what was drawn for the losses, are the same to the bit."""
    return len(first) == len(second) and all(
        torch.equal(a.image[rows], b.image[rows])
        and all(
            torch.equal(a.drawn[name][rows], b.drawn[name][rows])
            for name in (a.drawn if isinstance(a, SemiView) and isinstance(b, SemiView) else ())
        )
        for a, b in zip(first, second, strict=True)
    )
