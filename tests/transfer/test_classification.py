"""Fine-tuning for classification, from files to probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from medssl.archive.index import index
from medssl.archive.load import open_index
from medssl.data.probabilities import read_probabilities
from medssl.errors import UsageError
from medssl.inference.predict import predict
from medssl.pretraining.run import pretrain
from medssl.training.checkpoint import load_checkpoint, newest_intact
from medssl.training.metrics import read_metrics
from medssl.training.scores import classification_metrics
from medssl.transfer.classifier_files import load_classifier
from medssl.transfer.source import load_source
from tests.transfer.toy_images import finetune, toy_image, write_npz, write_pictures, write_volumes


@pytest.fixture(scope="module", autouse=True)
def own_key(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSSL_KEY_FILE", str(tmp_path_factory.mktemp("key") / "key"))
        yield


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz(tmp_path_factory.mktemp("npz") / "toy.npz")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def weights(run: Path) -> dict[str, torch.Tensor]:
    content = load_checkpoint(newest_intact(run / "checkpoints"))
    return {
        **content["network_weights"],
        **{f"head.{name}": value for name, value in content["medssl"]["head"].items()},
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def learned(npz: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RUN that has learned the toy problem."""
    out = tmp_path_factory.mktemp("runs") / "learned"
    return finetune(npz, out, steps=40, val_every=20, batch_size=8, cache=cache, learning_rate=3e-3)


def test_a_toy_problem_is_learned_in_two_dimensions(learned: Path) -> None:
    table = read_probabilities(learned / "validation" / "probabilities.csv")
    truth = np.array([table.classes.index(name) for name in table.targets])
    assert (table.values.argmax(axis=1) == truth).mean() > 0.9
    last = [row for row in read_metrics(learned) if "validation/auroc" in row][-1]
    assert last["step"] == 40 and last["validation/auroc"] > 0.95


def test_what_is_not_calibrated_is_what_the_last_look_measured(learned: Path) -> None:
    table = read_probabilities(learned / "validation" / "uncalibrated.csv")
    assert table.cases == read_probabilities(learned / "validation" / "probabilities.csv").cases
    truth = np.array([table.classes.index(name) for name in table.targets])
    last = [row for row in read_metrics(learned) if "validation/nll" in row][-1]
    measured = classification_metrics(table.values, truth, "multiclass")
    assert measured["nll"] == pytest.approx(last["validation/nll"], rel=1e-4)


def test_a_run_has_the_files_of_every_run(learned: Path) -> None:
    for name in ("recipe.yaml", "environment.json", "data.json", "metrics.jsonl", "transfer.json", "views.png"):
        assert (learned / name).is_file(), name
    assert json.loads((learned / "run.json").read_text())["finished"]
    data = json.loads((learned / "data.json").read_text())
    assert data["counts"] == {"train": 24, "validation": 12, "test": 4}
    assert data["classes_by_split"]["train"] == {"0": 12, "1": 12}
    content = load_checkpoint(newest_intact(learned / "checkpoints"))
    assert content["medssl"]["kind"] == "classification" and "training" not in content["medssl"]


def test_cases_of_the_split_test_are_predicted_at_the_end_only(learned: Path) -> None:
    assert read_probabilities(learned / "test" / "probabilities.csv").cases == tuple(f"test-{i:06d}" for i in range(4))


def test_a_toy_problem_is_learned_in_three_dimensions_by_patient(tmp_path: Path) -> None:
    labels = write_volumes(tmp_path / "data")
    run = finetune(labels, tmp_path / "run", steps=40, val_every=40, learning_rate=3e-3, modality="MR")
    table = read_probabilities(run / "validation" / "probabilities.csv")
    truth = np.array([table.classes.index(name) for name in table.targets])
    assert (table.values.argmax(axis=1) == truth).all()
    assert len(set(table.patient_keys)) == 2 and len(table.cases) == 4
    said = (run / "validation" / "probabilities.csv").read_text() + (run / "data.json").read_text()
    assert "patient0" not in said and "scans" not in said
    # What is written of a checkpoint names no path either.
    recipe = load_checkpoint(newest_intact(run / "checkpoints"))["medssl"]["recipe"]
    assert str(tmp_path) not in json.dumps(recipe)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(npz: Path, cache: Path, tmp_path: Path) -> None:
    first, again, other = (
        weights(finetune(npz, tmp_path / name, cache=cache, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert same(first, again) and not same(first, other)


def test_a_run_that_was_killed_ends_as_one_that_was_not(npz: Path, cache: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "cache": cache, "steps": 6, "overrides": ["dropout=0.3"], "balance": "sampling", "select": "best",
    }  # fmt: skip
    whole = finetune(npz, tmp_path / "whole", **options)
    cut = finetune(npz, tmp_path / "cut", **options)
    for path in (cut / "checkpoints").iterdir():
        if path.name.startswith(("step_00000006", "step_00000004")):
            path.unlink()
    finetune(npz, cut, resume=True, **options)
    assert same(weights(whole), weights(cut))
    for name in ("validation", "test"):
        tables = [(run / name / "probabilities.csv").read_text() for run in (whole, cut)]
        assert tables[0] == tables[1]
    timing = ("time", "steps_per_second", "waiting_for_data")
    rows = [
        [{name: value for name, value in row.items() if name not in timing} for row in read_metrics(run)]
        for run in (whole, cut)
    ]
    assert rows[0] == rows[1]


def test_a_finished_run_is_only_read_when_it_is_resumed(learned: Path, npz: Path, cache: Path) -> None:
    before = weights(learned)
    table = learned / "validation" / "probabilities.csv"
    content = table.read_text()
    table.unlink()
    finetune(npz, learned, steps=40, val_every=20, batch_size=8, cache=cache, learning_rate=3e-3, resume=True)
    assert same(before, weights(learned)) and table.read_text() == content


def test_a_run_is_resumed_with_its_own_settings_only(npz: Path, cache: Path, learned: Path) -> None:
    with pytest.raises(UsageError, match="--resume: steps is 41 now and was 40"):
        finetune(npz, learned, steps=41, val_every=20, batch_size=8, cache=cache, learning_rate=3e-3, resume=True)


def test_linear_mode_leaves_the_encoder_bit_identical(checkpoint: Path, tmp_path: Path) -> None:
    labels = write_volumes(tmp_path / "data")
    run = finetune(labels, tmp_path / "run", checkpoint, mode="linear", patch_size=(16, 16, 16))
    before, after = load_checkpoint(checkpoint)["network_weights"], weights(run)
    for name, value in before.items():
        if name.startswith("encoder."):
            assert torch.equal(after[name], value), name
    assert after["head.linear.weight"].abs().max() > 0


@pytest.mark.parametrize(("mode", "moves"), [("partial", {"stage_2", "stage_3"}),
                                             ("full", {"stem", *(f"stage_{n}" for n in range(4))})])  # fmt: skip
def test_each_mode_trains_what_it_names(checkpoint: Path, npz: Path, cache: Path, tmp_path: Path, mode, moves) -> None:
    from medssl.transfer.schedule import group_of

    run = finetune(npz, tmp_path / "run", cache=cache, mode=mode, steps=3)
    scratch = finetune(npz, tmp_path / "start", cache=cache, mode="linear", steps=1)
    start, end = weights(scratch), weights(run)
    moved = {
        group_of(name) for name in start if name.startswith("encoder.") and not torch.equal(start[name], end[name])
    }
    assert moved == moves


def test_weights_of_a_masked_autoencoder_arrive(npz: Path, cache: Path, tmp_path: Path) -> None:
    first = finetune(npz, tmp_path / "first", cache=cache, mode="linear", steps=1)
    store = next(path for path in cache.iterdir() if path.name.startswith("volumes-"))
    overrides = ["network=resenc-xs", "batch_size=4", "augmentation.modality=MR"]
    pretrain("mae", store, tmp_path / "mae", overrides=overrides, steps=2, device="cpu", workers=0, quiet=True)
    source = load_source(tmp_path / "mae")
    run = finetune(npz, tmp_path / "run", tmp_path / "mae", cache=cache, mode="linear", steps=1)
    end = weights(run)
    assert all(torch.equal(end[name], value) for name, value in source.weights.items() if name.startswith("encoder."))
    assert not same(weights(first), end)
    report = json.loads((run / "transfer.json").read_text())
    assert not report["missing"] and not report["mismatched"]


def test_a_classifier_can_be_fine_tuned_further_and_named_as_a_template(
    learned: Path, npz: Path, cache: Path, tmp_path: Path
) -> None:
    assert load_source(learned).architecture.dimensions == 2
    run = finetune(npz, tmp_path / "further", learned, cache=cache, mode="linear", steps=1)
    assert same({n: v for n, v in weights(run).items() if n.startswith("encoder.")},
                {n: v for n, v in weights(learned).items() if n.startswith("encoder.")})  # fmt: skip
    twin = finetune(npz, tmp_path / "twin", cache=cache, plans_from=learned, mode="linear", steps=1)
    named = finetune(npz, tmp_path / "named", cache=cache, mode="linear", steps=1)
    assert same(weights(twin), weights(named))


@pytest.mark.parametrize("kind", ["multilabel", "ordinal"])
def test_other_kinds_of_targets_train_and_predict(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for name, count in (("train", 12), ("val", 9)):
        labels = np.arange(count) % 3
        arrays[f"{name}_images"] = np.stack([toy_image(int(v), int(rng.integers(1000)), (16, 16)) for v in labels])
        arrays[f"{name}_labels"] = (
            np.stack([labels > 0, labels > 1], axis=1).astype(int) if kind == "multilabel" else labels
        )
    np.savez(tmp_path / "toy.npz", **arrays)
    run = finetune(tmp_path / "toy.npz", tmp_path / "run", kind=kind, balance="weights")
    table = read_probabilities(run / "validation" / "probabilities.csv")
    assert table.values.shape == (9, 2 if kind == "multilabel" else 3)
    sums = table.values.sum(axis=1)
    assert (np.allclose(sums, 1)) == (kind == "ordinal")
    assert load_classifier(run).kind == kind


def test_the_best_checkpoint_is_chosen_by_validation_loss(npz: Path, cache: Path, tmp_path: Path) -> None:
    # A rate far too large: the loss does not fall steadily.
    options: dict[str, Any] = {
        "cache": cache,
        "steps": 12,
        "val_every": 2,
        "learning_rate": 0.1,
        "schedule": "constant",
    }
    run = finetune(npz, tmp_path / "run", select="best", **options)
    losses = {row["step"]: row["validation/loss"] for row in read_metrics(run) if "validation/loss" in row}
    least = min(losses, key=lambda step: losses[step])
    assert load_checkpoint(newest_intact(run / "checkpoints"))["medssl"]["classification"]["selected_step"] == least
    upto = finetune(npz, tmp_path / "upto", **{**options, "steps": least})
    assert same(weights(run), weights(upto))


def test_prediction_of_new_images_equals_that_of_the_run(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures")
    run = finetune(folder, tmp_path / "run", grey=True, modality="US", folds=2, fold=0, steps=2)
    summary = predict(run, folder, tmp_path / "prediction", device="cpu", quiet=True)
    assert summary.exit_code == 0
    table = read_probabilities(tmp_path / "prediction" / "probabilities.csv")
    assert len(table.cases) == 20 and "large/3.png" in table.cases
    # The same network on the same pixels, by the two ways there are.
    trained = load_classifier(run)
    from medssl.data.target_files import read_targets
    from medssl.preprocessing.store import Store
    from medssl.training.temperature import probabilities_of
    from medssl.transfer.classification_method import predict_logits
    from medssl.transfer.image_batches import ImageSet

    targets = read_targets(folder, folds=2)
    store = Store.open(next((run / "images").glob("images-*")))
    images = ImageSet(store, list(targets.cases), targets, 2)
    with torch.no_grad():
        logits = predict_logits(trained.classifier, images, trained.patch_size, 7, torch.device("cpu"))
    expected = probabilities_of(logits, "multiclass", trained.temperature)
    found = dict(zip(table.cases, table.values, strict=True))
    for case, row in zip(targets.cases, expected, strict=True):
        assert found[case.where] == pytest.approx(row, abs=1e-5)


def test_an_image_that_cannot_be_predicted_costs_one_row(learned: Path, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures", count=2)
    (folder / "broken.png").write_bytes((folder / "large" / "0.png").read_bytes()[:60])
    summary = predict(learned, folder, tmp_path / "prediction", device="cpu", quiet=True)
    # In colour, where the model knows grey; and one that is cut off.
    assert summary.exit_code == 4
    assert {row.code for row in summary.refused} >= {"channels_differ"} and len(summary.refused) == 5


def test_options_of_masks_do_not_fit_a_classifier(learned: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="this model is a classifier"):
        predict(learned, tmp_path, tmp_path / "out", step_size=0.3)


def test_lower_precision_trains_too(npz: Path, cache: Path, tmp_path: Path) -> None:
    run = finetune(npz, tmp_path / "run", cache=cache, overrides=["precision=bf16"])
    assert all(bool(torch.isfinite(value).all()) for value in weights(run).values())


def test_runs_with_other_labels_share_what_was_prepared(npz: Path, tmp_path: Path) -> None:
    for seed, labelled in ((0, 4), (1, 6)):
        finetune(npz, tmp_path / f"run{seed}", cache=tmp_path / "cache", labelled=labelled, seed=seed, steps=1)
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2


def test_an_index_with_labels_is_trained_on(tmp_path: Path) -> None:
    write_volumes(tmp_path / "data", count=16)
    index([tmp_path / "data" / "scans"], tmp_path / "index", workers=1, quiet=True)
    known = {name.split(".")[0]: volume for name, volume in paths_of(tmp_path / "index")}
    labels = tmp_path / "by_id.csv"
    lines = [f"{known[str(number)]},{number // 2 % 2}" for number in range(16)]
    labels.write_text("\n".join(["volume_id,label", *lines]))
    run = finetune(tmp_path / "index", tmp_path / "run", labels=labels, folds=2, fold=0, steps=1)
    cases = read_probabilities(run / "validation" / "probabilities.csv").cases
    assert set(cases) < set(known.values()) and len(cases) == 8


def paths_of(folder: Path) -> list[tuple[str, str]]:
    """Name of the first file of each volume of an index, and the volume's id."""
    rows = open_index(folder).rows().iter_rows(named=True)
    return [(Path(row["relative_paths"][0]).name, row["volume_id"]) for row in rows]


def test_folds_and_labelled_cases_are_taken_from_the_options(npz: Path, cache: Path, tmp_path: Path) -> None:
    run = finetune(npz, tmp_path / "run", cache=cache, folds=4, fold=1, labelled=6, steps=1)
    data = json.loads((run / "data.json").read_text())
    assert data["counts"] == {"train": 6, "validation": 9, "test": 4} and data["split"] == "folds"
    assert yaml.safe_load((run / "recipe.yaml").read_text())["labelled"] == 6
