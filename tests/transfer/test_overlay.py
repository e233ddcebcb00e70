"""Pretrained weights reach the network, and each key's fate is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from medssl.errors import CheckpointError
from medssl.networks.build import build_network
from medssl.transfer.overlay import overlay
from medssl.transfer.source import load_source


def _network(in_channels: int = 1, out_channels: int = 3, name: str = "resenc-xs") -> nn.Module:
    return build_network(
        name, dimensions=3, in_channels=in_channels, out_channels=out_channels, deep_supervision=True, seed=1
    )


def test_encoder_and_decoder_are_taken_and_output_layers_never(checkpoint: Path) -> None:
    source = load_source(checkpoint)
    network = _network()
    heads = {name: value.clone() for name, value in network.state_dict().items() if ".seg_layers." in name}
    report = overlay(network, source.weights, decoder=True)
    for name, value in network.state_dict().items():
        if ".seg_layers." in name:
            assert torch.equal(value, heads[name])
        else:
            assert torch.equal(value, source.weights[name]), name
    assert not report.missing and not report.mismatched
    assert sorted(report.taken + report.not_wanted) == sorted(network.state_dict())
    assert set(report.left) == {name for name in source.weights if ".seg_layers." in name}


def test_encoder_only_leaves_the_decoder_at_its_start(checkpoint: Path) -> None:
    source = load_source(checkpoint)
    network, untouched = _network(), _network()
    overlay(network, source.weights, decoder=False)
    state, start = network.state_dict(), untouched.state_dict()
    assert all(torch.equal(state[name], source.weights[name]) for name in state if name.startswith("encoder."))
    decoder = [name for name in state if name.startswith(("decoder.stages", "decoder.transpconvs"))]
    assert decoder and all(torch.equal(state[name], start[name]) for name in decoder)


def test_more_input_channels_give_the_answer_to_equal_channels(checkpoint: Path) -> None:
    source = load_source(checkpoint)
    one, three = _network(1), _network(3)
    overlay(one, source.weights, decoder=True)
    report = overlay(three, source.weights, decoder=True)
    assert "encoder.stem.convs.0.conv.weight" in report.repeated
    assert torch.equal(
        three.state_dict()["encoder.stem.convs.0.conv.weight"],
        source.weights["encoder.stem.convs.0.conv.weight"].repeat(1, 3, 1, 1, 1) / 3,
    )
    image = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    features = [
        network.eval().encoder(image.expand(-1, count, -1, -1, -1)) for network, count in ((one, 1), (three, 3))
    ]  # type: ignore[operator]
    for first, second in zip(*features, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_prefixes_of_wrappers_and_missing_aliases_do_not_matter(checkpoint: Path) -> None:
    source = load_source(checkpoint)
    bare = {
        f"module._orig_mod.{name}": value
        for name, value in source.weights.items()
        if not name.startswith("decoder.encoder.") and ".all_modules." not in name
    }
    network = _network()
    report = overlay(network, bare, decoder=True)
    assert not report.missing
    assert torch.equal(
        network.state_dict()["decoder.encoder.stem.convs.0.all_modules.0.weight"],
        source.weights["encoder.stem.convs.0.conv.weight"],
    )


def test_other_shapes_and_missing_keys_are_listed(checkpoint: Path) -> None:
    source = load_source(checkpoint)
    weights = dict(source.weights)
    for name in [name for name in weights if "transpconvs.0" in name]:
        weights[name] = torch.zeros(1, 2, 3)
    for name in [name for name in weights if name.startswith("decoder.stages.1.")]:
        del weights[name]
    weights["projector.0.weight"] = torch.zeros(2)
    report = overlay(_network(), weights, decoder=True)
    assert report.mismatched["decoder.transpconvs.0.weight"][0] == [1, 2, 3]
    assert any(name.startswith("decoder.stages.1.") for name in report.missing)
    assert "projector.0.weight" in report.left
    assert report.to_json()["counts"]["missing"] == len(report.missing)


def test_a_strangers_weights_are_refused() -> None:
    with pytest.raises(CheckpointError, match="No weight of the encoder fits"):
        overlay(_network(), {"conv1.weight": torch.zeros(3)}, decoder=True)
    with pytest.raises(CheckpointError, match=r"For example encoder\..*shape"):
        overlay(
            _network(),
            {name: value[..., :1] for name, value in build_network("resenc-s", dimensions=2).state_dict().items()},
            decoder=True,
        )
