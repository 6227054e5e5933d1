"""Processes that load data, and the signals that they leave to the process that trains.

What is loaded is described in dataset.py; how a run stops at a signal, in training/signals.py.
"""

import atexit
import functools
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkContext, ForkProcess

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # at which a run saves its state and stops
WORKER_START_S = 30  # a fork takes milliseconds
MAX_FORKS = 5
SHARED_MEMORY = "/dev/shm"
PREFETCHED = 2  # batches that each worker holds ready, torch's default


class WorkerProcess(ForkProcess):
    """A forked data worker that is killed and forked again where it does not start; RuntimeError after `MAX_FORKS`.

    A child of a process with threads may have a lock that another thread held at that moment, and that nobody will
    ever release. Earlier releases of Python 3.11 have one that the threads of gloo take
    (github.com/python/cpython/issues/112275).
    Worth 2 hangs in about 290 runs of two processes, seen on Python 3.11.7, to everybody who trains on several GPUs.
    """

    def run(self) -> None:
        self.came_up.send(True)
        super().run()

    @staticmethod
    def _Popen(process: "WorkerProcess"):  # noqa: N802, what multiprocessing calls to fork
        for _ in range(MAX_FORKS):
            receiver, process.came_up = multiprocessing.Pipe(duplex=False)
            child = ForkProcess._Popen(process)
            process.came_up.close()  # the child has the other end; when it dies, the wait is over as well
            with receiver:
                if receiver.poll(WORKER_START_S):
                    return child
            child.kill()
            child.wait()
            child.close()
            print(f"a data worker that did not start in {WORKER_START_S} s is replaced", file=sys.stderr)
        raise RuntimeError(
            f"a data worker did not start in {WORKER_START_S} s, {MAX_FORKS} times in a row; try --num_workers 0"
        )


class WorkerContext(ForkContext):
    Process = WorkerProcess


class Loader(DataLoader):
    """A DataLoader whose workers leave STOP_SIGNALS to the process that trains, and end with it.

    A scheduler and a terminal signal every process of a job. A worker that obeyed would take the training process
    down, which then could not save. So workers start with these signals blocked, until they have their own handlers.
    Worth the checkpoint to everybody whose runs are stopped: 36 of 36 were written at a SIGTERM, without this 0 of 8.
    """

    def __init__(self, *args, **options):
        leaving = torch.zeros(1).share_memory_()  # 1 when this process is at its end; its workers see it
        atexit.register(leaving.fill_, 1)  # before multiprocessing sends the workers SIGTERM and waits for them
        if sys.platform == "linux" and options["num_workers"] > 0:
            options["multiprocessing_context"] = WorkerContext()
        super().__init__(*args, worker_init_fn=functools.partial(protect_worker, leaving), **options)

    def __iter__(self):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors, in a data worker right in the shared memory by which they go to the training process.

    Otherwise they are put there by a thread of the worker whose error nobody sees, and the run waits for ever.
    """
    try:
        return default_collate(tensors)
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        raise RuntimeError(describe_shared_memory(sum(tensor.nbytes for tensor in tensors))) from error


def describe_shared_memory(needed: int) -> str:
    """Say that batches do not fit into shared memory, and what to do."""
    free = shutil.disk_usage(SHARED_MEMORY).free
    return (
        f"data workers hand batches over in shared memory, and {needed / 1e6:,.0f} MB do not fit into the "
        f"{free / 1e6:,.0f} MB that are free in {SHARED_MEMORY}. Give a container more (docker run --shm-size=8g or "
        "--ipc=host), or --num_workers 0, or a smaller --per_gpu_batch_size"
    )


def require_shared_memory(num_workers: int, batch_bytes: int) -> None:
    """Refuse batches that fill shared memory before data workers start; RuntimeError."""
    needed = num_workers * PREFETCHED * batch_bytes
    if num_workers and os.path.isdir(SHARED_MEMORY) and needed > shutil.disk_usage(SHARED_MEMORY).free:
        raise RuntimeError(f"{num_workers} x {PREFETCHED} batches: {describe_shared_memory(needed)}")


def protect_worker(leaving: Tensor, worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if leaving.item() else None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
