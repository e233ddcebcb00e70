"""Untouched nnU-Net for `label_efficiency.py`: default planner, default trainer, a budget of CPU time."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

NAME = "Dataset998_benchmark"
# Steps that find out how long one takes; they are not part of the budget.
STEPS_TO_TIME = 2


def run_stock(
    options: argparse.Namespace, budget: str, seed: int, seconds: float, cases: list[str], validation: list[str]
) -> dict[str, Any]:
    """Train nnU-Net on labelled cases within a budget and return its Dice per validation case.

    nnU-Net plans by GPU memory and not by time, so its steps are longer and fewer. Its poly schedule is made to end
    with the budget. Only the time of batches and steps counts; planning, preprocessing, validation and plots are free.

    Args:
        options: Of the benchmark.
        budget: Its name.
        seed: Of the weights and batches.
        seconds: CPU time of training.
        cases: Labelled cases.
        validation: Cases to predict.
    """
    from label_efficiency import dice_of

    from medssl.evaluation.segmentation import evaluate_segmentation
    from medssl.transfer.nnunet import nnunet_environment

    home = options.workdir / "stock" / f"seed{seed}_{'long' if 'pretraining' in budget else 'short'}"
    kept = home / "scores.json"
    if kept.is_file():
        return json.loads(kept.read_text())  # type: ignore[no-any-return]
    make_dataset(options.data, home / "raw" / NAME, cases)
    folders = {f"nnUNet_{part}": str(home / part) for part in ("raw", "preprocessed", "results")}
    # The planner sets as many threads as there are processes for augmentation, and refuses none.
    with nnunet_environment(**folders, nnUNet_n_proc_DA="1"):
        plans = plan_and_preprocess(home)
    with nnunet_environment(**folders):
        trainer = make_trainer(home, plans, seed)
        facts = train(trainer, seconds)
        predict(trainer, options.data, validation, home / "masks")
    result = evaluate_segmentation(home / "masks", options.data / "labelsTr", cases=validation, quiet=True)
    configuration = plans["configurations"]["3d_fullres"]
    scores = {
        "dice": dice_of(result),
        **facts,
        "patch_size": [int(edge) for edge in configuration["patch_size"]],
        "batch_size": int(configuration["batch_size"]),
        "budget_s": seconds,
    }
    kept.write_text(json.dumps(scores))
    return scores


def make_dataset(source: Path, target: Path, cases: list[str]) -> None:
    """Link the labelled cases into a raw data set of their own."""
    for folder in ("imagesTr", "labelsTr"):
        (target / folder).mkdir(parents=True, exist_ok=True)
        for name in cases:
            for path in [*source.glob(f"{folder}/{name}_*.nii.gz"), *source.glob(f"{folder}/{name}.nii.gz")]:
                link = target / folder / path.name
                if not link.exists():
                    link.symlink_to(path.resolve())
    content = json.loads((source / "dataset.json").read_text())
    (target / "dataset.json").write_text(json.dumps(content | {"numTraining": len(cases)}))


def plan_and_preprocess(home: Path) -> dict[str, Any]:
    """Run nnU-Net's fingerprint, default planner and preprocessor."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    DatasetFingerprintExtractor(NAME, 1).run()
    plans: dict[str, Any] = ExperimentPlanner(NAME).plan_experiment()
    done = home / "preprocessed" / NAME / "nnUNetPlans_3d_fullres"
    if len(list(done.glob("*.pkl"))) < len(list((home / "raw" / NAME / "labelsTr").iterdir())):
        DefaultPreprocessor(verbose=False).run(NAME, "3d_fullres", "nnUNetPlans", 1)
    return plans


def make_trainer(home: Path, plans: dict[str, Any], seed: int) -> Any:
    """Return nnU-Net's own trainer on all labelled cases."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    np.random.seed(seed)
    torch.manual_seed(seed)
    content = json.loads((home / "raw" / NAME / "dataset.json").read_text())
    read = json.loads((home / "preprocessed" / NAME / "nnUNetPlans.json").read_text())
    trainer = nnUNetTrainer(read | {"continue_training": False}, "3d_fullres", "all", content, torch.device("cpu"))
    trainer.initialize()
    return trainer


def train(trainer: Any, seconds: float) -> dict[str, Any]:
    """Train for a budget of CPU time: time some steps, then start anew with a schedule that ends with the budget."""
    from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

    state = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    batches, _ = trainer.get_dataloaders()
    trainer.set_deep_supervision_enabled(True)
    trainer.network.train()
    started = time.process_time()
    for _ in range(STEPS_TO_TIME):
        trainer.train_step(next(batches))
    per_step = (time.process_time() - started) / STEPS_TO_TIME
    steps = max(1, round(seconds / per_step))
    trainer.network.load_state_dict(state)
    trainer.optimizer, _ = trainer.configure_optimizers()
    schedule = PolyLRScheduler(trainer.optimizer, trainer.initial_lr, steps)
    started, losses = time.process_time(), []
    for step in range(steps):
        schedule.step(step)
        losses.append(float(trainer.train_step(next(batches))["loss"]))
    return {"steps": steps, "cpu_s": time.process_time() - started, "last_losses": float(np.mean(losses[-10:]))}


def predict(trainer: Any, data: Path, cases: list[str], out: Path) -> None:
    """Predict cases with nnU-Net's predictor and its default test-time mirroring, in this process."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    out.mkdir(exist_ok=True)
    trainer.set_deep_supervision_enabled(False)
    predictor = nnUNetPredictor(perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network, trainer.plans_manager, trainer.configuration_manager, [trainer.network.state_dict()],
        trainer.dataset_json, "nnUNetTrainer", trainer.inference_allowed_mirroring_axes,
    )  # fmt: skip
    reader = trainer.plans_manager.image_reader_writer_class()
    for case in cases:
        image, facts = reader.read_images([str(path) for path in sorted(data.glob(f"imagesTr/{case}_*.nii.gz"))])
        predictor.predict_single_npy_array(image, facts, None, str(out / case), False)
