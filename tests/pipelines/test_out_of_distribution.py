"""The benchmark of strangers: sizes that tell nothing, artefacts in two severities, and intervals over several sets."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from pytest import approx

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "pipelines" / "benchmarks"))
import out_of_distribution
from _strange_scores import auroc, fpr95, judge_of, over_sets
from _strange_stores import cut_atria, shrunk_ultrasound, store_of

from medssl.augmentation.catalogue import CATALOGUE
from medssl.evaluation.ood import separation
from medssl.evaluation.ood_run import ARTEFACTS
from medssl.preprocessing.store import Store

RNG = np.random.default_rng(0)


def write_image(path: Path, shape: tuple[int, int, int], spacing: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = RNG.normal(100, 20, shape).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([spacing] * 3 + [1])), path)


def test_an_atrium_is_cut_to_the_size_in_mm_of_a_hippocampus(tmp_path: Path) -> None:
    write_image(tmp_path / "hippocampus" / "imagesTr" / "hippocampus_001_0000.nii.gz", (20, 24, 16), 1.0)
    for name in ("la_1", "la_2"):
        write_image(tmp_path / "left_atrium" / "imagesTr" / f"{name}_0000.nii.gz", (60, 70, 50), 0.5)
    jobs = cut_atria(tmp_path, tmp_path / "cut", 2)
    store = Store.open(store_of(jobs, (1.0, 1.0, 1.0), tmp_path / "store"))
    assert [store.entry(name).shape for name in ("la_1", "la_2")] == [(1, 16, 24, 20)] * 2


def test_ultrasound_is_shrunk_whole_and_held_out_images_are_no_training_images(tmp_path: Path) -> None:
    for number in range(8):
        folder = tmp_path / "breast_ultrasound" / ("benign", "malignant")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"image_{number}.png")
    jobs = shrunk_ultrasound(tmp_path, tmp_path / "small", 3)
    store = Store.open(store_of(jobs, "native", tmp_path / "store"))
    assert {store.entry(name).shape for name in store.ids} == {(1, 1, 28, 28)}
    assert store.modalities == {"US"}
    assert len(store.ids_of("validation")) == 3 and len(store.ids_of("train")) == 5
    lines = (tmp_path / "small.csv").read_text().splitlines()
    assert lines[1] == f"image_0,benign,{store.row('image_0')['split']}" and len(lines) == 9


def test_every_artefact_of_mr_that_the_command_makes_has_a_milder_twin() -> None:
    of_mr = {name for name in ARTEFACTS if name in CATALOGUE and CATALOGUE[name].fits("MR")}
    assert set(out_of_distribution.MILD) == of_mr
    assert all(out_of_distribution.MILD[name] != ARTEFACTS[name] for name in of_mr)


def test_over_one_set_the_measures_are_those_of_the_package() -> None:
    pair = (RNG.normal(0, 1, 40), RNG.normal(1, 1, 30))
    expected = separation(*pair, seed=0)
    for name, measure in (("auroc", auroc), ("fpr95", fpr95)):
        found = over_sets(partial(measure, [pair]), [pair])
        assert (found.value, found.low, found.high) == approx(
            (expected[name].value, expected[name].low, expected[name].high)
        )


def test_over_several_sets_the_value_is_their_mean_and_a_score_does_not_differ_from_itself() -> None:
    known = RNG.normal(0, 1, 40)
    pairs = [(known, RNG.normal(shift, 1, 40)) for shift in (0.5, 2.0)]
    mean = np.mean([separation(*pair)["auroc"].value for pair in pairs])
    assert over_sets(lambda weights: auroc(pairs, weights), pairs).value == approx(mean)
    same = over_sets(lambda weights: auroc(pairs, weights) - auroc(pairs, weights), pairs)
    assert (same.value, same.low, same.high) == (0, 0, 0)


@pytest.mark.parametrize("labels", [None, np.repeat([0, 1], 20)])
def test_an_encoder_has_all_scores_and_a_description_those_without_labels(labels: np.ndarray | None) -> None:
    fitted = RNG.normal(0, 1, (40, 4))
    scores = judge_of(fitted, labels)(fitted[:3])
    plain = {"mahalanobis", "knn"}
    assert set(scores) == (plain if labels is None else plain | {"norm", "class means", "energy", "softmax"})
    assert all(len(values) == 3 for values in scores.values())
