"""Are strangers told by an encoder's features, and better by a pretrained one than by random weights or a histogram?

Command: `python pipelines/benchmarks/out_of_distribution.py --workdir W` (ten minutes of one core, a third of it
two pretrainings; what is done is not done again; `--quick` takes a minute). MEDSSL_DATA says where the data lie.

Known are hippocampi (3D, MR) and breast ultrasound (2D). A small encoder is pretrained on the training part by the
masked autoencoder, scores are fitted on that part alone, and judged on held-out cases against

- `left atrium`: the middle of LGE cardiac MR, as large in mm as hippocampi and at their 1 mm;
- `X-ray`: PneumoniaMNIST against ultrasound that is shrunk to the same 28 x 28 pixels;
- `artefact, mild` and `strong`: the held-out hippocampi themselves after each artefact of MR that `medssl evaluate ood`
  makes. Strong is what that command takes, mild about half of it. They are added after normalisation.

Scores are those of `medssl.evaluation.ood`. `class means` is Mahalanobis distance with labels, which energy and softmax
need too: anterior volume by posterior above the training cases' median or not; benign, malignant or normal.

Beside the pretrained encoder stand the same network with random weights, since a coarse shift is found by anything, and
two encoders that are none: percentiles, mean, deviation and mean step between neighbours of the voxels that the encoder
sees (`normalised`), and the same of the file's own values before normalisation (`raw`; not of artefacts).

AUROC with strangers as positive, and FPR95: the share of strangers that pass where 95 % of the known pass. Intervals:
bootstrap over cases, known ones and strangers drawn apart, weights and fit held fixed; each image counts as a patient,
as neither set says whose it is. Rows `artefact, mild` and `artefact, strong` are means over all artefacts. One
pretraining each, one draw of random weights. `evaluate_ood`, run on the same stores, must agree. Writes
`results/out_of_distribution.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from _anatomy import DATA, kept
from _common import RESULTS, print_table, write_results
from _hippocampus_target import make_store, ratios_of, target_of
from _strange_scores import ENCODERS, MEASURES, SEED, Floats, Row, arrays, described, judge_of, row_of, shown
from _strange_stores import cut_atria, shrunk_ultrasound, store_of, xrays

from medssl.augmentation.catalogue import CATALOGUE
from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.evaluation.ood_run import ARTEFACTS, evaluate_ood
from medssl.evaluation.references import read_references
from medssl.inference.embedding import MOST_BOXES, Change, boxes_of, embed
from medssl.inference.frozen import Frozen, load_frozen
from medssl.inference.tiles import read_tile
from medssl.inference.views import changed_by
from medssl.inference.volumes import Volume, volumes_of_store
from medssl.preprocessing.store import Store
from medssl.pretraining.run import pretrain
from medssl.training.checkpoint import find_checkpoint

PIPELINES = Path(__file__).resolve().parents[1]
#: About half of what `ARTEFACTS` has.
MILD: dict[str, dict[str, Any]] = {
    "bias_field": {"strength": [0.25, 0.25]},
    "motion": {"moves": [1, 1], "degrees": 5.0, "mm": 5.0},
    "ghosting": {"intensity": [0.5, 0.5]},
    "spike": {"intensity": [0.1, 0.1]},
    "gibbs": {"cutoff": [0.75, 0.75]},
    "rician": {"std": [0.1, 0.1]},
    "noise": {"std": [0.15, 0.15]},
    "blur": {"sigma": [0.75, 0.75]},
    "low_resolution": {"zoom": [0.75, 0.75]},
}
SEVERITIES = {"mild": MILD, "strong": {name: ARTEFACTS[name] for name in MILD}}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is done.

    Args:
        hippocampi: Cases of the known 3D set; None takes all.
        judged_3d: Of those, held out.
        judged_2d: Ultrasound images that are held out.
        atria: Strangers in 3D.
        xrays: Strangers in 2D.
        steps_3d: Of the pretraining.
        steps_2d: Of the pretraining.
    """

    hippocampi: int | None = None
    judged_3d: int = 40
    judged_2d: int = 90
    atria: int = 80
    xrays: int = 150
    steps_3d: int = 100
    steps_2d: int = 300


QUICK = Plan(20, 6, 20, 4, 10, steps_3d=2, steps_2d=2)


@dataclasses.dataclass(frozen=True)
class Known:
    """A set of known volumes with its far strangers.

    Args:
        name: What the rows say.
        store: Of known volumes, with their division.
        strangers: Store of strangers.
        strange: What the rows call those.
        labels: CSV of classes of the known ones.
        run: Of the pretraining.
        files: By volume, the file before normalisation.
    """

    name: str
    store: Path
    strangers: Path
    strange: str
    labels: Path
    run: Path
    files: Mapping[str, Path]

    def volumes(self) -> tuple[list[Volume], list[Volume], list[Volume]]:
        """Return volumes to fit on, held-out ones, and strangers."""
        store = Store.open(self.store)
        fitted, judged = (volumes_of_store(store, split=split) for split in ("train", "validation"))
        return fitted, judged, volumes_of_store(Store.open(self.strangers))


def main() -> None:
    """Prepare, pretrain, score; print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="where stores and runs are made and found again")
    parser.add_argument("--quick", action="store_true", help="few steps and cases; writes no results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan = QUICK if options.quick else Plan()
    # Runs of another plan are not mixed with these.
    if kept(options.workdir / "plan.json", lambda: dataclasses.asdict(plan)) != dataclasses.asdict(plan):
        sys.exit(f"{options.workdir} holds runs of another plan. Choose another --workdir.")
    began = time.process_time()
    rows: list[Row] = []
    counts, agreement = {}, {}
    for known in (hippocampus(options.workdir, plan), ultrasound(options.workdir, plan)):
        found, counts[known.name], agreement[known.name] = measured(known)
        rows += found
    texts = [shown(row) for row in rows]
    print_table([{name: text for name, text in line.items() if not name.endswith("FPR95")} for line in texts])
    print(f"Largest difference from evaluate_ood: {max(agreement.values()):.2g}")
    if not options.quick:
        payload = {
            "plan": dataclasses.asdict(plan),
            "recipes": ["methods_hippocampus.yaml", "methods_pneumonia.yaml"],
            "volumes": counts,
            "artefacts": SEVERITIES,
            "difference_from_evaluate_ood": agreement,
            "cpu_s_of_this_call": round(time.process_time() - began),
            "rows": texts,
        }
        print(f"Written: {write_results('out_of_distribution', payload).relative_to(RESULTS.parents[2])}")


def hippocampus(work: Path, plan: Plan) -> Known:
    """Make the 3D stores and pretrain."""
    data, store = DATA / "hippocampus", work / "hippocampus"
    ratios = kept(work / "ratios.json", lambda: ratios_of(data))
    target = target_of(dict(list(ratios.items())[: plan.hippocampi]), plan.judged_3d)
    target.write(work / "hippocampus.csv")
    make_store(data, store, target)
    atria = cut_atria(DATA, work / "atria", plan.atria)
    strangers = store_of(atria, (1.0, 1.0, 1.0), work / "left_atrium")
    run = pretrained(work, store, "methods_hippocampus.yaml", plan.steps_3d, [])
    files = {case: data / "imagesTr" / f"{case}_0000.nii.gz" for case in target.labels}
    files |= {job.volume_id: Path(job.images[0]) for job in atria}
    return Known("hippocampus", store, strangers, "left atrium", work / "hippocampus.csv", run, files)


def ultrasound(work: Path, plan: Plan) -> Known:
    """Make the 2D stores and pretrain."""
    inside = shrunk_ultrasound(DATA, work / "ultrasound_images", plan.judged_2d)
    outside = xrays(DATA, work / "xray_images", plan.xrays)
    store = store_of(inside, "native", work / "ultrasound")
    strangers = store_of(outside, "native", work / "xray")
    run = pretrained(work, store, "methods_pneumonia.yaml", plan.steps_2d, ["augmentation.modality=US"])
    files = {job.volume_id: Path(job.images[0]) for job in (*inside, *outside)}
    return Known("ultrasound", store, strangers, "X-ray", work / "ultrasound_images.csv", run, files)


def pretrained(work: Path, store: Path, recipe: str, steps: int, overrides: Sequence[str]) -> Path:
    """Pretrain on the training volumes unless it is done; a run that was cut off goes on."""
    out = work / f"{store.name}_mae"
    print(f"{time.strftime('%H:%M:%S')} {out.name}", file=sys.stderr, flush=True)
    if (out / "recipe.yaml").is_file():
        return pretrain(None, store, out, resume=True, device="cpu", quiet=True)
    common = [f"seed={SEED}", "validate_every=0", "pictures_every=0", "probes.every=0"]
    if steps < 20:
        common += ["schedule.warmup_steps=1"]
    return pretrain(
        "mae", store, out, recipe=PIPELINES / recipe, steps=steps, overrides=[*common, *overrides], device="cpu",
        workers=0, quiet=True, overwrite=out.exists(),
    )  # fmt: skip


def measured(known: Known) -> tuple[list[Row], dict[str, int], float]:
    """Return the rows of a set, its volumes, and by how much `evaluate_ood` differs at most."""
    checkpoint = find_checkpoint(known.run)
    fitted, judged, strangers = known.volumes()
    trained = load_frozen(checkpoint)
    sets: dict[str, tuple[list[Volume], Change | None]] = {known.strange: (strangers, None)}
    if trained.dimensions == 3:
        for severity, settings in SEVERITIES.items():
            for name in settings:
                sets[f"{name}, {severity}"] = (judged, artefact(trained, name, settings[name]))
    references = read_references(known.labels)
    classes = sorted({reference.label for reference in references.values()})
    targets = np.array([classes.index(references[volume.id].label) for volume in fitted], np.int64)
    looks: dict[str, Callable[[list[Volume], Change | None], Floats]] = {
        "pretrained": lambda volumes, change: features(trained, volumes, change),
        "random": lambda volumes, change: features(untrained, volumes, change),
        "normalised": lambda volumes, change: np.stack([described_as_seen(trained, v, change) for v in volumes]),
        "raw": lambda volumes, change: np.stack([described(voxels_of(known.files[v.id])) for v in volumes]),
    }
    untrained = load_frozen(checkpoint, untrained=True, seed=SEED)

    def scored(look: str) -> dict[str, dict[str, list[float]]]:
        print(f"{time.strftime('%H:%M:%S')} {known.name}: {look}", file=sys.stderr, flush=True)
        of = looks[look]
        judge = judge_of(of(fitted, None), targets if look in ENCODERS else None)
        # What is done to a volume after normalisation leaves no trace in its file.
        wanted = {name: each for name, each in sets.items() if look != "raw" or each[1] is None}
        return {"known": judge(of(judged, None))} | {name: judge(of(*each)) for name, each in wanted.items()}

    folder = known.store.parent / "scores"
    scores = {look: arrays(kept(folder / f"{known.name}_{look}.json", partial(scored, look))) for look in looks}
    rows = [
        row_of(known.name, [name], score, {look: each for look, each in scores.items() if name in each})
        for name in sets
        for score in scores["pretrained"]["known"]
    ]
    for severity in SEVERITIES:
        near = [name for name in sets if name.endswith(f", {severity}")]
        seen = {look: each for look, each in scores.items() if look != "raw"}
        for score in scores["pretrained"]["known"] if near else ():
            rows.append(row_of(known.name, near, score, seen, f"artefact, {severity}"))
    counts = {"fitted": len(fitted), "judged": len(judged), known.strange: len(strangers)}
    return rows, counts, disagreement(known, checkpoint, rows, artefacts=trained.dimensions == 3)


def features(frozen: Frozen, volumes: list[Volume], change: Change | None) -> Floats:
    """Return what `evaluate_ood` looks at."""
    found = embed(frozen, volumes, stages="all", pooling="mean", change=change)
    found.require_finite()
    return found.features.astype(np.float64)


def artefact(frozen: Frozen, name: str, settings: Mapping[str, Any]) -> Change:
    """Return an artefact as `evaluate_ood` makes it."""
    values = {**settings, "probability": 1.0}
    if "per_channel" in CATALOGUE[name].settings_class.model_fields:
        values["per_channel"] = 1.0
    augmentation = AugmentationSettings(overrides={"intensity": {name: values}})
    return changed_by(policy_for("none", {"MR"}, frozen.patch_size, augmentation), frozen, SEED)


def described_as_seen(frozen: Frozen, volume: Volume, change: Change | None) -> Floats:
    """Describe the boxes that the encoder sees of a volume, on average."""
    found = []
    for tile in boxes_of(frozen, volume, "cover", MOST_BOXES):
        image = read_tile(volume.read, tile, volume.shape[1:], volume.shape[0], volume.background)
        found.append(described(image if change is None else change(image, volume, tile)))
    return np.mean(found, axis=0)


def voxels_of(path: Path) -> NDArray[Any]:
    """Return a file's own values."""
    if path.suffix == ".png":
        return np.asarray(Image.open(path))
    image: Any = nibabel.load(path)
    return np.asarray(image.dataobj)


def disagreement(known: Known, checkpoint: Path, rows: Sequence[Row], *, artefacts: bool) -> float:
    """Run what `medssl evaluate ood` runs, and return by how much its AUROC or FPR95 differs at most."""
    result = evaluate_ood(
        checkpoint, known.store, [known.strangers], artefacts=artefacts, seed=SEED, device="cpu", quiet=True
    )
    called = {name: f"{name}, strong" for name in result.near} | {known.strangers.name: known.strange}
    mine = {(row["strangers"], row["score"]): row["pretrained"] for row in rows}
    return max(
        abs(mine[called[name], score][measure].value - values[measure].value)
        for name, by_score in result.sets.items()
        for score, values in by_score.items()
        for measure in MEASURES
    )


if __name__ == "__main__":
    main()
