"""The V-Net of the semi-supervised literature."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medssl.networks.build import count_parameters
from medssl.networks.encoder import Encoder
from medssl.networks.vnet import VNet


def small(**changes: object) -> VNet:
    """Return a narrow one."""
    return VNet(**{"filters": 2, "seed": 0, **changes})  # type: ignore[arg-type]


def test_it_has_as_many_weights_as_the_literature_counts() -> None:
    with torch.device("meta"):
        assert count_parameters(VNet()) == 9_448_866


def test_stages_have_as_many_convolutions_as_the_literature_says() -> None:
    network = small()
    counts = [
        [sum(isinstance(layer, nn.Conv3d) and layer.kernel_size == (3, 3, 3) for layer in stage.modules()) for stage in
         part.stages]
        for part in (network.encoder, network.decoder)
    ]  # fmt: skip
    assert counts == [[1, 2, 3, 3, 3], [3, 3, 2, 1]]


def test_the_output_has_the_grid_of_the_input_and_the_coarsest_stage_a_sixteenth() -> None:
    network = small(in_channels=2, classes=3)
    image = torch.randn(1, 2, 16, 32, 48)
    assert network(image).shape == (1, 3, 16, 32, 48)
    assert [tuple(skip.shape[1:]) for skip in network.encoder(image)][::4] == [(2, 16, 32, 48), (32, 1, 2, 3)]


def test_medssls_encoder_reads_its_widths_and_strides() -> None:
    encoder = Encoder(small(in_channels=3))
    assert (encoder.in_channels, encoder.widths) == (3, (2, 4, 8, 16, 32))
    assert encoder.strides[-1] == (16, 16, 16)


def test_a_stage_adds_what_nnunets_decoders_lay_side_by_side() -> None:
    network = small().eval()
    raised, skip = torch.randn(2, 1, 16, 4, 4, 4)
    stage = network.decoder.stages[0]
    expected = stage.convolutions(stage.raised(raised) + skip)  # type: ignore[operator]
    assert torch.equal(stage(torch.cat([raised, skip], dim=1)), expected)


def test_whole_channels_are_dropped_at_the_bottleneck_and_before_the_output_in_training_alone() -> None:
    network = small(filters=16)
    seen: list[torch.Tensor] = []
    network.decoder.seg_layers[0].register_forward_hook(lambda layer, given, found: seen.append(given[0]))
    network.decoder.stages[0].convolutions.register_forward_hook(lambda layer, given, found: seen.append(given[0]))  # type: ignore[union-attr]
    image = torch.randn(1, 1, 16, 16, 32)
    deepest = network.encoder(image)[-1]
    # Without it a channel is nowhere positive now and then, but not half of them.
    assert 0.3 < float((deepest.flatten(2).amax(dim=2) == 0).float().mean()) < 0.7
    network(image)
    assert 2 <= int((seen[-1].flatten(2).abs().amax(dim=2) == 0).sum()) <= 14
    network.eval()
    assert torch.equal(network(image), network(image))


@pytest.mark.parametrize("seed", [0, 3])
def test_a_seed_fixes_the_weights_and_leaves_torchs_generator_alone(seed: int) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = small(seed=seed)
    assert torch.equal(torch.rand(3), expected)
    second, other = small(seed=seed), small(seed=seed + 1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
