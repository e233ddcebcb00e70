"""What `medssl bench` says of a store and a machine."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medssl.augmentation.spatial import Spatial
from medssl.cli import main
from medssl.data.dataset import CropReader
from medssl.errors import UsageError
from medssl.pretraining.bench import bench
from medssl.pretraining.bench_report import BenchReport, Part, TransformTime
from medssl.pretraining.mae import MaskedAutoencoder
from medssl.pretraining.recipe import PretrainingSettings

TINY = ("patch_size=[16,16,16]", "batch_size=2", "mask.block=4")
# Far longer than anything that a tiny batch costs here.
SLOW_S = 0.4


def measure(store: Path, *more: str, **arguments: Any) -> BenchReport:
    """Measure with as few batches as there can be."""
    given = {"device": "cpu", "workers": 0, "seconds": 0.01, "quiet": True, **arguments}
    return bench(store, overrides=(*TINY, *more), **given)


def slowed(function: Any) -> Any:
    """Return the function with a sleep before it."""

    def call(*arguments: Any, **named: Any) -> Any:
        time.sleep(SLOW_S)
        return function(*arguments, **named)

    return call


def report(reading: float, augmentation: float, step: float, *, workers: int = 0, device: str = "cpu") -> BenchReport:
    """Return a report of given seconds per batch."""
    seconds = {
        "reading": reading, "augmentation": augmentation, "step": step, "whole": reading + augmentation + step,
    }  # fmt: skip
    parts = {name: Part(name, value, 4, 3) for name, value in seconds.items()}
    transforms = (
        TransformTime("blur", "ours", augmentation / 2),
        TransformTime("torchio.RandomMotion", "library", 0.1),
    )
    memory = {"host": 1.0} if device == "cpu" else {"host": 1.0, "device": 10.0, "device_total": 80.0}
    return BenchReport(
        PretrainingSettings(precision="float32"), {"volumes": [{}]}, device, workers, parts, transforms, memory
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_every_figure_is_measured_and_positive(store: Path, workers: int) -> None:
    found = measure(store, workers=workers)
    assert list(found.parts) == ["reading", "augmentation", "step", "whole"]
    assert all(part.samples_per_second > 0 and part.batches >= 2 for part in found.parts.values())
    assert found.memory["host"] > 0 and found.workers == workers
    assert found.parts["whole"].seconds > found.parts["augmentation"].seconds


def test_each_transform_of_the_policy_has_its_time(store: Path) -> None:
    override = "augmentation.overrides={intensity: {noise: {probability: 1.0}, blur: {probability: 1.0}}}"
    times = {entry.name: entry.seconds for entry in measure(store, override).transforms}
    assert {"spatial", "noise", "blur", "masks and the rest"} == set(times)
    assert all(value > 0 for value in times.values())


def test_a_transform_of_a_library_has_its_time_too(store: Path) -> None:
    pytest.importorskip("torchio")
    override = "augmentation.overrides={library: [{transform: torchio.RandomNoise, probability: 1.0}]}"
    times = {(entry.name, entry.kind): entry.seconds for entry in measure(store, override).transforms}
    assert times["torchio.RandomNoise", "library"] > 0


def test_the_policy_is_as_before_when_its_transforms_were_timed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Spatial] = []
    before = Spatial.__init__

    def noted(self: Spatial, *arguments: Any, **named: Any) -> None:
        before(self, *arguments, **named)
        made.append(self)

    monkeypatch.setattr(Spatial, "__init__", noted)
    measure(store)
    assert made and not any({"draw", "apply"} & set(vars(spatial)) for spatial in made)


@pytest.mark.parametrize(
    ("owner", "name", "part"),
    [(CropReader, "read", "reading"), (Spatial, "apply", "augmentation"), (MaskedAutoencoder, "losses", "step")],
)
def test_the_part_that_was_slowed_is_named(
    store: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, part: str
) -> None:
    monkeypatch.setattr(owner, name, slowed(getattr(owner, name)))
    found = measure(store)
    assert found.limit == part and found.verdict.startswith(f"The {part} limits")
    assert found.parts[part].seconds > SLOW_S
    assert found.advice


def test_reading_ahead_limits_only_beyond_all_other_work_together() -> None:
    assert report(0.5, 0.3, 0.3).limit == "reading"
    assert report(0.5, 0.31, 0.3, workers=1).limit == "augmentation"
    assert report(0.7, 0.3, 0.31, workers=1).limit == "reading"
    assert report(0.5, 0.3, 0.31, device="cuda:0").limit == "step"


def test_advice_says_how_many_workers_would_keep_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    slow = report(2.0, 0.2, 0.8, workers=1)
    assert "Raise --workers from 1 to 2" in slow.advice[0]
    assert any("--codec int16" in line for line in slow.advice)
    much = report(9.0, 0.2, 0.8, workers=1)
    assert "to 4" in much.advice[0] and "9 would keep up" in much.advice[0]


def test_advice_names_the_slowest_transforms() -> None:
    lines = report(0.01, 1.0, 0.5).advice
    assert "blur takes 500 ms of 1e+03 ms" in lines[0] and "augmentation.overrides.intensity.blur" in lines[0]
    assert "library list" in lines[1]


def test_advice_on_a_step_names_memory_that_is_left() -> None:
    lines = report(0.01, 0.01, 1.0, device="cuda:0", workers=2).advice
    assert any("12 % of the device's memory" in line for line in lines)


def test_a_recipe_for_several_devices_is_measured_on_one_with_its_part_of_the_batch(store: Path) -> None:
    found = bench(
        store, overrides=(*TINY, "batch_size=4", "devices=2"), device="cpu", workers=0, seconds=0.01, quiet=True
    )
    assert found.settings.devices == 1 and found.parts["whole"].samples == 2


def test_accumulated_batches_are_counted_one_by_one(store: Path) -> None:
    found = measure(store, "accumulate=2")
    assert found.parts["step"].batches % 2 == 0


def test_json_can_be_read_and_names_no_path(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    monkeypatch.chdir(tmp_path)
    settings = [argument for override in TINY for argument in ("--set", override)]
    arguments = ["--store", str(store), "--device", "cpu", "--workers", "0", "--seconds", "0.01", "--json", *settings]
    monkeypatch.setattr(sys, "argv", ["medssl", "bench", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    out = capsys.readouterr().out
    content = json.loads(out)
    assert content["limit"] in ("reading", "augmentation", "step")
    assert set(content["parts"]) == {"reading", "augmentation", "step", "whole"}
    assert str(store) not in out and "volume-0" not in out
    assert not list(tmp_path.iterdir())
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


def test_people_get_a_table(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from medssl.screen import show

    show(measure(store), as_json=False)
    out = capsys.readouterr().out
    assert "samples per second" in out and "limits" in out and "Peak memory" in out


def test_what_is_not_there_is_named(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        bench(tmp_path / "nothing", device="cpu", quiet=True)
    with pytest.raises(UsageError, match="cannot be read"):
        bench(store, recipe=tmp_path / "nothing.yaml", device="cpu", quiet=True)
    with pytest.raises(UsageError, match="Did you mean"):
        measure(store, "batchsize=2")
    with pytest.raises(UsageError, match="Did you mean mae"):
        measure(store, method="mea")
    with pytest.raises(UsageError, match="--seconds"):
        measure(store, seconds=0)


def test_the_random_state_of_the_caller_is_left_as_it_was(store: Path) -> None:
    before: Tensor = torch.get_rng_state()
    measure(store)
    assert torch.equal(torch.get_rng_state(), before)
