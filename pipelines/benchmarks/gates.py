"""Do the gates of a model stop what it was not trained on, and does its disagreement find its own failures?

    python pipelines/benchmarks/gates.py [--data DATA] [--run RUN] [--steps 200] [--quick]

A small network learns the hippocampus (Medical Segmentation Decathlon) from 24 cases, `medssl calibrate` sets its gates
on the 39 validation cases of nnU-Net's fold 0, and `medssl predict` judges others:

- `unseen`: cases of the same set that are neither.
- `artefact ...`: other unseen cases with an artefact of MR at the strong end, by the package's own simulations.
- `spacing x ...`: unseen cases whose header has a wrong voxel size.
- `left atrium`: crops of the hippocampus's size from the middle of atria (LGE MR, 0.625 mm).
- `noise`: Gaussian noise of an unseen case's shape.

The first two sets are predicted with `--gates report`, so that there are masks to measure; the others with `--gates
enforce`, which spares the network the cases that are refused: their reasons are those known before it runs.

Failure detection: among unseen cases and those with artefacts a mean Dice below 0.8 is a failure. AUROC and FPR95
(share of good cases that are flagged where 95 % of the failures are) of disagreement and entropy, against two simple
baselines: the distance of the volume of all labels from those of the validation cases' predictions in standard
deviations, and one minus the mean largest softmax probability of the labelled voxels. Writes `results/gates.json`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from medssl.augmentation.policy import AugmentationSettings, policy_for  # noqa: E402  (the checkout comes first)
from medssl.evaluation.ood_run import ARTEFACTS  # noqa: E402
from medssl.evaluation.segmentation import evaluate_segmentation  # noqa: E402
from medssl.inference.gates.calibration import calibrate  # noqa: E402
from medssl.inference.gates.gates import NAME  # noqa: E402
from medssl.inference.gates.watch import encoder_of  # noqa: E402
from medssl.inference.model import load_model, resolve_device  # noqa: E402
from medssl.inference.predict import predict  # noqa: E402
from medssl.inference.tiles import Tile  # noqa: E402
from medssl.inference.views import changed_by  # noqa: E402
from medssl.inference.volumes import volumes_of_arrays  # noqa: E402
from medssl.training.ranking import Ranking  # noqa: E402
from medssl.transfer.raw import RawDataset, read_dataset  # noqa: E402
from medssl.transfer.segmentation import finetune_segmentation  # noqa: E402
from medssl.transfer.selection import select_cases  # noqa: E402
from pipelines.benchmarks._common import print_table, write_results  # noqa: E402

Array = NDArray[np.float32]
SHOWN = ("bias_field", "motion", "ghosting", "spike", "rician")
FACTORS = (0.1, 2.0, 10.0)
FAILURE = 0.8
TRAINED = 24


def main() -> None:
    """Train, calibrate, judge, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data", help="folder of real data")
    parser.add_argument("--run", type=Path, help="a hippocampus RUN to use instead of training one")
    parser.add_argument("--steps", type=int, default=200, help="steps of the training")
    parser.add_argument("--quick", action="store_true", help="few cases; writes no results")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    began = time.monotonic()
    raw = read_dataset(options.data / "hippocampus")
    split = select_cases(raw)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run = options.run or trained(options.data / "hippocampus", work / "run", split.train[:TRAINED], options.steps)
        used = json.loads((run / "data.json").read_text())
        steps = json.loads((run / "run.json").read_text())["steps"]
        gates = calibrate(run, dataset=options.data / "hippocampus", device="cpu", quiet=True)
        unseen = [name for name in raw.cases if name not in {*used["train_cases"], *used["validation_cases"]}]
        counts = (4, 1, 1, 2) if options.quick else (30, 8, 6, 10)
        sets = make_sets(raw, unseen, options.data / "left_atrium" / "imagesTr", run, work / "sets", *counts)
        masked = [name for name in sets if name == "unseen" or name.startswith("artefact")]
        verdicts = {
            name: judged(run, path, work / "masks" / name, "report" if name in masked else "enforce")
            for name, path in sets.items()
        }
        dice = dice_of(raw, work / "masks", masked)
    facts = gates.gates.facts
    rows = [row("validation (calibrated on)", facts["validation_verdicts"], [])]
    rows += [row(name, Counter(v["verdict"] for v in found), found) for name, found in verdicts.items()]
    print_table(rows)
    detection = failure_detection(verdicts, dice, gates.gates)
    print()
    print_table(detection["scores"])
    print(f"{detection['failures']} failures among {detection['cases']} cases. {time.monotonic() - began:.0f} s.")
    if not options.quick:
        payload = {
            "training_cases": len(used["train_cases"]),
            "steps": steps,
            "calibration": dict(facts),
            "sets": rows,
            "failure_detection": detection,
            "failure_below_dice": FAILURE,
            "seconds": round(time.monotonic() - began),
        }
        print(f"Written: {write_results('gates', payload).relative_to(REPOSITORY)}")


def trained(dataset: Path, run: Path, cases: Sequence[str], steps: int) -> Path:
    """Train a small network on some cases of the training part of fold 0."""
    return finetune_segmentation(
        dataset, None, run, steps=steps, val_every=steps, network="resenc-xs", train_cases=cases, device="cpu",
        workers=0, quiet=True, patch_size=(32, 48, 32), validation_cases=select_cases(read_dataset(dataset)).validation,
    )  # fmt: skip


def make_sets(
    raw: RawDataset,
    unseen: Sequence[str],
    atria: Path,
    run: Path,
    work: Path,
    plain: int,
    each: int,
    few: int,
    other: int,
) -> dict[str, Path]:
    """Write the volumes of every set and return its folder by name."""
    rng = np.random.default_rng(0)
    model = load_model(run, resolve_device("cpu"))
    frozen = encoder_of(model)
    names = list(rng.permutation(unseen))
    drawn = iter(names)
    sets: dict[str, Path] = {}

    def write(kind: str, case: str, change: Callable[[Array], Array], factor: float = 1.0) -> None:
        image = nibabel.load(raw.cases[case].images[0])
        affine = image.affine.copy()
        affine[:3, :3] *= factor
        sets[kind] = work / kind.replace(" ", "_")
        sets[kind].mkdir(parents=True, exist_ok=True)
        made = change(np.asarray(image.dataobj, np.float32))
        nibabel.save(nibabel.Nifti1Image(made, affine), sets[kind] / f"{case}.nii.gz")

    for _ in range(plain):
        write("unseen", next(drawn), lambda voxels: voxels)
    for artefact in SHOWN:
        for number in range(each):
            write(f"artefact {artefact}", next(drawn), _artefact(artefact, frozen, number))
    for factor in FACTORS:
        for _ in range(few):
            write(f"spacing x {factor:g}", next(drawn), lambda voxels: voxels, factor)
    for _ in range(few):
        write("noise", next(drawn), lambda voxels: rng.normal(100, 30, voxels.shape).astype(np.float32))
    shape = np.median([nibabel.load(raw.cases[name].images[0]).shape for name in names[:plain]], axis=0).astype(int)
    sets["left atrium"] = work / "left_atrium"
    sets["left atrium"].mkdir(parents=True, exist_ok=True)
    for path in sorted(atria.glob("*_0000.nii.gz"))[:other]:
        image = nibabel.load(path)
        start = (np.asarray(image.shape) - shape) // 2
        cut = image.slicer[tuple(slice(int(a), int(a + n)) for a, n in zip(start, shape, strict=True))]
        nibabel.save(cut, sets["left atrium"] / path.name.replace("_0000", ""))
    return sets


def _artefact(name: str, frozen: Any, seed: int) -> Callable[[Array], Array]:
    """Return an artefact of MR as a function of an image (x, y, z), applied to the z-scored image."""
    settings: dict[str, Any] = {**ARTEFACTS[name], "probability": 1.0}

    def change(voxels: Array) -> Array:
        scored = ((voxels - voxels.mean()) / voxels.std()).transpose(2, 1, 0)[None]
        augmentation = AugmentationSettings(modality="MR", overrides={"intensity": {name: settings}})
        policy = policy_for("none", {"MR"}, scored.shape[1:], augmentation)
        volume = volumes_of_arrays([scored], [f"case{seed}"], modality="MR")[0]
        whole = Tile((0, 0, 0), scored.shape[1:])
        return changed_by(policy, frozen, seed)(np.ascontiguousarray(scored), volume, whole)[0].transpose(2, 1, 0)

    return change


def judged(run: Path, images: Path, out: Path, mode: str) -> list[dict[str, Any]]:
    """Return the verdicts of a folder of images."""
    predict(run, images, out, device="cpu", gates=mode, quiet=True)
    verdicts: list[dict[str, Any]] = json.loads((out / NAME).read_text())["verdicts"]
    return verdicts


def dice_of(raw: RawDataset, masks: Path, sets: Sequence[str]) -> dict[tuple[str, str], float]:
    """Return the mean Dice over labels of each case of some sets."""
    found: dict[tuple[str, str], list[float]] = {}
    for name in sets:
        cases = [path.name.removesuffix(".nii.gz") for path in (masks / name).glob("*.nii.gz")]
        for line in evaluate_segmentation(masks / name, raw.folder / "labelsTr", cases=cases, quiet=True).rows:
            found.setdefault((name, line.case), []).append(line.scores.dice)
    return {key: float(np.nanmean(values)) for key, values in found.items()}


def row(name: str, counts: Any, verdicts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a line of the table: how many got which verdict, and the codes of the reasons."""
    total = sum(counts.values())
    codes = Counter(code for v in verdicts for code in {reason["code"] for reason in v["reasons"]})
    return {
        "set": name,
        "cases": total,
        **{kind: counts[kind] for kind in ("accepted", "review", "refused")},
        "flagged": 1 - counts["accepted"] / total,
        "reasons": ", ".join(f"{code} {count}" for code, count in codes.most_common()),
    }


def failure_detection(
    verdicts: dict[str, list[dict[str, Any]]], dice: dict[tuple[str, str], float], gates: Any
) -> dict[str, Any]:
    """Return how well each score ranks failures above good cases."""
    cases = [(name, found) for name, each in verdicts.items() for found in each if (name, found["case"]) in dice]
    failed = np.array([dice[name, found["case"]] < FAILURE for name, found in cases])
    measured = [found["measured"] for _, found in cases]
    volumes = np.array([sum(each["volumes_ml"].values()) for each in measured])
    known = gates.facts["validation_volume_ml"]
    scores = {
        "disagreement": [each["disagreement"] for each in measured],
        "entropy": [each["entropy"] for each in measured],
        "embedding distance": [each["embedding_distance"] for each in measured],
        "baseline: volume": np.abs(volumes - known["mean"]) / known["std"],
        "baseline: 1 - softmax": [None if each["confidence"] is None else 1 - each["confidence"] for each in measured],
    }
    table = []
    for name, values in scores.items():
        # A mask without a labelled voxel has no score: it counts as the strangest.
        column = np.array([np.nan if value is None else value for value in values], np.float64)
        column = np.where(np.isnan(column), np.nanmax(column) + 1, column)
        ranking = Ranking(column, failed)
        table.append(
            {"score": name, "AUROC": _number(ranking.auroc()), "FPR95": _number(ranking.false_positive_rate(0.95))}
        )
    spread = np.percentile(list(dice.values()), (0, 25, 50, 75, 100)).round(4).tolist()
    return {"cases": len(cases), "failures": int(failed.sum()), "dice_quartiles": spread, "scores": table}


def _number(values: Any) -> float | None:
    return None if np.isnan(values[0]) else round(float(values[0]), 4)


if __name__ == "__main__":
    main()
