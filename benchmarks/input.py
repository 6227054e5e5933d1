"""Measure how many training crops one core makes, each way beside the plain Pillow pipeline, and what differs.

    OMP_NUM_THREADS=1 python benchmarks/input.py --path_to_data PHOTOGRAPHS
    OMP_NUM_THREADS=1 python benchmarks/input.py --path_to_data PHOTOGRAPHS --formats
    OMP_NUM_THREADS=1 python benchmarks/input.py --path_to_data PHOTOGRAPHS --profile

The ways take turns image by image, in an order drawn anew for each. What counts is the processor time of the process,
so that other work on the machine disturbs little; a round is all images once, and the table has the median of the
rounds' ratios with the lowest and highest. The loaders with two workers take turns epoch by epoch, by the clock.
Packs are made in a temporary folder. --formats compares ways to store a pack instead (it needs lmdb, pyarrow and
webdataset), --profile says where the time of each way goes.
"""

import argparse
import contextlib
import cProfile
import gc
import math
import pstats
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataset
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

ROOT = Path(__file__).resolve().parent.parent
MIN_CROP_SCALE = 0.2
SEED = 0
PROFILED = 8  # functions


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path_to_data", type=Path, required=True, help="a folder of photographs of native size")
    parser.add_argument("--img_size", type=int, default=224, help="side of a crop in pixels (default: 224)")
    parser.add_argument("--rounds", type=int, default=20, help="times that every image is read each way (default: 20)")
    parser.add_argument("--loader_rounds", type=int, default=8, help="epochs of each loader (default: 8)")
    parser.add_argument("--formats", action="store_true", help="compare ways to store a pack instead")
    parser.add_argument("--profile", action="store_true", help="say where the time goes instead")
    parser.add_argument("--num_records", type=int, default=2000, help="of --formats (default: 2000)")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------ the ways


class PillowDataset(Dataset):
    """The pipeline of the original release: decode, crop, resize and flip with Pillow, then float and normalise."""

    def __init__(self, files: FileList, img_size: int):
        self.files = files
        self.crop = transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    img_size, scale=(MIN_CROP_SCALE, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
                ),
                transforms.RandomHorizontalFlip(),
            ]
        )
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
    """Hide decoders from the data set."""
    hidden = {"torchcodec": ("decode_jpeg", None), "nvimgcodec": ("load_nvimgcodec", lambda: None)}
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(dataset, *hidden[name]))
        yield


def ours(files: FileList, img_size: int, crops: int = 1) -> Callable[[SampleKey], object]:
    transform = build_pretraining_transform((img_size, img_size), MIN_CROP_SCALE)
    data = ImageDataset(files, transform, seed=SEED, noise_size=(img_size // 16) ** 2, keep_decoded=crops > 1)
    return lambda key: [data[SampleKey(key.epoch, key.index + r * len(files))] for r in range(crops)]


def build_ways(files: FileList, packs: dict[str, FileList], img_size: int) -> dict[str, Way]:
    ways = {
        "Pillow pipeline": Way(PillowDataset(files, img_size).__getitem__),
        "ours, Pillow decodes": Way(ours(files, img_size), 1, ("torchcodec", "nvimgcodec")),
    }
    if decoding.decode_jpeg is not None:
        ways["ours (default: torchcodec)"] = Way(ours(files, img_size), 1, ("nvimgcodec",))
        ways["ours, 4 crops of each"] = Way(ours(files, img_size, 4), 4, ("nvimgcodec",))
    if decoding.load_nvimgcodec() is not None:
        ways["ours, crop region decoded"] = Way(ours(files, img_size))
    for name, packed in packs.items():
        ways[name] = Way(ours(packed, img_size))
        ways[f"{name}, 4 crops of each"] = Way(ours(packed, img_size, 4), 4)
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


def profile(name: str, way: Way, num_images: int, rounds: int) -> None:
    """Print the functions in which a way spends most processor time, the profiler's own included."""
    keys = [SampleKey(epoch, index) for epoch in range(rounds) for index in range(num_images)]
    profiler = cProfile.Profile(time.process_time)
    with without(way.absent), profiler:
        for key in keys:
            way.read(key)
    found = pstats.Stats(profiler).stats
    total = sum(own for _, _, own, _, _ in found.values())
    print(f"\n{name}: {total / len(keys) / way.crops * 1e6:.0f} microseconds a crop, of which")
    for (_, _, function), (_, _, own, _, _) in sorted(found.items(), key=lambda item: -item[1][2])[:PROFILED]:
        print(f"  {own / len(keys) / way.crops * 1e6:6.0f}  {function}")


def compare_pixels(files: FileList, img_size: int, absent: tuple[str, ...]) -> tuple[float, float]:
    """Give the median PSNR in dB and the mean difference in grey values between our crops and Pillow's, same draws."""
    pillow = PillowDataset(files, img_size)
    transform = build_pretraining_transform((img_size, img_size), MIN_CROP_SCALE)
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


def measure_loaders(files: FileList, packed: FileList, img_size: int, rounds: int) -> dict[str, list[float]]:
    """Give the seconds that loaders with two workers need for one crop, epoch by epoch; the first is not counted."""
    batch_size, length = 16, 16 * 25
    transform = build_pretraining_transform((img_size, img_size), MIN_CROP_SCALE)
    keys = [[SampleKey(0, start + i) for i in range(batch_size)] for start in range(0, length, batch_size)]
    loaders = {
        "Pillow pipeline": DataLoader(
            PillowDataset(files, img_size), batch_sampler=keys, num_workers=2, persistent_workers=True
        )
    }
    for name, source in (("ours, files", files), ("ours, packed raw", packed)):
        data = ImageDataset(source, transform, seed=SEED, noise_size=(img_size // 16) ** 2)
        sampler = StepSampler(length, batch_size, seed=SEED)
        loaders[name] = build_training_loader(data, sampler, 2, pin_memory=False)
    times = {name: [] for name in loaders}
    for epoch in range(-1, rounds):
        for name in random.sample(list(loaders), len(loaders)):
            started = time.perf_counter()
            for _ in loaders[name]:
                pass
            if epoch >= 0:
                times[name].append((time.perf_counter() - started) / length)
    return times


def print_table(title: str, times: dict[str, list[float]], pixels: dict[str, tuple[float, float]]) -> None:
    """Print images per second and the ratio to the first way, median and range over the rounds."""
    print(f"\n| {title} | images/s | ratio | lowest to highest | PSNR | mean difference |\n|---|---|---|---|---|---|")
    first = next(iter(times.values()))
    for name, found in times.items():
        ratios = [a / b for a, b in zip(first, found, strict=True)]
        psnr, difference = (f"{pixels[name][0]:.1f} dB", f"{pixels[name][1]:.3f}") if name in pixels else ("", "")
        print(
            f"| {name} | {1 / statistics.median(found):.0f} | {statistics.median(ratios):.2f} | "
            f"{min(ratios):.2f} to {max(ratios):.2f} | {psnr} | {difference} |"
        )


# ------------------------------------------------------------------------------------------------ ways to store a pack


def compare_formats(packed: FileList, folder: Path, num_records: int) -> None:
    """Store the same JPEG files in several formats, and read them in random order."""
    import lmdb
    import pyarrow
    import pyarrow.parquet
    import webdataset

    records = [packed.pack.read(i % len(packed)).getvalue() for i in range(num_records)]
    (folder / "tree").mkdir()
    for i, record in enumerate(records):
        (folder / "tree" / f"{i:06d}.jpg").write_bytes(record)
    ours = pack(folder / "tree", folder / "ours")

    with webdataset.TarWriter(str(folder / "set.tar")) as tar:
        for i, record in enumerate(records):
            tar.write({"__key__": f"{i:06d}", "jpg": record})
    with tarfile.open(folder / "set.tar") as tar:
        members = [(member.offset_data, member.size) for member in tar]
    tar_file = (folder / "set.tar").open("rb", buffering=0)
    mapped = np.memmap(folder / "set.tar", dtype=np.uint8, mode="r")

    environment = lmdb.open(str(folder / "lmdb"), map_size=2**32)
    with environment.begin(write=True) as transaction:
        for i, record in enumerate(records):
            transaction.put(b"%08d" % i, record)
    reader = environment.begin(buffers=True)

    table = pyarrow.table({"jpg": pyarrow.array(records, pyarrow.binary())})
    with pyarrow.OSFile(str(folder / "set.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    arrow = pyarrow.ipc.open_file(pyarrow.memory_map(str(folder / "set.arrow"))).read_all()["jpg"]
    pyarrow.parquet.write_table(
        table, folder / "set.parquet", row_group_size=100, compression="none", use_dictionary=False
    )
    parquet = pyarrow.parquet.ParquetFile(folder / "set.parquet")

    def read_tar(i: int) -> bytes:
        offset, size = members[i]
        tar_file.seek(offset)
        return tar_file.read(size)

    def read_map(i: int) -> bytes:
        offset, size = members[i]
        return mapped[offset : offset + size].tobytes()

    ways = {
        "a file each": ((lambda i: (folder / "tree" / f"{i:06d}.jpg").read_bytes()), folder / "tree"),
        "ours: indexed shards, checksum compared": ((lambda i: ours.pack.read(i).getvalue()), folder / "ours"),
        "indexed tar, memory-mapped": (read_map, folder / "set.tar"),
        "indexed tar, seek and read": (read_tar, folder / "set.tar"),
        "LMDB": ((lambda i: bytes(reader.get(b"%08d" % i))), folder / "lmdb" / "data.mdb"),
        "Arrow file, memory-mapped": ((lambda i: arrow[i].as_py()), folder / "set.arrow"),
        "Parquet, row groups of 100": (
            (lambda i: parquet.read_row_group(i // 100)["jpg"][i % 100].as_py()),
            folder / "set.parquet",
        ),
    }
    times = {name: [] for name in ways}
    for _ in range(5):
        for name, (read, _) in ways.items():
            order = random.sample(range(num_records), 200 if "Parquet" in name else num_records)
            started = time.process_time()
            for i in order:
                assert len(read(i)) == len(records[i])
            times[name].append((time.process_time() - started) / len(order))
    started = time.process_time()
    streamed = sum(1 for _ in webdataset.WebDataset(str(folder / "set.tar"), shardshuffle=False))
    assert streamed == num_records
    stream_time = (time.process_time() - started) / num_records
    payload = sum(map(len, records))
    print(f"\n{num_records} JPEG files of {payload / num_records / 1000:.1f} kB on average, page cache warm\n")
    print("| format | random reads/s | size / that of the JPEG files |\n|---|---|---|")
    for name, (_, path) in ways.items():
        parts = path.rglob("*") if path.is_dir() else [path]
        used = sum(part.stat().st_blocks * 512 for part in parts)
        print(f"| {name} | {1 / statistics.median(times[name]):,.0f} | {used / payload:.3f} |")
    print(f"| webdataset, in the order of the tar only | {1 / stream_time:,.0f} | |")


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    random.seed(SEED)
    files = list_images(args.path_to_data)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jpeg = pack(args.path_to_data, folder / "jpeg", "--short_side", "256")
        if args.formats:
            compare_formats(jpeg, folder, args.num_records)
            return
        raw = pack(args.path_to_data, folder / "raw", "--short_side", "256", "--raw")
        large = pack(args.path_to_data, folder / "large", "--short_side", "384")
        packs = {"packed, 384 px JPEG": large, "packed, 256 px JPEG": jpeg, "packed, 256 px raw": raw}
        ways = build_ways(files, packs, args.img_size)
        print(f"{files.describe()}; here: {decoding.describe_decoder()}")
        if args.profile:
            for way_name, way in ways.items():
                profile(way_name, way, len(files), args.rounds)
            return
        gc.collect()
        gc.freeze()  # a collection of all that was imported would fall on one of the ways
        times = measure(ways, len(files), args.rounds)
        pixels = {
            name: compare_pixels(files, args.img_size, way.absent)
            for name, way in ways.items()
            if name.startswith("ours") and way.crops == 1
        }
        print_table("one core, processor time", times, pixels)
        print_table(
            "loader with two workers, by the clock", measure_loaders(files, raw, args.img_size, args.loader_rounds), {}
        )


if __name__ == "__main__":
    main(parse_args())
