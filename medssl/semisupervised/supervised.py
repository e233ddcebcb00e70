"""The control: the same loop, augmentation and steps, and unlabelled images are not looked at."""

from __future__ import annotations

from typing import ClassVar

from medssl.semisupervised.method import SemiSupervised, SemiSupervisedSettings


class SupervisedSettings(SemiSupervisedSettings):
    """Settings of the control; `labelled_policy: strong` makes it the control with strong augmentation."""


class Supervised(SemiSupervised):
    """Learns from the labelled samples alone."""

    settings: SupervisedSettings
    uses_unlabelled: ClassVar[bool] = False
