"""Pretrain a masked autoencoder on images (He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021).

Three quarters of an image's patches are removed, a ViT encodes the rest, and a light decoder predicts the removed
pixels. The encoder is then finetuned with finetune_classifier.py or finetune_segmentation.py.

Try it, no data needed, three to four minutes on two CPU cores:
    accelerate launch pretrain_mae.py --demo
ImageNet, ViT-B/16, 800 epochs, effective batch 4096 (paper, table 8), here on 8 GPUs:
    accelerate launch pretrain_mae.py --path_to_data IMAGENET --per_gpu_batch_size 512 --gradient_accumulation_steps 1
Published: 81 % top-1 after 800 epochs and 100 of finetuning (PyTorch-Adventures), 83.6 % after 1600 (paper, table 3).
This code at that size: not run yet.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from timm.optim import param_groups_weight_decay
from torch import Tensor
from torch.utils.data import DataLoader

from dataset import (
    EVAL_EPOCH,
    Batch,
    ImageDataset,
    ResizeCenterCrop,
    SampleKey,
    StepSampler,
    build_eval_images,
    build_eval_loader,
    build_pretraining_transform,
    build_training_loader,
    collate,
    denormalize,
    normalize,
)
from model import MODEL_CONFIGS, MAEConfig, ViTMAEForPreTraining, num_kept_patches
from storage.decoding import describe_decoder
from storage.demo import write_demo_data
from storage.lists import FileList, ListCache, check_same_classes, find_splits, list_images
from training.checkpoints import Checkpoints, check_weights, resume
from training.flags import HelpFormatter, add_run_flags, check_run_flags, micro_batch_size
from training.process import (
    build_accelerator,
    cap_workers,
    choose_kernels,
    collect_features,
    compile_in_place,
    describe_processes,
    process_slice,
)
from training.records import BadFiles, SkippedSteps, StepClock, build_bar, peak_memory_gb, save_picture
from training.run import open_experiment, refuse_inside, repetition_note, start_records
from training.signals import GO_ON, STOP, Interrupted, Interruptions
from utils import (
    accuracy,
    cosine_lr,
    draw_rows,
    knn_classify,
    nan_guard,
    reconstruction_titles,
    scaled_lr,
    set_learning_rate,
    skip_nonfinite,
)

# The paper's recipe (table 8), in the batches of the project's command.
# Deviation: gradients are clipped to a norm of 1 (--max_grad_norm); the original release never clips. Reason: the
# project's command does. Effect: not measured; 0 turns it off.
RECIPE = dict(
    experiment_name="MAEPretraining",
    epochs=800,
    warmup_epochs=40,
    per_gpu_batch_size=2048,
    gradient_accumulation_steps=4,
    weight_decay=0.05,
    num_workers=32,
)
# Three to four minutes on two CPU cores. Plain pixels, so that the pictures and errors need no true mean put back.
DEMO_RECIPE = dict(
    experiment_name="demo",
    img_size=[64],
    patch_size=8,
    encoder_embed_dim=96,
    encoder_depth=4,
    encoder_num_heads=3,
    encoder_mlp_ratio=2.0,
    decoder_embed_dim=96,
    decoder_depth=2,
    decoder_num_heads=3,
    decoder_mlp_ratio=2.0,
    norm_pix_loss=False,
    min_crop_scale=0.5,
    epochs=18,
    warmup_epochs=1,
    save_checkpoint_interval=6,
    per_gpu_batch_size=32,
    gradient_accumulation_steps=1,
    base_learning_rate=2.4e-2,
    num_workers=1,
)
ADAM_BETAS = (0.9, 0.95)
NUM_PICTURES = 8
SIZE_FLAGS = [field.name for field in dataclasses.fields(MAEConfig) if field.name.startswith(("encoder", "decoder"))]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add_run_flags(parser)
    mae = parser.add_argument_group("masked autoencoder")
    mae.add_argument(
        "--model",
        choices=MODEL_CONFIGS,
        default="mae_vit_base_patch16",
        help="sizes; the flags below override single ones",
    )
    mae.add_argument("--patch_size", type=int, help="side of a patch in pixels (default: the model's)")
    for name in SIZE_FLAGS:
        mae.add_argument(f"--{name}", type=type(getattr(MAEConfig(), name)), help="(default: the model's)")
    mae.add_argument("--mask_ratio", type=float, default=0.75, help="share of the patches that is removed")
    mae.add_argument(
        "--norm_pix_loss",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="predict each patch without its mean and contrast",
    )
    mae.add_argument(
        "--custom_weight_init",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="initialise as the original release, not as the layers do",
    )
    mae.add_argument(
        "--base_learning_rate",
        type=float,
        default=1.5e-4,
        help="for 256 images per step; scaled to the effective batch",
    )
    mae.add_argument("--min_learning_rate", type=float, default=0.0, help="the cosine's end")
    mae.add_argument(
        "--min_crop_scale", type=float, default=0.2, help="smallest share of the image that a random crop covers"
    )
    mae.add_argument(
        "--repeated_sampling",
        type=int,
        default=1,
        metavar="CROPS",
        help="crops of each decoded image in a forward pass; epochs keep their number of crops, so that R epochs visit "
        "every image once",
    )
    probe = parser.add_argument_group("online view")
    probe.add_argument(
        "--probe_every",
        type=int,
        default=0,
        metavar="EPOCHS",
        help="log how well the encoder's features tell the classes apart (knn_top1_acc, percent); 0 never",
    )
    probe.add_argument("--path_to_probe_data", help="train/ and val/ with class folders (default: --path_to_data)")
    probe.add_argument("--probe_images", type=int, default=5000, help="at most so many of each of the two")
    probe.add_argument("--probe_pool", choices=("avg", "cls"), default="avg", help="mean of the patch tokens, or cls")
    parser.set_defaults(**RECIPE)
    arguments = parser.parse_known_args(argv)[0]
    if arguments.demo:
        parser.set_defaults(**DEMO_RECIPE)
    args = parser.parse_args(argv)
    if args.path_to_data is None and not args.demo:
        parser.error(
            "give --path_to_data FOLDER to train on your images, or --demo to draw a small data set and train on it"
        )
    check_run_flags(parser, args)
    try:
        num_kept_patches(build_config(args).num_patches, args.mask_ratio)
    except ValueError as error:
        parser.error(str(error))
    if args.mask_ratio == 0:
        parser.error("--mask_ratio 0 removes nothing, so there is nothing to learn; the paper removes 0.75")
    if args.probe_every < 0 or args.probe_images < 1:
        parser.error("--probe_every cannot be negative, and --probe_images must be at least 1")
    if args.repeated_sampling < 1 or micro_batch_size(args) % args.repeated_sampling:
        parser.error(
            f"--repeated_sampling {args.repeated_sampling} must divide the {micro_batch_size(args)} images of a "
            "forward pass (--per_gpu_batch_size / --gradient_accumulation_steps)"
        )
    if not 0 < args.min_crop_scale <= 1:
        parser.error(f"--min_crop_scale is a share above 0 and up to 1, not {args.min_crop_scale}")
    return args


def build_config(args: argparse.Namespace) -> MAEConfig:
    """Take the named size and override what was given by flag."""
    names = [*SIZE_FLAGS, "patch_size"]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return dataclasses.replace(
        MODEL_CONFIGS[args.model],
        img_size=args.img_size,
        input_channels=args.input_channels,
        norm_pix_loss=args.norm_pix_loss,
        **given,
    )


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: ViTMAEForPreTraining,
    loader: DataLoader,
    bad_files: BadFiles,
    args: argparse.Namespace,
    watch: Callable[[DataLoader], Iterable[Batch]] = iter,
) -> dict[str, float]:
    """Reconstruct held-out images, each with its own fixed mask, and average over the images of all processes.

    `testing_loss` is the training loss. For a model that predicts plain pixels also the mean squared error on the
    removed patches, with 0 black and 1 white, beside two answers that need no learning (see `trivial_answers`).
    """
    sums, num_images = {}, 0
    model.eval()
    for batch in watch(loader):
        bad_files.note(batch.bad_files)
        images = normalize(batch.images.to(accelerator.device), args.mean, args.std)
        with accelerator.autocast():
            loss, pred, mask = model(images, args.mask_ratio, batch.noise.to(accelerator.device))
        values = {"testing_loss": loss}
        if not args.norm_pix_loss:
            reconstructed = model.reconstruct(images, pred, mask).reconstructed
            target, answer = (model.patchify(denormalize(x, args.mean, args.std)) for x in (images, reconstructed))
            answers = {"model_error": answer, **trivial_answers(target, mask, model)}
            for name, answer in answers.items():
                values[name] = ((answer - target).square().mean(dim=2) * mask).sum() / mask.sum()
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(images)
        num_images += len(images)
    model.train()
    shares = gather_object([(sums, num_images)])  # as objects, because the share of a process may be empty
    total = sum(count for _, count in shares)
    return {name: sum(share.get(name, 0.0) for share, _ in shares) / total for name in shares[0][0]}


def trivial_answers(target: Tensor, mask: Tensor, model: ViTMAEForPreTraining) -> dict[str, Tensor]:
    """Answer for all patches, each (N, L, P*P*C), without learning anything.

    `mean_colour_error` is of the mean colour of the image's visible patches, `nearest_patch_error` of a copy of the
    visible patch that is nearest in the grid (the first in reading order, where several are).
    """
    visible = (1 - mask)[:, :, None]  #                                               (N, L, 1)
    pixels = target.unflatten(2, (-1, model.config.input_channels))  #                (N, L, P*P, C)
    colour = (pixels.mean(dim=2) * visible).sum(dim=1) / visible.sum(dim=1)  #        (N, C)
    h, w = model.config.grid_size
    places = torch.cartesian_prod(torch.arange(h), torch.arange(w)).to(target.device)  # (L, 2)
    distances = (places[:, None] - places).square().sum(dim=2)  #                     (L, L), whole numbers
    distances = distances + mask[:, None, :] * (h * h + w * w)  #                     (N, L, L), removed ones too far
    nearest = distances.argmin(dim=2)  #                                              (N, L)
    return {
        "mean_colour_error": colour[:, None, None].expand_as(pixels).flatten(2),
        "nearest_patch_error": torch.gather(target, 1, nearest[:, :, None].expand_as(target)),
    }


@torch.no_grad()
def probe(
    accelerator: Accelerator,
    model: ViTMAEForPreTraining,
    loaders: tuple[DataLoader, DataLoader],
    args: argparse.Namespace,
    watch: Callable[[DataLoader], Iterable[Batch]] = iter,
) -> dict[str, float]:
    """Classify held-out images by the labels of the nearest training images, in the encoder's features, in percent."""

    def encode(images: Tensor) -> Tensor:
        with accelerator.autocast():
            return model.forward_pooled(normalize(images, args.mean, args.std))

    model.eval()
    (bank, bank_labels), (queries, labels) = (
        collect_features(accelerator, loader, encode, watch) for loader in loaders
    )
    model.train()
    ranked = knn_classify(bank, bank_labels, queries, len(loaders[0].dataset.files.classes))
    return {"knn_top1_acc": accuracy(ranked, labels)}


def build_probe_loaders(
    accelerator: Accelerator, config: MAEConfig, num_workers: int, args: argparse.Namespace
) -> tuple[DataLoader, DataLoader]:
    """Give the labelled images of the online view: those that lend their labels, and those that are classified."""
    root = args.path_to_probe_data or args.path_to_data
    train_folder, val_folder = find_splits(root)
    if val_folder is None:
        raise FileNotFoundError(f"--probe_every needs {root} to hold train/ and val/, or give --path_to_probe_data")
    with accelerator.local_main_process_first():
        rescan = args.rescan_data and accelerator.is_local_main_process
        cache = ListCache(Path(args.working_directory) / "file_lists", rescan)
        lists = [list_images(folder, cache) for folder in (train_folder, val_folder)]
    check_same_classes(lists[1].classes, lists[0].classes, val_folder, str(train_folder))
    if not lists[0].classes:
        raise ValueError(f"--probe_every needs labels, but {train_folder} has images outside class folders")
    return tuple(
        build_eval_loader(
            build_eval_images(files.subsample(args.probe_images), config.image_hw, channels=args.input_channels),
            micro_batch_size(args),
            num_workers,
            *process_slice(accelerator),
        )
        for files in lists
    )


@torch.no_grad()
def draw_reconstructions(
    accelerator: Accelerator, model: ViTMAEForPreTraining, batch: Batch, args: argparse.Namespace, path: Path
) -> None:
    """Draw rows of original, masked, reconstruction, and reconstruction with the visible patches pasted in."""
    images = normalize(batch.images.to(accelerator.device), args.mean, args.std)
    model.eval()
    with accelerator.autocast():
        _, pred, mask = model(images, args.mask_ratio, batch.noise.to(accelerator.device))
    model.train()
    panels = [denormalize(x, args.mean, args.std) for x in (images, *model.reconstruct(images, pred, mask))]
    if accelerator.is_main_process:
        titles = reconstruction_titles(args.mask_ratio, args.norm_pix_loss)
        save_picture(draw_rows(dict(zip(titles, panels, strict=True))), path)


def main(args: argparse.Namespace) -> dict[str, float]:
    """Run the experiment and give the last held-out figures."""
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
    args.decoder = describe_decoder()  # no flag: kept with them, so that a resume tells of another one
    if args.demo and args.path_to_data is None:
        demo_data = Path(args.working_directory) / "demo_data"
        say(f"demo            scenes are drawn into {demo_data}, unless they are there already")
        with accelerator.main_process_first():
            write_demo_data(demo_data)
        args.path_to_data = str(demo_data / "imagefolder")

    # Data: uint8 crops and masking noise, both functions of (seed, epoch, index)
    config = build_config(args)
    train_folder, val_folder = find_splits(args.path_to_data)
    refuse_inside(args.working_directory, train_folder)
    with accelerator.local_main_process_first():
        rescan = args.rescan_data and accelerator.is_local_main_process  # the others read what it found
        cache = ListCache(Path(args.working_directory) / "file_lists", rescan)
        train_files = list_images(train_folder, cache)
        val_files = list_images(val_folder, cache) if val_folder else None
    sample = dict(seed=args.seed, channels=args.input_channels, noise_size=config.num_patches)
    repeated = args.repeated_sampling
    augment = build_pretraining_transform(config.image_hw, args.min_crop_scale)
    train_data = ImageDataset(train_files, augment, keep_decoded=repeated > 1, **sample)
    eval_data = ImageDataset(val_files or train_files, ResizeCenterCrop(config.image_hw), **sample)
    sampler = StepSampler(
        len(train_data),
        micro_batch_size(args),
        accumulation_steps=args.gradient_accumulation_steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        seed=args.seed,
        crops_per_image=repeated,
    )
    num_workers = cap_workers(args.num_workers)
    loader = build_training_loader(train_data, sampler, num_workers, device.type == "cuda")
    eval_loader = (
        build_eval_loader(eval_data, micro_batch_size(args), num_workers, *process_slice(accelerator))
        if val_files
        else None
    )
    probe_loaders = build_probe_loaders(accelerator, config, num_workers, args) if args.probe_every else None
    spacing = max(1, len(eval_data) // NUM_PICTURES)
    shown = collate([eval_data[SampleKey(EVAL_EPOCH, i)] for i in range(0, len(eval_data), spacing)[:NUM_PICTURES]])

    # Model and optimizer; cls_token and mask_token are decayed, as in the original release
    model = ViTMAEForPreTraining(config, custom_weight_init=args.custom_weight_init)
    model.global_pool = args.probe_pool
    peak_learning_rate = scaled_lr(args.base_learning_rate, sampler.images_per_step)
    describe_run(accelerator, args, model, sampler, peak_learning_rate, train_files, val_files, num_workers)
    groups = param_groups_weight_decay(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=peak_learning_rate, betas=ADAM_BETAS, fused=True)
    model.activation_checkpointing = args.activation_checkpointing
    if device.type == "cpu" and accelerator.mixed_precision == "bf16":
        model.unfuse_attention()
    compile_in_place(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    bare_model = accelerator.unwrap_model(model)

    # Resume: the whole state, or a clear refusal
    config_record = {
        "architecture": "ViTMAEForPreTraining",
        "config": dataclasses.asdict(config),
        "image_mean": args.mean,
        "image_std": args.std,
    }
    identity = {
        "effective_batch_size": sampler.images_per_step,
        "num_images": len(train_data),
        "data": train_files.fingerprint() + (f", {repeated} crops each" if repeated > 1 else ""),
        "seed": args.seed,
    }
    first_epoch, step, row = 0, 0, {}
    if start.resume_from is not None:
        state = resume(accelerator, start.resume_from, config_record, identity)
        first_epoch, step, row = state["epoch"], state["step"], state["row"]
    total_steps = args.epochs * sampler.steps_per_epoch

    # Records: one run at a time in this folder
    log = start_records(accelerator, start, args, step)
    bad_files = BadFiles(experiment, len(train_data), args.max_bad_fraction)
    bad_files.note(shown.bad_files)
    skipped_steps = SkippedSteps(
        experiment, lambda step: [train_files.path(i) for i in sampler.images_of(step)], args.max_nonfinite_steps
    )
    checkpoints = Checkpoints(accelerator, experiment, args.keep_checkpoints)
    interruptions = Interruptions(accelerator, checkpoints, args.save_minutes)

    def save(epoch: int, row: dict, *, epoch_ends: bool = False, for_good: bool = False) -> bool:
        """Save after `epoch` complete epochs; `row` is one that waits for its evaluation."""
        state = identity | {"epoch": epoch, "step": step, "row": row}
        return checkpoints.save(model, config_record, state, epoch_ends=epoch_ends, for_good=for_good)

    # Loop
    bar = build_bar(accelerator, total_steps, step)
    clock = StepClock(say)
    step_loss = torch.zeros((), device=device)
    pending = []  # loss of each step since the last row, and whether it was left out; on the device
    figures: dict[str, float] = {}
    saved = True
    for epoch in range(first_epoch, args.epochs):
        sampler.set_epoch(epoch, first_step=step - epoch * sampler.steps_per_epoch)
        saves = (epoch + 1) % args.save_checkpoint_interval == 0 or epoch + 1 == args.epochs
        probes = args.probe_every > 0 and (epoch + 1) % args.probe_every == 0
        for batch in clock.watch(loader):
            bad_files.note(batch.bad_files)
            images = normalize(batch.images.to(device, non_blocking=True), args.mean, args.std)
            noise = batch.noise.to(device, non_blocking=True)
            learning_rate = cosine_lr(
                step,
                peak=peak_learning_rate,
                warmup_steps=args.warmup_epochs * sampler.steps_per_epoch,
                total_steps=total_steps,
                minimum=args.min_learning_rate,
            )
            set_learning_rate(optimizer, learning_rate)
            with accelerator.accumulate(model):
                loss = model(images, args.mask_ratio, noise, predict_visible=False).loss
                accelerator.backward(nan_guard(loss))
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
                    skipped = skip_nonfinite(optimizer, grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            step_loss += loss.detach() / args.gradient_accumulation_steps
            if not accelerator.sync_gradients:
                continue

            # An optimizer step is complete
            step += 1
            pending.append(torch.stack([step_loss, skipped]))
            step_loss.zero_()
            bar.update()
            request = interruptions.agree()
            epoch_ends = step == (epoch + 1) * sampler.steps_per_epoch
            if step > 1 and step % args.log_interval and not epoch_ends and request == GO_ON:
                continue

            # Row: the losses cross to the host here and nowhere else
            window = accelerator.reduce(torch.stack(pending), "mean").cpu()  # (steps, 2)
            pending.clear()
            finite = window[:, 1] == 0
            training_loss = window[finite, 0].mean().item()
            skipped_steps.note(accelerator, (~finite).tolist(), step, bar.write)
            row = {
                "step": step,
                "epoch": step / sampler.steps_per_epoch,
                "training_loss": training_loss if finite.any() else None,
                "learning_rate": learning_rate,
                **clock.read(accelerator.num_processes),
                "memory_gb": peak_memory_gb(device),
                "bad_files": bad_files.share(accelerator, bar.write),
                "nonfinite_steps": skipped_steps.count,
            }
            bar.set_postfix_str(
                f"loss {training_loss:.4f}, lr {learning_rate:.1e}, {row['images_per_second']:.0f} images/s, "
                f"{row['data_wait_fraction']:.0%} waiting for data",
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
        if saves or probes:
            check_weights(accelerator, model, experiment, step)
        try:
            if saves and eval_loader:
                figures = evaluate(accelerator, bare_model, eval_loader, bad_files, args, interruptions.watch)
                row |= figures
            if probes:
                row |= probe(accelerator, bare_model, probe_loaders, args, interruptions.watch)
        except Interrupted:
            interruptions.leave(log, bar, save(epoch, row), step)
            return {}
        log.write(row)
        if saves:
            picture = experiment / "reconstructions" / f"epoch_{epoch + 1}.png"
            draw_reconstructions(accelerator, bare_model, shown, args, picture)
            log.picture("reconstructions", picture, step)
        request = interruptions.agree()
        if saves or request != GO_ON:
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
    if not figures and eval_loader:  # a finished run that was started again
        figures = evaluate(accelerator, bare_model, eval_loader, bad_files, args)
    checkpoints.finish(step)
    folder = experiment / f"checkpoint_{args.epochs}"
    say(f"checkpoint      {folder}")
    say(f"picture         {experiment / 'reconstructions' / f'epoch_{args.epochs}.png'}")
    for name, value in figures.items():
        say(f"{name:<20}{value:.5f}")
    if args.demo:
        report_demo(say, figures, folder, val_files)
    accelerator.end_training()
    return figures


def describe_run(
    accelerator: Accelerator,
    args: argparse.Namespace,
    model: ViTMAEForPreTraining,
    sampler: StepSampler,
    learning_rate: float,
    train_files: FileList,
    val_files: FileList | None,
    num_workers: int,
) -> None:
    """Print what decides the result, before any long work."""
    num_processes, passes = accelerator.num_processes, args.gradient_accumulation_steps
    decoder = sum(p.numel() for name, p in model.named_parameters() if name.startswith(("decoder", "mask_token")))
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = num_kept_patches(model.config.num_patches, args.mask_ratio)
    lines = {
        "model": f"encoder {total - decoder:,} + decoder {decoder:,} = {total:,} parameters, "
        f"{trainable:,} of them trainable",
        "patches": f"{kept} of {model.config.num_patches} visible, predicting "
        + ("pixels normalised in each patch" if args.norm_pix_loss else "plain pixels"),
        "training": train_files.describe(),
        "held out": val_files.describe() if val_files else "none: no train/ with val/ or validation/ beside it",
        "effective batch": f"{sampler.images_per_step} = {num_processes} processes x {passes} forward passes "
        f"x {sampler.micro_batch_size} images",
        "learning rate": f"{learning_rate:.2e} = {args.base_learning_rate:.2e} x {sampler.images_per_step} / 256",
        "schedule": f"{args.epochs} epochs of {sampler.steps_per_epoch:,} steps, warmup {args.warmup_epochs:g} epochs",
        "decoder": args.decoder,
        "runs on": describe_processes(accelerator, num_workers, args.num_workers),
    }
    if args.repeated_sampling > 1:
        lines["sampling"] = f"{args.repeated_sampling} crops of each image at once; as many epochs visit all images"
    if len(train_files) < sampler.images_per_step:
        lines["note"] = repetition_note(len(train_files), sampler.images_per_step)
    for name, text in lines.items():
        accelerator.print(f"{name:<16}{text}")


def report_demo(
    say: Callable[[str], None], figures: dict[str, float], folder: Path, val_files: FileList | None
) -> None:
    """Say what the demo showed, and what to do next."""
    if "model_error" not in figures:
        say("\nNo errors beside trivial answers: they need --no-norm_pix_loss and data with train/ and val/.")
        return
    model, copy, colour = (figures[f"{name}_error"] for name in ("model", "nearest_patch", "mean_colour"))
    tool = Path(__file__).parent / "tools" / "reconstruct.py"
    say(
        "\nMean squared error on the removed patches of unseen images (0 black, 1 white):\n"
        f"  this model                              {model:.5f}\n"
        f"  copying the nearest visible patch       {copy:.5f}   ({copy / model:.1f} times the model's)\n"
        f"  the mean colour of the visible patches  {colour:.5f}   ({colour / model:.1f} times the model's)\n"
        "Next, any image, such as this unseen one:\n"
        f"  python {tool} --checkpoint {folder} {val_files.path(0)} --output reconstruction.png"
    )


if __name__ == "__main__":
    main(parse_args())
