"""Each transform of MR physics: identity at zero strength, each sample on its own, and its definition in NumPy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.ndimage import affine_transform
from scipy.spatial.transform import Rotation

from medssl.augmentation import kspace, mri
from medssl.augmentation.transform import Facts
from medssl.data.draw import Draw

KSPACE = {cls.name: cls for cls in (kspace.Gibbs, kspace.Ghosting, kspace.Motion, kspace.Spike)}
TRANSFORMS = {cls.name: cls for cls in (mri.BiasField, mri.Rician)} | KSPACE
ZERO = {
    "bias_field": {"strength": (0.0, 0.0)},
    "gibbs": {"cutoff": (1.0, 1.0)},
    "ghosting": {"intensity": (0.0, 0.0)},
    "motion": {"degrees": 0.0, "mm": 0.0},
    "spike": {"intensity": (0.0, 0.0)},
    "rician": {"std": (0.0, 0.0)},
}
# Far enough from no effect that every draw changes every voxel.
STRONG = {
    "bias_field": {"strength": (0.3, 0.5)},
    "gibbs": {"cutoff": (0.4, 0.6)},
    "ghosting": {"count": (2, 4), "restore": 0.0},
    "motion": {"moves": (1, 3)},
    "spike": {},
    "rician": {"std": (0.2, 0.4)},
}
SHAPES = [(4, 2, 9, 12, 11), (4, 2, 13, 11)]
AIR = -2.0


def images(shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(min=AIR)


def facts_of(image, spacing=(1.0, 1.0, 1.0), background=None, modality="MR") -> Facts:
    known = None if background is None else torch.full((len(image),), background)
    spacing = torch.tensor([spacing], dtype=torch.float64).repeat(len(image), 1)
    return Facts((modality,) * len(image), spacing, tuple(image.shape[2:]), image.shape[1], background=known)


def build(name, **settings):
    cls = TRANSFORMS[name]
    return cls({"MR": cls.settings_class(**{"probability": 1.0, **STRONG[name], **settings})})


def changed(name, image, seed=0, first=0, spacing=(1.0, 1.0, 1.0), background=None, **settings):
    transform = build(name, **settings)
    drawn = transform.draw(facts_of(image, spacing, background), Draw(seed, range(first, first + len(image))))
    return transform.apply(image, drawn), drawn


def frequencies(edge) -> np.ndarray:
    return np.fft.fftfreq(edge, 1 / edge).round()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_zero_strength_is_the_identity_bit_for_bit(name, shape):
    image = images(shape)
    result, drawn = changed(name, image, **ZERO[name])
    assert torch.equal(result, image) and not drawn["active"].any()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_who_drew_nothing_keeps_every_bit_and_the_others_change(name):
    image = images((16, 2, 10, 9, 8))
    result, drawn = changed(name, image, probability=0.5)
    assert 0 < drawn["active"].any(dim=1).sum() < 16
    for row, channel in np.ndindex(16, 2):
        same = torch.equal(result[row, channel], image[row, channel])
        assert same != bool(drawn["active"][row, channel])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_sample_is_changed_alike_alone_and_in_a_batch(name, shape):
    image = images(shape)
    together, drawn = changed(name, image, probability=0.7)
    for row in range(len(image)):
        alone, own = changed(name, image[row : row + 1], first=row, probability=0.7)
        assert torch.equal(alone[0], together[row])
        assert all(torch.equal(own[key][0], drawn[key][row]) for key in drawn)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_same_draw_repeats_and_samples_and_channels_have_parameters_of_their_own(name):
    image = images((1, 1, 40, 9, 8)).repeat(4, 2, 1, 1, 1)
    first, drawn = changed(name, image, **({"cutoff": (0.0001, 0.9)} if name == "gibbs" else {}))
    assert torch.equal(first, build(name).apply(image, drawn))
    assert len({tuple(one.flatten().tolist()) for one in first.flatten(0, 1)}) == 8


@pytest.mark.parametrize("name", TRANSFORMS)
def test_dtype_is_kept_half_precision_is_computed_in_float32_and_the_input_is_not_modified(name):
    image = images((2, 1, 8, 9, 10)).half().float()
    exact, _ = changed(name, image, background=AIR)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        given = image.to(dtype)
        before = given.clone()
        result, _ = changed(name, given, background=AIR)
        assert torch.equal(given, before) and result.dtype == dtype
        if dtype == torch.float16:
            assert torch.equal(result, exact.half())
        if dtype == torch.float64 and name != "rician":
            assert torch.allclose(result, exact.double(), atol=1e-4)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("shape", [(2, 1, 6, 5, 4), (2, 1, 1, 1, 1), (2, 1, 1, 5, 5), (2, 1, 1, 1), (2, 1, 2, 2, 2)])
def test_constant_images_and_single_voxels_stay_finite(name, shape):
    image = torch.full(shape, 3.0)
    result, drawn = changed(name, image)
    assert torch.isfinite(result).all() and not any(value.isnan().any() for value in drawn.values())
    if name != "rician":
        assert torch.allclose(result, image, atol=1e-5)


@pytest.mark.parametrize("shape", [*SHAPES, (4, 1, 1, 12, 11), (4, 1, 3, 16, 16)])
@pytest.mark.parametrize("name", KSPACE)
def test_artefacts_of_kspace_keep_the_mean(name, shape):
    image = images(shape)
    result, _ = changed(name, image, background=AIR)
    shift = (result.double().flatten(2).mean(dim=2) - image.double().flatten(2).mean(dim=2)).abs()
    assert (shift < 1e-4 * image.flatten(2).std(dim=2)).all()
    assert not torch.equal(result, image)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_only_magnetic_resonance_is_changed(name):
    assert TRANSFORMS[name].fits("MR") and not TRANSFORMS[name].fits("CT") and TRANSFORMS[name].family == "mri"
    image = images((8, 1, 4, 4))
    transform = build(name)
    drawn = transform.draw(facts_of(image, modality="CT"), Draw(0, range(8)))
    assert not drawn["active"].any() and torch.equal(transform.apply(image, drawn), image)


@pytest.mark.parametrize("name", sorted({*KSPACE} - {"motion"}))
def test_slices_that_are_excited_one_by_one_are_not_mixed(name):
    image = images((6, 1, 5, 12, 12))
    settings = {"count": (1, 1)} if name == "spike" else {}
    result, drawn = changed(name, image, spacing=(12.0, 1.0, 1.0), **settings)
    other = image.clone()
    other[:, :, 2] += images((6, 1, 12, 12), seed=1)
    again = build(name, **settings).apply(other, drawn)
    untouched = [0, 1, 3, 4]
    if name == "spike":
        # The height of a spike follows the mean of the volume, its place does not.
        slices = (result != image).flatten(3).any(dim=3)[:, 0]
        assert (slices.sum(dim=1) == 1).all() and len(set(slices.int().argmax(dim=1).tolist())) > 1
    else:
        assert torch.allclose(again[:, :, untouched], result[:, :, untouched], atol=1e-5)
    assert not torch.equal(again, result)


def test_directions_of_phase_encoding_are_all_that_were_read_in_kspace():
    image = torch.zeros(60, 1, 4, 4, 4)

    def axes(name, image, spacing=(1.0, 1.0, 1.0)) -> set[int]:
        drawn = build(name).draw(facts_of(image, spacing), Draw(0, range(60)))
        return set(drawn["axis"].flatten().tolist())

    assert axes("ghosting", image) == axes("motion", image) == {0, 1, 2}
    assert axes("ghosting", image, spacing=(1, 5, 1)) == {0, 2}
    assert axes("motion", image[:, :, :1]) == {1, 2}
    assert axes("motion", image[:, :, 0], spacing=(9, 1, 1)) == {0, 1}


# Bias field


def slow_field(coefficients, extent, size) -> np.ndarray:
    axes = [np.linspace(-1, 1, edge) * reach for edge, reach in zip(size, extent, strict=True)]
    exponent = np.zeros(size)
    for voxel in np.ndindex(*size):
        for powers in np.ndindex(*coefficients.shape):
            place = [axis[index] ** power for axis, index, power in zip(axes, voxel, powers, strict=True)]
            exponent[voxel] += coefficients[powers] * math.prod(place)
    field = np.exp(exponent)
    return field / field.mean()


@pytest.mark.parametrize(("shape", "order"), [((2, 1, 4, 5, 6), 3), ((2, 1, 7, 6), 2)])
def test_bias_field_equals_its_definition(shape, order):
    image = images(shape)
    result, drawn = changed("bias_field", image, background=AIR, order=order, spacing=(3, 1, 2))
    for row in range(2):
        coefficients = drawn["coefficients"][row, 0].double().numpy()
        field = slow_field(coefficients, drawn["extent"][row, 0].tolist(), shape[2:])
        slow = AIR + (image[row, 0].double().numpy() - AIR) * field
        assert np.abs(result[row, 0].numpy() - slow).max() < 1e-5
        assert all((sum(powers) <= order) == (c != 0) for powers, c in np.ndenumerate(coefficients) if sum(powers))
        assert np.abs(coefficients).max() <= drawn["strength"][row, 0]


def test_the_mean_of_the_bias_field_is_one():
    result, _ = changed("bias_field", torch.ones(5, 1, 12, 10, 11), background=0.0, strength=(0.5, 1.0))
    assert torch.allclose(result.flatten(2).mean(dim=2), torch.ones(5, 1), atol=1e-5)
    assert (result.flatten(2).std(dim=2) > 0.05).all()


def test_the_bias_field_is_as_smooth_along_thick_slices_as_within_them():
    _, drawn = changed("bias_field", images((1, 1, 11, 41, 21)), spacing=(1.0, 0.5, 1.0))
    assert drawn["extent"][0, 0].tolist() == [0.5, 1.0, 1.0]
    _, drawn = changed("bias_field", images((1, 1, 1, 21, 21)), spacing=(9.0, 1.0, 1.0))
    assert drawn["extent"][0, 0].tolist() == [0.0, 1.0, 1.0]


def test_air_stays_air_under_a_bias_field_and_signal_is_measured_from_it():
    image = images((3, 1, 8, 8, 8))
    image[:, :, :3] = AIR
    result, drawn = changed("bias_field", image, background=AIR)
    assert torch.equal(result[:, :, :3], image[:, :, :3]) and not torch.equal(result, image)
    without, _ = changed("bias_field", image)
    assert torch.allclose(result, without, atol=1e-5)
    shifted, _ = changed("bias_field", image + 7, background=AIR + 7)
    assert torch.allclose(shifted, result + 7, atol=1e-5)


def test_padding_above_the_smallest_value_keeps_every_bit_under_a_bias_field():
    image = images((3, 2, 8, 8, 8))
    image[:, :, :3] = 0.0
    result, _ = changed("bias_field", image, background=0.0)
    assert torch.equal(result[:, :, :3], image[:, :, :3])
    lowest = image == image.flatten(2).amin(dim=2)[..., None, None, None]
    assert torch.equal(result[lowest], image[lowest])


def test_a_crop_without_air_is_measured_from_the_background_that_is_known():
    tissue = images((3, 2, 8, 8, 8)).abs()
    result, _ = changed("bias_field", tissue, background=AIR)
    offset, _ = changed("bias_field", tissue - AIR, background=0.0)
    assert torch.allclose(result[:, 0], offset[:, 0] + AIR, atol=1e-5)
    # The background of the other channels is not known: they are measured from their minimum.
    own, _ = changed("bias_field", tissue)
    assert torch.equal(result[:, 1], own[:, 1])


def test_the_bias_field_is_torchios_up_to_its_mean():
    torchio = pytest.importorskip("torchio")
    size = (9, 9, 9)
    image = images((1, 1, *size)) - AIR
    result, drawn = changed("bias_field", image, background=0.0, order=3)
    order = [powers for powers in itertools.product(range(4), repeat=3) if sum(powers) <= 3]
    coefficients = [float(drawn["coefficients"][0, 0][powers]) for powers in order]
    field = torchio.BiasField.generate_bias_field(image[0], 3, coefficients)
    assert np.abs(result[0, 0].numpy() - image[0, 0].numpy() * field / field.mean()).max() < 1e-4


# Rician noise


def test_rician_noise_equals_its_definition():
    image = images((2, 2, 6, 7, 8))
    result, drawn = changed("rician", image)
    for row, channel in np.ndindex(2, 2):
        generator = torch.Generator().manual_seed(int(drawn["seed"][row, channel]))
        n1, n2 = (torch.empty(6, 7, 8).normal_(generator=generator).double().numpy() for _ in range(2))
        before = image[row, channel].double().numpy()
        air, std = before.min(), float(drawn["std"][row, channel])
        slow = air + np.sqrt((before - air + std * n1) ** 2 + (std * n2) ** 2)
        assert np.abs(result[row, channel].numpy() - slow).max() < 1e-5


def test_rician_noise_has_the_floor_and_the_shift_of_its_standard_deviation():
    image = torch.zeros(2, 1, 32, 32, 32)
    floor, drawn = changed("rician", image, background=0.0)
    std = drawn["std"][:, 0]
    assert torch.allclose(floor.flatten(1).mean(dim=1), std * math.sqrt(math.pi / 2), rtol=0.02)
    image[:, :, ::2] = 4.0
    bright = changed("rician", image, background=0.0)[0][:, :, ::2].flatten(1)
    assert torch.allclose(bright.std(dim=1), std, rtol=0.03)
    assert torch.allclose(bright.mean(dim=1), 4 + std**2 / 8, atol=0.01)
    assert (floor >= 0).all() and (bright.mean(dim=1) > 4).all()


def test_rician_strength_is_one_for_all_channels_and_its_noise_is_not():
    result, drawn = changed("rician", torch.zeros(3, 2, 8, 8))
    assert torch.equal(drawn["std"][:, 0], drawn["std"][:, 1])
    assert not torch.equal(result[:, 0], result[:, 1])


# K-space


@pytest.mark.parametrize("shape", SHAPES)
def test_gibbs_equals_truncation_of_the_whole_spectrum(shape):
    image = images(shape)
    result, drawn = changed("gibbs", image)
    for row, channel in np.ndindex(4, 2):
        spectrum = np.fft.fftn(image[row, channel].double().numpy())
        for axis, cutoff in enumerate(drawn["cutoff"][row, channel].tolist()):
            outer = np.abs(frequencies(spectrum.shape[axis])) > cutoff * spectrum.shape[axis] / 2
            spectrum[(slice(None),) * axis + (outer,)] = 0
        assert np.abs(result[row, channel].numpy() - np.fft.ifftn(spectrum).real).max() < 1e-5


def test_a_cutoff_that_removes_no_line_keeps_every_bit():
    image = images((2, 1, 7, 7, 7))
    assert torch.equal(changed("gibbs", image, cutoff=(0.9, 0.99))[0], image)


@pytest.mark.parametrize("shape", SHAPES)
def test_ghosting_equals_weakened_lines_of_the_whole_spectrum(shape):
    image = images(shape)
    result, drawn = changed("ghosting", image, restore=0.2)
    for row, channel in np.ndindex(4, 2):
        own = {name: value[row, channel].item() for name, value in drawn.items()}
        spectrum = np.fft.fftn(image[row, channel].double().numpy())
        edge = spectrum.shape[own["axis"]]
        for index, frequency in enumerate(frequencies(edge)):
            if abs(frequency) > 0.2 * edge / 2 and frequency % own["count"] == own["first"]:
                spectrum[(slice(None),) * own["axis"] + (index,)] *= 1 - own["intensity"]
        assert np.abs(result[row, channel].numpy() - np.fft.ifftn(spectrum).real).max() < 1e-5


def test_ghosts_are_copies_shifted_by_parts_of_the_edge():
    image = torch.zeros(1, 1, 24, 24)
    image[0, 0, 10, 10] = 1.0
    transform = build("ghosting", count=(4, 4), intensity=(1.0, 1.0))
    drawn = transform.draw(facts_of(image), Draw(0, [0]))
    drawn["first"][:] = 0
    ghosts = transform.apply(image, drawn)[0, 0] - image[0, 0]
    along = ghosts.movedim(int(drawn["axis"]), 0)
    # One line of four is lost, except the central one: a quarter of the point at each of four places, but for its mean.
    expected = torch.zeros(24, 24)
    expected[[4, 10, 16, 22], 10] = -0.25
    expected[:, 10] += 1 / 24
    assert torch.allclose(along, expected, atol=1e-5)


def test_ghosting_equals_torchio():
    torchio = pytest.importorskip("torchio")
    image = images((1, 1, 8, 9, 10))
    _, drawn = changed("ghosting", image, restore=0.0, count=(3, 3))
    drawn["first"] = torch.remainder(-(torch.tensor(image.shape[2:])[drawn["axis"]] // 2), 3)
    result = build("ghosting").apply(image, drawn)
    peer = torchio.Ghosting(3, int(drawn["axis"]), float(drawn["intensity"]), None)(image[0])
    assert torch.allclose(result[0], peer, atol=1e-5)


def slow_motion(image, drawn, spacing) -> np.ndarray:
    """Compose the spectrum line by line from images that SciPy moved."""
    size, axis = image.shape, int(drawn["axis"])
    spacing = np.array(spacing[-image.ndim :])
    centre = (np.array(size) - 1) / 2
    edge = size[axis]
    spectra, times = [], drawn["time"].tolist()
    for pose in drawn["pose"].double().numpy():
        # The vectors are (z, y, x); an angle turns the axes with its two neighbours in their order.
        turns = [Rotation.from_rotvec(np.radians(pose[a]) * s * np.eye(3)[a]) for a, s in ((0, 1), (1, -1), (2, 1))]
        turn = (turns[0] * turns[1] * turns[2]).as_matrix()[-image.ndim :, -image.ndim :]
        linear = turn * spacing[None] / spacing[:, None]
        offset = centre + pose[3:][-image.ndim :] / spacing - linear @ centre
        spectra.append(np.fft.fftn(affine_transform(image, linear, offset, order=1, mode="nearest")))
    result = np.fft.fftn(image)
    own = result.copy()
    for index, frequency in enumerate(frequencies(edge)):
        line = (slice(None),) * axis + (index,)
        when = 0.5 + frequency / edge
        if abs(frequency) <= float(drawn["still"]) * edge / 2:
            continue
        earlier = [number for number, time in enumerate(times) if time < 0.5 and when < time]
        later = [number for number, time in enumerate(times) if time >= 0.5 and when >= time]
        moved = earlier[:1] or later[-1:]
        result[line] = spectra[moved[0]][line] if moved else own[line]
    return np.fft.ifftn(result).real


@pytest.mark.parametrize(("shape", "spacing"), [((4, 1, 9, 12, 11), (1.5, 1, 1)), ((4, 1, 13, 12), (1, 1, 2))])
def test_motion_equals_a_spectrum_composed_line_by_line(shape, spacing):
    image = images(shape)
    result, drawn = changed("motion", image, spacing=spacing, moves=(1, 4), mm=3.0)
    for row in range(4):
        slow = slow_motion(image[row, 0].double().numpy(), {key: drawn[key][row, 0] for key in drawn}, spacing)
        assert np.abs(result[row, 0].numpy() - slow).max() < 1e-4


def test_motion_leaves_the_centre_of_kspace_where_the_label_is():
    image = images((6, 1, 20, 20, 20))
    result, drawn = changed("motion", image, moves=(2, 2), still=0.3)
    for row in range(6):
        axis = int(drawn["axis"][row])
        before, after = (np.fft.fft(one[row, 0].double().numpy(), axis=axis) for one in (image, result))
        change = np.abs(after - before).max(axis=tuple(a for a in range(3) if a != axis))
        assert (change[np.abs(frequencies(20)) <= 3] < 1e-4).all() and change.max() > 0.1


def test_nothing_moves_where_all_of_kspace_is_still():
    image = images((4, 1, 6, 7, 8))
    assert torch.equal(changed("motion", image, still=1.0)[0], image)


def test_moves_are_as_many_as_drawn_and_a_single_slice_moves_in_its_plane():
    drawn = build("motion", moves=(1, 3)).draw(facts_of(torch.zeros(60, 1, 1, 6, 6)), Draw(0, range(60)))
    moving = (drawn["pose"] != 0).any(dim=3).sum(dim=2)
    assert set(moving.flatten().tolist()) == {1, 2, 3}
    assert (drawn["pose"][..., [1, 2, 3]] == 0).all() and (drawn["pose"][..., [0, 4, 5]] != 0).any(dim=2).all()
    assert (drawn["pose"][..., 0].abs() <= 10).all() and (drawn["time"].diff(dim=2) >= 0).all()


def test_motion_by_shifts_equals_torchio():
    torchio = pytest.importorskip("torchio")
    image = torch.zeros(1, 1, 16, 16, 16)
    image[:, :, 5:11, 5:11, 5:11] = images((1, 1, 6, 6, 6)) - AIR
    transform = build("motion", moves=(2, 2))
    drawn = transform.draw(facts_of(image), Draw(0, [0]))
    shifts = torch.tensor([[0.0, 0.0, 1.5], [0.0, 0.0, -2.25]])
    drawn["axis"][:], drawn["still"][:] = 2, 0.0
    times = np.array([3 / 16, 13 / 16])
    drawn["time"][:] = torch.tensor(times)
    drawn["matrix"][:] = torch.cat([torch.eye(3).expand(2, 3, 3), shifts[..., None]], dim=2)
    result = transform.apply(image, drawn)
    peer = torchio.Motion(
        degrees=np.zeros((2, 3)), translation=shifts.numpy(), times=times, image_interpolation="linear"
    )
    assert torch.allclose(result[0], peer(image[0]), atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 2, 9, 12, 11), (4, 2, 13, 11)])
def test_a_spike_is_one_point_of_the_spectrum(shape):
    image = images(shape)
    result, drawn = changed("spike", image, background=AIR)
    for row, channel in np.ndindex(4, 2):
        before = image[row, channel].double().numpy()
        air = min(AIR, before.min()) if channel == 0 else before.min()
        spectrum = np.fft.fftn(before)
        centre = np.fft.fftn(before - air)[(0,) * before.ndim].real
        for height, phase, place in zip(
            *(drawn[key][row, channel].tolist() for key in ("intensity", "phase", "frequency")), strict=True
        ):
            assert height == 0 or any(place)
            spectrum[tuple(k % n for k, n in zip(place, before.shape, strict=True))] += (
                height * centre * np.exp(1j * phase)
            )
        assert np.abs(result[row, channel].numpy() - np.fft.ifftn(spectrum).real).max() < 1e-4


def test_a_spike_equals_torchio_where_no_signal_is_negative():
    torchio = pytest.importorskip("torchio")
    image = images((1, 1, 8, 10, 12)) - AIR
    transform = build("spike", count=(1, 1))
    drawn = transform.draw(facts_of(image, background=0.0), Draw(0, [3]))
    drawn["phase"][:] = 0.0
    size = np.array(image.shape[2:])
    place = (drawn["frequency"][0, 0].numpy() + size // 2 + 0.5) / size
    peer = torchio.Spike(place, float(drawn["intensity"][0, 0, 0]))(image[0])
    assert torch.allclose(transform.apply(image, drawn)[0], peer, atol=1e-4)


def test_spikes_are_as_many_as_drawn_and_keep_away_from_the_centre():
    drawn = build("spike", count=(1, 4), closest=0.5).draw(facts_of(torch.zeros(300, 1, 40, 40)), Draw(0, range(300)))
    assert set((drawn["intensity"] != 0).sum(dim=2).flatten().tolist()) == {1, 2, 3, 4}
    distance = drawn["frequency"].abs().amax(dim=3)
    assert distance.min() == 10 and distance.max() == 20


def test_small_images_get_no_spike_in_their_centre():
    image = images((40, 1, 2, 3))
    result, drawn = changed("spike", image, closest=0.0)
    assert torch.allclose(result.mean(dim=(1, 2, 3)), image.mean(dim=(1, 2, 3)), atol=1e-5)
    assert drawn["active"].any() and not drawn["active"].all()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bias_field", {"strength": (0.5, 0.1)}),
        ("bias_field", {"strength": (0.0, 3.0)}),
        ("bias_field", {"order": 0}),
        ("gibbs", {"cutoff": (0.0, 1.0)}),
        ("gibbs", {"cutoff": (0.5, 1.5)}),
        ("ghosting", {"count": (1, 4)}),
        ("ghosting", {"intensity": (0.5, 1.5)}),
        ("ghosting", {"restore": -0.1}),
        ("motion", {"degrees": -1}),
        ("motion", {"mm": float("nan")}),
        ("motion", {"moves": (0, 2)}),
        ("spike", {"count": (3, 1)}),
        ("spike", {"intensity": (-1.0, 1.0)}),
        ("rician", {"std": (0.0, float("inf"))}),
        ("rician", {"variance": (0.0, 0.1)}),
    ],
)
def test_settings_out_of_range_are_refused(name, settings):
    with pytest.raises(ValidationError, match=next(iter(settings))):
        build(name, **settings)
