"""Starting with one's own data: from weights, without a validation folder, with more images than before."""

import argparse
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_close, draw_images, rows, weights
from safetensors.torch import save_file

import finetune_classifier
import finetune_segmentation
import pretrain_mae
from model import ViTMAEForPreTraining
from training.schedule import Span, fit_batch, settle

PRETRAIN = """--experiment_name run --epochs 2 --warmup_epochs 1 --per_gpu_batch_size 8 --num_workers 0
 --gradient_accumulation_steps 1 --base_learning_rate 0.01 --save_checkpoint_interval 2 --log_interval 2"""
SIZES = """--img_size 16 --patch_size 4 --encoder_embed_dim 32 --encoder_depth 3 --encoder_num_heads 4
 --decoder_embed_dim 16 --decoder_depth 2 --decoder_num_heads 2"""

CLASSIFY = """--img_size 16 --patch_size 4 --encoder_embed_dim 32 --encoder_depth 2 --encoder_num_heads 4 --epochs 1
 --experiment_name run --per_gpu_batch_size 4 --num_workers 0 --random_aug_magnitude 0"""
SEGMENT = """--from_scratch --img_size 32 --patch_size 4 --encoder_embed_dim 64 --encoder_depth 4 --encoder_num_heads 4
 --epochs 1 --num_classes 4 --channels 128 --norm group --per_gpu_batch_size 2 --num_workers 0 --experiment_name run"""


def flags(data: Path, work: Path, more: str = "") -> list[str]:
    return [*shlex.split(f"{PRETRAIN} {more}"), "--path_to_data", str(data), "--working_directory", str(work)]


def pretrain(data: Path, work: Path, more: str = "") -> Path:
    pretrain_mae.main(pretrain_mae.parse_args(flags(data, work, more)))
    return work / "run"


@pytest.fixture
def flat(tmp_path) -> Path:
    """A folder of 20 images, without classes or splits."""
    draw_images(tmp_path / "flat", 20)
    return tmp_path / "flat"


@pytest.fixture
def experiment(tmp_path) -> Path:
    """An experiment that holds nothing but the weights of a tiny masked autoencoder of plain pixels."""
    model = ViTMAEForPreTraining(TINY)
    folder = tmp_path / "published" / "last_checkpoint"
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    record = {"architecture": "ViTMAEForPreTraining", "config": model.config.as_record(decoder=True)}
    record |= {"image_mean": [0.4] * 3, "image_std": [0.3] * 3}
    record["config"]["norm_pix_loss"] = False
    (folder / "config.json").write_text(json.dumps(record))
    return folder.parent


# -------------------------------------------------------------------------------- from weights


def test_pretraining_starts_from_the_weights_of_an_experiment_with_their_sizes(experiment, flat, tmp_path, capsys):
    run = pretrain(flat, tmp_path / "work", f"--init_from {experiment} --base_learning_rate 0")
    printed = capsys.readouterr().out
    assert re.search(r"start           \d+ tensors loaded, from .*last_checkpoint/model\.safetensors\n", printed)
    assert_close(weights(run / "checkpoint_2"), weights(experiment / "last_checkpoint"), atol=0)  # rate 0
    record = json.loads((run / "checkpoint_2" / "config.json").read_text())
    assert record["image_mean"] == [0.4] * 3 and record["config"]["norm_pix_loss"] is False


def test_image_size_and_channels_may_differ_from_the_weights(experiment, flat, tmp_path, capsys):
    more = f"--init_from {experiment} --img_size 24 --input_channels 1 --base_learning_rate 0"
    run = pretrain(flat, tmp_path / "work", more)
    printed = capsys.readouterr().out
    assert "2 fresh (decoder_pred), 2 left out (decoder_pred), 2 resampled (decoder_pos_embed, pos_embed), " in printed
    assert "first layer adapted from 3 channels to 1, from " in printed
    total = weights(experiment / "last_checkpoint")["patch_embed.proj.weight"].sum(dim=1, keepdim=True)
    torch.testing.assert_close(weights(run / "checkpoint_2")["patch_embed.proj.weight"], total)
    record = json.loads((run / "checkpoint_2" / "config.json").read_text())
    assert record["image_mean"] == [0.5] and record["config"]["img_size"] == 24


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--encoder_depth 2", "--encoder_depth 2, but {} has 3; leave the flag out"),
        ("--decoder_depth 3", "--decoder_depth 3, but {} has 2; leave the flag out"),
        ("--model mae_vit_tiny_patch16", "--model is for training from scratch; the sizes come with {}"),
    ],
)
def test_sizes_that_contradict_the_start_are_refused(experiment, capsys, more, message):
    with pytest.raises(SystemExit):
        pretrain_mae.parse_args(["--path_to_data", "x", "--init_from", str(experiment), *shlex.split(more)])
    assert message.format(experiment) in capsys.readouterr().err


def test_encoder_alone_gets_the_decoder_of_the_named_size_or_the_one_given(tmp_path):
    encoder = {"encoder_embed_dim": 192, "encoder_depth": 1, "encoder_num_heads": 3}
    config = pretrain_mae.MAEConfig(img_size=32, **encoder)
    model = ViTMAEForPreTraining(config)
    kept = {name: value for name, value in model.state_dict().items() if "decoder" not in name and "mask" not in name}
    torch.save({"model": kept}, tmp_path / "encoder.pth")
    command = ["--path_to_data", "x", "--init_from", str(tmp_path / "encoder.pth")]
    found = pretrain_mae.build_config(pretrain_mae.parse_args(command))
    assert (found.img_size, found.encoder_depth, found.decoder_embed_dim, found.decoder_depth) == (32, 1, 128, 4)
    found = pretrain_mae.build_config(pretrain_mae.parse_args([*command, "--decoder_depth", "2"]))
    assert found.decoder_depth == 2


def test_state_of_a_run_wins_over_the_weights_it_started_from(experiment, flat, tmp_path, capsys):
    more = f"--init_from {experiment} --resume_from_checkpoint latest"
    pretrain(flat, tmp_path / "whole", f"{more} --epochs 4")  # no state yet: the weights
    pretrain(flat, tmp_path / "work", f"{more} --epochs 4")
    shutil.rmtree(tmp_path / "work" / "run" / "checkpoint_4")
    capsys.readouterr()
    pretrain(flat, tmp_path / "work", f"{more} --epochs 4")
    printed = capsys.readouterr().out
    assert f"start           state of checkpoint_2; --init_from {experiment} is not loaded\n" in printed
    last = [weights(tmp_path / name / "run" / "checkpoint_4") for name in ("whole", "work")]
    assert_close(*last, atol=0)


def test_more_images_are_told_in_words_and_the_way_out_works(flat, tmp_path):
    run = pretrain(flat, tmp_path / "work", SIZES)
    draw_images(flat / "new", 5, seed=1)
    with pytest.raises(ValueError, match="this run differs") as refused:
        pretrain(flat, tmp_path / "work", f"{SIZES} --resume_from_checkpoint latest")
    said = str(refused.value)
    assert "\n  data: 5 images more than before (25 now, 20 in the checkpoint)\n" in said and "num_images" not in said
    advice = re.search(r"instead: (--init_from \S+) in the place of --resume_from_checkpoint, and another", said)
    again = pretrain(flat, tmp_path / "again", advice[1])
    assert rows(again)[-1]["step"] == 6 and (run / "checkpoint_2").exists()


def test_other_images_of_the_same_number_and_other_sizes_are_told_apart(flat, tmp_path):
    pretrain(flat, tmp_path / "work", SIZES)
    os.rename(flat / "003.jpg", flat / "x.jpg")
    with pytest.raises(ValueError, match="data: as many images as before, but not the same ones, or under other names"):
        pretrain(flat, tmp_path / "work", f"{SIZES} --resume_from_checkpoint latest")
    with pytest.raises(ValueError, match=r"config\.encoder_depth") as refused:
        pretrain(flat, tmp_path / "work", f"{SIZES} --encoder_depth 2 --resume_from_checkpoint latest")
    assert "--init_from" not in str(refused.value)  # the weights would not fit


# -------------------------------------------------------------------------------- without a validation folder


def test_flat_folder_is_split_and_the_split_is_part_of_the_run(flat, tmp_path, capsys):
    run = pretrain(flat, tmp_path / "work", f"{SIZES} --val_fraction 0.2")
    said = "split           16 for training, 4 held out, by their paths (--val_fraction 0.2, --seed 0)\n"
    assert said in capsys.readouterr().out
    assert "testing_loss" in rows(run)[-1]
    with pytest.raises(ValueError, match=r"val_fraction: 0\.2 in the checkpoint, 0\.3 now"):
        pretrain(flat, tmp_path / "work", f"{SIZES} --val_fraction 0.3 --resume_from_checkpoint latest")


def test_val_fraction_beside_a_validation_folder_is_refused(drawn_images, drawn_pairs, tmp_path):
    with pytest.raises(ValueError, match=r"--val_fraction 0\.1 draws .* but .*val holds some; leave the flag out"):
        pretrain(drawn_images, tmp_path / "work", f"{SIZES} --val_fraction 0.1")
    command = f"{SEGMENT} --path_to_data {drawn_pairs} --val_fraction 0.1 --working_directory {tmp_path}"
    with pytest.raises(ValueError, match=r"images/validation holds some; leave the flag out"):
        finetune_segmentation.main(finetune_segmentation.parse_args(shlex.split(command)))


def test_single_image_cannot_be_split(tmp_path):
    draw_images(tmp_path / "one", 1)
    with pytest.raises(ValueError, match="needs two images at least"):
        pretrain(tmp_path / "one", tmp_path / "work", f"{SIZES} --val_fraction 0.1")


def test_classifier_without_a_validation_folder_holds_images_of_every_class_out(fork: Callable, image_folder, tmp_path):
    shutil.rmtree(image_folder / "val")
    command = [*shlex.split(CLASSIFY), "--path_to_data", str(image_folder), "--working_directory", str(tmp_path)]
    printed = fork("finetune_classifier", [*command, "--val_fraction", "0.25"], num_processes=2)
    assert "split           18 for training, 6 held out" in printed
    assert "held out        6 images in 2 classes" in printed and "testing_top1_acc" in rows(tmp_path / "run")[-1]
    judged = ["--eval_only", "--path_to_pretrained_mae_weights", str(tmp_path / "run" / "best_checkpoint")]
    judged += shlex.split(f"--path_to_data {image_folder} --val_fraction 0.25 --num_workers 0")
    printed = fork("finetune_classifier", judged)
    found = json.loads((tmp_path / "run" / "best_checkpoint" / "evaluation.json").read_text())
    assert found["num_images"] == 6
    assert found["testing_top1_acc"] == pytest.approx(rows(tmp_path / "run")[-1]["testing_top1_acc"])


def test_segmenter_without_validation_pairs_names_the_flag_and_splits_with_it(fork: Callable, drawn_pairs, tmp_path):
    data = tmp_path / "pairs"
    for kind in ("images", "annotations"):
        shutil.copytree(drawn_pairs / kind / "training", data / kind / "training")
    command = [*shlex.split(SEGMENT), "--path_to_data", str(data), "--working_directory", str(tmp_path)]
    with pytest.raises(FileNotFoundError, match=r"no validation pairs: add them, or draw some by --val_fraction 0\.1"):
        finetune_segmentation.main(finetune_segmentation.parse_args(command))
    printed = fork("finetune_segmentation", [*command, "--val_fraction", "0.3"])
    assert "split           7 for training, 3 held out" in printed and "held out        3 pairs" in printed
    assert "testing_miou" in rows(tmp_path / "run")[-1]


# -------------------------------------------------------------------------------- recipes for few images


@pytest.mark.parametrize(
    ("num_images", "processes", "batch"),
    [(1, 1, 64), (500, 1, 64), (500, 4, 64), (2_000, 1, 64), (2_048, 1, 128), (5_000, 2, 256), (10**6, 1, 256)],
)
def test_open_batch_leaves_an_epoch_its_steps_on_any_number_of_processes(num_images, processes, batch):
    assert fit_batch(num_images, pretrain_mae.SMALL, processes) == batch


@pytest.mark.parametrize(("processes", "batch"), [(1, 2048), (8, 16_384), (16, 16_384), (128, 16_384)])
def test_batch_of_a_linear_probe_on_imagenet_is_the_papers_at_most(processes, batch):
    assert fit_batch(1_281_167, finetune_classifier.PROBE, processes) == batch


def test_what_a_recipe_leaves_open_follows_from_the_images():
    accelerator = argparse.Namespace(num_processes=2, print=lambda text: None)
    args = argparse.Namespace(
        per_gpu_batch_size=None, epochs=None, warmup_epochs=None, save_checkpoint_interval=None,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    stepping, loading = {"micro_batch_size": 32, "seed": 0}, {"batch_size": 32}
    settle(accelerator, args, Span(2_000, 64, 256), 1_000, stepping, loading)
    assert (args.per_gpu_batch_size, args.epochs, args.save_checkpoint_interval) == (32, 134, 14)  # 15 steps an epoch
    assert args.warmup_epochs == pytest.approx(6.7)
    assert (stepping, loading) == ({"micro_batch_size": 8, "seed": 0}, {"batch_size": 8})
    given = argparse.Namespace(**vars(args) | {"epochs": 3, "warmup_epochs": 1.0, "per_gpu_batch_size": 8})
    settle(accelerator, given, Span(2_000, 64, 256), 1_000, stepping, loading)
    assert (given.per_gpu_batch_size, given.epochs, given.warmup_epochs) == (8, 3, 1.0)


def test_small_recipe_pretrains_and_resumes_as_it_was(flat, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain_mae, "SMALL", Span(steps=3, lowest_batch=4, highest_batch_per_process=256))
    command = [*shlex.split(f"--recipe small {SIZES} --experiment_name run --num_workers 0 --path_to_data {flat}")]
    for work in ("whole", "part"):
        pretrain_mae.main(pretrain_mae.parse_args([*command, "--working_directory", str(tmp_path / work)]))
    assert "recipe          --per_gpu_batch_size 4, --epochs 1, as fits 20 training images\n" in capsys.readouterr().out
    draw_images(flat / "more", 60, seed=1)  # the same recipe is now another run
    with pytest.raises(ValueError, match="data: 60 images more than before"):
        again = ["--working_directory", str(tmp_path / "part"), "--resume_from_checkpoint", "latest"]
        pretrain_mae.main(pretrain_mae.parse_args([*command, *again]))
    shutil.rmtree(flat / "more")
    pretrain_mae.main(pretrain_mae.parse_args([*command, *again]))  # done, and the same
    assert rows(tmp_path / "part" / "run")[-1]["step"] == rows(tmp_path / "whole" / "run")[-1]["step"] == 5


def test_small_recipes_choose_a_small_model_and_flags_win(tmp_path):
    command = shlex.split("--path_to_data x --recipe small")
    args = pretrain_mae.parse_args(command)
    assert (pretrain_mae.build_config(args).encoder_embed_dim, args.epochs, args.per_gpu_batch_size) == (
        192,
        None,
        None,
    )
    args = pretrain_mae.parse_args([*command, *shlex.split("--model mae_vit_small_patch16 --epochs 40")])
    assert (pretrain_mae.build_config(args).encoder_embed_dim, args.epochs) == (384, 40)
    args = finetune_classifier.parse_args(command)
    assert (args.encoder_embed_dim, args.epochs, args.layer_decay, args.learning_rate) == (192, None, 1.0, 5e-4)
    args = finetune_classifier.parse_args([*command, "--base_learning_rate", "1e-3"])
    assert (args.learning_rate, args.base_learning_rate) == (None, 1e-3)
    args = finetune_segmentation.parse_args([*command, "--from_scratch"])
    assert (args.encoder_embed_dim, args.img_size, args.iterations, args.per_gpu_batch_size) == (192, 256, 5_000, 8)


@pytest.mark.parametrize("more", ["--recipe small --epochs 2", "--linear_probe --epochs 2 --global_pool avg"])
def test_classifier_fits_its_batch_to_few_images(fork: Callable, experiment, image_folder, tmp_path, more):
    command = f"""--path_to_data {image_folder} --path_to_pretrained_mae_weights {experiment} --experiment_name run
 --working_directory {tmp_path} --num_workers 0 {more}"""
    printed = fork("finetune_classifier", shlex.split(command))
    batch = "32" if "small" in more else "64"
    assert f"recipe          --per_gpu_batch_size {batch}, as fits 24 training images\n" in printed
    assert "warmup 0.1 epochs" in printed and "testing_top1_acc" in rows(tmp_path / "run")[-1]
