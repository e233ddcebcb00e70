"""The recipe of a protocol: data sets, arms, numbers of labels, seeds and learning rates, checked before any work."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from medssl import registry_semisupervised as registry
from medssl.config import Settings, apply_overrides, check_settings, merged, read_yaml
from medssl.errors import UsageError, unknown_name

SCRATCH, STRONG = "scratch", "strong"
Control = Literal["scratch", "strong"]
CONTROLS: tuple[Control, ...] = ("scratch", "strong")
TASKS = ("segmentation", "classification")
Labels = int | str
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


class PretrainingSettings(Settings):
    """A pretraining on the images of the pool, made once for each data set.

    Args:
        recipe: Recipe of `medssl pretrain`.
        settings: On top of it, as `--set` gives them: `{network: resenc-xs, mask.ratio: 0.7}`.
        spacing: Of the store, as in `medssl preprocess`.
    """

    recipe: Path
    settings: dict[str, Any] = Field(default_factory=dict)
    spacing: Literal["median", "native"] | tuple[float, float, float] = "median"


class SemiSupervisedSettings(Settings):
    """Training that also sees the images of the pool without their labels.

    Args:
        method: A key of `medssl.registry_semisupervised.SEMISUPERVISED`.
        settings: As `--set` gives them: `{unlabelled: {weight: 0.1}}`.
    """

    method: str
    settings: dict[str, Any] = Field(default_factory=dict)


class ArmSettings(Settings):
    """One way to come to a model; exactly one of `checkpoint`, `pretrain` and `same`.

    Args:
        checkpoint: A pretraining RUN or checkpoint file, or `none` for random weights.
        pretrain: Pretrain on the pool; a recipe's path alone stands for `{recipe: path}`.
        same: Take the checkpoint of another arm and fine-tune it in another way.
        transfer_decoder: Take the decoder too (segmentation); None does so where pretraining trained it.
        augmentation: In place of the protocol's own.
        schedule: In place of the protocol's own.
        layer_decay: In place of the protocol's own.
        semisupervised: Learn from the unlabelled part of the pool too; needs `training.trainer: paired`. A method's
            name alone stands for `{method: name}`.
    """

    checkpoint: Path | Literal["none"] | None = None
    pretrain: PretrainingSettings | None = None
    same: str | None = None
    transfer_decoder: bool | None = None
    augmentation: str | None = None
    schedule: str | None = None
    layer_decay: float | None = None
    semisupervised: SemiSupervisedSettings | None = None

    @field_validator("semisupervised", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @field_validator("pretrain", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"recipe": value} if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _one_origin(self) -> ArmSettings:
        given = [name for name in ("checkpoint", "pretrain", "same") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"an arm needs one of checkpoint, pretrain and same, this one has {len(given)}")
        return self

    @property
    def is_pretrained(self) -> bool:
        """Whether it starts from a checkpoint."""
        return self.checkpoint != "none"

    def changes(self) -> dict[str, Any]:
        """Return what this arm does in another way than the protocol says."""
        names = ("transfer_decoder", "augmentation", "schedule", "layer_decay")
        found = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.semisupervised is not None:
            found["semisupervised"] = self.semisupervised.model_dump(mode="json")
        return found


class DatasetSettings(Settings):
    """One labelled data set and how its cases are divided.

    Args:
        task: `segmentation` or `classification`.
        path: nnU-Net raw folder; for classification also what `medssl finetune classification` takes.
        targets: CSV of labels, for classification on an INDEX or a STORE.
        kind: Kind of target, see `medssl.data.targets`.
        classes: Classes in their order.
        patient: Segmentation: a regular expression whose first group is a case's patient; without, each case is one.
        validation: Cases that are reported and never looked at before: a number, names, or `given` for those that the
            data set itself sets apart (its test part, else its validation part, or `splits_final.json`).
        selection: Cases that choose the learning rate: a number or names.
        pool: Cases to learn from; None takes the rest.
        split_seed: Of the division and of the draw of labelled cases.
        labels: Numbers of labelled cases, in place of the protocol's own.
        metric: What chooses rates and is tested: Dice, or AUROC, by default.
        training: Settings of training on top of the protocol's own.
    """

    task: Literal["segmentation", "classification"]
    path: Path
    targets: Path | None = None
    kind: str = "auto"
    classes: tuple[str, ...] | None = None
    patient: str | None = None
    validation: int | tuple[str, ...] | Literal["given"]
    selection: int | tuple[str, ...]
    pool: tuple[str, ...] | None = None
    split_seed: int = 0
    labels: tuple[Labels, ...] | None = None
    metric: str | None = None
    training: dict[str, Any] = Field(default_factory=dict)

    @field_validator("patient")
    @classmethod
    def _one_group(cls, value: str | None) -> str | None:
        try:
            groups = 1 if value is None else re.compile(value).groups
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from error
        if groups < 1:
            raise ValueError("the expression needs a group in parentheses, for example '(patient\\d+)_.*'")
        return value


class Recipe(Settings):
    """What a protocol does.

    Args:
        datasets: By name.
        arms: By name; the twin from scratch and the control come on top.
        controls: `scratch`, the twin with random weights and the plans of `plans_from`, and `strong`, the same with
            strong augmentation. Every arm is compared with each of them.
        plans_from: Arm whose checkpoint decides network, patch and spacing of the controls; by default the first.
        labels: Numbers of labelled cases; `10%` is a share of the pool, `all` the whole of it.
        seeds: Of the draw of labelled cases and of training.
        rates: Peak learning rates, the same for every arm.
        rate_seeds: How many of the seeds choose the rate.
        training: Settings of training that all arms share; see `medssl.protocol.segmentation` and `.classification`.
        keep: `runs`, or `scores` to remove the models once they were measured.
    """

    datasets: dict[str, DatasetSettings] = Field(min_length=1)
    arms: dict[str, ArmSettings] = Field(min_length=1)
    controls: tuple[Control, ...] = CONTROLS
    plans_from: str | None = None
    labels: tuple[Labels, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    rates: tuple[float, ...] = Field(min_length=1)
    rate_seeds: int = Field(default=1, ge=1)
    training: dict[str, Any] = Field(default_factory=dict)
    keep: Literal["runs", "scores"] = "runs"

    @field_validator("labels", "seeds", "rates")
    @classmethod
    def _no_repeats(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) != len(values):
            raise ValueError("a value stands twice")
        return values

    @field_validator("rates")
    @classmethod
    def _positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if min(values) <= 0:
            raise ValueError("rates must be above 0")
        return values

    @property
    def template(self) -> str | None:
        """Name of the arm whose checkpoint decides the plans of runs from scratch; None where a network's name does."""
        return self.plans_from or next((name for name, arm in self.arms.items() if arm.is_pretrained), None)

    def every_arm(self) -> dict[str, ArmSettings]:
        """Return the arms and the controls, in the order of the tables."""
        strong = ArmSettings(checkpoint="none", augmentation=STRONG)
        controls = {SCRATCH: ArmSettings(checkpoint="none"), STRONG: strong}
        return {**self.arms, **{name: controls[name] for name in self.controls}}

    def comparisons(self) -> list[tuple[str, str]]:
        """Return the pairs (arm, control) that are tested."""
        order = list(self.every_arm())
        return [
            (arm, control)
            for control in self.controls
            for arm in order
            if arm not in self.controls or (control == SCRATCH and arm != SCRATCH)
        ]

    def training_of(self, dataset: str) -> dict[str, Any]:
        """Return the settings of training for a data set."""
        return merged(self.training, self.datasets[dataset].training)

    def labels_of(self, dataset: str) -> tuple[Labels, ...]:
        """Return the numbers of labelled cases of a data set as the recipe says them."""
        return self.datasets[dataset].labels or self.labels

    def origin(self, arm: str) -> str:
        """Return the arm that an arm has its checkpoint from: itself, or the one that `same` names."""
        found = self.every_arm()[arm].same
        return arm if found is None else found

    def jobs(self) -> int:
        """Return how many runs the whole protocol takes."""
        seeds, looking = len(self.seeds), min(self.rate_seeds, len(self.seeds))
        each = looking * len(self.rates) + seeds - looking
        return each * len(self.every_arm()) * sum(len(self.labels_of(name)) for name in self.datasets)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; its paths start at its own folder.

    Args:
        path: YAML file.
        overrides: Settings `a.b=c` that win over it.

    Raises:
        UsageError: If a name is unknown, a value does not fit, or a file or folder that it names is not there.
    """
    recipe = check_settings(Recipe, apply_overrides(read_yaml(path), overrides), str(path))
    _check_arms(recipe, str(path))
    recipe = _with_paths(recipe, path.resolve().parent)
    for what, file in _named_files(recipe):
        if not file.exists():
            raise UsageError(f"{path}: {what} is {file}, which does not exist. Paths start at the recipe's folder.")
    return recipe


def _check_arms(recipe: Recipe, where: str) -> None:
    for name in (*recipe.arms, *recipe.datasets):
        if not _NAME.fullmatch(name):
            raise UsageError(f"{where}: '{name}' names folders: use letters, digits, '.', '+' and '-'.")
    for name, arm in recipe.arms.items():
        if name in CONTROLS:
            raise UsageError(f"{where}: '{name}' is the name of a control, which the protocol adds itself. Rename it.")
        if arm.semisupervised is not None:
            registry.semisupervised(arm.semisupervised.method)
        if arm.same is not None:
            other = recipe.arms.get(arm.same)
            if other is None or other.same is not None or not other.is_pretrained:
                known = [one for one, each in recipe.arms.items() if each.same is None and each.is_pretrained]
                raise UsageError(f"{where}, arms.{name}.same: {unknown_name('arm with a checkpoint', arm.same, known)}")
    if SCRATCH not in recipe.controls:
        raise UsageError(f"{where}: controls must hold scratch: without its twin nothing says whether an arm helps.")
    pretrained = [name for name, arm in recipe.arms.items() if arm.is_pretrained]
    if not pretrained and "network" not in recipe.training:
        raise UsageError(
            f"{where}: no arm has a checkpoint, from which the runs from scratch have their plans, and training names "
            "no network. Set training.network."
        )
    if recipe.plans_from is not None and recipe.plans_from not in pretrained:
        raise UsageError(f"{where}, plans_from: {unknown_name('arm with a checkpoint', recipe.plans_from, pretrained)}")
    for name, dataset in recipe.datasets.items():
        if dataset.selection in (0, ()) and len(recipe.rates) > 1:
            raise UsageError(f"{where}, datasets.{name}: {len(recipe.rates)} rates need selection cases to choose by.")


def _with_paths(recipe: Recipe, folder: Path) -> Recipe:
    def moved(path: Path | None) -> Path | None:
        return None if path is None else folder / path

    datasets = {
        name: dataset.model_copy(update={"path": moved(dataset.path), "targets": moved(dataset.targets)})
        for name, dataset in recipe.datasets.items()
    }
    arms = {}
    for name, arm in recipe.arms.items():
        changes: dict[str, Any] = {}
        if isinstance(arm.checkpoint, Path):
            changes["checkpoint"] = moved(arm.checkpoint)
        if arm.pretrain is not None:
            changes["pretrain"] = arm.pretrain.model_copy(update={"recipe": moved(arm.pretrain.recipe)})
        arms[name] = arm.model_copy(update=changes)
    return recipe.model_copy(update={"datasets": datasets, "arms": arms})


def _named_files(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    for name, dataset in recipe.datasets.items():
        yield f"datasets.{name}.path", dataset.path
        if dataset.targets is not None:
            yield f"datasets.{name}.targets", dataset.targets
    for name, arm in recipe.arms.items():
        if isinstance(arm.checkpoint, Path):
            yield f"arms.{name}.checkpoint", arm.checkpoint
        if arm.pretrain is not None:
            yield f"arms.{name}.pretrain.recipe", arm.pretrain.recipe


def plain(recipe: Recipe) -> Mapping[str, Any]:
    """Return a recipe as plain values, without what was not given."""
    return recipe.model_dump(mode="json", exclude_none=True)
