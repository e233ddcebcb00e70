"""Names of methods and networks and where they live, without importing torch.

`medssl list` and the check of a name must not cost the import of a training stack, so an entry holds the place of its
code as text and is imported only when it is built.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from medssl.errors import unknown_name


@dataclass(frozen=True)
class Entry:
    """One thing that a user can name.

    Args:
        name: The name on the command line.
        place: `module:attribute` of the code.
        family: The group it is listed under.
        dimensions: The numbers of spatial dimensions it works in.
        transfers: What of it is worth transferring: `encoder` or `encoder and decoder`.
        source: Paper or origin.
        summary: One line for a list.
        settings: `module:attribute` of its pydantic settings, empty where it has none.
    """

    name: str
    place: str
    family: str
    dimensions: tuple[int, ...]
    transfers: str
    source: str
    summary: str
    settings: str = ""

    def load(self) -> Any:
        """Import and return the code."""
        return _import(self.place)

    def load_settings(self) -> Any:
        """Import and return the class of its settings."""
        return _import(self.settings)


METHODS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="mae",
            place="medssl.pretraining.mae:MaskedAutoencoder",
            settings="medssl.pretraining.mae:MaskedAutoencoderSettings",
            family="reconstruction",
            dimensions=(2, 3),
            transfers="encoder and decoder",
            source="He et al., CVPR 2022; convolutional form as in Wald et al., CVPR 2025",
            summary="Hide blocks of the crop and restore them with the whole U-Net",
        ),
    )
}


def method(name: str) -> Entry:
    """Return the entry of a pretraining method.

    Raises:
        UsageError: If there is none of that name; near names are listed.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[name]


def _import(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)
