"""Measure a folder of images of any bands and depth: smallest and largest value, mean and standard deviation a band.

    python tools/measure_values.py DATA/train --input_channels 13

Ends with the flags for the scripts. No-data (NaN, infinities) is left out; with --value_range the figures are those of
values mapped to 0..1.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from storage import explained_errors
from storage.decoding import DECODE_ERRORS
from storage.files import user_path
from storage.lists import list_images
from storage.values import ValueMap


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=user_path, help="training images, or a pack of them")
    parser.add_argument("--input_channels", type=int, required=True, help="bands of an image")
    parser.add_argument("--value_range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="as the training's")
    parser.add_argument("--images", type=int, help="at most so many, spread over the folder (default: all)")
    args = parser.parse_args(argv)
    if args.value_range and not args.value_range[0] < args.value_range[1]:
        parser.error(f"--value_range takes a lower and a higher number, not {args.value_range}")
    return args


def main(args: argparse.Namespace) -> None:
    files = list_images(args.folder)
    if args.images is not None:
        files = files.subsample(args.images)
    channels = args.input_channels
    to_model = ValueMap((0.0,) * channels, (1.0,) * channels, tuple(args.value_range) if args.value_range else None)
    # Sums of differences from a first guess, the first image's mean: squares of large values would lose digits
    guess, counts, sums, squares = None, np.zeros(channels), np.zeros(channels), np.zeros(channels)
    lows, highs, unread = np.full(channels, np.inf), np.full(channels, -np.inf), []
    for index in tqdm(range(len(files)), unit="image", disable=not sys.stderr.isatty()):
        try:
            picture = files.open_values(index, channels)
            values = to_model(picture.whole()).flatten(1).double()  # (C, pixels)
        except DECODE_ERRORS as error:
            unread.append(f"{files.path(index)}: {type(error).__name__}: {error}")
            continue
        known = values.isfinite()
        if guess is None and known.any(dim=1).all():
            guess = values.nanmean(dim=1, keepdim=True)
        if guess is None:
            guess = torch.zeros(channels, 1, dtype=torch.float64)
        differences = torch.where(known, values - guess, 0)
        counts += known.sum(dim=1).numpy()
        sums += differences.sum(dim=1).numpy()
        squares += differences.square().sum(dim=1).numpy()
        lows = np.minimum(lows, torch.where(known, values, torch.inf).amin(dim=1).numpy())
        highs = np.maximum(highs, torch.where(known, values, -torch.inf).amax(dim=1).numpy())
    for line in unread[:10]:
        print(f"left out: {line}")
    if len(unread) > 10:
        print(f"left out: {len(unread) - 10} more")
    if not counts.all():
        raise ValueError(f"no finite value of band {int(counts.argmin())} of {channels} in {files.describe()}")
    means, stds = guess.numpy()[:, 0] + sums / counts, np.sqrt(squares / counts - (sums / counts) ** 2)
    print(f"{files.describe()}, {len(unread):,} of them left out")
    for band in range(channels):
        print(f"band {band}: {lows[band]:g} to {highs[band]:g}, mean {means[band]:g}, deviation {stds[band]:g}")
    for band in np.flatnonzero(stds < 1e-9).tolist():
        print(f"band {band} is the same everywhere and tells nothing; its deviation is given as 1")
    stds = np.where(stds < 1e-9, 1, stds)
    given = (
        f"--value_range {args.value_range[0]:g} {args.value_range[1]:g}" if args.value_range else "--value_range own"
    )
    numbers = (" ".join(write_number(value) for value in values) for values in (means, stds))
    print(f"\n--input_channels {channels} {given} --mean {next(numbers)} --std {next(numbers)}")


def write_number(value: float) -> str:
    """Write a number with six digits and no exponent, which a command line takes for a flag."""
    return np.format_float_positional(value, precision=6, unique=False, fractional=False, trim="-")


if __name__ == "__main__":
    with explained_errors():
        main(parse_args())
