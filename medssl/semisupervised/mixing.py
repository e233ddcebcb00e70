"""Views mixed with those of batch mates, and predictions mixed alike on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medssl.augmentation.boxes import box_mask_of
from medssl.augmentation.mixing import cutmix, mixup
from medssl.augmentation.transform import Parameters
from medssl.data.batch import Batch
from medssl.data.draw import Draw
from medssl.semisupervised.batch import SemiView


def joined(views: list[SemiView]) -> SemiView:
    """Return the samples of several views as one view without labels; it shows what the images show.

    Args:
        views: Views of one size; what was drawn for them stays behind.
    """
    return SemiView(
        image=torch.cat([view.image for view in views]),
        inside=torch.cat([view.inside for view in views]),
        to_source_mm=torch.cat([view.to_source_mm for view in views]),
    )


def pool_draw(draw: Draw, parts: Sequence[Batch], name: str) -> Draw:
    """Return one stream for the samples of several batches in a row, which may have equal numbers or be the same.

    Args:
        draw: Stream of the step.
        parts: The batches.
        name: What is drawn.
    """
    index = [len(parts) * int(each) + number for number, part in enumerate(parts) for each in part.sample_index]
    return Draw(draw.seed, index, (*draw.path, name))


def soft_labels(view: SemiView, classes: int) -> Tensor:
    """Return what labelled samples show as probabilities, all 0 where a label is no class. Shape: (B, K, *rest).

    Raises:
        ValueError: If the view has no labels.
    """
    label = view.label if view.shows is None else view.shows
    if label is None:
        raise ValueError("The labelled part of a batch has no labels.")
    known = torch.arange(classes, device=label.device).view(1, -1, *(1,) * (label.ndim - 1))
    return (label[:, None] == known).float()


def mixed_up(view: SemiView, drawn: Parameters, *, where: Tensor | None = None) -> SemiView:
    """Return a view blended with the partners' images; a voxel counts where both images count.

    Args:
        view: B samples.
        drawn: What `draw_mixup` drew for them.
        where: Places that count before mixing instead of `inside`. Shape: (B, 1, *spatial), bool.

    Returns:
        The view without labels. `drawn` holds `partner` (B,), int64, and `weight` (B,), for `blend`.
    """
    partner, weight = drawn["partner"], drawn["weight"]
    counts = view.inside if where is None else where
    mixed = SemiView(
        image=mixup(view.image, drawn).image,
        inside=counts,
        to_source_mm=view.to_source_mm,
        parameters={**view.parameters, "mixup": drawn},
    ).with_drawn(partner=partner, weight=weight)
    mixed.inside = counts & counts.index_select(0, mixed.drawn["partner"])
    return mixed


def cut_mixed(view: SemiView, drawn: Parameters) -> SemiView:
    """Return a view with a box of each image from its partner; where the box's voxels count goes along.

    Args:
        view: B samples.
        drawn: What `draw_cutmix` drew for them.

    Returns:
        The view without labels. `drawn` holds `partner` (B,), int64, and `box` (B, 1, *spatial), bool, for `exchange`.
    """
    mixed = SemiView(
        image=cutmix(view.image, drawn).image,
        inside=view.inside,
        to_source_mm=view.to_source_mm,
        parameters={**view.parameters, "cutmix": drawn},
    ).with_drawn(partner=drawn["partner"], box=box_mask_of(drawn["boxes"], view.image.shape[2:]))
    mixed.inside = exchange(view.inside, mixed)
    return mixed


def blend(values: Tensor, mixed: SemiView) -> Tensor:
    """Return values mixed as the images of `mixed_up` were, on their device.

    Args:
        values: Of the samples before mixing, for example probabilities. Shape: (B, ...).
        mixed: What `mixed_up` returned.
    """
    weight = mixed.drawn["weight"].to(values.dtype).view(-1, *(1,) * (values.ndim - 1))
    return torch.lerp(values.index_select(0, mixed.drawn["partner"]), values, weight)


def exchange(values: Tensor, mixed: SemiView) -> Tensor:
    """Return values mixed as the images of `cut_mixed` were, on their device.

    Args:
        values: Of the samples before mixing, for example probabilities. Shape: (B, K, *spatial).
        mixed: What `cut_mixed` returned.
    """
    return torch.where(mixed.drawn["box"], values.index_select(0, mixed.drawn["partner"]), values)
