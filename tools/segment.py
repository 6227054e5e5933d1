"""Label every pixel of images of any size: an overlay picture and a label PNG each, and the classes' shares printed.

    python tools/segment.py --checkpoint work_dir/ADE20K_UperNet IMAGE_OR_FOLDER... --output FOLDER

The label PNGs hold what the training's label maps do: class numbers (with ADE20K 1 to 150), or the values or colours
of --label_values. A file that cannot be read is named on stderr and passed over; the exit code is then 1.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as tvf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import find_weights, load_segmenter
from storage import explained_errors
from storage.files import user_path
from storage.labels import LABEL_COLOURS, raw_labels
from storage.lists import find_images
from storage.values import ImageReader, fill_values
from training.pictures import colour_classes, draw_legend, show_values
from upernet import predict

SHOWN_CLASSES = 12


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    images = "of any size; all images below a folder"
    parser.add_argument("images", nargs="+", type=user_path, metavar="IMAGE_OR_FOLDER", help=images)
    source = "checkpoint or experiment folder of finetune_segmentation.py, or hf:OWNER/NAME"
    parser.add_argument("--checkpoint", type=user_path, required=True, help=source)
    parser.add_argument("--output", type=user_path, required=True, help="folder for the pictures")
    parser.add_argument("--overwrite", action="store_true", help="allow pictures of these names to exist")
    shown = "bands, from 0, as red, green and blue, of images in their own units (default: 0 1 2)"
    parser.add_argument("--show_channels", type=int, nargs=3, default=[0, 1, 2], metavar="BAND", help=shown)
    parser.add_argument("--slide", action=argparse.BooleanOptionalAction, default=True, help="score by windows")
    parser.add_argument("--multi_scale", action="store_true", help="average over six sizes")
    parser.add_argument("--flip", action="store_true", help="average over the image and its mirror image")
    parser.add_argument("--batch_size", type=int, default=4, help="windows at once (default: 4)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch_size must be at least 1, not {args.batch_size}")
    return args


def name_pictures(images: list[tuple[Path, Path]]) -> dict[str, Path]:
    """Give the images by the name of their pictures: the file's, or the path below its folder with _ for /."""
    named = {}
    for given, file in images:
        name = "_".join(file.relative_to(given if file != given else given.parent).with_suffix("").parts)
        if name in named:
            raise ValueError(f"{named[name]} and {file} would both be written as {name}; give them one at a time")
        named[name] = file
    return named


@torch.no_grad()
def main(args: argparse.Namespace) -> int:
    """Write the pictures, and give the exit code: 1 where a file could not be read, else 0."""
    files = name_pictures(find_images(args.images))
    for path in (args.output / f"{name}_{kind}.png" for name in files for kind in ("overlay", "labels")):
        if path.exists() and not args.overwrite:
            raise FileExistsError(f"{path} exists; choose another --output or add --overwrite")
    model, record = load_segmenter(args.checkpoint)
    model.to(args.device).eval()
    print(f"{'weights':<16}{find_weights(args.checkpoint)}")
    config, names = model.backbone.config, record["class_names"]
    reader = ImageReader(config.input_channels, record)
    options = {name: getattr(args, name) for name in ("slide", "multi_scale", "flip", "batch_size")}
    options |= dict(crop_size=config.image_hw, patch_size=config.patch_size, resize_to=record["resize_to"])
    args.output.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        image = reader.read_or_name(file)
        if image is None:
            continue
        image = fill_values(image) if reader.values else tvf.pil_to_tensor(image)
        classes = predict(model, [image.to(args.device)], normalize=reader.normalize, **options)[0].cpu()  # (H, W)
        counts = torch.bincount(classes.flatten(), minlength=len(names))
        shown = [k for k in counts.argsort(descending=True, stable=True).tolist() if counts[k]][:SHOWN_CLASSES]
        Image.fromarray(raw_labels(classes.numpy(), record)).save(args.output / f"{name}_labels.png")
        overlay_file = args.output / f"{name}_overlay.png"
        if reader.values:
            image = show_values([image[None]], args.show_channels)[0][0].clip(0, 1) * 255
        draw_overlay(image, classes, {names[k]: k for k in shown}).save(overlay_file)
        print(f"{file}: {overlay_file}")
        for k in shown:
            print(f"  {100 * counts[k].item() / classes.numel():6.2f} %  {names[k]}")
    return 1 if reader.num_bad else 0


def draw_overlay(image: torch.Tensor, classes: torch.Tensor, shown: dict[str, int]) -> Image.Image:
    """Mix an image, uint8 (C, H, W), half and half with its classes' colours; a legend of those `shown` lies below."""
    mixed = 0.5 * image[:3] / 255 + 0.5 * colour_classes(classes, LABEL_COLOURS)  # (3, H, W), also of a grey image
    top = Image.fromarray((mixed * 255).round().byte().permute(1, 2, 0).numpy())
    legend = draw_legend({name: tuple(LABEL_COLOURS[k]) for name, k in shown.items()}, max(320, top.width))
    canvas = ImageOps.expand(top, (0, 0, legend.width - top.width, legend.height), "white")
    canvas.paste(legend, (0, top.height))
    return canvas


if __name__ == "__main__":
    with explained_errors():
        sys.exit(main(parse_args()))
