"""Download data or weights into the layout that the scripts read; run the command again to resume a broken download.

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

# Fetching is written by hand because no library here does all of it: torch.hub and torchvision do not resume (and the
# latter falls back from https to http), huggingface_hub takes any range, and requests leaves resuming to its caller.

import argparse
import hashlib
import http.client
import os
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from storage.files import beside, read_json, remove, user_path, write_json
from storage.lists import contents
from storage.pairs import read_label_map

CONNECTION_ERRORS = (OSError, http.client.HTTPException)  # where nothing but the network can raise them
# What unpacking raises for damage, and RuntimeError for a password or an unknown compression.
DAMAGED_ARCHIVE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError)
TIMEOUT_S = 30
MAX_IDLE_TRIES = 5  # tries in a row that bring nothing
RETRY_WAIT_S = 3
CHUNK_BYTES = 2**20
UNPACKED_RATIO = 1.1  # unpacked size to archive size: images hardly shrink in an archive
PICKLE_START = b"\x80\x02"  # of weights that torch wrote before its files were archives
STAMP = "download.json"  # in a data set that this tool has finished

IMAGENETTE = "https://s3.amazonaws.com/fast-ai-imageclas"
PETS = "https://www.robots.ox.ac.uk/~vgg/data/pets/data"
ADE20K = "http://data.csail.mit.edu/places/ADEchallenge"
# Checksums of imagenette and pets are torchvision's, that of ade20k is GluonCV's. Of the MAE files the original release
# publishes the first six digits of the MD5, and none for those with a decoder.
MAE_FILES = {
    "pretrain": ("pretrain/mae_pretrain_vit_{}.pth", {"base": "8cad7c", "large": "b8b06e", "huge": "9bdbb0"}),
    "full": ("pretrain/mae_pretrain_vit_{}_full.pth", {"base": None, "large": None, "huge": None}),
    "visualize": ("visualize/mae_visualize_vit_{}.pth", {"base": None, "large": None, "huge": None}),
    "ganloss": ("visualize/mae_visualize_vit_{}_ganloss.pth", {"large": None}),
    "finetuned": ("finetune/mae_finetuned_vit_{}.pth", {"base": "1b25e9", "large": "51f550", "huge": "2541f2"}),
}
SOURCES = {  # by name and variant: addresses, with the algorithm and the published digits of their checksums, or None
    ("imagenette", "160"): {f"{IMAGENETTE}/imagenette2-160.tgz": "md5:e793b78cc4c9e9a4ccc0c1155377a412"},
    ("imagenette", "320"): {f"{IMAGENETTE}/imagenette2-320.tgz": "md5:3df6f0d01a2c9592104656642f5e78a3"},
    ("imagenette", "full"): {f"{IMAGENETTE}/imagenette2.tgz": "md5:fe2fc210e6bb7c5664d602c3cd71e612"},
    ("pets", None): {
        f"{PETS}/images.tar.gz": "md5:5c4f3ee8e5d25df40f4fd59a7f44e54c",
        f"{PETS}/annotations.tar.gz": "md5:95a8c909bbe2e81eed6a22bccdf3f68f",
    },
    ("ade20k", None): {f"{ADE20K}/ADEChallengeData2016.zip": "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"},
} | {
    (f"mae_{size}", kind): {f"https://dl.fbaipublicfiles.com/mae/{path.format(size)}": digits and f"md5:{digits}"}
    for kind, (path, digits_of) in MAE_FILES.items()
    for size, digits in digits_of.items()
}
TRIMAP_CLASSES = np.array([-1, 1, 2, 0] + 252 * [-1])  # pet 1 and background 2 stay; the border, 3, is ignored: 0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = parser.add_subparsers(dest="name", required=True)
    for name in dict.fromkeys(name for name, _ in SOURCES):
        command = names.add_parser(name)
        command.add_argument(
            "--output", type=user_path, required=True, help="folder to put it in; made if it is not there"
        )
        command.set_defaults(variant=None)
        variants = [variant for of, variant in SOURCES if of == name]
        if name == "imagenette":
            about = "short side in pixels (default: 320)"
            command.add_argument("--size", dest="variant", choices=variants, default="320", help=about)
        elif name.startswith("mae_"):
            about = "pretrain (default): encoder; full, visualize, ganloss: with decoder; finetuned: classifier"
            command.add_argument("--kind", dest="variant", choices=variants, default="pretrain", help=about)
    return parser.parse_args(argv)


def arrange_pets(unpacked: Path, target: Path) -> None:
    """Arrange the pets twice, as breeds in train/ and val/ and as ADE20K's pairs, by the publishers' own split."""
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
            try:
                os.link(image, breed / image.name)
            except OSError:  # a file system without hard links, such as exFAT and some network disks
                shutil.copyfile(image, breed / image.name)
            trimap = unpacked / "annotations" / "trimaps" / f"{stem}.png"
            Image.fromarray(read_label_map(trimap, TRIMAP_CLASSES)).save(label_maps / trimap.name)


def bytes_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def check_disk(folder: Path, needed: float, what: str) -> None:
    """Refuse what would fill the disk; OSError names both sizes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        sizes = f"{needed / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are free"
        raise OSError(f"{what} needs {sizes}; choose another --output or make room")


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, to other hosts too, but never from an encrypted connection to a plain one."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not newurl.startswith("https:") and (req.type == "https" or not newurl.startswith("http:")):
            raise ValueError(f"{req.full_url} leads to {newurl}, which is not followed: it is less safe")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def open_url(url: str, file: Path, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    """Ask a server for a file; FileNotFoundError where it refuses, ConnectionError where asking again may help."""
    request = urllib.request.Request(url, method=method, headers={"User-Agent": "mae-download", **headers})
    try:
        return urllib.request.build_opener(Redirects).open(request, timeout=TIMEOUT_S)
    except CONNECTION_ERRORS as error:
        if isinstance(error, urllib.error.HTTPError) and error.code < http.client.INTERNAL_SERVER_ERROR:
            refused = f"{url} cannot be downloaded: the server answers {error.code} {error.reason}"
            raise FileNotFoundError(f"{refused}. If you find it elsewhere, save it as {file}, run again") from error
        raise ConnectionError(f"{url} cannot be reached: {error}") from error


def append_rest(url: str, part: Path, total: int) -> None:
    """Append what is missing to `part`, or all of it anew where the server gives no rest; else ConnectionError."""
    start = bytes_of(part)
    with open_url(url, part.with_suffix(""), **({"Range": f"bytes={start}-"} if start else {})) as response:
        if response.status == http.client.PARTIAL_CONTENT:
            given = response.headers["Content-Range"] or "no range"
            allowed = (f"bytes {start}-{total - 1}/{total}", f"bytes {start}-{total - 1}/*")
        else:
            start, given, allowed = 0, response.headers["Content-Length"], (None, str(total))
        if given not in allowed:
            raise ConnectionError(f"asked for the bytes from {start} on of {total}, {url} gives {given}")
        with part.open("ab" if start else "wb") as out, tqdm.wrapattr(out, "write", total, initial=start) as bar:
            while start < total:
                try:  # around the reading alone, so that an error of the disk is not taken for one of the network
                    chunk = response.read(min(CHUNK_BYTES, total - start))
                except CONNECTION_ERRORS as error:
                    raise ConnectionError(f"{url}: {error}") from error
                if not chunk:
                    raise ConnectionError(f"{url} closed the connection")
                bar.write(chunk)
                start += len(chunk)


def fetch(url: str, part: Path, total: int) -> None:
    """Download what `part` lacks of `total` bytes, trying again as long as some come; it keeps what came."""
    idle_tries = 0
    if bytes_of(part) > total:
        part.unlink()  # of another file than the server has now
    while (before := bytes_of(part)) < total:
        try:
            append_rest(url, part, total)
        except ConnectionError as error:
            idle_tries = 0 if bytes_of(part) > before else idle_tries + 1
            if idle_tries == MAX_IDLE_TRIES:
                came = f"only {before:,} of {total:,} bytes came"
                raise ConnectionError(f"{came}: {error}; run again to go on") from error
            time.sleep(RETRY_WAIT_S)


def verify(file: Path, url: str, checksum: str | None, advice: str) -> str:
    """Check a file against all that is known of it, and say what that was; ValueError where it is another."""
    found = []
    if checksum:
        algorithm, digits = checksum.split(":")
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, algorithm).hexdigest()
        if not digest.startswith(digits):
            raise ValueError(f"{file} has the {algorithm} {digest}, but that of {url} is {digits}; {advice}")
        if digest == digits:
            return f"verified by {algorithm} {digits}"
        found.append(f"{algorithm} {digits}, the {len(digits)} digits that are published")
    if zipfile.is_zipfile(file):  # as torch writes weights, with a checksum for each tensor
        try:
            with zipfile.ZipFile(file) as content:
                damaged = content.testzip()
        except DAMAGED_ARCHIVE as error:
            damaged = error
        if damaged:
            raise ValueError(f"{file} is damaged: {damaged} does not have its checksum; {advice}")
        found.append("the checksums inside it")
    elif not found and url.endswith(".pth"):
        with file.open("rb") as content:
            start = content.read(len(PICKLE_START))
        if start != PICKLE_START:  # a page that asks to log in, for example
            raise ValueError(f"{file} is no file of weights: it begins with {start!r}; {advice}")
    return f"verified by {' and '.join(found)}" if found else "no checksum is known, only its length was checked"


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .zip or a tar file, once name, type and size of all that it holds are checked; ValueError otherwise."""
    is_zip = archive.suffix == ".zip"
    try:
        with zipfile.ZipFile(archive) if is_zip else tarfile.open(archive) as content:
            if is_zip:  # of the kinds 4 is a folder, 8 a plain file, 0 not recorded
                entries = content.infolist()
                members = [(e.filename, e.file_size, e.external_attr >> 28 in (0, 4, 8)) for e in entries]
            else:
                entries = content.getmembers()
                members = [(e.name, e.size, e.isfile() or e.isdir()) for e in entries]
            for name, _, plain in members:
                path = Path(name.replace("\\", "/"))
                if not plain or path.is_absolute() or ".." in path.parts:
                    found = f"{archive} holds {name!r}, which is a link, a device or outside its folder"
                    raise ValueError(f"{found}; nothing was unpacked. Remove the archive if you do not trust it")
            check_disk(folder, sum(size for _, size, _ in members), f"unpacking {archive.name}")
            content.extractall(folder, tqdm(entries, desc=archive.name), **({} if is_zip else {"filter": "data"}))
    except DAMAGED_ARCHIVE as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise ValueError(f"{archive} cannot be unpacked: {reason}; remove it and run the command again") from error


def get_file(url: str, checksum: str | None, file: Path, room: float = 1) -> None:
    """Download a file unless it exists; ValueError when another one does. `room` is the disk space, in file sizes."""
    if os.path.lexists(file):
        print(f"{file} is there: {verify(file, url, checksum, 'move it away and run the command again')}")
        return
    with open_url(url, file, "HEAD") as response:
        length = response.headers["Content-Length"] or ""
    if not length.isdecimal() or int(length) == 0:
        raise ConnectionError(f"{url} does not say how long it is, so nothing tells when it is whole")
    print(f"downloading {url}")
    part = beside(file, "part")
    check_disk(file.parent, room * int(length) - bytes_of(part), f"getting {file.name}")
    fetch(url, part, int(length))
    try:
        found = verify(part, url, checksum, "it was removed, run the command again")
    except ValueError:
        part.unlink()
        raise
    part.rename(file)
    print(f"{file}: {found}")


def get_data(sources: dict[str, str | None], target: Path) -> None:
    """Make a data set beside its place, so that its name means whole; FileExistsError where anything else has it."""
    work, stamp = beside(target, "download"), {"sources": list(sources)}
    if os.path.lexists(target) and not ((target / STAMP).is_file() and read_json(target / STAMP) == stamp):
        raise FileExistsError(f"{target} exists and is not from this tool; move it away or choose another --output")
    if not target.exists():
        work.mkdir(exist_ok=True)
        for url, checksum in sources.items():
            get_file(url, checksum, work / Path(url).name, 1 + UNPACKED_RATIO)
        unpacked = work / "unpacked"
        remove(unpacked)  # of a run that was killed
        try:
            unpacked.mkdir()
            for url in sources:
                unpack(work / Path(url).name, unpacked)
            folder = unpacked / target.name
            if target.name == "pets":
                arrange_pets(unpacked, folder)
            if not folder.is_dir():
                raise FileNotFoundError(f"the archive holds no folder {folder.name}, but {contents(unpacked)}")
            write_json(folder / STAMP, stamp)
            folder.rename(target)
        finally:
            remove(unpacked)
    remove(work)  # also that of a run that was killed at the very end
    print(f"{target} is complete")


def main(args: argparse.Namespace) -> None:
    """Get one file or one data set, as the only run; the lock ends with the process, however that ends."""
    sources = SOURCES[args.name, args.variant]
    first = Path(next(iter(sources)))
    args.output.mkdir(parents=True, exist_ok=True)
    weights = args.name.startswith("mae_")
    target = args.output / (first.name if weights else "pets" if args.name == "pets" else first.stem)
    lock = beside(target, "lock")
    try:
        with FileLock(lock, blocking=False):
            try:
                get_file(*next(iter(sources.items())), target) if weights else get_data(sources, target)
            finally:
                lock.unlink(missing_ok=True)
    except Timeout as error:
        raise BlockingIOError(f"another run is downloading {target}; wait for it") from error


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; run the command again to go on")
