"""The engine: layout in memory, compiling, and that no step makes the host wait for the device."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from medssl.augmentation.catalogue import CATALOGUE
from medssl.augmentation.policy import PURPOSES, AugmentationSettings, policy_for
from medssl.data.batch import Batch, View, Views
from medssl.data.dataset import BatchArrays
from medssl.data.draw import Draw
from medssl.data.loader import CropLoader
from medssl.data.sampling import CropSettings
from medssl.networks.build import build_network, freeze_unused_outputs
from medssl.preprocessing.store import Store
from medssl.pretraining.mae import MaskedAutoencoder, MaskedAutoencoderSettings
from medssl.pretraining.recipe import settle
from medssl.training.checkpoint import load_checkpoint
from medssl.training.devices import Machine
from medssl.training.engine import Engine
from medssl.training.layout import channels_last, contiguous_weights, lay_out_views, lay_out_weights
from medssl.training.method import Method, Step
from medssl.training.optimisers import OptimiserSettings, build_optimiser
from medssl.training.settings import TrainingSettings
from tests.augmentation.batches import make_batch
from tests.pretraining.conftest import make_store
from tests.training.test_loop import Killed, Loaded, Toy, equal, kill, run, weights
from tests.training.waiting import META, HostWaits, no_waiting

PATCH = (16, 16, 16)


class Wide(Toy):
    """The toy with more channels: the order of memory shows."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1), nn.LeakyReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 1, 1)
            )


def mae(purpose: str = "reconstruction", modality: str = "MR", overrides: dict[str, Any] | None = None) -> Method:
    """Return a masked autoencoder on resenc-xs."""
    network = build_network("resenc-xs", dimensions=3, seed=0)
    freeze_unused_outputs(network)
    policy = policy_for(purpose, {modality}, PATCH, AugmentationSettings(overrides=overrides or {}))
    return MaskedAutoencoder(network, policy, MaskedAutoencoderSettings().resolved(PATCH))


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last_3d if tensor.ndim == 5 else torch.channels_last)


# Layout in memory


def test_weights_and_images_lie_channels_last_and_keep_their_values() -> None:
    method = mae()
    before = copy.deepcopy(method.state_dict())
    lay_out_weights(method)
    wide = [weight for weight in method.parameters() if weight.ndim == 5 and min(weight.shape[1:3]) > 1]
    assert wide and all(is_channels_last(weight) and not weight.is_contiguous() for weight in wide)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    image = torch.randn(2, 3, 4, 5, 6)
    views: Views = [
        View(image, image > 0, torch.zeros(2, 3, 4), target=image),
        View(image, image > 0, image, target=-image),
    ]
    lay_out_views(views)
    assert all(is_channels_last(view.image) and torch.equal(view.image, image) for view in views)
    assert views[0].target is views[0].image and torch.equal(views[1].target, -image)  # type: ignore[arg-type]


def test_a_tensor_without_space_has_no_layout() -> None:
    vector = torch.randn(3, 4)
    assert channels_last(vector) is vector


def test_exported_weights_are_contiguous_and_shared_ones_stay_shared() -> None:
    method = mae()
    plain = contiguous_weights(method.network.state_dict())
    lay_out_weights(method)
    exported = contiguous_weights(method.network.state_dict())
    assert list(exported) == list(plain)
    assert all(value.is_contiguous() and torch.equal(value, plain[name]) for name, value in exported.items())
    assert len({value.data_ptr() for value in exported.values()}) == len({value.data_ptr() for value in plain.values()})


@pytest.mark.parametrize("step", [4, 7])
@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_a_channels_last_run_resumes_bit_for_bit_and_exports_contiguous_weights(
    tmp_path: Path, step: int, optimiser: str
) -> None:
    settings: dict[str, Any] = {"memory_format": "channels_last", "ema": 0.9, "optimiser": {"name": optimiser}}
    method = Wide()
    whole = run(tmp_path / "whole", method=method, **settings)
    assert not method.network[2].weight.is_contiguous()  # type: ignore[union-attr, operator]
    with pytest.raises(Killed):
        run(tmp_path / "broken", method=Wide(), loader=Loaded(at={step: kill}), **settings)
    assert equal(weights(whole), weights(run(tmp_path / "broken", method=Wide(), resume=True, **settings)))
    plain = weights(run(tmp_path / "plain", method=Wide(), **{**settings, "memory_format": "contiguous"}))
    assert list(plain) == list(weights(whole))
    for name, value in weights(whole).items():
        assert value.is_contiguous() and torch.allclose(value, plain[name], atol=1e-5)


@pytest.mark.parametrize(
    ("machine", "compiled", "expected"),
    [
        (Machine(cuda=True, memory_gib=80), True, "channels_last"),
        (Machine(cuda=True, memory_gib=80), False, "contiguous"),
        (Machine(cuda=False), True, "contiguous"),
    ],
)
def test_the_layout_follows_the_machine_and_whether_the_network_is_compiled(
    tmp_path: Path, machine: Machine, compiled: bool, expected: str
) -> None:
    store = make_store(tmp_path / "store")
    assert settle({"compile": compiled}, store, machine, "test").memory_format == expected
    given = settle({"compile": compiled, "memory_format": "contiguous"}, store, machine, "test")
    assert given.memory_format == "contiguous"


# Compiling


def test_compiling_leaves_keys_and_results_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        calls.append(graph)
        return graph.forward

    plain = run(tmp_path / "plain", method=Wide(), steps=4)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    compiled = run(tmp_path / "compiled", method=Wide(), steps=4, compile=True)
    assert calls
    assert equal(weights(plain), weights(compiled))
    step = "checkpoints/step_00000003.pth"
    first, second = (load_checkpoint(tmp_path / name / step) for name in ("plain", "compiled"))
    assert list(first["medssl"]["training"]["method"]) == list(second["medssl"]["training"]["method"])


def test_a_compiler_that_fails_costs_speed_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        raise RuntimeError("no compiler here")

    plain = run(tmp_path / "plain", method=Wide(), steps=3)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    with caplog.at_level(logging.WARNING):
        failed = run(tmp_path / "failed", method=Wide(), steps=3, compile=True)
    assert equal(weights(plain), weights(failed))
    assert "cannot be compiled" in caplog.text and "no compiler here" in caplog.text


@pytest.mark.slow
def test_a_compiled_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"compile": True, "optimiser": {"name": "adamw"}}
    whole = run(tmp_path / "whole", method=Wide(), **settings)
    with pytest.raises(Killed):
        run(tmp_path / "broken", method=Wide(), loader=Loaded(at={5: kill}), **settings)
    assert equal(weights(whole), weights(run(tmp_path / "broken", method=Wide(), resume=True, **settings)))
    plain = weights(run(tmp_path / "plain", method=Wide(), optimiser={"name": "adamw"}))
    assert all(torch.allclose(value, plain[name], atol=1e-4) for name, value in weights(whole).items())


# Waiting


class OnMeta(Fabric):
    """Devices that compute nothing."""

    @property
    def device(self) -> torch.device:
        return META

    def to_device(self, obj: Any) -> Any:
        return obj.to(META)


def on_meta(batch: Batch) -> Batch:
    return batch.to(META)


@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize("size", [PATCH, PATCH[1:]])
def test_no_policy_lets_the_host_wait(purpose: str, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for modality in ("MR", "CT", "US"):
        policy = policy_for(purpose, {modality}, size)
        batch = on_meta(make_batch(policy.read_size, samples=16, modality=modality))
        with no_waiting(monkeypatch):
            for view in policy.two(batch, Draw(0, batch.sample_index)):
                assert view.image.device == META and view.label is not None and view.label.device == META
        monkeypatch.undo()


@pytest.mark.parametrize("name", CATALOGUE)
def test_no_transform_lets_the_host_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modality = next(modality for modality in ("MR", "CT", "US", "PT") if CATALOGUE[name].fits(modality))
    settings = AugmentationSettings(overrides={"intensity": {name: {"probability": 1.0}}})
    changed = 0
    for size in (PATCH, PATCH[1:]):
        policy = policy_for("none", {modality}, size, settings)
        batch = on_meta(make_batch(policy.read_size, samples=3, channels=2, modality=modality))
        with no_waiting(monkeypatch):
            view = policy.view(batch, Draw(0, batch.sample_index))
        monkeypatch.undo()
        changed += int(view.parameters[name]["active"].sum())
    assert changed


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_no_step_of_the_masked_autoencoder_lets_the_host_wait(optimiser: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainingSettings(ema=0.9, accumulate=2, optimiser=OptimiserSettings(name=optimiser))  # type: ignore[arg-type]
    engine = Engine(mae(overrides={"spatial": {"rotation": {"probability": 0.5}}}), settings, OnMeta(accelerator="cpu"))
    engine.start()
    size = engine.method.policy.read_size
    batches = iter([on_meta(make_batch(size, samples=4, first=4 * number, labels=False)) for number in range(4)])
    with no_waiting(monkeypatch):
        for step in range(2):
            figures = engine.step(Step(step, 10), (engine.views(batch) for batch in itertools.islice(batches, 2)))
    assert {"loss", "reconstruction", "gradient_norm"} <= set(figures)
    assert all(value.device == META for value in figures.values())


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.mean().tolist(),
        lambda x: bool((x > 0).any()),
        lambda x: float(x.max()),
        lambda x: x[x > 0],
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.index_select(0, torch.tensor([0]).to(x.device)),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x.masked_select(x > 0),
        lambda x: x * torch.tensor(2.0, device=x.device),
        lambda x: x.copy_(torch.zeros(2, 3)),
        lambda x: x.unique(),
        lambda x: x.cpu(),
    ],
)
def test_what_waits_is_found(wait: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with no_waiting(monkeypatch), pytest.raises((HostWaits, NotImplementedError, RuntimeError)):
        wait(torch.zeros(2, 3, device=META))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_no_step_waits_for_the_gpu(optimiser: str, memory_format: str) -> None:
    settings = TrainingSettings(ema=0.9, optimiser={"name": optimiser}, memory_format=memory_format)  # type: ignore[arg-type]
    fabric = Fabric(accelerator="cuda", devices=1, precision="bf16-mixed")
    fabric.launch()
    engine = Engine(mae(modality="MR"), settings, fabric)
    engine.start()
    batches = [make_batch(engine.method.policy.read_size, samples=4, first=4 * n).to("cuda") for n in range(4)]
    # The first steps find their convolutions and make the optimiser's state.
    for step, batch in enumerate(batches[:2]):
        engine.step(Step(step, 10), iter([engine.views(batch)]))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, batch in enumerate(batches[2:]):
            figures = engine.step(Step(2 + step, 10), iter([engine.views(batch)]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(figures["loss"])


# Optimisers


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimisers_update_each_weight_in_one_pass_and_equal_the_plain_ones(name: str) -> None:
    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    results = []
    for plain in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer = nn.Linear(5, 3)
        optimiser = build_optimiser(OptimiserSettings(name=name), layer)  # type: ignore[arg-type]
        assert isinstance(optimiser, kinds[name]) and optimiser.defaults["fused"]
        if plain:
            for group in optimiser.param_groups:
                group["fused"], group["foreach"] = False, False
        for step in range(3):
            layer(torch.full((2, 5), float(step + 1))).square().sum().backward()
            optimiser.step()
            optimiser.zero_grad()
        results.append(layer.weight.detach())
    assert torch.allclose(*results, rtol=1e-5)


# The way to the device


class Track:
    """Stands in for CUDA's streams and events, and notes what happens in which order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.numbers = itertools.count()

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        track = self

        class Stream:
            def __init__(self, device: Any = None) -> None:
                pass

            def __enter__(self) -> None:
                pass

            def __exit__(self, *error: Any) -> None:
                pass

            def wait_event(self, event: Any) -> None:
                track.events.append(f"wait {event.number}")

        class Event:
            def __init__(self) -> None:
                self.number = next(track.numbers)

            def record(self, stream: Any) -> None:
                track.events.append(f"copy {self.number}")

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: track.events.append("keep"))
        monkeypatch.setattr(Batch, "to", lambda batch, device, non_blocking=False: dataclasses.replace(batch))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_next_batch_is_on_its_way_while_one_is_used_and_labels_travel_narrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    from tests.preprocessing.stores import make_store as make_labelled_store

    store = make_labelled_store(tmp_path / "store", n=2, labels=True)
    settings = CropSettings(patch_size=(8, 8, 8), batch_size=2, labels=True)
    expected = next(CropLoader(store, settings, seed=0).batches(2))
    track = Track()
    track.patch(monkeypatch)
    travelled: list[torch.dtype] = []

    def pinned(values: np.ndarray[Any, Any], dtype: torch.dtype, pin: bool) -> Tensor:
        assert pin
        travelled.append(dtype)
        return torch.from_numpy(values.copy()).to(dtype)

    monkeypatch.setattr("medssl.data.loader._tensor", pinned)
    with CropLoader(store, settings, seed=0, workers=workers, device="cuda") as loader:
        monkeypatch.setattr(loader, "_next_is_there", lambda: True)
        batches = loader.batches()
        taken = [next(batches) for _ in range(3)]
    assert track.events == [
        "copy 0", "copy 1", "wait 0", "keep", "keep",
        "copy 2", "wait 1", "keep", "keep",
        "copy 3", "wait 2", "keep", "keep",
    ]  # fmt: skip
    assert set(travelled) == {torch.float32, torch.int16}
    assert taken[2].label is not None and taken[2].label.dtype == torch.int64
    assert torch.equal(taken[2].label, expected.label) and torch.equal(taken[2].image, expected.image)  # type: ignore[arg-type]


def test_arrays_that_are_read_in_place_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    before = BatchArrays.__init__

    def counted(self: BatchArrays, *arguments: Any, **named: Any) -> None:
        made.append(self)
        before(self, *arguments, **named)

    monkeypatch.setattr(BatchArrays, "__init__", counted)
    store: Store = make_store(tmp_path / "store")
    batches = CropLoader(store, CropSettings(patch_size=(8, 8, 8)), seed=0).batches()
    first, second = next(batches), next(batches)
    assert len(made) == 1 and not torch.equal(first.image, second.image)


# What a bare GPU machine has not

PROGRAM = """
import sys

class Missing:
    names = {names!r}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from pathlib import Path
from medssl.pretraining.run import pretrain
from medssl.pretraining.bench import bench

settings = ["patch_size=[16,16,16]", "batch_size=2", "mask.block=4", "pictures_every=0", "validate_every=0"]
pretrain("mae", Path(sys.argv[1]), Path(sys.argv[2]), overrides=settings, steps=1, device="cpu", workers=1, quiet=True)
assert bench(Path(sys.argv[1]), overrides=settings, device="cpu", workers=0, seconds=0.01, quiet=True).limit
"""
MISSING = (
    "monai", "torchio", "nibabel", "SimpleITK", "polars", "nnunetv2", "batchgeneratorsv2", "batchgenerators",
    "pydicom", "highdicom", "gdcm",
)  # fmt: skip


def test_pretraining_needs_no_library_that_a_bare_gpu_machine_lacks(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store").folder
    program = PROGRAM.format(names=MISSING)
    done = subprocess.run(
        [sys.executable, "-c", program, str(store), str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
