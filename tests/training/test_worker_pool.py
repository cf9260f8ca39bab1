"""Forked processes that call functions: what happens when one fails, is interrupted, or cannot be started."""

from __future__ import annotations

import os
import sys
import time

import pytest

from tunery.errors import ModelError
from tunery.training.worker_pool import WorkerLostError, WorkerPool

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked under Linux only")


def test_results_come_in_the_order_of_the_arguments() -> None:
    pool = WorkerPool({"pid": lambda wait: (time.sleep(wait), os.getpid())[1]}, 3, 1)
    try:
        found = pool.call("pid", [0.0, 0.2, 0.0])
        assert found == [os.getpid(), *pool.pids]
        assert pool.call("pid", [0.0, 0.0]) == found[:2]
    finally:
        pool.close()


def test_an_interruption_does_not_wait_for_the_workers_and_loses_them() -> None:
    def work(place: str) -> None:
        if place == "here":
            raise KeyboardInterrupt
        time.sleep(60)

    pool = WorkerPool({"work": work}, 3, 1)
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.call("work", ["here", "there", "there"])
        assert time.monotonic() - started < 20
        with pytest.raises(WorkerLostError, match="were ended"):
            pool.call("work", ["here", "there"])
    finally:
        pool.close()


def test_an_error_for_the_user_stays_one() -> None:
    def work(place: str) -> None:
        if place == "there":
            raise ModelError("the rows are too long", "shorten them")

    pool = WorkerPool({"work": work}, 2, 1)
    try:
        with pytest.raises(ModelError, match="too long") as caught:
            pool.call("work", ["here", "there"])
        assert caught.value.hint == "shorten them"
        assert pool.call("work", ["here", "elsewhere"]) == [None, None]  # the workers live on
    finally:
        pool.close()


def test_an_error_here_leaves_no_answer_behind() -> None:
    def work(number: int) -> int:
        if number == 0:
            raise ValueError("here")
        return number

    pool = WorkerPool({"work": work}, 2, 1)
    try:
        with pytest.raises(ValueError, match="here"):
            pool.call("work", [0, 1])
        assert pool.call("work", [3, 4]) == [3, 4]
    finally:
        pool.close()


def test_where_a_process_cannot_be_started_the_others_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    real, pids = os.fork, []

    def fork() -> int:
        if pids:
            raise BlockingIOError("Resource temporarily unavailable")
        pids.append(real())
        return pids[-1]

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(BlockingIOError):
        WorkerPool({}, 3, 1)
    with pytest.raises(ChildProcessError):
        os.waitpid(pids[0], os.WNOHANG)  # it was waited for
