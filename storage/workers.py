"""Processes that load data, and the signals that they leave to the process that trains.

What is loaded is described in dataset.py; how a run stops at a signal, in training/signals.py.
"""

import atexit
import functools
import multiprocessing
import os
import signal
import sys
from multiprocessing.context import ForkContext, ForkProcess

import torch
from torch import Tensor
from torch.utils.data import DataLoader

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # at which a run saves its state and stops
WORKER_START_S = 30  # a fork takes milliseconds
MAX_FORKS = 5


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


def protect_worker(leaving: Tensor, worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if leaving.item() else None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
