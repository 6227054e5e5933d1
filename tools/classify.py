"""Name what a finetuned classifier sees in images: their likeliest classes, on the screen or in a CSV file.

    python tools/classify.py --checkpoint work_dir/MAE_Imagenet_Finetuning IMAGE_OR_FOLDER...

A file that cannot be read is named on stderr and passed over; the exit code is then 1.
"""

import argparse
import contextlib
import csv
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torchvision.models import ViT_B_16_Weights

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset import ResizeCenterCrop, eval_crop_ratio
from model import find_weights, load_classifier
from storage import explained_errors
from storage.files import user_path, written_whole
from storage.lists import as_text, find_images
from storage.values import ImageReader
from utils import describe_class


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    images = "of any size, resized and cropped to the model's; all images below a folder"
    parser.add_argument("images", nargs="+", type=user_path, metavar="IMAGE_OR_FOLDER", help=images)
    source = "checkpoint or experiment folder of finetune_classifier.py, hf:OWNER/NAME, or mae_finetuned_vit_*.pth"
    parser.add_argument("--checkpoint", type=user_path, required=True, help=source)
    parser.add_argument("--top", type=int, default=5, help="classes named of each image (default: 5)")
    table = "write a row for each image instead of printing: path, then class and probability for each of --top"
    parser.add_argument("--csv", type=user_path, metavar="FILE", help=table)
    parser.add_argument("--overwrite", action="store_true", help="allow --csv to exist")
    parser.add_argument("--batch_size", type=int, default=32, help="images at once (default: 32)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    for name in ("top", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    return args


def class_names_of(record: dict, num_classes: int) -> list[str]:
    """Give the names in config.json; without them ImageNet's where there are 1000 classes, else numbers."""
    if "class_names" in record:
        return record["class_names"]
    imagenet = ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]
    return imagenet if len(imagenet) == num_classes else [f"class {index}" for index in range(num_classes)]


@torch.no_grad()
def classify(
    model: torch.nn.Module, reader: ImageReader, files: Iterable[Path], args: argparse.Namespace
) -> Iterator[tuple[Path, list[tuple[int, float]]]]:
    """Give each file that can be read with its likeliest classes and their probabilities, best first."""
    fit = ResizeCenterCrop(model.config.image_hw, eval_crop_ratio(model.config.image_hw))
    images = ((file, reader.read_or_name(file)) for file in files)
    fitted = ((file, fit(image)) for file, image in images if image is not None)  # (C, H, W)
    while batch := list(itertools.islice(fitted, args.batch_size)):
        pixels = torch.stack([image for _, image in batch]).to(args.device)
        probabilities = model(reader.normalize(pixels)).softmax(dim=1)  # (N, K)
        best = probabilities.topk(min(args.top, probabilities.shape[1]))
        for (file, _), *row in zip(batch, best.indices.tolist(), best.values.tolist(), strict=True):
            yield file, list(zip(*row, strict=True))


@contextlib.contextmanager
def open_table(file: Path, num_classes: int) -> Iterator:
    """Give a writer of CSV rows, with the header written. Names may be any bytes: what is no UTF-8 stays as it is."""
    how = dict(newline="", encoding="utf-8", errors="surrogateescape")
    with written_whole(file) as temporary, temporary.open("x", **how) as opened:
        writer = csv.writer(opened)
        ranks = range(1, num_classes + 1)
        writer.writerow(["path", *(f"{what}_{rank}" for rank in ranks for what in ("class", "probability"))])
        yield writer


def main(args: argparse.Namespace) -> int:
    """Classify the images, and give the exit code: 1 where a file could not be read, else 0."""
    if args.csv and args.csv.exists() and not args.overwrite:
        raise FileExistsError(f"{args.csv} exists; choose another --csv or add --overwrite")
    files = [file for _, file in find_images(args.images)]
    model, record = load_classifier(args.checkpoint)
    model.to(args.device).eval()
    names = class_names_of(record, model.num_classes)
    reader = ImageReader(model.config.input_channels, record)
    found = classify(model, reader, files, args)
    print(f"{'weights':<16}{find_weights(args.checkpoint)}")
    if args.csv:
        with open_table(args.csv, min(args.top, len(names))) as table:
            for file, best in found:
                cells = ((names[index], f"{probability:.6f}") for index, probability in best)
                table.writerow([as_text(str(file)), *itertools.chain.from_iterable(cells)])
        print(f"{args.csv}: {len(files) - reader.num_bad:,} images")
    for file, best in () if args.csv else found:
        print(file)
        for index, probability in best:
            print(f"  {probability:7.2%}  {describe_class(names[index])}")
    if reader.num_bad:
        print(f"{reader.num_bad:,} of {len(files):,} files could not be read", file=sys.stderr)
    return 1 if reader.num_bad else 0


if __name__ == "__main__":
    with explained_errors():
        sys.exit(main(parse_args()))
