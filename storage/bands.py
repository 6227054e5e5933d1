"""Images in their own units, float32 (C, H, W): .npy, TIFF of any bands and depth, 16-bit PNG, photographs too.

Pictures as a person sees them, in 8 bits, live in decoding.py; what becomes of the values is decided in dataset.py.
"""

import contextlib
import importlib
import importlib.util
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from storage.decoding import (
    CHANNEL_MODES,
    DECODE_ERRORS,
    MAX_FILE_BYTES,
    UNSPECIFIED_SAMPLE,
    Area,
    NamedBytes,
    Picture,
    apply_rotation,
    is_tiff,
    open_image,
    read_image,
    read_layout,
    refuse_bomb,
    rotation_flag,
)
from storage.files import open_regular

try:
    from torchcodec.decoders import decode_png
except (ImportError, OSError, RuntimeError):  # not installed, an older one, or built for another torch
    decode_png = None

NPY_MAGIC = b"\x93NUMPY"
NPY_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
MAX_BYTES = 1 << 30  # of the values of an image, in memory
STRIDE = 4  # between rows and columns of a sample


class ValuePicture(Picture):
    """Values in memory or in a mapped file: where they are cut float32 (C, h, w), or float64 where 32 bits lose some.

    `flag` is the file's rotation flag, applied or not. Values that are `no_data` become NaN.
    """

    def __init__(self, values: np.ndarray, flag: int = 1, no_data: float | None = None):
        self.values, (self.height, self.width), self.flag, self.no_data = values, values.shape[1:], flag, no_data
        kind, size = values.dtype.kind, values.dtype.itemsize
        self.dtype = np.float64 if size > 4 or (size == 4 and kind != "f") else np.float32

    def cut(self, area: Area) -> Tensor:
        rows, columns = slice(area.top, area.top + area.height), slice(area.left, area.left + area.width)
        cut = np.array(self.values[:, rows, columns], dtype=self.dtype)
        if self.no_data is not None:
            cut[cut == self.no_data] = np.nan
        return torch.from_numpy(cut)

    def decoded(self) -> Picture:
        self.values = np.ascontiguousarray(self.values)
        return self


def open_values(source: str | Path | NamedBytes, channels: int, *, rotate: bool = True) -> ValuePicture:
    """Open an image in its own units; of a .npy file on a disk no more is read than what is cut.

    Raises one of decoding.DECODE_ERRORS, such as ValueError for another number of bands than `channels`.
    """
    if isinstance(source, NamedBytes):
        return read_values(source, str(source), channels, rotate)
    path = os.fspath(source)
    with open_regular(path) as file:
        magic, size = file.read(len(NPY_MAGIC)), os.fstat(file.fileno()).st_size
        file.seek(0)
        if magic == NPY_MAGIC:
            return ValuePicture(order_bands(map_npy(file, path), path, channels))
        if size > MAX_FILE_BYTES:
            raise OSError(f"{path} has {size:,} bytes; an image file has at most {MAX_FILE_BYTES:,}")
        return read_values(NamedBytes(file.read(), path), path, channels, rotate)


def read_values(file: NamedBytes, name: str, channels: int, rotate: bool) -> ValuePicture:
    """Read all values of an image, in the file's own type, turned by its rotation flag (`rotate`)."""
    if file.getbuffer()[: len(NPY_MAGIC)] == NPY_MAGIC:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):
            raise ValueError(f"{name} has more bytes of values than those of shape {array.shape} in {array.dtype}")
        return ValuePicture(order_bands(array, name, channels))
    turned, flag, no_data = read_tiff(file, name, channels) if is_tiff(file) else read_picture(file, name, channels)
    values = match_bands(turned, name, channels)
    return ValuePicture(values if rotate else apply_rotation(values, {6: 8, 8: 6}.get(flag, flag)), flag, no_data)


class Values(NamedTuple):
    """What a file holds, (C, H, W), turned by its rotation flag; that; and the value that stands for no data."""

    turned: np.ndarray
    flag: int
    no_data: float | None = None


def read_picture(file: NamedBytes, name: str, channels: int) -> Values:
    """Read an image that no 8 bits change by a picture of it, and a PNG of 16 bits."""
    image = open_image(file)
    refuse_bomb(image)
    arguments = image.tile[0].args if image.tile else ""
    if image.format == "PNG" and isinstance(arguments, str) and ";16" in arguments:
        return Values(read_deep_png(file, image, name), rotation_flag(image))
    if channels not in CHANNEL_MODES:
        raise ValueError(f"{name} is a picture of {len(image.getbands())} bands, --input_channels is {channels}")
    flag = rotation_flag(image)
    file.seek(0)
    pixels = np.asarray(read_image(file, channels))
    return Values(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1), flag)


def has_8_bits(file: NamedBytes) -> bool:
    """Tell whether an 8-bit picture keeps all that a file holds; the next read is at its beginning."""
    if file.getbuffer()[: len(NPY_MAGIC)] == NPY_MAGIC:
        return False
    try:
        image = open_image(file)
    finally:
        file.seek(0)
    if image.format == "TIFF":
        layout = read_layout(image)
        return layout.kind == "u" and layout.bits <= 8 and UNSPECIFIED_SAMPLE not in layout.extra
    arguments = image.tile[0].args if image.tile else ""
    return not image.mode.startswith(("I", "F")) and not (isinstance(arguments, str) and ";16" in arguments)


def read_deep_png(file: NamedBytes, image: Image.Image, name: str) -> np.ndarray:
    """Read a PNG of 16 bits, (C, H, W) uint16: greys by Pillow, which keeps no more than 8 bits of colours."""
    flag = rotation_flag(image)
    if image.mode.startswith("I;16"):
        return apply_rotation(np.asarray(image)[None], flag)
    if decode_png is None:
        raise ValueError(f"{name} has 16 bits for each colour, which needs another reader: pip install torchcodec")
    # Without its EXIF chunk, as torchcodec turns an image by one before the pixels, and by none behind them
    values = decode_png(without_exif(file.getvalue()), mode="UNCHANGED", output_dtype=torch.uint16)
    return apply_rotation(values.numpy(), flag)


def without_exif(data: bytes) -> bytes:
    """Leave the EXIF chunks out of a PNG file."""
    chunks, at = [data[:8]], 8
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")  # length, name, content, checksum
        if data[at + 4 : at + 8] != b"eXIf":
            chunks.append(data[at:end])
        at = end
    return b"".join(chunks)


def map_npy(file: BinaryIO, name: str) -> np.ndarray:
    """Map the array of a .npy file into memory; ValueError where the file is not as its header says."""
    version = np.lib.format.read_magic(file)
    if version not in NPY_READERS:
        raise ValueError(f"{name} is of .npy version {version}, of which an array of numbers has no need")
    shape, fortran_order, dtype = NPY_READERS[version](file)
    if dtype.hasobject:
        raise ValueError(f"{name} holds objects, which are never loaded")
    available = os.fstat(file.fileno()).st_size - file.tell()
    if not shape or math.prod(shape) * dtype.itemsize != available or not available:
        raise ValueError(f"{name} has {available:,} bytes of values, not those of shape {shape} in {dtype}")
    return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran_order else "C")


def order_bands(array: np.ndarray, name: str, channels: int) -> np.ndarray:
    """Bring (H, W), (H, W, C) or (C, H, W) into the last of these orders; ValueError where it is none of them."""
    if array.dtype.kind not in "uif" or array.dtype.itemsize > 8:
        raise ValueError(f"{name} holds {array.dtype}; values are whole numbers or floats of at most 64 bits")
    if array.size * 4 > MAX_BYTES or not array.size:
        raise ValueError(f"{name} is of shape {array.shape}; {MAX_BYTES // 4:,} values at most, 1 at least")
    if array.ndim == 2:
        return match_bands(array[None], name, channels)
    first, last = (array.ndim == 3 and array.shape[place] == channels for place in (0, -1))
    if first and last:
        raise ValueError(f"{name} of shape {array.shape} may hold its {channels} bands first or last; cut it otherwise")
    if first:
        return array
    if array.ndim == 3 and (last or array.shape[2] == 1):
        return match_bands(array.transpose(2, 0, 1), name, channels)
    if array.ndim == 3 and array.shape[0] == 1:
        return match_bands(array, name, channels)
    raise ValueError(f"{name} is of shape {array.shape}; (H, W, {channels}) or ({channels}, H, W) is needed")


def match_bands(values: np.ndarray, name: str, channels: int) -> np.ndarray:
    """Repeat a single band where three are wanted; ValueError for any other difference."""
    if len(values) == 1 and channels == 3:
        return np.broadcast_to(values, (3, *values.shape[1:]))
    if len(values) != channels:
        raise ValueError(f"{name} has {len(values)} bands, --input_channels is {channels}")
    return values


# ------------------------------------------------------------------------------------------------ TIFF


def load_tifffile(name: str, why: str) -> ModuleType:
    try:
        return importlib.import_module("tifffile")
    except ImportError as error:
        raise ValueError(f"{name} {why}, which needs another reader: pip install tifffile") from error


def read_tiff(file: NamedBytes, name: str, channels: int) -> Values:
    """Read the samples of a TIFF as stored (also where white is 0); colours of 8 bits and less as in a picture of them.

    One band a page, as many pages as channels: bands. Otherwise the first page. Masks and smaller copies are no pages.
    """
    kind = "samples that Pillow does not know"
    with contextlib.suppress(UnidentifiedImageError, SyntaxError):  # the second of further pages
        image = Image.open(file, formats=("TIFF",))
        refuse_bomb(image)
        layout, flag, no_data = read_layout(image), rotation_flag(image), read_no_data(image.tag_v2.get(GDAL_NO_DATA))
        colours = layout.samples >= 3 and layout.bits == 8 and UNSPECIFIED_SAMPLE not in layout.extra
        if layout.kind == "u" and (image.mode == "P" or colours or layout.bits < 8):
            file.seek(0)
            return read_picture(file, name, channels)
        first_page = layout.samples == 1 and (channels == 1 or getattr(image, "n_frames", 1) == 1)
        if first_page and layout.kind == PILLOW_EXACT.get(image.mode) and not layout.white_is_zero:
            image.seek(0)
            return Values(np.asarray(image)[None], flag, no_data)  # which Pillow has turned
        kind = layout.describe()
    tifffile = load_tifffile(name, f"has {kind}")
    try:
        with tifffile.TiffFile(io.BytesIO(file.getvalue())) as tiff:
            pages = [page for page in tiff.pages if not page.subfiletype & (REDUCED_PAGE | MASK_PAGE)]
            first = pages[0]
            count = channels if first.samplesperpixel == 1 and len(pages) == channels else 1
            if first.dtype is None or first.dtype.kind not in "uif":
                raise ValueError(f"samples of {first.dtype}")
            if math.prod(first.shape) * first.dtype.itemsize * count > MAX_BYTES:
                raise ValueError(f"shape {first.shape} needs more than {MAX_BYTES:,} bytes")
            if any(page.shape != first.shape for page in pages[:count]):
                raise ValueError("pages of several sizes")
            planes = np.stack([page.asarray() for page in pages[:count]])
            tags = {tag: first.tags.get(tag) for tag in (int(ExifTags.Base.Orientation), GDAL_NO_DATA)}
            flag, no_data = (tag.value if tag else None for tag in tags.values())
            axes = first.axes
    except (tifffile.TiffFileError, ValueError, RuntimeError, KeyError, IndexError, ImportError) as error:
        advice = "" if importlib.util.find_spec("imagecodecs") else "; some compressions need pip install imagecodecs"
        raise ValueError(f"{name}: tifffile cannot read it ({error}){advice}") from error
    if axes == "YX" and len(pages) > 1 and channels not in (1, 3, len(pages)):
        raise ValueError(f"{name} has {len(pages)} pages of shape {first.shape}; {channels} pages or bands are needed")
    if axes not in ("YX", "YXS", "SYX"):
        raise ValueError(f"{name} has the axes {axes}; height, width and bands are needed")
    values = planes if axes == "YX" else planes[0].transpose(2, 0, 1) if axes == "YXS" else planes[0]
    flag = flag if flag in range(1, 9) else 1
    return Values(apply_rotation(values, flag), flag, read_no_data(no_data))


def read_no_data(text: object) -> float | None:
    """Read the value that GDAL's tag calls no data; None where there is none."""
    try:
        return None if text is None else float(text)
    except (TypeError, ValueError):
        return None


GDAL_NO_DATA = 42113  # a tag of TIFF
REDUCED_PAGE, MASK_PAGE = 1, 4  # bits of a page's NewSubfileType
# The sample kinds of a single band that Pillow hands on to the last bit, by its mode
PILLOW_EXACT = {"L": "u", "I;16": "u", "I;16B": "u", "I": "i", "F": "f"}


# ------------------------------------------------------------------------------------------------ a look at a data set

NUM_LOOKED_AT, FEW_LOOKED_AT = 64, 16
PERCENTILES = (0.1, 99.9)


def sample_indices(files, count: int, suffixes: tuple[str, ...] = ("",)) -> list[int]:
    """Give up to `count` indices spread over a list, those of files that end so."""
    spread = np.unique(np.linspace(0, len(files) - 1, count).round().astype(int)).tolist()
    return [index for index in spread if files.path(index).lower().endswith(suffixes)]


def sample_pictures(files, channels: int, indices: list[int]) -> Iterator[ValuePicture]:
    """Give some images of a list in their own units; unreadable ones are left out."""
    for index in indices:
        with contextlib.suppress(*DECODE_ERRORS):
            yield files.open_values(index, channels)


def value_percentiles(files, channels: int) -> tuple[float, float]:
    """Give percentiles 0.1 and 99.9 of the finite values of a sample; ValueError where they are no range."""
    indices = sample_indices(files, NUM_LOOKED_AT)
    pictures = sample_pictures(files, channels, indices)
    parts = [picture.whole()[:, ::STRIDE, ::STRIDE].flatten().numpy() for picture in pictures]
    if not parts:
        try:
            files.open_values(indices[0], channels)
        except DECODE_ERRORS as error:
            why = str(error) if files.path(indices[0]) in str(error) else f"{files.path(indices[0])}: {error}"
            raise ValueError(
                f"--value_range auto: none of {len(indices)} images looked at can be read; {why}"
            ) from error
    found = np.concatenate(parts).astype(np.float64)
    found = found[np.isfinite(found)]
    if not found.size:
        raise ValueError(f"--value_range auto: no finite values of {channels} bands in a sample of {files.describe()}")
    low, high = np.percentile(found, PERCENTILES).tolist()
    if low == high:
        raise ValueError(f"--value_range auto: nearly all values in {files.describe()} are {low:g}; give LOW HIGH")
    return low, high


def describe_depth(files, channels: int) -> str:
    """Say how many of 256 levels a sample of greys of 16 bits has as 8-bit pictures; empty where none is deeper."""
    indices = sample_indices(files, FEW_LOOKED_AT, (".png", ".tif", ".tiff"))
    deep = [
        picture.values for picture in sample_pictures(files, channels, indices) if picture.values.dtype == np.uint16
    ]
    if not deep:
        return ""
    low, high = min(values.min() for values in deep), max(values.max() for values in deep)
    levels = len(np.unique(np.concatenate([np.unique(values // 257) for values in deep])))
    advice = ": give --value_range auto" if levels < 128 else ""
    return f"{low}..{high} of 65535, {levels} of 256 levels used{advice}"


def describe_pages(files) -> str:
    """Say how many of a sample of files have several pages or frames; empty where none has."""
    indices = sample_indices(files, FEW_LOOKED_AT, (".tif", ".tiff", ".gif", ".webp", ".png"))
    several = 0
    for index in indices:
        with contextlib.suppress(*DECODE_ERRORS), open_regular(files.path(index)) as file:
            several += getattr(open_image(file), "n_frames", 1) > 1
    return f"{several} of {len(indices)} files looked at have several, of which the first is read" if several else ""
