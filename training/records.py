"""What a run writes down and says: arguments, log, progress bar, bad files, skipped steps.

Everything here but the folder's lock is for people: what cannot be written costs a message, never the run.
"""

import argparse
import json
import resource
import stat
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TextIO

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from storage.files import (
    append_lines,
    escape,
    hold,
    optional_write,
    read_bytes,
    read_json,
    read_optional,
    rename_aside,
    rename_irregular,
    replace_json,
    write_rows,
    written_whole,
)
from storage.lists import as_text
from training.checkpoints import Start, advise_on_nonfinite, take_over
from training.differences import find_differences
from training.logs import cut_rows
from training.process import cap_workers, describe_environment
from training.progress import say
from training.trackers import finish_trackers, start_trackers

MAX_SHOWN = 500  # characters of a flag's value
# ------------------------------------------------------------------------------------------------ the folder


def lock_experiment(experiment: Path) -> TextIO:
    """Hold the experiment's folder while this process lives and has the file open; BlockingIOError if another does."""
    experiment.mkdir(parents=True, exist_ok=True)
    rename_irregular(experiment / ".lock")
    try:
        return hold(experiment / ".lock")
    except BlockingIOError as error:
        raise BlockingIOError(f"another run is training in {experiment}; choose another --experiment_name") from error


def write_args(
    experiment: Path, args: argparse.Namespace, resumed_from: Path | None, environment: Mapping[str, str] | None = None
) -> list[str]:
    """Write args.json; a resume keeps the first file and adds its own. Give the flags that differ from the first."""
    texts = {name: as_text(value) for name, value in vars(args).items() if isinstance(value, str)}
    before = flags = json.loads(json.dumps(vars(args) | texts | {"environment": environment}))
    file = experiment / "args.json"
    if resumed_from is not None and (first := read_optional(file, read_json)) is not None:
        before, file = first, experiment / f"args_from_{resumed_from.name}.json"
    with optional_write(file):
        rename_aside(file)
        replace_json(file, flags)
    return [
        f"--{name} {show(new)} (was {show(old)})"
        for name, old, new in sorted(find_differences(before, flags))
        if name in flags.keys() & before.keys() and name not in ("resume_from_checkpoint", "changed_flags")
    ]


def show(value: object) -> str:
    return escape(str(value), also_bytes=True)[:MAX_SHOWN]


def open_records(accelerator: Accelerator, start: Start, args: argparse.Namespace, step: int) -> "RunLog":
    """Hold the experiment's folder for this run, write its arguments, and open its log; every process calls this.

    BlockingIOError when another run holds the folder, until its log is closed, or has written since this one looked.
    """
    experiment, resume_from, lock = start.experiment, start.resume_from, None
    if accelerator.is_main_process:
        lock = lock_experiment(experiment)
        take_over(start)
        changes = write_args(experiment, args, resume_from, describe_environment(accelerator))
        origin = f"from {resume_from.name} on" if resume_from else "from the start"
        print(f"{'experiment':<16}{experiment}, {origin}", flush=True)
        if changes:
            print(f"{'changed':<16}since the first start: {', '.join(changes)}", flush=True)
    accelerator.wait_for_everyone()
    log = RunLog(experiment, enabled=accelerator.is_main_process, resumed_step=step if resume_from else None, lock=lock)
    if accelerator.is_main_process:
        log.start_trackers(args)
    return log


def describe_run(
    accelerator: Accelerator, args: argparse.Namespace, sampler, files, held_out, lines: Mapping[str, str]
) -> None:
    """Print what decides the result, before any long work: a script's own lines, and those that every run has.

    `files` and `held_out` describe themselves; without `held_out` nothing is evaluated.
    """
    capped = cap_workers(args.num_workers)
    workers = f"{capped} data workers"
    if capped < args.num_workers:
        workers += f" (of --num_workers {args.num_workers}, as there are no more cores)"
    common = {
        "training": files.describe(),
        "held out": held_out.describe() if held_out else "none: no train/ with val/, and no --val_fraction",
        "effective batch": f"{sampler.images_per_step} = {accelerator.num_processes} processes x "
        f"{args.gradient_accumulation_steps} forward passes x {sampler.micro_batch_size} images",
        "schedule": f"{args.epochs} epochs of {sampler.steps_per_epoch:,} steps, warmup {args.warmup_epochs} epochs",
        "runs on": f"{accelerator.num_processes} x {accelerator.device.type}, precision {accelerator.mixed_precision}, "
        f"{torch.get_num_threads()} CPU threads and {workers} each, torch {torch.__version__}, timm {timm.__version__}",
    }
    if len(files) < sampler.images_per_step:
        common["note"] = (
            f"{len(files):,} images do not fill one step of {sampler.images_per_step}, so an epoch repeats some; a "
            "smaller --per_gpu_batch_size avoids it"
        )
    for name, text in (common | dict(lines)).items():
        accelerator.print(f"{name:<16}{text}", flush=True)


def print_figures(accelerator: Accelerator, figures: Mapping[str, float]) -> None:
    for name, value in figures.items():
        accelerator.print(f"{name:<24}{value if isinstance(value, int) else format(value, '.4f')}")


# ------------------------------------------------------------------------------------------------ log


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB (1e9 bytes): of the GPU's allocator, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class RunLog:
    """Write `<experiment>/log.jsonl`, one row a line, and hand it to the trackers; only the main process writes.

    A resume cuts the rows beyond its step, so steps rise strictly; a fresh start sets an older log aside.
    """

    def __init__(self, experiment: Path, *, enabled: bool, resumed_step: int | None = None, lock: TextIO | None = None):
        self.file, self.enabled, self.resumed_step, self.lock = experiment / "log.jsonl", enabled, resumed_step, lock
        self.unwritten, self.trackers = "", []
        if enabled and resumed_step is None:
            with optional_write(self.file):
                rename_aside(self.file)
        elif enabled:
            with optional_write(self.file):
                cut_rows(self.file, resumed_step)

    def start_trackers(self, args: argparse.Namespace) -> None:
        self.trackers = start_trackers(self.file.parent, args, self.resumed_step)

    def write(self, row: Mapping[str, float | None]) -> None:
        """Append a row; it carries "step". Rows that a full disk refuses are written with a later one."""
        if not self.enabled:
            return
        self.unwritten += json.dumps(row) + "\n"
        try:
            append_lines(self.file, self.unwritten.encode())
            self.unwritten = ""
        except OSError as error:
            say(f"{self.file} could not be written ({error}); its rows wait for the next one")
        for tracker in self.trackers:
            tracker.log(row)

    def picture(self, key: str, epoch: int, picture: Image.Image, step: int) -> None:
        """Save a picture as <experiment>/<key>/epoch_<epoch>.png, and hand it to the trackers."""
        path = self.file.parent / key / f"epoch_{epoch}.png"
        with optional_write(path):
            rename_irregular(path.parent, stat.S_ISDIR)
            rename_irregular(path)
            with written_whole(path, flush=False) as temporary, temporary.open("xb") as file:
                picture.save(file, "PNG")
        for tracker in self.trackers if path.exists() else ():
            tracker.log_picture(key, path, picture, step)

    def table(self, key: str, epoch: int, rows: Iterable[Iterable[object]]) -> None:
        """Save a table as <experiment>/<key>/epoch_<epoch>.tsv; one that is there is renamed."""
        path = self.file.parent / key / f"epoch_{epoch}.tsv"
        with optional_write(path):
            rename_aside(path)
            write_rows(path, rows)

    def close(self) -> None:
        finish_trackers(self.trackers)
        if self.lock is not None:
            self.lock.close()


# ------------------------------------------------------------------------------------------------ what went wrong


class BadFiles:
    """Keep count of the files that cannot be used, over all processes, and name each once in bad_files.txt."""

    def __init__(self, experiment: Path, num_images: int, max_fraction: float):
        self.file, self.num_images, self.max_fraction = experiment / "bad_files.txt", num_images, max_fraction
        self.new: dict[str, str] = {}
        self.met: set[str] = set()  # by this run; a file that was repaired since it was named counts no more
        self.named: set[str] | None = None  # in the file, as they are written there; read when it is needed

    def note(self, bad_files: Iterable[tuple[str, str]]) -> None:
        """Remember what one batch of this process met; nothing is written before `share`."""
        self.new |= {path: reason for path, reason in bad_files if path not in self.met}

    def share(self, accelerator: Accelerator, say: Callable[[str], None]) -> int:
        """Name the new ones of all processes and give the count; ValueError above the limit. Every process calls it."""
        found = {path: reason for new in gather_object([self.new]) for path, reason in new.items()}
        self.new = {}
        self.met |= found.keys()
        if found and accelerator.is_main_process:
            self.name(found, say)
        if len(self.met) > self.max_fraction * self.num_images:
            raise ValueError(
                f"{len(self.met)} of {self.num_images:,} images cannot be used, more than --max_bad_fraction "
                f"{self.max_fraction} allows; they are named in {self.file}"
            )
        return len(self.met)

    def name(self, found: Mapping[str, str], say: Callable[[str], None]) -> None:
        """Write and say the files that are not named yet, each with the reason."""
        if self.named is None:
            content = read_optional(self.file, read_bytes) or b""
            self.named = {line.split("\t")[0] for line in content.decode("utf-8", "surrogateescape").split("\n")}
        rows = [(as_text(path), " ".join(found[path].split())) for path in sorted(found)]
        rows = [(path, reason) for path, reason in rows if escape(path) not in self.named]
        self.named |= {escape(path) for path, _ in rows}
        if rows:
            with optional_write(self.file):
                write_rows(self.file, rows, append=True)
        for path, reason in rows:
            say(escape(f"cannot be used, replaced by another: {path}  {reason}", also_bytes=True))


class SkippedSteps:
    """Count the optimizer steps whose loss or gradient is not finite; nonfinite_steps.jsonl names their images."""

    def __init__(self, experiment: Path, images_of: Callable[[int], list[str]], max_in_a_row: int):
        self.file, self.images_of, self.max_in_a_row = experiment / "nonfinite_steps.jsonl", images_of, max_in_a_row
        self.count, self.in_a_row = 0, 0

    def note(self, accelerator: Accelerator, skipped: list[bool], last_step: int, say: Callable[[str], None]) -> None:
        """Take in which of the steps up to `last_step` were left out; FloatingPointError for too many in a row."""
        for step, was_skipped in enumerate(skipped, start=last_step - len(skipped) + 1):
            self.count += was_skipped
            self.in_a_row = self.in_a_row + 1 if was_skipped else 0
            if was_skipped and accelerator.is_main_process:
                with optional_write(self.file):
                    row = json.dumps({"step": step, "images": self.images_of(step)})
                    append_lines(self.file, f"{row}\n".encode())
                say(f"step {step}: loss or gradient not finite, left out; its images are named in {self.file}")
            if self.in_a_row == self.max_in_a_row:
                raise FloatingPointError(
                    f"loss or gradient was not finite in {self.in_a_row} optimizer steps in a row, up to step {step} "
                    f"(--max_nonfinite_steps). {advise_on_nonfinite(self.file.parent)}"
                )
