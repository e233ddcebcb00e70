"""Batches for the tests of augmentation."""

from __future__ import annotations

import torch

from medssl.data.batch import Batch

BACKGROUND = -2.0
# Intercept and slope to HU.
RESCALE = (40.0, 250.0)


def make_batch(
    size: tuple[int, ...] = (24, 28, 26),
    *,
    samples: int = 3,
    channels: int = 1,
    spacing=(1.0, 1.0, 1.0),
    modality: str | tuple[str, ...] = "MR",
    labels: bool = True,
    first: int = 0,
    valid=None,
) -> Batch:
    """Return smooth random volumes with a label of three classes; sample i is a function of `first + i`."""
    images, masks = [], []
    for number in range(first, first + samples):
        generator = torch.Generator().manual_seed(number)
        coarse = torch.randn((1, channels, *(5,) * len(size)), generator=generator)
        mode = "trilinear" if len(size) == 3 else "bilinear"
        images.append(torch.nn.functional.interpolate(coarse, size, mode=mode, align_corners=True)[0])
        masks.append((images[-1][0] > 0).long() + (images[-1][0] > 0.5).long())
    three = (1,) * (3 - len(size)) + tuple(size)
    return Batch(
        image=torch.stack(images),
        sample_index=torch.arange(first, first + samples),
        sample_id=torch.arange(samples),
        origin_mm=torch.tensor([[5.0, -3.0, 2.0]]).repeat(samples, 1),
        spacing_mm=torch.tensor([spacing]).repeat(samples, 1),
        valid=torch.tensor([valid or [[0, edge] for edge in three]]).repeat(samples, 1, 1),
        background=torch.full((samples,), BACKGROUND),
        modality=(modality,) * samples if isinstance(modality, str) else modality,
        patient_key=("p",) * samples,
        label=torch.stack(masks) if labels else None,
        rescale=torch.tensor([RESCALE]).repeat(samples, 1),
    )


def row_of(batch: Batch, row: int) -> Batch:
    """Return one sample as a batch of its own."""
    one = slice(row, row + 1)
    return Batch(
        image=batch.image[one],
        sample_index=batch.sample_index[one],
        sample_id=batch.sample_id[one],
        origin_mm=batch.origin_mm[one],
        spacing_mm=batch.spacing_mm[one],
        valid=batch.valid[one],
        background=batch.background[one],
        modality=batch.modality[one],
        patient_key=batch.patient_key[one],
        label=None if batch.label is None else batch.label[one],
        rescale=None if batch.rescale is None else batch.rescale[one],
    )
