"""What --check measures before a training, in two minutes at most: data, forward passes, steps, evaluation, save.

`Check` takes the place of `Run` in a script, whose own loop it times, and like `Run` knows no network and no loss. The
weights that come of it are thrown away, and nothing is written into the experiment's folder. What follows from the
figures is worked out in advice.py.
"""

import argparse
import itertools
import math
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from storage.inspection import decode_some, find_bad_heads, read_cold, resize_batch
from storage.workers import PREFETCHED, Loader
from training.advice import FEWEST_COLD, Findings, Pass, advise, candidates, count_due, describe_data, extend
from training.checkpoints import Start, time_save
from training.data import print_lines
from training.memory import free_bytes, has_room
from training.process import cap_workers, process_slice
from training.progress import StepClock
from training.records import BadFiles, peak_memory_gb
from training.states import read_state

LIMIT_S = dict(disk=8, heads=8, decoding=15, passes=30, steps=30, evaluation=12)  # of each measurement, in their order
SAMPLE = 1000  # images at most that are read from the disk, and that are decoded
PIECE = 16  # images, about, that are decoded between two looks at the clock
WARMUP_STEPS, FEWEST_STEPS = 2, 3
FEWEST_ROUNDS, MOST_ROUNDS, ENOUGH_S = 3, 9, 1.0  # in which a pass of one size is repeated; the first does not count


class Measured(Exception):  # noqa: N818 - it is no error
    """Leaves the loop of a script once all is measured; `Check` catches it."""


class Check:
    """A stand-in for `Run` that lets a script make some steps and some of an evaluation, and says what to expect.

    Every process measures at the same time, as they share cores and disk; the slowest counts.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        start: Start,
        args: argparse.Namespace,
        plan,
        *,
        model: nn.Module,
        average: nn.Module | None = None,
        keeps_best: bool = False,
    ):
        self.accelerator, self.args, self.plan, self.model, self.average = accelerator, args, plan, model, average
        self.state = read_state(start.resume_from) if start.resume_from else {"epoch": 0, "step": 0}
        self.step, self.device, self.began = self.state["step"], accelerator.device, time.monotonic()
        self.bad_files = BadFiles(start.experiment, len(plan.files), args.max_bad_fraction)
        self.intervals: list[int] = []  # in epochs, that the script asks for; first that of its evaluations
        images = plan.sampler.micro_batch_size
        self.found = Findings(
            batch=images * args.gradient_accumulation_steps,
            images=images,
            threads=torch.get_num_threads() if self.device.type == "cpu" else 1,
            cores=cap_workers(1 << 16),
            steps=plan.total_steps - self.step,
            keeps_pass=any(isinstance(module, _BatchNorm) for module in model.modules()),
        )

    def __enter__(self) -> "Check":
        return self

    def __exit__(self, kind, error, trace) -> bool:
        measured = kind is Measured or (kind is torch.OutOfMemoryError and len(self.found.passes) > 0)
        if measured:
            print_lines(self.accelerator, self.report())
            self.accelerator.end_training()
        return measured

    # ---------------------------------------------------------------- what a script calls

    def epochs(self) -> Iterator[int]:
        yield self.state["epoch"]

    def batches(self, loader: Loader, beside: Iterable = ()) -> Iterator:
        """Give batches of several sizes, then those of the run, and take the time until the next one is asked for.

        What goes `beside` them in a run is left out.
        """
        self.found.workers, crops = loader.num_workers, getattr(self.plan.sampler, "crops_per_image", 1)
        part = math.lcm(crops, 2) if self.found.images % math.lcm(crops, 2) == 0 else crops  # pairs are mixed
        self.look_at_files()
        self.decoded = decode_some(loader, self.keys(), part * max(1, PIECE // part), SAMPLE, LIMIT_S["decoding"])
        self.bad_files.note(self.decoded.bad_files)
        self.found.image_s = self.slowest(self.decoded.seconds / self.decoded.count)
        yield from self.time_passes(self.decoded.batch, part)
        yield from self.time_steps(loader)
        work, keep = Path(self.args.working_directory), self.args.keep_checkpoints
        self.found.save_s = self.slowest(
            time_save(self.accelerator, work, keep, self.model, self.plan.config, self.average)
        )

    def watch(self, loader: Loader) -> Iterator:
        """Give some batches of an evaluation, work out how long all of them would take, and leave it."""
        images, seen = math.ceil(len(loader.dataset) / process_slice(self.accelerator)[1]), 0
        size = self.found.passes[-1].images
        if self.found.live_s is None and size < loader.batch_size:  # which would take too long
            options = {name: getattr(loader, name) for name in ("sampler", "collate_fn", "num_workers", "timeout_s")}
            loader = Loader(loader.dataset, batch_size=size, generator=torch.Generator(), **options)
        batches, began, first = iter(loader), time.perf_counter(), None
        for _ in range(math.ceil(images / loader.batch_size)):
            if (batch := next(batches, None)) is not None:  # else this process has one less
                yield batch
                seen += len(batch.images)
            elapsed = time.perf_counter() - began
            first = first or (elapsed, seen)  # in which the data workers start
            if self.agree(elapsed > LIMIT_S["evaluation"]):
                break
        rate = (elapsed - first[0]) / (seen - first[1]) if seen > first[1] else elapsed / max(1, seen)
        models = 1 if self.average is None else 2
        self.found.evaluation_s = models * self.slowest(elapsed + (images - seen) * rate)
        raise Measured

    def is_due(self, interval: int) -> bool:
        self.intervals.append(interval)
        return True

    def finish_epoch(self, figures: object, *, save: bool, for_good: bool) -> None:
        raise Measured  # there is no evaluation

    def keep_nothing(self, *args: object, **figures: object) -> None:
        """Pass over what a run would keep."""

    add = finish_step = check_weights = keep_picture = keep_nothing

    # ---------------------------------------------------------------- measuring

    def agree(self, over: bool) -> bool:
        """Tell whether it is over at any process: then it is at all."""
        return any(gather_object([over]))

    def slowest(self, seconds: float) -> float:
        return max(gather_object([seconds]))

    def now(self) -> float:
        """Give seconds, once the device has done what it was told."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def keys(self) -> Iterator:
        """Give the keys of this process's samples, epoch after epoch."""
        for epoch in itertools.count():
            self.plan.sampler.set_epoch(epoch)
            yield from itertools.chain.from_iterable(self.plan.sampler)

    def look_at_files(self) -> None:
        """Read the first images of the run from the disk, and the heads of as many others as there is time for.

        Shards that are elsewhere are left there.
        """
        files, rank, world_size = self.plan.files, self.accelerator.process_index, self.accelerator.num_processes
        first = dict.fromkeys(key.index % len(files) for key in itertools.islice(self.keys(), SAMPLE))
        self.disk, self.heads = read_cold(files, first, LIMIT_S["disk"]), 0
        if files.shards is None:
            order = np.random.default_rng(0).permutation(len(files))[rank::world_size].tolist()
            kind = self.args.input_channels, self.args.value_range is not None
            self.heads, bad = find_bad_heads(files, order, LIMIT_S["heads"], *kind)
            self.bad_files.note(bad.items())

    def time_passes(self, pool: tuple, part: int) -> Iterator:
        """Give batches of growing size, each several times, as long as time and memory suffice."""
        found, depth, began = self.found, min(2, self.args.gradient_accumulation_steps), time.perf_counter()
        self.accelerator.gradient_accumulation_steps = depth  # two tell passes that accumulate from those that update
        compiled = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO") != "NO"  # anew for every size, in minutes
        sizes = candidates(found.batch, found.images, part)
        for images in [found.images] if compiled else [n for n in sizes if n > 1 or not found.keeps_pass]:
            if found.passes:
                expected, left = extend(found.passes, images), LIMIT_S["passes"] - (time.perf_counter() - began)
                too_long = FEWEST_ROUNDS * expected.step_s(depth * images) > left
                if self.agree(too_long or not has_room(self.device, expected.memory_gb, peak_memory_gb(self.device))):
                    return
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            batch, rounds, over = resize_batch(pool, images), [], False
            self.accelerator.step = 0
            while not over:
                rounds.append([])
                for _ in range(depth):
                    asked = self.now()
                    yield batch
                    rounds[-1].append(self.now() - asked)
                enough = np.sum(rounds) > ENOUGH_S or len(rounds) == MOST_ROUNDS
                late = time.perf_counter() - began > LIMIT_S["passes"]
                over = self.agree(late or (len(rounds) >= FEWEST_ROUNDS and enough))
            seconds = [self.slowest(statistics.median(s)) for s in zip(*(rounds[1:] or rounds), strict=True)]
            found.passes.append(Pass(images, seconds[0], seconds[-1], self.slowest(peak_memory_gb(self.device))))
            found.given = found.passes[-1] if images == found.images else found.given

    def time_steps(self, loader: Loader) -> Iterator:
        """Give the batches that the run would have, from its own data workers, and take the time of its steps."""
        found, depth, steps, clock = self.found, self.args.gradient_accumulation_steps, -WARMUP_STEPS, StepClock()
        expected = extend(found.passes, found.images)
        if not self.agree(not has_room(self.device, expected.memory_gb, peak_memory_gb(self.device))):
            found.given = expected
        too_long = (WARMUP_STEPS + FEWEST_STEPS) * expected.step_s(found.batch) > LIMIT_S["steps"]
        if found.given is None or self.agree(too_long):
            return
        self.accelerator.gradient_accumulation_steps, self.accelerator.step, began = depth, 0, time.perf_counter()
        for epoch in itertools.count():
            self.plan.sampler.set_epoch(epoch)
            for number, batch in enumerate(clock.watch(loader), 1):
                self.bad_files.note(batch.bad_files)
                yield batch
                if number % depth:
                    continue
                steps += 1
                over = self.agree(steps >= FEWEST_STEPS and time.perf_counter() - began > LIMIT_S["steps"])
                if steps == 0 or over:
                    self.now()
                if steps == 0:
                    clock.restart()
                if over:
                    live_s = found.batch / clock.read(1)["images_per_second"]
                    if steps * depth < 4 * PREFETCHED * found.workers:  # much had been decoded before
                        live_s = max(live_s, found.batch * found.image_s / found.workers)
                    found.live_s = self.slowest(live_s)
                    return

    def report(self) -> dict[str, str]:
        """Put together what all processes found, and what follows from it."""
        bad = {path: reason for new in gather_object([self.bad_files.new]) for path, reason in new.items()}
        counts = [sum(gather_object([count])) for count in (self.heads, self.decoded.count)]
        disks, found = gather_object([self.disk]), self.found
        disk = None if None in disks else max(disks, key=lambda reads: reads.seconds / max(1, reads.cold_bytes))
        span = self.state["epoch"], self.plan.num_epochs
        found.evaluations = count_due(*span, self.intervals[:1]) if found.evaluation_s else 0
        found.saves = count_due(*span, self.intervals)
        total, free = len(self.plan.files), free_bytes(torch.device("cpu"))
        if disk is not None and disk.cold >= FEWEST_COLD and disk.size_of(total) > free:  # every epoch reads the disk
            found.image_s += disk.seconds / disk.cold
        lines = {"check": f"{time.monotonic() - self.began:.0f} s; nothing is kept of it"}
        return lines | describe_data(total, *counts, bad, self.args.max_bad_fraction, disk, free) | advise(found)
