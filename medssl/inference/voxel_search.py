"""Embeddings of points of whole volumes, and the point of one volume that looks most like a point of another.

Volumes are looked at tile by tile, each of the patch size that the encoder was trained with. What is kept of a tile is
the best cosine of each point that is looked for, so that memory does not grow with the volume.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medssl.errors import CheckpointError, UsageError
from medssl.inference.frozen import Frozen, load_frozen
from medssl.inference.tiles import Tile, Triple, read_tile
from medssl.inference.volumes import Volume
from medssl.pretraining.voxel_contrast import PREFIX
from medssl.pretraining.voxel_head import VoxelHead
from medssl.progress import progress
from medssl.training.checkpoint import find_checkpoint, load_checkpoint

#: Voxels whose features are interpolated at once.
MOST_VOXELS = 16_384
#: Voxels from one place that is compared to the next; what is found is then looked at voxel by voxel.
STEP = 2
#: Places that are looked at a second time.
CANDIDATES = 5


@dataclass(frozen=True)
class VoxelModel:
    """An encoder with heads that embed points.

    Args:
        frozen: The encoder.
        heads: By name; a point's similarity is the mean of their cosines.
        preprocessing: How volumes are made like those of the pretraining; empty where that is not known.
        modalities: What it was trained on.
    """

    frozen: Frozen
    heads: dict[str, VoxelHead]
    preprocessing: dict[str, Any]
    modalities: tuple[str, ...]

    @property
    def patch(self) -> Triple:
        """Size of a tile (z, y, x); one slice in 2D."""
        z, y, x = (1,) * (3 - self.frozen.dimensions) + tuple(self.frozen.patch_size)
        return z, y, x


def load_voxel_model(run: Path, *, device: torch.device | str = "cpu") -> VoxelModel:
    """Load the encoder and the heads of a pretraining.

    Args:
        run: A RUN of a method that embeds points, or one of its checkpoints.
        device: Where to put it.

    Raises:
        CheckpointError: If it cannot be read, or has no head that embeds points.
    """
    path = find_checkpoint(run)
    facts = load_checkpoint(path, numpy_scalars=True).get("medssl") or {}
    saved = {name: value for name, value in (facts.get("heads") or {}).items() if PREFIX in name}
    if not saved:
        raise CheckpointError(
            f"{path} was made by {facts.get('method', 'another program')} and has no head that embeds points. Match "
            "with a RUN of `medssl pretrain --method voxel-contrast`."
        )
    frozen = load_frozen(path, device=device)
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in saved.items():
        # Where several methods trained one network, each one's names begin with its own.
        head, _, key = name.partition(PREFIX)[2].partition(".")
        states.setdefault(head, {})[key] = value
    heads = {
        name: VoxelHead.from_state(state, frozen.encoder.widths).to(device).eval().requires_grad_(False)
        for name, state in states.items()
    }
    return VoxelModel(frozen, heads, dict(facts.get("preprocessing") or {}), tuple(facts.get("modalities") or ()))


def embed_points(model: VoxelModel, volume: Volume, points: Tensor) -> dict[str, Tensor]:
    """Return each head's embeddings of points, each seen in the tile that has it nearest to its middle.

    Args:
        model: The encoder and its heads.
        volume: As those of the pretraining.
        points: Voxels (z, y, x), also between voxels. Shape: (N, 3).

    Returns:
        Shape of each: (N, D), rows of length 1.
    """
    _check_channels(model, volume)
    found: dict[str, list[Tensor]] = {name: [] for name in model.heads}
    for point in points:
        tile = _tile_around(model, volume, point.tolist())
        for name, rows in _embed(model, _features(model, volume, tile), tile, point[None]).items():
            found[name].append(rows)
    return {name: torch.cat(rows) for name, rows in found.items()}


def search(
    model: VoxelModel, volume: Volume, wanted: dict[str, Tensor], *, step: int = STEP, quiet: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the voxel of a volume that looks most like each of some points.

    Every `step`-th voxel along each axis is compared first. The surroundings of the best of each tile are then compared
    voxel by voxel in a tile around it, as the point itself was seen, for the `CANDIDATES` best tiles.

    Args:
        model: The encoder and its heads.
        volume: Where to look.
        wanted: What `embed_points` returned.
        step: Voxels from one comparison to the next; 1 compares all.
        quiet: Show no progress.

    Returns:
        Voxels (z, y, x), shape (N, 3), int64; and their similarity, the mean cosine over the heads, shape (N,).
    """
    _check_channels(model, volume)
    places, similarities = [], []
    tiles = list(_cover(volume.shape[1:], model.patch))
    with progress("Searching", len(tiles), quiet=quiet) as advance:
        for tile, owned in tiles:
            found, similarity = _likeliest(model, volume, tile, _grid(owned, step), wanted)
            places.append(found)
            similarities.append(similarity)
            advance()
    # The likeliest voxel of each tile, and of these the best. Shapes: (N, tiles, 3), (N, candidates).
    candidates = torch.stack(places, dim=1)
    chosen = torch.stack(similarities, dim=1).topk(min(CANDIDATES, len(tiles)), dim=1).indices
    refined = []
    for number, ranks in enumerate(chosen.tolist()):
        one = {name: rows[number : number + 1] for name, rows in wanted.items()}
        near = [_look_closer(model, volume, candidates[number, rank].tolist(), one, step) for rank in ranks]
        refined.append(max(near, key=lambda found: float(found[1])))
    return torch.cat([found for found, _ in refined]), torch.cat([similarity for _, similarity in refined])


def _look_closer(
    model: VoxelModel, volume: Volume, place: Sequence[int], wanted: dict[str, Tensor], step: int
) -> tuple[Tensor, Tensor]:
    """Return the likeliest of a voxel and its neighbours in a tile around it, and its similarity."""
    near = [(max(at - step, 0), min(at + step + 1, edge)) for at, edge in zip(place, volume.shape[1:], strict=True)]
    if model.frozen.dimensions == 2:
        near[0] = (place[0], place[0] + 1)
    return _likeliest(model, volume, _tile_around(model, volume, place), _grid(near, 1), wanted)


def _likeliest(
    model: VoxelModel, volume: Volume, tile: Tile, grid: Tensor, wanted: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the voxel of a grid within a tile that looks most like each point, and its similarity."""
    features = _features(model, volume, tile)
    parts = []
    for voxels in grid.split(MOST_VOXELS):
        rows = _embed(model, features, tile, voxels)
        parts.append(torch.stack([wanted[name] @ rows[name].T for name in model.heads]).mean(dim=0).cpu())
    similarity, index = torch.cat(parts, dim=1).max(dim=1)
    return grid[index], similarity


def _features(model: VoxelModel, volume: Volume, tile: Tile) -> list[Tensor]:
    """Return the features of each stage over a tile."""
    block = read_tile(volume.read, tile, volume.shape[1:], volume.shape[0], volume.background)
    image = torch.from_numpy(block)[None].to(model.frozen.device)
    with torch.inference_mode():
        return model.frozen.encoder.stages(image[:, :, 0] if model.frozen.dimensions == 2 else image)


def _embed(model: VoxelModel, features: list[Tensor], tile: Tile, voxels: Tensor) -> dict[str, Tensor]:
    """Return each head's embeddings of voxels of the volume that lie in a tile. Shape of each: (N, D)."""
    own = (voxels - torch.tensor(tile.start)).float()[None].to(model.frozen.device)
    with torch.inference_mode():
        return {name: head(features, own, model.frozen.patch_size)[0] for name, head in model.heads.items()}


def _tile_around(model: VoxelModel, volume: Volume, point: Sequence[float]) -> Tile:
    """Return the tile that has a point nearest to its middle and does not leave the volume where it fits into it."""
    starts = []
    for at, edge, box in zip(point, volume.shape[1:], model.patch, strict=True):
        starts.append((edge - box) // 2 if box >= edge else min(max(round(at - (box - 1) / 2), 0), edge - box))
    return Tile((starts[0], starts[1], starts[2]), model.patch)


def _cover(shape: Sequence[int], patch: Triple) -> Iterator[tuple[Tile, list[tuple[int, int]]]]:
    """Yield tiles that overlap by half, each with the voxels that lie nearer to its middle than to any other's."""
    axes = [_along(edge, box) for edge, box in zip(shape, patch, strict=True)]
    for (z, along_z), (y, along_y), (x, along_x) in itertools.product(*axes):
        yield Tile((z, y, x), patch), [along_z, along_y, along_x]


def _along(edge: int, box: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield the starts of boxes along an axis, each with the range of voxels that are its own."""
    if box >= edge:
        yield (edge - box) // 2, (0, edge)
        return
    count = -(-(edge - box) // max(box // 2, 1)) + 1
    starts = [round(number * (edge - box) / (count - 1)) for number in range(count)]
    between = [0, *((a + b + box) // 2 for a, b in itertools.pairwise(starts)), edge]
    yield from zip(starts, itertools.pairwise(between), strict=True)


def _grid(owned: Sequence[tuple[int, int]], step: int) -> Tensor:
    """Return every `step`-th voxel of a box. Shape: (N, 3), int64."""
    return torch.cartesian_prod(*(torch.arange(start, stop, step) for start, stop in owned))


def _check_channels(model: VoxelModel, volume: Volume) -> None:
    channels = model.frozen.encoder.in_channels
    if volume.shape[0] != channels:
        raise UsageError(
            f"{volume.id} has {volume.shape[0]} channels, the model takes {channels}. Use volumes of the channels it "
            "was pretrained on."
        )
