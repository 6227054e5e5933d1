"""Draw what a masked autoencoder makes of images: original, masked, reconstruction and its error.

    python tools/reconstruct.py --checkpoint work_dir/MAEPretraining IMAGE_OR_FOLDER... --output out.png

A file that cannot be read is named on stderr and passed over; the exit code is then 1.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset import ResizeCenterCrop
from model import find_weights, load_pretrained_mae, read_config
from storage import explained_errors
from storage.files import escape, user_path
from storage.lists import find_images
from storage.sizes import MASKINGS, check_masking
from storage.values import ImageReader, patches_with_data
from training.pictures import draw_reconstructions
from utils import build_masking


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    images = "of any size, resized and cropped to the model's; of a folder --max_images, spread over all below it"
    parser.add_argument("images", nargs="+", type=user_path, metavar="IMAGE_OR_FOLDER", help=images)
    source = "checkpoint or experiment folder, weight file or hf:OWNER/NAME, with a decoder"
    parser.add_argument("--checkpoint", type=user_path, required=True, help=source)
    parser.add_argument("--max_images", type=int, default=8, help="images of each folder (default: 8)")
    parser.add_argument("--output", type=user_path, required=True, help="picture to write")
    parser.add_argument("--overwrite", action="store_true", help="allow --output to exist")
    parser.add_argument("--mask_ratio", type=float, default=0.75, help="share of the patches removed (default: 0.75)")
    masking = "random patches, random blocks, or three of every four (default: random)"
    parser.add_argument("--masking", choices=MASKINGS, default="random", help=masking)
    shown = "bands, from 0, as red, green and blue, of images in their own units (default: 0 1 2)"
    parser.add_argument("--show_channels", type=int, nargs=3, default=[0, 1, 2], metavar="BAND", help=shown)
    parser.add_argument("--seed", type=int, default=0, help="decides the masks (default: 0)")
    files = "mae_visualize_vit_*.pth without (default), mae_pretrain_vit_*_full.pth with"
    trained = f"how weights without a config.json were trained: {files}"
    parser.add_argument("--norm_pix_loss", action=argparse.BooleanOptionalAction, default=False, help=trained)
    args = parser.parse_args(argv)
    if args.max_images < 1:
        parser.error(f"--max_images must be at least 1, not {args.max_images}")
    if args.output.suffix.lower() not in Image.registered_extensions():
        parser.error(f"--output {args.output} has no ending of a picture; .png is usual")
    return args


def choose_files(paths: list[Path], max_images: int) -> list[Path]:
    """Give the files that were named, and of each folder at most so many, spread over what lies below it."""
    chosen = []
    for folder, group in itertools.groupby(find_images(paths), key=lambda found: found[0]):
        files = [file for _, file in group]
        if folder.is_dir() and len(files) > max_images:
            print(f"{folder}: {max_images} of {len(files):,} images (--max_images)")
            files = [files[round(i * (len(files) - 1) / max(1, max_images - 1))] for i in range(max_images)]
        chosen += files
    return chosen


@torch.no_grad()
def main(args: argparse.Namespace) -> int:
    """Draw the picture, and give the exit code: 1 where a file could not be read, else 0."""
    if args.output.exists() and not args.overwrite:
        raise FileExistsError(f"{args.output} exists; choose another --output or add --overwrite")
    files = choose_files(args.images, args.max_images)
    model = load_pretrained_mae(args.checkpoint, norm_pix_loss=args.norm_pix_loss).eval()
    config, weights = model.config, find_weights(args.checkpoint)
    check_masking(args.masking, config, args.mask_ratio)
    print(f"{'weights':<16}{weights}")
    reader, fit = ImageReader(config.input_channels, read_config(weights) or {}), ResizeCenterCrop(config.image_hw)
    found = {file: image for file in dict.fromkeys(files) if (image := reader.read_or_name(file)) is not None}
    if not found:
        raise ValueError(f"none of the {len(files)} files can be read, so there is nothing to draw")
    pixels = torch.stack([fit(image) for image in found.values()])
    images = reader.normalize(pixels)  # (N, C, H, W)
    torch.manual_seed(args.seed)
    noise = torch.rand(len(images), config.num_patches)
    masking = build_masking(args.masking, config.grid_size, args.mask_ratio)
    noise = noise if masking is None else torch.stack([masking(each) for each in noise])
    valid = patches_with_data(pixels, config.patch_size)
    loss, pred, mask = model(images, args.mask_ratio, noise, valid=valid)
    channels = None if reader.values is None else args.show_channels
    panels = [reader.denormalize(x) for x in (images, model.reconstruct(images, pred, mask).pasted)]
    names = [escape(file.name, also_bytes=True) for file in found]
    look = dict(mask_ratio=args.mask_ratio, norm_pix_loss=config.norm_pix_loss, channels=channels)
    picture = draw_reconstructions(panels, mask, config.grid_size, names, f"loss {loss.item():.4f}", **look)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(args.output)
    print(f"{args.output}: {len(images)} images")
    return 1 if reader.num_bad else 0


if __name__ == "__main__":
    with explained_errors():
        sys.exit(main(parse_args()))
