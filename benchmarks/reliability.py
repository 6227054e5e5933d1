"""What surviving costs: seconds of a checkpoint, and of agreeing after each step.

    python benchmarks/reliability.py --working_directory DISK

Each cost is measured in turn with the work that it is a part of. The checkpoint goes to --working_directory, so that is
the disk it tells about.
"""

import argparse
import functools
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from measure import alternate, build_parser, spread

from model import MODEL_CONFIGS, ViTMAEForPreTraining
from storage.files import checksum_of
from training.checkpoints import Checkpoints
from training.signals import Interruptions
from training.states import find_damage

NO_CONFIG = {"architecture": "ViTMAEForPreTraining"}
STEPS = 200  # of a round in which processes agree
LAUNCH_TWO = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH_TWO += ["--num_machines", "1", "--dynamo_backend", "no", "--main_process_port", "0", "--mixed_precision", "no"]
ONE_THREAD_ON_CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

# By the clock: a disk and another process are waited for.
take_times = functools.partial(alternate, clock=time.perf_counter)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__, rounds=7)
    parser.add_argument("--working_directory", type=Path, required=True, help="on the disk that checkpoints go to")
    parser.add_argument("--model", choices=MODEL_CONFIGS, default="mae_vit_base_patch16")
    return parser.parse_args(argv)


def print_spread(name: str, values: list[float], unit: float = 1.0) -> None:
    print(f"  {name:<58}{spread([value / unit for value in values])}")


def measure_checkpoints(args: argparse.Namespace) -> None:
    """Time a whole save, what Accelerate alone takes, the checksums, and the check before a resume."""
    accelerator = Accelerator(cpu=True)
    model = ViTMAEForPreTraining(MODEL_CONFIGS[args.model])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()  # so that its state is there
    model, optimizer = accelerator.prepare(model, optimizer)
    folder, plain = args.working_directory / "reliability", args.working_directory / "reliability_plain"
    folder.mkdir(parents=True)
    checkpoints, epochs = Checkpoints(accelerator, folder, keep=2), itertools.count()

    def save() -> None:
        epoch = next(epochs)
        checkpoints.save(model, NO_CONFIG, {"epoch": epoch, "step": epoch}, epoch_ends=True)

    def newest() -> Path:
        return (folder / "last_checkpoint").resolve()

    runs = {
        "whole: written, checksums, on the disk, old one removed": save,
        "of which Accelerate's save_state alone": lambda: accelerator.save_state(plain),
        "of which checksums": lambda: [checksum_of(file) for file in newest().iterdir()],
        "checking it before a resume": lambda: find_damage(newest()),
    }
    times, size = take_times(runs, args.rounds), checkpoints.size / 1e9
    print(f"a checkpoint of {args.model}, {size:.2f} GB; seconds per GB, median (range of {args.rounds})")
    for name, seconds in times.items():
        print_spread(name, seconds, size)
    shutil.rmtree(folder)
    shutil.rmtree(plain)


def measure_agreement(args: argparse.Namespace) -> None:
    """Time steps of a small model on two processes with and without the agreement."""
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.GELU(), torch.nn.Linear(512, 512))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    interruptions = Interruptions(accelerator, Checkpoints(accelerator, args.working_directory, 2), save_minutes=30)
    inputs = torch.randn(256, 512)

    def steps(agree: Callable[[], int]) -> None:
        for _ in range(STEPS):
            accelerator.backward(model(inputs).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            agree()

    runs = {"agreeing": lambda: steps(interruptions.agree), "alone": lambda: steps(lambda: 0)}
    times = take_times(runs, args.rounds)
    differences = [a - b for a, b in zip(times["agreeing"], times["alone"], strict=True)]
    if accelerator.is_main_process:
        print(f"agreeing after a step, {accelerator.num_processes} processes over gloo on this machine")
        print_spread("microseconds of a step without it", times["alone"], 1e-6 * STEPS)
        print_spread("microseconds more with it", differences, 1e-6 * STEPS)
    accelerator.end_training()


def main(args: argparse.Namespace) -> None:
    if "WORLD_SIZE" in os.environ:
        measure_agreement(args)
        return
    measure_checkpoints(args)
    flags = ["--working_directory", str(args.working_directory), "--rounds", str(args.rounds)]
    subprocess.run([*LAUNCH_TWO, __file__, *flags], env=os.environ | ONE_THREAD_ON_CPU, check=True)


if __name__ == "__main__":
    main(parse_args())
