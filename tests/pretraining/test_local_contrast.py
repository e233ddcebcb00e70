"""Contrast of places within a crop, and the first blocks of the decoder."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from medssl.augmentation.policy import AugmentationSettings, Policy, policy_for
from medssl.data.batch import View, Views
from medssl.data.draw import Draw
from medssl.errors import UsageError
from medssl.networks.build import build_network, freeze_unused_outputs
from medssl.networks.decoder import DecoderBlocks
from medssl.networks.encoder import Encoder
from medssl.pretraining.local_contrast import LocalContrast, LocalContrastSettings, LocalHeadSettings
from medssl.pretraining.places import places_of
from medssl.training.method import Step
from medssl.transfer.overlay import overlay
from tests.pretraining.crops import STILL, coordinates, crops, moving_policy

STEP = Step(0, 10)
SIZES = [(16, 16, 16), (32, 32)]


def method_of(
    size: tuple[int, ...] = (32, 32), *, policy: Policy | None = None, channels: int = 1, **settings: Any
) -> LocalContrast:
    network = build_network("resenc-xs", dimensions=len(size), in_channels=channels, seed=0)
    freeze_unused_outputs(network)
    policy = policy or policy_for("contrastive", {"MR"}, size, AugmentationSettings())
    torch.manual_seed(0)
    settings = {"places": 12, "region": 1, "projector": LocalHeadSettings(hidden=16, width=8), **settings}
    return LocalContrast(network, policy, LocalContrastSettings(**settings))


def views_of(method: LocalContrast, **given: Any) -> Views:
    batch = crops(method.policy, **given)
    return method.views(batch, Draw(0, batch.sample_index))


def by_position(method: LocalContrast, centre_mm: Tensor) -> None:
    """Let embeddings be what a view's image shows: the position in mm, on a sphere, so that each has its direction."""

    def shown(view: View) -> Tensor:
        offset = view.image - centre_mm.reshape(1, 3, *(1,) * (view.image.ndim - 2))
        return torch.cat([offset, torch.full_like(view.image[:, :1], 8.0)], dim=1)

    method.map_of = shown  # type: ignore[method-assign]
    method.projector = nn.Identity()  # type: ignore[assignment]


@pytest.mark.parametrize("size", SIZES)
def test_the_first_blocks_give_what_the_whole_network_computes_there(size: tuple[int, ...]) -> None:
    network = build_network("resenc-xs", dimensions=len(size), seed=0)
    encoder, image, seen = Encoder(network), torch.randn(2, 1, *size), {}
    for number, block in enumerate(network.decoder.stages):  # type: ignore[union-attr, arg-type]
        block.register_forward_hook(lambda _, __, output, number=number: seen.update({number: output}))
    with torch.no_grad():
        network(image)
        whole = dict(seen)
        for count in (1, 2, 3):
            blocks = DecoderBlocks(encoder, count)
            features = blocks(encoder.stages(image))
            assert torch.equal(features, whole[count - 1])
            assert features.shape[1] == blocks.width
            assert tuple(features.shape[2:]) == tuple(e // s for e, s in zip(size, blocks.stride, strict=True))


@pytest.mark.parametrize("count", [0, 4])
def test_blocks_that_the_decoder_does_not_have_are_refused(count: int) -> None:
    with pytest.raises(UsageError, match=f"has 3 blocks; {count} were asked for"):
        DecoderBlocks(Encoder(build_network("resenc-xs", dimensions=2, seed=0)), count)


@pytest.mark.parametrize(("name", "count"), [("resenc-m", 3), ("resenc-s", 2), ("resenc-xs", 1)])
def test_by_default_blocks_up_to_a_quarter_of_the_resolution_learn(name: str, count: int) -> None:
    network = build_network(name, dimensions=2, seed=0)
    policy = policy_for("contrastive", {"MR"}, (64, 64), AugmentationSettings())
    method = LocalContrast(network, policy, LocalContrastSettings())
    assert method.decoder.count == count and method.decoder.stride == (4, 4)


@pytest.mark.parametrize("size", SIZES)
def test_gradients_reach_the_encoder_and_the_first_blocks_and_nothing_later(size: tuple[int, ...]) -> None:
    method = method_of(size, decoder_stages=2)
    before = {name: value.clone() for name, value in method.network.state_dict().items()}
    views = views_of(method)
    optimiser = torch.optim.SGD(method.parameters(), lr=0.01)
    # nnU-Net starts the last norm of each residual block at zero: only the second step reaches what lies before it.
    for _ in range(2):
        optimiser.zero_grad()
        method.losses(views, STEP)["contrast"].backward()
        optimiser.step()
    late = ("decoder.stages.2", "decoder.transpconvs.2", "decoder.seg_layers")
    for name, weight in method.named_parameters():
        if name.removeprefix("network.").startswith(late):
            assert not weight.requires_grad and weight.grad is None, name
        else:
            assert weight.grad is not None and weight.grad.abs().sum() > 0, name
    for name, value in method.network.state_dict().items():
        assert torch.equal(value, before[name]) or not name.startswith(late), name


def test_a_frozen_encoder_stays_as_it_was_and_the_decoder_learns() -> None:
    method = method_of(freeze_encoder=True)
    views = views_of(method)
    method.losses(views, STEP)["contrast"].backward()
    for name, weight in method.named_parameters():
        learns = name.startswith(("network.decoder.stages.0", "network.decoder.transpconvs.0", "projector"))
        assert weight.requires_grad == learns and (weight.grad is not None) == learns, name


def test_trained_blocks_transfer_and_later_ones_are_what_they_started_as() -> None:
    method = method_of()
    start = {name: value.clone() for name, value in method.network.state_dict().items()}
    optimiser = torch.optim.SGD(method.parameters(), lr=0.01)
    method.losses(views_of(method), STEP)["contrast"].backward()
    optimiser.step()
    other = build_network("resenc-xs", dimensions=2, out_channels=3, seed=1)
    report = overlay(other, method.network.state_dict(), decoder=method.decoder_is_trained(method.settings))
    assert not report.missing and not report.mismatched
    found, trained = other.state_dict(), method.network.state_dict()
    first = [name for name in found if name.startswith(("decoder.stages.0", "decoder.transpconvs.0"))]
    late = [
        name for name in found if name.startswith(("decoder.stages.1", "decoder.stages.2", "decoder.transpconvs.1"))
    ]
    assert all(torch.equal(found[name], trained[name]) for name in first)
    assert any(not torch.equal(found[name], start[name]) for name in first)
    assert late and all(torch.equal(found[name], start[name]) for name in late)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("geometry", ["same", "different"])
def test_views_show_one_cut_in_two_intensities_or_two_cuts(size: tuple[int, ...], geometry: str) -> None:
    method = method_of(size, geometry=geometry)
    first, second = views_of(method)
    same = torch.equal(first.to_source_mm, second.to_source_mm)
    assert same == (geometry == "same")
    assert not torch.equal(first.image, second.image)
    places = places_of(first, second)
    if same:
        torch.testing.assert_close(places.first, places.second, atol=1e-3, rtol=0)
    else:
        assert (places.first - places.second)[places.usable].abs().max() > 0.5
    edges = torch.tensor(size)
    inside = places.first[..., 3 - len(size) :]
    assert ((inside >= -0.5) & (inside <= edges - 0.5)).all() and len(inside.unique(dim=1)[0]) == 12


@pytest.mark.parametrize(("size", "spacing"), [((16, 16, 16), (3.0, 1.0, 0.8)), ((32, 32), (4.0, 1.0, 0.7))])
def test_places_of_moved_views_show_the_same_millimetres(size: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    policy = moving_policy(size)
    method = method_of(size, policy=policy, geometry="different", places=200)
    origin = torch.tensor([[0.0, 0, 0], [30.0, 5, 2]])
    image = coordinates(tuple(policy.read_size), spacing, origin)
    views = views_of(method, count=2, spacing_mm=spacing, origin_mm=origin.tolist(), image=image)
    places = places_of(*views)
    assert places.usable.any(dim=1).all() and not places.usable.all()
    for view, voxels in zip(views, (places.first, places.second), strict=True):
        # One voxel from the border, where interpolation does not continue the image.
        size_3d = torch.tensor((1,) * (3 - len(size)) + size)
        free = ((voxels >= 0) & (voxels <= size_3d - 1)).all(dim=2) & places.usable
        shown = torch.nn.functional.grid_sample(
            view.image.double(), _grid(voxels, size), align_corners=False, mode="bilinear"
        )
        shown = shown.flatten(2).mT
        inside = free & _surely_inside(view, voxels, size)
        assert inside.sum() > 20
        assert (shown[inside] - places.mm[inside]).abs().max() < 0.05


def _grid(voxels: Tensor, size: tuple[int, ...]) -> Tensor:
    axes = [(2 * voxels[..., 3 - len(size) + axis].double() + 1) / edge - 1 for axis, edge in enumerate(size)]
    return torch.stack(axes[::-1], dim=-1).reshape(len(voxels), *(1,) * (len(size) - 1), -1, len(size))


def _surely_inside(view: View, voxels: Tensor, size: tuple[int, ...]) -> Tensor:
    seen = torch.nn.functional.grid_sample(view.inside.double(), _grid(voxels, size), align_corners=False)
    return seen.flatten(1) > 0.9999


@pytest.mark.parametrize("size", SIZES)
def test_the_loss_equals_its_definition(size: tuple[int, ...]) -> None:
    method = method_of(size, geometry="different", ignore_mm=6.0, temperature=0.2, region=3)
    views = views_of(method, spacing_mm=(2.0, 1.0, 0.5))
    views[1].inside[0, :, : size[0] // 2] = False
    places = places_of(*views)
    with torch.no_grad():
        embedded = [rows.double() for rows in method._embedded(views, places)]
        loss = method.losses(views, STEP)["contrast"]
    total, count = 0.0, 0
    for crop in range(3):
        usable = places.usable[crop].tolist()
        for own, other in (embedded, embedded[::-1]):
            for i in range(12):
                if not usable[i]:
                    continue
                count += 1
                cosine = [torch.cosine_similarity(own[crop, i], other[crop, j], dim=0).item() / 0.2 for j in range(12)]
                distance = [math.dist(places.mm[crop, i].tolist(), places.mm[crop, j].tolist()) for j in range(12)]
                far = [j for j in range(12) if j != i and usable[j] and distance[j] >= 6.0]
                total += math.log1p(sum(math.exp(cosine[j] - cosine[i]) for j in far))
    assert 10 < count < 72
    assert loss.item() == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize(("apart", "matters"), [((3.0, 0, 0), True), ((0, 3.0, 0), False), ((0, 0, 3.0), False)])
def test_what_is_near_is_measured_in_mm_and_not_in_voxels(apart: tuple[float, ...], matters: bool) -> None:
    policy = policy_for("contrastive", {"MR"}, (16, 16, 16), AugmentationSettings(overrides=STILL))
    method = method_of((16, 16, 16), policy=policy, places=3, ignore_mm=10.0)
    views = views_of(method, count=2, spacing_mm=(4.0, 1.0, 1.0))
    middle = torch.tensor([4.0, 8.0, 8.0])
    voxels = torch.stack([middle, middle + torch.tensor(apart), torch.tensor([15.0, 15.0, 15.0])])
    views[0].parameters["places"]["voxels"] = voxels.expand(2, 3, 3).clone()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((2, 3, 8), generator=generator)
    gradients = []
    for second_place in (rows[:, 1:2], torch.randn((2, 1, 8), generator=generator)):
        first = rows.clone().requires_grad_()
        second = torch.cat([rows[:, :1], second_place, rows[:, 2:]], dim=1)
        method._embedded = lambda *_, both=(first, second): list(both)  # type: ignore[method-assign]
        method.losses(views, STEP)["contrast"].backward()
        assert first.grad is not None
        gradients.append(first.grad[:, 0])
    # The first place feels what the second looks like only where the two are negatives of each other.
    assert torch.equal(*gradients) == (not matters)


@pytest.mark.parametrize(("region", "expected"), [(1, 16.0), (3, 48.0)])
def test_by_default_negatives_are_a_region_away_along_its_longest_edge(region: int, expected: float) -> None:
    policy = policy_for("contrastive", {"MR"}, (16, 16, 16), AugmentationSettings(overrides=STILL))
    method = method_of((16, 16, 16), policy=policy, region=region)
    views = views_of(method, spacing_mm=(4.0, 1.0, 0.5))
    assert method.ignore_mm(views[0]).tolist() == pytest.approx([expected] * 3)


def test_places_that_one_view_does_not_show_do_not_count() -> None:
    method = method_of(ignore_mm=4.0)
    views = views_of(method)
    views[1].inside[:, :, :16] = False
    places = places_of(*views)
    hidden = places.second[..., 1] < 15.5
    assert not places.usable[hidden].any() and places.usable[~hidden].all() and hidden.any()
    first, second = (rows.detach() for rows in method._embedded(views, places))
    losses = []
    for noise in (0.0, 5.0):
        spoilt = torch.where(hidden[..., None], second + noise * torch.randn(second.shape), second)
        method._embedded = lambda *_, spoilt=spoilt: [first, spoilt]  # type: ignore[method-assign]
        losses.append(method.losses(views, STEP)["contrast"].item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("size", SIZES)
def test_health_shows_a_wrong_correspondence(size: tuple[int, ...]) -> None:
    policy = moving_policy(size)
    method = method_of(size, policy=policy, channels=3, geometry="different", places=40, ignore_mm=3.0)
    image = coordinates(tuple(policy.read_size), (1.0, 1.0, 1.0), torch.zeros(3, 3))
    views = views_of(method, image=image, origin_mm=[[0.0] * 3] * 3)
    by_position(method, image[0].flatten(1).mean(dim=1))
    with torch.no_grad():
        right, loss = method.health(views), method.losses(views, STEP)["contrast"]
        # As if one view had been mirrored behind the map's back.
        views[1].image = views[1].image.flip(tuple(range(2, 2 + len(size))))
        wrong, loss_of_wrong = method.health(views), method.losses(views, STEP)["contrast"]
    assert right["place_error"] < 0.3 and wrong["place_error"] > 0.9
    assert right["agreement"] > 0.9 and wrong["agreement"] < 0
    assert loss_of_wrong > loss + 1
    assert right["usable"] == wrong["usable"] and right["negatives"] > 5


def test_health_shows_a_collapse() -> None:
    method = method_of(ignore_mm=4.0)
    views = views_of(method)
    with torch.no_grad():
        alive = method.health(views)
        for weight in method.projector.parameters():
            weight.zero_()
        method.projector[-1].bias.fill_(1.0)
        dead = method.health(views)
    assert alive["projection_std"] > 0.1 and dead["projection_std"] == 0
    assert alive["negative_similarity"] < 0.999 < dead["negative_similarity"]


@pytest.mark.parametrize("size", SIZES)
def test_pictures_show_what_resembles_the_middle(size: tuple[int, ...]) -> None:
    method = method_of(size)
    with torch.no_grad():
        pictures = method.pictures(views_of(method))
    assert set(pictures) == {"first", "second", "similarity"}
    assert all(image.shape == (3, 1, *size) for image in pictures.values())
    assert pictures["similarity"].abs().max() <= 1.0001


def test_a_patch_of_one_region_is_refused_with_what_to_change() -> None:
    with pytest.raises(UsageError, match="Raise patch_size or decoder_stages, or lower region"):
        method_of((16, 16), region=5)


def test_a_region_without_a_middle_is_refused() -> None:
    with pytest.raises(ValidationError, match="odd edge, not 2"):
        LocalContrastSettings(region=2)
