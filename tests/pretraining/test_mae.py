"""The masked autoencoder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.data.batch import Batch
from medssl.data.draw import Draw
from medssl.networks.build import build_network, freeze_unused_outputs
from medssl.pretraining.health import effective_rank, feature_std, local_mean
from medssl.pretraining.mae import MaskedAutoencoder, MaskedAutoencoderSettings, MaskSettings
from medssl.training.method import Step

STEP = Step(0, 10)


def method_of(size: tuple[int, ...] = (16, 16, 16), channels: int = 1, **mask: object) -> MaskedAutoencoder:
    network = build_network("resenc-xs", dimensions=len(size), in_channels=channels, out_channels=channels, seed=0)
    freeze_unused_outputs(network)
    policy = policy_for("reconstruction", {"MR"}, size, AugmentationSettings())
    return MaskedAutoencoder(network, policy, MaskedAutoencoderSettings(mask=MaskSettings(**{"block": 4, **mask})))  # type: ignore[arg-type]


def batch_of(method: MaskedAutoencoder, count: int = 3, channels: int = 1) -> Batch:
    size = tuple(method.policy.read_size)
    valid = torch.tensor([[0, edge] for edge in (size if len(size) == 3 else (1, *size))]).expand(count, 3, 2).clone()
    generator = torch.Generator().manual_seed(0)
    return Batch(
        image=torch.randn((count, channels, *size), generator=generator),
        sample_index=torch.arange(count),
        sample_id=torch.arange(count),
        origin_mm=torch.zeros(count, 3),
        spacing_mm=torch.ones(count, 3),
        valid=valid,
        background=torch.zeros(count),
        modality=("MR",) * count,
        patient_key=("p",) * count,
    )


@pytest.mark.parametrize("size", [(16, 16, 16), (16, 24)])
@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_every_sample_hides_the_exact_part_in_whole_blocks(size: tuple[int, ...], ratio: float) -> None:
    method = method_of(size, ratio=ratio)
    (view,) = method.views(batch_of(method), Draw(0, [0, 1, 2]))
    assert view.mask is not None
    assert view.mask.flatten(1).float().mean(dim=1).tolist() == [ratio] * 3
    pool = torch.nn.functional.avg_pool3d if len(size) == 3 else torch.nn.functional.avg_pool2d
    assert set(pool(view.mask.float(), 4).flatten().tolist()) == {0.0, 1.0}
    assert not torch.equal(view.mask[0], view.mask[1])


def test_views_depend_on_seed_and_index_and_not_on_batch_mates() -> None:
    method = method_of()
    batch = batch_of(method)
    (view,) = method.views(batch, Draw(0, batch.sample_index))
    (again,) = method.views(batch, Draw(0, batch.sample_index))
    (other,) = method.views(batch, Draw(1, batch.sample_index))
    assert view.mask is not None and again.mask is not None and other.mask is not None
    assert torch.equal(view.mask, again.mask) and torch.equal(view.image, again.image)
    assert not torch.equal(view.mask, other.mask)


def test_visible_voxels_and_voxels_outside_the_volume_do_not_count() -> None:
    method = method_of()
    (view,) = method.views(batch_of(method), Draw(0, [0, 1, 2]))
    assert view.mask is not None
    view.inside[:, :, :8] = False
    loss = method.losses([view], STEP)["reconstruction"].item()
    target: Tensor = view.image if view.target is None else view.target
    free = ~(view.mask & view.inside)
    # The input stays: only the target is spoilt where it must not count.
    view.target = torch.where(free, 1e6, target)
    assert method.losses([view], STEP)["reconstruction"].item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("fill", ["token", "zero", "mean"])
def test_the_network_never_sees_hidden_voxels(fill: str) -> None:
    method = method_of(fill=fill)
    (view,) = method.views(batch_of(method), Draw(0, [0, 1, 2]))
    assert view.mask is not None
    first = method.blank(view)
    view.image = torch.where(view.mask, 1e6, view.image)
    assert torch.equal(method.blank(view), first)
    assert torch.equal(first[~view.mask], view.image[~view.mask])


def test_fillings_have_their_values() -> None:
    for fill in ("token", "zero", "mean"):
        method = method_of(channels=2, fill=fill)
        (view,) = method.views(batch_of(method, channels=2), Draw(0, [0, 1, 2]))
        if method.token is not None:
            with torch.no_grad():
                method.token.copy_(torch.tensor([2.0, 3.0]))
        filled = method.blank(view)
        assert view.mask is not None
        for sample in range(3):
            for channel in range(2):
                visible = view.image[sample, channel][(view.inside & ~view.mask)[sample, 0]]
                expected = {"token": [2.0, 3.0][channel], "zero": 0.0, "mean": visible.mean().item()}[fill]
                hidden = filled[sample, channel][view.mask[sample, 0]]
                assert hidden.min().item() == pytest.approx(expected, abs=1e-6)
                assert hidden.max().item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", [(16, 16, 16), (16, 24)])
def test_gradients_reach_every_trained_weight(size: tuple[int, ...]) -> None:
    method = method_of(size)
    views = method.views(batch_of(method), Draw(0, [0, 1, 2]))
    optimiser = torch.optim.SGD(method.parameters(), lr=0.01)
    # nnU-Net starts the last norm of each residual block at zero: only the second step reaches what lies before it.
    for _ in range(2):
        optimiser.step()
        optimiser.zero_grad()
        sum(method.losses(views, STEP).values()).backward()  # type: ignore[union-attr]
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_state_names_each_weight_of_the_network_and_the_token_once() -> None:
    method = method_of()
    names = {name for name, _ in method.named_parameters()}
    assert all(name.startswith("network.") for name in names - {"token"}) and "token" in names


def test_health_is_one_for_a_network_that_fills_in_the_mean_and_less_for_one_that_knows() -> None:
    method = method_of()
    (view,) = method.views(batch_of(method), Draw(0, [0, 1, 2]))
    target = (view.image if view.target is None else view.target).clone()
    assert view.mask is not None
    visible = view.inside & ~view.mask
    means = torch.stack([target[i][visible[i]].mean() for i in range(3)]).view(3, 1, 1, 1, 1)
    method.restore = lambda _: means.expand_as(target)  # type: ignore[method-assign]
    assert method.health([view])["error_to_mean"] == pytest.approx(1.0, rel=1e-4)
    method.restore = lambda _: target  # type: ignore[method-assign]
    healthy = method.health([view])
    assert healthy["error_to_mean"] == pytest.approx(0.0, abs=1e-6)
    assert healthy["error_to_neighbours"] == pytest.approx(0.0, abs=1e-6)
    assert healthy["feature_std"] > 0.01 and healthy["effective_rank"] > 1


def test_pictures_show_target_input_and_reconstruction() -> None:
    method = method_of()
    views = method.views(batch_of(method), Draw(0, [0, 1, 2]))
    with torch.no_grad():
        pictures = method.pictures(views)
    assert {"target", "input", "restored"} <= set(pictures)
    assert views[0].mask is not None
    assert torch.isnan(pictures["input"]).float().mean().item() == pytest.approx(0.75)
    visible = ~views[0].mask
    assert torch.equal(pictures["restored"][visible], pictures["target"][visible])


@pytest.mark.parametrize(
    ("patch", "block"), [((160, 160, 160), 16), ((96, 96, 64), 8), ((48, 48, 40), 4), ((512, 512), 32)]
)
def test_the_block_grows_with_the_patch(patch: tuple[int, ...], block: int) -> None:
    assert MaskedAutoencoderSettings().resolved(patch).mask.block == block


def test_feature_std_is_zero_on_collapse_and_does_not_depend_on_scale() -> None:
    features = torch.randn(50, 8)
    assert feature_std(torch.ones(10, 4)).item() == 0
    assert feature_std(torch.zeros(10, 4)).item() == 0
    assert feature_std(features).item() == pytest.approx(1.0, abs=0.1)
    assert feature_std(features * 100).item() == pytest.approx(feature_std(features).item(), rel=1e-5)


def test_effective_rank_counts_the_directions_that_are_used() -> None:
    line = torch.linspace(-1, 1, 40)[:, None] * torch.ones(1, 6)
    assert effective_rank(line).item() == pytest.approx(1.0, abs=1e-3)
    assert effective_rank(torch.ones(10, 4)).item() == pytest.approx(1.0, abs=1e-3)
    orthogonal = torch.cat([torch.eye(6), -torch.eye(6)])
    assert effective_rank(orthogonal).item() == pytest.approx(6.0, abs=1e-3)
    assert 1 < effective_rank(torch.randn(2000, 6)).item() <= 6
    assert torch.isnan(effective_rank(torch.full((4, 4), float("nan"))))


@pytest.mark.parametrize("shape", [(2, 1, 6, 7, 5), (2, 2, 9, 8)])
def test_the_local_mean_equals_its_definition(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(shape, generator=generator)
    visible = torch.rand((shape[0], 1, *shape[2:]), generator=generator) < 0.4
    visible[1, :, :5] = False
    result = local_mean(image, visible, 2)
    for sample in range(shape[0]):
        for index in torch.cartesian_prod(*(torch.arange(size) for size in shape[2:])).tolist():
            box = tuple(slice(max(i - 2, 0), i + 3) for i in index)
            for channel in range(shape[1]):
                chosen = image[(sample, channel, *box)][visible[(sample, 0, *box)]]
                if chosen.numel() == 0:
                    chosen = image[sample, channel][visible[sample, 0]]
                assert result[(sample, channel, *index)].item() == pytest.approx(chosen.mean().item(), abs=1e-4)
