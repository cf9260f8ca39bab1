"""Numbers that are not finite, memory that runs out, signals."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from tunery.errors import DivergedError, ModelError
from tunery.models.device import is_out_of_memory
from tunery.training.guard import MicroBatchLimit, require_finite, stop_signals


@pytest.mark.parametrize(
    ("loss", "norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan")), (1.0, float("inf"))]
)
def test_numbers_that_are_not_finite_stop_with_the_rows_named(loss: float, norm: float) -> None:
    with pytest.raises(DivergedError, match=r"(?s)step 7: .*rows\.csv:1, rows\.csv:2"):
        require_finite(loss, norm, 7, ["rows.csv:1", "rows.csv:2"])
    require_finite(1.0, 2.0, 7, [])


def test_out_of_memory_is_told_from_other_errors() -> None:
    real = (
        "[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"
    )
    assert is_out_of_memory(RuntimeError(real))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)


def test_the_limit_is_halved_down_to_one_row_and_then_says_what_to_do() -> None:
    limit = MicroBatchLimit(4, tokens=100)
    for rows in (2, 1):
        limit.halve(MemoryError())
        assert limit.rows == rows
    assert limit.tokens == 25
    with pytest.raises(ModelError, match="gradient_checkpointing"):
        limit.halve(MemoryError())


def test_the_first_signal_is_a_request_and_the_second_acts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_training_runs_without_signals() -> None:
    seen: list[bool] = []

    def work() -> None:
        with stop_signals() as stop:
            seen.append(bool(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
