"""The queue of rows from earlier steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medssl.training.queue import NO_VOLUME, Queue


def rows_of(*numbers: int) -> tuple[Tensor, Tensor]:
    """Rows that can be told by their number, with the number as their volume."""
    volumes = torch.tensor(numbers)
    return volumes[:, None] * torch.ones(1, 2), volumes


def fill(queue: Queue, *batches: tuple[int, ...]) -> None:
    for numbers in batches:
        queue.offer(*rows_of(*numbers))
        queue.take_in()


def content(queue: Queue) -> list[int]:
    assert torch.equal(queue.rows[:, 0][queue.filled].long(), queue.volumes[queue.filled])
    return queue.volumes.tolist()


def test_a_new_queue_is_empty() -> None:
    queue = Queue(3, 2)
    assert content(queue) == [NO_VOLUME] * 3
    assert not queue.filled.any() and not queue.full


def test_rows_are_written_round_the_end_whatever_the_length() -> None:
    queue = Queue(5, 2)
    fill(queue, (0, 1))
    assert queue.filled.tolist() == [True, True, False, False, False]
    fill(queue, (2, 3), (4, 5))
    assert content(queue) == [5, 1, 2, 3, 4] and queue.full
    fill(queue, (6, 7, 8))
    assert content(queue) == [5, 6, 7, 8, 4]


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 7, 12])
def test_the_queue_holds_the_last_rows_for_any_batch(batch: int) -> None:
    queue, seen = Queue(5, 2), list[int]()
    for step in range(6):
        numbers = tuple(range(step * batch, (step + 1) * batch))
        fill(queue, numbers)
        seen.extend(numbers)
        assert set(content(queue)) - {NO_VOLUME} == set(seen[-5:])
        assert queue.count.item() == min(len(seen), 5)


def test_rows_wait_until_the_step_is_done_and_all_batches_of_it_are_taken() -> None:
    queue = Queue(5, 2)
    queue.offer(*rows_of(0, 1))
    queue.offer(*rows_of(2))
    assert not queue.filled.any()
    queue.take_in()
    queue.take_in()
    assert content(queue) == [0, 1, 2, NO_VOLUME, NO_VOLUME]


def test_a_look_in_eval_mode_leaves_no_row() -> None:
    queue = Queue(5, 2).eval()
    fill(queue, (0, 1))
    assert not queue.filled.any()


def test_what_is_offered_gets_no_gradient_and_is_kept_in_float32() -> None:
    queue = Queue(2, 2)
    queue.offer(torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True))
    queue.take_in()
    assert queue.rows.dtype == torch.float32 and not queue.rows.requires_grad
    assert queue.volumes.tolist() == [NO_VOLUME, NO_VOLUME] and queue.filled.tolist() == [True, False]


def test_a_resumed_queue_goes_on_where_it_was() -> None:
    whole, resumed = Queue(5, 2), Queue(5, 2)
    fill(whole, (0, 1, 2), (3, 4, 5))
    resumed.load_state_dict(whole.state_dict())
    for queue in (whole, resumed):
        fill(queue, (6, 7, 8))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.parametrize(("rows", "volumes"), [((2, 3), (2,)), ((2,), (2,)), ((2, 2), (3,))])
def test_rows_that_do_not_fit_are_named(rows: tuple[int, ...], volumes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="A queue of width 2 takes rows"):
        Queue(4, 2).offer(torch.zeros(rows), torch.zeros(volumes, dtype=torch.int64))
