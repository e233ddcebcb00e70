"""Features of several augmented views of each volume, for figures that ask what an encoder is invariant to."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medssl.augmentation.policy import AugmentationSettings, Policy, policy_for
from medssl.data.batch import Batch
from medssl.data.draw import Draw
from medssl.errors import UsageError
from medssl.inference.embedding import Change
from medssl.inference.frozen import Frozen
from medssl.inference.tiles import Tile, Triple, centre_tile, read_tile
from medssl.inference.volumes import Volume
from medssl.networks.pooling import Pooling, Stages, pooled_stages
from medssl.progress import progress


def view_features(
    frozen: Frozen,
    volumes: Sequence[Volume],
    *,
    views: int,
    purpose: str = "contrastive",
    settings: AugmentationSettings | None = None,
    stages: Stages = "last",
    pooling: Pooling = "mean",
    seed: int = 0,
    quiet: bool = True,
) -> NDArray[np.float32]:
    """Return features of views of the middle of each volume, drawn by a policy.

    A view depends on the seed and on the place of its volume in the list, not on the others.

    Args:
        frozen: The encoder.
        volumes: What to look at.
        views: Views of each.
        purpose: A purpose of `medssl.augmentation.policy`.
        settings: What else to say about augmentation.
        stages: See `medssl.networks.pooling`.
        pooling: See `medssl.networks.pooling`.
        seed: Of what is drawn.
        quiet: Show no progress.

    Returns:
        Shape: (N, views, W), float32.

    Raises:
        UsageError: If the purpose or a modality is unknown, or channels do not fit.
    """
    settings = settings or AugmentationSettings()
    policy = policy_for(purpose, {volume.modality for volume in volumes}, frozen.patch_size, settings)
    size: Triple = (1, *policy.read_size)[-3:]  # type: ignore[assignment]
    rows = []
    with progress("Drawing views", len(volumes), quiet=quiet) as advance, torch.inference_mode():
        for number, volume in enumerate(volumes):
            batch = _batch(volume, centre_tile(volume.shape[1:], size), number, frozen)
            draw = Draw(seed, batch.sample_index)
            images = torch.cat([policy.view(batch, draw.child("quality").child(view)).image for view in range(views)])
            rows.append(pooled_stages(frozen.encoder, images.to(frozen.device), stages, pooling).cpu().numpy())
            advance()
    return np.stack(rows).astype(np.float32)


def changed_by(policy: Policy, frozen: Frozen, seed: int = 0) -> Change:
    """Return what `embed` takes to see boxes as a policy of the encoder's patch size changes them.

    All boxes of a volume are changed alike, by what is drawn for its name.
    """

    def change(image: NDArray[np.float32], volume: Volume, tile: Tile) -> NDArray[np.float32]:
        batch = _batch(volume, tile, zlib.crc32(volume.id.encode()), frozen, image)
        changed = policy.view(batch, Draw(seed, batch.sample_index)).image[0]
        return (changed[:, None] if frozen.dimensions == 2 else changed).numpy()

    return change


def _batch(volume: Volume, tile: Tile, number: int, frozen: Frozen, array: NDArray[np.float32] | None = None) -> Batch:
    if volume.shape[0] != frozen.encoder.in_channels:
        raise UsageError(
            f"{volume.id} has {volume.shape[0]} channels, the encoder takes {frozen.encoder.in_channels}: views are "
            "drawn for all channels of a volume together."
        )
    if array is None:
        array = read_tile(volume.read, tile, volume.shape[1:], volume.shape[0], volume.background)
    start, stop = np.asarray(tile.start), np.asarray(tile.start) + np.asarray(tile.size)
    inside = np.stack([np.maximum(-start, 0), np.minimum(stop, volume.shape[1:]) - start], axis=1)
    spacing = volume.spacing_mm or (1.0, 1.0, 1.0)
    image = torch.from_numpy(array)[None]
    return Batch(
        image=image[:, :, 0] if frozen.dimensions == 2 else image,
        sample_index=torch.tensor([number]),
        sample_id=torch.tensor([number]),
        origin_mm=_row(start * np.asarray(spacing)),
        spacing_mm=_row(spacing),
        valid=torch.from_numpy(inside.astype(np.int64))[None],
        background=torch.tensor([volume.background], dtype=torch.float32),
        modality=(volume.modality,),
        patient_key=(volume.patient_key,),
        rescale=_row(volume.rescale),
    )


def _row(values: Sequence[float] | NDArray[np.float64]) -> Tensor:
    return torch.tensor(np.asarray(values, dtype=np.float32))[None]
