"""Ordered, bounded preparation."""

from __future__ import annotations

import random
import threading
import time

import pytest

from embedcache.encoders.base import Prepared
from embedcache.errors import InputError
from embedcache.stage_one.prepare import in_order


def job(i: int):
    def run() -> Prepared:
        time.sleep(random.Random(i).uniform(0, 0.002))
        if i % 7 == 3:
            raise InputError("bad", f"job {i}")
        return Prepared(i, bytes(16))

    return run


@pytest.mark.parametrize("n_threads", [1, 2, 8])
def test_outcomes_come_in_order(n_threads: int) -> None:
    outcomes = list(in_order(map(job, range(200)), n_threads=n_threads, ahead=4))
    assert len(outcomes) == 200
    for i, outcome in enumerate(outcomes):
        if i % 7 == 3:
            assert isinstance(outcome, InputError)
            assert str(outcome) == f"job {i}"
        else:
            assert isinstance(outcome, Prepared)
            assert outcome.inputs == i


def test_it_never_runs_further_ahead_than_agreed() -> None:
    started, lock = [], threading.Lock()

    def counted(i: int):
        def run() -> Prepared:
            with lock:
                started.append(i)
            return Prepared(i, bytes(16))

        return run

    stream = in_order(map(counted, range(300)), n_threads=4, ahead=6)
    for consumed in range(50):
        next(stream)
        if consumed % 10 == 0:
            time.sleep(0.02)
            assert len(started) <= consumed + 1 + 6
    stream.close()


def test_closing_early_ends_waiting_threads() -> None:
    before = threading.active_count()
    stream = in_order(map(job, range(1000)), n_threads=4, ahead=4)
    next(stream)
    stream.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_a_fault_ends_the_stream() -> None:
    def faulty() -> Prepared:
        raise ZeroDivisionError

    stream = in_order([job(0), faulty, job(1)], n_threads=2, ahead=2)
    with pytest.raises(ZeroDivisionError):
        list(stream)
