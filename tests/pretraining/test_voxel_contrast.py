"""Contrast of points."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from medssl.augmentation.correspondence import to_source_mm, values_at
from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.data.batch import Batch, View, Views
from medssl.data.draw import Draw
from medssl.errors import CheckpointError, UsageError
from medssl.losses.voxel_contrast import voxel_contrast
from medssl.networks.build import build_network, freeze_decoder
from medssl.pretraining.voxel_contrast import PREFIX, VoxelContrast, VoxelContrastSettings, match_error
from medssl.pretraining.voxel_head import VoxelHead
from medssl.training.method import Step

from .methods import blobs

STEP = Step(0, 10)
SIZES = {2: (32, 32), 3: (16, 16, 16)}
MOVED = {
    "spatial": {
        "rotation": {"probability": 1}, "scale": {"probability": 1}, "mirror": {"probability": 0.5},
        "elastic": {"probability": 0.5},
    }
}  # fmt: skip
HEAD = {"hidden": 16, "width": 8}


def method_of(dimensions: int = 3, overrides: dict[str, Any] | None = None, **settings: Any) -> VoxelContrast:
    network = build_network("resenc-xs", dimensions=dimensions, seed=0)
    freeze_decoder(network)
    augmentation = AugmentationSettings(overrides=overrides or {}, laterality="allow")
    policy = policy_for("contrastive", {"MR"}, SIZES[dimensions], augmentation)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VoxelContrast(network, policy, VoxelContrastSettings(**{"points": 32, "head": HEAD, **settings}))


def batch_of(method: VoxelContrast, count: int = 2, spacing: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Batch:
    size = tuple(method.policy.read_size)
    whole = (1,) * (3 - len(size)) + size
    return Batch(
        image=torch.stack([blobs(size, number) for number in range(count)]),
        sample_index=torch.arange(count),
        sample_id=torch.arange(count) + 3,
        origin_mm=torch.tensor([[7.0, 0, 3]] * count) * (torch.tensor(whole) > 1),
        spacing_mm=torch.tensor([spacing] * count),
        valid=torch.tensor([[0, edge] for edge in whole]).expand(count, 3, 2).clone(),
        background=torch.full((count,), -9.0),
        modality=("MR",) * count,
        patient_key=("p",) * count,
    )


def views_of(method: VoxelContrast, seed: int = 0, **more: Any) -> Views:
    batch = batch_of(method, **more)
    return method.views(batch, Draw(seed, batch.sample_index))


def points_of(views: Views) -> tuple[Tensor, Tensor, Tensor]:
    points = views[0].parameters["points"]
    return points["voxels"], views[1].parameters["points"]["voxels"], points["valid"]


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (4.0, 0.5, 0.7)])
def test_a_point_is_the_same_place_in_mm_in_both_views(dimensions: int, spacing: tuple[float, ...]) -> None:
    views = views_of(method_of(dimensions, MOVED), spacing=spacing)
    first, second, valid = points_of(views)
    assert valid.float().mean() > 0.8
    places = views[0].parameters["points"]["position_mm"]
    torch.testing.assert_close(to_source_mm(views[0], first)[valid], places[valid], atol=1e-3, rtol=0)
    torch.testing.assert_close(to_source_mm(views[1], second)[valid], places[valid], atol=0.05, rtol=0)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (4.0, 1.0, 0.5)])
def test_points_that_count_lie_in_both_views_and_on_tissue(spacing: tuple[float, ...]) -> None:
    method = method_of(3, tissue_margin=0.5)
    batch = batch_of(method, spacing=spacing)
    half = batch.image.shape[4] // 2
    batch.image[:, :, :, :, :half] = -9.2
    views = method.views(batch, Draw(0, batch.sample_index))
    first, second, valid = points_of(views)
    for voxels in (first, second):
        assert (voxels[valid] >= -0.51).all() and (voxels[valid] <= 15.51).all()
    x = views[0].parameters["points"]["position_mm"][valid][:, 2] - 3
    assert x.min() >= (half - 0.5) * spacing[2] and valid.any()


def test_points_on_the_padding_of_either_view_do_not_count() -> None:
    # A turn makes views see different parts of the padding behind the volume.
    method = method_of(3, MOVED)
    batch = batch_of(method)
    batch.valid[:, 1:, 1] = 16
    views = method.views(batch, Draw(1, batch.sample_index))
    for view, voxels in zip(views, points_of(views)[:2], strict=True):
        on_volume = values_at(view.inside.float(), voxels, (16, 16, 16), mode="nearest")[:, 0] > 0.5
        assert on_volume[points_of(views)[2]].all() and not view.inside.all()


def test_a_crop_without_tissue_costs_nothing_and_breaks_nothing() -> None:
    method = method_of()
    batch = dataclasses.replace(batch_of(method), background=torch.tensor([-9.0, 0.0]))
    batch.image[1] = 0
    views = method.views(batch, Draw(0, batch.sample_index))
    assert not points_of(views)[2][1].any()
    terms = method.losses(views, STEP)
    assert all(torch.isfinite(term) for term in terms.values())
    batch.image[0], batch.background[0] = 0, 0
    views = method.views(batch, Draw(0, batch.sample_index))
    assert [term.item() for term in method.losses(views, STEP).values()] == [0, 0]
    assert all(value == value for value in method.health(views).values())


def test_views_depend_on_seed_and_index_and_not_on_batch_mates() -> None:
    method = method_of()
    batch = batch_of(method)
    first, again, other = (points_of(method.views(batch, Draw(seed, [0, 1])))[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_gradients_reach_every_trained_weight(dimensions: int) -> None:
    method = method_of(dimensions)
    views = views_of(method)
    optimiser = torch.optim.SGD([weight for weight in method.parameters() if weight.requires_grad], lr=0.01)
    for _ in range(2):
        optimiser.zero_grad()
        torch.stack(list(method.losses(views, STEP).values())).sum().backward()
        optimiser.step()
    for name, weight in method.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_the_loss_of_each_head_has_its_radii_in_mm() -> None:
    method = method_of(positive_mm=1.0, ignore_radius_mm=3.0, coarse_factor=2.0)
    views = views_of(method, spacing=(2.0, 1.0, 0.5))
    terms = method.losses(views, STEP)
    embedded = [method.embed(view) for view in views]
    points = views[0].parameters["points"]
    for name, factor in (("fine", 1), ("coarse", 2)):
        expected = voxel_contrast(
            embedded[0][name].flatten(0, 1),
            embedded[1][name].flatten(0, 1),
            positions_mm=points["position_mm"].flatten(0, 1),
            groups=torch.tensor([3, 4]).repeat_interleave(32),
            valid=points["valid"].flatten(),
            positive_mm=factor * 1.0,
            ignore_radius_mm=factor * 3.0,
            temperature=0.1,
        )
        assert terms[name].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_order_of_the_volumes_does_not_matter() -> None:
    method = method_of()
    views = views_of(method)
    flipped = []
    for view in views:
        points = {name: value.flip(0) for name, value in view.parameters["points"].items()}
        assert view.sample_id is not None
        flipped.append(
            dataclasses.replace(
                view, image=view.image.flip(0), sample_id=view.sample_id.flip(0), parameters={"points": points}
            )
        )
    first, second = (method.losses(given, STEP) for given in (views, flipped))
    assert [term.item() for term in first.values()] == pytest.approx([term.item() for term in second.values()], 1e-5)


def test_without_coarse_stages_there_is_one_head() -> None:
    method = method_of(coarse_stages=())
    assert set(method.losses(views_of(method), STEP)) == {"fine"}


def told(view: View) -> dict[str, Tensor]:
    """Embeddings that say where in the volume the points of a view lie: near places look alike."""
    places = to_source_mm(view, view.parameters["points"]["voxels"])
    waves = places @ (torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * 0.3)
    rows = torch.nn.functional.normalize(torch.cat([waves.sin(), waves.cos()], dim=2), dim=2)
    return {"fine": rows, "coarse": rows}


def test_health_knows_points_that_find_themselves_from_collapse() -> None:
    method = method_of()
    views = views_of(method)
    method.embed = told  # type: ignore[method-assign]
    healthy = method.health(views)
    assert healthy["match_error"] == pytest.approx(0, abs=1e-6) == healthy["coarse_match_error"]
    assert healthy["positive_similarity"] == pytest.approx(1, abs=1e-5) and healthy["negative_similarity"] < 0.5
    method.embed = lambda view: {name: torch.ones_like(rows) / 128**0.5 for name, rows in told(view).items()}  # type: ignore[method-assign]
    collapsed = method.health(views)
    assert collapsed["match_error"] > 0.5 and collapsed["embedding_std"] == pytest.approx(0, abs=1e-3)
    assert collapsed["negative_similarity"] == pytest.approx(1, abs=1e-5)


def test_health_and_loss_react_to_points_of_the_wrong_place() -> None:
    method = method_of()
    views = views_of(method)
    method.embed = told  # type: ignore[method-assign]
    right = method.losses(views, STEP)["fine"].item()
    points = views[1].parameters["points"]
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    wrong = {**points, "voxels": points["voxels"][:, order]}
    views[1] = dataclasses.replace(views[1], parameters={"points": wrong})
    assert method.health(views)["match_error"] > 0.5
    assert method.losses(views, STEP)["fine"].item() > right + 1


def test_match_error_is_one_for_random_matches() -> None:
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(4, 200, 3, generator=generator)
    cosines = torch.rand(4, 200, 200, generator=generator)
    error = match_error(cosines, torch.cdist(places, places), torch.ones(4, 200, dtype=torch.bool))
    assert error.item() == pytest.approx(1, abs=0.1)


def test_exported_heads_build_the_same_heads_again() -> None:
    method = method_of()
    views = views_of(method)
    stages = method.encoder.stages(views[0].image)
    voxels = points_of(views)[0]
    heads = method.exported_heads()
    for name, head in method.heads.items():
        start = f"{PREFIX}{name}."
        state = {key.removeprefix(start): value for key, value in heads.items() if key.startswith(start)}
        again = VoxelHead.from_state(state, method.encoder.widths)
        torch.testing.assert_close(again(stages, voxels, (16, 16, 16)), head(stages, voxels, (16, 16, 16)))
    with pytest.raises(CheckpointError, match="does not fit its encoder"):
        VoxelHead.from_state(state, (4, 8, 12, 16))
    with pytest.raises(CheckpointError, match="does not fit its encoder"):
        VoxelHead.from_state({}, method.encoder.widths)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"positive_mm": 8.0}, "lies beyond ignore_radius_mm"),
        ({"head": {"norm": "batch"}}, "norm layer or none"),
        ({"head": {"layers": 0}}, "greater than or equal to 1"),
        ({"overlap": (0.9, 0.5)}, "a range within 0 to 1"),
    ],
)
def test_settings_that_do_not_fit_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VoxelContrastSettings(**values)


def test_stages_that_do_not_exist_are_named() -> None:
    with pytest.raises(UsageError, match="the encoder has stages 0 to 3"):
        method_of(coarse_stages=(7,))
