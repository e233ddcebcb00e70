"""Going on from another RUN."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from medssl.errors import UsageError
from medssl.pretraining.run import pretrain
from medssl.training.checkpoint import find_checkpoint, load_checkpoint

SETTINGS = [
    "network=resenc-xs",
    "patch_size=[16,16,16]",
    "batch_size=2",
    "log_every=1",
    "pictures_every=0",
    "workers=0",
]
INFINITE = ["schedule={name: infinite, warmup_steps: 1, anneal: 0.4}"]


def run(store: Path, out: Path, *overrides: str, method: str = "mae", **arguments: object) -> Path:
    return pretrain(
        method, store, out, overrides=[*SETTINGS, *overrides], device="cpu", quiet=True, **{"steps": 5, **arguments}  # type: ignore[arg-type]
    )  # fmt: skip


def rates(out: Path) -> list[float]:
    return [json.loads(line)["lr"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def first(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a plateau."""
    out = tmp_path_factory.mktemp("first") / "run"
    run(store, out, *INFINITE)
    return out


def test_an_infinite_run_keeps_a_checkpoint_from_before_its_anneal(first: Path) -> None:
    kept = load_checkpoint(first / "checkpoints" / "plateau.pth")["medssl"]
    assert kept["step"] == 3 and kept["training"]["step"] == 3


def test_a_continued_run_takes_weights_optimiser_and_plateau(store: Path, first: Path, tmp_path: Path) -> None:
    out = tmp_path / "second"
    run(store, out, method="mae", continue_from=first, steps=1)
    kept = load_checkpoint(first / "checkpoints" / "plateau.pth")
    begun = load_checkpoint(out / "start.pth")
    for name, value in kept["network_weights"].items():
        assert torch.equal(begun["network_weights"][name], value)
    moments = begun["medssl"]["training"]["optimiser"]["state"]
    assert moments[0]["step"].item() == 3
    # No second warm-up: the first rate is the plateau's.
    peak = rates(first)[0]
    assert rates(out)[0] == pytest.approx(0.3 * peak)
    data = json.loads((out / "data.json").read_text())
    assert data["continued_from"]["method"] == "mae" and data["continued_from"]["step"] == 3


def test_the_second_runs_loss_begins_where_the_first_ended(store: Path, first: Path, tmp_path: Path) -> None:
    fresh, on = tmp_path / "fresh", tmp_path / "on"
    run(store, fresh, *INFINITE, steps=1)
    run(store, on, continue_from=first, steps=1)
    losses = [json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["loss"] for out in (fresh, on)]
    assert losses[1] < losses[0]


def test_a_continued_run_that_is_resumed_before_its_first_checkpoint_begins_as_it_did(
    store: Path, first: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(store, whole, continue_from=first, steps=2)
    run(store, killed, continue_from=first, steps=2)
    for path in (killed / "checkpoints").iterdir():
        path.unlink()
    (killed / "metrics.jsonl").write_text("")
    pretrain(None, store, killed, resume=True, device="cpu", quiet=True)
    ends = [load_checkpoint(find_checkpoint(out))["network_weights"] for out in (whole, killed)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert "continued_from" in json.loads((killed / "data.json").read_text())


def test_another_method_takes_the_networks_weights_alone(
    store: Path, first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        run(store, tmp_path, method="combined", continue_from=first, steps=1)
    assert "network's weights" in caplog.text and "mae" in caplog.text
    assert load_checkpoint(tmp_path / "start.pth")["medssl"]["training"] is None


def test_an_annealed_checkpoint_gives_its_weights_alone_and_says_so(
    store: Path, first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        run(store, tmp_path, continue_from=find_checkpoint(first), steps=1)
    assert "not from before the anneal" in caplog.text


def test_the_optimisers_numbers_are_those_of_the_new_recipe(store: Path, first: Path, tmp_path: Path) -> None:
    run(store, tmp_path, "optimiser.weight_decay=0.5", "save_every=1", continue_from=first, steps=2)
    saved = load_checkpoint(tmp_path / "checkpoints" / "step_00000001.pth")["medssl"]["training"]["optimiser"]
    assert saved["param_groups"][0]["weight_decay"] == 0.5


def test_what_is_refused_leaves_the_run_that_stood_there(store: Path, first: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(store, out, steps=1)
    before = sorted(path.name for path in out.rglob("*"))
    for wrong in ("optimiser={name: sgd}", "network=plain-unet-s"):
        with pytest.raises(UsageError, match=r"optimiser of that run is adamw|network of that run is another"):
            run(store, out, wrong, continue_from=first, overwrite=True)
    with pytest.raises(UsageError, match="Give another --out"):
        run(store, first, continue_from=first, overwrite=True)
    assert sorted(path.name for path in out.rglob("*")) == before


def test_a_damaged_plateau_is_said(store: Path, first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(first, copied)
    (copied / "checkpoints" / "plateau.pth").write_bytes(b"no checkpoint")
    run(store, tmp_path / "run", continue_from=copied, steps=1)
    assert "plateau.pth" in caplog.text and "damaged" in caplog.text


@pytest.mark.parametrize(
    ("override", "message"),
    [("network=plain-unet-s", "network of that run is another"), ("mask.fill=zero", "token is .* there and None here")],
)
def test_what_does_not_fit_is_named(store: Path, first: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(store, tmp_path, override, continue_from=first)


def test_continuing_and_resuming_exclude_each_other(store: Path, first: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give one of them"):
        run(store, tmp_path, continue_from=first, resume=True)
