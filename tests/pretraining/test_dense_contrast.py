"""DenseCL."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.augmentation.policy import AugmentationSettings, Policy, policy_for
from medssl.data.batch import Views
from medssl.data.draw import Draw
from medssl.errors import UsageError
from medssl.losses.key_contrast import queue_contrast
from medssl.networks.build import build_network, freeze_decoder
from medssl.pretraining.dense_contrast import DenseCL, DenseCLSettings, most_similar
from medssl.pretraining.heads import ProjectorSettings
from medssl.pretraining.local_contrast import LocalHeadSettings
from medssl.pretraining.places import places_of
from medssl.training.method import Step
from tests.pretraining.crops import coordinates, crops, moving_policy

STEP = Step(0, 10)
SIZES = [(16, 16, 16), (32, 32)]


def method_of(
    size: tuple[int, ...] = (32, 32), *, policy: Policy | None = None, channels: int = 1, **settings: Any
) -> DenseCL:
    network = build_network("resenc-xs", dimensions=len(size), in_channels=channels, seed=0)
    freeze_decoder(network)
    policy = policy or policy_for("contrastive", {"MR"}, size, AugmentationSettings())
    torch.manual_seed(0)
    small = {
        "places": 10,
        "queue": 7,
        "dense_queue": 7,
        "projector": ProjectorSettings(hidden=16, width=8, norm="none"),
        "dense_projector": LocalHeadSettings(hidden=16, width=8),
    }
    return DenseCL(network, policy, DenseCLSettings(**{**small, **settings}))


def views_of(method: DenseCL, **given: Any) -> Views:
    batch = crops(method.policy, **given)
    return method.views(batch, Draw(0, batch.sample_index))


def showing_coordinates(size: tuple[int, ...], spacing: tuple[float, ...], **settings: Any) -> tuple[DenseCL, Views]:
    """Return a method whose features at every position are the position in mm, and moved views of two crops."""
    policy = moving_policy(size)
    method = method_of(size, policy=policy, channels=3, places=200, **settings)
    origin = torch.tensor([[0.0, 0, 0], [40.0, 0, 0]])
    image = coordinates(tuple(policy.read_size), spacing, origin)
    views = views_of(method, count=2, spacing_mm=spacing, origin_mm=origin.tolist(), image=image)
    method.dense_projector = nn.Identity()  # type: ignore[assignment]
    method.teacher.parts["dense_projector"] = nn.Identity()
    return method, views


def images(method: DenseCL, views: Views) -> dict[int, list[Tensor]]:
    """Return each view's image as the features of every stage."""
    return {number: [view.image] * (method.dense_stage + 1) for number, view in enumerate(views)}


@pytest.mark.parametrize(("size", "spacing"), [((16, 16, 16), (3.0, 1.0, 0.8)), ((32, 32), (4.0, 1.0, 0.7))])
def test_the_key_of_a_place_shows_the_same_millimetre_of_the_volume(
    size: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    method, views = showing_coordinates(size, spacing)
    places, maps = places_of(*views), images(method, views)
    whole = torch.tensor((1,) * (3 - len(size)) + size)
    free = places.usable
    for voxels in (places.first, places.second):
        # Interpolation does not continue an image beyond the middle of its outermost voxels, nor into padding.
        free = free & ((voxels >= 2 * (whole > 1)) & (voxels <= whole - 1 - 2 * (whole > 1))).all(dim=2)
    assert free.sum() > 30
    for asked, answered in ((0, 1), (1, 0)):
        query, key = method._dense_pairs(views, places, maps, maps, asked, answered)
        assert (query - key)[free].abs().max() < 0.1
        assert (query - places.mm)[free].abs().max() < 0.1


def test_with_features_the_key_is_the_position_that_resembles_the_place_most() -> None:
    method, views = showing_coordinates((32, 32), (4.0, 1.0, 1.0), correspondence="features")
    places, maps = places_of(*views), images(method, views)
    query, key = method._dense_pairs(views, places, maps, maps, 0, 1)
    rows = views[1].image.flatten(2).mT
    for crop in range(2):
        inside = views[1].inside[crop].flatten()
        for place in range(0, 200, 40):
            cosines = [F.cosine_similarity(query[crop, place], row, dim=0).item() for row in rows[crop][inside]]
            assert F.cosine_similarity(query[crop, place], key[crop, place], dim=0).item() == pytest.approx(
                max(cosines)
            )


def test_positions_that_show_padding_are_never_matched() -> None:
    features = torch.tensor([[[1.0, 0.0]]])
    other = torch.tensor([[[1.0, 0.9], [0.0, 0.5]]]).reshape(1, 2, 1, 2)
    inside = torch.ones(1, 1, 4, 8, dtype=torch.bool)
    assert most_similar(features, other, inside).tolist() == [[[1.0, 0.0]]]
    inside[..., :4] = False
    assert torch.allclose(most_similar(features, other, inside), torch.tensor([[[0.9, 0.5]]]))
    # However little the rest resembles it.
    unlike = torch.tensor([[[1.0, -0.9], [0.0, 0.5]]]).reshape(1, 2, 1, 2)
    assert torch.allclose(most_similar(features, unlike, inside), torch.tensor([[[-0.9, 0.5]]]))


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.double(), b.double(), dim=0).item()


def test_the_dense_term_equals_its_definition() -> None:
    method = method_of(dense_part=0.5, temperature=0.3)
    views = views_of(method, volumes=[4, 4, 6])
    views[1].inside[0, :, :12] = False
    generator = torch.Generator().manual_seed(0)
    entries = F.normalize(torch.randn((5, 8), generator=generator), dim=1)
    method.dense_queue.offer(entries, torch.tensor([4, 5, 5, 6, 7]))
    method.dense_queue.take_in()
    places = places_of(*views)
    assert 0 < places.usable.sum() < places.usable.numel()
    with torch.no_grad():
        loss = method.losses(views, STEP)["dense"]
        maps = [[encoder.stages(view.image) for view in views] for encoder in (method.encoder, method.teacher.encoder)]
        student, teacher = (dict(enumerate(stages)) for stages in maps)
        total, count = 0.0, 0
        for asked, answered in ((0, 1), (1, 0)):
            query, key = method._dense_pairs(views, places, student, teacher, asked, answered)
            grid = method.teacher["dense_projector"](teacher[answered][-1].flatten(2).mT)
            means = [(volume, row.mean(dim=0)) for volume, row in zip([4, 4, 6], grid, strict=True)]
            queue = [*zip([4, 5, 5, 6, 7], entries, strict=True), *means]
            for crop, volume in enumerate([4, 4, 6]):
                for place in range(10):
                    if not places.usable[crop, place]:
                        continue
                    q = query[crop, place]
                    positive = cosine(q, key[crop, place]) / 0.3
                    others = sum(math.exp(cosine(q, row) / 0.3) for other, row in queue if other != volume)
                    total += math.log(1 + others / math.exp(positive))
                    count += 1
    assert loss.item() == pytest.approx(0.5 * total / count, rel=1e-4)


def test_both_terms_have_their_part() -> None:
    views = views_of(method_of())
    terms = {part: method_of(dense_part=part).losses(views, STEP) for part in (0.0, 0.25, 1.0)}
    assert terms[0.0]["dense"] == 0 and terms[1.0]["global"] == 0
    assert terms[0.25]["dense"].item() == pytest.approx(0.25 * terms[1.0]["dense"].item(), rel=1e-5)
    assert terms[0.25]["global"].item() == pytest.approx(0.75 * terms[0.0]["global"].item(), rel=1e-5)


def test_places_without_a_counterpart_have_no_gradient() -> None:
    method = method_of()
    views = views_of(method)
    views[1].inside[:, :, :16] = False
    places = places_of(*views)
    assert places.usable.any() and not places.usable.all()
    query = torch.randn(3, 10, 8, requires_grad=True)
    key, mean_key = torch.randn(3, 10, 8), torch.randn(3, 8)
    method._dense_contrast(query, key, places, mean_key, torch.arange(3)).backward()
    assert query.grad is not None
    assert torch.equal(query.grad.abs().sum(dim=2) > 0, places.usable)


def test_queries_that_do_not_count_leave_the_mean_over_the_others() -> None:
    query, key, queue = torch.randn(5, 4), torch.randn(5, 4), torch.randn(6, 4)
    counted = torch.tensor([True, False, True, True, False])
    found = queue_contrast(query, key, queue, 0.2, counted=counted)
    assert found.item() == pytest.approx(queue_contrast(query[counted], key[counted], queue, 0.2).item(), rel=1e-6)
    assert queue_contrast(query, key, queue, 0.2, counted=torch.zeros(5, dtype=torch.bool)) == 0
    with pytest.raises(ValueError, match="'counted' needs shape"):
        queue_contrast(query, key, queue, 0.2, counted=torch.ones(5))


def test_the_dense_queue_holds_one_mean_key_for_each_crop_and_goes_round() -> None:
    method = method_of(symmetric=False)
    views = views_of(method, volumes=[3, 8, 3])
    with torch.no_grad():
        grid = method.teacher["dense_projector"](method.teacher.encoder.stages(views[1].image)[-1].flatten(2).mT)
        expected = F.normalize(grid.mean(dim=1), dim=1)
        method.losses(views, STEP)
        assert method.dense_queue.count == 0
        method.after_step(STEP)
        torch.testing.assert_close(method.dense_queue.rows[:3], expected, atol=1e-5, rtol=1e-4)
        assert method.dense_queue.volumes[:4].tolist() == [3, 8, 3, -1]
        for _ in range(2):
            method.losses(views, STEP)
            method.after_step(STEP)
    assert method.dense_queue.full and method.queue.full and method.dense_queue.position == 2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("correspondence", ["geometric", "features"])
def test_gradients_reach_every_trained_weight_and_no_teacher(size: tuple[int, ...], correspondence: str) -> None:
    method = method_of(size, correspondence=correspondence, symmetric=False)
    views = views_of(method)
    optimiser = torch.optim.SGD([weight for weight in method.parameters() if weight.requires_grad], lr=0.01)
    # nnU-Net starts the last norm of each residual block at zero: only the second step reaches what lies before it.
    for _ in range(2):
        optimiser.zero_grad()
        torch.stack(list(method.losses(views, STEP).values())).sum().backward()
        optimiser.step()
        method.after_step(STEP)
    for name, weight in method.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None and weight.grad.abs().sum() > 0, name
        else:
            assert weight.grad is None, name
    assert "dense_projector" in method.teacher.parts


def test_a_restored_method_goes_on_as_the_first_would() -> None:
    method, views = method_of(), views_of(method_of())
    method.losses(views, STEP)
    method.after_step(STEP)
    other = method_of()
    other.load_state_dict(method.state_dict())
    for first, second in zip(method.losses(views, STEP).values(), other.losses(views, STEP).values(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("size", SIZES)
def test_health_shows_a_wrong_correspondence(size: tuple[int, ...]) -> None:
    method, views = showing_coordinates(size, (1.0, 1.0, 1.0))
    centre = views[0].image.flatten(2).mean(dim=2)[:, :, None, None].reshape(2, 3, *(1,) * len(size))

    def shown(image: Tensor) -> list[Tensor]:
        return [torch.cat([image - centre, torch.full_like(image[:, :1], 8.0)], dim=1)] * (method.dense_stage + 1)

    method.encoder.stages = shown  # type: ignore[method-assign]
    method._teachers_stages = lambda view: shown(view.image)  # type: ignore[method-assign]
    # What is looked at is the dense part; the global one needs the network's own widths.
    method.projector, method.teacher.parts["projector"] = nn.Linear(16, 8), nn.Linear(16, 8)  # type: ignore[assignment]
    method.features = lambda view: torch.randn(2, 16)  # type: ignore[method-assign]
    method.key = lambda view: torch.randn(2, 8)  # type: ignore[method-assign]
    with torch.no_grad():
        right = method.health(views)
        # As if one view had been mirrored behind the map's back.
        views[1].image = views[1].image.flip(tuple(range(2, 2 + len(size))))
        wrong = method.health(views)
    assert right["place_error"] < 0.3 and right["match_error"] < 0.3 and right["agreement"] > 0.9
    assert wrong["place_error"] > 0.9 and wrong["match_error"] > 0.9 and wrong["agreement"] < 0
    assert right["usable"] == wrong["usable"]


def test_health_shows_a_collapse_of_the_dense_part() -> None:
    method = method_of()
    views = views_of(method)
    with torch.no_grad():
        alive = method.health(views)
        for weight in method.dense_projector.parameters():
            weight.zero_()
        method.dense_projector[-1].bias.fill_(1.0)
        dead = method.health(views)
    assert alive["dense_std"] > 0.01 and dead["dense_std"] == 0
    assert dead["projection_std"] == alive["projection_std"]


@pytest.mark.parametrize("size", SIZES)
def test_pictures_show_what_resembles_the_middle(size: tuple[int, ...]) -> None:
    method = method_of(size)
    with torch.no_grad():
        pictures = method.pictures(views_of(method))
    assert all(image.shape == (3, 1, *size) for image in pictures.values()) and len(pictures) == 3


def test_a_stage_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="stages 0 to 3"):
        method_of(dense_stage=7)
