"""Interruptions: signals and the clock, turned into one answer that all processes share.

What is saved then, and where the loop stops, is known to run.py.
"""

import datetime
import os
import signal
import time

import torch
from accelerate import Accelerator

from storage.workers import STOP_SIGNALS
from training.checkpoints import Checkpoints

GO_ON, SAVE, STOP = 0, 1, 2
ONE_REQUEST_S = 3  # signals this close together are one request: a scheduler and a launcher both pass it on


class Interruptions:
    """Turn signals and the clock into one answer for all processes: go on, save, or save and stop.

    SIGTERM, SIGINT or SIGUSR1 at any one process stops all of them at the same optimizer step. A further signal,
    seconds later, ends its process at once.
    """

    def __init__(
        self, accelerator: Accelerator, checkpoints: Checkpoints, save_minutes: float, timeout_minutes: float = 30
    ):
        self.accelerator, self.checkpoints, self.save_minutes = accelerator, checkpoints, save_minutes
        self.name, self.asked_at, self.launcher = None, 0.0, os.getppid()
        # The processes ask each other over a group of their own on the CPU, so that no step waits for a GPU. It has to
        # be told how long to wait for a process that hangs; it does not take that from the other group.
        timeout = datetime.timedelta(minutes=timeout_minutes)
        several = accelerator.num_processes > 1
        self.group = torch.distributed.new_group(backend="gloo", timeout=timeout) if several else None
        self.handlers = {number: signal.signal(number, self.handle) for number in STOP_SIGNALS}

    def handle(self, number: int, frame) -> None:
        if self.name is None:
            self.name, self.asked_at = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self.asked_at > ONE_REQUEST_S and os.getppid() == self.launcher:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agree(self) -> int:
        """Give GO_ON, SAVE or STOP, the same on every process; each calls this after every optimizer step."""
        waited_s = time.monotonic() - self.checkpoints.saved_at
        due = self.accelerator.is_main_process and 0 < 60 * self.save_minutes <= waited_s
        wanted = STOP if self.name else SAVE if due else GO_ON
        if self.group is None:
            return wanted
        answer = torch.tensor([wanted])
        torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MAX, self.group)
        return int(answer)

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
