"""Finetune a pretrained encoder under UperNet to label every pixel, or evaluate a segmenter (paper, appendix A.4).

Try it, after the demo of pretrain_mae.py:
    accelerate launch finetune_segmentation.py --demo
ADE20K, ViT-B/16, MMSegmentation's recipe, effective batch 16, on one GPU (published with --rel_pos_bias as well):
    accelerate launch finetune_segmentation.py --path_to_data ADE20K --path_to_backbone_checkpoint CHECKPOINT_FOLDER
Published: 48.1 mIoU (paper, table 5); 48.13, and 48.70 with several scales and flips, on V100s of 9.96 GB each
(MMSegmentation). This code at that size: not run yet.
"""

import argparse
import dataclasses
import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dataset import (
    ADE20K_CLASS_NAMES,
    ADE20K_NUM_CLASSES,
    DEMO_LABEL_NAMES,
    EVAL_EPOCH,
    IGNORE_INDEX,
    LABEL_COLOURS,
    ADE20KDataset,
    PairList,
    SampleKey,
    SegmentationTransform,
    StepSampler,
    build_eval_loader,
    build_training_loader,
    check_pairs,
    collate_lists,
    fit_within,
    keep_size,
    label_table,
    list_pairs,
    normalize,
    resize_image,
    write_demo_data,
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
from upernet import NORMS, resize, slide_inference
from utils import (
    BEST_CHECKPOINT,
    LAST_CHECKPOINT,
    BadFiles,
    ConfusionMatrix,
    HelpFormatter,
    StepClock,
    add_run_flags,
    build_accelerator,
    build_bar,
    cap_workers,
    check_run_flags,
    colour_classes,
    compile_in_place,
    describe_processes,
    draw_legend,
    draw_rows,
    find_checkpoints,
    micro_batch_size,
    open_experiment,
    peak_memory_gb,
    poly_lr,
    repetition_note,
    report,
    resume,
    save_checkpoint,
    save_weights,
    set_aside,
    set_learning_rate,
    share_buffers,
    share_of,
    start_records,
    stop_not_finite,
    weights_are_finite,
    write_json,
)

# MMSegmentation's recipe for MAE and UperNet on ADE20K, which is the paper's.
RECIPE = dict(
    experiment_name="ADE20K_UperNet",
    img_size=[512],
    iterations=160_000,
    warmup_iterations=1500,
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
    warmup_iterations=50,
    eval_interval=2,
    save_checkpoint_interval=6,
    per_gpu_batch_size=16,
    learning_rate=2e-3,
    layer_decay=0.75,
    num_workers=1,
)
ADAM_BETAS = (0.9, 0.999)
SCALE_FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of a test with several scales
NUM_PICTURES = 4
PICTURE_SIDE = 256
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
    labels.add_argument("--num_classes", type=int, default=ADE20K_NUM_CLASSES)
    labels.add_argument(
        "--ignore_zero",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="0 in a label map is no class, and 1 is the first, as in ADE20K",
    )
    labels.add_argument(
        "--resize_to",
        type=int,
        nargs=2,
        metavar=("LONG", "SHORT"),
        help="images fit into this before the random factor (default: 4 and 1 times --img_size)",
    )
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--iterations", type=int, help="optimizer steps; --epochs, where given, counts instead")
    recipe.add_argument("--warmup_iterations", type=int, help="optimizer steps of linear warmup")
    recipe.add_argument("--learning_rate", type=float, default=1e-4, help="the peak, at an effective batch of 16")
    recipe.add_argument("--layer_decay", type=float, default=0.65, help="each layer's learning rate / the next one's")
    recipe.add_argument("--drop_path", type=float, default=0.1, help="rate of the last block, rising linearly from 0")
    recipe.add_argument("--auxiliary_weight", type=float, default=0.4, help="of the auxiliary head's loss")
    recipe.add_argument("--eval_interval", type=int, default=10, help="epochs between evaluations")
    test = parser.add_argument_group("test")
    test.add_argument("--eval_only", action="store_true", help="evaluate a segmenter and stop")
    test.add_argument(
        "--slide",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="score by overlapping windows of --img_size, two thirds of it apart; else whole images",
    )
    test.add_argument("--multi_scale", action="store_true", help="average over six sizes, 0.5 to 1.75")
    test.add_argument("--window_batch_size", type=int, default=16, help="windows scored at once")
    test.add_argument("--flip", action="store_true", help="average over the image and its mirror image")
    parser.set_defaults(**RECIPE)

    given = parser.parse_known_args(argv)[0]
    if given.demo:
        parser.set_defaults(**DEMO_RECIPE)
        checkpoints = find_checkpoints(Path(given.working_directory) / "demo")
        if checkpoints:
            parser.set_defaults(path_to_backbone_checkpoint=str(checkpoints[max(checkpoints)]))
        elif not given.path_to_backbone_checkpoint and not given.from_scratch:
            parser.error("--demo starts from the demo pretraining: first run accelerate launch pretrain_mae.py --demo")
        given = parser.parse_known_args(argv)[0]
    set_size_defaults(parser, given)
    args = parser.parse_args(argv)

    if args.path_to_data is None and not args.demo:
        parser.error("give --path_to_data FOLDER with images/ and annotations/, each with training/ and validation/")
    if args.path_to_backbone_checkpoint is None and not args.from_scratch:
        parser.error("give --path_to_backbone_checkpoint CHECKPOINT to start from, or --from_scratch to do without")
    if args.eval_only and args.from_scratch:
        parser.error("--eval_only judges weights: give --path_to_backbone_checkpoint, and leave --from_scratch out")
    check_run_flags(parser, args)
    for name, low, high in (("layer_decay", 0, 1), ("drop_path", 0, 0.99), ("auxiliary_weight", 0, 10)):
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name} must lie between {low} and {high}, and is {getattr(args, name)}")
    for name in ("eval_interval", "iterations", "window_batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.norm == "batch" and micro_batch_size(args) < 2 and not args.eval_only:
        parser.error(
            "batch norm over a map pooled to one cell needs two images in a forward pass, and there is one: raise "
            "--per_gpu_batch_size, lower --gradient_accumulation_steps, or take --norm group"
        )
    try:
        config = build_config(args)
        if args.taps is None:
            args.taps = default_taps(config.encoder_depth)
        label_table(args.num_classes, args.ignore_zero)
    except ValueError as error:
        parser.error(str(error))
    if args.resize_to is None:
        args.resize_to = [4 * max(config.image_hw), min(config.image_hw)]
    return args


def set_size_defaults(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Take the encoder's sizes from the checkpoint, or from --model; the image size is the recipe's."""
    names = (*SIZE_FLAGS, "patch_size")
    if given.path_to_backbone_checkpoint is None or given.from_scratch:
        sizes = dataclasses.asdict(MODEL_CONFIGS[given.model or "mae_vit_base_patch16"])
        if given.path_to_backbone_checkpoint is not None:  # the same sizes, to compare with
            sizes = dataclasses.asdict(MAEConfig(**read_sizes(given.path_to_backbone_checkpoint)["config"]))
        parser.set_defaults(**{name: sizes[name] for name in names})
        return
    source = given.path_to_backbone_checkpoint
    if given.model is not None:
        parser.error(f"--model is for --from_scratch; the sizes come with {source}")
    record = read_sizes(source)
    sizes = dataclasses.asdict(MAEConfig(**record["config"]))
    for name in names:
        if getattr(given, name) not in (None, sizes[name]):
            parser.error(f"--{name} {getattr(given, name)}, but {source} has {sizes[name]}; leave the flag out")
    parser.set_defaults(**{name: sizes[name] for name in names}, input_channels=sizes["input_channels"])
    if "image_mean" in record:
        parser.set_defaults(mean=list(record["image_mean"]), std=list(record["image_std"]))
    if given.eval_only:
        size = sizes["img_size"]
        parser.set_defaults(
            img_size=[size] if isinstance(size, int) else list(size),
            **{name: record[name] for name in ("num_classes", "ignore_zero", "resize_to") if name in record},
        )


def build_config(args: argparse.Namespace) -> MAEConfig:
    sizes = {name: getattr(args, name) for name in (*SIZE_FLAGS, "patch_size", "img_size", "input_channels")}
    return MAEConfig(**sizes, norm_pix_loss=False)


# ------------------------------------------------------------------------------------------------ evaluation


def predict(model: ViTMAEForSegmentation, images: list[Tensor], args: argparse.Namespace) -> list[Tensor]:
    """Label every pixel of images of any sizes, uint8 (C, H, W) each -> int64 (H, W) each.

    Images are resized as in MMSegmentation's test (ratio kept), scored whole or by windows, and the scores are brought
    back to the images' own size. Several scales and flips average probabilities.
    """
    factors, mirrors = (SCALE_FACTORS if args.multi_scale else (1.0,)), ((False, True) if args.flip else (False,))
    crop, score_windows = model.backbone.config.image_hw, functools.partial(score_cells, model)
    totals: list = [0.0] * len(images)
    for factor in factors:
        long_side, short_side = (factor * side for side in args.resize_to)
        if args.slide and args.multi_scale:  # as published: no scale smaller than a window
            long_side, short_side = math.inf, max(short_side, *crop)
        sizes = [fit_within(*image.shape[-2:], long_side, short_side) for image in images]
        resized = [resize_image(image, size) for image, size in zip(images, sizes, strict=True)]
        inputs = [normalize(image[None], args.mean, args.std)[0] for image in resized]
        for mirror in mirrors:
            views = [image.flip(-1) for image in inputs] if mirror else inputs
            if args.slide:
                stride = tuple(2 * side // 3 for side in crop)
                scores = slide_inference(score_windows, views, crop, stride, args.window_batch_size)
            else:
                scores = [score_whole(model, view) for view in views]
            for index, score in enumerate(scores):
                score = score.flip(-1) if mirror else score
                score = resize(score[None], size=images[index].shape[-2:])[0]  # (K, H, W)
                totals[index] = totals[index] + (score.softmax(dim=0) if len(factors) * len(mirrors) > 1 else score)
    return [total.argmax(dim=0) for total in totals]


def score_cells(model: ViTMAEForSegmentation, images: Tensor) -> Tensor:
    """Score every pixel: normalised (N, C, H, W) -> float32 (N, K, H, W)."""
    return resize(model(images).logits.float(), size=images.shape[-2:])


def score_whole(model: ViTMAEForSegmentation, image: Tensor) -> Tensor:
    """Score an image of any size at once, padded to whole patches: normalised (C, H, W) -> (K, H, W)."""
    height, width = image.shape[-2:]
    patch = 2 * model.backbone.config.patch_size  # twice, because the pyramid halves the grid
    padded = F.pad(image, (0, -width % patch, 0, -height % patch))
    return score_cells(model, padded[None])[0, :, :height, :width]


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: ViTMAEForSegmentation, loader: DataLoader, args: argparse.Namespace
) -> ConfusionMatrix:
    """Label every validation image once, at its own size, and count the pixels over all processes."""
    was_training = model.training
    model.eval()
    confusion = ConfusionMatrix(args.num_classes, accelerator.device, IGNORE_INDEX)
    for batch in loader:
        with accelerator.autocast():
            answers = predict(model, [image.to(accelerator.device) for image in batch.images], args)
        for labels, answer in zip(batch.labels, answers, strict=True):
            confusion.update(labels, answer)
    model.train(was_training)
    if share_of(accelerator)[1] > 1:
        confusion.reduce(accelerator)
    return confusion


def class_names_of(args: argparse.Namespace) -> list[str]:
    if args.num_classes == ADE20K_NUM_CLASSES:
        return list(ADE20K_CLASS_NAMES)
    if args.demo:
        return list(DEMO_LABEL_NAMES[1:])
    return [f"class {index}" for index in range(args.num_classes)]


def write_table(confusion: ConfusionMatrix, names: list[str], file: Path) -> None:
    """Write a row for each class: its share of the pixels and its scores in percent."""
    set_aside(file)
    counts, scores = confusion.counts.cpu(), confusion.per_class()
    shares = 100 * counts.sum(dim=1).double() / counts.sum()
    lines = ["class\tname\tpixels_percent\tiou\tacc\tdice"]
    for index, name in enumerate(names):
        cells = [f"{values[index].item():.2f}" for values in (shares, *scores.values())]
        lines.append("\t".join([str(index), name, *cells]))
    file.write_text("\n".join(lines) + "\n")


@torch.no_grad()
def draw_predictions(
    accelerator: Accelerator, model: ViTMAEForSegmentation, data: ADE20KDataset, args: argparse.Namespace, path: Path
) -> None:
    """Draw validation images, their label maps and the model's, with the names of all classes; every process calls."""
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
        return F.interpolate(picture[None].float(), (PICTURE_SIDE, PICTURE_SIDE), mode="nearest")[0]

    rows = {
        "image": torch.stack([fit(sample.image / 255) for sample in samples]),
        "label (black is ignored)": torch.stack([fit(colour_classes(s.label, LABEL_COLOURS)) for s in samples]),
        "prediction": torch.stack([fit(colour_classes(answer, LABEL_COLOURS)) for answer in answers]),
    }
    picture, names = draw_rows(rows), class_names_of(args)
    shown = torch.cat([x.flatten().long() for x in (*answers, *(sample.label for sample in samples))]).unique().tolist()
    legend = draw_legend({names[k]: tuple(LABEL_COLOURS[k]) for k in shown if k != IGNORE_INDEX}, picture.width)
    canvas = Image.new("RGB", (picture.width, picture.height + legend.height), "white")
    canvas.paste(picture, (0, 0))
    canvas.paste(legend, (0, picture.height))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def run_evaluation(args: argparse.Namespace) -> dict[str, float]:
    """Do what --eval_only asks for, and write two files beside the weights."""
    accelerator = build_accelerator(1)
    weights = find_weights(args.path_to_backbone_checkpoint)
    model, _ = load_segmenter(weights)
    _, val_data = build_data(accelerator, args, model)
    num_workers = cap_workers(args.num_workers)
    loader = build_eval_loader(val_data, micro_batch_size(args), num_workers, *share_of(accelerator), collate_lists)
    accelerator.print(f"{'evaluating':<16}{weights} on {val_data.files.describe()}")
    confusion = evaluate(accelerator, model.to(accelerator.device), loader, args)
    figures = confusion.figures()
    if accelerator.is_main_process:
        files = [weights.parent / name for name in ("evaluation.json", "per_class.tsv")]
        set_aside(files[0])
        write_json(files[0], figures | {"weights": str(weights), "num_images": len(val_data)})
        write_table(confusion, class_names_of(args), files[1])
        accelerator.print(f"{'written':<16}{', '.join(file.name for file in files)} in {weights.parent}")
    report(accelerator, figures)
    accelerator.end_training()
    return figures


# ------------------------------------------------------------------------------------------------ training


def build_data(
    accelerator: Accelerator, args: argparse.Namespace, model: ViTMAEForSegmentation
) -> tuple[ADE20KDataset, ADE20KDataset]:
    """Pair and check images and label maps; training ones augmented, validation ones at their own size."""
    table = label_table(args.num_classes, args.ignore_zero)
    lists = [list_pairs(args.path_to_data, split) for split in ("training", "validation")]
    with accelerator.local_main_process_first():
        for pairs in lists:
            check_pairs(pairs, table, cap_workers(args.num_workers), Path(args.working_directory) / "file_lists")
    config = model.backbone.config
    augment = SegmentationTransform(config.image_hw, args.mean, args.std, *args.resize_to)
    common = dict(seed=args.seed, channels=args.input_channels)
    train_data = ADE20KDataset(lists[0], augment, table, noise_size=model.noise_size, **common)
    return train_data, ADE20KDataset(lists[1], keep_size, table, replace_bad_files=False, **common)


def compute_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy at the labels' size, (N, K, h, w) and (N, H, W): the sum over labelled pixels / all pixels.

    As in MMSegmentation, whose mean is over all pixels. So a crop without a label is 0 and not 0/0, and accumulated
    passes add up to the loss of the whole batch.
    """
    scores = resize(scores.float(), size=labels.shape[-2:])
    return F.cross_entropy(scores, labels, ignore_index=IGNORE_INDEX, reduction="sum") / labels.numel()


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
    accelerator = build_accelerator(args.gradient_accumulation_steps)
    say, device = accelerator.print, accelerator.device
    experiment, resume_from = open_experiment(args)
    set_seed(args.seed)

    # Model: the pretrained encoder under a new neck and new heads
    config = build_config(args)
    options = dict(taps=args.taps, channels=args.channels, norm=args.norm, rel_pos_bias=args.rel_pos_bias)
    model = ViTMAEForSegmentation(config, args.num_classes, drop_path_rate=args.drop_path, **options)
    start = "from scratch"
    if not args.from_scratch:
        loaded = load_pretrained_encoder(model.backbone, args.path_to_backbone_checkpoint)
        start = f"{loaded.describe()}, from {args.path_to_backbone_checkpoint}"

    # Data: augmentation, drop path and dropout are functions of (seed, epoch, index)
    train_data, val_data = build_data(accelerator, args, model)
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
    val_loader = build_eval_loader(val_data, eval_batch_size, num_workers, *share_of(accelerator), collate_lists)
    total_steps = args.iterations if args.epochs is None else args.epochs * sampler.steps_per_epoch
    num_epochs = math.ceil(total_steps / sampler.steps_per_epoch)

    # Optimizer
    groups = param_groups_layer_decay(
        model, args.weight_decay, no_weight_decay_list=model.no_weight_decay(), layer_decay=args.layer_decay
    )
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=ADAM_BETAS, fused=True)
    describe_run(accelerator, args, model, sampler, total_steps, train_data.files, val_data.files, num_workers, start)
    if args.norm == "batch" and accelerator.num_processes > 1:
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        else:
            say("batch norm      not synchronised: torch has no such layer for the CPU; each process has its own")
    compile_in_place(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    bare_model = accelerator.unwrap_model(model)

    # Resume: the whole state, or a clear refusal
    config_record = {
        "architecture": "ViTMAEForSegmentation",
        "config": {k: v for k, v in dataclasses.asdict(config).items() if not k.startswith(("decoder", "norm_pix"))},
        "num_classes": args.num_classes,
        "ignore_zero": args.ignore_zero,
        "class_names": class_names_of(args),
        "resize_to": args.resize_to,
        "image_mean": args.mean,
        "image_std": args.std,
        **options,
    }
    identity = {
        "effective_batch_size": sampler.images_per_step,
        "num_images": len(train_data),
        "data": train_data.files.fingerprint(),
        "seed": args.seed,
        "total_steps": total_steps,
    }
    first_epoch, step, best = 0, 0, -1.0
    if resume_from is not None:
        state = resume(accelerator, resume_from, config_record, identity)
        first_epoch, step = state["epoch"], state["step"]
        if (experiment / BEST_CHECKPOINT).exists():  # else the run goes on under another name, without the best so far
            best = state["best"]

    # Records: one run at a time in this folder
    log = start_records(accelerator, experiment, args, resume_from, step)
    bad_files = BadFiles(experiment, len(train_data), args.max_bad_fraction)

    # The loop
    model.train()
    bar = build_bar(accelerator, total_steps, step)
    clock = StepClock()
    sums = torch.zeros(2, device=device)  # of this step: loss of the head, and of the auxiliary head
    pending = []  # of the steps since the last row, left on the device
    figures: dict[str, float] = {}
    for epoch in range(first_epoch, num_epochs):
        sampler.set_epoch(epoch)
        last_step = min(total_steps, (epoch + 1) * sampler.steps_per_epoch)
        evaluates = (epoch + 1) % args.eval_interval == 0 or epoch + 1 == num_epochs
        saves = (epoch + 1) % args.save_checkpoint_interval == 0 or epoch + 1 == num_epochs
        for batch in clock.watch(loader):
            bad_files.note(batch.bad_files)
            images = batch.images.to(device, non_blocking=True)  #    (N, C, H, W), normalised
            labels = batch.labels.to(device, non_blocking=True).long()  # (N, H, W)
            noise = batch.noise.to(device, non_blocking=True)  #      (N, noise_size)
            learning_rate = poly_lr(
                step, peak=args.learning_rate, warmup_steps=args.warmup_iterations, total_steps=total_steps
            )
            set_learning_rate(optimizer, learning_rate)
            with accelerator.accumulate(model):
                logits, auxiliary = model(images, noise)
                losses = torch.stack([compute_loss(logits, labels), compute_loss(auxiliary, labels)])
                accelerator.backward(losses[0] + args.auxiliary_weight * losses[1])
                if accelerator.sync_gradients and args.max_grad_norm > 0:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            sums += losses.detach() / args.gradient_accumulation_steps
            if not accelerator.sync_gradients:
                continue

            # An optimizer step is complete
            step += 1
            pending.append(sums.clone())
            sums.zero_()
            bar.update()
            epoch_ends = step == last_step
            if step > 1 and step % args.log_interval and not (epoch_ends and (evaluates or saves)):
                if epoch_ends:
                    break
                continue

            # Row: figures cross to the host here and nowhere else
            window = accelerator.reduce(torch.stack(pending), "mean")  # (steps, 2)
            pending.clear()
            for index, finite in enumerate(window.isfinite().all(dim=1).tolist()):
                if not finite:
                    bad_step = step - len(window) + index + 1
                    stop_not_finite("loss", bad_step, sampler.steps_per_epoch, learning_rate, experiment)
            throughput = clock.read(accelerator.num_processes)
            row = {
                "step": step,
                "epoch": step / sampler.steps_per_epoch,
                "training_loss": window[:, 0].mean().item(),
                "training_auxiliary_loss": window[:, 1].mean().item(),
                "learning_rate": learning_rate,
                **throughput,
                "memory_gb": peak_memory_gb(device),
                "bad_files": bad_files.share(accelerator, bar.write),
            }
            if epoch_ends and evaluates:
                if not weights_are_finite(accelerator, model):
                    stop_not_finite("model", step, sampler.steps_per_epoch, learning_rate, experiment)
                share_buffers(accelerator, bare_model)
                confusion = evaluate(accelerator, bare_model, val_loader, args)
                figures = confusion.figures()
                row |= figures
                picture = experiment / "predictions" / f"epoch_{epoch + 1}.png"
                draw_predictions(accelerator, bare_model, val_data, args, picture)
                log.picture("predictions", picture, step)
                if figures["testing_miou"] > best:
                    best = figures["testing_miou"]
                    record = config_record | {"epoch": epoch + 1, "testing": figures}
                    save_weights(accelerator, bare_model, experiment / BEST_CHECKPOINT, record)
                    if accelerator.is_main_process:
                        write_table(confusion, class_names_of(args), experiment / BEST_CHECKPOINT / "per_class.tsv")
            bar.set_postfix_str(
                f"loss {row['training_loss']:.4f}, lr {learning_rate:.1e}, {row['images_per_second']:.1f} images/s, "
                f"{row['data_wait_fraction']:.0%} waiting for data"
                + (f", mIoU {figures['testing_miou']:.2f} %, best {best:.2f} %" if figures else ""),
                refresh=False,
            )
            log.write(row)
            if epoch_ends and (evaluates or saves):
                state = identity | {"epoch": epoch + 1, "step": step, "best": best}
                folders = [experiment / LAST_CHECKPOINT] + [experiment / f"checkpoint_{epoch + 1}"] * saves
                for folder in folders:
                    save_checkpoint(accelerator, model, folder, config_record, state)
            clock.restart()
            if epoch_ends:
                break

    # Finish
    bar.close()
    log.close()
    if step != total_steps:
        raise RuntimeError(f"{step} optimizer steps were made instead of {total_steps}: a bug, please report it")
    if not figures:  # a finished run that was started again
        figures = evaluate(accelerator, bare_model, val_loader, args).figures()
    say(f"checkpoints     {experiment / BEST_CHECKPOINT} (mIoU {best:.2f} %), {experiment / LAST_CHECKPOINT}")
    report(accelerator, figures)
    accelerator.end_training()
    return figures


def describe_run(
    accelerator: Accelerator,
    args: argparse.Namespace,
    model: ViTMAEForSegmentation,
    sampler: StepSampler,
    total_steps: int,
    train_pairs: PairList,
    val_pairs: PairList,
    num_workers: int,
    start: str,
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
        "start": start,
        "training": train_pairs.describe(),
        "validation": val_pairs.describe(),
        "labels": f"{args.num_classes} classes, 0 is " + ("ignored" if args.ignore_zero else "the first"),
        "effective batch": f"{sampler.images_per_step} = {accelerator.num_processes} processes x "
        f"{args.gradient_accumulation_steps} forward passes x {sampler.micro_batch_size} images",
        "learning rate": f"{args.learning_rate:.2e}{decays}",
        "schedule": f"{total_steps:,} steps, {sampler.steps_per_epoch:,} an epoch, warmup {args.warmup_iterations:,}",
        "images": f"fit into {args.resize_to[0]} x {args.resize_to[1]}, cropped to "
        f"{model.backbone.config.image_hw[0]} x {model.backbone.config.image_hw[1]}",
        "runs on": describe_processes(accelerator, num_workers, args.num_workers),
    }
    if len(train_pairs) < sampler.images_per_step:
        lines["note"] = repetition_note(len(train_pairs), sampler.images_per_step)
    for name, text in lines.items():
        accelerator.print(f"{name:<16}{text}")


if __name__ == "__main__":
    main(parse_args())
