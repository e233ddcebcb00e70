"""What a codec gives back is as near as its facts say, and everything that is not an intensity stays exact."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from medssl.data.loader import CropLoader
from medssl.data.sampling import CropSettings
from medssl.errors import EXIT_SOME_REFUSED, DataError, InputRefused, UsageError
from medssl.preprocessing.codec import CODECS, Encoding, encode
from medssl.preprocessing.run import PreprocessSummary, preprocess
from medssl.preprocessing.store import Store, StoreWriter
from tests.preprocessing.raw import SHAPE, make_raw, write_nifti
from tests.preprocessing.test_store import FACTS

INTEGERS = ("int16", "int8")
LOSSY = ("float16", *INTEGERS)
LEVELS = {"int16": 65535, "int8": 255}
WHOLE = (0, 0, 0), (12, 17, 15)


def volume(seed: int = 0) -> np.ndarray:
    """Three channels whose ranges differ by orders of magnitude, one of them with an outlier."""
    array = np.random.default_rng(seed).standard_normal((3, 12, 17, 15))
    array[1] = 1000 * array[1] + 40
    array[2] = 1e-3 * array[2] - 7
    array[0, 3, 4, 5] = 90
    return array.astype(np.float32)


def run(raw: Path, out: Path, **options: object) -> PreprocessSummary:
    """Preprocess in this process: starting others would take longer than the work."""
    with ThreadPoolExecutor(1) as executor:
        return preprocess(raw, out, executor=executor, quiet=True, **options)


def stored(folder: Path, array: np.ndarray, codec: str, label: np.ndarray | None = None, **facts: object) -> Store:
    writer = StoreWriter(folder, {"codec": codec})
    writer.add("a", array, {**FACTS, **facts}, label, codec)
    return writer.finish()


@pytest.mark.parametrize("codec", INTEGERS)
def test_no_value_is_further_than_half_a_step_and_none_is_clipped(tmp_path: Path, codec: str) -> None:
    array = volume()
    read = stored(tmp_path / "s", array, codec).read("a", *WHOLE)
    for values, found in zip(array.astype(np.float64), read, strict=True):
        step = (values.max() - values.min()) / LEVELS[codec]
        rounding = 2 * np.spacing(np.float32(np.abs(values).max()))
        assert np.abs(found - values).max() <= step / 2 + rounding
        assert abs(found.max() - values.max()) <= rounding and found.min() == values.min()


@pytest.mark.parametrize("value", [0.0, -3.7, 1e-30, 1e30])
@pytest.mark.parametrize("codec", INTEGERS)
def test_constants_are_exact(tmp_path: Path, codec: str, value: float) -> None:
    array = volume()
    array[1] = value
    store = stored(tmp_path / "s", array, codec)
    np.testing.assert_array_equal(store.read("a", *WHOLE)[1], array[1])


@pytest.mark.parametrize("codec", INTEGERS)
def test_ranges_at_the_edge_of_float32_are_kept(codec: str) -> None:
    for low, high in ((0.0, 1e-44), (1.0, np.nextafter(np.float32(1), np.float32(2))), (-1e30, 1e30), (1e6, 1e6 + 1)):
        array = np.linspace(low, high, 4000, dtype=np.float32).reshape(1, 10, 20, 20)
        numbers, encoding = encode(array, codec)
        half = (float(array.max()) - float(array.min())) / LEVELS[codec] / 2
        error = np.abs(encoding.decode(numbers).astype(np.float64) - array).max()
        assert error == encoding.largest_error <= 1.01 * half + float(np.spacing(np.abs(array).max()))


def test_lossless_keeps_every_bit(tmp_path: Path) -> None:
    array = volume()
    array[0, 0, 0, :3] = (-0.0, 1e-42, 3.4e38)
    store = stored(tmp_path / "s", array, "lossless")
    assert store.read("a", *WHOLE).tobytes() == array.tobytes()
    assert store.info["codec_error"] == {"largest": 0.0, "rms": 0.0}


@pytest.mark.parametrize("codec", LOSSY)
def test_the_error_that_is_written_down_is_the_error_of_what_is_read(tmp_path: Path, codec: str) -> None:
    arrays = [volume(), volume(1)[:, :5] * np.float32(0.5)]
    writer = StoreWriter(tmp_path / "s", {})
    for name, array in zip("ab", arrays, strict=True):
        writer.add(name, array, FACTS, codec=codec)
    store = writer.finish()
    errors = []
    for name, array in zip("ab", arrays, strict=True):
        errors.append(store.read(name, (0, 0, 0), array.shape[1:]).astype(np.float64) - array)
        facts = store.entry(name).properties["codec"]
        assert facts["name"] == codec
        assert facts["largest_error"] == np.abs(errors[-1]).max() > 0
        assert facts["rms_error"] == pytest.approx(np.sqrt((errors[-1] ** 2).mean()), rel=1e-6)
    every = np.concatenate([error.ravel() for error in errors])
    assert store.info["codec_error"]["largest"] == np.abs(every).max()
    assert store.info["codec_error"]["rms"] == pytest.approx(np.sqrt((every**2).mean()), rel=1e-6)


@pytest.mark.parametrize("codec", CODECS)
def test_crops_and_channels_are_parts_of_the_whole_and_labels_are_exact(tmp_path: Path, codec: str) -> None:
    array = volume()
    label = np.random.default_rng(1).integers(-1, 30000, array.shape[1:]).astype(np.int16)
    store = stored(tmp_path / "s", array, codec, label)
    whole = store.read("a", *WHOLE)
    crop = store.read("a", (2, 3, 0), (7, 16, 9))
    assert crop.dtype == np.float32 and crop.flags.writeable
    np.testing.assert_array_equal(crop, whole[:, 2:7, 3:16, :9])
    np.testing.assert_array_equal(store.read("a", (2, 3, 0), (7, 16, 9), [2, 0]), whole[[2, 0], 2:7, 3:16, :9])
    found = store.read_label("a", *WHOLE)
    assert found is not None
    np.testing.assert_array_equal(found, label)


@pytest.mark.parametrize("codec", LOSSY)
def test_padding_equals_the_stored_voxels_of_the_background(tmp_path: Path, codec: str) -> None:
    array = volume()
    array[0, :, :4] = background = np.float32(-1.2345678)
    store = stored(tmp_path / "s", array, codec, background=float(background))
    entry = store.entry("a")
    assert np.float32(entry.background) == store.read("a", (0, 0, 0), (1, 1, 1))[0, 0, 0, 0]
    far = stored(tmp_path / "far", array, codec, background=-1024.0)
    assert far.entry("a").background == -1024.0


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(tmp_path: Path, codec: str, value: float) -> None:
    array = volume()
    array[1, 2, 3, 4] = value
    with pytest.raises(InputRefused, match="not_finite"):
        StoreWriter(tmp_path / "s", {}).add("a", array, FACTS, codec=codec)
    assert not list((tmp_path / "s").glob("a*"))


def test_what_half_precision_cannot_hold_costs_a_row(tmp_path: Path) -> None:
    raw = make_raw(tmp_path / "raw", n=1, labels=False)
    write_nifti(raw / "imagesTr" / "case_9_0000.nii.gz", np.full(SHAPE, 1e5, np.float32))
    summary = run(raw, tmp_path / "store", codec="float16", normalisation="none", crop=False, spacing="native")
    assert (summary.codes, summary.exit_code) == ({"float16_overflow": 1}, EXIT_SOME_REFUSED)
    assert "--codec int16" in str(summary)


def test_an_unknown_codec_is_named_with_its_neighbours() -> None:
    with pytest.raises(UsageError, match=r"no codec named 'int61'. Did you mean int16"):
        encode(volume(), "int61")


@pytest.mark.parametrize("codec", INTEGERS)
def test_integers_without_the_facts_of_their_codec_are_not_read_as_intensities(tmp_path: Path, codec: str) -> None:
    stored(tmp_path / "s", volume(), codec)
    path = tmp_path / "s" / "a.json"
    facts = json.loads(path.read_text())
    for damage in ({"codec": None}, {"codec": {**facts["codec"], "step": []}}, {"codec": {"name": codec}}):
        path.write_text(json.dumps({**facts, **damage}))
        with pytest.raises(DataError, match=r"a\.json is damaged"):
            Store.open(tmp_path / "s").read("a", *WHOLE)


def make_old(folder: Path) -> None:
    """Turn a lossless store into one of schema 1, which named a dtype and no codec."""
    for path in folder.glob("*.json"):
        content = {**json.loads(path.read_text()), "schema_version": 1, "dtype": "float32"}
        content.pop("codec", None)
        content.pop("codec_error", None)
        path.write_text(json.dumps(content))


def test_stores_of_schema_1_are_read_and_resumed(tmp_path: Path) -> None:
    raw, folder = make_raw(tmp_path / "raw", n=2), tmp_path / "store"
    run(raw, folder)
    entry = Store.open(folder).entry("case_0")
    before = Store.open(folder).read("case_0", (0, 0, 0), entry.shape[1:])
    make_old(folder)
    np.testing.assert_array_equal(Store.open(folder).read("case_0", (0, 0, 0), entry.shape[1:]), before)
    (folder / "case_1.json").unlink()
    summary = run(raw, folder, resume=True)
    assert (summary.volumes, summary.kept, summary.largest_error) == (2, 1, 0.0)


def test_another_codec_is_another_store(tmp_path: Path) -> None:
    raw = make_raw(tmp_path / "raw", n=1)
    first = run(raw, tmp_path / "store", codec="int16")
    again = run(raw, tmp_path / "store", codec="int16", resume=True)
    assert again.kept == 1 and again.largest_error == first.largest_error > 0
    with pytest.raises(UsageError, match=r"other settings \(codec\)"):
        run(raw, tmp_path / "store", codec="int8", resume=True)


@pytest.mark.parametrize("codec", INTEGERS)
def test_preprocessing_says_the_error_and_batches_are_no_further_from_the_lossless_ones(
    tmp_path: Path, codec: str
) -> None:
    raw = make_raw(tmp_path / "raw", n=2, channel="CT")
    run(raw, tmp_path / "exact")
    summary = run(raw, tmp_path / "store", codec=codec)
    assert f"Stored as {codec}: largest error {summary.largest_error:.2g}, root mean square" in str(summary)
    store, exact = Store.open(tmp_path / "store"), Store.open(tmp_path / "exact")
    error = store.info["codec_error"]
    assert (summary.to_json()["largest_error"], summary.rms_error) == (error["largest"], error["rms"])
    assert store.hash != exact.hash
    settings = CropSettings(patch_size=(40, 16, 16), batch_size=2, labels=True)
    batches = [next(CropLoader(one, settings, seed=0, split="all").batches()) for one in (store, exact)]
    found, reference = batches
    assert 0 < (found.image - reference.image).abs().max() <= error["largest"] + 1e-7
    assert found.label is not None and reference.label is not None and (found.label == reference.label).all()
    assert found.rescale is not None and reference.rescale is not None and (found.rescale == reference.rescale).all()
    np.testing.assert_array_equal(store.entry("case_0").foreground, exact.entry("case_0").foreground)


def test_facts_without_a_codec_mean_floats() -> None:
    assert Encoding.of_facts({}) == Encoding()
    encoding = encode(volume(), "int8")[1]
    assert Encoding.of_facts(json.loads(json.dumps({"codec": encoding.to_json()}))) == encoding
