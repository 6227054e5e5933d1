r"""What does one CUDA GPU make of all this? Prints in nine minutes what benchmarks/RESULTS.md has not run yet.

    python benchmarks/gpu.py > gpu.md
    python benchmarks/gpu.py --original CHECKOUT              # also beside a checkout of facebookresearch/mae
    python benchmarks/gpu.py --sections segmenter resume --minutes 3
    python benchmarks/gpu.py --dry_run                        # toy sizes, on the CPU where there is no GPU

A row is printed as soon as it is measured, so a run that is cut off counts. Each section is a process of its own with
a share of the time that is left; one that fails or takes longer says so in a row, and the exit code is then 1. Peers
are `pip install transformers lightly`.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import gpu_runs
import torch
from gpu_runs import FAILURES, Job, Rows, reason, size_flags
from measure import ROOT, describe_machine, print_row, print_table
from networks import Segmenter, build_lightly, build_original, build_ours, build_transformers, training_flops
from step import (
    DEVICE,
    GPU_MATRIX,
    MASK_RATIO,
    NUM_CLASSES,
    OURS,
    THEIRS,
    Measured,
    build_on_device,
    build_optimizer,
    build_step,
    compare_mask_ratios,
    draw_images,
    matrix_rate,
    time_calls,
)
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

import finetune_classifier
from dataset import IMAGENET_MEAN, IMAGENET_STD, normalize
from model import MODEL_CONFIGS, MAEConfig, ViTMAEForSegmentation
from upernet import predict

EAGER, COMPILED = "bfloat16 eager", "bfloat16 compiled"
ORIGINAL, LIGHTLY = "original, today's timm", "lightly"
STILL_GROWS = 1.03  # times the images a second, for which a larger batch is tried
MINUTES = 8.7  # and the imports
SOFT_SHARE = 0.85  # of a section's time, after which it begins nothing new
FAILED = 3  # exit code of a section's process that has said why

BASE, LARGE, HUGE = (MODEL_CONFIGS[f"mae_vit_{name}"] for name in ("base_patch16", "large_patch16", "huge_patch14"))
REAL = dict(
    matrix=GPU_MATRIX,
    models={"ViT-B": BASE, "ViT-L": LARGE, "ViT-H": HUGE},
    batches=(64, 128, 256, 512, 1024, 2048),
    timed_s=0.25,
    compiler="inductor",
    crop_size=512,
    crop_batches=(16, 2),
    photographs=2000,
    batch=256,
    small=MODEL_CONFIGS["mae_vit_tiny_patch16"],
    small_batch=64,
    small_epochs=10,
)
TINY = MAEConfig(32, 8, 3, 32, 4, 2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
TOY = dict(
    matrix=256,  # a CPU without bfloat16 takes long for more
    models={"ViT-B": TINY, "ViT-L": TINY, "ViT-H": TINY},
    batches=(2, 4),
    timed_s=0.0,
    compiler="eager",  # inductor's C++ would take minutes
    crop_size=64,
    crop_batches=(2,),
    photographs=6,
    batch=8,
    small=TINY,
    small_batch=4,
    small_epochs=2,
)


# ------------------------------------------------------------------------------------------------ steps


def grow_batch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    draw: Callable[[int], list[Tensor]],
    mode: str,
    batches: Iterable[int],
    job: Job,
) -> Iterator[tuple[int, Measured | None]]:
    """Measure steps of larger and larger batches while that helps and time is left; None where memory runs out."""
    rate = 0.0
    for batch in batches:
        found = None
        with contextlib.suppress(torch.OutOfMemoryError):
            found = time_calls(build_step(network, optimizer, draw(batch), mode, job.compiler), job.timed_s)
        yield batch, found
        if found is None or batch / found.seconds < STILL_GROWS * rate or job.is_over():
            return
        rate = batch / found.seconds


def step_cells(batch: int, found: Measured | None) -> list[str]:
    if found is None:
        return [str(batch), "out of memory"]
    return [str(batch), f"{batch / found.seconds:.1f}", f"{found.gb:.2f}", f"{found.first_s:.1f}"]


def draw_one(config: MAEConfig) -> Callable[[int], list[Tensor]]:
    return lambda batch: [draw_images(batch, config)]


# ------------------------------------------------------------------------------------------------ sections


def describe(job: Job) -> Rows:
    yield ["measured on", describe_machine(DEVICE)]
    yield ["Python, CPU cores", f"{platform.python_version()}, {os.cpu_count()}"]
    if DEVICE.type == "cuda":
        card = torch.cuda.get_device_properties(DEVICE)
        yield ["memory in GB, compute capability", f"{card.total_memory / 1e9:.1f}, {card.major}.{card.minor}"]
        yield ["CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}"]
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, encoding="utf-8", check=False).stdout
        yield ["driver, power limit, clock", answer.strip().replace("\n", "; ")]
    yield ["bfloat16 matrix rate, TFLOP/s", f"{matrix_rate(torch.bfloat16, job.matrix) / 1e12:.3g}"]


def find_builders(job: Job) -> dict[str, Callable[[MAEConfig, float], nn.Module] | None]:
    """Give what builds each network; None for those that are not there."""
    builders = {OURS: build_ours, THEIRS: build_transformers, LIGHTLY: build_lightly}
    missing = [name for name in (THEIRS, LIGHTLY) if importlib.util.find_spec(name) is None]
    original = functools.partial(build_original, checkout=job.original) if job.original else None
    return builders | {ORIGINAL: original} | dict.fromkeys(missing)


def compare_pretraining(job: Job) -> Rows:
    """Give the steps of each network, at growing batches, and then compiled at the best of them."""
    builders, rate, best = find_builders(job), matrix_rate(torch.bfloat16, job.matrix), {}
    yield from (["-", name, "not installed or given, so not compared"] for name in builders if not builders[name])
    plan = [("ViT-B", OURS, EAGER), ("ViT-L", OURS, EAGER), ("ViT-H", OURS, EAGER), ("ViT-B", OURS, COMPILED)]
    plan += [("ViT-B", THEIRS, EAGER), ("ViT-B", ORIGINAL, EAGER), ("ViT-L", OURS, COMPILED)]
    plan += [("ViT-B", THEIRS, COMPILED), ("ViT-B", ORIGINAL, COMPILED), ("ViT-H", OURS, COMPILED)]
    plan += [(model, name, EAGER) for model in ("ViT-L", "ViT-H") for name in (THEIRS, ORIGINAL)]
    plan += [("ViT-B", LIGHTLY, EAGER), ("ViT-B", LIGHTLY, COMPILED)]
    for model, name, mode in plan:
        if builders[name] is None or (mode == COMPILED and (model, name) not in best):
            continue
        if job.is_over():
            yield [model, name, mode, "and what would follow: time is up"]
            return
        config, batches = job.models[model], job.batches if mode == EAGER else best[model, name][1:]
        network = optimizer = None  # before the next is built
        try:
            network = build_on_device(builders[name], config, MASK_RATIO)
            optimizer = build_optimizer(network)
            for batch, found in grow_batch(network, optimizer, draw_one(config), mode, batches, job):
                cells = [model, name, mode, *step_cells(batch, found)]
                if found is not None:
                    flops = training_flops(config, MASK_RATIO) * batch / found.seconds
                    cells += [f"{flops / 1e12:.3g}", f"{flops / rate:.1%}"]
                    if mode == EAGER:
                        best[model, name] = max(best.get((model, name), (0, 0)), (batch / found.seconds, batch))
                yield cells
        except FAILURES as error:
            job.failed |= name == OURS
            yield [model, name, mode, reason(error)]


def compare_checkpointing(job: Job) -> Rows:
    for model, config in job.models.items():
        for recompute in (False, True):
            network = build_on_device(build_ours, config, MASK_RATIO)
            network.activation_checkpointing = recompute
            draw, batches = draw_one(config), job.batches[:1]
            for batch, found in grow_batch(network, build_optimizer(network), draw, EAGER, batches, job):
                yield [model, "yes" if recompute else "no", *step_cells(batch, found)]
            network = None  # before the next is built
        if job.is_over():
            return


class Classifier(nn.Module):
    """The classifier of finetune_classifier.py, with the loss that training computes."""

    def __init__(self, args: argparse.Namespace):
        super().__init__()
        self.model, _ = finetune_classifier.build_model(args.num_classes, args)
        self.compute_loss = SoftTargetCrossEntropy()

    def forward(self, images: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        return self.compute_loss(self.model(images, noise).float(), targets)


def measure_classifier(job: Job) -> Rows:
    config, batches, best = job.models["ViT-B"], job.batches, (0, 0)
    flags = [*size_flags(config, decoder=False), "--path_to_data", str(ROOT), "--num_classes", "1000"]
    args = finetune_classifier.parse_args(flags)

    def draw(batch: int) -> list[Tensor]:
        targets = torch.rand(batch, args.num_classes, device=DEVICE).softmax(dim=1)
        return [draw_images(batch, config), targets, torch.rand(batch, 0, device=DEVICE)]  # the recipe drops no path

    for mode in (EAGER, COMPILED):
        network = build_on_device(Classifier, args)
        optimizer = finetune_classifier.build_optimizer(network.model, args.learning_rate, args)
        for batch, found in grow_batch(network, optimizer, draw, mode, batches, job):
            yield [mode, *step_cells(batch, found)]
            best = best if found is None else max(best, (batch / found.seconds, batch))
        batches, network, optimizer = best[1:], None, None


def measure_segmenter(job: Job) -> Rows:
    """Give steps with all images and with the published share of them, and how fast one image is labelled."""
    side, config = job.crop_size, dataclasses.replace(job.models["ViT-B"], img_size=job.crop_size)
    image = torch.randint(0, 256, (3, side, 4 * side // 3), dtype=torch.uint8, device=DEVICE)
    options = dict(crop_size=config.image_hw, patch_size=config.patch_size, resize_to=(4 * side, side))
    options["normalize"] = functools.partial(normalize, mean=IMAGENET_MEAN, std=IMAGENET_STD)

    def draw(batch: int) -> list[Tensor]:
        return [draw_images(batch, config), torch.randint(NUM_CLASSES, (batch, side, side), device=DEVICE)]

    for kind, more in (("default", False), ("as published", True)):
        switches = dict(rel_pos_bias=more, layer_scale=more, drop_path_rate=0.1)
        network = build_on_device(Segmenter, config, NUM_CLASSES, **switches)
        optimizer = build_optimizer(network)
        for size in job.crop_batches:
            for batch, found in grow_batch(network, optimizer, draw, EAGER, (size,), job):
                yield ["training step", kind, *step_cells(batch, found)[:3], f"{found.seconds:.3f}" if found else ""]
        network.eval()
        score = functools.partial(ViTMAEForSegmentation.forward, network)
        for how, slide in (("windows", True), ("whole", False)):
            with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
                found = time_calls(functools.partial(predict, score, [image], slide=slide, **options), job.timed_s)
            yield [f"labelling, {how}", kind, *step_cells(1, found)[:3], f"{found.seconds:.3f}"]
        network = optimizer = score = None  # before the next is built


def compare_ratios(job: Job) -> Rows:
    for model in ("ViT-L", "ViT-B"):
        args = argparse.Namespace(model=model, batch_size=job.batches[0], rounds=3)
        compare_mask_ratios(args, job.models[model])  # prints its own table
    yield from ()


# ------------------------------------------------------------------------------------------------ command


class Section(NamedTuple):
    """A table: its seconds of nine minutes, title, columns, and what gives its rows."""

    seconds: int
    title: str
    columns: str
    rows: Callable[[Job], Rows]


PRETRAINING, UPERNET = "pretraining step: loss, gradients, clipping, fused AdamW", "UperNet on ViT-B, bfloat16 eager"
PUBLISHED = "published: 9.96 GB at 2 images on each of 8 GPUs, 7.14 frames/s on a V100"
STEP = "batch | images/s | GB | s of the first step"
SECTIONS = {
    "machine": Section(15, "the machine", "what | value", describe),
    "pretraining": Section(
        230, PRETRAINING, f"model | network | mode | {STEP} | TFLOP/s | of the matrix rate", compare_pretraining
    ),
    "checkpointing": Section(
        25, f"{PRETRAINING}, bfloat16 eager", f"model | activation checkpointing | {STEP}", compare_checkpointing
    ),
    "classifier": Section(45, "finetuning step of the classifier, ViT-B", f"mode | {STEP}", measure_classifier),
    "segmenter": Section(40, f"{UPERNET}; {PUBLISHED}", "what | model | images | images/s | GB | s", measure_segmenter),
    "waiting": Section(
        75,
        "pretrain_mae.py, ViT-B, bf16: what its log says of generated photographs",
        "crops of each | kB a file | decoder | CPU cores | batch | images/s | waits for data | at most",
        gpu_runs.wait_for_data,
    ),
    "resume": Section(
        55,
        "pretrain_mae.py, killed and resumed, against a run that nothing stopped",
        "flag | killed after step | resumed from | weights bit for bit | largest difference",
        gpu_runs.compare_resumes,
    ),
    "steady": Section(30, "pretrain_mae.py, many small steps", "what | value", gpu_runs.watch_steps),
    "mask_ratio": Section(25, "", "", compare_ratios),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="(default: all)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"until all has ended (default: {MINUTES})")
    parser.add_argument("--original", type=Path, help="checkout of facebookresearch/mae")
    parser.add_argument("--dry_run", action="store_true", help="toy sizes and no limits, to see that all works")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of a section's own process
    return parser.parse_args(argv)


def run_section(name: str, args: argparse.Namespace, until: float) -> bool:
    """Print a section's table, a row as soon as it is there; say whether nothing failed."""
    section, job = SECTIONS[name], Job(until, args.original, **(TOY if args.dry_run else REAL))
    if section.columns:
        print_table(f"{name}: {section.title}", section.columns.split(" | "), [])
    try:
        for row in section.rows(job):
            print_row(row)
    except FAILURES as error:
        print_row([f"{name} failed", reason(error)])
        return False
    return not job.failed


def run_apart(name: str, args: argparse.Namespace, limit_s: float) -> bool:
    """Let a process of its own print a section's table; it, and all that it started, is killed when time is up."""
    command = [sys.executable, __file__, "--sections", name, "--until", str(time.time() + SOFT_SHARE * limit_s)]
    command += ["--original", str(args.original)] if args.original else []
    command += ["--dry_run"] if args.dry_run else []
    process = subprocess.Popen(command, process_group=0)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        print_row([f"{name} was stopped", f"its {limit_s:.0f} s are up"])
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code not in (0, FAILED):
        print_row([f"{name} died", f"exit code {code}"])
    return code == 0


def main(args: argparse.Namespace) -> int:
    if DEVICE.type != "cuda" and not args.dry_run:
        raise SystemExit("torch sees no CUDA GPU here; --dry_run shows on the CPU that everything works")
    alone = args.dry_run or args.until
    if not alone:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a section's process does not outlive this one
    until = args.until or time.time() + 60 * (60 if args.dry_run else args.minutes)
    names, failed = list(args.sections), []
    while names:
        share = SECTIONS[names[0]].seconds / sum(SECTIONS[name].seconds for name in names)
        limit_s, name = share * max(0.0, until - time.time()), names.pop(0)
        fine = run_section(name, args, until) if alone else run_apart(name, args, limit_s)
        failed += [] if fine else [name]
    if failed and not args.until:
        print(f"\nfailed: {', '.join(failed)}", flush=True)
    return (FAILED if args.until else 1) if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(parse_args()))
