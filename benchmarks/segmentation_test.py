r"""What does it cost to label an image, in time and memory, beside MMSegmentation's loop and transformers'?

    OMP_NUM_THREADS=1 python benchmarks/segmentation_test.py
    OMP_NUM_THREADS=1 python benchmarks/segmentation_test.py --networks base --tests windows whole

MMSegmentation is not needed: its loop is written out here as it is documented, and a test's labels are compared. Its
network, and transformers' (`pip install transformers`), is this project's encoder and neck under transformers' head,
which computes what MMSegmentation's does, with the same weights. "none" gives drawn scores in place of a network, and
so shows the rest alone. Every run is in a process of its own, and labels an image once before it is measured.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from measure import CPU, build_parser, describe_machine, print_table, ratio, take_turns, time_run
from networks import TransformersSegmenter
from step import measure_apart, memory_gb
from torch import Tensor, nn

from dataset import IMAGENET_MEAN, IMAGENET_STD, normalize
from model import MODEL_CONFIGS, ViTMAEForSegmentation
from training.process import keep_freed_memory
from upernet import choose_sizes, predict, resize_image, window_starts

CROP, STRIDE, RESIZE_TO, NUM_CLASSES, PATCH_SIZE = (512, 512), (341, 341), (2048, 512), 150, 16
NETWORKS = {"none": None, "tiny": ("mae_vit_tiny_patch16", 128), "base": ("mae_vit_base_patch16", None)}
OURS, MMSEG, TRANSFORMERS = "this project", "MMSegmentation's loop", "transformers"
TESTS = {  # size of the image; how it is tested; by whom. Whole images are of whole cells, so that nobody pads
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
    """Answers at once, with the same scores whatever it is shown."""

    def __init__(self):
        super().__init__()
        self.scores = 3 * torch.randn(1, NUM_CLASSES, 128, 176)

    def forward(self, images: Tensor) -> SimpleNamespace:
        height, width = (side // 4 for side in images.shape[-2:])
        return SimpleNamespace(logits=self.scores[..., :height, :width].expand(len(images), -1, -1, -1))


class TheirNetwork(TransformersSegmenter):
    def forward(self, images: Tensor) -> SimpleNamespace:
        maps = self.backbone.get_intermediate_layers(images, self.taps)
        return SimpleNamespace(logits=self.decode_head(self.neck(maps)))


def build_network(kind: str, name: str) -> nn.Module:
    """Give the network that a loop asks: the same weights for all, whose answers differ from place to place."""
    torch.manual_seed(0)
    if NETWORKS[kind] is None:
        return DrawnScores()
    size, channels = NETWORKS[kind]
    config = dataclasses.replace(MODEL_CONFIGS[size], img_size=CROP[0])
    network = ViTMAEForSegmentation(config, NUM_CLASSES, channels=channels)
    nn.init.normal_(network.decode_head.conv_seg.weight)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # the statistics of real maps: random ones would make one class win
            module.momentum = 1.0
    with torch.no_grad():
        network(to_input(draw_image((128, 256)).unfold(2, 128, 128).permute(2, 0, 1, 3)))
    if name == OURS:
        return network.eval()
    theirs = TheirNetwork(config, NUM_CLASSES, channels)
    for part in ("backbone", "neck", "decode_head"):
        state = getattr(network, part).state_dict()
        state = {key.replace(".bn.", ".batch_norm.").replace("conv_seg", "classifier"): x for key, x in state.items()}
        getattr(theirs, part).load_state_dict(state)
    return theirs.eval()


def draw_image(size: tuple[int, int]) -> Tensor:
    blocks = torch.randint(0, 256, (3, 12, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return resize_image(blocks, size)


# ------------------------------------------------------------------------------------------------ their loops


def resized(scores: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)


def slide_as_mmsegmentation(network: nn.Module, pixels: Tensor) -> Tensor:
    """Sum the windows' scores at the size of the pixels (1, C, h, w), and divide them by how many there are."""
    height, width = pixels.shape[-2:]
    total, visits = pixels.new_zeros(1, NUM_CLASSES, height, width), pixels.new_zeros(1, 1, height, width)
    for top in window_starts(height, CROP[0], STRIDE[0]):
        for left in window_starts(width, CROP[1], STRIDE[1]):
            window = pixels[:, :, top : top + CROP[0], left : left + CROP[1]]
            scores = resized(network(window).logits, window.shape[-2:])
            total += F.pad(scores, (left, width - left - CROP[1], top, height - top - CROP[0]))
            visits[:, :, top : top + CROP[0], left : left + CROP[1]] += 1
    return total / visits


def label_as_mmsegmentation(network: nn.Module, image: Tensor, slide=True, multi_scale=False, flip=False) -> Tensor:
    """Average the views' softmax at the size of the image, as its test-time augmentation; of one, take the best."""
    total = 0
    for size in choose_sizes(image.shape[-2:], RESIZE_TO, CROP if slide else None, multi_scale):
        pixels = to_input(resize_image(image, size)[None])
        for mirrored in (False, True) if flip else (False,):
            view = pixels.flip(-1) if mirrored else pixels
            scores = slide_as_mmsegmentation(network, view) if slide else resized(network(view).logits, size)
            scores = resized(scores.flip(-1) if mirrored else scores, image.shape[-2:])[0]
            total = total + scores.softmax(dim=0) if multi_scale or flip else scores
    return total.argmax(dim=0)


def label_as_transformers(network: nn.Module, image: Tensor, slide: bool) -> Tensor:
    from transformers import BeitImageProcessor

    size = next(choose_sizes(image.shape[-2:], RESIZE_TO, None, False))
    outputs = network(to_input(resize_image(image, size)[None]))
    return BeitImageProcessor().post_process_semantic_segmentation(outputs, [tuple(image.shape[-2:])])[0]


def label_as_here(network: nn.Module, image: Tensor, **how: bool) -> Tensor:
    sizes = dict(crop_size=CROP, patch_size=PATCH_SIZE, resize_to=RESIZE_TO)
    return predict(network, [image], normalize=to_input, **sizes, **how)[0]


LOOPS = {OURS: label_as_here, MMSEG: label_as_mmsegmentation, TRANSFORMERS: label_as_transformers}


# ------------------------------------------------------------------------------------------------ measuring


@torch.no_grad()
def measure_run(kind: str, test: str, name: str) -> None:
    """Print seconds, peak memory above what the libraries take, and how many labels are not ours."""
    if name == OURS:
        keep_freed_memory()
    before, (size, how, _), answers = memory_gb(), TESTS[test], []
    network, image = build_network(kind, name), draw_image(size)

    def label() -> None:
        answers.append(LOOPS[name](network, image, **how))

    *_, seconds = (time_run(label, CPU) for _ in range(2))
    found = {"seconds": seconds, "gb": memory_gb() - before}
    different = answers[0] != label_as_here(network, image, **how)
    print(json.dumps(found | {"different": different.double().mean().item()}))


def main(args: argparse.Namespace) -> None:
    if args.run_of:
        measure_run(*args.run_of)
        return
    print(describe_machine(CPU), flush=True)
    rows = []
    for kind, test in itertools.product(args.networks, args.tests):
        keys = [(kind, test, name) for name in TESTS[test][2]]
        found = take_turns(keys, args.rounds, lambda key: measure_apart(["--run_of", *key], __file__))
        seconds = {key: [run["seconds"] for run in runs] for key, runs in found.items()}
        for key, runs in found.items():
            figures = [statistics.median(run[name] for run in runs) for name in ("gb", "different")]
            as_fast = "" if key == keys[0] else ratio(seconds[key], seconds[keys[0]])
            rows.append(
                [
                    *key,
                    f"{statistics.median(seconds[key]):.2f}",
                    as_fast,
                    f"{figures[0]:.2f}",
                    f"{figures[1]:.0e}",
                ]
            )
    print_table("one image", ["network", "test", "", "s", f"/ that of {OURS}", "GB", "labels that differ"], rows)


if __name__ == "__main__":
    main(parse_args())
