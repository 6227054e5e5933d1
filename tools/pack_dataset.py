"""Pack a folder of images into a few large files, which load many times faster; run again to go on where it stopped.

    python tools/pack_dataset.py IMAGENET --output imagenet_packed --short_side 256
    accelerate launch pretrain_mae.py --path_to_data imagenet_packed ...
    python tools/pack_dataset.py --verify imagenet_packed

All three scripts take the result where they take the folder: train/ with val/ or validation/, any tree, or ADE20K's
images/ and annotations/. Images whose short side is larger than --short_side are made that small (bicubic, ratio kept)
and stored as JPEG of --quality, or as they are in memory with --raw; plain JPEG files that are small enough stay byte
for byte what they are. Pairs stay byte for byte what they are in any case: a resized label map would score another
task. Files that cannot be decoded are left out and named.
"""

import argparse
import functools
import hashlib
import io
import itertools
import json
import os
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from storage.decoding import DECODE_ERRORS, IMAGE_FORMATS, NamedBytes, is_plain_jpeg, read_image
from storage.lists import FileList, find_splits, list_images
from storage.packs import (
    PACK_FILE,
    PACK_VERSION,
    PACKING_FILE,
    SHARD_MAGIC,
    SHARD_TABLE,
    SHARD_TRAILER,
    Pack,
    is_inner_path,
    is_packed,
)
from storage.pairs import PairList, list_pairs

CHUNK_BYTES = 2**22
MAX_LEFT_OUT_NAMED = 10


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", nargs="?", type=Path, help="the folder to pack")
    parser.add_argument("--output", type=Path, help="the folder to write")
    parser.add_argument("--short_side", type=int, default=384, help="at most so many pixels (default: 384)")
    parser.add_argument("--quality", type=int, default=90, help="of JPEG, 1 to 95 (default: 90)")
    parser.add_argument(
        "--raw", action="store_true", help="store pixels uncompressed: ten times the space, no decoding"
    )
    parser.add_argument("--images_per_shard", type=int, default=4096, help="(default: 4096)")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="(default: all cores)")
    parser.add_argument("--verify", type=Path, metavar="PACK", help="compare a pack with its checksums instead")
    args = parser.parse_args(argv)
    if args.verify is None and (args.source is None or args.output is None):
        parser.error("give a folder to pack and --output, or --verify and a pack")
    if not 1 <= args.quality <= 95:
        parser.error(f"--quality goes from 1 to 95, not to {args.quality}")
    for name in ("short_side", "images_per_shard", "num_workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    return args


# ------------------------------------------------------------------------------------------------ what goes into a pack


class Item(NamedTuple):
    """A file to pack: where it is, its name in the pack, and its label, -1 where there are no classes."""

    path: str
    name: bytes
    label: int


class Record(NamedTuple):
    """What is stored of a file; `error` says why it cannot be."""

    data: bytes
    height: int = 0
    width: int = 0
    error: str | None = None


class Job(NamedTuple):
    """One pack to write: its folder, its pack.json without the shards, and what goes into each shard."""

    folder: Path
    header: dict
    shards: list[list[Item]]

    @property
    def plan(self) -> dict:
        """Give all that decides the shards' content, so that only equal ones are gone on with."""
        digest = hashlib.sha256()
        for item in itertools.chain.from_iterable(self.shards):
            status = os.stat(item.path)
            digest.update(repr((item.name, item.label, status.st_size, status.st_mtime_ns)).encode())
        return self.header | {"files": digest.hexdigest(), "items": [len(items) for items in self.shards]}


def list_jobs(args: argparse.Namespace) -> list[Job]:
    """Find out what kind of folder it is, and give a job for every split."""
    root = args.source
    if any(is_packed(folder) for folder in (root, *root.glob("*/"))):
        raise ValueError(f"{root} is packed already; give the folder that it was made of")
    pairs_root = root / "ADEChallengeData2016" if (root / "ADEChallengeData2016").is_dir() else root
    if (pairs_root / "annotations").is_dir():
        splits = [name for name in ("training", "validation") if (pairs_root / "annotations" / name).is_dir()]
        return [plan_pairs(list_pairs(pairs_root, name), args.output / name, args) for name in splits]
    train, val = find_splits(root)
    if train == root:
        return [plan_images(list_images(root), args.output, args)]
    return [plan_images(list_images(folder), args.output / folder.name, args) for folder in (train, val) if folder]


def plan_images(files: FileList, folder: Path, args: argparse.Namespace) -> Job:
    items = [Item(files.path(i), bytes(files.paths[i]), int(files.labels[i])) for i in range(len(files))]
    header = {
        "version": PACK_VERSION,
        "kind": "images",
        "encoding": "raw" if args.raw else "jpeg",
        "short_side": args.short_side,
        "quality": None if args.raw else args.quality,
        "classes": list(files.classes),
    }
    return Job(folder, header, [list(shard) for shard in batched(items, args.images_per_shard)])


def plan_pairs(pairs: PairList, folder: Path, args: argparse.Namespace) -> Job:
    items = []
    for i in range(len(pairs)):
        items.append(Item(pairs.path(i), bytes(pairs.images[i]), -1))
        items.append(Item(pairs.label_path(i), bytes(pairs.label_maps[i]), -1))
    header = {
        "version": PACK_VERSION,
        "kind": "pairs",
        "encoding": "files",
        "short_side": None,
        "quality": None,
        "classes": [],
    }
    return Job(folder, header, [list(shard) for shard in batched(items, 2 * args.images_per_shard)])


def batched(items: list[Item], size: int) -> Iterator[list[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def encode(item: Item, header: dict) -> Record:
    """Make a record of a file."""
    try:
        with open(item.path, "rb") as file:
            data = file.read()
        if header["encoding"] == "files":
            return Record(data)
        image = Image.open(NamedBytes(data, item.path), formats=IMAGE_FORMATS)
        plain = header["encoding"] == "jpeg" and is_plain_jpeg(image, 3)
        image = read_image(NamedBytes(data, item.path))  # in any case, so that every record can be decoded
        scale = header["short_side"] / min(image.size)
        if plain and scale >= 1:
            return Record(data, image.height, image.width)
        if scale < 1:
            image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
        if header["encoding"] == "raw":
            return Record(np.asarray(image).tobytes(), image.height, image.width)
        compressed = io.BytesIO()
        image.save(compressed, "JPEG", quality=header["quality"])
        return Record(compressed.getvalue(), image.height, image.width)
    except DECODE_ERRORS as error:
        return Record(b"", error=f"{type(error).__name__}: {error}")


# ------------------------------------------------------------------------------------------------ writing it


def pack(job: Job, num_workers: int) -> None:
    """Write a pack, shard by shard; what an interrupted call has finished is kept."""
    plan = json.loads(json.dumps(job.plan))
    names = [item.name for item in itertools.chain.from_iterable(job.shards)]
    too_long = next((name for name in names if not is_inner_path(name)), None)
    if too_long is not None:
        raise ValueError(f"{os.fsdecode(too_long)} is no name that a pack can hold; rename it")
    start(job.folder, plan)
    left_out: list[str] = []
    shards = []
    with (
        ProcessPoolExecutor(num_workers) as pool,
        tqdm(total=len(names), unit="file", desc=str(job.folder), mininterval=1) as bar,
    ):
        for number, items in enumerate(job.shards):
            path = job.folder / f"{number:05d}.shard"
            if path.exists():
                bar.update(len(items))
            else:
                records = pool.map(functools.partial(encode, header=job.header), items, chunksize=8)
                left_out += write_shard(path, items, records, bar)
            shards.append(describe_shard(path))
    write_whole(job.folder / PACK_FILE, json.dumps(job.header | {"shards": shards}, indent=1).encode())
    (job.folder / PACKING_FILE).unlink()
    found = Pack(job.folder)
    missing = len(names) - len(found.names)
    size = sum(shard["bytes"] for shard in shards) / 1e9
    print(
        f"{job.folder}: {len(found.names):,} records, {size:.3f} GB in {len(shards)} shards, {missing} files left out"
    )
    for line in left_out[:MAX_LEFT_OUT_NAMED]:
        print(f"  left out: {line}")
    if len(left_out) > MAX_LEFT_OUT_NAMED:
        print(f"  and {len(left_out) - MAX_LEFT_OUT_NAMED} more")


def start(folder: Path, plan: dict) -> None:
    """Begin a pack, or go on with one of the same plan; FileExistsError when the folder holds anything else."""
    note = folder / PACKING_FILE
    if (folder / PACK_FILE).exists():
        raise FileExistsError(f"{folder} is packed already; remove it or name another folder")
    if not note.exists():
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty; remove it or name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(note, json.dumps(plan).encode())
    elif json.loads(note.read_text()) != plan:
        raise FileExistsError(f"{folder} was begun with other files or flags; remove it or name another folder")


def write_shard(path: Path, items: list[Item], records: Iterator[Record], bar: tqdm) -> list[str]:
    """Write a shard and give a line for every file that is left out. It has its name when all of it is on the disk."""
    rows, names, left_out, offset = [], [], [], 0
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        for item, record in zip(items, records, strict=True):
            bar.update()
            if record.error is not None:
                left_out.append(f"{item.path}: {record.error}")
                continue
            file.write(record.data)
            checksum = zlib.crc32(record.data)
            rows.append((offset, len(record.data), record.height, record.width, item.label, checksum))
            names.append(item.name)
            offset += len(record.data)
        index = np.array(rows, SHARD_TABLE).tobytes() + b"\0".join(names)
        file.write(index)
        names_size = len(index) - len(rows) * SHARD_TABLE.itemsize
        file.write(SHARD_TRAILER.pack(len(rows), names_size, zlib.crc32(index), SHARD_MAGIC))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return left_out


def write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def describe_shard(path: Path) -> dict:
    """Read a shard back and give its entry in pack.json."""
    with path.open("rb") as file:
        file.seek(-SHARD_TRAILER.size, os.SEEK_END)
        count, _, _, _ = SHARD_TRAILER.unpack(file.read())
    return {"file": path.name, "bytes": path.stat().st_size, "records": count, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def verify(root: Path) -> None:
    """Compare every byte of a pack with its checksums; ValueError names the shards that have changed."""
    folders = [folder for folder in (root, *sorted(root.glob("*/"))) if is_packed(folder)]
    if not folders:
        raise FileNotFoundError(f"{root} holds no {PACK_FILE}, nor does a folder in it")
    for folder in folders:
        found = Pack(folder)
        paths = [found.shard_path(number) for number in range(len(found.header["shards"]))]
        sums = [sha256(path) for path in tqdm(paths, unit="shard", desc=str(folder))]
        expected = [shard.get("sha256") for shard in found.header["shards"]]
        changed = [str(path) for path, a, b in zip(paths, sums, expected, strict=True) if a != b]
        if changed:
            raise ValueError(f"changed since they were packed: {', '.join(changed)}")
        print(f"{folder}: {len(found.names):,} records in {len(paths)} shards are what was packed")


def main(args: argparse.Namespace) -> None:
    if args.verify is not None:
        verify(args.verify)
        return
    if not args.source.is_dir():
        raise FileNotFoundError(f"{args.source} is not a folder")
    if args.output.resolve().is_relative_to(args.source.resolve()):
        raise ValueError(f"--output {args.output} lies in the folder that is packed; choose one outside")
    for job in list_jobs(args):
        if (job.folder / PACK_FILE).exists():
            print(f"{job.folder} is packed already")
        else:
            pack(job, args.num_workers)


if __name__ == "__main__":
    main(parse_args())
