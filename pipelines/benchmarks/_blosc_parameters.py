"""Which compressor, filter and edges suit the store: what `store_reading.py` measures to choose its constants."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import blosc2
import numpy as np

from medssl.preprocessing import store_files
from medssl.preprocessing.codec import encode

Parameters = dict[str, Any]
CODECS = {
    "lz4": blosc2.Codec.LZ4,
    "lz4hc": blosc2.Codec.LZ4HC,
    "zstd": blosc2.Codec.ZSTD,
    "blosclz": blosc2.Codec.BLOSCLZ,
}
FILTERS = {"none": blosc2.Filter.NOFILTER, "bytes": blosc2.Filter.SHUFFLE, "bits": blosc2.Filter.BITSHUFFLE}
#: Whether the bytes of a shuffled block are packed each on their own; without shuffling there is nothing to split.
SPLITS = {True: blosc2.SplitMode.AUTO_SPLIT, False: blosc2.SplitMode.NEVER_SPLIT}
LEVELS = (("lz4", 1), ("lz4", 5), ("lz4", 9), ("lz4hc", 1), ("lz4hc", 5), ("zstd", 1), ("zstd", 8), ("blosclz", 5))
#: Chunk and block.
EDGES = ((16, 16), (32, 16), (32, 32), (64, 16), (64, 32), (64, 64), (128, 32), (128, 64))
STORED = ("lossless", "int16", "int8")
FIGURES = ("decode ns/voxel", "bytes/voxel", "encode ns/voxel")
CROPS, REPEATS = 2, 3


def measure(volumes: Mapping[str, np.ndarray], edges: Sequence[int], *, quick: bool) -> list[dict[str, Any]]:
    """Return a row for each stored type, crop and setting, with figures by volume and relative to the store's own.

    Args:
        volumes: One volume (1, Z, Y, X) by name.
        edges: Of the crops; all settings are tried with the first, those of chunk and block with all.
        quick: Few settings.
    """
    rows = []
    for codec in STORED:
        arrays = {name: encode(volume, codec)[0] for name, volume in volumes.items()}
        itemsize = next(iter(arrays.values())).itemsize
        for edge in edges:
            settings = _settings(itemsize, quick, edges_only=edge != edges[0])
            found = {name: _in_turns(stored, edge, settings) for name, stored in arrays.items()}
            for number, setting in enumerate(settings):
                figures = {name: values[number] for name, values in found.items()}
                own = {name: values[0] for name, values in found.items()}
                rows.append(
                    {
                        "stored": np.dtype(next(iter(arrays.values())).dtype).name,
                        "crop": edge,
                        **setting,
                        **{what: {name: one[what] for name, one in figures.items()} for what in FIGURES},
                        **{f"{what} relative": _ratio(figures, own, what) for what in FIGURES[:2]},
                    }
                )
    return rows


def _ratio(figures: Mapping[str, dict[str, float]], own: Mapping[str, dict[str, float]], what: str) -> float:
    return round(float(np.exp(np.mean([np.log(one[what] / own[name][what]) for name, one in figures.items()]))), 3)


def chosen() -> Parameters:
    """Return what the store does now."""
    return {
        "compressor": next(name for name, codec in CODECS.items() if codec == store_files.COMPRESSOR),
        "level": store_files.LEVEL,
        "shuffled": "none",
        "split": True,
        "chunk": store_files.CHUNK,
        "block": store_files.BLOCK,
    }


def _settings(itemsize: int, quick: bool, *, edges_only: bool) -> list[Parameters]:
    """Return the store's own setting, then those that differ from it in one respect or in compressor and filter."""
    own = chosen()
    found = [own]
    levels, filters, edges = (LEVELS[4:5], ("bytes",), EDGES[:1]) if quick else (LEVELS, tuple(FILTERS), EDGES)
    if not edges_only:
        found += [
            {**own, "compressor": compressor, "level": level, "shuffled": shuffled}
            for compressor, level in levels
            for shuffled in filters
            if itemsize > 1 or shuffled != "bytes"
        ]
        if itemsize > 1:
            found.append({**own, "shuffled": "bytes", "split": False})
    found += [{**own, "chunk": chunk, "block": block} for chunk, block in edges]
    return [setting for number, setting in enumerate(found) if setting not in found[:number]]


def _in_turns(stored: np.ndarray, edge: int, settings: list[Parameters]) -> list[dict[str, float]]:
    """Decode the same crops with every setting, one after the other, and keep the best of several rounds."""
    rng = np.random.default_rng(0)
    boxes = [random_box(stored.shape[1:], edge, rng) for _ in range(CROPS)]
    packed, encode_seconds = [], []
    for setting in settings:
        start = time.process_time()
        packed.append(_pack(stored, setting))
        encode_seconds.append(time.process_time() - start)
    if len(packed[0]) != len(store_files.compress(stored)):
        raise SystemExit("The first setting is not what the store writes: correct `chosen`.")
    arrays = [blosc2.ndarray_from_cframe(content) for content in packed]
    best = np.full((len(settings), len(boxes)), np.inf)
    for _ in range(REPEATS):
        for number, array in enumerate(arrays):
            for crop, box in enumerate(boxes):
                start = time.process_time()
                array[(slice(None), *box)]
                best[number, crop] = min(best[number, crop], time.process_time() - start)
    voxels = sum(int(np.prod([side.stop - side.start for side in box])) for box in boxes)
    seconds = best.sum(axis=1)
    figures = zip(seconds / voxels, [len(content) for content in packed], encode_seconds, strict=True)
    return [
        {
            "decode ns/voxel": round(1e9 * float(decoding), 3),
            "bytes/voxel": round(size / stored.size, 3),
            "encode ns/voxel": round(1e9 * encoding / stored.size, 1),
        }
        for decoding, size, encoding in figures
    ]


def _pack(stored: np.ndarray, setting: Parameters) -> bytes:
    chunks, blocks = ((1, *(min(setting[kind], size) for size in stored.shape[1:])) for kind in ("chunk", "block"))
    parameters = blosc2.CParams(
        codec=CODECS[setting["compressor"]],
        clevel=setting["level"],
        filters=[FILTERS[setting["shuffled"]]],
        splitmode=SPLITS[setting["split"]],
        typesize=stored.itemsize,
        nthreads=1,
    )
    return bytes(blosc2.asarray(stored, chunks=chunks, blocks=blocks, cparams=parameters).to_cframe())


def random_box(shape: tuple[int, ...], edge: int, rng: np.random.Generator) -> tuple[slice, slice, slice]:
    """Return a random box of a volume (Z, Y, X), cut where the volume is smaller."""
    starts = [int(rng.integers(0, max(size - edge, 0) + 1)) for size in shape]
    z, y, x = (slice(start, min(start + edge, size)) for start, size in zip(starts, shape, strict=True))
    return z, y, x
