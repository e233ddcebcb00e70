"""Checkpoints of nnssl and nnU-Net become ours; each key is accounted for, and nothing in them is executed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medssl.errors import CheckpointError
from medssl.networks.architecture import Architecture, architecture
from medssl.networks.build import build_from_architecture, build_network
from medssl.transfer.importing import import_checkpoint
from medssl.transfer.inferring import infer_architecture
from medssl.transfer.source import load_source

XS = architecture("resenc-xs", 3)


def _adaptation_plan(architecture_plans: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Restate nnssl's adaptation plan key by key, independently of the code that writes ours."""
    return {
        "architecture_plans": architecture_plans,
        "pretrain_plan": {
            "dataset_name": "Dataset745_OpenMind",
            "plans_name": "nnsslPlans",
            "configurations": {
                "onemmiso": {"spacing_style": "onemmiso", "spacing": [1, 1, 1], "patch_size": [160, 160, 160]}
            },
        },
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": (32, 32, 32),
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ("encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"),
        "key_to_lpe": None,
        **changes,
    }


def _by_kwargs(plan: Architecture) -> dict[str, Any]:
    return {
        "arch_class_name": plan.network_class_name.rpartition(".")[2],
        "arch_kwargs": plan.arch_kwargs,
        "arch_kwargs_requiring_import": list(plan.kw_requires_import),
    }


def _weights(plan: Architecture = XS, seed: int = 5) -> dict[str, Tensor]:
    return dict(build_from_architecture(plan, 1, 1, seed=seed).state_dict())


def _nnssl_file(path: Path, weights: dict[str, Tensor], plan: dict[str, Any] | None) -> Path:
    content: dict[str, Any] = {
        "network_weights": weights,
        "optimizer_state": {"state": {}, "param_groups": []},
        "grad_scaler_state": None,
        "logging": {"train_losses": [0.5]},
        "_best_ema": None,
        "current_epoch": 1000,
        "init_args": {"pretrain_json": {"datasets": {"745": {"subjects": {"sub-01": {}}}}}, "fold": "all"},
        "trainer_name": "BaseMAETrainer_BS8",
    }
    if plan is not None:
        content |= {
            "nnssl_adaptation_plan": plan,
            "citations": [{"type": "Pretraining", "name": "MAE", "apa_citations": ["..."]}],
        }
    torch.save(content, path)
    return path


def test_an_nnssl_mae_checkpoint_comes_over_whole(tmp_path: Path) -> None:
    weights = _weights()
    report = import_checkpoint(
        _nnssl_file(tmp_path / "in.pth", weights, _adaptation_plan(_by_kwargs(XS))), tmp_path / "out.pth"
    )
    source = load_source(tmp_path / "out.pth")
    assert source.architecture == XS and source.in_channels == 1 and source.trains_decoder
    assert source.patch_size == (32, 32, 32) and source.spacing_mm == (1.0, 1.0, 1.0)
    assert all(torch.equal(source.weights[name], value) for name, value in weights.items())
    assert sorted(report.keys.taken) == sorted(weights) and not report.keys.missing
    assert source.citations[0]["name"] == "MAE"
    assert "init_args" in report.not_kept


def test_no_list_of_patients_comes_along(tmp_path: Path) -> None:
    import_checkpoint(
        _nnssl_file(tmp_path / "in.pth", _weights(), _adaptation_plan(_by_kwargs(XS))), tmp_path / "out.pth"
    )
    assert b"sub-01" not in (tmp_path / "out.pth").read_bytes()


def test_resenc_l_is_known_by_its_name_alone(tmp_path: Path) -> None:
    large = architecture("resenc-l", 3)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in build_network("resenc-l", dimensions=3).state_dict().items()}
    # Expanded zeros take no memory; the file stores a few bytes for each.
    weights = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    plan = _adaptation_plan({"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None})
    report = import_checkpoint(_nnssl_file(tmp_path / "in.pth", weights, plan), tmp_path / "out.pth")
    assert load_source(tmp_path / "out.pth").architecture == large
    assert len(report.keys.taken) == 956


def test_a_voco_checkpoint_gives_its_encoder_and_names_the_rest(tmp_path: Path) -> None:
    encoder = {name: value for name, value in _weights().items() if name.startswith("encoder.")}
    weights = {f"module.{name}": value for name, value in encoder.items()} | {
        "module.projector.0.weight": torch.zeros(3, 3)
    }
    report = import_checkpoint(
        _nnssl_file(tmp_path / "in.pth", weights, _adaptation_plan(_by_kwargs(XS))), tmp_path / "out.pth"
    )
    source = load_source(tmp_path / "out.pth")
    assert report.keys.left == ["projector.0.weight"] and not source.trains_decoder
    assert all(torch.equal(source.weights[name], value) for name, value in encoder.items())
    assert any(name.startswith("decoder.stages") for name in report.keys.missing)
    assert "ignored          1 keys (projector.0.weight)" in str(report)


def test_an_encoder_under_another_name_is_found_by_the_plan(tmp_path: Path) -> None:
    weights = {
        name.replace("encoder.", "online_encoder.", 1): value
        for name, value in _weights().items()
        if name.startswith("encoder.")
    }
    plan = _adaptation_plan(
        _by_kwargs(XS), key_to_encoder="online_encoder.stages", key_to_stem="online_encoder.stem",
        keys_to_in_proj=("online_encoder.stem.convs.0.conv",),
    )  # fmt: skip
    import_checkpoint(_nnssl_file(tmp_path / "in.pth", weights, plan), tmp_path / "out.pth")
    taken = load_source(tmp_path / "out.pth").weights
    assert torch.equal(
        taken["encoder.stages.1.blocks.0.conv1.conv.weight"],
        weights["online_encoder.stages.1.blocks.0.conv1.conv.weight"],
    )


@pytest.mark.parametrize("name", ["resenc-xs", "resenc-s", "plain-unet-s"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_spark_checkpoint_without_a_plan_is_read_off_its_shapes(tmp_path: Path, name: str, dimensions: int) -> None:
    strides = [[1] * dimensions, [1] + [2] * (dimensions - 1)] + [[2] * dimensions] * (5 if name == "resenc-s" else 4)
    strides = strides[: 5 if name == "resenc-s" else 4]
    plan = architecture(name, dimensions, strides=strides)
    assert infer_architecture(_weights(plan), tmp_path) == plan
    report = import_checkpoint(_nnssl_file(tmp_path / "in.pth", _weights(plan), None), tmp_path / "out.pth")
    assert report.kind == "nnssl without an adaptation plan"
    assert load_source(tmp_path / "out.pth").architecture == plan


def test_an_nnunet_checkpoint_with_numpy_numbers_comes_over(tmp_path: Path) -> None:
    configuration = {"architecture": XS.to_json(), "patch_size": [32, 24, 16], "spacing": [1.0, 0.8, 0.8]}
    torch.save(
        {
            "network_weights": _weights(),
            "optimizer_state": {},
            "logging": {"train_losses": [np.float32(0.3), np.float64(0.2)], "mean_fg_dice": [np.float64(0.9)]},
            "_best_ema": np.float64(0.9),
            "current_epoch": 1000,
            "init_args": {
                "plans": {
                    "configurations": {
                        "3d_fullres": configuration,
                        "big": {"inherits_from": "3d_fullres", "patch_size": [64, 24, 16]},
                    }
                },
                "configuration": "big",
                "fold": 0,
                "device": torch.device("cpu"),
            },
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": (0, 1, 2),
        },
        tmp_path / "in.pth",
    )
    report = import_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth")
    source = load_source(tmp_path / "out.pth")
    assert report.kind == "nnU-Net" and report.trains_decoder
    assert source.architecture == XS and source.patch_size == (64, 24, 16) and source.spacing_mm == (1.0, 0.8, 0.8)


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, legacy: bool) -> None:
    target, path = tmp_path / "owned", tmp_path / "in.pth"
    content = {"network_weights": _weights(), "init_args": _Bomb(target)}
    if legacy:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"refused.*could run code"):
        import_checkpoint(path, tmp_path / "out.pth")
    assert not target.exists() and not (tmp_path / "out.pth").exists()


def test_numpy_objects_are_no_way_in(tmp_path: Path) -> None:
    target, path = tmp_path / "owned", tmp_path / "in.pth"
    torch.save({"network_weights": _weights(), "logging": np.array([_Bomb(target)], dtype=object)}, path)
    with pytest.raises(CheckpointError, match="refused"):
        import_checkpoint(path, tmp_path / "out.pth")
    assert not target.exists()


def test_networks_that_medssl_does_not_build_are_named(tmp_path: Path) -> None:
    plan = _adaptation_plan({"arch_class_name": "PrimusM", "arch_kwargs": None, "arch_kwargs_requiring_import": None})
    with pytest.raises(CheckpointError, match=r"holds a PrimusM; medssl fine-tunes U-Nets.*nnUNetv2_train_pretrained"):
        import_checkpoint(
            _nnssl_file(tmp_path / "in.pth", {"eva.pos_embed": torch.zeros(1)}, plan), tmp_path / "out.pth"
        )
    with pytest.raises(CheckpointError, match=r"describes no network.*eva.pos_embed"):
        import_checkpoint(
            _nnssl_file(tmp_path / "in.pth", {"eva.pos_embed": torch.zeros(1)}, None), tmp_path / "out.pth"
        )


def test_a_half_encoder_is_refused(tmp_path: Path) -> None:
    weights = {name: value for name, value in _weights().items() if ".stages.3." not in name}
    with pytest.raises(CheckpointError, match=r"weights of the encoder are missing"):
        import_checkpoint(
            _nnssl_file(tmp_path / "in.pth", weights, _adaptation_plan(_by_kwargs(XS))), tmp_path / "out.pth"
        )


def test_our_own_checkpoint_needs_no_import(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a checkpoint of medssl already"):
        import_checkpoint(checkpoint, tmp_path / "out.pth")


def test_an_nnssl_file_can_be_fine_tuned_as_it_is(tmp_path: Path) -> None:
    path = _nnssl_file(tmp_path / "in.pth", _weights(), _adaptation_plan(_by_kwargs(XS)))
    assert load_source(path).architecture == XS
