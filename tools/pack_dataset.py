"""Pack a folder of images into a few tars, which load many times faster; run again to go on where it stopped.

    python tools/pack_dataset.py IMAGENET --output imagenet_packed --short_side 256
    accelerate launch pretrain_mae.py --path_to_data imagenet_packed ...
    python tools/pack_dataset.py --verify imagenet_packed

All three scripts take the result where they take the folder: train/ with val/ or validation/, any tree, or ADE20K's
images/ and annotations/; webdataset and tar read its shards, too. Images whose short side is larger than --short_side
are made that small (bicubic, ratio kept) and stored as JPEG of --quality, or as they are in memory with --raw; plain
JPEG files that are small enough stay byte for byte what they are. Pairs stay byte for byte what they are in any case: a
resized label map would score another task. Images that cannot be decoded are left out, and named in pack.json.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import sys
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from storage import explained_errors, packs
from storage.bands import has_8_bits
from storage.decoding import DECODE_ERRORS, NamedBytes, is_plain_jpeg, load_file, open_image, read_image
from storage.files import hold, read_json, recover, user_path, write_json, written_whole
from storage.lists import FileList, as_text, find_splits, list_images, name_some
from storage.packs import Pack, is_inner_path, is_packed
from storage.pairs import list_pairs
from storage.workers import end_with_parent

LOCK_FILE = ".lock"


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
    """What is stored of a file, with its checksum, and what its name ends in where it is another file than the one
    that was packed; `error` says why it cannot be stored.
    """

    data: bytes
    height: int = 0
    width: int = 0
    suffix: str = ""
    crc: int = 0
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
        record = read_record(path, header)
        return record._replace(crc=zlib.crc32(record.data))
    except DECODE_ERRORS as error:
        return Record(b"", error=f"{type(error).__name__}: {error}")


def read_record(path: str, header: dict) -> Record:
    file = load_file(path)
    data = file.getvalue()
    if header["encoding"] == "files":
        return Record(data)
    if not has_8_bits(file):
        raise ValueError("it has more than 8 bits, or more bands than colours: pack the folder with --as_is")
    plain = is_plain_jpeg(open_image(file), 3)
    image = read_image(NamedBytes(data, path), short_side=header["short_side"])  # so that every record can be decoded
    scale = header["short_side"] / min(image.size)
    if plain and scale >= 1 and header["encoding"] == "jpeg":
        return Record(data, image.height, image.width)
    if scale < 1:
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    encoded = io.BytesIO()
    if header["encoding"] == "raw":
        np.save(encoded, np.asarray(image))
    else:
        image.save(encoded, "JPEG", quality=header["quality"])
    suffix = packs.RAW_SUFFIX if header["encoding"] == "raw" else ".jpg"
    return Record(encoded.getvalue(), image.height, image.width, suffix)


def pack(job: Job, num_workers: int) -> None:
    """Write a pack, shard by shard; what an interrupted call has finished is kept."""
    too_long = next((name for files in job.shards for name in files.paths if not is_inner_path(name)), None)
    if too_long is not None:
        raise ValueError(f"{os.fsdecode(too_long)} is no name that a pack can hold; rename it")
    start(job.folder, job.plan())
    shards, left_out, total = [], [], sum(map(len, job.shards))
    bar = tqdm(total=total, unit="file", desc=str(job.folder), mininterval=1)
    with bar, ProcessPoolExecutor(num_workers, initializer=end_with_parent) as pool:
        for number, files in enumerate(job.shards):
            path = job.folder / f"shard-{number:06d}.tar"
            if path.with_suffix(packs.INDEX_SUFFIX).exists():
                bar.update(len(files))
            else:
                paths = map(files.path, range(len(files)))
                records = pool.map(functools.partial(encode, header=job.header), paths, chunksize=8)
                write_shard(path, files, job.header, records, bar)
            index = packs.read_arrays(path.with_suffix(packs.INDEX_SUFFIX))
            left_out += [line.decode() for line in index["left_out"].tolist()]
            samples = len(index["paths"]) // packs.RECORDS_PER_SAMPLE[job.header["kind"]]
            shards.append({"file": path.name, "samples": samples, "bytes": path.stat().st_size})
    if not any(shard["samples"] for shard in shards):
        reasons = name_some(left_out, 10, "\n" + " " * 12)
        raise ValueError(f"nothing that {job.folder} is made of can be packed; left out: {reasons}")
    with written_whole(job.folder / packs.PACK_FILE) as temporary:
        write_json(temporary, job.header | {"shards": shards, "left_out": left_out})
    (job.folder / packs.PACKING_FILE).unlink()
    count, size = len(Pack(job.folder).names), sum(shard["bytes"] for shard in shards) / 1e9
    print(f"{job.folder}: {count:,} records, {size:.3f} GB in {len(shards)} shards, {total - count} files left out")
    if left_out:
        print("  left out: " + name_some(left_out, 10, "\n" + " " * 12))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; BlockingIOError where another one packs into it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = hold(folder / LOCK_FILE)
    except BlockingIOError as error:
        raise BlockingIOError(f"another process packs into {folder}; wait for it") from error
    with lock:
        yield
        (folder / LOCK_FILE).unlink()


def start(folder: Path, plan: dict) -> None:
    """Begin a pack, or go on with one of the same plan; FileExistsError when the folder holds anything else."""
    note = folder / packs.PACKING_FILE
    recover(note)  # of a kill while it was written, which must not look like files of somebody else
    if not note.exists():
        if any(entry.name != LOCK_FILE for entry in folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty; remove it or name another folder")
        with written_whole(note) as temporary:
            write_json(temporary, plan)
    elif read_json(note) != plan:
        raise FileExistsError(f"{folder} was begun with other files or flags; remove it or name another folder")


def write_shard(path: Path, files: FileList, header: dict, records: Iterator[Record], bar: tqdm) -> None:
    """Write a shard, and after it its index, which tells that the shard is whole."""
    rows, paths, left_out, taken = [], [], [], {as_text(os.fsdecode(name)) for name in files.paths}
    of_pairs, member = header["kind"] == "pairs", ""
    with written_whole(path) as temporary, temporary.open("wb") as file, open_tar(file) as tar:
        for i, record in zip(range(len(files)), records, strict=True):
            bar.update()
            if record.error is not None:
                left_out.append(f"{as_text(files.path(i))}: {record.error}")
                if of_pairs:  # of which every second record is a label map
                    raise ValueError(f"a pair cannot be read: {left_out[0]}")
                continue
            name = as_text(os.fsdecode(files.paths[i]))
            if of_pairs and i % 2:  # named so that webdataset takes both for one sample
                member = f"{os.path.splitext(member)[0]}.seg{os.path.splitext(name)[1]}"
            else:
                member = choose_name(name, record.suffix, taken)
            offset = add_member(tar, file, member, record.data)
            if header["classes"]:
                add_member(tar, file, f"{webdataset_key(member)}.cls", str(files.labels[i]).encode())
            rows.append((offset, len(record.data), record.height, record.width, files.labels[i], record.crc))
            paths.append(files.paths[i])
    arrays = dict(paths=np.array(paths, dtype=bytes), table=np.array(rows, packs.SHARD_TABLE))
    arrays["left_out"] = np.array([line.encode("utf-8", "backslashreplace") for line in left_out], dtype=bytes)
    with written_whole(path.with_suffix(packs.INDEX_SUFFIX)) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def open_tar(file: BinaryIO) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape")


def choose_name(name: str, suffix: str, taken: set[str]) -> str:
    """Give the name of a record in its tar: that of its file, with another ending where it is another file."""
    if not suffix:
        return name
    member = os.path.splitext(name)[0] + suffix
    member = name + suffix if member in taken and member != name else member
    taken.add(member)
    return member


def webdataset_key(member: str) -> str:
    """Give the name up to the first dot, by which webdataset tells what belongs to one sample."""
    folder, name = os.path.split(member)
    return os.path.join(folder, name.partition(".")[0] or name)


def add_member(tar: tarfile.TarFile, file: BinaryIO, name: str, data: bytes) -> int:
    """Add a file to a tar, the same whoever packs it and when, and give the place of its data."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))
    return file.tell() - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def verify(root: Path) -> None:
    """Compare every record of a pack with its checksum, and every name and place with its tar; ValueError for any."""
    folders = [folder for folder in (root, *sorted(root.glob("*/"))) if is_packed(folder)]
    if not folders:
        raise FileNotFoundError(f"{root} holds no {packs.PACK_FILE}, nor does a folder in it")
    for folder in folders:
        found, changed = Pack(folder), []
        shards = found.header["shards"]
        for number in range(len(shards)):
            with tarfile.open(found.shard_path(number), encoding="utf-8", errors="surrogateescape") as tar:
                members = {member.offset_data: member.size for member in tar}
            records = np.flatnonzero(found.shards == number)
            if any(members.get(int(found.table[i]["offset"])) != int(found.table[i]["size"]) for i in records):
                changed.append(str(found.shard_path(number)))
        for record in tqdm(range(len(found.names)), unit="file", desc=str(folder)):
            try:
                found.read(record)
            except OSError:
                changed.append(found.path(record))
        if changed:
            raise ValueError(f"changed since they were packed: {name_some(changed, 10)}")
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
        with locked(job.folder):
            if (job.folder / packs.PACK_FILE).exists():
                packs.read_pack_header(job.folder)
                (job.folder / packs.PACKING_FILE).unlink(missing_ok=True)  # left by a kill at the very end
                print(f"{job.folder} is packed already")
            else:
                pack(job, args.num_workers)


if __name__ == "__main__":
    with explained_errors():
        main(parse_args())
