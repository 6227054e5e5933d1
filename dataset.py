"""What is trained on: transforms, data sets, random numbers, sampler, mixing, loaders.

What a training sample looks like is a function of (seed, epoch, index) alone: the sampler hands the workers (epoch,
index), and the dataset seeds every generator from them. Nothing here knows a network; reading files is storage's task.

Shapes   N batch   C channels   H W image   L patches   K classes
"""

import contextlib
import itertools
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tvf

from storage.console import DataError
from storage.decoding import CHANNEL_MODES, DECODE_ERRORS, Area, Picture, to_pixels
from storage.files import random_key
from storage.labels import IGNORE_INDEX, read_label_map, resize_labels
from storage.lists import FileList, PackedImages
from storage.pairs import PairList
from storage.values import (  # noqa: F401 - also names that scripts use as of here
    IMAGENET_MEAN,
    IMAGENET_STD,
    MappedPicture,
    PerChannel,
    ValueMap,
    build_values,
    denormalize,
    fill_values,
    normalize,
    patches_with_data,
    resize_pixels,
    resize_values,
)
from storage.workers import Loader, note_file, require_shared_memory, stack
from upernet import fit_within, resize_image

LONG = 16  # times the pixels of its cut that an image may have when it is resized whole


# ------------------------------------------------------------------------------------------------ randomness


class SampleKey(NamedTuple):
    """What decides a sample's every random draw, together with the seed."""

    epoch: int
    index: int


@contextlib.contextmanager
def seeded(*parts: int | str, torch_only: bool = False) -> Iterator[None]:
    """Make every draw inside (torch's CPU generator, random, numpy) a function of `parts`.

    `torch_only` leaves the other two alone, for code that draws from torch and nothing else. Outside data workers,
    which draw nothing else, the generators' states are restored, for ten times what seeding takes.
    """
    restore = contextlib.ExitStack()
    if get_worker_info() is None:
        restore.callback(torch.set_rng_state, torch.get_rng_state())
        if not torch_only:
            restore.callback(random.setstate, random.getstate())
            restore.callback(np.random.set_state, np.random.get_state())
    key = random_key(*parts)
    torch.default_generator.manual_seed(key)  # torch.manual_seed would walk every device: 30 times slower
    if not torch_only:
        random.seed(key)
        np.random.seed(key % 2**32)
    with restore:
        yield


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
        resize = resize_values if pixels.is_floating_point() else resize_pixels
        pixels = resize(pixels, self.img_size)
        return pixels.flip(-1) if torch.rand(1) < 0.5 else pixels

    def __call__(self, image: Image.Image) -> Tensor:
        return self.resize_and_flip(self.cut(Picture(to_pixels(image))))


class FixedCropFlip(ResizedCropFlip):
    """A crop of fixed size at a random place, and flip (paper, table 1e): 224 of 256 pixels of the shorter side."""

    def draw_area(self, height: int, width: int) -> Area:
        scale = min(height / self.img_size[0], width / self.img_size[1]) * 224 / 256
        h, w = (max(1, round(side * scale)) for side in self.img_size)
        top, left = (int(torch.randint(0, room + 1, (1,))) for room in (height - h, width - w))
        return Area(top, left, h, w)


class JitteredCropFlip(ResizedCropFlip):
    """Random resized crop, flip and colour jitter (paper, table 1e), half as strong as SimCLR's: 0.4, hue 0.1."""

    jitter = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)

    def resize_and_flip(self, pixels: Tensor) -> Tensor:
        return self.jitter(super().resize_and_flip(pixels))


def build_pretraining_transform(
    img_size: tuple[int, int], min_crop_scale: float, augmentation: str = "random_crop"
) -> Callable:
    """Random resized crop and flip, nothing else (paper, section 4.1), or another row of table 1e; uint8 (C, H, W)."""
    if augmentation == "none":
        return ResizeCenterCrop(img_size)
    kinds = {"random_crop": ResizedCropFlip, "fixed_crop": FixedCropFlip, "random_crop_jitter": JitteredCropFlip}
    return kinds[augmentation](img_size, min_crop_scale)


class ValueFinetuningTransform(ResizedCropFlip):
    """What finetuning does to images in their own units: random resized crop, flip and random erasing."""

    def __init__(self, img_size: tuple[int, int], random_erasing: float):
        super().__init__(img_size, min_crop_scale=0.08)
        self.erase = RandomErasing(random_erasing, mode="pixel", device="cpu")

    def resize_and_flip(self, pixels: Tensor) -> Tensor:
        return self.erase(fill_values(super().resize_and_flip(pixels)))


class FinetuningTransform(ResizedCropFlip):
    """Random resized crop, flip, RandAugment (paper, table 9), normalisation and the release's random erasing.

    Gives normalised float32, because erased areas are filled with normal noise of that space. Draws and operations are
    timm's, but the crop is decoded and resized as in pretraining; a magnitude of 0 leaves RandAugment out.
    """

    def __init__(self, img_size: tuple[int, int], magnitude: int, erasing: float, mean: PerChannel, std: PerChannel):
        super().__init__(img_size, min_crop_scale=0.08)
        self.mean, self.std = mean, std
        policy = f"rand-m{magnitude}-mstd0.5-inc1" if magnitude else None
        options = dict(interpolation="bicubic", auto_augment=policy, color_jitter=None, mean=mean, separate=True)
        crop_and_flip, self.augment, _ = create_transform(img_size, is_training=True, **options)
        self.crop = crop_and_flip.transforms[0]
        self.erase = RandomErasing(erasing, mode="pixel", device="cpu")
        for step in self.augment.transforms:
            for operation in step.ops:
                if operation.aug_fn is auto_augment.posterize:
                    operation.aug_fn = posterize

    def draw_area(self, height: int, width: int) -> Area:
        top, left, h, w = self.crop.get_params(torch.empty(()).expand(height, width), self.crop.scale, self.crop.ratio)
        # Of an image of a few pixels timm may draw none
        return Area(min(top, height - 1), min(left, width - 1), max(1, h), max(1, w))

    def resize_and_flip(self, pixels: Tensor) -> Tensor:
        # The pixels of `resize_pixels`, interleaved as Pillow needs them; a cut has to be made so first
        pixels = pixels[None].contiguous(memory_format=torch.channels_last)[0]
        pixels = tvf.resize(pixels, self.img_size, interpolation=InterpolationMode.BICUBIC)
        pixels = pixels.flip(-1) if torch.rand(1) < 0.5 else pixels
        if self.augment.transforms:
            pixels = to_pixels(self.augment(tvf.to_pil_image(pixels)))
        return self.erase(normalize(pixels[None], self.mean, self.std)[0])


def posterize(image: Image.Image, bits_to_keep: int, **unused: object) -> Image.Image:
    """Keep the highest bits of each value; none where the magnitude is 10, which 9 +- 0.5 draws now and then.

    Pillow made that a black picture until version 13, whose error timm 1.0.31 does not expect.
    """
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)


class ProbingTransform(ResizedCropFlip):
    """Random resized crop, flip and normalisation, as for the original linear probing (table 10); float32 (C, H, W).

    The crop is drawn once and cut to the image, instead of drawn until one fits.
    """

    def __init__(self, img_size: tuple[int, int], mean: PerChannel, std: PerChannel):
        super().__init__(img_size, min_crop_scale=0.08)
        self.mean, self.std = mean, std

    def draw_area(self, height: int, width: int) -> Area:
        area = height * width * torch.empty(1).uniform_(self.min_crop_scale, 1.0).item()
        ratio = torch.empty(1).uniform_(*self.log_ratio).exp().item()
        h, w = min(height, max(1, round(math.sqrt(area / ratio)))), min(width, max(1, round(math.sqrt(area * ratio))))
        top, left = (int(torch.randint(room + 1, ())) for room in (height - h, width - w))
        return Area(top, left, h, w)

    def resize_and_flip(self, pixels: Tensor) -> Tensor:
        return normalize(super().resize_and_flip(pixels)[None], self.mean, self.std)[0]


def eval_crop_ratio(img_size: tuple[int, int]) -> float:
    """Share of the resized image that evaluation keeps: 224 of 256, and everything above 224 (original release)."""
    return 224 / 256 if max(img_size) <= 224 else 1.0


@dataclass(frozen=True)
class ResizeCenterCrop:
    """Resize (bicubic, ratio kept) until `img_size` / `crop_ratio` is covered, and cut `img_size` from the middle.

    Takes a picture, as it is or as uint8 (C, h, w), and gives uint8 (C, H, W), or takes and gives normalised values,
    float32. Resizes as Pillow does but for rounding, transparency as a channel like others, as in training.
    """

    img_size: tuple[int, int]
    crop_ratio: float = 1.0

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        pixels = image if isinstance(image, Tensor) else to_pixels(image)
        size, box = self.resized(*pixels.shape[1:])
        if pixels.is_floating_point():
            return resize_values(pixels, self.img_size, box)
        if math.prod(size) > LONG * math.prod(self.img_size):
            image = tvf.to_pil_image(pixels)
            return tvf.pil_to_tensor(image.resize(self.img_size[::-1], Image.Resampling.BICUBIC, box))
        # Pixels that the box gives as well, but for the order of rows and columns, by which a level or two differ
        return tvf.center_crop(resize_pixels(pixels, size), list(self.img_size))

    def resized(self, image_height: int, image_width: int) -> tuple[tuple[int, int], tuple[float, ...]]:
        """Give the size of the whole image of which the middle is cut, and what becomes the cut: the box in the source.

        With the box nothing but the cut is resized: a whole line of 20,000 x 2 pixels would take gigabytes.
        """
        height, width = (int(side / self.crop_ratio) for side in self.img_size)
        # In whole numbers: a scale factor would round 750 of a 375 x 750 image to 511 instead of 512.
        if height * image_width >= width * image_height:
            width = max(width, height * image_width // image_height)
        else:
            height = max(height, width * image_height // image_width)
        top, left = round((height - self.img_size[0]) / 2), round((width - self.img_size[1]) / 2)
        y, x = image_height / height, image_width / width
        return (height, width), (left * x, top * y, (left + self.img_size[1]) * x, (top + self.img_size[0]) * y)


@dataclass(frozen=True)
class SegmentationTransform:
    """MMSegmentation's training augmentation for ADE20K, on image and label map together.

    Resize by a random factor keeping the ratio, crop so that no class fills more than `max_class_share` of the crop,
    flip, distort the colours, normalise, pad (image with the mean colour, labels with IGNORE_INDEX). Gives float32
    (C, H, W) and uint8 (H, W) of `img_size`.
    """

    img_size: tuple[int, int]
    mean: PerChannel
    std: PerChannel
    long_side: int = 2048
    short_side: int = 512
    factors: tuple[float, float] = (0.5, 2.0)
    max_class_share: float = 0.75
    crop_tries: int = 10
    distort: bool = True

    def __call__(self, image: Image.Image | Tensor, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        image, labels = keep_size(image, labels)
        factor = random.uniform(*self.factors)
        size = fit_within(*labels.shape, int(self.long_side * factor), int(self.short_side * factor))
        image, labels = resize_image(image, size), resize_labels(labels, size)
        area = self.choose_crop(labels)
        image, labels = image[(..., *area)], labels[area]
        if random.random() < 0.5:
            image, labels = image.flip(-1), labels.flip(-1)
        if self.distort and len(image) == 3 and not image.is_floating_point():
            image = distort_colours(image)
        image = normalize(image[None], self.mean, self.std)[0]
        bottom, right = (side - there for side, there in zip(self.img_size, labels.shape, strict=True))
        if bottom or right:  # which otherwise is a copy
            image = F.pad(image, (0, right, 0, bottom))
            labels = F.pad(labels, (0, right, 0, bottom), value=IGNORE_INDEX)
        return image, labels

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
    before = after = levels = np.arange(256, dtype=np.uint8)  # what becomes of each grey level

    def convert(levels: np.ndarray, factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
        return (levels * np.float32(factor) + np.float32(offset)).clip(0, 255).astype(np.uint8)

    def contrast(levels: np.ndarray) -> np.ndarray:
        return convert(levels, random.uniform(0.5, 1.5)) if random.random() < 0.5 else levels

    if random.random() < 0.5:
        before = convert(before, offset=random.uniform(-32, 32))
    contrast_first = random.random() < 0.5
    if contrast_first:
        before = contrast(before)
    saturation = random.uniform(0.5, 1.5) if random.random() < 0.5 else 1.0
    hue = random.randint(-18, 17) / 180 if random.random() < 0.5 else 0.0  # a share of the circle
    if not contrast_first:
        after = contrast(after)

    def look_up(picture: Image.Image, *bands: np.ndarray) -> Image.Image:
        return picture if all(b is levels for b in bands) else picture.point(np.concatenate(bands).tolist())

    picture = tvf.to_pil_image(image)
    if saturation == 1.0 and not hue:
        return to_pixels(look_up(picture, *[after[before]] * 3))
    turned, hsv = (levels.astype(np.int16) + round(hue * 256)) % 256, look_up(picture, *[before] * 3).convert("HSV")
    hsv = look_up(hsv, turned, convert(levels, saturation), levels)
    return to_pixels(look_up(hsv.convert("RGB"), *[after] * 3))


def keep_size(image: Image.Image | Tensor, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Turn an image and its label map into tensors as they are, (C, H, W) and uint8 (H, W): a test resizes later."""
    image = image if isinstance(image, Tensor) else to_pixels(image)
    return fill_values(image) if image.is_floating_point() else image, torch.from_numpy(labels)


# ------------------------------------------------------------------------------------------------ data sets

EVAL_EPOCH = -1  # evaluation draws its masks from (seed, EVAL_EPOCH, index): the same at every evaluation
MAX_REPLACEMENTS = 100
SHARDS_AT_ONCE = 4  # whose images are shuffled together, where shards are fetched


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
    a score has to be over the very images it says. Indices past the end start over, each time with new random draws.

    `masking` turns an image's noise into another one of the same size (utils.build_masking).

    `keep_decoded` keeps the last picture for samplers that ask for several crops of it in a row. Worth 2.5 times the
    crops a second, at 4 crops of a decoded image, to those whose GPU waits for data.
    """

    def __init__(
        self,
        files: FileList,
        transform: Callable,
        *,
        seed: int = 0,
        channels: int = 3,
        values: ValueMap | None = None,
        noise_size: int = 0,
        masking: Callable[[Tensor], Tensor] | None = None,
        replace_bad_files: bool = True,
        keep_decoded: bool = False,
    ):
        if channels not in CHANNEL_MODES and values is None:
            raise ValueError(
                f"--input_channels {channels}: 8-bit pictures have 1 (grey), 3 (RGB) or 4 (RGBA) channels; for other "
                "counts give --value_range LOW HIGH, auto or own"
            )
        if channels == 4 and isinstance(files, PackedImages) and files.pack.header["encoding"] != "files":
            raise ValueError(f"--input_channels 4: {files.root} is packed without transparency; give the folder itself")
        self.files, self.transform, self.seed = files, transform, seed
        self.channels, self.values = channels, values
        self.noise_size, self.masking, self.replace_bad_files = noise_size, masking, replace_bad_files
        self.keep_decoded, self.kept = keep_decoded, (-1, None)  # index and picture
        # Where the crop is known before anything is decoded, no more than the crop has to be.
        self.cuts_first = isinstance(transform, ResizedCropFlip)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: SampleKey) -> Sample:
        bad_files = []
        with seeded(self.seed, *key, torch_only=type(self.transform) is ResizedCropFlip):
            noise = torch.rand(self.noise_size)  # drawn first, so that masks do not hang on the augmentation
            if self.masking:
                noise = self.masking(noise)
            image, label = self.load(key.index % len(self.files), bad_files)
        note_file("")
        return Sample(key, image, label, noise, bad_files)

    def read(self, index: int) -> tuple[Tensor, int]:
        """Give uint8 (C, h, w), or where images are read in their own units normalised float32."""
        label = int(self.files.labels[index])
        picture = self.open_picture(index)
        return self.transform.cut(picture) if self.cuts_first else picture.whole(), label

    def open_picture(self, index: int) -> Picture:
        if self.kept[0] == index:
            return self.kept[1]
        if self.values is None:
            picture = self.files.open_picture(index, self.channels)
        else:
            picture = MappedPicture(self.files.open_values(index, self.channels), self.values)
        if self.keep_decoded:
            picture = picture.decoded()
            self.kept = index, picture
        return picture

    def prepare(self, image: Tensor, label: int) -> tuple[Tensor, int]:
        return self.transform.resize_and_flip(image) if self.cuts_first else self.transform(image), label

    def load(self, index: int, bad_files: list[BadFile]) -> tuple[Tensor, int]:
        """Read and transform an image with its label, or where that fails another one."""
        while True:
            path = self.files.path(index)
            note_file(path)
            before = torch.get_rng_state(), random.getstate()
            try:
                return self.prepare(*self.read(index))
            except DataError:  # a shard that does not come, which is no bad file
                raise
            except DECODE_ERRORS as error:
                torch.set_rng_state(before[0])  # a crop may have been drawn, or not: nothing must hang on that
                random.setstate(before[1])
                reason = f"{type(error).__name__}: {error}"
                if os.path.islink(path) and not os.path.exists(path):
                    reason = "a link to nothing"
                elif isinstance(error, FileNotFoundError):
                    reason = "missing since the list of files was made; --rescan_data makes it anew"
                if not self.replace_bad_files:
                    raise DataError(f"cannot decode {path}: {reason}") from error
                bad_files.append(BadFile(path, reason))
            if len(bad_files) == MAX_REPLACEMENTS:
                raise DataError(f"{MAX_REPLACEMENTS} files in a row cannot be decoded; the last is {path}: {reason}")
            index = int(torch.randint(len(self.files), ()))


class ADE20KDataset(ImageDataset):
    """Pairs of an image and its label map; `dataset[SampleKey(epoch, index)]` is a `Sample` whose label is a map.

    `transform` takes both, the image and classes uint8 (H, W), and gives both as tensors.
    """

    def __init__(self, pairs: PairList, transform: Callable, table: np.ndarray, **options):
        super().__init__(pairs, transform, **options)
        self.table = table

    def read(self, index: int) -> tuple[Tensor, np.ndarray]:
        labels = read_label_map(self.files.label_file(index), self.table)
        picture = self.open_picture(index)
        height, width = picture.height, picture.width
        if (height, width) != labels.shape:
            raise ValueError(f"{width} x {height} pixels, but its label map has {labels.shape[1]} x {labels.shape[0]}")
        return picture.whole(), labels

    def prepare(self, image: Tensor, label: np.ndarray) -> tuple[Tensor, Tensor]:
        return self.transform(image, label)


def collate(samples: list[Sample]) -> Batch:
    _, images, labels, noise, bad_files = zip(*samples, strict=True)
    labels = stack(labels) if isinstance(labels[0], Tensor) else torch.tensor(labels)
    return Batch(stack(images), labels, stack(noise), list(itertools.chain(*bad_files)))


def collate_lists(samples: list[Sample]) -> Batch:
    """Keep images and label maps of different sizes apart: both are lists."""
    _, images, labels, noise, bad_files = zip(*samples, strict=True)
    images, labels = ([stack([tensor])[0] for tensor in tensors] for tensors in (images, labels))
    return Batch(images, labels, stack(noise), list(itertools.chain(*bad_files)))


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


# ------------------------------------------------------------------------------------------------ sampler and loaders


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

    With the images' `shards`, for packs that are elsewhere, these come in random order, a few mixed at a time.

    With the images' `labels` each class comes equally often in an epoch, and within it each image, both up to one
    (class-balanced sampling, Kang et al. 2020, arXiv 1910.09217). Epochs keep their number of steps.
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
        labels: np.ndarray | None = None,
        shards: np.ndarray | None = None,
    ):
        assert labels is None or crops_per_image == 1, "classes and crops are not balanced together"
        if micro_batch_size % crops_per_image:
            raise ValueError(
                f"--repeated_sampling {crops_per_image} does not divide the {micro_batch_size} images of a forward "
                "pass on one process; choose another, or another batch size"
            )
        self.crops_per_image = crops_per_image
        self.num_images, self.micro_batch_size = num_images, micro_batch_size
        self.accumulation_steps, self.rank, self.world_size, self.seed = accumulation_steps, rank, world_size, seed
        self.images_per_step = micro_batch_size * accumulation_steps * world_size
        self.steps_per_epoch = max(1, num_images // self.images_per_step)
        self.epoch, self.first_step = 0, 0
        self.shards = None if shards is None else torch.from_numpy(shards)
        self.classes: list[Tensor] = []  # the images of each class, where classes are to come equally often
        if labels is not None:
            order, counts = np.argsort(labels, kind="stable"), np.unique(labels, return_counts=True)[1]
            self.classes = list(torch.from_numpy(order).split(counts.tolist()))

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch, and how many of its optimizer steps are already made."""
        self.epoch, self.first_step = epoch, first_step

    def order(self, epoch: int) -> list[int]:
        """Give an epoch's indices; those of the r-th repetition of an image are raised by r * num_images.

        Repetitions come from a data set smaller than a step, and from several crops of an image.
        """
        if self.classes:
            return self.balanced_order(epoch)
        crops = self.crops_per_image
        generator = torch.Generator().manual_seed(random_key(self.seed, epoch // crops, "order"))
        needed = self.steps_per_epoch * self.images_per_step
        repeats = -(-needed // self.num_images)
        shuffles = [self.shuffle(generator) + r * self.num_images for r in range(repeats)]
        images = torch.cat(shuffles)[: needed - needed % crops].view(crops, -1)[epoch % crops]
        return (images[:, None] + torch.arange(crops) * repeats * self.num_images).flatten().tolist()

    def shuffle(self, generator: torch.Generator) -> Tensor:
        images = torch.randperm(self.num_images, generator=generator)
        if self.shards is None:
            return images
        turns = torch.randperm(int(self.shards.max()) + 1, generator=generator) // SHARDS_AT_ONCE
        return images[turns[self.shards[images]].argsort(stable=True)]

    def balanced_order(self, epoch: int) -> list[int]:
        """Give an epoch's indices, every class alike: of each class as many shuffles as it takes, then all shuffled."""
        generator = torch.Generator().manual_seed(random_key(self.seed, epoch, "balanced order"))
        needed, num_classes = self.steps_per_epoch * self.images_per_step, len(self.classes)
        one_more = torch.randperm(num_classes, generator=generator) < needed % num_classes  # other classes each epoch
        drawn = []
        for images, count in zip(self.classes, (needed // num_classes + one_more).tolist(), strict=True):
            rounds = range(-(-count // len(images)))
            shuffles = [images[torch.randperm(len(images), generator=generator)] + r * self.num_images for r in rounds]
            drawn += torch.cat(shuffles)[:count].tolist() if shuffles else []
        return [drawn[place] for place in torch.randperm(needed, generator=generator).tolist()]

    def images_of(self, step: int) -> list[int]:
        """Give the indices of the images of a run's optimizer step, from 1, over all processes."""
        epoch, step = divmod(step - 1, self.steps_per_epoch)
        start = step * self.images_per_step
        return [index % self.num_images for index in self.order(epoch)[start : start + self.images_per_step]]

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.first_step) * self.accumulation_steps

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order, size = self.order(self.epoch), self.micro_batch_size
        first = self.first_step * self.images_per_step + self.rank * size
        for start in range(first, len(order), self.world_size * size):
            yield [SampleKey(self.epoch, index) for index in order[start : start + size]]


def build_training_loader(
    dataset: ImageDataset, sampler: StepSampler, num_workers: int, collate_fn: Callable = collate, **options
) -> DataLoader:
    """Give the batches of the sampler's epoch; RuntimeError at once where they do not fit into shared memory."""
    if num_workers:
        require_shared_memory(num_workers, sampler.micro_batch_size * dataset[SampleKey(0, 0)].image.nbytes)
    options |= dict(num_workers=num_workers, persistent_workers=num_workers > 0, collate_fn=collate_fn)
    # Without a generator of its own every pass would draw from the global one, and a resumed run would drift
    return Loader(dataset, batch_sampler=sampler, generator=torch.Generator(), **options)


def build_eval_images(files: FileList, img_size: tuple[int, int], crop: float | None = None, **options) -> ImageDataset:
    """Give images as a classifier is evaluated on: resized, the middle cut out with the original release's margin."""
    return ImageDataset(files, ResizeCenterCrop(img_size, crop or eval_crop_ratio(img_size)), **options)


def build_eval_loader(
    dataset: ImageDataset, *, rank: int = 0, world_size: int = 1, collate_fn: Callable = collate, **options
) -> DataLoader:
    """Give every image exactly once over all processes: each gets every `world_size`-th, without padding."""
    keys = [SampleKey(EVAL_EPOCH, index) for index in range(rank, len(dataset), world_size)]
    return Loader(dataset, sampler=keys, collate_fn=collate_fn, generator=torch.Generator(), **options)


def pick_samples(data: ImageDataset, count: int) -> list[Sample]:
    """Give some samples of an evaluation, spread over the data set, or over a few shards where these are fetched."""
    shards = np.zeros(len(data)) if data.files.shards is None else data.files.shards
    ids = np.unique(shards, return_inverse=True)[1]
    indices = np.flatnonzero(ids % (ids.max() // SHARDS_AT_ONCE + 1) == 0).tolist()
    return [data[SampleKey(EVAL_EPOCH, index)] for index in indices[:: max(1, len(indices) // count)][:count]]
