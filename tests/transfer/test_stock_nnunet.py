"""Stock nnU-Net's own commands run on what we write: prediction on a RUN, training with our trainer and our weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

import medssl.transfer.trainers
from medssl.transfer.export import export
from medssl.transfer.segmentation import finetune_segmentation

from .conftest import MakeDataset

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent


def _run(command: list[str], **environment: str) -> str:
    variables = {**os.environ, "nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "1", **environment}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def _images_without_labels(folder: Path, cases: list[str], target: Path) -> Path:
    target.mkdir()
    for case in cases:
        for path in (folder / "imagesTr").glob(f"{case}_*.nii.gz"):
            (target / path.name).symlink_to(path)
    return target


def test_stock_prediction_runs_on_a_run_and_gives_the_same_masks(
    make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path
) -> None:
    folder = make_dataset()
    run = finetune_segmentation(
        folder,
        checkpoint,
        tmp_path / "run",
        steps=20,
        val_every=20,
        val_batches=1,
        learning_rate=1e-2,
        device="cpu",
        quiet=True,
    )
    cases = json.loads((run / "data.json").read_text())["validation_cases"]
    images = _images_without_labels(folder, cases, tmp_path / "images")
    _run(
        [
            str(BIN / "nnUNetv2_predict_from_modelfolder"),
            "-i",
            str(images),
            "-o",
            str(tmp_path / "masks"),
            "-m",
            str(run),
        ]
        + ["-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1"]
    )
    for case in cases:
        theirs, ours = (nibabel.load(place / f"{case}.nii.gz") for place in (tmp_path / "masks", run / "validation"))
        assert np.array_equal(theirs.dataobj, ours.dataobj) and np.allclose(theirs.affine, ours.affine)
        assert np.any(np.asarray(ours.dataobj))


def test_plain_nnunet_trains_with_our_trainer_our_plans_and_our_weights(
    make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path
) -> None:
    folder = make_dataset("Dataset017_balls", cases=6)
    environment = {
        "nnUNet_raw": str(folder.parent),
        "nnUNet_preprocessed": str(tmp_path / "preprocessed"),
        "nnUNet_results": str(tmp_path / "results"),
        "nnUNet_extTrainer": str(Path(medssl.transfer.trainers.__file__).parent),
    }
    home = tmp_path / "preprocessed" / "Dataset017_balls"
    _run(
        [str(BIN / "nnUNetv2_plan_and_preprocess"), "-d", "17", "-c", "3d_fullres", "-np", "1", "-npfp", "1"],
        **environment,
    )
    weights = export(checkpoint, "nnunet", tmp_path / "weights.pth", plans=home / "nnUNetPlans.json")
    (home / "medSSLPlans.json").write_bytes((tmp_path / "weights_plans.json").read_bytes())
    settings = tmp_path / "settings.yaml"
    settings.write_text("{steps: 3, val_every: 2, val_batches: 1, schedule: sawtooth, laterality: forbid}\n")
    command = [str(BIN / "nnUNetv2_train"), "17", "3d_fullres", "0", "-p", "medSSLPlans", "-tr", "medSSLTrainer"]
    output = _run(
        [*command, "-device", "cpu", "-pretrained_weights", str(weights)], **environment, MEDSSL_FINETUNE=str(settings)
    )
    assert "Loading pretrained weights" in output and "Mean Validation Dice" in output
    model = tmp_path / "results" / "Dataset017_balls" / "medSSLTrainer__medSSLPlans__3d_fullres"
    content = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=True)
    assert content["medssl"]["step"] == 3 and tuple(content["inference_allowed_mirroring_axes"]) == (0, 1)
    # Three steps at a small rate leave the weights near where pretraining put them.
    pretrained = torch.load(weights, weights_only=True)["network_weights"]
    name = "encoder.stages.2.blocks.0.conv1.conv.weight"
    assert torch.allclose(content["network_weights"][name], pretrained[name], atol=1e-2)
    assert (model / "plans.json").is_file() and (model / "dataset.json").is_file()


KILLED = """
import sys
from pathlib import Path
from medssl.transfer.segmentation import finetune_segmentation
folder, checkpoint, out, cache, resume = sys.argv[1:]
finetune_segmentation(Path(folder), Path(checkpoint), Path(out), cache=Path(cache), resume=resume == "yes", steps=60,
                      val_every=10, val_batches=1, device="cpu", validation_cases=[], quiet=True)
"""


def test_a_run_that_is_killed_by_the_kernel_ends_as_if_it_had_not_been(
    make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path
) -> None:
    folder = make_dataset()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out: Path, resume: str = "no") -> subprocess.Popen[bytes]:
        arguments = [str(folder), str(checkpoint), str(out), str(tmp_path / "cache"), resume]
        return subprocess.Popen([sys.executable, "-c", KILLED, *arguments], env=environment)

    assert start(tmp_path / "whole").wait(280) == 0
    killed = start(tmp_path / "killed")
    latest = tmp_path / "killed" / "fold_0" / "checkpoint_latest.pth"
    while not latest.is_file():
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait(30)
    assert not (tmp_path / "killed" / "fold_0" / "checkpoint_final.pth").is_file()
    assert start(tmp_path / "killed", resume="yes").wait(280) == 0
    one, two = (
        torch.load(tmp_path / name / "fold_0" / "checkpoint_final.pth", weights_only=True)["network_weights"]
        for name in ("whole", "killed")
    )
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_real_hippocampi_train_for_some_steps(data_folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = data_folder / "hippocampus"
    if not folder.is_dir():
        pytest.skip("the hippocampus data set is absent")
    names = sorted(path.name.removesuffix(".nii.gz") for path in (folder / "labelsTr").glob("*.nii.gz"))[:6]
    run = finetune_segmentation(
        folder, checkpoint, tmp_path / "run", train_cases=names[:4], validation_cases=names[4:], steps=30, val_every=15,
        val_batches=2, learning_rate=1e-2, patch_size=(32, 40, 32), device="cpu", quiet=True,
    )  # fmt: skip
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2
    for name in names[4:]:
        mask, image = (
            nibabel.load(run / "validation" / f"{name}.nii.gz"),
            nibabel.load(folder / "imagesTr" / f"{name}_0000.nii.gz"),
        )
        assert mask.shape == image.shape and np.allclose(mask.affine, image.affine)
        assert set(np.unique(mask.dataobj)) <= {0, 1, 2}
