"""Processes that load data: how they start, are waited for and end, and the signals that they leave to the trainer.

What is loaded is described in dataset.py; how a run stops at a signal, in training/signals.py.
"""

import atexit
import ctypes
import functools
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.sharedctypes import RawArray
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader, default_collate

PR_SET_PDEATHSIG = 1  # of Linux' prctl
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # at which a run saves and stops
WORKER_START_S = 30  # a fork takes milliseconds
MAX_FORKS = 5
SHARED_MEMORY = "/dev/shm"
PREFETCHED = 2  # batches that each worker holds ready, torch's default
PROCESS_STATES = {"T": "stopped", "D": "waiting for a disk"}  # of Linux, in which a worker may stay for ever


class DataTimeoutError(TimeoutError):
    """No batch came in time; names the data workers that may be to blame, and their files."""


class WaitInterrupted(Exception):  # noqa: N818 - it is no error
    """Breaks off the wait for a batch, from the handler of a signal."""


class Note(ctypes.Structure):
    """What a data worker tells the process that trains, in shared memory: who it is, and the file that it reads."""

    _fields_ = [("pid", ctypes.c_int), ("file", ctypes.c_char * 4096)]


def end_with_parent() -> None:
    """Let Linux send SIGTERM to this process when its parent ends, however that ends; elsewhere this does nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


own_note: Note | None = None  # of this process, where it is a data worker


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
    """A DataLoader whose workers leave STOP_SIGNALS to the process that trains, end with it, and cannot hang it.

    DataTimeoutError after `timeout_s` seconds without a batch; 0 waits for ever. A handler of a signal may raise
    WaitInterrupted within a wait. These, and an error of a worker, end all loading of the process.

    A scheduler and a terminal signal every process of a job. A worker that obeyed would take the training process
    down, which then could not save. So workers start with these signals blocked, until they ignore them.
    Worth the checkpoint to everybody whose runs are stopped: 36 of 36 were written at a SIGTERM, without this 0 of 8.
    """

    def __init__(self, *args, num_workers: int, timeout_s: float = 0, **options):
        atexit.register(kill_workers)
        if sys.platform == "linux" and num_workers > 0:
            options["multiprocessing_context"] = WorkerContext()
        self.timeout_s, self.notes = timeout_s, RawArray(Note, num_workers)
        options["worker_init_fn"] = functools.partial(begin_work, self.notes)
        super().__init__(*args, num_workers=num_workers, **options)

    def __iter__(self) -> Iterator:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self.wait_for(batches) if self.num_workers else batches

    def wait_for(self, batches: Iterator) -> Iterator:
        # Torch's own timeout covers the queue, not what follows: the worker itself hands over the memory of a batch
        while True:
            before, came = signal.signal(signal.SIGALRM, self.give_up), False
            try:
                signal.setitimer(signal.ITIMER_REAL, self.timeout_s)
                try:
                    batch, came = next(batches, None), True
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    signal.signal(signal.SIGALRM, before)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)  # where WaitInterrupted came before the one above
                if not came:  # an error of a worker as well: it would outlive its loader, as it ignores SIGTERM
                    kill_workers()
            if batch is None:
                return
            yield batch

    def give_up(self, number: int, frame) -> None:
        raise DataTimeoutError(self.describe_wait())

    def describe_wait(self) -> str:
        """Say which workers are stopped or in the middle of a file."""
        found = []
        for worker, note in enumerate(self.notes):
            state, file = state_of(note.pid), os.fsdecode(note.file)
            if state or file:
                doing = f"reads {file}" if file else "waits"
                found.append(f"data worker {worker} (process {note.pid}{', ' + state if state else ''}) {doing}")
        return f"no batch came for {self.timeout_s / 60:g} minutes: {'; '.join(found) or 'no worker reads a file'}"


def state_of(pid: int) -> str | None:
    """Say in which state a process is that may last for ever; None where it is in no such state, or nobody knows."""
    try:
        return PROCESS_STATES.get(Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0])
    except (OSError, IndexError):  # no Linux, or it has ended
        return None


def note_file(path: str) -> None:
    """Tell the process that trains which file this data worker reads; "" for none."""
    if own_note is not None:
        own_note.file = os.fsencode(path)[:4095]


def begin_work(notes: Sequence[Note], worker: int) -> None:
    """Make this process a data worker."""
    global own_note
    own_note = notes[worker]
    own_note.pid, own_note.file = os.getpid(), b""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def kill_workers() -> None:
    """End the data workers of a process that loads no more; one that is stopped or waits for a disk obeys nothing else.

    multiprocessing would send them SIGTERM and wait for ever, as would torch for the thread that pins memory.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


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
