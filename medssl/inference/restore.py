"""From logits on the network's grid back to labels on the source's grid, a slab at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from medssl.inference.model import SegmentationModel
from medssl.inference.preprocess import Prepared
from medssl.inference.resampling import RowResampler, Scheme
from medssl.inference.workspace import Workspace

Array = npt.NDArray[Any]


def restore(rows: Iterable[Array], prepared: Prepared, model: SegmentationModel, workspace: Workspace) -> Array:
    """Resample logits, take the labels, undo the crop and the transposition.

    Where all logits at both grids fit the budget, nnU-Net's own function resamples them whole, class by class, and
    the labels are bit-equal to nnU-Net's. Beyond it each slab of output rows is made from the input rows it depends
    on (two for linear interpolation) and reduced to labels at once; a logit may then differ in float16's last digit,
    by a rounding tie. Resampling functions other than nnU-Net's two are always used whole.

    Args:
        rows: Logits in order along axis 0. Shape each: (heads, n, Y', X'), float16.
        prepared: What `prepare` returned; its `data` is no longer needed once `rows` is exhausted.
        model: Whose labels and resampling to follow.
        workspace: Gives large arrays.

    Returns:
        Labels. Shape: (Z, Y, X) of the source as its reader saw it, uint8 or uint16.
    """
    shape_in = tuple(int(side) for side in prepared.data.shape[1:])
    shape_out = prepared.cropped_shape
    dtype = np.uint8 if len(model.labels.foreground_labels) < 255 else np.uint16
    whole_mask = workspace.zeros(prepared.shape_before_cropping, dtype)
    mask = whole_mask[tuple(slice(low, high) for low, high in prepared.bbox)]
    settings = model.configuration.configuration
    current, target = prepared.target_spacing(model), prepared.spacing
    scheme = Scheme.of(
        settings["resampling_fn_probabilities"], settings["resampling_fn_probabilities_kwargs"], current, target
    )
    if shape_in == shape_out:
        _as_they_are(rows, mask, model)
    elif not scheme.by_rows or scheme.order > 1 or workspace.fits(_whole_cost(model.heads, shape_in, shape_out)):
        _whole(rows, (shape_in[0], shape_in[1], shape_in[2]), mask, current, target, model, workspace)
    else:
        resampler = RowResampler((shape_in[0], shape_in[1], shape_in[2]), shape_out, scheme.separate_axis)
        _by_slabs(rows, resampler, mask, scheme.out_dtype or np.float16, model, workspace)
    return whole_mask.transpose(model.plans.transpose_backward)


def _whole_cost(heads: int, shape_in: tuple[int, ...], shape_out: tuple[int, ...]) -> float:
    """Return bytes of the logits at both grids in float16 and of one class in float64 at both."""
    return float(np.prod(shape_in)) * (2 * heads + 16) + float(np.prod(shape_out)) * (4 * heads + 20)


def _labels(logits: Array, model: SegmentationModel) -> Array:
    return np.asarray(model.labels.convert_logits_to_segmentation(logits))


def _as_they_are(rows: Iterable[Array], mask: Array, model: SegmentationModel) -> None:
    start = 0
    for block in rows:
        for row in range(block.shape[1]):  # one row at a time: argmax makes an int64 copy
            mask[start + row] = _labels(block[:, row : row + 1], model)[0]
        start += block.shape[1]


def _whole(
    rows: Iterable[Array],
    shape_in: tuple[int, int, int],
    mask: Array,
    current: list[float],
    target: tuple[float, ...],
    model: SegmentationModel,
    workspace: Workspace,
) -> None:
    logits = workspace.empty((model.heads, *shape_in), np.float16)
    start = 0
    for block in rows:
        logits[:, start : start + block.shape[1]] = block
        start += block.shape[1]
    resample = model.configuration.resampling_fn_probabilities
    made: Array | None = None
    for head in range(model.heads):
        one = np.asarray(resample(logits[head : head + 1], mask.shape, current, list(target)))
        if made is None:
            made = workspace.empty((model.heads, *mask.shape), one.dtype)
        made[head] = one[0]
    workspace.release(logits)
    if made is not None:
        for row in range(mask.shape[0]):
            mask[row] = _labels(made[:, row : row + 1], model)[0]
        workspace.release(made)


def _by_slabs(
    rows: Iterable[Array],
    resampler: RowResampler,
    mask: Array,
    dtype: npt.DTypeLike,
    model: SegmentationModel,
    workspace: Workspace,
) -> None:
    plane_in = resampler.shape_in[1] * resampler.shape_in[2]
    plane_out = resampler.shape_out[1] * resampler.shape_out[2]
    ratio = max(1.0, resampler.shape_in[0] / resampler.shape_out[0])
    # One class in float64 at both grids and between them, every class in `dtype` at the output, argmax in int64.
    between = resampler.shape_out[1] * resampler.shape_in[2]
    labels = plane_out * (24.0 + model.heads * (np.dtype(dtype).itemsize + 4))
    step = workspace.rows(16.0 * ratio * plane_in + 8.0 * between + labels)
    kept: list[Array] = []
    first = start = available = 0
    for block in rows:
        kept.append(block)
        available += block.shape[1]
        held = np.concatenate(kept, axis=1) if len(kept) > 1 else block
        until = resampler.ready(available, start)
        while start < until:
            stop = min(until, start + step)
            logits = np.empty((model.heads, stop - start, *resampler.shape_out[1:]), dtype)
            for head in range(model.heads):
                logits[head] = resampler.apply(held[head], first, start, stop)
            for row in range(stop - start):
                mask[start + row] = _labels(logits[:, row : row + 1], model)[0]
            start = stop
        workspace.relax()
        if start < resampler.shape_out[0]:
            low = max(first, resampler.needed(start, start + 1)[0])
            kept = [held[:, low - first :].copy()]
            first = low
