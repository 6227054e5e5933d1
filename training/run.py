"""Where a training stands: its folder, what it goes on from, its steps, rows and ends."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import (
    broadcast_object_list,
)

from storage.files import unused_name
from training.checkpoints import (
    CHECKPOINT_NAME,
    DONE_FILE,
    LAST_CHECKPOINT,
    checkpoint_order,
    find_checkpoint,
    find_checkpoints,
    find_damage,
    lock_experiment,
    newest_whole_checkpoint,
    point_last_checkpoint,
    read_state,
    tidy,
    write_args,
)
from training.records import RunLog, optional_write


def refuse_inside(working_directory: str | Path, train_folder: Path) -> None:
    """Refuse to write into the training images; ValueError."""
    if Path(working_directory).resolve().is_relative_to(train_folder.resolve()):
        raise ValueError(
            f"--working_directory {working_directory} lies in the training images, {train_folder}: the run would train "
            "on its own pictures; choose one outside"
        )


def repetition_note(num_images: int, images_per_step: int) -> str:
    return (
        f"{num_images:,} images do not fill one step of {images_per_step}, so an epoch repeats some; a smaller "
        "--per_gpu_batch_size avoids it"
    )


def report(accelerator: Accelerator, figures: Mapping[str, float]) -> None:
    """Print figures, one a line."""
    for name, value in figures.items():
        accelerator.print(f"{name:<24}{value:.4f}")


class Start(NamedTuple):
    """Where a run keeps its files, the checkpoint it goes on from, if any, and the newer ones that are damaged."""

    experiment: Path
    resume_from: Path | None
    damaged: list[Path]


def open_experiment(accelerator: Accelerator, args: argparse.Namespace) -> Start:
    """Choose what to go on from; every process calls this, the main one reads the disk for all.

    Without --resume_from_checkpoint, checkpoints that are there are never trained over: FileExistsError. 'latest' is
    a fresh start where there is none, and else the newest whose files are as its manifest says; ValueError where all
    are damaged, or the one that was asked for is. Raises alike on every process.
    """
    found: list = [None]
    if accelerator.is_main_process:
        try:
            found = [choose_start(args)]
        except (ValueError, OSError) as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    start: Start = found[0]
    if start.resume_from is not None and not start.resume_from.is_dir():
        raise FileNotFoundError(
            f"process {accelerator.process_index} cannot see {start.resume_from}, which the first process chose: "
            "--working_directory has to be on a disk that all machines share"
        )
    return start


def choose_start(args: argparse.Namespace) -> Start:
    experiment = Path(args.working_directory) / args.experiment_name
    existing = find_checkpoints(experiment)
    if args.resume_from_checkpoint is None and existing:
        raise FileExistsError(
            f"{experiment} already holds {len(existing)} checkpoints. Add --resume_from_checkpoint latest to go on "
            "with that run, or choose another --experiment_name to start a new one"
        )
    if args.resume_from_checkpoint is None or (args.resume_from_checkpoint == "latest" and not existing):
        return Start(experiment, None, [])
    if args.resume_from_checkpoint == "latest":
        folder, damaged = newest_whole_checkpoint(existing)
    else:
        folder, damaged = find_checkpoint(experiment, args.resume_from_checkpoint), []
        damage = find_damage(folder)
        if damage:
            raise ValueError(f"--resume_from_checkpoint {folder} is damaged: {damage}. 'latest' takes a whole one")
        newer = [other for other in existing if checkpoint_order(other) > checkpoint_order(folder)]
        if newer:
            raise FileExistsError(
                f"going on from {folder} would train over {newer[-1]}. Resume from 'latest', or give "
                f"--resume_from_checkpoint {folder} with another --experiment_name"
            )
    epoch = read_state(folder)["epoch"]
    if args.epochs is not None and epoch > args.epochs:
        raise ValueError(f"{folder} has {epoch} epochs behind it, more than --epochs {args.epochs}")
    return Start(experiment, folder, damaged)


def start_records(accelerator: Accelerator, start: Start, args: argparse.Namespace, step: int) -> RunLog:
    """Hold the experiment's folder for this run, write its arguments, and open its log; every process calls this.

    What a killed save left is cleared away, and damaged checkpoints that were passed over are renamed. BlockingIOError
    when another run holds the folder, until its log is closed, or has written to it since this one looked.
    """
    experiment, resume_from, damaged = start
    lock = None
    if accelerator.is_main_process:
        lock = lock_experiment(experiment)
        tidy(experiment)
        (experiment / DONE_FILE).unlink(missing_ok=True)
        for folder in damaged:
            if folder.exists():
                renamed = unused_name(folder, ".damaged")
                os.rename(folder, renamed)
                print(
                    f"{'passed over':<16}{folder.name}, which is damaged ({find_damage(renamed)}): now {renamed.name}"
                )
        newest = find_checkpoints(experiment)[-1:]
        if newest and (resume_from is None or checkpoint_order(newest[0]) > checkpoint_order(resume_from)):
            raise BlockingIOError(f"another run has just written {newest[0]}; start this one again")
        if newest and resume_from.samefile(newest[0]) and CHECKPOINT_NAME.fullmatch(newest[0].name):
            with optional_write(experiment / LAST_CHECKPOINT):  # a kill right after the save left the older one
                point_last_checkpoint(newest[0])
        changes = write_args(experiment, args, resume_from)
        origin = f"from {resume_from.name} on" if resume_from else "from the start"
        print(f"{'experiment':<16}{experiment}, {origin}", flush=True)
        if changes:
            print(f"{'changed':<16}since the first start: {', '.join(changes)}", flush=True)
    accelerator.wait_for_everyone()
    resumed_step = step if resume_from else None
    log = RunLog(experiment, enabled=accelerator.is_main_process, resumed_step=resumed_step, lock=lock)
    if args.log_wandb:
        log.start_wandb(args)
    return log
