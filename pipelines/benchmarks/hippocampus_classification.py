"""Does one encoder serve a 3D classification and a segmentation: the form of the hippocampus, and its two parts?

Command: `python pipelines/benchmarks/hippocampus_classification.py --workdir W` (about 20 minutes of one core; it goes
on where it stopped; `--quick` takes a minute). MEDSSL_DATA says where the data lie.

Target: whether a hippocampus has a ratio of anterior to posterior volume above the median. The median is that of the
training cases, so that the validation cases tell nothing of themselves. 40 cases validate, those of
`label_efficiency.py` (the same seed); all others train, without labels for the pretraining. Nothing is chosen on the
validation cases but each run's temperature, which no ranking (AUROC) depends on.

- `finetune classification`: whole network, pretrained by the masked autoencoder of `methods_hippocampus.yaml` and from
  scratch, default rate, last step, same images; three seeds. With fewer labels each seed draws its own, the same ones
  for both.
- `evaluate probe` and `evaluate segmentation-probe`: frozen encoder and its untrained twin (one draw of weights).
- Baseline: logistic regression on the three edges of the crop.

What this is not: the volumes are crops of 1 mm around the hippocampus (Medical Segmentation Decathlon), so that finding
it is no part of the task, and a crop's size tells of the length of what is in it, which is why the baseline stands
beside. The ratio is a geometric target made from the masks: it says whether a classifier sees form, nothing of disease.
Each case counts as a patient, since the set does not say whose the cases are. The pretraining is short. Intervals:
bootstrap over the validation cases, seeds averaged first. Writes `results/hippocampus_classification.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _anatomy import DATA, kept
from _common import RESULTS, print_table, write_results

from medssl.data.probabilities import read_probabilities
from medssl.evaluation.classification_result import Interval
from medssl.evaluation.probe import evaluate_probe
from medssl.evaluation.segmentation_probe import evaluate_segmentation_probe
from medssl.files import write_text
from medssl.preprocessing.run import check_options, preprocess_source
from medssl.preprocessing.source import open_source
from medssl.preprocessing.store import Store
from medssl.preprocessing.store_files import STORE_FILE
from medssl.pretraining.run import pretrain
from medssl.protocol.outcomes import Answers
from medssl.protocol.statistics import over_seeds, paired
from medssl.training.checkpoint import find_checkpoint
from medssl.training.heads import Cases, linear_probe
from medssl.transfer.classification import finetune_classification

RECIPE = Path(__file__).resolve().parents[1] / "methods_hippocampus.yaml"
#: The division of `label_efficiency.py` and `protocol_hippocampus.yaml`.
SPLIT_SEED = 20_240
ANTERIOR, POSTERIOR = 1, 2
ARMS = ("pretrained", "scratch")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is done.

    Args:
        validation: Cases that validate.
        cases: Cases of the data set that are used; None takes all.
        pretraining: Steps of the masked autoencoder.
        steps: Steps of each fine-tuning.
        batch_size: Images in such a step.
        probe_steps: Steps of the segmentation probe's head.
        seeds: Of the fine-tunings.
        labels: Numbers of labelled cases; None is all.
    """

    validation: int = 40
    cases: int | None = None
    pretraining: int = 120
    steps: int = 60
    batch_size: int = 8
    probe_steps: int = 150
    seeds: tuple[int, ...] = (0, 1, 2)
    labels: tuple[int | None, ...] = (None, 20)


QUICK = Plan(8, 24, pretraining=3, steps=2, batch_size=2, probe_steps=2, seeds=(0,), labels=(None,))


def main() -> None:
    """Prepare, pretrain, fine-tune, probe; print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="where store and runs are made and found again")
    parser.add_argument("--pretrain-steps", type=int, default=Plan.pretraining)
    parser.add_argument("--steps", type=int, default=Plan.steps, help="of each fine-tuning")
    parser.add_argument("--quick", action="store_true", help="few steps and cases; writes no results")
    options = parser.parse_args()
    plan = QUICK if options.quick else Plan(pretraining=options.pretrain_steps, steps=options.steps)
    work: Path = options.workdir
    work.mkdir(parents=True, exist_ok=True)
    # Runs of another plan are not mixed with these.
    stated = dataclasses.asdict(plan)
    if kept(work / "plan.json", lambda: stated) != _plain(stated):
        sys.exit(f"{work} holds runs of another plan. Choose another --workdir.")
    payload = measure(DATA / "hippocampus", work, plan)
    for name in ("fine-tuning", "classification probe", "segmentation probe"):
        print_table(payload[name])
        print()
    print(f"{sum(payload['cpu_s'].values()):.0f} s of processor time.")
    if not options.quick:
        path = write_results("hippocampus_classification", payload)
        print(f"Written: {path.relative_to(RESULTS.parents[2])}")


def measure(data: Path, work: Path, plan: Plan) -> dict[str, Any]:
    """Return all figures."""
    ratios = dict(list(kept(work / "ratios.json", lambda: ratios_of(data)).items())[: plan.cases])
    validating = divide(list(ratios), plan.validation)
    middle, labels = targets_of(ratios, validating)
    table = work / "labels.csv"
    write_labels(table, labels, validating)
    seconds = {"store": _timed(work, "store", lambda: str(make_store(data, work / "store", validating)))[1]}
    store = Store.open(work / "store")
    _, seconds["pretraining"] = _timed(work, "pretraining", lambda: str(pretrained(work, plan)))
    checkpoint = find_checkpoint(work / "pretraining")
    tuned, seconds["fine-tuning"] = fine_tuned(work, table, checkpoint, plan)
    shared: dict[str, Any] = {"device": "cpu", "quiet": True}
    probe, seconds["classification probe"] = _timed(
        work, "probe",
        lambda: probe_rows(
            evaluate_probe(checkpoint, work / "store", probes=("linear", "knn"), labels=table, cache=work / "images",
                           **shared)
        ),
    )  # fmt: skip
    segmentation, seconds["segmentation probe"] = _timed(
        work, "segmentation_probe",
        lambda: segmentation_rows(
            evaluate_segmentation_probe(checkpoint, work / "store", steps=plan.probe_steps, **shared)
        ),
    )  # fmt: skip
    counts = {
        split: {value: sum(labels[case] == value for case in labels if (case in validating) == (split != "train"))
                for value in (0, 1)}
        for split in ("train", "validation")
    }  # fmt: skip
    return {
        "plan": dataclasses.asdict(plan),
        "recipe": RECIPE.name,
        "threads": torch.get_num_threads(),
        "median_ratio": round(middle, 4),
        "cases": counts,
        "fine-tuning": tuned,
        "classification probe": [*probe, baseline(store, labels, validating)],
        "segmentation probe": segmentation,
        "cpu_s": {name: round(value) for name, value in seconds.items()},
    }


def ratios_of(data: Path) -> dict[str, float]:
    """Return anterior voxels by posterior ones of each case."""
    found = {}
    for path in sorted((data / "labelsTr").glob("*.nii.gz")):
        mask = np.asarray(nibabel.load(path).dataobj)
        found[path.name.removesuffix(".nii.gz")] = float((mask == ANTERIOR).sum() / (mask == POSTERIOR).sum())
    if not found:
        raise SystemExit(f"{data} has no masks in labelsTr. Set MEDSSL_DATA.")
    return found


def divide(cases: Sequence[str], validation: int) -> set[str]:
    """Return the cases that validate."""
    names = sorted(cases)
    return {names[index] for index in np.random.default_rng(SPLIT_SEED).permutation(len(names))[:validation]}


def targets_of(ratios: Mapping[str, float], validating: set[str]) -> tuple[float, dict[str, int]]:
    """Return the median ratio of the training cases, and of each case whether its own is above."""
    middle = float(np.median([ratio for case, ratio in ratios.items() if case not in validating]))
    return middle, {case: int(ratio > middle) for case, ratio in ratios.items()}


def write_labels(path: Path, labels: Mapping[str, int], validating: set[str]) -> None:
    """Write the CSV that `finetune classification` and `evaluate probe` read."""
    lines = [f"{case},{label},{split_of(case, validating)}" for case, label in labels.items()]
    write_text(path, "\n".join(["volume_id,label,split", *lines]) + "\n")


def split_of(case: str, validating: set[str]) -> str:
    """Return the split of a case."""
    return "validation" if case in validating else "train"


def make_store(data: Path, out: Path, validating: set[str]) -> Path:
    """Make the store of all cases, masks too, with the split in it: pretraining takes the training volumes alone."""
    known = {line.split(",")[0] for line in (out.parent / "labels.csv").read_text().splitlines()[1:]}
    source = open_source(data, None, out.with_name("index"), workers=0, quiet=True)
    jobs = [
        dataclasses.replace(job, split=split_of(job.volume_id, validating))
        for job in source.jobs
        if job.volume_id in known
    ]
    options = check_options((1.0, 1.0, 1.0), "by-modality", True, "lossless", None)
    again = out.exists() and not (out / STORE_FILE).is_file()
    preprocess_source(dataclasses.replace(source, jobs=jobs), out, options, workers=0, resume=again, quiet=True)
    return out


def pretrained(work: Path, plan: Plan) -> Path:
    """Pretrain on the images of the training cases."""
    out = work / "pretraining"
    overrides = (f"steps={plan.pretraining}", "seed=0", "validate_every=0", "pictures_every=0", "probes.every=0")
    if plan.pretraining < 12:
        overrides = (*overrides, "schedule.warmup_steps=1")
    return pretrain(
        "mae", work / "store", out, recipe=RECIPE, overrides=overrides, device="cpu", workers=0, quiet=True,
        overwrite=out.exists(),
    )  # fmt: skip


def fine_tuned(work: Path, table: Path, checkpoint: Path, plan: Plan) -> tuple[list[dict[str, Any]], float]:
    """Fine-tune both arms, and return a row for each number of labels, with the seconds that all runs took."""
    rows, seconds = [], 0.0
    for number in plan.labels:
        answers: dict[str, list[Answers]] = {arm: [] for arm in ARMS}
        for seed in plan.seeds:
            for arm in ARMS:
                name = f"{arm}_{number or 'all'}_seed{seed}"
                found, taken = _timed(
                    work,
                    name,
                    lambda name=name, arm=arm, seed=seed, number=number: one_run(  # type: ignore[misc]
                        work, table, checkpoint, plan, name, arm, number, seed
                    ),
                )
                answers[arm].append(Answers.from_json(found))
                seconds += taken
        rows.append(row_of(number, answers))
    return rows, seconds


def one_run(
    work: Path, table: Path, checkpoint: Path, plan: Plan, name: str, arm: str, number: int | None, seed: int
) -> dict[str, Any]:
    """Fine-tune once and return the answers on the validation cases."""
    out = work / "runs" / name
    finetune_classification(
        work / "store", checkpoint if arm == "pretrained" else None, out, labels=table, labelled=number,
        plans_from=None if arm == "pretrained" else checkpoint, steps=plan.steps, val_every=plan.steps,
        batch_size=plan.batch_size, seed=seed, cache=work / "images", device="cpu", workers=0, quiet=True,
        overwrite=out.exists(),
    )  # fmt: skip
    found = read_probabilities(out / "validation" / "probabilities.csv")
    order = np.argsort(found.cases)
    targets = np.array([found.classes.index(target) for target in found.targets], np.int64)
    names = tuple(found.cases[place] for place in order)
    return Answers("multiclass", found.classes, names, found.values[order], targets[order]).to_json()


def row_of(number: int | None, answers: Mapping[str, Sequence[Answers]]) -> dict[str, Any]:
    """Return AUROC of both arms and their difference, in points."""
    cases = answers["scratch"][0].cases
    means = {arm: over_seeds(found, cases)["auroc"] for arm, found in answers.items()}
    seeds = {arm: [float(one.weighted(None)["auroc"][0]) for one in found] for arm, found in answers.items()}
    return {
        "labels": number or "all",
        **{arm: points(means[arm]) for arm in ARMS},
        "pretrained - scratch": points(
            paired(answers["pretrained"], answers["scratch"], "auroc", cases).interval, sign=True
        ),
        **{f"{arm} by seed": ", ".join(f"{100 * value:.1f}" for value in seeds[arm]) for arm in ARMS},
    }


def probe_rows(result: Any) -> list[dict[str, Any]]:
    """Return AUROC of each probe of the frozen encoders, in points."""
    return [
        {
            "probe": name,
            "trained": points(found["trained"].result.metrics["auroc"]),
            "untrained": points(found["untrained"].result.metrics["auroc"]),
            "difference": points(result.differences[name]["auroc"], sign=True),
        }
        for name, found in result.outcomes.items()
    ]


def segmentation_rows(result: Any) -> list[dict[str, Any]]:
    """Return Dice of the head on the frozen encoders, in points."""
    return [
        {
            "label": label,
            **{encoder: points(result.mean(encoder, label)) for encoder in ("trained", "untrained")},
            "difference": points(result.difference(label)[0], sign=True),
        }
        for label in result.dice["trained"]
    ]


def baseline(store: Store, labels: Mapping[str, int], validating: set[str]) -> dict[str, Any]:
    """Return AUROC of a logistic regression on the edges of the crop, in points."""
    parts = {}
    for split in ("train", "validation"):
        names = sorted(case for case in labels if split_of(case, validating) == split)
        edges = np.array([store.row(case)["shape"][1:] for case in names], np.float64)
        parts[split] = Cases(edges, np.array([labels[case] for case in names], np.int64), tuple(names))
    values = linear_probe(parts["train"], "multiclass", 2).head(parts["validation"].features)
    names = parts["validation"].patients
    found = over_seeds([Answers("multiclass", ("0", "1"), names, values, parts["validation"].targets)], names)
    return {"probe": "baseline: edges of the crop", "trained": points(found["auroc"]), "untrained": "", "difference": ""}


def points(value: Interval | Any, *, sign: bool = False) -> str:
    """Return a value with its interval as text, times 100."""
    middle = value.value if isinstance(value, Interval) else value.mean
    shape = "+.1f" if sign else ".1f"
    return f"{100 * middle:{shape}} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def _timed(work: Path, name: str, make: Callable[[], Any]) -> tuple[Any, float]:
    """Return what was made, now or in an earlier call, and the seconds of processor time that it took."""

    def made() -> dict[str, Any]:
        print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
        began = time.process_time()
        result = make()
        return {"result": result, "cpu_s": time.process_time() - began}

    found = kept(work / "kept" / f"{name}.json", made)
    return found["result"], found["cpu_s"]


def _plain(stated: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in stated.items()}


if __name__ == "__main__":
    main()
