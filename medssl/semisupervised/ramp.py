"""How the weight of what is learnt without labels rises: a pure function of the step."""

from __future__ import annotations

import math

from pydantic import Field

from medssl.config import Settings
from medssl.training.method import Step


class RampSettings(Settings):
    """A weight that rises along exp(-5 (1 - t)^2) (Laine and Aila, ICLR 2017).

    Args:
        weight: The weight that is reached; 0 leaves the unlabelled part without any influence.
        fraction: Part of the run after which it is reached; 0 has it from the first step. In the code of the field
            it is 1 without being said: the weight that a paper names is there at the very last step only.
    """

    weight: float = Field(default=1.0, ge=0)
    fraction: float = Field(default=0.3, ge=0, le=1)

    def at(self, step: Step) -> float:
        """Return the weight at a step."""
        return self.weight * risen(step, self.fraction)


def risen(step: Step, fraction: float) -> float:
    """Return the part of a ramp of a given length, in [exp(-5), 1], that is reached at a step."""
    if step.fraction >= fraction:
        return 1.0
    return math.exp(-5 * (1 - step.fraction / fraction) ** 2)
