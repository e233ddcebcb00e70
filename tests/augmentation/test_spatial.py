"""Anatomy is moved rigidly in mm, labels and coordinates go with it, and who drew nothing keeps every bit."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from medssl.augmentation.geometry import PLANES, quarter_turn_matrices, rotation_matrices
from medssl.augmentation.spatial import Spatial
from medssl.augmentation.spatial_settings import Elastic, Mirror, Rot90, Rotation, Scale, SpatialSettings
from medssl.augmentation.transform import Facts
from medssl.data.draw import Draw
from tests.augmentation.batches import BACKGROUND, make_batch, row_of

EVERYTHING = SpatialSettings(
    rotation=Rotation(probability=0.7, degrees=30, in_plane_degrees=30),
    scale=Scale(probability=0.7, range=(0.7, 1.4)),
    elastic=Elastic(probability=0.5, strength=(0.5, 1.0)),
    mirror=Mirror(probability=0.5, axes=("z", "y", "x")),
    shift=0.1,
)
RIGID = EVERYTHING.model_copy(update={"elastic": Elastic()})
PATCHES = [(16, 20, 18), (20, 18)]
READS = {3: (24, 28, 26), 2: (28, 26)}


def place(batch, settings, patch, seed=0, parameters=None, **options):
    spatial = Spatial(dict.fromkeys(set(batch.modality), settings), patch, **options)
    facts = Facts(batch.modality, batch.spacing_mm.double(), patch, batch.image.shape[1])
    drawn = spatial.draw(facts, Draw(seed, batch.sample_index))
    drawn.update(parameters or {})
    return spatial.apply(batch, drawn), drawn


def neutral(samples: int) -> dict[str, torch.Tensor]:
    return {
        "angle_degrees": torch.zeros(samples, 3),
        "scale": torch.ones(samples, 3),
        "mirror": torch.zeros(samples, 3, dtype=torch.bool),
        "shift": torch.zeros(samples, 3, dtype=torch.int64),
        "elastic_strength": torch.zeros(samples),
    }


@pytest.mark.parametrize("patch", PATCHES)
def test_at_zero_strength_the_view_is_the_crop_bit_for_bit(patch):
    batch = make_batch(READS[len(patch)])
    placed, _ = place(batch, SpatialSettings(), patch)
    centre = tuple(slice((r - p) // 2, (r - p) // 2 + p) for r, p in zip(READS[len(patch)], patch, strict=True))
    assert torch.equal(placed.image, batch.image[(..., *centre)])
    assert torch.equal(placed.label, batch.label[(..., *centre)])
    assert placed.inside.all() and placed.displacement_mm is None


def test_only_samples_that_drew_something_are_interpolated():
    batch = make_batch(samples=8)
    settings = SpatialSettings(rotation=Rotation(probability=0.5))
    placed, drawn = place(batch, settings, (16, 20, 18))
    still = (drawn["angle_degrees"] == 0).all(dim=1)
    assert 0 < still.sum() < 8
    crops = batch.image[:, :, 4:20, 4:24, 4:22]
    assert torch.equal(placed.image[still], crops[still])
    assert not any(torch.equal(placed.image[row], crops[row]) for row in (~still).nonzero()[:, 0])


def test_the_batch_that_is_given_is_not_changed():
    batch = make_batch(samples=6)
    image, label = batch.image.clone(), batch.label.clone()
    place(batch, EVERYTHING, (16, 20, 18))
    assert torch.equal(batch.image, image) and torch.equal(batch.label, label)


@pytest.mark.parametrize("patch", PATCHES)
def test_a_sample_looks_the_same_alone_and_in_a_batch(patch):
    batch = make_batch(READS[len(patch)], samples=6)
    together, _ = place(batch, EVERYTHING, patch)
    for row in range(6):
        alone, _ = place(row_of(batch, row), EVERYTHING, patch)
        for name in ("image", "inside", "label", "to_source_mm", "displacement_mm"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[row]), name


def test_the_same_draw_gives_the_same_view_and_samples_differ():
    batch = make_batch(samples=4)
    first, drawn = place(batch, EVERYTHING, (16, 20, 18), seed=2)
    again, _ = place(batch, EVERYTHING, (16, 20, 18), seed=2)
    other, _ = place(batch, EVERYTHING, (16, 20, 18), seed=3)
    assert torch.equal(first.image, again.image) and not torch.equal(first.image, other.image)
    assert len(drawn["angle_degrees"].unique(dim=0)) > 1


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 0.7, 0.9)])
def test_the_map_to_mm_tells_where_every_voxel_came_from(patch, spacing):
    """An image of its own coordinates in mm shows, after the transform, what the map says: within 0.5 voxel."""
    batch = make_batch(READS[len(patch)], samples=8, channels=3, spacing=spacing)
    size = (1,) * (3 - len(patch)) + READS[len(patch)]
    axes = [torch.arange(edge) * step for edge, step in zip(size, spacing, strict=True)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")).reshape(3, *READS[len(patch)])
    batch.image = (grid + batch.origin_mm[0].reshape(3, *[1] * len(patch))).expand_as(batch.image).clone()
    placed, drawn = place(batch, EVERYTHING, patch)
    assert (drawn["elastic_strength"] > 0).any() and (drawn["elastic_strength"] == 0).any()
    expected = mapped(placed, patch)
    error = (placed.image - expected).abs() / batch.spacing_mm[0].reshape(1, 3, *[1] * len(patch))
    # At the rim of what was read the nearest voxel stands for half a voxel beyond it.
    assert error[placed.inside.expand_as(error)].max() < 0.5 + 1e-3
    last = torch.stack([axis[-1] for axis in axes]).reshape(1, 3, *[1] * len(patch))
    position = expected - batch.origin_mm[0].reshape(1, 3, *[1] * len(patch))
    interpolated = ((position >= 0) & (position <= last)).all(dim=1, keepdim=True).expand_as(error)
    assert interpolated.float().mean() > 0.7
    assert error[interpolated].max() < 1e-3


def mapped(placed, patch):
    size = (1,) * (3 - len(patch)) + patch
    index = torch.stack(torch.meshgrid(*(torch.arange(edge).float() for edge in size), indexing="ij"))
    homogeneous = torch.cat([index, torch.ones(1, *size)]).flatten(1)
    source = (placed.to_source_mm @ homogeneous).reshape(-1, 3, *patch)
    return source if placed.displacement_mm is None else source + placed.displacement_mm


ZOOM = SpatialSettings(scale=Scale(probability=1), mirror=Mirror(probability=0.5, axes=("z", "y", "x")), shift=0.1)


@pytest.mark.parametrize(
    ("settings", "spacing"),
    [(RIGID, (1.0, 1.0, 1.0)), (RIGID, (5.0, 1.0, 1.2)), (ZOOM, (1.0, 1.0, 1.0)), (ZOOM, (2.0, 1.0, 1.0))],
    ids=["turned", "turned within slices", "zoomed", "zoomed, anisotropic"],
)
def test_linear_resampling_equals_scipy(settings, spacing):
    batch = make_batch(samples=6, channels=2, spacing=spacing)
    placed, _ = place(batch, settings, (16, 20, 18), seed=5)
    step = batch.spacing_mm[0].reshape(1, 3, 1, 1, 1)
    source = ((mapped(placed, (16, 20, 18)) - batch.origin_mm[0].reshape(1, 3, 1, 1, 1)) / step).numpy()
    for row in range(6):
        seen = placed.inside[row, 0].numpy()
        for channel in range(2):
            slow = map_coordinates(batch.image[row, channel].numpy(), source[row], order=1, mode="nearest")
            assert np.abs(placed.image[row, channel].numpy() - slow)[seen].max() < 1e-4
        nearest = map_coordinates(batch.label[row].numpy(), source[row], order=0, mode="nearest")
        assert (placed.label[row].numpy() == nearest)[seen].mean() > 0.999


@pytest.mark.parametrize("settings", [RIGID, ZOOM, EVERYTHING], ids=["rigid", "zoom", "everything"])
def test_inside_is_where_the_nearest_voxel_lies_in_the_volume(settings):
    valid = [[3, 20], [6, 28], [0, 15]]
    batch = make_batch(samples=12, valid=valid)
    placed, _ = place(batch, settings, (16, 20, 18), seed=2)
    source = mapped(placed, (16, 20, 18)) - batch.origin_mm[0].reshape(1, 3, 1, 1, 1)
    limits = torch.tensor(valid).reshape(1, 3, 2, 1, 1, 1) - 0.5
    beyond = torch.minimum(source - limits[:, :, 0], limits[:, :, 1] - source).amin(dim=1, keepdim=True)
    clear = beyond.abs() > 1e-3
    assert torch.equal(placed.inside[clear], (beyond > 0)[clear])
    assert 0.2 < placed.inside.float().mean() < 0.9


@pytest.mark.parametrize("label_mode", ["nearest", "linear"])
def test_landmarks_stay_with_their_label(label_mode):
    batch = make_batch((40, 40, 40), samples=6, spacing=(2.0, 1.0, 1.0))
    batch.label.zero_()
    corners = list(itertools.product((14, 26), (12, 28), (12, 28)))[:6]
    for value, (z, y, x) in enumerate(corners, start=1):
        batch.label[:, z - 1 : z + 2, y - 2 : y + 3, x - 2 : x + 3] = value
    placed, _ = place(batch, EVERYTHING, (40, 40, 40), label_mode=label_mode, classes=7)
    found = 0
    for row, (value, corner) in itertools.product(range(6), enumerate(corners, start=1)):
        voxels = (placed.label[row] == value).nonzero()
        if len(voxels) < 5 or (voxels == 0).any() or (voxels == 39).any():
            continue
        found += 1
        where = mapped(placed, (40, 40, 40))[row][:, placed.label[row] == value].mean(dim=1)
        truth = torch.tensor(corner) * batch.spacing_mm[row] + batch.origin_mm[row]
        assert ((where - truth) / batch.spacing_mm[row]).abs().max() < 0.5
    assert found > 15


def test_rotation_keeps_distances_in_mm_where_voxels_are_anisotropic():
    """Two points 12 mm apart along X in the image stay 12 mm apart when turned towards Y, whose voxels are larger."""
    batch = make_batch((9, 21, 41), samples=1, spacing=(2.0, 2.0, 1.0))
    parameters = {**neutral(1), "angle_degrees": torch.tensor([[90.0, 0.0, 0.0]])}
    batch.label.zero_()
    batch.label[0, 4, 10, 14], batch.label[0, 4, 10, 26] = 1, 2
    spatial = Spatial({"MR": SpatialSettings()}, (9, 21, 41))
    placed = spatial.apply(batch, parameters)
    a, b = ((placed.label[0] == value).nonzero().float().mean(dim=0) for value in (1, 2))
    assert ((a - b) * batch.spacing_mm[0]).norm().item() == pytest.approx(12, abs=1.0)
    assert (a - b)[2].abs() < 0.6, "turned out of X"


def test_rotation_matrices_turn_by_the_angle_and_compose():
    turned = rotation_matrices(torch.tensor([[90.0, 0.0, 0.0], [0.0, 30.0, 0.0], [10.0, 20.0, 30.0]]))
    assert torch.allclose(turned @ turned.transpose(1, 2), torch.eye(3, dtype=torch.float64).expand(3, 3, 3))
    assert torch.allclose(turned[0] @ torch.tensor([0.0, 1.0, 0.0]).double(), torch.tensor([0.0, 0.0, 1.0]).double())
    assert turned[1].diagonal().sum().item() == pytest.approx(1 + 2 * math.cos(math.radians(30)))
    parts = rotation_matrices(torch.diag(torch.tensor([10.0, 20.0, 30.0])))
    assert torch.allclose(turned[2], parts[0] @ parts[1] @ parts[2])


def test_a_scale_above_one_shows_more_anatomy():
    batch = make_batch((33, 33, 33), samples=1)
    batch.label.zero_()
    batch.label[0, 8:25, 8:25, 8:25] = 1
    spatial = Spatial({"MR": SpatialSettings()}, (33, 33, 33))
    sizes = {}
    for scale in (0.7, 1.0, 1.4):
        placed = spatial.apply(batch, {**neutral(1), "scale": torch.full((1, 3), scale)})
        sizes[scale] = placed.label.sum().item() ** (1 / 3)
    assert sizes[1.4] == pytest.approx(sizes[1.0] / 1.4, rel=0.1)
    assert sizes[0.7] == pytest.approx(sizes[1.0] / 0.7, rel=0.1)


def test_a_mirrored_view_is_the_flipped_crop_and_its_map_says_so():
    batch = make_batch((16, 20, 18), samples=1)
    spatial = Spatial({"MR": SpatialSettings()}, (16, 20, 18))
    plain = spatial.apply(batch, neutral(1))
    mirrored = spatial.apply(batch, {**neutral(1), "mirror": torch.tensor([[True, False, True]])})
    assert torch.equal(mirrored.image, plain.image.flip(2, 4)) and torch.equal(mirrored.label, plain.label.flip(1, 3))
    first = mirrored.to_source_mm[0] @ torch.tensor([0.0, 0, 0, 1])
    assert torch.allclose(first, batch.origin_mm[0] + torch.tensor([15.0, 0, 17]))


def turning(**others) -> SpatialSettings:
    return SpatialSettings(rot90=Rot90(probability=1), **others)


@pytest.mark.parametrize(("patch", "read"), [((16, 16, 16), (20, 22, 24)), ((16, 16), (22, 24))])
def test_a_quarter_turned_view_is_the_turned_crop_bit_for_bit(patch, read):
    valid = [*([[0, 1]] if len(patch) == 2 else [[2, 17]]), [0, 15], [5, 24]]
    batch = make_batch(read, samples=12, valid=valid)
    settings = turning(mirror=Mirror(probability=0.5, axes=("z", "y", "x")), shift=0.1)
    placed, drawn = place(batch, settings, patch)
    plain, _ = place(batch, settings, patch, parameters={"quarter_turns": torch.zeros(12, 3, dtype=torch.int64)})
    turns = drawn["quarter_turns"]
    assert ((turns != 0).sum(dim=1) == 1).all() and (turns.amax(dim=1) <= 3).all()
    assert len(turns.unique(dim=0)) >= 3
    for row in range(12):
        axis = int(turns[row].argmax())
        count, plane = int(turns[row, axis]), [a + len(patch) - 3 for a in PLANES[axis]]
        after = [a + 1 for a in plane]
        assert torch.equal(placed.image[row], plain.image[row].rot90(count, after))
        assert torch.equal(placed.label[row], plain.label[row].rot90(count, plane))
        assert torch.equal(placed.inside[row], plain.inside[row].rot90(count, after))
    assert not plain.inside.all()


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 0.7, 0.7)])
@pytest.mark.parametrize("moved", [False, True], ids=["alone", "with everything"])
def test_the_map_to_mm_knows_of_quarter_turns(spacing, moved):
    batch = make_batch((26, 26, 26), samples=8, channels=3, spacing=spacing)
    axes = [torch.arange(26) * step for step in spacing]
    batch.image = torch.stack(torch.meshgrid(*axes, indexing="ij")).expand_as(batch.image).clone()
    others = {name: getattr(EVERYTHING, name) for name in ("rotation", "scale", "elastic", "mirror", "shift")}
    placed, drawn = place(batch, turning(**others if moved else {}), (18, 18, 18))
    assert (drawn["quarter_turns"] != 0).any(dim=1).all()
    position = mapped(placed, (18, 18, 18)) - batch.origin_mm[0].reshape(1, 3, 1, 1, 1)
    error = (placed.image - position).abs() / batch.spacing_mm[0].reshape(1, 3, 1, 1, 1)
    last = torch.stack([axis[-1] for axis in axes]).reshape(1, 3, 1, 1, 1)
    interpolated = ((position >= 0) & (position <= last)).all(dim=1, keepdim=True).expand_as(error)
    assert interpolated.float().mean() > 0.7 and error[interpolated].max() < 1e-3


@pytest.mark.parametrize(
    ("patch", "spacing", "axes"),
    [
        ((16, 16, 16), (1.0, 1.0, 1.0), {0, 1, 2}),
        ((16, 16, 16), (1.0, 0.995, 1.0), {0, 1, 2}),
        ((16, 16, 16), (3.0, 1.0, 1.0), {0}),
        ((16, 16, 16), (1.0, 0.97, 1.0), {1}),
        ((12, 16, 16), (1.0, 1.0, 1.0), {0}),
        ((12, 14, 16), (1.0, 1.0, 1.0), set()),
        ((16, 16), (1.0, 1.0, 1.0), {0}),
        ((16, 14), (1.0, 1.0, 1.0), set()),
        ((1, 1), (1.0, 1.0, 1.0), set()),
    ],
)
def test_quarter_turns_stay_in_planes_of_equal_edges_and_voxel_sizes(patch, spacing, axes):
    batch = make_batch(patch, samples=40, spacing=spacing, labels=False)
    _, drawn = place(batch, turning(), patch)
    assert set(drawn["quarter_turns"].nonzero()[:, 1].tolist()) == axes


def test_quarter_turns_have_the_asked_probability_axes_and_counts():
    batch = make_batch((4, 4, 4), samples=1000, labels=False)
    settings = SpatialSettings(rot90=Rot90(probability=0.3, axes=("z", "x")))
    _, drawn = place(batch, settings, (4, 4, 4))
    turns = drawn["quarter_turns"]
    assert (turns != 0).any(dim=1).float().mean().item() == pytest.approx(0.3, abs=0.04)
    assert set(turns.nonzero()[:, 1].tolist()) == {0, 2}
    assert turns[turns != 0].bincount().tolist() == pytest.approx([0, 100, 100, 100], abs=25)


def test_quarter_turn_matrices_are_exact_and_right_handed():
    counts = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [2, 0, 0], [3, 1, 2]])
    matrices = quarter_turn_matrices(counts)
    assert torch.equal(matrices.abs().sum(dim=2), torch.ones(5, 3).double())
    assert torch.equal(torch.linalg.det(matrices), torch.ones(5).double())


def test_quarter_turns_do_not_change_what_else_is_drawn():
    batch = make_batch((16, 16, 16), samples=4)
    _, without = place(batch, RIGID, (16, 16, 16))
    _, drawn = place(batch, RIGID.model_copy(update={"rot90": Rot90(probability=1)}), (16, 16, 16))
    assert all(torch.equal(drawn[name], without[name]) for name in without)


def test_outside_the_volume_is_background_not_inside_and_without_label():
    batch = make_batch(samples=4, valid=[[0, 24], [6, 28], [0, 26]])
    batch.image[:, :, :, :6] = BACKGROUND
    batch.label[:, :, :6] = 0
    placed, _ = place(batch, EVERYTHING, (24, 28, 26), seed=1)
    assert 0.3 < placed.inside.float().mean() < 0.95
    assert (placed.image[~placed.inside.expand_as(placed.image)] == BACKGROUND).all()
    assert (placed.label[~placed.inside[:, 0]] == 0).all()


def test_what_is_inside_of_a_crop_follows_valid_shift_and_mirror():
    batch = make_batch((16, 20, 18), samples=1, valid=[[0, 16], [5, 20], [0, 18]])
    spatial = Spatial({"MR": SpatialSettings()}, (16, 20, 18))
    parameters = {**neutral(1), "mirror": torch.tensor([[False, True, False]]), "shift": torch.tensor([[0, 2, 0]])}
    placed = spatial.apply(batch, parameters)
    rows = placed.inside[0, 0, 0, :, 0]
    # Voxel y of the view shows voxel 2 + (19 - y) of the crop, which is inside for 5 to 19.
    assert rows.tolist() == [5 <= 21 - y < 20 for y in range(20)]
    assert (placed.image[0, 0, :, :2] == BACKGROUND).all(), "a shift beyond what was read shows background"


@pytest.mark.parametrize(("patch", "spacing"), [((8, 32, 32), (1.0, 1.0, 1.0)), ((16, 16, 16), (5.0, 1.0, 1.0))])
def test_anisotropic_samples_turn_and_zoom_within_their_slices(patch, spacing):
    batch = make_batch(patch, samples=8, spacing=spacing)
    placed, drawn = place(batch, EVERYTHING, patch)
    assert (drawn["angle_degrees"][:, 1:] == 0).all() and (drawn["angle_degrees"][:, 0] != 0).any()
    assert (drawn["scale"][:, 0] == 1).all() and (drawn["scale"][:, 1] != 1).any()
    assert (placed.displacement_mm[:, 0] == 0).all() and (placed.displacement_mm[:, 1:] != 0).any()


def test_elastic_deformation_never_folds():
    batch = make_batch((24, 24, 24), samples=8)
    strongest = SpatialSettings(
        rotation=Rotation(),
        scale=Scale(probability=1, range=(0.7, 0.7)),
        elastic=Elastic(probability=1, strength=(1, 1)),
    )
    spatial = Spatial({"MR": strongest}, (24, 24, 24))
    facts = Facts(batch.modality, batch.spacing_mm.double(), (24, 24, 24), 1)
    drawn = spatial.draw(facts, Draw(0, batch.sample_index))
    drawn["elastic_control"] = drawn["elastic_control"].sign()
    source = mapped(spatial.apply(batch, drawn), (24, 24, 24))
    gradients = torch.stack(torch.gradient(source, dim=(2, 3, 4)), dim=2)
    assert torch.linalg.det(gradients.movedim((1, 2), (-2, -1))).min() > 0


def test_shift_moves_whole_voxels_both_ways():
    batch = make_batch(samples=64, labels=False)
    _, drawn = place(batch, SpatialSettings(shift=0.2), (16, 20, 18))
    assert drawn["shift"].amin(dim=0).tolist() == [-3, -4, -3] and drawn["shift"].amax(dim=0).tolist() == [3, 4, 3]


def test_parameters_have_the_asked_probability_and_range():
    samples = 1000
    facts = Facts(("MR",) * samples, torch.ones(samples, 3, dtype=torch.float64), (16, 16, 16), 1)
    settings = SpatialSettings(
        rotation=Rotation(probability=0.2, degrees=30),
        scale=Scale(probability=0.2),
        mirror=Mirror(probability=0.5, axes=("y",)),
    )
    drawn = Spatial({"MR": settings}, (16, 16, 16)).draw(facts, Draw(0, range(samples)))
    turned = (drawn["angle_degrees"] != 0).any(dim=1)
    assert turned.float().mean().item() == pytest.approx(0.2, abs=0.04)
    assert 28 < drawn["angle_degrees"].abs().max() <= 30
    scaled = drawn["scale"][drawn["scale"] != 1]
    assert 0.7 <= scaled.min() < 0.72 and 1.38 < scaled.max() <= 1.4
    assert drawn["mirror"].float().mean(dim=0).tolist() == pytest.approx([0, 0.5, 0], abs=0.05)


def test_one_slice_and_one_voxel_pass():
    for size in ((1, 16, 16), (1, 1, 1)):
        placed, _ = place(make_batch(size, samples=4), EVERYTHING, size)
        assert placed.image.shape == (4, 1, *size) and torch.isfinite(placed.image).all()
