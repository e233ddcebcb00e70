"""How much must be read around a patch so that turning and shrinking seldom show what was not read."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import torch

from medssl.augmentation.geometry import is_resampled, view_to_crop
from medssl.augmentation.spatial import Spatial
from medssl.augmentation.spatial_settings import SpatialSettings
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
    sizes = [_read_size(settings, spatial.patch_size) for settings in set(spatial.by_modality.values())]
    return tuple(max(edges) for edges in zip(*sizes, strict=True))


@lru_cache(maxsize=256)
def _read_size(settings: SpatialSettings, patch: tuple[int, ...]) -> tuple[int, ...]:
    three = (1, *patch) if len(patch) == 2 else patch
    spatial = Spatial({"any": settings}, patch)
    facts = Facts(("any",) * DRAWS, torch.ones(DRAWS, 3, dtype=torch.float64), patch, 1)
    parameters = spatial.draw(facts, Draw(0, range(DRAWS)))
    margin = torch.tensor([math.floor(settings.shift * edge) if edge > 1 else 0 for edge in three])
    rows = is_resampled(parameters)
    if bool(rows.any()):
        matrix = view_to_crop(parameters, facts.spacing_mm, (0, 0, 0), three)[rows]
        ticks = [torch.linspace(0, edge - 1, POINTS_PER_AXIS).tolist() for edge in three]
        points = torch.tensor(list(itertools.product(*ticks)), dtype=torch.float64)
        position = (points @ matrix[:, :, :3].transpose(1, 2) + matrix[:, None, :, 3]).flatten(0, 1)
        beyond = torch.maximum(-position, position - (torch.tensor(three, dtype=torch.float64) - 1))
        # Each axis gets a third of what may lie outside. A sort: `torch.quantile` refuses so many numbers.
        rank = round((1 - OUTSIDE_PART / 3) * (len(beyond) - 1))
        margin = torch.maximum(margin, torch.ceil(beyond.sort(dim=0).values[rank]).long())
    size = [edge + 2 * max(int(more), 0) for edge, more in zip(three, margin, strict=True)]
    return tuple(size[-len(patch) :])
