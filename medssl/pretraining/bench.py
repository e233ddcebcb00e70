"""What limits a pretraining on this machine and this store: the Python twin of `medssl bench`.

Reading, augmentation and the step are measured apart, then together as the loop runs them. The engine, the loader and
the policy are those of a run; nothing is written.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medssl import registry
from medssl.augmentation.policy import Policy
from medssl.data.batch import Batch, Views
from medssl.data.loader import STEPS_AHEAD, CropLoader
from medssl.errors import UsageError
from medssl.preprocessing.store import Store
from medssl.pretraining.bench_report import REST, BenchReport, Part, TransformTime, peak_host_gib
from medssl.pretraining.recipe import PretrainingSettings, settle
from medssl.pretraining.run import build_method, given_values, make_loader, policy_of, reader_processes
from medssl.progress import progress
from medssl.training.devices import find_machine, launch, own_random_state
from medssl.training.engine import Engine
from medssl.training.method import Step

# How the time is shared out; the rest goes to warm-up.
SHARES = {"reading": 0.15, "augmentation": 0.15, "transforms": 0.1, "step": 0.25, "whole": 0.25}
# Batches that each part is measured on at least, however slow they are.
LEAST = 2
# Steps are measured in so many turns, and the faster one counts: what else the machine does comes and goes.
TURNS = 2
# Batches that lie ready for the augmentation, so that it does not meet the same ones again and again.
READY = 2


def bench(
    store: Path,
    *,
    method: str | None = None,
    recipe: Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    workers: int | None = None,
    seconds: float = 20.0,
    quiet: bool = False,
) -> BenchReport:
    """Measure how many samples per second each part of a pretraining can do here, and say which of them limits.

    A recipe for several devices is measured on one of them, with its part of the batch.

    Args:
        store: A store of `medssl preprocess`, or an nnU-Net preprocessed folder.
        method: A key of `medssl.registry.METHODS`; None takes the recipe's, or `mae`.
        recipe: YAML of settings, as for `pretrain`.
        overrides: Settings `a.b=c` that win over the recipe.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        workers: Reader processes; by default what a run would take.
        seconds: About how long to measure. Some batches of every part are measured whatever they take, and a network
            that the recipe compiles is compiled before.
        quiet: Show no progress.

    Raises:
        UsageError: If a setting is unknown or does not fit, or `seconds` is not positive.
        DataError: If the store has no training volumes.
    """
    if not seconds > 0:
        raise UsageError(f"--seconds takes a positive number, got {seconds:g}.")
    if method is not None:
        registry.method(method)
    source = Store.open(store)
    settings = _of_one_device(given_values(recipe, overrides, method=method, workers=workers), source, device, recipe)
    fabric = launch(find_machine(device), settings.precision, device)
    kind = registry.method(settings.method).load()
    policy = policy_of(kind, settings, source)
    readers = reader_processes(settings)
    with (
        own_random_state(settings.seed, fabric.device.type == "cuda"),
        make_loader(kind, settings, source, fabric, policy, "train", readers) as loader,
        progress("Measuring", 3 + TURNS, quiet=quiet) as advance,
    ):
        engine = Engine(build_method(kind, settings, policy, loader.channels), settings, fabric)
        engine.start()
        parts, transforms, memory = _Bench(engine, loader, policy, settings, seconds).run(advance)
    return BenchReport(settings, source.info, str(fabric.device), readers, parts, tuple(transforms), memory)


def _of_one_device(values: dict[str, Any], store: Store, device: str, recipe: Path | None) -> PretrainingSettings:
    devices = values.get("devices", 1)
    if isinstance(devices, int) and devices > 1:
        values = {**values, "devices": 1}
        if isinstance(values.get("batch_size"), int):
            values["batch_size"] = max(values["batch_size"] // devices, 1)
    return settle(values, store, find_machine(device), str(recipe or "settings"))


class _Bench:
    """The measurements, one after the other."""

    def __init__(
        self, engine: Engine, loader: CropLoader, policy: Policy, settings: PretrainingSettings, seconds: float
    ) -> None:
        self.engine, self.loader, self.policy, self.settings, self.seconds = engine, loader, policy, settings, seconds
        self.device = engine.fabric.device
        self.steps = 0

    def run(self, advance: Callable[..., None]) -> tuple[dict[str, Part], list[TransformTime], dict[str, float]]:
        """Return the parts, the transforms and the peak of memory in GiB."""
        batches = self.loader.batches(0)
        ready = list(itertools.islice(batches, READY))
        # What the readers had prepared before is not counted.
        for _ in range(STEPS_AHEAD if self.loader.reader_processes else 0):
            next(batches)
        parts = {"reading": self._timed("reading", lambda _: next(batches))}
        advance(1, "augmentation")
        self.engine.views(ready[0])
        parts["augmentation"] = self._timed("augmentation", lambda number: self._views(ready, number))
        advance(1, "each transform")
        transforms = self._transforms(ready)
        advance(1, "steps")
        views = self._views(ready, 0)
        # Only what a run holds too shall lie on the device while its memory is measured.
        ready.clear()
        turns: dict[str, list[Part]] = {"step": [], "whole": []}
        for _ in range(TURNS):
            turns["step"].append(self._fixed(itertools.repeat(views)))
            turns["whole"].append(self._whole())
            advance(1, "steps")
        for name, found in turns.items():
            best = min(found, key=lambda part: part.seconds)
            parts[name] = dataclasses.replace(best, batches=sum(part.batches for part in found))
        memory = {"host": peak_host_gib()}
        if self.device.type == "cuda":
            memory["device"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            memory["device_total"] = torch.cuda.get_device_properties(self.device).total_memory / 2**30
        return parts, transforms, memory

    def _fixed(self, views: Iterator[Views]) -> Part:
        """Measure steps on views that are there already."""
        self._step(views)
        return self._timed("step", lambda _: self._step(views))

    def _whole(self) -> Part:
        """Measure what the loop does: read, augment, step."""
        views = (self.engine.views(batch) for batch in self.loader.batches(self.steps * self.settings.accumulate))
        for _ in range(STEPS_AHEAD if self.loader.reader_processes else 1):
            self._step(views)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return self._timed("whole", lambda _: self._step(views))

    def _timed(self, name: str, one: Callable[[int], Any]) -> Part:
        """Repeat one batch's work until the time of its part is over."""
        # A step takes as many batches as its gradients are averaged over.
        batches = self.settings.accumulate if name in ("step", "whole") else 1
        limit = self.seconds * SHARES[name] / (TURNS if name in ("step", "whole") else 1)
        self._wait()
        began = time.perf_counter()
        count = 0
        while count < LEAST or time.perf_counter() - began < limit:
            one(count)
            count += 1
        self._wait()
        passed = time.perf_counter() - began
        return Part(name, passed / count / batches, self.loader.samples, count * batches)

    def _step(self, views: Iterator[Views]) -> dict[str, Tensor]:
        now = Step(min(self.steps, self.settings.steps - 1), self.settings.steps)
        self.steps += 1
        return self.engine.step(now, itertools.islice(views, self.settings.accumulate))

    def _views(self, ready: list[Batch], number: int) -> Views:
        """Return views of a ready batch with draws of their own."""
        batch = ready[number % len(ready)]
        index = batch.sample_index + number * len(batch)
        return self.engine.views(dataclasses.replace(batch, sample_index=index))

    def _transforms(self, ready: list[Batch]) -> list[TransformTime]:
        """Time each part of the policy, waiting for the device around it; slow ones of libraries one by one."""
        limit = self.seconds * SHARES["transforms"]
        libraries = {transform: transform.seconds for transform in self.policy.library.transforms}
        with clocked(self.policy, self._wait) as clock:
            began = time.perf_counter()
            count = 0
            while count < LEAST or time.perf_counter() - began < limit:
                self._views(ready, count)
                count += 1
            self._wait()
            whole = time.perf_counter() - began
        found = [TransformTime(name, "ours", seconds / count) for name, seconds in clock.items()]
        found += [
            TransformTime(transform.name, "library", (transform.seconds - before) / count)
            for transform, before in libraries.items()
        ]
        rest = whole / count - sum(entry.seconds for entry in found)
        return [*found, TransformTime(REST, "ours", max(rest, 0.0))]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def clocked(policy: Policy, wait: Callable[[], None]) -> Iterator[dict[str, float]]:
    """Measure the seconds that the spatial step and each intensity transform of a policy spend."""
    watched: list[tuple[Any, str, str]] = [(policy.spatial, "spatial", call) for call in ("draw", "apply")]
    watched += [(transform, transform.name, call) for transform in policy.intensity for call in ("draw", "apply_")]
    clock = dict.fromkeys((name for _, name, _ in watched), 0.0)

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            wait()
            began = time.perf_counter()
            result = function(*arguments, **named)
            wait()
            clock[name] += time.perf_counter() - began
            return result

        return call

    for owner, name, call in watched:
        setattr(owner, call, timed(getattr(owner, call), name))
    try:
        yield clock
    finally:
        for owner, _, call in watched:
            delattr(owner, call)
