"""Images and labels from disk: decoding, file lists, packs, transforms, random numbers, samplers, loaders, demo data.

What a training sample looks like is a function of (seed, epoch, index) and of nothing else: the sampler hands the
workers (epoch, index), and the dataset seeds every generator from them. Nothing here knows a network.

Shapes   N batch   C channels   H W image   L patches
"""

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.context import ForkContext, ForkProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageOps
from timm.data import Mixup, auto_augment, create_transform
from timm.data.auto_augment import RandAugment
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tvf

try:
    from torchcodec.decoders import decode_jpeg
except (ImportError, OSError, RuntimeError):  # not installed, or built for another torch: Pillow decodes
    decode_jpeg = None

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# ------------------------------------------------------------------------------------------------ decoding

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # the contents decide, not the file name
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# What Pillow raises on files that are cut, damaged, disguised or hostile. DecompressionBombError is Pillow's own
# limit on the declared size, checked before anything is decoded.
DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
CHANNEL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def read_image(source: str | Path | io.BytesIO, channels: int = 3, *, rotate: bool = True) -> Image.Image:
    """Decode a file into the 8-bit picture a person sees, with 1 (grey), 3 (RGB) or 4 (RGBA) channels.

    Rotation flags are applied (`rotate`), 16-bit values scaled, transparent pixels laid on white. Raises one of
    DECODE_ERRORS.

    Deviation: the original release ignores EXIF rotation and shows what lies under transparent pixels. Reason: both
    train on pictures nobody sees. Effect: not measured.
    """
    with Image.open(source, formats=IMAGE_FORMATS) as image:
        refuse_bomb(image)
        image.load()
    image = scale_to_8_bit(upright(image) if rotate else image)
    mode = CHANNEL_MODES[channels]
    if image.has_transparency_data and mode != "RGBA":
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def refuse_bomb(image: Image.Image) -> None:
    """Refuse more pixels than Pillow's limit, before they are decoded; Pillow alone only warns up to twice that."""
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF rotation; a damaged EXIF block of a sound picture counts as none."""
    try:
        return ImageOps.exif_transpose(image)
    except DECODE_ERRORS:
        return image


def scale_to_8_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit and float greys to 8 bits; Pillow's own conversion clips them to white."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    white = 65535.0
    if image.mode in ("I", "F"):  # 32 bits say nothing of the range, the values have to
        tops = (255.0,) if image.mode == "I" else (1.0, 255.0)
        white = next((top for top in tops if values.max() <= top), white)
    transparent = values == image.info.get("transparency", -1)
    values = np.where(transparent, 1, (values / white).clip(0, 1))
    return Image.fromarray((values * 255).round().astype(np.uint8))


# Three decoders, one result. Training crops come from torchcodec, or from nvimgcodec, which decodes no more than the
# crop; Pillow decodes what they refuse or might see differently, and everything where neither is installed. All three
# stand on libjpeg-turbo and give the same pixels bit for bit, so a run does not hang on what is installed. Evaluation
# and label maps are always Pillow's.


class Area(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Picture:
    """An image in memory of which areas can be had, uint8 (C, h, w); the rows of its pixels lie interleaved."""

    def __init__(self, pixels: Tensor):
        self.pixels, (self.height, self.width) = pixels, pixels.shape[1:]

    def cut(self, area: Area) -> Tensor:
        """Give the pixels of an area. Raises one of DECODE_ERRORS."""
        return self.pixels[:, area.top : area.top + area.height, area.left : area.left + area.width]

    def decoded(self) -> "Picture":
        """Give the whole picture decoded, for when several areas of it are wanted. Raises one of DECODE_ERRORS."""
        return self


class JPEGPicture(Picture):
    """A JPEG file that every decoder sees alike, decoded when it is cut, and where possible no further than the cut."""

    def __init__(self, data: bytes, height: int, width: int, channels: int, scan_start: int | None):
        self.data, self.height, self.width, self.channels = data, height, width, channels
        self.scan_start = scan_start  # where the compressed pixels begin, if they do so only once

    def cut(self, area: Area) -> Tensor:
        part = area != (0, 0, self.height, self.width)
        if part and self.channels == 3 and load_nvimgcodec() is not None and self.ends_at_its_end():
            pixels = decode_area(self.data, area)
            if pixels is not None and pixels.shape[1:] == (area.height, area.width):
                return pixels
        return self.decoded().cut(area)

    def ends_at_its_end(self) -> bool:
        """Tell whether the first marker after the header is the end, and the last of the file.

        Otherwise a file that is cut off or broken below the area would pass for a sound one, or it is progressive.
        """
        if self.scan_start is None:
            return False
        marker = JPEG_MARKER.search(self.data, self.scan_start)
        return marker is not None and marker[0] == JPEG_END and marker.end() == len(self.data)

    def decoded(self) -> Picture:
        if decode_jpeg is not None:
            with contextlib.suppress(RuntimeError):  # whatever is wrong with the file, Pillow decides and names it
                pixels = decode_jpeg(self.data, mode="RGB" if self.channels == 3 else "GRAY")
                if pixels.shape == (self.channels, self.height, self.width):
                    return Picture(pixels)
        return Picture(to_pixels(read_image(io.BytesIO(self.data), self.channels)))


JPEG_END = b"\xff\xd9"
JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # not a stuffed 255, padding or a restart


class NamedBytes(io.BytesIO):
    """A file in memory, by whose name Pillow's errors call it."""

    def __init__(self, data: bytes, name: str):
        super().__init__(data)
        self.label = name

    def __repr__(self) -> str:
        return repr(self.label)


def open_picture(file: NamedBytes, channels: int = 3) -> Picture:
    """Read the header of an image file and, unless it is a plain JPEG, decode it. Raises one of DECODE_ERRORS.

    The pixels are those of `read_image`.
    """
    image = Image.open(file, formats=IMAGE_FORMATS)
    refuse_bomb(image)
    if is_plain_jpeg(image, channels):
        # Pillow has read up to where the compressed pixels begin. Progressive files have several such places.
        scan_start = None if "progressive" in image.info else file.tell()
        return JPEGPicture(file.getvalue(), image.height, image.width, channels, scan_start)
    file.seek(0)
    return Picture(to_pixels(read_image(file, channels)))


def is_plain_jpeg(image: Image.Image, channels: int) -> bool:
    """Tell whether the header of an opened image leaves no room for two decoders to see different pictures."""
    if image.format != "JPEG" or (image.mode, channels) not in (("RGB", 3), ("L", 3), ("L", 1)):
        return False
    segments = [content for name, content in image.applist if name == "APP1"]
    if not segments:
        return True
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except DECODE_ERRORS:
        return False
    # torchcodec also reads what Pillow does not take for EXIF, so the tag's bytes, in either order, may not be there.
    return orientation == 1 or (
        orientation is None and not any(tag in segment for segment in segments for tag in (b"\x01\x12", b"\x12\x01"))
    )


def to_pixels(image: Image.Image) -> Tensor:
    """Give a picture as uint8 (C, H, W), interleaved as the decoders leave it, so that resizing rounds alike."""
    return torch.from_numpy(np.array(image).reshape(image.height, image.width, -1)).permute(2, 0, 1)


def decode_area(data: bytes, area: Area) -> Tensor | None:
    """Decode one area of a JPEG file with nvimgcodec, uint8 (3, h, w); None where it cannot."""
    library = load_nvimgcodec()
    decoder, parameters = start_area_decoder(os.getpid())
    try:
        stream = library.CodeStream(data)
        region = library.Region(area.top, area.left, area.top + area.height, area.left + area.width)
        image = decoder.decode(stream.get_sub_code_stream(region=region), params=parameters)
    except RuntimeError:  # a header that it cannot read
        return None
    return None if image is None else torch.from_numpy(np.asarray(image)).permute(2, 0, 1)


@functools.cache
def load_nvimgcodec():
    """Import nvimgcodec with its JPEG decoder for the CPU alone; None where it is not installed.

    Its other parts look for CUDA libraries when they are loaded, print errors where there are none, and have no
    business in a worker process.
    """
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.nvimgcodec") is None:
        return None
    package = Path(importlib.util.find_spec("nvidia.nvimgcodec").origin).parent
    before = os.environ.get(EXTENSIONS_VARIABLE)
    with tempfile.TemporaryDirectory() as folder:
        for extension in (package / "extensions").glob("libjpeg_turbo_ext*"):
            os.symlink(extension, os.path.join(folder, extension.name))
        os.environ[EXTENSIONS_VARIABLE] = folder
        try:
            return importlib.import_module("nvidia.nvimgcodec")
        except (ImportError, OSError):  # no build for this Python or machine
            return None
        finally:
            del os.environ[EXTENSIONS_VARIABLE]
            if before is not None:
                os.environ[EXTENSIONS_VARIABLE] = before


EXTENSIONS_VARIABLE = "NVIMGCODEC_EXTENSIONS_PATH"


@functools.cache
def start_area_decoder(process_id: int) -> tuple:
    """Start the decoder of a process, whose threads would not survive a fork, and give it with its parameters."""
    library = load_nvimgcodec()
    decoder = library.Decoder(
        device_id=library.NVIMGCODEC_DEVICE_CPU_ONLY,
        max_num_cpu_threads=1,
        backends=[library.Backend(library.CPU_ONLY)],
        options=":fancy_upsampling=1",  # as Pillow and torchcodec
    )
    return decoder, library.DecodeParams(apply_exif_orientation=False)


def describe_decoder() -> str:
    """Name what decodes training crops in this run."""
    whole = "torchcodec" if decode_jpeg is not None else "Pillow (faster with: pip install torchcodec)"
    areas = "nvimgcodec (only the crop), " if load_nvimgcodec() is not None else ""
    return areas + whole + ("" if decode_jpeg is None else ", Pillow for what is not plain JPEG")


# ------------------------------------------------------------------------------------------------ file lists


@dataclass(frozen=True)
class FileList:
    """The images below a folder: relative paths, and where they lie in class folders a label each.

    `paths` is an array of bytes, not a list of strings: worker processes share its pages, and a million strings they
    would copy one reference count at a time.
    """

    root: Path
    paths: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.paths[index]))

    def read_image(self, index: int, channels: int) -> Image.Image:
        return read_image(self.path(index), channels)

    def open_picture(self, index: int, channels: int) -> Picture:
        path = self.path(index)
        with open(path, "rb") as file:
            return open_picture(NamedBytes(file.read(), path), channels)

    def fingerprint(self) -> str:
        """Hash the relative paths, so that a resumed run can tell whether its data is still the same."""
        return hashlib.sha256(b"\0".join(self.paths.tolist())).hexdigest()[:16]

    def thinned(self, count: int) -> "FileList":
        """Give at most `count` images, spread evenly over the list and so over the classes."""
        if len(self) <= count:
            return self
        kept = np.linspace(0, len(self) - 1, count).round().astype(np.int64)
        return dataclasses.replace(self, paths=self.paths[kept], labels=self.labels[kept])

    def describe(self) -> str:
        classes = f" in {len(self.classes):,} classes" if self.classes else ""
        return f"{len(self):,} images{classes} in {self.root}"


LAYOUT = """expected one of
  <path_to_data>/train/<class>/*.jpg  and  <path_to_data>/val/<class>/*.jpg   (or validation/; ImageNet's layout)
  <path_to_data>/any/folders/*.jpg                                           (pretraining only: no classes needed)
with files ending in """ + " ".join(IMAGE_SUFFIXES)


def find_splits(path_to_data: str | Path) -> tuple[Path, Path | None]:
    """Give the training and the validation folder of a data root; without train/ the whole root is for training."""
    root = Path(path_to_data)
    if not root.is_dir():
        there = contents(root.parent)
        raise FileNotFoundError(f"--path_to_data {root} is not a folder; {LAYOUT}\nin {root.parent}: {there}")
    return (root / "train", find_validation(root)) if (root / "train").is_dir() else (root, None)


def find_validation(root: Path) -> Path | None:
    """Give the validation folder of a data root, val/ or validation/; None where there is neither."""
    validation = [root / name for name in ("val", "validation") if (root / name).is_dir()]
    if len(validation) > 1:
        raise ValueError(f"{root} holds both val/ and validation/; keep one, so that it is clear which is meant")
    return validation[0] if validation else None


def check_same_classes(classes: tuple[str, ...], expected: tuple[str, ...], folder: Path, expected_from: str) -> None:
    """Refuse a folder whose classes differ from what they have to be; ValueError names the difference.

    A class that is missing or added would shift the label of every class after it.
    """
    if classes == expected:
        return
    if not classes:
        raise ValueError(f"{folder} has images outside class folders, so there are no labels; {LAYOUT}")
    lacking, extra = sorted(set(expected) - set(classes)), sorted(set(classes) - set(expected))
    parts = [
        f"{what} {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for what, names in (("it lacks", lacking), ("it adds", extra))
        if names
    ]
    reason = "; ".join(parts) or "their order differs"
    raise ValueError(
        f"the {len(classes)} classes in {folder} are not the {len(expected)} of {expected_from}: {reason}. Every class "
        "needs a folder of the same name in both"
    )


def contents(folder: Path) -> str:
    """Name the first ten entries of a folder, for error messages."""
    if not folder.is_dir():
        return "no such folder"
    return ", ".join(sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())[:10]) or "nothing"


def scan_images(root: Path) -> tuple[list[str], dict[str, int]]:
    """Walk a folder tree, links included: sorted relative image paths, and every folder's modification time (ns).

    Names that begin with a dot are passed over: thumbnails and copies that file managers and notebooks leave.
    """
    files, folders, visited = [], {}, set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:  # a link that leads back up
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        # Sorted, so that of two links to one folder the same one counts on every machine.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != "__MACOSX")
        relative = os.path.relpath(folder, root)
        folders[relative] = status.st_mtime_ns
        images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")]
        files += [os.path.normpath(os.path.join(relative, name)) for name in images]
    return sorted(files), folders


def list_images(root: Path, cache_folder: Path | None = None, *, rescan: bool = False) -> FileList:
    """List the images below `root`; the first folder of a path is its class, where every image has one.

    With `cache_folder` the list is kept there, one file per root, and is read again while no folder has changed:
    a million-file tree on a network disk is then a thousand look-ups instead of minutes. FileNotFoundError shows the
    expected layout beside what is there. A folder that tools/pack_dataset.py wrote brings its own list.
    """
    root = Path(root).resolve()
    if is_packed(root):
        return read_packed_images(root)
    cache = None
    if cache_folder is not None:
        cache = Path(cache_folder) / f"{root.name}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}.npz"
        if cache.is_file() and not rescan:
            cached = read_file_list(cache, root)
            if cached is not None:
                return cached
    files, folders = scan_images(root)
    if not files:
        raise FileNotFoundError(f"no images below {root}; {LAYOUT}\nwhat is there: {contents(root)}")
    first_folders = [file.split(os.sep, 1)[0] if os.sep in file else None for file in files]
    classes = () if None in first_folders else tuple(sorted(set(first_folders)))
    index = {name: i for i, name in enumerate(classes)}
    file_list = FileList(
        root,
        np.array([os.fsencode(file) for file in files]),
        np.array([index.get(name, -1) for name in first_folders], dtype=np.int32),
        classes,
    )
    if cache is not None:
        write_file_list(cache, file_list, folders)
    return file_list


def write_file_list(cache: Path, file_list: FileList, folders: dict[str, int]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp.npz")
    np.savez(
        temporary,
        root=np.array(os.fsencode(file_list.root)),
        paths=file_list.paths,
        labels=file_list.labels,
        classes=np.array([os.fsencode(name) for name in file_list.classes], dtype=bytes),
        folders=np.array([os.fsencode(folder) for folder in folders]),
        folder_times=np.array(list(folders.values()), dtype=np.int64),
    )
    os.replace(temporary, cache)


def read_file_list(cache: Path, root: Path) -> FileList | None:
    """Read a cached list; None when it is damaged, is of another root, or a folder has changed since."""
    try:
        with np.load(cache, allow_pickle=False) as content:
            stored = {name: content[name] for name in content.files}
        same_root = os.fsdecode(stored["root"].item()) == str(root)
        unchanged = same_root and all(
            os.stat(os.path.join(root, os.fsdecode(folder))).st_mtime_ns == time
            for folder, time in zip(stored["folders"], stored["folder_times"], strict=True)
        )
        classes = tuple(os.fsdecode(name) for name in stored["classes"])
        return FileList(root, stored["paths"], stored["labels"], classes) if unchanged else None
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile):
        return None


# ------------------------------------------------------------------------------------------------ packs

# tools/pack_dataset.py turns a folder of many small files into a few large ones. A pack is a folder with pack.json,
# which says what is in it, and shards. A shard is all its records (image files, or uncompressed pixels) one after the
# other, a table with a row for each, their names, and a trailer. Of a pack of pairs every second record is a label map.
# Nothing in a pack is trusted: names do not lead anywhere, places and sizes are checked before they are read.
PACK_FILE, PACKING_FILE = "pack.json", "packing.json"  # the second while a pack is being made
PACK_VERSION = 1
SHARD_NAME = re.compile(r"\d{5}\.shard")
SHARD_MAGIC = b"MAEPACK1"
SHARD_TRAILER = struct.Struct("<QQI8s")  # number of records, bytes of the names, CRC-32 of table and names, magic
SHARD_TABLE = np.dtype(
    [("offset", "<u8"), ("size", "<u8"), ("height", "<u4"), ("width", "<u4"), ("label", "<i4"), ("crc", "<u4")]
)
MAX_NAME_BYTES = 1024
ENCODINGS = ("files", "jpeg", "raw")  # bytes as they were; resized and compressed anew where larger; uint8 (H, W, 3)


def is_packed(folder: Path) -> bool:
    """Tell whether a folder is a pack; ValueError when it is one that was not finished."""
    if (folder / PACKING_FILE).exists() and not (folder / PACK_FILE).exists():
        raise ValueError(f"{folder} was not packed to the end; run tools/pack_dataset.py again, it goes on")
    return (folder / PACK_FILE).is_file()


class Pack:
    """The records of a pack, by number; files are opened when first needed, anew in every process.

    ValueError says what is wrong with a pack that is damaged or made up. `read` raises OSError for a record that is.
    """

    def __init__(self, folder: Path):
        self.folder, self.open_shards = folder, {}
        content = (folder / PACK_FILE).read_bytes()
        self.digest = hashlib.sha256(content).hexdigest()[:16]
        self.header = parse_pack_header(content, folder)
        parts = [self.read_index(number) for number in range(len(self.header["shards"]))]
        self.table = np.concatenate([table for table, _ in parts])
        self.shards = np.repeat(np.arange(len(parts)), [len(table) for table, _ in parts])
        self.names = np.array([name for _, names in parts for name in names])
        if not len(self.names):
            raise ValueError(f"{folder} holds no records")

    def __getstate__(self) -> dict:
        return self.__dict__ | {"open_shards": {}}

    def __del__(self):
        for descriptor in self.open_shards.values():
            os.close(descriptor)

    def shard_path(self, number: int) -> Path:
        return self.folder / self.header["shards"][number]["file"]

    def open_shard(self, number: int) -> int:
        if number not in self.open_shards:
            self.open_shards[number] = os.open(self.shard_path(number), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        return self.open_shards[number]

    def read_bytes(self, shard: int, offset: int, size: int) -> bytes:
        """Read a part of a shard; OSError when it is not there. Unlike a memory map, a failing disk is no crash."""
        found = os.pread(self.open_shard(shard), size, offset)
        if len(found) != size:
            raise OSError(f"{self.shard_path(shard)} is cut off")
        return found

    def read_index(self, number: int) -> tuple[np.ndarray, list[bytes]]:
        """Read the table and the names of a shard; ValueError when they are not those of a whole one."""
        path, shard = self.shard_path(number), self.header["shards"][number]

        def refuse_unless(condition: bool, reason: str) -> None:
            if not condition:
                raise ValueError(f"{path} is damaged ({reason}); pack the folder again")

        try:
            size = os.fstat(self.open_shard(number)).st_size
        except OSError as error:
            raise ValueError(f"{path} cannot be opened ({error.strerror}); pack the folder again") from error
        refuse_unless(size == shard["bytes"] and size >= SHARD_TRAILER.size, f"{size:,} bytes, not {shard['bytes']:,}")
        trailer = self.read_bytes(number, size - SHARD_TRAILER.size, SHARD_TRAILER.size)
        count, names_size, checksum, magic = SHARD_TRAILER.unpack(trailer)
        index_size = count * SHARD_TABLE.itemsize + names_size
        end = size - SHARD_TRAILER.size - index_size
        refuse_unless(magic == SHARD_MAGIC and end >= 0 and count == shard["records"], "its trailer")
        index = self.read_bytes(number, end, index_size)
        refuse_unless(zlib.crc32(index) == checksum, "the checksum of its table")
        table = np.frombuffer(index, SHARD_TABLE, count)
        names = index[count * SHARD_TABLE.itemsize :].split(b"\0") if count else []
        refuse_unless(len(names) == count and all(is_inner_path(name) for name in names), "its names")
        refuse_unless(bool((table["size"] <= end).all()), "a record's size")
        refuse_unless(bool((table["offset"] <= end - table["size"]).all()), "a record's place")
        allowed = range(len(self.header["classes"])) or range(-1, 0)
        refuse_unless(bool(((table["label"] >= allowed.start) & (table["label"] < allowed.stop)).all()), "a label")
        if self.header["encoding"] == "raw":
            pixels = table["height"].astype(np.uint64) * table["width"]
            fitting = (pixels > 0) & (pixels <= Image.MAX_IMAGE_PIXELS) & (pixels * 3 == table["size"])
            refuse_unless(bool(fitting.all()), "an image's size")
        return table, names

    def path(self, record: int) -> str:
        """Name a record as if it were a file in the pack's folder."""
        return os.path.join(self.folder, os.fsdecode(self.names[record]))

    def read(self, record: int) -> NamedBytes:
        """Read a record that is a file; OSError when it is not what was packed."""
        row = self.table[record]
        data = self.read_bytes(int(self.shards[record]), int(row["offset"]), int(row["size"]))
        if zlib.crc32(data) != row["crc"]:
            raise OSError(f"damaged since it was packed: {self.path(record)}")
        return NamedBytes(data, self.path(record))

    def read_rows(self, record: int, top: int, count: int) -> Tensor:
        """Read rows of uncompressed pixels, uint8 (3, count, W), interleaved; their checksum is not looked at."""
        row = self.table[record]
        line = int(row["width"]) * 3
        shard, offset = int(self.shards[record]), int(row["offset"]) + top * line
        rows = np.empty(
            (count, int(row["width"]), 3), dtype=np.uint8
        )  # read into, for there is no checksum to wait for
        if os.preadv(self.open_shard(shard), [rows], offset) != rows.nbytes:
            raise OSError(f"{self.shard_path(shard)} is cut off")
        return torch.from_numpy(rows).permute(2, 0, 1)


def is_inner_path(name: bytes) -> bool:
    """Tell whether a name is a relative path of reasonable length that stays below where it starts."""
    parts = name.split(b"/")
    return 0 < len(name) <= MAX_NAME_BYTES and not any(part in (b"", b".", b"..") for part in parts)


def parse_pack_header(content: bytes, folder: Path) -> dict:
    """Read pack.json; ValueError names the field that is not as tools/pack_dataset.py writes it."""
    path = folder / PACK_FILE
    try:
        header = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); pack the folder again") from error
    header = header if isinstance(header, dict) else {}
    if header.get("version") != PACK_VERSION:
        raise ValueError(f"{path} is of version {header.get('version')!r}, this code reads {PACK_VERSION}")

    def is_list(value: object, is_right: Callable[[object], bool]) -> bool:
        return isinstance(value, list) and all(is_right(entry) for entry in value)

    def is_count(value: object) -> bool:
        return type(value) is int and 0 <= value < 2**63

    def is_shard(shard: object) -> bool:
        return (
            isinstance(shard, dict)
            and isinstance(shard.get("file"), str)
            and SHARD_NAME.fullmatch(shard["file"]) is not None
            and is_count(shard.get("bytes"))
            and is_count(shard.get("records"))
        )

    checks = {
        "kind": header.get("kind") in ("images", "pairs"),
        "encoding": header.get("encoding") in ENCODINGS,
        "short_side": header.get("short_side") is None or is_count(header["short_side"]),
        "classes": is_list(header.get("classes"), lambda name: isinstance(name, str))
        and len(set(header["classes"])) == len(header["classes"]),
        "shards": is_list(header.get("shards"), is_shard) and len(header["shards"]) > 0,
    }
    wrong = [name for name, right in checks.items() if not right]
    if wrong:
        raise ValueError(f"{path} is damaged or not a pack: {', '.join(wrong)} not as it should be")
    return header


class PackedRows(Picture):
    """Uncompressed pixels in a pack, of which no more rows are read than the cut needs."""

    def __init__(self, pack: Pack, record: int):
        self.pack, self.record = pack, record
        self.height, self.width = int(pack.table[record]["height"]), int(pack.table[record]["width"])

    def cut(self, area: Area) -> Tensor:
        return self.pack.read_rows(self.record, area.top, area.height)[:, :, area.left : area.left + area.width]

    def decoded(self) -> Picture:
        return Picture(self.pack.read_rows(self.record, 0, self.height))


@dataclass(frozen=True)
class PackedImages(FileList):
    """A `FileList` whose images lie in a pack; image i is record `records[i]`."""

    pack: Pack
    records: np.ndarray

    def read_image(self, index: int, channels: int) -> Image.Image:
        record = int(self.records[index])
        if self.pack.header["encoding"] != "raw":
            return read_image(self.pack.read(record), channels)
        pixels = PackedRows(self.pack, record).decoded().pixels.permute(1, 2, 0)
        return Image.fromarray(pixels.numpy()).convert(CHANNEL_MODES[channels])

    def open_picture(self, index: int, channels: int) -> Picture:
        record = int(self.records[index])
        if self.pack.header["encoding"] != "raw":
            return open_picture(self.pack.read(record), channels)
        return PackedRows(self.pack, record) if channels == 3 else Picture(to_pixels(self.read_image(index, channels)))

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{super().fingerprint()} {self.pack.digest}".encode()).hexdigest()[:16]

    def thinned(self, count: int) -> "PackedImages":
        if len(self) <= count:
            return self
        kept = np.linspace(0, len(self) - 1, count).round().astype(np.int64)
        return dataclasses.replace(self, paths=self.paths[kept], labels=self.labels[kept], records=self.records[kept])

    def describe(self) -> str:
        side = self.pack.header["short_side"]
        size = f", short side at most {side}" if side else ""
        return f"{super().describe()}, packed as {self.pack.header['encoding']}{size}"


def read_packed_images(folder: Path) -> PackedImages:
    """List the images of a pack, with the labels and classes of the folder it was made of."""
    pack = open_pack(folder, "images")
    classes = tuple(pack.header["classes"])
    return PackedImages(
        folder, pack.names, pack.table["label"].astype(np.int32), classes, pack, np.arange(len(pack.names))
    )


def open_pack(folder: Path, kind: str) -> Pack:
    pack = Pack(folder)
    if pack.header["kind"] != kind:
        raise ValueError(f"{folder} is a pack of {pack.header['kind']}, here {kind} are needed")
    return pack


# ------------------------------------------------------------------------------------------------ label maps

ADE20K_NUM_CLASSES = 150
IGNORE_INDEX = 255  # in a label map as this project uses it: counts neither in training nor in a metric
# Names and colours of the 150 classes, in the order of the label values (CSAILVision/sceneparsing, BSD-3).
ADE20K_NAMES = """
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
    table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field,
    armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest
    of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool
    table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill,
    bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus,
    towel, light, truck, tower, chandelier, awning, streetlight, booth, television, airplane, dirt track, apparel,
    pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt,
    canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven,
    ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture,
    hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower,
    radiator, glass, clock, flag
"""
ADE20K_CLASS_NAMES = tuple(" ".join(name.split()) for name in ADE20K_NAMES.split(","))
ADE20K_COLOURS = """
    787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33 ff0652
    8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0
    ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff
    8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff
    00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99 ff5c00 ff00ff
    ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52 000aff 0070ff 3300ff 00c2ff 007aff
    00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070
    5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500
    0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff
    b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
"""
ADE20K_PALETTE = np.frombuffer(bytes.fromhex(ADE20K_COLOURS), dtype=np.uint8).reshape(-1, 3)
LABEL_COLOURS = np.resize(ADE20K_PALETTE, (IGNORE_INDEX, 3))  # of any data set; from the 151st class on they repeat
LABEL_FORMATS = ("PNG", "BMP", "TIFF", "GIF")  # a JPEG's compression makes up class ids
LABEL_LAYOUT = """expected
  <root>/images/{training,validation}/*.jpg  and  <root>/annotations/{training,validation}/*.png  (ADEChallengeData2016)
with a label map of the same name and size for every image"""


def label_table(num_classes: int, ignore_zero: bool) -> np.ndarray:
    """Give the class of each of the 256 raw values of a label map; IGNORE_INDEX, or -1 where no such value may be.

    ADE20K: 0 is "other" and ignored, 1 to 150 are the classes 0 to 149. Without `ignore_zero` raw values are classes.
    255 is ignored either way. A table, because subtracting one from uint8 would wrap 0 around.
    """
    first = int(ignore_zero)
    if not 1 <= num_classes <= IGNORE_INDEX - first:
        raise ValueError(f"num_classes must lie between 1 and {IGNORE_INDEX - first}, not {num_classes}")
    table = np.full(256, -1, dtype=np.int16)
    table[[0, IGNORE_INDEX]] = IGNORE_INDEX
    table[first : first + num_classes] = np.arange(num_classes)
    return table


def read_label_map(source: str | Path | io.BytesIO, table: np.ndarray) -> np.ndarray:
    """Read a label map as classes, uint8 (H, W); ValueError names the file and what is wrong with it."""
    with Image.open(source, formats=LABEL_FORMATS) as image:
        if image.mode not in ("L", "P"):
            raise ValueError(f"{source} is of mode {image.mode}; a label map has one 8-bit channel of class numbers")
        raw = np.asarray(image)
    classes = table[raw]
    if classes.min() < 0:
        unknown = np.unique(raw[classes < 0])
        raise ValueError(
            f"{source} has the label values {', '.join(map(str, unknown[:10]))}, which are no classes here"
        )
    return classes.astype(np.uint8)


@dataclass(frozen=True)
class PairList:
    """Images and their label maps, as relative paths; arrays of bytes, as in FileList."""

    root: Path
    images: np.ndarray
    label_maps: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.images[index]))

    def label_path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.label_maps[index]))

    def image_file(self, index: int) -> str | io.BytesIO:
        """Give what an image can be opened from; `label_file` likewise."""
        return self.path(index)

    def label_file(self, index: int) -> str | io.BytesIO:
        return self.label_path(index)

    def stamps(self) -> list[tuple[int, int]]:
        """Give size and modification time (ns) of every file."""
        statuses = [os.stat(path(i)) for path in (self.path, self.label_path) for i in range(len(self))]
        return [(status.st_size, status.st_mtime_ns) for status in statuses]

    def fingerprint(self) -> str:
        return hashlib.sha256(b"\0".join([*self.images.tolist(), *self.label_maps.tolist()])).hexdigest()[:16]

    def describe(self) -> str:
        return f"{len(self):,} pairs in {os.path.dirname(self.path(0))}"


@dataclass(frozen=True)
class PackedPairs(PairList):
    """A `PairList` whose files lie in a pack, byte for byte: image i is record 2 i, its label map record 2 i + 1."""

    pack: Pack

    def image_file(self, index: int) -> NamedBytes:
        return self.pack.read(2 * index)

    def label_file(self, index: int) -> NamedBytes:
        return self.pack.read(2 * index + 1)

    def stamps(self) -> list[tuple[int, int]]:
        statuses = [os.stat(self.pack.shard_path(number)) for number in range(len(self.pack.header["shards"]))]
        return [(status.st_size, status.st_mtime_ns) for status in statuses]

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{super().fingerprint()} {self.pack.digest}".encode()).hexdigest()[:16]

    def describe(self) -> str:
        return f"{len(self):,} pairs in {self.root}, packed"


def read_packed_pairs(folder: Path) -> PackedPairs:
    pack = open_pack(folder, "pairs")
    if len(pack.names) % 2:
        raise ValueError(f"{folder} holds {len(pack.names)} records, which are no pairs; pack the folder again")
    return PackedPairs(folder, pack.names[0::2], pack.names[1::2], pack)


def list_pairs(root: str | Path, split: str) -> PairList:
    """Pair the images of a split, "training" or "validation", with their label maps by file name.

    `root` holds images/ and annotations/, or is the folder above, or what tools/pack_dataset.py made of it.
    FileNotFoundError names what has no partner.
    """
    root = Path(root).resolve()
    if is_packed(root / split):
        return read_packed_pairs(root / split)
    if not (root / "images").is_dir() and (root / "ADEChallengeData2016").is_dir():
        root = root / "ADEChallengeData2016"
    found = []
    for kind in ("images", "annotations"):
        folder = root / kind / split
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not there; {LABEL_LAYOUT}\nin {root}: {contents(root)}")
        files, _ = scan_images(folder)
        by_stem = {}
        for file in files:
            stem = os.path.splitext(file)[0]
            if stem in by_stem:
                raise ValueError(f"{folder} has both {by_stem[stem]} and {file}; keep one")
            by_stem[stem] = file
        found.append(by_stem)
    images, label_maps = found
    for one, other, what in ((images, label_maps, "no label map"), (label_maps, images, "no image")):
        alone = sorted(one.keys() - other.keys())
        if alone:
            names = ", ".join(one[stem] for stem in alone[:5]) + (f" and {len(alone) - 5} more" * (len(alone) > 5))
            raise FileNotFoundError(f"{root}, {split}: {what} for {names}; {LABEL_LAYOUT}")
    if not images:
        raise FileNotFoundError(f"no images in {root / 'images' / split}; {LABEL_LAYOUT}")
    paths = [
        np.array([os.fsencode(os.path.join(kind, split, files[stem])) for stem in sorted(images)])
        for kind, files in (("images", images), ("annotations", label_maps))
    ]
    return PairList(root, *paths)


def check_pairs(
    pairs: PairList,
    table: np.ndarray,
    num_threads: int,
    cache_folder: Path | None = None,
    *,
    decode: bool = False,
    rescan: bool = False,
) -> None:
    """Open every label map, and the head of every image (`decode`: all of it); ValueError names what cannot be used.

    Minutes for ADE20K, so what held is remembered in `cache_folder` by the names, sizes and times of all files, until
    one of them changes; `rescan` looks again.
    """
    parts = (pairs.fingerprint(), str(pairs.root), table.tolist(), pairs.stamps(), decode)
    passed = cache_folder / f"checked-{random_key(*parts):016x}" if cache_folder else None
    if passed is not None and passed.exists() and not rescan:
        return
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        found = list(pool.map(lambda i: check_pair(pairs, i, table, decode), range(len(pairs))))
    problems = [check.problem for check in found if check.problem]
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError("label maps or images that cannot be used:\n  " + "\n  ".join(problems[:10]) + more)
    if not any(check.has_labels for check in found):
        raise ValueError(f"not one pixel has a label in {os.path.dirname(pairs.label_path(0))}: all are ignored")
    if passed is not None:
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.touch()


class PairCheck(NamedTuple):
    """What is wrong with a pair, None where nothing is, and whether any pixel has a label that counts."""

    problem: str | None
    has_labels: bool


def check_pair(pairs: PairList, index: int, table: np.ndarray, decode: bool) -> PairCheck:
    """Look at a pair. Images that cannot be decoded are training's to skip, and a problem only with `decode`."""
    label_path, image_path = pairs.label_path(index), pairs.path(index)
    try:
        labels = read_label_map(pairs.label_file(index), table)
    except DECODE_ERRORS as error:
        reason = str(error)
        return PairCheck(reason if reason.startswith(label_path) else f"{label_path}: {reason}", False)
    height, width = labels.shape
    has_labels = bool((labels != IGNORE_INDEX).any())
    try:
        with Image.open(pairs.image_file(index), formats=IMAGE_FORMATS) as image:
            size, turned = image.size, is_turned(image)
        if decode:
            read_image(pairs.image_file(index))
    except DECODE_ERRORS as error:
        return PairCheck(f"{image_path}: {type(error).__name__}: {error}" if decode else None, has_labels)
    if (width, height) != size and not (turned and (height, width) == size):
        reason = f"{width} x {height} pixels, but its image has {size[0]} x {size[1]}"
        return PairCheck(f"{label_path}: {reason}", has_labels)
    return PairCheck(None, has_labels)


def is_turned(image: Image.Image) -> bool:
    """Tell whether the EXIF flag of an opened image swaps its height and width; a damaged block is none."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except DECODE_ERRORS:
        return False


# ------------------------------------------------------------------------------------------------ randomness


class SampleKey(NamedTuple):
    """What decides a sample's every random draw, together with the seed."""

    epoch: int
    index: int


def random_key(*parts: int | str) -> int:
    """Hash (seed, epoch, index, ...) into 64 bits, alike in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


@contextlib.contextmanager
def seeded(*parts: int | str, torch_only: bool = False) -> Iterator[None]:
    """Make every draw inside (torch's CPU generator, random, numpy) a function of `parts`.

    `torch_only` leaves the other two alone, for code that draws from torch and nothing else. Outside data workers,
    which draw nothing else, the generators' states are restored, for ten times what seeding takes.
    """
    restore = []
    if get_worker_info() is None:
        restore.append(functools.partial(torch.set_rng_state, torch.get_rng_state()))
        if not torch_only:
            restore.append(functools.partial(random.setstate, random.getstate()))
            restore.append(functools.partial(np.random.set_state, np.random.get_state()))
    key = random_key(*parts)
    torch.default_generator.manual_seed(key)  # torch.manual_seed would walk every device: 30 times slower
    if not torch_only:
        random.seed(key)
        np.random.seed(key % 2**32)
    try:
        yield
    finally:
        for restore_state in restore:
            restore_state()


# ------------------------------------------------------------------------------------------------ transforms


class ResizedCropFlip:
    """Random resized crop (bicubic, antialiased) and flip, on uint8, in two steps: `cut`, then the rest of it.

    Draws what torchvision's RandomResizedCrop and RandomHorizontalFlip draw, in their order, and resizes as Pillow
    does but for rounding: 0.04 of 255 grey values on average. Gives uint8 (C, H, W).
    """

    def __init__(self, img_size: tuple[int, int], min_crop_scale: float):
        self.img_size, self.min_crop_scale = list(img_size), min_crop_scale
        self.log_ratio = torch.tensor((3 / 4, 4 / 3)).log().tolist()

    def cut(self, picture: Picture) -> Tensor:
        """Draw an area of a picture and decode it; raises one of DECODE_ERRORS."""
        return picture.cut(self.draw_area(picture.height, picture.width))

    def draw_area(self, height: int, width: int) -> Area:
        """Draw a share of the area and a ratio of the sides until they fit, ten times at most, then a place."""
        for _ in range(10):
            area = height * width * torch.empty(1).uniform_(self.min_crop_scale, 1.0).item()
            ratio = torch.empty(1).uniform_(*self.log_ratio).exp().item()
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top, left = (int(torch.randint(0, room + 1, (1,))) for room in (height - h, width - w))
                return Area(top, left, h, w)
        w, h = min(width, round(height * 4 / 3)), min(height, round(width / (3 / 4)))  # the middle, as far as it fits
        return Area((height - h) // 2, (width - w) // 2, h, w)

    def resize_and_flip(self, pixels: Tensor) -> Tensor:
        # What torchvision's resize calls; that leaves pixels interleaved as they come, and undoing it costs a third.
        pixels = F.interpolate(pixels[None], self.img_size, mode="bicubic", antialias=True)[0]
        return pixels.flip(-1) if torch.rand(1) < 0.5 else pixels

    def __call__(self, image: Image.Image) -> Tensor:
        return self.resize_and_flip(self.cut(Picture(to_pixels(image))))


def build_pretraining_transform(img_size: tuple[int, int], min_crop_scale: float) -> ResizedCropFlip:
    """Random resized crop and flip, nothing else (paper, appendix A.1; table 1e: colour jitter hurts)."""
    return ResizedCropFlip(img_size, min_crop_scale)


def build_finetuning_transform(
    img_size: tuple[int, int],
    random_aug_magnitude: int,
    random_erasing: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Callable:
    """Random resized crop, flip, RandAugment, normalisation and random erasing, as the original finetuning (table 9).

    Gives normalised float32, because erased areas are filled with normal noise of that space. All of it is timm's, at
    the settings of the original release; a magnitude of 0 leaves RandAugment out.
    """
    transform = create_transform(
        img_size,
        is_training=True,
        color_jitter=None,
        auto_augment=f"rand-m{random_aug_magnitude}-mstd0.5-inc1" if random_aug_magnitude else None,
        interpolation="bicubic",
        re_prob=random_erasing,
        re_mode="pixel",
        mean=mean,
        std=std,
    )
    for step in transform.transforms:
        for operation in step.ops if isinstance(step, RandAugment) else ():
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = posterize
    return transform


def posterize(image: Image.Image, bits_to_keep: int, **unused: object) -> Image.Image:
    """Keep the highest bits of each value; none where the magnitude is 10, which 9 +- 0.5 draws now and then.

    Pillow made that a black picture until version 13, whose error timm 1.0.31 does not expect.
    """
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)


class SingleTryResizedCrop(v2.RandomResizedCrop):
    """Draw the crop once and cut it to the image, instead of drawing until one fits (original linear probing)."""

    def make_params(self, flat_inputs: list) -> dict[str, int]:
        height, width = v2.query_size(flat_inputs)
        area = height * width * float(torch.empty(1).uniform_(*self.scale))
        ratio = float(torch.empty(1).uniform_(*(math.log(limit) for limit in self.ratio)).exp())
        crop_height = min(height, max(1, round(math.sqrt(area / ratio))))
        crop_width = min(width, max(1, round(math.sqrt(area * ratio))))
        top = int(torch.randint(height - crop_height + 1, ()))
        left = int(torch.randint(width - crop_width + 1, ()))
        return dict(top=top, left=left, height=crop_height, width=crop_width)


def build_probing_transform(img_size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]) -> Callable:
    """Random resized crop, flip and normalisation, as for the original linear probing (table 10); float32 (C, H, W)."""
    return v2.Compose(
        [
            SingleTryResizedCrop(img_size, interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )


def eval_crop_ratio(img_size: tuple[int, int]) -> float:
    """Share of the resized image that evaluation keeps: 224 of 256, and everything above 224 (original release)."""
    return 224 / 256 if max(img_size) <= 224 else 1.0


@dataclass(frozen=True)
class ResizeCenterCrop:
    """Resize (bicubic, ratio kept) until `img_size` / `crop_ratio` is covered, and cut `img_size` from the middle.

    Takes a picture and gives uint8 (C, H, W).
    """

    img_size: tuple[int, int]
    crop_ratio: float = 1.0

    def __call__(self, image: Image.Image) -> Tensor:
        height, width = (int(side / self.crop_ratio) for side in self.img_size)
        # In whole numbers: a scale factor would round 750 of a 375 x 750 image to 511 instead of 512.
        if height * image.width >= width * image.height:
            size = height, max(width, height * image.width // image.height)
        else:
            size = max(height, width * image.height // image.width), width
        image = tvf.resize(image, list(size), interpolation=InterpolationMode.BICUBIC)
        return tvf.pil_to_tensor(tvf.center_crop(image, list(self.img_size)))


def fit_within(height: int, width: int, long_side: float, short_side: float) -> tuple[int, int]:
    """Give the largest size of the same ratio whose long side is at most `long_side` and short at most `short_side`."""
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear without antialiasing, as MMSegmentation resizes (OpenCV)."""
    return tvf.resize(image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=False)


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest: anything else would make up classes. (H, W) -> size."""
    return tvf.resize(labels[None], list(size), interpolation=InterpolationMode.NEAREST)[0]


@dataclass(frozen=True)
class SegmentationTransform:
    """MMSegmentation's training augmentation for ADE20K, on image and label map together.

    Resize by a random factor keeping the ratio, crop so that no class fills more than `max_class_share` of the crop,
    flip, distort the colours, normalise, pad (image with the mean colour, labels with IGNORE_INDEX). Gives float32
    (C, H, W) and uint8 (H, W) of `img_size`.
    """

    img_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    long_side: int = 2048
    short_side: int = 512
    factors: tuple[float, float] = (0.5, 2.0)
    max_class_share: float = 0.75
    crop_tries: int = 10
    distort: bool = True

    def __call__(self, image: Image.Image, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        image, labels = tvf.pil_to_tensor(image), torch.from_numpy(labels)
        factor = random.uniform(*self.factors)
        size = fit_within(*labels.shape, int(self.long_side * factor), int(self.short_side * factor))
        image, labels = resize_image(image, size), resize_labels(labels, size)
        area = self.choose_crop(labels)
        image, labels = image[(..., *area)], labels[area]
        if random.random() < 0.5:
            image, labels = image.flip(-1), labels.flip(-1)
        if self.distort and len(image) == 3:
            image = distort_colours(image)
        image = normalize(image[None], self.mean, self.std)[0]
        bottom, right = (side - there for side, there in zip(self.img_size, labels.shape, strict=True))
        image = F.pad(image, (0, right, 0, bottom))
        return image, F.pad(labels, (0, right, 0, bottom), value=IGNORE_INDEX)

    def choose_crop(self, labels: Tensor) -> tuple[slice, slice]:
        """Draw where to crop; up to `crop_tries` draws that one class has too much of are drawn again."""
        for _ in range(self.crop_tries):
            area = self.draw_crop(labels)
            counts = torch.bincount(labels[area].flatten(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
            if (counts > 0).sum() > 1 and counts.max() < self.max_class_share * counts.sum():
                return area
        return self.draw_crop(labels)

    def draw_crop(self, labels: Tensor) -> tuple[slice, slice]:
        starts = [random.randint(0, max(0, n - c)) for n, c in zip(labels.shape, self.img_size, strict=True)]
        return tuple(slice(start, start + crop) for start, crop in zip(starts, self.img_size, strict=True))


def distort_colours(image: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue at random, each in half of the cases; uint8 (3, H, W).

    The amounts are those of MMSegmentation: brightness is added, contrast comes before or after the colours.
    """

    def convert(pixels: np.ndarray, factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
        return (pixels * np.float32(factor) + np.float32(offset)).clip(0, 255).astype(np.uint8)

    def contrast(pixels: np.ndarray) -> np.ndarray:
        return convert(pixels, random.uniform(0.5, 1.5)) if random.random() < 0.5 else pixels

    pixels = image.permute(1, 2, 0).numpy()
    if random.random() < 0.5:
        pixels = convert(pixels, offset=random.uniform(-32, 32))
    contrast_first = random.random() < 0.5
    if contrast_first:
        pixels = contrast(pixels)
    saturation = random.uniform(0.5, 1.5) if random.random() < 0.5 else 1.0
    hue = random.randint(-18, 17) / 180 if random.random() < 0.5 else 0.0  # a share of the circle
    if saturation != 1.0 or hue:
        hsv = np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV"))
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + round(hue * 256)) % 256
        hsv[..., 1] = convert(hsv[..., 1], saturation)
        pixels = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    if not contrast_first:
        pixels = contrast(pixels)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()


def keep_size(image: Image.Image, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Turn an image and its label map into tensors as they are, uint8 (C, H, W) and (H, W): a test resizes later."""
    return tvf.pil_to_tensor(image), torch.from_numpy(labels)


@functools.cache
def channel_values(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Put a number for each channel on a device, (1, C, 1, 1): once, because a GPU is waited for when that is done."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Turn uint8 (N, C, H, W) into normalised float32, on the device where it lies."""
    mean, std = (channel_values(tuple(values), images.device) for values in (mean, std))
    return (images.float() / 255 - mean) / std


def denormalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Undo `normalize` up to the scale: float (N, C, H, W) with 0 black and 1 white, not clipped."""
    mean, std = (channel_values(tuple(values), images.device) for values in (mean, std))
    return images.float() * std + mean


# ------------------------------------------------------------------------------------------------ data sets and loaders

EVAL_EPOCH = -1  # evaluation draws its masks from (seed, EVAL_EPOCH, index): the same at every evaluation
MAX_REPLACEMENTS = 100


class BadFile(NamedTuple):
    path: str
    reason: str


class Sample(NamedTuple):
    """What the transform makes of an image, (C, H, W); `label`, -1 without classes; uniform `noise`; undecodable files.

    `noise` is what the model draws for this image: (L,) decides its mask, (2 * depth,) its drop path.
    """

    key: SampleKey
    image: Tensor
    label: int
    noise: Tensor
    bad_files: list[BadFile]


class Batch(NamedTuple):
    """Samples put together: `images` (N, C, H, W), `noise` float32 (N, ...), undecodable files met.

    `labels` are int64 (N,), or the float32 targets (N, K) that `PairMixing` makes of them, or uint8 maps (N, H, W).
    """

    images: Tensor
    labels: Tensor
    noise: Tensor
    bad_files: list[BadFile]


class ImageDataset(Dataset):
    """Decode and transform the images of a list; `dataset[SampleKey(epoch, index)]` is a `Sample`.

    A file that cannot be decoded is replaced by another one, drawn from the same (seed, epoch, index), and reported
    in `bad_files`; ValueError when that goes on for MAX_REPLACEMENTS files, and at once with `replace_bad_files` off:
    a score has to be over the very images it says.
    Indices past the end start over, each time with new random draws. With `keep_decoded` the last picture is kept, for
    samplers that ask for several crops of it in a row.
    """

    def __init__(
        self,
        files: FileList,
        transform: Callable,
        *,
        seed: int = 0,
        channels: int = 3,
        noise_size: int = 0,
        replace_bad_files: bool = True,
        keep_decoded: bool = False,
    ):
        if channels not in CHANNEL_MODES:
            raise ValueError(
                f"--input_channels {channels}: image files give 1 (grey), 3 (RGB) or 4 (RGBA) channels; for other "
                "counts the model works, but the data set has to be your own"
            )
        if channels == 4 and isinstance(files, PackedImages):
            raise ValueError(f"--input_channels 4: {files.root} is packed without transparency; give the folder itself")
        self.files, self.transform, self.seed = files, transform, seed
        self.channels, self.noise_size, self.replace_bad_files = channels, noise_size, replace_bad_files
        self.keep_decoded, self.kept = keep_decoded, (-1, None)  # index and picture
        # Where the crop is known before anything is decoded, no more than the crop has to be.
        self.cuts_first = isinstance(transform, ResizedCropFlip)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: SampleKey) -> Sample:
        bad_files = []
        with seeded(self.seed, *key, torch_only=self.cuts_first):
            noise = torch.rand(self.noise_size)  # drawn first, so that masks do not hang on the augmentation
            image, label = self.prepare(*self.decode(key.index % len(self.files), bad_files))
        return Sample(key, image, label, noise, bad_files)

    def read(self, index: int) -> tuple[Image.Image | Tensor, int]:
        label = int(self.files.labels[index])
        if self.cuts_first:
            return self.transform.cut(self.open_picture(index)), label
        return self.files.read_image(index, self.channels), label

    def open_picture(self, index: int) -> Picture:
        if self.kept[0] == index:
            return self.kept[1]
        picture = self.files.open_picture(index, self.channels)
        if self.keep_decoded:
            picture = picture.decoded()
            self.kept = index, picture
        return picture

    def prepare(self, image: Image.Image | Tensor, label: int) -> tuple[Tensor, int]:
        return self.transform.resize_and_flip(image) if self.cuts_first else self.transform(image), label

    def decode(self, index: int, bad_files: list[BadFile]) -> tuple[Image.Image | Tensor, int]:
        """Read an image with its label, or where it cannot be decoded another one."""
        while True:
            path = self.files.path(index)
            before = torch.get_rng_state() if self.cuts_first else None
            try:
                return self.read(index)
            except DECODE_ERRORS as error:
                if before is not None:  # a crop may have been drawn, or not: the replacement must not hang on that
                    torch.set_rng_state(before)
                reason = f"{type(error).__name__}: {error}"
                if not self.replace_bad_files:
                    raise ValueError(f"cannot decode {path}: {reason}") from error
                bad_files.append(BadFile(path, reason))
            if len(bad_files) == MAX_REPLACEMENTS:
                raise ValueError(f"{MAX_REPLACEMENTS} files in a row cannot be decoded; the last is {path}: {reason}")
            index = int(torch.randint(len(self.files), ()))


class ADE20KDataset(ImageDataset):
    """Pairs of an image and its label map; `dataset[SampleKey(epoch, index)]` is a `Sample` whose label is a map.

    `transform` takes both, a picture and classes uint8 (H, W), and gives both as tensors.
    """

    def __init__(self, pairs: PairList, transform: Callable, table: np.ndarray, **options):
        super().__init__(pairs, transform, **options)
        self.table = table

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        labels = read_label_map(self.files.label_file(index), self.table)
        image = read_image(self.files.image_file(index), self.channels)
        if (image.height, image.width) != labels.shape:  # drawn on the picture as it is stored, rotation flag ignored
            image = read_image(self.files.image_file(index), self.channels, rotate=False)
        return image, labels

    def prepare(self, image: Image.Image, label: np.ndarray) -> tuple[Tensor, Tensor]:
        return self.transform(image, label)


def collate(samples: list[Sample]) -> Batch:
    _, images, labels, noise, bad_files = zip(*samples, strict=True)
    flat = [bad for bad_list in bad_files for bad in bad_list]
    labels = torch.stack(labels) if isinstance(labels[0], Tensor) else torch.tensor(labels)
    return Batch(torch.stack(images), labels, torch.stack(noise), flat)


def collate_lists(samples: list[Sample]) -> Batch:
    """Keep images and label maps of different sizes apart: both are lists."""
    _, images, labels, noise, bad_files = zip(*samples, strict=True)
    return Batch(list(images), list(labels), torch.stack(noise), [bad for bad_list in bad_files for bad in bad_list])


class PairMixing:
    """Collate, mix neighbours with timm's mixup or cutmix, and turn labels into smoothed targets (N, K).

    Deviation: the original release draws one lambda for a forward pass; here every pair of neighbours has its own,
    drawn from (seed, epoch, index). Reason: so a run depends neither on processes nor on accumulation (forward passes
    of an even number of images keep the pairs together). Effect: the same distribution for each image; accuracy not
    compared. Of an odd number the last image stays as it is.
    """

    def __init__(self, num_classes: int, mixup_alpha: float, cutmix_alpha: float, label_smoothing: float, seed: int):
        self.seed = seed
        self.mixup = Mixup(mixup_alpha, cutmix_alpha, label_smoothing=label_smoothing, num_classes=num_classes)
        self.mixup.mixup_enabled = mixup_alpha > 0 or cutmix_alpha > 0

    def __call__(self, samples: list[Sample]) -> Batch:
        batch = collate(samples)
        targets = []
        for start in range(0, len(samples), 2):
            images, labels = batch.images[start : start + 2], batch.labels[start : start + 2]
            alone = len(images) == 1
            if alone:  # timm takes pairs only; mixed with itself, an image stays what it is
                images, labels = images.repeat(2, 1, 1, 1), labels.repeat(2)
            with seeded(self.seed, *samples[start].key, "mix"):
                _, target = self.mixup(images, labels)  # the images are mixed in place
            targets.append(target[:1] if alone else target)
        return batch._replace(labels=torch.cat(targets))


class StepSampler(Sampler):
    """Cut each epoch's order into optimizer steps, and each step into the micro-batches of one process.

    The images of step s of epoch e are the same whatever the number of processes and accumulation steps, as long as
    their product with the micro-batch size, `images_per_step`, is. Every step is full: the remainder of an epoch is
    left out, as in the original release (another one each epoch). A data set smaller than one step is repeated,
    freshly shuffled, until the step is full.

    With `crops_per_image` R each image comes R times in a row, as R crops in one micro-batch (repeated augmentation,
    arXiv 1901.09335). Epochs keep their number of samples and steps: each visits an R-th of the images, and R epochs
    from a multiple of R on visit all of them, so images seen, schedule and log stay comparable. ValueError when a
    micro-batch cannot be filled with groups of R.
    """

    def __init__(
        self,
        num_images: int,
        micro_batch_size: int,
        *,
        accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        crops_per_image: int = 1,
    ):
        if micro_batch_size % crops_per_image:
            raise ValueError(
                f"--repeated_sampling {crops_per_image} does not divide the {micro_batch_size} images of a forward "
                "pass on one process; choose another, or another batch size"
            )
        self.crops_per_image = crops_per_image
        self.num_images, self.micro_batch_size, self.accumulation_steps = (
            num_images,
            micro_batch_size,
            accumulation_steps,
        )
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.images_per_step = micro_batch_size * accumulation_steps * world_size
        self.steps_per_epoch = max(1, num_images // self.images_per_step)
        self.epoch, self.first_step = 0, 0

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch, and how many of its optimizer steps are already made."""
        self.epoch, self.first_step = epoch, first_step

    def order(self) -> list[int]:
        """Give the epoch's indices; those of the r-th repetition of an image are raised by r * num_images.

        Repetitions come from a data set smaller than a step, and from several crops of an image.
        """
        crops = self.crops_per_image
        generator = torch.Generator().manual_seed(random_key(self.seed, self.epoch // crops, "order"))
        needed = self.steps_per_epoch * self.images_per_step
        repeats = -(-needed // self.num_images)
        shuffles = [torch.randperm(self.num_images, generator=generator) + r * self.num_images for r in range(repeats)]
        share = needed // crops
        first = self.epoch % crops * share
        images = torch.cat(shuffles)[first : first + share]
        return (images[:, None] + torch.arange(crops) * repeats * self.num_images).flatten().tolist()

    def images_of(self, step: int) -> list[int]:
        """Give the indices of the images of a run's optimizer step, from 1, over all processes."""
        epoch, step = divmod(step - 1, self.steps_per_epoch)
        before, self.epoch = self.epoch, epoch
        order, self.epoch = self.order(), before
        indices = order[step * self.images_per_step : (step + 1) * self.images_per_step]
        return [index % self.num_images for index in indices]

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.first_step) * self.accumulation_steps

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order, size = self.order(), self.micro_batch_size
        first = self.first_step * self.images_per_step + self.rank * size
        for start in range(first, len(order), self.world_size * size):
            yield [SampleKey(self.epoch, index) for index in order[start : start + size]]


PROTECTED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
WORKER_START_S = 30  # a fork takes milliseconds
MAX_FORKS = 5


class WorkerProcess(ForkProcess):
    """A forked data worker that is killed and forked again where it does not come up.

    A child of a process with threads may have a lock that another thread held at that moment, and that nobody will
    ever release. Earlier releases of Python 3.11 have one that the threads of gloo take
    (github.com/python/cpython/issues/112275). RuntimeError after `MAX_FORKS`.
    """

    def run(self) -> None:
        self.came_up.send(True)
        super().run()

    @staticmethod
    def _Popen(process: "WorkerProcess"):  # noqa: N802, what multiprocessing calls to fork
        for _ in range(MAX_FORKS):
            receiver, process.came_up = multiprocessing.Pipe(duplex=False)
            child = ForkProcess._Popen(process)
            process.came_up.close()  # the child has the other end; when it dies, the wait is over as well
            with receiver:
                if receiver.poll(WORKER_START_S):
                    return child
            child.kill()
            child.wait()
            child.close()
            print(f"a data worker that did not start in {WORKER_START_S} s is replaced", file=sys.stderr)
        raise RuntimeError(
            f"a data worker did not start in {WORKER_START_S} s, {MAX_FORKS} times in a row; try --num_workers 0"
        )


class WorkerContext(ForkContext):
    Process = WorkerProcess


class Loader(DataLoader):
    """A DataLoader whose workers leave the signals that end a run to the process that trains, and end with it.

    A scheduler and a terminal signal every process of a job. A worker that obeyed would take the training process
    down, which then could not save. So the workers start with these signals held back, and let them in when they have
    handlers of their own.
    """

    def __init__(self, *args, **options):
        leaving = torch.zeros(1).share_memory_()  # 1 when this process is at its end; its workers see it
        atexit.register(leaving.fill_, 1)  # before multiprocessing sends the workers SIGTERM and waits for them
        if sys.platform == "linux" and options["num_workers"] > 0:
            options["multiprocessing_context"] = WorkerContext()
        super().__init__(*args, worker_init_fn=functools.partial(protect_worker, leaving), **options)

    def __iter__(self):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, PROTECTED_SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def protect_worker(leaving: Tensor, worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if leaving.item() else None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PROTECTED_SIGNALS)


def build_training_loader(
    dataset: ImageDataset,
    sampler: StepSampler,
    num_workers: int,
    pin_memory: bool,
    collate_fn: Callable[[list[Sample]], Batch] = collate,
) -> DataLoader:
    return Loader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate_fn,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        # Without a generator of its own every pass would draw from the global one, and a resumed run would drift.
        generator=torch.Generator(),
    )


def build_eval_loader(
    dataset: ImageDataset,
    batch_size: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    collate_fn: Callable[[list[Sample]], Batch] = collate,
) -> DataLoader:
    """Give every image exactly once over all processes: this one's share is every `world_size`-th, unpadded."""
    return Loader(
        dataset,
        sampler=[SampleKey(EVAL_EPOCH, index) for index in range(rank, len(dataset), world_size)],
        batch_size=batch_size,
        collate_fn=collate_fn,
        num_workers=num_workers,
        generator=torch.Generator(),
    )


# ------------------------------------------------------------------------------------------------ demo data

# One large object of ten kinds before a gradient and a pattern. Colour, place, size and tilt are drawn without regard
# to the kind, so only the outline gives it away. A scene follows from (seed, kind, size) alone.
DEMO_KINDS = ("circle", "ring", "square", "triangle", "star", "cross", "heart", "crescent", "house", "tree")
# The index is the value in a label map. 0 is ADE20K's "other", which training and metrics ignore:
# here the rim of a shape, where antialiasing mixes two regions in one pixel.
DEMO_LABEL_NAMES = ("other", "background", *DEMO_KINDS, "clutter")
DEMO_OVERSAMPLING = 4  # drawn this many times larger, then averaged: antialiased edges
DEMO_VAL_SEED = 2_000_000  # training scenes have the seeds below, validation scenes those from here on
DEMO_VERSION = 1  # raise it with every change to the drawing: data on disk is reused only if it agrees


def demo_outlines(kind: str) -> list[np.ndarray]:
    """Give the polygon of a kind, and that of its hole if it has one; (points, 2) in [-1, 1], y down."""
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if kind == "circle":
        return [circle]
    if kind == "ring":
        return [circle, 0.5 * circle]
    if kind == "crescent":
        return [circle, 0.8 * circle + (0.5, 0)]
    if kind == "heart":
        x, y = np.sin(turn) ** 3, -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn))
        return [np.stack([x, (y - 2.5) / 15], axis=1)]
    if kind == "star":
        radius = np.where(np.arange(10) % 2, 0.45, 1.05)
        angle = np.pi * np.arange(10) / 5
        return [np.stack([radius * np.sin(angle), 0.08 - radius * np.cos(angle)], axis=1)]
    points = {
        "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        "triangle": [(0, -0.95), (1, 0.8), (-1, 0.8)],
        "cross": [(-0.35, -1), (0.35, -1), (0.35, -0.35), (1, -0.35), (1, 0.35), (0.35, 0.35),
                  (0.35, 1), (-0.35, 1), (-0.35, 0.35), (-1, 0.35), (-1, -0.35), (-0.35, -0.35)],
        "house": [(0, -1), (1, -0.1), (0.75, -0.1), (0.75, 0.95), (-0.75, 0.95), (-0.75, -0.1), (-1, -0.1)],
        "tree": [(0, -1), (0.6, -0.2), (0.35, -0.2), (0.9, 0.5), (0.2, 0.5), (0.2, 1),
                 (-0.2, 1), (-0.2, 0.5), (-0.9, 0.5), (-0.35, -0.2), (-0.6, -0.2)],
    }  # fmt: skip
    return [np.array(points[kind])]


def draw_coverage(outlines: list[np.ndarray], center: np.ndarray, radius: float, tilt: float, size: int) -> np.ndarray:
    """Give how much of each pixel a shape covers, (size, size) in [0, 1]; center and radius in image widths."""
    side = size * DEMO_OVERSAMPLING
    rotation = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    canvas = Image.new("L", (side, side))
    for outline, fill in zip(outlines, (255, 0), strict=False):  # the second outline is a hole
        points = (center + radius * outline @ rotation.T) * side
        ImageDraw.Draw(canvas).polygon([tuple(point) for point in points.tolist()], fill=fill)
    return np.asarray(canvas.reduce(DEMO_OVERSAMPLING), dtype=np.float32) / 255


def draw_gradient(
    rng: np.random.Generator, color: np.ndarray, strength: float, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Give a colour that brightens by `strength` across the image in a random direction, (3, size, size)."""
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5)
    tint = rng.uniform(0.4, 1, size=3)  # unequal channels, so that the hue drifts as well
    return color[:, None, None] + (strength * tint)[:, None, None] * ramp


def draw_pattern(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Give soft stripes, checks or waves in [-1, 1], (size, size)."""
    waves_across = rng.uniform(1, 2.5)
    phase_u, phase_v = rng.uniform(0, 2 * np.pi, size=2)
    angle = rng.uniform(0, np.pi)
    u = 2 * np.pi * waves_across * (np.cos(angle) * x + np.sin(angle) * y) + phase_u
    v = 2 * np.pi * waves_across * (np.cos(angle) * y - np.sin(angle) * x) + phase_v
    style = rng.integers(3)
    if style == 0:
        return np.sin(u)
    if style == 1:
        return np.sin(u) * np.sin(v)
    return np.sin(u + np.sin(v / 2))


def draw_demo_scene(seed: int, kind: int, size: int = 80) -> tuple[Image.Image, Image.Image]:
    """Draw a scene and its label map, modes RGB and L; see DEMO_KINDS and DEMO_LABEL_NAMES."""
    rng = np.random.default_rng([seed, kind])
    y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5) / size

    # Three colours at a distance, or an object might not stand out.
    while True:
        ground, body, clutter = rng.uniform(0.1, 0.9, size=(3, 3))
        if min(np.linalg.norm(ground - body), np.linalg.norm(ground - clutter)) > 0.5:
            break
    scene = draw_gradient(rng, ground, rng.uniform(0.1, 0.35), x, y)
    scene += rng.uniform(0.02, 0.06) * draw_pattern(rng, x, y)
    labels = np.full((size, size), DEMO_LABEL_NAMES.index("background"), dtype=np.uint8)

    # The clutter first, so that the object may hide some of it and never the reverse.
    radius = rng.uniform(0.29, 0.4)
    center = rng.uniform(radius, 1 - radius, size=2)
    shapes = []
    for _ in range(rng.integers(1, 4)):
        outlines = demo_outlines(("circle", "square", "triangle")[rng.integers(3)])
        spot = (outlines, rng.uniform(0.06, 0.94, size=2), rng.uniform(0.035, 0.055), rng.uniform(-np.pi, np.pi))
        shapes.append((spot, clutter, DEMO_LABEL_NAMES.index("clutter")))
    main = (demo_outlines(DEMO_KINDS[kind]), center, radius, rng.uniform(-0.2, 0.2))
    shapes.append((main, body, DEMO_LABEL_NAMES.index(DEMO_KINDS[kind])))

    for shape, color, label in shapes:
        coverage = draw_coverage(*shape, size)
        fill = draw_gradient(rng, color, rng.uniform(0.05, 0.2), x, y)
        scene += coverage * (fill - scene)
        labels[coverage > 0.25] = 0
        labels[coverage > 0.75] = label
    pixels = (scene.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))), Image.fromarray(labels)


def write_demo_data(root: Path, num_train: int = 3000, num_val: int = 400) -> None:
    """Write the scenes below `root` as imagefolder/ and as ADEChallengeData2016/, once.

    Does nothing where `root` already holds the same scenes. Raises FileExistsError where it holds anything else.
    """
    recipe = {"version": DEMO_VERSION, "num_train": num_train, "num_val": num_val}
    stamp = root / "demo.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == recipe:
        return
    if root.exists():
        raise FileExistsError(f"{root} exists and is not the demo data for {recipe}; remove it or name another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    # Renamed only when complete, so a killed run leaves no half data set under the final name.
    partial = Path(tempfile.mkdtemp(prefix=f"{root.name}.", dir=root.parent))
    try:
        splits = (("train", "training", num_train, 0), ("val", "validation", num_val, DEMO_VAL_SEED))
        for split, ade_split, num_scenes, first_seed in splits:
            for kind in DEMO_KINDS:
                (partial / "imagefolder" / split / kind).mkdir(parents=True)
            ade_folders = [partial / "ADEChallengeData2016" / part / ade_split for part in ("images", "annotations")]
            for folder in ade_folders:
                folder.mkdir(parents=True)
            for index in range(num_scenes):
                kind = index % len(DEMO_KINDS)
                image, labels = draw_demo_scene(first_seed + index, kind)
                stem = f"demo_{split}_{index:06d}"
                ade_image = ade_folders[0] / f"{stem}.jpg"
                image.save(ade_image, quality=92, subsampling=0)  # 4:4:4, or thin shapes lose their colour
                shutil.copyfile(ade_image, partial / "imagefolder" / split / DEMO_KINDS[kind] / ade_image.name)
                labels.save(ade_folders[1] / f"{stem}.png")
        (partial / stamp.name).write_text(json.dumps(recipe))
        if not stamp.is_file():  # else another run was faster
            partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
