"""AMAES: no skip connections, and artefacts undone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.config import check_settings
from medssl.data.batch import View
from medssl.data.draw import Draw
from medssl.losses.reconstruction import masked_mean
from medssl.networks.build import build_network, count_parameters, freeze_decoder, freeze_unused_outputs
from medssl.pretraining.amaes import AMAES, AMAESSettings, LightDecoder
from medssl.training.method import Step
from tests.pretraining.test_mae import batch_of

STEP = Step(0, 10)
NOISY = {"intensity": {"noise": {"probability": 1.0, "std": [0.2, 0.3]}}}


def method_of(
    size: tuple[int, ...] = (16, 16, 16), name: str = "resenc-xs", channels: int = 1, **settings: object
) -> AMAES:
    network = build_network(name, dimensions=len(size), in_channels=channels, out_channels=channels, seed=0)
    freeze_unused_outputs(network)
    freeze_decoder(network)
    policy = policy_for(AMAES.needs.policy, {"MR"}, size, AugmentationSettings(overrides=NOISY))
    torch.manual_seed(0)
    return AMAES(network, policy, check_settings(AMAESSettings, settings, "test"))


def view_of(method: AMAES, channels: int = 1) -> View:
    (view,) = method.views(batch_of(method, channels=channels), Draw(0, [0, 1, 2]))
    return view


def test_what_is_to_be_undone_are_artefacts_of_the_modality() -> None:
    for modality, own in (("MR", {"bias_field", "gibbs"}), ("CT", {"dose_noise", "metal"})):
        policy = policy_for(AMAES.needs.policy, {modality}, (16, 16, 16), AugmentationSettings())
        assert own | {"blur", "low_resolution"} <= {transform.name for transform in policy.intensity}


@pytest.mark.parametrize("size", [(16, 16, 16), (16, 24)])
def test_the_input_is_degraded_and_the_target_is_the_same_place_without(size: tuple[int, ...]) -> None:
    method = method_of(size)
    view = view_of(method)
    assert view.target is not None and view.mask is not None
    clean = policy_for("reconstruction", {"MR"}, size, AugmentationSettings())
    expected = clean.view(batch_of(method), Draw(0, [0, 1, 2]).child("view"))
    assert torch.equal(view.target, expected.image)
    difference = (view.image - view.target).flatten(1)
    assert (difference.std(dim=1) > 0.1).all()


@pytest.mark.parametrize("size", [(16, 16, 16), (16, 24)])
def test_six_tenths_of_cells_of_four_voxels_are_hidden(size: tuple[int, ...]) -> None:
    view = view_of(method_of(size))
    assert view.mask is not None and AMAESSettings().resolved((160, 160, 160)).mask.block == 4
    pool = torch.nn.functional.avg_pool3d if len(size) == 3 else torch.nn.functional.avg_pool2d
    cells = pool(view.mask.float(), 4).flatten(1)
    assert set(cells.flatten().tolist()) == {0.0, 1.0}
    assert cells.sum(dim=1).tolist() == [round(0.6 * cells.shape[1])] * 3


def test_the_error_counts_everywhere_inside_the_volume_or_on_hidden_voxels_alone() -> None:
    for voxels in ("all", "hidden"):
        method = method_of(voxels=voxels)
        view = view_of(method)
        view.inside[:, :, :8] = False
        assert view.target is not None and view.mask is not None
        where = view.inside if voxels == "all" else view.inside & view.mask
        restored = torch.randn_like(view.image)
        method.restore = lambda view, restored=restored: restored  # type: ignore[method-assign, misc]
        expected = (restored - view.target)[where].square().mean().item()
        assert method.losses([view], STEP)["reconstruction"].item() == pytest.approx(expected, rel=1e-5)
        view.target = torch.where(where, view.target, 1e6)
        assert method.losses([view], STEP)["reconstruction"].item() == pytest.approx(expected, rel=1e-5)
    assert AMAESSettings().voxels == "all"


@pytest.mark.parametrize("fill", ["token", "zero", "mean"])
def test_the_network_never_sees_hidden_voxels(fill: str) -> None:
    method = method_of(mask={"fill": fill})
    view = view_of(method)
    assert view.mask is not None
    first = method.restore(view)
    view.image = torch.where(view.mask, 1e6, view.image)
    assert torch.equal(method.restore(view), first)


def test_all_that_is_restored_passes_the_bottleneck() -> None:
    method = method_of()
    view = view_of(method)
    stages = method.encoder.stages
    restored = method.restore(view)

    def other_fine_stages(image: Tensor) -> list[Tensor]:
        *fine, last = stages(image)
        return [*(torch.randn_like(feature) for feature in fine), last]

    method.encoder.stages = other_fine_stages  # type: ignore[method-assign]
    assert torch.equal(method.restore(view), restored)
    method.encoder.stages = lambda image: [*stages(image)[:-1], torch.randn_like(stages(image)[-1])]  # type: ignore[method-assign]
    assert not torch.allclose(method.restore(view), restored)


@pytest.mark.parametrize("name", ["resenc-xs", "plain-unet-s"])
@pytest.mark.parametrize("size", [(16, 16, 16), (16, 24)])
def test_gradients_reach_every_trained_weight_and_not_the_decoder_of_the_u_net(
    name: str, size: tuple[int, ...]
) -> None:
    method = method_of(size, name, channels=2)
    view = view_of(method, channels=2)
    assert method.restore(view).shape == view.image.shape
    optimiser = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01)
    # nnU-Net starts the last norm of each residual block at zero: only the second step reaches what lies before it.
    for _ in range(2):
        optimiser.step()
        optimiser.zero_grad()
        sum(method.losses([view], STEP).values()).backward()  # type: ignore[union-attr]
    for key, parameter in method.named_parameters():
        if key.startswith("network.decoder."):
            assert parameter.grad is None and not parameter.requires_grad, key
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


def test_the_network_keeps_its_names_and_only_token_and_light_decoder_are_added() -> None:
    method = method_of()
    names = set(method.state_dict())
    assert {name.removeprefix("network.") for name in names if name.startswith("network.")} == set(
        build_network("resenc-xs", dimensions=3).state_dict()
    )
    assert {name.partition(".")[0] for name in names} == {"network", "decoder", "token"}
    assert not AMAES.trains_decoder


def test_the_light_decoder_undoes_uneven_strides_with_fewer_weights_than_the_u_nets() -> None:
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 1]]
    network = build_network("resenc-xs", dimensions=3, strides=strides)
    decoder = LightDecoder(network.encoder, 3)  # type: ignore[arg-type]
    image = torch.randn(1, 1, 4, 16, 8)
    assert decoder(network.encoder(image)[-1]).shape == (1, 3, 4, 16, 8)  # type: ignore[operator]
    own = count_parameters(network.decoder) - count_parameters(network.encoder)  # type: ignore[arg-type]
    assert count_parameters(decoder) < own


def test_health_tells_whether_artefacts_are_undone() -> None:
    method = method_of()
    view = view_of(method)
    assert view.target is not None and view.mask is not None
    target, visible = view.target, view.inside & ~view.mask
    method.restore = lambda view: view.image  # type: ignore[method-assign]
    idle = method.health([view])
    assert idle["visible_error"] == pytest.approx(idle["input_error"]) and idle["input_error"] > 1e-3
    method.restore = lambda view: target  # type: ignore[method-assign]
    healthy = method.health([view])
    assert healthy["visible_error"] == pytest.approx(0, abs=1e-6) and healthy["input_error"] == idle["input_error"]
    assert healthy["error_to_mean"] == pytest.approx(0, abs=1e-6) and healthy["feature_std"] > 0.01
    mean = masked_mean(target, visible).expand_as(target)
    method.restore = lambda view: mean  # type: ignore[method-assign]
    trivial = method.health([view])
    assert trivial["visible_error"] == pytest.approx(1, rel=1e-5)
    assert trivial["error_to_mean"] == pytest.approx(1, rel=1e-5)
