"""The phantom is reproducible, fits its labels, and looks like what it imitates."""

from __future__ import annotations

import numpy as np
import pytest

from medssl.demo.phantom import ORGANS, CtLook, MrLook, body, ct, grid, labels, mr
from medssl.demo.shapes import Waves, ellipsoid, generator, rotation_matrix, tube

AXIAL = np.diag([-1.0, -1.0, 1.0])
CENTRE = np.array([0.0, 0.0, -32.0])
QUIET_CT = CtLook(noise_hu=0.0, blur_mm=0.0)


@pytest.fixture(scope="module")
def where():
    return grid((24, 56, 56), (10.0, 7.0, 7.0), AXIAL, CENTRE)


def test_the_same_numbers_give_the_same_patient_and_others_another(where):
    first, again = (ct(body(3, 5), where, CtLook(), 1) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(labels(body(3, 5), where), labels(body(3, 6), where))
    assert not np.array_equal(labels(body(3, 5), where), labels(body(4, 5), where))
    assert not np.array_equal(first, ct(body(3, 5), where, CtLook(), 2)), "each series has its own noise"


@pytest.mark.parametrize("patient", range(4))
def test_every_organ_is_there_in_a_plausible_size(where, patient):
    label = labels(body(0, patient), where)
    litre = where.spacing_mm.prod() / 1e6
    volume = {name: (label == number).sum() * litre for name, number in ORGANS.items()}
    assert 0.7 < volume["liver"] < 2.4
    assert all(0.05 < volume[name] < 0.5 for name in ("spleen", "kidney_right", "kidney_left"))
    assert all(0.7 < volume[name] < 3.5 for name in ("lung_right", "lung_left"))
    assert volume["heart"] > 0.25 and volume["spine"] > 0.2 and volume["aorta"] > 0.05 and volume["stomach"] > 0.1


def test_organs_lie_on_their_side_of_the_patient(where):
    label = labels(body(0, 1), where)
    x, y, z = (axis.reshape(where.shape) for axis in where.points())
    middle = {name: [axis[label == number].mean() for axis in (x, y, z)] for name, number in ORGANS.items()}
    assert middle["liver"][0] > 20 and middle["kidney_right"][0] > 20 and middle["lung_right"][0] > 20
    assert middle["spleen"][0] < -20 and middle["kidney_left"][0] < -20 and middle["heart"][0] < 0
    assert middle["spine"][1] < middle["aorta"][1] < middle["heart"][1]
    assert middle["kidney_right"][2] < middle["liver"][2] < middle["heart"][2]


def test_ct_values_are_those_of_the_tissues(where):
    person = body(0, 2, healthy=True)
    value, label = ct(person, where, QUIET_CT, 1), labels(person, where)
    assert np.median(value[label == ORGANS["liver"]]) == pytest.approx(105, abs=12)
    assert np.median(value[label == ORGANS["lung_right"]]) == pytest.approx(-830, abs=40)
    assert np.median(value[label == ORGANS["spine"]]) > 180
    assert np.median(value[0, :4]) < -950
    plain = ct(person, where, CtLook(noise_hu=0.0, blur_mm=0.0, enhanced=False), 1)
    assert np.median(plain[label == ORGANS["aorta"]]) < np.median(value[label == ORGANS["aorta"]]) - 80


def test_mr_contrast_follows_the_sequence_and_noise_is_never_negative(where):
    person = body(0, 2, healthy=True)
    label = labels(person, where)
    t1, t2 = (mr(person, where, MrLook(name), 1).astype(float) for name in ("t1", "t2"))
    liver, spleen = (label == ORGANS[name] for name in ("liver", "spleen"))
    assert np.median(t1[liver]) > 1.2 * np.median(t1[spleen])
    assert np.median(t2[liver]) < 0.9 * np.median(t2[spleen])
    outside = t1[:, :3]
    assert outside.min() >= 0 and outside.mean() == pytest.approx(np.sqrt(np.pi / 2) * 0.02 * 1200, rel=0.5)


def test_a_turned_grid_shows_the_same_patient_at_the_same_place():
    person = body(0, 0, healthy=True)
    straight = grid((30, 48, 48), (6.0, 6.0, 6.0), AXIAL, CENTRE)
    turned = grid((30, 48, 48), (6.0, 6.0, 6.0), rotation_matrix((25, -15, 40)) @ AXIAL, CENTRE)
    world = np.array([64.0, 0.0, -40.0, 1.0])
    for where in (straight, turned):
        x, y, z = np.rint(np.linalg.solve(where.affine, world)[:3]).astype(int)
        assert labels(person, where)[z, y, x] == ORGANS["liver"]


def test_breathing_moves_the_liver_down_in_image_and_label(where):
    person = body(0, 0, healthy=True)
    heights = where.points()[2].reshape(where.shape)
    rest, deep = (labels(person, where, breath_mm=breath) == ORGANS["liver"] for breath in (0.0, 15.0))
    assert heights[deep].mean() < heights[rest].mean() - 5
    value = ct(person, where, CtLook(noise_hu=0.0, blur_mm=0.0, breath_mm=15.0), 1)
    assert np.mean(value[deep & ~rest] > 0) > 0.7, "what the label gained is liver in the image"
    assert np.mean(value[rest & ~deep] > 0) < 0.6, "what it lost is mostly lung and fat"


def test_labels_may_be_a_choice_of_organs(where):
    label = labels(body(0, 0), where, organs={"spleen": 1, "liver": 7})
    assert set(np.unique(label)) == {0, 1, 7}


def test_the_field_of_view_is_padded(where):
    value = ct(body(0, 0), where, CtLook(field_of_view_mm=350.0), 1)
    assert (value[:, 0, 0] == -2000).all() and (value[:, 28, 28] != -2000).all()


def test_distances_are_zero_on_the_surface():
    surface = np.array([[30.0, 0, 0], [0, 20, 0], [0, 0, 10]], np.float32) + np.array([5, 6, 7], np.float32)
    assert np.allclose(ellipsoid((5, 6, 7), (30, 20, 10))(tuple(surface.T)), 0, atol=1e-4)
    pipe = tube([(0, 0, 0), (0, 0, 100)], (4, 8))
    points = tuple(np.array([[6, 0, 50], [0, 8, 100], [10, 0, 50]], np.float32).T)
    assert np.allclose(pipe(points), [0, 0, 4], atol=1e-4)


def test_waves_have_the_deviation_they_were_asked_for():
    rng = generator("test")
    points = tuple(rng.uniform(-5000, 5000, (3, 20_000)).astype(np.float32))
    assert Waves(rng, (40, 90), 2.5)(points).std() == pytest.approx(2.5, rel=0.15)
