"""Measure how many training crops one core makes, each way beside the plain Pillow pipeline, and what differs.

    OMP_NUM_THREADS=1 python benchmarks/input.py --path_to_data PHOTOGRAPHS

The ways take turns image by image, in an order drawn anew for each. What counts is the processor time of the process,
so that other work on the machine disturbs little; a round is all images once. The loaders with two workers take turns
epoch by epoch, by the clock. Packs are made in a temporary folder.
"""

import argparse
import contextlib
import functools
import gc
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from measure import ROOT, alternate, build_parser, describe_machine, print_table, ratio
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
    seeded,
)
from storage import decoding
from storage.lists import FileList, list_images

IMG_SIZE, MIN_CROP_SCALE = 224, 0.2
SEED = 0
LOADER_EPOCHS, LOADER_BATCH, LOADER_BATCHES = 8, 16, 25


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__, rounds=20)
    parser.add_argument("--path_to_data", type=Path, required=True, help="a folder of photographs of native size")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------ the ways


class PillowDataset(Dataset):
    """The pipeline of the original release: decode, crop, resize and flip with Pillow, then float and normalise."""

    def __init__(self, files: FileList):
        self.files, bicubic = files, transforms.InterpolationMode.BICUBIC
        crop = transforms.RandomResizedCrop(IMG_SIZE, scale=(MIN_CROP_SCALE, 1.0), interpolation=bicubic)
        self.crop = transforms.Compose([crop, transforms.RandomHorizontalFlip()])
        self.finish = transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Image.Image:
        with open(self.files.path(index), "rb") as file:
            return Image.open(file).convert("RGB")

    def __getitem__(self, key: SampleKey) -> Tensor:
        return self.finish(self.crop(self.read(key.index % len(self.files))))


class Way(NamedTuple):
    """One way to make crops: `read(key)` makes `crops` of them with decoders that `absent` hides."""

    read: Callable[[SampleKey], object]
    crops: int = 1
    absent: tuple[str, ...] = ()


@contextlib.contextmanager
def without(names: tuple[str, ...]) -> Iterator[None]:
    """Hide decoders, as if they were not installed."""
    hidden = {"torchcodec": ("decode_jpeg", None), "nvimgcodec": ("load_nvimgcodec", lambda: None)}
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(decoding, *hidden[name]))
        yield


def build_data(files: FileList, *, keep_decoded: bool = False) -> ImageDataset:
    transform = build_pretraining_transform((IMG_SIZE, IMG_SIZE), MIN_CROP_SCALE)
    return ImageDataset(files, transform, seed=SEED, noise_size=(IMG_SIZE // 16) ** 2, keep_decoded=keep_decoded)


def ours(files: FileList, crops: int = 1) -> Callable[[SampleKey], object]:
    data = build_data(files, keep_decoded=crops > 1)
    return lambda key: [data[SampleKey(key.epoch, key.index + r * len(files))] for r in range(crops)]


def build_ways(files: FileList, packs: dict[str, FileList]) -> dict[str, Way]:
    ways = {
        "Pillow pipeline": Way(PillowDataset(files).__getitem__),
        "ours, Pillow decodes": Way(ours(files), 1, ("torchcodec", "nvimgcodec")),
    }
    if decoding.decode_jpeg is not None:
        ways["ours (default: torchcodec)"] = Way(ours(files), 1, ("nvimgcodec",))
        ways["ours, 4 crops of each"] = Way(ours(files, 4), 4, ("nvimgcodec",))
    if decoding.load_nvimgcodec() is not None:
        ways["ours, crop region decoded"] = Way(ours(files))
    for name, packed in packs.items():
        ways[name] = Way(ours(packed))
        ways[f"{name}, 4 crops of each"] = Way(ours(packed, 4), 4)
    return ways


def pack(source: Path, output: Path, *flags: str) -> FileList:
    command = [sys.executable, str(ROOT / "tools" / "pack_dataset.py"), str(source), "--output", str(output), *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return list_images(output)


# ------------------------------------------------------------------------------------------------ measuring


def measure(ways: dict[str, Way], num_images: int, rounds: int) -> dict[str, list[float]]:
    """Give the processor seconds that each way needs for one crop, round by round; the first round is not counted."""
    times = {name: [] for name in ways}
    for epoch in range(-1, rounds):
        total = dict.fromkeys(ways, 0.0)
        for index in range(num_images):
            key = SampleKey(epoch + 1, index)
            for name in random.sample(list(ways), len(ways)):
                with without(ways[name].absent):
                    started = time.process_time()
                    ways[name].read(key)
                    total[name] += time.process_time() - started
        if epoch >= 0:
            for name, way in ways.items():
                times[name].append(total[name] / num_images / way.crops)
    return times


def compare_pixels(files: FileList, absent: tuple[str, ...]) -> tuple[float, float]:
    """Give the median PSNR in dB and the mean difference in grey values between our crops and Pillow's, same draws."""
    pillow = PillowDataset(files)
    transform = build_pretraining_transform((IMG_SIZE, IMG_SIZE), MIN_CROP_SCALE)
    ratios, differences = [], []
    for index in range(len(files)):
        with without(absent):
            with seeded(SEED, index):
                found = transform.resize_and_flip(transform.cut(files.open_picture(index, 3)))
            with seeded(SEED, index):
                expected = np.asarray(pillow.crop(files.read_image(index, 3)))
        difference = found.permute(1, 2, 0).numpy().astype(float) - expected
        differences.append(np.abs(difference).mean())
        ratios.append(20 * math.log10(255) - 10 * math.log10(max(np.square(difference).mean(), 1e-12)))
    return statistics.median(ratios), statistics.mean(differences)


def measure_loaders(files: FileList, packed: FileList) -> dict[str, list[float]]:
    """Give the seconds that loaders with two workers need for an epoch of a few batches."""
    length = LOADER_BATCH * LOADER_BATCHES
    keys = [[SampleKey(0, start + i) for i in range(LOADER_BATCH)] for start in range(0, length, LOADER_BATCH)]
    pillow = DataLoader(PillowDataset(files), batch_sampler=keys, num_workers=2, persistent_workers=True)
    loaders = {"Pillow pipeline": pillow}
    for name, source in (("ours, files", files), ("ours, packed raw", packed)):
        sampler = StepSampler(length, LOADER_BATCH, seed=SEED)
        loaders[name] = build_training_loader(build_data(source), sampler, 2, pin_memory=False)
    runs = {name: functools.partial(deque, loader, 0) for name, loader in loaders.items()}  # what is read is dropped
    return alternate(runs, LOADER_EPOCHS, clock=time.perf_counter)


def print_rates(title: str, crop_times: dict[str, list[float]], pixels: dict[str, tuple[float, float]]) -> None:
    """Print images per second, and the ratio to the first way, from the seconds of a crop, round by round."""
    rows, first = [], next(iter(crop_times.values()))
    for name, times in crop_times.items():
        psnr, difference = (f"{pixels[name][0]:.1f} dB", f"{pixels[name][1]:.3f}") if name in pixels else ("", "")
        rows.append([name, f"{1 / statistics.median(times):.0f}", ratio(first, times), psnr, difference])
    print_table(title, ["way", "images/s", "ratio (lowest to highest)", "PSNR", "mean difference"], rows)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    random.seed(SEED)
    files = list_images(args.path_to_data)
    with tempfile.TemporaryDirectory() as folder:
        flags = {"384 px JPEG": ["384"], "256 px JPEG": ["256"], "256 px raw": ["256", "--raw"]}
        packs = {
            f"packed, {name}": pack(args.path_to_data, Path(folder) / name.replace(" ", "_"), "--short_side", *more)
            for name, more in flags.items()
        }
        ways = build_ways(files, packs)
        print(f"{describe_machine(torch.device('cpu'))}; {files.describe()}; here: {decoding.describe_decoder()}")
        gc.collect()
        gc.freeze()  # a collection of all that was imported would fall on one of the ways
        times = measure(ways, len(files), args.rounds)
        plain = {name: way for name, way in ways.items() if name.startswith("ours") and way.crops == 1}
        print_rates(
            "one core, processor time", times, {name: compare_pixels(files, way.absent) for name, way in plain.items()}
        )
        length = LOADER_BATCH * LOADER_BATCHES
        loaders = measure_loaders(files, packs["packed, 256 px raw"])
        crop_times = {name: [seconds / length for seconds in found] for name, found in loaders.items()}
        print_rates("loader with two workers, by the clock", crop_times, {})


if __name__ == "__main__":
    main(parse_args())
