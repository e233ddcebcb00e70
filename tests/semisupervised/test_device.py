"""The losses of methods never ask for a value, for which the host would wait for the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.entropy_minimisation import EntropyMinimisation, EntropyMinimisationSettings
from medssl.semisupervised.fixmatch import FixMatch, FixMatchSettings
from medssl.semisupervised.interpolation import Interpolation, InterpolationSettings
from medssl.semisupervised.mean_teacher import MeanTeacher, MeanTeacherSettings
from medssl.semisupervised.method import SemiSupervised, SemiSupervisedSettings
from medssl.semisupervised.mixmatch import MixMatch, MixMatchSettings
from medssl.semisupervised.pseudo_labels import PseudoLabels, PseudoLabelsSettings
from medssl.semisupervised.semixup import Semixup, SemixupSettings
from medssl.semisupervised.uncertainty_teacher import UncertaintyTeacher, UncertaintyTeacherSettings
from medssl.semisupervised.unimatch import UniMatch, UniMatchSettings
from tests.semisupervised.helpers import LATE, build, paired, total, views_of

METHODS: list[tuple[type[SemiSupervised], SemiSupervisedSettings]] = [
    (EntropyMinimisation, EntropyMinimisationSettings()),
    (FixMatch, FixMatchSettings()),
    (Interpolation, InterpolationSettings()),
    (MeanTeacher, MeanTeacherSettings()),
    (MixMatch, MixMatchSettings()),
    (PseudoLabels, PseudoLabelsSettings()),
    (Semixup, SemixupSettings()),
    (UncertaintyTeacher, UncertaintyTeacherSettings(passes=2)),
    (UniMatch, UniMatchSettings()),
]


def without_values(view: SemiView, mode: FakeTensorMode) -> SemiView:
    """Return a view whose tensors have shapes and no values: whatever asks for one raises."""
    parts = {
        name: mode.from_tensor(value) if isinstance(value, Tensor) else value for name, value in vars(view).items()
    }
    parts["drawn"] = {name: mode.from_tensor(value) for name, value in view.drawn.items()}
    return SemiView(**parts)


@pytest.mark.parametrize(
    ("kind", "settings", "task"), [(kind, settings, task) for kind, settings in METHODS for task in kind.tasks]
)
def test_no_loss_waits_for_the_device(kind: type[SemiSupervised], settings: SemiSupervisedSettings, task: str) -> None:
    method = build(kind, settings, task)
    views = views_of(method, paired(task))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [without_values(view, mode) for view in views if isinstance(view, SemiView)]
        total(method.losses(fakes, LATE)).backward()
        # The net holds: a method that reads one number is caught.
        with pytest.raises(DataDependentOutputException):
            torch.sum(fakes[0].image).item()
