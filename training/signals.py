"""Interruptions: signals and the clock, agreed on by all processes."""

import math
import os
import signal
import time
from collections.abc import Iterator

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from storage.workers import STOP_SIGNALS
from training.checkpoints import Checkpoints
from training.process import process_slice
from training.records import RunLog

GO_ON, SAVE, STOP = 0, 1, 2


ONE_REQUEST_S = 3  # signals this close together are one request: a scheduler and a launcher both pass it on


class Interrupted(Exception):  # noqa: N818 - it is no error
    """Leaves an evaluation because the run is asked to stop."""


class Interruptions:
    """Turn signals and the clock into one answer for all processes: go on, save, or save and stop.

    SIGTERM, SIGINT or SIGUSR1 at any one process stops all of them at the same optimizer step. A further signal,
    seconds later, ends its process at once.
    """

    def __init__(self, accelerator: Accelerator, checkpoints: Checkpoints, save_minutes: float):
        self.accelerator, self.checkpoints, self.save_minutes = accelerator, checkpoints, save_minutes
        self.name, self.asked_at, self.launcher = None, 0.0, os.getppid()
        self.answer: tuple[Tensor, torch.distributed.Work] | None = None  # of the question before, on its way
        # The processes ask each other over a group of their own on the CPU, so that no step waits for a GPU.
        self.group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self.handlers = {number: signal.signal(number, self.handle) for number in STOP_SIGNALS}

    def handle(self, number: int, frame) -> None:
        if self.name is None:
            self.name, self.asked_at = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self.asked_at > ONE_REQUEST_S and os.getppid() == self.launcher:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agree(self) -> int:
        """Give GO_ON, SAVE or STOP, the same on every process; each calls this after every optimizer step.

        With several processes the answer is to the question of the call before: nobody waits for it.
        """
        waited_s = time.monotonic() - self.checkpoints.saved_at
        due = self.accelerator.is_main_process and 0 < 60 * self.save_minutes <= waited_s
        wanted = STOP if self.name else SAVE if due else GO_ON
        if self.group is None:
            return wanted
        flag = torch.tensor([wanted])
        work = torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, self.group, async_op=True)
        before, self.answer = self.answer, (flag, work)
        if before is None:
            return GO_ON
        before[1].wait()
        return int(before[0])

    def watch(self, loader: DataLoader) -> Iterator:
        """Iterate over an evaluation's loader; raises Interrupted on every process when the run is to stop."""
        share = len(loader.dataset) // process_slice(self.accelerator)[1]
        asked = math.ceil(share / loader.batch_size)  # batches that every process has
        for index, batch in enumerate(loader):
            if index < asked and self.agree() == STOP:
                raise Interrupted
            yield batch

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def leave(self, log: RunLog, bar: tqdm, saved: bool, step: int) -> None:
        """Say how to go on, and close what is open; OSError when the state could not be saved."""
        bar.close()
        log.close()
        self.close()
        reason = self.name or "a signal at another process"
        if not saved:
            raise OSError(f"stopped by {reason} at step {step}, but the state could not be saved")
        self.accelerator.print(
            f"{'stopped':<16}by {reason} at step {step}; the same command, with "
            "--resume_from_checkpoint latest, goes on from there"
        )
        self.accelerator.end_training()
