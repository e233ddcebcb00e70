"""Models Genesis: shuffled windows, bent intensities, painted regions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from medssl.augmentation.curves import Bezier, BezierSettings, bezier_table
from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.augmentation.transform import Facts
from medssl.config import check_settings
from medssl.data.batch import Batch, View
from medssl.data.draw import Draw
from medssl.networks.build import build_network, freeze_unused_outputs
from medssl.pretraining import genesis
from medssl.pretraining.genesis import Genesis, GenesisSettings, bent
from medssl.training.method import Step
from tests.augmentation.batches import row_of
from tests.pretraining.test_mae import batch_of
from tests.training.waiting import META, no_waiting

STEP = Step(0, 10)
SIZES = [(16, 16, 16), (16, 24)]
NEVER = {"probability": 0.0}
ALWAYS = {"probability": 1.0}
NOTHING = {"shuffle": NEVER, "curve": NEVER, "paint": NEVER}
# Views that are the crop as it was read, so that constructed voxels stay.
STILL = AugmentationSettings(
    overrides={"spatial": {name: {"probability": 0} for name in ("rotation", "scale", "mirror")}}
)


def method_of(
    size: tuple[int, ...] = (16, 16, 16),
    channels: int = 1,
    modality: str = "MR",
    augmentation: AugmentationSettings | None = None,
    **settings: object,
) -> Genesis:
    network = build_network("resenc-xs", dimensions=len(size), in_channels=channels, out_channels=channels, seed=0)
    freeze_unused_outputs(network)
    policy = policy_for(Genesis.needs.policy, {modality}, size, augmentation or AugmentationSettings())
    return Genesis(network, policy, check_settings(GenesisSettings, settings, "test").resolved(size))


def view_of(method: Genesis, count: int = 3, channels: int = 1, batch: Batch | None = None) -> tuple[View, Tensor]:
    """Return the view and its target."""
    batch = batch or batch_of(method, count=count, channels=channels)  # type: ignore[arg-type]
    (view,) = method.views(batch, Draw(0, batch.sample_index))
    assert view.target is not None and view.mask is not None
    return view, view.target


@pytest.mark.parametrize("size", SIZES)
def test_the_target_is_the_policys_image_and_the_input_is_spoilt(size: tuple[int, ...]) -> None:
    method = method_of(size)
    view, target = view_of(method)
    expected = method.policy.view(batch_of(method), Draw(0, [0, 1, 2]).child("view"))  # type: ignore[arg-type]
    assert torch.equal(target, expected.image) and torch.equal(view.inside, expected.inside)
    assert ((view.image - target).flatten(1).std(dim=1) > 0.1).all()
    nothing, target = view_of(method_of(size, **NOTHING))
    assert torch.equal(nothing.image, target) and nothing.mask is not None and not nothing.mask.any()


def test_the_target_is_clean_also_where_the_policy_gives_none() -> None:
    method = method_of()
    method.policy = policy_for("weak", {"MR"}, (16, 16, 16))
    view, target = view_of(method)
    made = method.policy.view(batch_of(method), Draw(0, [0, 1, 2]).child("view"))  # type: ignore[arg-type]
    assert made.target is None and torch.equal(target, made.image) and not torch.equal(view.image, target)


@pytest.mark.parametrize("size", SIZES)
def test_a_sample_is_spoilt_alike_alone_and_in_a_batch(size: tuple[int, ...]) -> None:
    method = method_of(size)
    batch = batch_of(method, count=5)  # type: ignore[arg-type]
    together, _ = view_of(method, batch=batch)
    for row in range(5):
        alone, _ = view_of(method, batch=row_of(batch, row))
        assert torch.equal(alone.image[0], together.image[row])
    assert not torch.equal(together.image[0] - together.target[0], together.image[1] - together.target[1])  # type: ignore[index]


def test_each_corruption_happens_as_often_as_published() -> None:
    method = method_of((8, 8), shuffle={"side": 0.25})
    draw = Draw(0, range(1000))
    image = torch.randn(1000, 1, 8, 8)
    inside = torch.ones(1000, 1, 8, 8, dtype=torch.bool)
    view = View(image, inside, torch.zeros(1000, 3, 4))
    shuffled = (method._shuffled(image, draw) != image).flatten(1).any(dim=1).float().mean().item()
    # Of windows of one or two voxels some lots move nothing.
    assert 0.3 < shuffled <= 0.54
    bends = method._bent(image, view, batch_of(method, count=1000), draw)  # type: ignore[arg-type]
    assert (bends != image).flatten(1).any(dim=1).float().mean().item() == pytest.approx(0.9, abs=0.04)
    _, mask = method._painted(image, inside, draw)
    painted = mask.flatten(1).any(dim=1)
    assert painted.float().mean().item() == pytest.approx(0.9, abs=0.04)
    # Only out-painting reaches the corner.
    assert mask[painted][:, 0, 0, 0].float().mean().item() == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize("size", SIZES)
def test_shuffling_keeps_every_value_and_moves_it_within_a_window(size: tuple[int, ...]) -> None:
    view, target = view_of(method_of(size, **{**NOTHING, "shuffle": ALWAYS}))
    assert torch.equal(view.image.flatten(1).sort(dim=1).values, target.flatten(1).sort(dim=1).values)
    assert (view.image != target).any() and view.mask is not None and not view.mask.any()


@pytest.mark.parametrize("modality", ["MR", "CT"])
@pytest.mark.parametrize("size", SIZES)
def test_curves_keep_order_mean_and_deviation(size: tuple[int, ...], modality: str) -> None:
    method = method_of(size, channels=2, modality=modality, **{**NOTHING, "curve": ALWAYS})
    batch = dataclasses.replace(batch_of(method, channels=2), modality=(modality,) * 3)  # type: ignore[arg-type]
    view, target = view_of(method, batch=batch)
    for row in range(3):
        for channel in range(2):
            inside = view.inside[row, 0]
            before, after = target[row, channel][inside], view.image[row, channel][inside]
            assert (before - after).abs().max() > 0.05
            assert (after[before.argsort()].diff() >= -1e-5).all()
            assert after.mean().item() == pytest.approx(before.mean().item(), abs=1e-4)
            assert after.std().item() == pytest.approx(before.std().item(), rel=1e-3)


def test_no_more_than_a_few_per_cent_of_the_voxels_sit_at_a_bound() -> None:
    method = method_of((24, 24, 24), augmentation=STILL, **{**NOTHING, "curve": ALWAYS})
    view, target = view_of(method, count=6)
    for row in range(6):
        image = view.image[row]
        at_bound = ((image == image.min()) | (image == image.max())).float().mean()
        assert at_bound < 0.02
    # What peers do: the curve's [0, 1] is taken of the z-scored image as it is.
    clamped = target.clamp(0, 1)
    assert ((clamped == 0) | (clamped == 1)).float().mean() > 0.6


def test_a_curve_acts_between_the_percentiles_and_goes_on_straight_beyond() -> None:
    values = torch.linspace(-3, 5, 1001, dtype=torch.float64)
    image = values.view(1, 1, 7, 143).float()
    inside = torch.ones(1, 1, 7, 143, dtype=torch.bool)
    bezier = Bezier({"MR": BezierSettings(probability=1)})
    facts = Facts(("MR",), torch.ones(1, 3), (7, 143), 1)
    drawn = bezier.draw(facts, Draw(0, [3]))
    result = bent(image, inside, bezier, drawn, (10, 80)).flatten().double().numpy()

    low, high = np.percentile(values, (10, 80))
    table = bezier_table(drawn["points"][0].double(), 4096)[0].numpy()
    x = (values.numpy() - low) / (high - low)
    expected = np.where((x < 0) | (x > 1), x, np.interp(x, np.linspace(0, 1, 4096), table))
    expected = (expected - expected.mean()) / expected.std() * values.numpy().std() + values.numpy().mean()
    assert np.abs(result - expected).max() < 5e-3


def test_voxels_outside_the_volume_have_no_say_in_curve_and_noise() -> None:
    paint = {"probability": 1.0, "outer": 0.0}
    method = method_of((16, 16, 16), augmentation=STILL, shuffle=NEVER, curve=ALWAYS, paint=paint)
    inputs = []
    for padding in (0.0, 1e4):
        batch = batch_of(method)  # type: ignore[arg-type]
        batch.valid[:, 0, 0] = method.policy.read_size[0] // 2
        outside = torch.arange(batch.image.shape[2]) < batch.valid[0, 0, 0]
        batch.image[:, :, outside] = padding
        view, _ = view_of(method, batch=batch)
        assert not view.inside.all() and view.inside.any()
        # The noise itself depends on how many voxels it is made for; its range does not.
        inputs.append(torch.where(view.inside, view.image, 0.0))
    torch.testing.assert_close(inputs[0], inputs[1])
    assert inputs[1].abs().max() < 100


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("outer", [0.0, 1.0])
def test_painted_voxels_show_noise_in_the_range_of_the_others(size: tuple[int, ...], outer: float) -> None:
    view, target = view_of(method_of(size, **{**NOTHING, "paint": {"probability": 1.0, "outer": outer}}), count=8)
    assert view.mask is not None
    for row in range(8):
        mask, seen = view.mask[row, 0], view.inside[row, 0] & ~view.mask[row, 0]
        assert torch.equal(view.image[row, 0][~mask], target[row, 0][~mask])
        assert mask.any() and not mask.all()
        painted, shown = view.image[row, 0][mask], target[row, 0][seen]
        assert painted.min() >= shown.min() and painted.max() <= shown.max()
        assert painted.std() > 0.3 * shown.std()
    # In-painting leaves a margin, out-painting hides it.
    borders = view.mask.movedim(2, 0)[[0, -1]]
    assert borders.all() if outer else not borders.any()


def test_the_error_counts_on_all_voxels_inside_the_volume_and_on_no_other() -> None:
    method = method_of()
    view, target = view_of(method)
    view.inside[:, :, :8] = False
    restored = target + torch.where(view.inside, 2.0, 1e6)
    method.restore = lambda _: restored  # type: ignore[method-assign]
    assert method.losses([view], STEP)["reconstruction"].item() == pytest.approx(4.0, rel=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_gradients_reach_every_trained_weight(size: tuple[int, ...]) -> None:
    method = method_of(size)
    view, _ = view_of(method)
    optimiser = torch.optim.SGD(method.parameters(), lr=0.01)
    for _ in range(2):
        optimiser.step()
        optimiser.zero_grad()
        method.losses([view], STEP)["reconstruction"].backward()
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_health_tells_a_copier_from_a_restorer_and_sees_when_nothing_is_spoilt() -> None:
    method = method_of()
    view, target = view_of(method)
    method.restore = lambda view: view.image  # type: ignore[method-assign]
    copied = method.health([view])
    assert copied["error_to_input"] == pytest.approx(1.0) and copied["damage"] > 0.1
    method.restore = lambda _: target  # type: ignore[method-assign]
    healthy = method.health([view])
    assert healthy["error_to_input"] == healthy["error_to_mean"] == 0
    assert healthy["feature_std"] > 0.01 and healthy["effective_rank"] > 1
    view.image = target
    assert method.health([view])["damage"] == 0


def test_health_sees_curves_that_flatten_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"curve": ALWAYS, "paint": {"probability": 1.0, "outer": 0.0}}
    method = method_of((24, 24, 24), **settings)
    with torch.no_grad():
        healthy = method.health([view_of(method)[0]])["cut_off"]
        monkeypatch.setattr(genesis, "bent", lambda image, *_: image.clamp(0, 1))
        broken = method.health([view_of(method)[0]])["cut_off"]
    assert healthy < 0.02 and broken > 0.5


def test_pictures_show_target_input_and_output() -> None:
    method = method_of()
    view, target = view_of(method)
    with torch.no_grad():
        pictures = method.pictures([view])
    assert list(pictures) == ["target", "input", "output"]
    assert torch.equal(pictures["target"], target) and torch.equal(pictures["input"], view.image)


@pytest.mark.parametrize(
    ("patch", "side"), [((160, 160, 160), 0.1), ((16, 16, 16), 0.125), ((12, 256, 256), 0.1), ((8, 8), 0.25)]
)
def test_windows_have_a_tenth_of_the_patch_or_two_voxels(patch: tuple[int, ...], side: float) -> None:
    settings = GenesisSettings().resolved(patch)
    assert settings.shuffle.side == side
    assert Genesis.misfit(settings, patch, []) is None


def test_windows_of_one_voxel_are_refused_before_training() -> None:
    given = {"shuffle": {"side": 0.05}}
    settings = check_settings(GenesisSettings, given, "test").resolved((32, 32, 32))
    reason = Genesis.misfit(settings, (32, 32, 32), [])
    assert reason is not None and "shuffle.side 0.05" in reason and "Raise it to 0.063 or more" in reason
    mended = check_settings(GenesisSettings, {"shuffle": {"side": 0.063}}, "test")
    assert Genesis.misfit(mended, (32, 32, 32), []) is None
    never = check_settings(GenesisSettings, {"shuffle": {**given["shuffle"], **NEVER}}, "test")
    assert Genesis.misfit(never, (32, 32, 32), []) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"curve": {"percentiles": (90, 10)}},
        {"curve": {"percentiles": (0, 101)}},
        {"paint": {"probability": 1.5}},
        {"paint": {"fill": "alien"}},
        {"shuffle": {"side": 0}},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        GenesisSettings(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", SIZES)
def test_views_and_losses_let_no_host_wait(size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    method = method_of(size).to(META)
    batch = batch_of(method, count=8).to(META)  # type: ignore[arg-type]
    with no_waiting(monkeypatch), torch.no_grad():
        loss = method.losses(method.views(batch, Draw(0, batch.sample_index)), STEP)["reconstruction"]
    assert loss.device == META
