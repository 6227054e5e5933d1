"""What surviving costs: seconds of a checkpoint, of seeding each sample, and of agreeing after each step.

    python benchmarks/reliability.py --path_to_images FOLDER --working_directory DISK

Each cost is measured in turn with the work that it is a part of. The checkpoint goes to --working_directory, so that is
the disk it tells about.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dataset
from dataset import ImageDataset, SampleKey, build_pretraining_transform
from model import MODEL_CONFIGS, ViTMAEForPreTraining
from storage.files import checksum_of, sync_to_disk
from storage.lists import list_images
from training.checkpoints import Checkpoints, find_damage
from training.signals import Interruptions

NO_CONFIG = {"architecture": "ViTMAEForPreTraining"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path_to_images", type=Path, help="photographs that stand for the training data")
    parser.add_argument("--working_directory", type=Path, required=True, help="on the disk that checkpoints go to")
    parser.add_argument("--model", choices=MODEL_CONFIGS, default="mae_vit_base_patch16")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each (default: 7)")
    parser.add_argument("--steps", type=int, default=200, help="steps of a round in which processes agree")
    return parser.parse_args(argv)


def seconds(act: Callable[[], None]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def in_turn(rounds: int, **ways: Callable[[], None]) -> dict[str, list[float]]:
    """Time ways of doing something, one after the other in each round; the first round warms up and is left out."""
    times = {name: [] for name in ways}
    for round_number in range(rounds + 1):
        for name, act in ways.items():
            times[name] += [seconds(act)] if round_number else (seconds(act), [])[1]
    return times


def describe(values: list[float], unit: float = 1.0) -> str:
    low, middle, high = (value / unit for value in (min(values), statistics.median(values), max(values)))
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def measure_checkpoints(args: argparse.Namespace) -> None:
    """Time a whole save, what Accelerate alone takes, the checksums, the flush, and the check before a resume."""
    accelerator = Accelerator(cpu=True)
    model = ViTMAEForPreTraining(MODEL_CONFIGS[args.model])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()  # so that its state is there
    model, optimizer = accelerator.prepare(model, optimizer)
    folder, plain = args.working_directory / "reliability", args.working_directory / "reliability_plain"
    folder.mkdir(parents=True)
    checkpoints, epochs = Checkpoints(accelerator, folder, keep=2), iter(range(10_000))

    def save() -> None:
        epoch = next(epochs)
        checkpoints.save(model, NO_CONFIG, {"epoch": epoch, "step": epoch}, epoch_ends=True)

    def save_alone() -> None:
        accelerator.save_state(plain)

    def newest() -> list[Path]:
        return list((folder / "last_checkpoint").resolve().iterdir())

    times = in_turn(
        args.rounds,
        whole=save,
        alone=save_alone,
        checksums=lambda: [checksum_of(file) for file in newest()],
        flush=lambda: [sync_to_disk(file) for file in plain.iterdir()],
        check=lambda: find_damage((folder / "last_checkpoint").resolve()),
    )
    size = checkpoints.size / 1e9
    print(f"a checkpoint of {args.model}, {size:.2f} GB; seconds per GB, median (range of {args.rounds})")
    for name, text in (
        ("whole", "whole: written, checksums, on the disk, old one removed"),
        ("alone", "of which Accelerate's save_state alone"),
        ("checksums", "of which checksums"),
        ("flush", "flushing what save_state left in memory"),
        ("check", "checking it before a resume"),
    ):
        print(f"  {text:<60}{describe(times[name], size)}")
    shutil.rmtree(folder)
    shutil.rmtree(plain)


def measure_seeding(args: argparse.Namespace) -> None:
    """Time samples as a data worker makes them, and their seeding alone.

    Samples without seeds would be other crops, of other sizes, whose time differs by more than what is sought.
    """
    dataset.get_worker_info = lambda: "a worker"
    data = ImageDataset(list_images(args.path_to_images), build_pretraining_transform((224, 224), 0.2), noise_size=196)
    keys = [SampleKey(0, index) for index in range(min(len(data), 200))]

    def read() -> None:
        for key in keys:
            data[key]

    def seed() -> None:
        for key in keys:
            with dataset.seeded(0, *key, torch_only=data.cuts_first):
                pass

    times = in_turn(args.rounds, whole=read, seeds=seed)
    shares = [100 * seeds / whole for seeds, whole in zip(times["seeds"], times["whole"], strict=True)]
    print(f"a training sample (decoded, cropped to 224, flipped; {len(keys)} photographs)")
    print(f"  microseconds, whole                    {describe(times['whole'], 1e-6 * len(keys))}")
    print(f"  microseconds, of which seeding         {describe(times['seeds'], 1e-6 * len(keys))}")
    print(f"  share of seeding, percent              {describe(shares)}")


def measure_agreement(args: argparse.Namespace) -> None:
    """Time steps of a small model on two processes with and without the agreement."""
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.GELU(), torch.nn.Linear(512, 512))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    interruptions = Interruptions(accelerator, Checkpoints(accelerator, args.working_directory, 2), save_minutes=30)
    inputs = torch.randn(256, 512)

    def steps(agree: Callable[[], int]) -> None:
        for _ in range(args.steps):
            accelerator.backward(model(inputs).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            agree()

    times = in_turn(args.rounds, agreeing=lambda: steps(interruptions.agree), alone=lambda: steps(lambda: 0))
    differences = [(a - b) / args.steps * 1e6 for a, b in zip(times["agreeing"], times["alone"], strict=True)]
    if accelerator.is_main_process:
        print(f"agreeing after a step, {accelerator.num_processes} processes over gloo on this machine")
        print(f"  microseconds of a step without it      {describe(times['alone'], 1e-6 * args.steps)}")
        print(f"  microseconds more with it              {describe(differences)}")
    accelerator.end_training()


def main(args: argparse.Namespace) -> None:
    if "WORLD_SIZE" in os.environ:
        measure_agreement(args)
        return
    measure_checkpoints(args)
    if args.path_to_images is not None:
        measure_seeding(args)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    flags = ["--working_directory", str(args.working_directory), "--rounds", str(args.rounds)]
    subprocess.run([*command, __file__, *flags, "--steps", str(args.steps)], env=environment, check=True)


if __name__ == "__main__":
    main(parse_args())
