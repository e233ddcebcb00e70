"""Does one encoder serve a 3D classification and a segmentation: the form of the hippocampus, and its two parts?

Command: `python pipelines/benchmarks/hippocampus_classification.py --workdir W` (about 15 minutes of one core; what is
done is not done again; `--quick` takes a minute). MEDSSL_DATA says where the data lie.

Target: whether a hippocampus has a ratio of anterior to posterior volume above the median. The median is that of the
training cases, so that the validation cases tell nothing of themselves. 40 cases validate, those of
`label_efficiency.py` (the same seed); all others train, without labels for the pretraining. Nothing is chosen on the
validation cases; AUROC is that of the probabilities before any temperature.

- `finetune classification`: whole network, pretrained by the masked autoencoder of `methods_hippocampus.yaml` and from
  scratch; default rate, last step, bf16, three seeds. With fewer labels each seed draws its own, the same for both.
- `evaluate probe` and `evaluate segmentation-probe`: frozen encoder and its untrained twin (one draw of weights).
- References: logistic regression on the three edges of the crop, and on the form of the whole mask, its parts not told
  apart: how far one comes who knows where the hippocampus is.

What this is not: the volumes are crops of 1 mm around the hippocampus (Medical Segmentation Decathlon), so that finding
it is no part of the task, and a crop's size tells of the size of what is in it, which is why that reference stands
beside. The ratio is a geometric target made from the masks: it says whether a classifier sees form, nothing of disease,
and cases near the median are told apart by the raters' border alone. Each case counts as a patient, since the set does
not say whose the cases are. The pretraining is short. Intervals: bootstrap over the validation cases, seeds averaged
first. Writes `results/hippocampus_classification.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from _anatomy import DATA, kept
from _common import RESULTS, print_table, write_results
from _hippocampus_target import Target, make_store, ratios_of, target_of

from medssl.data.probabilities import read_probabilities
from medssl.evaluation.classification_result import Interval
from medssl.evaluation.probe import evaluate_probe
from medssl.evaluation.segmentation_probe import evaluate_segmentation_probe
from medssl.preprocessing.store import Store
from medssl.pretraining.run import pretrain
from medssl.protocol.outcomes import Answers
from medssl.protocol.statistics import over_seeds, paired
from medssl.training.checkpoint import find_checkpoint
from medssl.training.heads import Cases, linear_probe
from medssl.transfer.classification import finetune_classification
from medssl.transfer.classification_run import UNCALIBRATED

RECIPE = Path(__file__).resolve().parents[1] / "methods_hippocampus.yaml"
ARMS = ("pretrained", "scratch")
#: Cells of the form of a mask.
GRID = (8, 12, 8)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is done.

    Args:
        validation: Cases that validate.
        cases: Cases of the data set that are used; None takes all.
        pretraining: Steps of the masked autoencoder.
        steps: Steps of each fine-tuning.
        batch_size: Images in such a step.
        patch: What fine-tuning and probes see: that of the pretraining, to which larger crops are shrunk whole.
        probe_steps: Steps of the segmentation probe's head.
    """

    validation: int = 40
    cases: int | None = None
    pretraining: int = 120
    steps: int = 100
    batch_size: int = 8
    patch: tuple[int, ...] = (32, 48, 32)
    probe_steps: int = 100

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }


QUICK = Plan(8, 24, pretraining=3, steps=2, batch_size=2, probe_steps=2)


def main() -> None:
    """Prepare, pretrain, probe, fine-tune; print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="where store and runs are made and found again")
    parser.add_argument("--pretrain-steps", type=int, default=Plan.pretraining)
    parser.add_argument("--steps", type=int, default=Plan.steps, help="of each fine-tuning")
    parser.add_argument("--labels", nargs="+", default=["all"], help="numbers of labelled cases, or all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the fine-tunings")
    parser.add_argument("--quick", action="store_true", help="few steps and cases; writes no results")
    options = parser.parse_args()
    plan = QUICK if options.quick else Plan(pretraining=options.pretrain_steps, steps=options.steps)
    seeds = options.seeds[:1] if options.quick else options.seeds
    # Runs of another plan are not mixed with these.
    if kept(options.workdir / "plan.json", plan.to_json) != plan.to_json():
        sys.exit(f"{options.workdir} holds runs of another plan. Choose another --workdir.")
    payload = measure(options.workdir, plan, [None if text == "all" else int(text) for text in options.labels], seeds)
    for name in ("fine-tuning", "classification probe", "references", "segmentation probe"):
        print(f"{name}:")
        print_table(payload[name])
        print()
    print(f"{sum(payload['cpu_s'].values())} s of processor time.")
    if not options.quick:
        path = write_results("hippocampus_classification", payload)
        print(f"Written: {path.relative_to(RESULTS.parents[2])}")


def measure(work: Path, plan: Plan, numbers: Sequence[int | None], seeds: Sequence[int]) -> dict[str, Any]:
    """Return all figures; of `numbers` of labelled cases, None is all."""
    data, store = DATA / "hippocampus", work / "store"
    ratios = kept(work / "ratios.json", lambda: ratios_of(data))
    target = target_of(dict(list(ratios.items())[: plan.cases]), plan.validation)
    target.write(work / "labels.csv")
    seconds: dict[str, float] = {}
    _, seconds["store"] = timed(work, "store", lambda: str(make_store(data, store, target)))
    _, seconds["pretraining"] = timed(work, "pretraining", lambda: str(pretrained(work, plan)))
    checkpoint = find_checkpoint(work / "pretraining")
    probe, seconds["classification probe"] = timed(work, "probe", partial(probe_rows, work, checkpoint, plan))
    segmentation, seconds["segmentation probe"] = timed(
        work, "segmentation_probe", partial(segmentation_rows, work, checkpoint, plan)
    )
    rows, seconds["fine-tuning"] = [], 0.0
    for number in numbers:
        row, taken = fine_tuned(work, checkpoint, plan, number, seeds)
        rows.append(row)
        seconds["fine-tuning"] += taken
    return {
        "plan": {**plan.to_json(), "seeds": list(seeds)},
        "recipe": RECIPE.name,
        "threads": torch.get_num_threads(),
        "median_ratio": round(target.median, 4),
        "cases": dict(Counter(f"{target.split(case)} {label}" for case, label in sorted(target.labels.items()))),
        "fine-tuning": rows,
        "classification probe": probe,
        "references": references(Store.open(store), target),
        "segmentation probe": segmentation,
        "cpu_s": {name: round(value) for name, value in seconds.items()},
    }


def pretrained(work: Path, plan: Plan) -> Path:
    """Pretrain on the images of the training cases; a run that was cut off goes on."""
    out = work / "pretraining"
    if (out / "recipe.yaml").is_file():
        return pretrain(None, work / "store", out, resume=True, device="cpu", quiet=True)
    overrides = ["seed=0", "validate_every=0", "pictures_every=0", "probes.every=0"]
    if plan == QUICK:
        overrides += ["schedule.warmup_steps=1"]
    return pretrain(
        "mae", work / "store", out, recipe=RECIPE, steps=plan.pretraining, overrides=overrides, device="cpu", workers=0,
        quiet=True, overwrite=out.exists(),
    )  # fmt: skip


def fine_tuned(work: Path, checkpoint: Path, plan: Plan, number: int | None, seeds: Sequence[int]) -> tuple[Row, float]:
    """Fine-tune both arms from each seed, and return AUROC in points with the seconds that all runs took."""
    answers: dict[str, list[Answers]] = {arm: [] for arm in ARMS}
    seconds = 0.0
    for seed in seeds:
        for arm in ARMS:
            name = f"{arm}_{number or 'all'}_seed{seed}"
            run = partial(one_run, work, checkpoint, plan, name, arm, number, seed)
            found, taken = timed(work, name, run)
            answers[arm].append(Answers.from_json(found))
            seconds += taken
    return row_of(number, answers), seconds


def one_run(
    work: Path, checkpoint: Path, plan: Plan, name: str, arm: str, number: int | None, seed: int
) -> dict[str, Any]:
    """Fine-tune once and return the answers on the validation cases."""
    out, start = work / "runs" / name, {"pretrained": checkpoint}.get(arm)
    finetune_classification(
        work / "store", start, out, labels=work / "labels.csv", labelled=number,
        plans_from=None if start else checkpoint, steps=plan.steps, val_every=plan.steps, batch_size=plan.batch_size,
        patch_size=plan.patch, precision="bf16", seed=seed, cache=work / "images", device="cpu", workers=0, quiet=True,
        overwrite=out.exists(),
    )  # fmt: skip
    # Calibrated in parts, cases would no longer stand in the model's order.
    found = read_probabilities(out / "validation" / UNCALIBRATED)
    order = np.argsort(found.cases)
    targets = np.array([found.classes.index(target) for target in found.targets], np.int64)
    names = tuple(found.cases[place] for place in order)
    return Answers("multiclass", found.classes, names, found.values[order], targets[order]).to_json()


def row_of(number: int | None, answers: Mapping[str, Sequence[Answers]]) -> Row:
    """Return AUROC of both arms and their difference, in points."""
    cases = answers["scratch"][0].cases
    gap = paired(answers["pretrained"], answers["scratch"], "auroc", cases).interval
    seeds = {arm: [100 * float(one.weighted(None)["auroc"][0]) for one in answers[arm]] for arm in ARMS}
    return {
        "labels": number or "all",
        **{arm: points(over_seeds(answers[arm], cases)["auroc"]) for arm in ARMS},
        "pretrained - scratch": points(gap, sign=True),
        **{f"{arm} by seed": ", ".join(f"{value:.1f}" for value in seeds[arm]) for arm in ARMS},
    }


def probe_rows(work: Path, checkpoint: Path, plan: Plan) -> list[Row]:
    """Return AUROC of each probe of the frozen encoders, in points."""
    result = evaluate_probe(
        checkpoint, work / "store", probes=("linear", "knn"), labels=work / "labels.csv", patch_size=plan.patch,
        cache=work / "images", device="cpu", quiet=True,
    )  # fmt: skip
    return [
        {
            "probe": name,
            **{encoder: points(found[encoder].result.metrics["auroc"]) for encoder in ("trained", "untrained")},
            "difference": points(result.differences[name]["auroc"], sign=True),
        }
        for name, found in result.outcomes.items()
    ]


def segmentation_rows(work: Path, checkpoint: Path, plan: Plan) -> list[Row]:
    """Return Dice of the head on the frozen encoders, in points."""
    result = evaluate_segmentation_probe(
        checkpoint, work / "store", steps=plan.probe_steps, patch_size=plan.patch, device="cpu", quiet=True
    )
    return [
        {
            "label": label,
            **{encoder: points(result.mean(encoder, label)) for encoder in ("trained", "untrained")},
            "difference": points(result.difference(label)[0], sign=True),
        }
        for label in result.dice["trained"]
    ]


def references(store: Store, target: Target) -> list[Row]:
    """Return AUROC in points of logistic regressions on the edges of the crop and on the form of the whole mask."""
    kinds: dict[str, Callable[[str], Any]] = {
        "edges of the crop": lambda case: store.row(case)["shape"][1:],
        "form of the whole mask": lambda case: form(store, case),
    }
    rows = []
    for name, features in kinds.items():
        learn, judged = (
            Cases(
                np.array([features(case) for case in target.of(split)], np.float64),
                np.array([target.labels[case] for case in target.of(split)], np.int64),
                tuple(target.of(split)),
            )
            for split in ("train", "validation")
        )
        values = linear_probe(learn, "multiclass", 2).head(judged.features)
        answers = Answers("multiclass", ("0", "1"), judged.patients, values, judged.targets)
        rows.append({"features": name, "auroc": points(over_seeds([answers], judged.patients)["auroc"])})
    return rows


def form(store: Store, case: str) -> NDArray[np.float32]:
    """Return how much of each cell of a grid over the crop the mask fills, both parts as one. Shape: (N,)."""
    mask = store.read_label(case, (0, 0, 0), store.row(case)["shape"][1:])
    assert mask is not None
    filled = torch.from_numpy((mask > 0).astype(np.float32))
    return torch.nn.functional.adaptive_avg_pool3d(filled[None], GRID).flatten().numpy()


def points(value: Any, *, sign: bool = False) -> str:
    """Return an `Interval` or an `Estimate` as text, times 100."""
    middle = value.value if isinstance(value, Interval) else value.mean
    shape = "+.1f" if sign else ".1f"
    return f"{100 * middle:{shape}} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def timed(work: Path, name: str, make: Callable[[], Any]) -> tuple[Any, float]:
    """Return what was made, now or in an earlier call, and the seconds of processor time that it took."""

    def made() -> dict[str, Any]:
        print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
        began = time.process_time()
        result = make()
        return {"result": result, "cpu_s": time.process_time() - began}

    found = kept(work / "kept" / f"{name}.json", made)
    return found["result"], found["cpu_s"]


if __name__ == "__main__":
    main()
