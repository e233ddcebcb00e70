"""Runs one data set's jobs in order: the grid of rates first, then the chosen rate; what is scored already is read."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl.config import Settings
from medssl.errors import EXIT_FAILURE, DataError, TrainingStopped, UsageError
from medssl.files import write_json
from medssl.protocol.division import Division
from medssl.protocol.outcomes import read_outcome, require_cases
from medssl.protocol.pretraining import Pretrainer, PretrainingJob, checkpoint_of, weights_hash
from medssl.protocol.recipe import DatasetSettings, Recipe
from medssl.protocol.results import Entry, choose_rate
from medssl.protocol.tasks import Job, Task, Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A data set, ready to run.

    Args:
        name: Its name in the recipe.
        settings: What the recipe says of it.
        task: Its cases and how to train on them.
        division: Its parts.
        training: What all arms share.
        metric: What chooses rates and is tested.
        drawn: Labelled cases by number and seed.
    """

    name: str
    settings: DatasetSettings
    task: Task
    division: Division
    training: Settings
    metric: str
    drawn: Mapping[tuple[int, int], tuple[str, ...]]


def resolve_checkpoints(
    plan: Recipe, dataset: Prepared, out: Path, pretrainer: Pretrainer, device: str, workers: int | None
) -> dict[str, Path | None]:
    """Return where each arm's weights come from; pretrainings are made first."""
    found: dict[str, Path | None] = {}
    arms = plan.every_arm()
    for name, arm in sorted(arms.items(), key=lambda item: item[1].same is not None):
        if arm.pretrain is not None:
            folder = out / "pretraining" / dataset.name / name
            logger.info("%s: pretraining %s on %d images.", dataset.name, name, len(dataset.division.pool))
            job = PretrainingJob(
                dataset.task, dataset.division.pool, arm.pretrain, folder, device=device, workers=workers
            )
            found[name] = checkpoint_of(job, pretrainer)
        elif arm.same is not None:
            found[name] = found[arm.same]
        else:
            found[name] = arm.checkpoint if isinstance(arm.checkpoint, Path) else None
    return {name: found[name] for name in arms}


class Runner:
    """All runs of one data set.

    Args:
        plan: The recipe.
        dataset: The data set.
        out: Folder of the protocol.
        checkpoints: Where each arm's weights come from.
        trainer: Trains and measures.
        device: As in `medssl finetune`.
        workers: As in `medssl finetune`.
    """

    def __init__(
        self,
        plan: Recipe,
        dataset: Prepared,
        out: Path,
        checkpoints: Mapping[str, Path | None],
        trainer: Trainer,
        device: str,
        workers: int | None,
    ) -> None:
        self.plan, self.dataset, self.out = plan, dataset, out
        self.checkpoints, self.trainer = checkpoints, trainer
        self.device, self.workers = device, workers
        self.hashes = {name: weights_hash(path) for name, path in checkpoints.items()}
        self.plans: dict[tuple[int, int], tuple[str, Any]] = {}

    def entries(self) -> Iterator[Entry]:
        """Yield every run: the grid on the first seeds, then the chosen rate on the others."""
        plan = self.plan
        looking, others = plan.seeds[: plan.rate_seeds], plan.seeds[plan.rate_seeds :]
        for labels in dict.fromkeys(count for count, _ in self.dataset.drawn):
            for arm in plan.every_arm():
                tried = []
                for seed in looking:
                    for rate in plan.rates:
                        tried.append(self._entry(arm, labels, seed, rate))
                        yield tried[-1]
                chosen, _ = choose_rate(tried, self.dataset.metric, plan.rates, looking)
                if chosen is not None:
                    for seed in others:
                        yield self._entry(arm, labels, seed, chosen)

    def _entry(self, arm: str, labels: int, seed: int, rate: float) -> Entry:
        job = self._job(arm, labels, seed, rate)
        path = self.out / "scores" / self.dataset.name / f"{job.name}.json"
        # Weights of a pretrained arm, else those whose plans it copies.
        template = arm if job.checkpoint is not None else self.plan.template
        weights = None if template is None else self.hashes[template]
        identity = {**job.identity(), "weights": weights}
        if path.is_file():
            content = json.loads(path.read_text())
            _refuse_other(content["identity"], identity, job, self.out)
        else:
            content = {"identity": identity, **self._run(job)}
            write_json(path, content)
        if self.plan.keep == "scores":
            shutil.rmtree(job.folder, ignore_errors=True)
        if content["failed"]:
            return Entry(job.dataset, arm, labels, seed, rate, failed=content["failed"])
        self._require_equal_plans(job, content["plan"])
        selection = read_outcome(content["selection"]) if content["selection"] else None
        validation = read_outcome(content["validation"])
        return Entry(job.dataset, arm, labels, seed, rate, selection, validation, costs=content["costs"])

    def _run(self, job: Job) -> dict[str, Any]:
        logger.info("%s: %s.", job.dataset, job.name)
        try:
            result = self.trainer(job)
        except TrainingStopped as error:
            if error.exit_code != EXIT_FAILURE:
                # A signal ended the run, which is saved and goes on with --resume.
                raise
            # A rate that is too high is a result of the grid, not the end of the protocol.
            logger.warning("%s: %s failed: %s", job.dataset, job.name, error)
            return {"failed": str(error)}
        require_cases(result.validation, job.validation, f"{job.dataset}, {job.name}")
        if job.selection and result.selection is not None:
            require_cases(result.selection, job.selection, f"{job.dataset}, {job.name}")
        return {
            "failed": "",
            "selection": result.selection.to_json() if result.selection is not None else None,
            "validation": result.validation.to_json(),
            "plan": result.plan,
            "costs": dict(result.costs),
        }

    def _job(self, arm: str, labels: int, seed: int, rate: float) -> Job:
        dataset, checkpoint, template = self.dataset, self.checkpoints[arm], self.plan.template
        job = Job(
            dataset=dataset.name,
            arm=arm,
            labels=labels,
            seed=seed,
            rate=rate,
            train_cases=dataset.drawn[labels, seed],
            pool=dataset.division.pool,
            selection=dataset.division.selection,
            validation=dataset.division.validation,
            checkpoint=checkpoint,
            plans_from=self.checkpoints[template] if checkpoint is None and template is not None else None,
            changes=self.plan.every_arm()[arm].changes(),
            settings=dataset.settings,
            training=dataset.training,
            folder=Path(),
            cache=self.out / "cache" / dataset.name,
            device=self.device,
            workers=self.workers,
        )
        return Job(**{**vars(job), "folder": self.out / "runs" / dataset.name / job.name})

    def _require_equal_plans(self, job: Job, plan: Any) -> None:
        arm, first = self.plans.setdefault((job.labels, job.seed), (job.arm, plan))
        if plan != first:
            raise DataError(
                f"{job.dataset}: the arms {arm} and {job.arm} have different plans (network, patch or spacing), so "
                "that their difference is not that of their weights. Set patch_size and spacing in training, and give "
                "checkpoints of another network a recipe of their own."
            )


def _refuse_other(before: Mapping[str, Any], now: Mapping[str, Any], job: Job, out: Path) -> None:
    for name, value in json.loads(json.dumps(now)).items():
        if before.get(name) != value:
            raise UsageError(
                f"{out} holds a run {job.name} of {job.dataset} that was made with another {name}. Use the same "
                "recipe, another name for the arm, or another --out."
            )
