"""The protocol chooses, compares and resumes by its rules; nothing is trained here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medssl.errors import DataError, TrainingStopped, UsageError
from medssl.protocol.outcomes import CaseValues
from medssl.protocol.results import Entry
from medssl.protocol.run import protocol

from .fakes import BEST, GAIN, FakeTask, FakeTrainer, fake_pretrainer, recipe_values, run

TABLES = ("results.json", "table.md", "table.csv", "differences.csv", "report.html", "curves_forty.png")


def row_of(results: Any, arm: str, labels: int) -> Any:
    return next(row for row in results.rows if (row.arm, row.labels) == (arm, labels))


def test_every_arm_has_the_same_grid_and_each_its_best_rate_of_it(tmp_path: Path) -> None:
    trainer = FakeTrainer()
    results = run(tmp_path, trainer)
    assert {row.arm for row in results.rows} == {"pretrained", "encoder", "scratch", "strong"}
    for arm in BEST:
        for labels in (2, 8):
            assert row_of(results, arm, labels).rate == BEST[arm]
            jobs = [job for job in trainer.jobs if (job.arm, job.labels) == (arm, labels)]
            assert [job.rate for job in jobs if job.seed == 0] == [1e-3, 1e-2, 1e-1]
            assert [job.rate for job in jobs if job.seed > 0] == [BEST[arm]] * 2
    assert row_of(results, "strong", 2).at_edge and not row_of(results, "pretrained", 2).at_edge


def test_the_rate_does_not_depend_on_the_validation_cases(tmp_path: Path) -> None:
    class Cheat(FakeTrainer):
        """At the worst rate the validation cases are perfect."""

        def __call__(self, job: Any) -> Any:
            result = super().__call__(job)
            perfect = CaseValues({"dice": dict.fromkeys(job.validation, 1.0)})
            return type(result)(result.selection, perfect if job.rate == 1e-1 else result.validation, result.plan)

    results = run(tmp_path, Cheat())
    assert row_of(results, "pretrained", 2).rate == 1e-2


def test_arms_share_labelled_cases_and_fewer_are_part_of_more(tmp_path: Path) -> None:
    trainer = FakeTrainer()
    run(tmp_path, trainer)
    for seed in (0, 1, 2):
        drawn = {
            labels: {job.train_cases for job in trainer.jobs if (job.seed, job.labels) == (seed, labels)}
            for labels in (2, 8)
        }
        (few,), (many,) = drawn[2], drawn[8]
        assert len(few) == 2 and len(many) == 8 and set(few) < set(many)
    seeds = {job.train_cases for job in trainer.jobs if job.labels == 8}
    assert len(seeds) == 3, "another seed draws other cases"


def test_controls_start_from_random_weights_with_the_plans_of_the_checkpoint(tmp_path: Path) -> None:
    trainer = FakeTrainer()
    run(tmp_path, trainer)
    source = tmp_path / "out" / "pretraining" / "forty" / "pretrained" / "run" / "checkpoint_final.pth"
    for job in trainer.jobs:
        scratch = job.arm in ("scratch", "strong")
        assert (job.checkpoint, job.plans_from) == ((None, source) if scratch else (source, None))
        assert job.changes == {"strong": {"augmentation": "strong"}, "encoder": {"transfer_decoder": False}}.get(
            job.arm, {}
        )


@pytest.mark.parametrize("crash_at", [0, 1, 7, 23])
def test_interrupted_and_resumed_it_ends_in_the_same_tables(tmp_path: Path, crash_at: int) -> None:
    whole = FakeTrainer()
    run(tmp_path, whole, name="whole/p")
    first, second = FakeTrainer(crash_at), FakeTrainer()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, first, name="cut/p")
    run(tmp_path, second, name="cut/p", resume=True)
    assert first.names + second.names == whole.names, "no run is made twice and none is left out"
    for name in TABLES:
        assert (tmp_path / "cut/p" / name).read_bytes() == (tmp_path / "whole/p" / name).read_bytes(), name


def test_a_finished_protocol_is_tabulated_again_without_any_run(tmp_path: Path) -> None:
    run(tmp_path, FakeTrainer())
    before = (tmp_path / "out" / "results.json").read_bytes()
    again = FakeTrainer()
    protocol(
        None, tmp_path / "out", resume=True, quiet=True, open_task=FakeTask, trainer=again, pretrainer=fake_pretrainer
    )
    assert again.names == [] and (tmp_path / "out" / "results.json").read_bytes() == before


def test_labels_seeds_and_arms_may_be_added_later(tmp_path: Path) -> None:
    run(tmp_path, FakeTrainer(), values=recipe_values(labels=[2], seeds=[0], controls=["scratch"]))
    more = FakeTrainer()
    results = run(tmp_path, more, resume=True)
    assert "pretrained_0002_seed0_rate0.01" not in more.names
    assert {"strong_0002_seed0_rate0.1", "pretrained_0008_seed0_rate0.01", "scratch_0002_seed1_rate0.001"} <= set(
        more.names
    )
    assert len(row_of(results, "scratch", 2).seeds) == 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"training": {"steps": 11}}, "another training"),
        ({"arms": {"pretrained": {"pretrain": "mae.yaml", "schedule": "poly"}}}, "another changes"),
        ({"arms": {"pretrained": {"pretrain": {"recipe": "mae.yaml", "settings": {"steps": 3}}}}}, "another settings"),
    ],
)
def test_runs_of_another_recipe_are_not_taken_for_these(tmp_path: Path, changes: Any, named: str) -> None:
    run(tmp_path, FakeTrainer())
    with pytest.raises(UsageError, match=named):
        run(tmp_path, FakeTrainer(), values=recipe_values(**changes), resume=True)


def test_another_division_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    run(tmp_path, FakeTrainer())
    with pytest.raises(UsageError, match="not those that"):
        run(tmp_path, FakeTrainer(), resume=True, overrides=["datasets.forty.selection=5"])
    with pytest.raises(UsageError, match="--resume"):
        run(tmp_path, FakeTrainer())


def test_differences_are_paired_by_case_and_corrected_for_all_comparisons(tmp_path: Path) -> None:
    trainer = FakeTrainer()
    results = run(tmp_path, trainer)
    pairs = {(row.arm, row.control) for row in results.differences}
    assert pairs == {
        ("pretrained", "scratch"), ("encoder", "scratch"), ("strong", "scratch"),
        ("pretrained", "strong"), ("encoder", "strong"),
    }  # fmt: skip
    assert len(results.differences) == 10
    found = next(
        row for row in results.differences if (row.arm, row.control, row.labels) == ("pretrained", "scratch", 8)
    )
    by_seed = []
    for seed in (0, 1, 2):
        ours, theirs = (
            next(
                trainer(job).validation.column("dice")
                for job in trainer.jobs
                if (job.arm, job.labels, job.seed, job.rate) == (arm, 8, seed, BEST[arm])
            )
            for arm in ("pretrained", "scratch")
        )
        by_seed.append(ours - theirs)
    gaps = np.mean(by_seed, axis=0)
    assert found.paired.interval.value == pytest.approx(gaps.mean())
    assert found.paired.interval.low < GAIN["pretrained"] < found.paired.interval.high
    assert found.paired.better == int((gaps > 0).sum())
    ps = sorted(row.paired.interval.p for row in results.differences)
    smallest = min(results.differences, key=lambda row: row.paired.interval.p)
    assert smallest.p_holm == pytest.approx(min(1, 10 * ps[0]))


def test_a_rate_that_breaks_a_run_is_not_chosen_and_does_not_end_the_protocol(tmp_path: Path) -> None:
    trainer = FakeTrainer(fails=lambda job: job.rate == 1e-2 and job.arm == "pretrained")
    results = run(tmp_path, trainer)
    row = row_of(results, "pretrained", 2)
    assert row.rate in (1e-3, 1e-1) and np.isnan(row.looked["0.01"]) and len(row.seeds) == 3
    again = FakeTrainer()
    run(tmp_path, again, resume=True)
    assert again.names == [], "what failed is not tried again"


def test_a_rate_counts_only_with_all_of_the_seeds_that_choose(tmp_path: Path) -> None:
    trainer = FakeTrainer(fails=lambda job: (job.rate, job.arm, job.seed) == (1e-2, "pretrained", 1))
    results = run(tmp_path, trainer, overrides=["rate_seeds=2"])
    row = row_of(results, "pretrained", 2)
    assert row.rate != 1e-2 and np.isnan(row.looked["0.01"])
    assert {job.rate for job in trainer.jobs if (job.arm, job.seed) == ("scratch", 1)} == {1e-3, 1e-2, 1e-1}


def test_an_arm_without_any_working_rate_is_missing_and_said_to_be(tmp_path: Path) -> None:
    results = run(tmp_path, FakeTrainer(fails=lambda job: job.arm == "encoder" and job.labels == 2))
    assert not row_of(results, "encoder", 2).seeds and row_of(results, "encoder", 8).seeds
    assert not any((row.arm, row.labels) == ("encoder", 2) for row in results.differences)
    assert "forty, 2 labels: encoder: no learning rate of the grid worked." in results.missing
    assert "no learning rate" in (tmp_path / "out" / "report.html").read_text()
    assert "no learning rate" in (tmp_path / "out" / "table.md").read_text()


def test_a_failed_seed_is_named_and_the_others_are_compared_with_their_own(tmp_path: Path) -> None:
    results = run(tmp_path, FakeTrainer(fails=lambda job: (job.arm, job.seed) == ("pretrained", 2)))
    assert list(row_of(results, "pretrained", 2).seeds) == [0, 1]
    assert row_of(results, "pretrained", 2).failed == {2: "The loss became NaN."}
    assert all(row.seeds == (0, 1) for row in results.differences if row.arm == "pretrained")


def test_a_signal_is_no_failure_of_a_run(tmp_path: Path) -> None:
    class Told(FakeTrainer):
        def __call__(self, job: Any) -> Any:
            error = TrainingStopped("Stopped by SIGTERM.")
            error.exit_code = 143
            raise error

    with pytest.raises(TrainingStopped):
        run(tmp_path, Told())
    assert not list((tmp_path / "out" / "scores").rglob("*.json"))


def test_arms_of_different_plans_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="encoder and scratch have different plans"):
        run(tmp_path, FakeTrainer(plan=lambda job: "other" if job.arm == "scratch" else "one"))


def test_a_run_that_did_not_measure_every_case_is_refused(tmp_path: Path) -> None:
    class Lazy(FakeTrainer):
        def __call__(self, job: Any) -> Any:
            result = super().__call__(job)
            rest = dict.fromkeys(job.validation[1:], 1.0)
            return type(result)(result.selection, CaseValues({"dice": rest}), result.plan)

    with pytest.raises(DataError, match="was not measured"):
        run(tmp_path, Lazy())


def test_pretraining_is_made_once_on_the_pool_alone(tmp_path: Path) -> None:
    made = []

    def pretrainer(job: Any) -> Path:
        made.append(job)
        return fake_pretrainer(job)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, FakeTrainer(crash_at=3), pretrainer=pretrainer)
    run(tmp_path, FakeTrainer(), pretrainer=pretrainer, resume=True)
    (job,) = made
    parts = json.loads((tmp_path / "out" / "splits" / "forty.json").read_text())["parts"]
    assert list(job.pool) == parts["pool"]
    assert not set(job.pool) & {*parts["selection"], *parts["validation"]}


def test_an_arm_from_elsewhere_comes_into_the_tables(tmp_path: Path) -> None:
    run(tmp_path, FakeTrainer())
    parts = json.loads((tmp_path / "out" / "splits" / "forty.json").read_text())["parts"]
    values = CaseValues({"dice": dict.fromkeys(parts["validation"], 0.5)})
    outside = [Entry("forty", "nnU-Net", 8, seed, None, None, values) for seed in (0, 1, 2)]
    results = run(tmp_path, FakeTrainer(), resume=True, outside=outside, compared=[("pretrained", "nnU-Net")])
    assert row_of(results, "nnU-Net", 8).values["dice"].value == 0.5
    assert any((row.arm, row.control, row.labels) == ("pretrained", "nnU-Net", 8) for row in results.differences)
    odd = Entry("forty", "nnU-Net", 8, 0, None, None, CaseValues({"dice": {"case00": 1.0}}))
    with pytest.raises(DataError, match="same cases"):
        run(tmp_path, FakeTrainer(), resume=True, outside=[odd])


def test_models_are_removed_where_only_scores_are_kept(tmp_path: Path) -> None:
    class Writes(FakeTrainer):
        def __call__(self, job: Any) -> Any:
            job.folder.mkdir(parents=True)
            return super().__call__(job)

    run(tmp_path, Writes(), values=recipe_values(keep="scores"))
    assert not list((tmp_path / "out" / "runs" / "forty").iterdir())
    run(tmp_path, Writes(), name="kept")
    assert list((tmp_path / "kept" / "runs" / "forty").iterdir())


def test_the_page_loads_nothing_and_names_no_folder(tmp_path: Path) -> None:
    run(tmp_path, FakeTrainer())
    page = (tmp_path / "out" / "report.html").read_text()
    assert "http:" not in page and "https:" not in page and str(tmp_path) not in page and "<svg" in page
    assert "pretrained - scratch" in page
