"""Where a training stands: its epochs, steps, rows, checkpoints and ends. Forward, loss and step stay in the scripts.

    accelerator, start, stepping, workers, loading = open_run(args)
    ...  # data, model, optimizer, accelerator.prepare
    with Run(accelerator, start, args, plan, model=model) as run:
        for epoch in run.epochs():
            for batch in run.batches(loader):  # saves and stops between steps, each when it is time
                ...  # forward, backward, optimizer.step()
                run.add(training_loss=loss)
                if accelerator.sync_gradients:
                    run.finish_step(learning_rate, skipped)
            ...  # evaluate
            run.finish_epoch(figures, save=..., for_good=...)
        run.finish()

Nothing here knows a network, a loss or a data set.
"""

import argparse
import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from storage.files import replace_json
from storage.lists import as_text
from storage.workers import DataTimeoutError
from training.checkpoints import DONE_FILE, Checkpoints, Start, check_weights, open_experiment, resume
from training.flags import micro_batch_size
from training.process import build_accelerator, cap_workers, process_slice
from training.progress import Progress, StepClock
from training.records import BadFiles, SkippedSteps, open_records, peak_memory_gb
from training.signals import FAIL, GO_ON, SAVE, STOP, Interruptions
from training.states import BEST_CHECKPOINT
from training.trackers import note_missing

JUMP = 3  # times the learning rate of the step before, which no schedule makes from its third step on
JUMPS = (
    "jumps from {:.1e} to {:.1e} at step {}, because the schedule is another one than before; --schedule_epochs, with "
    "the --epochs of before, keeps it"
)


class Stopped(Exception):  # noqa: N818 - it is no error
    """Leaves the loop of a run that was asked to stop, with its state saved; `Run` catches it."""


@dataclass(frozen=True)
class Plan:
    """What a run is: how long, over which images, and what makes it this run and no other.

    `sampler` gives `set_epoch`, `steps_per_epoch`, `images_per_step` and `images_of`; `files` are the training images,
    with their `path` and `fingerprint`. `config` is the config.json beside the weights. A state is only gone on from
    where that is equal, and seed, batch, images, and what else a script puts into `identity`. `start_flag` is the
    script's flag that starts a new run from weights, which a refusal names.
    """

    sampler: object
    files: object
    num_epochs: int
    total_steps: int
    config: Mapping
    identity: Mapping
    start_flag: str | None = None


class Opened(NamedTuple):
    """The processes of a run, where it starts, and options: of this one's step sampler, training and eval loaders."""

    accelerator: Accelerator
    start: Start
    stepping: dict[str, int]
    workers: dict[str, int]
    loading: dict[str, int]


def open_run(args: argparse.Namespace) -> Opened:
    """Join the processes, choose what to go on from, seed all generators and choose the kernels."""
    accelerator = build_accelerator(args.gradient_accumulation_steps, timeout_minutes=args.timeout_minutes)
    Image.MAX_IMAGE_PIXELS = args.max_image_pixels
    if accelerator.is_main_process:
        note_missing(args)
    start = open_experiment(accelerator, args)
    set_seed(args.seed)
    if args.deterministic:  # only operations that give the same bits every time; torch raises for the others
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    stepping = dict(rank=accelerator.process_index, world_size=accelerator.num_processes, seed=args.seed)
    stepping |= dict(micro_batch_size=micro_batch_size(args), accumulation_steps=args.gradient_accumulation_steps)
    workers = worker_options(args) | dict(pin_memory=args.pin_memory and accelerator.device.type == "cuda")
    return Opened(accelerator, start, stepping, workers, loading_options(accelerator, args))


def worker_options(args: argparse.Namespace) -> dict[str, float]:
    """Give how many data workers a process has, and how many seconds it waits for them."""
    return dict(num_workers=cap_workers(args.num_workers), timeout_s=60 * args.timeout_minutes)


def loading_options(accelerator: Accelerator, args: argparse.Namespace) -> dict[str, float]:
    """Give this process's options for the loader of an evaluation: batch size, data workers, and its slice."""
    rank, world_size = process_slice(accelerator)
    return dict(batch_size=micro_batch_size(args), rank=rank, world_size=world_size, **worker_options(args))


def open_evaluation(args: argparse.Namespace) -> tuple[Accelerator, dict[str, int]]:
    """Join the processes of an evaluation, which leaves no run; also give the options for its loaders."""
    accelerator = build_accelerator(timeout_minutes=args.timeout_minutes)
    Image.MAX_IMAGE_PIXELS = args.max_image_pixels
    return accelerator, loading_options(accelerator, args)


class Run:
    """The bookkeeping of one training; a context, which closes all that is open however it is left."""

    def __init__(
        self,
        accelerator: Accelerator,
        start: Start,
        args: argparse.Namespace,
        plan: Plan,
        *,
        model: nn.Module,
        average: nn.Module | None = None,
        keeps_best: bool = False,
    ):
        self.accelerator, self.args, self.plan, self.model, self.average = accelerator, args, plan, model, average
        self.experiment = start.experiment
        self.identity = {
            "effective_batch_size": plan.sampler.images_per_step,
            "num_images": len(plan.files),
            "data": plan.files.fingerprint(),
            "seed": args.seed,
            "val_fraction": args.val_fraction,
            **plan.identity,
        }
        state = {"epoch": 0, "step": 0, "row": {}, "best": -1.0}
        if start.resume_from is not None:
            options = dict(average=average, keeps_best=keeps_best, start_flag=plan.start_flag)
            state |= resume(accelerator, start.resume_from, plan.config, self.identity, **options)
            if not (self.experiment / BEST_CHECKPOINT).exists():  # it goes on under another name, without the best
                state["best"] = -1.0
        self.first_epoch = self.epoch = state["epoch"]
        self.step, self.row, self.best = state["step"], state["row"], state["best"]
        self.first_step = self.step
        self.saved_step = self.step  # of the newest state; nothing has to be saved before the first step
        self.bad_files = BadFiles(self.experiment, len(plan.files), args.max_bad_fraction)
        self.log = open_records(accelerator, start, args, self.step)  # from here on there is something to close
        self.skipped_steps = SkippedSteps(self.experiment, self.images_of, args.max_nonfinite_steps)
        self.checkpoints = Checkpoints(accelerator, self.experiment, args.keep_checkpoints)
        self.interruptions = Interruptions(accelerator, self.checkpoints, args.save_minutes, args.timeout_minutes)
        self.progress = Progress(accelerator, plan.num_epochs, plan.total_steps, self.step)
        self.clock = StepClock(self.progress.say)
        self.sums: dict[str, Tensor] = {}  # figures of the step under way, on the device
        self.names: list[str] = []  # of the figures
        self.pending: list[Tensor] = []  # (figures + 1,) of each step since the last row; the last is 1.0 where skipped
        self.learning_rate = state.get("learning_rate", 0.0)  # of the last step
        self.statistics: list[tuple[Tensor, Tensor]] = []  # buffers of the model, and what they were before the step
        self.saved, self.keeps_best = True, keeps_best

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, trace) -> bool:
        # Signals are given back last: a launcher that dies sends one for each of its threads, the last of them late.
        with contextlib.closing(self):
            if kind is not Stopped:
                return False
            self.progress.close()
            stopped = f"by {self.interruptions.name or 'a signal at another process'} at step {self.step}"
            if not self.saved:
                raise OSError(f"stopped {stopped}, but the state could not be saved")
            advice = "the same command, with --resume_from_checkpoint latest, goes on from there"
            self.accelerator.print(f"{'stopped':<16}{stopped}; {advice}")
            self.accelerator.end_training()
            return True

    def close(self) -> None:
        """Close all that is open; a second time, this does nothing."""
        self.progress.close()
        self.log.close()
        self.interruptions.close()

    def images_of(self, step: int) -> list[str]:
        return [as_text(self.plan.files.path(index)) for index in self.plan.sampler.images_of(step)]

    # ---------------------------------------------------------------- the loop

    def epochs(self) -> Iterator[int]:
        """Give the epochs that are left, the first from the step on at which the last start was stopped."""
        for epoch in range(self.first_epoch, self.plan.num_epochs):
            before = epoch * self.plan.sampler.steps_per_epoch
            self.epoch, self.last_step = epoch, min(self.plan.total_steps, before + self.plan.sampler.steps_per_epoch)
            self.plan.sampler.set_epoch(epoch, first_step=self.step - before)
            yield epoch

    def is_due(self, interval: int) -> bool:
        """Say whether what happens every `interval` epochs, and after the last, comes after this one."""
        return (self.epoch + 1) % interval == 0 or self.epoch + 1 == self.plan.num_epochs

    def batches(self, loader: DataLoader, beside: Iterable = ()) -> Iterator:
        """Give the training batches that are left of this epoch; measures the waiting and notes bad files.

        In the first epoch one of `beside` is taken after each, so that its data workers work beside the steps.

        Before each, all processes agree: when it is time, the state of the last complete step is saved, and a run that
        should stop raises Stopped.
        """
        batches, beside = self.clock.watch(loader), iter(beside if self.epoch == 0 else ())
        while self.step < self.last_step:  # else only the evaluation is left
            batch, request = self.interruptions.receive(batches)
            if request == SAVE and (self.sums or self.step == self.saved_step):  # within a step, or nothing new
                request = GO_ON
            if request != GO_ON:
                self.restore_statistics()
                if self.pending:
                    self.row = self.read_row()
                    self.log.write(self.row)
                self.obey(request, self.epoch, {})
            self.keep_statistics()
            self.bad_files.note(batch.bad_files)
            yield batch
            self.interruptions.take(beside)
        while self.interruptions.take(beside) is not None:  # whatever ends it early is agreed on at the next batch
            pass

    def keep_statistics(self) -> None:
        """Remember the model's buffers at the start of a step of several forward passes, each of which changes them."""
        if self.args.gradient_accumulation_steps > 1 and not self.sums:
            self.statistics = [(buffer, buffer.clone()) for buffer in self.model.buffers()]

    def restore_statistics(self) -> None:
        """Undo what the forward passes of a step that is not complete did to the model's buffers."""
        for buffer, before in self.statistics if self.sums else ():
            buffer.copy_(before)

    def add(self, **figures: Tensor) -> None:
        """Add the figures of one forward pass to those of the step; they stay on the device."""
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach() / self.args.gradient_accumulation_steps

    def finish_step(self, learning_rate: float, skipped: Tensor) -> None:
        """Count an optimizer step, and write a row when it is time."""
        self.step += 1
        if self.step == self.first_step + 1 > 2 and 0 < JUMP * self.learning_rate < learning_rate:
            self.progress.say(f"{'learning rate':<16}{JUMPS.format(self.learning_rate, learning_rate, self.step)}")
        self.learning_rate = learning_rate
        self.pending.append(torch.stack([*self.sums.values(), skipped]))
        self.names, self.sums = list(self.sums), {}
        self.progress.update()
        epoch_ends = self.step == self.last_step
        if self.step > 1 and self.step % self.args.log_interval and not epoch_ends:
            return
        self.row = self.read_row()
        if not epoch_ends:  # there the row waits for the evaluation
            self.log.write(self.row)

    def read_row(self) -> dict:
        """Give the log row of the steps since the last one; figures cross to the host here and nowhere else."""
        window = self.accelerator.reduce(torch.stack(self.pending), "mean").cpu()  # (steps, figures + 1)
        self.pending.clear()
        finite = window[:, -1] == 0
        figures = dict(zip(self.names, window[finite, :-1].mean(dim=0).tolist(), strict=True))
        self.skipped_steps.note(self.accelerator, (~finite).tolist(), self.step, self.progress.say)
        row = {
            "step": self.step,
            "epoch": self.step / self.plan.sampler.steps_per_epoch,
            **{name: value if finite.any() else None for name, value in figures.items()},
            "learning_rate": self.learning_rate,
            **self.clock.read(self.accelerator.num_processes),
            "memory_gb": peak_memory_gb(self.accelerator.device),
            "bad_files": self.bad_files.share(self.accelerator, self.progress.say),
            "nonfinite_steps": self.skipped_steps.count,
        }
        self.progress.show(self.epoch, row)
        return row

    # ---------------------------------------------------------------- evaluations and saves

    def watch(self, loader: DataLoader) -> Iterator:
        """Give an evaluation's batches; a run that should stop is saved as it was before, and raises Stopped."""
        images = math.ceil(len(loader.dataset) / process_slice(self.accelerator)[1])  # of the process with most
        batches = iter(loader)
        for _ in range(math.ceil(images / loader.batch_size)):
            batch, request = self.interruptions.receive(batches)
            if request >= STOP:
                self.obey(request, self.epoch, self.row)
            if batch is not None:  # else this process has one less
                self.bad_files.note(batch.bad_files)
                yield batch

    def check_weights(self) -> None:
        check_weights(self.accelerator, self.model, self.experiment, self.step)

    def keep_best(self, model: nn.Module, figure: float, record: Mapping) -> bool:
        """Write weights into best_checkpoint/ where their figure is higher than all before; True where they were."""
        config = {**self.plan.config, **record}
        if figure <= self.best or not self.checkpoints.save_weights(model, BEST_CHECKPOINT, config):
            return False
        self.best = figure
        return True

    def keep_picture(self, name: str, picture: Image.Image | None) -> None:
        """Save a picture of this epoch, from the main process, and hand it to the tracker; others may have none."""
        if self.accelerator.is_main_process and picture is not None:
            self.log.picture(name, self.epoch + 1, picture, self.step)

    def keep_table(self, name: str, rows: Iterable[Iterable[object]]) -> None:
        """Save a table of this epoch, from the main process."""
        if self.accelerator.is_main_process:
            self.log.table(name, self.epoch + 1, rows)

    def finish_epoch(self, figures: Mapping, *, save: bool, for_good: bool) -> None:
        """Write the epoch's row with the figures of its evaluation, and its checkpoint; may raise Stopped."""
        bad_files = self.bad_files.share(self.accelerator, self.progress.say)  # with those that the evaluation met
        self.log.write({**self.row, **figures, "bad_files": bad_files})
        request = self.interruptions.agree()
        if request == STOP and self.step == self.plan.total_steps:  # nothing is left to stop
            request = SAVE
        request = max(request, SAVE if save else GO_ON)
        self.obey(request, self.epoch + 1, {}, epoch_ends=True, for_good=for_good)
        best = self.best if self.keeps_best and self.best >= 0 else None
        saved_as = f"checkpoint_{self.epoch + 1}" if request != GO_ON and self.saved else None
        self.progress.end_epoch(self.epoch, self.row, figures, best, saved_as)
        self.clock.restart()

    def obey(self, request: int, epoch: int, row: Mapping, **how: bool) -> None:
        """Do what the processes agreed on: save after `epoch` complete epochs, then raise where the run should end.

        `row` is one that waits for its evaluation. Stopped, or DataTimeoutError where the data of any process does not
        come.
        """
        if request != GO_ON and (how or self.step != self.saved_step):
            self.save(epoch, row, **how)
            self.clock.restart()
        if request == FAIL:
            failure = next(filter(None, gather_object([self.interruptions.failure])))
            advice = "--resume_from_checkpoint latest goes on from it" if self.saved else "but could not be saved"
            raise DataTimeoutError(f"{failure} (--timeout_minutes). The run is at step {self.step}; {advice}")
        if request == STOP:
            raise Stopped

    def save(self, epoch: int, row: Mapping, **how: bool) -> None:
        state = {**self.identity, "epoch": epoch, "step": self.step, "best": self.best, "row": row}
        state["learning_rate"] = self.learning_rate
        self.saved = self.checkpoints.save(self.model, self.plan.config, state, average=self.average, **how)
        if self.saved:
            self.saved_step = self.step

    def finish(self) -> None:
        """Close all, and leave DONE; AssertionError or OSError where the run is not complete."""
        self.close()
        if self.step != self.plan.total_steps:
            raise AssertionError(
                f"{self.step} optimizer steps were made instead of {self.plan.total_steps}: a bug, please report it"
            )
        if not self.saved:
            raise OSError("the last checkpoint could not be written; make room for it and go on with the same command")
        if self.accelerator.is_main_process:
            replace_json(self.experiment / DONE_FILE, {"step": self.step})
