"""Mixing: partners, boxes, and labels that follow the image voxel by voxel."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from medssl.augmentation.boxes import (
    box_mask_of,
    class_map_of,
    draw_boxes,
    draw_boxes_of_sides,
    draw_cover,
    volume_of,
)
from medssl.augmentation.mixing import (
    beta,
    cutmix,
    draw_cutmix,
    draw_mixup,
    draw_volume_fusion,
    mixup,
    partners,
    volume_fusion,
    with_partner,
)
from medssl.augmentation.pasting import alien_patch, copy_paste, draw_alien_patch, draw_copy_paste
from medssl.data.draw import Draw

SIZES = [(10, 12, 11), (12, 11), (1, 12, 14)]


def images(size, samples=4, channels=2, seed=0) -> torch.Tensor:
    return torch.randn((samples, channels, *size), generator=torch.Generator().manual_seed(seed))


def labels_of(image) -> torch.Tensor:
    """Return a class that can be read off the image: its first channel in steps."""
    return (image[:, 0] * 4).floor().long() + 20


def slow_mask(boxes, size) -> np.ndarray:
    mask = np.zeros((len(boxes), *size), dtype=bool)
    for row, box in itertools.product(range(boxes.shape[0]), range(boxes.shape[1])):
        for position in np.ndindex(*size):
            inside = [start <= p < stop for p, (start, stop) in zip(position, boxes[row, box].tolist(), strict=True)]
            mask[row][position] |= all(inside)
    return mask


@pytest.mark.parametrize("size", SIZES)
def test_boxes_lie_inside_and_have_the_volume_that_was_asked(size):
    boxes = draw_boxes(Draw(0, range(200)), size, (0.1, 0.5), count=2)
    assert boxes.shape == (200, 2, len(size), 2)
    assert (boxes[..., 0] >= 0).all() and (boxes[..., 1] <= torch.tensor(size)).all()
    part = volume_of(boxes).double() / np.prod(size)
    assert part.min() > 0.06 and part.max() < 0.58
    assert part.mean().item() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("size", [(5, 6, 4), (6, 5)])
def test_box_masks_equal_a_loop_over_voxels(size):
    boxes = draw_boxes(Draw(1, range(3)), size, (0.0, 0.5), count=(1, 4))
    mask = box_mask_of(boxes, size)
    assert mask.shape == (3, 1, *size) and mask.dtype == torch.bool
    assert np.array_equal(mask[:, 0].numpy(), slow_mask(boxes, size))


def test_the_whole_range_of_sides_positions_and_counts_is_drawn():
    boxes = draw_boxes_of_sides(Draw(0, range(3000)), (6, 9), (1, 2), (3, 4), count=(1, 3))
    real = boxes[volume_of(boxes) > 0]
    sides = real[..., 1] - real[..., 0]
    assert {tuple(side.tolist()) for side in sides} == set(itertools.product((1, 2, 3), (2, 3, 4)))
    assert set(real[sides[:, 0] == 1][:, 0, 0].tolist()) == set(range(6))
    counts = (volume_of(boxes) > 0).sum(dim=1)
    assert torch.bincount(counts).tolist()[1:] == pytest.approx([1000, 1000, 1000], abs=90)


def test_boxes_keep_a_margin_where_there_is_room():
    boxes = draw_boxes_of_sides(Draw(0, range(500)), (1, 8, 20), (1, 5, 4), (1, 5, 4), margin=3)
    assert boxes[..., 0].amin(dim=(0, 1)).tolist() == [0, 1, 3]
    assert boxes[..., 1].amax(dim=(0, 1)).tolist() == [1, 7, 17]


def test_later_boxes_overwrite_earlier_ones():
    boxes = torch.tensor([[[[0, 4], [0, 4]], [[2, 6], [2, 6]], [[0, 0], [0, 0]]]])
    painted = class_map_of(boxes, torch.tensor([[3, 1, 7]]), (6, 6))[0]
    assert painted[3, 3] == 1 and painted[1, 1] == 3 and painted[0, 5] == 0 and painted.max() == 3


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("at_most", [False, True])
def test_covers_end_at_the_box_that_reaches_the_fraction(size, at_most):
    draw, fraction = Draw(3, range(40)), (0.3, 0.6)
    asked = draw.child("fraction").uniform(*fraction).double() * np.prod(size)
    covered = draw_cover(draw, size, fraction, (0.1, 0.4), at_most=at_most).flatten(1).sum(dim=1)
    largest = np.prod([max(1, int(0.4 * edge)) for edge in size])
    assert ((covered <= asked) if at_most else (covered >= asked)).all()
    assert ((asked - covered).abs() <= largest).all()


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_covers_reach_nothing_and_everything(fraction):
    assert draw_cover(Draw(0, range(3)), (9, 10, 8), (fraction, fraction), (0.2, 0.3)).float().mean() == fraction


def test_a_partner_is_another_sample_of_the_group_and_each_is_used_once():
    groups = ("MR", "CT", "MR", "MR", "CT", "PT")
    met = [set() for _ in groups]
    for seed in range(40):
        partner = partners(Draw(seed, range(6)), groups).tolist()
        assert sorted(partner) == list(range(6))
        for row, other in enumerate(partner):
            met[row].add(other)
    assert met == [{2, 3}, {4}, {0, 3}, {0, 2}, {1}, {5}]


def test_partners_repeat_and_are_drawn_as_often_as_asked():
    assert torch.equal(partners(Draw(2, range(50))), partners(Draw(2, range(50))))
    own = partners(Draw(0, range(2000)), probability=0.3) == torch.arange(2000)
    assert own.float().mean().item() == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize(("a", "b"), [(0.4, 0.4), (1.0, 1.0), (2.0, 5.0)])
def test_beta_has_its_distribution(a, b):
    numbers = beta(Draw(0, range(4000)), a, b)
    assert stats.kstest(numbers.numpy(), stats.beta(a, b).cdf).pvalue > 0.01


@pytest.mark.parametrize("size", SIZES)
def test_mixup_blends_image_and_soft_label_with_a_weight_per_sample(size):
    image, soft = images(size), torch.eye(5)[torch.tensor([0, 3, 2, 4])]
    drawn = draw_mixup(Draw(0, range(4)))
    mixed = mixup(image, drawn, soft)
    assert len(mixed.weight.unique()) == 4
    for row, (other, weight) in enumerate(zip(drawn["partner"].tolist(), mixed.weight.tolist(), strict=True)):
        slow = weight * image[row].double() + (1 - weight) * image[other].double()
        assert torch.allclose(mixed.image[row].double(), slow, atol=1e-6)
        assert torch.allclose(mixed.label[row], weight * soft[row] + (1 - weight) * soft[other])


def test_hard_labels_of_mixup_come_as_a_pair():
    image = images((6, 7, 5))
    drawn = draw_mixup(Draw(0, range(4)))
    for label in (torch.tensor([4, 0, 2, 1]), labels_of(image)):
        mixed = mixup(image, drawn, label)
        assert torch.equal(mixed.label, label) and torch.equal(mixed.partner_label, label[drawn["partner"]])


def test_mixup_can_keep_each_sample_closest_to_itself():
    drawn = draw_mixup(Draw(0, range(200)), own_majority=True)
    assert (drawn["weight"] >= 0.5).all()


@pytest.mark.parametrize("size", SIZES)
def test_cutmix_takes_image_and_label_from_the_partner_inside_the_box_only(size):
    image = images(size)
    drawn = draw_cutmix(Draw(5, range(4)), size)
    mixed = cutmix(image, drawn, labels_of(image))
    inside = torch.from_numpy(slow_mask(drawn["boxes"], size))
    slow = torch.where(inside[:, None], image[drawn["partner"]], image)
    assert torch.equal(mixed.image, slow) and torch.equal(mixed.label, labels_of(slow))
    assert torch.equal(mixed.weight, (1 - inside.flatten(1).double().mean(dim=1)).float())
    assert mixed.partner_label is None


def test_cutmix_moves_dense_probabilities_and_weighs_labels_of_whole_images():
    image, dense = images((8, 9, 7)), images((8, 9, 7), channels=3, seed=1)
    drawn = draw_cutmix(Draw(5, range(4)), (8, 9, 7))
    inside = box_mask_of(drawn["boxes"], (8, 9, 7))
    assert torch.equal(cutmix(image, drawn, dense).label, torch.where(inside, dense[drawn["partner"]], dense))
    soft = torch.eye(4)
    weight = drawn["weight"][:, None]
    expected = weight * soft + (1 - weight) * soft[drawn["partner"]]
    assert torch.allclose(cutmix(image, drawn, soft).label, expected, atol=1e-6)
    pair = cutmix(image, drawn, torch.arange(4))
    assert torch.equal(pair.label, torch.arange(4)) and torch.equal(pair.partner_label, drawn["partner"])


def test_cutmix_has_the_area_that_beta_asks_for():
    drawn = draw_cutmix(Draw(0, range(2000)), (40, 40, 40), alpha=1.0)
    assert stats.kstest(drawn["weight"].numpy(), stats.uniform().cdf).statistic < 0.06
    assert len(drawn["boxes"][:, 0, :, 0].unique(dim=0)) > 500


@pytest.mark.parametrize("size", [(20, 24, 22), (30, 26), (1, 24, 30)])
def test_volume_fusion_equals_its_definition(size):
    foreground, background = images(size, 3), images(size, 3, seed=1)
    drawn = draw_volume_fusion(Draw(0, range(3)), size, classes=5)
    fused, classes = volume_fusion(foreground, background, drawn)
    slow = np.zeros((3, *size), dtype=int)
    for row, box in itertools.product(range(3), range(drawn["boxes"].shape[1])):
        index = tuple(slice(start, stop) for start, stop in drawn["boxes"][row, box].tolist())
        slow[row][index] = drawn["box_class"][row, box]
    assert classes.dtype == torch.int64 and np.array_equal(classes.numpy(), slow)
    alpha = torch.from_numpy(np.linspace(0, 1, 5)[slow])[:, None]
    expected = alpha * foreground.double() + (1 - alpha) * background.double()
    assert torch.allclose(fused.double(), expected, atol=1e-6)
    for value, whole in ((0, background), (4, foreground)):
        where = (classes == value)[:, None].expand_as(fused)
        assert where.any() and torch.equal(fused[where], whole[where])


def test_volume_fusion_draws_boxes_as_published():
    boxes = draw_volume_fusion(Draw(0, range(400)), (64, 96, 48))["boxes"]
    counts = (volume_of(boxes) > 0).sum(dim=1)
    assert counts.min() == 10 and counts.max() == 39
    sides = (boxes[..., 1] - boxes[..., 0])[volume_of(boxes) > 0]
    assert sides.amin(dim=0).tolist() == [8, 8, 8] and sides.amax(dim=0).tolist() == [40, 60, 30]


@pytest.mark.parametrize("size", SIZES)
def test_alien_patches_come_from_the_same_place_and_stay_below_the_fraction(size):
    image = images(size)
    drawn = draw_alien_patch(Draw(0, range(4)), size, (0.1, 0.3), (0.1, 0.4))
    result, mask = alien_patch(image, drawn)
    assert torch.equal(result, torch.where(mask, image[drawn["partner"]], image))
    part = mask.flatten(1).float().mean(dim=1)
    assert (part <= 0.3).all() and part.max() > 0.02


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("classes", [None, (21, 23)])
def test_pasted_labels_follow_the_image_voxel_by_voxel(size, classes):
    image = images(size)
    label = labels_of(image)
    label[image[:, 0] < 0] = 0
    drawn = draw_copy_paste(Draw(0, range(4)))
    result, changed, mask = copy_paste(image, label, drawn, classes)
    donor = label[drawn["partner"]]
    pasted = donor > 0 if classes is None else (donor == 21) | (donor == 23)
    assert torch.equal(mask[:, 0], pasted) and pasted.any() and not pasted.all()
    assert torch.equal(result, torch.where(pasted[:, None], image[drawn["partner"]], image))
    assert torch.equal(changed, torch.where(pasted, donor, label))


def test_a_soft_edge_blends_only_around_the_edge_and_never_the_label():
    image = images((16, 18, 20), samples=2)
    label = torch.zeros(2, 16, 18, 20, dtype=torch.int64)
    label[:, 3:13, 3:15, 4:16] = 1
    drawn = draw_copy_paste(Draw(0, range(2)))
    result, changed, mask = copy_paste(image, label, drawn, soft_edge=0.7)
    sharp, sharp_label, _ = copy_paste(image, label, drawn)
    assert torch.equal(changed, sharp_label)
    assert torch.equal(result[..., 0, 0, 0], image[..., 0, 0, 0])
    centre = (..., 8, 9, 10)
    assert torch.allclose(result[centre], sharp[centre], atol=1e-5)
    edge = (..., 3, 9, 10)
    low, high = torch.minimum(image, image.flip(0))[edge], torch.maximum(image, image.flip(0))[edge]
    assert ((result[edge] > low) & (result[edge] < high)).all()


def test_a_sample_without_a_partner_keeps_every_bit():
    size, groups = (9, 10, 8), ("a", "b", "b")
    image = images(size, 3)
    label = labels_of(image)
    draw = Draw(0, range(3))
    mixed = mixup(image, draw_mixup(draw, groups=groups), label)
    cut = cutmix(image, draw_cutmix(draw, size, groups=groups), label)
    alien, mask = alien_patch(image, draw_alien_patch(draw, size, (0.3, 0.3), (0.2, 0.4), groups))
    pasted, follow, where = copy_paste(image, label, draw_copy_paste(draw, groups))
    for result in (mixed.image, cut.image, alien, pasted):
        assert torch.equal(result[0], image[0]) and not torch.equal(result[1], image[1])
    assert mixed.weight[0] == cut.weight[0] == 1 and not mask[0].any() and not where[0].any()
    assert torch.equal(follow[0], label[0]) and mask[1].any()


def test_adding_partners_leaves_the_parameters_of_the_caller_alone():
    weight = torch.tensor([0.25, 0.5])
    drawn = {"weight": weight}
    found = with_partner(Draw(0, [0, 1]), drawn, ["MR", "CT"], 1.0)
    assert found["partner"].tolist() == [0, 1] and found["weight"].tolist() == [1, 1]
    assert set(drawn) == {"weight"} and drawn["weight"] is weight and weight.tolist() == [0.25, 0.5]


def test_draws_repeat_and_a_sample_has_its_parameters_in_any_batch():
    size = (20, 24, 22)
    for draw_of in (
        lambda draw: draw_mixup(draw),
        lambda draw: draw_cutmix(draw, size),
        lambda draw: draw_volume_fusion(draw, size),
        lambda draw: draw_alien_patch(draw, size),
    ):
        four, two = draw_of(Draw(7, [3, 4, 5, 6])), draw_of(Draw(7, [5, 6]))
        for name in set(four) - {"partner"}:
            assert torch.equal(four[name][2:], two[name])
            assert name == "classes" or not torch.equal(two[name][0], two[name][1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_and_dtypes_are_kept(dtype):
    size = (8, 9, 7)
    image, label = images(size).to(dtype), labels_of(images(size))
    before, label_before = image.clone(), label.clone()
    draw = Draw(0, range(4))
    results = [
        mixup(image, draw_mixup(draw), label).image,
        cutmix(image, draw_cutmix(draw, size), label).image,
        volume_fusion(image, image.flip(0), draw_volume_fusion(draw, size))[0],
        alien_patch(image, draw_alien_patch(draw, size))[0],
        copy_paste(image, label, draw_copy_paste(draw))[0],
        copy_paste(image, label, draw_copy_paste(draw), soft_edge=1.0)[0],
    ]
    assert all(result.dtype == dtype and torch.isfinite(result).all() for result in results)
    assert torch.equal(image, before) and torch.equal(label, label_before)


@pytest.mark.slow
def test_mixup_equals_monai():
    monai = pytest.importorskip("monai.transforms")
    image = images((8, 8, 8))
    drawn = draw_mixup(Draw(0, range(4)))
    peer = monai.MixUp(batch_size=4, alpha=1.0)
    peer._params = (drawn["weight"], drawn["partner"], [])
    assert torch.allclose(peer(image, randomize=False), mixup(image, drawn).image, atol=1e-6)


def test_unusable_batches_are_named():
    image, label = images((8, 9, 7)), labels_of(images((8, 9, 7)))
    draw = Draw(0, range(4))
    with pytest.raises(ValueError, match="at least 2 samples, the batch has 1: raise the batch size"):
        draw_mixup(Draw(0, [0]))
    with pytest.raises(ValueError, match="one group per sample"):
        partners(draw, ("MR",))
    with pytest.raises(ValueError, match=r"draw is for 4 samples, got an image of \(3"):
        mixup(image[:3], draw_mixup(draw))
    with pytest.raises(ValueError, match="4 images and 3 labels"):
        mixup(image, draw_mixup(draw), label[:3])
    with pytest.raises(ValueError, match="do not fit an image"):
        cutmix(image, draw_cutmix(draw, (20, 20, 20)))
    with pytest.raises(ValueError, match="has its spatial shape"):
        cutmix(image, draw_cutmix(draw, (8, 9, 7)), label[:, :4])
    with pytest.raises(ValueError, match="one shape and dtype"):
        volume_fusion(image, image[:, :1], draw_volume_fusion(draw, (8, 9, 7)))
    with pytest.raises(ValueError, match="draw is for 4 samples"):
        volume_fusion(image[:2], image[:2], draw_volume_fusion(draw, (8, 9, 7)))
    with pytest.raises(ValueError, match="2 to 256 classes, got 1"):
        draw_volume_fusion(draw, (8, 9, 7), classes=1)
    with pytest.raises(ValueError, match="draw is for images of"):
        alien_patch(image, draw_alien_patch(draw, (4, 4, 4)))
    with pytest.raises(ValueError, match="needs a class for each voxel"):
        copy_paste(image, label[:, :4], draw_copy_paste(draw))
    with pytest.raises(ValueError, match="at least one class"):
        copy_paste(image, label, draw_copy_paste(draw), classes=())
    with pytest.raises(ValueError, match="not negative"):
        copy_paste(image, label, draw_copy_paste(draw), soft_edge=-1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda draw: draw_boxes(draw, (8, 8), (0.5, 0.2)), "ordered range in"),
        (lambda draw: draw_boxes(draw, (8, 8), (0.1, 0.2), count=0), "positive number of boxes"),
        (lambda draw: draw_boxes(draw, (8, 0), (0.1, 0.2)), "no place for boxes"),
        (lambda draw: draw_boxes_of_sides(draw, (8, 8), (2, 2), (9, 4)), "do not fit into an image"),
        (lambda draw: draw_boxes_of_sides(draw, (8, 8), (5, 2), (4, 4)), "make no boxes"),
        (lambda draw: draw_cover(draw, (8, 8), (0.1, 1.2), (0.1, 0.2)), "fraction is an ordered range"),
        (lambda draw: draw_cover(draw, (90, 90), (0.1, 0.2), (0.0, 0.01)), "random_mask"),
        (lambda draw: beta(draw, 0.0, 1.0), "positive parameters"),
        (lambda draw: partners(draw, probability=1.5), "probability lies in"),
    ],
)
def test_draws_that_make_no_sense_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(Draw(0, range(2)))
