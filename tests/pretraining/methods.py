"""Methods on a small network and batch, as the tests of all methods use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from medssl import registry
from medssl.augmentation.policy import AugmentationSettings, Policy, policy_for
from medssl.config import Settings
from medssl.data.batch import Batch
from medssl.data.draw import Draw
from medssl.networks.build import build_network, freeze_decoder, freeze_unused_outputs
from medssl.training.method import Method, Step

#: Settings that make a method small enough for a test, by method; sizes are for patches of 16.
SMALL_HEAD = {"projector": {"hidden": 16, "width": 8}}
# A queue that starts empty lets the loss rise while it fills, so that it is short here.
FAST_TEACHER = {"momentum": 0.9, "final": 0.99}
SMALL: dict[str, dict[str, Any]] = {
    "mae": {"mask": {"block": 4}},
    "dino": {"projector": {"hidden": 16, "width": 32}, "prototypes": 32, "local_crops": 1},
    "moco": {**SMALL_HEAD, "queue": 1, "teacher": FAST_TEACHER},
    "densecl": {**SMALL_HEAD, "queue": 1, "dense_queue": 1, "teacher": FAST_TEACHER},
}
SIZES = {2: (32, 32), 3: (16, 16, 16)}
# What mixes a sample with its batch mates differs between one process and two.
ALONE = AugmentationSettings(overrides={"intensity": {"fourier_mix": None}})


def cases() -> list[tuple[str, int]]:
    """Return each method with each number of dimensions that it works in."""
    return [(name, dimensions) for name, entry in registry.METHODS.items() for dimensions in entry.dimensions]


def size_of(name: str, dimensions: int) -> tuple[int, ...]:
    """Return the patch; VoCo divides it, and its parts must be larger than the network's stride."""
    return (32,) * dimensions if name == "voco" else SIZES[dimensions]


def settings_of(name: str, dimensions: int) -> Settings:
    """Return small settings of a method, resolved for the test's patch."""
    kind = registry.method(name).load_settings()
    values = SMALL.get(name, SMALL_HEAD if "projector" in kind.model_fields else {})
    settings: Settings = kind(**values)
    return settings.resolved(size_of(name, dimensions)) if hasattr(settings, "resolved") else settings


def build(name: str, dimensions: int, seed: int = 0, settings: Settings | None = None) -> Method:
    """Return a method on resenc-xs, the same for the same seed."""
    kind, settings = registry.method(name).load(), settings or settings_of(name, dimensions)
    network = build_network(
        "resenc-xs", dimensions=dimensions, out_channels=kind.output_channels(1, settings), seed=seed
    )
    freeze_unused_outputs(network)
    if not kind.decoder_is_trained(settings):
        freeze_decoder(network)
    policy = policy_for(kind.purposes(settings)[0], {"MR"}, size_of(name, dimensions), ALONE)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        method: Method = kind(network, policy, settings)
    return method


def batch_for(method: Method, name: str, settings: Settings, count: int = 4) -> Batch:
    """Return crops of `count` volumes with structure, as large as the method's policies want to read."""
    policy = method.policy
    assert isinstance(policy, Policy)
    kind = registry.method(name).load()
    windows = [policy.read_size, *(policy.sibling(purpose).read_size for purpose in kind.purposes(settings)[1:])]
    size = tuple(max(edges) for edges in zip(*windows, strict=True))
    whole = (1,) * (3 - len(size)) + size
    return Batch(
        image=torch.stack([blobs(size, number) for number in range(count)]),
        sample_index=torch.arange(count),
        sample_id=torch.arange(count),
        origin_mm=torch.tensor([[10.0 * number, 0, 0] for number in range(count)]),
        spacing_mm=torch.ones(count, 3),
        valid=torch.tensor([[0, edge] for edge in whole]).expand(count, 3, 2).clone(),
        background=torch.zeros(count),
        modality=("MR",) * count,
        patient_key=tuple(f"p{number}" for number in range(count)),
        extent_mm=torch.tensor([[100.0, *whole[1:]]] * count),
    )


def blobs(size: tuple[int, ...], seed: int) -> Tensor:
    """Return a smooth random image, z-scored. Shape: (1, *size)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn((1, 1, *(max(edge // 4, 1) for edge in size)), generator=generator)
    mode = "bilinear" if len(size) == 2 else "trilinear"
    image = torch.nn.functional.interpolate(coarse, size=size, mode=mode, align_corners=False)[0]
    return (image - image.mean()) / image.std()


def two_steps(method: Method, batch: Batch, average: Callable[[Tensor], Tensor] = lambda gradient: gradient) -> Tensor:
    """Take a step of gradient descent in float64 and return the loss of the next, whose gradients stay.

    In float32 a unit at its threshold may fall to either side when rows are summed in another order.
    """
    method.double()
    for index in range(2):
        with torch.no_grad():
            views = method.views(batch, Draw(0, batch.sample_index))
        for view in views:
            view.image = view.image.double()
            view.target = None if view.target is None else view.target.double()
        method.zero_grad()
        loss = torch.stack(list(method.losses(views, Step(50, 100)).values())).sum()
        loss.backward()
        for weight in method.parameters():
            if weight.grad is not None:
                weight.grad = average(weight.grad)
        if index == 0:
            with torch.no_grad():
                for weight in method.parameters():
                    if weight.grad is not None:
                        weight -= 0.01 * weight.grad
            method.after_step(Step(50, 100))
    return loss.detach()
