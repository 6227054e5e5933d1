"""Measure how many training crops one core makes, each way beside the plain Pillow pipeline.

    OMP_NUM_THREADS=1 python benchmarks/input.py --path_to_data PHOTOGRAPHS
    OMP_NUM_THREADS=1 python benchmarks/input.py --path_to_data PHOTOGRAPHS --path_to_pairs ADE20K --before CHECKOUT

The second measures finetuning, evaluation and segmentation instead, each beside the plain pipeline of its kind and,
if given, this project's own at another commit, a checkout of it.

The ways take turns, a round each, which is all images once with the same random crops; what counts is the processor
time of the process, so that other work on the machine disturbs little. This project decodes with the fastest decoder
that is installed. The loaders with two workers take turns epoch by epoch, by the clock. Packs are made in a temporary
folder.
"""

import argparse
import functools
import gc
import importlib
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from measure import CPU, ROOT, alternate, build_parser, describe_machine, print_table, ratio
from PIL import Image
from timm.data import auto_augment, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import dataset
from dataset import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageDataset,
    SampleKey,
    StepSampler,
    build_pretraining_transform,
    build_training_loader,
)
from storage import decoding
from storage.lists import FileList, list_images
from storage.pairs import list_pairs
from upernet import fit_within

IMG_SIZE, MIN_CROP_SCALE = 224, 0.2
SEED = 0
PACKS = {"384 px JPEG": ["384"], "256 px JPEG": ["256"], "256 px raw": ["256", "--raw"]}
LOADER_EPOCHS, LOADER_BATCH, LOADER_BATCHES = 8, 16, 25
LOADER_CROPS = LOADER_BATCH * LOADER_BATCHES
BICUBIC, STATISTICS = transforms.InterpolationMode.BICUBIC, (IMAGENET_MEAN, IMAGENET_STD)
TO_NORMALISED = (transforms.ToTensor(), transforms.Normalize(*STATISTICS))
CROP_SIZE, NUM_CLASSES = 512, 150  # segmentation's
MAGNITUDE, ERASING = 9, 0.25  # finetuning's


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__, rounds=20)
    parser.add_argument("--path_to_data", type=Path, required=True, help="a folder of photographs of native size")
    parser.add_argument("--path_to_pairs", type=Path, help="ADE20K: measure finetuning, evaluation and segmentation")
    parser.add_argument("--before", type=Path, help="a checkout of another commit, to be measured beside this one")
    return parser.parse_args(argv)


class PillowDataset(Dataset):
    """The pipeline of the original release: decode, crop, resize and flip with Pillow, then float and normalise.

    Or another `transform` of the decoded picture.
    """

    def __init__(self, files: FileList, transform: Callable[[Image.Image], Tensor] | None = None):
        self.files = files
        self.transform = transform or transforms.Compose(
            [
                transforms.RandomResizedCrop(IMG_SIZE, scale=(MIN_CROP_SCALE, 1.0), interpolation=BICUBIC),
                transforms.RandomHorizontalFlip(),
                *TO_NORMALISED,
            ]
        )

    def __getitem__(self, key: SampleKey) -> Tensor:
        with dataset.seeded(SEED, *key), open(self.files.path(key.index % len(self.files)), "rb") as file:
            return self.transform(Image.open(file).convert("RGB"))


def build_data(files: FileList, *, keep_decoded: bool = False) -> ImageDataset:
    transform = build_pretraining_transform((IMG_SIZE, IMG_SIZE), MIN_CROP_SCALE)
    return ImageDataset(files, transform, seed=SEED, noise_size=(IMG_SIZE // 16) ** 2, keep_decoded=keep_decoded)


def pack(source: Path, output: Path, flags: list[str]) -> FileList:
    command = [sys.executable, str(ROOT / "tools" / "pack_dataset.py"), str(source), "--output", str(output)]
    subprocess.run([*command, "--short_side", *flags], check=True, stdout=subprocess.DEVNULL)
    return list_images(output)


def build_round(data: Dataset, num_images: int, crops: int = 1) -> Callable[[], None]:
    """Give a run over all images, an epoch further each time, with several crops of each one after the other."""
    epochs = itertools.count()

    def run() -> None:
        epoch = next(epochs)
        for index in range(num_images):
            for r in range(crops):
                data[SampleKey(epoch, index + r * num_images)]

    return run


def measure_crops(files: FileList, packs: dict[str, FileList], rounds: int) -> dict[str, list[float]]:
    """Give the processor seconds that each way needs for a crop, round by round."""
    ways = {"Pillow pipeline": (PillowDataset(files), 1)}
    for name, source in {"ours": files, **packs}.items():
        ways[name] = build_data(source), 1
        ways[f"{name}, 4 crops of each"] = build_data(source, keep_decoded=True), 4
    runs = {name: build_round(data, len(files), crops) for name, (data, crops) in ways.items()}
    times = alternate(runs, rounds, clock=time.process_time)
    return {name: [s / len(files) / ways[name][1] for s in seconds] for name, seconds in times.items()}


def measure_loaders(files: FileList, packed: FileList) -> dict[str, list[float]]:
    """Give the seconds that loaders with two workers need for a crop, epoch by epoch of a few batches."""
    starts = range(0, LOADER_CROPS, LOADER_BATCH)
    keys = [[SampleKey(0, start + i) for i in range(LOADER_BATCH)] for start in starts]
    pillow = DataLoader(PillowDataset(files), batch_sampler=keys, num_workers=2, persistent_workers=True)
    loaders = {"Pillow pipeline": pillow}
    for name, source in (("ours, files", files), ("ours, packed raw", packed)):
        sampler = StepSampler(LOADER_CROPS, LOADER_BATCH, seed=SEED)
        loaders[name] = build_training_loader(build_data(source), sampler, 2, pin_memory=False)
    runs = {name: functools.partial(deque, loader, 0) for name, loader in loaders.items()}  # what is read is dropped
    times = alternate(runs, LOADER_EPOCHS, clock=time.perf_counter)
    return {name: [s / LOADER_CROPS for s in seconds] for name, seconds in times.items()}


class MMSegmentationDataset(Dataset):
    """MMSegmentation's training pipeline for ADE20K as its configuration has it, in OpenCV, and its normalisation.

    Its LoadImageFromFile, LoadAnnotations, RandomResize, RandomCrop, RandomFlip, PhotoMetricDistortion and
    SegDataPreProcessor, written out.
    """

    def __init__(self, root: Path):
        self.cv2 = importlib.import_module("cv2")  # pip install opencv-python-headless
        self.cv2.setNumThreads(1)
        self.pairs = list_pairs(root, "training")
        self.mean, self.std = (255 * torch.tensor(values)[:, None, None] for values in STATISTICS)

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, Tensor]:
        cv2, draw, side = self.cv2, np.random, CROP_SIZE
        image = cv2.imdecode(np.fromfile(self.pairs.path(key.index), np.uint8), cv2.IMREAD_COLOR)
        labels = np.array(Image.open(self.pairs.label_path(key.index)))
        labels[labels == 0] = 255
        labels = labels - 1
        labels[labels == 254] = 255
        factor = draw.uniform(0.5, 2.0)
        height, width = fit_within(*labels.shape, int(2048 * factor), int(512 * factor))
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        labels = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST)
        for _ in range(11):
            top, left = (draw.randint(0, max(n - side, 0) + 1) for n in (height, width))
            area = slice(top, top + side), slice(left, left + side)
            classes, counts = np.unique(labels[area], return_counts=True)
            counts = counts[classes != 255]
            if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
                break
        image, labels = image[area], labels[area]
        if draw.rand() < 0.5:
            image, labels = cv2.flip(image, 1), cv2.flip(labels, 1)
        image = self.distort(image)
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[[2, 1, 0]].float()
        pixels, labels = (pixels - self.mean) / self.std, torch.from_numpy(labels.astype(np.int64))
        padding = (0, side - labels.shape[1], 0, side - labels.shape[0])
        return F.pad(pixels, padding), F.pad(labels, padding, value=255)

    def distort(self, image: np.ndarray) -> np.ndarray:
        cv2, draw = self.cv2, np.random

        def convert(pixels: np.ndarray, factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
            return np.clip(pixels.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)

        if draw.randint(2):
            image = convert(image, offset=draw.uniform(-32, 32))
        contrast_first = draw.randint(2)
        if contrast_first and draw.randint(2):
            image = convert(image, draw.uniform(0.5, 1.5))
        if draw.randint(2):
            image = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
            image[..., 1] = convert(image[..., 1], draw.uniform(0.5, 1.5))
            image = cv2.cvtColor(image, cv2.COLOR_HSV2BGR)
        if draw.randint(2):
            image = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
            image[..., 0] = (image[..., 0].astype(int) + draw.randint(-18, 18)) % 180
            image = cv2.cvtColor(image, cv2.COLOR_HSV2BGR)
        return convert(image, draw.uniform(0.5, 1.5)) if not contrast_first and draw.randint(2) else image


def load_code(root: Path | None = None) -> list[ModuleType]:
    """Give dataset.py and the modules that list its data: this project's, or a checkout's, imported beside them."""
    names = ("dataset", "storage.lists", "storage.pairs", "storage.labels")
    if root is None:
        return [importlib.import_module(name) for name in names]
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] in {"dataset", "storage"}}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(root.resolve()))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.pop(0)
        sys.modules.update(ours)


def build_kinds(args: argparse.Namespace, root: Path | None = None) -> dict[str, Dataset]:
    """Give what finetuning, evaluation and segmentation read, by this or another checkout's code."""
    code, lists, pairs, labels = load_code(root)
    code.get_worker_info = lambda: True  # as in a data worker, where random states are not restored
    files, size = lists.list_images(args.path_to_data), (IMG_SIZE, IMG_SIZE)
    finetuning = getattr(code, "FinetuningTransform", None) or code.build_finetuning_transform  # until 0f99a6d
    table = labels.label_table(NUM_CLASSES, True)
    survey = pairs.check_pairs(pairs.list_pairs(args.path_to_pairs, "training"), table, 1)
    transform = code.SegmentationTransform((CROP_SIZE, CROP_SIZE), *STATISTICS)
    return {
        "finetuning": code.ImageDataset(files, finetuning(size, MAGNITUDE, ERASING, *STATISTICS), seed=SEED),
        "evaluation": code.build_eval_images(files, size),
        "segmentation": code.ADE20KDataset(survey.pairs, transform, table, seed=SEED),
    }


def build_plain_kinds(args: argparse.Namespace) -> dict[str, tuple[str, Dataset]]:
    """Give name and data of the plain pipeline of each kind: timm's, torchvision's and MMSegmentation's."""
    files, policy = list_images(args.path_to_data), f"rand-m{MAGNITUDE}-mstd0.5-inc1"
    options = dict(auto_augment=policy, re_prob=ERASING, re_mode="pixel", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    timms = create_transform(IMG_SIZE, is_training=True, color_jitter=None, interpolation="bicubic", **options)
    for operation in timms.transforms[2].ops:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = dataset.posterize
    resize = (transforms.Resize(256, interpolation=BICUBIC), transforms.CenterCrop(IMG_SIZE))
    return {
        "finetuning": ("timm's create_transform", PillowDataset(files, timms)),
        "evaluation": ("torchvision", PillowDataset(files, transforms.Compose([*resize, *TO_NORMALISED]))),
        "segmentation": ("MMSegmentation's pipeline, OpenCV", MMSegmentationDataset(args.path_to_pairs)),
    }


def measure_kinds(args: argparse.Namespace) -> None:
    """Print a table of each kind: plain pipeline, before and now."""
    ways = {"ours": build_kinds(args)} | ({"ours, before": build_kinds(args, args.before)} if args.before else {})
    for kind, (name, plain) in build_plain_kinds(args).items():
        count = len(ways["ours"][kind])
        data = {name: plain} | {way: kinds[kind] for way, kinds in ways.items()}
        runs = {way: build_round(found, count) for way, found in data.items()}
        times = alternate(runs, args.rounds, clock=time.process_time)
        print_rates(f"{kind}, one core, processor time", {way: [s / count for s in t] for way, t in times.items()})


def print_rates(title: str, times: dict[str, list[float]]) -> None:
    """Print images per second, and the ratio to the first way, the plain pipeline, from the seconds of a crop."""
    plain = next(iter(times.values()))
    rows = [[name, f"{1 / statistics.median(found):.0f}", ratio(plain, found)] for name, found in times.items()]
    print_table(title, ["way", "images/s", "ratio (lowest to highest)"], rows)


def measure_pretraining(files: FileList, rounds: int) -> None:
    """Print a table of pretraining's crops, and one of its loaders."""
    with tempfile.TemporaryDirectory() as folder:
        packs = {
            f"packed, {name}": pack(files.root, Path(folder) / name.replace(" ", "_"), flags)
            for name, flags in PACKS.items()
        }
        print_rates("one core, processor time", measure_crops(files, packs, rounds))
        loaders = measure_loaders(files, packs["packed, 256 px raw"])
        print_rates("loader with two workers, by the clock", loaders)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    files = list_images(args.path_to_data)
    print(f"{describe_machine(CPU)}; {files.describe()}; here: {decoding.describe_decoder()}")
    gc.collect()
    gc.freeze()  # a collection of all that was imported would fall on one of the ways
    if args.path_to_pairs is not None:
        measure_kinds(args)
    else:
        measure_pretraining(files, args.rounds)


if __name__ == "__main__":
    main(parse_args())
