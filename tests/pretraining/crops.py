"""Batches of crops whose place in a volume is known, and views that show their own coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medssl.augmentation.policy import AugmentationSettings, Policy, policy_for
from medssl.data.batch import Batch
from tests.pretraining.methods import blobs

#: Moves every view, each in its own way, and leaves intensities alone.
MOVED = {
    "spatial": {
        "rotation": {"probability": 1.0, "degrees": 15, "in_plane_degrees": 15},
        "scale": {"probability": 1.0, "range": [0.9, 1.1]},
        "mirror": {"probability": 0.0},
        "shift": 0.15,
    }
}
#: Leaves views where they were cut.
STILL = {"spatial": {"rotation": {"probability": 0.0}, "scale": {"probability": 0.0}, "shift": 0.0}}


def moving_policy(size: tuple[int, ...]) -> Policy:
    """Return a policy that moves views and changes no intensity."""
    return policy_for("weak", {"MR"}, size, AugmentationSettings(overrides=MOVED))


def crops(
    policy: Policy,
    count: int = 3,
    *,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    origin_mm: Sequence[Sequence[float]] | None = None,
    extent_mm: Sequence[float] = (100.0, 100.0, 100.0),
    volumes: Sequence[int] | None = None,
    image: Tensor | None = None,
) -> Batch:
    """Return crops of the size that a policy reads."""
    size = tuple(policy.read_size)
    whole = (1,) * (3 - len(size)) + size
    return Batch(
        image=torch.stack([blobs(size, number) for number in range(count)]) if image is None else image,
        sample_index=torch.arange(count),
        sample_id=torch.arange(count) if volumes is None else torch.tensor(volumes),
        origin_mm=torch.tensor([[10.0 * number, 0, 0] for number in range(count)] if origin_mm is None else origin_mm),
        spacing_mm=torch.tensor([spacing_mm] * count),
        valid=torch.tensor([[0, edge] for edge in whole]).expand(count, 3, 2).clone(),
        background=torch.zeros(count),
        modality=("MR",) * count,
        patient_key=tuple(f"p{number}" for number in range(count)),
        extent_mm=torch.tensor([extent_mm] * count),
    )


def coordinates(size: tuple[int, ...], spacing_mm: Sequence[float], origin_mm: Tensor) -> Tensor:
    """Return images whose three channels are the position of each voxel in mm. Shape: (B, 3, *size)."""
    whole = (1,) * (3 - len(size)) + size
    grid = torch.meshgrid(*(torch.arange(edge).float() for edge in whole), indexing="ij")
    position = torch.stack(grid) * torch.tensor(spacing_mm).reshape(3, 1, 1, 1)
    return (position[None] + origin_mm.reshape(-1, 3, 1, 1, 1)).reshape(len(origin_mm), 3, *size)
