"""Finetune a pretrained encoder under UperNet to label every pixel, or evaluate a segmenter (paper, appendix A.4).

Try it, after the demo of pretrain_mae.py:
    accelerate launch finetune_segmentation.py --demo
ADE20K, ViT-B/16, MMSegmentation's recipe, effective batch 16, on one GPU (published with --rel_pos_bias as well):
    accelerate launch finetune_segmentation.py --path_to_data ADE20K --path_to_backbone_checkpoint CHECKPOINT_FOLDER
Published: 48.1 mIoU (paper, table 5); 48.13, and 48.70 with several scales and flips, on V100s of which each used
9.96 GB (MMSegmentation). This code at that size: not run yet.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dataset import (
    EVAL_EPOCH,
    ADE20KDataset,
    Batch,
    SampleKey,
    SegmentationTransform,
    StepSampler,
    build_eval_loader,
    build_training_loader,
    collate_lists,
    fit_within,
    keep_size,
    normalize,
    resize_image,
)
from model import (
    MODEL_CONFIGS,
    MAEConfig,
    ViTMAEForSegmentation,
    default_taps,
    find_weights,
    load_pretrained_encoder,
    load_segmenter,
    read_sizes,
)
from storage.demo import DEMO_LABEL_NAMES, write_demo_data
from storage.files import rename_aside, write_json
from storage.lists import ListCache
from storage.pairs import (
    ADE20K_CLASS_NAMES,
    ADE20K_NUM_CLASSES,
    IGNORE_INDEX,
    LABEL_COLOURS,
    PairList,
    check_pairs,
    label_table,
    list_pairs,
)
from training.checkpoints import BEST_CHECKPOINT, LAST_CHECKPOINT, Checkpoints, check_weights, find_checkpoints, resume
from training.flags import HelpFormatter, add_run_flags, check_run_flags, micro_batch_size
from training.process import (
    SHARDING,
    broadcast_buffers,
    build_accelerator,
    cap_workers,
    choose_kernels,
    compile_in_place,
    describe_processes,
    process_slice,
)
from training.records import (
    BadFiles,
    SkippedSteps,
    StepClock,
    build_bar,
    optional_write,
    peak_memory_gb,
    save_picture,
)
from training.run import open_experiment, repetition_note, report, start_records
from training.signals import GO_ON, STOP, Interrupted, Interruptions
from upernet import NORMS, resize, resized_cross_entropy, slide_inference
from utils import (
    ConfusionMatrix,
    colour_classes,
    draw_legend,
    draw_rows,
    nan_guard,
    poly_lr,
    set_learning_rate,
    skip_nonfinite,
)

# MMSegmentation's recipe for MAE and UperNet on ADE20K, which is the paper's.
RECIPE = dict(
    experiment_name="ADE20K_UperNet",
    img_size=[512],
    iterations=160_000,
    save_checkpoint_interval=None,
    per_gpu_batch_size=16,
    weight_decay=0.05,
    max_grad_norm=0.0,
    num_workers=16,
)
# For the model and the scenes of pretrain_mae.py --demo.
DEMO_RECIPE = dict(
    experiment_name="demo_segmentation",
    img_size=[64],
    resize_to=[128, 80],
    num_classes=len(DEMO_LABEL_NAMES) - 1,
    channels=48,
    epochs=6,
    eval_interval=2,
    save_checkpoint_interval=6,
    per_gpu_batch_size=16,
    learning_rate=2e-3,
    layer_decay=0.75,
    num_workers=1,
)
ADAM_BETAS = (0.9, 0.999)
WARMUP_STEPS = 1500
SCALE_FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of a test with several scales
BAND_ROWS = 128
NUM_PICTURES = 4
PICTURE_SIDE = 256
LEGEND_NAMES = 24
EVALUATIONS = 10  # in a run, where --eval_interval does not say otherwise
MODEL_FLAGS = ("taps", "channels", "norm", "rel_pos_bias")
SEGMENTER_FLAGS = (*MODEL_FLAGS, "num_classes")  # what a segmenter is, beside its encoder's sizes
SIZE_FLAGS = [field.name for field in dataclasses.fields(MAEConfig) if field.name.startswith("encoder")]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add_run_flags(parser)
    start = parser.add_argument_group("model")
    start.add_argument(
        "--path_to_backbone_checkpoint",
        metavar="CHECKPOINT",
        help="checkpoint folder, .safetensors, or .pth of the original release; with --eval_only a segmenter's folder",
    )
    start.add_argument("--from_scratch", action="store_true", help="start from random weights, for comparison")
    start.add_argument("--model", choices=MODEL_CONFIGS, help="sizes from scratch (default: mae_vit_base_patch16)")
    start.add_argument("--patch_size", type=int, help="(default: the checkpoint's or the model's)")
    for name in SIZE_FLAGS:
        start.add_argument(f"--{name}", type=type(getattr(MAEConfig(), name)), help="(default: likewise)")
    start.add_argument(
        "--taps", type=int, nargs=4, help="0-based blocks that feed the pyramid (default: 3 5 7 11 of 12)"
    )
    start.add_argument("--channels", type=int, help="width of the head (default: the encoder's)")
    start.add_argument("--norm", choices=NORMS, default="batch", help="of the heads; group works with one image a pass")
    start.add_argument(
        "--rel_pos_bias",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="add relative position tables to the attention, at zero, as the paper and the published 48.1 mIoU have",
    )
    labels = parser.add_argument_group("labels")
    labels.add_argument("--num_classes", type=int, default=ADE20K_NUM_CLASSES, help="that a pixel can be of")
    labels.add_argument(
        "--ignore_zero",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="0 in a label map is no class, and 1 is the first, as in ADE20K",
    )
    labels.add_argument("--class_names", metavar="FILE", help="a name on every line (default: ADE20K's for its 150)")
    labels.add_argument(
        "--resize_to",
        type=int,
        nargs=2,
        metavar=("LONG", "SHORT"),
        help="images fit into this before the random factor (default: 4 and 1 times --img_size)",
    )
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--iterations", type=int, help="optimizer steps; --epochs, where given, counts instead")
    recipe.add_argument(
        "--warmup_iterations",
        type=int,
        help="optimizer steps of linear warmup, unless --warmup_epochs is given (default: 1500, MMSegmentation's, or a "
        "tenth of a shorter run)",
    )
    recipe.add_argument(
        "--learning_rate", type=float, default=1e-4, help="the peak; MMSegmentation's for a batch of 16"
    )
    recipe.add_argument(
        "--layer_decay", type=float, default=0.65, help="each layer's learning rate / the next one's, as MMSegmentation"
    )
    recipe.add_argument(
        "--drop_path", type=float, default=0.1, help="rate of the last block, rising linearly from 0, as MMSegmentation"
    )
    recipe.add_argument(
        "--auxiliary_weight", type=float, default=0.4, help="of the auxiliary head's loss, as MMSegmentation"
    )
    recipe.add_argument("--eval_interval", type=int, help="epochs between evaluations (default: a tenth of the run)")
    test = parser.add_argument_group("test")
    test.add_argument("--eval_only", action="store_true", help="evaluate a segmenter and stop")
    test.add_argument(
        "--slide",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="score by overlapping windows of --img_size, two thirds of it apart; else whole images",
    )
    test.add_argument("--multi_scale", action="store_true", help="average over six sizes, 0.5 to 1.75")
    test.add_argument("--window_batch_size", type=int, default=16, help="windows, or whole images, scored at once")
    test.add_argument("--flip", action="store_true", help="average over the image and its mirror image")
    parser.set_defaults(**RECIPE)

    # Defaults: the checkpoint's, then the recipe's; what is given by flag wins. --help waits for them
    argv = sys.argv[1:] if argv is None else argv
    flags = [flag for flag in argv if flag not in ("-h", "--help")]
    given = parser.parse_known_args(flags)[0]
    if given.demo:
        if given.eval_only:
            parser.error(
                "--demo trains; to evaluate what it left, leave it out and give --path_to_data "
                f"{Path(given.working_directory) / 'demo_data' / 'ADEChallengeData2016'}"
            )
        parser.set_defaults(**DEMO_RECIPE)
        checkpoints = find_checkpoints(Path(given.working_directory) / "demo")
        if checkpoints:
            parser.set_defaults(path_to_backbone_checkpoint=str(checkpoints[-1]))
        elif not given.path_to_backbone_checkpoint and flags == argv:
            parser.error("--demo starts from the demo pretraining: first run accelerate launch pretrain_mae.py --demo")
        given = parser.parse_known_args(flags)[0]
    record = set_size_defaults(parser, given)
    args = parser.parse_args(argv)

    if args.path_to_data is None and not args.demo:
        parser.error("give --path_to_data FOLDER with images/ and annotations/, each with training/ and validation/")
    if args.path_to_backbone_checkpoint is None and not args.from_scratch:
        parser.error("give --path_to_backbone_checkpoint CHECKPOINT to start from, or --from_scratch to do without")
    if args.eval_only and args.from_scratch:
        parser.error("--eval_only judges weights: give --path_to_backbone_checkpoint, and leave --from_scratch out")
    if args.eval_only:
        refuse_other_sizes(parser, args, record)
    check_run_flags(parser, args)
    for name, low, high in (
        ("layer_decay", 0, 1),
        ("drop_path", 0, 0.99),
        ("auxiliary_weight", 0, 10),
        ("learning_rate", 0, 1),
    ):
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name} must lie between {low} and {high}, and is {getattr(args, name)}")
    for name in ("eval_interval", "iterations", "window_batch_size", "channels"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.warmup_iterations is not None and args.warmup_iterations < 0:
        parser.error(f"--warmup_iterations cannot be negative, and is {args.warmup_iterations}")
    if args.num_classes < 2:
        parser.error(
            f"--num_classes {args.num_classes} leaves nothing to tell apart; for one class before a background give 2, "
            "with --no-ignore_zero where the background is 0"
        )
    if args.resize_to is not None and not args.resize_to[0] >= args.resize_to[1] >= 1:
        parser.error(f"--resize_to takes a long and a short side, not {' '.join(map(str, args.resize_to))}")
    if args.norm == "batch" and micro_batch_size(args) < 2 and not args.eval_only:
        parser.error(
            "batch norm over a map pooled to one cell needs two images in a forward pass, and there is one: raise "
            "--per_gpu_batch_size, lower --gradient_accumulation_steps, or take --norm group"
        )
    try:
        config = build_config(args)
        if min(config.grid_size) < 2:
            raise ValueError(f"--img_size {args.img_size} is less than two patches of {config.patch_size} a side")
        if args.taps is None:
            args.taps = default_taps(config.encoder_depth)
        label_table(args.num_classes, args.ignore_zero)
        args.class_names = read_class_names(args)
        with torch.device("meta"):
            build_model(config, args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.resize_to is None:
        args.resize_to = [4 * max(config.image_hw), min(config.image_hw)]
    return args


def refuse_other_sizes(parser: argparse.ArgumentParser, args: argparse.Namespace, record: dict) -> None:
    """Refuse flags of --eval_only that contradict the segmenter; those that are not given are its own by now."""
    size = record["config"]["img_size"]
    saved = record | {"img_size": [size] if isinstance(size, int) else list(size)}
    for name in ("img_size", *SEGMENTER_FLAGS):
        if getattr(args, name) != saved[name]:
            source = args.path_to_backbone_checkpoint
            parser.error(f"--{name} {getattr(args, name)}, but {source} has {saved[name]}; leave the flag out")


def read_class_names(args: argparse.Namespace) -> list[str]:
    """Give the names of the classes: of a file, of a segmenter, of ADE20K or the demo, or numbers."""
    if isinstance(args.class_names, list):  # a segmenter's own
        return args.class_names
    if args.class_names is not None:
        names = [line.strip() for line in Path(args.class_names).read_text().splitlines() if line.strip()]
        if len(names) != args.num_classes:
            raise ValueError(f"--class_names {args.class_names} has {len(names)} names for {args.num_classes} classes")
        return names
    if args.num_classes == ADE20K_NUM_CLASSES and args.ignore_zero:
        return list(ADE20K_CLASS_NAMES)
    if args.demo:
        return list(DEMO_LABEL_NAMES[1:])
    return [f"class {index}" for index in range(args.num_classes)]


def set_size_defaults(parser: argparse.ArgumentParser, given: argparse.Namespace) -> dict:
    """Take the encoder's sizes from the checkpoint, or from --model, and give the checkpoint's record.

    The image size is the recipe's, but for --eval_only, where all that the segmenter was trained with is taken over.
    """
    names, source = (*SIZE_FLAGS, "patch_size"), given.path_to_backbone_checkpoint
    if source is None:
        sizes = dataclasses.asdict(MODEL_CONFIGS[given.model or "mae_vit_base_patch16"])
        parser.set_defaults(**{name: sizes[name] for name in names})
        return {}
    if given.model is not None:
        parser.error(f"--model is for --from_scratch without a checkpoint; the sizes come with {source}")
    record = read_sizes(source)
    sizes = dataclasses.asdict(MAEConfig(**record["config"]))
    for name in names:
        if getattr(given, name) not in (None, sizes[name]):
            parser.error(f"--{name} {getattr(given, name)}, but {source} has {sizes[name]}; leave the flag out")
    parser.set_defaults(**{name: sizes[name] for name in names}, input_channels=sizes["input_channels"])
    if "image_mean" in record:
        parser.set_defaults(mean=list(record["image_mean"]), std=list(record["image_std"]))
    if given.eval_only and not given.from_scratch:
        if record.get("architecture") != ViTMAEForSegmentation.__name__:
            parser.error(f"--eval_only judges a segmenter, and {source} is none; give a checkpoint of this script")
        size = sizes["img_size"]
        parser.set_defaults(
            img_size=[size] if isinstance(size, int) else list(size),
            **{name: record[name] for name in (*SEGMENTER_FLAGS, "ignore_zero", "resize_to", "class_names")},
        )
    return record


def build_config(args: argparse.Namespace) -> MAEConfig:
    sizes = {name: getattr(args, name) for name in (*SIZE_FLAGS, "patch_size", "img_size", "input_channels")}
    return MAEConfig(**sizes, norm_pix_loss=False)


def build_model(config: MAEConfig, args: argparse.Namespace) -> ViTMAEForSegmentation:
    options = {name: getattr(args, name) for name in MODEL_FLAGS}
    return ViTMAEForSegmentation(config, args.num_classes, drop_path_rate=args.drop_path, **options)


# ------------------------------------------------------------------------------------------------ evaluation


class View(NamedTuple):
    """One of the looks that a test takes at an image: normalised `pixels` (C, h, w), mirrored or not."""

    index: int
    mirrored: bool
    pixels: Tensor


def predict(model: ViTMAEForSegmentation, images: list[Tensor], args: argparse.Namespace) -> list[Tensor]:
    """Label every pixel of images of any sizes, uint8 (C, H, W) each -> int64 (H, W) each.

    Images are resized as in MMSegmentation's test (ratio kept), scored whole or by windows, and the scores are brought
    back to the images' own size. Several scales and flips average probabilities.
    """
    views = [view for index, image in enumerate(images) for view in look_at(index, image, model, args)]
    scores = score_views(model, [view.pixels for view in views], args)
    answers = []
    if len(views) == len(images):
        return [label_pixels(score, image.shape[-2:]) for score, image in zip(scores, images, strict=True)]
    for index, group in itertools.groupby(zip(views, scores, strict=True), key=lambda pair: pair[0].index):
        total = None
        for view, score in group:
            score = score.flip(-1) if view.mirrored else score
            share = resize(score[None], size=images[index].shape[-2:])[0].softmax(dim=0)  # (K, H, W)
            total = share if total is None else total.add_(share)
        answers.append(total.argmax(dim=0))
    return answers


def look_at(index: int, image: Tensor, model: ViTMAEForSegmentation, args: argparse.Namespace) -> Iterator[View]:
    """Give the views of an image that a test scores: one, or several scales, each also mirrored."""
    crop = model.backbone.config.image_hw
    for factor in SCALE_FACTORS if args.multi_scale else (1.0,):
        long_side, short_side = (factor * side for side in args.resize_to)
        if args.slide and args.multi_scale:  # as published: no scale smaller than a window
            long_side, short_side = math.inf, max(short_side, *crop)
        resized = resize_image(image, fit_within(*image.shape[-2:], long_side, short_side))
        pixels = normalize(resized[None], args.mean, args.std)[0]
        yield View(index, False, pixels)
        if args.flip:
            yield View(index, True, pixels.flip(-1))


def score_views(model: ViTMAEForSegmentation, views: list[Tensor], args: argparse.Namespace) -> Iterator[Tensor]:
    """Score every pixel of normalised images of any sizes, (C, h, w) -> (K, h, w), one after the other."""
    if args.slide:
        crop = model.backbone.config.image_hw
        stride = tuple(2 * side // 3 for side in crop)
        score_windows = functools.partial(score_cells, model)
        yield from slide_inference(score_windows, views, crop, stride, args.window_batch_size)
        return
    unit = 2 * model.backbone.config.patch_size  # two patches, because the pyramid halves the grid
    padded = [F.pad(view, (0, -view.shape[2] % unit, 0, -view.shape[1] % unit)) for view in views]
    for _, group in itertools.groupby(range(len(views)), key=lambda i: padded[i].shape):
        same = list(group)
        for first in range(0, len(same), args.window_batch_size):
            chunk = same[first : first + args.window_batch_size]
            for i, score in zip(chunk, score_cells(model, torch.stack([padded[i] for i in chunk])), strict=True):
                yield score[:, : views[i].shape[1], : views[i].shape[2]]


def score_cells(model: ViTMAEForSegmentation, images: Tensor) -> Tensor:
    """Score every pixel: normalised (N, C, H, W) -> float32 (N, K, H, W)."""
    return resize(model(images).logits.float(), size=images.shape[-2:])


def label_pixels(score: Tensor, size: tuple[int, int]) -> Tensor:
    """Give the best class of each pixel of an image of another size: (K, h, w) -> int64 (H, W), `resize` and argmax.

    In bands of rows, because the scores of all classes at the size of a photograph would take gigabytes.
    """
    height, width = size
    rows = ((torch.arange(height, device=score.device) + 0.5) * (score.shape[1] / height) - 0.5).clamp(min=0)
    above = rows.long()
    below, share = (above + 1).clamp(max=score.shape[1] - 1), (rows - above)[:, None]
    bands = []
    for top in range(0, height, BAND_ROWS):
        upper, lower = score[:, above[top : top + BAND_ROWS]], score[:, below[top : top + BAND_ROWS]]
        band = upper + (lower - upper) * share[top : top + BAND_ROWS]  #      (K, band, w)
        bands.append(resize(band[None], size=(band.shape[1], width))[0].argmax(dim=0))
    return torch.cat(bands)


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: ViTMAEForSegmentation,
    loader: DataLoader,
    args: argparse.Namespace,
    watch: Callable[[DataLoader], Iterable[Batch]] = iter,
) -> ConfusionMatrix:
    """Label every validation image once, at its own size, and count the pixels over all processes."""
    was_training = model.training
    model.eval()
    confusion = ConfusionMatrix(args.num_classes, accelerator.device, IGNORE_INDEX)
    for batch in watch(loader):
        with accelerator.autocast():
            answers = predict(model, [image.to(accelerator.device) for image in batch.images], args)
        for labels, answer in zip(batch.labels, answers, strict=True):
            confusion.update(labels, answer)
    model.train(was_training)
    if process_slice(accelerator)[1] > 1:
        confusion.reduce(accelerator)
    return confusion


def write_table(confusion: ConfusionMatrix, names: list[str], file: Path) -> None:
    """Write a row for each class: its share of the pixels and its scores in percent."""
    rename_aside(file)
    counts, scores = confusion.counts.cpu(), confusion.per_class()
    shares = 100 * counts.sum(dim=1).double() / counts.sum()
    lines = ["class\tname\tpixels_percent\tiou\tacc\tdice"]
    for index, name in enumerate(names):
        cells = [f"{values[index].item():.2f}" for values in (shares, *scores.values())]
        lines.append("\t".join([str(index), name, *cells]))
    with optional_write(file):
        file.write_text("\n".join(lines) + "\n")


@torch.no_grad()
def draw_predictions(
    accelerator: Accelerator, model: ViTMAEForSegmentation, data: ADE20KDataset, args: argparse.Namespace, path: Path
) -> None:
    """Draw validation images, their label maps and the model's, with the names of the classes that fill most of them.

    The main process draws; a sharded model answers only when all processes ask, so there every process calls.
    """
    if not accelerator.is_main_process and accelerator.distributed_type not in SHARDING:
        return
    spacing = max(1, len(data) // NUM_PICTURES)
    samples = [data[SampleKey(EVAL_EPOCH, index)] for index in range(0, len(data), spacing)[:NUM_PICTURES]]
    model.eval()
    with accelerator.autocast():
        answers = predict(model, [sample.image.to(accelerator.device) for sample in samples], args)
    answers = [answer.cpu() for answer in answers]
    model.train()
    if not accelerator.is_main_process:
        return

    def fit(picture: Tensor) -> Tensor:
        """Put a picture (C, H, W) into a square, its ratio kept, on grey."""
        size = fit_within(*picture.shape[-2:], PICTURE_SIDE, PICTURE_SIDE)
        picture = F.interpolate(picture[None].float(), size, mode="nearest")[0]
        return F.pad(picture, (0, PICTURE_SIDE - size[1], 0, PICTURE_SIDE - size[0]), value=0.8)

    labels = [sample.label.long() for sample in samples]
    rows = {
        "image": torch.stack([fit(sample.image / 255) for sample in samples]),
        "label (black is ignored)": torch.stack([fit(colour_classes(label, LABEL_COLOURS)) for label in labels]),
        "prediction": torch.stack([fit(colour_classes(answer, LABEL_COLOURS)) for answer in answers]),
    }
    picture = draw_rows(rows)
    shown = torch.cat([x.flatten() for x in (*answers, *labels)])
    counts = torch.bincount(shown[shown != IGNORE_INDEX], minlength=args.num_classes)
    order = [k for k in counts.argsort(descending=True, stable=True).tolist() if counts[k]]
    names = {args.class_names[k]: tuple(LABEL_COLOURS[k]) for k in order[:LEGEND_NAMES]}
    if len(order) > LEGEND_NAMES:
        names[f"and {len(order) - LEGEND_NAMES} more"] = (255, 255, 255)
    legend = draw_legend(names, picture.width)
    canvas = Image.new("RGB", (picture.width, picture.height + legend.height), "white")
    canvas.paste(picture, (0, 0))
    canvas.paste(legend, (0, picture.height))
    save_picture(canvas, path)


def run_evaluation(args: argparse.Namespace) -> dict[str, float]:
    """Do what --eval_only asks for, and write two files beside the weights."""
    accelerator = build_accelerator(1)
    weights = find_weights(args.path_to_backbone_checkpoint)
    model, _ = load_segmenter(weights)
    if not os.access(weights.parent, os.W_OK):
        raise PermissionError(f"the figures are written beside the weights, but {weights.parent} cannot be written to")
    pairs = list_checked_pairs(accelerator, args, "validation")
    data = build_val_data(pairs, args)
    num_workers = cap_workers(args.num_workers)
    loader = build_eval_loader(data, micro_batch_size(args), num_workers, *process_slice(accelerator), collate_lists)
    accelerator.print(f"{'evaluating':<16}{weights} on {pairs.describe()}")
    confusion = evaluate(accelerator, model.to(accelerator.device), loader, args)
    figures = confusion.figures()
    if accelerator.is_main_process:
        files = [weights.parent / name for name in ("evaluation.json", "per_class.tsv")]
        how = {name: getattr(args, name) for name in ("path_to_data", "slide", "multi_scale", "flip", "resize_to")}
        how |= {"weights": str(weights), "num_images": len(data), "precision": accelerator.mixed_precision}
        rename_aside(files[0])
        write_json(files[0], figures | how)
        write_table(confusion, args.class_names, files[1])
        accelerator.print(f"{'written':<16}{', '.join(file.name for file in files)} in {weights.parent}")
    report(accelerator, figures)
    accelerator.end_training()
    return figures


# ------------------------------------------------------------------------------------------------ training


def list_checked_pairs(accelerator: Accelerator, args: argparse.Namespace, split: str) -> PairList:
    """Pair the images and label maps of a split, "training" or "validation", and check that all can be used."""
    pairs = list_pairs(args.path_to_data, split)
    rescan = args.rescan_data and accelerator.is_local_main_process
    accelerator.print(f"{'checking':<16}{pairs.describe()}")
    with accelerator.local_main_process_first():
        check_pairs(
            pairs,
            label_table(args.num_classes, args.ignore_zero),
            cap_workers(args.num_workers),
            ListCache(Path(args.working_directory) / "file_lists", rescan),
            decode=split == "validation",  # where an image that cannot be decoded is not replaced by another
        )
    return pairs


def build_training_data(pairs: PairList, model: ViTMAEForSegmentation, args: argparse.Namespace) -> ADE20KDataset:
    augment = SegmentationTransform(model.backbone.config.image_hw, args.mean, args.std, *args.resize_to)
    table, common = label_table(args.num_classes, args.ignore_zero), dict(seed=args.seed, channels=args.input_channels)
    return ADE20KDataset(pairs, augment, table, noise_size=model.noise_size, **common)


def build_val_data(pairs: PairList, args: argparse.Namespace) -> ADE20KDataset:
    """Give validation images and label maps at their own size."""
    table, common = label_table(args.num_classes, args.ignore_zero), dict(seed=args.seed, channels=args.input_channels)
    return ADE20KDataset(pairs, keep_size, table, replace_bad_files=False, **common)


def compute_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy at the labels' size, (N, K, h, w) and (N, H, W): the sum over labelled pixels / all pixels.

    As in MMSegmentation, whose mean is over all pixels. So a crop without a label is 0 and not 0/0, and accumulated
    passes add up to the loss of the whole batch.
    """
    return resized_cross_entropy(scores, labels, IGNORE_INDEX) / labels.numel()


def main(args: argparse.Namespace) -> dict[str, float]:
    """Run the experiment and give the last validation figures."""
    if args.demo and args.path_to_data is None:
        demo_data = Path(args.working_directory) / "demo_data"
        with build_accelerator(args.gradient_accumulation_steps).main_process_first():
            write_demo_data(demo_data)
        args.path_to_data = str(demo_data / "ADEChallengeData2016")
    if args.eval_only:
        return run_evaluation(args)

    # Run: processes, folder, what to resume
    accelerator = build_accelerator(
        args.gradient_accumulation_steps,
        timeout_minutes=args.timeout_minutes,
        bf16_gradient_sync=args.bf16_gradient_sync,
    )
    say, device = accelerator.print, accelerator.device
    start = open_experiment(accelerator, args)
    experiment = start.experiment
    set_seed(args.seed)
    choose_kernels(args.deterministic)

    # Model: the pretrained encoder under a new neck and new heads
    config = build_config(args)
    model = build_model(config, args)
    origin = "from scratch"
    if not args.from_scratch:
        loaded = load_pretrained_encoder(model.backbone, args.path_to_backbone_checkpoint)
        origin = f"{loaded.describe()}, from {args.path_to_backbone_checkpoint}"

    # Data: augmentation, drop path and dropout are functions of (seed, epoch, index)
    train_pairs, val_pairs = (list_checked_pairs(accelerator, args, split) for split in ("training", "validation"))
    train_data, val_data = build_training_data(train_pairs, model, args), build_val_data(val_pairs, args)
    sampler = StepSampler(
        len(train_data),
        micro_batch_size(args),
        accumulation_steps=args.gradient_accumulation_steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        seed=args.seed,
    )
    num_workers = cap_workers(args.num_workers)
    loader = build_training_loader(train_data, sampler, num_workers, device.type == "cuda")
    eval_batch_size = micro_batch_size(args)
    val_loader = build_eval_loader(val_data, eval_batch_size, num_workers, *process_slice(accelerator), collate_lists)
    total_steps = args.iterations if args.epochs is None else args.epochs * sampler.steps_per_epoch
    num_epochs = math.ceil(total_steps / sampler.steps_per_epoch)
    warmup_steps = choose_warmup(args, sampler.steps_per_epoch, total_steps)
    eval_interval = args.eval_interval or max(1, num_epochs // EVALUATIONS)
    save_interval = args.save_checkpoint_interval or max(1, num_epochs // EVALUATIONS)

    # Optimizer
    groups = param_groups_layer_decay(
        model, args.weight_decay, no_weight_decay_list=model.no_weight_decay(), layer_decay=args.layer_decay
    )
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=ADAM_BETAS, fused=True)
    describe_run(
        accelerator, args, model, sampler, total_steps, warmup_steps, train_pairs, val_pairs, num_workers, origin
    )
    say(f"{'every':<16}{eval_interval} of {num_epochs:,} epochs evaluated, every {save_interval} kept as a checkpoint")
    if args.norm == "batch" and accelerator.num_processes > 1:
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        else:
            say("batch norm      not synchronised: torch has no such layer for the CPU; each process has its own")
    model.backbone.activation_checkpointing = args.activation_checkpointing
    compile_in_place(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    bare_model = accelerator.unwrap_model(model)

    # Resume: the whole state, or a clear refusal
    config_record = {
        "architecture": "ViTMAEForSegmentation",
        "config": {k: v for k, v in dataclasses.asdict(config).items() if not k.startswith(("decoder", "norm_pix"))},
        "num_classes": args.num_classes,
        "ignore_zero": args.ignore_zero,
        "class_names": args.class_names,
        "resize_to": args.resize_to,
        "image_mean": args.mean,
        "image_std": args.std,
        **{name: getattr(args, name) for name in MODEL_FLAGS},
    }
    identity = {
        "effective_batch_size": sampler.images_per_step,
        "num_images": len(train_data),
        "data": train_data.files.fingerprint(),
        "seed": args.seed,
        "total_steps": total_steps,
        "warmup_steps": warmup_steps,
    }
    first_epoch, step, best, row = 0, 0, -1.0, {}
    if start.resume_from is not None:
        state = resume(accelerator, start.resume_from, config_record, identity, keeps_best=True)
        first_epoch, step, row = state["epoch"], state["step"], state["row"]
        if (experiment / BEST_CHECKPOINT).exists():  # else the run goes on under another name, without the best so far
            best = state["best"]

    # Records: one run at a time in this folder
    log = start_records(accelerator, start, args, step)
    bad_files = BadFiles(experiment, len(train_data), args.max_bad_fraction)
    skipped_steps = SkippedSteps(
        experiment, lambda step: [train_pairs.path(i) for i in sampler.images_of(step)], args.max_nonfinite_steps
    )
    checkpoints = Checkpoints(accelerator, experiment, args.keep_checkpoints)
    interruptions = Interruptions(accelerator, checkpoints, args.save_minutes)

    def save(epoch: int, row: dict, *, epoch_ends: bool = False, for_good: bool = False) -> bool:
        """Save after `epoch` complete epochs; `row` is one that waits for its evaluation."""
        state = identity | {"epoch": epoch, "step": step, "best": best, "row": row}
        return checkpoints.save(model, config_record, state, epoch_ends=epoch_ends, for_good=for_good)

    # The loop
    model.train()
    bar = build_bar(accelerator, total_steps, step)
    clock = StepClock(say)
    sums = torch.zeros(2, device=device)  # of this step: loss of the head, and of the auxiliary head
    pending = []  # of each step since the last row, and whether it was left out; on the device
    figures: dict[str, float] = {}
    saved = True
    for epoch in range(first_epoch, num_epochs):
        sampler.set_epoch(epoch, first_step=step - epoch * sampler.steps_per_epoch)
        last_step = min(total_steps, (epoch + 1) * sampler.steps_per_epoch)
        evaluates = (epoch + 1) % eval_interval == 0 or epoch + 1 == num_epochs
        saves = (epoch + 1) % save_interval == 0 or epoch + 1 == num_epochs
        for batch in clock.watch(loader) if step < last_step else ():
            bad_files.note(batch.bad_files)
            images = batch.images.to(device, non_blocking=True)  #    (N, C, H, W), normalised
            labels = batch.labels.to(device, non_blocking=True).long()  # (N, H, W)
            noise = batch.noise.to(device, non_blocking=True)  #      (N, noise_size)
            learning_rate = poly_lr(step, peak=args.learning_rate, warmup_steps=warmup_steps, total_steps=total_steps)
            set_learning_rate(optimizer, learning_rate)
            with accelerator.accumulate(model):
                logits, auxiliary = model(images, noise)
                losses = torch.stack([compute_loss(logits, labels), compute_loss(auxiliary, labels)])
                accelerator.backward(nan_guard(losses[0] + args.auxiliary_weight * losses[1]))
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
                    skipped = skip_nonfinite(optimizer, grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            sums += losses.detach() / args.gradient_accumulation_steps
            if not accelerator.sync_gradients:
                continue

            # An optimizer step is complete
            step += 1
            pending.append(torch.stack([*sums, skipped]))
            sums.zero_()
            bar.update()
            request = interruptions.agree()
            epoch_ends = step == last_step
            if step > 1 and step % args.log_interval and not epoch_ends and request == GO_ON:
                continue

            # Row: figures cross to the host here and nowhere else
            window = accelerator.reduce(torch.stack(pending), "mean").cpu()  # (steps, 3)
            pending.clear()
            finite = window[:, 2] == 0
            training_loss, auxiliary_loss = window[finite, :2].mean(dim=0).tolist()
            skipped_steps.note(accelerator, (~finite).tolist(), step, bar.write)
            row = {
                "step": step,
                "epoch": step / sampler.steps_per_epoch,
                "training_loss": training_loss if finite.any() else None,
                "training_auxiliary_loss": auxiliary_loss if finite.any() else None,
                "learning_rate": learning_rate,
                **clock.read(accelerator.num_processes),
                "memory_gb": peak_memory_gb(device),
                "bad_files": bad_files.share(accelerator, bar.write),
                "nonfinite_steps": skipped_steps.count,
            }
            bar.set_postfix_str(
                f"loss {training_loss:.4f}, lr {learning_rate:.1e}, {row['images_per_second']:.1f} images/s, "
                f"{row['data_wait_fraction']:.0%} waiting for data"
                + (f", mIoU {figures['testing_miou']:.2f} %, best {best:.2f} %" if figures else ""),
                refresh=False,
            )
            if epoch_ends:  # its row waits for the evaluation
                break
            log.write(row)
            if request != GO_ON:
                saved = save(epoch, {})
                if request == STOP:
                    interruptions.leave(log, bar, saved, step)
                    return {}
                clock.restart()

        # The epoch is complete
        if evaluates:
            check_weights(accelerator, model, experiment, step)
            broadcast_buffers(accelerator, bare_model)
            try:
                confusion = evaluate(accelerator, bare_model, val_loader, args, interruptions.watch)
            except Interrupted:
                interruptions.leave(log, bar, save(epoch, row), step)
                return {}
            figures = confusion.figures()
            row |= figures
            picture = experiment / "predictions" / f"epoch_{epoch + 1}.png"
            draw_predictions(accelerator, bare_model, val_data, args, picture)
            log.picture("predictions", picture, step)
            if figures["testing_miou"] > best:
                record = config_record | {"epoch": epoch + 1, "testing": figures}
                if checkpoints.save_weights(bare_model, BEST_CHECKPOINT, record):
                    best = figures["testing_miou"]
                    if accelerator.is_main_process:
                        write_table(confusion, args.class_names, experiment / BEST_CHECKPOINT / "per_class.tsv")
            if accelerator.is_main_process:
                write_table(confusion, args.class_names, picture.with_suffix(".tsv"))
        log.write(row)
        request = interruptions.agree()
        if evaluates or saves or request != GO_ON:
            saved = save(epoch + 1, {}, epoch_ends=True, for_good=saves)
        if request == STOP and step < total_steps:
            interruptions.leave(log, bar, saved, step)
            return {}
        clock.restart()

    # Finish
    bar.close()
    log.close()
    interruptions.close()
    if step != total_steps:
        raise RuntimeError(f"{step} optimizer steps were made instead of {total_steps}: a bug, please report it")
    if not saved:
        raise OSError("the last checkpoint could not be written; make room for it and go on with the same command")
    if not figures:  # a finished run that was started again
        figures = evaluate(accelerator, bare_model, val_loader, args).figures()
    checkpoints.finish(step)
    say(f"checkpoints     {experiment / BEST_CHECKPOINT} (mIoU {best:.2f} %), {experiment / LAST_CHECKPOINT}")
    report(accelerator, figures)
    accelerator.end_training()
    return figures


def choose_warmup(args: argparse.Namespace, steps_per_epoch: int, total_steps: int) -> int:
    """Give the steps of the warmup; ValueError where it leaves nothing of the run."""
    steps = args.warmup_iterations
    if args.warmup_epochs is not None:
        steps = round(args.warmup_epochs * steps_per_epoch)
    if steps is None:
        return min(WARMUP_STEPS, total_steps // 10)
    if steps >= total_steps:
        raise ValueError(
            f"a warmup of {steps} steps leaves nothing of the run's {total_steps}; give less --warmup_iterations, or "
            "leave it out"
        )
    return steps


def describe_run(
    accelerator: Accelerator,
    args: argparse.Namespace,
    model: ViTMAEForSegmentation,
    sampler: StepSampler,
    total_steps: int,
    warmup_steps: int,
    train_pairs: PairList,
    val_pairs: PairList,
    num_workers: int,
    origin: str,
) -> None:
    """Print what decides the result, before any long work."""

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    parts = {
        "backbone": model.backbone,
        "neck": model.neck,
        "head": model.decode_head,
        "auxiliary head": model.auxiliary_head,
    }
    decays = f", times {args.layer_decay:g} for each layer down" if args.layer_decay < 1 else ""
    lines = {
        "parameters": " + ".join(f"{name} {count(part):,}" for name, part in parts.items()) + f" = {count(model):,}",
        "taps": f"outputs of blocks {', '.join(map(str, model.taps))} of {model.backbone.config.encoder_depth}, from 0",
        "start": origin,
        "training": train_pairs.describe(),
        "validation": val_pairs.describe(),
        "labels": f"{args.num_classes} classes, 0 is " + ("ignored" if args.ignore_zero else "the first"),
        "effective batch": f"{sampler.images_per_step} = {accelerator.num_processes} processes x "
        f"{args.gradient_accumulation_steps} forward passes x {sampler.micro_batch_size} images",
        "learning rate": f"{args.learning_rate:.2e}{decays}",
        "schedule": f"{total_steps:,} steps, {sampler.steps_per_epoch:,} an epoch, warmup {warmup_steps:,}",
        "images": f"fit into {args.resize_to[0]} x {args.resize_to[1]}, cropped to "
        f"{model.backbone.config.image_hw[0]} x {model.backbone.config.image_hw[1]}",
        "decoder": "Pillow",
        "runs on": describe_processes(accelerator, num_workers, args.num_workers),
    }
    if sampler.images_per_step != RECIPE["per_gpu_batch_size"]:
        lines["note on batch"] = (
            f"the published schedule has an effective batch of {RECIPE['per_gpu_batch_size']}; learning rate and steps "
            "are not scaled to another"
        )
    if len(train_pairs) < sampler.images_per_step:
        lines["note"] = repetition_note(len(train_pairs), sampler.images_per_step)
    for name, text in lines.items():
        accelerator.print(f"{name:<16}{text}")


if __name__ == "__main__":
    main(parse_args())
