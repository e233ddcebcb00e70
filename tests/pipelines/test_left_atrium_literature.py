"""The literature's left-atrium protocol: its windows, its metrics, its streams, and a run of every method."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medssl.augmentation.policy import policy_for
from medssl.data.draw import Draw
from medssl.training.checkpoint import load_checkpoint
from tests.semisupervised.helpers import paired

BENCHMARKS = Path(__file__).parents[2] / "pipelines" / "benchmarks"


@pytest.fixture(scope="module")
def parts() -> ModuleType:
    """Return the module of its parts."""
    sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module("_left_atrium")


@pytest.fixture(scope="module")
def program(parts: ModuleType) -> ModuleType:
    """Return the program."""
    return importlib.import_module("left_atrium_literature")


class Bright(nn.Module):
    """Says class 1 where the image is bright, the surer the brighter, and remembers how large its inputs were."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(tuple(image.shape))
        return torch.cat([-image, image], dim=1)


def test_windows_follow_the_stride_and_the_last_one_ends_with_the_volume(parts: ModuleType) -> None:
    assert parts.starts_of(88, 80, 4) == [0, 4, 8]
    assert parts.starts_of(140, 112, 18) == [0, 18, 28]
    assert parts.starts_of(148, 112, 18) == [0, 18, 36]
    assert parts.starts_of(112, 112, 18) == [0]


def test_every_voxel_is_segmented_by_the_mean_of_its_windows(parts: ModuleType) -> None:
    image = np.random.default_rng(0).standard_normal((5, 9, 8)).astype(np.float32)
    network = Bright()
    mask = parts.segment(network, image, (4, 4, 4), (2, 3, 2), torch.device("cpu"), 3)
    assert np.array_equal(mask, image > 0)
    assert sum(shape[0] for shape in network.seen) == 2 * 3 * 3
    assert {shape[1:] for shape in network.seen} == {(1, 4, 4, 4)}

    class Doubtful(nn.Module):
        """Is almost sure of class 1 in the first window and rather of class 0 in the second."""

        def __init__(self) -> None:
            super().__init__()
            self.answers = [0.9, 0.3]

        def forward(self, image: Tensor) -> Tensor:
            chance = torch.tensor([self.answers.pop(0) for _ in image]).reshape(-1, 1, 1, 1, 1)
            return torch.cat([1 - chance, chance], dim=1).log().expand(-1, 2, *image.shape[2:])

    mask = parts.segment(Doubtful(), image[:3, :2, :2], (2, 2, 2), (1, 1, 1), torch.device("cpu"), 2)
    # The mean of 0.9 and 0.3 where both look; each alone at the ends.
    assert mask[:, 0, 0].tolist() == [True, True, False]


def test_distances_are_those_of_the_literature_in_voxels(parts: ModuleType) -> None:
    truth, prediction = np.zeros((1, 1, 12), bool), np.zeros((1, 1, 12), bool)
    truth[0, 0, 2] = True
    prediction[0, 0, [2, 6]] = True
    scores = parts.voxel_scores(prediction, truth)
    # From the prediction 0 and 4, from the truth 0.
    assert scores["dice"] == pytest.approx(2 / 3) and scores["jaccard"] == pytest.approx(1 / 2)
    assert scores["asd"] == pytest.approx(2) and scores["assd"] == pytest.approx(4 / 3)
    assert scores["hd95"] == pytest.approx(np.percentile([0, 4, 0], 95))
    assert parts.voxel_scores(truth, prediction)["asd"] == 0


def test_an_empty_prediction_is_undefined_and_not_perfect(parts: ModuleType, program: ModuleType) -> None:
    truth = np.zeros((4, 4, 4), bool)
    truth[1:3, 1:3, 1:3] = True
    missed, found = parts.voxel_scores(np.zeros_like(truth), truth), parts.voxel_scores(truth, truth)
    assert missed["dice"] == 0 and missed["hd95"] is None and missed["asd"] is None and missed["assd"] is None
    cases = {name: {"whole": scores, "largest part": scores} for name, scores in (("a", missed), ("b", found))}
    run = {
        "method": "supervised", "labelled": 8, "network": "vnet", "pretrained": False, "seed": 0, "steps": 1,
        "seconds a step": 1.0, "cases": cases,
    }  # fmt: skip
    row = program.rows_of([run])[0]
    assert row["dice"] == 0.5 and row["hd95"] == 0 and row["undefined"] == 1


def test_crops_are_turned_by_quarters_and_mirrored_in_the_plane_and_nothing_else(
    program: ModuleType, parts: ModuleType, tmp_path: Path
) -> None:
    store = parts.made(tmp_path / "store", 6, (20, 24, 24))
    settings = program.Run(tmp_path, store, "supervised", 2, program.QUICK, program.options_of([])).settings
    policy = policy_for("weak", {"MR"}, (16, 16, 16), settings.augmentation)
    assert settings.of_method().labelled_policy == "weak" and policy.read_size == (16, 16, 16)
    batch = paired(dimensions=3, labelled=64).labelled
    batch.image = batch.image[:1, :, 4:20, 4:20, 4:20].expand(64, -1, -1, -1, -1)
    batch.label, batch.valid = None, torch.tensor([[0, 16]] * 3).expand(64, 3, 2)
    shown = policy.view(batch, Draw(0, batch.sample_index)).image
    turned = [batch.image[0].rot90(turns, (2, 3)) for turns in range(4)]
    alike = [[torch.equal(view, image) for image in [*turned, *(image.flip(3) for image in turned)]] for view in shown]
    assert all(sum(row) == 1 for row in alike)
    assert torch.tensor(alike).any(dim=0).all()


def test_the_unlabelled_part_has_no_way_to_a_label(parts: ModuleType, tmp_path: Path) -> None:
    store = parts.made(tmp_path / "all", 3, (16, 20, 20))
    first, *others = store.info["order"]
    known = parts.subset(store, [first], tmp_path / "known", labels=True)
    rest = parts.subset(store, others, tmp_path / "rest", labels=False)
    assert known.ids == [first] and rest.ids == others
    assert known.read_label(first, (0, 0, 0), (16, 20, 20)).any()
    assert rest.read_label(others[0], (0, 0, 0), (16, 20, 20)) is None
    assert not list((tmp_path / "rest").glob("*_seg*"))


def test_what_travels_is_read_as_it_was_rounded(parts: ModuleType, tmp_path: Path) -> None:
    import nibabel

    rng = np.random.default_rng(0)
    image, truth = rng.integers(0, 200, (9, 8, 7)).astype(np.uint8), np.zeros((9, 8, 7), np.uint8)
    truth[2:5, 3:6, 1:4] = 1
    affine = np.diag([0.625, 0.625, 1.25, 1])
    for folder, name, array in (("imagesTr", "a_0000", image), ("labelsTr", "a", truth)):
        (tmp_path / folder).mkdir()
        nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / folder / f"{name}.nii.gz")
    (tmp_path / "train_order.txt").write_text("a\n")
    parts.prepare(tmp_path, tmp_path / "packed.npz")
    store = parts.unpacked(tmp_path / "packed.npz", tmp_path / "store")
    expected = image.T.astype(float)
    expected = (expected - expected.mean()) / expected.std()
    found = store.read("a", (0, 0, 0), (7, 8, 9))[0]
    assert np.abs(found - expected).max() <= parts.GRAIN / 2 + 1e-6
    assert np.array_equal(found / parts.GRAIN, np.rint(found / parts.GRAIN))
    assert np.array_equal(store.read_label("a", (0, 0, 0), (7, 8, 9)), truth.T)
    assert store.entry("a").spacing_mm == (1.25, 0.625, 0.625)


def test_an_interrupted_run_goes_on_and_one_that_is_done_stays(
    program: ModuleType, parts: ModuleType, tmp_path: Path
) -> None:
    store = parts.made(tmp_path / "store", 6, (20, 24, 24))
    options = program.options_of(["--steps", "3", "--set", "save_every=1", "--set", "keep=3"])
    run = program.Run(tmp_path, store, "mean-teacher", 2, program.QUICK, options)
    whole = run.done()
    last = max((run.out / "checkpoints").glob("step_*.pth"))
    weights = load_checkpoint(last)["network_weights"]
    for path in (last, run.out / "scores.json"):
        path.unlink()
    assert run.done()["cases"] == whole["cases"]
    assert all(torch.equal(load_checkpoint(last)["network_weights"][name], value) for name, value in weights.items())
    last.unlink()
    assert run.done()["cases"] == whole["cases"] and not last.exists()
    with pytest.raises(SystemExit, match="begun with other settings"):
        program.Run(
            tmp_path, store, "mean-teacher", 2, program.QUICK, program.options_of(["--set", "noise=0.2"])
        ).done()


@pytest.mark.slow
def test_every_method_runs_and_the_leaks_stand_beside_the_numbers(
    program: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    program.main(["--quick"])
    printed = capsys.readouterr().out
    table = printed.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in table[2::2]] == list(program.METHODS)
    assert "cropped around the ground truth" in printed
    assert "TraCoCo  8         last" in printed and "89.29" in printed
    assert not (BENCHMARKS / "results" / "left_atrium_literature.json").exists() or "Written" not in printed
