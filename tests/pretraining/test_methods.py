"""What must hold of every registered method."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medssl import registry
from medssl.config import Settings
from medssl.data.draw import Draw
from medssl.networks.build import build_network
from medssl.pretraining.run import pretrain
from medssl.pretraining.teacher import Teacher
from medssl.training.checkpoint import find_checkpoint, load_checkpoint
from medssl.training.method import Step
from medssl.transfer.overlay import overlay
from tests.pretraining.conftest import make_store
from tests.pretraining.methods import SMALL, SMALL_HEAD, batch_for, build, cases, settings_of, size_of, two_steps

CASES = cases()
NAMES = sorted(registry.METHODS)
STEP = Step(0, 100)


def steps_of(name: str, dimensions: int, count: int, rate: float = 1e-3) -> list[float]:
    """Return the losses of some steps of AdamW on one batch; its views are drawn anew at each, but for VoCo.

    VoCo's overlap with new bases is as good as noise to so few steps: it learns the same views by heart.
    """
    method, settings = build(name, dimensions), settings_of(name, dimensions)
    batch = batch_for(method, name, settings)
    optimiser = torch.optim.AdamW([w for w in method.parameters() if w.requires_grad], lr=rate)
    found = []
    for index in range(count):
        with torch.no_grad():
            views = method.views(batch, Draw(0 if name == "voco" else index, batch.sample_index))
        loss = torch.stack(list(method.losses(views, Step(index, count)).values())).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        method.after_step(Step(index, count))
        found.append(loss.item())
    return found


@pytest.mark.parametrize(("name", "dimensions"), CASES)
def test_gradients_reach_every_trained_weight_and_no_teacher(name: str, dimensions: int) -> None:
    method, settings = build(name, dimensions), settings_of(name, dimensions)
    batch = batch_for(method, name, settings)
    optimiser = torch.optim.SGD([w for w in method.parameters() if w.requires_grad], lr=0.01)
    # nnU-Net starts the last norm of each residual block at zero: later steps reach what lies before it.
    reached: set[str] = set()
    for index in range(3):
        with torch.no_grad():
            views = method.views(batch, Draw(index, batch.sample_index))
        optimiser.zero_grad()
        # In the middle of the run nothing is held still any more.
        torch.stack(list(method.losses(views, Step(50, 100)).values())).sum().backward()
        for key, weight in method.named_parameters():
            if weight.grad is not None and weight.grad.abs().sum() > 0:
                reached.add(key)
        optimiser.step()
        method.after_step(Step(50, 100))
    missing = [key for key, weight in method.named_parameters() if weight.requires_grad and key not in reached]
    assert not missing
    teachers = [module for module in method.modules() if isinstance(module, Teacher)]
    assert not any(weight.requires_grad for teacher in teachers for weight in teacher.parameters())


@pytest.mark.parametrize(("name", "dimensions"), CASES)
def test_views_and_losses_are_functions_of_seed_index_and_weights(name: str, dimensions: int) -> None:
    values = []
    for seed in (0, 0, 1):
        method, settings = build(name, dimensions), settings_of(name, dimensions)
        batch = batch_for(method, name, settings)
        before = batch.image.clone()
        views = method.views(batch, Draw(seed, batch.sample_index))
        values.append(torch.stack([term.detach() for term in method.losses(views, STEP).values()]))
        assert torch.equal(batch.image, before)
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    assert torch.isfinite(values[0]).all() and values[0].dtype == torch.float32


@pytest.mark.parametrize(("name", "dimensions"), CASES)
def test_looking_at_health_and_pictures_leaves_no_trace(name: str, dimensions: int) -> None:
    method, settings = build(name, dimensions), settings_of(name, dimensions)
    batch = batch_for(method, name, settings)
    views = method.views(batch, Draw(0, batch.sample_index))
    before = {key: value.clone() for key, value in method.state_dict().items()}
    with torch.no_grad():
        figures, pictures = method.health(views), method.pictures(views)
    assert figures and all(isinstance(value, float) for value in figures.values())
    assert any(key.endswith("std") for key in figures), "the guard against collapse needs a figure"
    assert all(image.ndim == dimensions + 2 for image in pictures.values())
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dimensions"), CASES)
def test_the_loss_falls_on_a_few_volumes(name: str, dimensions: int) -> None:
    # The hinge of the variance moves slowly.
    losses = steps_of(name, dimensions, 60, 3e-3 if name == "vicreg" else 1e-3)
    assert sum(losses[-10:]) < sum(losses[:10])


def run(store: Path, out: Path, name: str, *overrides: str, **arguments: Any) -> Path:
    settings = SMALL.get(name, SMALL_HEAD if "projector" in registry.method(name).load_settings().model_fields else {})
    given = [f"{key}={value}" for key, value in settings.items()]
    common = ["network=resenc-xs", "batch_size=4", "log_every=1", "health_every=2", "pictures_every=0", "save_every=2"]
    return pretrain(
        name, store, out, overrides=[*common, *given, *overrides], device="cpu", workers=0, quiet=True, **arguments
    )


def state(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_checkpoint(path)["medssl"]["training"]["method"]
    return found


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Three volumes to train on, by dimensions of the patch."""
    folder = tmp_path_factory.mktemp("stores")
    return {
        2: make_store(folder / "slices", shape=(1, 6, 44, 40)).folder,
        3: make_store(folder / "volumes", shape=(1, 34, 36, 33)).folder,
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_equals_an_uninterrupted_one_and_its_checkpoint_transfers(
    stores: dict[int, Path], tmp_path: Path, name: str
) -> None:
    dimensions = registry.method(name).dimensions[-1]
    patch = f"patch_size={list(size_of(name, dimensions))}"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    final = run(stores[dimensions], whole, name, patch, steps=5)
    shutil.copytree(whole, killed)
    for path in (killed / "checkpoints").iterdir():
        if "00000002" not in path.name:
            path.unlink()
    pretrain(None, stores[dimensions], killed, resume=True, device="cpu", quiet=True)
    first, second = (state(out / "checkpoints" / "step_00000004.pth") for out in (whole, killed))
    # Heads, teachers and queues too, bit for bit.
    assert list(first) == list(second)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    ends = [load_checkpoint(find_checkpoint(out))["network_weights"] for out in (whole, killed)]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())

    content = load_checkpoint(final)
    network = build_network("resenc-xs", dimensions=dimensions, out_channels=3, seed=1)
    report = overlay(network, content["network_weights"], decoder=content["medssl"]["trains_decoder"])
    assert not report.missing and not report.mismatched
    parts = "encoder and decoder" if content["medssl"]["trains_decoder"] else "encoder"
    assert registry.method(name).transfers == parts
    state_dict = network.state_dict()
    for key, value in content["network_weights"].items():
        if key.startswith("encoder.") or (parts != "encoder" and ".seg_layers." not in key):
            assert torch.equal(state_dict[key], value), key


#: Methods whose samples are mixed with others of their own rank: two ranks then draw other partners than one process.
MIXING: set[str] = set()

TWO_RANKS = """
import dataclasses, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from medssl.data.batch import Batch
from medssl.training.distributed import mean_across_ranks, rank
from tests.pretraining.methods import batch_for, build, settings_of, two_steps
torch.set_num_threads(1)
dist.init_process_group("gloo")
for case in sys.argv[2:]:
    name, dimensions = case.split("/")
    method, settings = build(name, int(dimensions)), settings_of(name, int(dimensions))
    batch = batch_for(method, name, settings)
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(Batch)}
    mine = Batch(**{key: value if value is None else value[rank()::2] for key, value in values.items()})
    loss = two_steps(method, mine, mean_across_ranks)
    found = {"loss": mean_across_ranks(loss), "state": method.state_dict(),
             "gradients": {key: weight.grad for key, weight in method.named_parameters() if weight.grad is not None}}
    if rank() == 0:
        torch.save(found, f"{name}_{dimensions}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_equal_one_process_for_every_method(tmp_path: Path) -> None:
    program = tmp_path / "ranks.py"
    program.write_text(TWO_RANKS)
    wanted = [(name, dimensions) for name, dimensions in CASES if name not in MIXING]
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program),
            str(Path(__file__).resolve().parents[2]), *(f"{name}/{dimensions}" for name, dimensions in wanted),
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, dimensions in wanted:
        found = torch.load(tmp_path / f"{name}_{dimensions}.pt", weights_only=True)
        method, settings = build(name, dimensions), settings_of(name, dimensions)
        loss = two_steps(method, batch_for(method, name, settings))
        assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-6), name
        for key, weight in method.named_parameters():
            if weight.grad is not None:
                torch.testing.assert_close(
                    found["gradients"][key], weight.grad, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}"
                )
        for key, value in method.state_dict().items():
            torch.testing.assert_close(found["state"][key], value, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", NAMES)
def test_a_part_of_the_settings_given_in_part_keeps_the_methods_own_defaults(name: str) -> None:
    for field in registry.method(name).load_settings().model_fields.values():
        part = field.get_default(call_default_factory=True)
        if isinstance(part, Settings):
            assert field.annotation is not None and part == field.annotation()
