"""The product's own engine, loader and policy for a recipe, for benchmarks that time their parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from medssl import registry
from medssl.augmentation.policy import Policy
from medssl.config import apply_overrides
from medssl.data.batch import Views
from medssl.data.loader import CropLoader
from medssl.preprocessing.store import Store
from medssl.pretraining.recipe import PretrainingSettings, settle
from medssl.pretraining.run import build_method, make_loader, policy_of, reader_processes
from medssl.training.devices import find_machine, launch
from medssl.training.engine import Engine
from medssl.training.method import Step


@dataclass
class Parts:
    """What a run is made of.

    Args:
        engine: Takes steps.
        loader: Reads.
        policy: Augments.
        settings: The resolved recipe.
    """

    engine: Engine
    loader: CropLoader
    policy: Policy
    settings: PretrainingSettings

    def __post_init__(self) -> None:
        self._steps = count()

    def step(self, views: Iterator[Views]) -> dict[str, Any]:
        """Take one step on the next views."""
        now = Step(min(next(self._steps), self.settings.steps - 1), self.settings.steps)
        return self.engine.step(now, islice(views, self.settings.accumulate))

    def seen(self, start: int = 0) -> Iterator[Views]:
        """Yield what the network sees of real batches, as the loop does."""
        return (self.engine.views(batch) for batch in self.loader.batches(start))


@contextmanager
def parts_of(store: Store, device: str, overrides: Sequence[str]) -> Iterator[Parts]:
    """Build the parts of a recipe, a masked autoencoder's unless it names another method."""
    settings = settle(apply_overrides({}, overrides), store, find_machine(device), "benchmark")
    fabric = launch(find_machine(device), settings.precision, device)
    kind = registry.method(settings.method).load()
    policy = policy_of(kind, settings, store)
    with make_loader(kind, settings, store, fabric, policy, "train", reader_processes(settings)) as loader:
        engine = Engine(build_method(kind, settings, policy, loader.channels), settings, fabric)
        engine.start()
        yield Parts(engine, loader, policy, settings)
