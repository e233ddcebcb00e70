"""S3D: the encoder never touches hidden voxels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.config import check_settings
from medssl.data.batch import View
from medssl.data.draw import Draw
from medssl.errors import UsageError
from medssl.networks import sparse
from medssl.networks.build import build_network, freeze_unused_outputs
from medssl.pretraining.s3d import S3D, Densify, S3DSettings
from medssl.training.method import Step
from tests.pretraining.test_mae import batch_of

STEP = Step(0, 10)


def method_of(size: tuple[int, ...] = (16, 16, 16), name: str = "resenc-xs", channels: int = 1, block: int = 4) -> S3D:
    """Return a method all of whose paths count: nnU-Net starts the last norm of each residual block at zero."""
    network = build_network(name, dimensions=len(size), in_channels=channels, out_channels=channels, seed=0)
    freeze_unused_outputs(network)
    policy = policy_for("reconstruction", {"MR"}, size, AugmentationSettings())
    torch.manual_seed(0)
    method = S3D(network, policy, check_settings(S3DSettings, {"mask": {"block": block}}, "test"))
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return method


def view_of(method: S3D, channels: int = 1) -> View:
    (view,) = method.views(batch_of(method, channels=channels), Draw(0, [0, 1, 2]))  # type: ignore[arg-type]
    return view


def spoilt(view: View, value: float) -> View:
    """Return the view with something else at hidden voxels, in the image and not in the target."""
    assert view.mask is not None
    target = view.image if view.target is None else view.target
    return dataclasses.replace(view, image=torch.where(view.mask, value, view.image), target=target.clone())


def target_of(view: View) -> Tensor:
    return view.image if view.target is None else view.target


@pytest.mark.parametrize("size", [(16, 16, 16), (16, 24)])
def test_every_sample_hides_three_quarters_of_its_blocks(size: tuple[int, ...]) -> None:
    view = view_of(method_of(size))
    assert view.mask is not None
    assert view.mask.flatten(1).float().mean(dim=1).tolist() == [0.75] * 3
    assert not torch.equal(view.mask[0], view.mask[1])


@pytest.mark.parametrize("name", ["resenc-xs", "plain-unet-s"])
@pytest.mark.parametrize("size", [(16, 16, 16), (16, 24)])
def test_nothing_that_is_computed_depends_on_hidden_voxels(name: str, size: tuple[int, ...]) -> None:
    method = method_of(size, name, channels=2)
    view = view_of(method, channels=2)
    features, restored, loss = method.features(view), method.restore(view), method.losses([view], STEP)
    assert restored.shape == view.image.shape
    for value in (1e6, float("nan")):
        other = spoilt(view, value)
        assert all(torch.equal(a, b) for a, b in zip(features, method.features(other), strict=True))
        assert torch.equal(method.restore(other), restored)
        assert torch.equal(method.losses([other], STEP)["reconstruction"], loss["reconstruction"])


def test_the_loss_is_the_error_on_hidden_voxels_inside_the_volume() -> None:
    method = method_of()
    view = view_of(method)
    view.inside[:, :, :8] = False
    assert view.mask is not None
    where = view.mask & view.inside
    expected = (method.restore(view) - target_of(view))[where].square().mean().item()
    assert method.losses([view], STEP)["reconstruction"].item() == pytest.approx(expected, rel=1e-5)
    view.target = torch.where(where, target_of(view), 1e6)
    assert method.losses([view], STEP)["reconstruction"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [(16, 16, 16), (16, 24)])
def test_gradients_reach_every_trained_weight(size: tuple[int, ...]) -> None:
    method = method_of(size)
    sum(method.losses([view_of(method)], STEP).values()).backward()  # type: ignore[union-attr]
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_network_keeps_its_names_and_only_what_makes_dense_is_added() -> None:
    method = method_of()
    names = set(method.state_dict())
    assert {name.removeprefix("network.") for name in names if name.startswith("network.")} == set(
        build_network("resenc-xs", dimensions=3).state_dict()
    )
    assert {name.partition(".")[0] for name in names} == {"network", "densify"}
    assert S3D.trains_decoder


def test_a_dense_stage_keeps_what_is_visible_and_puts_the_token_where_nothing_is() -> None:
    densify = Densify(3, 3, convolve=False)
    features = torch.randn(2, 3, 4, 4, 4)
    visible = torch.rand(2, 1, 4, 4, 4) < 0.5
    dense = densify(features, visible)
    where = visible.expand_as(dense)
    expected = sparse.sparse_instance_norm(features, visible)
    torch.testing.assert_close(dense[where], expected[where])
    assert torch.equal(dense[~where], densify.token.view(1, 3, 1, 1, 1).expand_as(dense)[~where])


def test_tokens_start_small_and_the_coarsest_stage_has_no_convolution() -> None:
    token = Densify(20_000, 2, convolve=False).token
    # A normal of deviation 0.02 that is cut far out.
    assert token.std().item() == pytest.approx(0.02, rel=0.05) and token.abs().max().item() < 0.2
    kinds = [type(densify.convolution) for densify in method_of((16, 24)).densify]
    assert kinds == [nn.Conv2d, nn.Conv2d, nn.Conv2d, nn.Identity]


def test_the_leak_is_exactly_zero_in_a_sound_encoder() -> None:
    for block in (2, 4, 8):
        method = method_of(block=block)
        with torch.no_grad():
            figures = method.health([view_of(method)])
        assert figures["leak"] == 0 and figures["hidden_feature"] == 0
        assert figures["feature_std"] > 0.01 and figures["effective_rank"] > 1
        assert {"error_to_mean", "error_to_neighbours"} <= set(figures)


def test_the_leak_is_seen_where_the_encoder_looks_under_the_mask() -> None:
    method = method_of()
    view = view_of(method)

    class Dense(nn.Module):
        """The encoder as it is, with the masks of the sparse one."""

        def forward(self, image: Tensor, visible: Tensor) -> list[Tensor]:
            found: list[Tensor] = method.network.encoder(image)  # type: ignore[operator]
            return found

        visible_stages = method.sparse_encoder.visible_stages

    method.sparse_encoder = Dense()  # type: ignore[assignment]
    with torch.no_grad():
        figures = method.health([view])
    assert figures["leak"] > 0.01 and figures["hidden_feature"] > 0.01


def test_a_mask_that_is_lost_below_its_grid_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    method = method_of(block=8)
    view = view_of(method)
    right = sparse.any_visible

    def nothing_hidden(visible: Tensor, stride: Sequence[int]) -> Tensor:
        return torch.ones_like(right(visible, stride)) if max(stride) > 1 else visible

    monkeypatch.setattr(sparse, "any_visible", nothing_hidden)
    with torch.no_grad():
        assert method.health([view])["hidden_feature"] > 0.01


def test_statistics_over_all_voxels_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    method = method_of()

    def dense_norm(features: Tensor, visible: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
        return F.instance_norm(features, weight=weight, bias=bias, eps=eps)

    monkeypatch.setattr(sparse, "sparse_instance_norm", dense_norm)
    with torch.no_grad():
        assert method.health([view_of(method)])["hidden_feature"] > 0.01


def test_a_step_in_bfloat16_is_finite() -> None:
    method = method_of()
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.losses([view_of(method)], STEP)["reconstruction"]
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_there_is_nothing_to_fill_hidden_voxels_with() -> None:
    with pytest.raises(UsageError, match=r"mask\.fill"):
        check_settings(S3DSettings, {"mask": {"fill": "zero"}}, "recipe")
    settings = S3DSettings().resolved((48, 48, 40))
    assert (settings.mask.block, settings.mask.ratio, settings.error) == (4, 0.75, "l2")


def test_pictures_show_the_reconstruction_in_its_place() -> None:
    method = method_of()
    view = view_of(method)
    with torch.no_grad():
        pictures = method.pictures([view])
    assert view.mask is not None
    assert torch.equal(pictures["restored"][~view.mask], pictures["target"][~view.mask])
    assert torch.equal(pictures["restored"][view.mask], pictures["output"][view.mask])
