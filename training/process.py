"""Processes, device and kernels: what Accelerate gives, and what has to be told to it.

Nothing here knows how far a run is, nor what it trains.
"""

import ctypes
import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import accelerate
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, DynamoBackend, broadcast
from torch import Tensor, nn

from storage.console import protect_output
from storage.workers import end_with_parent

SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)
GIT_TIMEOUT_S = 5  # for what a run only notes
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


def build_accelerator(gradient_accumulation_steps: int = 1, *, timeout_minutes: float = 30) -> Accelerator:
    """Join the processes that the launcher started; RuntimeError when each of them would train alone.

    A process that waits for another longer than the timeout gives up, and with it the launcher and the job.
    """
    protect_output()
    if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":  # accelerate launch started this process
        # A launcher that is killed, and one that starts a single process and only gets SIGTERM, would leave it training
        # alone. With this 60 of 60 signals to the launcher ended in a saved state (benchmarks/RESULTS.md).
        end_with_parent()
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


# ------------------------------------------------------------------------------------------------ what it runs on


def find_commit() -> str:
    """Give the commit of this code, where git knows one in time, and whether files differ from it."""
    git, found = ["git", "-C", str(Path(__file__).parent)], []
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # a lock that is left would stop the user's own git
    for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run([*git, *words], capture_output=True, env=environment, timeout=GIT_TIMEOUT_S)
            found.append(done.stdout.strip().decode(errors="replace"))
        except (OSError, subprocess.TimeoutExpired):  # there is no git, or a disk that takes too long
            found.append("")
    commit, changes = found
    return (commit or "unknown") + (" with changes" if changes else "")


def name_device(device: torch.device) -> str:
    """Name a GPU, or the processor with the number of its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"


def describe_environment(accelerator: Accelerator) -> dict[str, str]:
    """Say what a run is made with: time, script, commit, hardware and versions, all as texts."""
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "script": os.path.basename(sys.argv[0]),
        "commit": find_commit(),
        "hardware": f"{accelerator.num_processes} x {name_device(accelerator.device)}",
        "precision": accelerator.mixed_precision,
        "python": platform.python_version(),
        **{module.__name__: str(module.__version__) for module in (torch, timm, accelerate)},
    }
