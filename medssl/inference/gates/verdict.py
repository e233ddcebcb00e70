"""What the gates say of a case: accepted, review or refused, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["review", "refused"]
ACCEPTED, REVIEW, REFUSED = "accepted", "review", "refused"


@dataclass(frozen=True)
class Reason:
    """Why a case is not simply accepted.

    Args:
        code: A code of the group `gate` in `medssl.archive.codes`.
        level: `review`, or `refused` where the case is out of the question.
        value: What was found.
        allowed: What is accepted: a range (low, high) where None is open, or words.
        words: The same for a person, without identity.
    """

    code: str
    level: Level
    value: float | str
    allowed: tuple[float | None, float | None] | str
    words: str

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        allowed = list(self.allowed) if isinstance(self.allowed, tuple) else self.allowed
        return {**vars(self), "allowed": allowed}


@dataclass(frozen=True)
class Verdict:
    """The gates' word on one case.

    Args:
        case: Its name in the outputs, or how the input is called in the table of refusals.
        reasons: Why it is not accepted; empty if it is.
        measured: The numbers that were judged.
        not_checked: Gates that could not be applied, and why.
    """

    case: str
    reasons: tuple[Reason, ...] = ()
    measured: dict[str, Any] | None = None
    not_checked: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """`accepted`, `review` or `refused`: that of the gravest reason."""
        levels = {reason.level for reason in self.reasons}
        return REFUSED if "refused" in levels else REVIEW if levels else ACCEPTED

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        return {
            "case": self.case,
            "verdict": self.verdict,
            "reasons": [reason.to_json() for reason in self.reasons],
            "measured": self.measured or {},
            "not_checked": list(self.not_checked),
        }


def in_words(reasons: Sequence[Reason]) -> str:
    """Return the reasons in one line, the gravest first."""
    return "; ".join(reason.words for reason in sorted(reasons, key=lambda reason: reason.level != "refused"))
