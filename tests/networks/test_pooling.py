"""Pooled stages, and the classifier that stands on them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from medssl.errors import UsageError
from medssl.networks.architecture import architecture
from medssl.networks.build import build_from_architecture, build_network
from medssl.networks.classifier import Classifier, Head, OrdinalHead
from medssl.networks.encoder import Encoder
from medssl.networks.pooling import chosen_stages, pooled_stages, pooled_width
from medssl.training.temperature import probabilities_of


@pytest.fixture(scope="module", params=[2, 3])
def network(request: pytest.FixtureRequest) -> nn.Module:
    return build_network("resenc-xs", dimensions=request.param, seed=0)


def images(network: nn.Module) -> torch.Tensor:
    three = "Conv3d" in repr(network.encoder.stem)
    return torch.randn(2, 1, *(16,) * (3 if three else 2), generator=torch.Generator().manual_seed(0))


def test_pooled_stages_are_means_over_space_side_by_side(network: nn.Module) -> None:
    encoder = Encoder(network)
    stages = encoder.stages(images(network))
    expected = [[stage[b, c].mean().item() for stage in stages for c in range(stage.shape[1])] for b in range(2)]
    torch.testing.assert_close(pooled_stages(encoder, images(network)), torch.tensor(expected))
    assert pooled_width(encoder) == 16 + 32 + 48 + 64


def test_largest_values_stand_behind_the_means(network: nn.Module) -> None:
    encoder = Encoder(network)
    both = pooled_stages(encoder, images(network), "last", "mean+max")
    last = encoder.stages(images(network))[-1].flatten(2)
    torch.testing.assert_close(both, torch.cat([last.mean(dim=2), last.amax(dim=2)], dim=1))
    assert both.shape[1] == pooled_width(encoder, "last", "mean+max") == 128


def test_the_last_stage_alone_is_what_the_encoder_pools(network: nn.Module) -> None:
    encoder = Encoder(network)
    torch.testing.assert_close(pooled_stages(encoder, images(network), "last"), encoder.pooled(images(network)))


def test_pooling_is_in_float32_whatever_the_network_computed_in() -> None:
    encoder = Encoder(build_network("resenc-xs", dimensions=2, seed=0).bfloat16())
    assert pooled_stages(encoder, torch.zeros(1, 1, 16, 16, dtype=torch.bfloat16)).dtype == torch.float32


def test_stages_count_from_either_end(network: nn.Module) -> None:
    encoder = Encoder(network)
    assert chosen_stages(encoder, (-1, 0)) == (0, 3)
    assert chosen_stages(encoder) == (0, 1, 2, 3)


@pytest.mark.parametrize(("stages", "message"), [((4,), "stages 0 to 3"), ((), "at least one"), ((3, -1), "twice"),
                                                 ("first", "takes all, last")])  # fmt: skip
def test_stages_that_do_not_exist_are_named(network: nn.Module, stages, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        chosen_stages(Encoder(network), stages)


def test_an_unknown_pooling_is_named(network: nn.Module) -> None:
    with pytest.raises(UsageError, match=r"mean or mean\+max"):
        pooled_stages(Encoder(network), images(network), "all", "median")  # type: ignore[arg-type]


def test_the_head_sees_features_of_mean_zero_and_deviation_one() -> None:
    head = Head(3, 2, "multiclass")
    features = torch.randn(50, 3) * torch.tensor([1.0, 100.0, 0.01]) + torch.tensor([5.0, -300.0, 2.0])
    features[:, 2] = 7.0
    head.fit_scale(features)
    seen = (features - head.mean) / head.scale
    torch.testing.assert_close(seen.mean(dim=0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen.std(dim=0, correction=0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-4, rtol=0)


def test_an_untrained_head_says_that_all_classes_are_alike() -> None:
    logits = Head(5, 3, "multiclass")(torch.randn(4, 5))
    torch.testing.assert_close(logits, torch.zeros(4, 3))


def test_probabilities_of_ordered_classes_are_never_negative() -> None:
    head = OrdinalHead(4, 5)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0, 5)
    logits = head(torch.randn(100, 4))
    assert bool((logits.diff(dim=1) <= 0).all())
    values = probabilities_of(logits.detach().double().numpy(), "ordinal")
    assert values.min() >= 0 and values.sum(axis=1) == pytest.approx(1)


def test_two_ordered_classes_need_one_threshold() -> None:
    assert OrdinalHead(4, 2)(torch.randn(3, 4)).shape == (3, 1)


@pytest.mark.parametrize(
    ("stages", "trained"), [(0, set()), (1, {"3"}), (2, {"2", "3"}), (None, {"0", "1", "2", "3", "stem"})]
)
def test_only_the_coarsest_stages_are_trained(network: nn.Module, stages: int | None, trained: set[str]) -> None:
    classifier = Classifier(network, 2, "multiclass")
    classifier.freeze(stages)
    found = {
        name.split(".")[2] if ".stages." in name else name.split(".")[1]
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }
    assert found == trained
    assert all(parameter.requires_grad for parameter in classifier.head.parameters())


def test_more_stages_than_there_are_cannot_be_trained(network: nn.Module) -> None:
    with pytest.raises(UsageError, match="has 4 stages"):
        Classifier(network, 2, "multiclass").freeze(5)


def test_a_frozen_encoder_stays_in_evaluation() -> None:
    plan = architecture("resenc-xs", 2)
    with_batch_norm = {**plan.arch_kwargs, "norm_op": "torch.nn.modules.batchnorm.BatchNorm2d"}
    network = build_from_architecture(dataclasses.replace(plan, arch_kwargs=with_batch_norm), 1, 1, seed=0)
    classifier = Classifier(network, 2, "multiclass")
    classifier.freeze(0)
    classifier.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    classifier(torch.randn(3, 1, 16, 16))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert classifier.head.training


def test_gradients_reach_the_encoder_and_not_the_decoder() -> None:
    network = build_network("resenc-xs", dimensions=2, seed=0)
    classifier = Classifier(network, 2, "multiclass")
    nn.init.normal_(classifier.head.linear.weight)
    classifier(torch.randn(2, 1, 16, 16)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.encoder.parameters())
    assert all(parameter.grad is None for parameter in network.decoder.stages.parameters())
