"""Verbs that no task owns: flags, run set-up, optimisation, checkpoints, logging, metrics, pictures.

Entry rule: two scripts use it, or it is a pure metric. Nothing here knows a network or a data set, and the training
loops are not here: each script shows its own.
"""

import argparse
import contextlib
import ctypes
import datetime
import fcntl
import functools
import importlib
import itertools
import json
import math
import netrc
import os
import pickle
import re
import resource
import shutil
import signal
import stat
import sys
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import timm
import torch
import torch.distributed
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedType,
    DynamoBackend,
    broadcast,
    broadcast_object_list,
    gather_object,
)
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------ flags


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the module docstring's lines, and show every default that says something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default is None or "(default" in action.help
        return action.help if silent else super()._get_help_string(action)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every script has; a script sets its own defaults with `parser.set_defaults`."""
    run = parser.add_argument_group("run")
    run.add_argument("--experiment_name", default="experiment", help="folder below --working_directory; W&B project")
    run.add_argument("--working_directory", default="work_dir", help="where experiments and cached file lists are kept")
    run.add_argument(
        "--resume_from_checkpoint",
        metavar="CHECKPOINT",
        help="a checkpoint folder, the name of one inside the experiment, or 'latest': the newest one that is whole, "
        "or a fresh start where there is none",
    )
    run.add_argument(
        "--save_checkpoint_interval",
        type=int,
        default=10,
        help="epochs between checkpoints that are kept for good; the last epoch is always saved",
    )
    run.add_argument(
        "--save_minutes",
        type=float,
        default=30,
        help="minutes after which the state is saved also within an epoch; 0 never",
    )
    run.add_argument(
        "--keep_checkpoints", type=int, default=2, help="newest checkpoints that are never removed, at least 2"
    )
    run.add_argument(
        "--max_nonfinite_steps",
        type=int,
        default=10,
        help="stop after so many optimizer steps in a row whose loss or gradient was not finite; each is left out",
    )
    run.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="only kernels that give the same bits every time; slower on a GPU, and needed there for an exact resume",
    )
    run.add_argument(
        "--timeout_minutes",
        type=float,
        default=30,
        help="how long a process waits for the others before the job is given up",
    )
    run.add_argument(
        "--activation_checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compute the blocks again in the backward pass: less memory, a third more work, the same gradients",
    )
    run.add_argument(
        "--bf16_gradient_sync",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="average gradients over processes in bfloat16: half the traffic, coarser rounding",
    )
    run.add_argument("--log_interval", type=int, default=20, help="optimizer steps between log rows")
    run.add_argument(
        "--log_wandb",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also log to Weights & Biases (needs the package; offline without a key)",
    )
    run.add_argument("--wandb_run_name", help="name of the W&B run (default: W&B's choice)")
    run.add_argument("--seed", type=int, default=0, help="decides weights, order, crops and masks")
    run.add_argument(
        "--demo",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="draw a small data set and train a small model on it; other flags still win",
    )

    data = parser.add_argument_group("data")
    data.add_argument("--path_to_data", help="root of the data set")
    data.add_argument(
        "--img_size", type=int, nargs="+", default=[224], metavar="PIXELS", help="one number, or height and width"
    )
    data.add_argument("--input_channels", type=int, default=3, help="1 grey, 3 RGB, 4 RGBA")
    data.add_argument(
        "--mean",
        type=float,
        nargs="+",
        default=[0.485, 0.456, 0.406],
        help="channel means, 0..1 (default: ImageNet's; 0.5 each when the channels are not three)",
    )
    data.add_argument(
        "--std",
        type=float,
        nargs="+",
        default=[0.229, 0.224, 0.225],
        help="channel standard deviations, 0..1 (likewise)",
    )
    data.add_argument(
        "--num_workers",
        type=int,
        default=8,
        help="processes that decode, for each training process; at most the machine's cores",
    )
    data.add_argument(
        "--max_bad_fraction",
        type=float,
        default=0.01,
        help="stop when more than this share of the images cannot be decoded",
    )
    data.add_argument(
        "--rescan_data",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="list the files anew instead of reading the cached list",
    )

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--epochs", type=int, help="passes over the training images")
    optim.add_argument("--warmup_epochs", type=float, help="epochs of linear warmup from 0")
    optim.add_argument(
        "--per_gpu_batch_size",
        type=int,
        help="images of one optimizer step on one process, cut into --gradient_accumulation_steps forward passes",
    )
    optim.add_argument("--gradient_accumulation_steps", type=int, default=1, help="forward passes per optimizer step")
    optim.add_argument("--weight_decay", type=float, help="AdamW's, not on biases and norms")
    optim.add_argument(
        "--max_grad_norm", type=float, default=1.0, help="clip the gradient norm to this; 0 never clips, as the paper"
    )


def check_run_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse impossible values of the shared flags, and turn the lists into what the code uses."""
    positive = (
        "epochs",
        "per_gpu_batch_size",
        "gradient_accumulation_steps",
        "save_checkpoint_interval",
        "log_interval",
        "max_nonfinite_steps",
    )
    for name in positive:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    for name in ("warmup_epochs", "num_workers", "weight_decay", "max_grad_norm", "save_minutes"):
        if getattr(args, name) is not None and getattr(args, name) < 0:
            parser.error(f"--{name} cannot be negative, and is {getattr(args, name)}")
    if args.keep_checkpoints < 2:
        parser.error(
            f"--keep_checkpoints {args.keep_checkpoints}: at least 2, so that one is left when the newest is damaged"
        )
    if args.timeout_minutes <= 0:
        parser.error(f"--timeout_minutes must be above 0, and is {args.timeout_minutes:g}")
    if args.epochs is not None and args.warmup_epochs is not None and args.warmup_epochs >= args.epochs:
        parser.error(
            f"--warmup_epochs {args.warmup_epochs:g} leaves nothing of --epochs {args.epochs}; give both, the paper's "
            "share is a twentieth"
        )
    if args.per_gpu_batch_size % args.gradient_accumulation_steps:
        parser.error(
            f"--per_gpu_batch_size {args.per_gpu_batch_size} cannot be cut into --gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps} equal forward passes; choose a multiple of it"
        )
    if len(args.img_size) > 2:
        parser.error(f"--img_size takes one number, or height and width, not {len(args.img_size)} numbers")
    args.img_size = args.img_size[0] if len(args.img_size) == 1 else tuple(args.img_size)
    for name in ("mean", "std"):
        values = getattr(args, name)
        if values == parser.get_default(name) and args.input_channels != len(values):
            values = [0.5]
        if len(values) == 1:
            values = values * args.input_channels
        if len(values) != args.input_channels:
            parser.error(
                f"--{name} has {len(values)} values, --input_channels is {args.input_channels}; give as many, or one"
            )
        setattr(args, name, tuple(values))
    if min(args.std) <= 0:
        parser.error(f"--std must be positive, and is {args.std}")
    if not 0 <= args.max_bad_fraction <= 1:
        parser.error(f"--max_bad_fraction is a share between 0 and 1, not {args.max_bad_fraction}")
    if args.seed < 0:
        parser.error(f"--seed cannot be negative, and is {args.seed}")
    if Path(args.experiment_name).name != args.experiment_name or args.experiment_name in ("", ".."):
        parser.error(
            f"--experiment_name {args.experiment_name!r} is a folder name; the path goes into --working_directory"
        )


# ------------------------------------------------------------------------------------------------ run set-up

PR_SET_PDEATHSIG = 1  # of Linux' prctl
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


def build_accelerator(
    gradient_accumulation_steps: int, *, timeout_minutes: float = 30, bf16_gradient_sync: bool = False
) -> Accelerator:
    """Join the processes that the launcher started; RuntimeError when each of them would train alone.

    A process that waits for another longer than the timeout gives up, and with it the launcher and the job.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # accelerate launch started this process
        die_with_parent(signal.SIGTERM)
    hook = DDPCommunicationHookType.BF16 if bf16_gradient_sync else DDPCommunicationHookType.NO
    accelerator = Accelerator(
        gradient_accumulation_steps=gradient_accumulation_steps,
        kwargs_handlers=[
            # No static_graph: with it, torch's reducer fails on passes that are accumulated without a reduction.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, comm_hook=hook),
            InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=timeout_minutes)),
        ],
    )
    if accelerator.gradient_accumulation_steps != gradient_accumulation_steps:
        raise RuntimeError(
            f"the launcher or its environment sets {accelerator.gradient_accumulation_steps} gradient accumulation "
            f"steps, this script {gradient_accumulation_steps}; give --gradient_accumulation_steps to the script alone"
        )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise RuntimeError(
            f"the launcher started {launched} processes, but this one sees {accelerator.num_processes}: they would all "
            "train alone in one folder. Without a GPU, set ACCELERATE_USE_CPU=true; with one, check its driver"
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, unless MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_MAX_ is set.

    A step on the CPU allocates and frees the same tensors as the one before. By default glibc gives large ones back to
    Linux, which hands them out again page by page, zeroed. Other C libraries are left as they are.
    """
    if sys.platform != "linux" or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"} & os.environ.keys():
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_MAX, 0)


def die_with_parent(number: signal.Signals) -> None:
    """Ask Linux to send this process a signal when its parent ends, however that ends.

    A launcher that is killed, and one that starts a single process and is only asked to end, leave it running alone.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))


def choose_kernels(deterministic: bool) -> None:
    """With `deterministic`, allow only operations that give the same bits every time; torch raises for the others."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def describe_processes(accelerator: Accelerator, num_workers: int, asked_workers: int) -> str:
    """Say on what a run works: processes, device, precision, threads, workers, versions."""
    workers = f"{num_workers} data workers"
    if num_workers < asked_workers:
        workers += f" (of --num_workers {asked_workers}, as there are no more cores)"
    return (
        f"{accelerator.num_processes} x {accelerator.device.type}, precision {accelerator.mixed_precision}, "
        f"{torch.get_num_threads()} CPU threads and {workers} each, torch {torch.__version__}, timm {timm.__version__}"
    )


def share_of(accelerator: Accelerator) -> tuple[int, int]:
    """Give which images of an evaluation are this process's: every `second`-th from `first` on.

    A sharded model answers only when all processes ask together, so there each takes all images.
    """
    if accelerator.distributed_type in SHARDING:
        return 0, 1
    return accelerator.process_index, accelerator.num_processes


def share_buffers(accelerator: Accelerator, model: nn.Module) -> None:
    """Give all processes the first one's buffers, such as a batch norm's statistics, as a checkpoint has them.

    Torch's DDP does so before every forward pass of training, but not after the last.
    """
    if accelerator.num_processes > 1 and accelerator.distributed_type not in SHARDING:
        for buffer in model.buffers():
            broadcast(buffer, from_process=0)


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


def compile_in_place(accelerator: Accelerator, model: nn.Module) -> None:
    """Do what `accelerate launch --dynamo_backend` asks for without wrapping the model.

    Accelerate's own way puts `_orig_mod.` before every key of model.safetensors, which then loads nowhere else.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend != DynamoBackend.NO:
        model.compile(**plugin.to_kwargs())
        plugin.backend = DynamoBackend.NO


def micro_batch_size(args: argparse.Namespace) -> int:
    """Count the images of one forward pass on one process."""
    return args.per_gpu_batch_size // args.gradient_accumulation_steps


def report(accelerator: Accelerator, figures: Mapping[str, float]) -> None:
    """Print figures, one a line."""
    for name, value in figures.items():
        accelerator.print(f"{name:<24}{value:.4f}")


def cap_workers(num_workers: int) -> int:
    """Give each training process at most its share of this machine's cores as data workers."""
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(num_workers, max(1, cores // local_processes))


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


def lock_experiment(experiment: Path) -> TextIO:
    """Create the experiment's folder and hold it for this run; BlockingIOError when another run does.

    The lock goes with the process, however that ends. Keep the returned file open.
    """
    experiment.mkdir(parents=True, exist_ok=True)
    lock = (experiment / ".lock").open("w")
    try:
        # A record lock, which is this process's alone: data workers that outlive a killed run for seconds would
        # hold one of flock's, and the next start would be refused.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise BlockingIOError(f"another run is training in {experiment}; choose another --experiment_name") from error
    return lock


def unused_name(path: Path, suffix: str) -> Path:
    """Give the first of path_1, path_2, ... with a suffix that does not exist."""
    numbered = (path.with_name(f"{path.name}_{number}{suffix}") for number in itertools.count(1))
    return next(name for name in numbered if not name.exists())


def set_aside(file: Path) -> None:
    """Rename what an earlier run without a checkpoint left under this name, so that nothing is overwritten."""
    if file.exists():
        file.rename(unused_name(file.with_suffix(""), file.suffix))


def write_args(experiment: Path, args: argparse.Namespace, resumed_from: Path | None) -> list[str]:
    """Write args.json; a resume keeps the first file and adds its own. Give the flags that differ from the first."""
    flags = json.loads(json.dumps(vars(args)))
    first = experiment / "args.json"
    before = json.loads(first.read_text()) if first.exists() and resumed_from is not None else flags
    file = first
    if resumed_from is None:
        set_aside(first)
    elif first.exists():
        file = experiment / f"args_from_{resumed_from.name}.json"
        set_aside(file)
    file.write_text(json.dumps(flags, indent=2) + "\n")
    return [
        f"--{name} {new} (was {old})"
        for name, old, new in sorted(flat_differences(before, flags))
        if name != "resume_from_checkpoint"
    ]


# ------------------------------------------------------------------------------------------------ optimisation


def scaled_lr(base_learning_rate: float, effective_batch_size: int) -> float:
    """Linear scaling rule: learning rate = base x images per optimizer step over all processes / 256 (appendix A.1)."""
    return base_learning_rate * effective_batch_size / 256


def cosine_lr(step: int, *, peak: float, warmup_steps: float, total_steps: int, minimum: float = 0.0) -> float:
    """Give the learning rate of an optimizer step: linear from exactly 0, then half a cosine down to `minimum`.

    A pure function of the step, so nothing has to be saved, and no number of processes can make it run faster. Past
    `total_steps` it stays at the minimum.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1e-12, total_steps - warmup_steps))
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


def poly_lr(step: int, *, peak: float, warmup_steps: int, total_steps: int, start_factor: float = 1e-6) -> float:
    """Give the learning rate of an optimizer step: linear from `start_factor` x peak, then linear down to 0.

    MMSegmentation's warmup and polynomial of power 1. Past `total_steps` it stays at 0.
    """
    if step < warmup_steps:
        return peak * (start_factor + (1 - start_factor) * step / warmup_steps)
    return peak * max(0.0, 1 - (step - warmup_steps) / max(1, total_steps - warmup_steps))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Write a learning rate into every group, times the group's `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


# ------------------------------------------------------------------------------------------------ checkpoints

CHECKPOINT_NAME = re.compile(r"checkpoint_(\d+)(?:_step_(\d+))?")  # epochs behind it, and the step within the next
LAST_CHECKPOINT, BEST_CHECKPOINT = "last_checkpoint", "best_checkpoint"  # a link to the newest, and weights alone
STATE_FILE, MANIFEST_FILE, DONE_FILE, AVERAGE_FILE = "state.json", "manifest.json", "DONE", "ema.safetensors"
CHUNK_BYTES = 1 << 24
MAX_FAILED_SAVES = 3  # in a row, then the run stops
SPACE_FACTOR = 1.2  # free space that a save wants, in sizes of the one before
SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)
# What a full or broken disk raises: torch reports it as a RuntimeError, safetensors with an error of its own.
SAVE_ERRORS = (OSError, RuntimeError, SafetensorError)
# What torch and safetensors raise for files that are damaged, or that would run code, under a manifest made to fit.
LOAD_ERRORS = (*SAVE_ERRORS, ValueError, TypeError, LookupError, AttributeError, EOFError, pickle.UnpicklingError)


def checkpoint_order(folder: Path) -> tuple[int, int]:
    """Sort checkpoints by how far they are, from their names alone; those named otherwise come first."""
    match = CHECKPOINT_NAME.fullmatch(folder.resolve().name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def find_checkpoints(experiment: Path) -> list[Path]:
    """Give the checkpoints of an experiment, whole or damaged, oldest first.

    A last_checkpoint that is a folder, because the experiment was copied without links, comes first.
    """
    folders = [entry for entry in experiment.glob("checkpoint_*") if CHECKPOINT_NAME.fullmatch(entry.name)]
    if not (last := experiment / LAST_CHECKPOINT).is_symlink():
        folders.append(last)
    return sorted((folder for folder in folders if folder.is_dir()), key=checkpoint_order)


def find_checkpoint(experiment: Path, name: str) -> Path:
    """Find a checkpoint by its name inside the experiment, or by its folder. FileNotFoundError lists what is there."""
    for folder in (experiment / name, Path(name)):
        if (folder / STATE_FILE).is_file():
            return folder.resolve()  # of last_checkpoint, which moves on, the one it is now
    there = ", ".join(folder.name for folder in find_checkpoints(experiment)) or "none"
    raise FileNotFoundError(
        f"--resume_from_checkpoint {name}: no checkpoint with a {STATE_FILE} there. In {experiment}: {there}"
    )


def newest_whole_checkpoint(checkpoints: list[Path]) -> tuple[Path, list[Path]]:
    """Give the newest checkpoint whose files are as its manifest says, and the newer ones that are damaged."""
    damaged, reasons = [], []
    for folder in reversed(checkpoints):
        damage = find_damage(folder)
        if damage is None:
            return folder, damaged
        damaged.append(folder)
        reasons.append(f"  {folder.name}: {damage}")
    raise ValueError(
        f"every checkpoint in {checkpoints[0].parent} is damaged, and starting again without being asked would lose "
        "the run:\n" + "\n".join(reasons) + "\nPut a whole copy back, or choose another --experiment_name"
    )


def find_damage(folder: Path) -> str | None:
    """Compare a checkpoint's files with its manifest; None when all are there, whole, and readable."""
    if not (folder / MANIFEST_FILE).is_file():
        return f"{MANIFEST_FILE} is missing, which is written last"
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
        for name, expected in manifest["files"].items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"{MANIFEST_FILE} names {name!r}, which is not inside the folder"
            size, checksum = (folder / name).stat().st_size, expected["crc32"]
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if checksum_of(folder / name) != checksum:
                return f"{name} has another content than when it was written"
        missing = [name for name in ("config.json", STATE_FILE) if name not in manifest["files"]]
        return f"{MANIFEST_FILE} does not name {', '.join(missing)}" if missing else None
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST_FILE} cannot be read ({type(error).__name__}: {error})"


def checksum_of(file: Path) -> str:
    """Give the CRC-32 of a file's content. It is there to find damage, not forgery, and reads 1 to 2 GB a second."""
    checksum = 0
    with file.open("rb") as content:
        while chunk := content.read(CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return f"{checksum:08x}"


def read_record(file: Path) -> dict:
    """Read a JSON file of a checkpoint; ValueError names it when it holds no entries by name."""
    try:
        record = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file} holds a {type(record).__name__}, not entries by name")
    return record


def read_state(folder: Path) -> dict:
    """Read how far a checkpoint is; ValueError names the file when it is no such record."""
    state = read_record(folder / STATE_FILE)
    if not all(type(state.get(name)) is int for name in ("epoch", "step")):
        raise ValueError(f"{folder / STATE_FILE} does not hold an epoch and a step")
    return state


def check_weights(accelerator: Accelerator, model: nn.Module, experiment: Path, step: int) -> None:
    """Raise FloatingPointError if a weight or a running statistic of any process is not finite; every process calls."""
    tensors = [getattr(tensor, "to_local", lambda t=tensor: t)() for tensor in (*model.parameters(), *model.buffers())]
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
    if accelerator.reduce(finite.int(), "sum").item() < accelerator.num_processes:
        raise FloatingPointError(f"the weights are not finite at step {step}, and not saved. {way_out(experiment)}")


def way_out(experiment: Path) -> str:
    """Say what to do with a run that left the finite numbers."""
    checkpoints = find_checkpoints(experiment)
    last = f"Go on from {checkpoints[-1]}" if checkpoints else "There is no checkpoint: start again"
    return f"{last} with a lower learning rate, --max_grad_norm 1, or bf16 instead of fp16"


def sync_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, folder: Path) -> None:
    """Give a folder that was written under another name its own, when all of it is on the disk."""
    mode = stat.S_IMODE((temporary / "config.json").stat().st_mode)
    for path in temporary.rglob("*"):
        if path.is_file():
            path.chmod(mode)  # safetensors lets nobody else read
        sync_to_disk(path)
    sync_to_disk(temporary)
    os.rename(temporary, folder)
    sync_to_disk(folder.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that a kill in between leaves no half of it under its name."""
    leaving = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(leaving, ignore_errors=True)
    os.rename(folder, leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def point_last_checkpoint(folder: Path) -> None:
    """Make last_checkpoint the link to this one; a folder of that name is set aside."""
    last, link = (folder.with_name(f"{LAST_CHECKPOINT}{end}") for end in ("", ".tmp"))
    link.symlink_to(folder.name)
    if last.is_dir() and not last.is_symlink():
        os.rename(last, unused_name(last, ""))
    os.replace(link, last)


def tidy(experiment: Path) -> None:
    """Undo what a kill in the middle of a save left: half folders go, and a best checkpoint set aside comes back."""
    for old in experiment.glob("*_checkpoint.old"):
        folder = old.with_suffix("")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, folder)
    for pattern in ("checkpoint_*.tmp", "*_checkpoint.tmp"):
        for half in experiment.glob(pattern):
            half.unlink() if half.is_symlink() else shutil.rmtree(half, ignore_errors=True)


def all_succeed(accelerator: Accelerator, act: Callable[[], None]) -> str | None:
    """Do something on every process and tell all of them what failed on any; None when nothing did."""
    try:
        act()
        failure = None
    except SAVE_ERRORS as error:
        failure = f"{type(error).__name__}: {error}"
    return next((failure for failure in gather_object([failure]) if failure is not None), None)


class Checkpoints:
    """Write the states of a run: whole or not at all, each with a manifest, the newest and those kept for good.

    Not a cure for a broken disk: a save that fails costs a message and the run goes on, until MAX_FAILED_SAVES of them
    fail in a row. Every process calls the methods; the disk has to be one that all of them see.
    """

    def __init__(self, accelerator: Accelerator, experiment: Path, keep: int):
        self.accelerator, self.experiment, self.keep = accelerator, experiment, keep
        self.failures, self.size, self.saved_at = 0, 0, time.monotonic()

    def save(
        self,
        model: nn.Module,
        config: Mapping,
        state: Mapping,
        *,
        epoch_ends: bool,
        for_good: bool = False,
        average: nn.Module | None = None,
    ) -> bool:
        """Write weights with their sizes (model.safetensors, config.json) and all that an exact resume needs.

        The name is checkpoint_<epoch> when the epoch is complete, evaluation included, else checkpoint_<epoch>_step_
        <step>, epoch being the number of complete ones. `average`, a moving average of the weights, goes into
        ema.safetensors. Gives whether it was written; FloatingPointError for weights that are not finite, OSError
        when saving has failed too often.
        """
        accelerator = self.accelerator
        name = f"checkpoint_{state['epoch']}" + ("" if epoch_ends else f"_step_{state['step']}")
        folder, temporary = self.experiment / name, self.experiment / f"{name}.tmp"
        check_weights(accelerator, model, self.experiment, state["step"])

        def prepare() -> None:
            if accelerator.is_main_process:
                tidy(self.experiment)
                temporary.mkdir()
                free = shutil.disk_usage(self.experiment).free
                if free < SPACE_FACTOR * self.size:
                    raise OSError(f"{free / 1e9:.2f} GB are free, the last checkpoint has {self.size / 1e9:.2f} GB")

        def write() -> None:
            accelerator.save_state(temporary)
            if accelerator.is_main_process:
                if average is not None:
                    save_file(average.state_dict(), temporary / AVERAGE_FILE)
                write_json(temporary / "config.json", config)
                write_json(temporary / STATE_FILE, {**state, "for_good": for_good})

        def seal() -> None:
            if not accelerator.is_main_process:
                return
            record = {
                file.relative_to(temporary).as_posix(): {"bytes": file.stat().st_size, "crc32": checksum_of(file)}
                for file in sorted(temporary.rglob("*"))
                if file.is_file()
            }
            write_json(temporary / MANIFEST_FILE, {"files": record})
            self.size = sum(entry["bytes"] for entry in record.values())
            if folder.exists() and find_damage(folder) is None:  # of this very step, and so the same
                shutil.rmtree(temporary)
                return
            if folder.exists():
                os.rename(folder, unused_name(folder, ".damaged"))
            publish(temporary, folder)

        def make_way() -> None:
            if accelerator.is_main_process:
                point_last_checkpoint(folder)
                self.prune()

        failure = all_succeed(accelerator, prepare) or all_succeed(accelerator, write)
        if failure is None and accelerator.distributed_type in SHARDING:  # these save in pieces; weights go on whole
            state_dict = accelerator.get_state_dict(model)
            if accelerator.is_main_process:
                save_file(state_dict, temporary / "model.safetensors")
        failure = failure or all_succeed(accelerator, seal)
        self.saved_at = time.monotonic()
        if failure is None:
            self.failures = 0
            failure = all_succeed(accelerator, make_way)
            if failure is not None:
                accelerator.print(f"{name} is written, but older ones could not be removed ({failure})")
            return True
        self.failures += 1
        if accelerator.is_main_process:
            tidy(self.experiment)
        if self.failures == MAX_FAILED_SAVES:
            raise OSError(f"{self.failures} saves in a row failed, the last one with {failure}; earlier ones are kept")
        accelerator.print(f"{name} could not be written ({failure}); earlier ones are kept, and the run goes on")
        return False

    def prune(self) -> None:
        """Remove checkpoints that are neither among the newest nor kept for good; what cannot be read is left alone."""
        for folder in find_checkpoints(self.experiment)[: -self.keep]:
            try:
                kept = read_state(folder).get("for_good", True)
            except (OSError, ValueError):
                continue
            if not kept and CHECKPOINT_NAME.fullmatch(folder.name):
                remove_folder(folder)

    def save_weights(self, model: nn.Module, name: str, config: Mapping) -> bool:
        """Write weights to hand on, model.safetensors and config.json, in the place of older ones.

        False when the disk refused, and the older ones are still there; the run goes on.
        """
        folder, temporary, old = (self.experiment / f"{name}{end}" for end in ("", ".tmp", ".old"))
        state_dict = self.accelerator.get_state_dict(model)

        def write() -> None:
            if not self.accelerator.is_main_process:
                return
            tidy(self.experiment)
            temporary.mkdir()
            save_file({name: value.contiguous() for name, value in state_dict.items()}, temporary / "model.safetensors")
            write_json(temporary / "config.json", config)
            if folder.exists():
                os.rename(folder, old)
            publish(temporary, folder)
            shutil.rmtree(old, ignore_errors=True)

        failure = all_succeed(self.accelerator, write)
        if failure is not None:
            self.accelerator.print(f"{folder} could not be written ({failure}); the run goes on")
        return failure is None

    def finish(self, step: int) -> None:
        """Leave the file that tells a scheduler that nothing is left to do."""
        if self.accelerator.is_main_process:
            write_json(self.experiment / DONE_FILE, {"step": step})


def write_json(file: Path, content: Mapping) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def resume(
    accelerator: Accelerator,
    folder: Path,
    config: Mapping,
    identity: Mapping,
    *,
    average: nn.Module | None = None,
    keeps_best: bool = False,
) -> dict:
    """Load a checkpoint into everything that was prepared, and into `average`; every process calls this.

    Gives its state: `epoch`, `step`, the `row` that waits for an evaluation, and the `best` figure so far where the
    script `keeps_best`. ValueError names every difference in the sizes or in `identity` that would make the run go on
    as another one.
    """
    state = read_state(folder)
    saved = read_record(folder / "config.json") | {key: state.get(key) for key in identity}
    current = json.loads(json.dumps({**config, **identity}))
    differences = sorted(flat_differences(saved, current))
    if differences:
        lines = [f"  {key}: {old!r} in the checkpoint, {new!r} now" for key, old, new in differences]
        raise ValueError(f"cannot resume from {folder}, because this run differs:\n" + "\n".join(lines))
    if not isinstance(state.get("row"), dict) or (keeps_best and not isinstance(state.get("best"), int | float)):
        raise ValueError(f"{folder / STATE_FILE} does not hold the row that waits and the best figure of a run")
    try:
        accelerator.load_state(folder)
        if average is not None:
            average.load_state_dict(load_file(folder / AVERAGE_FILE))
    except LOAD_ERRORS as error:
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else ""
        raise ValueError(f"{folder} cannot be loaded ({type(error).__name__}: {reason})") from error
    accelerator.step = 0  # its position inside an accumulation; checkpoints lie between optimizer steps
    return state


def flat_differences(old: Mapping, new: Mapping, prefix: str = "") -> Iterator[tuple]:
    for key in old.keys() | new.keys():
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from flat_differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b


# ------------------------------------------------------------------------------------------------ interruptions

GO_ON, SAVE, STOP = 0, 1, 2
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
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
        share = len(loader.dataset) // share_of(self.accelerator)[1]
        asked = math.ceil(share / loader.batch_size)  # batches that every process has
        for index, batch in enumerate(loader):
            if index < asked and self.agree() == STOP:
                raise Interrupted
            yield batch

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def leave(self, log: "RunLog", bar: tqdm, saved: bool, step: int) -> None:
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


# ------------------------------------------------------------------------------------------------ numbers that are none


def spread_not_finite(loss: Tensor) -> Tensor:
    """Give a loss that is not finite a gradient that is NaN everywhere, so that every process meets it in the norm."""
    return loss * (1 + 0 * loss.detach())


def skip_if_not_finite(optimizer: torch.optim.Optimizer, grad_norm: Tensor) -> Tensor:
    """Make the coming `optimizer.step()` leave weights and state alone if the gradient norm is not finite.

    Gives 1.0 where it will and 0.0 where not, on the device. The norm is of the gradients after their reduction over
    the processes, and so all decide alike. A fused optimizer decides on the device, as it does for torch's GradScaler;
    for others the norm crosses to the host.
    """
    skipped = (~grad_norm.isfinite()).to(torch.float32)  # what the fused kernels take, whatever the weights are
    inner = getattr(optimizer, "optimizer", optimizer)
    if inner.defaults.get("fused"):
        inner.found_inf = skipped
    elif skipped:
        optimizer.zero_grad(set_to_none=True)  # a parameter without a gradient is passed over
    return skipped


class SkippedSteps:
    """Count the optimizer steps whose loss or gradient was not finite, and name their images in nonfinite_steps.jsonl.

    `images_of` gives the files of an optimizer step.
    """

    def __init__(self, experiment: Path, images_of: Callable[[int], list[str]], max_in_a_row: int):
        self.experiment, self.images_of, self.max_in_a_row = experiment, images_of, max_in_a_row
        self.count, self.in_a_row = 0, 0

    def note(self, accelerator: Accelerator, skipped: list[bool], last_step: int, say: Callable[[str], None]) -> None:
        """Take in whether each of the steps up to `last_step` was left out, in their order.

        FloatingPointError after `max_in_a_row` of them.
        """
        for step, was_skipped in enumerate(skipped, start=last_step - len(skipped) + 1):
            self.in_a_row = self.in_a_row + 1 if was_skipped else 0
            if not was_skipped:
                continue
            self.count += 1
            file = self.experiment / "nonfinite_steps.jsonl"
            if accelerator.is_main_process:
                with going_on_without(file), file.open("a", errors="surrogateescape") as rows:
                    rows.write(json.dumps({"step": step, "images": self.images_of(step)}) + "\n")
                say(f"step {step}: loss or gradient not finite, left out; its images are named in {file}")
            if self.in_a_row == self.max_in_a_row:
                raise FloatingPointError(
                    f"loss or gradient was not finite in {self.in_a_row} optimizer steps in a row, up to step {step} "
                    f"(--max_nonfinite_steps). {way_out(self.experiment)}"
                )


# ------------------------------------------------------------------------------------------------ logging

WANDB_TIMEOUT_S = 20
BAR_INTERVAL_S = 30  # between lines of a progress bar that goes into a file


def build_bar(accelerator: Accelerator, total_steps: int, step: int) -> tqdm:
    """Show the progress of a run from the main process; where no one watches a terminal, a line now and then."""
    watched = sys.stderr.isatty()
    return tqdm(
        total=total_steps,
        initial=step,
        unit="step",
        dynamic_ncols=watched,
        ncols=None if watched else 160,
        mininterval=0.1 if watched else BAR_INTERVAL_S,
        maxinterval=10 if watched else BAR_INTERVAL_S,
        disable=not accelerator.is_main_process,
    )


WAIT_WORTH_A_HINT = 0.2  # share of the time
DATA_HINT = (
    "waiting for data takes {:.0%} of the time: give more --num_workers where there are cores, pack the data "
    "(tools/pack_dataset.py), or pretrain with --repeated_sampling 4"
)


class StepClock:
    """Measure images per second and the share of the time that the loop waits for data, between log rows.

    Where that share is high in two readings in a row, `say` is told once what to do; not after the first reading, in
    which the workers start.
    """

    def __init__(self, say: Callable[[str], None] | None = None):
        self.say, self.readings, self.slow_readings = say, 0, 0
        self.restart()

    def restart(self) -> None:
        self.started, self.waited_s, self.images = time.perf_counter(), 0.0, 0

    def watch(self, loader: Iterable) -> Iterator:
        """Iterate over a loader, adding up the time spent in it and the images it gives."""
        iterator = iter(loader)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            self.waited_s += time.perf_counter() - asked
            if batch is None:
                return
            self.images += len(batch.images)
            yield batch

    def read(self, num_processes: int) -> dict[str, float]:
        """Give the figures since the last reading, images counted over all processes, and start over."""
        elapsed_s = max(time.perf_counter() - self.started, 1e-9)
        figures = {
            "images_per_second": self.images * num_processes / elapsed_s,
            "data_wait_fraction": self.waited_s / elapsed_s,
        }
        self.readings += 1
        slow = figures["data_wait_fraction"] > WAIT_WORTH_A_HINT and self.readings > 1
        self.slow_readings = self.slow_readings + 1 if slow else 0
        if self.slow_readings == 2 and self.say is not None:
            self.say(DATA_HINT.format(figures["data_wait_fraction"]))
            self.say = None
        self.restart()
        return figures


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB (1e9 bytes): of the GPU's allocator, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class RunLog:
    """Write `<experiment>/log.jsonl`, one row a line, and W&B when asked; only the main process writes.

    A resume cuts the rows beyond its step, so steps rise strictly; a fresh start sets an older log aside. W&B that is
    not installed, not reachable or breaks costs one message, never the run.
    """

    def __init__(self, experiment: Path, *, enabled: bool, resumed_step: int | None = None, lock: TextIO | None = None):
        self.file, self.enabled, self.wandb_run, self.lock = experiment / "log.jsonl", enabled, None, lock
        self.unwritten = ""
        if enabled and resumed_step is None:
            set_aside(self.file)
        elif enabled and self.file.exists():
            lines = self.file.read_text().splitlines()
            kept = [line for line in lines if (row := parse_row(line)) is not None and row["step"] <= resumed_step]
            temporary = self.file.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            temporary.replace(self.file)

    def start_wandb(self, args: argparse.Namespace) -> None:
        """Start or go on with a W&B run: online where a key is found, else offline."""
        if not self.enabled:
            return
        try:
            self.wandb = importlib.import_module("wandb")
        except ImportError as error:
            print(f"--log_wandb: wandb cannot be imported ({error}); logging to {self.file} alone", flush=True)
            return
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb_key_exists() else "offline")
        if "WANDB_MODE" not in os.environ and mode == "offline":
            print("--log_wandb: no API key found, so W&B runs offline; `wandb sync` uploads it later", flush=True)
        if self.with_wandb(lambda: self.init_wandb(args, mode)) is None and mode == "online":
            self.with_wandb(lambda: self.init_wandb(args, "offline"))

    def init_wandb(self, args: argparse.Namespace, mode: str):
        id_file = self.file.with_name("wandb_id.txt")
        run = self.wandb.init(
            project=re.sub(r"[/\\#?%:]", "_", args.experiment_name),  # W&B refuses these
            name=args.wandb_run_name,
            dir=self.file.parent,
            id=id_file.read_text().strip() if id_file.exists() else None,
            resume="allow",
            config=vars(args),
            mode=mode,
            settings=self.wandb.Settings(init_timeout=WANDB_TIMEOUT_S),
        )
        id_file.write_text(run.id + "\n")
        run.define_metric("*", step_metric="step")
        self.wandb_run = run
        return run

    def with_wandb(self, act: Callable):
        """Do something with W&B; if it fails, say so and leave W&B alone from then on."""
        try:
            return act()
        except (self.wandb.Error, OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            print(f"--log_wandb: W&B failed ({type(error).__name__}: {error}); the run goes on without it", flush=True)
            self.wandb_run = None
            return None

    def write(self, row: Mapping[str, float | None]) -> None:
        """Append a row; it carries "step". Rows that a full disk refuses are written with a later one."""
        if not self.enabled:
            return
        self.unwritten += json.dumps(row) + "\n"
        whole = self.file.stat().st_size if self.file.exists() else 0
        try:
            with self.file.open("a") as file:
                file.write(self.unwritten)
            self.unwritten = ""
        except OSError as error:
            print(f"{self.file} could not be written ({error}); its rows wait for the next one", flush=True)
            if self.file.exists():
                os.truncate(self.file, whole)
        if self.wandb_run is not None:
            self.with_wandb(lambda: self.wandb_run.log(dict(row)))

    def picture(self, key: str, path: Path, step: int) -> None:
        """Send a picture file to W&B."""
        if self.wandb_run is not None and path.exists():
            self.with_wandb(lambda: self.wandb_run.log({key: self.wandb.Image(str(path)), "step": step}))

    def close(self) -> None:
        if self.wandb_run is not None:
            self.with_wandb(self.wandb_run.finish)
        if self.lock is not None:
            self.lock.close()


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
            with going_on_without(experiment / LAST_CHECKPOINT):  # a kill right after the save left the older one
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


@contextlib.contextmanager
def going_on_without(file: Path) -> Iterator[None]:
    """Write a file that a run can do without: a disk that is full costs the file and a message."""
    try:
        yield
    except OSError as error:
        print(f"{file} could not be written ({error}); the run goes on", flush=True)


def save_picture(picture: Image.Image, path: Path) -> None:
    with going_on_without(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def parse_row(line: str) -> dict | None:
    """Read a row of a log; None for one that a crash cut short."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def wandb_key_exists() -> bool:
    """Look where `wandb login` leaves a key; wandb itself would stop the run to ask for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class BadFiles:
    """Keep count of the files that cannot be decoded, over all processes, and name each once in bad_files.txt."""

    def __init__(self, experiment: Path, num_images: int, max_fraction: float):
        self.file, self.num_images, self.max_fraction = experiment / "bad_files.txt", num_images, max_fraction
        self.new: dict[str, str] = {}
        self.met: set[str] = set()  # by this run; a file that was repaired since it was named counts no more
        self.named: set[str] = set()
        if self.file.exists():
            lines = self.file.read_text(errors="surrogateescape").splitlines()
            self.named = {line.split("\t")[0] for line in lines}

    def note(self, bad_files: Iterable[tuple[str, str]]) -> None:
        """Remember what one batch of this process met; nothing is written before `share`."""
        self.new |= {path: reason for path, reason in bad_files if path not in self.met}

    def share(self, accelerator: Accelerator, say: Callable[[str], None]) -> int:
        """Bring the processes' findings together, name the new ones and give the count; every process calls it.

        ValueError when the share of bad files is above the limit.
        """
        found = {path: reason for new in gather_object([self.new]) for path, reason in new.items()}
        self.new = {}
        self.met |= found.keys()
        unnamed = sorted(found.keys() - self.named)
        self.named |= found.keys()
        if unnamed and accelerator.is_main_process:
            # File names are bytes; those that are no UTF-8 are written back as they are, and shown with a mark.
            with going_on_without(self.file), self.file.open("a", errors="surrogateescape") as file:
                for path in unnamed:
                    line = f"{path}\t{' '.join(found[path].split())}"
                    file.write(line + "\n")
                    say(f"cannot be decoded, replaced by another: {line.encode(errors='replace').decode()}")
        if len(self.met) > self.max_fraction * self.num_images:
            raise ValueError(
                f"{len(self.met)} of {self.num_images:,} images cannot be decoded, more than --max_bad_fraction "
                f"{self.max_fraction} allows; they are named in {self.file}"
            )
        return len(self.met)


# ------------------------------------------------------------------------------------------------ metrics


def gather_shares(accelerator: Accelerator, values: Tensor, total: int) -> Tensor:
    """Put together what every process found for its share, every `num_processes`-th of `total` items, in their order.

    `values` (share, ...) -> (total, ...); shares are those of `share_of`.
    """
    _, world_size = share_of(accelerator)
    if world_size == 1:
        return values
    padded = values.new_zeros((-(-total // world_size), *values.shape[1:]))
    padded[: len(values)] = values
    gathered = accelerator.gather(padded).unflatten(0, (world_size, -1))  # (processes, share, ...)
    return gathered.transpose(0, 1).flatten(0, 1)[:total]


def accuracy(predictions: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of the labels (M,) that are among the first k predictions (M, >= k), best first, in percent."""
    return 100 * (predictions[:, :k] == labels[:, None]).any(dim=1).sum().item() / len(labels)


@functools.cache
def imagenet_names() -> dict[str, str]:
    """Give the first word of every ImageNet id, in English: n01440764 is a tench."""
    info = ImageNetInfo("imagenet-22k")
    return {name: info.label_name_to_description(name).split(",")[0] for name in info.label_names()}


def describe_class(name: str) -> str:
    """Put the name of a class folder into words where it is one of ImageNet's ids."""
    return imagenet_names().get(name, name) if re.fullmatch(r"n\d{8}", name) else name


class ConfusionMatrix:
    """Count how often which class is taken for which: `counts` (K, K) int64, rows true, columns predicted.

    From its counts, summed over images and processes, come all scores; none is a mean over batches or images.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", ignore_index: int | None = None):
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self.ignore_index = ignore_index

    def update(self, labels: Tensor, predictions: Tensor) -> None:
        """Add labels and predictions of any equal shape; where the label is `ignore_index` nothing counts.

        ValueError for shapes that differ, and for classes that do not exist: they would be counted as others.
        """
        num_classes = len(self.counts)
        if labels.shape != predictions.shape:
            raise ValueError(f"labels of shape {tuple(labels.shape)}, predictions of shape {tuple(predictions.shape)}")
        labels, predictions = (x.flatten().to(self.counts.device).long() for x in (labels, predictions))
        if self.ignore_index is not None:
            counted = labels != self.ignore_index
            labels, predictions = labels[counted], predictions[counted]
        if len(labels) and max(labels.max(), predictions.max()) >= num_classes:
            raise ValueError(f"label {labels.max()} or prediction {predictions.max()} of {num_classes} classes from 0")
        found = torch.bincount(labels * num_classes + predictions, minlength=num_classes**2)
        self.counts += found.view(num_classes, num_classes)

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up what all processes counted; every process calls it, once."""
        self.counts = accelerator.reduce(self.counts, "sum")

    def worst_pairs(self, count: int) -> list[tuple[int, int, int]]:
        """Give the most frequent errors as (true class, predicted class, times), most frequent first."""
        wrong = self.counts.clone().fill_diagonal_(0).flatten()
        times, places = wrong.sort(descending=True, stable=True)
        pairs = zip(places[:count].tolist(), times[:count].tolist(), strict=True)
        return [(*divmod(place, len(self.counts)), n) for place, n in pairs if n]

    def per_class(self) -> dict[str, Tensor]:
        """Give IoU, accuracy and Dice of each class in percent, (K,) float64; nan for classes that no label has."""
        counts = self.counts.double().cpu()
        hit, true, predicted = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
        scores = {"iou": hit / (true + predicted - hit), "acc": hit / true, "dice": 2 * hit / (true + predicted)}
        return {name: (100 * score).where(true > 0, torch.nan) for name, score in scores.items()}

    def figures(self, prefix: str = "testing") -> dict[str, float]:
        """Give mIoU, mean accuracy and mean Dice over the classes that occur, and the accuracy of all pixels, percent.

        MMSegmentation's mIoU, mAcc, aAcc and mDice wherever every class occurs, as in ADE20K.

        Deviation: a class that no label has is left out, also when it is predicted somewhere; MMSegmentation then
        counts it as 0. Reason: sets with a few of the classes could not be compared. Effect: none on ADE20K.
        """
        scores = self.per_class()
        found = {f"{prefix}_m{name}": score.nanmean().item() for name, score in scores.items()}
        counts = self.counts.double()
        return found | {f"{prefix}_aacc": (100 * counts.diagonal().sum() / counts.sum()).item()}


KNN_NEIGHBOURS = 20
KNN_TEMPERATURE = 0.07
KNN_CHUNK = 1024  # queries at a time: memory is this times the number of training features


def collect_features(
    accelerator: Accelerator,
    loader: DataLoader,
    encode: Callable[[Tensor], Tensor],
    watch: Callable[[DataLoader], Iterable] = iter,
) -> tuple[Tensor, Tensor]:
    """Encode a whole data set, (total, D) unit-length float32 and labels (total,), in its order on every process."""
    total = len(loader.dataset)
    if total < share_of(accelerator)[1]:
        raise ValueError(f"{total} images are fewer than {accelerator.num_processes} processes; start fewer")
    features, labels = [], []
    for batch in watch(loader):
        features.append(F.normalize(encode(batch.images.to(accelerator.device)).float(), dim=1))
        labels.append(batch.labels.to(accelerator.device))
    return gather_shares(accelerator, torch.cat(features), total), gather_shares(accelerator, torch.cat(labels), total)


def knn_classify(
    bank: Tensor, bank_labels: Tensor, features: Tensor, num_classes: int, num_neighbours: int = KNN_NEIGHBOURS
) -> Tensor:
    """Rank the classes of features (M, D) by their nearest neighbours in a bank (B, D): (M, K), best first.

    The vote of Wu et al. 2018 (arXiv 1805.01978, section 3.4), as DINO uses it: each neighbour counts
    exp(cosine similarity / 0.07). All features have unit length.
    """
    num_neighbours = min(num_neighbours, len(bank))
    ranked = []
    for chunk in features.split(KNN_CHUNK):
        similarity, nearest = (chunk @ bank.T).topk(num_neighbours, dim=1)  # (m, k)
        votes = torch.zeros(len(chunk), num_classes, device=chunk.device)
        votes.scatter_add_(1, bank_labels[nearest], ((similarity - 1) / KNN_TEMPERATURE).exp())
        ranked.append(votes.argsort(dim=1, descending=True, stable=True))
    return torch.cat(ranked)


# ------------------------------------------------------------------------------------------------ pictures


def draw_rows(
    rows: Mapping[str, Tensor],
    captions: Mapping[str, list[str]] | None = None,
    *,
    min_side: int = 128,
    margin: int = 4,
) -> Image.Image:
    """Draw titled rows of images, each (N, C, H, W) with 0 black and 1 white; small images are enlarged.

    One channel is drawn grey, more than three show their first three. `captions` give every image of a row a line
    below it, cut to the image's width.
    """
    height, width = next(iter(rows.values())).shape[-2:]
    zoom = max(1, math.ceil(min_side / min(height, width)))
    height, width = height * zoom, width * zoom
    font = ImageFont.load_default(size=14)
    title_height, columns = 20, max(len(images) for images in rows.values())
    caption_height = 20 if captions else 0
    row_height = title_height + height + caption_height + margin
    longest_title = math.ceil(max(font.getlength(title) for title in rows))
    canvas_width = max(columns * (width + margin), longest_title + margin) + margin
    canvas = Image.new("RGB", (canvas_width, len(rows) * row_height + margin), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (title, images) in enumerate(rows.items()):
        top = margin + row * row_height
        draw.text((margin, top), title, fill="black", font=font)
        for column, image in enumerate(to_uint8(images)):
            picture = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            left = margin + column * (width + margin)
            canvas.paste(picture, (left, top + title_height))
            if captions:
                text = captions[title][column]
                while font.getlength(text) > width:
                    text = text[:-1]
                draw.text((left, top + title_height + height + 2), text, fill="black", font=font)
    return canvas


def colour_classes(labels: Tensor, palette: np.ndarray) -> Tensor:
    """Paint a label map (H, W) in the colours of its classes, (3, H, W) in 0..1; ignored pixels are black."""
    colours = np.zeros((256, 3), dtype=np.float32)
    colours[: len(palette)] = palette / 255
    return torch.from_numpy(colours)[labels.cpu().long()].permute(2, 0, 1)


def draw_legend(names: Mapping[str, tuple[int, int, int]], width: int) -> Image.Image:
    """Draw a box of its colour beside every name, in as many lines as the width needs."""
    font, places, x, y = ImageFont.load_default(size=14), [], 4, 4
    for name in names:
        needed = 18 + math.ceil(font.getlength(name)) + 12
        if x + needed > width and x > 4:
            x, y = 4, y + 20
        places.append((x, y))
        x += needed
    canvas = Image.new("RGB", (width, y + 22), "white")
    draw = ImageDraw.Draw(canvas)
    for (name, colour), (x, y) in zip(names.items(), places, strict=True):
        draw.rectangle((x, y, x + 13, y + 13), fill=tuple(int(value) for value in colour), outline="black")
        draw.text((x + 18, y - 2), name, fill="black", font=font)
    return canvas


def reconstruction_titles(mask_ratio: float, norm_pix_loss: bool) -> list[str]:
    """Name the four rows of a reconstruction picture."""
    answer = "reconstruction"
    if norm_pix_loss:
        answer += " (true mean and contrast of each patch put back: norm-pix)"
    return [
        "original",
        f"masked ({mask_ratio:.0%} removed)",
        answer,
        "reconstruction with the visible patches pasted in",
    ]


def to_uint8(images: Tensor) -> np.ndarray:
    """Clip (N, C, H, W) in 0..1 to uint8 (N, H, W, 3), grey repeated, channels after the third left out."""
    images = images.detach().float().cpu().clamp(0, 1)
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
