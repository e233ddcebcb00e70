"""A page about features: a map in two dimensions with small pictures, and the nearest neighbours of each volume.

The page runs no script: a point is a link, and the block it leads to is shown by the style sheet alone.
"""

from __future__ import annotations

import base64
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medssl import __version__
from medssl.errors import DataError, UsageError
from medssl.files import write_text
from medssl.inference.embed import EDGE, FEATURES, THUMBNAILS
from medssl.inference.embedding import Embeddings
from medssl.inference.embedding_file import read_embeddings
from medssl.inference.predict import NOTICE
from medssl.report.figures import COLOURS
from medssl.report.page import NAME, _template
from medssl.training.heads import Standardiser, unit

Layout = Literal["tsne", "pca"]
Floats = NDArray[np.float64]

#: Volumes on a page; of more, so many evenly spaced ones.
MOST = 600
NEIGHBOURS = 6
#: Pictures on the map at most, and how far apart they lie, in parts of its width.
PICTURES, APART = 80, 0.06
COLUMNS = 20


@dataclass(frozen=True)
class Point:
    """A volume on the map.

    Args:
        number: Its place in the sprite of pictures, and its anchor.
        name: Its id.
        x: In percent of the map's width.
        y: In percent of its height, from above.
        colour: Of its group.
        group: Modality, split or nothing.
        pictured: Drawn as its picture and not as a dot.
        neighbours: Numbers and cosines of the nearest others, nearest first.
        note: What else is known of it.
    """

    number: int
    name: str
    x: float
    y: float
    colour: str
    group: str
    pictured: bool
    neighbours: tuple[tuple[int, float], ...]
    note: str


def embedding_report(folder: Path, *, layout: Layout = "tsne") -> Path:
    """Write `report.html` into a folder of `medssl embed` and return its path.

    Args:
        folder: The folder.
        layout: `tsne`, which keeps neighbours together, or `pca`, which keeps large distances.

    Raises:
        UsageError: If the folder holds no features.
        DataError: If its files are damaged or do not belong together.
    """
    if not (folder / FEATURES).is_file():
        raise UsageError(f"{folder} holds no {FEATURES}: give the --out folder of `medssl embed`.")
    found = read_embeddings(folder / FEATURES)
    found.require_finite()
    if len(found) > MOST:
        found = found.of(np.linspace(0, len(found) - 1, MOST).round().astype(np.int64))
    pictures = _read_pictures(folder / THUMBNAILS, found)
    rows = unit(Standardiser(found.features.astype(np.float64))(found.features.astype(np.float64)))
    places = {"pca": principal_map(rows), "tsne": neighbour_map(rows)}
    chosen = places[layout]
    points = _points(found, rows, chosen, pictures is not None)
    groups = sorted({(point.group, point.colour) for point in points})
    encoder = found.facts.get("encoder", {})
    page = _template("embedding.html.j2").render(
        name=folder.resolve().name,
        points=points,
        groups=groups if len(groups) > 1 else [],
        sprite=_sprite(pictures) if pictures is not None else None,
        edge=EDGE,
        columns=COLUMNS,
        tiles=[
            ("volumes", f"{len(found):,}"),
            ("numbers each", f"{found.features.shape[1]:,}"),
            ("encoder", str(encoder.get("method", "unknown"))),
            ("stages", ", ".join(map(str, found.facts.get("stages", []))) or "unknown"),
        ],
        layout={"tsne": "t-SNE", "pca": "principal components"}[layout],
        retrieval=patient_retrieval(rows, found.patient_keys),
        twins=_twins(found, rows),
        notice=NOTICE,
        version=__version__,
    )
    write_text(folder / NAME, page)
    return folder / NAME


def principal_map(rows: Floats) -> Floats:
    """Return the first two principal components; the larger half of each axis is positive. Shape: (N, 2)."""
    centred = rows - rows.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    found = np.zeros((len(rows), 2))
    count = min(2, left.shape[1])
    found[:, :count] = left[:, :count] * values[:count]
    # The sign of a component is arbitrary and would flip the map from machine to machine.
    return found * np.where(found[np.abs(found).argmax(axis=0), [0, 1]] < 0, -1.0, 1.0)


def neighbour_map(rows: Floats, seed: int = 0) -> Floats:
    """Return t-SNE's places (van der Maaten and Hinton, 2008), started from the principal components. Shape: (N, 2).

    Fewer than ten volumes, or equal ones, are shown by their principal components.
    """
    start = principal_map(rows)
    if len(rows) < 10 or not start[:, 0].std() > 1e-9:
        return start
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(rows) - 1) / 3)
    return np.asarray(
        TSNE(perplexity=perplexity, init=1e-4 * start / start[:, 0].std(), random_state=seed).fit_transform(rows),
        np.float64,
    )


def nearest(rows: Floats, count: int) -> tuple[NDArray[np.int64], Floats]:
    """Return the nearest other rows by cosine, nearest first, and their cosines. Shape: (N, min(count, N - 1)) each."""
    cosine = rows @ rows.T
    np.fill_diagonal(cosine, -np.inf)
    order = np.argsort(-cosine, axis=1, kind="stable")[:, : min(count, len(rows) - 1)]
    return order, np.take_along_axis(cosine, order, axis=1)


def patient_retrieval(rows: Floats, patients: tuple[str, ...]) -> tuple[int, int] | None:
    """Return for how many volumes of patients with several the nearest other is of the same patient, and of how many.

    None where no patient has several.
    """
    several = [row for row, key in enumerate(patients) if key and patients.count(key) > 1]
    if not several or len(rows) < 2:
        return None
    closest = nearest(rows, 1)[0][:, 0]
    return sum(patients[closest[row]] == patients[row] for row in several), len(several)


def spread_out(places: Floats, most: int, apart: float) -> NDArray[np.bool_]:
    """Return which of some places may carry a picture without covering another, the first come first. Shape: (N,)."""
    kept: list[int] = []
    for number, place in enumerate(places):
        if len(kept) < most and (not kept or (np.abs(places[kept] - place).max(axis=1) >= apart).all()):
            kept.append(number)
    found = np.zeros(len(places), bool)
    found[kept] = True
    return found


def _points(found: Embeddings, rows: Floats, places: Floats, pictures: bool) -> list[Point]:
    span = np.ptp(places, axis=0)
    scaled = (places - places.min(axis=0)) / np.where(span > 0, span, 1.0)
    scaled[:, span <= 0] = 0.5
    pictured = spread_out(scaled, PICTURES, APART) if pictures else np.zeros(len(rows), bool)
    groups = _groups(found)
    colours = {group: COLOURS[number % len(COLOURS)] for number, group in enumerate(sorted(set(groups)))}
    order, cosines = nearest(rows, NEIGHBOURS)
    notes = [
        ", ".join(values[row] for values in (found.labels, found.modalities, found.splits) if values and values[row])
        for row in range(len(found))
    ]
    return [
        Point(
            number=row,
            name=found.ids[row],
            x=3 + 94 * float(scaled[row, 0]),
            y=97 - 94 * float(scaled[row, 1]),
            colour=colours[groups[row]],
            group=groups[row],
            pictured=bool(pictured[row]),
            neighbours=tuple(zip(order[row].tolist(), cosines[row].tolist(), strict=True)),
            note=notes[row],
        )
        for row in range(len(found))
    ]


def _groups(found: Embeddings) -> tuple[str, ...]:
    """Return what points are coloured by: labels where there are some, else modality where there are several, or split.

    Labels of which there are more than colours tell nothing apart.
    """
    for values in (found.labels if len(set(found.labels)) <= len(COLOURS) else (), found.modalities, found.splits):
        if len(set(values)) > 1:
            return values
    return ("",) * len(found)


def _twins(found: Embeddings, rows: Floats) -> list[tuple[str, str]]:
    """Return pairs of volumes whose features are all but equal."""
    if len(rows) < 2:
        return []
    order, cosines = nearest(rows, 1)
    close = [(int(row), int(order[row, 0])) for row in np.flatnonzero(cosines[:, 0] > 1 - 1e-6)]
    pairs = {(min(pair), max(pair)) for pair in close}
    return [(found.ids[first], found.ids[second]) for first, second in sorted(pairs)]


def _read_pictures(path: Path, found: Embeddings) -> NDArray[np.uint8] | None:
    """Return the picture of each volume, or None where the folder has none. Shape: (N, edge, edge)."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as content:
            pictures, ids = content["pictures"], content["ids"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}). Embed again with --overwrite.") from error
    place = {name: number for number, name in enumerate(ids)}
    missing = [name for name in found.ids if name not in place]
    if missing or pictures.shape[1:] != (EDGE, EDGE) or pictures.dtype != np.uint8:
        raise DataError(f"{path} does not belong to the features beside it. Embed again with --overwrite.")
    return pictures[[place[name] for name in found.ids]]


def _sprite(pictures: NDArray[np.uint8]) -> str:
    """Return all pictures in one, `COLUMNS` a row, as a `data:` address."""
    from PIL import Image

    lines = -(-len(pictures) // COLUMNS)
    sheet = np.zeros((lines * EDGE, COLUMNS * EDGE), np.uint8)
    for number, picture in enumerate(pictures):
        top, left = number // COLUMNS * EDGE, number % COLUMNS * EDGE
        sheet[top : top + EDGE, left : left + EDGE] = picture
    stream = io.BytesIO()
    Image.fromarray(sheet).save(stream, "JPEG", quality=85, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
