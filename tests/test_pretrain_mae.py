"""The pretraining run: resumed, accumulated and spread runs against the plain one, refusals, and what it leaves."""

import functools
import io
import itertools
import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, assert_close, launch, rows, weights
from PIL import Image
from torch._dynamo.utils import counters

import finetune_classifier
import model as model_module
import training.data
from dataset import (
    EVAL_EPOCH,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Batch,
    ImageDataset,
    ResizeCenterCrop,
    SampleKey,
    StepSampler,
    build_pretraining_transform,
    collate,
    normalize,
)
from model import MAEConfig, ViTMAEForPreTraining, load_pretrained_mae
from pretrain_mae import build_config, evaluate, main, parse_args
from storage import decoding
from storage.demo import write_demo_data
from storage.lists import list_images
from training.run import Run
from utils import trivial_answers

TINY_FLAGS = """--experiment_name run --img_size 16 --patch_size 4 --encoder_embed_dim 32 --encoder_depth 2
 --encoder_num_heads 4 --decoder_embed_dim 16 --decoder_depth 1 --decoder_num_heads 2 --epochs 4 --warmup_epochs 1
 --per_gpu_batch_size 8 --gradient_accumulation_steps 1 --base_learning_rate 0.01 --save_checkpoint_interval 2
 --num_workers 0 --log_interval 2"""


TINY_SIZES = dict(embed_dim=4, depth=1, num_heads=1)
MEAN, STD = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))


def flags(data: Path, work: Path, *more: str) -> list[str]:
    return [*shlex.split(TINY_FLAGS), "--path_to_data", str(data), "--working_directory", str(work), *more]


def train(data: Path, work: Path, *more: str) -> Path:
    main(parse_args(flags(data, work, *more)))
    return work / "run"


@pytest.fixture(scope="module")
def finished(drawn_images, tmp_path_factory) -> Path:
    """One plain run of 12 steps, not to be changed."""
    from accelerate.state import AcceleratorState, GradientState

    experiment = train(drawn_images, tmp_path_factory.mktemp("work"))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return experiment


# -------------------------------------------------------------------------------- what a run leaves


def test_run_leaves_checkpoints_arguments_log_and_pictures(finished):
    assert sorted(entry.name for entry in finished.iterdir()) == [
        ".lock",
        "DONE",
        "args.json",
        "checkpoint_2",
        "checkpoint_4",
        "last_checkpoint",
        "log.jsonl",
        "reconstructions",
    ]
    assert json.loads((finished / "args.json").read_text())["base_learning_rate"] == 0.01
    log = rows(finished)
    assert [row["step"] for row in log] == [1, 2, 3, 4, 6, 8, 9, 10, 12]  # 3 steps an epoch
    assert all(math.isfinite(row["training_loss"]) for row in log)
    assert log[0]["learning_rate"] == 0.0 and 0 < log[-1]["learning_rate"] < log[4]["learning_rate"]
    assert [("testing_loss" in row) for row in log] == [row["step"] in (6, 12) for row in log]
    figures = {"images_per_second", "data_wait_fraction", "memory_gb", "bad_files", "epoch"}
    assert all(figures <= row.keys() for row in log)
    with Image.open(finished / "reconstructions" / "epoch_4.png") as picture:
        assert picture.width > 8 * 128 and picture.height > 4 * 128


def test_run_learns(finished):
    log = rows(finished)
    assert log[-1]["testing_loss"] < log[4]["testing_loss"] < log[0]["training_loss"]


def test_checkpoint_loads_into_the_model_its_config_names(finished):
    record = json.loads((finished / "checkpoint_4" / "config.json").read_text())
    model = ViTMAEForPreTraining(MAEConfig(**record["config"]))
    model.load_state_dict(weights(finished / "checkpoint_4"))
    assert record["image_mean"] == [0.485, 0.456, 0.406]


# -------------------------------------------------------------------------------- the same run, otherwise


def test_resumed_run_equals_the_uninterrupted_bit_for_bit(finished, interrupted, drawn_images):
    torch.rand(3)  # whatever else the process draws must not matter
    train(drawn_images, interrupted.parent, "--resume_from_checkpoint", "latest")
    assert_close(weights(interrupted / "checkpoint_4"), weights(finished / "checkpoint_4"), atol=0)
    losses = [{k: row[k] for k in ("step", "training_loss", "learning_rate")} for row in rows(finished)]
    assert [{k: row[k] for k in losses[0]} for row in rows(interrupted)] == losses
    assert (interrupted / "args_from_checkpoint_2.json").exists()


def test_run_equals_the_same_steps_in_plain_torch(drawn_images, tmp_path):
    """Replay the recipe by hand: groups, betas, decay, warmup, cosine, accumulation, and clipping once a step."""
    more = (
        "--gradient_accumulation_steps 2 --max_grad_norm 0.1 --weight_decay 0.5 --epochs 3 --save_checkpoint_interval 3"
    )
    experiment = train(drawn_images, tmp_path, *shlex.split(more))

    config = build_config(parse_args(flags(drawn_images, tmp_path)))
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(config)
    trained = [(name, p) for name, p in model.named_parameters() if not name.endswith("pos_embed")]
    decayed = [p for name, p in trained if p.ndim > 1]
    free = [p for name, p in trained if p.ndim == 1]
    assert any(p is model.mask_token for p in decayed) and any(p is model.norm.weight for p in free)
    groups = [{"params": decayed, "weight_decay": 0.5}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    data = ImageDataset(
        list_images(drawn_images / "train"), build_pretraining_transform((16, 16), 0.2), seed=0, noise_size=16
    )
    sampler = StepSampler(24, 4, accumulation_steps=2, seed=0)
    norms, step = [], 0
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = [collate([data[key] for key in keys]) for keys in sampler]
        for pair in zip(batches[::2], batches[1::2], strict=True):
            for batch in pair:
                images = (batch.images / 255 - MEAN) / STD
                (model(images, 0.75, batch.noise).loss / 2).backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
            peak, warmup = 0.01 * 8 / 256, 3
            share = peak * step / warmup if step < warmup else peak / 2 * (1 + math.cos(math.pi * (step - warmup) / 6))
            for group in optimizer.param_groups:
                group["lr"] = share
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    assert min(norms) > 0.1  # the clipping was felt at every step
    assert_close(weights(experiment / "checkpoint_3"), dict(model.state_dict()), atol=1e-6)


def test_run_whose_schedule_is_longer_is_extended_as_if_it_had_been_as_long(finished, drawn_images, tmp_path, capsys):
    train(drawn_images, tmp_path, "--epochs", "2", "--schedule_epochs", "4")
    longer = train(drawn_images, tmp_path, "--resume_from_checkpoint", "latest")
    assert "learning rate   jumps" not in capsys.readouterr().out
    assert_close(weights(longer / "checkpoint_4"), weights(finished / "checkpoint_4"), atol=0)


def test_extended_run_whose_learning_rate_jumps_says_so(drawn_images, tmp_path, capsys):
    train(drawn_images, tmp_path, "--epochs", "2")
    train(drawn_images, tmp_path, "--resume_from_checkpoint", "latest", "--epochs", "8")
    said = capsys.readouterr().out
    assert said.count("learning rate   jumps from ") == 1 and "at step 7, because the schedule is another one" in said


def test_accumulated_run_resumes_as_it_was(drawn_images, tmp_path):
    accumulated = ("--gradient_accumulation_steps", "2")
    whole = train(drawn_images, tmp_path / "whole", *accumulated)
    part = tmp_path / "part" / "run"
    shutil.copytree(whole / "checkpoint_2", part / "checkpoint_2")
    train(drawn_images, tmp_path / "part", *accumulated, "--resume_from_checkpoint", "latest")
    assert_close(weights(part / "checkpoint_4"), weights(whole / "checkpoint_4"), atol=0)


def test_accumulated_run_equals_the_plain_one(finished, drawn_images, tmp_path):
    experiment = train(drawn_images, tmp_path, "--gradient_accumulation_steps", "4")
    assert_close(weights(experiment / "checkpoint_4"), weights(finished / "checkpoint_4"), atol=1e-6)


def test_two_processes_equal_one_and_resume_on_one(finished, drawn_images, tmp_path):
    halves = flags(drawn_images, tmp_path, "--per_gpu_batch_size", "4", "--gradient_accumulation_steps", "2")
    printed = launch("pretrain_mae.py", halves, num_processes=2)
    assert "8 = 2 processes x 2 forward passes x 2 images" in printed
    experiment = tmp_path / "run"
    assert_close(weights(experiment / "checkpoint_4"), weights(finished / "checkpoint_4"), atol=1e-6)
    for ours, plain in zip(rows(experiment), rows(finished), strict=True):
        assert ours["learning_rate"] == plain["learning_rate"]
        assert ours["training_loss"] == pytest.approx(plain["training_loss"], abs=1e-5)
        if "testing_loss" in plain:
            assert ours["testing_loss"] == pytest.approx(plain["testing_loss"], abs=1e-5)
    # What two processes began, one ends.
    for entry in (experiment / "checkpoint_4").iterdir():
        entry.unlink()
    (experiment / "checkpoint_4").rmdir()
    train(drawn_images, tmp_path, "--resume_from_checkpoint", "latest")
    assert_close(weights(experiment / "checkpoint_4"), weights(finished / "checkpoint_4"), atol=1e-6)


def test_activation_checkpointing_does_not_change_the_run(finished, drawn_images, tmp_path, monkeypatch):
    calls = []
    checkpoint = model_module.checkpoint
    monkeypatch.setattr(model_module, "checkpoint", lambda *a, **k: calls.append(a) or checkpoint(*a, **k))
    experiment = train(drawn_images, tmp_path, "--activation_checkpointing")
    assert_close(weights(experiment / "checkpoint_4"), weights(finished / "checkpoint_4"), atol=0)
    assert len(calls) == 12 * (2 + 1)  # once a step and block, never at evaluation


def test_bfloat16_run_attends_by_products_and_is_near_the_exact_one(finished, drawn_images, tmp_path, monkeypatch):
    built, unfuse = [], ViTMAEForPreTraining.unfuse_attention
    monkeypatch.setattr(ViTMAEForPreTraining, "unfuse_attention", lambda model: built.append(model) or unfuse(model))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    losses = [row["training_loss"] for row in rows(train(drawn_images, tmp_path))]
    assert not any(block.attn.fused_attn for model in built for block in (*model.blocks, *model.decoder_blocks))
    exact = [row["training_loss"] for row in rows(finished)]
    assert len(built) == 1 and losses != exact and losses == pytest.approx(exact, rel=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for")
def test_training_step_never_waits_for_the_gpu():
    model = ViTMAEForPreTraining(MAEConfig(img_size=32)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images, noise = torch.zeros(2, 3, 32, 32, dtype=torch.uint8).pin_memory(), torch.rand(2, 4).pin_memory()
    for mode in ("default", "error"):  # the first step puts things in place
        torch.cuda.set_sync_debug_mode(mode)
        try:
            pixels = normalize(images.to("cuda", non_blocking=True), IMAGENET_MEAN, IMAGENET_STD)
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(pixels, 0.75, noise.to("cuda", non_blocking=True)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_workers_do_not_change_the_run(finished, drawn_images, tmp_path):
    experiment = train(drawn_images, tmp_path, "--num_workers", "2")
    assert_close(weights(experiment / "checkpoint_4"), weights(finished / "checkpoint_4"), atol=0)


@pytest.mark.parametrize("more", [(), ("--activation_checkpointing",)])
def test_compiled_run_breaks_no_graph_and_compiles_nothing_after_its_first_epoch(
    more, finished, drawn_images, tmp_path, monkeypatch
):
    """A graph for training, one for evaluation, and one for any size of its last batch. Keys have no prefix."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")  # as `accelerate launch --dynamo_backend` sets it
    graphs, finish_epoch = [], Run.finish_epoch

    def note(self, *args, **how):
        graphs.append(counters["stats"]["unique_graphs"])
        return finish_epoch(self, *args, **how)

    monkeypatch.setattr(Run, "finish_epoch", note)
    torch.compiler.reset()
    counters.clear()
    often = ("--epochs", "3", "--save_checkpoint_interval", "1", "--per_gpu_batch_size", "6")
    experiment = train(drawn_images, tmp_path, *often, *more)
    assert not counters["graph_break"]
    assert 1 <= graphs[0] <= 3 and graphs == graphs[:1] * 3
    assert weights(experiment / "checkpoint_3").keys() == weights(finished / "checkpoint_4").keys()


def test_run_on_grey_rectangles_without_classes_or_validation(image_folder, tmp_path):
    more = ("--input_channels", "1", "--img_size", "8", "20", "--epochs", "2", "--no-norm_pix_loss")
    experiment = train(image_folder / "train" / "cats", tmp_path, *more)
    assert weights(experiment / "checkpoint_2")["patch_embed.proj.weight"].shape == (32, 1, 4, 4)
    assert "testing_loss" not in rows(experiment)[-1]
    assert (experiment / "reconstructions" / "epoch_2.png").exists()


@pytest.fixture
def tiles(tmp_path) -> Path:
    """Draw float tiles of five bands in two classes, a third of each tile without data, as train/ and val/."""
    generator = np.random.default_rng(0)
    for split, label in itertools.product(("train", "val"), ("a", "b")):
        folder = tmp_path / "tiles" / split / label
        folder.mkdir(parents=True)
        for index in range(8):
            tile = generator.normal(1000 if label == "a" else 3000, 300, (18, 18, 5)).astype(np.float32)
            tile[:, :6] = np.nan
            np.save(folder / f"{index}.npy", tile)
    return tmp_path / "tiles"


def test_run_on_tiles_in_their_own_units_with_no_data(tiles, tmp_path, capsys):
    own = ["--input_channels", "5", "--mean", *["2000"] * 5, "--std", *["1000"] * 5, "--no-norm_pix_loss"]
    more = ["--show_channels", "4", "2", "0", "--probe_every", "4"]
    experiment = train(tiles, tmp_path, *own, *more)
    log = rows(experiment)
    assert log[-1]["testing_loss"] < log[0]["training_loss"] and all(math.isfinite(row["training_loss"]) for row in log)
    assert all(row["nonfinite_steps"] == row["bad_files"] == 0 for row in log) and log[-1]["knn_top1_acc"] == 100
    assert "values          in the files' own units, mean 2000 2000" in capsys.readouterr().out
    record = json.loads((experiment / "checkpoint_4" / "config.json").read_text())
    assert record["value_range"] == "own" and record["image_std"] == [1000] * 5
    assert (experiment / "reconstructions" / "epoch_4.png").exists()
    resumed = train(tiles, tmp_path, *own, *more, "--resume_from_checkpoint", "latest")
    assert rows(resumed) == log


def test_mean_and_deviation_that_look_like_defaults_are_taken_where_they_are_given(tiles, tmp_path):
    given = ["--mean", "0.5", "--std", "0.5", "--epochs", "2"]
    assert rows(train(tiles, tmp_path, "--input_channels", "5", *given))[-1]["step"] > 0


def test_error_of_removed_patches_without_data_is_none(tmp_path):
    """Of two removed patches one has no data; the other is off by 2 everywhere, so the mean over both is 2."""
    args = parse_args(["--path_to_data", "x", "--mean", "0", "--std", "1", "--input_channels", "1"])
    sizes = {f"{part}_{size}": value for part in ("encoder", "decoder") for size, value in TINY_SIZES.items()}
    model = ViTMAEForPreTraining(MAEConfig(4, 2, 1, norm_pix_loss=False, **sizes))
    pixels = torch.full((1, 1, 4, 4), 3.0)
    pixels[:, :, :2, :2] = torch.nan
    torch.nn.init.zeros_(model.decoder_pred.weight)
    torch.nn.init.constant_(model.decoder_pred.bias, 1.0)
    batch = Batch(pixels, torch.zeros(1), torch.tensor([[0.8, 0.1, 0.9, 0.2]]), [])  # the first and the third go
    args.mask_ratio = 0.5
    figures = evaluate(Accelerator(cpu=True), model, [batch], args)
    assert figures["model_error"] == pytest.approx(2.0) and figures["testing_loss"] == pytest.approx(2.0)


def test_values_without_their_mean_ask_for_it_and_auto_finds_a_range(tiles, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"tools/measure_values\.py .*train --input_channels 5 prints them"):
        train(tiles, tmp_path, "--input_channels", "5")
    experiment = train(tiles, tmp_path / "auto", "--input_channels", "5", "--value_range", "auto", "--epochs", "2")
    low, high = json.loads((experiment / "checkpoint_2" / "config.json").read_text())["value_range"]
    assert 0 < low < 700 and 3300 < high < 4500
    assert f"{low:g} becomes 0 and {high:g} becomes 1" in capsys.readouterr().out


def test_mean_of_pixels_0_to_255_is_refused_with_the_scaled_numbers(drawn_images, tmp_path):
    wrong = ["--mean", "123.675", "116.28", "103.53", "--std", "58.395", "57.12", "57.375"]
    with pytest.raises(ValueError, match=r"give --mean 0\.485 0\.456 0\.406 --std 0\.229 0\.224 0\.225"):
        train(drawn_images, tmp_path, *wrong)


@pytest.mark.parametrize(("top", "levels", "advice"), [(872, 4, True), (65535, 256, False)])
def test_16_bit_pictures_say_how_many_levels_survive(tmp_path, capsys, top, levels, advice):
    for index in range(8):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(np.linspace(0, top, 400).astype(np.uint16).reshape(20, 20)).save(
            tmp_path / "data" / f"{index}.png"
        )
    train(tmp_path / "data", tmp_path, "--input_channels", "1", "--epochs", "2")
    said = f"values          0..{top} of 65535, {levels} of 256 levels used" + ": give --value_range auto" * advice
    assert said + "\n" in capsys.readouterr().out


def test_data_smaller_than_one_step_repeats_and_says_so(image_folder, tmp_path, capsys):
    experiment = train(image_folder, tmp_path, "--per_gpu_batch_size", "32", "--epochs", "2")
    assert rows(experiment)[-1]["step"] == 2
    assert "24 images do not fill one step of 32" in capsys.readouterr().out


# -------------------------------------------------------------------------------- the online view


def test_probing_changes_nothing_but_the_log(finished, drawn_images, tmp_path):
    experiment = train(drawn_images, tmp_path, "--probe_every", "1", "--probe_images", "10")
    assert_close(weights(experiment / "checkpoint_4"), weights(finished / "checkpoint_4"), atol=0)
    probed = [row for row in rows(experiment) if "knn_top1_acc" in row]
    assert [row["step"] for row in probed] == [3, 6, 9, 12]
    assert all(0 <= row["knn_top1_acc"] <= 100 for row in probed)


def test_probe_equals_the_knn_of_the_finished_encoder(drawn_images, tmp_path):
    experiment = train(drawn_images, tmp_path, "--probe_every", "4")
    arguments = ["--path_to_data", str(drawn_images), "--working_directory", str(tmp_path), "--num_workers", "0"]
    weights_flag = ["--path_to_pretrained_mae_weights", str(experiment / "checkpoint_4"), "--per_gpu_batch_size", "8"]
    figures = finetune_classifier.main(finetune_classifier.parse_args([*arguments, *weights_flag, "--knn"]))
    assert rows(experiment)[-1]["knn_top1_acc"] == figures["knn_top1_acc"]


def test_probe_of_a_runs_own_images_lists_them_once(drawn_images, tmp_path, capsys):
    experiment = train(drawn_images / "train", tmp_path, "--probe_every", "4", "--val_fraction", "0.25")
    assert 0 <= rows(experiment)[-1]["knn_top1_acc"] <= 100
    assert capsys.readouterr().out.count("split   ") == 1


def test_probe_on_two_processes_equals_one(fork, drawn_images, tmp_path):
    one = train(drawn_images, tmp_path / "one", "--probe_every", "4")
    halves = flags(drawn_images, tmp_path / "two", "--probe_every", "4", "--per_gpu_batch_size", "4")
    fork("pretrain_mae", halves, num_processes=2)
    assert rows(tmp_path / "two" / "run")[-1]["knn_top1_acc"] == rows(one)[-1]["knn_top1_acc"]


def test_probe_survives_a_file_that_training_replaces_and_comes_when_it_is_due(image_folder, tmp_path):
    (image_folder / "train" / "cats" / "000.jpg").write_text("no picture")
    experiment = train(image_folder, tmp_path, "--probe_every", "3", "--max_bad_fraction", "0.1")
    log = rows(experiment)
    assert log[-1]["step"] == 12 and [row["step"] for row in log if "knn_top1_acc" in row] == [9]


def test_probe_without_labels_is_refused_before_training(image_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--probe_every needs .* train/ and val/.*--path_to_probe_data"):
        train(image_folder / "train" / "cats", tmp_path, "--probe_every", "1")
    shutil.copy(image_folder / "val" / "cats" / "000.jpg", image_folder / "val")
    with pytest.raises(ValueError, match="images outside class folders"):
        train(image_folder, tmp_path, "--probe_every", "1")


# -------------------------------------------------------------------------------- refusals


def test_neither_data_nor_demo_is_an_error_that_names_both(capsys):
    with pytest.raises(SystemExit):
        parse_args([])
    error = capsys.readouterr().err
    assert "--path_to_data" in error and "--demo" in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--img_size 230", "img_size 230 is not a multiple of patch_size 16; use 224 or 240"),
        ("--img_size 224 224 224", "--img_size takes one number, or height and width"),
        ("--mask_ratio 1.0", "mask_ratio 1.0 keeps 0 of 196 patches"),
        ("--mask_ratio 0", "--mask_ratio must be above 0 and at most 1, not 0, as there is nothing to learn"),
        ("--repeated_sampling 3", "--repeated_sampling 3 must divide the 512 images of a forward pass"),
        ("--repeated_sampling 0", "--repeated_sampling must be at least 1, not 0"),
        (
            "--per_gpu_batch_size 10 --gradient_accumulation_steps 4",
            "cannot be cut into --gradient_accumulation_steps 4",
        ),
        ("--epochs 40 --warmup_epochs 40", "--warmup_epochs 40 leaves nothing of --epochs 40; give both"),
        ("--mean 0.5 0.5", "--mean has 2 values, --input_channels is 3"),
        ("--std 0", "--std must be above 0, not 0"),
        ("--max_bad_fraction 2", "--max_bad_fraction must be between 0 and 1, not 2"),
        ("--experiment_name a/b", "the path goes into --working_directory"),
        ("--experiment_name ..", "the path goes into --working_directory"),
        ("--seed -1", "--seed must be at least 0, not -1"),
        ("--epoch 3", "unknown: --epoch 3; did you mean --epochs?"),
    ],
)
def test_impossible_flags_are_refused_before_any_work(more, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--path_to_data", "nowhere", *shlex.split(more)])
    assert message in capsys.readouterr().err


def test_finished_experiment_is_not_trained_over(finished, drawn_images):
    before = weights(finished / "checkpoint_4")
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint latest"):
        train(drawn_images, finished.parent)
    assert_close(weights(finished / "checkpoint_4"), before, atol=0)


@pytest.fixture
def interrupted(finished, tmp_path) -> Path:
    """The plain run as it was after its first checkpoint."""
    experiment = tmp_path / "interrupted" / "run"
    shutil.copytree(finished / "checkpoint_2", experiment / "checkpoint_2")
    for name in ("log.jsonl", "args.json"):
        shutil.copy(finished / name, experiment)
    return experiment


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--encoder_depth 3", r"config\.encoder_depth: 2 in the checkpoint, 3 now"),
        ("--per_gpu_batch_size 4", "effective_batch_size: 8 in the checkpoint, 4 now"),
        ("--seed 1", "seed: 0 in the checkpoint, 1 now"),
        ("--repeated_sampling 2", "data: '[0-9a-f]{16}' in the checkpoint, '[0-9a-f]{16}, 2 crops each' now"),
    ],
)
def test_resume_as_another_run_is_refused_with_the_difference(interrupted, drawn_images, more, message):
    before = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        train(drawn_images, interrupted.parent, "--resume_from_checkpoint", "checkpoint_2", *shlex.split(more))
    assert {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()} == before


def test_resume_names_the_flags_that_changed(interrupted, drawn_images, capsys):
    train(drawn_images, interrupted.parent, "--resume_from_checkpoint", "latest", "--mask_ratio", "0.5")
    assert "changed         since the first start: --mask_ratio 0.5 (was 0.75)" in capsys.readouterr().out


def test_resume_with_another_decoder_is_the_same_run_and_is_told(
    finished, interrupted, drawn_images, monkeypatch, capsys
):
    monkeypatch.setattr(decoding, "decode_jpeg", None)
    monkeypatch.setattr(decoding, "load_nvimgcodec", lambda: None)
    before = json.loads((interrupted / "args.json").read_text())
    (interrupted / "args.json").write_text(json.dumps(before | {"decoder": "another"}))
    train(drawn_images, interrupted.parent, "--resume_from_checkpoint", "latest")
    output = capsys.readouterr().out
    assert "changed         since the first start: --decoder Pillow" in output and "(was another)" in output
    assert "\nimage decoder   Pillow" in output
    assert_close(weights(interrupted / "checkpoint_4"), weights(finished / "checkpoint_4"), atol=0)


def test_repeated_sampling_run_has_as_many_steps_and_resumes_bit_for_bit(finished, drawn_images, tmp_path, capsys):
    whole = train(drawn_images, tmp_path / "whole", "--repeated_sampling", "4")
    assert "sampling        4 crops of each image at once; as many epochs visit all" in capsys.readouterr().out
    assert [row["step"] for row in rows(whole)] == [row["step"] for row in rows(finished)]
    part = tmp_path / "part" / "run"
    shutil.copytree(whole / "checkpoint_2", part / "checkpoint_2")
    train(drawn_images, part.parent, "--repeated_sampling", "4", "--resume_from_checkpoint", "latest")
    assert_close(weights(part / "checkpoint_4"), weights(whole / "checkpoint_4"), atol=0)
    halves = ["--repeated_sampling", "4", "--gradient_accumulation_steps", "2"]
    accumulated = train(drawn_images, tmp_path / "halves", *halves)
    assert_close(weights(accumulated / "checkpoint_4"), weights(whole / "checkpoint_4"), atol=1e-5)


def test_working_directory_inside_the_training_images_is_refused(image_folder):
    with pytest.raises(ValueError, match="lies in the training images"):
        train(image_folder / "train", image_folder / "train" / "work")


@pytest.fixture
def poison(monkeypatch):
    """Give a function that makes the images of the n-th forward passes from then on not finite."""
    forward = ViTMAEForPreTraining.forward

    def poison(passes):
        calls = itertools.count(1)

        def poisoned(self, images, *args, **options):
            return forward(self, images * (math.nan if next(calls) in passes else 1.0), *args, **options)

        monkeypatch.setattr(ViTMAEForPreTraining, "forward", poisoned)

    return poison


def test_step_that_is_not_finite_is_left_out_counted_and_named(interrupted, drawn_images, poison):
    before = weights(interrupted / "checkpoint_2")
    poison([2])  # step 8
    more = ("--epochs", "3", "--warmup_epochs", "0", "--log_interval", "1", "--resume_from_checkpoint", "latest")
    train(drawn_images, interrupted.parent, *more)
    log = {row["step"]: row for row in rows(interrupted)}
    assert log[8]["training_loss"] is None and math.isfinite(log[9]["training_loss"])
    assert [log[step]["nonfinite_steps"] for step in (7, 8, 9)] == [0, 1, 1]
    (noted,) = [json.loads(line) for line in (interrupted / "nonfinite_steps.jsonl").read_text().splitlines()]
    sampler = StepSampler(24, 8)
    sampler.set_epoch(2)
    files = list_images(drawn_images / "train")
    step_8 = [files.path(key.index) for key in list(sampler)[1]]
    assert noted == {"step": 8, "images": step_8}
    after = weights(interrupted / "checkpoint_3")
    assert all(value.isfinite().all() for value in after.values())
    assert not torch.equal(after["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])


def test_run_without_finite_steps_stops_and_overwrites_nothing(finished, interrupted, drawn_images, poison):
    poison(range(2, 100))
    more = ("--max_nonfinite_steps", "3", "--resume_from_checkpoint", "latest")
    with pytest.raises(FloatingPointError, match=r"3 optimizer steps in a row, up to step 10 .*checkpoint_2 with"):
        train(drawn_images, interrupted.parent, *more)
    assert [entry.name for entry in interrupted.glob("checkpoint_*")] == ["checkpoint_2"]
    assert_close(weights(interrupted / "checkpoint_2"), weights(finished / "checkpoint_2"), atol=0)


def test_weights_that_are_not_finite_are_not_saved(interrupted, drawn_images, monkeypatch):
    class Diverging(torch.optim.AdamW):
        """Writes an infinity into the weights with the last step before the checkpoint."""

        def step(self, *args, **kwargs):
            result = super().step(*args, **kwargs)
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 6:
                with torch.no_grad():
                    self.param_groups[0]["params"][0].view(-1)[0] = math.inf
            return result

    monkeypatch.setattr(torch.optim, "AdamW", Diverging)
    with pytest.raises(FloatingPointError, match=r"the weights are not finite at step 12, .*checkpoint_2"):
        train(drawn_images, interrupted.parent, "--resume_from_checkpoint", "latest")
    assert [entry.name for entry in interrupted.glob("checkpoint_*")] == ["checkpoint_2"]


def test_bad_files_are_named_and_the_run_goes_on_until_there_are_too_many(image_folder, tmp_path):
    bad = image_folder / "train" / "dogs" / "005.jpg"
    bad.write_bytes(b"")
    experiment = train(image_folder, tmp_path / "tolerant", "--max_bad_fraction", "0.05")
    (line,) = (experiment / "bad_files.txt").read_text().splitlines()
    assert line.startswith(str(bad)) and rows(experiment)[-1]["bad_files"] == 1
    with pytest.raises(ValueError, match="1 of 24 images cannot be used"):
        train(image_folder, tmp_path / "strict")


def test_bad_held_out_files_are_named_too(image_folder, tmp_path):
    bad = image_folder / "val" / "dogs" / "002.jpg"
    bad.write_bytes(b"")
    experiment = train(image_folder, tmp_path, "--max_bad_fraction", "0.05", "--epochs", "2")
    assert (experiment / "bad_files.txt").read_text().startswith(str(bad))
    assert rows(experiment)[-1]["bad_files"] == 1


# -------------------------------------------------------------------------------- the given interface


def test_given_command_is_understood_as_it_stands():
    args = parse_args(
        shlex.split(
            """--experiment_name "MAEPretraining" --wandb_run_name "pretrain_mae" --path_to_data "<IMAGENET>"
            --working_directory "work_dir" --img_size 224 --input_channels 3 --epochs 800 --warmup_epochs 40
            --save_checkpoint_interval 10 --per_gpu_batch_size 2048 --gradient_accumulation_steps 4
            --base_learning_rate 1.5e-4 --weight_decay 0.05 --max_grad_norm 1.0 --img_size 224 --encoder_embed_dim 768
            --encoder_depth 12 --encoder_num_heads 12 --encoder_mlp_ratio 4 --decoder_embed_dim 512 --decoder_depth 8
            --decoder_num_heads 16 --decoder_mlp_ratio 4 --num_workers 32 --custom_weight_init --log_wandb"""
        )
    )
    assert build_config(args) == MAEConfig() and args.log_wandb and args.custom_weight_init
    assert (args.per_gpu_batch_size, args.gradient_accumulation_steps, args.img_size) == (2048, 4, 224)


def test_defaults_are_the_given_command():
    args = parse_args(["--path_to_data", "x"])
    assert build_config(args) == MAEConfig()
    assert (args.epochs, args.warmup_epochs, args.per_gpu_batch_size, args.gradient_accumulation_steps) == (
        800,
        40,
        2048,
        4,
    )
    assert (args.base_learning_rate, args.weight_decay, args.max_grad_norm, args.mask_ratio) == (
        1.5e-4,
        0.05,
        1.0,
        0.75,
    )


def test_size_flags_override_single_fields_of_the_named_model():
    args = parse_args(
        ["--path_to_data", "x", "--model", "mae_vit_large_patch16", "--decoder_depth", "2", "--img_size", "32", "64"]
    )
    config = build_config(args)
    assert (config.encoder_depth, config.decoder_depth, config.img_size) == (24, 2, (32, 64))


def test_wandb_offline_run_is_written_and_resumed_under_the_same_id(fork, drawn_images, tmp_path):
    arguments = flags(drawn_images, tmp_path, "--epochs", "2", "--log_wandb")
    fork("pretrain_mae", arguments, WANDB_MODE="offline")
    run_id = (tmp_path / "run" / "wandb_id.txt").read_text().strip()
    fork("pretrain_mae", [*arguments, "--epochs", "4", "--resume_from_checkpoint", "latest"], WANDB_MODE="offline")
    assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}"))) == 2


def test_wandb_that_refuses_its_settings_does_not_stop_the_run(fork, drawn_images, tmp_path):
    arguments = flags(drawn_images, tmp_path, "--epochs", "2", "--log_wandb")
    printed = fork("pretrain_mae", arguments, WANDB_MODE="no such mode")
    assert "--log_wandb: W&B failed" in printed and len(rows(tmp_path / "run")) == 5


def test_trackers_that_fail_or_hang_change_nothing_in_the_run(fork, finished, drawn_images, tmp_path):
    every = ["start", "store_init_configuration", "log", "log_images", "finish"]
    broken = {"mlflow": (every, False), "tensorboard": (["log", "log_images", "finish"], False)}
    broken |= {"aim": (["start"], True), "comet_ml": (["log"], True)}
    faults = [("break_tracker", dict(name=name, calls=calls, hangs=hangs)) for name, (calls, hangs) in broken.items()]
    printed = fork("pretrain_mae", flags(drawn_images, tmp_path, "--log_with", *broken), *faults)
    for name in ("model.safetensors", "optimizer.bin"):
        made = tmp_path / "run" / "checkpoint_4" / name
        assert made.read_bytes() == (finished / "checkpoint_4" / name).read_bytes()
    assert rows(tmp_path / "run")[-1]["training_loss"] == rows(finished)[-1]["training_loss"]
    said = [line for line in printed.splitlines() if line.startswith("--log_with")]
    assert sorted(said) == [
        "--log_with aim: aim does not answer; the run goes on without it",
        "--log_with comet_ml: comet_ml does not answer; the run goes on without it",
        "--log_with comet_ml: pictures are in " + str(tmp_path / "run" / "reconstructions") + " alone",
        "--log_with mlflow: mlflow failed (TroubleError: mlflow is broken); the run goes on without it",
        "--log_with tensorboard: tensorboard failed (TroubleError: tensorboard is broken); the run goes on without it",
    ]


def test_tensorboard_log_of_a_resumed_run_reads_back(fork, drawn_images, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = flags(drawn_images, tmp_path, "--log_with", "tensorboard")
    fork("pretrain_mae", [*arguments, "--epochs", "2"])
    fork("pretrain_mae", [*arguments, "--resume_from_checkpoint", "latest"])
    run = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    log = rows(tmp_path / "run")
    for name in ("training_loss", "learning_rate", "testing_loss", "bad_files"):
        logged = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in log if name in row]  # in float32
        assert [(event.step, event.value) for event in run.Scalars(name)] == logged
    assert [event.step for event in run.Images("reconstructions")] == [6, 12]
    with Image.open(tmp_path / "run" / "reconstructions" / "epoch_4.png") as picture:
        shown = Image.open(io.BytesIO(run.Images("reconstructions")[-1].encoded_image_string))
        assert np.array_equal(np.asarray(shown), np.asarray(picture.convert("RGB")))


# -------------------------------------------------------------------------------- the demo


def test_demo_draws_its_data_and_reports_three_errors(tmp_path, monkeypatch, capsys):
    few = functools.partial(write_demo_data, num_train=40, num_val=10)
    monkeypatch.setattr(training.data, "write_demo_data", few)
    shorter = ["--demo", "--epochs", "2", "--num_workers", "0", "--working_directory", str(tmp_path)]
    figures = main(parse_args(shorter))
    assert set(figures) == {"testing_loss", "model_error", "mean_colour_error", "nearest_patch_error"}
    printed = capsys.readouterr().out
    assert f"this model                              {figures['model_error']:.5f}" in printed
    assert "tools/reconstruct.py --checkpoint" in printed
    assert (tmp_path / "demo" / "reconstructions" / "epoch_2.png").exists()


def test_demo_with_other_flags_ends_without_the_errors_it_cannot_have(tmp_path, monkeypatch, capsys):
    few = functools.partial(write_demo_data, num_train=40, num_val=10)
    monkeypatch.setattr(training.data, "write_demo_data", few)
    arguments = ["--demo", "--epochs", "2", "--num_workers", "0", "--working_directory", str(tmp_path)]
    assert set(main(parse_args([*arguments, "--norm_pix_loss"]))) == {"testing_loss"}
    assert "No errors beside trivial answers" in capsys.readouterr().out


def test_evaluate_equals_the_errors_of_whole_images(finished, drawn_images, tmp_path):
    """Count the errors another way: on pixels of whole images, with the mask painted at full size."""
    pixels = train(drawn_images, tmp_path, "--no-norm_pix_loss")
    model = load_pretrained_mae(pixels / "checkpoint_4").eval()
    data = ImageDataset(list_images(drawn_images / "val"), ResizeCenterCrop((16, 16)), seed=0, noise_size=16)
    batch = collate([data[SampleKey(EVAL_EPOCH, index)] for index in range(8)])
    images = (batch.images / 255 - MEAN) / STD
    with torch.no_grad():
        loss, pred, mask = model(images, 0.75, batch.noise)
    removed = mask.reshape(8, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1).bool()
    shown = model.unpatchify(pred) * STD + MEAN
    truth = batch.images / 255
    colour = torch.stack([image[~gone].reshape(3, -1).mean(1) for image, gone in zip(truth, removed, strict=True)])
    last = rows(pixels)[-1]
    assert last["testing_loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert last["model_error"] == pytest.approx((shown - truth)[removed].square().mean().item(), abs=1e-6)
    error = (colour[:, :, None, None] - truth)[removed].square().mean().item()
    assert last["mean_colour_error"] == pytest.approx(error, abs=1e-6)


# -------------------------------------------------------------------------------- what a start imports


START = """
import gc, runpy, sys
others = "transformers datasets plotly matplotlib scipy tensorboard training.check training.robustness".split()
runpy.run_path("pretrain_mae.py", run_name="__main__")
print([name for name in others if name in sys.modules], gc.isenabled(), gc.get_freeze_count() > 100_000)
"""


def test_run_imports_nothing_that_it_does_not_need_and_never_looks_for_garbage_among_it(drawn_images, tmp_path):
    words = flags(drawn_images, tmp_path, "--epochs", "1", "--warmup_epochs", "0")
    ended = subprocess.run([sys.executable, "-c", START, *words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.stdout.endswith("\n[] True True\n"), ended.stderr


# -------------------------------------------------------------------------------- trivial answers


def test_trivial_answers_of_a_hand_made_image():
    model = ViTMAEForPreTraining(MAEConfig(
        img_size=(2, 8), patch_size=2, input_channels=3, encoder_embed_dim=8, encoder_depth=1, encoder_num_heads=1,
        decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=1, norm_pix_loss=False,
    ))  # fmt: skip
    images = torch.zeros(1, 3, 2, 8)
    for patch, colour in enumerate([(1.0, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.2), (0.0, 1.0, 0.6)]):
        images[0, :, :, 2 * patch : 2 * patch + 2] = torch.tensor(colour)[:, None, None]
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.0]])  # the middle two of four patches in a row are removed
    answers = trivial_answers(model.patchify(images), mask, model.config.grid_size, model.config.input_channels)
    copied = model.unpatchify(answers["nearest_patch_error"])[0, :, 0, ::2].T
    assert copied.tolist() == images[0, :, 0, [0, 0, 6, 6]].T.tolist()
    mean = model.unpatchify(answers["mean_colour_error"])[0, :, 0, ::2].T
    torch.testing.assert_close(mean, torch.tensor([[0.5, 0.5, 0.3]] * 4))
