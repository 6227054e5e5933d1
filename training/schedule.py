"""Batch and epochs that a recipe leaves open until the number of training images is known."""

import argparse
import math
from typing import TYPE_CHECKING, NamedTuple

from training.flags import WARMUP_SHARE, micro_batch_size

if TYPE_CHECKING:  # a script needs `Span` before it imports what takes seconds
    from accelerate import Accelerator

STEPS_PER_EPOCH = 16  # that an epoch has at least where the batch is left open, down to the recipe's lowest
SAVES = 10  # checkpoints that are kept for good, where --save_checkpoint_interval is left open


class Span(NamedTuple):
    """How long a run is, in optimizer steps, and the range of its batch: images of a step, and of one on a process."""

    steps: int
    lowest_batch: int
    highest_batch_per_process: int
    highest_batch: float = math.inf


def fit_batch(num_images: int, span: Span, world_size: int) -> int:
    """Give the images of a step: the highest power of two that leaves an epoch STEPS_PER_EPOCH steps, within the span.

    The same on any number of processes, but for large data, so that a run may go on with another number.
    """
    fitting = 2 ** int(math.log2(max(1, num_images / STEPS_PER_EPOCH)))
    highest = min(span.highest_batch, span.highest_batch_per_process * world_size)
    return int(min(max(fitting, span.lowest_batch), highest))


def settle(accelerator: "Accelerator", args: argparse.Namespace, span: Span, num_images: int, *options: dict) -> None:
    """Choose what `args` leave open (None) by the number of training images, and say so.

    That is --per_gpu_batch_size, --epochs, --warmup_epochs and --save_checkpoint_interval. `options` of samplers and
    loaders that hold the images of a forward pass are set to it. The same images give the same choice.
    """
    chosen = [name for name in ("per_gpu_batch_size", "epochs") if getattr(args, name) is None]
    world_size, passes = accelerator.num_processes, args.gradient_accumulation_steps
    if args.per_gpu_batch_size is None:
        batch = fit_batch(num_images, span, world_size)
        args.per_gpu_batch_size = passes * math.ceil(batch / (passes * world_size))
        for table in options:
            table |= {name: micro_batch_size(args) for name in ("micro_batch_size", "batch_size") if name in table}
    if args.epochs is None:
        args.epochs = math.ceil(span.steps / max(1, num_images // (args.per_gpu_batch_size * world_size)))
    if args.warmup_epochs is None:
        args.warmup_epochs = WARMUP_SHARE * args.epochs
    if args.save_checkpoint_interval is None:
        args.save_checkpoint_interval = math.ceil(args.epochs / SAVES)
    if chosen:
        values = ", ".join(f"--{name} {getattr(args, name)}" for name in chosen)
        accelerator.print(f"{'recipe':<16}{values}, as fits {num_images:,} training images")
