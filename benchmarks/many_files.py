"""Measure how long a folder of a million files takes to list, anew and again, and what a data worker then holds.

    python benchmarks/many_files.py --working_directory DISK

The files are hard links to a few drawn images, in 1,000 class folders; they are removed at the end.
"""

import argparse
import itertools
import os
import shutil
import tempfile
import time
from pathlib import Path

import psutil
from measure import CPU, describe_machine, print_table
from PIL import Image

from dataset import ImageDataset, StepSampler, build_pretraining_transform, build_training_loader
from storage.lists import FileList, ListCache, list_images

LINKS = 30_000  # to one file; ext4 has no more than 65,000
BATCH, BATCHES = 64, 20


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--working_directory", type=Path, required=True, help="on the disk that is measured")
    parser.add_argument("--files", type=int, default=1_000_000, help="(default: 1000000)")
    parser.add_argument("--classes", type=int, default=1000, help="(default: 1000)")
    return parser.parse_args(argv)


def link_files(root: Path, count: int, num_classes: int) -> None:
    sources = root / ".sources"
    for index in range(num_classes):
        (root / "train" / f"n{index:08d}").mkdir(parents=True)
    sources.mkdir()
    for index in range(count):
        source = sources / f"{index // LINKS}.jpg"
        if index % LINKS == 0:
            Image.new("RGB", (32, 32), (index // LINKS, 80, 120)).save(source)
        folder = f"n{index % num_classes:08d}"
        os.link(source, root / "train" / folder / f"{folder}_{index // num_classes:05d}.JPEG")


def private_mb(pid: int) -> float:
    """Give the memory that a process shares with nobody, in MB (1e6 bytes)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024 / 1e6


def worker_mb(files: FileList) -> float:
    """Give what a data worker holds for itself alone after some batches."""
    data = ImageDataset(files, build_pretraining_transform((16, 16), 0.2), noise_size=16)
    loader = build_training_loader(data, StepSampler(len(data), BATCH), 1)
    batches = iter(loader)
    for _ in itertools.islice(batches, min(BATCHES, len(loader) - 1)):
        pass
    (worker,) = psutil.Process().children()
    found = private_mb(worker.pid)
    batches.close()
    return found


def main(args: argparse.Namespace) -> None:
    args.working_directory.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(dir=args.working_directory))
    try:
        print(describe_machine(CPU), flush=True)
        link_files(root, args.files, args.classes)
        few = list_images(next((root / "train").iterdir()))  # one class
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            files = list_images(root / "train", ListCache(root / "lists"))
            seconds.append(time.perf_counter() - began)
        empty, full = worker_mb(few), worker_mb(files)
        rows = [
            ["seconds to list them", f"{seconds[0]:.1f}"],
            ["seconds to read the list again", f"{seconds[1]:.2f}"],
            [f"MB of a data worker, beyond the {empty:.0f} of one with {len(few):,} files", f"{full - empty:.0f}"],
        ]
        print_table(f"{len(files):,} files in {len(files.classes):,} classes", ["what", "found"], rows)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main(parse_args())
