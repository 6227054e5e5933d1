"""Finetune a pretrained encoder as an image classifier, probe it frozen, or evaluate a classifier (paper, section 4).

Try it, after the demo of pretrain_mae.py:
    accelerate launch finetune_classifier.py --demo
ImageNet, ViT-B/16, the tutorial's recipe (PyTorch-Adventures), on one GPU:
    accelerate launch finetune_classifier.py --path_to_data IMAGENET --path_to_pretrained_mae_weights CHECKPOINT_FOLDER
The recipe of the paper's release, effective batch 1024, on 8 GPUs:
    accelerate launch finetune_classifier.py --recipe paper --path_to_data IMAGENET --path_to_pretrained_mae_weights ...
Published: 81 % top-1 after 800 + 100 epochs, 62 % from scratch (PyTorch-Adventures); 83.6 % after 1600 + 100 with the
paper's recipe (table 3). This code at that size: not run yet.
"""

import argparse
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import storage
import training
from storage.sizes import MODEL_CONFIGS, MAEConfig

# The tutorial's recipe, as its command has it; learning rate and augmentation are the defaults in FLAGS. No layer-wise
# learning-rate decay, no drop path, no random erasing.
TUTORIAL_RECIPE = dict(
    experiment_name="MAE_Imagenet_Finetuning",
    epochs=100,
    warmup_epochs=5,
    per_gpu_batch_size=256,
    weight_decay=0.1,
    num_workers=32,
)
# What the paper does otherwise: finetuning (as its release, which for normalised pixels differs from table 9: see
# docs/finetuning.md; effective batch 1024 on 8 GPUs), training from scratch (appendix A.2, table 11; 4096; the pooling
# is the release's) and linear probing (appendix A.1, table 10: LARS; 16384).
PAPER_RECIPES = {
    #                              finetuning  scratch  probing
    "epochs":                      (100,       300,     90),
    "warmup_epochs":               (5,         20,      10),
    "per_gpu_batch_size":          (128,       512,     None),  # probing: 2048, or what fits fewer images (PROBE)
    "gradient_accumulation_steps": (1,         1,       4),
    "learning_rate":               (None,      None,    None),
    "base_learning_rate":          (5e-4,      1e-4,    0.1),
    "min_learning_rate":           (1e-6,      0.0,     0.0),
    "weight_decay":                (0.05,      0.3,     0.0),
    "adam_betas":                  ([.9, .999], [.9, .95], [.9, .999]),
    "max_grad_norm":               (0.0,       0.0,     0.0),
    "layer_decay":                 (0.65,      1.0,     1.0),
    "drop_path":                   (0.1,       0.1,     0.0),
    "random_aug_magnitude":        (9,         9,       0),
    "random_erasing":              (0.25,      0.0,     0.0),
    "mixup_alpha":                 (0.8,       0.8,     0.0),
    "cutmix_alpha":                (1.0,       1.0,     0.0),
    "label_smoothing":             (0.1,       0.1,     0.0),
    "ema_decay":                   (0.0,       0.9999,  0.0),
    "global_pool":                 ("avg",     "avg",   "cls"),
}  # fmt: skip
# The values above are for ViT-B; these replace them for the larger sizes.
PAPER_SIZES = {
    "large": dict(epochs=50, base_learning_rate=1e-3, layer_decay=0.75, drop_path=0.2),
    "huge": dict(epochs=50, base_learning_rate=1e-3, layer_decay=0.75, drop_path=0.3),
}
PAPER_SCRATCH_LARGER = dict(epochs=200, drop_path=0.2)
PROBE = training.Span(steps=0, lowest_batch=64, highest_batch_per_process=2048, highest_batch=16384)
# For 500 to 5,000 images (--recipe small): a batch of 32 to 128 and epochs that make the steps of SMALL, more of them
# from scratch. The rate is the release's for ViT-B (2e-3 at 1024), scaled by the root of a batch of 64; layer decay is
# weaker than its for ViT-B, as the model is narrower, and CutMix, which needs long schedules, is off. Beside the
# defaults, at 64 pixels: benchmarks/RESULTS.md, "A recipe for small data".
SMALL_RECIPE = dict(
    model="mae_vit_tiny_patch16",
    epochs=None,
    warmup_epochs=None,
    save_checkpoint_interval=None,
    per_gpu_batch_size=None,
    weight_decay=0.05,
    learning_rate=5e-4,
    layer_decay=0.75,
    drop_path=0.1,
    random_erasing=0.25,
    cutmix_alpha=0.0,
    num_workers=8,
)
SMALL_SCRATCH_RECIPE = SMALL_RECIPE | dict(layer_decay=1.0)
SMALL = training.Span(steps=3_000, lowest_batch=32, highest_batch_per_process=128)
SMALL_SCRATCH = SMALL._replace(steps=10_000)
# For the model and the scenes of pretrain_mae.py --demo.
DEMO_RECIPE = dict(
    experiment_name="demo_finetuned",
    epochs=8,
    warmup_epochs=1,
    save_checkpoint_interval=8,
    per_gpu_batch_size=32,
    learning_rate=4e-3,
    base_learning_rate=None,
    layer_decay=0.75,
    random_aug_magnitude=0,
    mixup_alpha=0.0,
    cutmix_alpha=0.0,
    num_workers=1,
)
DEMO_SCRATCH_RECIPE = dict(learning_rate=2e-3, layer_decay=1.0)  # the best of three rates: benchmarks/RESULTS.md
DEMO_LABELLED = 500  # of the scenes are trained on, as few labels are where pretraining helps most
PROBE_MOMENTUM = 0.9
NUM_PICTURES = 8
CAPTION_WIDTH = 240  # pixels up to which a picture makes room for the names of classes
RECIPES = ("tutorial", "paper", "small")
BASE = "mae_vit_base_patch16"
FLAGS = {
    "what to do, instead of finetuning everything": [
        ("eval_only", False, "evaluate a finetuned checkpoint and stop"),
        ("linear_probe", False, "train a linear layer on the frozen encoder, by the paper's recipe (table 10)"),
        ("knn", False, "classify by the nearest training images; trains nothing"),
        ("finetune_blocks", float, "train the last K blocks, norm and head: 0 none, 0.5 the last MLP, the depth all"),
    ],
    "model": [
        ("path_to_pretrained_mae_weights", str, "checkpoint folder, .safetensors, .pth, hf:OWNER/NAME; else scratch"),
        ("label_column", str, "of a data set of the Hub (default: the only one of classes)"),
        ("num_classes", int, "(default: as many as there are class folders)"),
        ("model", str, f"sizes from scratch (default: {BASE})", {"choices": MODEL_CONFIGS}),
        ("patch_size", int, "(default: the weights' or the model's)"),
        *training.size_flags(MAEConfig, ("encoder",), "likewise"),
        ("global_pool", "avg", "feature: mean of the patch tokens, or the cls token", {"choices": ("avg", "cls")}),
        ("custom_weight_init", True, "initialise as the release's pretraining, not as the layers do"),
    ],
    "recipe": [
        ("recipe", "tutorial", "PyTorch-Adventures', the paper's, or for 500 to 5,000 images", {"choices": RECIPES}),
        ("learning_rate", 2e-3, "the peak, whatever the batch"),
        ("base_learning_rate", float, "the peak for 256 images per step"),
        ("min_learning_rate", 0.0, "the cosine's end"),
        ("schedule_epochs", int, "epochs at which the cosine ends, if the run may go on (default: all)", (1, None)),
        ("layer_decay", 1.0, "each layer's learning rate / the next one's", (0, 1)),
        ("adam_betas", [0.9, 0.999], "AdamW's two", {"nargs": 2}),
        ("drop_path", 0.0, "rate of the last block, rising linearly from 0", (0, 0.99)),
        ("random_aug_magnitude", 9, "RandAugment's, 1 to 10; 0 turns it off", (0, 10)),
        ("random_erasing", 0.0, "share of the images with an erased area", (0, 1)),
        ("mixup_alpha", 0.2, "of mixup's Beta distribution; 0 turns it off", (0, None)),
        ("cutmix_alpha", 1.0, "of CutMix's Beta distribution; 0 turns it off", (0, None)),
        ("label_smoothing", 0.1, "share of the target that all classes get alike", (0, 0.99)),
        ("ema_decay", 0.0, "also keep and evaluate a moving average of the weights; 0 not", (0, 0.999999)),
        ("eval_interval", 1, "epochs between evaluations", (1, None)),
        ("balanced_sampling", False, "show every class equally often in an epoch, whatever its number of images"),
        ("class_weights", str, "in the loss: balanced (inverse frequency), numbers, or a file", {"nargs": "+"}),
    ],
    "test": [
        ("test_folder", str, "class folders on which the best weights are scored once, at the end"),
        (
            "class_subset",
            False,
            "with --eval_only: some classes alone, scores of others masked, as for ImageNet-A and -R",
        ),
    ],
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    flags = training.Flags(__doc__, FLAGS)
    given = flags.parse(argv)

    # Defaults: the weights' sizes, then the recipe's; what is given by flag wins over both
    weights = given.get("path_to_pretrained_mae_weights")
    if given.get("demo") and weights is None:
        weights = flags.find_demo_weights(given)
    if weights is not None and "model" in given:
        flags.error(f"--model is for training from scratch; the sizes come with {weights}")
    record = read_sizes(weights) if weights else {}
    base = SMALL_RECIPE["model"] if given.get("recipe") == "small" else BASE
    config = MAEConfig(**record["config"]) if weights else MODEL_CONFIGS[given.get("model", base)]
    sizes = flags.size_defaults(given, record, dataclasses.asdict(config), weights)
    width = given.get("encoder_embed_dim", config.encoder_embed_dim)
    recipe = choose_recipe(given.get("recipe", "tutorial"), weights is None, given.get("linear_probe", False), width)
    if given.get("demo"):
        recipe = recipe | DEMO_RECIPE
    if "base_learning_rate" in given:
        recipe = recipe | {"learning_rate": None}
    elif "learning_rate" in given:
        recipe = recipe | {"base_learning_rate": None}
    args = flags.complete(given, TUTORIAL_RECIPE, {"path_to_pretrained_mae_weights": weights}, sizes, recipe)

    # Refusals
    modes = [f"--{name}" for name in ("eval_only", "linear_probe", "knn") if getattr(args, name)]
    modes += ["--finetune_blocks"] * (args.finetune_blocks is not None)
    if len(modes) > 1:
        flags.error(f"{' and '.join(modes)} exclude each other; give one of them")
    if args.path_to_data is None and not args.demo:
        flags.error("give --path_to_data FOLDER with train/ and val/, each with a folder for every class")
    if modes and weights is None:
        flags.error(f"{modes[0]} judges weights: give --path_to_pretrained_mae_weights")
    if modes and args.demo:
        flags.error(
            "--demo compares finetuning with training from scratch; for anything else leave it out and give "
            f"--path_to_data {Path(args.working_directory) / 'demo_data' / 'imagefolder'}"
        )
    if args.learning_rate is not None and args.base_learning_rate is not None:
        flags.error("--learning_rate is the peak, --base_learning_rate is scaled to the batch; give one of them")
    if args.eval_only and args.value_range == "auto":
        flags.error("--value_range auto measures training images; --eval_only has the weights' range: leave it out")
    augments = not (args.eval_only or args.knn or args.linear_probe)
    if augments and (args.input_channels != 3 or args.value_range) and args.random_aug_magnitude:
        flags.error(
            "RandAugment changes colours: with --input_channels other than 3 or --value_range, add "
            "--random_aug_magnitude 0"
        )
    if args.linear_probe and training.micro_batch_size(args) < 2:
        flags.error("--linear_probe normalises over a forward pass, here of 1 image: give more --per_gpu_batch_size")
    if args.class_subset and not args.eval_only:
        flags.error("--class_subset judges finished weights: give --eval_only as well, or leave it out")
    if args.test_folder is not None and (args.eval_only or args.knn):
        flags.error("--test_folder is scored after a training; without one give that folder as --path_to_data")
    try:
        args.class_weights = training.read_class_weights(args.class_weights)
        config = build_config(args)
        if args.finetune_blocks is not None:
            check_trainable_blocks(args.finetune_blocks, config.encoder_depth)
    except (ValueError, OSError) as error:
        flags.error(str(error))
    if args.balanced_sampling and args.class_weights == "balanced":
        flags.error("--balanced_sampling and --class_weights balanced make up for the same; give one of them")
    return args


def choose_recipe(recipe: str, from_scratch: bool, linear_probe: bool, width: int) -> dict:
    """Give what a recipe does otherwise than the tutorial's; the paper's differ by size, told by the width."""
    if recipe == "small" and not linear_probe:
        return SMALL_SCRATCH_RECIPE if from_scratch else SMALL_RECIPE
    if recipe == "tutorial" and not linear_probe:
        return {}
    column = 2 if linear_probe else 1 if from_scratch else 0
    chosen = {name: values[column] for name, values in PAPER_RECIPES.items()}
    if linear_probe or width <= 768:
        return chosen
    return chosen | (PAPER_SCRATCH_LARGER if from_scratch else PAPER_SIZES["large" if width <= 1024 else "huge"])


def build_config(args: argparse.Namespace) -> MAEConfig:
    return MAEConfig.from_flags(args, MAEConfig(norm_pix_loss=False))


# ------------------------------------------------------------------------------------------------ imports

if __name__ == "__main__":  # before the imports that take seconds
    training.check_command(__doc__, FLAGS, parse_args)

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from timm.loss import SoftTargetCrossEntropy
from timm.optim import Lars, param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import dataset
import utils
from model import (
    VisionTransformer,
    ViTMAEForImageClassification,
    check_trainable_blocks,
    load_classifier,
    load_pretrained_encoder,
    read_sizes,
)

# ------------------------------------------------------------------------------------------------ evaluation


def evaluate(
    accelerator: Accelerator,
    model: ViTMAEForImageClassification,
    batches: Iterable[dataset.Batch],
    data: dataset.ImageDataset,
    args: argparse.Namespace,
    classes: list[int] | None = None,
) -> training.ImageEvaluation:
    """Classify every image exactly once, whatever the number of processes and the remainder; by `classes` (K) alone.

    The scores stay on the device until all are there: 200 MB for ImageNet, over all processes.
    """
    classes = list(range(model.num_classes)) if classes is None else classes
    results = [torch.zeros(0, len(classes), device=accelerator.device)]  # a process may have no image at all
    with utils.evaluating(model):
        for batch in batches:
            images = dataset.normalize(batch.images.to(accelerator.device), args.mean, args.std)
            with accelerator.autocast():
                results.append(model(images).float()[:, classes])  # (N, K)

    def image_of(index: int) -> Tensor:
        return data[dataset.SampleKey(dataset.EVAL_EPOCH, index)].image

    source = training.ImageSource(data.files.classes, image_of, args.show_channels)
    labels = torch.from_numpy(data.files.labels).long()
    return training.gather_evaluation(accelerator, torch.cat(results), labels, source)


def run_evaluation(args: argparse.Namespace) -> dict[str, float]:
    """Do what --eval_only asks for, and write files beside the weights."""
    accelerator, loading = training.open_evaluation(args)
    weights = training.find_writable_weights(args.path_to_pretrained_mae_weights)
    model, record = load_classifier(weights)
    model.to(accelerator.device)
    corruptions = training.find_corruptions(args.path_to_data)

    def choose(files: storage.FileList) -> list[int]:
        return training.choose_classes(files, record.get("class_names"), model.num_classes, weights, args)

    def score(files: storage.FileList, classes: list[int]) -> training.ImageEvaluation:
        data = build_eval_data(files, args, 1.0 if corruptions else None)  # ImageNet-C's are cropped already
        accelerator.print(f"{'evaluating':<16}{weights} on {files.describe()}")
        return evaluate(accelerator, model, dataset.build_eval_loader(data, **loading), data, args, classes)

    if corruptions:
        figures = training.evaluate_corruptions(accelerator, weights, corruptions, choose, score, args)
    else:
        files = training.list_validation(accelerator, args)
        how = {"class_subset": True} if args.class_subset else {}
        figures = training.report_evaluation(accelerator, weights, files, score(files, choose(files)), record, **how)
    training.end_script(__file__, accelerator, args, weights)
    return figures


@torch.no_grad()
def run_knn(args: argparse.Namespace) -> dict[str, float]:
    """Do what --knn asks for: classify validation images by the labels of the nearest training images."""
    accelerator, loading = training.open_evaluation(args)
    weights = storage.find_weights(args.path_to_pretrained_mae_weights)
    if {"head.weight", "head.1.weight"} & storage.read_state_dict(weights).keys():
        model, _ = load_classifier(weights)
    else:
        model = VisionTransformer(build_config(args))
        model.global_pool = args.global_pool
        accelerator.print(f"{'weights':<16}{load_pretrained_encoder(model, weights).describe()}")
    model.to(accelerator.device).eval()

    def encode(images: Tensor) -> Tensor:
        return model.forward_pooled(dataset.normalize(images, args.mean, args.std))

    features, splits = [], training.list_labelled_splits(accelerator, args)
    for files in splits:
        accelerator.print(f"{'encoding':<16}{files.describe()}")
        loader = dataset.build_eval_loader(build_eval_data(files, args), **loading)
        features.append(training.collect_features(accelerator, loader, len(files), encode))
    (bank, bank_labels), (queries, labels) = features
    ranked = utils.knn_classify(bank, bank_labels, queries, len(splits[0].classes))
    figures = {f"knn_top{k}_acc": utils.accuracy(ranked, labels, k) for k in (1, training.TOP)}
    vote = f"of the {utils.KNN_NEIGHBOURS} nearest, by cosine similarity, {model.global_pool} features"
    accelerator.print(f"{'vote':<16}{vote}")
    training.print_figures(accelerator, figures)
    accelerator.end_training()
    return figures


# ------------------------------------------------------------------------------------------------ data


def build_eval_data(
    files: storage.FileList, args: argparse.Namespace, crop_ratio: float | None = None
) -> dataset.ImageDataset:
    """Give images as validation sees them; one that cannot be decoded is an error, as a score is over all of them."""
    values = dataset.build_values(args.value_range, args.mean, args.std)
    options = dict(seed=args.seed, channels=args.input_channels, values=values, replace_bad_files=False)
    return dataset.build_eval_images(files, build_config(args).image_hw, crop_ratio, **options)


def build_training_data(
    files: storage.FileList, model: ViTMAEForImageClassification, args: argparse.Namespace
) -> tuple[dataset.ImageDataset, Callable]:
    """Give the augmented training images, already normalised, and how samples are mixed into a batch."""
    hw, statistics = model.config.image_hw, (args.mean, args.std)
    values = dataset.build_values(args.value_range, args.mean, args.std)
    if args.linear_probe:
        transform = dataset.ProbingTransform(hw, *statistics)
    elif values is not None:
        transform = dataset.ValueFinetuningTransform(hw, args.random_erasing)
    else:
        transform = dataset.FinetuningTransform(hw, args.random_aug_magnitude, args.random_erasing, *statistics)
    options = dict(seed=args.seed, channels=args.input_channels, values=values)
    data = dataset.ImageDataset(files, transform, noise_size=model.drop_path_noise_size, **options)
    mixing = dataset.PairMixing(
        len(files.classes), args.mixup_alpha, args.cutmix_alpha, args.label_smoothing, args.seed
    )
    return data, mixing


# ------------------------------------------------------------------------------------------------ training


def build_optimizer(
    model: ViTMAEForImageClassification, learning_rate: float, args: argparse.Namespace
) -> torch.optim.Optimizer:
    """AdamW with layer-wise learning rates; LARS for a probe, whose bias has no decay and no trust ratio (original)."""
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
    utils.decay_more(groups, model, biases=args.bias_weight_decay, norms=args.norm_weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=tuple(args.adam_betas), fused=True)


def build_model(num_classes: int, args: argparse.Namespace) -> tuple[ViTMAEForImageClassification, str]:
    """Put the pretrained encoder under a new head, and freeze what is not trained; also say where weights come from."""
    model = ViTMAEForImageClassification(
        build_config(args),
        num_classes,
        args.global_pool,
        args.drop_path,
        probe_head=args.linear_probe,
        custom_weight_init=args.custom_weight_init,
    )
    origin = "from scratch"
    if args.path_to_pretrained_mae_weights is not None:
        loaded = load_pretrained_encoder(model, args.path_to_pretrained_mae_weights)
        origin = f"{loaded.describe()}, from {storage.find_weights(args.path_to_pretrained_mae_weights)}"
    if args.linear_probe:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    elif args.finetune_blocks is not None:
        model.set_trainable_blocks(args.finetune_blocks)
    model.activation_checkpointing = args.activation_checkpointing
    return model, origin


def main(args: argparse.Namespace) -> dict[str, float]:
    """Run the experiment and give the last validation figures."""
    if args.eval_only:
        return run_evaluation(args)
    if args.knn:
        return run_knn(args)

    # Processes, folder, what to go on from
    accelerator, start, stepping, workers, loading = training.open_run(args)
    device = accelerator.device
    if args.ema_decay and accelerator.distributed_type in training.SHARDING:
        raise ValueError("--ema_decay cannot average weights that are sharded; leave it out or use plain DDP")
    if args.demo and args.path_to_data is None:
        args.path_to_data = str(training.draw_demo_data(accelerator, args.working_directory) / "imagefolder")

    # Data and model: augmentation, mixing and drop path are functions of (seed, epoch, index)
    train_files, val_files = splits = training.list_labelled_splits(accelerator, args)
    test_files = training.list_test(accelerator, splits, args)
    if args.demo:
        train_files = train_files.subsample(DEMO_LABELLED)
    span = PROBE if args.linear_probe else SMALL if args.path_to_pretrained_mae_weights else SMALL_SCRATCH
    training.settle(accelerator, args, span, len(train_files), stepping, loading)
    model, origin = build_model(len(train_files.classes), args)
    train_data, mixing = build_training_data(train_files, model, args)
    eval_data = build_eval_data(val_files, args)
    labels = train_files.labels if args.balanced_sampling else None
    sampler = dataset.StepSampler(len(train_data), labels=labels, shards=train_files.shards, **stepping)
    loader = dataset.build_training_loader(train_data, sampler, collate_fn=mixing, **workers)
    eval_loader = dataset.build_eval_loader(eval_data, **loading)
    test_loader = dataset.build_eval_loader(build_eval_data(test_files, args), **loading) if test_files else None
    # Held-out images are decoded beside the first epoch: a broken one stops the run there, not at its first evaluation
    held_out = (loader.dataset for loader in (eval_loader, test_loader) if loader)
    decoded = itertools.chain.from_iterable(dataset.build_eval_loader(x, collate_fn=len, **loading) for x in held_out)

    # Optimizer
    peak = args.learning_rate
    if peak is None:
        peak = utils.scaled_lr(args.base_learning_rate, sampler.images_per_step)
    warmup_steps = args.warmup_epochs * sampler.steps_per_epoch
    total_steps = args.epochs * sampler.steps_per_epoch
    schedule_steps = (args.schedule_epochs or args.epochs) * sampler.steps_per_epoch
    counts = np.bincount(train_files.labels, minlength=len(train_files.classes))
    class_weights = training.choose_class_weights(args.class_weights, counts)
    lines = {"start": origin, **describe(model, peak, sampler, args)}
    if class_weights is not None:
        lines["class weights"] = training.describe_class_weights(class_weights, train_files.classes)
    if not args.linear_probe and args.finetune_blocks is None:  # else most blocks keep nothing
        tokens = dict(encoder=1 + model.config.num_patches)
        lines |= training.note_memory(accelerator, args, model, model.config, tokens)
    training.describe_run(accelerator, args, sampler, train_files, val_files, lines)
    optimizer = build_optimizer(model, peak, args)
    average = ModelEmaV3(model.to(device), decay=args.ema_decay) if args.ema_decay else None
    model, optimizer, bare_model = training.prepare(accelerator, model, optimizer)
    candidates = {"testing": bare_model} | ({} if average is None else {"ema_testing": average.module})
    compute_loss = build_loss(class_weights).to(device)

    # Loop
    record = build_record(bare_model, train_files, args)
    identity = {name: getattr(args, name) for name in ("linear_probe", "finetune_blocks", "ema_decay")}
    identity["balanced_sampling"] = args.balanced_sampling or None  # as in states from before there was the flag
    plan = training.Plan(sampler, train_files, args.epochs, total_steps, record, identity)
    figures: dict[str, float] = {}
    selection = {"chosen_on": training.mark_images(val_files)}
    averaged = average and average.module
    best = start.experiment / training.BEST_CHECKPOINT
    keeper = training.Check if args.check else training.Run
    with keeper(accelerator, start, args, plan, model=model, average=averaged, keeps_best=True) as run:
        model.train()
        for epoch in run.epochs():
            for batch in run.batches(loader, decoded):
                images = batch.images.to(device, non_blocking=True)  #    (N, C, H, W), normalised
                targets = batch.labels.to(device, non_blocking=True)  #   (N, K)
                noise = batch.noise.to(device, non_blocking=True)  #      (N, 2 * depth), or (N, 0)
                schedule = dict(warmup_steps=warmup_steps, total_steps=schedule_steps, minimum=args.min_learning_rate)
                learning_rate = utils.cosine_lr(run.step, peak=peak, **schedule)
                utils.set_learning_rate(optimizer, learning_rate)
                with accelerator.accumulate(model):
                    scores = model(images, noise)  #                      (N, K)
                    loss = compute_loss(scores.float(), targets)
                    accelerator.backward(utils.nan_guard(loss))
                    if accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
                        skipped = utils.skip_nonfinite(optimizer, grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                hits = (scores.argmax(dim=1) == targets.argmax(dim=1)).float().mean()
                run.add(training_loss=loss, training_top1_acc=100 * hits)
                if accelerator.sync_gradients:
                    if average is not None:
                        average.update(bare_model)
                    run.finish_step(learning_rate, skipped)

            # The epoch is complete
            evaluates, saves = run.is_due(args.eval_interval), run.is_due(args.save_checkpoint_interval)
            if evaluates:
                run.check_weights()
                figures, evaluations = {}, {}
                for prefix, candidate in candidates.items():
                    training.broadcast_buffers(accelerator, candidate)
                    evaluations[prefix] = evaluate(accelerator, candidate, run.watch(eval_loader), eval_data, args)
                    figures |= evaluations[prefix].figures(prefix)
                for prefix, candidate in candidates.items():
                    kept = {key: figures[f"{prefix}_{key}"] for key in ("loss", "top1_acc", "top5_acc", "macro_f1")}
                    scored = {"epoch": epoch + 1, "moving_average": prefix != "testing", "testing": kept} | selection
                    if run.keep_best(candidate, kept["top1_acc"], scored):
                        training.report_best(accelerator, best, val_files, evaluations[prefix], scored)
            if saves:
                run.keep_picture("predictions", draw_predictions(accelerator, bare_model, eval_data, args))
            run.finish_epoch(figures if evaluates else {}, save=evaluates or saves, for_good=saves)
        run.finish()
        if not figures:  # a finished run that was started again
            figures = evaluate(accelerator, bare_model, eval_loader, eval_data, args).figures()
        last = run.experiment / training.LAST_CHECKPOINT
        accelerator.print(f"{'checkpoints':<16}{best} (top-1 {run.best:.2f} %), {last}")
        training.note_selection(accelerator, val_files, selection)
        training.print_figures(accelerator, figures)
        if test_loader is not None:

            def score_best() -> training.ImageEvaluation:
                best_model, _ = load_classifier(best)
                return evaluate(accelerator, best_model.to(device), test_loader, test_loader.dataset, args)

            figures = figures | training.report_test(accelerator, best, test_files, score_best)
        if not args.demo:  # the demo trains a second model in these processes
            training.end_script(__file__, accelerator, args, run.experiment, train_files, val_files)
        return figures
    return {}  # stopped by a signal


def build_loss(class_weights: Tensor | None) -> nn.Module:
    """Give the loss of scores and targets t (N, K): the mean over images of -sum_k w_k t_k log p_k.

    Without weights w is 1. The mean is over images and not over their weights, so that it is the same however a step
    is cut into passes and processes: for one class a target, torch divides the sum by sum(w) instead.
    """
    return SoftTargetCrossEntropy() if class_weights is None else nn.CrossEntropyLoss(weight=class_weights)


def build_record(
    model: ViTMAEForImageClassification, files: storage.FileList, args: argparse.Namespace
) -> dict[str, object]:
    """Give the config.json that lies beside the weights."""
    return {
        "architecture": "ViTMAEForImageClassification",
        "config": model.config.as_record(decoder=False),
        "num_classes": len(files.classes),
        "global_pool": args.global_pool,
        "class_names": list(files.classes),
        "image_mean": args.mean,
        "image_std": args.std,
        "value_range": args.value_range,
    }


def draw_predictions(
    accelerator: Accelerator, model: ViTMAEForImageClassification, data: dataset.ImageDataset, args: argparse.Namespace
) -> Image.Image:
    """Draw validation images, each with its class, the answer, and the answer's probability."""
    samples = dataset.pick_samples(data, NUM_PICTURES)
    images = dataset.normalize(
        torch.stack([sample.image for sample in samples]).to(accelerator.device), args.mean, args.std
    )
    with utils.evaluating(model), accelerator.autocast():
        probabilities, answers = model(images).float().softmax(dim=1).max(dim=1)
    names = [utils.describe_class(name) for name in data.files.classes]
    title = "validation images, what they are, and what they are taken for"
    captions = [
        f"true: {names[sample.label]}\nis: {names[answer]} {100 * probability:.0f} %"
        for sample, answer, probability in zip(samples, answers.tolist(), probabilities.tolist(), strict=True)
    ]
    panels = training.show_values([dataset.denormalize(images, args.mean, args.std)], args.show_channels)
    return training.draw_rows({title: panels[0]}, {title: captions}, caption_width=CAPTION_WIDTH)


def describe(
    model: ViTMAEForImageClassification, peak: float, sampler: dataset.StepSampler, args: argparse.Namespace
) -> dict[str, str]:
    """Say what decides the result, beside what every run has."""
    total, trainable = utils.count_parameters(model)
    height, width = model.config.image_hw
    scaled = f" = {args.base_learning_rate:.2e} x {sampler.images_per_step} / 256" if args.learning_rate is None else ""
    decays = args.layer_decay < 1 and not args.linear_probe
    augmentation = (
        f"RandAugment {args.random_aug_magnitude}, erasing {args.random_erasing:g}, mixup {args.mixup_alpha:g}, "
        f"CutMix {args.cutmix_alpha:g}, smoothing {args.label_smoothing:g}, drop path {args.drop_path:g}"
    )
    lines = {
        "model": f"{total:,} parameters, {trainable:,} of them trained, {model.global_pool} feature, "
        f"{height} x {width} pixels",
        "learning rate": f"{peak:.2e}{scaled}" + f", times {args.layer_decay:g} for each layer down" * decays,
        "augmentation": "crops and flips alone" if args.linear_probe else augmentation,
        "image decoder": storage.describe_decoder(),
    }
    if args.balanced_sampling:
        lines["sampling"] = f"each of {model.num_classes} classes equally often in an epoch"
    if sampler.micro_batch_size == 1 and args.mixup_alpha + args.cutmix_alpha > 0:
        lines["mixing"] = "none, because a forward pass is of one image"
    return lines


def compare_with_scratch(args: argparse.Namespace) -> None:
    """Train the same model twice, from random weights and from the demo's encoder, as suits each, and compare."""
    scratch = argparse.Namespace(**vars(args) | DEMO_SCRATCH_RECIPE)
    scratch.path_to_pretrained_mae_weights = None
    scratch.experiment_name = f"{args.experiment_name}_from_scratch"
    runs = {"from scratch": main(scratch)}
    runs |= {"from the demo's pretraining": main(args)} if runs["from scratch"] else {}
    if not all(runs.values()) or len(runs) < 2:  # stopped by a signal
        return
    accelerator, _ = training.open_evaluation(args)
    accelerator.print(
        f"\nTop-1 on unseen scenes of ten kinds, after {args.epochs} epochs on the same labelled ones "
        f"({DEMO_LABELLED} at most):"
    )
    for name, figures in runs.items():
        accelerator.print(f"  {name:<32}{figures['testing_top1_acc']:6.2f} %")
    training.end_script(__file__, accelerator, args, Path(args.working_directory) / args.experiment_name)


if __name__ == "__main__":
    with storage.explained_errors():
        arguments = parse_args()
        compare_with_scratch(arguments) if arguments.demo and not arguments.check else main(arguments)
