"""Fine-tuning ends in a RUN that is an nnU-Net model folder, the same after a crash."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from medssl.errors import DataError, TrainingStopped, UsageError
from medssl.networks.architecture import architecture
from medssl.transfer.segmentation import finetune_segmentation
from medssl.transfer.source import load_source

from .conftest import MakeDataset

SMALL: dict[str, Any] = {"steps": 4, "val_every": 2, "val_batches": 1, "quiet": True, "device": "cpu", "workers": 0}


class Crash(Exception):
    """Stands for a kill: nothing of ours catches it."""


def _crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    from medssl.transfer.trainers.medssl_trainer import medSSLTrainer

    whole = medSSLTrainer._one_step

    def one_step(self: Any, batch: dict[str, Any]) -> tuple[float, float]:
        if self.step == step:
            raise Crash
        return whole(self, batch)

    monkeypatch.setattr(medSSLTrainer, "_one_step", one_step)


def _final(run: Path) -> dict[str, Any]:
    return torch.load(run / "fold_0" / "checkpoint_final.pth", weights_only=True)  # type: ignore[no-any-return]


def _same(first: Path, second: Path) -> bool:
    one, two = _final(first), _final(second)
    weights = all(torch.equal(one["network_weights"][key], value) for key, value in two["network_weights"].items())
    momenta = one["optimizer_state"]["state"], two["optimizer_state"]["state"]
    return weights and all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(momenta[1][key][name]))
        for key, values in momenta[0].items()
        for name, value in values.items()
    )


def test_a_run_holds_all_that_nnunet_and_a_reader_need(
    make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path
) -> None:
    folder, run = make_dataset(), tmp_path / "run"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert finetune_segmentation(folder, checkpoint, run, labelled=2, **SMALL) == run
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    content = _final(run)
    assert content["trainer_name"] == "nnUNetTrainer"
    assert content["init_args"]["configuration"] == "3d_fullres"
    assert tuple(content["inference_allowed_mirroring_axes"]) == (0, 1)
    assert json.loads((run / "run.json").read_text())["kind"] == "segmentation"
    assert json.loads((run / "run.json").read_text())["finished"] is True
    data = json.loads((run / "data.json").read_text())
    assert len(data["train_cases"]) == 2 and not set(data["train_cases"]) & set(data["validation_cases"])
    for name in ("recipe.yaml", "environment.json", "splits_final.json", "views.png", "dataset.json", "plans.json"):
        assert (run / name).stat().st_size > 0, name
    for case in data["validation_cases"]:
        mask, source = (
            nibabel.load(path)
            for path in (run / "validation" / f"{case}.nii.gz", folder / "labelsTr" / f"{case}.nii.gz")
        )
        assert mask.shape == source.shape and np.allclose(mask.affine, source.affine)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "pseudo_dice/left_ball" in row] == [2, 4]
    report = json.loads((run / "transfer.json").read_text())
    assert report["counts"]["missing"] == 0 and "decoder.stages.0.convs.0.conv.weight" in report["taken"]
    assert not list((run / "fold_0").glob("checkpoint_latest*"))


def test_the_first_step_starts_from_the_pretrained_weights(
    make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path
) -> None:
    run = finetune_segmentation(
        make_dataset(), checkpoint, tmp_path / "run", learning_rate=1e-12, **SMALL | {"steps": 1}
    )
    weights, pretrained = _final(run)["network_weights"], load_source(checkpoint).weights
    for name, value in pretrained.items():
        if ".seg_layers." not in name:
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-7)


def test_encoder_only_is_an_option(make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path) -> None:
    run = finetune_segmentation(
        make_dataset(),
        checkpoint,
        tmp_path / "run",
        transfer_decoder=False,
        learning_rate=1e-12,
        **SMALL | {"steps": 1},
    )
    weights, pretrained = _final(run)["network_weights"], load_source(checkpoint).weights
    assert not torch.allclose(
        weights["decoder.stages.0.convs.0.conv.weight"], pretrained["decoder.stages.0.convs.0.conv.weight"]
    )
    assert torch.allclose(
        weights["encoder.stages.3.blocks.1.conv1.conv.weight"],
        pretrained["encoder.stages.3.blocks.1.conv1.conv.weight"],
    )


def test_the_scratch_twin_has_the_same_plans_batches_and_output_layers(
    make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path
) -> None:
    folder = make_dataset()
    shared = {**SMALL, "cache": tmp_path / "cache", "learning_rate": 1e-12, "steps": 1}
    pretrained = finetune_segmentation(folder, checkpoint, tmp_path / "pretrained", **shared)
    scratch = finetune_segmentation(folder, None, tmp_path / "scratch", plans_from=checkpoint, **shared)
    assert (pretrained / "plans.json").read_text() == (scratch / "plans.json").read_text()
    assert (pretrained / "views.png").read_bytes() == (scratch / "views.png").read_bytes()
    one, two = (_final(run)["network_weights"] for run in (pretrained, scratch))
    assert torch.allclose(one["decoder.seg_layers.0.weight"], two["decoder.seg_layers.0.weight"], atol=1e-8)
    assert not torch.allclose(one["encoder.stem.convs.0.conv.weight"], two["encoder.stem.convs.0.conv.weight"])
    assert json.loads((scratch / "run.json").read_text())["arm"] == "scratch"


@pytest.mark.parametrize("crash", [0, 1, 3])
def test_a_killed_run_goes_on_bit_for_bit(
    make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: int
) -> None:
    folder = make_dataset()
    options = {**SMALL, "cache": tmp_path / "cache", "schedule": "sawtooth", "frozen_fraction": 0.5}
    whole = finetune_segmentation(folder, checkpoint, tmp_path / "whole", **options)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        _crash_at(patch, crash)
        finetune_segmentation(folder, checkpoint, tmp_path / "killed", **options)
    killed = finetune_segmentation(folder, checkpoint, tmp_path / "killed", resume=True, **options)
    assert _same(whole, killed)
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 2, 3, 4, 4]
    for mask in (whole / "validation").glob("*.nii.gz"):
        assert np.array_equal(nibabel.load(mask).dataobj, nibabel.load(killed / "validation" / mask.name).dataobj)


def test_workers_change_nothing_but_the_time(make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path) -> None:
    folder = make_dataset()
    shared = {**SMALL, "cache": tmp_path / "cache", "validation_cases": []}
    none = finetune_segmentation(folder, checkpoint, tmp_path / "none", **shared)
    two = finetune_segmentation(folder, checkpoint, tmp_path / "two", **shared | {"workers": 2})
    assert _same(none, two)


def test_another_seed_is_another_run(make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path) -> None:
    folder = make_dataset()
    shared = {**SMALL, "cache": tmp_path / "cache", "validation_cases": []}
    runs = [finetune_segmentation(folder, checkpoint, tmp_path / f"{seed}", seed=seed, **shared) for seed in (0, 1)]
    assert not _same(*runs)


def test_a_frozen_encoder_does_not_move(make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path) -> None:
    run = finetune_segmentation(
        make_dataset(),
        checkpoint,
        tmp_path / "run",
        schedule="frozen",
        frozen_fraction=0.99,
        learning_rate=1e-2,
        **SMALL,
    )
    weights, pretrained = _final(run)["network_weights"], load_source(checkpoint).weights
    for name, value in pretrained.items():
        if name.startswith("encoder."):
            assert torch.equal(weights[name], value), name
    assert not torch.equal(
        weights["decoder.stages.0.convs.0.conv.weight"], pretrained["decoder.stages.0.convs.0.conv.weight"]
    )


def test_more_channels_and_swapped_labels_train(make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path) -> None:
    run = finetune_segmentation(
        make_dataset(channel_names=("T1", "T2")),
        checkpoint,
        tmp_path / "run",
        laterality="swap-labels",
        **SMALL | {"steps": 2},
    )
    assert _final(run)["network_weights"]["encoder.stem.convs.0.conv.weight"].shape[1] == 2
    assert json.loads((run / "transfer.json").read_text())["counts"]["repeated"] > 0


def test_a_signal_saves_and_the_run_goes_on(
    make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    from medssl.transfer.trainers.medssl_trainer import medSSLTrainer

    folder = make_dataset()
    options = {**SMALL, "cache": tmp_path / "cache", "val_every": 4, "validation_cases": []}
    whole = finetune_segmentation(folder, checkpoint, tmp_path / "whole", **options)
    original = medSSLTrainer._one_step

    def one_step(self: Any, batch: dict[str, Any]) -> tuple[float, float]:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    with (
        monkeypatch.context() as patch,
        pytest.raises(TrainingStopped, match=r"SIGTERM after step 3.*--resume") as stopped,
    ):
        patch.setattr(medSSLTrainer, "_one_step", one_step)
        finetune_segmentation(folder, checkpoint, tmp_path / "stopped", **options)
    assert stopped.value.exit_code == 143
    assert _same(whole, finetune_segmentation(folder, checkpoint, tmp_path / "stopped", resume=True, **options))


def test_a_finished_run_is_left_alone_by_resume(make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path) -> None:
    folder, run = make_dataset(), tmp_path / "run"
    finetune_segmentation(folder, checkpoint, run, **SMALL)
    before = (run / "fold_0" / "checkpoint_final.pth").stat().st_mtime_ns
    finetune_segmentation(folder, checkpoint, run, resume=True, **SMALL)
    assert (run / "fold_0" / "checkpoint_final.pth").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match=r"is not empty. Use --resume"):
        finetune_segmentation(folder, checkpoint, run, **SMALL)
    with pytest.raises(UsageError, match=r"--resume: steps is 8 now and was 4"):
        finetune_segmentation(folder, checkpoint, run, resume=True, **SMALL | {"steps": 8})


def test_bad_data_leave_nothing_behind(make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path) -> None:
    folder, run = make_dataset(), tmp_path / "run"
    image = nibabel.load(folder / "labelsTr" / "case2.nii.gz")
    nibabel.save(
        nibabel.Nifti1Image(np.asanyarray(image.dataobj)[:-1], image.affine), folder / "labelsTr" / "case2.nii.gz"
    )
    for overwrite in (False, True):
        if overwrite:
            (run / "preprocessed").mkdir(parents=True)
            (run / "run.json").write_text('{"kind": "segmentation"}')
        with pytest.raises(DataError, match=r"case2: case2.nii.gz has the shape"):
            finetune_segmentation(folder, checkpoint, run, overwrite=overwrite, **SMALL)
        assert not run.exists()


def test_a_foreign_folder_is_not_overwritten(make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    with pytest.raises(UsageError, match="was not written by this command"):
        finetune_segmentation(make_dataset(), checkpoint, tmp_path / "thesis", overwrite=True, **SMALL)
    assert (tmp_path / "thesis" / "chapter1.tex").is_file()


def test_slices_of_volumes_train_a_network_of_two_dimensions(make_dataset: MakeDataset, tmp_path: Path) -> None:
    from medssl.networks.build import build_network
    from medssl.training.checkpoint import save_checkpoint

    plan = architecture("resenc-xs", 2)
    facts = {"dimensions": 2, "in_channels": 1, **plan.to_json()}
    save_checkpoint(
        tmp_path / "flat.pth",
        {
            "network_weights": build_network("resenc-xs", dimensions=2, seed=0).state_dict(),
            "medssl": {"architecture": facts, "patch_size": [24, 24], "spacing_mm": None, "trains_decoder": True},
        },
    )
    folder = make_dataset()
    run = finetune_segmentation(folder, tmp_path / "flat.pth", tmp_path / "run", **SMALL)
    assert _final(run)["init_args"]["configuration"] == "2d"
    assert tuple(_final(run)["inference_allowed_mirroring_axes"]) == (0,)
    case = json.loads((run / "data.json").read_text())["validation_cases"][0]
    assert nibabel.load(run / "validation" / f"{case}.nii.gz").shape == (24, 24, 24)


def test_colour_pictures_train_a_network_of_two_dimensions(tmp_path: Path) -> None:
    from PIL import Image

    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for number in range(4):
        mask = np.zeros((40, 48), dtype=np.uint8)
        mask[10 + number : 30, 12:30] = 1
        picture = rng.integers(0, 90, (40, 48, 3), dtype=np.uint8) + 100 * mask[..., None]
        Image.fromarray(picture).save(folder / "imagesTr" / f"p{number}_0000.png")
        Image.fromarray(mask).save(folder / "labelsTr" / f"p{number}.png")
    content = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": 4,
        "file_ending": ".png",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    run = finetune_segmentation(folder, None, tmp_path / "run", network="resenc-xs", **SMALL)
    assert (run / "validation" / "p3.png").is_file()
    assert _final(run)["network_weights"]["encoder.stem.convs.0.conv.weight"].shape == (16, 3, 3, 3)


def test_regions_and_ignored_voxels_train(make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path) -> None:
    folder = make_dataset()
    content = json.loads((folder / "dataset.json").read_text())
    content |= {"labels": {"background": 0, "both": [1, 2], "right": 2, "ignore": 3}, "regions_class_order": [1, 2]}
    (folder / "dataset.json").write_text(json.dumps(content))
    path = folder / "labelsTr" / "case0.nii.gz"
    image = nibabel.load(path)
    mask = np.asanyarray(image.dataobj).copy()
    mask[:3] = 3
    nibabel.save(nibabel.Nifti1Image(mask, image.affine), path)
    run = finetune_segmentation(folder, checkpoint, tmp_path / "run", **SMALL)
    assert _final(run)["network_weights"]["decoder.seg_layers.0.weight"].shape[0] == 2
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"pseudo_dice/both", "pseudo_dice/right"} <= set(rows[-1])


def test_options_that_exclude_each_other_are_refused(
    make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path
) -> None:
    folder, run = make_dataset(), tmp_path / "run"
    with pytest.raises(UsageError, match=r"either --plans-from CHECKPOINT .* or --network NAME"):
        finetune_segmentation(folder, None, run, **SMALL)
    with pytest.raises(UsageError, match="the checkpoint decides the network"):
        finetune_segmentation(folder, checkpoint, run, network="resenc-xs", **SMALL)
    with pytest.raises(UsageError, match="no schedule named 'warm'"):
        finetune_segmentation(folder, checkpoint, run, schedule="warm", **SMALL)
    with pytest.raises(UsageError, match="no network named 'resenc-z'"):
        finetune_segmentation(folder, None, run, network="resenc-z", **SMALL)
    with pytest.raises(UsageError, match="device cuda:99"):
        finetune_segmentation(folder, checkpoint, run, **SMALL | {"device": "cuda:99"})
    assert not run.exists()


def test_a_damaged_last_checkpoint_is_named(
    make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medssl.errors import CheckpointError

    folder, run = make_dataset(), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Crash):
        _crash_at(patch, 3)
        finetune_segmentation(folder, checkpoint, run, **SMALL)
    latest = run / "fold_0" / "checkpoint_latest.pth"
    latest.write_bytes(latest.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        finetune_segmentation(folder, checkpoint, run, resume=True, **SMALL)


def test_the_global_state_of_the_process_is_as_before(
    make_dataset: MakeDataset,
    checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import os

    environment, state = dict(os.environ), torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        finetune_segmentation(make_dataset(), checkpoint, tmp_path / "run", **SMALL | {"steps": 1})
    assert dict(os.environ) == environment and torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr().out == ""
    assert not caplog.records


def test_the_pretrainings_spacing_is_an_option(make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path) -> None:
    folder = make_dataset()
    run = finetune_segmentation(folder, checkpoint, tmp_path / "run", spacing="pretraining", **SMALL | {"steps": 1})
    assert json.loads((run / "data.json").read_text())["spacing_mm"] == [1.0, 1.0, 1.0]
    with pytest.raises(UsageError, match="spacing takes median, pretraining or millimetres"):
        finetune_segmentation(folder, checkpoint, tmp_path / "other", spacing="native", **SMALL)
