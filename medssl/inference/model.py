"""A trained nnU-Net model folder, read for prediction."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medssl.errors import CheckpointError, DataError, UsageError
from medssl.files import sha256_of

CHECKPOINT = "checkpoint_final.pth"
READERS = ("NibabelIOWithReorient", "NibabelIO", "SimpleITKIO")


@dataclass
class SegmentationModel:
    """Networks, plans and labels of a model folder: `dataset.json`, `plans.json`, `fold_*/checkpoint_final.pth`.

    Args:
        networks: One network per fold, in evaluation mode, on `device`.
        plans: nnU-Net's `PlansManager`.
        configuration: nnU-Net's `ConfigurationManager` of the trained configuration.
        dataset: Content of `dataset.json`.
        labels: nnU-Net's `LabelManager`.
        channels: Number of input channels.
        mirroring_axes: Spatial axes the checkpoint allows to mirror, empty for none.
        device: Where the networks are.
        sha256: SHA-256 of each fold's checkpoint file, by fold name.
    """

    networks: list[nn.Module]
    plans: Any
    configuration: Any
    dataset: dict[str, Any]
    labels: Any
    channels: int
    mirroring_axes: tuple[int, ...]
    device: torch.device
    sha256: dict[str, str]

    @property
    def heads(self) -> int:
        """Number of output channels."""
        return int(self.labels.num_segmentation_heads)

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Tile size in voxels, in nnU-Net's transposed axis order; two numbers for a 2D configuration."""
        return tuple(int(side) for side in self.configuration.patch_size)

    @property
    def label_values(self) -> dict[str, tuple[int, ...]]:
        """Values in the mask that make up each foreground label or region, by name."""
        names = {}
        for name, value in self.dataset["labels"].items():
            values = tuple(value) if isinstance(value, list | tuple) else (value,)
            if name not in ("background", "ignore") and values != (0,):
                names[str(name)] = tuple(int(each) for each in values)
        return names


def resolve_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.

    Raises:
        UsageError: If the name is unknown or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: no such device. Use auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices. Use --device cpu."
        )
    return device


def load_model(folder: Path, device: torch.device) -> SegmentationModel:
    """Load every fold of a model folder; checkpoints are read with `weights_only`.

    Raises:
        CheckpointError: If a file of the folder is missing or damaged, or the weights do not fit the plans.
        UsageError: If the model needs a cascade, which is not offered.
    """
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    dataset, plans_content = (_read_json(folder, name) for name in ("dataset.json", "plans.json"))
    files = sorted(folder.glob(f"fold_*/{CHECKPOINT}"))
    if len(files) > 1:  # fold_all is trained on every case; nnU-Net leaves it out of an ensemble too
        files = [file for file in files if file.parent.name != "fold_all"]
    if not files:
        raise CheckpointError(
            f"{folder} has no fold_*/{CHECKPOINT}: it is not a trained segmentation run, or its training has not "
            "ended. Finish it with `medssl finetune segmentation ... --resume`."
        )
    plans = PlansManager(plans_content)
    checkpoints = [_read_checkpoint(file) for file in files]
    name = checkpoints[0]["init_args"]["configuration"]
    configuration = plans.get_configuration(name)
    if configuration.previous_stage_name is not None:
        raise UsageError(
            f"{folder}: configuration {name} is a cascade's second stage; predict it with nnUNetv2_predict."
        )
    reader = plans_content.get("image_reader_writer")
    if reader not in READERS:
        raise UsageError(
            f"{folder}: the model reads its images with {reader}; `medssl predict` knows {', '.join(READERS)}. Use "
            f"nnUNetv2_predict_from_modelfolder -m {folder}."
        )
    labels = plans.get_label_manager(dataset)
    channels = determine_num_input_channels(plans, configuration, dataset)
    networks = [
        _build(configuration, checkpoint, channels, labels.num_segmentation_heads, file).to(device).eval()
        for checkpoint, file in zip(checkpoints, files, strict=True)
    ]
    return SegmentationModel(
        networks=networks,
        plans=plans,
        configuration=configuration,
        dataset=dataset,
        labels=labels,
        channels=channels,
        mirroring_axes=tuple(checkpoints[0].get("inference_allowed_mirroring_axes") or ()),
        device=device,
        sha256={file.parent.name: sha256_of(file) for file in files},
    )


@contextmanager
def precision(device: torch.device) -> Iterator[None]:
    """Run as nnU-Net does: float16 autocast on CUDA, float32 elsewhere, no gradients."""
    with torch.inference_mode():
        if device.type == "cuda":
            with torch.autocast("cuda"):
                yield
        else:
            yield


def _build(configuration: Any, checkpoint: dict[str, Any], channels: int, heads: int, file: Path) -> nn.Module:
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    network: nn.Module = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        channels,
        heads,
        allow_init=False,
        deep_supervision=False,
    )
    weights: dict[str, Tensor] = checkpoint["network_weights"]
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if len(str(error).splitlines()) > 1 else str(error)
        raise CheckpointError(
            f"{file.parent.name}/{file.name}: the weights do not fit the network of plans.json ({first}). "
            "The two must come from the same training."
        ) from error
    return network


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text())
    except OSError as error:
        raise CheckpointError(
            f"{folder} has no readable {name}: it is not a segmentation run. --model takes the folder that "
            "`medssl finetune segmentation` or nnU-Net wrote, the one that holds plans.json."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{folder / name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{folder / name} must hold an object, not a {type(content).__name__}.")
    return content


def _read_checkpoint(file: Path) -> dict[str, Any]:
    from medssl.training.checkpoint import load_checkpoint

    content: dict[str, Any] = load_checkpoint(file, numpy_scalars=True)
    for key in ("network_weights", "init_args"):
        if key not in content:
            raise CheckpointError(f"{file} has no '{key}': it is not a checkpoint of a finished nnU-Net training.")
    return content
