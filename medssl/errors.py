"""Errors a user can act on, and the exit code each one ends a command with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_SOME_REFUSED = 3
EXIT_ALL_REFUSED = 4


class MedsslError(Exception):
    """A failure whose message names the value, the place and the remedy."""

    exit_code = EXIT_FAILURE


class UsageError(MedsslError):
    """An option, a name or a combination of them that does not exist or cannot work."""

    exit_code = EXIT_USAGE


class AllInputRefused(MedsslError):
    """Nothing of the input could be used; the reasons are in the output's table of refusals."""

    exit_code = EXIT_ALL_REFUSED


class DataError(MedsslError):
    """A file or data set that cannot be used as it is."""


class InputRefused(DataError):
    """One input that is refused with a code of `medssl.archive.codes`.

    Args:
        code: A key of the table of reason codes.
        detail: What was found, without any patient identity.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail

    def __reduce__(self) -> tuple[type[InputRefused], tuple[str, str]]:
        return type(self), (self.code, self.detail)


class CheckpointError(MedsslError):
    """A checkpoint that is damaged, unsafe, or does not fit."""


class TrainingStopped(MedsslError):
    """A guard stopped the run; the message names the cause."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """Return the error for a name that does not exist, listing the near ones first.

    Args:
        kind: What is named, for example `"method"`.
        name: The unknown name.
        known: All names that exist.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    return UsageError(f"There is no {kind} named '{name}'. {hint}Known: {', '.join(names)}.")
