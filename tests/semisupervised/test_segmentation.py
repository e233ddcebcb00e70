"""Semi-supervised segmentation from a raw data set to a model that the other verbs take."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from medssl.errors import UsageError
from medssl.evaluation.segmentation import evaluate_segmentation
from medssl.semisupervised.segmentation import semisupervise_segmentation
from medssl.training.checkpoint import load_checkpoint
from medssl.training.engine import Engine
from medssl.training.metrics import read_metrics
from medssl.transfer.segmentation import finetune_segmentation
from medssl.transfer.source import load_source
from tests.transfer.conftest import MakeDataset, write_case

FAST: dict[str, Any] = {
    "network": "resenc-xs", "patch_size": (16, 16, 16), "steps": 4, "device": "cpu", "workers": 0, "quiet": True,
    "overrides": ["save_every=2", "pictures_every=0"],
}  # fmt: skip


def train(method: str, dataset: Path, out: Path, **changes: Any) -> Path:
    """Train a few steps with two labelled cases."""
    options = FAST | {"labelled": 2} | changes
    if "extra" in options:
        options["overrides"] = [*FAST["overrides"], *options.pop("extra")]
    return semisupervise_segmentation(method, dataset, options.pop("checkpoint", None), out, **options)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the network of a finished run."""
    found: dict[str, torch.Tensor] = load_checkpoint(run / "fold_0" / "checkpoint_final.pth")["network_weights"]
    return found


def same(first: Path, second: Path) -> bool:
    """Tell whether two runs ended with the same weights, bit for bit."""
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the machine fail once a number of steps were computed."""
    original = Engine.step

    def failing(self: Engine, now: Any, parts: Any) -> Any:
        if now.index == step:
            raise OSError("the machine failed")
        return original(self, now, parts)

    monkeypatch.setattr(Engine, "step", failing)


def test_a_run_is_a_model_that_the_other_verbs_take(make_dataset: MakeDataset, tmp_path: Path) -> None:
    from medssl.inference.predict import predict

    dataset = make_dataset(cases=6)
    run = train("mean-teacher", dataset, tmp_path / "run")
    facts = json.loads((run / "run.json").read_text())
    assert facts["kind"] == "segmentation" and facts["method"] == "mean-teacher" and facts["finished"]
    cases = json.loads((run / "data.json").read_text())["validation_cases"]
    result = evaluate_segmentation(run, dataset)
    assert list(result.cases) == cases
    images = tmp_path / "images"
    images.mkdir()
    for case in cases:
        (images / f"{case}_0000.nii.gz").symlink_to(dataset / "imagesTr" / f"{case}_0000.nii.gz")
    predict(run, images, tmp_path / "masks", device="cpu", quiet=True)
    for case in cases:
        ours = np.asarray(nibabel.load(tmp_path / "masks" / f"{case}.nii.gz").dataobj)  # type: ignore[attr-defined]
        written = np.asarray(nibabel.load(run / "validation" / f"{case}.nii.gz").dataobj)  # type: ignore[attr-defined]
        assert np.array_equal(ours, written)
    source = load_source(run)
    assert source.trains_decoder and source.patch_size == (16, 16, 16)
    tuned = finetune_segmentation(
        dataset, run, tmp_path / "tuned", steps=1, val_batches=1, device="cpu", workers=0, quiet=True
    )
    taken = json.loads((tuned / "transfer.json").read_text())
    assert taken["checkpoint"].startswith("step_") and any(name.startswith("decoder.stages") for name in taken["taken"])


def test_with_weight_zero_a_run_equals_the_supervised_one_bit_for_bit(
    make_dataset: MakeDataset, tmp_path: Path
) -> None:
    dataset, cache = make_dataset(cases=6), tmp_path / "cache"
    control = train("supervised", dataset, tmp_path / "control", cache=cache)
    none = ["unlabelled.weight=0", "predict_with=student"]
    assert same(control, train("mean-teacher", dataset, tmp_path / "zero", cache=cache, extra=none))
    some = ["unlabelled.fraction=0", "predict_with=student"]
    assert not same(control, train("mean-teacher", dataset, tmp_path / "one", cache=cache, extra=some))


@pytest.mark.parametrize("method", ["mean-teacher", pytest.param("cps", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_bit_for_bit(
    method: str, make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, cache = make_dataset(cases=6), tmp_path / "cache"
    whole = train(method, dataset, tmp_path / "whole", cache=cache)
    with monkeypatch.context() as patch:
        crash_at(patch, 3)
        with pytest.raises(OSError, match="the machine failed"):
            train(method, dataset, tmp_path / "killed", cache=cache)
    assert same(whole, train(method, dataset, tmp_path / "killed", cache=cache, resume=True))


def test_masks_of_unlabelled_cases_are_never_read(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = make_dataset(cases=6)
    before = train("mean-teacher", dataset, tmp_path / "before", train_cases=["case0", "case1"], labelled=None,
                   validation_cases=["case5"])  # fmt: skip
    for case in ("case2", "case3", "case4"):
        (dataset / "labelsTr" / f"{case}.nii.gz").write_bytes(b"no mask at all")
    after = train("mean-teacher", dataset, tmp_path / "after", train_cases=["case0", "case1"], labelled=None,
                  validation_cases=["case5"])  # fmt: skip
    assert same(before, after)
    links = [path.name for path in (after / "streams" / "unlabelled").rglob("*.b2nd")]
    assert len(links) == 3 and not any(name.endswith("_seg.b2nd") or name.startswith("case") for name in links)


def test_it_starts_from_a_pretrained_checkpoint_in_every_network(
    make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path
) -> None:
    run = train(
        "cps", make_dataset(cases=6), tmp_path / "run", checkpoint=checkpoint, network=None, learning_rate=1e-12
    )  # fmt: skip
    pretrained = load_checkpoint(checkpoint)["network_weights"]
    name = "encoder.stem.convs.0.conv.weight"
    assert torch.allclose(weights(run)[name], pretrained[name], atol=1e-6)
    assert json.loads((run / "transfer.json").read_text())["checkpoint"] == checkpoint.name


def test_without_unlabelled_images_a_method_that_needs_them_is_refused(
    make_dataset: MakeDataset, tmp_path: Path
) -> None:
    dataset = make_dataset(cases=5)
    with pytest.raises(UsageError, match="no unlabelled images"):
        train("mean-teacher", dataset, tmp_path / "run", labelled=None)
    assert not (tmp_path / "run").exists()
    train("supervised", dataset, tmp_path / "control", labelled=None)


def test_a_folder_of_images_is_checked_against_the_labelled_and_the_validation_cases(
    make_dataset: MakeDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, folder = make_dataset(cases=6), tmp_path / "archive"
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    write_case(folder, "other", seed=50)
    cases = {"train_cases": ["case0", "case1"], "validation_cases": ["case5"], "labelled": None}
    copied = folder / "imagesTr" / "copy_0000.nii.gz"
    copied.write_bytes((dataset / "imagesTr" / "case0_0000.nii.gz").read_bytes())
    with caplog.at_level(logging.WARNING):
        train("mean-teacher", dataset, tmp_path / "run", unlabelled=folder, **cases)
    assert "copy is the labelled case case0 too" in caplog.text
    assert len(list((tmp_path / "run" / "streams" / "unlabelled").rglob("u*.b2nd"))) == 1
    copied.write_bytes((dataset / "imagesTr" / "case5_0000.nii.gz").read_bytes())
    with pytest.raises(UsageError, match="validation case case5"):
        train("mean-teacher", dataset, tmp_path / "leak", unlabelled=folder, **cases)


def test_a_store_of_other_voxels_or_modality_is_refused_and_a_fitting_one_taken(
    make_dataset: MakeDataset, tmp_path: Path
) -> None:
    from medssl.preprocessing.run import preprocess

    dataset = make_dataset(cases=6)
    source = make_dataset("more", cases=3)
    fine, coarse = tmp_path / "fine", tmp_path / "coarse"
    preprocess(source, fine, spacing=(1.2, 1.0, 1.0), workers=0, quiet=True)
    preprocess(source, coarse, spacing=(2.0, 2.0, 2.0), workers=0, quiet=True)
    with pytest.raises(UsageError, match="--spacing"):
        train("mean-teacher", dataset, tmp_path / "run", unlabelled=coarse, spacing=(1.2, 1.0, 1.0))
    train("mean-teacher", dataset, tmp_path / "run", unlabelled=fine, spacing=(1.2, 1.0, 1.0))
    other = make_dataset("ct", cases=6, channel_names=("CT",))
    with pytest.raises(UsageError, match="no pseudo-labels"):
        train("mean-teacher", other, tmp_path / "ct_run", unlabelled=fine, spacing=(1.2, 1.0, 1.0))


def test_few_cases_and_absent_classes_are_warned_of(
    make_dataset: MakeDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = make_dataset(cases=6)
    path = dataset / "labelsTr" / "case0.nii.gz"
    mask = nibabel.load(path)  # type: ignore[attr-defined]
    values = np.asarray(mask.dataobj)
    nibabel.save(nibabel.Nifti1Image(np.where(values == 2, 0, values).astype(np.uint8), mask.affine), path)  # type: ignore[attr-defined, no-untyped-call]
    with caplog.at_level(logging.WARNING):
        train("supervised", dataset, tmp_path / "run", train_cases=["case0"], validation_cases=["case5"], labelled=None)
    assert "No labelled case shows 'right_ball'" in caplog.text
    assert "some crops of a batch come from one case" in caplog.text


def test_methods_and_settings_that_do_not_fit_are_refused(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = make_dataset(cases=6)
    with pytest.raises(UsageError, match="semixup is for classification"):
        train("semixup", dataset, tmp_path / "run")
    with pytest.raises(UsageError, match="unlabeled"):
        train("mean-teacher", dataset, tmp_path / "run", extra=["unlabeled.weight=1"])
    content = json.loads((dataset / "dataset.json").read_text())
    content["labels"] = {"background": 0, "whole": [1, 2], "right_ball": 2}
    content["regions_class_order"] = [1, 2]
    (dataset / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="regions"):
        train("mean-teacher", dataset, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_ranks_equal_one_process(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset, cache = make_dataset(cases=6), tmp_path / "cache"
    line = [
        "-m", "medssl", "semisupervise", "--dataset", str(dataset), "--method", "mean-teacher", "--labelled", "2",
        "--network", "resenc-xs", "--patch-size", "16,16,16", "--steps", "4", "--batch-size", "2", "--device", "cpu",
        "--workers", "0", "--quiet", "--cache", str(cache), "--set", "pictures_every=0",
    ]  # fmt: skip
    subprocess.run([sys.executable, *line, "--out", str(tmp_path / "one")], check=True, timeout=300)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", sys.executable]
    subprocess.run([sys.executable, *launcher, *line, "--out", str(tmp_path / "two")], check=True, timeout=300)
    rows = [read_metrics(tmp_path / run) for run in ("one", "two")]
    # Adam makes large steps of gradients that are nothing but rounding: the errors are compared, not the weights.
    for term in ("dice", "cross_entropy", "consistency", "gradient_norm"):
        first, second = ([row[term] for row in part] for part in rows)
        assert first == pytest.approx(second, rel=5e-3), term
    assert (tmp_path / "two" / "validation").is_dir()
