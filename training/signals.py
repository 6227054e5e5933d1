"""Interruptions: signals, the clock and data that does not come, turned into one answer that all processes share.

What is saved then, and where the loop stops, is known to run.py.
"""

import datetime
import os
import signal
import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator

from storage.workers import STOP_SIGNALS, DataTimeoutError, WaitInterrupted
from training.checkpoints import Checkpoints

GO_ON, SAVE, STOP, FAIL = range(4)
ONE_REQUEST_S = 3  # signals this close together are one request: a scheduler and a launcher both pass it on
# How long a process waits for another, in times of how long that one may wait for its data
PATIENCE = 1.5


class Interruptions:
    """Turn signals and the clock into one answer for all processes: go on, save, save and stop, or save and fail.

    Any of STOP_SIGNALS at any one process stops all of them at the same optimizer step. A further signal, seconds
    later, ends its process at once. Every process calls the methods.
    """

    def __init__(
        self, accelerator: Accelerator, checkpoints: Checkpoints, save_minutes: float, timeout_minutes: float = 30
    ):
        self.accelerator, self.checkpoints, self.save_minutes = accelerator, checkpoints, save_minutes
        self.name, self.asked_at, self.launcher = None, 0.0, os.getppid()
        self.waiting, self.failure = False, ""
        # The processes ask each other over a group of their own on the CPU, so that no step waits for a GPU. It has to
        # be told how long to wait for a process that hangs; it does not take that from the other group.
        timeout = datetime.timedelta(minutes=PATIENCE * timeout_minutes)
        several = accelerator.num_processes > 1
        self.group = torch.distributed.new_group(backend="gloo", timeout=timeout) if several else None
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # a terminal that closes should not stop this run
        numbers = [number for number in STOP_SIGNALS if not (nohup and number == signal.SIGHUP)]
        self.handlers = {number: signal.signal(number, self.handle) for number in numbers}

    def handle(self, number: int, frame) -> None:
        if self.name is None:
            self.name, self.asked_at = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self.asked_at > ONE_REQUEST_S and os.getppid() == self.launcher:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self.waiting:
            self.waiting = False
            raise WaitInterrupted

    def receive(self, batches: Iterator) -> tuple[object, int]:
        """Wait for the next batch, None after the last or in a stop, and agree on what to do before it is used.

        Nobody waits in a forward or backward pass for a process whose data does not come: all wait here, where a
        signal ends it.
        """
        return self.take(batches), self.agree()

    def take(self, batches: Iterator) -> object:
        """Wait for the next batch of this process alone, None after the last; in a stop or failure None at once."""
        try:
            try:
                self.waiting = True
                if self.name is None and not self.failure:
                    return next(batches, None)
            finally:
                self.waiting = False
        except WaitInterrupted:
            pass  # the others learn of it by the answer
        except DataTimeoutError as error:
            self.failure = f"process {self.accelerator.process_index}: {error}"
        return None

    def agree(self) -> int:
        """Give GO_ON, SAVE, STOP or FAIL, the highest that any process wants."""
        waited_s = time.monotonic() - self.checkpoints.saved_at
        due = self.accelerator.is_main_process and 0 < 60 * self.save_minutes <= waited_s
        wanted = FAIL if self.failure else STOP if self.name else SAVE if due else GO_ON
        if self.group is None:
            return wanted
        answer = torch.tensor([wanted])
        torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MAX, self.group)
        return int(answer)

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
