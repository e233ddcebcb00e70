"""`medssl protocol`: run what has not been run, then tabulate; the Python twin of the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from medssl.config import check_settings, to_yaml
from medssl.errors import UsageError, unknown_name
from medssl.files import write_json, write_text
from medssl.lock import claimed_folder
from medssl.progress import progress
from medssl.protocol.division import counts_of, divide
from medssl.protocol.outcomes import require_cases
from medssl.protocol.pages import write_tables
from medssl.protocol.pretraining import Pretrainer, pretrain_on_pool
from medssl.protocol.recipe import DatasetSettings, Recipe, plain, read_recipe
from medssl.protocol.results import Entry, Results, tabulate
from medssl.protocol.runner import Prepared, Runner, resolve_checkpoints
from medssl.protocol.tasks import Task, Trainer
from medssl.training.environment import describe_environment

KIND = "protocol"
RECIPE = "recipe.yaml"
Opener = Callable[[DatasetSettings], Task]


def protocol(
    recipe: Path | None,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    device: str = "auto",
    workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    outside: Sequence[Entry] = (),
    compared: Sequence[tuple[str, str]] = (),
    open_task: Opener | None = None,
    trainer: Trainer | None = None,
    pretrainer: Pretrainer = pretrain_on_pool,
) -> Results:
    """Run every arm with every number of labels and seed, and write tables, curves and a page to `out`.

    Patients are divided once into pool, selection and validation. Each arm learns from the same labelled cases of the
    pool, for the same steps, with the same plans; its learning rate is chosen from the same grid on the selection
    cases; its last checkpoint is its model; the validation cases are reported and choose nothing. A run that is
    done is never made again, so that an interrupted protocol that is resumed ends in the same tables.

    Args:
        recipe: YAML, see `medssl.protocol.recipe.Recipe`; with `resume` None takes the one in `out`.
        out: Folder of the protocol.
        overrides: Settings `a.b=c` that win over the recipe.
        device: auto, cpu, cuda or cuda:N.
        workers: Processes that read and preprocess.
        resume: Go on in `out`; arms, labels, seeds and rates may have been added.
        overwrite: Replace the protocol in `out`.
        quiet: Show no progress.
        outside: Runs of arms that were trained elsewhere, on the same division; their cases must be the validation
            cases. They come into the tables, and into the comparisons that `compared` adds.
        compared: Further pairs (arm, control).
        open_task: Opens a data set in place of the task's own way.
        trainer: Trains in place of the task.
        pretrainer: Pretrains in place of `pretrain_on_pool`.

    Returns:
        The tables; they stand in `results.json`, `table.md`, `table.csv`, `differences.csv`, `curves_*.png` and
        `report.html` too.

    Raises:
        UsageError: If the recipe does not fit, or `out` holds runs made in another way.
        DataError: If a data set cannot be used or divided as the recipe asks.
    """
    if recipe is None:
        if not (resume and (out / RECIPE).is_file()):
            raise UsageError("medssl protocol needs --recipe; only --resume of a protocol that has begun goes without.")
        recipe = out / RECIPE
    plan = read_recipe(recipe, overrides)
    datasets = [_prepare(name, plan, open_task or open_dataset) for name in plan.datasets]
    with claimed_folder(out, resume=resume, overwrite=overwrite, owned=is_ours):
        if not (out / "run.json").is_file():
            write_json(out / "run.json", {"kind": KIND, "schema_version": 1, "finished": False})
        for dataset in datasets:
            _write_division(out, dataset)
        write_text(out / RECIPE, "# Written by medssl protocol; paths as they were found.\n" + to_yaml(plain(plan)))
        write_json(out / "environment.json", describe_environment())
        entries: list[Entry] = []
        with progress("Protocol", plan.jobs(), quiet=quiet) as advance:
            for dataset in datasets:
                checkpoints = resolve_checkpoints(plan, dataset, out, pretrainer, device, workers)
                runner = Runner(plan, dataset, out, checkpoints, trainer or dataset.task.train, device, workers)
                for entry in runner.entries():
                    entries.append(entry)
                    advance(note=f"{entry.dataset} {entry.arm}, {entry.labels} labels, seed {entry.seed}")
        _check_outside(outside, datasets)
        results = tabulate(
            [*entries, *outside],
            [*plan.comparisons(), *compared],
            {dataset.name: dataset.metric for dataset in datasets},
            {dataset.name: dataset.division.patients for dataset in datasets},
            plan.rates,
            plan.seeds[: plan.rate_seeds],
        )
        write_json(out / "costs.json", _costs(entries))
        write_tables(out, results, {dataset.name: dataset.division for dataset in datasets})
        write_json(out / "run.json", {"kind": KIND, "schema_version": 1, "finished": True})
    return results


def open_dataset(settings: DatasetSettings) -> Task:
    """Return the data set, read by its task."""
    if settings.task == "segmentation":
        from medssl.protocol.segmentation import Segmentation

        return Segmentation(settings)
    from medssl.protocol.classification import Classification

    return Classification(settings)


def is_ours(out: Path) -> bool:
    """Whether a folder is a protocol."""
    path = out / "run.json"
    return path.is_file() and json.loads(path.read_text()).get("kind") == KIND


def _prepare(name: str, plan: Recipe, opener: Opener) -> Prepared:
    settings, where = plan.datasets[name], f"datasets.{name}"
    task = opener(settings)
    division = divide(task.cases(), settings, where)
    training = check_settings(task.training_model, plan.training_of(name), f"{where}.training")
    metric = settings.metric or task.metrics[0]
    if metric not in task.metrics:
        raise unknown_name(f"metric to choose a rate by in {where}", metric, task.metrics)
    counts = counts_of(plan.labels_of(name), len(division.pool), where)
    drawn = {(count, seed): tuple(task.labelled(division, count, seed)) for count in counts for seed in plan.seeds}
    return Prepared(name, settings, task, division, training, metric, drawn)


def _write_division(out: Path, dataset: Prepared) -> None:
    """Write who is where; refuse to go on with another division."""
    path = out / "splits" / f"{dataset.name}.json"
    parts = dataset.division.to_json()
    signature = dataset.task.signature()
    before = json.loads(path.read_text()) if path.is_file() else {"parts": parts, "signature": signature}
    if before["parts"] != parts or before["signature"] != signature:
        raise UsageError(
            f"{dataset.name}: its cases or its pool, selection and validation are not those that {out} began with: the "
            "data set, the sizes or the seed have changed. Use another --out."
        )
    labelled = {f"{count} labels, seed {seed}": list(names) for (count, seed), names in dataset.drawn.items()}
    write_json(path, {"signature": signature, "parts": parts, "labelled": labelled})


def _check_outside(outside: Sequence[Entry], datasets: Sequence[Prepared]) -> None:
    known = {dataset.name: dataset for dataset in datasets}
    for entry in outside:
        if entry.dataset not in known:
            raise unknown_name("data set", entry.dataset, known)
        if entry.validation is not None:
            require_cases(entry.validation, known[entry.dataset].division.validation, f"{entry.dataset}, {entry.arm}")


def _costs(entries: Sequence[Entry]) -> dict[str, dict[str, dict[str, float]]]:
    """Return what each run took; apart from the results, which are the same wherever they are made."""
    costs: dict[str, dict[str, dict[str, float]]] = {}
    for entry in entries:
        name = f"{entry.arm}_{entry.labels:04d}_seed{entry.seed}_rate{entry.rate:g}"
        costs.setdefault(entry.dataset, {})[name] = dict(entry.costs)
    return costs
