"""What becomes of the values of an image on their way into a model: normalised pictures, values in their own units.

Reading them is the task of decoding.py and bands.py, cropping that of dataset.py.

Shapes   N batch   C channels   H W image   L patches
"""

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from storage.bands import open_values
from storage.decoding import DECODE_ERRORS, Area, Picture, read_image
from storage.files import escape

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LOST = 0.999  # share of no-data in a resized pixel, from which on it is no data
PerChannel = tuple[float, ...]  # a value for each channel, of pixels in [0, 1] or in the file's units


@dataclass(frozen=True)
class ValueMap:
    """What becomes of images that are read in their own units, instead of as 8-bit pictures: normalised float32.

    With `value_range` (low, high) values are mapped so that these are 0 and 1, and clipped, before mean and std are
    taken off; without it mean and std are in the file's units. No-data (NaN, infinities) is NaN.
    """

    mean: PerChannel
    std: PerChannel
    value_range: tuple[float, float] | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """Map floats (C, H, W) in the file's units, in 64 bits: large values may differ by little."""
        values = values.double().where(values.isfinite(), torch.nan)
        if self.value_range is not None:
            low, high = self.value_range
            values = ((values - low) / (high - low)).clip(0, 1)
        mean, std = (torch.tensor(numbers, dtype=torch.float64)[:, None, None] for numbers in (self.mean, self.std))
        return ((values - mean) / std).float()


def build_values(value_range: tuple[float, float] | str | None, mean: PerChannel, std: PerChannel) -> ValueMap | None:
    """Give what becomes of values by what --value_range has settled; None for 8-bit pictures."""
    if value_range is None:
        return None
    return ValueMap(tuple(mean), tuple(std), None if value_range == "own" else tuple(value_range))


def patches_with_data(images: Tensor, patch_size: int) -> Tensor | None:
    """Tell which patches of normalised values (N, C, H, W) hold data, float (N, L); None for 8-bit pictures."""
    if not images.is_floating_point():
        return None
    return F.max_pool2d((~images.isnan()).any(dim=1, keepdim=True).float(), patch_size).flatten(1)


class MappedPicture(Picture):
    """An image in its own units, mapped where it is cut: normalised float32 (C, h, w)."""

    def __init__(self, picture: Picture, values: ValueMap):
        self.picture, self.values, self.height, self.width = picture, values, picture.height, picture.width

    def cut(self, area: Area) -> Tensor:
        return self.values(self.picture.cut(area))

    def decoded(self) -> Picture:
        self.picture = self.picture.decoded()
        return self


def fill_values(values: Tensor) -> Tensor:
    """Put the mean, 0, where there is no data (NaN)."""
    return values.nan_to_num(0)


@functools.cache
def channel_values(values: PerChannel, device: torch.device) -> Tensor:
    """Put a number for each channel on a device, (1, C, 1, 1): once, because a GPU is waited for when that is done."""
    return torch.tensor(values, dtype=torch.get_default_dtype(), device=device).view(1, -1, 1, 1)


def normalize(images: Tensor, mean: PerChannel, std: PerChannel) -> Tensor:
    """Turn uint8 (N, C, H, W) into normalised float32, on the device where it lies.

    Images read in their own units come normalised (`ValueMap`); where they have no data they become the mean, 0.
    """
    if images.is_floating_point():
        return fill_values(images)
    mean, std = (channel_values(tuple(values), images.device) for values in (mean, std))
    # In place, and no longer interleaved: on the CPU a third of the time
    return images.to(mean.dtype, memory_format=torch.contiguous_format).div_(255).sub_(mean).div_(std)


def denormalize(images: Tensor, mean: PerChannel, std: PerChannel) -> Tensor:
    """Undo `normalize` up to the scale: float (N, C, H, W) with 0 black and 1 white, not clipped; or file's units."""
    mean, std = (channel_values(tuple(values), images.device) for values in (mean, std))
    return images.float() * std + mean


class ImageReader:
    """Reads image files as a model was trained on them, by the config.json (`record`) beside its weights."""

    def __init__(self, channels: int, record: Mapping[str, object]):
        defaults = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
        self.channels, self.num_bad = channels, 0
        self.mean, self.std = (
            tuple(record.get(name, defaults[i])) for i, name in enumerate(("image_mean", "image_std"))
        )
        self.values = build_values(record.get("value_range"), self.mean, self.std)

    def read(self, path: str | Path) -> Image.Image | Tensor:
        """Give a picture, or of images in their own units normalised float32 (C, H, W); ValueError names the file."""
        try:
            if self.values is None:
                return read_image(path, self.channels)
            return MappedPicture(open_values(path, self.channels), self.values).whole()
        except DECODE_ERRORS as error:
            raise ValueError(f"cannot decode {path}: {type(error).__name__}: {error}") from error

    def read_or_name(self, path: str | Path) -> Image.Image | Tensor | None:
        """Read an image; one that cannot be read is named on stderr and counted in `num_bad`, and None."""
        try:
            return self.read(path)
        except ValueError as error:
            self.num_bad += 1
            print(escape(f"passed over: {error}", also_bytes=True), file=sys.stderr, flush=True)
            return None

    def normalize(self, images: Tensor) -> Tensor:
        return normalize(images, self.mean, self.std)

    def denormalize(self, images: Tensor) -> Tensor:
        return denormalize(images, self.mean, self.std)


def resize_pixels(pixels: Tensor, img_size: Sequence[int]) -> Tensor:
    """Resize uint8 (C, h, w), bicubic and antialiased."""
    # What torchvision's resize calls; that leaves pixels interleaved as they come, and undoing it costs a third.
    return F.interpolate(pixels[None], tuple(img_size), mode="bicubic", antialias=True)[0]


def resize_values(values: Tensor, img_size: Sequence[int], box: tuple[float, ...] | None = None) -> Tensor:
    """Resize normalised values (C, h, w), or a box in them (left, top, right, bottom), bicubic and antialiased.

    No-data (NaN) counts as the mean, 0, and stays where nothing else went into a pixel.
    """

    def resize(bands: Tensor, how: Image.Resampling) -> Tensor:
        pictures = (Image.fromarray(band.numpy()).resize(tuple(img_size[::-1]), how, box) for band in bands)
        return torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures])

    lost = values.isnan()
    resized = resize(fill_values(values), Image.Resampling.BICUBIC)
    if lost.any():
        resized[resize(lost.float(), Image.Resampling.BILINEAR) > LOST] = torch.nan
    return resized
