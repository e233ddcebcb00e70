"""Methods on the V-Net of the literature, which has batch normalisation, dropout and features that are added."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric

from medssl import registry_semisupervised as registry
from medssl.augmentation.policy import policy_for
from medssl.networks.vnet import VNet
from medssl.semisupervised.method import SemiSupervised
from medssl.semisupervised.task import SegmentationTask
from medssl.training.checkpoint import load_checkpoint, save_checkpoint
from medssl.training.devices import own_random_state
from medssl.training.engine import Engine
from medssl.training.guards import CollapseGuard, GuardSettings
from medssl.training.method import Step
from medssl.training.settings import TrainingSettings
from medssl.training.state import LoopState
from tests.semisupervised.helpers import SIZES, paired, total, views_of

DENSE = [name for name, entry in registry.SEMISUPERVISED.items() if "segmentation" in entry.tasks]


def method_of(name: str) -> SemiSupervised:
    """Return a registered method on narrow V-Nets."""
    entry = registry.semisupervised(name)
    kind = entry.load()
    networks = [VNet(filters=2, seed=number) for number in range(kind.network_count)]
    policy = policy_for("weak", {"MR"}, SIZES[3])
    method: SemiSupervised = kind(networks, SegmentationTask(2), policy, entry.load_settings()())
    return method


@pytest.mark.parametrize("name", DENSE)
def test_gradients_reach_every_weight(name: str) -> None:
    method, batch = method_of(name), paired(dimensions=3)
    # Each step drops channels; a method may begin with another stage.
    with own_random_state(0, cuda=False):
        for index in (0, 60, 90):
            total(method.losses(views_of(method, batch, seed=index), Step(index, 100))).backward()
    # Batch normalisation takes the bias of the convolution before it away.
    kernels = {key: weight for key, weight in method.named_parameters() if weight.requires_grad and weight.ndim > 1}
    assert not [key for key, weight in kernels.items() if weight.grad is None or weight.grad.abs().max() == 0]


def test_a_resumed_run_drops_the_same_channels(tmp_path: Path) -> None:
    def begun() -> tuple[Engine, LoopState]:
        settings = TrainingSettings(steps=4)
        engine = Engine(method_of("mean-teacher"), settings, Fabric(accelerator="cpu", devices=1))
        engine.start()
        return engine, LoopState(engine.method, engine.optimiser, None, CollapseGuard(GuardSettings()))

    def stepped(engine: Engine, indices: range) -> dict[str, torch.Tensor]:
        found: dict[str, Any] = {}
        for index in indices:
            batch = paired(dimensions=3, first=2 * index, seed=index)
            found = engine.step(Step(index, 4), [engine.views(batch)])  # type: ignore[arg-type]
        return found

    with own_random_state(0, cuda=False):
        engine, state = begun()
        stepped(engine, range(2))
        save_checkpoint(tmp_path / "step_2.pth", {"network_weights": {}, "training": state.capture()})
        whole = stepped(engine, range(2, 4))
    with own_random_state(7, cuda=False):
        again, state = begun()
        state.restore(load_checkpoint(tmp_path / "step_2.pth")["training"], torch.device("cpu"))
        resumed = stepped(again, range(2, 4))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    pairs = zip(engine.method.state_dict().values(), again.method.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
