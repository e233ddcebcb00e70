"""What we write, stock nnU-Net's -pretrained_weights takes, nnssl's reader takes, and safetensors holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from medssl.errors import CheckpointError, DataError, UsageError
from medssl.networks.architecture import Architecture, architecture
from medssl.networks.build import build_from_architecture
from medssl.training.checkpoint import save_checkpoint
from medssl.transfer.export import export
from medssl.transfer.fingerprint import fingerprint
from medssl.transfer.plans import make_plans
from medssl.transfer.raw import read_dataset
from medssl.transfer.source import load_source

from .conftest import MakeDataset


def _network_of(plans: dict[str, Any], channels: int) -> nn.Module:
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    network = plans["configurations"]["3d_fullres"]["architecture"]
    return get_network_from_plans(  # type: ignore[no-any-return]
        network["network_class_name"],
        network["arch_kwargs"],
        network["_kw_requires_import"],
        channels,
        3,
        deep_supervision=True,
    )


def _plans(make_dataset: MakeDataset, tmp_path: Path, network: str, channels: tuple[str, ...] = ("MR",)) -> Path:
    dataset = read_dataset(make_dataset(cases=2, channel_names=channels))
    facts = fingerprint(dataset, list(dataset.cases), tmp_path / "facts", quiet=True)
    plans = make_plans(dataset, facts, architecture(network, 3), patch_size=None) | {"plans_name": "nnUNetPlans"}
    (tmp_path / "nnUNetPlans.json").write_text(json.dumps(plans))
    return tmp_path / "nnUNetPlans.json"


def test_stock_pretrained_weights_takes_the_file_for_the_targets_plans(
    checkpoint: Path, make_dataset: MakeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    plans = _plans(make_dataset, tmp_path, "resenc-xs", ("T1", "T2"))
    out = export(checkpoint, "nnunet", tmp_path / "weights.pth", plans=plans)
    assert not (tmp_path / "weights_plans.json").exists()
    network = _network_of(json.loads(plans.read_text()), 2)
    load_pretrained_weights(network, str(out))
    pretrained = load_source(checkpoint).weights
    for name, value in network.state_dict().items():
        if name.startswith("encoder.stem.convs.0.conv.weight"):
            assert torch.equal(value, pretrained[name].repeat(1, 2, 1, 1, 1) / 2)
        elif ".seg_layers." not in name and "stem.convs.0" not in name:
            assert torch.equal(value, pretrained[name]), name


def test_plans_of_another_network_are_adapted_and_keep_their_data(
    checkpoint: Path, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    plans = _plans(make_dataset, tmp_path, "plain-unet-s")
    out = export(checkpoint, "nnunet", tmp_path / "weights.pth", plans=plans)
    given, adapted = json.loads(plans.read_text()), json.loads((tmp_path / "weights_plans.json").read_text())
    before, after = (content["configurations"]["3d_fullres"] for content in (given, adapted))
    assert adapted["plans_name"] == "medSSLPlans"
    assert Architecture.from_json(after["architecture"]) == architecture("resenc-xs", 3)
    for name in ("data_identifier", "spacing", "normalization_schemes", "use_mask_for_norm"):
        assert after[name] == before[name]
    load_pretrained_weights(_network_of(adapted, 1), str(out))


def test_without_plans_a_plans_file_that_fits_is_written(checkpoint: Path, tmp_path: Path) -> None:
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    out = export(checkpoint, "nnunet", tmp_path / "weights.pth")
    plans = json.loads((tmp_path / "weights_plans.json").read_text())
    configuration = PlansManager(plans).get_configuration("3d_fullres")
    assert configuration.patch_size == [24, 24, 24] and configuration.resampling_fn_data is not None
    load_pretrained_weights(_network_of(plans, 1), str(out))
    assert json.loads((tmp_path / "weights_keys.json").read_text())["counts"]["missing"] == 0


def test_a_decoder_that_was_not_trained_is_not_exported(tmp_path: Path, checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["medssl"]["trains_decoder"] = False
    save_checkpoint(tmp_path / "encoder.pth", content)
    export(tmp_path / "encoder.pth", "nnunet", tmp_path / "weights.pth")
    written = torch.load(tmp_path / "weights.pth", weights_only=True)["network_weights"]
    name = "decoder.stages.0.convs.0.conv.weight"
    assert not torch.equal(written[name], content["network_weights"][name])
    assert torch.equal(
        written["encoder.stages.0.blocks.0.conv1.conv.weight"],
        content["network_weights"]["encoder.stages.0.blocks.0.conv1.conv.weight"],
    )


def test_nnssls_reader_finds_each_key_and_loads_strictly(checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(export(checkpoint, "nnssl", tmp_path / "nnssl.pth"), weights_only=True)
    assert set(content) == {"network_weights", "nnssl_adaptation_plan", "citations"}
    plan = content["nnssl_adaptation_plan"]
    # The keys that nnU-Net's reader accesses without a default, key_to_lpe among them.
    assert set(plan) == {
        "architecture_plans", "pretrain_plan", "pretrain_num_input_channels", "recommended_downstream_patchsize",
        "key_to_encoder", "key_to_stem", "keys_to_in_proj", "key_to_lpe",
    }  # fmt: skip
    assert set(plan["architecture_plans"]) == {"arch_class_name", "arch_kwargs", "arch_kwargs_requiring_import"}
    assert {"configurations", "plans_name", "transpose_forward", "image_reader_writer"} <= set(plan["pretrain_plan"])
    # Restated from the documented behaviour of the reader: cut the prefix off, load strictly into the submodules.
    target = build_from_architecture(architecture("resenc-xs", 3), 1, 4)
    for key in ("key_to_encoder", "key_to_stem"):
        prefix = plan[key] + "."
        part = {
            name.removeprefix(prefix): value
            for name, value in content["network_weights"].items()
            if name.startswith(prefix)
        }
        target.get_submodule(plan[key]).load_state_dict(part, strict=True)
    for name in plan["keys_to_in_proj"]:
        assert content["network_weights"][f"{name}.weight"].shape[1] == plan["pretrain_num_input_channels"]


def test_resenc_l_is_written_by_its_name() -> None:
    from medssl.training.nnssl_plan import adaptation_plan

    plan = adaptation_plan(
        architecture("resenc-l", 3), in_channels=1, patch_size=(160,) * 3, spacing_mm=(1, 1, 1), modalities=["MR"]
    )
    assert plan["architecture_plans"] == {
        "arch_class_name": "ResEncL",
        "arch_kwargs": None,
        "arch_kwargs_requiring_import": None,
    }


def test_safetensors_hold_each_tensor_once_and_rebuild_the_network(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    out = export(checkpoint, "safetensors", tmp_path / "weights.safetensors")
    weights, facts = load_file(out), json.loads((tmp_path / "weights.json").read_text())
    network = build_from_architecture(Architecture.from_json(facts["architecture"]), facts["in_channels"], 1)
    whole = weights | {alias: weights[name] for alias, name in facts["aliases"].items()}
    network.load_state_dict(whole, strict=True)
    pretrained = load_source(checkpoint).weights
    assert all(torch.equal(value, pretrained[name]) for name, value in network.state_dict().items())
    assert len(weights) == len({value.data_ptr() for value in network.state_dict().values()})


def test_exports_that_cannot_be_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no format named 'onx'"):
        export(checkpoint, "onx", tmp_path / "x")
    with pytest.raises(UsageError, match="--plans is for --format nnunet"):
        export(checkpoint, "nnssl", tmp_path / "x", plans=tmp_path / "plans.json")
    with pytest.raises(CheckpointError, match="does not exist"):
        export(tmp_path / "nothing", "nnssl", tmp_path / "x")
    (tmp_path / "plans.json").write_text('{"configurations": {"2d": {}}}')
    with pytest.raises(DataError, match=r"no usable configuration 3d_fullres .*there are: 2d"):
        export(checkpoint, "nnunet", tmp_path / "x", plans=tmp_path / "plans.json")
