"""Options that are lists or numbers in one text."""

from __future__ import annotations

from typing import Any

from medssl.errors import UsageError


def names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def numbers(text: str | None, kind: type, option: str) -> Any:
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} takes numbers with commas between them, got '{text}'.") from error


def stages_of(text: str) -> Any:
    return text if text in ("all", "last") else numbers(text, int, "--stages")


def spacing_of(text: str) -> Any:
    return text if text in ("median", "native", "pretraining") else numbers(text, float, "--spacing")
