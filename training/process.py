"""Processes, device and kernels: what Accelerate gives, and what has to be told to it."""

import ctypes
import datetime
import os
import signal
import sys
from collections.abc import Callable, Iterable

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
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

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


def process_slice(accelerator: Accelerator) -> tuple[int, int]:
    """Give which images of an evaluation are this process's: every `second`-th from `first` on.

    A sharded model answers only when all processes ask together, so there each takes all images.
    """
    if accelerator.distributed_type in SHARDING:
        return 0, 1
    return accelerator.process_index, accelerator.num_processes


def broadcast_buffers(accelerator: Accelerator, model: nn.Module) -> None:
    """Give all processes the first one's buffers, such as a batch norm's statistics, as a checkpoint has them.

    Torch's DDP does so before every forward pass of training, but not after the last.
    """
    if accelerator.num_processes > 1 and accelerator.distributed_type not in SHARDING:
        for buffer in model.buffers():
            broadcast(buffer, from_process=0)


def compile_in_place(accelerator: Accelerator, model: nn.Module) -> None:
    """Do what `accelerate launch --dynamo_backend` asks for without wrapping the model.

    Accelerate's own way puts `_orig_mod.` before every key of model.safetensors, which then loads nowhere else.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend != DynamoBackend.NO:
        model.compile(**plugin.to_kwargs())
        plugin.backend = DynamoBackend.NO


def cap_workers(num_workers: int) -> int:
    """Give each training process at most its share of this machine's cores as data workers."""
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(num_workers, max(1, cores // local_processes))


SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def gather_slices(accelerator: Accelerator, values: Tensor, total: int) -> Tensor:
    """Put together what every process found for its share, every `num_processes`-th of `total` items, in their order.

    `values` (share, ...) -> (total, ...); shares are those of `process_slice`.
    """
    _, world_size = process_slice(accelerator)
    if world_size == 1:
        return values
    padded = values.new_zeros((-(-total // world_size), *values.shape[1:]))
    padded[: len(values)] = values
    gathered = accelerator.gather(padded).unflatten(0, (world_size, -1))  # (processes, share, ...)
    return gathered.transpose(0, 1).flatten(0, 1)[:total]


def collect_features(
    accelerator: Accelerator,
    loader: DataLoader,
    encode: Callable[[Tensor], Tensor],
    watch: Callable[[DataLoader], Iterable] = iter,
) -> tuple[Tensor, Tensor]:
    """Encode a whole data set, (total, D) unit-length float32 and labels (total,), in its order on every process."""
    total = len(loader.dataset)
    if total < process_slice(accelerator)[1]:
        raise ValueError(f"{total} images are fewer than {accelerator.num_processes} processes; start fewer")
    features, labels = [], []
    for batch in watch(loader):
        features.append(F.normalize(encode(batch.images.to(accelerator.device)).float(), dim=1))
        labels.append(batch.labels.to(accelerator.device))
    return gather_slices(accelerator, torch.cat(features), total), gather_slices(accelerator, torch.cat(labels), total)
