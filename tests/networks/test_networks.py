"""Networks by name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from medssl import registry
from medssl.errors import CheckpointError, UsageError
from medssl.networks.architecture import Architecture, architecture
from medssl.networks.build import (
    build_from_architecture,
    build_network,
    count_parameters,
    freeze_decoder,
    freeze_unused_outputs,
)
from medssl.networks.encoder import Encoder

SMALL = ("resenc-xs", "plain-unet-s")


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("name", list(registry.NETWORKS))
def test_the_registry_tells_the_true_number_of_parameters(name: str, dimensions: int) -> None:
    with torch.device("meta"):
        network = build_network(name, dimensions=dimensions)
    assert count_parameters(network) == registry.NETWORKS[name].parameters[dimensions]


def test_resenc_l_has_the_names_and_shapes_of_nnssl() -> None:
    with torch.device("meta"):
        network = build_network("resenc-l", dimensions=3)
    state = network.state_dict()
    assert len(state) == 956
    assert count_parameters(network) == 102_348_965
    counts = {prefix: sum(name.startswith(prefix) for name in state) for prefix in ("encoder.stem", "encoder.stages")}
    assert counts == {"encoder.stem": 8, "encoder.stages": 440}
    assert sum(name.startswith("decoder.encoder.") for name in state) == 448
    assert state["encoder.stages.1.blocks.0.conv1.conv.weight"].shape == (64, 32, 3, 3, 3)
    assert "encoder.stages.1.blocks.0.skip.1.conv.weight" in state


def test_resenc_xs_has_between_half_a_million_and_a_million_weights_in_four_stages() -> None:
    entry = registry.NETWORKS["resenc-xs"]
    assert 500_000 <= entry.parameters[3] <= 1_000_000
    assert len(entry.features) == 4
    assert entry.total_stride == 8


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", [(40, 56, 40), (32, 32, 32), (8, 16, 8), (48, 56)])
def test_output_has_the_size_of_the_input(name: str, shape: tuple[int, ...]) -> None:
    network = build_network(name, dimensions=len(shape), in_channels=2, out_channels=3)
    assert network(torch.randn(1, 2, *shape)).shape == (1, 3, *shape)


@pytest.mark.parametrize("name", SMALL)
def test_deep_supervision_changes_the_output_and_no_weight(name: str) -> None:
    plain = build_network(name, dimensions=2, seed=3)
    deep = build_network(name, dimensions=2, seed=3, deep_supervision=True)
    for (first, a), (second, b) in zip(plain.state_dict().items(), deep.state_dict().items(), strict=True):
        assert first == second
        assert torch.equal(a, b)
    outputs = deep(torch.randn(1, 1, 32, 32))
    assert [tuple(output.shape[2:]) for output in outputs] == [(32, 32), (16, 16), (8, 8)]


def test_a_seed_fixes_the_weights_and_leaves_torchs_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = build_network("resenc-xs", dimensions=2, seed=5)
    assert torch.equal(torch.rand(3), expected)
    second = build_network("resenc-xs", dimensions=2, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_an_architecture_survives_json() -> None:
    import json

    for name in registry.NETWORKS:
        plan = architecture(name, 3)
        assert Architecture.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_nnunet_builds_the_same_network_from_the_architecture() -> None:
    plans = pytest.importorskip("nnunetv2.utilities.get_network_from_plans")
    plan = architecture("resenc-xs", 3)
    theirs = plans.get_network_from_plans(
        plan.network_class_name, plan.arch_kwargs, plan.kw_requires_import, 1, 2, deep_supervision=True
    )
    ours = build_from_architecture(plan, 1, 2, True)
    assert {name: value.shape for name, value in theirs.state_dict().items()} == {
        name: value.shape for name, value in ours.state_dict().items()
    }


def test_anisotropic_strides_and_kernels_are_taken() -> None:
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
    kernels = [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]]
    plan = architecture("resenc-xs", 3, strides=strides, kernel_sizes=kernels)
    assert plan.total_stride == (4, 8, 8)
    network = build_from_architecture(plan, 1, 1)
    assert network(torch.randn(1, 1, 12, 32, 32)).shape == (1, 1, 12, 32, 32)
    assert not plan.is_resenc_l


def test_strides_that_do_not_fit_the_stages_are_named() -> None:
    with pytest.raises(UsageError, match="strides of resenc-xs needs 4 stages of 3 numbers"):
        architecture("resenc-xs", 3, strides=[[1, 1, 1], [2, 2, 2]])


def test_unknown_names_list_near_ones() -> None:
    with pytest.raises(UsageError, match=r"Did you mean .*resenc-xs"):
        build_network("resnet-xs", dimensions=3)


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ((30, 32, 32), r"nearest is \[32, 32, 32\]"),
        ((8, 8, 8), "one voxel"),
        ((32, 32), "has 2 axes"),
        ((0, 8, 8), "nearest"),
    ],
)
def test_patches_that_do_not_fit_are_refused_with_one_that_does(patch: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        architecture("resenc-xs", 3).check_patch(patch)


@pytest.mark.parametrize(
    ("key", "value"),
    [("conv_op", "os.system"), ("nonlin", "torch.nn.modules.module.Module"), ("norm_op", "builtins.eval")],
)
def test_code_that_a_checkpoint_names_is_not_imported(key: str, value: str) -> None:
    plan = architecture("resenc-xs", 3)
    evil = Architecture(plan.network_class_name, {**plan.arch_kwargs, key: value})
    with pytest.raises(CheckpointError, match="not supported"):
        build_from_architecture(evil, 1, 1)


def test_other_network_classes_are_refused() -> None:
    plan = architecture("resenc-xs", 3)
    with pytest.raises(CheckpointError, match="not supported"):
        build_from_architecture(Architecture("subprocess.Popen", plan.arch_kwargs), 1, 1)


def test_the_encoder_owns_no_weights_and_tells_the_true_shapes() -> None:
    network = build_network("resenc-xs", dimensions=3, in_channels=2)
    encoder = Encoder(network)
    assert list(encoder.parameters()) == []
    assert encoder.in_channels == 2
    image = torch.randn(2, 2, 16, 32, 24)
    stages = encoder.stages(image)
    for features, width, stride in zip(stages, encoder.widths, encoder.strides, strict=True):
        assert features.shape == (2, width, *(size // step for size, step in zip((16, 32, 24), stride, strict=True)))
    pooled = encoder.pooled(image)
    assert pooled.shape == (2, encoder.pooled_width)
    assert torch.allclose(pooled, stages[-1].mean(dim=(2, 3, 4)), atol=1e-6)


def test_freezing_leaves_gradients_where_they_are_used() -> None:
    network = build_network("resenc-xs", dimensions=2)
    freeze_unused_outputs(network)
    network(torch.randn(1, 1, 16, 16)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    freeze_decoder(network)
    trained = {name.split(".")[0] for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {"encoder"}


def test_listing_networks_imports_no_torch() -> None:
    code = (
        "import sys; from medssl import registry; [entry.row() for entry in registry.NETWORKS.values()];"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
