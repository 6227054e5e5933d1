"""Finetune a pretrained encoder as an image classifier, probe it frozen, or evaluate a classifier (paper, section 4).

Try it, after the demo of pretrain_mae.py:
    accelerate launch finetune_classifier.py --demo
ImageNet, ViT-B/16, the tutorial's recipe (PyTorch-Adventures), on one GPU:
    accelerate launch finetune_classifier.py --path_to_data IMAGENET --path_to_pretrained_mae_weights CHECKPOINT_FOLDER
The paper's recipe (table 9), effective batch 1024, on 8 GPUs:
    accelerate launch finetune_classifier.py --recipe paper --path_to_data IMAGENET --path_to_pretrained_mae_weights ...
Published: 81 % top-1 after 800 + 100 epochs, 62 % from scratch (PyTorch-Adventures); 83.6 % after 1600 + 100 with the
paper's recipe (table 3). This code at that size: not run yet.
"""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.loss import SoftTargetCrossEntropy
from timm.optim import Lars, param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.utils.data import DataLoader

from dataset import (
    EVAL_EPOCH,
    Batch,
    ImageDataset,
    PairMixing,
    SampleKey,
    StepSampler,
    build_eval_images,
    build_eval_loader,
    build_finetuning_transform,
    build_probing_transform,
    build_training_loader,
    denormalize,
    normalize,
)
from model import (
    MODEL_CONFIGS,
    MAEConfig,
    VisionTransformer,
    ViTMAEForImageClassification,
    check_trainable_blocks,
    find_weights,
    load_classifier,
    load_pretrained_encoder,
    read_sizes,
)
from storage.demo import write_demo_data
from storage.files import rename_aside, write_json
from storage.lists import FileList, ListCache, check_same_classes, find_splits, find_validation, list_images
from storage.weights import read_state_dict
from training.checkpoints import BEST_CHECKPOINT, LAST_CHECKPOINT, Checkpoints, check_weights, find_checkpoints, resume
from training.flags import HelpFormatter, add_run_flags, check_run_flags, micro_batch_size
from training.process import (
    SHARDING,
    broadcast_buffers,
    build_accelerator,
    cap_workers,
    choose_kernels,
    collect_features,
    compile_in_place,
    describe_processes,
    gather_slices,
    process_slice,
)
from training.records import BadFiles, SkippedSteps, StepClock, build_bar, peak_memory_gb, save_picture
from training.run import open_experiment, refuse_inside, repetition_note, report, start_records
from training.signals import GO_ON, STOP, Interrupted, Interruptions
from utils import (
    KNN_NEIGHBOURS,
    ConfusionMatrix,
    accuracy,
    cosine_lr,
    describe_class,
    draw_rows,
    knn_classify,
    nan_guard,
    scaled_lr,
    set_learning_rate,
    skip_nonfinite,
)

# The tutorial's, as its command has it; it decays no learning rate by depth, drops no path and erases nothing.
TUTORIAL_RECIPE = dict(
    epochs=100,
    warmup_epochs=5,
    per_gpu_batch_size=256,
    learning_rate=2e-3,
    min_learning_rate=0.0,
    weight_decay=0.1,
    adam_betas=[0.9, 0.999],
    max_grad_norm=1.0,
    layer_decay=1.0,
    drop_path=0.0,
    random_aug_magnitude=9,
    random_erasing=0.0,
    mixup_alpha=0.2,
    cutmix_alpha=1.0,
    label_smoothing=0.1,
    ema_decay=0.0,
)
# The paper's finetuning (table 9) with the settings of its release, and by size; effective batch 1024 on 8 GPUs.
PAPER_RECIPE = TUTORIAL_RECIPE | dict(
    per_gpu_batch_size=128,
    learning_rate=None,
    min_learning_rate=1e-6,
    weight_decay=0.05,
    max_grad_norm=0.0,
    random_erasing=0.25,
    mixup_alpha=0.8,
)
PAPER_SIZES = {
    "base": dict(epochs=100, base_learning_rate=5e-4, layer_decay=0.65, drop_path=0.1),
    "large": dict(epochs=50, base_learning_rate=1e-3, layer_decay=0.75, drop_path=0.2),
    "huge": dict(epochs=50, base_learning_rate=1e-3, layer_decay=0.75, drop_path=0.3),
}
# The paper's training from scratch (appendix A.2, table 11); effective batch 4096 on 8 GPUs.
PAPER_SCRATCH_RECIPE = PAPER_RECIPE | dict(
    warmup_epochs=20,
    per_gpu_batch_size=512,
    base_learning_rate=1e-4,
    min_learning_rate=0.0,
    weight_decay=0.3,
    adam_betas=[0.9, 0.95],
    layer_decay=1.0,
    random_erasing=0.0,
    ema_decay=0.9999,
)
PAPER_SCRATCH_SIZES = {
    "base": dict(epochs=300, drop_path=0.1),
    "large": dict(epochs=200, drop_path=0.2),
    "huge": dict(epochs=200, drop_path=0.2),
}
# The paper's linear probing (appendix A.1, table 10): LARS, no decay, crops and flips; effective batch 16384 on 8 GPUs.
PROBE_RECIPE = TUTORIAL_RECIPE | dict(
    epochs=90,
    warmup_epochs=10,
    per_gpu_batch_size=2048,
    gradient_accumulation_steps=4,
    learning_rate=None,
    base_learning_rate=0.1,
    weight_decay=0.0,
    max_grad_norm=0.0,
    random_aug_magnitude=0,
    mixup_alpha=0.0,
    cutmix_alpha=0.0,
    label_smoothing=0.0,
    global_pool="cls",
)
# For the model and the scenes of pretrain_mae.py --demo.
DEMO_RECIPE = dict(
    experiment_name="demo_finetuned",
    epochs=10,
    warmup_epochs=1,
    save_checkpoint_interval=10,
    per_gpu_batch_size=32,
    learning_rate=1e-3,
    base_learning_rate=None,
    layer_decay=0.75,
    random_aug_magnitude=0,
    mixup_alpha=0.0,
    cutmix_alpha=0.0,
    num_workers=1,
)
# Without pretraining neither this nor a larger rate leaves chance within 10 epochs (benchmarks/RESULTS.md).
DEMO_SCRATCH_RECIPE = dict(layer_decay=1.0)
PROBE_MOMENTUM = 0.9
TOP = 5
NUM_PICTURES = 8
SIZE_FLAGS = [field.name for field in dataclasses.fields(MAEConfig) if field.name.startswith("encoder")]
EVALUATION_FILES = ("evaluation.json", "per_class.tsv", "worst_confusions.png")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add_run_flags(parser)
    start = parser.add_argument_group("model")
    start.add_argument(
        "--path_to_pretrained_mae_weights",
        metavar="CHECKPOINT",
        help="checkpoint folder, .safetensors, or .pth of the original release; left out, the ViT starts from scratch",
    )
    start.add_argument("--num_classes", type=int, help="(default: as many as there are class folders)")
    start.add_argument("--model", choices=MODEL_CONFIGS, help="sizes from scratch (default: mae_vit_base_patch16)")
    start.add_argument("--patch_size", type=int, help="(default: the weights' or the model's)")
    for name in SIZE_FLAGS:
        start.add_argument(f"--{name}", type=type(getattr(MAEConfig(), name)), help="(default: likewise)")
    start.add_argument(
        "--global_pool",
        choices=("avg", "cls"),
        default="avg",
        help="feature: mean of the patch tokens, or the cls token (default: avg; cls for --linear_probe)",
    )
    modes = parser.add_argument_group("what to do, instead of finetuning everything").add_mutually_exclusive_group()
    modes.add_argument("--eval_only", action="store_true", help="evaluate a finetuned checkpoint and stop")
    modes.add_argument("--linear_probe", action="store_true", help="train a linear layer on the frozen encoder")
    modes.add_argument("--knn", action="store_true", help="classify by the nearest training images; trains nothing")
    modes.add_argument(
        "--finetune_blocks",
        type=float,
        metavar="K",
        help="train the last K blocks and the head: 0 is the head alone, 0.5 the last block's MLP, the depth all",
    )
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--recipe",
        choices=("tutorial", "paper"),
        default="tutorial",
        help="whose defaults: PyTorch-Adventures', or the paper's (without weights: the paper's training from scratch)",
    )
    recipe.add_argument("--learning_rate", type=float, help="the peak, whatever the batch")
    recipe.add_argument("--base_learning_rate", type=float, help="the peak for 256 images per step")
    recipe.add_argument("--min_learning_rate", type=float, help="the cosine's end")
    recipe.add_argument("--layer_decay", type=float, help="each layer's learning rate / the next one's")
    recipe.add_argument("--adam_betas", type=float, nargs=2, metavar="BETA", help="AdamW's two")
    recipe.add_argument("--drop_path", type=float, help="rate of the last block, rising linearly from 0")
    recipe.add_argument("--random_aug_magnitude", type=int, help="RandAugment's, 1 to 10; 0 turns it off")
    recipe.add_argument("--random_erasing", type=float, help="share of the images with an erased area")
    recipe.add_argument("--mixup_alpha", type=float, help="of mixup's Beta distribution; 0 turns it off")
    recipe.add_argument("--cutmix_alpha", type=float, help="of CutMix's Beta distribution; 0 turns it off")
    recipe.add_argument("--label_smoothing", type=float, help="share of the target that all classes get alike")
    recipe.add_argument("--ema_decay", type=float, help="also keep and evaluate a moving average of the weights; 0 not")
    recipe.add_argument("--eval_interval", type=int, default=1, help="epochs between evaluations")
    parser.set_defaults(experiment_name="MAE_Imagenet_Finetuning", num_workers=32)

    # Defaults: the weights' sizes, then the recipe's; what is given by flag wins over both. --help waits for them
    argv = sys.argv[1:] if argv is None else argv
    flags = [flag for flag in argv if flag not in ("-h", "--help")]
    given = parser.parse_known_args(flags)[0]
    if given.demo and given.path_to_pretrained_mae_weights is None and flags == argv:
        checkpoints = find_checkpoints(Path(given.working_directory) / "demo")
        if not checkpoints:
            parser.error("--demo starts from the demo pretraining: first run accelerate launch pretrain_mae.py --demo")
        parser.set_defaults(path_to_pretrained_mae_weights=str(checkpoints[-1]))
        given = parser.parse_known_args(flags)[0]
    set_size_defaults(parser, given)
    width = parser.parse_known_args(flags)[0].encoder_embed_dim
    from_scratch = given.path_to_pretrained_mae_weights is None
    parser.set_defaults(**choose_recipe(given.recipe, from_scratch, given.linear_probe, width))
    if given.demo:
        parser.set_defaults(**DEMO_RECIPE)
    if given.base_learning_rate is not None:
        parser.set_defaults(learning_rate=None)
    elif given.learning_rate is not None:
        parser.set_defaults(base_learning_rate=None)
    args = parser.parse_args(argv)

    # Refusals
    if args.path_to_data is None and not args.demo:
        parser.error("give --path_to_data FOLDER with train/ and val/, each with a folder for every class")
    partial = args.linear_probe or args.finetune_blocks is not None
    if args.path_to_pretrained_mae_weights is None and (args.eval_only or args.knn or partial):
        parser.error(
            "--eval_only, --linear_probe, --knn and --finetune_blocks judge weights: give "
            "--path_to_pretrained_mae_weights"
        )
    if args.demo and (args.eval_only or args.knn or partial):
        parser.error(
            "--demo compares finetuning with training from scratch; for anything else leave it out and give "
            f"--path_to_data {Path(args.working_directory) / 'demo_data' / 'imagefolder'}"
        )
    if args.learning_rate is not None and args.base_learning_rate is not None:
        parser.error("--learning_rate is the peak, --base_learning_rate is scaled to the batch; give one of them")
    check_run_flags(parser, args)
    for name, low, high in (
        ("layer_decay", 0, 1),
        ("drop_path", 0, 0.99),
        ("random_erasing", 0, 1),
        ("label_smoothing", 0, 0.99),
        ("ema_decay", 0, 0.999999),
        ("random_aug_magnitude", 0, 10),
    ):
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name} must lie between {low} and {high}, and is {getattr(args, name)}")
    for name in ("mixup_alpha", "cutmix_alpha"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} cannot be negative, and is {getattr(args, name)}; 0 turns it off")
    if args.eval_interval < 1:
        parser.error(f"--eval_interval must be at least 1, not {args.eval_interval}")
    augments = not (args.eval_only or args.knn or args.linear_probe)
    if augments and args.input_channels != 3 and args.random_aug_magnitude:
        parser.error("RandAugment changes colours: with --input_channels other than 3, add --random_aug_magnitude 0")
    if args.linear_probe and micro_batch_size(args) < 2:
        parser.error(
            f"--linear_probe normalises over a forward pass, here of {micro_batch_size(args)} image: give more "
            "--per_gpu_batch_size or fewer --gradient_accumulation_steps"
        )
    try:
        depth = build_config(args).encoder_depth
        if args.finetune_blocks is not None:
            check_trainable_blocks(args.finetune_blocks, depth)
    except ValueError as error:
        parser.error(str(error))
    return args


def set_size_defaults(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Take the sizes from the pretrained weights, or from --model; a given size that contradicts weights is refused."""
    weights = given.path_to_pretrained_mae_weights
    if weights is None:
        sizes = dataclasses.asdict(MODEL_CONFIGS[given.model or "mae_vit_base_patch16"])
        parser.set_defaults(**{name: sizes[name] for name in (*SIZE_FLAGS, "patch_size")})
        return
    if given.model is not None:
        parser.error(f"--model is for training from scratch; the sizes come with {weights}")
    record = read_sizes(weights)
    sizes = dataclasses.asdict(MAEConfig(**record["config"]))
    for name in (*SIZE_FLAGS, "patch_size"):
        if getattr(given, name) not in (None, sizes[name]):
            parser.error(f"--{name} {getattr(given, name)}, but {weights} has {sizes[name]}; leave the flag out")
        parser.set_defaults(**{name: sizes[name]})
    img_size = sizes["img_size"]
    parser.set_defaults(
        img_size=[img_size] if isinstance(img_size, int) else list(img_size), input_channels=sizes["input_channels"]
    )
    if "image_mean" in record:
        parser.set_defaults(mean=list(record["image_mean"]), std=list(record["image_std"]))


def choose_recipe(recipe: str, from_scratch: bool, linear_probe: bool, width: int) -> dict:
    """Give the defaults of a recipe; the paper's differ by size, told by the encoder's width."""
    size = "base" if width <= 768 else "large" if width <= 1024 else "huge"
    if linear_probe:
        return PROBE_RECIPE
    if recipe == "tutorial":
        return TUTORIAL_RECIPE
    if from_scratch:
        return PAPER_SCRATCH_RECIPE | PAPER_SCRATCH_SIZES[size]
    return PAPER_RECIPE | PAPER_SIZES[size]


def build_config(args: argparse.Namespace) -> MAEConfig:
    sizes = {name: getattr(args, name) for name in (*SIZE_FLAGS, "patch_size", "img_size", "input_channels")}
    return MAEConfig(**sizes, norm_pix_loss=False)


# ------------------------------------------------------------------------------------------------ evaluation


class Evaluation(NamedTuple):
    """Of every image of a data set, in its order, on the CPU: `losses` (M,), best classes first `top` (M, up to 5)."""

    losses: Tensor
    top: Tensor
    labels: Tensor

    def figures(self, prefix: str = "testing") -> dict[str, float]:
        """Cross entropy, and top-1 and top-5 accuracy in percent."""
        return {
            f"{prefix}_loss": self.losses.double().mean().item(),
            f"{prefix}_top1_acc": accuracy(self.top, self.labels),
            f"{prefix}_top5_acc": accuracy(self.top, self.labels, TOP),
        }


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: ViTMAEForImageClassification,
    loader: DataLoader,
    args: argparse.Namespace,
    watch: Callable[[DataLoader], Iterable[Batch]] = iter,
) -> Evaluation:
    """Classify every validation image exactly once, whatever the number of processes and the remainder."""
    was_training = model.training
    model.eval()
    total, results = len(loader.dataset), []
    for batch in watch(loader):
        images = normalize(batch.images.to(accelerator.device), args.mean, args.std)
        with accelerator.autocast():
            scores = model(images).float()  #                          (N, K)
        losses = F.cross_entropy(scores, batch.labels.to(accelerator.device), reduction="none")
        top = scores.topk(min(TOP, scores.shape[1]), dim=1).indices  # (N, 5)
        results.append(torch.cat([losses[:, None], top.float()], dim=1))  # float32 is exact up to 16 million classes
    model.train(was_training)
    empty = torch.zeros(0, 1 + min(TOP, model.num_classes), device=accelerator.device)
    share = torch.cat([empty, *results])  # a process may have no image at all
    table = gather_slices(accelerator, share, total).cpu()  #          (M, 1 + 5)
    labels = torch.from_numpy(loader.dataset.files.labels).long()
    return Evaluation(table[:, 0], table[:, 1:].long(), labels)


def write_evaluation(
    evaluation: Evaluation, data: ImageDataset, class_names: list[str], folder: Path, record: dict
) -> list[str]:
    """Write the figures, a table with a row for each class, and a picture of the most frequent errors; name the files.

    Files of an earlier evaluation are renamed, not overwritten.
    """
    confusion = ConfusionMatrix(len(class_names))
    confusion.update(evaluation.labels, evaluation.top[:, 0])
    for name in EVALUATION_FILES:
        rename_aside(folder / name)
    figures_file, table_file, picture_file = (folder / name for name in EVALUATION_FILES)
    write_json(figures_file, record)

    lines = ["class\tname\timages\ttop1\ttop5\tmost_often_taken_for\ttimes"]
    for index, name in enumerate(class_names):
        there = evaluation.labels == index
        row = confusion.counts[index].clone()
        row[index] = 0
        top1, top5 = (accuracy(evaluation.top[there], evaluation.labels[there], k) for k in (1, TOP))
        taken_for = class_names[int(row.argmax())] if row.max() else ""
        fields = (name, describe_class(name), int(there.sum()), f"{top1:.2f}", f"{top5:.2f}", taken_for, int(row.max()))
        lines.append("\t".join(str(field) for field in fields))
    table_file.write_text("\n".join(lines) + "\n")

    rows = {}
    for true, predicted, times in confusion.worst_pairs(NUM_PICTURES):
        wrong = (evaluation.labels == true) & (evaluation.top[:, 0] == predicted)
        pictures = [data[SampleKey(EVAL_EPOCH, index)].image for index in wrong.nonzero()[:NUM_PICTURES, 0].tolist()]
        names = describe_class(class_names[true]), describe_class(class_names[predicted])
        rows[f"{names[0]}, taken for {names[1]}: {times} of {int(confusion.counts[true].sum())}"] = pictures
    if rows:
        draw_rows({title: torch.stack(pictures) / 255 for title, pictures in rows.items()}).save(picture_file)
    return [file.name for file in (figures_file, table_file, picture_file) if file.exists()]


def run_evaluation(args: argparse.Namespace) -> dict[str, float]:
    """Do what --eval_only asks for, and write three files beside the weights."""
    accelerator = build_accelerator(1)
    weights = find_weights(args.path_to_pretrained_mae_weights)
    model, record = load_classifier(weights)
    if not os.access(weights.parent, os.W_OK):
        raise PermissionError(f"the figures are written beside the weights, but {weights.parent} cannot be written to")
    folder = find_validation(Path(args.path_to_data)) or Path(args.path_to_data)
    files = list_labelled(accelerator, folder, args)
    class_names = record.get("class_names") or list(files.classes)
    check_same_classes(files.classes, tuple(class_names), folder, f"the classifier in {weights}")
    for what, number in ((str(folder), len(class_names)), ("--num_classes", args.num_classes)):
        if number not in (None, model.num_classes):
            raise ValueError(f"{weights} tells {model.num_classes} classes apart, but {what} has {number}")
    data = build_eval_data(files, build_config(args), args)
    loader = build_eval_loader(data, micro_batch_size(args), cap_workers(args.num_workers), *process_slice(accelerator))
    accelerator.print(f"{'evaluating':<16}{weights} on {files.describe()}")
    evaluation = evaluate(accelerator, model.to(accelerator.device), loader, args)
    figures = evaluation.figures()
    if accelerator.is_main_process:
        summary = figures | {"weights": str(weights), "data": str(folder), "num_images": len(data)}
        written = write_evaluation(evaluation, data, class_names, weights.parent, summary)
        accelerator.print(f"{'written':<16}{', '.join(written)} in {weights.parent}")
    report(accelerator, figures)
    accelerator.end_training()
    return figures


@torch.no_grad()
def run_knn(args: argparse.Namespace) -> dict[str, float]:
    """Do what --knn asks for: classify validation images by the labels of the nearest training images."""
    accelerator = build_accelerator(1)
    weights = find_weights(args.path_to_pretrained_mae_weights)
    config = build_config(args)
    if {"head.weight", "head.1.weight"} & read_state_dict(weights).keys():
        model, _ = load_classifier(weights)
    else:
        model = VisionTransformer(config)
        model.global_pool = args.global_pool
        accelerator.print(f"{'weights':<16}{load_pretrained_encoder(model, weights).describe()}")
    model.to(accelerator.device).eval()

    def encode(images: Tensor) -> Tensor:
        with accelerator.autocast():
            return model.forward_pooled(normalize(images, args.mean, args.std))

    features = []
    train_files, val_files = list_splits(accelerator, args)
    for files in (train_files, val_files):
        accelerator.print(f"{'encoding':<16}{files.describe()}")
        data = build_eval_data(files, config, args)
        loader = build_eval_loader(
            data, micro_batch_size(args), cap_workers(args.num_workers), *process_slice(accelerator)
        )
        features.append(collect_features(accelerator, loader, encode))
    (bank, bank_labels), (queries, labels) = features
    ranked = knn_classify(bank, bank_labels, queries, len(train_files.classes))
    figures = {"knn_top1_acc": accuracy(ranked, labels), "knn_top5_acc": accuracy(ranked, labels, TOP)}
    accelerator.print(
        f"{'vote':<16}of the {KNN_NEIGHBOURS} nearest, by cosine similarity, {model.global_pool} features"
    )
    report(accelerator, figures)
    accelerator.end_training()
    return figures


# ------------------------------------------------------------------------------------------------ data


def list_labelled(accelerator: Accelerator, folder: Path, args: argparse.Namespace) -> FileList:
    """List the images of a folder, whose every image has to lie in a class folder."""
    rescan = args.rescan_data and accelerator.is_local_main_process
    with accelerator.local_main_process_first():
        files = list_images(folder, ListCache(Path(args.working_directory) / "file_lists", rescan))
    if not files.classes:
        check_same_classes(files.classes, ("",), folder, "this data set")
    return files


def list_splits(accelerator: Accelerator, args: argparse.Namespace) -> tuple[FileList, FileList]:
    """List training and validation images; both have to have the same classes, and as many as --num_classes says."""
    train_folder, val_folder = find_splits(args.path_to_data)
    if val_folder is None:
        raise FileNotFoundError(
            f"--path_to_data {args.path_to_data} needs train/ and val/ (or validation/), each with a folder for every "
            "class: without held-out images no classifier can be judged"
        )
    train_files, val_files = (list_labelled(accelerator, folder, args) for folder in (train_folder, val_folder))
    check_same_classes(val_files.classes, train_files.classes, val_folder, str(train_folder))
    if args.num_classes not in (None, len(train_files.classes)):
        raise ValueError(
            f"--num_classes {args.num_classes}, but {train_folder} has {len(train_files.classes)} class folders; give "
            "that number or leave the flag out"
        )
    return train_files, val_files


def build_eval_data(files: FileList, config: MAEConfig, args: argparse.Namespace) -> ImageDataset:
    common = dict(seed=args.seed, channels=args.input_channels)
    return build_eval_images(files, config.image_hw, replace_bad_files=False, **common)


def build_training_data(
    files: FileList, model: ViTMAEForImageClassification, args: argparse.Namespace
) -> tuple[ImageDataset, Callable]:
    """Give the augmented training images, already normalised, and how samples are mixed into a batch."""
    hw, statistics = model.config.image_hw, (args.mean, args.std)
    if args.linear_probe:
        transform = build_probing_transform(hw, *statistics)
    else:
        transform = build_finetuning_transform(hw, args.random_aug_magnitude, args.random_erasing, *statistics)
    data = ImageDataset(
        files,
        transform,
        seed=args.seed,
        channels=args.input_channels,
        noise_size=model.drop_path_noise_size,
    )
    mixing = PairMixing(len(files.classes), args.mixup_alpha, args.cutmix_alpha, args.label_smoothing, args.seed)
    return data, mixing


# ------------------------------------------------------------------------------------------------ training


def build_optimizer(
    model: ViTMAEForImageClassification, learning_rate: float, args: argparse.Namespace
) -> torch.optim.Optimizer:
    """AdamW with layer-wise learning rates; LARS for a probe, its bias without decay and trust ratio (original)."""
    if args.linear_probe:
        weight, bias = model.head[1].weight, model.head[1].bias
        groups = [
            {"params": [weight], "always_adapt": True, "weight_decay": args.weight_decay},
            {"params": [bias], "always_adapt": False, "weight_decay": 0.0},
        ]
        return Lars(groups, lr=learning_rate, momentum=PROBE_MOMENTUM)
    groups = param_groups_layer_decay(
        model, args.weight_decay, no_weight_decay_list=model.no_weight_decay(), layer_decay=args.layer_decay
    )
    return torch.optim.AdamW(groups, lr=learning_rate, betas=tuple(args.adam_betas), fused=True)


def main(args: argparse.Namespace) -> dict[str, float]:
    """Run the experiment and give the last validation figures."""
    if args.demo and args.path_to_data is None:
        demo_data = Path(args.working_directory) / "demo_data"
        with build_accelerator(args.gradient_accumulation_steps).main_process_first():
            write_demo_data(demo_data)
        args.path_to_data = str(demo_data / "imagefolder")
    if args.eval_only:
        return run_evaluation(args)
    if args.knn:
        return run_knn(args)

    # Run: processes, folder, what to resume
    accelerator = build_accelerator(
        args.gradient_accumulation_steps,
        timeout_minutes=args.timeout_minutes,
        bf16_gradient_sync=args.bf16_gradient_sync,
    )
    say, device = accelerator.print, accelerator.device
    if args.ema_decay and accelerator.distributed_type in SHARDING:
        raise ValueError("--ema_decay cannot average weights that are sharded; leave it out or use plain DDP")
    start = open_experiment(accelerator, args)
    experiment = start.experiment
    set_seed(args.seed)
    choose_kernels(args.deterministic)

    # Model: the pretrained encoder under a new head
    train_files, val_files = list_splits(accelerator, args)
    refuse_inside(args.working_directory, train_files.root)
    config = build_config(args)
    model = ViTMAEForImageClassification(
        config, len(train_files.classes), args.global_pool, args.drop_path, probe_head=args.linear_probe
    )
    origin = "from scratch"
    if args.path_to_pretrained_mae_weights is not None:
        loaded = load_pretrained_encoder(model, args.path_to_pretrained_mae_weights)
        origin = f"{loaded.describe()}, from {args.path_to_pretrained_mae_weights}"
    if args.linear_probe:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    elif args.finetune_blocks is not None:
        model.set_trainable_blocks(args.finetune_blocks)

    # Data: augmentation, mixing and drop path are functions of (seed, epoch, index)
    train_data, mixing = build_training_data(train_files, model, args)
    eval_data = build_eval_data(val_files, config, args)
    sampler = StepSampler(
        len(train_data),
        micro_batch_size(args),
        accumulation_steps=args.gradient_accumulation_steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        seed=args.seed,
    )
    num_workers = cap_workers(args.num_workers)
    loader = build_training_loader(train_data, sampler, num_workers, device.type == "cuda", mixing)
    eval_loader = build_eval_loader(eval_data, micro_batch_size(args), num_workers, *process_slice(accelerator))

    # Optimizer
    peak_learning_rate = args.learning_rate
    if peak_learning_rate is None:
        peak_learning_rate = scaled_lr(args.base_learning_rate, sampler.images_per_step)
    describe_run(accelerator, args, model, sampler, peak_learning_rate, train_files, val_files, num_workers, origin)
    optimizer = build_optimizer(model, peak_learning_rate, args)
    if device.type == "cpu" and accelerator.mixed_precision == "bf16":
        model.unfuse_attention()
    average = ModelEmaV3(model.to(device), decay=args.ema_decay) if args.ema_decay else None
    model.activation_checkpointing = args.activation_checkpointing
    compile_in_place(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    bare_model = accelerator.unwrap_model(model)
    compute_loss = SoftTargetCrossEntropy()

    # Resume: the whole state, or a clear refusal
    config_record = {
        "architecture": "ViTMAEForImageClassification",
        "config": {k: v for k, v in dataclasses.asdict(config).items() if not k.startswith(("decoder", "norm_pix"))},
        "num_classes": len(train_files.classes),
        "global_pool": args.global_pool,
        "class_names": list(train_files.classes),
        "image_mean": args.mean,
        "image_std": args.std,
    }
    identity = {
        "effective_batch_size": sampler.images_per_step,
        "num_images": len(train_data),
        "data": train_files.fingerprint(),
        "seed": args.seed,
        "linear_probe": args.linear_probe,
        "finetune_blocks": args.finetune_blocks,
        "ema_decay": args.ema_decay,
    }
    first_epoch, step, best, row = 0, 0, -1.0, {}
    if start.resume_from is not None:
        state = resume(
            accelerator,
            start.resume_from,
            config_record,
            identity,
            average=average and average.module,
            keeps_best=True,
        )
        first_epoch, step, row = state["epoch"], state["step"], state["row"]
        if (experiment / BEST_CHECKPOINT).exists():  # else the run goes on under another name, without the best so far
            best = state["best"]
    total_steps = args.epochs * sampler.steps_per_epoch

    # Records: one run at a time in this folder
    log = start_records(accelerator, start, args, step)
    bad_files = BadFiles(experiment, len(train_data), args.max_bad_fraction)
    skipped_steps = SkippedSteps(
        experiment, lambda step: [train_files.path(i) for i in sampler.images_of(step)], args.max_nonfinite_steps
    )
    checkpoints = Checkpoints(accelerator, experiment, args.keep_checkpoints)
    interruptions = Interruptions(accelerator, checkpoints, args.save_minutes)
    spacing = max(1, len(eval_data) // NUM_PICTURES)
    shown = list(range(0, len(eval_data), spacing))[:NUM_PICTURES]

    def save(epoch: int, row: dict, *, epoch_ends: bool = False, for_good: bool = False) -> bool:
        """Save after `epoch` complete epochs; `row` is one that waits for its evaluation."""
        state = identity | {"epoch": epoch, "step": step, "best": best, "row": row}
        weights_average = average and average.module
        return checkpoints.save(
            model, config_record, state, epoch_ends=epoch_ends, for_good=for_good, average=weights_average
        )

    # Every validation image is decoded once now, because one that cannot be would stop the run at its first evaluation
    if start.resume_from is None:
        for _ in eval_loader:
            pass

    # The loop
    model.train()
    bar = build_bar(accelerator, total_steps, step)
    clock = StepClock(say)
    sums = torch.zeros(2, device=device)  # of this step: loss, and images whose strongest target was the top answer
    pending = []  # of each step since the last row, and whether it was left out; on the device
    figures: dict[str, float] = {}
    saved = True
    for epoch in range(first_epoch, args.epochs):
        sampler.set_epoch(epoch, first_step=step - epoch * sampler.steps_per_epoch)
        evaluates = (epoch + 1) % args.eval_interval == 0 or epoch + 1 == args.epochs
        saves = (epoch + 1) % args.save_checkpoint_interval == 0 or epoch + 1 == args.epochs
        for batch in clock.watch(loader):
            bad_files.note(batch.bad_files)
            images = batch.images.to(device, non_blocking=True)  #    (N, C, H, W), normalised
            targets = batch.labels.to(device, non_blocking=True)  #   (N, K)
            noise = batch.noise.to(device, non_blocking=True)  #      (N, 2 * depth), or (N, 0)
            learning_rate = cosine_lr(
                step,
                peak=peak_learning_rate,
                warmup_steps=args.warmup_epochs * sampler.steps_per_epoch,
                total_steps=total_steps,
                minimum=args.min_learning_rate,
            )
            set_learning_rate(optimizer, learning_rate)
            with accelerator.accumulate(model):
                scores = model(images, noise)  #                      (N, K)
                loss = compute_loss(scores.float(), targets)
                accelerator.backward(nan_guard(loss))
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
                    skipped = skip_nonfinite(optimizer, grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            hits = (scores.argmax(dim=1) == targets.argmax(dim=1)).float().mean()
            sums += torch.stack([loss.detach(), hits]) / args.gradient_accumulation_steps
            if not accelerator.sync_gradients:
                continue

            # An optimizer step is complete
            step += 1
            if average is not None:
                average.update(bare_model)
            pending.append(torch.stack([*sums, skipped]))
            sums.zero_()
            bar.update()
            request = interruptions.agree()
            epoch_ends = step == (epoch + 1) * sampler.steps_per_epoch
            if step > 1 and step % args.log_interval and not epoch_ends and request == GO_ON:
                continue

            # Row: figures cross to the host here and nowhere else
            window = accelerator.reduce(torch.stack(pending), "mean").cpu()  # (steps, 3)
            pending.clear()
            finite = window[:, 2] == 0
            training_loss, hits = window[finite, :2].mean(dim=0).tolist()
            skipped_steps.note(accelerator, (~finite).tolist(), step, bar.write)
            row = {
                "step": step,
                "epoch": step / sampler.steps_per_epoch,
                "training_loss": training_loss if finite.any() else None,
                "training_top1_acc": 100 * hits if finite.any() else None,
                "learning_rate": learning_rate,
                **clock.read(accelerator.num_processes),
                "memory_gb": peak_memory_gb(device),
                "bad_files": bad_files.share(accelerator, bar.write),
                "nonfinite_steps": skipped_steps.count,
            }
            bar.set_postfix_str(
                f"loss {training_loss:.4f}, lr {learning_rate:.1e}, {row['images_per_second']:.0f} images/s, "
                f"{row['data_wait_fraction']:.0%} waiting for data"
                + (f", top-1 {figures['testing_top1_acc']:.2f} %, best {best:.2f} %" if figures else ""),
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
            candidates = {"testing": bare_model} | ({} if average is None else {"ema_testing": average.module})
            try:
                figures = {}
                for prefix, candidate in candidates.items():
                    broadcast_buffers(accelerator, candidate)
                    evaluation = evaluate(accelerator, candidate, eval_loader, args, interruptions.watch)
                    figures |= evaluation.figures(prefix)
            except Interrupted:
                interruptions.leave(log, bar, save(epoch, row), step)
                return {}
            row |= figures
            for prefix, candidate in candidates.items():
                if figures[f"{prefix}_top1_acc"] > best:
                    kept = {key: figures[f"{prefix}_{key}"] for key in ("loss", "top1_acc", "top5_acc")}
                    record = config_record | {"epoch": epoch + 1, "moving_average": prefix != "testing"}
                    if checkpoints.save_weights(candidate, BEST_CHECKPOINT, record | {"testing": kept}):
                        best = kept["top1_acc"]
        log.write(row)
        if saves:
            picture = experiment / "predictions" / f"epoch_{epoch + 1}.png"
            draw_predictions(accelerator, bare_model, eval_data, shown, args, picture)
            log.picture("predictions", picture, step)
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
        figures = evaluate(accelerator, bare_model, eval_loader, args).figures()
    checkpoints.finish(step)
    say(f"checkpoints     {experiment / BEST_CHECKPOINT} (top-1 {best:.2f} %), {experiment / LAST_CHECKPOINT}")
    report(accelerator, figures)
    if not args.demo:
        accelerator.end_training()
    return figures


@torch.no_grad()
def draw_predictions(
    accelerator: Accelerator,
    model: ViTMAEForImageClassification,
    data: ImageDataset,
    indices: list[int],
    args: argparse.Namespace,
    path: Path,
) -> None:
    """Draw validation images, each with its class, the answer, and the answer's probability."""
    samples = [data[SampleKey(EVAL_EPOCH, index)] for index in indices]
    images = normalize(torch.stack([sample.image for sample in samples]).to(accelerator.device), args.mean, args.std)
    model.eval()
    with accelerator.autocast():
        probabilities, answers = model(images).float().softmax(dim=1).max(dim=1)
    model.train()
    if accelerator.is_main_process:
        names = [describe_class(name) for name in data.files.classes]
        title = "validation images, and what they are taken for"
        captions = [
            f"{'right' if answer == sample.label else 'wrong'}: {names[answer]} {probability:.0%}"
            for sample, answer, probability in zip(samples, answers.tolist(), probabilities.tolist(), strict=True)
        ]
        save_picture(draw_rows({title: denormalize(images, args.mean, args.std)}, {title: captions}), path)


def describe_run(
    accelerator: Accelerator,
    args: argparse.Namespace,
    model: ViTMAEForImageClassification,
    sampler: StepSampler,
    learning_rate: float,
    train_files: FileList,
    val_files: FileList,
    num_workers: int,
    origin: str,
) -> None:
    """Print what decides the result, before any long work."""
    num_processes, passes = accelerator.num_processes, args.gradient_accumulation_steps
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rate = f"{learning_rate:.2e}"
    if args.learning_rate is None:
        rate += f" = {args.base_learning_rate:.2e} x {sampler.images_per_step} / 256"
    decays = args.layer_decay < 1 and not args.linear_probe
    lines = {
        "model": f"{total:,} parameters, {trainable:,} of them trained, {model.global_pool} feature, "
        f"{model.config.image_hw[0]} x {model.config.image_hw[1]} pixels",
        "start": origin,
        "training": train_files.describe(),
        "validation": val_files.describe(),
        "effective batch": f"{sampler.images_per_step} = {num_processes} processes x {passes} forward passes "
        f"x {sampler.micro_batch_size} images",
        "learning rate": rate + (f", times {args.layer_decay:g} for each layer down" if decays else ""),
        "schedule": f"{args.epochs} epochs of {sampler.steps_per_epoch:,} steps, warmup {args.warmup_epochs:g} epochs",
        "augmentation": "crops and flips alone"
        if args.linear_probe
        else f"RandAugment {args.random_aug_magnitude}, erasing {args.random_erasing:g}, mixup "
        f"{args.mixup_alpha:g}, CutMix {args.cutmix_alpha:g}, smoothing {args.label_smoothing:g}, drop path "
        f"{args.drop_path:g}",
        "decoder": "Pillow",
        "runs on": describe_processes(accelerator, num_workers, args.num_workers),
    }
    if len(train_files) < sampler.images_per_step:
        lines["note"] = repetition_note(len(train_files), sampler.images_per_step)
    if sampler.micro_batch_size == 1 and args.mixup_alpha + args.cutmix_alpha > 0:
        lines["mixing"] = "none, because a forward pass is of one image"
    for name, text in lines.items():
        accelerator.print(f"{name:<16}{text}")


def compare_with_scratch(args: argparse.Namespace) -> None:
    """Train the same model twice, from random weights and from the demo's encoder, as suits each, and compare."""
    scratch = argparse.Namespace(**vars(args) | DEMO_SCRATCH_RECIPE)
    scratch.path_to_pretrained_mae_weights = None
    scratch.experiment_name = f"{args.experiment_name}_from_scratch"
    runs = {"from scratch": main(scratch)}
    runs |= {"from the demo's pretraining": main(args)} if runs["from scratch"] else {}
    if not all(runs.values()) or len(runs) < 2:  # stopped by a signal
        return
    accelerator = build_accelerator(args.gradient_accumulation_steps)
    accelerator.print(f"\nTop-1 on unseen scenes of ten kinds, after {args.epochs} epochs on the same scenes:")
    for name, figures in runs.items():
        accelerator.print(f"  {name:<32}{figures['testing_top1_acc']:6.2f} %")
    accelerator.end_training()


if __name__ == "__main__":
    arguments = parse_args()
    compare_with_scratch(arguments) if arguments.demo else main(arguments)
