"""Processes that load data: started again where they hang, deaf to the signals that stop a run."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from multiprocessing.context import ForkProcess
from types import SimpleNamespace

import pytest
from torch.utils.data import Dataset

from storage import workers
from storage.console import DataError, is_explained
from storage.workers import (
    STOP_SIGNALS,
    DataTimeoutError,
    Loader,
    WaitInterrupted,
    WorkerProcess,
    require_shared_memory,
)


class ProcessIds(Dataset):
    """Items that say which process loaded them."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return os.getpid()


def hang_at_first(monkeypatch, count: int) -> list[object]:
    """Let the first `count` forks of a worker hang; gives the list of all forks."""
    forks, fork, run = [], ForkProcess._Popen, WorkerProcess.run
    monkeypatch.setattr(workers, "WORKER_START_S", 0.5)
    monkeypatch.setattr(ForkProcess, "_Popen", lambda process: forks.append(process) or fork(process))
    monkeypatch.setattr(WorkerProcess, "run", lambda self: time.sleep(60) if len(forks) <= count else run(self))
    return forks


def test_worker_that_hangs_as_it_starts_is_replaced(monkeypatch, capfd):
    forks = hang_at_first(monkeypatch, 1)
    pids = [int(pid) for pid in Loader(ProcessIds(), num_workers=1)]
    assert len(pids) == 8 and len(set(pids)) == 1 and len(forks) == 2
    assert "a data worker that did not start in 0.5 s is replaced" in capfd.readouterr().err


def test_workers_that_never_start_are_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(workers, "MAX_FORKS", 2)
    forks = hang_at_first(monkeypatch, 100)
    with pytest.raises(RuntimeError, match=r"did not start in 0\.5 s, 2 times in a row; try --num_workers 0"):
        iter(Loader(ProcessIds(), num_workers=1))
    assert len(forks) == 2


def test_stop_signals_leave_workers_at_work_and_the_process_unmasked():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    batches = iter(Loader(ProcessIds(), num_workers=1, prefetch_factor=1))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    worker = int(next(batches))
    assert worker != os.getpid()
    for number in STOP_SIGNALS:
        os.kill(worker, number)
    assert [int(pid) for pid in batches] == [worker] * 7


def test_batches_that_fill_shared_memory_are_refused_before_a_worker_starts(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=64_000_000))
    require_shared_memory(0, 10**12)
    require_shared_memory(2, 16_000_000)
    words = r"2 x 2 batches: .* 68 MB do not fit into the 64 MB that are free in /dev/shm.*--shm-size.*--num_workers 0"
    with pytest.raises(RuntimeError, match=words):
        require_shared_memory(2, 17_000_000)


class Stopping(Dataset):
    """Items of which the third stops its worker, in the middle of a file."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        workers.note_file(f"/data/{index}.jpg")
        if index == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        workers.note_file("")
        return index


def test_worker_that_is_stopped_is_named_with_its_file_and_ended():
    loader = Loader(Stopping(), num_workers=2, prefetch_factor=1, timeout_s=1)
    with pytest.raises(DataTimeoutError) as error:
        list(loader)
    pid = loader.notes[0].pid
    words = f"no batch came for 0.0166667 minutes: data worker 0 (process {pid}, stopped) reads /data/2.jpg"
    assert str(error.value) == words
    for child in multiprocessing.active_children():
        child.join(10)
    assert not os.path.exists(f"/proc/{pid}") and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_handler_of_a_signal_may_break_a_wait():
    def interrupt(*_):
        raise WaitInterrupted

    before = signal.signal(signal.SIGUSR2, interrupt)
    try:
        batches = iter(Loader(Stopping(), num_workers=1, prefetch_factor=1, timeout_s=60))
        assert [int(next(batches)) for _ in range(2)] == [0, 1]
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        with pytest.raises(WaitInterrupted):
            next(batches)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


class Refusing(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise DataError("one.jpg is no image")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_error_of_a_data_worker_is_said_in_its_own_words(num_workers):
    with pytest.raises(DataError) as error:
        list(Loader(Refusing(), num_workers=num_workers))
    assert str(error.value) == "one.jpg is no image" and is_explained(error.value)
    for child in multiprocessing.active_children():
        child.join(10)
    assert not multiprocessing.active_children()
