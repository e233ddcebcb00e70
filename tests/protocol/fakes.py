"""A data set that exists in names only, and a trainer that draws scores instead of training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from medssl.config import Settings
from medssl.errors import TrainingStopped
from medssl.protocol.division import Case, Division, draw
from medssl.protocol.outcomes import Answers, CaseValues
from medssl.protocol.recipe import DatasetSettings
from medssl.protocol.results import Results
from medssl.protocol.run import protocol
from medssl.protocol.tasks import Job, Result

# What an arm adds to Dice, and the rate at which it is best.
GAIN = {"pretrained": 0.05, "encoder": 0.02, "scratch": 0.0, "strong": 0.01}
BEST = {"pretrained": 1e-2, "encoder": 1e-3, "scratch": 1e-3, "strong": 1e-1}


class FakeTraining(Settings):
    """What a fake run is told."""

    steps: int = 10


class FakeTask:
    """Forty cases; every second patient has two."""

    metrics = ("dice", "jaccard")
    training_model = FakeTraining

    def __init__(self, settings: DatasetSettings) -> None:
        self.settings = settings

    def cases(self) -> list[Case]:
        return [Case(f"case{n:02d}", f"patient{n // 3 * 2 + (n % 3 > 0):02d}", given=n >= 36) for n in range(40)]

    def signature(self) -> str:
        return "forty"

    def labelled(self, division: Division, number: int, seed: int) -> list[str]:
        return draw(division.pool, number, self.settings.split_seed, seed)

    def pool_store(self, *_: Any) -> Path:
        raise AssertionError("a fake pretraining reads nothing")

    def train(self, job: Job) -> Result:
        raise AssertionError("a fake trainer takes its place")


class FakeTrainer:
    """Gives each run scores that are a function of the run alone.

    Args:
        crash_at: Number of the call that is killed.
        fails: Runs whose loss becomes NaN.
        plan: What a run was planned as.
    """

    def __init__(
        self,
        crash_at: int | None = None,
        fails: Callable[[Job], bool] = lambda job: False,
        plan: Callable[[Job], Any] = lambda job: "one plan",
    ) -> None:
        self.crash_at, self.fails, self.plan = crash_at, fails, plan
        self.jobs: list[Job] = []

    def __call__(self, job: Job) -> Result:
        if len(self.jobs) == self.crash_at:
            raise KeyboardInterrupt
        self.jobs.append(job)
        if self.fails(job):
            raise TrainingStopped("The loss became NaN.")
        level = 0.6 + GAIN[job.arm] + 0.02 * np.log(job.labels) - 0.05 * abs(np.log10(job.rate / BEST[job.arm]))
        return Result(
            selection=_values(job.selection, level, job) if job.selection else None,
            validation=_values(job.validation, level, job),
            plan=self.plan(job),
            costs={"train_wall_s": 1.0},
        )

    @property
    def names(self) -> list[str]:
        return [job.name for job in self.jobs]


def _values(cases: Sequence[str], level: float, job: Job) -> CaseValues:
    def dice(case: str) -> float:
        # How hard a case is, the same for every run, and a little luck of the run.
        hard, luck = (
            np.random.default_rng(int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)).normal()
            for text in (case, f"{case}{job.arm}{job.labels}{job.seed}")
        )
        return float(level + 0.1 * hard + 0.02 * luck)

    return CaseValues({"dice": {case: dice(case) for case in cases}})


def answers(skill: float, seed: int, count: int = 60) -> Answers:
    """A classifier's answers on cases of two classes."""
    rng = np.random.default_rng(seed)
    targets = np.arange(count) % 3 % 2
    p = 1 / (1 + np.exp(-(skill * (2.0 * targets - 1) + rng.normal(size=count))))
    names = tuple(f"case{n:02d}" for n in range(count))
    return Answers("multiclass", ("no", "yes"), names, np.stack([1 - p, p], axis=1), targets.astype(np.int64))


def fake_pretrainer(job: Any) -> Path:
    """Write a file that stands for a checkpoint."""
    run: Path = job.folder / "run"
    run.mkdir(parents=True, exist_ok=True)
    (run / "checkpoint_final.pth").write_bytes(b"weights")
    return run


def recipe_values(**changes: Any) -> dict[str, Any]:
    """Return a recipe with two pretrained arms."""
    return {
        "datasets": {"forty": {"task": "segmentation", "path": ".", "validation": 10, "selection": 6, "split_seed": 3}},
        "arms": {"pretrained": {"pretrain": "mae.yaml"}, "encoder": {"same": "pretrained", "transfer_decoder": False}},
        "labels": [2, 8],
        "seeds": [0, 1, 2],
        "rates": [1e-3, 1e-2, 1e-1],
        **changes,
    }


def write_recipe(folder: Path, values: dict[str, Any]) -> Path:
    """Write a recipe, with the pretraining recipe that it names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mae.yaml").write_text("method: mae\n")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(folder: Path, trainer: FakeTrainer, *, name: str = "out", values: Any = None, **options: Any) -> Results:
    """Run a protocol with fakes."""
    recipe = write_recipe(folder / "recipe", values or recipe_values())
    options = {"open_task": FakeTask, "trainer": trainer, "pretrainer": fake_pretrainer, "quiet": True, **options}
    return protocol(recipe, folder / name, **options)
