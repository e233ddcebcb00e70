"""Does pretraining save labels? Hippocampus, 4, 8 and 16 labelled cases: pretrained, scratch twin, untouched nnU-Net.

Command: `python pipelines/benchmarks/label_efficiency.py --workdir /tmp/label_efficiency` (hours; it goes on where it
stopped). A smoke run of a minute or two on two free cores:
`python pipelines/benchmarks/label_efficiency.py --workdir /tmp/smoke --smoke`

Protocol. The cases are split once by a fixed seed into validation (40), selection (20) and a pool (the rest). The
masked autoencoder is pretrained on the images of the pool alone, without labels; images of validation and selection
cases are never seen before they are predicted. For each seed, n labelled cases are drawn from the pool, the same ones
for every arm; fewer are a part of more. Every arm has the same small grid of learning rates, the same steps, batches
and plans. Its rate is chosen per number of labels by the mean Dice of the first `--rate-seeds` seeds on the selection
cases, and the Dice on the validation cases is then looked at for that rate alone. The last checkpoint of a run is its
model. Untouched nnU-Net (default planner and trainer, its own 3d_fullres plans, default rate) gets 8 labelled cases
and the CPU time that one fine-tuning run takes, and, in a second row, the CPU time of the pretraining on top.

Figures: mean Dice over labels in each case; intervals are percentile bootstraps over the validation cases with the
seeds averaged in each case; differences are paired by case. Seeds are listed one by one, since three are too few for
an interval of their own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("MEDSSL_DATA", HERE.parents[2] / "shared" / "data")) / "hippocampus"
SPLIT_SEED = 20_240
ARMS = {
    "pretrained": "encoder and decoder of the masked autoencoder",
    "encoder-only": "its encoder alone",
    "scratch": "the twin with random weights",
}


@dataclass(frozen=True)
class Run:
    """One fine-tuning run.

    Args:
        arm: A key of `ARMS`.
        labels: Number of labelled cases.
        seed: Of the draw of cases and of the training.
        rate: Peak learning rate.
    """

    arm: str
    labels: int
    seed: int
    rate: float

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.arm}_{self.labels:02d}_seed{self.seed}_rate{self.rate:g}"


def main() -> None:
    """Run what has not been run, then tabulate."""
    options = parse()
    # Before torch and numpy are imported: their pools are sized once.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(options.threads)
    from _label_efficiency_stock import run_stock
    from _label_efficiency_tables import chosen_rate, tabulate

    options.workdir.mkdir(parents=True, exist_ok=True)
    split = make_split(options)
    check_same_options(options)
    checkpoint = pretrained_checkpoint(options, split["pool"])
    scores: dict[Run, dict[str, Any]] = {}

    def score(arm: str, labels: int, seed: int, rate: float) -> None:
        run = Run(arm, labels, seed, rate)
        say(run.name)
        scores[run] = finetuned_scores(run, options, split, checkpoint)

    for labels, arm in itertools.product(options.labels, options.arms):
        for seed, rate in itertools.product(options.seeds[: options.rate_seeds], options.rates):
            score(arm, labels, seed, rate)
        chosen, _ = chosen_rate(options, split, scores, arm, labels)
        for seed in options.seeds[options.rate_seeds :]:
            score(arm, labels, seed, chosen)
    stock = {}
    if options.stock_labels:
        budgets = stock_budgets(options, scores)
        for name, seconds in budgets.items():
            for seed in options.seeds[: options.stock_seeds]:
                say(f"nnU-Net {name}, seed {seed}, {seconds:.0f} s of CPU time")
                cases = labelled_cases(split["pool"], options.stock_labels, seed)
                stock[name, seed] = run_stock(options, name, seed, seconds, cases, split["validation"])
    tabulate(options, split, scores, stock)


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="where runs are kept and found again")
    parser.add_argument("--data", type=Path, default=DATA, help="nnU-Net raw folder")
    parser.add_argument("--network", default="resenc-xs")
    parser.add_argument("--patch", type=int, nargs=3, default=[40, 56, 40], metavar=("Z", "Y", "X"))
    parser.add_argument("--steps", type=int, default=100, help="steps of each fine-tuning run")
    parser.add_argument("--pretrain-steps", type=int, default=1200)
    parser.add_argument("--recipe", type=Path, default=HERE.parent / "hippocampus_mae.yaml", help="of the pretraining")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "float32"], help="of the pretraining")
    parser.add_argument("--labels", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 3e-3])
    parser.add_argument("--rate-seeds", type=int, default=1, help="seeds that choose the learning rate")
    parser.add_argument("--arms", nargs="+", default=["pretrained", "scratch"], choices=sorted(ARMS))
    parser.add_argument("--schedule", default="warmup")
    parser.add_argument("--validation", type=int, default=40, help="validation cases")
    parser.add_argument("--selection", type=int, default=20, help="cases that choose the learning rate")
    parser.add_argument(
        "--stock-labels", type=int, default=8, help="labelled cases of untouched nnU-Net; 0 leaves it out"
    )
    parser.add_argument("--stock-seeds", type=int, help="how many of the seeds untouched nnU-Net gets; all by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="label_efficiency", help="name of the results")
    parser.add_argument("--smoke", action="store_true", help="a minute or two, to see that all of it runs")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.pretrain_steps, options.labels, options.seeds = 6, 6, [2], [0]
        options.rates, options.validation, options.selection, options.stock_labels = [1e-2], 3, 2, 2
        options.name = "label_efficiency_smoke"
    if "scratch" not in options.arms:
        parser.error("--arms needs scratch: all other arms are compared with it")
    return options


def make_split(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return validation, selection and pool: the same for the same data set and sizes."""
    names = sorted(path.name.removesuffix(".nii.gz") for path in (options.data / "labelsTr").glob("*.nii.gz"))
    needed = options.validation + options.selection + max(options.labels)
    if len(names) < needed:
        sys.exit(f"{options.data} has {len(names)} cases; {needed} are needed.")
    order = [names[index] for index in np.random.default_rng(SPLIT_SEED).permutation(len(names))]
    first, second = options.validation, options.validation + options.selection
    return {
        "validation": sorted(order[:first]),
        "selection": sorted(order[first:second]),
        "pool": sorted(order[second:]),
    }


def labelled_cases(pool: list[str], number: int, seed: int) -> list[str]:
    """Draw labelled cases; for one seed, fewer are a part of more."""
    order = np.random.default_rng([SPLIT_SEED, seed]).permutation(len(pool))
    return sorted(pool[index] for index in order[:number])


def check_same_options(options: argparse.Namespace) -> None:
    """Refuse to mix runs of different settings in one work folder; arms, labels, seeds and rates may be added."""
    fixed = (
        "network",
        "patch",
        "steps",
        "pretrain_steps",
        "precision",
        "schedule",
        "validation",
        "selection",
        "threads",
    )
    values = {name: getattr(options, name) for name in fixed}
    path = options.workdir / "options.json"
    if path.is_file() and json.loads(path.read_text()) != values:
        sys.exit(f"{options.workdir} holds runs with other options ({path.read_text()}). Choose another --workdir.")
    path.write_text(json.dumps(values))


def pretrained_checkpoint(options: argparse.Namespace, pool: list[str]) -> Path:
    """Pretrain on the images of the pool; noted are the seconds it took."""
    from medssl.preprocessing.run import preprocess
    from medssl.pretraining.run import pretrain
    from medssl.training.checkpoint import find_checkpoint

    run, note = options.workdir / "pretraining", options.workdir / "pretraining.json"
    if note.is_file():
        return find_checkpoint(run)
    images, store = options.workdir / "unlabelled", options.workdir / "store"
    (images / "imagesTr").mkdir(parents=True, exist_ok=True)
    for name in pool:
        for path in options.data.glob(f"imagesTr/{name}_*.nii.gz"):
            link = images / "imagesTr" / path.name
            if not link.exists():
                link.symlink_to(path.resolve())
    content = json.loads((options.data / "dataset.json").read_text())
    (images / "dataset.json").write_text(json.dumps(content | {"numTraining": len(pool)}))
    preprocess(images, store, resume=store.exists(), workers=options.threads)
    settings = [f"network={options.network}", f"precision={options.precision}", "seed=0", "save_minutes=5"]
    wall, cpu = time.monotonic(), time.process_time()
    resume = (run / "recipe.yaml").is_file()
    path = pretrain(
        "mae",
        store,
        run,
        recipe=options.recipe,
        overrides=settings,
        steps=options.pretrain_steps,
        resume=resume,
        device="cpu",
        workers=0,
    )
    seconds = {
        "wall_s": time.monotonic() - wall,
        "cpu_s": time.process_time() - cpu,
        "resumed": resume,
        "images": len(pool),
    }
    note.write_text(json.dumps(seconds))
    return path


def finetuned_scores(
    run: Run, options: argparse.Namespace, split: dict[str, list[str]], checkpoint: Path
) -> dict[str, Any]:
    """Fine-tune once, predict selection and validation cases, and return Dice per case with the time it took."""
    from medssl.evaluation.results import measure_run
    from medssl.training.checkpoint import load_checkpoint
    from medssl.transfer.segmentation import finetune_segmentation

    kept = options.workdir / "scores" / f"{run.name}.json"
    if kept.is_file():
        return json.loads(kept.read_text())  # type: ignore[no-any-return]
    folder = options.workdir / "runs" / run.name
    scratch = run.arm == "scratch"
    finetune_segmentation(
        options.data,
        None if scratch else checkpoint,
        folder,
        plans_from=checkpoint if scratch else None,
        transfer_decoder=run.arm == "pretrained",
        steps=options.steps,
        val_every=options.steps,
        val_batches=1,
        learning_rate=run.rate,
        schedule=options.schedule,
        train_cases=labelled_cases(split["pool"], run.labels, run.seed),
        validation_cases=[*split["selection"], *split["validation"]],
        patch_size=options.patch,
        batch_size=2,
        seed=run.seed,
        device="cpu",
        workers=0,
        cache=options.workdir / "cache",
        resume=(folder / "run.json").is_file(),
        overwrite=folder.exists() and not (folder / "run.json").is_file(),
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if "loss" in row]
    scores = {
        "dice": dice_of(measure_run(folder)),
        "train_wall_s": training[-1]["time"],
        "train_cpu_s": load_checkpoint(folder / "fold_0" / "checkpoint_final.pth")["medssl"]["cpu_s"],
        "last_losses": float(np.mean([row["loss"] for row in training[-20:]])),
    }
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps(scores))
    return scores


def dice_of(result: Any) -> dict[str, float]:
    """Return the mean Dice over labels of each case."""
    return {case: float(value) for case, value in result.per_case("dice").items()}


def stock_budgets(options: argparse.Namespace, scores: dict[Run, dict[str, Any]]) -> dict[str, float]:
    """Return the CPU seconds that untouched nnU-Net may use: of one fine-tuning, and with the pretraining on top."""
    finetuning = float(np.median([score["train_cpu_s"] for score in scores.values()]))
    pretraining = json.loads((options.workdir / "pretraining.json").read_text())["cpu_s"]
    return {
        "same time as fine-tuning": finetuning,
        "same time as pretraining and fine-tuning": finetuning + pretraining,
    }


def say(text: str) -> None:
    """Tell what is being done."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
