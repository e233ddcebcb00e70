"""How much must be read around a patch so that turning and shrinking seldom show what was not read."""

from __future__ import annotations

import itertools
import math

import torch

from medssl.augmentation.geometry import is_resampled, view_to_crop
from medssl.augmentation.spatial import Spatial
from medssl.augmentation.transform import Facts
from medssl.data.draw import Draw

# Part of the voxels of the resampled views that may lie outside what was read; they are filled and marked not `inside`.
# All corners of all draws would need 2.2 times the patch along each axis, 11 times the voxels, for few views.
OUTSIDE_PART = 0.05
DRAWS = 1024
POINTS_PER_AXIS = 7


def read_size_for(spatial: Spatial) -> tuple[int, ...]:
    """Return the size to read, found by drawing the transform's own parameters with a fixed seed.

    Isotropic voxels are assumed. The size differs from the patch by an even number along each axis, so that both have
    one centre.
    """
    different = {settings: modality for modality, settings in spatial.by_modality.items()}
    sizes = [_read_size(spatial, modality) for modality in different.values()]
    return tuple(max(edges) for edges in zip(*sizes, strict=True))


def _read_size(spatial: Spatial, modality: str) -> tuple[int, ...]:
    patch = spatial.patch_size
    three = (1, *patch) if len(patch) == 2 else patch
    facts = Facts((modality,) * DRAWS, torch.ones(DRAWS, 3, dtype=torch.float64), patch, 1)
    parameters = spatial.draw(facts, Draw(0, range(DRAWS)))
    shift = [math.floor(spatial.by_modality[modality].shift * edge) if edge > 1 else 0 for edge in three]
    rows = is_resampled(parameters)
    if not bool(rows.any()):
        margin = torch.tensor(shift)
    else:
        matrix = view_to_crop(parameters, facts.spacing_mm, (0, 0, 0), three)[rows]
        ticks = [torch.linspace(0, edge - 1, POINTS_PER_AXIS).double() for edge in three]
        points = torch.tensor(list(itertools.product(*(tick.tolist() for tick in ticks))), dtype=torch.float64)
        position = (points @ matrix[:, :, :3].transpose(1, 2) + matrix[:, None, :, 3]).flatten(0, 1)
        beyond = torch.maximum(-position, position - (torch.tensor(three, dtype=torch.float64) - 1))
        # Each axis gets a third of what may lie outside.
        margin = torch.ceil(torch.quantile(beyond, 1 - OUTSIDE_PART / 3, dim=0)).long()
        margin = torch.maximum(margin, torch.tensor(shift))
    size = [edge + 2 * max(int(more), 0) for edge, more in zip(three, margin, strict=True)]
    return tuple(size[-len(patch) :])
