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
import dataclasses
import functools
import hashlib
import io
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

from storage import packs, protect_output
from storage.bands import has_8_bits
from storage.decoding import DECODE_ERRORS, NamedBytes, is_plain_jpeg, load_file, open_image, read_image
from storage.files import read_json, recover, user_path, write_json, written_whole
from storage.lists import FileList, find_splits, list_images, name_some
from storage.packs import Pack, is_inner_path, is_packed
from storage.pairs import list_pairs


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("source", nargs="?", type=user_path, help="the folder to pack")
    parser.add_argument("--output", type=user_path, help="the folder to write")
    parser.add_argument("--short_side", type=int, default=384, help="at most so many pixels (default: 384)")
    parser.add_argument("--quality", type=int, default=90, help="of JPEG, 1 to 95 (default: 90)")
    parser.add_argument("--raw", action="store_true", help="store pixels as they are: ten times the space, no decoding")
    largest = (
        "pixels of an image that is decoded whole; larger JPEG files are decoded at a fraction (default: %(default)s)"
    )
    parser.add_argument("--max_image_pixels", type=int, default=Image.MAX_IMAGE_PIXELS, help=largest)
    as_is = "store the files byte for byte: for .npy, many bands, more than 8 bits"
    parser.add_argument("--as_is", action="store_true", help=as_is)
    parser.add_argument("--images_per_shard", type=int, default=4096, help="(default: 4096)")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="(default: all cores)")
    parser.add_argument("--verify", type=user_path, metavar="PACK", help="compare a pack with its checksums instead")
    args = parser.parse_args(argv)
    if args.verify is None and (args.source is None or args.output is None):
        parser.error("give a folder to pack and --output, or --verify and a pack")
    if args.raw and args.as_is:
        parser.error("--raw decodes the images, --as_is leaves them as they are; give one of them")
    if not 1 <= args.quality <= 95:
        parser.error(f"--quality must be between 1 and 95, not {args.quality}")
    for name in ("short_side", "images_per_shard", "num_workers", "max_image_pixels"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    return args


class Record(NamedTuple):
    """What is stored of a file; `error` says why it cannot be."""

    data: bytes
    height: int = 0
    width: int = 0
    error: str | None = None


class Job(NamedTuple):
    """One pack to write: its folder, its pack.json without the shards, and the files that go into each shard."""

    folder: Path
    header: dict
    shards: list[FileList]

    def plan(self) -> dict:
        """Give all that decides the shards' content, so that only equal ones are gone on with."""
        digest = hashlib.sha256()
        for files in self.shards:
            for i in range(len(files)):
                status = os.stat(files.path(i))
                row = (bytes(files.paths[i]), int(files.labels[i]), status.st_size, status.st_mtime_ns)
                digest.update(repr(row).encode())
        return self.header | {"files": digest.hexdigest(), "items": [len(files) for files in self.shards]}


def list_jobs(args: argparse.Namespace) -> list[Job]:
    """Find out what kind of folder it is, and give a job for every split."""
    root, jobs = args.source, []
    if any(is_packed(folder) for folder in (root, *root.glob("*/"))):
        raise ValueError(f"{root} is packed already; give the folder that it was made of")
    pairs_root = root / "ADEChallengeData2016" if (root / "ADEChallengeData2016").is_dir() else root
    if (pairs_root / "annotations").is_dir():
        header = dict(kind="pairs", encoding="files", quality=None, short_side=None, classes=[])
        for split in ("training", "validation"):
            if (pairs_root / "annotations" / split).is_dir():
                pairs = list_pairs(pairs_root, split)
                paths = np.stack([pairs.images, pairs.label_maps], axis=1).flatten()  # every second one a label map
                files = FileList(pairs.root, paths, np.full(len(paths), -1), ())
                jobs.append(plan_job(args.output / split, header, files, 2 * args.images_per_shard))
        return jobs
    encoding = dict(encoding="raw", quality=None) if args.raw else dict(encoding="jpeg", quality=args.quality)
    if args.as_is:
        encoding = dict(encoding="files", quality=None)
    train, val, notes = find_splits(root)
    for note in notes:
        print(note)
    for source in filter(None, (train, val)):
        files = list_images(source)
        header = dict(
            kind="images", short_side=None if args.as_is else args.short_side, classes=list(files.classes), **encoding
        )
        folder = args.output if source == root else args.output / source.name
        jobs.append(plan_job(folder, header, files, args.images_per_shard))
    return jobs


def plan_job(folder: Path, header: dict, files: FileList, size: int) -> Job:
    cuts = [slice(start, start + size) for start in range(0, len(files), size)]
    shards = [dataclasses.replace(files, paths=files.paths[cut], labels=files.labels[cut]) for cut in cuts]
    return Job(folder, {"version": packs.PACK_VERSION} | header, shards)


def encode(path: str, header: dict) -> Record:
    """Make a record of a file."""
    try:
        file = load_file(path)
        if header["encoding"] == "files":
            return Record(file.getvalue())
        if not has_8_bits(file):
            raise ValueError("it has more than 8 bits, or more bands than colours: pack the folder with --as_is")
        plain, data = is_plain_jpeg(open_image(file), 3), file.getvalue()
        image = read_image(
            NamedBytes(data, path), short_side=header["short_side"]
        )  # in any case, so that every record can be decoded
        scale = header["short_side"] / min(image.size)
        if plain and scale >= 1 and header["encoding"] == "jpeg":
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


def pack(job: Job, num_workers: int) -> None:
    """Write a pack, shard by shard; what an interrupted call has finished is kept."""
    too_long = next((name for files in job.shards for name in files.paths if not is_inner_path(name)), None)
    if too_long is not None:
        raise ValueError(f"{os.fsdecode(too_long)} is no name that a pack can hold; rename it")
    start(job.folder, job.plan())
    left_out, shards, total = [], [], sum(map(len, job.shards))
    bar = tqdm(total=total, unit="file", desc=str(job.folder), mininterval=1)
    with bar, ProcessPoolExecutor(num_workers) as pool:
        for number, files in enumerate(job.shards):
            path = job.folder / f"{number:05d}.shard"
            if path.exists():
                bar.update(len(files))
            else:
                paths = map(files.path, range(len(files)))
                records = pool.map(functools.partial(encode, header=job.header), paths, chunksize=8)
                left_out += write_shard(path, files, records, bar)
            shards.append(describe_shard(path))
    if not any(shard["records"] for shard in shards):
        reasons = name_some(left_out, 10, "\n" + " " * 12)
        raise ValueError(f"nothing that {job.folder} is made of can be packed; left out: {reasons}")
    with written_whole(job.folder / packs.PACK_FILE) as temporary:
        write_json(temporary, job.header | {"shards": shards})
    (job.folder / packs.PACKING_FILE).unlink()
    count, size = len(Pack(job.folder).names), sum(shard["bytes"] for shard in shards) / 1e9
    missing = total - count
    print(f"{job.folder}: {count:,} records, {size:.3f} GB in {len(shards)} shards, {missing} files left out")
    if left_out:
        print("  left out: " + name_some(left_out, 10, "\n" + " " * 12))


def start(folder: Path, plan: dict) -> None:
    """Begin a pack, or go on with one of the same plan; FileExistsError when the folder holds anything else."""
    note = folder / packs.PACKING_FILE
    recover(note)  # of a kill while it was written, which must not look like files of somebody else
    if not note.exists():
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty; remove it or name another folder")
        with written_whole(note) as temporary:
            write_json(temporary, plan)
    elif read_json(note) != plan:
        raise FileExistsError(f"{folder} was begun with other files or flags; remove it or name another folder")


def write_shard(path: Path, files: FileList, records: Iterator[Record], bar: tqdm) -> list[str]:
    """Write a shard and give a line for every file that is left out."""
    rows, names, left_out, offset = [], [], [], 0
    with written_whole(path) as temporary, temporary.open("wb") as file:
        for i, record in zip(range(len(files)), records, strict=True):
            bar.update()
            if record.error is not None:
                left_out.append(f"{files.path(i)}: {record.error}")
                continue
            size, checksum = file.write(record.data), zlib.crc32(record.data)
            rows.append((offset, size, record.height, record.width, files.labels[i], checksum))
            names.append(files.paths[i])
            offset += size
        table, texts = np.array(rows, packs.SHARD_TABLE).tobytes(), b"\0".join(names)
        file.write(table + texts)
        checksum = zlib.crc32(table + texts)
        file.write(packs.SHARD_TRAILER.pack(len(rows), len(texts), checksum, packs.SHARD_MAGIC))
    return left_out


def describe_shard(path: Path) -> dict:
    """Read a shard back and give its entry in pack.json."""
    with path.open("rb") as file:
        file.seek(-packs.SHARD_TRAILER.size, os.SEEK_END)
        count, _, _, _ = packs.SHARD_TRAILER.unpack(file.read())
    return {"file": path.name, "bytes": path.stat().st_size, "records": count, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(root: Path) -> None:
    """Compare every byte of a pack with its checksums; ValueError names the shards that have changed."""
    folders = [folder for folder in (root, *sorted(root.glob("*/"))) if is_packed(folder)]
    if not folders:
        raise FileNotFoundError(f"{root} holds no {packs.PACK_FILE}, nor does a folder in it")
    for folder in folders:
        found = Pack(folder)
        shards = found.header["shards"]
        digests = {folder / shard["file"]: shard.get("sha256") for shard in shards}
        bar = tqdm(digests.items(), unit="shard", desc=str(folder))
        changed = [str(path) for path, digest in bar if sha256(path) != digest]
        if changed:
            raise ValueError(f"changed since they were packed: {', '.join(changed)}")
        print(f"{folder}: {len(found.names):,} records in {len(shards)} shards are what was packed")


def main(args: argparse.Namespace) -> None:
    Image.MAX_IMAGE_PIXELS = args.max_image_pixels
    if args.verify is not None:
        verify(args.verify)
        return
    if not args.source.is_dir():
        raise FileNotFoundError(f"{args.source} is not a folder")
    if args.output.resolve().is_relative_to(args.source.resolve()):
        raise ValueError(f"--output {args.output} lies in the folder that is packed; choose one outside")
    for job in list_jobs(args):
        if (job.folder / packs.PACK_FILE).exists():
            (job.folder / packs.PACKING_FILE).unlink(missing_ok=True)  # left by a kill at the very end
            print(f"{job.folder} is packed already")
        else:
            pack(job, args.num_workers)


if __name__ == "__main__":
    protect_output()
    main(parse_args())
