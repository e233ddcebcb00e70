"""The verbs that are killed: how each starts, how it goes on, and what its result must be equal in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from _kills import digest_of_masks, same_weights
from _synthetic_store import synthetic_store
from index_speed import generate

# All that a verb needs is imported before the forks, so that a kill meets its work and not its imports.
import medssl.inference.predict as prediction
import medssl.transfer.trainers.medssl_trainer as trainer
import medssl.transfer.validation as validation
from medssl.archive.index import index
from medssl.archive.manifest import TABLES
from medssl.preprocessing.run import preprocess
from medssl.preprocessing.store import Store
from medssl.pretraining.mae import MaskedAutoencoder
from medssl.pretraining.run import pretrain
from medssl.training.checkpoint import find_checkpoint
from medssl.training.metrics import read_metrics
from medssl.transfer.nnunet import nnunet_environment
from medssl.transfer.segmentation import finetune_segmentation

PRETRAINING = (
    "patch_size=[16,32,16]", "batch_size=4", "mask.block=4", "log_every=1", "save_every=5", "health_every=10",
    "pictures_every=0", "optimiser.name=adamw", "schedule.name=cosine", "schedule.warmup_steps=5", "ema=0.99",
)  # fmt: skip
CLOCK = {"time", "steps_per_second", "waiting_for_data"}


@dataclass(frozen=True)
class Verb:
    """One command.

    Args:
        name: Its name.
        run: Does the work into a folder, from the start or, with True, in the verb's own way of going on; the number of
            the trial chooses among ways of working that must not change the result.
        differences: Names what differs between two finished folders.
        goes_on: The verb's own way of going on.
    """

    name: str
    run: Callable[[Path, bool, int], object]
    differences: Callable[[Path, Path], list[str]]
    goes_on: str = "--resume"


def make_inputs(scratch: Path) -> Mapping[str, Path]:
    """Write an archive, a store, and a raw data set of two balls."""
    generate(scratch / "archive", 40, 10, 32)
    store = synthetic_store(scratch / "store", volumes=4, shape=(24, 40, 24)).folder
    return {"archive": scratch / "archive", "store": store, "raw": _raw_data_set(scratch / "raw", cases=4)}


def make_verbs(scratch: Path, inputs: Mapping[str, Path], pretraining_steps: int) -> list[Verb]:
    """Return the verbs; `predict` needs the fine-tuned model that the whole run of the one before it makes."""
    key = scratch / "key"
    key.write_text("the key of a benchmark is no secret\n")
    key.chmod(0o600)
    found = scratch / "whole_index"

    def run_index(out: Path, again: bool, number: int) -> object:
        return index([inputs["archive"]], out, key_file=key, workers=1 + number % 2, resume=again, quiet=True)

    def run_preprocess(out: Path, again: bool, number: int) -> object:
        return preprocess(found, out, workers=1 + number % 2, resume=again, quiet=True)

    def run_pretrain(out: Path, again: bool, number: int) -> object:
        return pretrain(
            "mae", inputs["store"], out, overrides=PRETRAINING, steps=pretraining_steps, device="cpu",
            workers=2 * (number % 2), resume=again, quiet=True,
        )  # fmt: skip

    def run_finetune(out: Path, again: bool, number: int) -> object:
        return finetune_segmentation(
            inputs["raw"], None, out, network="resenc-xs", patch_size=(16, 16, 16), batch_size=2, steps=6, val_every=2,
            val_batches=1, validation_cases=["case3"], workers=0, device="cpu", resume=again, quiet=True,
        )  # fmt: skip

    def run_predict(out: Path, again: bool, number: int) -> object:
        model, images = scratch / "whole_finetune segmentation", inputs["raw"] / "imagesTr"
        return prediction.predict(model, images, out, device="cpu", overwrite=again, quiet=True)

    return [
        Verb("index", run_index, _index_differences),
        Verb("preprocess", run_preprocess, _store_differences),
        Verb("pretrain", run_pretrain, _pretraining_differences),
        Verb("finetune segmentation", run_finetune, _finetuning_differences),
        Verb("predict", run_predict, _prediction_differences, "the same command with --overwrite"),
    ]


def warm_up() -> None:
    """Import what the verbs import late."""
    with nnunet_environment():
        import nnunetv2.inference.export_prediction
        import nnunetv2.inference.predict_from_raw_data
        import nnunetv2.preprocessing.preprocessors.default_preprocessor
    assert MaskedAutoencoder and trainer and validation and nnunetv2


def _index_differences(one: Path, other: Path) -> list[str]:
    names = (*(f"{table}.parquet" for table in TABLES), "index.json")
    return [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]


def _store_differences(one: Path, other: Path) -> list[str]:
    first, second = Store.open(one), Store.open(other)
    found = [] if first.hash == second.hash else ["hash"]
    for name in first.ids:
        a, b = (store.read(name, (0, 0, 0), store.entry(name).shape[1:]) for store in (first, second))
        if not np.array_equal(a, b):
            found.append(f"voxels of {name}")
    return found


def _pretraining_differences(one: Path, other: Path) -> list[str]:
    found = [] if same_weights(find_checkpoint(one), find_checkpoint(other)) else ["weights"]
    a, b = ([{k: v for k, v in row.items() if k not in CLOCK} for row in read_metrics(run)] for run in (one, other))
    return found + ([] if a == b else ["metrics"])


def _finetuning_differences(one: Path, other: Path) -> list[str]:
    final = "fold_0/checkpoint_final.pth"
    found = [] if same_weights(one / final, other / final) else ["weights"]
    same = digest_of_masks(one / "validation") == digest_of_masks(other / "validation")
    return found + ([] if same else ["masks"])


def _prediction_differences(one: Path, other: Path) -> list[str]:
    found = [] if digest_of_masks(one) == digest_of_masks(other) else ["masks"]
    a, b = (json.loads((out / prediction.VOLUMES).read_text()) for out in (one, other))
    return found + ([] if a == b else ["volumes"])


def _raw_data_set(folder: Path, *, cases: int, edge: int = 24) -> Path:
    """Write noisy images of two balls and their masks."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(edge)] * 3, indexing="ij"), axis=-1)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for number in range(cases):
        mask = np.zeros((edge,) * 3, np.uint8)
        for value, side in ((1, 0.3), (2, 0.7)):
            centre = np.array([side, 0.5, 0.5]) * edge + rng.uniform(-2, 2, 3)
            mask[np.linalg.norm(grid - centre, axis=-1) < edge * 0.17] = value
        image = (rng.normal(100, 10, mask.shape) + 60 * (mask > 0) + 30 * (mask == 2)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), folder / "imagesTr" / f"case{number}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), folder / "labelsTr" / f"case{number}.nii.gz")
    content = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "left_ball": 1, "right_ball": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder
