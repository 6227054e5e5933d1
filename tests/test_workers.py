"""Processes that load data: started again where they hang, deaf to the signals that stop a run."""

import os
import shutil
import signal
import time
from multiprocessing.context import ForkProcess
from types import SimpleNamespace

import pytest
from torch.utils.data import Dataset

from storage import workers
from storage.workers import STOP_SIGNALS, Loader, WorkerProcess, require_shared_memory


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
