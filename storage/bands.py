"""Images in their own units, float32 (C, H, W): .npy, TIFF of any bands and depth, 16-bit PNG, photographs too.

Pictures as a person sees them, in 8 bits, live in decoding.py; what becomes of the values is decided in dataset.py.
"""

import contextlib
import importlib
import io
import math
import os
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from storage.decoding import (
    CHANNEL_MODES,
    IMAGE_FORMATS,
    MAX_FILE_BYTES,
    Area,
    NamedBytes,
    Picture,
    apply_rotation,
    is_tiff,
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


class ValuePicture(Picture):
    """Values in memory or in a mapped file, float32 (C, h, w) where they are cut."""

    def __init__(self, values: np.ndarray):
        self.values, (self.height, self.width) = values, values.shape[1:]

    def cut(self, area: Area) -> Tensor:
        rows, columns = slice(area.top, area.top + area.height), slice(area.left, area.left + area.width)
        return torch.from_numpy(np.array(self.values[:, rows, columns], dtype=np.float32))

    def decoded(self) -> Picture:
        self.values = np.ascontiguousarray(self.values, dtype=np.float32)
        return self


def open_values(source: str | Path | NamedBytes, channels: int) -> ValuePicture:
    """Open an image in its own units; of a .npy file on a disk no more is read than what is cut.

    Raises one of decoding.DECODE_ERRORS, such as ValueError for another number of bands than `channels`.
    """
    if isinstance(source, NamedBytes):
        return ValuePicture(read_values(source, str(source), channels))
    path = os.fspath(source)
    with open_regular(path) as file:
        magic, size = file.read(len(NPY_MAGIC)), os.fstat(file.fileno()).st_size
        file.seek(0)
        if magic == NPY_MAGIC:
            return ValuePicture(order_bands(map_npy(file, path), path, channels))
        if size > MAX_FILE_BYTES:
            raise OSError(f"{path} has {size:,} bytes; an image file has at most {MAX_FILE_BYTES:,}")
        return ValuePicture(read_values(NamedBytes(file.read(), path), path, channels))


def read_values(file: NamedBytes, name: str, channels: int) -> np.ndarray:
    """Read all values of an image, (C, H, W) of the file's own type."""
    if file.getbuffer()[: len(NPY_MAGIC)] == NPY_MAGIC:
        return order_bands(np.lib.format.read_array(file, allow_pickle=False), name, channels)
    if is_tiff(file):
        return match_bands(read_tiff(file, name, channels), name, channels)
    image = Image.open(file, formats=IMAGE_FORMATS)
    refuse_bomb(image)
    arguments = image.tile[0].args if image.tile else ""
    if image.format == "PNG" and isinstance(arguments, str) and ";16" in arguments:
        return match_bands(read_deep_png(file, image, name), name, channels)
    if channels not in CHANNEL_MODES:
        raise ValueError(f"{name} is a picture of {len(image.getbands())} bands, --input_channels is {channels}")
    file.seek(0)
    pixels = np.asarray(read_image(file, channels))
    return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)


def read_deep_png(file: NamedBytes, image: Image.Image, name: str) -> np.ndarray:
    """Read a PNG of 16 bits, (C, H, W) uint16: greys by Pillow, which keeps no more than 8 bits of colours."""
    if image.mode.startswith("I;16"):
        return apply_rotation(np.asarray(image)[None], rotation_flag(image))
    if decode_png is None:
        raise ValueError(f"{name} has 16 bits for each colour, which needs another reader: pip install torchcodec")
    return decode_png(file.getvalue(), mode="UNCHANGED", output_dtype=torch.uint16).numpy()  # which it has turned


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
        array = array[:, :, None]
    first, last = (array.ndim == 3 and array.shape[place] == channels for place in (0, -1))
    if first and last:
        raise ValueError(f"{name} of shape {array.shape} may hold its {channels} bands first or last; cut it otherwise")
    if first:
        return array
    if array.ndim == 3 and (last or array.shape[2] == 1):
        return match_bands(array.transpose(2, 0, 1), name, channels)
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


def read_tiff(file: NamedBytes, name: str, channels: int) -> np.ndarray:
    """Read the samples of a TIFF as stored (also where white is 0), turned by its rotation flag; (C, H, W).

    One band a page, as many pages as channels: bands. Otherwise the first page.
    """
    kind = "samples that Pillow does not know"
    with contextlib.suppress(UnidentifiedImageError):
        image = Image.open(file, formats=("TIFF",))
        refuse_bomb(image)
        layout = read_layout(image)
        if image.mode == "P":  # colours of a table
            file.seek(0)
            return np.asarray(read_image(file, 3)).transpose(2, 0, 1)
        single = layout.samples == 1 and getattr(image, "n_frames", 1) == 1 and not layout.white_is_zero
        if single and layout.kind == PILLOW_EXACT.get(image.mode) and layout.bits >= 8:
            return np.asarray(image)[None]  # which Pillow has turned
        kind = layout.describe()
    tifffile = load_tifffile(name, f"has {kind}")
    try:
        with tifffile.TiffFile(io.BytesIO(file.getvalue())) as tiff:
            first = tiff.pages.first
            count = channels if first.samplesperpixel == 1 and len(tiff.pages) == channels else 1
            if math.prod(first.shape) * first.dtype.itemsize * count > MAX_BYTES:
                raise ValueError(f"{name} of shape {first.shape} needs more than {MAX_BYTES:,} bytes")
            planes = [page.asarray() for page in tiff.pages[:count]]
            axes, tag = first.axes, first.tags.get(ExifTags.Base.Orientation)
            flag = tag.value if tag else 1
    except (tifffile.TiffFileError, RuntimeError, KeyError, IndexError) as error:
        raise ValueError(f"{name}: tifffile cannot read it ({error})") from error
    if axes == "YXS":
        planes = [plane.transpose(2, 0, 1) for plane in planes]
    elif axes == "YX":
        planes = [plane[None] for plane in planes]
    elif axes != "SYX":
        raise ValueError(f"{name} has the axes {axes}; height, width and bands are needed")
    if any(plane.shape != planes[0].shape for plane in planes):
        raise ValueError(f"{name} has pages of several sizes")
    return apply_rotation(np.concatenate(planes), flag)


# The sample kinds of a single band that Pillow hands on to the last bit, by its mode
PILLOW_EXACT = {"L": "u", "I;16": "u", "I;16B": "u", "I": "i", "F": "f"}
