"""The encoder on visible voxels only."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from medssl.augmentation.masking import block_mask
from medssl.data.draw import Draw
from medssl.errors import UsageError
from medssl.networks.architecture import Architecture, architecture
from medssl.networks.build import build_from_architecture, build_network
from medssl.networks.sparse import SparseEncoder, any_visible, sparse_instance_norm

NETWORKS = ("resenc-xs", "plain-unet-s")
SIZES = ((16, 16, 16), (16, 24))


def network_of(name: str, dimensions: int, **kwargs: Any) -> nn.Module:
    """Return a network all of whose paths count: nnU-Net starts the last norm of each residual block at zero."""
    network = build_network(name, dimensions=dimensions, seed=0, **kwargs)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def image_and_mask(size: tuple[int, ...], block: int = 4, ratio: float = 0.75) -> tuple[Tensor, Tensor]:
    image = torch.randn((2, 1, *size), generator=torch.Generator().manual_seed(2))
    return image, ~block_mask(Draw(0, [0, 1]), size, block, ratio)


def under_the_mask(visible: Tensor, feature: Tensor) -> Tensor:
    """Return where a feature's cell covers hidden voxels only. Shape: (B, 1, *spatial), bool."""
    stride = [edge // cells for edge, cells in zip(visible.shape[2:], feature.shape[2:], strict=True)]
    pool = F.avg_pool3d if visible.ndim == 5 else F.avg_pool2d
    return pool((~visible).float(), stride) == 1


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", SIZES)
def test_with_nothing_hidden_it_is_the_encoder(name: str, size: tuple[int, ...]) -> None:
    network = network_of(name, len(size), in_channels=2).double()
    image = torch.randn(2, 2, *size, dtype=torch.float64)
    found = SparseEncoder(network)(image, torch.ones(2, 1, *size, dtype=torch.bool))
    for feature, expected in zip(found, network.encoder(image), strict=True):  # type: ignore[operator]
        torch.testing.assert_close(feature, expected)


def test_with_nothing_hidden_it_is_an_encoder_of_uneven_strides() -> None:
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 1]]
    kernels = [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
    network = network_of("resenc-xs", 3, strides=strides, kernel_sizes=kernels).double()
    image = torch.randn(1, 1, 4, 16, 8, dtype=torch.float64)
    found = SparseEncoder(network)(image, torch.ones(1, 1, 4, 16, 8, dtype=torch.bool))
    for feature, expected in zip(found, network.encoder(image), strict=True):  # type: ignore[operator]
        torch.testing.assert_close(feature, expected)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_encoder_with_every_layer_masked(name: str, size: tuple[int, ...]) -> None:
    network = network_of(name, len(size)).double()
    image, visible = image_and_mask(size)
    image = image.double()
    found = SparseEncoder(network)(image, visible)

    def mask_of(feature: Tensor) -> Tensor:
        return ~under_the_mask(visible, feature)

    def mask_output(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output * mask_of(output)

    def norm_visible(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return slow_norm(inputs[0], mask_of(output), module.weight, module.bias)  # type: ignore[arg-type]

    for module in network.encoder.modules():  # type: ignore[union-attr]
        if isinstance(module, (_ConvNd, nn.AvgPool2d, nn.AvgPool3d)):
            module.register_forward_hook(mask_output)
        elif isinstance(module, _InstanceNorm):
            module.register_forward_hook(norm_visible)
    for feature, expected in zip(found, network.encoder(image * visible), strict=True):  # type: ignore[operator]
        torch.testing.assert_close(feature, expected)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("block", [2, 4, 8])
def test_changing_hidden_voxels_changes_no_feature_at_any_stage(name: str, size: tuple[int, ...], block: int) -> None:
    encoder = SparseEncoder(network_of(name, len(size)))
    image, visible = image_and_mask(size, block)
    before = encoder(image, visible)
    for value in (1e6, float("nan"), float("inf")):
        after = encoder(torch.where(visible, image, value), visible)
        assert all(torch.equal(first, second) for first, second in zip(before, after, strict=True))
    # Visible ones do matter, down to the bottleneck.
    changed = encoder(torch.where(visible, image + torch.randn_like(image), image), visible)
    assert all((first - second).abs().max() > 1e-3 for first, second in zip(before, changed, strict=True))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("block", [4, 8])
def test_cells_that_are_all_hidden_have_no_feature_at_any_stage(name: str, size: tuple[int, ...], block: int) -> None:
    encoder = SparseEncoder(network_of(name, len(size)))
    image, visible = image_and_mask(size, block)
    for feature, mask in zip(encoder(image, visible), encoder.visible_stages(visible), strict=True):
        assert torch.equal(mask, ~under_the_mask(visible, feature))
        assert not mask.all()
        assert (feature[(~mask).expand_as(feature)] == 0).all()
        assert (feature.abs().sum(dim=1, keepdim=True)[mask] > 0).all()


def test_no_gradient_comes_from_hidden_voxels_and_every_weight_gets_one() -> None:
    network = network_of("resenc-xs", 3)
    image, visible = image_and_mask((16, 16, 16))
    image = torch.where(visible, image, float("nan")).requires_grad_()
    sum((feature * torch.randn_like(feature)).sum() for feature in SparseEncoder(network)(image, visible)).backward()
    assert image.grad is not None
    assert (image.grad[~visible] == 0).all() and (image.grad[visible] != 0).any()
    for name, parameter in network.encoder.named_parameters():  # type: ignore[union-attr]
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


def test_batch_mates_do_not_matter() -> None:
    encoder = SparseEncoder(network_of("resenc-xs", 3).double())
    image, visible = image_and_mask((16, 16, 16))
    together, alone = encoder(image.double(), visible), encoder(image[1:].double(), visible[1:])
    for first, second in zip(together, alone, strict=True):
        torch.testing.assert_close(first[1:], second)


def test_threads_with_masks_of_their_own_do_not_disturb_each_other() -> None:
    encoder = SparseEncoder(network_of("resenc-xs", 2))
    cases = [image_and_mask((32, 32), 4, ratio) for ratio in (0.25, 0.75)]
    expected = [encoder(*case) for case in cases]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            found = encoder(*cases[number])
            if not all(torch.equal(a, b) for a, b in zip(found, expected[number], strict=True)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_it_adds_no_weight_and_leaves_the_network_as_it_was() -> None:
    network = network_of("plain-unet-s", 3)
    image, visible = image_and_mask((16, 16, 16))
    names, plain = list(network.state_dict()), network(image)
    encoder = SparseEncoder(network)
    encoder(image, visible)
    assert list(encoder.state_dict()) == [] and list(encoder.parameters()) == []
    assert list(network.state_dict()) == names and torch.equal(network(image), plain)
    assert all(not module._forward_hooks for module in network.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_traced_as_one_program(name: str) -> None:
    encoder = SparseEncoder(network_of(name, 3).double())
    image, visible = image_and_mask((16, 16, 16))
    image = image.double()
    compiled: Callable[..., list[Tensor]] = torch.compile(encoder, backend="aot_eager", fullgraph=True, dynamic=False)
    for first, second in zip(compiled(image, visible), encoder(image, visible), strict=True):
        torch.testing.assert_close(first, second)
    found = compiled(torch.where(visible, image, 1e6), visible)
    assert all(torch.equal(first, second) for first, second in zip(found, compiled(image, visible), strict=True))


def test_what_does_not_fit_is_named() -> None:
    encoder = SparseEncoder(network_of("resenc-xs", 2))
    image, visible = image_and_mask((16, 16))
    with pytest.raises(ValueError, match=r"The mask needs shape \(2, 1, 16, 16\) and bool, got .* torch.float32"):
        encoder(image, visible.float())
    with pytest.raises(ValueError, match="The mask needs shape"):
        encoder(image, visible[:1])
    with pytest.raises(ValueError, match=r"A mask of \(12, 12\) has no cells of \(1, 8\)"):
        any_visible(visible[..., :12, :12], (1, 8))


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_op": "torch.nn.BatchNorm3d"},
        {"norm_op_kwargs": {"eps": 1e-5, "affine": True, "track_running_stats": True}},
    ],
)
def test_norms_that_would_see_hidden_voxels_are_refused(changes: dict[str, Any]) -> None:
    plan = architecture("resenc-xs", 3)
    other = Architecture(plan.network_class_name, {**plan.arch_kwargs, **changes})
    with pytest.raises(UsageError, match=r"layer stem\.convs\.0\.norm is a (Batch|Instance)Norm3d"):
        SparseEncoder(build_from_architecture(other, 1, 1))


def test_a_cell_is_visible_if_any_of_its_voxels_is() -> None:
    visible = torch.rand((2, 1, 4, 6, 3), generator=torch.Generator().manual_seed(0)) < 0.15
    found = any_visible(visible, (2, 3, 1))
    assert found.shape == (2, 1, 2, 2, 3) and not found.all() and found.any()
    for sample in range(2):
        for z, y, x in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3)).tolist():
            cell = visible[sample, 0, 2 * z : 2 * z + 2, 3 * y : 3 * y + 3, x]
            assert found[sample, 0, z, y, x].item() == any(cell.flatten().tolist())


def slow_norm(features: Tensor, visible: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Gather the visible positions of each sample and channel, normalise them, put them back."""
    found = torch.zeros_like(features)
    for sample in range(features.shape[0]):
        where = visible[sample, 0]
        for channel in range(features.shape[1]):
            values = features[sample, channel][where]
            if values.numel():
                normed = (values - values.mean()) / torch.sqrt(values.var(correction=0) + eps)
                found[sample, channel][where] = normed * weight[channel] + bias[channel]
    return found


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (3, 2, 7, 5)])
def test_the_norm_equals_its_definition_whatever_stands_at_hidden_positions(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    features = 3 + 2 * torch.randn(shape, generator=generator)
    visible = torch.rand((shape[0], 1, *shape[2:]), generator=generator) < 0.4
    weight, bias = torch.randn(shape[1], generator=generator), torch.randn(shape[1], generator=generator)
    expected = slow_norm(features, visible, weight, bias)
    for value in (0.0, 1e6, float("nan")):
        found = sparse_instance_norm(torch.where(visible, features, value), visible, weight, bias)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_norm_of_everything_is_torchs() -> None:
    features = torch.randn(2, 3, 4, 5, 6)
    everything = torch.ones(2, 1, 4, 5, 6, dtype=torch.bool)
    torch.testing.assert_close(sparse_instance_norm(features, everything), F.instance_norm(features))


def test_a_single_visible_position_becomes_the_shift_and_none_becomes_zero() -> None:
    features = torch.randn(2, 2, 3, 3, requires_grad=True)
    visible = torch.zeros(2, 1, 3, 3, dtype=torch.bool)
    visible[0, 0, 1, 1] = True
    found = sparse_instance_norm(features, visible, torch.ones(2), torch.tensor([0.5, -2.0]))
    assert found[0, :, 1, 1].tolist() == [0.5, -2.0]
    assert (found[~visible.expand_as(found)] == 0).all()
    found.sum().backward()
    assert features.grad is not None and features.grad.isfinite().all()


def test_gradients_of_the_norm_match_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    features, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 2, 3, 4), (2,), (2,))
    )
    visible = torch.rand((2, 1, 3, 4), generator=generator) < 0.5
    assert torch.autograd.gradcheck(lambda x, w, b: sparse_instance_norm(x, visible, w, b), (features, weight, bias))


def test_the_norm_of_narrow_numbers_is_computed_in_float32() -> None:
    features = 100 + torch.randn((1, 2, 40, 40), generator=torch.Generator().manual_seed(0))
    visible = torch.rand((1, 1, 40, 40), generator=torch.Generator().manual_seed(1)) < 0.5
    narrow = features.bfloat16()
    found = sparse_instance_norm(narrow, visible)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), sparse_instance_norm(narrow.float(), visible), rtol=1e-2, atol=1e-2)
