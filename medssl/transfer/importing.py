"""Checkpoints of nnssl (OpenMind) and of nnU-Net made into ours; each key is accounted for, pickles are refused."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from medssl.errors import CheckpointError
from medssl.networks.architecture import PLAIN, RESIDUAL, Architecture, architecture
from medssl.networks.build import build_from_architecture
from medssl.training.checkpoint import SCHEMA_VERSION, load_checkpoint, save_checkpoint
from medssl.training.environment import library_versions
from medssl.training.nnssl_plan import adaptation_plan
from medssl.transfer.inferring import infer_architecture
from medssl.transfer.overlay import KeyReport, overlay, strip_wrappers

# Top-level keys of nnssl and nnU-Net checkpoints that hold training state or, in nnssl's init_args, a list of patients.
_NOT_KEPT = (
    "optimizer_state",
    "grad_scaler_state",
    "logging",
    "_best_ema",
    "current_epoch",
    "init_args",
    "trainer_name",
    "inference_allowed_mirroring_axes",
    "spark_weights",
)
# nnssl's words for spacing: only these two are one spacing for all volumes.
_ONE_SPACING = ("onemmiso", "median")

logger = logging.getLogger(__name__)


@dataclass
class ImportReport:
    """What a foreign checkpoint was and what became of each of its keys.

    Args:
        kind: `nnssl`, `nnssl without an adaptation plan` or `nnU-Net`.
        architecture: Class of the network and how its description was found.
        keys: What became of each key of the weights; see `KeyReport`. Keys that stay random in the result are in
            `missing` and `mismatched`.
        not_kept: Top-level parts of the file that were left behind.
        trains_decoder: Whether the decoder came along whole.
    """

    kind: str
    architecture: str
    keys: KeyReport
    not_kept: list[str] = field(default_factory=list)
    trains_decoder: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "kind": self.kind,
            "architecture": self.architecture,
            "trains_decoder": self.trains_decoder,
            "not_kept": self.not_kept,
            "keys": self.keys.to_json(),
        }

    def __str__(self) -> str:
        lines = [
            f"{self.kind} checkpoint, {self.architecture}",
            f"taken            {len(self.keys.taken)} keys",
            f"ignored          {len(self.keys.left)} keys{_some(self.keys.left)}",
            f"missing          {len(self.keys.missing)} keys{_some(self.keys.missing)}",
            f"other shape      {len(self.keys.mismatched)} keys{_some(list(self.keys.mismatched))}",
            "decoder          "
            f"{'taken' if self.trains_decoder else 'not trained, or not whole: fine-tuning starts it anew'}",
            f"left behind      {', '.join(self.not_kept) or 'nothing'}",
        ]
        return "\n".join(lines)


def import_checkpoint(file: Path, out: Path) -> ImportReport:
    """Write a checkpoint of ours from one of nnssl or nnU-Net.

    Args:
        file: The foreign checkpoint. Nothing in it is executed.
        out: File to write.

    Returns:
        What became of each key.

    Raises:
        CheckpointError: If it is missing, damaged, a pickle that asks for code, or a network that medssl does not
            build.
    """
    content = load_checkpoint(Path(file), numpy_scalars=True)
    if "medssl" in content and "architecture" in content["medssl"]:
        raise CheckpointError(f"{file} is a checkpoint of medssl already: use it as it is.")
    converted, report = convert(content, Path(file))
    save_checkpoint(Path(out), converted)
    return report


def convert(content: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], ImportReport]:
    """Return the content of our checkpoint and the report of keys.

    Args:
        content: Content of a foreign checkpoint.
        path: Its file, for messages.

    Raises:
        CheckpointError: If its network is none that medssl builds.
    """
    weights = strip_wrappers(content["network_weights"])
    plan = content.get("nnssl_adaptation_plan")
    spacing: list[float] | None = None
    patch: list[int] | None = None
    if isinstance(plan, Mapping):
        kind = "nnssl"
        network, said = _of_nnssl(plan, weights, path)
        weights = _rename(weights, plan)
        patch, spacing = _patch_and_spacing(plan)
    elif isinstance(content.get("init_args"), Mapping) and "configurations" in content["init_args"].get("plans", {}):
        kind = "nnU-Net"
        network, patch, spacing = _of_nnunet(content["init_args"], path)
        said = f"{network.network_class_name.rpartition('.')[2]} from the plans in the file"
    else:
        kind = "nnssl without an adaptation plan"
        network = infer_architecture(weights, path)
        said = f"{network.network_class_name.rpartition('.')[2]} read off the shapes of the weights"
    channels = _input_channels(weights, path)
    heads = next(
        (value.shape[0] for name, value in weights.items() if re.fullmatch(r"decoder\.seg_layers\.\d+\.weight", name)),
        1,
    )
    unet = build_from_architecture(network, channels, int(heads), seed=0)
    keys = overlay(unet, weights, decoder=True, heads=True)
    _require_encoder(keys, path)
    whole = not any(
        name.startswith(("decoder.stages", "decoder.transpconvs")) for name in (*keys.missing, *keys.mismatched)
    )
    report = ImportReport(kind, said, keys, sorted(name for name in content if name in _NOT_KEPT), whole)
    for name in ("missing", "mismatched"):
        if getattr(keys, name):
            logger.warning("%s: %d keys %s; they start random.", path.name, len(getattr(keys, name)), name)
    edge = patch or [max(64, stride * 4) for stride in network.total_stride]
    modality = ["CT"] if "CTNormalization" in str(plan) else ["MR"]
    facts = {
        "schema_version": SCHEMA_VERSION,
        "method": f"imported from {kind}",
        "recipe": {},
        "step": 0,
        "architecture": _description(network, channels),
        "patch_size": edge,
        "spacing_mm": spacing,
        "normalisation": "as in the source",
        "trains_decoder": whole,
        "modalities": modality,
        "data_hash": None,
        "library_versions": library_versions(),
    }
    ours = {
        "network_weights": unet.state_dict(),
        "nnssl_adaptation_plan": adaptation_plan(
            network, in_channels=channels, patch_size=edge, spacing_mm=spacing, modalities=modality
        ),
        "citations": _citations(content.get("citations")),
        "medssl": facts,
    }
    return ours, report


def _description(network: Architecture, channels: int) -> dict[str, Any]:
    code = list(network.kw_requires_import)
    extent = {"name": None, "dimensions": network.dimensions, "in_channels": channels}
    return {**extent, **network.to_json(), "kw_requires_import": code}


def _of_nnssl(plan: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> tuple[Architecture, str]:
    plans = plan.get("architecture_plans")
    if not isinstance(plans, Mapping) or "arch_class_name" not in plans:
        return infer_architecture(_rename(weights, plan), path), "read off the shapes of the weights"
    name = str(plans["arch_class_name"])
    if name in ("ResEncL", "NoSkipResEncL"):
        # Without skips the encoder is the same; its decoder fits no U-Net with skips and is reported as such.
        return architecture("resenc-l", 3), f"{name} by its name"
    kinds = {"ResidualEncoderUNet": RESIDUAL, "PlainConvUNet": PLAIN}
    if name not in kinds:
        raise CheckpointError(
            f"{path} holds a {name}; medssl fine-tunes U-Nets ({', '.join(('ResEncL', *kinds))}). Use nnU-Net's own "
            "nnUNetv2_train_pretrained for transformers."
        )
    if not isinstance(plans.get("arch_kwargs"), Mapping):
        return infer_architecture(
            _rename(weights, plan), path
        ), f"{name}, its arguments read off the shapes of the weights"
    code = plans.get("arch_kwargs_requiring_import") or plans.get("_kw_requires_import")
    network = Architecture(
        kinds[name], dict(plans["arch_kwargs"]), tuple(code or Architecture(name, {}).kw_requires_import)
    )
    return network, f"{name} from the adaptation plan"


def _rename(weights: Mapping[str, Tensor], plan: Mapping[str, Any]) -> dict[str, Tensor]:
    """Give encoder and stem the names they have in a U-Net: methods keep them under their own."""
    result = dict(weights)
    for key, home in (("key_to_encoder", "encoder.stages"), ("key_to_stem", "encoder.stem")):
        prefix = plan.get(key)
        if not isinstance(prefix, str) or prefix == home or prefix.startswith("encoder.stages"):
            continue
        for name in [name for name in result if name.startswith(f"{prefix}.")]:
            result.setdefault(home + name.removeprefix(prefix), result.pop(name))
    return result


def _patch_and_spacing(plan: Mapping[str, Any]) -> tuple[list[int] | None, list[float] | None]:
    patch = plan.get("recommended_downstream_patchsize")
    spacing = None
    pretraining = plan.get("pretrain_plan")
    configurations = pretraining.get("configurations", {}) if isinstance(pretraining, Mapping) else {}
    if len(configurations) == 1:
        configuration = next(iter(configurations.values()))
        if configuration.get("spacing_style", "onemmiso") in _ONE_SPACING:
            spacing = configuration.get("spacing")
    return (
        [int(edge) for edge in patch] if isinstance(patch, list | tuple) else None,
        [float(edge) for edge in spacing] if isinstance(spacing, list | tuple) and len(spacing) == 3 else None,
    )


def _of_nnunet(arguments: Mapping[str, Any], path: Path) -> tuple[Architecture, list[int], list[float] | None]:
    name = str(arguments.get("configuration"))
    configuration = dict(arguments["plans"]["configurations"].get(name, {}))
    while "inherits_from" in configuration:
        parent = arguments["plans"]["configurations"][configuration.pop("inherits_from")]
        configuration = {**parent, **configuration}
    if "architecture" not in configuration:
        raise CheckpointError(
            f"{path}: its plans are of an nnU-Net before 2.5 and do not describe the network. Plan and train it again."
        )
    spacing = [float(edge) for edge in configuration["spacing"]]
    patch = [int(edge) for edge in configuration["patch_size"]]
    return Architecture.from_json(configuration["architecture"]), patch, spacing if len(spacing) == 3 else None


def _input_channels(weights: Mapping[str, Tensor], path: Path) -> int:
    for name in ("encoder.stem.convs.0.conv.weight", "encoder.stages.0.0.convs.0.conv.weight"):
        for found in (name, f"decoder.{name}", name.replace(".conv.weight", ".all_modules.0.weight")):
            if found in weights:
                return int(weights[found].shape[1])
    raise CheckpointError(
        f"{path} has no first convolution of a U-Net (encoder.stem.convs.0 or encoder.stages.0.0.convs.0); it holds "
        f"{', '.join(list(weights)[:4])} ... medssl imports U-Nets of nnssl and nnU-Net."
    )


def _require_encoder(keys: KeyReport, path: Path) -> None:
    lost = [name for name in (*keys.missing, *keys.mismatched) if name.startswith("encoder.")]
    if lost:
        raise CheckpointError(
            f"{path}: {len(lost)} weights of the encoder are missing or have another shape, for example {lost[0]}. The "
            "file is not whole, or its plan describes another network."
        )


def _citations(value: Any) -> list[Any]:
    """Keep citations that are plain text; they are shown to users and go into exports."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _some(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
