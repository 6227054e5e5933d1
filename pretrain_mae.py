"""Pretrain a masked autoencoder on images (He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021).

Three quarters of an image's patches are removed, a ViT encodes the rest, and a light decoder predicts the removed
pixels. The encoder is then finetuned with finetune_classifier.py or finetune_segmentation.py.

Try it, no data needed, about three minutes on two CPU cores:
    accelerate launch pretrain_mae.py --demo
Your own photographs, 500 to 5,000 of them in any folders:
    accelerate launch pretrain_mae.py --path_to_data FOLDER --recipe small --val_fraction 0.1
ImageNet, ViT-B/16, 800 epochs, effective batch 4096 (paper, table 8), here on 8 GPUs:
    accelerate launch pretrain_mae.py --path_to_data IMAGENET --per_gpu_batch_size 512 --gradient_accumulation_steps 1
Published: 81 % top-1 after 800 epochs and 100 of finetuning (PyTorch-Adventures), 83.6 % after 1600 (paper, table 3;
with --epochs 1600 give --warmup_epochs 40).
This code at that size: not run yet.
"""

import argparse
import dataclasses
import itertools
import math
from collections.abc import Iterable
from pathlib import Path

import storage
import training
from storage.sizes import MASKINGS, MODEL_CONFIGS, MAEConfig, check_masking, num_kept_patches

# The paper's recipe (table 8; 800 epochs: table 1), in the batches of the project's command.
# Deviation: gradients are clipped to a norm of 1 (--max_grad_norm); the original release never clips. Reason: the
# project's command does. Effect: not measured; 0 turns it off.
RECIPE = dict(
    experiment_name="MAEPretraining",
    epochs=800,
    warmup_epochs=40,
    per_gpu_batch_size=2048,  # of an optimizer step; a forward pass sees 2048 / 4 = 512
    gradient_accumulation_steps=4,
    weight_decay=0.05,
    num_workers=32,
)
# For 500 to 5,000 images (--recipe small): a batch of 64 to 256, so that an epoch has several steps, and as many epochs
# as make SMALL.steps. ViT-Ti, because a night on a few CPU cores suffices for it; on a GPU --model takes a larger one.
# The rate is the paper's peak (2.4e-3 at 4096), scaled by about the root of the batch. Beside the defaults, at 64
# pixels: benchmarks/RESULTS.md, "A recipe for small data".
SMALL_RECIPE = dict(
    model="mae_vit_tiny_patch16",
    epochs=None,
    warmup_epochs=None,
    save_checkpoint_interval=None,
    per_gpu_batch_size=None,
    gradient_accumulation_steps=1,
    base_learning_rate=1e-3,
    num_workers=8,
)
SMALL = training.Span(steps=20_000, lowest_batch=64, highest_batch_per_process=256)
# About three minutes on two CPU cores. Plain pixels, because with norm_pix_loss its pictures would need each
# patch's true mean and contrast.
DEMO_RECIPE = dict(
    experiment_name="demo",
    img_size=[64],
    patch_size=8,
    encoder_embed_dim=96,
    encoder_depth=4,
    encoder_num_heads=3,
    encoder_mlp_ratio=2.0,
    decoder_embed_dim=64,
    decoder_depth=2,
    decoder_num_heads=2,
    decoder_mlp_ratio=2.0,
    norm_pix_loss=False,
    min_crop_scale=0.9,
    epochs=24,
    warmup_epochs=1,
    save_checkpoint_interval=8,
    per_gpu_batch_size=32,
    gradient_accumulation_steps=1,
    base_learning_rate=2.4e-2,
    num_workers=1,
)
ADAM_BETAS = (0.9, 0.95)
NUM_PICTURES = 8
NUM_COMPONENTS, PCA_IMAGES = 96, 256  # of --target pca (paper, section 4.1), and how many images they are found in
PCA_MAX_VALUES = 8192  # of a patch, as their covariance is a matrix of so many rows and columns

BASE = "mae_vit_base_patch16"
AUGMENTATIONS = ("none", "fixed_crop", "random_crop", "random_crop_jitter")
TARGET = f"table 1d: --norm_pix_loss by another name, or {NUM_COMPONENTS} principal components of each patch"
JITTERED = "changes the colours of 8-bit pictures of 1 or 3 channels alone"
NOTHING_REMOVED = "as there is nothing to learn where nothing is removed; the paper removes 0.75"
FLAGS = {
    "masked autoencoder": [
        ("init_from", str, "start from weights: checkpoint or experiment folder, .safetensors, .pth, or hf:OWNER/NAME"),
        ("model", BASE, "sizes; the flags below override single ones", {"choices": MODEL_CONFIGS}),
        ("patch_size", int, "side of a patch in pixels (default: the model's)"),
        *training.size_flags(MAEConfig, ("encoder", "decoder"), "the model's"),
        ("mask_ratio", 0.75, "share of the patches that is removed", (1e-9, 1, NOTHING_REMOVED)),
        ("masking", "random", "table 1f: random patches, random blocks, or three of every four", {"choices": MASKINGS}),
        ("encode_mask_tokens", False, "table 1c: the encoder sees removed patches too, as mask tokens"),
        ("norm_pix_loss", True, "predict each patch without its mean and contrast"),
        ("target", str, TARGET, {"choices": ("pixels", "normalized_pixels", "pca")}),
        ("custom_weight_init", True, "initialise as the original release, not as the layers do"),
    ],
    "optimisation": [
        ("recipe", "paper", "whose defaults; small is for 500 to 5,000 images", {"choices": ("paper", "small")}),
        ("base_learning_rate", 1.5e-4, "for 256 images per step; scaled to the effective batch"),
        ("min_learning_rate", 0.0, "the cosine's end"),
        ("schedule_epochs", int, "epochs at which the cosine ends, if the run may go on (default: all)", (1, None)),
    ],
    "data": [
        (
            "augmentation",
            "random_crop",
            "table 1e; all but none flip, none cuts the middle",
            {"choices": AUGMENTATIONS},
        ),
        ("min_crop_scale", 0.2, "smallest share of the image that a random crop covers", (1e-9, 1)),
        ("repeated_sampling", 1, "crops R of each decoded image; an epoch then visits 1/R of the images", (1, None)),
    ],
    "k-NN probe during training": [
        ("probe_every", 0, "epochs between k-NN classifications by the features; 0 never", (0, None)),
        ("label_column", str, "of a data set of the Hub (default: the only one of classes)"),
        ("path_to_probe_data", str, "train/ and val/ with class folders (default: --path_to_data)"),
        ("probe_images", 5000, "at most so many images of train/ and of val/", (1, None)),
        ("probe_pool", "avg", "mean of the patch tokens, or cls", {"choices": ("avg", "cls")}),
    ],
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    flags = training.Flags(__doc__, FLAGS)
    given = flags.parse(argv)
    recipes = [RECIPE, SMALL_RECIPE if given.get("recipe") == "small" else {}, DEMO_RECIPE if given.get("demo") else {}]
    args = flags.complete(given, *recipes, start_defaults(flags, given))
    if args.path_to_data is None and not args.demo:
        flags.error(
            "give --path_to_data FOLDER to train on your images, or --demo to draw a small data set and train on it"
        )
    if args.target:
        if "norm_pix_loss" in given and given["norm_pix_loss"] != (args.target == "normalized_pixels"):
            no, other = ("", "no-") if args.norm_pix_loss else ("no-", "")
            way_out = f"leave the second out, or give --{other}norm_pix_loss"
            flags.error(f"--target {args.target} and --{no}norm_pix_loss exclude each other; {way_out}")
        args.norm_pix_loss = args.target == "normalized_pixels"
    try:
        config = build_config(args)
        check_masking(args.masking, config, args.mask_ratio)
    except ValueError as error:
        flags.error(str(error))
    if args.target == "pca" and config.patch_dim > PCA_MAX_VALUES:
        flags.error(f"--target pca takes patches of at most {PCA_MAX_VALUES:,} values, not {config.patch_dim:,}")
    if args.augmentation == "random_crop_jitter" and (args.input_channels not in (1, 3) or args.value_range):
        flags.error(f"--augmentation random_crop_jitter {JITTERED}; choose another")
    images = training.micro_batch_size(args)
    if images % args.repeated_sampling:
        flags.error(
            f"--repeated_sampling {args.repeated_sampling} must divide the {images} images of a forward pass "
            "(--per_gpu_batch_size / --gradient_accumulation_steps)"
        )
    return args


def start_defaults(flags: training.Flags, given: dict) -> dict[str, object]:
    """Give the sizes and statistics of the weights of --init_from; a decoder they lack is that of the named size."""
    source = given.get("init_from")
    if source is None:
        return {}
    if "model" in given:
        flags.error(f"--model is for training from scratch; the sizes come with {source}")
    record = read_sizes(source)
    sizes = MAEConfig(**record["config"]).as_record(decoder="decoder_embed_dim" in record["config"])
    named = (name for name, config in MODEL_CONFIGS.items() if config.encoder_embed_dim == sizes["encoder_embed_dim"])
    defaults = {"model": next(named, BASE)} | flags.size_defaults(given, record, sizes, source)
    targets = ("norm_pix_loss", "encode_mask_tokens") if "decoder_embed_dim" in record["config"] else ()
    defaults |= {name: sizes[name] for name in targets if name in sizes}
    keeps_target = not {"target", "norm_pix_loss"} & given.keys()
    return defaults | ({"target": "pca"} if sizes.get("pca_target") and keeps_target else {})


def build_config(args: argparse.Namespace) -> MAEConfig:
    """Take the named size and override what was given by flag."""
    config = MAEConfig.from_flags(args, MODEL_CONFIGS[args.model])
    components = min(NUM_COMPONENTS, config.patch_dim) if args.target == "pca" else 0
    return dataclasses.replace(config, pca_target=components)


# ------------------------------------------------------------------------------------------------ imports

if __name__ == "__main__":  # before the imports that take seconds
    training.check_command(__doc__, FLAGS, parse_args)

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from timm.optim import param_groups_weight_decay
from torch import Tensor

import dataset
import utils
from model import ViTMAEForPreTraining, load_pretrained_encoder, read_sizes

# ------------------------------------------------------------------------------------------------ evaluation


def evaluate(
    accelerator: Accelerator, model: ViTMAEForPreTraining, batches: Iterable[dataset.Batch], args: argparse.Namespace
) -> dict[str, float]:
    """Reconstruct held-out images, each with its own fixed mask, and average over the images of all processes.

    `testing_loss` is the loss of training, on held-out images. For a model that predicts plain pixels also the mean
    squared error on the removed patches, with 0 black and 1 white, beside two answers that need no learning (see
    `utils.trivial_answers`).
    """
    sums, num_images = {}, 0
    with utils.evaluating(model):
        for batch in batches:
            pixels = batch.images.to(accelerator.device)
            images = dataset.normalize(pixels, args.mean, args.std)
            valid = dataset.patches_with_data(pixels, model.config.patch_size)
            with accelerator.autocast():
                loss, pred, mask = model(images, args.mask_ratio, batch.noise.to(accelerator.device), valid=valid)
            values = {"testing_loss": loss}
            if not model.config.norm_pix_loss:
                reconstructed = model.reconstruct(images, pred, mask).reconstructed
                target, answer = (
                    model.patchify(dataset.denormalize(x, args.mean, args.std)) for x in (images, reconstructed)
                )
                answers = {
                    "model_error": answer,
                    **utils.trivial_answers(target, mask, model.config.grid_size, args.input_channels),
                }
                counted = mask if valid is None else mask * valid
                for name, answer in answers.items():
                    values[name] = ((answer - target).square().mean(dim=2) * counted).sum() / mask.sum()
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(images)
            num_images += len(images)
    shares = gather_object([(sums, num_images)])  # as objects, because the share of a process may be empty
    total = sum(count for _, count in shares)
    return {name: sum(share.get(name, 0.0) for share, _ in shares) / total for name in shares[0][0]}


def probe(
    accelerator: Accelerator,
    model: ViTMAEForPreTraining,
    batches: list[Iterable[dataset.Batch]],
    data: list[dataset.ImageDataset],
    args: argparse.Namespace,
) -> dict[str, float]:
    """Classify held-out images by the labels of the nearest training images, in the encoder's features, in percent."""

    def encode(images: Tensor) -> Tensor:
        return model.forward_pooled(dataset.normalize(images, args.mean, args.std))

    with utils.evaluating(model):
        (bank, bank_labels), (queries, labels) = (
            training.collect_features(accelerator, part, len(images), encode)
            for part, images in zip(batches, data, strict=True)
        )
    ranked = utils.knn_classify(bank, bank_labels, queries, len(data[0].files.classes))
    return {"knn_top1_acc": utils.accuracy(ranked, labels)}


def draw_reconstructions(
    accelerator: Accelerator,
    model: ViTMAEForPreTraining,
    samples: list[dataset.Sample],
    data: dataset.ImageDataset,
    step: int,
    figures: dict[str, float],
    args: argparse.Namespace,
) -> Image.Image:
    """Draw rows of original, masked, reconstruction and error; above them the step and, of `figures`, the errors."""
    batch = dataset.collate(samples)
    pixels = batch.images.to(accelerator.device)
    images = dataset.normalize(pixels, args.mean, args.std)
    valid = dataset.patches_with_data(pixels, model.config.patch_size)
    with utils.evaluating(model), accelerator.autocast():
        loss, pred, mask = model(images, args.mask_ratio, batch.noise.to(accelerator.device), valid=valid)
    pasted = model.reconstruct(images, pred, mask).pasted
    panels = [dataset.denormalize(x, args.mean, args.std) for x in (images, pasted)]
    heading = f"{step:,} steps: loss of these images {loss.item():.4f}"
    if "model_error" in figures:
        error, copy = figures["model_error"], figures["nearest_patch_error"]
        heading = f"{step:,} steps: error {error:.4f} on unseen images, {copy:.4f} by copying the nearest visible patch"
    paths = ["another for a bad file" if s.bad_files else data.files.path(s.key.index) for s in samples]
    names = [storage.escape(Path(path).name, also_bytes=True) for path in paths if not args.demo]
    look = dict(mask_ratio=args.mask_ratio, norm_pix_loss=args.norm_pix_loss, channels=args.show_channels)
    return training.draw_reconstructions(panels, mask, model.config.grid_size, names, heading, **look)


# ------------------------------------------------------------------------------------------------ training


def main(args: argparse.Namespace) -> dict[str, float]:
    """Run the experiment and give the last held-out figures."""
    # Processes, folder, what to go on from
    accelerator, start, stepping, workers, loading = training.open_run(args)
    device = accelerator.device
    args.decoder = storage.describe_decoder()  # no flag, but saved with them: a resume reports another image decoder
    if args.demo and args.path_to_data is None:
        args.path_to_data = str(training.draw_demo_data(accelerator, args.working_directory) / "imagefolder")

    # Data: uint8 crops, and for each patch a random number (noise), both functions of (seed, epoch, index); the patches
    # of lowest noise stay visible (model.py, random_masking)
    config = build_config(args)
    train_files, val_files = training.list_splits(accelerator, args.path_to_data, args)
    training.settle(accelerator, args, SMALL, len(train_files), stepping, loading)
    training.choose_value_range(accelerator, args, train_files)
    values = dataset.build_values(args.value_range, args.mean, args.std)  # None for photographs
    if values is not None and args.augmentation == "random_crop_jitter":
        raise ValueError(f"--augmentation random_crop_jitter {JITTERED}; these images are read in their own units")
    sample = dict(seed=args.seed, channels=args.input_channels, values=values, noise_size=config.num_patches)
    sample["masking"] = utils.build_masking(args.masking, config.grid_size, args.mask_ratio)
    augment = dataset.build_pretraining_transform(config.image_hw, args.min_crop_scale, args.augmentation)
    train_data = dataset.ImageDataset(train_files, augment, keep_decoded=args.repeated_sampling > 1, **sample)
    eval_data = dataset.ImageDataset(val_files or train_files, dataset.ResizeCenterCrop(config.image_hw), **sample)
    sampler = dataset.StepSampler(
        len(train_data), crops_per_image=args.repeated_sampling, shards=train_files.shards, **stepping
    )
    loader = dataset.build_training_loader(train_data, sampler, **workers)
    eval_loader = dataset.build_eval_loader(eval_data, **loading) if val_files else None
    probe_data = [
        dataset.build_eval_images(files, config.image_hw, channels=args.input_channels, values=values)
        for files in (training.list_probe_files(accelerator, train_files, val_files, args) if args.probe_every else ())
    ]
    probe_loaders = [dataset.build_eval_loader(data, **loading) for data in probe_data]

    # Model and optimizer; cls_token and mask_token are decayed, as in the original release
    model = ViTMAEForPreTraining(config, custom_weight_init=args.custom_weight_init)
    model.global_pool = args.probe_pool
    model.activation_checkpointing = args.activation_checkpointing
    origin = load_start(model, start.resume_from, args)
    if config.pca_target and not start.resume_from and not model.pca_basis.any():  # as --init_from may have one
        images = torch.stack([sample.image for sample in dataset.pick_samples(train_data, PCA_IMAGES)])
        valid = dataset.patches_with_data(images, config.patch_size)
        model.fit_pca(dataset.normalize(images, args.mean, args.std), valid)
    peak = utils.scaled_lr(args.base_learning_rate, sampler.images_per_step)
    # Linear warmup from 0, then half a cosine (utils.cosine_lr); run.step counts complete optimizer steps, from 0
    warmup_steps = args.warmup_epochs * sampler.steps_per_epoch
    total_steps = args.epochs * sampler.steps_per_epoch
    schedule_steps = (args.schedule_epochs or args.epochs) * sampler.steps_per_epoch
    lines = {"start": origin} | describe(model, peak, sampler.images_per_step, args) | {"image decoder": args.decoder}
    kept = num_kept_patches(config.num_patches, args.mask_ratio)
    encoded = config.num_patches if args.encode_mask_tokens else kept
    tokens = dict(encoder=1 + encoded, decoder=1 + config.num_patches)
    lines |= training.note_memory(accelerator, args, model, config, tokens)
    training.describe_run(accelerator, args, sampler, train_files, val_files, lines)
    groups = param_groups_weight_decay(model, args.weight_decay)
    utils.decay_more(groups, model, biases=args.bias_weight_decay, norms=args.norm_weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=ADAM_BETAS, fused=True)
    model, optimizer, bare_model = training.prepare(accelerator, model, optimizer)

    # Loop
    crops = f", {args.repeated_sampling} crops each" if args.repeated_sampling > 1 else ""
    sizes = config.as_record(decoder=True)
    record = dict(architecture="ViTMAEForPreTraining", config=sizes, image_mean=args.mean, image_std=args.std)
    record["value_range"] = args.value_range
    identity = {"data": train_files.fingerprint() + crops}
    plan = training.Plan(sampler, train_files, args.epochs, total_steps, record, identity, "--init_from")
    figures: dict[str, float] = {}
    shown: list[dataset.Sample] = []  # chosen for the first picture, and then the same
    keeper = training.Check if args.check else training.Run
    with keeper(accelerator, start, args, plan, model=model) as run:
        for epoch in run.epochs():
            for batch in run.batches(loader):
                pixels = batch.images.to(device, non_blocking=True)  #          (N, C, H, W)
                images = dataset.normalize(pixels, args.mean, args.std)
                valid = dataset.patches_with_data(pixels, config.patch_size)  # (N, L), None for photographs
                noise = batch.noise.to(device, non_blocking=True)  #            (N, L)
                learning_rate = utils.cosine_lr(
                    run.step,
                    peak=peak,
                    warmup_steps=warmup_steps,
                    total_steps=schedule_steps,
                    minimum=args.min_learning_rate,
                )
                utils.set_learning_rate(optimizer, learning_rate)
                with accelerator.accumulate(model):
                    loss = model(images, args.mask_ratio, noise, predict_visible=False, valid=valid).loss
                    # A step whose loss or gradient is not finite is skipped on all processes, counted and named in the
                    # log; --max_nonfinite_steps of them in a row stop the run
                    accelerator.backward(utils.nan_guard(loss))
                    if accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
                        skipped = utils.skip_nonfinite(optimizer, grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                run.add(training_loss=loss)
                if accelerator.sync_gradients:
                    run.finish_step(learning_rate, skipped)

            # The epoch is complete
            saves = run.is_due(args.save_checkpoint_interval)
            probes = args.probe_every > 0 and (epoch + 1) % args.probe_every == 0
            found = {}
            if saves or probes:
                run.check_weights()
            if saves and eval_loader:
                figures = found = evaluate(accelerator, bare_model, run.watch(eval_loader), args)
            if probes:
                found = found | probe(accelerator, bare_model, list(map(run.watch, probe_loaders)), probe_data, args)
            if saves:
                shown = shown or dataset.pick_samples(eval_data, NUM_PICTURES)
                run.bad_files.note(itertools.chain(*(sample.bad_files for sample in shown)))
                picture = draw_reconstructions(accelerator, bare_model, shown, eval_data, run.step, found, args)
                run.keep_picture("reconstructions", picture)
            run.finish_epoch(found, save=saves, for_good=saves)
        run.finish()
        if not figures and eval_loader:  # a finished run that was started again
            figures = evaluate(accelerator, bare_model, eval_loader, args)
        report(accelerator, figures, run.experiment, args)
        training.end_script(__file__, accelerator, args, run.experiment, train_files, val_files)
        return figures
    return {}  # stopped by a signal


def load_start(model: ViTMAEForPreTraining, resume_from: Path | None, args: argparse.Namespace) -> str:
    """Load the weights of --init_from, unless the run goes on from a state, which has its own; say which it is."""
    if resume_from is not None:
        return f"state of {resume_from.name}" + f"; --init_from {args.init_from} is not loaded" * bool(args.init_from)
    return load_pretrained_encoder(model, args.init_from).describe() if args.init_from else "from scratch"


def describe(
    model: ViTMAEForPreTraining, peak: float, images_per_step: int, args: argparse.Namespace
) -> dict[str, str]:
    """Say what decides the result, beside what every run has."""
    of_decoder = ("decoder",) if args.encode_mask_tokens else ("decoder", "mask_token")
    decoder = sum(p.numel() for name, p in model.named_parameters() if name.startswith(of_decoder))
    total, trainable = utils.count_parameters(model)
    kept = num_kept_patches(model.config.num_patches, args.mask_ratio)
    target = "pixels normalised in each patch" if args.norm_pix_loss else "plain pixels"
    if model.config.pca_target:
        target = f"{model.config.pca_target} principal components of each patch"
    seen = "visible, the others as mask tokens" if args.encode_mask_tokens else "visible"
    lines = {
        "model": f"encoder {total - decoder:,} + decoder {decoder:,} = {total:,} parameters, "
        f"{trainable:,} of them trainable",
        "patches": f"{kept} of {model.config.num_patches} {seen} ({args.masking} masking), predicting {target}",
        "learning rate": f"{peak:.2e} = {args.base_learning_rate:.2e} x {images_per_step} / 256",
    }
    if args.augmentation != "random_crop":
        lines["augmentation"] = f"{args.augmentation} (table 1e)"
    if args.repeated_sampling > 1:
        lines["sampling"] = f"{args.repeated_sampling} crops of each image at once; as many epochs visit all images"
    return lines


def report(accelerator: Accelerator, figures: dict[str, float], experiment: Path, args: argparse.Namespace) -> None:
    """Print the last figures and where the results are; of the demo also what they mean."""
    checkpoint = experiment / f"checkpoint_{args.epochs}"
    picture = experiment / "reconstructions" / f"epoch_{args.epochs}.png"
    accelerator.print(f"{'checkpoint':<16}{checkpoint}")
    accelerator.print(f"{'picture':<16}{picture}")
    for name, value in figures.items():
        accelerator.print(f"{name:<20}{value:.5f}")
    if args.demo and "model_error" not in figures:
        accelerator.print("\nNo errors beside trivial answers: they need --no-norm_pix_loss and train/ with val/.")
    elif args.demo:
        error, copy, colour = (figures[f"{name}_error"] for name in ("model", "nearest_patch", "mean_colour"))
        accelerator.print(
            "\nMean squared error on the removed patches of unseen images (0 black, 1 white):\n"
            f"  this model                              {error:.5f}\n"
            f"  copying the nearest visible patch       {copy:.5f}   ({copy / error:.1f} times the model's)\n"
            f"  the mean colour of the visible patches  {colour:.5f}   ({colour / error:.1f} times the model's)"
        )


if __name__ == "__main__":
    with storage.explained_errors():
        main(parse_args())
