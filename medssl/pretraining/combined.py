"""Several methods at once on one network: their terms are added, for example reconstruction and contrast.

"No single objective benefits all tasks": reconstruction helps segmentation, contrast helps classification, and hybrids
help both (FOMO25, arXiv 2604.11679). Each method makes its own views of the same crops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from pydantic import Field, field_validator
from torch import Tensor, nn

from medssl import registry
from medssl.augmentation.policy import Policy
from medssl.config import Settings, check_settings
from medssl.data.batch import Batch, View, Views
from medssl.data.draw import Draw
from medssl.errors import UsageError
from medssl.networks.build import freeze_decoder
from medssl.networks.encoder import Encoder
from medssl.training.method import Method, Needs, Step

NAME = "combined"
Value = TypeVar("Value")


def _default() -> dict[str, dict[str, Any]]:
    return {"mae": {}, "simclr": {}}


class CombinedSettings(Settings):
    """Settings of several methods at once.

    Args:
        methods: The settings of each method by its name, `{}` for its defaults. Terms of the loss are called
            `METHOD/TERM`, and `weights` of the recipe weighs them.
    """

    methods: dict[str, dict[str, Any]] = Field(default_factory=_default, validate_default=True)

    @field_validator("methods")
    @classmethod
    def _known(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if len(value) < 2 or NAME in value:
            raise ValueError(f"name two or more methods other than {NAME}, got {', '.join(value) or 'none'}")
        try:
            known = {name: _settings_of(name, values).model_dump(mode="json") for name, values in value.items()}
        except UsageError as error:
            raise ValueError(str(error)) from error
        cut = [name for name, own in known.items() if (own.get("embedding_norm") or {}).get("cut", 1) != 1]
        if cut:
            raise ValueError(
                f"{', '.join(cut)}: embedding_norm.cut divides weights that all methods share; leave it at 1"
            )
        return known

    def resolved(self, patch_size: Sequence[int]) -> CombinedSettings:
        """Return the settings with each method's resolved for a patch size."""
        return self.model_copy(
            update={
                "methods": {
                    name: _resolved(settings, patch_size).model_dump(mode="json")
                    for name, settings in self.by_name().items()
                }
            }
        )

    def by_name(self) -> dict[str, Settings]:
        """Return each method's settings."""
        return {name: _settings_of(name, values) for name, values in self.methods.items()}


class CombinedViews(list[View]):
    """The views of all methods, and those of each.

    Args:
        of_method: Views by method.
    """

    def __init__(self, of_method: Mapping[str, Views]) -> None:
        super().__init__(view for views in of_method.values() for view in views)
        self.of_method = dict(of_method)


class Combined(Method):
    """Adds the losses of several methods on one network.

    Args:
        network: U-Net that all of them train.
        policy: Augmentation of the first method's purpose; the others' are its siblings.
        settings: Which methods, and their settings.
    """

    needs: ClassVar[Needs] = Needs()

    def __init__(self, network: nn.Module, policy: Policy, settings: CombinedSettings) -> None:
        super().__init__()
        self.network = network
        self.encoder = Encoder(network)
        self.policy = policy
        self.methods: dict[str, Method] = {}
        before = {name: weight.requires_grad for name, weight in network.named_parameters()}
        learns = dict.fromkeys(before, False)
        for name, kind, own in _kinds(settings):
            if not kind.decoder_is_trained(own):
                freeze_decoder(network)
            first, *_ = kind.purposes(own)
            self.methods[name] = kind(network, policy if first == policy.purpose else policy.sibling(first), own)
            # A method may hold parts of the network still; what another one trains has to learn all the same.
            for key, weight in network.named_parameters():
                learns[key] |= weight.requires_grad
                weight.requires_grad_(before[key])
        for key, weight in network.named_parameters():
            weight.requires_grad_(learns[key])
        # Registered, so that heads, teachers and queues are trained and saved; the network keeps its one name too.
        self.parts = nn.ModuleDict(self.methods)

    @classmethod
    def output_channels(cls, in_channels: int, settings: Settings) -> int:
        """Return the channels of those methods that use the network's output.

        Raises:
            UsageError: If they ask for different ones.
        """
        wanted = {
            name: kind.output_channels(in_channels, own)
            for name, kind, own in _kinds(settings)
            if kind.output_is_used(own)
        }
        if len(set(wanted.values())) > 1:
            asked = ", ".join(f"{name} {count}" for name, count in wanted.items())
            raise UsageError(f"These methods need different output channels of one network: {asked}. Take one of them.")
        return next(iter(wanted.values()), in_channels)

    @classmethod
    def needs_of(cls, settings: Settings) -> Needs:
        """Return the needs of all methods together."""
        each = [kind.needs_of(own) for _, kind, own in _kinds(settings)]
        return Needs(
            views=sum(needs.views for needs in each),
            policy=each[0].policy,
            crops_per_volume=max(needs.crops_per_volume for needs in each),
            labels=any(needs.labels for needs in each),
            least_batch=max(needs.least_batch for needs in each),
            least_volumes=max(needs.least_volumes for needs in each),
            whole_patch=any(needs.whole_patch for needs in each),
        )

    @classmethod
    def purposes(cls, settings: Settings) -> tuple[str, ...]:
        """Return the policies of all methods, that of the first method first."""
        return tuple(dict.fromkeys(purpose for _, kind, own in _kinds(settings) for purpose in kind.purposes(own)))

    @classmethod
    def decoder_is_trained(cls, settings: Settings) -> bool:
        """Tell whether one of the methods trains the decoder."""
        return any(kind.decoder_is_trained(own) for _, kind, own in _kinds(settings))

    @classmethod
    def misfit(cls, settings: Settings, patch_size: Sequence[int], shapes: Sequence[Sequence[int]]) -> str | None:
        """Return the first reason that one of the methods has."""
        for name, kind, own in _kinds(settings):
            if len(patch_size) not in registry.method(name).dimensions:
                return f"{name} does not work with the {len(patch_size)}D patch {list(patch_size)}: leave it out."
            if (reason := kind.misfit(own, patch_size, shapes)) is not None:
                return reason
        return None

    def views(self, batch: Batch, draw: Draw) -> CombinedViews:
        """Make the views of each method, from a stream of its own."""
        return CombinedViews({name: method.views(batch, draw.child(name)) for name, method in self.methods.items()})

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        """Return the terms of all methods as `METHOD/TERM`."""
        return self._of_each(lambda name, method: method.losses(_views_of(views, name), step))

    def after_step(self, step: Step) -> None:
        """Let each method update its teachers, queues and prototypes."""
        for method in self.methods.values():
            method.after_step(step)

    def health(self, views: Views) -> dict[str, float]:
        """Return the figures of all methods."""
        return self._of_each(lambda name, method: method.health(_views_of(views, name)))

    def pictures(self, views: Views) -> dict[str, Tensor]:
        """Return the pictures of all methods."""
        return self._of_each(lambda name, method: method.pictures(_views_of(views, name)))

    def exported_heads(self) -> dict[str, Tensor]:
        """Return the heads of all methods."""
        return self._of_each(lambda _, method: method.exported_heads())

    def _of_each(self, look: Callable[[str, Method], Mapping[str, Value]]) -> dict[str, Value]:
        return {
            f"{name}/{key}": value for name, method in self.methods.items() for key, value in look(name, method).items()
        }


def _views_of(views: Views, name: str) -> Views:
    if not isinstance(views, CombinedViews):
        raise ValueError("These views were not made by Combined.views: nobody knows which method's they are")
    return views.of_method[name]


def _kinds(settings: Settings) -> list[tuple[str, type[Method], Settings]]:
    """Return name, class and settings of each method."""
    assert isinstance(settings, CombinedSettings)
    return [(name, registry.method(name).load(), own) for name, own in settings.by_name().items()]


def _settings_of(name: str, values: Mapping[str, Any]) -> Settings:
    return check_settings(registry.method(name).load_settings(), values, f"methods, {name}")


def _resolved(settings: Settings, patch_size: Sequence[int]) -> Settings:
    return settings.resolved(patch_size) if hasattr(settings, "resolved") else settings
