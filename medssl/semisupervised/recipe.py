"""The recipe of a semi-supervised run: what the user gave, checked, and completed for the machine at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, create_model

from medssl import registry_semisupervised as registry
from medssl.augmentation.policy import AugmentationSettings
from medssl.config import Settings, check_settings, part_of
from medssl.errors import UsageError
from medssl.semisupervised.method import SemiSupervised
from medssl.training.devices import Machine
from medssl.training.settings import TrainingSettings
from medssl.transfer.schedule import choose_optimiser

#: Peak rates, as in fine-tuning: AdamW's for short runs, SGD's for long ones.
_RATES = {"adamw": 3e-3, "sgd": 1e-2}
_WEIGHT_DECAY = 3e-5


class SemiTrainingSettings(TrainingSettings):
    """What every semi-supervised run is told; the method's own settings stand beside these.

    Args:
        method: A key of `medssl.registry_semisupervised.SEMISUPERVISED`.
        batch_size: Labelled samples of a step over all devices.
        unlabelled_batch_size: Unlabelled samples; by default as many.
        foreground_probability: How often a labelled crop is placed on a class above background, as in nnU-Net's
            training, and an unlabelled one on tissue.
        augmentation: What is done to them.
    """

    method: str = "mean-teacher"
    batch_size: int = Field(default=2, ge=1)
    unlabelled_batch_size: int | None = Field(default=None, ge=1)
    foreground_probability: float = Field(default=0.33, ge=0, le=1)
    augmentation: AugmentationSettings = AugmentationSettings()

    def of_method(self) -> Settings:
        """Return the method's own settings alone."""
        return part_of(self, registry.semisupervised(self.method).load_settings())


def recipe_model(method: str) -> type[SemiTrainingSettings]:
    """Return the model of a recipe: the common settings and those of a method, on one level.

    Raises:
        UsageError: If there is no such method.
    """
    own = registry.semisupervised(method).load_settings()
    return create_model("Recipe", __base__=(own, SemiTrainingSettings))


def settle(values: Mapping[str, Any], task: str, machine: Machine, where: str) -> SemiTrainingSettings:
    """Check what the user gave and complete it.

    Args:
        values: Names and values, overrides applied.
        task: `segmentation` or `classification`.
        machine: What trains.
        where: The place to name in messages.

    Raises:
        UsageError: If a name is unknown, a value does not fit, or the method is not for the task.
    """
    given = check_settings(recipe_model(str(values.get("method", "mean-teacher"))), values, where)
    kind = registry.semisupervised(given.method).load()
    check_task(given.method, kind, task)
    chosen: dict[str, Any] = {"devices": machine.devices}
    if given.unlabelled_batch_size is None:
        chosen["unlabelled_batch_size"] = given.batch_size
    optimiser = given.optimiser
    if "name" not in optimiser.model_fields_set:
        optimiser = optimiser.model_copy(update={"name": choose_optimiser("auto", given.steps)})
    defaults = {"learning_rate": _RATES[optimiser.name], "weight_decay": _WEIGHT_DECAY}
    chosen["optimiser"] = optimiser.model_copy(
        update={name: value for name, value in defaults.items() if getattr(optimiser, name) is None}
    )
    if optimiser.name == "adamw" and "schedule" not in given.model_fields_set:
        chosen["schedule"] = given.schedule.model_copy(update={"name": "cosine", "warmup_steps": given.steps // 10})
    if given.precision == "auto":
        chosen["precision"] = "bf16" if machine.cuda else "float32"
    if given.memory_format == "auto":
        chosen["memory_format"] = "channels_last" if machine.cuda and given.compile else "contiguous"
    if "log_every" not in given.model_fields_set:
        chosen["log_every"] = max(1, min(50, given.steps // 100))
    log_every = chosen.get("log_every", given.log_every)
    if "health_every" not in given.model_fields_set:
        chosen["health_every"] = log_every * 5
    if "pictures_every" not in given.model_fields_set:
        chosen["pictures_every"] = max(50, given.steps // 10)
    for name in ("batch_size", "unlabelled_batch_size"):
        size = chosen.get(name, getattr(given, name))
        if size % machine.devices:
            raise UsageError(
                f"{name} {size} cannot be shared by {machine.devices} devices: use a multiple of {machine.devices}."
            )
    return given.model_copy(update=chosen)


def check_task(name: str, kind: type[SemiSupervised], task: str) -> None:
    """Refuse a method that is not for a task.

    Raises:
        UsageError: Naming those that are.
    """
    if task not in kind.tasks:
        fitting = [other for other, entry in registry.SEMISUPERVISED.items() if task in entry.tasks]
        raise UsageError(f"{name} is for {' and '.join(kind.tasks)}, not for {task}. For {task}: {', '.join(fitting)}.")


def exported(recipe: SemiTrainingSettings) -> dict[str, Any]:
    """Return the recipe as plain values that may leave the machine: a policy file is named without its folder."""
    values = recipe.model_dump(mode="json")
    if recipe.augmentation.policy is not None:
        values["augmentation"]["policy"] = recipe.augmentation.policy.name
    return values
