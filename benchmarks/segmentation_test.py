r"""What does it cost to label an image, in time and memory, beside MMSegmentation's loop and transformers'?

    OMP_NUM_THREADS=1 python benchmarks/segmentation_test.py
    OMP_NUM_THREADS=1 python benchmarks/segmentation_test.py --networks base --tests windows whole --rounds 3

Needs transformers. MMSegmentation's loop is written out as documented. The peers' network is ours under transformers'
head, which computes what MMSegmentation's does; "none" gives drawn scores at once. A process for each run.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
from types import SimpleNamespace

import torch
from measure import CPU, build_parser, describe_machine, print_table, ratio, take_turns, time_run
from networks import TransformersSegmenter
from step import measure_apart, memory_gb
from torch import Tensor, nn
from transformers import BeitImageProcessor

from dataset import IMAGENET_MEAN, IMAGENET_STD, normalize
from model import MODEL_CONFIGS, ViTMAEForSegmentation
from training.process import keep_freed_memory
from upernet import choose_sizes, predict, resize, resize_image, window_starts

CROP, STRIDE, RESIZE_TO, NUM_CLASSES = 512, 341, (2048, 512), 150
NETWORKS = {"none": None, "tiny": ("mae_vit_tiny_patch16", 128), "base": ("mae_vit_base_patch16", None)}
OURS, MMSEG, TRANSFORMERS = "this project", "MMSegmentation's loop", "transformers"
TESTS = {  # size of the image; how it is tested; by whom. The whole image is of whole cells, so that nobody pads it
    "windows": ((512, 683), {}, (OURS, MMSEG)),
    "windows of a photograph": ((1536, 2048), {}, (OURS, MMSEG)),
    "whole": ((512, 704), {"slide": False}, (OURS, MMSEG, TRANSFORMERS)),
    "windows, 6 scales, flip": ((512, 683), {"multi_scale": True, "flip": True}, (OURS, MMSEG)),
}
to_input = functools.partial(normalize, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["none", "tiny"])
    parser.add_argument("--tests", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--run_of", nargs=3, metavar=("NETWORK", "TEST", "NAME"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


class DrawnScores(nn.Module):
    scores = torch.randn(1, NUM_CLASSES, 128, 176, generator=torch.Generator().manual_seed(0))

    def forward(self, images: Tensor) -> SimpleNamespace:
        scores = self.scores[..., : images.shape[2] // 4, : images.shape[3] // 4]
        return SimpleNamespace(logits=scores.expand(len(images), -1, -1, -1))


def build_network(kind: str, name: str) -> nn.Module:
    """Give the network that a loop asks: the same weights for all, whose answers differ from place to place."""
    torch.manual_seed(0)
    size, channels = NETWORKS[kind]
    config = dataclasses.replace(MODEL_CONFIGS[size], img_size=CROP)
    network = ViTMAEForSegmentation(config, NUM_CLASSES, channels=channels)
    nn.init.normal_(network.decode_head.conv_seg.weight)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # the statistics of real maps: with drawn ones one class would win
            module.momentum = 1.0
    network(to_input(draw_image((128, 256)).unfold(2, 128, 128).permute(2, 0, 1, 3)))
    if name == OURS:
        return network.eval()
    theirs = TransformersSegmenter(config, NUM_CLASSES, channels)
    for part in ("backbone", "neck", "decode_head"):
        state = getattr(network, part).state_dict()
        renamed = {key.replace(".bn.", ".batch_norm.").replace("conv_seg", "classifier"): x for key, x in state.items()}
        getattr(theirs, part).load_state_dict(renamed)
    return theirs.eval()


def draw_image(size: tuple[int, int]) -> Tensor:
    blocks = torch.randint(0, 256, (3, 12, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return resize_image(blocks, size)


def slide_as_mmsegmentation(network: nn.Module, pixels: Tensor) -> Tensor:
    """Sum the windows' scores at the size of the pixels (1, C, h, w), and divide them by how many there are."""
    height, width = pixels.shape[-2:]
    total, visits = pixels.new_zeros(1, NUM_CLASSES, height, width), pixels.new_zeros(1, 1, height, width)
    for top, left in itertools.product(*(window_starts(side, CROP, STRIDE) for side in (height, width))):
        area = (..., slice(top, top + CROP), slice(left, left + CROP))
        total[area] += resize(network(pixels[area]).logits, size=(CROP, CROP))
        visits[area] += 1
    return total / visits


def label_as_mmsegmentation(network: nn.Module, image: Tensor, slide=True, multi_scale=False, flip=False) -> Tensor:
    """Average the views' softmax at the size of the image, as its test-time augmentation; of one, take the best."""
    total = 0
    for size in choose_sizes(image.shape[-2:], RESIZE_TO, (CROP, CROP) if slide else None, multi_scale):
        pixels = to_input(resize_image(image, size)[None])
        for view in (pixels, pixels.flip(-1)) if flip else (pixels,):
            scores = slide_as_mmsegmentation(network, view) if slide else resize(network(view).logits, size=size)
            scores = resize(scores if view is pixels else scores.flip(-1), size=image.shape[-2:])[0]
            total = total + scores.softmax(dim=0) if multi_scale or flip else scores
    return total.argmax(dim=0)


def label_as_transformers(network: nn.Module, image: Tensor, slide: bool) -> Tensor:
    outputs = network(to_input(image[None]))
    return BeitImageProcessor().post_process_semantic_segmentation(outputs, [tuple(image.shape[-2:])])[0]


def label_as_here(network: nn.Module, image: Tensor, **how: bool) -> Tensor:
    how |= dict(crop_size=(CROP, CROP), patch_size=16, resize_to=RESIZE_TO)
    return predict(network, [image], normalize=to_input, **how)[0]


@torch.no_grad()
def measure_run(kind: str, test: str, name: str) -> None:
    """Print seconds, peak memory above what the libraries take, and the share of labels that are not ours."""
    if name == OURS:
        keep_freed_memory()
    loop = {OURS: label_as_here, MMSEG: label_as_mmsegmentation, TRANSFORMERS: label_as_transformers}[name]
    before, (size, how, _), answers = memory_gb(), TESTS[test], []
    network, image = DrawnScores() if kind == "none" else build_network(kind, name), draw_image(size)
    for _ in range(1 if "multi_scale" in how else 2):  # the first is to warm up
        seconds = time_run(lambda: answers.append(loop(network, image, **how)), CPU)
    found = {"seconds": seconds, "gb": memory_gb() - before}
    different = answers[0] != label_as_here(network, image, **how)
    print(json.dumps(found | {"different": different.double().mean().item()}))


def main(args: argparse.Namespace) -> None:
    if args.run_of:
        measure_run(*args.run_of)
        return
    print(describe_machine(CPU), flush=True)
    for kind, test in itertools.product(args.networks, args.tests):
        keys = [(kind, test, name) for name in TESTS[test][2]]
        found = take_turns(keys, args.rounds, lambda key: measure_apart(["--run_of", *key], __file__))
        rows, ours = [], [run["seconds"] for run in found[keys[0]]]
        for key, runs in found.items():
            seconds, gb, different = ([run[name] for run in runs] for name in ("seconds", "gb", "different"))
            cells = [f"{statistics.median(seconds):.2f}", ratio(seconds, ours), f"{statistics.median(gb):.2f}"]
            rows.append([key[2], *cells, f"{max(different):.0e}"])
        print_table(f"{kind}, {test}", ["", "s", f"/ that of {OURS}", "GB", "labels that differ"], rows)


if __name__ == "__main__":
    main(parse_args())
