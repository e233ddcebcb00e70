"""One volume: the content, its normalisation, its geometry and its label come out as documented."""

from __future__ import annotations

import numpy as np
import pytest

from medssl.archive.volume import Volume
from medssl.errors import InputRefused, UsageError
from medssl.preprocessing.case import Plan, check_label, prepare
from medssl.preprocessing.content import content_box, outside_value
from medssl.preprocessing.fingerprint import intensities, median_spacing, tissue_sample
from medssl.preprocessing.normalise import check_scheme, fit, mean_and_std
from medssl.preprocessing.resample import resample_label
from medssl.preprocessing.tissue import otsu_threshold, sample_above, tissue_threshold

NATIVE = Plan(None, "by-modality")


def body(value: float = 100.0, air: float = 0.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    array = np.full((1, 20, 24, 28), air, np.float32)
    array[0, 4:15, 5:20, 6:25] = value + rng.normal(0, 10, (11, 15, 19))
    return array


def volume(
    array: np.ndarray, modality: str = "MR", channels: str = "scalar", spacing: tuple = (2.0, 1.5, 1.0)
) -> Volume:
    affine = np.diag([*spacing[::-1], 1.0])
    affine[:3, 3] = (-7.0, 3.0, 11.0)
    return Volume(array, affine, modality, channels)


def test_mr_is_cropped_to_what_is_not_zero_and_its_tissue_has_mean_0_and_deviation_1() -> None:
    found = prepare(volume(body()), NATIVE, name="a")
    assert found.array.shape == (1, 11, 15, 19)
    assert found.facts["crop"] == [[4, 15], [5, 20], [6, 25]]
    assert found.array.mean() == pytest.approx(0, abs=1e-4) and found.array.std() == pytest.approx(1, abs=1e-4)
    used = found.facts["normalisation"][0]
    assert found.facts["background"] == pytest.approx((0 - used["shift"]) / used["scale"])
    restored = found.array[0] * used["scale"] + used["shift"]
    np.testing.assert_allclose(restored, body()[0, 4:15, 5:20, 6:25], rtol=1e-5)


def test_the_share_of_air_does_not_change_how_mr_tissue_looks() -> None:
    tight, wide = np.zeros((1, 20, 24, 28)), np.zeros((1, 40, 48, 56))
    noise = np.random.default_rng(1).uniform(0, 8, wide.shape)
    tissue = body()[0, 4:15, 5:20, 6:25]
    tight[0, 4:15, 5:20, 6:25] = wide[0, 14:25, 15:30, 16:35] = tissue
    one = prepare(volume(np.maximum(tight, noise[:, :20, :24, :28]).astype(np.float32)), NATIVE, name="a")
    two = prepare(volume(np.maximum(wide, noise).astype(np.float32)), NATIVE, name="a")
    assert one.facts["normalisation"][0]["shift"] == pytest.approx(two.facts["normalisation"][0]["shift"], rel=1e-3)
    assert one.facts["normalisation"][0]["scale"] == pytest.approx(two.facts["normalisation"][0]["scale"], rel=1e-2)


def test_ct_is_cropped_to_the_body_and_shares_the_fingerprints_scale() -> None:
    statistics = {"CT": {"mean": 50.0, "std": 25.0, "percentile_00_5": -100.0, "percentile_99_5": 110.0}}
    found = prepare(volume(body(air=-1000.0), "CT"), Plan(None, "by-modality", statistics), name="a")
    assert found.array.shape == (1, 11, 15, 19)
    assert found.facts["background"] == pytest.approx((-100 - 50) / 25)
    np.testing.assert_allclose(found.array[0], (body()[0, 4:15, 5:20, 6:25].clip(-100, 110) - 50) / 25, atol=1e-5)
    padded = body(air=-1000.0)
    padded[:, :, :, :3] = -3024
    assert (
        prepare(volume(padded, "CT"), Plan(None, "by-modality", statistics), name="a").array.shape == found.array.shape
    )


def test_a_window_maps_its_limits_to_minus_one_and_one() -> None:
    found = prepare(volume(body(40, -1000.0), "CT"), Plan(None, "window:20:60"), name="a")
    assert found.array.min() == -1 and found.array.max() == 1


def test_colours_share_one_scale_and_frames_do_not() -> None:
    array = np.random.default_rng(0).uniform(0, 50, (3, 1, 16, 16)).astype(np.float32)
    array[1] *= 4
    colour = prepare(volume(array, "IMAGE", "colour"), NATIVE, name="a")
    assert colour.array.shape == (3, 1, 16, 16)
    assert colour.array[1].mean() > colour.array[0].mean() + 0.5
    assert colour.array.mean() == pytest.approx(0, abs=1e-4)
    frames = prepare(volume(np.repeat(array, 4, axis=1), "MR", "frames"), Plan(None, "zscore"), name="a")
    np.testing.assert_allclose(frames.array.mean(axis=(1, 2, 3)), 0, atol=1e-4)


def test_the_stored_grid_lies_where_the_crop_lay() -> None:
    source = volume(body())
    found = prepare(source, Plan((3.0, 3.0, 3.0), "zscore"), name="a")
    affine = np.array(found.facts["affine"])
    z, y, x = found.array.shape[1:]
    low, high = affine @ (-0.5, -0.5, -0.5, 1), affine @ (x - 0.5, y - 0.5, z - 0.5, 1)
    (z0, z1), (y0, y1), (x0, x1) = found.facts["crop"]
    np.testing.assert_allclose(low, source.affine @ (x0 - 0.5, y0 - 0.5, z0 - 0.5, 1))
    np.testing.assert_allclose(high, source.affine @ (x1 - 0.5, y1 - 0.5, z1 - 0.5, 1))
    assert found.facts["spacing_mm"] == [3.0, 3.0, 3.0]


def test_foreground_voxels_lie_in_the_tissue_and_are_the_same_each_time() -> None:
    array = np.zeros((1, 30, 30, 30), np.float32)
    array[0, 1:29, 1:29, 1:29] = np.random.default_rng(0).uniform(1, 5, (28, 28, 28))
    array[0, 10:20, 10:20, 10:20] += 100
    found = prepare(volume(array), Plan((1.0, 1.0, 1.0), "zscore"), name="a")
    voxels = np.array(found.facts["foreground"])
    assert voxels.shape == (512, 3) and len(np.unique(voxels, axis=0)) == 512
    values = found.array[0][tuple(voxels.T)]
    assert values.min() > np.quantile(found.array, 0.9)
    assert prepare(volume(array), Plan((1.0, 1.0, 1.0), "zscore"), name="a").facts["foreground"] == voxels.tolist()
    assert prepare(volume(array), Plan((1.0, 1.0, 1.0), "zscore"), name="b").facts["foreground"] != voxels.tolist()


def test_a_label_is_turned_cropped_and_resampled_with_its_image() -> None:
    array = body()
    label = np.zeros((1, 20, 24, 28), np.uint8)
    label[0, 6:12, 8:16, 10:20] = 3
    lps = np.diag([-1.0, -1.5, 2.0, 1.0])
    image = Volume(array, lps, "MR")
    checked = check_label(image, Volume(label, lps), [0, 3])
    found = prepare(image, Plan((1.0, 1.0, 1.0), "zscore"), name="a", label=checked)
    assert found.label is not None and found.label.shape == found.array.shape[1:]
    # LPS: x and y run the other way.
    turned = label[0, :, ::-1, ::-1].astype(np.int16)
    box = tuple(slice(start, stop) for start, stop in found.facts["crop"])
    np.testing.assert_array_equal(found.label, resample_label(turned[box], found.array.shape[1:]))
    assert (found.label == 3).sum() == pytest.approx(6 * 8 * 10 * 3, rel=0.15)


def test_a_label_outside_the_content_is_kept() -> None:
    label = np.zeros((1, 20, 24, 28), np.int16)
    label[0, 0, 0, 0] = 1
    found = prepare(volume(body()), NATIVE, name="a", label=volume(label))
    assert found.array.shape == (1, 15, 20, 25) and found.label is not None and found.label[0, 0, 0] == 1


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda label, affine: (label[:, 1:], affine), "label_shape_differs"),
        (lambda label, affine: (label, affine + np.eye(4)[:, [3, 0, 1, 2]] * 2), "label_grid_differs"),
        (lambda label, affine: (label + 254, affine), "label_values_unknown"),
        (lambda label, affine: (label + 0.5, affine), "label_values_unknown"),
    ],
)
def test_labels_that_do_not_fit_are_refused(change, code: str) -> None:
    image = volume(body())
    array, affine = change(np.ones((1, 20, 24, 28)), image.affine)
    with pytest.raises(InputRefused, match=code):
        check_label(image, Volume(array, affine), [0, 1])


@pytest.mark.parametrize(
    ("array", "modality", "code"),
    [
        (np.zeros((1, 4, 4, 4)), "MR", "no_content"),
        (np.full((1, 4, 4, 4), -1000.0), "CT", "no_content"),
        (np.full((1, 4, 4, 4), 7.0), "MR", "no_contrast"),
        (np.full((1, 4, 4, 4), np.nan), "MR", "not_finite"),
    ],
)
def test_volumes_without_anything_to_learn_from_are_refused(array: np.ndarray, modality: str, code: str) -> None:
    with pytest.raises(InputRefused, match=code):
        prepare(volume(array, modality), Plan(None, "zscore"), name="a")


def test_a_voxel_size_that_would_fill_the_memory_is_refused() -> None:
    with pytest.raises(InputRefused, match="resampled_too_large"):
        prepare(volume(body()), Plan((0.001, 0.001, 0.001), "zscore"), name="a")


def test_crop_can_be_left_out() -> None:
    assert prepare(volume(body()), Plan(None, "zscore", crop=False), name="a").array.shape == (1, 20, 24, 28)


def test_pictures_are_not_cropped() -> None:
    picture = np.zeros((1, 1, 8, 8))
    picture[0, 0, 2, 3] = 1
    assert content_box(picture, "IMAGE") == ((0, 1), (0, 8), (0, 8))
    assert content_box(picture, "MR") == ((0, 1), (2, 3), (3, 4))


def test_what_lies_outside_is_air_zero_or_the_darkest_value() -> None:
    assert outside_value(body(air=-1000.0)[0], "CT") == -1000
    assert outside_value(body()[0], "MR") == 0
    assert outside_value(body(air=-1024.0)[0], "OT") == -1024
    masked = np.where(body()[0] == 0, 0, body()[0] - 100)
    assert outside_value(masked, "MR") == 0


def test_mean_and_deviation_equal_numpys_in_double_precision() -> None:
    parts = [np.random.default_rng(seed).normal(1000, 3, 200_000).astype(np.float32) for seed in range(2)]
    mean, std = mean_and_std(parts)
    both = np.concatenate(parts).astype(np.float64)
    assert mean == pytest.approx(both.mean(), rel=1e-7) and std == pytest.approx(both.std(), rel=1e-4)


def test_otsu_separates_two_groups_and_survives_one_value() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(10, 2, 4000), rng.normal(100, 10, 1000)])

    def between(threshold: float) -> float:
        above = values > threshold
        return above.mean() * (1 - above.mean()) * (values[above].mean() - values[~above].mean()) ** 2

    best = max(between(threshold) for threshold in np.linspace(values.min(), values.max(), 500)[1:-1])
    assert between(otsu_threshold(values)) > 0.999 * best
    assert otsu_threshold(np.full(10, 3.0)) == 3.0
    assert tissue_threshold(values.reshape(1, 50, 100), "CT") == -900


def test_voxels_are_drawn_evenly_wherever_tissue_is() -> None:
    image = np.zeros((60, 60, 60), np.float32)
    image[10:20] = image[40:50] = 1
    places = sample_above(image, 0.5, 500, "a")
    assert len(places) == 500 and (image[tuple(places.T)] == 1).all()
    assert 200 < (places[:, 0] < 30).sum() < 300
    rare = np.zeros((90, 90, 90), np.float32)
    rare[1, 2, 3] = rare[80, 70, 60] = 1
    assert sample_above(rare, 0.5, 500, "a").tolist() == [[1, 2, 3], [80, 70, 60]]
    assert sample_above(rare, 5, 500, "a").shape == (0, 3)


def test_fingerprint_has_nnunets_figures_of_the_tissue() -> None:
    samples = [tissue_sample(body(40 * n, -1000.0, n)[0], "CT", str(n)) for n in (1, 2)]
    found = intensities(samples)
    assert set(found) == {"mean", "std", "min", "max", "median", "percentile_00_5", "percentile_99_5"}
    assert found["mean"] == pytest.approx(60, abs=1) and found["min"] > -900
    assert median_spacing([(1, 1, 1), (2, 1, 0.5), (3, 4, 0.25)]) == (2.0, 1.0, 0.5)


def test_unknown_schemes_and_windows_are_named() -> None:
    with pytest.raises(UsageError, match="Did you mean zscore"):
        check_scheme("zscor")
    for wrong in ("window:1", "window:a:b", "window:5:1", "window:0:inf"):
        with pytest.raises(UsageError, match="window"):
            check_scheme(wrong)
    check_scheme("window:-160:240")
    unit = fit([np.linspace(0, 200, 1000, dtype=np.float32).reshape(10, 10, 10)], [0.0], "unit", "MR", {})
    assert unit.of(100) == pytest.approx(0.5, abs=0.01)
