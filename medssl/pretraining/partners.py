"""Another sample of the batch for each sample, on whichever rank it lies: for methods that mix images.

A sample that is mixed depends on its batch by definition. The batch is that of all ranks in the order of one process,
so that the number of ranks changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medssl.augmentation.policy import Policy, known_modality
from medssl.augmentation.transform import to_device
from medssl.data.batch import Batch
from medssl.data.draw import Draw
from medssl.training.distributed import gather, rank, world_size


def partner_rows(batch: Batch, draw: Draw, policy: Policy) -> Tensor:
    """Choose for each sample another one of the whole batch.

    It is one of another volume and the same modality where the batch has one, else one of another volume, else another
    crop of the same volume; among those each is as likely as any other. Every rank must call it.

    Args:
        batch: Samples of this rank.
        draw: Stream that the choice is made with.
        policy: Names the modalities.

    Returns:
        Row of the partner in what `of_partners` gathers. Shape: (B,), int64, on the images' device.

    Raises:
        ValueError: If there is no other sample.
    """
    device, world = batch.image.device, world_size()
    count = world * len(batch)
    if count < 2:
        raise ValueError("Mixing needs at least 2 samples in the batch of all devices, got 1: raise batch_size")
    volume = to_device(batch.sample_id, device)
    modality = to_device(torch.tensor(_modality_numbers(batch, policy)), device)
    volumes, modalities = gather(torch.stack([volume, modality], dim=1)).unbind(dim=1)
    score = to_device(draw.uniform(0, 1, (count,)), device)
    score = score + 2 * (volumes != volume[:, None]) + (modalities == modality[:, None])
    own = torch.arange(len(batch), device=device)[:, None] * world + rank()
    return score.scatter(1, own, -1.0).argmax(dim=1)


def of_partners(values: Tensor, rows: Tensor) -> Tensor:
    """Return the values of each sample's partner. Every rank must call it.

    Args:
        values: Of the samples of this rank. Shape: (B, ...).
        rows: What `partner_rows` returned.
    """
    if values.dtype == torch.bool:
        # Not every backend sends truth values.
        return of_partners(values.to(torch.uint8), rows).bool()
    return gather(values).index_select(0, rows)


def _modality_numbers(batch: Batch, policy: Policy) -> list[int]:
    if policy.settings.modality is not None:
        return [0] * len(batch)
    known = sorted(policy.by_modality)
    return [known.index(known_modality(name)) for name in batch.modality]
