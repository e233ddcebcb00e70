"""The report: whole in one file, true to the run, and silent about patients and machines."""

from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medssl.errors import UsageError
from medssl.report.facts import public, public_text, read_facts
from medssl.report.overlays import Aligned, overlays
from medssl.report.page import report
from tests.report.runs import pretraining_run, segmentation_run


class Outline(HTMLParser):
    """Collects what a page refers to, its headings, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.addresses += [
            str(values[name]) for name in ("href", "src", "xlink:href", "action", "data") if name in values
        ]
        self.ids += [str(values["id"])] if "id" in values else []
        if tag == "img":
            self.images.append(values)


@pytest.fixture
def pretraining(tmp_path: Path) -> Path:
    return pretraining_run(tmp_path / "pretraining")


@pytest.fixture
def segmentation(tmp_path: Path) -> Path:
    return segmentation_run(tmp_path / "segmentation", tmp_path / "Dataset004_Hippocampus")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The page of each kind of run, made once for all tests that only read it."""
    folder = tmp_path_factory.mktemp("pages")
    return {
        "pretraining": report(pretraining_run(folder / "pretraining")).read_text(),
        "segmentation": report(
            segmentation_run(folder / "segmentation", folder / "Dataset004_Hippocampus")
        ).read_text(),
    }


@pytest.fixture(params=["pretraining", "segmentation"])
def page(request: pytest.FixtureRequest, pages: dict[str, str]) -> str:
    return pages[request.param]


def test_page_loads_nothing_from_elsewhere(page: str) -> None:
    outline = Outline(page)
    assert outline.addresses and all(address.startswith(("#", "data:")) for address in outline.addresses)
    assert not {"script", "link", "iframe", "object", "embed"} & set(outline.tags)
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    assert "default-src 'none'" in page


def test_every_link_within_the_page_leads_somewhere(page: str) -> None:
    outline = Outline(page)
    assert {address[1:] for address in outline.addresses if address.startswith("#")} <= set(outline.ids)
    sections = [name for name in outline.ids if "-" not in name]
    assert len(sections) == len(set(sections))


def test_page_tells_no_path_of_the_machine_and_no_folder_above_the_data(page: str, tmp_path: Path) -> None:
    for secret in ("hospital", "Mueller", "19500101", str(tmp_path), "/tmp", "/srv", "/home"):
        assert secret not in page
    assert "…/Dataset004_Hippocampus" in page


def test_page_is_small_and_says_what_it_is_for(page: str) -> None:
    assert len(page) < 5_000_000
    assert "Research use only. Not a medical device" in page


def test_every_picture_and_figure_has_a_text_instead(page: str) -> None:
    outline = Outline(page)
    assert all(image["alt"] for image in outline.images)
    for figure in re.findall(r'<figure class="card"[^>]*>', page):
        assert re.search(r'role="img" aria-label="[^"]{10,}"', figure)


def test_pretraining_page_shows_curves_views_reconstructions_and_the_recipe(pages: dict[str, str]) -> None:
    page = pages["pretraining"]
    for part in (
        "Loss terms",
        "Learning rate",
        "Health: std",
        "Health: rank",
        "Quality: rankme",
        "Probe: knn",
        "What the network sees",
        "After 1,000 steps",
        "ratio: 0.65",
        "patients",
    ):
        assert part in page, part
    assert "The loss went from" in page and "What this page lacks" not in page


def test_segmentation_page_shows_the_scores_that_evaluation_gives(segmentation: Path) -> None:
    page = report(segmentation).read_text()
    written = json.loads((segmentation / "validation" / "metrics.json").read_text())
    for label in ("anterior", "posterior"):
        assert f"{written['labels'][label]['dice']['mean']:.3f}" in page
        assert f"{written['labels'][label]['hd95_mm']['mean']:.2f}" in page
    assert "none of which it was fine-tuned on" in page
    assert "90 keys taken" in page


def test_best_median_and_worst_case_are_those_of_the_scores(pages: dict[str, str]) -> None:
    page = pages["segmentation"]
    shown = re.findall(r"<header><b>(\w+)</b> <span>(\w+)</span>", page)
    assert shown == [("best", "case0"), ("median", "case2"), ("worst", "case4")]
    assert page.count('<svg class="slice"') == 9


def test_scores_of_older_masks_are_measured_again(segmentation: Path) -> None:
    import os

    report(segmentation)
    before = json.loads((segmentation / "validation" / "metrics.json").read_text())
    best = segmentation / "validation" / "case0.nii.gz"
    worst = segmentation / "validation" / "case4.nii.gz"
    best.write_bytes(worst.read_bytes())
    stamp = (segmentation / "validation" / "metrics.json").stat().st_mtime + 5
    os.utime(best, (stamp, stamp))
    report(segmentation)
    after = json.loads((segmentation / "validation" / "metrics.json").read_text())
    assert after["overall"]["dice"]["mean"] < before["overall"]["dice"]["mean"]


def test_cases_that_were_trained_on_are_called_out(segmentation: Path) -> None:
    data = json.loads((segmentation / "data.json").read_text())
    (segmentation / "data.json").write_text(json.dumps(data | {"train_cases": ["case1"]}))
    assert "1 of the cases were trained on: these figures are too good" in report(segmentation).read_text()


@pytest.mark.parametrize(
    "name", ["run.json", "metrics.jsonl", "recipe.yaml", "environment.json", "data.json", "transfer.json"]
)
@pytest.mark.parametrize("damage", [b"\x00{ damaged", None], ids=["damaged", "missing"])
def test_a_missing_or_damaged_part_is_named(segmentation: Path, name: str, damage: bytes | None) -> None:
    (segmentation / name).unlink()
    if damage is not None:
        (segmentation / name).write_bytes(damage)
    facts = read_facts(segmentation)
    assert facts.kind == "segmentation" and [line for line in facts.missing if line.startswith(name)]


def test_a_run_with_nothing_but_its_curves_has_a_page(pretraining: Path) -> None:
    for name in ("run.json", "recipe.yaml", "environment.json", "data.json", "views.png"):
        (pretraining / name).unlink()
    (pretraining / "pictures" / "step_001000.png").write_bytes(b"no picture")
    shown, _, missing = report(pretraining).read_text().partition("What this page lacks")
    assert "Loss terms" in shown and "After 2,000 steps" in shown
    for name in ("run.json", "recipe.yaml", "environment.json", "data.json", "views.png", "step_001000.png"):
        assert name in missing


def test_without_the_data_set_the_page_says_that_pictures_are_missing(segmentation: Path, tmp_path: Path) -> None:
    report(segmentation)
    (tmp_path / "Dataset004_Hippocampus").rename(tmp_path / "moved")
    page = report(segmentation).read_text()
    assert "Pictures of case0: its image is no longer where the run found it" in page
    assert '<svg class="slice"' not in page and "Dice" in page


def test_a_run_without_masks_yet_has_a_page(segmentation: Path) -> None:
    for mask in (segmentation / "validation").glob("*.nii.gz"):
        mask.unlink()
    page = report(segmentation).read_text()
    assert "Scores of the validation cases:" in page and "Loss" in page and str(segmentation) not in page


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match="is no RUN"):
        report(tmp_path / "other")
    with pytest.raises(UsageError, match="does not exist"):
        report(tmp_path / "nothing")


def test_names_of_labels_are_text_and_never_markup(segmentation: Path) -> None:
    labels = {"background": 0, "<script>alert(1)</script>": 1, 'a"b': 2}
    for name in ("dataset.json", "data.json"):
        content = json.loads((segmentation / name).read_text())
        (segmentation / name).write_text(json.dumps(content | {"labels": labels}))
    page = report(segmentation).read_text()
    assert "script" not in Outline(page).tags
    for svg in re.findall(r'<svg class="slice".*?</svg>', page, flags=re.S):
        ElementTree.fromstring(svg)


def picture_of(svg: str) -> np.ndarray:
    data = re.search(r'data:image/png;base64,([^"]+)"', svg)
    assert data
    return np.asarray(Image.open(BytesIO(base64.b64decode(data.group(1)))))


def test_slices_are_radiological_and_in_the_patients_proportions() -> None:
    """A bright mark at right, anterior, superior must lie where the letters say."""
    array = np.full((10, 14, 12), 50.0, np.float32)
    array[0, 0, 0] = 0.0
    array[9, :, 11], array[:, 13, 11], array[9, 13, :] = 200.0, 200.0, 200.0  # the three edges that meet in that corner
    labels = np.zeros(array.shape, np.int32)
    labels[9, 13, 11] = 1
    axial, coronal, sagittal = overlays(Aligned(array, (3.0, 1.0, 2.0)), labels, labels, {"mark": (1,)})
    for overlay, across_mm, down_mm in ((axial, 24, 14), (coronal, 24, 30), (sagittal, 14, 30)):
        picture = picture_of(overlay.svg)
        assert picture[0, 0] > 200 and picture[-1, -1] < 150, overlay.plane
        found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', overlay.svg)
        assert found and (float(found.group(1)), float(found.group(2))) == (across_mm, down_mm)
    letters = re.findall(r'text-anchor="(\w+)">(\w)<', axial.svg)
    assert letters == [("start", "R"), ("end", "L"), ("middle", "A"), ("middle", "P")]
    assert [letter for _, letter in re.findall(r'text-anchor="(\w+)">(\w)<', sagittal.svg)] == ["A", "P", "S", "I"]


def test_contours_run_along_the_border_of_the_mask_in_millimetres() -> None:
    array = np.zeros((20, 20, 20), np.float32)
    labels = np.zeros(array.shape, np.int32)
    labels[:, 5:15, 8:12] = 1  # 10 x 4 voxels: y 5..14, x 8..11
    axial = overlays(Aligned(array, (1.0, 2.0, 3.0)), None, labels, {"box": (1,)})[0]
    path = re.search(r'<path class="reference"[^>]* d="([^"]+)"', axial.svg)
    assert path and 'class="prediction"' not in axial.svg
    points = np.array([[float(value) for value in pair.split(",")] for pair in re.split("[ML]", path.group(1)) if pair])
    # The picture is turned by 180 degrees: columns 19 - 11 = 8 to 11, rows 19 - 14 = 5 to 14.
    assert points[:, 0].min() == pytest.approx(8 * 3.0) and points[:, 0].max() == pytest.approx(12 * 3.0)
    assert points[:, 1].min() == pytest.approx(5 * 2.0) and points[:, 1].max() == pytest.approx(15 * 2.0)


def test_paths_in_any_text_are_cut_to_their_last_part() -> None:
    assert public_text("see /home/jane/data/Task04 now") == "see …/Task04 now"
    assert public_text("C:\\Users\\jane\\Task04") == "…/Task04"
    assert public_text("../shared/data/hippocampus") == "…/hippocampus"
    assert public_text("1/2 and a/b, 3.5e-4/s, y/n") == "1/2 and a/b, 3.5e-4/s, y/n"
    assert public({"a": ["/x/y/z"], "b": 3}) == {"a": ["…/z"], "b": 3}
