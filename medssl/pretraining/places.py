"""Places that two views share: drawn in the first, found again in the second, and what features say of them.

Distances are in mm of the volume, so that anisotropic voxels and zoomed views measure alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.augmentation.correspondence import to_source_mm, to_view_voxels, values_at
from medssl.augmentation.transform import to_device
from medssl.data.batch import View
from medssl.data.draw import Draw
from medssl.losses.precision import at_least_float32
from medssl.losses.similarity import product

NAME = "places"


@dataclass(frozen=True)
class Places:
    """Points that two views of the same volumes show.

    Args:
        first: Voxels of the first view, also between voxels. Shape: (B, N, 3).
        second: Voxels of the second view. Shape: (B, N, 3).
        mm: Where they lie in the volume. Shape: (B, N, 3).
        usable: Whether both views show tissue of the volume there. Shape: (B, N), bool.
    """

    first: Tensor
    second: Tensor
    mm: Tensor
    usable: Tensor


def draw_places(view: View, draw: Draw, count: int) -> None:
    """Draw points evenly from a view, and keep them with what else was drawn for it.

    Args:
        view: Gets the points as `parameters["places"]["voxels"]`, shape (B, count, 3), on the CPU.
        draw: Stream of the points.
        count: Points of each sample.
    """
    size = view.image.shape[2:]
    edges = torch.tensor((1,) * (3 - len(size)) + tuple(size))
    voxels = draw.uniform(0, 1, (count, 3)) * edges - 0.5
    # A slice is looked at in its plane.
    view.parameters[NAME] = {"voxels": torch.where(edges > 1, voxels, 0.0)}


def places_of(first: View, second: View) -> Places:
    """Return where the points that were drawn for the first view lie in the second."""
    voxels = to_device(first.parameters[NAME]["voxels"], first.image.device)
    mm = to_source_mm(first, voxels)
    found, within = to_view_voxels(second, mm)
    return Places(voxels, found, mm, within & _inside(first, voxels) & _inside(second, found))


def features_at(features: Tensor, voxels: Tensor, size: Sequence[int]) -> Tensor:
    """Return features at points of a view, interpolated linearly.

    Args:
        features: At any resolution. Shape: (B, C, *grid).
        voxels: In voxels of the view. Shape: (B, N, 3).
        size: Spatial size of the view.

    Returns:
        Shape: (B, N, C), float32 or wider.
    """
    return values_at(features, voxels, size).mT


def voxel_edges_mm(view: View) -> Tensor:
    """Return the edges of a view's voxels, measured in the volume. Shape: (B, 3)."""
    return view.to_source_mm[:, :, :3].norm(dim=1)


def place_error(first: Tensor, second: Tensor, places: Places) -> Tensor:
    """Return how far from the truth the best match lies, relative to a match by chance.

    The match of a place is the one of the other view of its crop whose embedding is most similar.

    Args:
        first: Embeddings of the places in the first view. Shape: (B, N, D).
        second: Embeddings of the same places in the second view. Shape: (B, N, D).
        places: Where they lie.

    Returns:
        Mean distance in mm over that of two places of a crop; 0 where all are found, about 1 by chance. Scalar.
    """
    first, second = (F.normalize(at_least_float32(rows), dim=2) for rows in (first, second))
    cosines = product(first, second.mT).masked_fill(~places.usable[:, None], -torch.inf)
    return distance_to_chance(cosines.argmax(dim=2), places)


def distance_to_chance(matched: Tensor, places: Places) -> Tensor:
    """Return the mean distance of places from those that they were matched with, over that of any two of a crop.

    Args:
        matched: Number of the place that each was matched with. Shape: (B, N), int64.
        places: Where they lie.
    """
    distance = torch.cdist(places.mm, places.mm, compute_mode="donot_use_mm_for_euclid_dist")
    pairs = places.usable[:, :, None] & places.usable[:, None]
    found = distance.gather(2, matched[:, :, None])[:, :, 0]
    usual = torch.where(pairs, distance, 0.0).sum() / pairs.sum().clamp(min=1)
    error = torch.where(places.usable, found, 0.0).sum() / places.usable.sum().clamp(min=1)
    return error / usual.clamp(min=1e-12)


def image_agreement(first: View, second: View, places: Places) -> Tensor:
    """Return the correlation of what two views show at places that are said to be one.

    Near 1 for views that differ in brightness and contrast, lower the more they are changed otherwise, and near 0 if
    the places are not the same: it looks at images alone, not at what a network makes of them.

    Returns:
        Mean over samples and channels that show something, scalar.
    """
    # Means over three voxels: noise is not what the places are compared by.
    shown = [
        values_at(_smoothed(view.image), voxels, view.image.shape[2:])
        for view, voxels in ((first, places.first), (second, places.second))
    ]
    weight = places.usable[:, None].float()
    count = weight.sum(dim=2, keepdim=True).clamp(min=1)
    a, b = ((values - (values * weight).sum(dim=2, keepdim=True) / count) * weight for values in shown)
    size = (a.square().sum(dim=2) * b.square().sum(dim=2)).sqrt()
    power = [(values.square() * weight).sum(dim=2) for values in shown]
    some = size > 1e-8 * (power[0] * power[1]).sqrt()
    return torch.where(some, (a * b).sum(dim=2) / size.clamp(min=1e-12), 0.0).sum() / some.sum().clamp(min=1)


def similarity_map(query: Tensor, embedded: Tensor, size: Sequence[int]) -> Tensor:
    """Return how similar each position of a map is to one embedding, as an image.

    Args:
        query: Shape: (B, D).
        embedded: Shape: (B, D, *grid).
        size: Spatial size of the image.

    Returns:
        Cosines, shape (B, 1, *size).
    """
    query, embedded = F.normalize(at_least_float32(query), dim=1), F.normalize(at_least_float32(embedded), dim=1)
    cosines = (query.reshape(*query.shape, *(1,) * (embedded.ndim - 2)) * embedded).sum(dim=1, keepdim=True)
    return F.interpolate(cosines, size=tuple(size), mode="nearest")


def _smoothed(image: Tensor) -> Tensor:
    pool = F.avg_pool2d if image.ndim == 4 else F.avg_pool3d
    return pool(at_least_float32(image), 3, stride=1, padding=1, count_include_pad=False)


def _inside(view: View, voxels: Tensor) -> Tensor:
    """Tell whether points of a view show tissue of the volume. Shape: (B, N), bool."""
    return values_at(view.inside.float(), voxels, view.image.shape[2:], mode="nearest")[:, 0] > 0.5
