"""Points find their way from a view to the volume and into another view, whatever the views drew."""

from __future__ import annotations

import itertools

import pytest
import torch

from medssl.augmentation.correspondence import (
    box_overlap,
    carry,
    match,
    overlap_fraction,
    overlap_mask,
    source_positions_mm,
    to_source_mm,
    to_view_voxels,
    values_at,
)
from medssl.augmentation.spatial import Spatial
from medssl.augmentation.spatial_settings import Elastic, Mirror, Rot90, Rotation, Scale, SpatialSettings
from medssl.augmentation.transform import Facts
from medssl.data.batch import View
from medssl.data.draw import Draw
from tests.augmentation.batches import make_batch, row_of

RIGID = SpatialSettings(
    rotation=Rotation(probability=0.7),
    scale=Scale(probability=0.7, range=(0.7, 1.4)),
    mirror=Mirror(probability=0.5, axes=("z", "y", "x")),
    rot90=Rot90(probability=0.7),
    shift=0.15,
)
EVERYTHING = RIGID.model_copy(update={"elastic": Elastic(probability=0.8, strength=(0.5, 1.0))})
STILL = SpatialSettings()
CASES = [((14, 20, 20), (24, 32, 32), (1.0, 1.0, 1.0)), ((14, 20, 20), (24, 32, 32), (2.5, 0.7, 0.7))]
CASES += [((20, 20), (32, 32), (1.0, 0.8, 0.8)), ((20, 17), (32, 32), (1.0, 0.8, 1.1))]


def view_of(batch, settings, patch, seed=0) -> View:
    spatial = Spatial({"MR": settings}, patch)
    drawn = spatial.draw(Facts.of(batch, batch.modality, patch), Draw(seed, batch.sample_index))
    placed = spatial.apply(batch, drawn)
    return View(
        image=placed.image,
        inside=placed.inside,
        to_source_mm=placed.to_source_mm,
        displacement_mm=placed.displacement_mm,
        label=placed.label,
        parameters={"spatial": drawn},
    )


def three(size) -> tuple[int, ...]:
    return (1,) * (3 - len(size)) + tuple(size)


def points_in(patch, samples, count=200, margin=0.0) -> torch.Tensor:
    u = torch.rand((samples, count, 3), generator=torch.Generator().manual_seed(1))
    last = torch.tensor(three(patch)) - 1.0
    low = torch.minimum(torch.full((3,), margin), last / 2)
    return low + u * (last - 2 * low)


def coordinate_batch(read, spacing, samples=6):
    """Three channels that hold each voxel's own position in mm."""
    batch = make_batch(read, samples=samples, channels=3, spacing=spacing)
    axes = [torch.arange(edge) * step for edge, step in zip(three(read), spacing, strict=True)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")).reshape(1, 3, *read)
    batch.image = (grid + batch.origin_mm.reshape(-1, 3, *[1] * len(read))).contiguous()
    return batch


@pytest.mark.parametrize(("patch", "read", "spacing"), CASES)
def test_source_positions_are_what_an_image_of_positions_shows(patch, read, spacing):
    batch = coordinate_batch(read, spacing)
    view = view_of(batch, EVERYTHING, patch)
    error = (source_positions_mm(view) - view.image).abs() / batch.spacing_mm.reshape(-1, 3, *[1] * len(patch))
    # The outermost voxel of the read stands for the half voxel beyond its centre.
    assert error.amax(dim=1, keepdim=True)[view.inside].max() < 0.51


@pytest.mark.parametrize(("patch", "read", "spacing"), CASES)
@pytest.mark.parametrize("settings", [EVERYTHING, RIGID, STILL], ids=["everything", "rigid", "still"])
def test_a_round_trip_through_the_volume_returns_to_the_voxel(patch, read, spacing, settings):
    batch = make_batch(read, samples=8, spacing=spacing, labels=False)
    view = view_of(batch, settings, patch)
    points = points_in(patch, 8)
    back, within = to_view_voxels(view, to_source_mm(view, points))
    assert within.all()
    assert (back - points).abs().max() < (0.05 if settings is EVERYTHING else 1e-3)


def test_the_strongest_deformations_are_inverted():
    patch = (20, 20, 20)
    batch = make_batch(patch, samples=2, labels=False)
    strongest = SpatialSettings(elastic=Elastic(probability=1, strength=(0.8, 0.8)))
    spatial = Spatial({"MR": strongest}, patch)
    drawn = spatial.draw(Facts.of(batch, batch.modality, patch), Draw(0, batch.sample_index))
    # All control points on one side of a diagonal plane push away from it, or towards it.
    along = torch.arange(7) - 3.0
    side = torch.where(along[:, None, None] + along[:, None] + along >= 0, 1.0, -1.0)
    drawn["elastic_control"] = torch.stack([side, -side])[:, None].repeat(1, 3, 1, 1, 1)
    placed = spatial.apply(batch, drawn)
    view = View(placed.image, placed.inside, placed.to_source_mm, placed.displacement_mm)
    points = points_in(patch, 2, 500)
    back, _ = to_view_voxels(view, to_source_mm(view, points))
    assert (back - points).abs().max() < 0.1


@pytest.mark.parametrize(("patch", "read", "spacing"), CASES)
def test_a_blob_at_a_known_position_is_found_at_the_matched_voxels_of_both_views(patch, read, spacing):
    batch = make_batch(read, samples=8, spacing=spacing)
    batch.image.zero_()
    middle = torch.tensor(three(read)) // 2
    z, y, x = middle.tolist()
    # Two voxels off the middle, so that a mirrored match would be elsewhere.
    y, x = y + 2, x - 2
    target = batch.image if len(patch) == 3 else batch.image[:, :, None]
    axes = [torch.arange(edge) - at for edge, at in zip(three(read), (z, y, x), strict=True)]
    distance = axes[0][:, None, None] ** 2 + axes[1][:, None] ** 2 + axes[2] ** 2
    target.copy_(torch.exp(-distance / 4.5))
    position = (batch.origin_mm + torch.tensor([z, y, x]) * batch.spacing_mm)[:, None]
    views = [view_of(batch, EVERYTHING, patch, seed=seed) for seed in (1, 2)]
    voxels = []
    for view in views:
        voxel, within = to_view_voxels(view, position)
        assert within.all()
        assert (values_at(view.image, voxel, patch)[:, 0, 0] > 0.7).all()
        voxels.append(voxel)
    found, within = match(views[0], views[1], voxels[0])
    assert within.all() and (found - voxels[1]).abs().max() < 0.05
    assert (voxels[0] - voxels[1]).abs().amax(dim=(1, 2)).min() > 1e-3


@pytest.mark.parametrize(("patch", "read", "spacing"), CASES)
def test_matched_voxels_show_the_same_position(patch, read, spacing):
    batch = coordinate_batch(read, spacing)
    first, second = (view_of(batch, EVERYTHING, patch, seed=seed) for seed in (1, 2))
    points = points_in(patch, len(batch), margin=2.0)
    found, within = match(first, second, points)
    inner = ((found >= 1) & (found <= torch.tensor(three(patch)) - 2) | (torch.tensor(three(patch)) == 1)).all(dim=2)
    insides = [
        values_at(view.inside.float(), at, patch)[:, 0] > 0.999 for view, at in ((first, points), (second, found))
    ]
    chosen = within & inner & insides[0] & insides[1]
    assert chosen.float().mean() > 0.2
    difference = values_at(first.image, points, patch) - values_at(second.image, found, patch)
    error = difference.abs() / batch.spacing_mm[:, :, None]
    # Between voxels, positions are interpolated over half a voxel at the rim of the read at most.
    assert error.amax(dim=1)[chosen].max() < 0.5
    assert error.amax(dim=1)[chosen].median() < 0.01


def test_positions_outside_a_view_are_not_within():
    batch = make_batch((12, 12, 12), samples=1)
    view = view_of(batch, STILL, (12, 12, 12))
    corners = torch.tensor(list(itertools.product((-0.6, -0.4, 11.4, 11.6), repeat=3)))[None]
    _, within = to_view_voxels(view, to_source_mm(view, corners))
    assert torch.equal(within[0], ((corners[0] > -0.5) & (corners[0] < 11.5)).all(dim=1))


def test_the_overlap_of_shifted_crops_is_the_box_they_share():
    batch = make_batch((12, 12, 12), samples=1)
    spatial = Spatial({"MR": STILL}, (8, 8, 8))
    drawn = spatial.draw(Facts.of(batch, batch.modality, (8, 8, 8)), Draw(0, [0]))
    views = []
    for shift in ((-1, -2, 0), (1, 2, 0)):
        placed = spatial.apply(batch, {**drawn, "shift": torch.tensor([shift])})
        views.append(View(placed.image, placed.inside, placed.to_source_mm))
    mask = overlap_mask(*views)
    assert mask.shape == (1, 1, 8, 8, 8)
    assert mask[0, 0, 2:, 4:].all() and mask.sum() == 6 * 4 * 8
    assert overlap_fraction(*views).tolist() == [pytest.approx(6 * 4 * 8 / 512)]
    carried, within = carry(views[1].image, views[1], views[0])
    assert torch.equal(within, mask)
    assert torch.allclose(carried[mask], views[0].image[mask], atol=1e-5)


def test_what_is_padding_in_either_view_is_no_overlap():
    whole = view_of(make_batch((8, 8, 8), samples=1), STILL, (8, 8, 8))
    padded = view_of(make_batch((8, 8, 8), samples=1, valid=[[0, 8], [0, 5], [0, 8]]), STILL, (8, 8, 8))
    assert padded.inside.float().mean() == 5 / 8
    assert torch.equal(overlap_mask(whole, padded), padded.inside)
    assert torch.equal(overlap_mask(padded, whole), padded.inside)


def test_points_of_a_sample_do_not_depend_on_batch_mates():
    patch, read, spacing = CASES[1]
    batch = make_batch(read, samples=4, spacing=spacing)
    points = points_in(patch, 4)
    together = [view_of(batch, EVERYTHING, patch, seed=seed) for seed in (1, 2)]
    expected, mask = match(*together, points)[0], overlap_mask(*together)
    for row in range(4):
        alone = [view_of(row_of(batch, row), EVERYTHING, patch, seed=seed) for seed in (1, 2)]
        assert torch.equal(match(*alone, points[row : row + 1])[0][0], expected[row])
        assert torch.equal(overlap_mask(*alone)[0], mask[row])


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_values_of_a_coarse_map_are_read_at_the_centre_of_what_they_stand_for(stride):
    """A map of each cell's centre, in voxels of the view, gives back the point itself."""
    size = (16, 8, 24)
    centres = [torch.arange(edge // stride) * stride + (stride - 1) / 2 for edge in size]
    maps = torch.stack(torch.meshgrid(*centres, indexing="ij"))[None].requires_grad_()
    points = points_in(size, 1, margin=(stride - 1) / 2)
    found = values_at(maps, points, size)
    assert torch.allclose(found.mT, points, atol=1e-4)
    found.sum().backward()
    assert maps.grad.sum().item() == pytest.approx(3 * points.shape[1], rel=1e-4)


def test_values_are_read_in_float32_from_a_half_precision_map():
    maps = torch.arange(16.0).reshape(1, 1, 4, 4).bfloat16()
    found = values_at(maps, torch.tensor([[[0.0, 1.3, 2.6]]]), (4, 4))
    assert found.dtype == torch.float32 and found.item() == pytest.approx(4 * 1.3 + 2.6, abs=1e-4)


def test_box_overlaps_are_true_volumes_and_sum_to_one_over_tiles():
    tiles = torch.tensor(list(itertools.product((0.0, 30.0), (0.0, 20.0), (0.0, 10.0))))[None]
    tile = torch.tensor([30.0, 20.0, 10.0])
    crops = torch.tensor([[[15.0, 10.0, 0.0], [0.0, 0.0, 0.0], [45.0, 0.0, 0.0], [100.0, 0.0, 0.0]]])
    parts = box_overlap(crops, tile, tiles, tile)
    assert parts.shape == (1, 4, 8)
    assert parts.sum(dim=2)[0].tolist() == pytest.approx([1, 1, 0.5, 0])
    # Half in Z and half in Y of four tiles: z offsets count, unlike in labels made of areas in the plane.
    assert parts[0, 0].tolist() == pytest.approx([0.25, 0, 0.25, 0, 0.25, 0, 0.25, 0])
    assert parts[0, 1].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]


def test_box_overlaps_equal_counted_voxels():
    generator = torch.Generator().manual_seed(0)
    origins = torch.randint(0, 10, (2, 5, 3), generator=generator).float()
    bases = torch.randint(0, 10, (2, 4, 3), generator=generator).float()
    sizes, base_sizes = torch.tensor([4.0, 6.0, 5.0]), torch.tensor([7.0, 5.0, 6.0])
    parts = box_overlap(origins, sizes, bases, base_sizes)
    for sample, crop, base in itertools.product(range(2), range(5), range(4)):
        masks = torch.zeros(2, 20, 20, 20, dtype=torch.bool)
        for mask, low, size in ((masks[0], origins[sample, crop], sizes), (masks[1], bases[sample, base], base_sizes)):
            (z, y, x), (depth, height, width) = low.int().tolist(), size.int().tolist()
            mask[z : z + depth, y : y + height, x : x + width] = True
        counted = (masks[0] & masks[1]).sum() / masks[0].sum()
        assert parts[sample, crop, base].item() == pytest.approx(counted.item(), abs=1e-6)
