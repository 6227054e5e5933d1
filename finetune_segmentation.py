"""Finetune a pretrained encoder under UperNet to label every pixel, or evaluate a segmenter (paper, appendix A.4).

Try it, after the demo of pretrain_mae.py:
    accelerate launch finetune_segmentation.py --demo
ADE20K, ViT-B/16, MMSegmentation's recipe, effective batch 16, on one GPU (published with --rel_pos_bias --layer_scale):
    accelerate launch finetune_segmentation.py --path_to_data ADE20K --path_to_backbone_checkpoint CHECKPOINT_FOLDER
Published: 48.1 mIoU (paper, table 5); 48.13, and 48.70 with several scales and flips, on V100s of which each used
9.96 GB (MMSegmentation). This code at that size: not run yet.
"""

import argparse
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable
from pathlib import Path

import storage
import training
from storage.sizes import MODEL_CONFIGS, MAEConfig

# MMSegmentation's recipe for MAE and UperNet on ADE20K. The paper (appendix A.4) trained 100 epochs at a batch of 16,
# where 160,000 iterations are 127, searched the learning rate, and had relative positions (--rel_pos_bias).
RECIPE = dict(
    experiment_name="ADE20K_UperNet",
    img_size=[512],
    save_checkpoint_interval=None,
    per_gpu_batch_size=16,
    weight_decay=0.05,
    max_grad_norm=0.0,
    num_workers=16,
)
# For 500 to 5,000 images (--recipe small): half the batch and a thirtieth of the steps, on crops of half the side. The
# rate is for ViT-Ti and ViT-S, whose peaks are higher than ViT-B's. By these reasons, not measured.
SMALL_RECIPE = dict(
    model="mae_vit_tiny_patch16",
    img_size=[256],
    iterations=5_000,
    per_gpu_batch_size=8,
    learning_rate=3e-4,
    layer_decay=0.75,
    num_workers=8,
)
# For the model and the scenes of pretrain_mae.py --demo.
DEMO_RECIPE = dict(
    experiment_name="demo_segmentation",
    img_size=[64],
    resize_to=[128, 80],
    num_classes=len(storage.DEMO_LABEL_NAMES) - 1,
    ignore_zero=True,
    channels=32,
    epochs=4,
    eval_interval=2,
    save_checkpoint_interval=4,
    per_gpu_batch_size=16,
    learning_rate=2e-3,
    layer_decay=0.75,
    num_workers=1,
)
ADAM_BETAS = (0.9, 0.999)
WARMUP_STEPS = 1500
HEAD_VECTORS = 13  # that neck and heads keep of each cell of the finest map, four cells a patch and side (counted)
NUM_PICTURES = 4
CANDIDATES, VISIBLE_SHARE = 64, 0.01  # label maps that pictures are chosen from; least share of a class that counts
PICTURE_SIDE = 256
LEGEND_NAMES = 24
EVALUATIONS = 10  # in a run, where --eval_interval does not say otherwise
MODEL_FLAGS = ("taps", "channels", "norm", "rel_pos_bias", "layer_scale")
SEGMENTER_FLAGS = (*MODEL_FLAGS, "num_classes")  # what a segmenter is, beside its encoder's sizes
BASE = "mae_vit_base_patch16"
LOSSES = ("cross_entropy", "dice", "focal", "cross_entropy+dice", "focal+dice")
FOCAL_GAMMA = 2.0  # Lin et al. 2017, section 5.1
ONE_CLASS = "for one class before a background give 2, with --no-ignore_zero where the background is 0"
FLAGS = {
    "model": [
        ("path_to_backbone_checkpoint", str, "checkpoint folder, .safetensors, .pth, or hf:OWNER/NAME"),
        ("from_scratch", False, "start from random weights, for comparison"),
        ("model", str, f"sizes from scratch (default: {BASE})", {"choices": MODEL_CONFIGS}),
        ("patch_size", int, "(default: the checkpoint's or the model's)"),
        *training.size_flags(MAEConfig, ("encoder",), "likewise"),
        ("taps", int, "0-based blocks that feed the pyramid (default: 3 5 7 11 of 12)", {"nargs": 4}),
        ("channels", int, "width of the head (default: the encoder's)", (1, None)),
        ("norm", "batch", "of the heads; group works with one image a pass", {"choices": ("batch", "group")}),
        ("rel_pos_bias", False, "add relative positions to the attention, at zero, as the paper"),
        ("layer_scale", False, "scale each branch of a block by a trained vector, at one, as MMSegmentation"),
    ],
    "labels": [
        ("num_classes", storage.ADE20K_NUM_CLASSES, "that a pixel can be of", (2, 255, ONE_CLASS)),
        (
            "ignore_zero",
            bool,
            "0 in a label map is no class, 1 is the first (default: with ADE20K; else by the values)",
        ),
        ("label_values", str, "classes by value or colour: 0=background,255=cell or #rrggbb=NAME,...; or a file"),
        ("class_names", str, "file with a name on every line (default: ADE20K's for its 150)"),
        ("resize_to", int, "long and short side that images fit into (default: 4 and 1 --img_size)", {"nargs": 2}),
    ],
    "layout": [
        ("annotation_column", str, "of label maps in a data set of the Hub (default: told by its name)"),
        ("image_folder", str, "of images, below the root; {split} in it is train, val, ... (default: as documented)"),
        ("label_folder", str, "of label maps, likewise (default: that of the images, with --label_suffix)"),
        ("image_suffix", "", "what names of images end in beside those of label maps, such as _img (default: nothing)"),
        ("label_suffix", "", "what names of label maps end in, likewise, such as _mask or .png (default: nothing)"),
    ],
    "recipe": [
        ("recipe", "paper", "MMSegmentation's; small is for 500 to 5,000 images", {"choices": ("paper", "small")}),
        ("iterations", 160_000, "optimizer steps; --epochs, where given, counts instead", (1, None)),
        ("warmup_iterations", int, "steps of linear warmup (default: 1500, or a tenth of a shorter run)", (0, None)),
        ("learning_rate", 1e-4, "the peak; MMSegmentation's for a batch of 16", (0, 1)),
        ("layer_decay", 0.65, "each layer's learning rate / the next one's, as MMSegmentation", (0, 1)),
        ("drop_path", 0.1, "rate of the last block, rising linearly from 0, as MMSegmentation", (0, 0.99)),
        ("auxiliary_weight", 0.4, "of the auxiliary head's loss, as MMSegmentation", (0, 10)),
        ("eval_interval", int, "epochs between evaluations (default: a tenth of the run)", (1, None)),
        ("loss", "cross_entropy", "of both heads; of two, the sum", {"choices": LOSSES}),
        ("class_weights", str, "in the loss: balanced (inverse frequency), numbers, or a file", {"nargs": "+"}),
    ],
    "test": [
        ("eval_only", False, "evaluate a segmenter and stop"),
        ("slide", True, "score by windows of --img_size, two thirds of it apart; else whole images"),
        ("multi_scale", False, "average over six sizes, 0.5 to 1.75"),
        ("flip", False, "average over the image and its mirror image"),
        ("window_batch_size", 16, "windows, or whole images, scored at once", (1, None)),
        ("test_split", str, "folder beside training/ and validation/ on which the best weights are scored at the end"),
    ],
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    flags = training.Flags(__doc__, FLAGS)
    given = flags.parse(argv)

    # Defaults: the checkpoint's, then the recipe's; what is given by flag wins over both
    source, evaluates = given.get("path_to_backbone_checkpoint"), given.get("eval_only", False)
    if given.get("demo") and source is None and not given.get("from_scratch"):
        source = flags.find_demo_weights(given)
    if source is not None and "model" in given:
        flags.error(f"--model is for --from_scratch without a checkpoint; the sizes come with {source}")
    record = read_sizes(source) if source else {}
    small = SMALL_RECIPE if given.get("recipe") == "small" else {}
    config = MAEConfig(**record["config"]) if source else MODEL_CONFIGS[given.get("model", small.get("model", BASE))]
    sizes = flags.size_defaults(given, record, dataclasses.asdict(config), source)
    if not evaluates:  # the image size is the recipe's
        sizes.pop("img_size", None)
    elif source and not given.get("from_scratch"):
        if record.get("architecture") != ViTMAEForSegmentation.__name__:
            flags.error(f"--eval_only judges a segmenter, and {source} is none; give a checkpoint of this script")
        record.setdefault("layer_scale", False)  # which checkpoints before it do not have
        sizes |= {name: record[name] for name in (*SEGMENTER_FLAGS, "ignore_zero", "resize_to", "class_names")}
        sizes["label_values"] = None if "ignore_zero" in given else record.get("label_values")
    if "label_values" in given:
        try:
            sizes |= storage.read_label_flags(given, record.get("class_names") if evaluates else None)
        except ValueError as error:
            flags.error(str(error))
    demo = DEMO_RECIPE if given.get("demo") else {}
    args = flags.complete(given, RECIPE, small, demo, {"path_to_backbone_checkpoint": source}, sizes)

    # Refusals
    if args.demo and args.eval_only:
        flags.error(
            "--demo trains; to evaluate what it left, leave it out and give --path_to_data "
            f"{Path(args.working_directory) / 'demo_data' / 'ADEChallengeData2016'}"
        )
    if args.path_to_data is None and not args.demo:
        flags.error("give --path_to_data FOLDER with images/ and annotations/, each with training/ and validation/")
    if args.label_folder is not None and args.image_folder is None:
        flags.error(f"--label_folder {args.label_folder} says where label maps lie; give --image_folder, too")
    if args.image_folder is not None and not (args.label_folder or args.label_suffix or args.image_suffix):
        flags.error(
            f"--image_folder {args.image_folder} says where images lie; give --label_folder, too, or --label_suffix "
            "for label maps beside them"
        )
    if source is None and not args.from_scratch:
        flags.error("give --path_to_backbone_checkpoint CHECKPOINT to start from, or --from_scratch to do without")
    if args.eval_only and args.from_scratch:
        flags.error("--eval_only judges weights: give --path_to_backbone_checkpoint, and leave --from_scratch out")
    if args.eval_only and args.value_range == "auto":
        flags.error("--value_range auto measures training images; --eval_only has the weights' range: leave it out")
    for name in ("img_size", *SEGMENTER_FLAGS) if args.eval_only else ():
        saved = config.img_size if name == "img_size" else record[name]
        if getattr(args, name) != saved:
            flags.error(f"--{name} {getattr(args, name)}, but {source} has {saved}; leave the flag out")
    if args.resize_to is not None and not args.resize_to[0] >= args.resize_to[1] >= 1:
        flags.error(f"--resize_to takes a long and a short side, not {' '.join(map(str, args.resize_to))}")
    if args.norm == "batch" and training.micro_batch_size(args) < 2 and not args.eval_only:
        flags.error(
            "batch norm over a map pooled to one cell needs two images in a forward pass, and there is one: raise "
            "--per_gpu_batch_size, lower --gradient_accumulation_steps, or take --norm group"
        )
    if args.test_split in ("training", "validation") or (args.test_split and args.eval_only):
        flags.error(f"--test_split {args.test_split}: after a training, another split than training and validation")
    if args.class_weights is not None and args.loss == "dice":
        flags.error("--class_weights are of cross_entropy and focal; dice counts every class alike: leave them out")
    try:
        args.class_weights = training.read_class_weights(args.class_weights)
        config = build_config(args)
        if min(config.grid_size) < 2:
            raise ValueError(f"--img_size {args.img_size} is less than two patches of {config.patch_size} a side")
        if args.taps is None:
            args.taps = default_taps(config.encoder_depth)
        if args.ignore_zero is None and args.num_classes == storage.ADE20K_NUM_CLASSES:
            args.ignore_zero = True  # else the label maps decide, when they are read
        storage.label_table(args.num_classes, bool(args.ignore_zero), args.label_values)
        drawn = storage.DEMO_LABEL_NAMES[1:] if args.demo else None
        args.class_names = storage.name_classes(args.class_names, args.num_classes, args.ignore_zero, drawn)
        with torch.device("meta"):
            build_model(args)
    except (ValueError, OSError) as error:
        flags.error(str(error))
    if args.resize_to is None:
        args.resize_to = [4 * max(config.image_hw), min(config.image_hw)]
    return args


def build_config(args: argparse.Namespace) -> MAEConfig:
    return MAEConfig.from_flags(args, MAEConfig(norm_pix_loss=False))


# ------------------------------------------------------------------------------------------------ imports

if __name__ == "__main__":  # before the imports that take seconds
    training.check_command(__doc__, FLAGS, parse_args)

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dataset
import utils
from model import ViTMAEForSegmentation, default_taps, load_pretrained_encoder, load_segmenter, read_sizes
from storage import IGNORE_INDEX, LABEL_COLOURS
from storage.labels import count_classes
from upernet import fit_within, predict, resize_matrix, resized_cross_entropy


def build_model(args: argparse.Namespace) -> ViTMAEForSegmentation:
    options = {name: getattr(args, name) for name in MODEL_FLAGS}
    return ViTMAEForSegmentation(build_config(args), args.num_classes, drop_path_rate=args.drop_path, **options)


# ------------------------------------------------------------------------------------------------ evaluation


def label_images(model: ViTMAEForSegmentation, images: list[Tensor], args: argparse.Namespace) -> list[Tensor]:
    """Label every pixel of images of any sizes, uint8 (C, H, W) each -> int64 (H, W) each, as the test flags say."""
    return predict(
        model,
        images,
        normalize=functools.partial(dataset.normalize, mean=args.mean, std=args.std),
        crop_size=model.backbone.config.image_hw,
        patch_size=model.backbone.config.patch_size,
        resize_to=args.resize_to,
        slide=args.slide,
        multi_scale=args.multi_scale,
        flip=args.flip,
        batch_size=args.window_batch_size,
    )


def evaluate(
    accelerator: Accelerator, model: ViTMAEForSegmentation, batches: Iterable[dataset.Batch], args: argparse.Namespace
) -> training.PixelEvaluation:
    """Label every validation image once, at its own size, and count the pixels over all processes."""
    confusion = utils.ConfusionMatrix(args.num_classes, accelerator.device, IGNORE_INDEX)
    with utils.evaluating(model):
        for batch in batches:
            with accelerator.autocast():
                answers = label_images(model, [image.to(accelerator.device) for image in batch.images], args)
            for labels, answer in zip(batch.labels, answers, strict=True):
                confusion.update(labels, answer)
    if training.process_slice(accelerator)[1] > 1:
        confusion.reduce(accelerator)
    return training.PixelEvaluation(confusion, args.class_names)


def choose_samples(data: dataset.ADE20KDataset, count: int) -> list[dataset.Sample]:
    """Give images for pictures that show many classes: each adds the most that those before it do not show.

    Chosen among CANDIDATES label maps spread over the data set, by the classes that fill a visible part of them. Of
    those that add as many the one farthest from those before is taken, as neighbours may be frames of one film.
    """
    spacing, shown, classes = max(1, len(data) // CANDIDATES), set(), {}
    for index in range(0, len(data), spacing)[:CANDIDATES]:
        labels = storage.read_label_map(data.files.label_file(index), data.table)
        counts = torch.bincount(torch.from_numpy(labels).flatten(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
        classes[index] = set((counts > VISIBLE_SHARE * labels.size).nonzero()[:, 0].tolist())
    chosen = []

    def worth(index: int) -> tuple[int, int]:
        return len(classes[index] - shown), min((abs(index - other) for other in chosen), default=0)

    while classes and len(chosen) < count:
        chosen.append(max(classes, key=worth))
        shown |= classes.pop(chosen[-1])
    return [data[dataset.SampleKey(dataset.EVAL_EPOCH, index)] for index in chosen]


def draw_predictions(
    accelerator: Accelerator, model: ViTMAEForSegmentation, samples: list[dataset.Sample], args: argparse.Namespace
) -> Image.Image | None:
    """Draw validation images, their label maps and the model's, with the names of the classes that fill most of them.

    The main process draws; a sharded model answers only when all processes ask, so there every process calls.
    """
    if not accelerator.is_main_process and accelerator.distributed_type not in training.SHARDING:
        return None
    with utils.evaluating(model), accelerator.autocast():
        answers = label_images(model, [sample.image.to(accelerator.device) for sample in samples], args)
    answers = [answer.cpu() for answer in answers]
    if not accelerator.is_main_process:
        return None

    def fit(picture: Tensor, mode: str = "nearest") -> Tensor:
        """Resize a picture (C, H, W) to the height of the others; a very wide one becomes less high."""
        height, width = fit_within(*picture.shape[-2:], 2 * PICTURE_SIDE, PICTURE_SIDE)
        smooth = {} if mode == "nearest" else dict(antialias=True)
        return F.interpolate(picture[None].float(), (height, width), mode=mode, **smooth)[0]

    labels = [sample.label.long() for sample in samples]
    scale = 255 if args.show_channels is None else 1
    images = [training.show_values([sample.image[None] / scale], args.show_channels)[0][0] for sample in samples]
    rows = {
        "image" + training.describe_channels(args.show_channels): [fit(image, "bilinear") for image in images],
        "label (black is ignored)": [fit(training.colour_classes(label, LABEL_COLOURS)) for label in labels],
        "prediction": [fit(training.colour_classes(answer, LABEL_COLOURS)) for answer in answers],
    }
    picture = training.draw_rows(rows, min_side=1)
    pixels = torch.cat([x.flatten() for x in (*answers, *labels)])
    counts = torch.bincount(pixels[pixels != IGNORE_INDEX], minlength=args.num_classes)
    order = [k for k in counts.argsort(descending=True, stable=True).tolist() if counts[k]]
    names = {args.class_names[k]: tuple(LABEL_COLOURS[k]) for k in order[:LEGEND_NAMES]}
    if len(order) > LEGEND_NAMES:
        names[f"and {len(order) - LEGEND_NAMES} more"] = (255, 255, 255)
    legend = training.draw_legend(names, picture.width)
    canvas = Image.new("RGB", (picture.width, picture.height + legend.height), "white")
    canvas.paste(picture, (0, 0))
    canvas.paste(legend, (0, picture.height))
    return canvas


def run_evaluation(args: argparse.Namespace) -> dict[str, float]:
    """Do what --eval_only asks for, and write files beside the weights."""
    accelerator, loading = training.open_evaluation(args)
    weights = training.find_writable_weights(args.path_to_backbone_checkpoint)
    model, record = load_segmenter(weights)
    pairs = training.list_checked_pairs(accelerator, "validation", args).pairs
    loader = dataset.build_eval_loader(build_data(pairs, args), collate_fn=dataset.collate_lists, **loading)
    accelerator.print(f"{'evaluating':<16}{weights} on {pairs.describe()}")
    evaluation = evaluate(accelerator, model.to(accelerator.device), loader, args)
    how = {name: getattr(args, name) for name in ("slide", "multi_scale", "flip", "resize_to")}
    how |= {"path_to_data": storage.as_text(args.path_to_data), "precision": accelerator.mixed_precision}
    figures = training.report_evaluation(accelerator, weights, pairs, evaluation, record, **how)
    training.end_script(__file__, accelerator, args, weights, pairs, pairs)
    return figures


# ------------------------------------------------------------------------------------------------ training


def build_data(
    pairs: storage.PairList, args: argparse.Namespace, model: ViTMAEForSegmentation | None = None
) -> dataset.ADE20KDataset:
    """Give the pairs augmented, to train a model, or without one as they are, to be validated on at their own size."""
    table = storage.label_table(args.num_classes, args.ignore_zero, args.label_values)
    values = dataset.build_values(args.value_range, args.mean, args.std)
    common = dict(seed=args.seed, channels=args.input_channels, values=values)
    if model is None:
        return dataset.ADE20KDataset(pairs, dataset.keep_size, table, replace_bad_files=False, **common)
    augment = dataset.SegmentationTransform(model.backbone.config.image_hw, args.mean, args.std, *args.resize_to)
    return dataset.ADE20KDataset(pairs, augment, table, noise_size=model.noise_size, **common)


def compute_loss(
    scores: Tensor, labels: Tensor, kind: str = "cross_entropy", class_weights: Tensor | None = None
) -> Tensor:
    """Give a loss at the labels' size, (N, K, h, w) and (N, H, W): the sum over labelled pixels / all pixels.

    As MMSegmentation's cross entropy, whose mean is over all pixels. So a crop without a label is 0 and not 0/0, and
    accumulated passes add up to the loss of the whole batch. For the same reason weights of classes do not divide the
    sum, and Dice is of each image, with the mean over images.
    """
    if kind == "cross_entropy" and class_weights is None:
        return resized_cross_entropy(scores, labels, IGNORE_INDEX) / labels.numel()
    first, *dice = kind.split("+")

    def of_image(scores: Tensor, labels: Tensor) -> Tensor:
        options = dict(device=scores.device, dtype=scores.dtype)
        rows, columns = (resize_matrix(*sides, **options) for sides in zip(scores.shape[1:], labels.shape, strict=True))
        log_probs = (rows @ scores @ columns.T).log_softmax(dim=0)  #  (K, H, W)
        if first == "dice":
            return utils.dice_loss(log_probs, labels, IGNORE_INDEX)
        gamma = FOCAL_GAMMA if first == "focal" else 0.0
        loss = utils.pixel_loss(log_probs, labels, IGNORE_INDEX, weights=class_weights, gamma=gamma) / labels.numel()
        return loss + utils.dice_loss(log_probs, labels, IGNORE_INDEX) if dice else loss

    # Computed again in the backward pass, so that only one image's scores at the labels' size are in memory
    once = functools.partial(checkpoint, of_image, use_reentrant=False, preserve_rng_state=False)
    images = zip(scores.float() if scores.dtype != torch.float64 else scores, labels, strict=True)
    return torch.stack([once(*image) for image in images]).mean()


def main(args: argparse.Namespace) -> dict[str, float]:
    """Run the experiment and give the last validation figures."""
    if args.eval_only:
        return run_evaluation(args)

    # Processes, folder, what to go on from
    accelerator, start, stepping, workers, loading = training.open_run(args)
    device = accelerator.device
    if args.demo and args.path_to_data is None:
        args.path_to_data = str(training.draw_demo_data(accelerator, args.working_directory) / "ADEChallengeData2016")

    # Model: the pretrained encoder under a new neck and new heads
    model, origin = build_model(args), "from scratch"
    if not args.from_scratch:
        loaded = load_pretrained_encoder(model.backbone, args.path_to_backbone_checkpoint)
        origin = f"{loaded.describe()}, from {storage.find_weights(args.path_to_backbone_checkpoint)}"

    # Data: augmentation, drop path and dropout are functions of (seed, epoch, index)
    survey = training.list_checked_pairs(accelerator, "training", args)
    train_pairs = survey.pairs
    splits = ["validation"] + ([args.test_split] if args.test_split else [])
    rotate = train_pairs.rotate
    val_pairs, *test_pairs = (training.list_checked_pairs(accelerator, x, args, rotate=rotate).pairs for x in splits)
    train_data, val_data = build_data(train_pairs, args, model), build_data(val_pairs, args)
    sampler = dataset.StepSampler(len(train_data), shards=train_pairs.shards, **stepping)
    loader = dataset.build_training_loader(train_data, sampler, **workers)
    val_loader = dataset.build_eval_loader(val_data, collate_fn=dataset.collate_lists, **loading)
    # Held-out images are decoded beside the first epoch: a broken one stops the run there, not at its first evaluation
    held_out = (build_data(pairs, args) for pairs in (val_pairs, *test_pairs))
    decoded = itertools.chain.from_iterable(dataset.build_eval_loader(x, collate_fn=len, **loading) for x in held_out)
    total_steps = args.iterations if args.epochs is None else args.epochs * sampler.steps_per_epoch
    num_epochs = math.ceil(total_steps / sampler.steps_per_epoch)
    warmup_steps = choose_warmup(args, sampler.steps_per_epoch, total_steps)
    eval_interval = args.eval_interval or max(1, num_epochs // EVALUATIONS)
    save_interval = args.save_checkpoint_interval or max(1, num_epochs // EVALUATIONS)

    # Loss and optimizer
    table = storage.label_table(args.num_classes, args.ignore_zero, args.label_values)
    counts = count_classes(survey.pixels, table, args.num_classes)
    class_weights = training.choose_class_weights(args.class_weights, counts)
    on_device = None if class_weights is None else class_weights.to(device)
    loss_of = functools.partial(compute_loss, kind=args.loss, class_weights=on_device)
    groups = param_groups_layer_decay(
        model, args.weight_decay, no_weight_decay_list=model.no_weight_decay(), layer_decay=args.layer_decay
    )
    utils.decay_more(groups, model, biases=args.bias_weight_decay, norms=args.norm_weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=ADAM_BETAS, fused=True)
    lines = {"start": origin, **describe(model, sampler, args)}
    if class_weights is not None:
        lines["class weights"] = training.describe_class_weights(class_weights, args.class_names)
    lines["schedule"] = f"{total_steps:,} steps, {sampler.steps_per_epoch:,} an epoch, warmup {warmup_steps:,}"
    lines["every"] = f"{eval_interval} of {num_epochs:,} epochs evaluated, every {save_interval} kept as a checkpoint"
    config = model.backbone.config
    width, tokens = args.channels or config.encoder_embed_dim, dict(encoder=1 + config.num_patches)
    head_values = HEAD_VECTORS * 16 * config.num_patches * width + 3 * args.num_classes * math.prod(config.image_hw)
    lines |= training.note_memory(accelerator, args, model, config, tokens, head_values)
    training.describe_run(accelerator, args, sampler, train_pairs, val_pairs, lines)
    if args.norm == "batch" and accelerator.num_processes > 1:
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        else:
            accelerator.print("batch norm      not synchronised: torch cannot on the CPU; each process has its own")
    model.backbone.activation_checkpointing = args.activation_checkpointing
    model, optimizer, bare_model = training.prepare(accelerator, model, optimizer)

    # Loop
    identity = {"total_steps": total_steps, "warmup_steps": warmup_steps}
    plan = training.Plan(sampler, train_pairs, num_epochs, total_steps, build_record(args), identity)
    figures: dict[str, float] = {}
    shown: list[dataset.Sample] = []  # chosen for the first picture, and then the same
    selection = {"chosen_on": training.mark_images(val_pairs)}
    best, last = start.experiment / training.BEST_CHECKPOINT, start.experiment / training.LAST_CHECKPOINT
    keeper = training.Check if args.check else training.Run
    with keeper(accelerator, start, args, plan, model=model, keeps_best=True) as run:
        model.train()
        for epoch in run.epochs():
            for batch in run.batches(loader, decoded):
                images = batch.images.to(device, non_blocking=True)  #          (N, C, H, W), normalised
                labels = batch.labels.to(device, non_blocking=True).long()  #   (N, H, W)
                noise = batch.noise.to(device, non_blocking=True)  #            (N, noise_size)
                learning_rate = utils.poly_lr(
                    run.step, peak=args.learning_rate, warmup_steps=warmup_steps, total_steps=total_steps
                )
                utils.set_learning_rate(optimizer, learning_rate)
                with accelerator.accumulate(model):
                    logits, auxiliary = model(images, noise)
                    loss, auxiliary_loss = loss_of(logits, labels), loss_of(auxiliary, labels)
                    accelerator.backward(utils.nan_guard(loss + args.auxiliary_weight * auxiliary_loss))
                    if accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
                        skipped = utils.skip_nonfinite(optimizer, grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                run.add(training_loss=loss, training_auxiliary_loss=auxiliary_loss)
                if accelerator.sync_gradients:
                    run.finish_step(learning_rate, skipped)

            # The epoch is complete
            evaluates, saves = run.is_due(eval_interval), run.is_due(save_interval)
            if evaluates:
                run.check_weights()
                training.broadcast_buffers(accelerator, bare_model)
                evaluation = evaluate(accelerator, bare_model, run.watch(val_loader), args)
                figures = evaluation.figures()
                shown = shown or choose_samples(val_data, NUM_PICTURES)
                run.keep_picture("predictions", draw_predictions(accelerator, bare_model, shown, args))
                scored = {"epoch": epoch + 1, "testing": figures} | selection
                if run.keep_best(bare_model, figures["testing_miou"], scored):
                    training.report_best(accelerator, best, val_pairs, evaluation, scored)
                run.keep_table("predictions", evaluation.tables()["per_class.tsv"])
            run.finish_epoch(figures if evaluates else {}, save=evaluates or saves, for_good=saves)
        run.finish()
        if not figures:  # a finished run that was started again
            figures = evaluate(accelerator, bare_model, val_loader, args).figures()
        accelerator.print(f"{'checkpoints':<16}{best} (mIoU {run.best:.2f} %), {last}")
        training.note_selection(accelerator, val_pairs, selection)
        training.print_figures(accelerator, figures)
        for pairs in test_pairs:

            def score_best(pairs: storage.PairList = pairs) -> training.PixelEvaluation:
                loader = dataset.build_eval_loader(build_data(pairs, args), collate_fn=dataset.collate_lists, **loading)
                return evaluate(accelerator, load_segmenter(best)[0].to(device), loader, args)

            figures = figures | training.report_test(accelerator, best, pairs, score_best)
        training.end_script(__file__, accelerator, args, run.experiment, train_pairs, val_pairs)
        return figures
    return {}  # stopped by a signal


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


def build_record(args: argparse.Namespace) -> dict[str, object]:
    """Give the config.json that lies beside the weights."""
    return {
        "architecture": "ViTMAEForSegmentation",
        "config": build_config(args).as_record(decoder=False),
        "num_classes": args.num_classes,
        "ignore_zero": args.ignore_zero,
        "class_names": args.class_names,
        **({"label_values": args.label_values} if args.label_values else {}),  # earlier checkpoints have none
        "resize_to": args.resize_to,
        "image_mean": args.mean,
        "image_std": args.std,
        "value_range": args.value_range,
        **{name: getattr(args, name) for name in MODEL_FLAGS if name != "layer_scale" or args.layer_scale},
    }


def describe(model: ViTMAEForSegmentation, sampler: dataset.StepSampler, args: argparse.Namespace) -> dict[str, str]:
    """Say what decides the result, beside what every run has."""
    parts = {"backbone": model.backbone, "neck": model.neck}
    parts |= {"head": model.decode_head, "auxiliary head": model.auxiliary_head, "": model}
    counts = {name: f"{utils.count_parameters(part)[0]:,}" for name, part in parts.items()}
    total, config = counts.pop(""), model.backbone.config
    decays = f", times {args.layer_decay:g} for each layer down" if args.layer_decay < 1 else ""
    lines = {
        "parameters": " + ".join(f"{name} {count}" for name, count in counts.items()) + f" = {total}",
        "taps": f"outputs of blocks {', '.join(map(str, model.taps))} of {config.encoder_depth}, from 0",
        "labels": f"{args.num_classes} classes, 0 is " + ("ignored" if args.ignore_zero else "the first"),
        **({"labels": " ".join(f"{k}={name}" for k, name in args.label_values.items())} if args.label_values else {}),
        "learning rate": f"{args.learning_rate:.2e}{decays}",
        "images": f"fit into {args.resize_to[0]} x {args.resize_to[1]}, cropped to "
        f"{config.image_hw[0]} x {config.image_hw[1]}",
        "image decoder": storage.describe_decoder(),
    }
    if sampler.images_per_step != RECIPE["per_gpu_batch_size"]:
        lines["note on batch"] = (
            f"the published schedule has an effective batch of {RECIPE['per_gpu_batch_size']}; learning rate and steps "
            "are not scaled to another"
        )
    return lines


if __name__ == "__main__":
    with storage.explained_errors():
        main(parse_args())
