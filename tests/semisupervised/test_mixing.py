"""Views and predictions are mixed alike, and a voxel counts where all that it shows counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medssl.augmentation.mixing import cutmix, draw_cutmix, draw_mixup, mixup
from medssl.data.draw import Draw
from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.dropping import draw_kept, dropped
from medssl.semisupervised.mixing import blend, cut_mixed, exchange, joined, mixed_up, pool_draw, soft_labels
from tests.semisupervised.helpers import paired

SIZE = (8, 6)


def view_of(count: int = 4) -> SemiView:
    generator = torch.Generator().manual_seed(0)
    return SemiView(
        image=torch.randn((count, 1, *SIZE), generator=generator),
        inside=torch.rand((count, 1, *SIZE), generator=generator) < 0.8,
        to_source_mm=torch.zeros(count, 3, 4),
    )


def predictions(count: int = 4) -> Tensor:
    return torch.randn((count, 3, *SIZE), generator=torch.Generator().manual_seed(1)).softmax(dim=1)


def test_predictions_are_blended_as_images_are() -> None:
    drawn = draw_mixup(Draw(0, range(4)))
    mixed = mixed_up(view_of(), drawn)
    torch.testing.assert_close(blend(predictions(), mixed), mixup(predictions(), drawn).image)
    torch.testing.assert_close(blend(view_of().image, mixed), mixed.image)


def test_a_blended_voxel_counts_where_both_images_count() -> None:
    view, drawn = view_of(), draw_mixup(Draw(0, range(4)))
    for row, other in enumerate(drawn["partner"].tolist()):
        assert torch.equal(mixed_up(view, drawn).inside[row], view.inside[row] & view.inside[other])
        nothing = mixed_up(view, drawn, where=torch.zeros_like(view.inside)).inside
        assert not nothing.any()


def test_predictions_are_exchanged_as_images_are() -> None:
    drawn = draw_cutmix(Draw(0, range(4)), SIZE)
    mixed = cut_mixed(view_of(), drawn)
    assert torch.equal(exchange(predictions(), mixed), cutmix(predictions(), drawn).image)
    assert torch.equal(exchange(view_of().image, mixed), mixed.image)


def test_where_a_voxel_counts_goes_with_its_box() -> None:
    view, drawn = view_of(), draw_cutmix(Draw(0, range(4)), SIZE)
    expected = cutmix(view.inside.float(), drawn).image > 0
    assert torch.equal(cut_mixed(view, drawn).inside, expected)
    assert not torch.equal(expected, view.inside)


def test_samples_of_a_pool_have_numbers_of_their_own() -> None:
    batch = paired()
    assert batch.unlabelled is not None
    parts = [batch.labelled, batch.unlabelled, batch.unlabelled]
    drawn = pool_draw(Draw(0, [0, 1]), parts, "name").uniform(0, 1)
    assert len(set(drawn.tolist())) == 6
    other_name = pool_draw(Draw(0, [0, 1]), parts, "other").uniform(0, 1)
    other_seed = pool_draw(Draw(1, [0, 1]), parts, "name").uniform(0, 1)
    assert len({*drawn.tolist(), *other_name.tolist(), *other_seed.tolist()}) == 18


def test_joined_views_keep_their_order() -> None:
    first, second = view_of(2), view_of(3)
    both = joined([first, second])
    assert torch.equal(both.image, torch.cat([first.image, second.image]))
    assert torch.equal(both.inside, torch.cat([first.inside, second.inside]))


def test_soft_labels_are_certain_of_classes_and_empty_where_a_label_is_none() -> None:
    view = view_of(1)
    view.label = torch.zeros((1, *SIZE), dtype=torch.int64)
    view.label[0, 0, :3] = torch.tensor([1, 2, 255])
    found = soft_labels(view, 3)[0, :, 0, :4]
    assert found.T.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]]
    with pytest.raises(ValueError, match="no labels"):
        soft_labels(view_of(1), 3)


def test_dropped_channels_are_zero_and_the_mean_stays() -> None:
    kept = draw_kept(Draw(0, range(2000)), 6, 0.25)
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    assert kept.mean().item() == pytest.approx(1, abs=0.02)
    features = [torch.ones(2000, 2, 3), torch.ones(2000, 4, 1, 1)]
    low, high = dropped(features, kept)
    assert torch.equal(low[:, :, 1], kept[:, :2]) and torch.equal(high[:, :, 0, 0], kept[:, 2:])


def test_unusable_drops_are_named() -> None:
    with pytest.raises(ValueError, match=r"probability in \[0, 1\), got 1"):
        draw_kept(Draw(0, [0]), 4, 1.0)
    with pytest.raises(ValueError, match="3 channels, 4 factors"):
        dropped([torch.ones(1, 3, 2)], draw_kept(Draw(0, [0]), 4, 0.5))
