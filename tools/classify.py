"""Name what a finetuned classifier sees in images: its five likeliest classes.

python tools/classify.py --checkpoint work_dir/MAE_Imagenet_Finetuning/best_checkpoint IMAGE...
"""

import argparse
import sys
from pathlib import Path

import torch
from torchvision.models import ViT_B_16_Weights

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset import ResizeCenterCrop, eval_crop_ratio
from model import load_classifier
from storage import explained_errors
from storage.values import ImageReader
from utils import describe_class

TOP = 5


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="of any size; resized and cropped to the model's")
    source = "checkpoint folder of finetune_classifier.py, or mae_finetuned_vit_*.pth"
    parser.add_argument("--checkpoint", required=True, help=source)
    return parser.parse_args(argv)


def class_names_of(record: dict, num_classes: int) -> list[str]:
    """Give the names in config.json in words; without them ImageNet's where there are 1000 classes, else numbers."""
    if "class_names" in record:
        return [describe_class(name) for name in record["class_names"]]
    imagenet = ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]
    return imagenet if len(imagenet) == num_classes else [f"class {index}" for index in range(num_classes)]


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    model, record = load_classifier(args.checkpoint)
    model.eval()
    names = class_names_of(record, model.num_classes)
    fit = ResizeCenterCrop(model.config.image_hw, eval_crop_ratio(model.config.image_hw))
    reader = ImageReader(model.config.input_channels, record)
    for path in args.images:
        image = fit(reader.read(path))  # (C, H, W)
        probabilities = model(reader.normalize(image[None])).softmax(dim=1)[0]
        print(path)
        best = probabilities.topk(min(TOP, len(names)))
        for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            print(f"  {probability:7.2%}  {names[index]}")


if __name__ == "__main__":
    with explained_errors():
        main(parse_args())
