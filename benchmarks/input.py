"""Measure how many training crops one core makes, each way beside the plain Pillow pipeline.

    OMP_NUM_THREADS=1 python benchmarks/input.py --path_to_data PHOTOGRAPHS

The ways take turns, a round each, which is all images once with the same random crops; what counts is the processor
time of the process, so that other work on the machine disturbs little. This project decodes with the fastest decoder
that is installed. The loaders with two workers take turns epoch by epoch, by the clock. Packs are made in a temporary
folder.
"""

import argparse
import functools
import gc
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from measure import CPU, ROOT, alternate, build_parser, describe_machine, print_table, ratio
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from dataset import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageDataset,
    SampleKey,
    StepSampler,
    build_pretraining_transform,
    build_training_loader,
)
from storage import decoding
from storage.lists import FileList, list_images

IMG_SIZE, MIN_CROP_SCALE = 224, 0.2
SEED = 0
PACKS = {"384 px JPEG": ["384"], "256 px JPEG": ["256"], "256 px raw": ["256", "--raw"]}
LOADER_EPOCHS, LOADER_BATCH, LOADER_BATCHES = 8, 16, 25
LOADER_CROPS = LOADER_BATCH * LOADER_BATCHES


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__, rounds=20)
    parser.add_argument("--path_to_data", type=Path, required=True, help="a folder of photographs of native size")
    return parser.parse_args(argv)


class PillowDataset(Dataset):
    """The pipeline of the original release: decode, crop, resize and flip with Pillow, then float and normalise."""

    def __init__(self, files: FileList):
        self.files, bicubic = files, transforms.InterpolationMode.BICUBIC
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(IMG_SIZE, scale=(MIN_CROP_SCALE, 1.0), interpolation=bicubic),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __getitem__(self, key: SampleKey) -> Tensor:
        with open(self.files.path(key.index % len(self.files)), "rb") as file:
            return self.transform(Image.open(file).convert("RGB"))


def build_data(files: FileList, *, keep_decoded: bool = False) -> ImageDataset:
    transform = build_pretraining_transform((IMG_SIZE, IMG_SIZE), MIN_CROP_SCALE)
    return ImageDataset(files, transform, seed=SEED, noise_size=(IMG_SIZE // 16) ** 2, keep_decoded=keep_decoded)


def pack(source: Path, output: Path, flags: list[str]) -> FileList:
    command = [sys.executable, str(ROOT / "tools" / "pack_dataset.py"), str(source), "--output", str(output)]
    subprocess.run([*command, "--short_side", *flags], check=True, stdout=subprocess.DEVNULL)
    return list_images(output)


def build_round(data: Dataset, num_images: int, crops: int = 1) -> Callable[[], None]:
    """Give a run over all images, an epoch further each time, with several crops of each one after the other."""
    epochs = itertools.count()

    def run() -> None:
        epoch = next(epochs)
        for index in range(num_images):
            for r in range(crops):
                data[SampleKey(epoch, index + r * num_images)]

    return run


def measure_crops(files: FileList, packs: dict[str, FileList], rounds: int) -> dict[str, list[float]]:
    """Give the processor seconds that each way needs for a crop, round by round."""
    ways = {"Pillow pipeline": (PillowDataset(files), 1)}
    for name, source in {"ours": files, **packs}.items():
        ways[name] = build_data(source), 1
        ways[f"{name}, 4 crops of each"] = build_data(source, keep_decoded=True), 4
    runs = {name: build_round(data, len(files), crops) for name, (data, crops) in ways.items()}
    times = alternate(runs, rounds, clock=time.process_time)
    return {name: [s / len(files) / ways[name][1] for s in seconds] for name, seconds in times.items()}


def measure_loaders(files: FileList, packed: FileList) -> dict[str, list[float]]:
    """Give the seconds that loaders with two workers need for a crop, epoch by epoch of a few batches."""
    starts = range(0, LOADER_CROPS, LOADER_BATCH)
    keys = [[SampleKey(0, start + i) for i in range(LOADER_BATCH)] for start in starts]
    pillow = DataLoader(PillowDataset(files), batch_sampler=keys, num_workers=2, persistent_workers=True)
    loaders = {"Pillow pipeline": pillow}
    for name, source in (("ours, files", files), ("ours, packed raw", packed)):
        sampler = StepSampler(LOADER_CROPS, LOADER_BATCH, seed=SEED)
        loaders[name] = build_training_loader(build_data(source), sampler, 2, pin_memory=False)
    runs = {name: functools.partial(deque, loader, 0) for name, loader in loaders.items()}  # what is read is dropped
    times = alternate(runs, LOADER_EPOCHS, clock=time.perf_counter)
    return {name: [s / LOADER_CROPS for s in seconds] for name, seconds in times.items()}


def print_rates(title: str, times: dict[str, list[float]]) -> None:
    """Print images per second, and the ratio to the Pillow pipeline, from the seconds of a crop."""
    pillow = times["Pillow pipeline"]
    rows = [[name, f"{1 / statistics.median(found):.0f}", ratio(pillow, found)] for name, found in times.items()]
    print_table(title, ["way", "images/s", "ratio (lowest to highest)"], rows)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    files = list_images(args.path_to_data)
    with tempfile.TemporaryDirectory() as folder:
        packs = {
            f"packed, {name}": pack(args.path_to_data, Path(folder) / name.replace(" ", "_"), flags)
            for name, flags in PACKS.items()
        }
        print(f"{describe_machine(CPU)}; {files.describe()}; here: {decoding.describe_decoder()}")
        gc.collect()
        gc.freeze()  # a collection of all that was imported would fall on one of the ways
        print_rates("one core, processor time", measure_crops(files, packs, args.rounds))
        loaders = measure_loaders(files, packs["packed, 256 px raw"])
        print_rates("loader with two workers, by the clock", loaders)


if __name__ == "__main__":
    main(parse_args())
