"""The losses of methods never ask for a value, for which the host would wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from medssl.semisupervised.copy_paste import CopyPaste, CopyPasteSettings
from medssl.semisupervised.cross_pseudo import CrossPseudo, CrossPseudoSettings
from medssl.semisupervised.entropy_minimisation import EntropyMinimisation, EntropyMinimisationSettings
from medssl.semisupervised.fixmatch import FixMatch, FixMatchSettings
from medssl.semisupervised.interpolation import Interpolation, InterpolationSettings
from medssl.semisupervised.mean_teacher import MeanTeacher, MeanTeacherSettings
from medssl.semisupervised.method import SemiSupervised, SemiSupervisedSettings
from medssl.semisupervised.mixmatch import MixMatch, MixMatchSettings
from medssl.semisupervised.mutual_decoders import MutualDecoders, MutualDecodersSettings
from medssl.semisupervised.pseudo_labels import PseudoLabels, PseudoLabelsSettings
from medssl.semisupervised.self_training import SelfTraining, SelfTrainingSettings
from medssl.semisupervised.semixup import Semixup, SemixupSettings
from medssl.semisupervised.tracoco import TraCoCo, TraCoCoSettings
from medssl.semisupervised.uncertainty_teacher import UncertaintyTeacher, UncertaintyTeacherSettings
from medssl.semisupervised.unimatch import UniMatch, UniMatchSettings
from tests.semisupervised.helpers import LATE, build, paired, total, views_of

WAITS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
)
METHODS: list[tuple[type[SemiSupervised], SemiSupervisedSettings]] = [
    (CopyPaste, CopyPasteSettings()),
    (CrossPseudo, CrossPseudoSettings()),
    (EntropyMinimisation, EntropyMinimisationSettings()),
    (FixMatch, FixMatchSettings()),
    (Interpolation, InterpolationSettings()),
    (MeanTeacher, MeanTeacherSettings()),
    (MixMatch, MixMatchSettings()),
    (MutualDecoders, MutualDecodersSettings()),
    (PseudoLabels, PseudoLabelsSettings()),
    (SelfTraining, SelfTrainingSettings()),
    (Semixup, SemixupSettings()),
    (TraCoCo, TraCoCoSettings()),
    (UncertaintyTeacher, UncertaintyTeacherSettings(passes=2)),
    (UniMatch, UniMatchSettings()),
]


class Watch(TorchDispatchMode):
    """Raises where an operation's result, or its shape, must be known to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = [index for index in args[1] if index is not None] if func is torch.ops.aten.index.Tensor else []
        if func in WAITS or any(index.dtype == torch.bool for index in masks):
            raise AssertionError(f"{func} makes the host wait")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "settings", "task"), [(kind, settings, task) for kind, settings in METHODS for task in kind.tasks]
)
def test_no_loss_waits_for_the_device(
    kind: type[SemiSupervised], settings: SemiSupervisedSettings, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = build(kind, settings, task)
    views = views_of(method, paired(task))
    # It reads memory without an operation.
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    with Watch():
        total(method.losses(views, LATE)).backward()


def test_the_watch_sees_what_waits() -> None:
    values = torch.arange(3)
    for reads in (values.max().item, values.nonzero, lambda: values[values > 1], lambda: bool(values.any())):
        with pytest.raises(AssertionError, match="wait"), Watch():
            reads()
