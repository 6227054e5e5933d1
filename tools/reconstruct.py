"""Draw what a masked autoencoder makes of images: original, masked, reconstruction, and the latter with the visible
patches pasted in.

    python tools/reconstruct.py --checkpoint work_dir/MAEPretraining/checkpoint_800 IMAGE... --output out.png
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset import ResizeCenterCrop
from model import find_weights, load_pretrained_mae, num_kept_patches, read_config
from storage import explained_errors
from storage.files import user_path
from storage.values import ImageReader
from utils import draw_rows, reconstruction_titles, show_values


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="of any size; resized and cropped to the model's")
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder or weight file, with a decoder")
    parser.add_argument("--output", type=user_path, required=True, help="picture to write")
    parser.add_argument("--overwrite", action="store_true", help="allow --output to exist")
    parser.add_argument("--mask_ratio", type=float, default=0.75, help="share of the patches removed (default: 0.75)")
    shown = "bands, from 0, as red, green and blue, of images in their own units (default: 0 1 2)"
    parser.add_argument("--show_channels", type=int, nargs=3, default=[0, 1, 2], metavar="BAND", help=shown)
    parser.add_argument("--seed", type=int, default=0, help="decides the masks (default: 0)")
    files = "mae_visualize_vit_*.pth without (default), mae_pretrain_vit_*_full.pth with"
    trained = f"how weights without a config.json were trained: {files}"
    parser.add_argument("--norm_pix_loss", action=argparse.BooleanOptionalAction, default=False, help=trained)
    return parser.parse_args(argv)


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    if args.output.exists() and not args.overwrite:
        raise FileExistsError(f"{args.output} exists; choose another --output or add --overwrite")
    model = load_pretrained_mae(args.checkpoint, norm_pix_loss=args.norm_pix_loss).eval()
    num_kept_patches(model.config.num_patches, args.mask_ratio)
    record = read_config(find_weights(args.checkpoint)) or {}
    reader, fit = ImageReader(model.config.input_channels, record), ResizeCenterCrop(model.config.image_hw)
    images = reader.normalize(torch.stack([fit(reader.read(path)) for path in args.images]))  # (N, C, H, W)
    noise = torch.rand(len(images), model.config.num_patches, generator=torch.Generator().manual_seed(args.seed))
    _, pred, mask = model(images, args.mask_ratio, noise)
    channels = None if reader.values is None else args.show_channels
    panels = [reader.denormalize(x) for x in (images, *model.reconstruct(images, pred, mask))]
    titles = reconstruction_titles(args.mask_ratio, model.config.norm_pix_loss, channels)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw_rows(dict(zip(titles, show_values(panels, channels), strict=True))).save(args.output)
    print(f"{args.output}: {len(images)} images")


if __name__ == "__main__":
    with explained_errors():
        main(parse_args())
