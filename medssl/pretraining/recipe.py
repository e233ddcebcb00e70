"""The recipe of a pretraining: what the user gave, checked, and completed for the store and the machine at hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Literal

from pydantic import Field, create_model

from medssl import registry
from medssl.augmentation.policy import AugmentationSettings
from medssl.config import Settings, SettingsT, check_settings, part_of
from medssl.errors import DataError, UsageError
from medssl.networks.architecture import Architecture, architecture
from medssl.preprocessing.store import Store
from medssl.pretraining.fitness import Sample, check_fitness
from medssl.pretraining.probe_settings import ProbeSettings
from medssl.training.devices import Machine
from medssl.training.settings import FREE_ON_RESUME, TrainingSettings

#: Edges of the patch that a network is meant for, by dimensions: what its receptive field and memory are made for.
_EDGES = {
    "resenc-l": {2: 512, 3: 160},
    "resenc-m": {2: 512, 3: 128},
    "resenc-s": {2: 256, 3: 96},
    "resenc-xs": {2: 128, 3: 48},
    "plain-unet": {2: 512, 3: 128},
    "plain-unet-s": {2: 128, 3: 64},
}
DEFAULT_METHOD = "mae"
#: Name of the copy of the user's own policy file in a RUN.
POLICY = "policy.yaml"
#: Stands in a RUN for the labels of the probes, whose path is not written down.
ELSEWHERE = "not kept in the RUN"


class SamplingSettings(Settings):
    """Where crops are cut; see `medssl.data.sampling.CropSettings`.

    Args:
        foreground_probability: How often a crop is placed on a voxel of tissue instead of anywhere.
        crops_per_volume: Consecutive samples that share one volume; a method may ask for more.
        spread: How far the crops of one volume lie from each other, in patch sizes; None places each on its own.
        balance: `volume` shows every volume equally often, `patient` every patient.
        channels: `all` channels of a volume, or a `random` one.
    """

    foreground_probability: float = Field(default=0.33, ge=0, le=1)
    crops_per_volume: int = Field(default=1, ge=1)
    spread: float | None = Field(default=0.5, ge=0)
    balance: Literal["volume", "patient"] = "volume"
    channels: Literal["all", "random"] = "all"


class PretrainingSettings(TrainingSettings):
    """What every pretraining is told; the method's own settings stand beside these.

    What is not given is chosen for the store and the machine, and written into the RUN's recipe.yaml.

    Args:
        method: A key of `medssl.registry.METHODS`.
        network: A key of `medssl.registry.NETWORKS`. By default `resenc-l` on a GPU with 40 GB or more, `resenc-s` on
            a smaller one, `resenc-xs` on a CPU.
        strides: Stride per stage and axis, for anisotropic voxels; by default 1, then 2 everywhere.
        kernel_sizes: Kernel per stage and axis; by default 3 everywhere.
        patch_size: What the network sees, in voxels: (Z, Y, X), or (Y, X) for slices and images. By default what the
            network is made for, and not beyond the median volume.
        batch_size: Samples per batch over all devices.
        sampling: Where crops are cut.
        augmentation: What is done to them.
        probes: What is looked at beside the loss, see `medssl.pretraining.probe_settings.ProbeSettings`.
    """

    method: str = DEFAULT_METHOD
    network: str = "resenc-xs"
    strides: tuple[tuple[int, ...], ...] | None = None
    kernel_sizes: tuple[tuple[int, ...], ...] | None = None
    patch_size: tuple[int, ...] = (48, 48, 48)
    batch_size: int = Field(default=4, ge=1)
    sampling: SamplingSettings = SamplingSettings()
    augmentation: AugmentationSettings = AugmentationSettings()
    probes: ProbeSettings = ProbeSettings()

    @property
    def architecture(self) -> Architecture:
        """The network as data."""
        return architecture(self.network, len(self.patch_size), strides=self.strides, kernel_sizes=self.kernel_sizes)

    def of_method(self) -> Settings:
        """Return the method's own settings alone."""
        return part_of(self, registry.method(self.method).load_settings())


def recipe_model(method: str) -> type[PretrainingSettings]:
    """Return the model of a recipe: the common settings and those of a method, on one level.

    Raises:
        UsageError: If there is no such method.
    """
    own = registry.method(method).load_settings()
    return create_model("Recipe", __base__=(own, PretrainingSettings))


def settle(values: Mapping[str, Any], store: Store, machine: Machine, where: str) -> PretrainingSettings:
    """Check what the user gave and complete it.

    Args:
        values: Names and values of the recipe, its overrides applied.
        store: Where the volumes are.
        machine: What trains.
        where: The place to name in messages.

    Raises:
        UsageError: If a name is unknown, a value does not fit, or the patch does not fit the network.
        DataError: If the store has no volume to train on.
    """
    given = check_settings(recipe_model(str(values.get("method", DEFAULT_METHOD))), values, where)
    shapes = _training_shapes(store)
    chosen: dict[str, Any] = {}

    def choose(name: str, default: Any) -> Any:
        """Return what was given, else note and return the default."""
        if name not in given.model_fields_set:
            chosen[name] = default
        return chosen.get(name, getattr(given, name))

    middle = [int(median(axis)) for axis in zip(*shapes, strict=True)]
    flat = len(given.patch_size) == 2 if "patch_size" in given.model_fields_set else middle[0] == 1
    network = choose("network", _network(machine))
    registry.network(network)
    plan = architecture(network, 2 if flat else 3, strides=given.strides, kernel_sizes=given.kernel_sizes)
    patch = choose("patch_size", _patch(network, middle[1:] if flat else middle, plan.total_stride))
    plan.check_patch(patch)
    choose("batch_size", _batch(machine, len(patch)) * machine.devices)
    steps = choose("steps", 250_000 if machine.cuda else 2_000)
    # Short runs on a CPU gain from AdamW: on the hippocampus crops 150 of its steps reach an error (0.56) that SGD
    # has not reached after 250 (0.77). Long runs keep nnU-Net's optimiser and schedule.
    optimiser = _filled(given.optimiser, name="sgd" if machine.cuda else "adamw")
    chosen["optimiser"] = optimiser.resolved()
    if optimiser.name == "adamw":
        chosen["schedule"] = _filled(given.schedule, name="cosine", warmup_steps=steps // 20)
    choose("precision", "bf16" if machine.cuda else "float32")
    if given.precision == "auto":
        chosen["precision"] = "bf16" if machine.cuda else "float32"
    if given.memory_format == "auto":
        # A compiled norm keeps the order of its input; nnU-Net's norms as they are turn it round and back.
        chosen["memory_format"] = "channels_last" if machine.cuda and given.compile else "contiguous"
    choose("log_every", max(1, min(50, steps // 100)))
    log_every = chosen.get("log_every", given.log_every)
    choose("health_every", log_every * 5)
    if choose("validate_every", log_every * 10 if store.ids_of("validation") else 0) and not store.ids_of("validation"):
        raise UsageError(f"validate_every: {store.folder} has no validation volumes. Set validate_every=0.")
    if given.probes.every is None:
        usual = chosen.get("validate_every", given.validate_every) or log_every * 10
        samples = chosen.get("batch_size", given.batch_size) * given.accumulate // machine.devices
        chosen["probes"] = given.probes.model_copy(update={"every": given.probes.interval(usual, max(samples, 1))})
    choose("pictures_every", max(50, steps // 10))
    chosen["devices"] = machine.devices
    recipe = given.model_copy(update=chosen)
    own = recipe.of_method()
    if hasattr(own, "resolved"):
        own = own.resolved(recipe.patch_size)
        recipe = recipe.model_copy(update={name: getattr(own, name) for name in type(own).model_fields})
    check_fitness(recipe.method, own, Sample.of(recipe, store))
    _check_batch(recipe)
    return recipe


def exported(recipe: PretrainingSettings) -> dict[str, Any]:
    """Return the recipe as plain values that may leave the machine.

    A policy file is named without its folder, and the labels of the probes are not named at all.
    """
    values = recipe.model_dump(mode="json")
    if recipe.augmentation.policy is not None:
        values["augmentation"]["policy"] = POLICY
    if recipe.probes.labels is not None:
        values["probes"]["labels"] = ELSEWHERE
    first = ("method", "network", "patch_size", "batch_size", "steps")
    return {name: values[name] for name in (*first, *(name for name in values if name not in first))}


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return, one line each, what differs between two resolved recipes and may not differ on resume."""
    lines = []
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if old == new or (not prefix and name in FREE_ON_RESUME):
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name} was {old}, now {new}")
    return lines


def _filled(settings: SettingsT, **defaults: Any) -> SettingsT:
    """Return settings with defaults where nothing was given."""
    return settings.model_copy(update={k: v for k, v in defaults.items() if k not in settings.model_fields_set})


def _training_shapes(store: Store) -> list[Sequence[int]]:
    train = set(store.ids_of("train"))
    if not train:
        raise DataError(
            f"{store.folder} has no volume to train on ({len(store)} in all, {len(store.ids_of('validation'))} for "
            "validation). Index more patients, or take another --select when preprocessing."
        )
    return [row["shape"][1:] for row in store.info["volumes"] if row["id"] in train]


def _network(machine: Machine) -> str:
    if not machine.cuda:
        return "resenc-xs"
    return "resenc-l" if machine.memory_gib >= 40 else "resenc-s"


def _patch(network: str, middle: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Return the network's own edge along each axis, or where the median volume is smaller, what just covers it."""
    most = _EDGES[network][len(middle)]
    edges = [
        min(max(most // stride, 1), math.ceil(size / stride)) * stride
        for size, stride in zip(middle, strides, strict=True)
    ]
    if all(edge == stride for edge, stride in zip(edges, strides, strict=True)):
        edges = [2 * edge for edge in edges]
    return tuple(edges)


def _batch(machine: Machine, dimensions: int) -> int:
    if dimensions == 2:
        return 32 if machine.cuda else 16
    if not machine.cuda:
        return 4
    return 8 if machine.memory_gib >= 70 else 2


def _check_batch(recipe: PretrainingSettings) -> None:
    group = recipe.sampling.crops_per_volume * recipe.devices
    if recipe.batch_size % group:
        raise UsageError(
            f"batch_size {recipe.batch_size} cannot be shared by {recipe.devices} devices with "
            f"{recipe.sampling.crops_per_volume} crops per volume: use a multiple of {group}."
        )
