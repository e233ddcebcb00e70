"""A batch keeps its facts on the CPU, and batches can be joined."""

from __future__ import annotations

import pytest
import torch

from medssl.data.batch import Batch, View, stack


def make_batch(first: int, labels: bool = False) -> Batch:
    return Batch(
        image=torch.full((2, 1, 4, 4, 4), float(first)),
        sample_index=torch.tensor([first, first + 1]),
        sample_id=torch.tensor([7, 8]),
        origin_mm=torch.zeros(2, 3),
        spacing_mm=torch.ones(2, 3),
        valid=torch.tensor([[[0, 4]] * 3] * 2),
        background=torch.zeros(2),
        modality=("MR", "CT"),
        patient_key=("a", "b"),
        label=torch.zeros(2, 4, 4, 4, dtype=torch.int64) if labels else None,
    )


def test_moving_a_batch_moves_voxels_and_leaves_facts_where_parameters_are_drawn():
    moved = make_batch(0, labels=True).to("meta")
    assert moved.image.device.type == "meta" and moved.label is not None and moved.label.device.type == "meta"
    assert moved.sample_index.device.type == "cpu" and moved.spacing_mm.device.type == "cpu"


def test_moving_a_view_moves_all_of_it():
    view = View(image=torch.zeros(1, 1, 2, 2), inside=torch.ones(1, 1, 2, 2), to_source_mm=torch.zeros(1, 3, 4))
    assert view.to("meta").to_source_mm.device.type == "meta" and view.to("meta").label is None


def test_joined_batches_keep_order_facts_and_names():
    joined = stack([make_batch(0), make_batch(2)])
    assert len(joined) == 4 and joined.dimensions == 3
    assert joined.sample_index.tolist() == [0, 1, 2, 3] and joined.modality == ("MR", "CT", "MR", "CT")


def test_batches_with_and_without_labels_are_not_mixed():
    with pytest.raises(ValueError, match="keep labelled and unlabelled samples apart"):
        stack([make_batch(0), make_batch(2, labels=True)])
    with pytest.raises(ValueError, match="empty"):
        stack([])
