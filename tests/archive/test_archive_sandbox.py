"""Whatever an input does to its decoder costs one input."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from medssl.archive.sandbox import Limits, Pool, map_on_executor, run_limited
from medssl.errors import InputRefused

SMALL = Limits(memory_mb=1024, seconds=1.0)


class Panic(BaseException):
    """As pyo3 raises: no Exception."""


def double(number: int) -> int:
    return 2 * number


def array_of(size: int) -> np.ndarray:
    return np.arange(size, dtype=np.float32)


def segfault(_: int) -> None:
    ctypes.string_at(0)


def killed(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(_: int) -> None:
    time.sleep(60)


def greedy(_: int) -> bytearray:
    return bytearray(2**32)


def large(_: int) -> int:
    return len(bytearray(2**31))


def panic(_: int) -> None:
    raise Panic("Doe^Jane")


def quoting(_: int) -> None:
    raise ValueError("patient Doe^Jane in /archive/Doe")


def deep(number: int) -> int:
    return deep(number + 1) + 1


def treacherous(number: int) -> int:
    {3: segfault, 7: panic, 11: greedy, 13: killed, 17: quoting}.get(number, double)(number)
    return number


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (segfault, "decode_crashed"),
        (killed, "decode_crashed"),
        (panic, "decode_crashed"),
        (hang, "decode_timeout"),
        (greedy, "decode_memory"),
        (quoting, "decode_failed"),
        (deep, "decode_failed"),
    ],
)
def test_a_bad_end_becomes_a_code_without_the_text_of_the_input(function, code):
    with pytest.raises(InputRefused) as refusal:
        run_limited(function, 1, SMALL)
    assert refusal.value.code == code
    assert "Doe" not in str(refusal.value)
    assert run_limited(double, 4, SMALL) == 8


def test_arrays_come_back_whole_and_writable():
    result = run_limited(array_of, 1000, SMALL)
    assert np.array_equal(result, np.arange(1000))
    result += 1


@pytest.mark.parametrize("batch", [1, 8])
def test_a_pool_loses_only_the_bad_items(batch):
    with Pool(2, SMALL) as pool:
        outcomes = dict(pool.map(treacherous, range(40), batch=batch))
    assert sorted(outcomes) == list(range(40))
    bad = {item: outcome.code for item, outcome in outcomes.items() if outcome.code}
    assert bad == {
        3: "decode_crashed",
        7: "decode_crashed",
        11: "decode_memory",
        13: "decode_crashed",
        17: "decode_failed",
    }
    assert all(outcome.value == item for item, outcome in outcomes.items() if not outcome.code)


def test_each_batch_has_its_own_limit():
    with Pool(1) as pool:
        for memory, code in ((1024, "decode_memory"), (8192, ""), (1024, "decode_memory")):
            limits = Limits(memory_mb=memory, seconds=20)
            assert [outcome.code for _, outcome in pool.map(large, [1], limits=limits)] == [code]


def test_items_are_drawn_only_as_processes_become_free():
    drawn = []

    def items():
        for number in range(1000):
            drawn.append(number)
            yield number

    with Pool(2, SMALL) as pool:
        results = pool.map(double, items(), batch=4)
        next(results)
        assert len(drawn) <= 16


def test_the_same_on_any_executor():
    with ThreadPoolExecutor(2) as executor:
        results = list(map_on_executor(executor, treacherous, range(20), SMALL, batch=5, in_flight=3))
    assert sorted(item for item, outcome in results if not outcome.code) == [
        number for number in range(20) if number not in (3, 7, 11, 13, 17)
    ]


def test_threads_and_forked_processes_may_call_at_the_same_time():
    run_limited(double, 1, SMALL)
    results = []
    threads = [threading.Thread(target=lambda n=n: results.append(run_limited(double, n, SMALL))) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 2, 4, 6, 8, 10]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(run_limited, [(double, n, SMALL) for n in range(4)]) == [0, 2, 4, 6]
    assert run_limited(double, 5, SMALL) == 10


def test_no_process_is_left_behind():
    with Pool(2, SMALL) as pool:
        list(pool.map(double, range(10)))
        numbers = [worker.process.pid for worker in pool._idle]
    assert numbers
    assert not any(Path(f"/proc/{number}").exists() for number in numbers)
