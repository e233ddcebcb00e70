"""Several methods on one network."""

from __future__ import annotations

import pytest
import torch

from medssl.data.draw import Draw
from medssl.errors import UsageError
from medssl.pretraining.combined import Combined, CombinedSettings
from medssl.training.method import Step
from tests.pretraining.methods import batch_for, build, settings_of, size_of

HEAD = {"projector": {"hidden": 16, "width": 8}}


def combined(**methods: dict[str, object]) -> tuple[Combined, CombinedSettings]:
    settings = CombinedSettings(methods={name.replace("_", "-"): values for name, values in methods.items()})
    settings = settings.resolved(size_of("combined", 3))
    method = build("combined", 3, settings=settings)
    assert isinstance(method, Combined)
    return method, settings


def test_the_loss_is_the_sum_of_what_each_method_alone_would_say() -> None:
    method, settings = combined(mae={}, simclr=HEAD)
    batch = batch_for(method, "combined", settings)
    views = method.views(batch, Draw(0, batch.sample_index))
    terms = method.losses(views, Step(0, 10))
    assert set(terms) == {"mae/reconstruction", "simclr/contrast"}
    alone = method.methods["mae"]
    assert (
        terms["mae/reconstruction"].item() == alone.losses(views.of_method["mae"], Step(0, 10))["reconstruction"].item()
    )
    assert len(views) == 3 == Combined.needs_of(settings).views


def test_each_method_sees_views_of_its_own_purpose() -> None:
    method, settings = combined(mae={}, simclr=HEAD)
    batch = batch_for(method, "combined", settings)
    views = method.views(batch, Draw(0, batch.sample_index))
    assert views.of_method["mae"][0].target is not None and views.of_method["mae"][0].mask is not None
    assert all(view.target is None for view in views.of_method["simclr"])
    assert Combined.purposes(settings) == ("reconstruction", "contrastive")


def test_the_network_is_shared_and_every_head_is_trained_and_saved() -> None:
    method, _ = combined(mae={}, byol=HEAD)
    assert all(part.network is method.network for part in method.methods.values())
    names = {name for name, _ in method.named_parameters()}
    assert {"parts.mae.token", "parts.byol.projector.0.weight"} <= names
    assert not any(name.startswith("parts.byol.network") for name in names), "each weight has one name"


def test_what_one_method_holds_still_learns_where_another_trains_it() -> None:
    method, settings = combined(mae={}, local_contrast={})
    for name, weight in method.network.named_parameters():
        unused = name.startswith("decoder.seg_layers.") and not name.startswith("decoder.seg_layers.2")
        assert weight.requires_grad != unused, name
    assert Combined.decoder_is_trained(settings)


def test_without_a_method_that_trains_the_decoder_it_is_not_transferred() -> None:
    _, settings = combined(simclr=HEAD, vicreg=HEAD)
    assert not Combined.decoder_is_trained(settings)


def test_needs_are_those_of_the_most_demanding_method() -> None:
    _, settings = combined(mae={}, simclr=HEAD)
    needs = Combined.needs_of(settings)
    assert (needs.least_batch, needs.least_volumes) == (2, 2)


def test_what_no_method_reaches_does_not_learn() -> None:
    method, _ = combined(simclr=HEAD, local_contrast={})
    learns = {name for name, weight in method.network.named_parameters() if weight.requires_grad}
    assert any(name.startswith("decoder.stages.0") for name in learns)
    assert not any(name.startswith(("decoder.stages.2", "decoder.seg_layers")) for name in learns)


def test_a_method_that_does_not_use_the_output_takes_any() -> None:
    settings = CombinedSettings(methods={"volume-fusion": {}, "local-contrast": {}}).resolved((16, 16, 16))
    assert Combined.output_channels(1, settings) == 5


def test_methods_that_need_different_outputs_are_refused() -> None:
    settings = CombinedSettings(methods={"mae": {}, "volume-fusion": {}}).resolved((16, 16, 16))
    with pytest.raises(UsageError, match="mae 1, volume-fusion 5"):
        Combined.output_channels(1, settings)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"mae": {}}, "two or more"),
        ({"mae": {}, "combined": {}}, "other than combined"),
        ({"mae": {}, "simcl": {}}, "simclr"),
        ({"mae": {}, "simclr": {"stags": "all"}}, "stages"),
        ({"mae": {}, "simclr": {"embedding_norm": {"cut": 3}}}, "simclr: embedding_norm"),
    ],
)
def test_methods_that_cannot_be_combined_are_named(methods: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CombinedSettings(methods=methods)


def test_views_of_another_method_are_not_guessed_apart() -> None:
    method, _ = combined(mae={}, simclr=HEAD)
    other = build("mae", 3)
    batch = batch_for(other, "mae", settings_of("mae", 3))
    with pytest.raises(ValueError, match=r"Combined\.views"):
        method.losses(other.views(batch, Draw(0, batch.sample_index)), Step(0, 10))


def test_health_carries_the_names_of_the_methods() -> None:
    method, settings = combined(mae={}, simclr=HEAD)
    batch = batch_for(method, "combined", settings)
    with torch.no_grad():
        figures = method.health(method.views(batch, Draw(0, batch.sample_index)))
    assert {"mae/error_to_mean", "simclr/feature_std"} <= set(figures)


def test_heads_of_each_method_are_exported_under_its_name() -> None:
    method, _ = combined(mae={}, voxel_contrast={})
    heads = method.exported_heads()
    assert heads and all(name.startswith("voxel-contrast/") for name in heads)
