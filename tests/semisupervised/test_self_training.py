"""Self-training: who may become a label in which round, and whom the heads' gradients reach."""

from __future__ import annotations

import pytest
import torch

from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.ensemble import Curriculum, Ensemble, agreement, features_and_logits
from medssl.semisupervised.ramp import RampSettings
from medssl.semisupervised.self_training import SelfTraining, SelfTrainingSettings
from medssl.training.method import Step
from tests.semisupervised.helpers import (
    LATE,
    build,
    equals_supervised_at_weight_zero,
    network_of,
    paired,
    total,
    views_of,
)

TASKS = ["segmentation", "classification"]


def settings(weight: float = 1.0, **values: object) -> SelfTrainingSettings:
    return SelfTrainingSettings(unlabelled=RampSettings(weight=weight, fraction=0), **values)  # type: ignore[arg-type]


def test_each_round_takes_a_larger_part_and_the_first_part_of_the_run_none() -> None:
    rounds = settings(rounds=4)
    shares = [rounds.share_at(Step(index, 100)) for index in (0, 19, 20, 39, 40, 60, 80, 99)]
    assert shares == [0, 0, 0.25, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_features_and_logits_are_those_of_the_network(task: str, dimensions: int) -> None:
    network = network_of(task, dimensions, 3, 0)
    image = torch.randn(2, 1, *(16,) * dimensions)
    features, logits = features_and_logits(network, image)
    assert torch.equal(logits, network(image))
    layer = network.decoder.seg_layers[-1] if task == "segmentation" else network.head.linear  # type: ignore[union-attr, index]
    torch.testing.assert_close(layer(features), logits)  # type: ignore[operator]
    members = Ensemble(network, 4, 3)(features)
    assert members.shape == (2, 4, 3, *logits.shape[2:])
    assert not torch.allclose(members[:, 0], members[:, 1])


@pytest.mark.parametrize("task", TASKS)
def test_no_gradient_of_the_heads_reaches_the_network(task: str) -> None:
    method = build(SelfTraining, settings(), task)
    terms = method.losses(views_of(method, paired(task)), LATE)
    (terms["diversity"] + terms["ensemble"]).backward()
    assert all(weight.grad is None for weight in method.networks.parameters())
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in method.heads.parameters())


@pytest.mark.parametrize("task", TASKS)
def test_guesses_reach_the_network_and_neither_heads_nor_teacher(task: str) -> None:
    method = build(SelfTraining, settings(), task)
    method.losses(views_of(method, paired(task)), LATE)["pseudo_label"].backward()
    assert any(weight.grad is not None for weight in method.networks.parameters())
    assert all(weight.grad is None for part in (method.heads, method.teacher) for weight in part.parameters())


@pytest.mark.parametrize("task", TASKS)
def test_the_diversity_makes_heads_differ_on_unlabelled_images(task: str) -> None:
    method, batch = build(SelfTraining, settings(), task), paired(task, unlabelled=4)
    views = views_of(method, batch)
    optimiser = torch.optim.SGD(method.heads.parameters(), lr=1.0)
    values = []
    for _ in range(8):
        term = method.losses(views, LATE)["diversity"]
        optimiser.zero_grad()
        term.backward()
        optimiser.step()
        values.append(term.item())
    assert 0 <= values[-1] < values[0] - 0.003


@pytest.mark.parametrize("confidence", ["t-similarity", "probability"])
@pytest.mark.parametrize("task", TASKS)
def test_above_a_threshold_the_teachers_class_is_learnt(task: str, confidence: str) -> None:
    method = build(SelfTraining, settings(selection="threshold", confidence=confidence, threshold=0.55), task)
    with torch.no_grad():
        method.teacher["heads"].layer.weight.mul_(4)  # type: ignore[union-attr, operator]
    _, view = views_of(method, paired(task, unlabelled=8, margin=0 if task == "classification" else 6))
    assert isinstance(view, SemiView)
    features, logits = features_and_logits(method.teacher["network"], view.image)
    probabilities = logits.softmax(dim=1)
    members = method.teacher["heads"](features)
    value = agreement(members) if confidence == "t-similarity" else probabilities.amax(dim=1)
    method.settings = method.settings.model_copy(update={"threshold": float(value.median())})
    guess, chosen = method.chosen(view, LATE)
    assert torch.equal(guess, probabilities.argmax(dim=1))
    expected = value >= value.median()
    if task == "segmentation":
        expected &= view.inside[:, 0]
    assert torch.equal(chosen[:, 0], expected) and 0 < expected.sum() < expected.numel()
    assert not method.chosen(view, Step(0, 100))[1].any()
    error = torch.nn.functional.cross_entropy(method.networks[0](view.image), guess, reduction="none")[expected].mean()
    terms = method.losses(
        views_of(method, paired(task, unlabelled=8, margin=0 if task == "classification" else 6)), LATE
    )
    assert terms["pseudo_label"].item() == pytest.approx(error.item(), rel=1e-4)


def test_the_upper_part_of_each_class_is_chosen() -> None:
    curriculum = Curriculum(2)
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(4, 500, generator=generator)
    guess = (torch.rand(4, 500, generator=generator) < 0.1).long()
    # The rare class is never as sure as the other one.
    confidence = torch.where(guess == 1, 0.5 * confidence, 0.5 + 0.5 * confidence)
    bins = curriculum.bins_of(confidence, guess)
    counts = curriculum.counts_of(bins, None)
    for share in (0.0, 0.2, 0.6, 1.0):
        chosen = curriculum.chosen(bins, counts, share)
        for number in range(2):
            own = guess == number
            part = chosen[own].float().mean().item()
            assert part == pytest.approx(share, abs=0.08)
            if 0 < part < 1:
                assert confidence[own & chosen].min() >= confidence[own & ~chosen].max() - 0.01


def test_certain_places_are_told_apart() -> None:
    curriculum = Curriculum(1)
    confidence = 1 - 10 ** -torch.linspace(1, 5, 200)[None]
    bins = curriculum.bins_of(confidence, torch.zeros(1, 200, dtype=torch.int64))
    chosen = curriculum.chosen(bins, curriculum.counts_of(bins, None), 0.25)
    assert 0.25 <= chosen.float().mean().item() <= 0.3 and chosen[0, -50:].all()


def test_the_distribution_is_that_of_past_steps_too_and_fades() -> None:
    curriculum = Curriculum(1, decay=0.5)
    past = torch.linspace(0, 1, 1000)[None]
    zero = torch.zeros(1, 1000, dtype=torch.int64)
    curriculum.follow(curriculum.counts_of(curriculum.bins_of(past, zero), None))
    one = curriculum.bins_of(torch.tensor([[0.9], [0.4]]), torch.zeros(2, 1, dtype=torch.int64))
    assert curriculum.chosen(one, torch.zeros(1, 512), 0.3).flatten().tolist() == [True, False]
    curriculum.follow(torch.zeros(1, 512))
    assert curriculum.seen.sum().item() == pytest.approx(500)


def test_places_that_do_not_count_are_in_no_distribution() -> None:
    curriculum = Curriculum(2)
    where = torch.tensor([[[True, False, True]]])
    bins = curriculum.bins_of(torch.tensor([[0.1, 0.5, 0.9]]), torch.tensor([[0, 1, 1]]))
    assert curriculum.counts_of(bins, where).sum(dim=1).tolist() == [1, 1]


def test_the_distribution_follows_a_step_and_no_look() -> None:
    method = build(SelfTraining, settings())
    views = views_of(method, paired())
    method.eval()
    method.losses(views, LATE)
    method.after_step(LATE)
    assert method.curriculum.seen.sum() == 0
    method.train()
    method.losses(views, LATE)
    method.after_step(LATE)
    assert method.curriculum.seen.sum() == 2 * 16 * 16
    assert "curriculum.seen" in method.state_dict()


@pytest.mark.parametrize("task", TASKS)
def test_heads_learn_labels_by_the_mean_of_their_cross_entropies(task: str) -> None:
    method = build(SelfTraining, settings(members=3), task)
    views = views_of(method, paired(task, margin=6))
    labelled = views[0]
    assert isinstance(labelled, SemiView)
    label = labelled.label if labelled.shows is None else labelled.shows
    assert label is not None
    members = method.heads(features_and_logits(method.networks[0], labelled.image)[0])
    errors = torch.stack(
        [torch.nn.functional.cross_entropy(members[:, number], label, reduction="none") for number in range(3)]
    )
    if task == "segmentation":
        errors = errors[:, labelled.inside[:, 0]]
    assert method.losses(views, LATE)["ensemble"].item() == pytest.approx(errors.mean().item(), rel=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_weight_zero_leaves_the_supervised_gradients(task: str) -> None:
    method = build(SelfTraining, settings(0.0), task)
    assert equals_supervised_at_weight_zero(method, paired(task))
    assert not any(weight.requires_grad for weight in method.heads.parameters())


@pytest.mark.parametrize("task", TASKS)
def test_gradients_reach_every_trained_weight(task: str) -> None:
    method, batch = build(SelfTraining, settings(), task), paired(task)
    optimiser = torch.optim.SGD([weight for weight in method.parameters() if weight.requires_grad], lr=0.01)
    for index in range(4):
        optimiser.zero_grad()
        total(method.losses(views_of(method, batch, seed=index), LATE)).backward()
        optimiser.step()
        method.after_step(LATE)
    assert not [n for n, w in method.named_parameters() if w.requires_grad and not w.grad.abs().max() > 0]  # type: ignore[union-attr]
    assert all(bool(weight.isfinite().all()) for weight in method.parameters())
