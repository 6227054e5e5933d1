"""Processes, device and kernels: what Accelerate gives, and what has to be told to it.

Nothing here knows how far a run is, nor what it trains.
"""

import argparse
import ctypes
import datetime
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, DynamoBackend, broadcast
from torch import Tensor, nn

from storage.bands import describe_depth, describe_pages, value_percentiles
from storage.console import protect_output
from storage.decoding import CHANNEL_MODES
from storage.demo import write_demo_data
from storage.labels import describe_labels, has_colours, label_table, refuse_one_class
from storage.lists import FileList, ListCache, check_same_classes, find_splits, list_images, refuse_inside
from storage.packs import is_packed
from storage.pair_folders import SPLIT_NAMES, PairLayout, find_pair_folders
from storage.pairs import PairList, PairSurvey, check_values, choose_ignore_zero, list_pairs, survey_pairs

SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)
PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that a process gets when its parent ends, however that ends
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


def build_accelerator(gradient_accumulation_steps: int = 1, *, timeout_minutes: float = 30) -> Accelerator:
    """Join the processes that the launcher started; RuntimeError when each of them would train alone.

    A process that waits for another longer than the timeout gives up, and with it the launcher and the job.
    """
    protect_output()
    if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":  # accelerate launch started this process
        # A launcher that is killed, and one that starts a single process and only gets SIGTERM, would leave it training
        # alone. With this 60 of 60 signals to the launcher ended in a saved state (benchmarks/RESULTS.md).
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if is_orphan():
            raise RuntimeError("the launcher has ended while this process started, which would now train alone")
    accelerator = Accelerator(
        gradient_accumulation_steps=gradient_accumulation_steps,
        kwargs_handlers=[
            # No static_graph: with it, torch's reducer fails on passes that are accumulated without a reduction.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
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
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise ValueError("--mixed_precision fp16 is for GPUs; on a CPU torch would compute in float32: give bf16 or no")
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def is_orphan() -> bool:
    """Tell whether the launcher ended before this process asked for a signal at its end (Linux).

    Whoever adopts an orphan is neither in its session or group, as `accelerate launch` and any script in between are,
    nor has torch loaded, as torch's launcher has, which gives each process a session of its own.
    """
    parent = os.getppid()
    try:
        related = os.getsid(parent) == os.getsid(0) or os.getpgid(parent) == os.getpgrp()
        return not related and "libtorch" not in Path(f"/proc/{parent}/maps").read_text("utf-8", "replace")
    except OSError:  # it has just ended, or is of another user, as a launcher is not
        return True


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, unless MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_MAX_ is set.

    A step on the CPU allocates and frees the same tensors as the one before. By default glibc gives large ones back to
    Linux, which hands them out again page by page, zeroed. Worth 2 to 3 s of a 16 s step of ViT-B at batch 32 on two
    CPU cores; nothing on a GPU. Other C libraries are left as they are.
    """
    if sys.platform != "linux" or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"} & os.environ.keys():
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_MAX, 0)


def compile_in_place(accelerator: Accelerator, model: nn.Module) -> None:
    """Do what `accelerate launch --dynamo_backend` asks for without wrapping the model.

    Accelerate's own way puts `_orig_mod.` before every key of model.safetensors, which then loads nowhere else.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend != DynamoBackend.NO:
        model.compile(**plugin.to_kwargs())
        plugin.backend = DynamoBackend.NO


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module]:
    """Compile a model where the launcher asks for it, let Accelerate wrap it with its optimizer, and give it bare too.

    In bfloat16 on a CPU a model that can attend without torch's fused kernel does: 1.15 times as fast on two cores.
    """
    in_bf16_on_cpu = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16"
    if in_bf16_on_cpu and hasattr(model, "unfuse_attention"):
        model.unfuse_attention()
    compile_in_place(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer, accelerator.unwrap_model(model)


def cap_workers(num_workers: int) -> int:
    """Give each training process at most its share of this machine's cores as data workers."""
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(num_workers, max(1, cores // local_processes))


def draw_demo_data(accelerator: Accelerator, working_directory: str) -> Path:
    """Give the folder of the drawn scenes, for which the main process draws them where they are not there yet."""
    folder = Path(working_directory) / "demo_data"
    accelerator.print(f"{'demo':<16}scenes are drawn into {folder}, unless they are there already")
    with accelerator.main_process_first():
        write_demo_data(folder)
    return folder


def list_cache(accelerator: Accelerator, args: argparse.Namespace) -> ListCache:
    """Give the cache of file lists; with --rescan_data the first process of a machine looks anew, for all of them."""
    rescan = args.rescan_data and accelerator.is_local_main_process
    return ListCache(Path(args.working_directory) / "file_lists", rescan)


def list_folder(accelerator: Accelerator, folder: Path, args: argparse.Namespace) -> FileList:
    """List the images of a folder; the first process of a machine looks, the others read what it found."""
    with accelerator.local_main_process_first():
        files = list_images(folder, list_cache(accelerator, args))
    for note in files.notes:
        accelerator.print(f"{'in ' + folder.name + '/':<16}{note}")
    return files


def list_splits(accelerator: Accelerator, root: str, args: argparse.Namespace) -> tuple[FileList, FileList | None]:
    """List the training and the held-out images (None without) of a data set; ValueError for a run that lies inside.

    Without a validation folder --val_fraction draws them from the training images.
    """
    train_folder, val_folder, notes = find_splits(root)
    for note in notes:
        accelerator.print(f"{'data':<16}{note}")
    refuse_inside(args.working_directory, train_folder)
    if val_folder is not None and root == args.path_to_data:
        refuse_second_split(val_folder, args)
    train_files = list_folder(accelerator, train_folder, args)
    if val_folder is not None:
        return train_files, list_folder(accelerator, val_folder, args)
    return hold_out(accelerator, train_files, args) if args.val_fraction else (train_files, None)


def refuse_second_split(val_folder: Path, args: argparse.Namespace) -> None:
    if args.val_fraction:
        raise ValueError(
            f"--val_fraction {args.val_fraction:g} draws held-out images from the training images, but {val_folder} "
            "holds some; leave the flag out, or move that folder away"
        )


def hold_out(accelerator: Accelerator, files: FileList | PairList, args: argparse.Namespace) -> tuple:
    """Split a list by --val_fraction and --seed, the same in every process, and say so; ValueError for a single one."""
    if len(files) < 2:
        raise ValueError(f"--val_fraction needs two images at least, and there is one in {files.root}")
    parts = files.split(args.val_fraction, args.seed)
    counts, share = [len(part) for part in parts], f"--val_fraction {args.val_fraction:g}, --seed {args.seed}"
    accelerator.print(f"{'split':<16}{counts[0]:,} for training, {counts[1]:,} held out, by their paths ({share})")
    return parts


def list_probe_files(accelerator: Accelerator, args: argparse.Namespace) -> list[FileList]:
    """List the labelled images of the k-NN probe: those that lend their labels, and those that are classified."""
    root = args.path_to_probe_data or args.path_to_data
    train_files, val_files = list_splits(accelerator, root, args)
    if val_files is None:
        raise FileNotFoundError(f"--probe_every needs {root} to hold train/ and val/, or give --path_to_probe_data")
    check_same_classes(val_files.classes, train_files.classes, val_files.root, str(train_files.root))
    if not train_files.classes:
        raise ValueError(f"--probe_every needs labels, but {train_files.root} has images outside class folders")
    return [files.subsample(args.probe_images) for files in (train_files, val_files)]


def list_pairs_of(accelerator: Accelerator, split: str, args: argparse.Namespace) -> PairList:
    """Pair images and label maps of a split; without a validation folder --val_fraction draws it from training's."""
    root = Path(args.path_to_data).resolve()
    layout = PairLayout(args.image_folder, args.label_folder, args.image_suffix, args.label_suffix)
    held_out = root / "validation" if is_packed(root / "validation") else None
    if held_out is None and (folders := find_pair_folders(root, "validation", layout)) is not None:
        held_out = folders.root / folders.images
    if held_out is not None:
        refuse_second_split(held_out, args)
    elif args.val_fraction and split in SPLIT_NAMES:
        return hold_out(accelerator, list_pairs(root, "training", layout), args)[split == "validation"]
    elif split == "validation" and find_pair_folders(root, "training", layout) is not None:
        raise FileNotFoundError(f"{root} has no validation pairs: add them, or draw some by --val_fraction 0.1")
    return list_pairs(root, split, layout)


def list_checked_pairs(
    accelerator: Accelerator, split: str, args: argparse.Namespace, *, rotate: bool = True
) -> PairSurvey:
    """Pair the images and label maps of a split, "training" or another, check that all can be used, and say so.

    `rotate` tells whether label maps lie on images as turned by their rotation flags, where no pair of the split does.
    Where nobody says whether 0 is ignored, the values of the training label maps decide (args.ignore_zero).
    """
    pairs = list_pairs_of(accelerator, split, args)
    if split == "training":
        choose_value_range(accelerator, args, pairs)
    accelerator.print(f"{'checking':<16}{pairs.describe()}")
    for note in pairs.notes:
        accelerator.print(f"{'left out':<16}{note}")
    decode = split != "training"  # where an image that cannot be decoded is not replaced by another
    how = dict(decode=decode, rotate=rotate, channels=args.input_channels, own_units=args.value_range is not None)
    table = label_table(args.num_classes, bool(args.ignore_zero), args.label_values)
    how |= dict(colours=has_colours(table))
    with accelerator.local_main_process_first():
        survey = survey_pairs(pairs, cap_workers(args.num_workers), list_cache(accelerator, args), **how)
    lines = {}
    if args.ignore_zero is None:
        args.ignore_zero, lines["label value 0"] = choose_ignore_zero(survey, args.num_classes)
        table = label_table(args.num_classes, args.ignore_zero)
    check_values(survey, table)
    if split == "training":
        refuse_one_class(survey.pixels, table, args.num_classes, pairs.folder_of(pairs.label_maps))
    lines["labels"] = describe_labels(survey.pixels, table, args.class_names)
    print_lines(accelerator, lines | ({"rotation": survey.note} if survey.note else {}))
    return survey


def choose_value_range(accelerator: Accelerator, args: argparse.Namespace, files: FileList | PairList) -> None:
    """Settle how values become pixels (args.value_range) and pictures (args.show_channels), by a sample, and say so.

    None: 8-bit pictures. "own": the files' units. Two numbers: these become 0 and 1. ValueError where mean and
    standard deviation cannot belong to that.
    """
    values, lines = args.value_range, {}
    if values is None and (args.input_channels not in CHANNEL_MODES or files.path(0).lower().endswith(".npy")):
        values = "own"
    if values == "auto":
        values = value_percentiles(files, args.input_channels)  # the same in every process
    statistics = f"--mean {' '.join(f'{value:g}' for value in args.mean)} and --std"
    if values == "own":
        numbers = (" ".join(f"{value:g}" for value in values) for values in (args.mean, args.std))
        lines["values"] = f"in the files' own units, mean {next(numbers)}, standard deviation {next(numbers)}"
        if not args.statistics_given:
            raise ValueError(
                "values stay in the files' own units, so --mean and --std have to be given in them: python "
                f"tools/measure_values.py {files.root} --input_channels {args.input_channels} prints them. Or give "
                "--value_range LOW HIGH or auto"
            )
    elif max(map(abs, args.mean)) > 1 or max(args.std) > 1:
        scaled = " ".join(f"{value / 255:.4g}" for value in args.mean), " ".join(f"{v / 255:.4g}" for v in args.std)
        raise ValueError(
            f"{statistics} are of pixels 0 to 1; if yours are of pixels 0 to 255, give --mean {scaled[0]} "
            f"--std {scaled[1]}"
        )
    elif values is None:
        if accelerator.is_main_process:
            found = {"values": describe_depth(files, args.input_channels), "pages": describe_pages(files)}
            lines = {name: text for name, text in found.items() if text}
    else:
        lines["values"] = f"{values[0]:g} becomes 0 and {values[1]:g} becomes 1, in float32"
    args.value_range = values
    args.show_channels = None if values is None else args.show_channels  # 8-bit pictures are shown as they are
    print_lines(accelerator, lines)


def print_lines(accelerator: Accelerator, lines: Mapping[str, str]) -> None:
    """Print texts behind their names, one a line, from the main process."""
    for name, text in lines.items():
        accelerator.print(f"{name:<16}{text}")


def process_slice(accelerator: Accelerator) -> tuple[int, int]:
    """Give rank and world size of an evaluation: this process takes every `second`-th image from `first` on.

    A sharded model answers only when all processes ask together, so there each takes all images.
    """
    if accelerator.distributed_type in SHARDING:
        return 0, 1
    return accelerator.process_index, accelerator.num_processes


def gather_slices(accelerator: Accelerator, values: Tensor, total: int) -> Tensor:
    """Put together, in order, what each process found for its slice of `total` items: (slice, ...) -> (total, ...)."""
    _, world_size = process_slice(accelerator)
    if world_size == 1:
        return values
    padded = values.new_zeros((-(-total // world_size), *values.shape[1:]))
    padded[: len(values)] = values
    gathered = accelerator.gather(padded).unflatten(0, (world_size, -1))  # (processes, slice, ...)
    return gathered.transpose(0, 1).flatten(0, 1)[:total]


def collect_features(
    accelerator: Accelerator, batches: Iterable, total: int, encode: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Encode a data set of `total` images, (total, D) unit-length float32 and labels (total,), on every process."""
    if total < process_slice(accelerator)[1]:
        raise ValueError(f"{total} images are fewer than {accelerator.num_processes} processes; start fewer")
    features, labels = [], []
    for batch in batches:
        with accelerator.autocast():
            found = encode(batch.images.to(accelerator.device))
        features.append(F.normalize(found.float(), dim=1))
        labels.append(batch.labels.to(accelerator.device))
    return gather_slices(accelerator, torch.cat(features), total), gather_slices(accelerator, torch.cat(labels), total)


def broadcast_buffers(accelerator: Accelerator, model: nn.Module) -> None:
    """Give all processes the first one's buffers, such as a batch norm's statistics, as a checkpoint has them.

    Torch's DDP does so before every forward pass of training, but not after the last.
    """
    if accelerator.num_processes > 1 and accelerator.distributed_type not in SHARDING:
        broadcast(list(model.buffers()), from_process=0)
