"""Heads, the control of embeddings' length, and teachers."""

from __future__ import annotations

import math

import pytest
import torch

from medssl.networks.build import build_network, count_parameters
from medssl.networks.encoder import Encoder
from medssl.pretraining.embedding_norm import EmbeddingNormSettings, balanced_gradient, cut_weights
from medssl.pretraining.heads import BatchStandardise, Projector, ProjectorSettings, predictor, scaled_gradient
from medssl.pretraining.teacher import Teacher, TeacherSettings
from medssl.training.method import Step


def test_batch_standardising_equals_torchs_batch_norm_in_training() -> None:
    rows = torch.randn(6, 5)
    norm = torch.nn.BatchNorm1d(5)
    torch.testing.assert_close(BatchStandardise(5)(rows), norm(rows))
    ours = BatchStandardise(5).eval()
    torch.testing.assert_close(ours(rows), norm(rows))


def test_all_rows_are_standardised_together_however_they_are_arranged() -> None:
    rows = torch.randn(2, 6, 5)
    torch.testing.assert_close(BatchStandardise(5)(rows), BatchStandardise(5)(rows.flatten(0, 1)).view(2, 6, 5))


def test_a_feature_that_is_equal_for_all_samples_standardises_to_zero() -> None:
    assert BatchStandardise(3)(torch.full((4, 3), 7.0)).abs().max().item() == 0


def test_batch_standardising_is_float32_under_bfloat16() -> None:
    assert BatchStandardise(3)(torch.randn(4, 3).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_a_projector_has_the_layers_and_width_asked_for(layers: int, norm: str) -> None:
    settings = ProjectorSettings(hidden=7, width=5, layers=layers, norm=norm)  # type: ignore[arg-type]
    head = Projector(6, settings)
    outputs = head.layer_outputs(torch.randn(4, 6))
    assert [tuple(rows.shape) for rows in outputs] == [(4, 7)] * max(layers - 1, 0) + [(4, 5)] * min(layers, 1)
    assert head.width == (5 if layers else 6)
    if layers:
        rows = torch.randn(4, 6)
        torch.testing.assert_close(head.layer_outputs(rows)[-1], head(rows))
        assert head(torch.randn(4, 6)).min().item() < 0, "the output is not cut by a ReLU"


def test_the_last_norm_leaves_no_scale_to_learn() -> None:
    head = Projector(6, ProjectorSettings(hidden=7, width=5, layers=2, last_norm=True))
    rows = head(torch.randn(50, 6))
    torch.testing.assert_close(rows.mean(dim=0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.std(dim=0, correction=0), torch.ones(5), atol=1e-2, rtol=0)


def test_a_predictor_maps_a_projection_to_one_of_its_width() -> None:
    assert predictor(5, 9)(torch.randn(4, 5)).shape == (4, 5)


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_a_scaled_gradient_changes_the_gradient_and_not_the_value(factor: float) -> None:
    values = torch.randn(3, requires_grad=True)
    result = scaled_gradient(values, factor)
    assert torch.equal(result, values)
    result.sum().backward()
    assert values.grad is not None and values.grad.tolist() == [factor] * 3


def test_cut_initialisation_divides_weights_of_layers_once() -> None:
    head = Projector(4, ProjectorSettings(hidden=3, width=2))
    before = [weight.clone() for weight in head.parameters()]
    cut_weights(EmbeddingNormSettings(cut=3), head, head)
    for old, new in zip(before, head.parameters(), strict=True):
        torch.testing.assert_close(new, old / 3 if new.ndim > 1 else old)


def test_a_balanced_gradient_gives_long_and_short_embeddings_equal_turns() -> None:
    rows = torch.tensor([[2.0, 0.0], [0.0, 0.5]], requires_grad=True)
    other = torch.nn.functional.normalize(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), dim=1)

    def gradients(power: float) -> list[float]:
        rows.grad = None
        balanced = balanced_gradient(EmbeddingNormSettings(gradient_power=power), rows)
        (1 - torch.nn.functional.cosine_similarity(balanced, other)).sum().backward()
        assert rows.grad is not None
        return rows.grad.norm(dim=1).tolist()

    plain, balanced = gradients(0), gradients(1)
    # A cosine's gradient is sin(angle) / length.
    assert plain == pytest.approx([math.sqrt(0.5) / 2, math.sqrt(0.5) / 0.5])
    assert balanced[0] == pytest.approx(balanced[1])


def test_a_teacher_starts_as_a_copy_and_moves_by_its_momentum() -> None:
    student = torch.nn.Linear(2, 2)
    count = torch.zeros(1)
    student.register_buffer("count", count)
    teacher = Teacher(TeacherSettings(momentum=0.9, final=0.9), head=student)
    start = student.weight.detach().clone()
    with torch.no_grad():
        student.weight.add_(1)
        count.add_(1)
    teacher.follow(Step(0, 10))
    torch.testing.assert_close(teacher["head"].weight, start + 0.1)
    assert dict(teacher.named_buffers())["parts.head.count"].item() == 1
    assert not any(weight.requires_grad for weight in teacher.parameters())


def test_the_momentum_rises_along_half_a_cosine() -> None:
    settings = TeacherSettings(momentum=0.5, final=1.0)
    assert settings.at(Step(0, 100)) == pytest.approx(0.5)
    assert settings.at(Step(50, 100)) == pytest.approx(0.75)
    assert settings.at(Step(100, 100)) == pytest.approx(1.0)


def test_an_encoders_teacher_sees_as_its_student_and_holds_no_decoder() -> None:
    network = build_network("resenc-xs", dimensions=2, seed=0)
    student = Encoder(network)
    teacher = Teacher(TeacherSettings(), encoder=student)
    image = torch.randn(2, 1, 16, 16)
    for ours, theirs in zip(teacher.encoder.stages(image), student.stages(image), strict=True):
        assert torch.equal(ours, theirs)
    assert count_parameters(teacher) == count_parameters(network.encoder)  # type: ignore[arg-type]
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.1)
    teacher.follow(Step(0, 1))
    assert not torch.equal(teacher.encoder.stages(image)[-1], student.stages(image)[-1])
