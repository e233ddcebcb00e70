"""VoCo."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from medssl.augmentation.correspondence import source_positions_mm, values_at
from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.data.batch import Batch, Views
from medssl.data.draw import Draw
from medssl.errors import UsageError
from medssl.networks.build import build_network, freeze_decoder
from medssl.pretraining.voco import VoCo, VoCoSettings, base_size, correlation
from medssl.training.method import Step

from .methods import blobs

STEP = Step(0, 10)
SIZES = {2: (32, 32), 3: (16, 16, 32)}
EXACT = "donot_use_mm_for_euclid_dist"
GRIDS = {2: (2, 2), 3: (1, 1, 2)}
MOVED = {"spatial": {"rotation": {"probability": 1}, "scale": {"probability": 1}, "mirror": {"probability": 0.5}}}


def method_of(dimensions: int = 3, overrides: dict[str, Any] | None = None, **settings: Any) -> VoCo:
    network = build_network("resenc-xs", dimensions=dimensions, seed=0)
    freeze_decoder(network)
    augmentation = AugmentationSettings(overrides=overrides or {}, laterality="allow")
    policy = policy_for("contrastive", {"MR"}, SIZES[dimensions], augmentation)
    head = {"hidden": 16, "width": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = {"grid": GRIDS[dimensions], "targets": 2, "projector": head, **settings}
        return VoCo(network, policy, VoCoSettings(**values))


def batch_of(method: VoCo, count: int = 2) -> Batch:
    size = tuple(method.policy.read_size)
    whole = (1,) * (3 - len(size)) + size
    return Batch(
        image=torch.stack([blobs(size, number) for number in range(count)]),
        sample_index=torch.arange(count),
        sample_id=torch.arange(count),
        origin_mm=torch.tensor([[7.0, 0, 3]] * count),
        spacing_mm=torch.tensor([[2.0, 1, 1]] * count),
        valid=torch.tensor([[0, edge] for edge in whole]).expand(count, 3, 2).clone(),
        background=torch.zeros(count),
        modality=("MR",) * count,
        patient_key=("p",) * count,
    )


def views_of(method: VoCo, seed: int = 0, count: int = 2) -> Views:
    batch = batch_of(method, count)
    return method.views(batch, Draw(seed, batch.sample_index))


@pytest.mark.parametrize("dimensions", [2, 3])
def test_bases_tile_the_patch_and_targets_lie_anywhere_in_it(dimensions: int) -> None:
    method = method_of(dimensions, targets=3)
    views = views_of(method)
    assert len(views) == method.needs_of(method.settings).views == method.bases + 3
    size, patch = torch.tensor(method.size), torch.tensor(method.policy.patch_size)
    covered = torch.zeros(method.policy.patch_size)
    for view in views[: method.bases]:
        start = view.parameters["crop"]["start"][0, 3 - dimensions :]
        covered[tuple(slice(a, a + b) for a, b in zip(start.tolist(), method.size, strict=True))] += 1
    assert torch.equal(covered, torch.ones_like(covered))
    for view in views:
        assert tuple(view.image.shape[2:]) == method.size
        start = view.parameters["crop"]["start"][:, 3 - dimensions :]
        assert (start >= 0).all() and (start + size <= patch).all()
    starts = torch.stack([view.parameters["crop"]["start"] for view in views[method.bases :]])
    assert len(starts.flatten(0, 1).unique(dim=0)) > 3


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("overrides", [None, MOVED], ids=["as it comes", "moved"])
def test_labels_are_the_shared_part_of_the_voxels_however_the_patch_lies(
    dimensions: int, overrides: dict[str, Any] | None
) -> None:
    method = method_of(dimensions, overrides)
    views = views_of(method)
    labels = method.overlaps(views)
    assert labels.shape == (2, 2, method.bases)
    torch.testing.assert_close(labels.sum(dim=2), torch.ones(2, 2))
    for sample in range(2):
        places = [source_positions_mm(view)[sample].flatten(1).T for view in views]
        for number, target in enumerate(places[method.bases :]):
            for base in range(method.bases):
                # Voxels of one patch lie at one place in the volume, whatever way it was turned.
                apart = torch.cdist(target, places[base], compute_mode=EXACT)
                shared = (apart < 1e-2).any(dim=1).float().mean().item()
                assert labels[sample, number, base].item() == pytest.approx(shared, abs=1e-6)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_crop_shows_the_volume_where_its_map_says_and_knows_what_lies_outside(dimensions: int) -> None:
    method = method_of(dimensions, MOVED)
    method = method_of(dimensions, MOVED | {"intensity": dict.fromkeys(method.policy.by_modality["MR"].intensity)})
    batch = batch_of(method)
    batch.valid[:, 2, 1] = batch.image.shape[-1] // 2
    batch.image[..., batch.image.shape[-1] // 2 :] = 0
    seen = 0
    for view in method.views(batch, Draw(0, batch.sample_index)):
        voxels = (source_positions_mm(view).flatten(2).mT - batch.origin_mm[:, None]) / batch.spacing_mm[:, None]
        inside = voxels[:, :, 2] <= batch.image.shape[-1] // 2 - 0.5
        assert torch.equal(view.inside.flatten(1) & ~inside, torch.zeros_like(inside))
        assert (view.inside.flatten(1) == inside).float().mean() > 0.9
        expected = values_at(batch.image, voxels, batch.image.shape[2:])[:, 0]
        well = (voxels[:, :, 2] < batch.image.shape[-1] // 2 - 2) & view.inside.flatten(1)
        torch.testing.assert_close(view.image.flatten(1)[well], expected[well], atol=0.02, rtol=0)
        seen += int(well.sum())
    assert seen > 100


def test_all_crops_share_the_geometry_and_each_has_intensities_of_its_own() -> None:
    nothing = dict.fromkeys(method_of().policy.by_modality["MR"].intensity)
    noise = {"noise": {"probability": 1.0, "std": [0.5, 0.5]}}
    calm, noisy = (views_of(method_of(3, MOVED | {"intensity": nothing | more})) for more in ({}, noise))
    turns = [view.parameters["spatial"]["angle_degrees"] for view in noisy]
    assert all(torch.equal(turn, turns[0]) for turn in turns)
    added = [loud.image - quiet.image for loud, quiet in zip(noisy, calm, strict=True)]
    assert all(noise.std().item() == pytest.approx(0.5, rel=0.1) for noise in added)
    correlations = [correlation(one, other).abs().item() for one, other in itertools.combinations(added, 2)]
    assert max(correlations) < 0.1


def test_views_depend_on_seed_and_index_alone() -> None:
    method = method_of()
    first, again, other = views_of(method), views_of(method), views_of(method, seed=1)
    assert all(torch.equal(one.image, two.image) for one, two in zip(first, again, strict=True))
    starts = [[view.parameters["crop"]["start"] for view in views] for views in (first, again, other)]
    assert all(map(torch.equal, starts[0], starts[1])) and not all(map(torch.equal, starts[0], starts[2]))


@pytest.mark.parametrize("dimensions", [2, 3])
def test_gradients_reach_every_trained_weight_and_not_the_teacher(dimensions: int) -> None:
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
    assert all(not weight.requires_grad and weight.grad is None for weight in method.teacher.parameters())


def test_the_teacher_follows_after_a_step() -> None:
    method = method_of(teacher={"momentum": 0.5, "final": 0.5})
    before = next(method.teacher.parameters()).clone()
    with torch.no_grad():
        for weight in method.network.parameters():
            weight.add_(1.0)
    method.after_step(STEP)
    torch.testing.assert_close(next(method.teacher.parameters()), before + 0.5)


def perfect(method: VoCo, views: Views, labels: Tensor) -> None:
    """Make student and teacher say exactly these overlaps: bases are axes, targets their combinations."""
    rest = (1 - labels.square().sum(dim=2, keepdim=True)).clamp(min=0).sqrt()
    targets = torch.cat([labels, rest], dim=2)
    bases = torch.eye(labels.shape[2], labels.shape[2] + 1).expand(len(labels), -1, -1)
    rows = torch.cat([bases, targets], dim=1)
    method.project = lambda _: rows  # type: ignore[method-assign]
    method.teachers_projection = lambda _: rows  # type: ignore[method-assign]


def test_embeddings_that_say_the_overlap_cost_nothing_and_others_do() -> None:
    method = method_of(2)
    views = views_of(method)
    perfect(method, views, method.overlaps(views))
    assert [term.item() for term in method.losses(views, STEP).values()] == pytest.approx([0, 0, 0], abs=1e-4)
    assert method.health(views)["overlap_correlation"] == pytest.approx(1, abs=1e-4)
    wrong = method.overlaps(views).flip(2)
    perfect(method, views, wrong)
    assert method.losses(views, STEP)["overlap"].item() > 0.1


def test_health_tells_wrong_overlaps_and_collapse() -> None:
    method = method_of(2)
    views = views_of(method, count=16)
    labels = method.overlaps(views)
    perfect(method, views, labels[torch.randperm(16, generator=torch.Generator().manual_seed(0))])
    assert abs(method.health(views)["overlap_correlation"]) < 0.4
    same = torch.ones(16, method.bases + 2, 8)
    method.project = lambda _: same  # type: ignore[method-assign]
    method.teachers_projection = lambda _: same  # type: ignore[method-assign]
    collapsed = method.health(views)
    assert collapsed["overlap_correlation"] == pytest.approx(0, abs=1e-3)
    assert collapsed["base_similarity"] == pytest.approx(1)


def test_health_has_all_figures() -> None:
    method = method_of()
    figures = method.health(views_of(method))
    assert {"overlap_correlation", "base_similarity", "feature_std", "teacher_lag"} == set(figures)
    assert figures["teacher_lag"] == 0 and figures["feature_std"] > 0


def test_scale_and_position_of_a_volume_do_not_matter() -> None:
    method = method_of()
    batch = batch_of(method)
    moved = dataclasses.replace(batch, origin_mm=batch.origin_mm + 50, sample_id=batch.sample_id + 9)
    first, second = (
        method.losses(method.views(given, Draw(0, [0, 1])), STEP)["overlap"].item() for given in (batch, moved)
    )
    assert first == pytest.approx(second, rel=1e-6)


def test_settings_take_two_bases_along_each_axis_by_default() -> None:
    assert VoCoSettings().resolved((32, 32)).grid == (2, 2)
    assert VoCoSettings().resolved((48, 48, 48)).grid == (2, 2, 2)
    assert VoCoSettings(grid=(3, 3, 1)).resolved((48, 48, 16)).grid == (3, 3, 1)
    with pytest.raises(ValueError, match="two in all"):
        VoCoSettings(grid=(1, 1, 1))


@pytest.mark.parametrize(
    ("patch", "grid", "message"),
    [
        ((40, 48, 48), (2, 2, 2), r"With this patch .*\[1, 3, 3\].* with this grid the patch \[32, 48, 48\]"),
        ((16, 16, 16), (2, 2, 2), r"the patch \[32, 32, 32\] would"),
        ((8, 8, 8), (2, 2, 2), "no grid fits"),
        ((48, 48, 48), (2, 2), "grid .* has 2 axes, the patch"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused_with_what_would(
    patch: tuple[int, ...], grid: tuple[int, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        base_size(patch, grid, (8, 8, 8))


def test_correlation_is_pearsons() -> None:
    first = torch.tensor([1.0, 2, 4, 3])
    second = torch.tensor([2.0, 1, 5, 5])
    expected = torch.corrcoef(torch.stack([first, second]))[0, 1]
    assert correlation(first, second).item() == pytest.approx(expected.item(), rel=1e-5)
    assert correlation(first, torch.ones(4)).item() == 0
