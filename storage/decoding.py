"""Bytes to pixels: a whole picture or an area of it, the same pixels whichever library decodes.

Finding the files is the task of lists.py and packs.py, what becomes of the pixels that of dataset.py.
"""

import contextlib
import io
import math
import os
import re
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin, UnidentifiedImageError
from torch import Tensor

from storage.areas import decode_area, load_nvimgcodec
from storage.files import open_regular

try:
    from torchcodec.decoders import decode_jpeg
except (ImportError, OSError, RuntimeError):  # not installed, or built for another torch: Pillow decodes
    decode_jpeg = None

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # the contents decide, not the file name
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # not a stuffed 255, padding or a restart

# What Pillow raises on files that are cut, damaged, disguised or hostile. DecompressionBombError is Pillow's own
# limit on the declared size, checked before anything is decoded.
DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, AttributeError, OverflowError)
DECODE_ERRORS += (MemoryError, struct.error, zlib.error, Image.DecompressionBombError)

CHANNEL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
UNDO_ROTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
# Tags of a TIFF, and what their values say
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLES_PER_PIXEL, EXTRA_SAMPLES, SAMPLE_FORMAT = 258, 262, 277, 338, 339
WHITE_IS_ZERO, UNSPECIFIED_SAMPLE = 0, 0
SAMPLE_KINDS = {1: "u", 2: "i", 3: "f", 4: "u", 5: "c", 6: "c"}  # 4 is "undefined"
KIND_NAMES = {"u": "unsigned", "i": "signed", "f": "floating-point", "c": "complex"}


MAX_FILE_BYTES = 1 << 30  # of an image file: sparse files may claim any size


class NamedBytes(io.BytesIO):
    """A file in memory, by whose name Pillow's errors call it."""

    def __init__(self, data: bytes, name: str):
        super().__init__(data)
        self.label = name

    def __repr__(self) -> str:
        return repr(self.label)

    def __str__(self) -> str:
        return self.label


def load_file(path: str | Path) -> NamedBytes:
    """Read an image file into memory; OSError where it is no regular file or impossibly large.

    Never hand Pillow a path: of an uncompressed TIFF it then maps the file, and mixes up the rows of a rotated one.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise OSError(f"{os.fspath(path)} has {size:,} bytes; an image file has at most {MAX_FILE_BYTES:,}")
        return NamedBytes(file.read(), os.fspath(path))


def read_image(
    source: str | Path | BinaryIO, channels: int = 3, *, rotate: bool = True, short_side: int | None = None
) -> Image.Image:
    """Decode a file into the 8-bit picture a person sees, with 1 (grey), 3 (RGB) or 4 (RGBA) channels.

    Rotation flags are applied (`rotate`), 16-bit values and floats in [0, 1] scaled, transparent pixels laid on white.
    With `short_side`, a JPEG file beyond the limit of pixels is decoded at a half, a quarter or an eighth of its size,
    where that leaves as many. Raises one of DECODE_ERRORS, also for values that no 8 bits can show.

    Deviation: the original release ignores EXIF rotation and shows what lies under transparent pixels. Reason: both
    train on pictures nobody sees. Effect: not measured.
    """
    file = load_file(source) if isinstance(source, str | Path) else source
    with open_image(file) as image:
        if short_side is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            scale = short_side / min(image.size)
            image.draft(image.mode, (math.ceil(image.width * scale), math.ceil(image.height * scale)))  # JPEG's alone
        refuse_bomb(image)
        layout = read_layout(image) if image.format == "TIFF" else None
        flag = rotation_flag(image) if layout else 1  # Pillow turns TIFFs, and no others, by itself
        if layout and channels == 4:
            layout.refuse_unknown_band(source)
        if layout and layout.kind != "u" and image.mode not in ("I", "F"):
            raise ValueError(f"{KIND_NAMES[layout.kind]} samples have no known black and white: give --value_range")
        image.load()
    if rotate:
        image = upright(image)
    elif flag in UNDO_ROTATION:
        image = image.transpose(UNDO_ROTATION[flag])
    image = scale_to_8_bit(image, layout)
    mode = CHANNEL_MODES[channels]
    if image.has_transparency_data and mode != "RGBA":
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def open_image(file: BinaryIO, formats: tuple[str, ...] = IMAGE_FORMATS) -> Image.Image:
    """Read the header of an image file, of a JPEG of any size. Raises one of DECODE_ERRORS."""
    try:
        image = Image.open(file, formats=formats)
        if (
            image.format == "BMP" and image.mode == "1" and bmp_bits(file) != 1
        ):  # which Pillow takes for one bit a pixel
            raise ValueError(f"{file} is a BMP of {bmp_bits(file)} bits with two colours: save it as PNG")
        return image
    except Image.DecompressionBombError as error:
        file.seek(0)
        if file.read(len(JPEG_START)) != JPEG_START:
            raise Image.DecompressionBombError(f"{error} --max_image_pixels takes larger ones") from error
        file.seek(0)
        return JpegImagePlugin.JpegImageFile(file)  # which may be decoded at a fraction of its size
    except UnidentifiedImageError as error:
        if is_tiff(file):
            raise ValueError(
                f"{file} is a damaged TIFF, or one of samples that make no 8-bit picture: give --value_range LOW HIGH, "
                "auto or own"
            ) from error
        raise


def bmp_bits(file: BinaryIO) -> int:
    """Read how many bits a pixel of a BMP has."""
    place = file.tell()
    file.seek(0)
    head = file.read(30)
    file.seek(place)
    return int.from_bytes(head[28:30], "little") if head[14] >= 40 else int.from_bytes(head[24:26], "little")


def is_tiff(file: BinaryIO) -> bool:
    """Tell whether a file begins as a TIFF does; the next read is at its beginning."""
    file.seek(0)
    start = file.read(4)
    file.seek(0)
    return start in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class TIFFLayout(NamedTuple):
    """What the tags of a TIFF say of its samples; the first page's."""

    samples: int  # per pixel
    bits: int  # of the largest sample
    kind: str  # u, i, f or c, as numpy's
    white_is_zero: bool
    extra: tuple[int, ...]  # what samples beyond the colours are: 0 unspecified, 1 and 2 alpha

    def describe(self) -> str:
        white = ", white as 0" if self.white_is_zero else ""
        return f"{self.samples} x {self.bits} bits {KIND_NAMES[self.kind]}{white}"

    def refuse_unknown_band(self, source: object) -> None:
        if UNSPECIFIED_SAMPLE in self.extra:
            raise ValueError(
                f"the fourth band of {source} is no transparency: give --value_range, such as 0 255, to train on all "
                "four"
            )


def read_layout(image: Image.Image) -> TIFFLayout:
    """Read the layout of an opened TIFF."""
    tags = image.tag_v2
    formats = tags.get(SAMPLE_FORMAT, (1,))
    return TIFFLayout(
        samples=tags.get(SAMPLES_PER_PIXEL, 1),
        bits=max(tags.get(BITS_PER_SAMPLE, (1,))),
        kind=SAMPLE_KINDS.get(max(formats), "u"),
        white_is_zero=tags.get(PHOTOMETRIC) == WHITE_IS_ZERO,
        extra=tuple(tags.get(EXTRA_SAMPLES, ())),
    )


def apply_rotation(values: np.ndarray, flag: int) -> np.ndarray:
    """Turn an array (C, H, W) as its rotation flag says."""
    if flag in (5, 6, 7, 8):
        values = values.swapaxes(1, 2)
    if flag in (3, 4, 7, 8):
        values = values[:, ::-1]
    return values[:, :, ::-1] if flag in (2, 3, 6, 7) else values


def refuse_bomb(image: Image.Image) -> None:
    """Refuse more pixels than Pillow's limit, before they are decoded; Pillow alone only warns up to twice that."""
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(
            f"{image.width} x {image.height} pixels; --max_image_pixels {image.width * image.height} takes it"
        )


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF rotation; a damaged EXIF block of a sound picture counts as none."""
    try:
        return ImageOps.exif_transpose(image)
    except DECODE_ERRORS:
        return image


def rotation_flag(image: Image.Image) -> int:
    """Give the rotation flag (EXIF orientation) of an opened image, 1 to 8; a damaged block is none, 1."""
    try:
        flag = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODE_ERRORS:
        return 1
    return flag if flag in range(1, 9) else 1


def scale_to_8_bit(image: Image.Image, layout: TIFFLayout | None) -> Image.Image:
    """Scale 16-bit greys, and floats in [0, 1], to 8 bits; Pillow's own conversion clips them to white.

    ValueError for values that have no known black and white: what is black in one file may be white in another.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F" or (layout and (layout.kind, layout.bits) != ("u", 16) and layout.bits > 12):
        finite = values[np.isfinite(values)]
        if not (image.mode == "F" and finite.size == values.size and finite.min() >= 0 and finite.max() <= 1):
            found = f"values {finite.min():g} to {finite.max():g}" if finite.size else "no finite values"
            if finite.size < values.size:
                found += f" and {values.size - finite.size:,} that are not finite"
            raise ValueError(f"{found} have no known black and white: give --value_range LOW HIGH, or auto")
        return Image.fromarray((values * 255).round().astype(np.uint8))
    white = 4095 if layout and layout.bits == 12 else 65535
    grey = ((values.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
    if layout and layout.white_is_zero:  # which Pillow minds in 8 bits alone
        grey = 255 - grey
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


# Three decoders, one result. Images come from torchcodec, or crops from nvimgcodec, which decodes nothing else; Pillow
# decodes what they refuse or might see differently, and everything where neither is installed. All three use
# libjpeg-turbo and give the same pixels bit for bit, so a run does not depend on what is installed.
# nvimgcodec is worth 1.15 times torchcodec's crops a second on a core (40 ImageNet photographs; benchmarks/RESULTS.md,
# "Input"), to those whose GPU waits for data.


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

    def whole(self) -> Tensor:
        """Give all pixels, as `cut` does."""
        return self.cut(Area(0, 0, self.height, self.width))

    def decoded(self) -> "Picture":
        """Give the whole picture decoded, for when several areas of it are wanted. Raises one of DECODE_ERRORS."""
        return self


class JPEGPicture(Picture):
    """A JPEG file that every decoder sees alike, decoded when it is cut, and where possible the cut alone."""

    def __init__(self, data: bytes, height: int, width: int, channels: int, scan_start: int | None):
        self.data, self.height, self.width, self.channels = data, height, width, channels
        self.scan_start = scan_start  # where the compressed pixels begin, if they do so only once

    def cut(self, area: Area) -> Tensor:
        part = area != (0, 0, self.height, self.width)
        if part and self.channels == 3 and load_nvimgcodec() is not None and self.ends_at_its_end():
            pixels = decode_area(self.data, *area)
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


def open_picture(file: NamedBytes, channels: int = 3, *, rotate: bool = True) -> Picture:
    """Read the header of an image file and, unless it is a plain JPEG, decode it. Raises one of DECODE_ERRORS.

    The pixels are those of `read_image`, with the same `rotate`.
    """
    image = open_image(file)
    refuse_bomb(image)
    if is_plain_jpeg(image, channels):
        # Pillow has read up to where the compressed pixels begin; progressive files have several such places.
        scan_start = None if "progressive" in image.info else file.tell()
        return JPEGPicture(file.getvalue(), image.height, image.width, channels, scan_start)
    file.seek(0)
    return Picture(to_pixels(read_image(file, channels, rotate=rotate)))


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
    tags = (b"\x01\x12", b"\x12\x01")
    return orientation == 1 or (orientation is None and not any(tag in part for part in segments for tag in tags))


def to_pixels(image: Image.Image) -> Tensor:
    """Give a picture as uint8 (C, H, W), interleaved as the decoders leave it, so that resizing rounds alike."""
    return torch.from_numpy(np.array(image).reshape(image.height, image.width, -1)).permute(2, 0, 1)


def describe_decoder() -> str:
    """Name what decodes images in this run."""
    whole = "torchcodec" if decode_jpeg is not None else "Pillow (faster with: pip install torchcodec)"
    areas = "nvimgcodec (only the crop), " if load_nvimgcodec() is not None else ""
    return areas + whole + ("" if decode_jpeg is None else ", Pillow for what is not plain JPEG")
