"""MC-Net+: three decoders on one encoder, targets that do not learn, and an export that is a plain U-Net."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from medssl.networks.build import build_network
from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.mutual_decoders import MutualDecoders, MutualDecodersSettings, RaisingDecoder
from medssl.semisupervised.ramp import RampSettings
from tests.semisupervised.helpers import (
    LATE,
    build,
    equals_supervised_at_weight_zero,
    paired,
    views_of,
    weights_out_of_reach,
)


def settings(weight: float = 1.0, **values: float) -> MutualDecodersSettings:
    return MutualDecodersSettings(unlabelled=RampSettings(weight=weight, fraction=0), **values)  # type: ignore[arg-type]


def test_two_answers_differ_by_their_squared_difference_from_the_sharpened_others() -> None:
    method = build(MutualDecoders, settings(temperature=0.5))
    p = torch.tensor([0.8, 0.6, 0.5])
    logits = [torch.stack([x.log(), (1 - x).log()])[None, :, None, None].expand(1, 2, 2, 2) for x in p]
    sharp = p**2 / (p**2 + (1 - p) ** 2)
    expected = sum(float((p[i] - sharp[j]) ** 2) for i in range(3) for j in range(3) if i != j)
    where = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    assert method.disagreement(logits, where).item() == pytest.approx(expected, rel=1e-4)


def test_a_sharpened_prediction_is_a_target_and_does_not_learn() -> None:
    method = build(MutualDecoders, settings())
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(2, 3, 4, 4, generator=generator).requires_grad_() for _ in range(3)]
    method.disagreement(logits, torch.ones(2, 1, 4, 4, dtype=torch.bool)).backward()
    fixed = [each.detach().softmax(dim=1) for each in logits]
    fixed = [each**10 / (each**10).sum(dim=1, keepdim=True) for each in fixed]
    for own in range(3):
        alone = logits[own].detach().clone().requires_grad_()
        sum((alone.softmax(dim=1) - fixed[other]).square().mean() for other in range(3) if other != own).backward()  # type: ignore[union-attr]
        torch.testing.assert_close(logits[own].grad, alone.grad, rtol=1e-4, atol=1e-7)


def test_all_decoders_learn_labels_and_agree_on_labelled_and_unlabelled_images() -> None:
    method = build(MutualDecoders, settings(supervised=0.25), classes=3)
    views = views_of(method, paired(classes=3, margin=6))
    labelled, view = views
    assert isinstance(labelled, SemiView) and isinstance(view, SemiView)
    with torch.no_grad():
        known, rest = method.decoded(labelled.image), method.decoded(view.image)
    terms = method.losses(views, LATE)
    for name in ("dice", "cross_entropy"):
        found = [method.task.supervised(logits, labelled)[name].item() for logits in known]
        assert terms[name].item() == pytest.approx(0.25 * sum(found), rel=1e-5)
    p = [torch.cat(pair).softmax(dim=1) for pair in zip(known, rest, strict=True)]
    sharp = [each**10 / (each**10).sum(dim=1, keepdim=True) for each in p]
    inside = torch.cat([labelled.inside, view.inside])[:, 0]
    assert not inside.all()
    expected = sum(
        float((p[i] - sharp[j]).square().mean(dim=1)[inside].mean()) for i in range(3) for j in range(3) if i != j
    )
    assert terms["consistency"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_decoders_go_up_by_interpolation_of_two_kinds(dimensions: int) -> None:
    method = build(MutualDecoders, settings(), dimensions=dimensions)
    features = torch.randn(1, 2, *(3,) * dimensions)
    size = (6,) * dimensions
    linear, nearest = method.decoders
    mode = "bilinear" if dimensions == 2 else "trilinear"
    expected = F.interpolate(features, size=size, mode=mode, align_corners=False)
    torch.testing.assert_close(linear._raised(features, size), expected)  # type: ignore[operator]
    torch.testing.assert_close(nearest._raised(features, size), F.interpolate(features, size=size, mode="nearest"))  # type: ignore[operator]


def test_a_transposed_convolution_of_one_kernel_goes_up_as_the_nearest_value_does() -> None:
    unet, other = (build_network("resenc-xs", dimensions=2, out_channels=2, seed=seed) for seed in range(2))
    for layer in unet.decoder.transpconvs:  # type: ignore[union-attr]
        with torch.no_grad():
            layer.weight.copy_(layer.weight.mean(dim=(2, 3), keepdim=True).expand_as(layer.weight))
    image = torch.randn(1, 1, 32, 32)
    stages = unet.encoder(image)  # type: ignore[operator]
    nearest = RaisingDecoder(unet.decoder, "nearest")  # type: ignore[arg-type]
    torch.testing.assert_close(nearest(stages), unet.decoder(stages), rtol=1e-4, atol=1e-5)  # type: ignore[operator]
    # Random kernels keep their size although they differ.
    for layer, narrow in zip(other.decoder.transpconvs, RaisingDecoder(other.decoder, "linear").narrow, strict=True):  # type: ignore[union-attr, arg-type]
        assert narrow.weight.square().mean().item() == pytest.approx(layer.weight.square().mean().item(), rel=1e-4)  # type: ignore[operator]


def test_the_export_is_a_plain_network_that_the_first_decoder_predicts_with() -> None:
    method = build(MutualDecoders, settings())
    assert method.predictor is method.networks[0] and len(method.networks) == 1
    plain = build_network("resenc-xs", dimensions=2, out_channels=2)
    plain.load_state_dict(method.network.state_dict())
    image = torch.randn(1, 1, 16, 16)
    assert torch.equal(plain(image), method.decoded(image)[0])


def test_the_encoder_is_held_once_and_decoders_start_differently() -> None:
    method = build(MutualDecoders, settings())
    encoders = [name for name, _ in method.named_parameters() if "stages.0.blocks" in name and "encoder" in name]
    assert encoders and all(name.startswith("networks.0.encoder") for name in encoders)
    first, second = (decoder.get_parameter("output.weight") for decoder in method.decoders)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dimensions", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_gradients_reach_every_trained_weight(dimensions: int) -> None:
    assert (
        weights_out_of_reach(build(MutualDecoders, settings(), dimensions=dimensions), paired(dimensions=dimensions))
        == []
    )


def test_weight_zero_leaves_one_decoder_and_the_supervised_gradients() -> None:
    method = build(MutualDecoders, settings(0.0))
    assert len(method.decoders) == 0
    assert equals_supervised_at_weight_zero(method, paired())
