"""Options that are lists or numbers in one text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medssl.errors import UsageError

STAGES = ("all", "last")
SPACINGS = ("median", "native", "pretraining")


def names(text: str | None) -> list[str] | None:
    """Return the names between commas without blanks around them, empty ones left out; None for None."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def numbers(text: str | None, kind: type, option: str, words: Sequence[str] = ()) -> Any:
    """Return the numbers between commas as a tuple; None for None.

    Args:
        text: What was given.
        kind: `int` or `float`.
        option: Its name, for the message.
        words: What the option takes besides numbers, for the message.

    Raises:
        UsageError: If a part is no number of this kind.
    """
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        wanted = "whole numbers" if kind is int else "numbers"
        others = f", or one of {', '.join(words)}" if words else ""
        raise UsageError(f"{option} takes {wanted} with commas between them{others}; got '{text}'.") from error


def stages_of(text: str) -> Any:
    """Return `all`, `last`, or the numbers of the stages as a tuple.

    Raises:
        UsageError: If it is neither; the words are named.
    """
    return text if text in STAGES else numbers(text, int, "--stages", STAGES)


def spacing_of(text: str) -> Any:
    """Return `median`, `native`, `pretraining`, or the spacing (z, y, x) in mm as a tuple.

    Raises:
        UsageError: If it is neither; the words are named.
    """
    return text if text in SPACINGS else numbers(text, float, "--spacing", SPACINGS)
