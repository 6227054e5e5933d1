"""Download data or weights into the layout that the scripts read; run again to go on where a download stopped.

    python tools/download.py pets --output data
    accelerate launch finetune_segmentation.py --path_to_data data/pets --num_classes 2 ...

imagenette  ten easy classes of ImageNet, for pretraining and the classifier
pets        Oxford-IIIT Pet, for all three scripts: 37 breeds, and label maps of pet and background, the border ignored
ade20k      ADE20K's scene parsing data, for the segmenter
mae_*       weights of the original release: the encoder, with its decoder (full), one for pictures (visualize,
            ganloss), or a classifier (finetuned)

Each has its owner's licence and terms. Written without access to the internet: the tests bring a server of their own,
and none of the addresses below has been tried.
"""

import argparse
import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import re
import shutil
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from storage.decoding import DECODE_ERRORS
from storage.files import read_json
from storage.lists import check_same_classes, contents, list_images
from storage.pairs import list_pairs

HEADERS = {"User-Agent": "mae-download"}
CONNECTION_ERRORS = (OSError, http.client.HTTPException)  # where nothing but the network can raise them
# What unpacking raises for damage, and RuntimeError for a password or an unknown compression.
DAMAGED_ARCHIVE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError)
TIMEOUT_S = 30
MAX_IDLE_TRIES = 5  # tries in a row that bring nothing
RETRY_WAIT_S = 3
CHUNK_BYTES = 2**20
UNPACKED_SHARE = 1.1  # of an archive's size: pictures hardly shrink in one
MAX_UNPACKED_SHARE = 100  # of an archive's size; an archive that grows more is made to fill disks
BLOCK_BYTES = 4096  # what a file takes on a disk beside its content, at most; so empty files count too
PICKLE_START = b"\x80\x02"  # of weights that torch wrote before its files were archives
STAMP = "download.json"  # in a data set that this tool has finished
LOCK, UNPACKING = ".lock", "unpacking"  # beside the archives, in the folder where one is made

# ------------------------------------------------------------------------------------------------ what there is


class Source(NamedTuple):
    """A file to fetch; `checksum` is "algorithm:digits", as many of the digits as are published, or None."""

    url: str
    checksum: str | None = None

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]


class Download(NamedTuple):
    """What becomes `target` below --output: the one source itself, or what `arrange` makes of the unpacked sources."""

    target: str
    sources: tuple[Source, ...]
    arrange: Callable[[Path, Path], None] | None = None


def arrange_folder(unpacked: Path, target: Path) -> None:
    """Move the archive's one folder, which has the layout already, to `target`."""
    folder = unpacked / target.name
    if not folder.is_dir():
        raise FileNotFoundError(f"the archive holds no folder {target.name}, but {contents(unpacked)}")
    folder.rename(target)


def arrange_pets(unpacked: Path, target: Path) -> None:
    """Lay the pets out twice, as breeds in train/ and val/ and as ADE20K's pairs; images are stored once.

    The split is the publishers': "trainval" trains, "test" validates.
    """
    for listing, split, ade_split in (("trainval.txt", "train", "training"), ("test.txt", "val", "validation")):
        images, label_maps = (target / kind / ade_split for kind in ("images", "annotations"))
        images.mkdir(parents=True)
        label_maps.mkdir(parents=True)
        for line in tqdm((unpacked / "annotations" / listing).read_text().splitlines(), desc=split):
            stem = line.partition(" ")[0]
            if stem in ("", "..") or Path(stem).name != stem:
                raise ValueError(f"{listing} lists {stem!r}, which is no name of an image")
            breed = target / split / stem.rsplit("_", 1)[0]
            breed.mkdir(parents=True, exist_ok=True)
            image = (unpacked / "images" / f"{stem}.jpg").rename(images / f"{stem}.jpg")
            link_or_copy(image, breed / image.name)
            convert_trimap(unpacked / "annotations" / "trimaps" / f"{stem}.png", label_maps / f"{stem}.png")


def link_or_copy(file: Path, other: Path) -> None:
    try:
        os.link(file, other)
    except OSError:  # a file system without hard links, such as exFAT and some network disks
        shutil.copyfile(file, other)


def convert_trimap(trimap: Path, label_map: Path) -> None:
    """Write a trimap as a label map: pet 1 and background 2 stay, the border, 3, becomes 0, which training ignores."""
    try:
        with Image.open(trimap) as image:
            values = np.array(image)
    except DECODE_ERRORS as error:
        raise ValueError(f"{trimap.name} cannot be decoded: {error}") from error
    if values.ndim != 2 or not np.isin(values, (1, 2, 3)).all():
        raise ValueError(f"{trimap.name} is no trimap: its values are {np.unique(values)[:10]}, not 1, 2 and 3")
    Image.fromarray(np.where(values == 3, 0, values).astype(np.uint8)).save(label_map)


IMAGENETTE = "https://s3.amazonaws.com/fast-ai-imageclas"
PETS = "https://www.robots.ox.ac.uk/~vgg/data/pets/data"
ADE20K = "http://data.csail.mit.edu/places/ADEchallenge"
MAE = "https://dl.fbaipublicfiles.com/mae"
# Checksums of imagenette and pets are torchvision's, that of ade20k is GluonCV's. Of the MAE files the original release
# publishes the first six digits, and none for those with a decoder.
IMAGENETTE_FILES = {
    "160": ("imagenette2-160", "md5:e793b78cc4c9e9a4ccc0c1155377a412"),
    "320": ("imagenette2-320", "md5:3df6f0d01a2c9592104656642f5e78a3"),
    "full": ("imagenette2", "md5:fe2fc210e6bb7c5664d602c3cd71e612"),
}
PETS_FILES = (
    Source(f"{PETS}/images.tar.gz", "md5:5c4f3ee8e5d25df40f4fd59a7f44e54c"),
    Source(f"{PETS}/annotations.tar.gz", "md5:95a8c909bbe2e81eed6a22bccdf3f68f"),
)
ADE20K_FILE = Source(f"{ADE20K}/ADEChallengeData2016.zip", "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7")
MAE_FILES = {  # of each kind the place, and the checksums by size
    "pretrain": (
        "pretrain/mae_pretrain_vit_{}.pth",
        {"base": "md5:8cad7c", "large": "md5:b8b06e", "huge": "md5:9bdbb0"},
    ),
    "full": ("pretrain/mae_pretrain_vit_{}_full.pth", {"base": None, "large": None, "huge": None}),
    "visualize": ("visualize/mae_visualize_vit_{}.pth", {"base": None, "large": None, "huge": None}),
    "ganloss": ("visualize/mae_visualize_vit_{}_ganloss.pth", {"large": None}),
    "finetuned": (
        "finetune/mae_finetuned_vit_{}.pth",
        {"base": "md5:1b25e9", "large": "md5:51f550", "huge": "md5:2541f2"},
    ),
}
DOWNLOADS = {  # by name and variant
    **{
        ("imagenette", size): Download(name, (Source(f"{IMAGENETTE}/{name}.tgz", checksum),), arrange_folder)
        for size, (name, checksum) in IMAGENETTE_FILES.items()
    },
    ("pets", None): Download("pets", PETS_FILES, arrange_pets),
    ("ade20k", None): Download("ADEChallengeData2016", (ADE20K_FILE,), arrange_folder),
    **{
        (f"mae_{size}", kind): Download(source.name, (source,))
        for kind, (place, checksums) in MAE_FILES.items()
        for size, checksum in checksums.items()
        for source in (Source(f"{MAE}/{place.format(size)}", checksum),)
    },
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = parser.add_subparsers(dest="name", required=True)
    for name in dict.fromkeys(name for name, _ in DOWNLOADS):
        command = names.add_parser(name)
        command.add_argument("--output", type=Path, required=True, help="folder to put it in; made if it is not there")
        command.set_defaults(variant=None)
        variants = [variant for of, variant in DOWNLOADS if of == name]
        if name == "imagenette":
            about = "short side in pixels (default: 320)"
            command.add_argument("--size", dest="variant", choices=variants, default="320", help=about)
        elif name.startswith("mae_"):
            about = (
                "pretrain: the encoder; full: with its decoder; visualize: trained on plain pixels, with decoder; "
                "ganloss: the same with sharper pictures, large only; finetuned: a classifier (default: pretrain)"
            )
            command.add_argument("--kind", dest="variant", choices=variants, default="pretrain", help=about)
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------ fetching


@contextlib.contextmanager
def held(file: Path) -> Iterator[None]:
    """Hold a file; BlockingIOError when another run does. The lock goes with the process, however that ends.

    A file that is empty at the end is removed: nothing came.
    """
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # What was opened may have been renamed or removed since, by the run that held it until now.
            if not file.exists() or not os.path.samestat(os.fstat(lock.fileno()), file.stat()):
                raise BlockingIOError("it was renamed or removed meanwhile")
        except BlockingIOError as error:
            raise BlockingIOError(f"another run is downloading to {file.parent}; wait for it") from error
        try:
            yield
        finally:
            if file.exists() and not bytes_of(file):
                file.unlink()


def bytes_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def part_of(file: Path) -> Path:
    """Where a file grows until it is whole and verified."""
    return file.with_name(f"{file.name}.part")


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, to other hosts too, but never from an encrypted connection to a plain one."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not newurl.startswith("https:") and (req.type == "https" or not newurl.startswith("http:")):
            raise ValueError(f"{req.full_url} leads to {newurl}, which is not followed: it is less safe")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        request.method = req.get_method()  # older versions of Python make a GET of a HEAD
        return request


def open_url(url: str, file: Path, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    """Ask a server for what is to become `file`; FileNotFoundError where it says no, as asking again would not help.

    ConnectionError where there is no answer, or one that may change.
    """
    request = urllib.request.Request(url, method=method, headers={**HEADERS, **headers})
    try:
        return urllib.request.build_opener(Redirects).open(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code < http.client.INTERNAL_SERVER_ERROR:
            raise FileNotFoundError(
                f"{url} is not given: the server answers {error.code} {error.reason}. It may have moved; if you get it "
                f"elsewhere, save it as {file} and run the command again"
            ) from error
        raise ConnectionError(f"{error.code} {error.reason}") from error
    except CONNECTION_ERRORS as error:
        raise ConnectionError(error) from error


def remote_size(url: str, file: Path) -> int:
    """Ask how long what is to become `file` is, in bytes; ConnectionError where there is no answer."""
    try:
        with open_url(url, file, "HEAD") as response:
            length = response.headers["Content-Length"] or ""
    except ConnectionError as error:
        raise ConnectionError(f"{url} cannot be reached: {error}") from error
    if not length.isdecimal() or int(length) == 0:
        raise ConnectionError(f"{url} does not say how long it is, so nothing tells when it is whole")
    return int(length)


def stream(url: str, part: Path, total: int) -> None:
    """Append the rest of a file to `part`, or all of it anew where the server gives no rest; until the stream ends.

    ConnectionError where the answer is another part than asked for, or part of a file of another length.
    """
    start = bytes_of(part)
    with open_url(url, part.with_suffix(""), **({"Range": f"bytes={start}-"} if start else {})) as response:
        if response.status == http.client.PARTIAL_CONTENT:
            given = response.headers["Content-Range"] or "no range"
            if not re.fullmatch(rf"bytes {start}-\d+/({total}|\*)", given):
                raise ConnectionError(f"asked for the bytes from {start} on of {total}, it gave {given}")
        else:
            start = 0
        length = response.headers["Content-Length"] or str(total - start)
        if length != str(total - start):
            raise ConnectionError(f"it gives {length} bytes now where {total - start} are awaited")
        with (
            part.open("ab" if start else "wb") as file,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem) as bar,
        ):
            while chunk := read_chunk(response, total - start):
                file.write(chunk)
                start += len(chunk)
                bar.update(len(chunk))


def read_chunk(response: http.client.HTTPResponse, awaited: int) -> bytes:
    """Read what comes next, and no more than is awaited; ConnectionError when the network fails, and only then."""
    try:
        return response.read(min(CHUNK_BYTES, awaited))
    except CONNECTION_ERRORS as error:
        raise ConnectionError(error) from error


def fetch(source: Source, file: Path, total: int) -> None:
    """Download to `file`, which is there only when whole and verified; FILE.part keeps what came until then.

    A connection that breaks is taken up again. ConnectionError when that brings nothing any more, ValueError for a
    wrong checksum.
    """
    part, idle_tries = part_of(file), 0
    if bytes_of(part) > total:
        part.unlink()  # of another file than the server has now
    while (before := bytes_of(part)) < total:
        reason: object = "it closed the connection"
        try:
            stream(source.url, part, total)
        except ConnectionError as error:
            reason = error
        idle_tries = 0 if bytes_of(part) > before else idle_tries + 1
        if idle_tries == MAX_IDLE_TRIES:
            kept = f"; they are kept in {part}: run the command again to go on" if before else "; run it again later"
            raise ConnectionError(f"{source.url} gives no more than {before:,} of {total:,} bytes ({reason}){kept}")
        if bytes_of(part) < total:
            time.sleep(RETRY_WAIT_S)
    try:
        found = verify(part, source)
    except ValueError as error:
        part.unlink()
        raise ValueError(f"{error}; what came was removed, run the command again") from error
    part.rename(file)
    print(f"{file}: {found}")


def verify(file: Path, source: Source) -> str:
    """Check a file against all that is known of it, and say what that was; ValueError where it is another."""
    found, whole = [], False
    if source.checksum:
        algorithm, digits = source.checksum.split(":")
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, algorithm).hexdigest()
        if not digest.startswith(digits):
            raise ValueError(f"{file} has the {algorithm} {digest}, but that of {source.url} is {digits}")
        whole = len(digits) == len(digest)
        found.append(f"{algorithm} {digits}" + ("" if whole else f", the {len(digits)} digits that are published"))
    if not whole and zipfile.is_zipfile(file):  # as torch writes weights, with a checksum for each tensor
        check_inside(file)
        found.append("the checksums inside it")
    elif not found:
        with file.open("rb") as content:
            start = content.read(len(PICKLE_START))
        if start != PICKLE_START:
            raise ValueError(f"{file} is no file of weights: it begins with {start!r}")
    return f"verified by {' and '.join(found)}" if found else "no checksum is known, only its length was checked"


def check_inside(file: Path) -> None:
    """Compare what a .zip holds with its checksums; ValueError names what is damaged."""
    try:
        with zipfile.ZipFile(file) as content:
            unpacked = sum(entry.file_size for entry in content.infolist())
            if unpacked > bytes_of(file):  # torch does not compress
                raise zipfile.BadZipFile(f"it would grow to {unpacked:,} bytes")
            damaged = content.testzip()
    except DAMAGED_ARCHIVE as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if damaged:
        raise ValueError(f"{file} is damaged: {damaged} in it has another checksum")


def check_disk(folder: Path, needed: float, what: str) -> None:
    """Refuse what would fill the disk; OSError names both sizes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{what} needs {needed / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are free; choose another "
            "--output or make room"
        )


# ------------------------------------------------------------------------------------------------ unpacking


def check_members(archive: Path, folder: Path, members: Sequence[tuple[str, int, bool]]) -> None:
    """Look at name, size and plainness of all that an archive holds, before any of it is written.

    ValueError for links, devices, names that lead out of the folder, and what grows beyond all measure; OSError where
    the disk is too small.
    """
    for name, _, plain in members:
        path = PurePosixPath(name.replace("\\", "/"))
        if not plain or path.is_absolute() or ".." in path.parts:
            raise ValueError(
                f"{archive} holds {name!r}, which is a link, a device or outside its folder; nothing was unpacked. "
                "Remove the archive if you do not trust it"
            )
    unpacked = sum(size for _, size, _ in members)
    if unpacked > MAX_UNPACKED_SHARE * bytes_of(archive):
        raise ValueError(f"{archive} would grow from {bytes_of(archive):,} to {unpacked:,} bytes; nothing was unpacked")
    check_disk(folder, unpacked + BLOCK_BYTES * len(members), f"unpacking {archive.name}")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .zip or a tar file into a folder, once all of it has passed `check_members`.

    ValueError for an archive that cannot be read.
    """
    try:
        unpack_checked(archive, folder)
    except DAMAGED_ARCHIVE as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise ValueError(f"{archive} cannot be unpacked: {reason}; remove it and run the command again") from error


def unpack_checked(archive: Path, folder: Path) -> None:
    if archive.suffix == ".zip":
        plain_types = (0, stat.S_IFREG, stat.S_IFDIR)  # 0: written where files have no type
        with zipfile.ZipFile(archive) as content:
            entries = content.infolist()
            types = [stat.S_IFMT(entry.external_attr >> 16) for entry in entries]
            names_and_sizes = [(entry.filename, entry.file_size) for entry in entries]
            members = [(*pair, kind in plain_types) for pair, kind in zip(names_and_sizes, types, strict=True)]
            check_members(archive, folder, members)
            for entry in tqdm(entries, desc=archive.name):
                content.extract(entry, folder)
    else:
        with tarfile.open(archive) as content:
            entries = content.getmembers()
            members = [(entry.name, entry.size, entry.isfile() or entry.isdir()) for entry in entries]
            check_members(archive, folder, members)
            for entry in tqdm(entries, desc=archive.name):
                content.extract(entry, folder, filter="data")


def describe(root: Path) -> str:
    """Open a data set as the scripts do, and count; FileNotFoundError or ValueError where they could not."""
    parts = []
    if (root / "train").is_dir():
        train, val = (list_images(root / split) for split in ("train", "val"))
        check_same_classes(val.classes, train.classes, val.root, str(train.root))
        parts.append(f"{len(train):,} training and {len(val):,} validation images in {len(train.classes)} classes")
    if (root / "images").is_dir():
        training, validation = (list_pairs(root, split) for split in ("training", "validation"))
        parts.append(f"{len(training):,} training and {len(validation):,} validation images with label maps")
    if not parts:
        raise FileNotFoundError(f"there is neither train/ nor images/ in {root}, but {contents(root)}")
    return "; ".join(parts)


# ------------------------------------------------------------------------------------------------ the two ways


def get_file(source: Source, target: Path) -> None:
    """Fetch one file, unless it is there; ValueError when another one is."""
    if os.path.lexists(target):
        print(f"{target} is there: {verify(target, source)}")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with held(part_of(target)):
        total = remote_size(source.url, target)
        check_disk(target.parent, total - bytes_of(part_of(target)), f"downloading {source.name}")
        fetch(source, target, total)


def get_data(download: Download, target: Path) -> None:
    """Fetch, unpack and arrange a data set, unless it is there; FileExistsError when anything else is.

    All is made in a folder beside it, which is removed at the end: the final name means a whole data set.
    """
    work = target.with_name(f"{target.name}.download")
    if not is_complete(target, download) or work.exists():  # complete and beside it work: killed in between
        work.mkdir(parents=True, exist_ok=True)
        try:
            with held(work / LOCK):
                if not is_complete(target, download):
                    make_data(download, target, work)
                shutil.rmtree(work)
        finally:
            if work.exists() and not any(work.iterdir()):
                work.rmdir()
    print(f"{target} is complete: {describe(target)}")


def stamp_of(download: Download) -> dict:
    return {"sources": [source.url for source in download.sources]}


def is_complete(target: Path, download: Download) -> bool:
    """Say whether a data set of this tool is there; FileExistsError when anything else is."""
    if not os.path.lexists(target):
        return False
    if not (target / STAMP).is_file() or read_json(target / STAMP) != stamp_of(download):
        raise FileExistsError(f"{target} exists and is not from this tool; move it away or choose another --output")
    return True


def make_data(download: Download, target: Path, work: Path) -> None:
    """Bring about a data set in `work`, from the archives that are there and those that are not."""
    shutil.rmtree(work / UNPACKING, ignore_errors=True)  # of a run that was killed
    archives = {work / source.name: source for source in download.sources}
    for file, source in archives.items():
        if file.exists():
            try:
                verify(file, source)
            except ValueError as error:
                raise ValueError(f"{error}; remove it and run the command again") from error
    totals = {file: bytes_of(file) or remote_size(source.url, file) for file, source in archives.items()}
    there = sum(bytes_of(file) + bytes_of(part_of(file)) for file in archives)
    needed = sum(totals.values()) * (1 + UNPACKED_SHARE) - there
    check_disk(work, needed, f"downloading and unpacking {target.name}")
    for file, source in archives.items():
        if not file.exists():
            fetch(source, file, totals[file])
    unpacked, arranged = work / UNPACKING / "unpacked", work / UNPACKING / target.name
    try:
        unpacked.mkdir(parents=True)
        for archive in archives:
            unpack(archive, unpacked)
        download.arrange(unpacked, arranged)
        describe(arranged)
        (arranged / STAMP).write_text(json.dumps(stamp_of(download), indent=2) + "\n")
        arranged.rename(target)
    finally:
        shutil.rmtree(work / UNPACKING)


def check_output(folder: Path) -> None:
    """Refuse a folder that is a file, or lies below one."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is no folder; --output takes a folder, which is made if it is not there")


def main(args: argparse.Namespace) -> None:
    check_output(args.output)
    download = DOWNLOADS[args.name, args.variant]
    target = args.output / download.target
    if download.arrange is None:
        get_file(*download.sources, target)
    else:
        get_data(download, target)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; run the command again to go on")
