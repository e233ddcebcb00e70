"""Which transforms of TorchIO and MONAI a policy may hold, and how they are made of its entries."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from pydantic import Field

from medssl.config import Settings
from medssl.errors import UsageError, unknown_name

ROOTS = ("torchio", "monai.transforms")

_MIRRORS = frozenset({"Flip", "RandomFlip", "Transpose", "ToOrientation"}) | {
    *("Flipd", "RandFlipd", "RandAxisFlipd", "Transposed", "Orientationd")
}
# They hold other transforms or functions, which could not be looked at.
_HOLDERS = frozenset({"Compose", "OneOf", "Lambda", "MonaiAdapter"}) | {
    *("Lambdad", "RandLambdad", "TorchIOd", "RandTorchIOd", "TorchVisiond", "RandTorchVisiond", "CuCIMd", "RandCuCIMd")
}
_FILES = frozenset({"SaveClassificationd"})
_MOVES = frozenset({"RandSmoothDeformd", "Transposed"})
# It lives among MONAI's spatial transforms, and gives every voxel back where it was.
_STAYS = frozenset({"RandSimulateLowResolutiond"})
# What the libraries raise on arguments or volumes that do not fit.
FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class LibrarySettings(Settings):
    """A transform of a library.

    Args:
        transform: Its name, for example `torchio.RandomMotion` or `monai.transforms.RandBiasFieldd`.
        probability: How often a sample is changed. The library's own `p` or `prob` is set to 1.
        arguments: What its constructor is given; lists become tuples.
    """

    transform: str
    probability: float = Field(ge=0, le=1)
    arguments: dict[str, Any] = Field(default_factory=dict)


def find_class(name: str) -> type:
    """Return the transform of a name below `torchio` or `monai.transforms`; nothing else is ever imported.

    Raises:
        UsageError: If it is not there, is no transform, or is one that a policy cannot hold.
    """
    root = next((root for root in ROOTS if name.startswith(f"{root}.")), None)
    if root is None:
        raise UsageError(
            f"library: '{name}' is not below torchio or monai.transforms. A policy holds their transforms only, for "
            "example torchio.RandomMotion or monai.transforms.RandBiasFieldd."
        )
    try:
        library = importlib.import_module(root)
    except ImportError as error:
        raise UsageError(f"library: {name} needs {root.partition('.')[0]}, which is not installed.") from error
    place: Any = library
    *parents, last = name[len(root) + 1 :].split(".")
    for part in parents:
        place = getattr(place, part, None)
        if not isinstance(place, ModuleType) or not place.__name__.startswith(f"{root}."):
            raise UsageError(f"library: there is no module '{part}' for {name}. {_near(library, root, last)}")
    kind = getattr(place, last, None)
    if not _is_transform(kind, library, root):
        raise UsageError(f"library: there is no transform named '{name}'. {_near(library, root, last)}")
    assert isinstance(kind, type)
    where = f"library: {name}"
    if root == "monai.transforms" and not issubclass(kind, library.MapTransform):
        form = getattr(library, f"{kind.__name__}d", None)
        advice = f"Use {root}.{form.__name__}." if form is not None else "It has no dictionary form."
        raise UsageError(f"{where} is no dictionary transform: it would change the image without its label. {advice}")
    if kind.__name__ in _HOLDERS:
        raise UsageError(f"{where} holds other transforms or functions. Name the transforms themselves, one an entry.")
    if kind.__name__ in _FILES or kind.__module__.startswith("monai.transforms.io"):
        raise UsageError(f"{where} reads or writes files, which is no augmentation. Remove it.")
    if kind.__module__.startswith("monai.transforms.regularization"):
        raise UsageError(f"{where} mixes the samples of a batch, and a library's transform meets one alone. Remove it.")
    return kind


def _is_transform(kind: Any, library: ModuleType, root: str) -> bool:
    return isinstance(kind, type) and issubclass(kind, library.Transform) and kind.__module__.startswith(f"{root}.")


def _near(library: ModuleType, root: str, name: str) -> str:
    base = library.MapTransform if root == "monai.transforms" else library.Transform
    known = [found for found in dir(library) if isinstance(kind := getattr(library, found), type)
             and issubclass(kind, base)]  # fmt: skip
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return (
        f"Did you mean {' or '.join(f'{root}.{found}' for found in near)}?" if near else f"See {root}'s documentation."
    )


def mirrors(kind: type) -> bool:
    """Tell whether a transform mirrors or exchanges axes."""
    return kind.__name__ in _MIRRORS


def moves(kind: type) -> bool:
    """Tell whether a transform moves anatomy."""
    if kind.__module__.startswith("torchio."):
        return issubclass(kind, importlib.import_module("torchio").SpatialTransform)
    spatial = kind.__module__.startswith(("monai.transforms.spatial", "monai.transforms.croppad"))
    return (spatial or kind.__name__ in _MOVES) and kind.__name__ not in _STAYS


def _defaults(kind: type, settings: LibrarySettings) -> dict[str, Any]:
    """Return what a MONAI transform is given where the policy says nothing: keys, and nearest voxels for the label."""
    moving = moves(kind)
    keys = settings.arguments.get("keys", ("image", "label") if moving else ("image",))
    keys = (keys,) if isinstance(keys, str) else tuple(keys)
    if moving and set(keys) != {"image", "label"}:
        raise UsageError(
            f"library: {settings.transform} moves anatomy, so its keys are image and label, not {', '.join(keys)}: "
            "what is left out would stay behind."
        )
    known = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    given: dict[str, Any] = {"keys": keys, "allow_missing_keys": True}
    interpolates = kind.__module__.startswith("monai.transforms.spatial") and "mode" in known
    if moving and interpolates and "mode" not in settings.arguments:
        given["mode"] = tuple("nearest" if key == "label" else known["mode"].default for key in keys)
    if "prob" in known:
        given["prob"] = 1.0
    return {name: value for name, value in given.items() if name in known}


def build(kind: type, settings: LibrarySettings) -> Any:
    """Make a transform with the arguments of a policy's entry.

    Raises:
        UsageError: If an argument is unknown or does not fit; transform and argument are named.
    """
    where = f"library: {settings.transform}"
    defaults = _defaults(kind, settings) if kind.__module__.startswith("monai.") else {}
    for name in ("p", "prob"):
        if name in settings.arguments:
            raise UsageError(f"{where}: say `probability` in the entry instead of the argument {name}.")
    known = {
        name
        for base in kind.__mro__
        if base is not object
        for name, parameter in inspect.signature(base.__init__).parameters.items()  # type: ignore[misc]
        if name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    for name in settings.arguments:
        if name not in known:
            raise UsageError(f"{where}: {unknown_name('argument', name, known)}")
    given = {name: _tuples(value) for name, value in settings.arguments.items()}
    try:
        return kind(**{**defaults, **given})
    except FAILURES as error:
        named = {name: given[name] for name in given if _fits_without(kind, {**defaults, **given}, name)} or given
        values = ", ".join(f"{name}={value!r}" for name, value in named.items()) or "no arguments"
        raise UsageError(f"{where} cannot be made with {values}: {' '.join(str(error).split())}") from error


def _fits_without(kind: type, arguments: Mapping[str, Any], left_out: str) -> bool:
    try:
        kind(**{name: value for name, value in arguments.items() if name != left_out})
    except FAILURES:
        return False
    return True


def _tuples(value: Any) -> Any:
    """Turn YAML's lists into tuples, which both libraries take for ranges."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
