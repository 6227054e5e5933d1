"""What do the UperNet head, the loss and a whole step of segmentation cost, beside transformers' heads, torch's loss?

    OMP_NUM_THREADS=1 python benchmarks/segmentation.py

Both heads have the same weights and see the same random maps, on the GPU where there is one and else on the CPU. The
peer is `pip install transformers`; without it there is nothing to compare.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import (
    alternate,
    build_parser,
    choose_device,
    describe_machine,
    find_memory,
    memory_gb,
    missing,
    print_table,
    ratio,
)
from torch import Tensor, nn

from model import MODEL_CONFIGS, ViTMAEForSegmentation
from upernet import UperNetHead, resize, resized_cross_entropy

OURS, THEIRS = "this project", "transformers"
PARTS = ("head", "loss", "step")
MODES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IGNORED = 255
PYRAMID = (4, 2, 1, 0.5)  # sides of the four maps, in patches


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser, batch = build_parser(__doc__), 16 if choose_device().type == "cuda" else 2
    parser.add_argument("--batch_size", type=int, default=batch, help=f"images of a step (default here: {batch})")
    parser.add_argument("--model", choices=MODEL_CONFIGS, default="mae_vit_base_patch16")
    parser.add_argument("--img_size", type=int, default=512, help="side of the crops in pixels (default: 512)")
    parser.add_argument("--num_classes", type=int, default=150, help="(default: 150)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--memory_of", nargs=3, metavar=("PART", "WHOSE", "MODE"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------ what is compared


def build_their_heads(width: int, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """Give transformers' head and auxiliary head, which take the pyramid and the maps before it."""
    import transformers
    from transformers.models.upernet.modeling_upernet import UperNetFCNHead
    from transformers.models.upernet.modeling_upernet import UperNetHead as TheirHead

    config = transformers.UperNetConfig(
        backbone_config=transformers.ResNetConfig(),
        hidden_size=width,
        num_labels=num_classes,
        auxiliary_channels=256,
        auxiliary_in_channels=width,
    )
    return TheirHead(config, [width] * 4), UperNetFCNHead(config, [width] * 4)


def torch_loss(scores: Tensor, labels: Tensor) -> Tensor:
    resized = resize(scores.float(), size=labels.shape[-2:])
    return F.cross_entropy(resized, labels, ignore_index=IGNORED, reduction="sum") / labels.numel()


def our_loss(scores: Tensor, labels: Tensor) -> Tensor:
    return resized_cross_entropy(scores, labels, IGNORED) / labels.numel()


LOSSES = {OURS: our_loss, THEIRS: torch_loss}


class Segmenter(ViTMAEForSegmentation):
    """This project's encoder and neck, under its own heads or transformers', with the losses that belong to them."""

    def __init__(self, args: argparse.Namespace, whose: str):
        super().__init__(dataclasses.replace(MODEL_CONFIGS[args.model], img_size=args.img_size), args.num_classes)
        self.compute_loss = LOSSES[whose]
        if whose == THEIRS:
            width = MODEL_CONFIGS[args.model].encoder_embed_dim
            self.decode_head, self.auxiliary_head = build_their_heads(width, args.num_classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        maps = self.backbone.get_intermediate_layers(images, self.taps)
        logits = self.decode_head(self.neck(maps))
        # Their auxiliary head takes all maps and looks at the third.
        auxiliary = self.auxiliary_head(maps[2] if self.compute_loss is our_loss else maps)
        return self.compute_loss(logits, labels) + 0.4 * self.compute_loss(auxiliary, labels)


def build_run(part: str, whose: str, mode: str, args: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """Give a run forwards and backwards of a part; that of the whole step ends with AdamW."""
    torch.manual_seed(0)
    config, side = MODEL_CONFIGS[args.model], args.img_size
    patches, width, classes = side // config.patch_size, config.encoder_embed_dim, args.num_classes
    draw = functools.partial(torch.randn, args.batch_size, device=device, requires_grad=part != "step")
    labels = torch.randint(0, classes, (args.batch_size, side, side), device=device)
    module, optimizer = nn.Module(), None
    if part == "head":
        module = UperNetHead([width] * 4, width, classes) if whose == OURS else build_their_heads(width, classes)[0]
        inputs = [draw(width, int(patches * share), int(patches * share)) for share in PYRAMID]
    elif part == "loss":
        inputs = [draw(classes, 4 * patches, 4 * patches)]
    else:
        module, inputs = Segmenter(args, whose), [draw(3, side, side)]
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4, fused=True)
    module.to(device).train()
    compute_loss = {
        "head": lambda: module(inputs).float().square().mean(),
        "loss": lambda: LOSSES[whose](*inputs, labels),
        "step": lambda: module(*inputs, labels),
    }[part]

    def run() -> None:
        for leaf in (*inputs, *module.parameters()):
            leaf.grad = None
        with torch.autocast(device.type, MODES[mode], enabled=mode != "float32"):
            loss = compute_loss()
        loss.backward()
        if optimizer is not None:
            optimizer.step()

    return run


# ------------------------------------------------------------------------------------------------ tables


def measure_memory(args: argparse.Namespace, device: torch.device) -> None:
    """Print the peak memory of two runs above what the libraries take, as JSON; this process does nothing else."""
    before = memory_gb(device)
    run = build_run(*args.memory_of, args, device)
    run()
    run()
    print(json.dumps({"gb": memory_gb(device) - before}))


def main(args: argparse.Namespace) -> None:
    device = choose_device()
    if args.memory_of:
        measure_memory(args, device)
        return
    if importlib.util.find_spec("transformers") is None:
        missing("transformers")
        return
    print(describe_machine(device), flush=True)
    names = ("model", "img_size", "num_classes", "batch_size")
    flags = [word for name in names for word in (f"--{name}", str(getattr(args, name)))]
    rows = []
    for part in args.parts:
        for mode in args.modes if part != "loss" else ["float32"]:
            runs = {whose: build_run(part, whose, mode, args, device) for whose in (OURS, THEIRS)}
            times = alternate(runs, args.rounds, device)
            seconds = [f"{statistics.median(found):.3f}" for found in times.values()]
            memory = [find_memory(__file__, [*flags, "--memory_of", part, whose, mode]) for whose in runs]
            rows.append([part, mode, *seconds, ratio(times[THEIRS], times[OURS]), *memory])
    header = ["forwards and backwards", "mode", "s", f"s, {THEIRS}", "times as fast", "GB", f"GB, {THEIRS}"]
    print_table(f"{args.model} under UperNet, {args.img_size} px, batch {args.batch_size}", header, rows)


if __name__ == "__main__":
    main(parse_args())
