"""Pretraining from a store to a RUN."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from medssl import registry
from medssl.config import check_settings
from medssl.errors import CheckpointError, DataError, UsageError
from medssl.networks.architecture import Architecture
from medssl.networks.build import build_from_architecture
from medssl.pretraining.recipe import PretrainingSettings, recipe_model
from medssl.pretraining.run import pretrain
from medssl.training.checkpoint import find_checkpoint, load_checkpoint, newest_intact
from medssl.training.metrics import read_metrics

from .conftest import make_store

SMALL = (
    "patch_size=[16,16,16]",
    "batch_size=2",
    "mask.block=4",
    "log_every=1",
    "save_every=2",
    "health_every=4",
    "pictures_every=0",
    "validate_every=4",
)


def run(store: Path, out: Path, *more: str, steps: int | None = 4, **arguments: Any) -> Path:
    """Pretrain a few steps of resenc-xs on the CPU."""
    overrides = () if arguments.get("resume") and not more else (*SMALL, *more)
    return pretrain(
        None, store, out, overrides=overrides, steps=steps, device="cpu", quiet=True, **{"workers": 0, **arguments}
    )


def weights(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_checkpoint(path)["network_weights"]
    return found


def equal(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RUN of four steps."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    run(store, out, "pictures_every=2")
    return out


def test_a_run_holds_what_the_design_says(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {
        "run.json", "recipe.yaml", "environment.json", "data.json", "metrics.jsonl", "tensorboard", "views.png",
        "pictures", "checkpoints",
    } <= names  # fmt: skip
    assert json.loads((finished / "run.json").read_text())["kind"] == "pretraining"
    assert (finished / "pictures" / "step_000004.png").is_file()
    rows = read_metrics(finished)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"loss", "reconstruction", "lr", "time"} <= set(rows[0])
    assert {"health/error_to_mean", "validation/loss"} <= set(rows[-1])


def test_no_file_of_a_run_names_a_volume_a_patient_a_machine_or_a_path(finished: Path, store: Path) -> None:
    secrets = ["volume-0", "patient-0", str(store), str(finished), str(Path.home())]
    # A name of two letters stands in any picture.
    secrets += [socket.gethostname()] if len(socket.gethostname()) > 5 else []
    for path in finished.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for secret in secrets:
            assert secret.encode() not in content, f"{secret} in {path.name}"
            assert secret not in path.name


def test_the_checkpoint_has_the_keys_of_the_design_and_of_nnssl(finished: Path) -> None:
    content = torch.load(find_checkpoint(finished), weights_only=True)
    assert set(content) == {"network_weights", "nnssl_adaptation_plan", "citations", "medssl"}
    ours = content["medssl"]
    assert {
        "schema_version", "method", "recipe", "step", "architecture", "patch_size", "spacing_mm", "normalisation",
        "trains_decoder", "modalities", "data_hash", "library_versions",
    } <= set(ours)  # fmt: skip
    assert ours["step"] == 4 and ours["trains_decoder"] is True and ours["modalities"] == ["MR"]
    assert ours["spacing_mm"] == [1.0, 1.0, 1.0]
    assert content["nnssl_adaptation_plan"]["pretrain_num_input_channels"] == 1
    assert all(value.device.type == "cpu" for value in content["network_weights"].values())
    intermediate = load_checkpoint(finished / "checkpoints" / "step_00000002.pth")
    assert "training" in intermediate["medssl"] and "training" not in ours


def test_the_weights_fit_a_network_with_other_heads_and_the_encoder_is_bit_equal(finished: Path) -> None:
    content = load_checkpoint(find_checkpoint(finished))
    plan = Architecture.from_json(content["medssl"]["architecture"])
    network = build_from_architecture(plan, 1, 5, True)
    fitting = {name: value for name, value in content["network_weights"].items() if ".seg_layers." not in name}
    missing, unexpected = network.load_state_dict(fitting, strict=False)
    assert not unexpected and all(".seg_layers." in name for name in missing)
    for name, value in network.state_dict().items():
        if name.startswith(("encoder.", "decoder.encoder.")):
            assert torch.equal(value, content["network_weights"][name])
    assert len(network(torch.randn(1, 1, 16, 16, 16))) == 3


def test_nnunet_takes_the_checkpoint_as_pretrained_weights(finished: Path) -> None:
    loader = pytest.importorskip("nnunetv2.run.load_pretrained_weights")
    path = find_checkpoint(finished)
    plan = Architecture.from_json(load_checkpoint(path)["medssl"]["architecture"])
    network = build_from_architecture(plan, 1, 3, True)
    loader.load_pretrained_weights(network, path)
    name = "decoder.encoder.stages.2.blocks.1.conv2.all_modules.0.weight"
    assert torch.equal(network.state_dict()[name], weights(path)[name])


@pytest.mark.slow
def test_the_loss_falls_on_three_volumes(store: Path, tmp_path: Path) -> None:
    run(store, tmp_path, "log_every=10", "save_every=1000", steps=120)
    rows = read_metrics(tmp_path)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[-1]["validation/loss"] < 0.7 * rows[0]["loss"]
    assert rows[-1]["health/error_to_mean"] < 0.8


def test_images_are_pretrained_in_two_dimensions(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "images", shape=(3, 1, 40, 36), modality="IMAGE").folder
    final = pretrain(
        "mae", folder, tmp_path / "run", overrides=["log_every=1"], steps=2, device="cpu", workers=0, quiet=True
    )
    ours = load_checkpoint(final)["medssl"]
    assert ours["patch_size"] == [40, 40]
    assert ours["architecture"]["dimensions"] == 2 and ours["architecture"]["in_channels"] == 3


def test_the_same_recipe_gives_the_same_weights_and_another_seed_does_not(
    store: Path, finished: Path, tmp_path: Path
) -> None:
    first = find_checkpoint(finished)
    assert equal(first, run(store, tmp_path / "again"))
    assert not equal(first, run(store, tmp_path / "other", "seed=1"))


def test_a_recipe_is_read_overridden_and_written_complete(store: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: mae\npatch_size: [16, 16, 16]\nsteps: 50\nmask: {block: 8, ratio: 0.5}\nbatch_size: 2\n")
    pretrain(
        None, store, tmp_path / "run", recipe=recipe, overrides=["mask.ratio=0.6"], steps=1, device="cpu", workers=0,
        quiet=True,
    )  # fmt: skip
    resolved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert resolved["steps"] == 1 and resolved["mask"] == {"block": 8, "ratio": 0.6, "fill": "token"}
    assert set(resolved) == set(recipe_model("mae").model_fields)
    assert resolved["optimiser"]["name"] == "adamw" and resolved["optimiser"]["learning_rate"] == 0.001


def test_a_part_of_a_setting_leaves_the_rest_to_the_defaults(store: Path, tmp_path: Path) -> None:
    run(store, tmp_path / "a", "optimiser.learning_rate=0.002", steps=1)
    resolved = yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())
    assert resolved["optimiser"]["name"] == "adamw" and resolved["optimiser"]["learning_rate"] == 0.002
    assert resolved["schedule"]["name"] == "cosine"
    run(store, tmp_path / "b", "optimiser.name=sgd", steps=1)
    resolved = yaml.safe_load((tmp_path / "b" / "recipe.yaml").read_text())
    assert resolved["optimiser"]["learning_rate"] == 0.01 and resolved["schedule"]["name"] == "poly"


def test_unknown_names_list_near_ones(store: Path, tmp_path: Path) -> None:
    for override, hint in (
        ("batchsize=2", "batch_size"),
        ("mask.ration=1", "mask.ratio"),
        ("network=resenc-sx", "resenc-"),
    ):
        with pytest.raises(UsageError, match=f"Did you mean .*{hint}"):
            run(store, tmp_path / "run", override)
    with pytest.raises(UsageError, match="Did you mean mae"):
        pretrain("mea", store, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("patch_size=[20,16,16]", "multiples of"),
        ("patch_size=[8,8,8]", "one voxel"),
        ("mask.ratio=1.5", "less than 1"),
        ("optimiser.learning_rate=-1", "greater than 0"),
        ("augmentation.laterality=maybe", "forbid"),
    ],
)
def test_values_that_do_not_fit_are_named_before_anything_is_written(
    store: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(store, tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_a_store_without_training_volumes_is_refused(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "store", count=2, validation=2).folder
    with pytest.raises(DataError, match="no volume to train on"):
        run(folder, tmp_path / "run")


def test_validation_without_validation_volumes_is_refused_where_it_is_asked_for_and_else_left_out(
    tmp_path: Path,
) -> None:
    folder = make_store(tmp_path / "store", count=2, validation=0).folder
    with pytest.raises(UsageError, match="no validation volumes"):
        run(folder, tmp_path / "run", "validate_every=2")
    run(folder, tmp_path / "run", "validate_every=0", steps=1)
    assert "validation/loss" not in read_metrics(tmp_path / "run")[0]


def test_an_output_that_is_taken_is_refused_and_another_commands_is_never_removed(
    store: Path, finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--resume"):
        run(store, finished)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not written by this command"):
        run(store, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_overwrite_replaces_a_run(store: Path, tmp_path: Path) -> None:
    run(store, tmp_path / "run")
    run(store, tmp_path / "run", steps=2, overwrite=True)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]


def test_resuming_a_finished_run_changes_nothing(store: Path, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.*") if path.name != ".lock"}
    assert run(store, finished, steps=None, resume=True) == find_checkpoint(finished)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.*") if path.name != ".lock"} == before


def test_resume_with_another_recipe_names_the_difference(store: Path, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"mask\.ratio was 0\.75, now 0\.5"):
        run(store, finished, "mask.ratio=0.5", resume=True)
    with pytest.raises(UsageError, match="steps was 4, now 9"):
        run(store, finished, steps=9, resume=True)
    other = make_store(tmp_path / "other", count=5).folder
    with pytest.raises(UsageError, match="store is not the one"):
        run(other, finished, steps=None, resume=True)


def test_workers_and_saving_may_change_on_resume(store: Path, finished: Path) -> None:
    run(store, finished, "keep=2", "save_minutes=1", resume=True, workers=1)


def test_a_damaged_newest_checkpoint_falls_back_and_the_run_ends_the_same(
    store: Path, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    final = run(store, tmp_path / "run")
    raw = bytearray(final.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    final.write_bytes(raw)
    assert newest_intact(tmp_path / "run" / "checkpoints").name == "step_00000002.pth"
    assert equal(run(store, tmp_path / "run", steps=None, resume=True), find_checkpoint(finished))
    assert "falling back" in caplog.text
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_when_all_checkpoints_are_damaged_a_run_is_not_silently_started_anew(store: Path, tmp_path: Path) -> None:
    run(store, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("*.pth"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="are damaged"):
        run(store, tmp_path / "run", steps=None, resume=True)


def test_a_run_killed_before_its_first_checkpoint_starts_anew_with_its_recipe(
    store: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name in ("run.json", "recipe.yaml", "data.json", "metrics.jsonl"):
        (out / name).write_bytes((finished / name).read_bytes())
    assert equal(run(store, out, steps=None, resume=True), find_checkpoint(finished))
    assert [row["step"] for row in read_metrics(out)] == [1, 2, 3, 4]


def test_a_policy_of_ones_own_is_kept_without_its_path(store: Path, tmp_path: Path) -> None:
    policies = Path(registry.__file__).parent / "augmentation" / "policies"
    own = tmp_path / "private" / "own.yaml"
    own.parent.mkdir()
    own.write_text((policies / "none.yaml").read_text())
    out = tmp_path / "run"
    run(store, out, f"augmentation.policy={own}", steps=2)
    assert (out / "policy.yaml").read_text() == own.read_text()
    recipe = load_checkpoint(find_checkpoint(out))["medssl"]["recipe"]
    assert recipe["augmentation"]["policy"] == "policy.yaml"
    own.unlink()
    (out / "checkpoints" / "step_00000002.pth").write_bytes(b"")
    (out / "checkpoints" / "step_00000002.pth").unlink()
    run(store, out, steps=None, resume=True)


def test_settings_of_a_method_and_of_the_loop_have_different_names() -> None:
    for entry in registry.METHODS.values():
        assert not set(entry.load_settings().model_fields) & set(PretrainingSettings.model_fields)


def test_every_recipe_of_the_repository_fits_its_model() -> None:
    pipelines = Path(__file__).resolve().parents[2] / "pipelines"
    recipes = [
        path for path in pipelines.glob("*.yaml") if yaml.safe_load(path.read_text()).get("method") in registry.METHODS
    ]
    assert recipes
    for path in recipes:
        values = yaml.safe_load(path.read_text())
        recipe = check_settings(recipe_model(values["method"]), values, path.name)
        recipe.architecture.check_patch(recipe.patch_size)
        assert "# medssl pretrain --recipe" in path.read_text()


def test_a_setting_of_devices_that_is_no_number_is_a_usage_error(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="devices"):
        run(store, tmp_path / "run", "devices=many")
