"""The classification run: against plain torch, resumed and spread, its recipes, its scores, and its refusals."""

import dataclasses
import functools
import itertools
import json
import math
import pickle
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, assert_close, draw_images, launch, load_tool, rows, weights
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.optim import Lars

import finetune_classifier
import model as model_module
import pretrain_mae
import training.data
import utils
from dataset import IMAGENET_MEAN, IMAGENET_STD, ResizeCenterCrop, SampleKey, StepSampler, normalize
from finetune_classifier import (
    build_loss,
    build_model,
    build_optimizer,
    build_training_data,
    compare_with_scratch,
    main,
    parse_args,
)
from model import MAEConfig, ViTMAEForImageClassification, ViTMAEForPreTraining, load_classifier
from storage.decoding import read_image
from storage.demo import write_demo_data
from storage.lists import list_images
from training.metrics import ImageEvaluation, ImageSource

RUN_FLAGS = """--experiment_name run --epochs 4 --warmup_epochs 1 --per_gpu_batch_size 8 --learning_rate 0.01
 --save_checkpoint_interval 2 --num_workers 0 --log_interval 2"""
# Everything random at once: RandAugment, erasing, mixup, CutMix, drop path; and what has a state of its own.
STRONG = "--drop_path 0.5 --random_erasing 0.5 --layer_decay 0.75 --ema_decay 0.9"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "checkpoint_4"
    folder.mkdir()
    torch.manual_seed(0)
    save_file(ViTMAEForPreTraining(TINY).state_dict(), folder / "model.safetensors")
    record = {"config": dataclasses.asdict(TINY), "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def flags(data: Path, work: Path, start: Path | None, more: str = "") -> list[str]:
    given = ["--path_to_data", str(data), "--working_directory", str(work)]
    if start is not None:
        given += ["--path_to_pretrained_mae_weights", str(start)]
    return [*shlex.split(RUN_FLAGS), *given, *shlex.split(more)]


def train(data: Path, work: Path, start: Path | None, more: str = "") -> Path:
    main(parse_args(flags(data, work, start, more)))
    return work / "run"


@pytest.fixture(scope="module")
def finished(drawn_images, pretrained, tmp_path_factory) -> Path:
    """One run of 12 steps with everything random in it, not to be changed."""
    from accelerate.state import AcceleratorState, GradientState

    experiment = train(drawn_images, tmp_path_factory.mktemp("work"), pretrained, STRONG)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return experiment


# -------------------------------------------------------------------------------- what a run leaves


def test_run_leaves_checkpoints_log_and_pictures(finished):
    assert {entry.name for entry in finished.iterdir()} == {
        ".lock", "DONE", "args.json", "best_checkpoint", "checkpoint_2", "checkpoint_3", "checkpoint_4",
        "last_checkpoint", "log.jsonl", "predictions",
    }  # fmt: skip
    log = rows(finished)
    assert [row["step"] for row in log] == [1, 2, 3, 4, 6, 8, 9, 10, 12]
    assert [row["step"] for row in log if "testing_top1_acc" in row] == [3, 6, 9, 12]  # at every epoch
    keys = {"training_loss", "training_top1_acc", "learning_rate", "images_per_second", "data_wait_fraction"}
    assert all(keys <= row.keys() and math.isfinite(row["training_loss"]) for row in log)
    scores = {f"{prefix}_{key}" for prefix in ("testing", "ema_testing") for key in ("loss", "top1_acc", "top5_acc")}
    assert scores <= log[-1].keys() and log[-1]["testing_top5_acc"] == 100  # of two classes
    assert_close(weights(finished / "last_checkpoint"), weights(finished / "checkpoint_4"), atol=0)
    with Image.open(finished / "predictions" / "epoch_4.png") as picture:
        assert picture.width > 8 * 128


def test_activation_checkpointing_does_not_change_the_run(finished, drawn_images, pretrained, tmp_path, monkeypatch):
    calls, checkpoint = [], model_module.checkpoint
    monkeypatch.setattr(model_module, "checkpoint", lambda *a, **k: calls.append(a) or checkpoint(*a, **k))
    experiment = train(drawn_images, tmp_path, pretrained, f"{STRONG} --activation_checkpointing")
    assert_close(weights(experiment / "checkpoint_4"), weights(finished / "checkpoint_4"), atol=0)
    assert len(calls) == 12 * TINY.encoder_depth  # once a step and block, never at evaluation


def test_bfloat16_run_attends_by_products_and_is_near_the_exact_one(
    finished, drawn_images, pretrained, tmp_path, monkeypatch
):
    built, unfuse = [], ViTMAEForImageClassification.unfuse_attention
    monkeypatch.setattr(
        ViTMAEForImageClassification, "unfuse_attention", lambda model: built.append(model) or unfuse(model)
    )
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    losses = [row["training_loss"] for row in rows(train(drawn_images, tmp_path, pretrained, STRONG))]
    assert not any(block.attn.fused_attn for model in built for block in model.blocks)
    exact = [row["training_loss"] for row in rows(finished)]
    assert len(built) == 1 and losses != exact and losses == pytest.approx(exact, rel=0.05)


def test_best_checkpoint_is_the_best_and_says_what_it_is(finished):
    record = json.loads((finished / "best_checkpoint" / "config.json").read_text())
    log = rows(finished)
    scores = [row[key] for row in log for key in ("testing_top1_acc", "ema_testing_top1_acc") if key in row]
    assert record["testing"]["top1_acc"] == max(scores)
    prefix = "ema_testing" if record["moving_average"] else "testing"
    row = next(row for row in log if "testing_loss" in row and row["epoch"] == record["epoch"])
    assert record["testing"]["loss"] == row[f"{prefix}_loss"]
    assert record["class_names"] == ["cats", "dogs"] and record["num_classes"] == 2
    assert MAEConfig(**record["config"]).encoder_embed_dim == 32 and "decoder_embed_dim" not in record["config"]


def test_moving_average_is_kept_and_scored_beside_the_weights(finished, drawn_images, tmp_path):
    checkpoint = shutil.copytree(finished / "last_checkpoint", tmp_path / "average")
    (checkpoint / "ema.safetensors").rename(checkpoint / "model.safetensors")
    figures = main(parse_args(flags(drawn_images, tmp_path, checkpoint, "--eval_only")))
    last = rows(finished)[-1]
    assert figures == {key: last[f"ema_{key}"] for key in figures}
    assert figures["testing_loss"] != last["testing_loss"]


def test_best_checkpoint_may_be_the_moving_average(drawn_images, pretrained, tmp_path, monkeypatch):
    """Scored in turn: the weights as if all were wrong, their average as if all were right."""
    labels = torch.from_numpy(list_images(drawn_images / "val").labels).long()
    answers = itertools.cycle([1 - labels, labels])

    def score(*_):
        auc, source = (
            torch.full((2,), 50.0).double(),
            ImageSource(("cats", "dogs"), lambda index: torch.zeros(3, 16, 16), None),
        )
        return ImageEvaluation(torch.ones(8), next(answers)[:, None], labels, auc, source)

    monkeypatch.setattr(finetune_classifier, "evaluate", score)
    experiment = train(drawn_images, tmp_path, pretrained, "--ema_decay 0.9 --save_checkpoint_interval 1")
    record = json.loads((experiment / "best_checkpoint" / "config.json").read_text())
    assert record["moving_average"] is True and record["epoch"] == 1 and record["testing"]["top1_acc"] == 100
    average = load_file(experiment / "checkpoint_1" / "ema.safetensors")
    assert_close(weights(experiment / "best_checkpoint"), average, atol=0)


# -------------------------------------------------------------------------------- the same run, otherwise


def test_same_seed_gives_the_same_run(finished, drawn_images, pretrained, tmp_path):
    torch.rand(3)
    experiment = train(drawn_images, tmp_path, pretrained, f"{STRONG} --num_workers 2")
    assert_close(weights(experiment / "checkpoint_4"), weights(finished / "checkpoint_4"), atol=0)


@pytest.mark.parametrize("name", ["checkpoint_2", "last_checkpoint"])
def test_resumed_run_equals_the_uninterrupted_bit_for_bit(finished, drawn_images, pretrained, tmp_path, name):
    experiment = tmp_path / "run"
    shutil.copytree(finished / "checkpoint_2", experiment / name)
    shutil.copy(finished / "log.jsonl", experiment)
    train(drawn_images, tmp_path, pretrained, f"{STRONG} --resume_from_checkpoint latest")
    for file in ("model.safetensors", "ema.safetensors"):
        ours, whole = (load_file(run / "last_checkpoint" / file) for run in (experiment, finished))
        assert_close(ours, whole, atol=0)
    kept = ("step", "training_loss", "training_top1_acc", "testing_loss", "ema_testing_top1_acc")
    assert [[row.get(key) for key in kept] for row in rows(experiment)] == [
        [row.get(key) for key in kept] for row in rows(finished)
    ]


def test_run_that_goes_on_under_another_name_has_its_own_best(finished, drawn_images, pretrained, tmp_path):
    shutil.copytree(finished / "checkpoint_2", tmp_path / "other" / "checkpoint_2")
    more = f"{STRONG} --resume_from_checkpoint {tmp_path / 'other' / 'checkpoint_2'}"
    experiment = train(drawn_images, tmp_path, pretrained, more)
    assert (experiment / "best_checkpoint" / "model.safetensors").exists()


def test_accumulated_run_equals_the_plain_one(finished, drawn_images, pretrained, tmp_path):
    experiment = train(drawn_images, tmp_path, pretrained, f"{STRONG} --gradient_accumulation_steps 2")
    for file in ("model.safetensors", "ema.safetensors"):
        ours, plain = (load_file(run / "checkpoint_4" / file) for run in (experiment, finished))
        assert_close(ours, plain, atol=1e-6)


def test_two_processes_equal_one(finished, drawn_images, pretrained, tmp_path):
    halves = flags(drawn_images, tmp_path, pretrained, f"{STRONG} --per_gpu_batch_size 4")
    printed = launch("finetune_classifier.py", halves, num_processes=2)
    assert "8 = 2 processes x 1 forward passes x 4 images" in printed
    assert_close(weights(tmp_path / "run" / "checkpoint_4"), weights(finished / "checkpoint_4"), atol=1e-6)
    for ours, plain in zip(rows(tmp_path / "run"), rows(finished), strict=True):
        assert ours["learning_rate"] == plain["learning_rate"]
        for key in ("training_loss", "training_top1_acc", "testing_loss", "testing_top1_acc"):
            assert ours.get(key) == pytest.approx(plain.get(key), abs=1e-5)


def test_run_equals_the_same_steps_in_plain_torch(image_folder, pretrained, tmp_path):
    """Replay by hand what the tutorial's recipe does, on images that no crop or flip can change."""
    for index, path in enumerate(sorted(image_folder.rglob("*.jpg"))):
        Image.new("RGB", (16, 16), (10 * index, 255 - 9 * index, 40)).save(path, quality=100)
    plain = "--random_aug_magnitude 0 --mixup_alpha 0 --cutmix_alpha 0 --max_grad_norm 0.5 --epochs 2"
    experiment = train(image_folder, tmp_path, pretrained, f"{plain} --layer_decay 0.5 --ema_decay 0.8")

    torch.manual_seed(0)
    model = ViTMAEForImageClassification(TINY, 2)
    encoder = {k: v for k, v in weights(pretrained).items() if k in model.state_dict() and not k.startswith("norm")}
    model.load_state_dict(encoder, strict=False)
    groups = []
    for name, p in model.named_parameters():
        stem = name.startswith(("cls_token", "pos_embed", "patch_embed"))
        layer = 0 if stem else int(name.split(".")[1]) + 1 if name.startswith("blocks") else 4
        decay = 0.1 if p.ndim > 1 and name not in ("cls_token", "pos_embed") else 0.0
        groups.append({"params": [p], "weight_decay": decay, "scale": 0.5 ** (4 - layer)})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    files = list_images(image_folder / "train")
    average = {name: value.clone() for name, value in model.state_dict().items()}
    sampler, step = StepSampler(24, 8, seed=0), 0
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for keys in sampler:
            pictures = [torch.from_numpy(np.array(read_image(files.path(key.index)))) for key in keys]
            images = normalize(torch.stack(pictures).permute(0, 3, 1, 2), IMAGENET_MEAN, IMAGENET_STD)
            labels = torch.from_numpy(files.labels[[key.index for key in keys]]).long()
            F.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            rate = 0.01 * step / 3 if step < 3 else 0.005 * (1 + math.cos(math.pi * (step - 3) / 3))
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            optimizer.step()
            optimizer.zero_grad()
            average = {name: 0.8 * average[name] + 0.2 * value for name, value in model.state_dict().items()}
            step += 1
    assert_close(weights(experiment / "checkpoint_2"), dict(model.state_dict()), atol=2e-6)
    assert_close(load_file(experiment / "checkpoint_2" / "ema.safetensors"), average, atol=2e-6)


def test_two_epochs_memorise_32_images(tmp_path):
    """32 images, each of one colour, in four classes drawn by lot; each is there 40 times."""
    labels = np.random.default_rng(0).permutation(np.arange(32) % 4)
    colours = itertools.product((0, 85, 170, 255), (0, 85, 170, 255), (0, 255))
    for index, (label, colour) in enumerate(zip(labels, colours, strict=True)):
        image = Image.new("RGB", (16, 16), colour)
        for split, copies in (("train", 40), ("val", 1)):
            folder = tmp_path / "data" / split / f"class_{label}"
            folder.mkdir(parents=True, exist_ok=True)
            for copy in range(copies):
                image.save(folder / f"{index:02d}_{copy:02d}.png")
    size = "--img_size 16 --patch_size 4 --encoder_embed_dim 48 --encoder_depth 2 --encoder_num_heads 3"
    plain = "--random_aug_magnitude 0 --mixup_alpha 0 --cutmix_alpha 0 --label_smoothing 0"
    more = f"{size} {plain} --epochs 2 --warmup_epochs 0.2 --learning_rate 2e-3 --weight_decay 0 --log_interval 20"
    experiment = train(tmp_path / "data", tmp_path / "work", None, more)
    assert rows(experiment)[-1]["testing_top1_acc"] == 100.0


# -------------------------------------------------------------------------------- scores


@pytest.fixture
def odd_data(image_folder) -> Path:
    (image_folder / "val" / "cats" / "000.jpg").unlink()
    return image_folder


def evaluation_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "evaluation.json").read_text())


def test_evaluation_counts_every_image_once_on_any_number_of_processes(finished, fork, odd_data, tmp_path):
    """Seven images, so that neither two nor three processes get equal shares, nor equal last batches."""
    found = []
    for num_processes in (1, 2, 3):
        checkpoint = shutil.copytree(finished / "last_checkpoint", tmp_path / f"on_{num_processes}")
        arguments = flags(odd_data, tmp_path, checkpoint, "--eval_only --per_gpu_batch_size 2")
        run = fork if num_processes == 2 else launch  # launched with two is a test above
        run("finetune_classifier.py", arguments, num_processes=num_processes)
        found.append({k: v for k, v in evaluation_of(checkpoint).items() if k != "weights"})
        table = (checkpoint / "per_class.tsv").read_text()
        assert table == (tmp_path / "on_1" / "per_class.tsv").read_text()
    assert found[0]["num_images"] == 7 and found[0]["testing_top1_acc"] == found[1]["testing_top1_acc"]
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert other["testing_loss"] == pytest.approx(found[0]["testing_loss"], abs=1e-6)
        assert {k: v for k, v in other.items() if "loss" not in k} == {
            k: v for k, v in found[0].items() if "loss" not in k
        }


def test_scores_equal_brute_force(finished, odd_data, tmp_path):
    checkpoint = shutil.copytree(finished / "last_checkpoint", tmp_path / "copy")
    figures = main(parse_args(flags(odd_data, tmp_path, checkpoint, "--eval_only")))
    model, _ = load_classifier(checkpoint)
    files, losses, hits = list_images(odd_data / "val"), [], []
    for index in range(7):
        image = ResizeCenterCrop((16, 16), 0.875)(read_image(files.path(index)))
        with torch.no_grad():
            scores = model.eval()(normalize(image[None], IMAGENET_MEAN, IMAGENET_STD))
        losses.append(F.cross_entropy(scores, torch.tensor([files.labels[index]]).long()).item())
        hits.append(int(scores.argmax()) == files.labels[index])
    assert figures["testing_top1_acc"] == 100 * sum(hits) / 7
    assert figures["testing_loss"] == pytest.approx(sum(losses) / 7, abs=1e-6)
    lines = [line.split("\t") for line in (checkpoint / "per_class.tsv").read_text().splitlines()]
    assert [line[:3] for line in lines[1:]] == [["cats", "cats", "3"], ["dogs", "dogs", "4"]]
    right = sum(int(line[2]) * float(line[3]) for line in lines[1:]) / 100
    assert round(right) == sum(hits) and (checkpoint / "worst_confusions.png").exists() == (sum(hits) < 7)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_top5_of_seven_classes_equals_brute_force(fork, tmp_path, num_processes):
    for index in range(7):
        draw_images(tmp_path / "data" / "val" / f"class_{index}", 3, seed=index)
    torch.manual_seed(0)
    model = ViTMAEForImageClassification(TINY, 7)
    torch.nn.init.normal_(model.head.weight)
    (tmp_path / "checkpoint").mkdir()
    save_file(model.state_dict(), tmp_path / "checkpoint" / "model.safetensors")
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps({"config": dataclasses.asdict(TINY)}))
    arguments = flags(tmp_path / "data", tmp_path, tmp_path / "checkpoint", "--eval_only --per_gpu_batch_size 4")
    fork("finetune_classifier.py", arguments, num_processes=num_processes)
    files, hits = list_images(tmp_path / "data" / "val"), {1: 0, 5: 0}
    for index in range(21):
        image = ResizeCenterCrop((16, 16), 0.875)(read_image(files.path(index)))
        with torch.no_grad():
            order = model.eval()(normalize(image[None], IMAGENET_MEAN, IMAGENET_STD))[0].argsort(descending=True)
        for k in hits:
            hits[k] += int(files.labels[index]) in order[:k].tolist()
    found = evaluation_of(tmp_path / "checkpoint")
    assert 0 < hits[1] < hits[5] < 21
    assert (found["testing_top1_acc"], found["testing_top5_acc"]) == (100 * hits[1] / 21, 100 * hits[5] / 21)


def test_eval_only_has_no_training_images_to_measure_a_range_on(finished, drawn_images, tmp_path, capsys):
    arguments = flags(drawn_images, tmp_path, finished / "checkpoint_2", "--eval_only --value_range auto")
    with pytest.raises(SystemExit):
        parse_args(arguments)
    assert "--eval_only has the weights' range: leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["best_checkpoint", "last_checkpoint"])
def test_eval_only_gives_the_logged_figures_to_the_last_digit(finished, drawn_images, tmp_path, name):
    checkpoint = shutil.copytree(finished / name, tmp_path / name)
    figures = main(parse_args(flags(drawn_images, tmp_path, checkpoint, "--eval_only")))
    if name == "last_checkpoint":
        logged = {key: rows(finished)[-1][key] for key in figures}
    else:
        record = json.loads((checkpoint / "config.json").read_text())["testing"]
        logged = {f"testing_{key}": value for key, value in record.items()}
    assert figures == logged


def test_evaluating_twice_keeps_the_first_files(finished, drawn_images, tmp_path):
    checkpoint = shutil.copytree(finished / "last_checkpoint", tmp_path / "copy")
    for _ in range(2):
        main(parse_args(flags(drawn_images, tmp_path, checkpoint, "--eval_only")))
    assert (checkpoint / "per_class_1.tsv").exists() and (checkpoint / "per_class.tsv").exists()


def test_eval_only_takes_a_file_of_the_original_release_and_a_folder_of_classes(image_folder, tmp_path):
    torch.manual_seed(0)
    config = MAEConfig(img_size=32, encoder_embed_dim=192, encoder_depth=1, encoder_num_heads=3)
    model = ViTMAEForImageClassification(config, 2)
    torch.save({"model": model.state_dict()}, tmp_path / "mae_finetuned_vit.pth")
    more = ["--eval_only", "--path_to_pretrained_mae_weights", str(tmp_path / "mae_finetuned_vit.pth")]
    work = ["--working_directory", str(tmp_path / "work"), "--num_workers", "0"]
    figures = [
        main(parse_args(["--path_to_data", str(path), *more, *work])) for path in (image_folder, image_folder / "val")
    ]
    assert figures[0] == figures[1]
    (image_folder / "val" / "birds").mkdir()
    shutil.copy(image_folder / "val" / "cats" / "000.jpg", image_folder / "val" / "birds")
    with pytest.raises(ValueError, match=r"tells 2 classes apart, but .* has 3"):
        main(parse_args(["--path_to_data", str(image_folder), *more, *work]))


def test_knn_equals_brute_force_and_the_online_view(drawn_images, pretrained, tmp_path):
    figures = main(parse_args(flags(drawn_images, tmp_path, pretrained, "--knn --global_pool cls")))
    model = ViTMAEForPreTraining(TINY)
    model.load_state_dict(weights(pretrained))
    vectors, labels = {}, {}
    for split in ("train", "val"):
        files = list_images(drawn_images / split)
        images = torch.stack([ResizeCenterCrop((16, 16), 0.875)(read_image(files.path(i))) for i in range(len(files))])
        with torch.no_grad():
            tokens = model.forward_features(normalize(images, IMAGENET_MEAN, IMAGENET_STD))
        vectors[split], labels[split] = F.normalize(tokens[:, 0], dim=1), files.labels
    hits = 0
    for vector, label in zip(vectors["val"], labels["val"], strict=True):
        similarity = vectors["train"] @ vector
        nearest = similarity.argsort(descending=True)[:20]
        votes = [sum(math.exp(similarity[i] / 0.07) for i in nearest if labels["train"][i] == k) for k in (0, 1)]
        hits += votes.index(max(votes)) == label
    assert figures["knn_top1_acc"] == 100 * hits / 8


def test_evaluation_in_the_run_is_what_eval_only_says_of_the_best_weights(finished, drawn_images, tmp_path):
    best = shutil.copytree(finished / "best_checkpoint", tmp_path / "best")
    main(parse_args(flags(drawn_images, tmp_path, best, "--eval_only")))
    first, again = json.loads((best / "evaluation_1.json").read_text()), evaluation_of(best)
    assert first.pop("weights") != again.pop("weights")
    assert first == again
    kinds = {f"testing_macro_{name}" for name in ("precision", "recall", "f1", "auc")} | {"testing_classes"}
    assert kinds <= first.keys() and first["testing_classes"] == 2
    for name in ("per_class", "confusion"):
        assert (best / f"{name}.tsv").read_text() == (best / f"{name}_1.tsv").read_text()
    matrix = [line.split("\t") for line in (best / "confusion.tsv").read_text().splitlines()]
    assert [row[0] for row in matrix[1:]] == matrix[0][1:] == ["cats", "dogs"]
    counts = np.array([row[1:] for row in matrix[1:]], dtype=int)
    assert counts.sum(axis=1).tolist() == [4, 4] and 100 * counts.trace() / 8 == first["testing_top1_acc"]
    hit, true, named = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    assert first["testing_macro_f1"] == pytest.approx(100 * (2 * hit / (true + named)).mean())


def test_score_on_the_set_that_chose_the_weights_says_so(finished, drawn_images, image_folder, tmp_path, capsys):
    """The very weights on the same images elsewhere, on others, and weights that were not chosen."""
    assert evaluation_of(finished / "best_checkpoint")["chose_best_checkpoint"] is True
    best = shutil.copytree(finished / "best_checkpoint", tmp_path / "best")
    last = shutil.copytree(finished / "last_checkpoint", tmp_path / "last")
    shutil.copytree(image_folder / "val", tmp_path / "test")
    cases = ((best, image_folder, True), (best, tmp_path / "test", False), (last, drawn_images, False))
    for checkpoint, data, chose in cases:
        main(parse_args(flags(data, tmp_path, checkpoint, "--eval_only")))
        assert evaluation_of(checkpoint)["chose_best_checkpoint"] is chose
        assert ("best_checkpoint was chosen by its score on 8 images" in capsys.readouterr().out) is chose


# -------------------------------------------------------------------------------- another split, scored once


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    """Nine images, which two processes cannot share alike."""
    folder = tmp_path_factory.mktemp("held_out") / "test"
    for index, (name, count) in enumerate((("cats", 5), ("dogs", 4))):
        draw_images(folder / name, count, seed=20 + index)
    return folder


@pytest.fixture(scope="module")
def tested(drawn_images, held_out, pretrained, tmp_path_factory) -> Path:
    """A run with a test, not to be changed."""
    from accelerate.state import AcceleratorState, GradientState

    more = f"--epochs 2 --test_folder {held_out}"
    experiment = train(drawn_images, tmp_path_factory.mktemp("work"), pretrained, more)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return experiment


def figures_of_test(experiment: Path) -> dict:
    record = evaluation_of(experiment / "best_checkpoint")
    return {key: value for key, value in record.items() if key.startswith("test_") and isinstance(value, int | float)}


def test_best_weights_are_scored_on_the_test_folder_as_eval_only_does(tested, held_out, tmp_path):
    best, found = tested / "best_checkpoint", figures_of_test(tested)
    copy = shutil.copytree(best, tmp_path / "copy")
    main(parse_args(flags(held_out, tmp_path, copy, "--eval_only")))
    alone = {k.replace("testing_", "test_"): v for k, v in evaluation_of(copy).items() if k.startswith("testing_")}
    assert found == alone | {"test_num_images": 9} and evaluation_of(best)["test_data"] == str(held_out)
    for name in ("per_class", "confusion"):
        assert (best / f"test_{name}.tsv").read_text() == (copy / f"{name}.tsv").read_text()
    assert {"testing_top1_acc", "testing_macro_auc", "chose_best_checkpoint"} <= evaluation_of(best).keys()


def test_evaluation_keeps_the_test_score_of_the_same_weights(tested, held_out, drawn_images, pretrained, tmp_path):
    """Which training took once; on the images of the test or on any other, with or without --class_subset."""
    run = shutil.copytree(tested, tmp_path / "run", symlinks=True)
    shutil.copytree(held_out / "cats", tmp_path / "some" / "cats")
    for data, flag in ((tmp_path / "some", ["--class_subset"]), (held_out, [])):
        main(parse_args(flags(data, tmp_path, run / "best_checkpoint", " ".join(["--eval_only", *flag]))))
        assert figures_of_test(run) == figures_of_test(tested)
        assert evaluation_of(run / "best_checkpoint").get("class_subset", False) is bool(flag)
    other = shutil.copy(run / "best_checkpoint" / "model.safetensors", run / "best_checkpoint" / "other.safetensors")
    main(parse_args(flags(held_out, tmp_path, other, "--eval_only")))
    assert figures_of_test(run) == {}  # of these weights there is no such score


def test_finished_run_keeps_its_test_score(tested, drawn_images, held_out, pretrained, tmp_path):
    """The figures are those of the file, even where the images have changed under their names."""
    best = shutil.copytree(tested, tmp_path / "run", symlinks=True) / "best_checkpoint"
    folder = shutil.copytree(held_out, tmp_path / "test")
    for path in folder.rglob("*.jpg"):
        Image.new("RGB", (20, 20), (9, 99, 200)).save(path)
    before = {path.name: path.read_bytes() for path in best.iterdir()}
    more = f"--epochs 2 --test_folder {folder} --resume_from_checkpoint latest"
    figures = main(parse_args(flags(drawn_images, tmp_path, pretrained, more)))
    assert {k: v for k, v in figures.items() if k.startswith("test_")} == figures_of_test(tested)
    assert before == {path.name: path.read_bytes() for path in best.iterdir()}


def test_run_that_ended_before_its_test_is_tested_by_two_processes_alike(
    tested, fork, drawn_images, held_out, pretrained, tmp_path
):
    best = shutil.copytree(tested, tmp_path / "run", symlinks=True) / "best_checkpoint"
    for file in best.glob("test_*"):
        file.unlink()
    record = {k: v for k, v in evaluation_of(best).items() if not k.startswith("test_")}
    (best / "evaluation.json").write_text(json.dumps(record))
    more = f"--epochs 2 --test_folder {held_out} --resume_from_checkpoint latest --per_gpu_batch_size 4"
    fork("finetune_classifier.py", flags(drawn_images, tmp_path, pretrained, more), num_processes=2)
    ours, whole = figures_of_test(tmp_path / "run"), figures_of_test(tested)
    assert ours.pop("test_loss") == pytest.approx(whole.pop("test_loss"), abs=1e-6) and ours == whole
    assert evaluation_of(best) == evaluation_of(best) | record
    for name in ("per_class", "confusion"):
        assert (best / f"test_{name}.tsv").read_text() == (tested / "best_checkpoint" / f"test_{name}.tsv").read_text()


def test_test_folder_needs_the_same_classes_and_images_of_its_own(image_folder, pretrained, tmp_path):
    for split in ("val", "train"):
        with pytest.raises(ValueError, match=rf"--test_folder .*{split} is in use by the training; give another split"):
            train(image_folder, tmp_path, pretrained, f"--test_folder {image_folder / split}")
    folder = shutil.copytree(image_folder / "val", tmp_path / "test")
    (folder / "cats" / "000.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"cannot decode .*test/cats/000\.jpg"):
        train(image_folder, tmp_path, pretrained, f"--test_folder {folder}")
    assert rows(tmp_path / "run")[-1]["step"] == 2  # beside the first epoch, after the validation images
    (folder / "dogs").rename(folder / "doges")
    with pytest.raises(ValueError, match="it lacks dogs; it adds doges"):
        train(image_folder, tmp_path / "other", pretrained, f"--test_folder {folder}")
    assert not (tmp_path / "other" / "run" / "log.jsonl").exists()


# -------------------------------------------------------------------------------- imbalance


@pytest.fixture
def few_dogs(image_folder) -> Path:
    """12 cats and 3 dogs: one step of 8 images an epoch."""
    for index in range(3, 12):
        (image_folder / "train" / "dogs" / f"{index:03d}.jpg").unlink()
    return image_folder


def test_balanced_run_is_the_same_resumed_accumulated_and_spread(few_dogs, pretrained, fork, tmp_path):
    more = "--balanced_sampling --drop_path 0.5 --class_weights 1 2.5 --save_checkpoint_interval 1"
    works = [tmp_path / name for name in ("whole", "resumed", "accumulated", "spread")]
    whole = train(few_dogs, works[0], pretrained, more)
    shutil.copytree(whole / "checkpoint_2", works[1] / "run" / "checkpoint_2")
    resumed = train(few_dogs, works[1], pretrained, f"{more} --resume_from_checkpoint latest --num_workers 1")
    assert_close(weights(resumed / "checkpoint_4"), weights(whole / "checkpoint_4"), atol=0)
    train(few_dogs, works[2], pretrained, f"{more} --gradient_accumulation_steps 2")
    halves = flags(few_dogs, works[3], pretrained, f"{more} --per_gpu_batch_size 4")
    fork("finetune_classifier.py", halves, num_processes=2)
    for work in works[2:]:  # sums in another order: up to a two-thousandth of a step
        assert_close(weights(work / "run" / "checkpoint_4"), weights(whole / "checkpoint_4"), atol=5e-6)
    assert [row["step"] for row in rows(whole)] == [1, 2, 3, 4]  # as without
    with pytest.raises(ValueError, match="balanced_sampling: True in the checkpoint, None now"):
        train(few_dogs, works[1], pretrained, "--resume_from_checkpoint latest --epochs 5")


def test_weighted_loss_of_soft_targets_is_the_formula_by_hand():
    """Mixup's targets, three images: the mean of -sum_k w_k t_k log p_k, whatever the images' own weights are."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 4, generator=generator)
    targets = torch.tensor([[1, 0, 0, 0], [0.3, 0.7, 0, 0], [0.025, 0.025, 0.925, 0.025]])
    class_weights = torch.tensor([0.5, 2.0, 1.0, 0.0])
    log_p = scores.numpy() - np.log(np.exp(scores.numpy()).sum(axis=1, keepdims=True))
    by_hand = [-(class_weights.numpy() * t * p).sum() for t, p in zip(targets.numpy(), log_p, strict=True)]
    loss, oracle = build_loss(class_weights), torch.nn.CrossEntropyLoss(weight=class_weights)
    assert loss(scores, targets).item() == pytest.approx(np.mean(by_hand), rel=1e-5)
    assert loss(scores, targets).item() == pytest.approx(oracle(scores, targets).item(), rel=1e-6)
    parts = [loss(scores[i : i + 1], targets[i : i + 1]).item() for i in range(3)]
    assert np.mean(parts) == pytest.approx(np.mean(by_hand), rel=1e-5)  # accumulated passes add up
    plain, ones = build_loss(None), build_loss(torch.ones(4))
    assert plain(scores, targets).item() == pytest.approx(ones(scores, targets).item(), rel=1e-6)


def test_class_weights_of_the_flag_reach_the_loss(few_dogs, pretrained, tmp_path, capsys):
    """In the first step all have the same weights and images: of twice the class weights the loss is twice as high."""
    losses = {}
    for given in ("none", "1 1", "2 2", "balanced"):
        experiment = train(few_dogs, tmp_path / given, pretrained, f"--epochs 2 --class_weights {given}")
        losses[given] = rows(experiment)[0]["training_loss"]
        printed = capsys.readouterr().out
        assert ("class weights   0.625 (cats) to 2.5 (dogs)" in printed) == (given == "balanced")
    assert losses["1 1"] == pytest.approx(losses["none"], rel=1e-6)
    assert losses["2 2"] == pytest.approx(2 * losses["none"], rel=1e-6)
    assert losses["balanced"] != losses["none"]


# -------------------------------------------------------------------------------- frozen encoders


def test_linear_probe_trains_the_head_alone_from_the_frozen_feature(drawn_images, pretrained, tmp_path):
    more = "--linear_probe --learning_rate 1 --gradient_accumulation_steps 1"
    experiment = train(drawn_images, tmp_path, pretrained, more)
    probed, before = weights(experiment / "last_checkpoint"), weights(pretrained)
    assert all(torch.equal(value, before[key]) for key, value in probed.items() if not key.startswith("head"))
    assert probed["head.0.running_mean"].any() and probed["head.1.bias"].any()
    record = json.loads((experiment / "last_checkpoint" / "config.json").read_text())
    assert record["global_pool"] == "cls"
    figures = main(parse_args(flags(drawn_images, tmp_path, experiment / "last_checkpoint", "--eval_only")))
    assert figures["testing_loss"] == rows(experiment)[-1]["testing_loss"]


def test_linear_probe_on_two_processes_logs_what_its_checkpoint_scores(fork, drawn_images, pretrained, tmp_path):
    """Each process has batch norm statistics of its own; scored and saved are the first one's."""
    more = "--linear_probe --learning_rate 1 --gradient_accumulation_steps 1 --per_gpu_batch_size 4"
    fork("finetune_classifier.py", flags(drawn_images, tmp_path, pretrained, more), num_processes=2)
    figures = main(parse_args(flags(drawn_images, tmp_path, tmp_path / "run" / "last_checkpoint", "--eval_only")))
    assert figures["testing_loss"] == pytest.approx(rows(tmp_path / "run")[-1]["testing_loss"], abs=1e-7)


def test_what_workers_get_can_be_sent_to_them(drawn_images, pretrained, tmp_path):
    for more in ("--linear_probe", ""):
        args = parse_args(flags(drawn_images, tmp_path, pretrained, more))
        model = ViTMAEForImageClassification(TINY, 2, probe_head=args.linear_probe)
        data, mixing = build_training_data(list_images(drawn_images / "train"), model, args)
        samples = [data[SampleKey(0, index)] for index in range(4)]
        again, remixing = pickle.loads(pickle.dumps((data, mixing)))
        assert torch.equal(remixing([again[SampleKey(0, index)] for index in range(4)]).images, mixing(samples).images)


def test_lars_takes_the_steps_of_the_original_by_hand(pretrained, drawn_images):
    """Weights are decayed and get the trust ratio 0.001 |w| / |g|, the bias neither; momentum holds what was scaled."""
    args = parse_args(flags(drawn_images, Path("nowhere"), pretrained, "--linear_probe --weight_decay 0.1"))
    model = ViTMAEForImageClassification(TINY, 2, "cls", probe_head=True)
    optimizer = build_optimizer(model, 6.4, args)
    assert isinstance(optimizer, Lars) and len([p for group in optimizer.param_groups for p in group["params"]]) == 2
    linear, momentum = model.head[1], {}
    torch.nn.init.normal_(linear.bias)
    expected = {"weight": linear.weight.detach().clone(), "bias": linear.bias.detach().clone()}
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for name, parameter in linear.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.clone()
            if name == "weight":
                decayed = gradient + 0.1 * expected[name]
                norms = expected[name].norm(), gradient.norm()
                gradient = decayed * 0.001 * norms[0] / (norms[1] + 0.1 * norms[0])
            momentum[name] = 0.9 * momentum.get(name, 0) + gradient
            expected[name] = expected[name] - 6.4 * momentum[name]
        optimizer.step()
    torch.testing.assert_close(linear.weight.detach(), expected["weight"])
    torch.testing.assert_close(linear.bias.detach(), expected["bias"])


def test_partial_finetuning_leaves_the_first_blocks_alone(drawn_images, pretrained, tmp_path):
    experiment = train(drawn_images, tmp_path, pretrained, "--finetune_blocks 0.5 --drop_path 0.5")
    tuned, before = weights(experiment / "last_checkpoint"), weights(pretrained)
    changed = {key for key in tuned if key in before and not torch.equal(tuned[key], before[key])}
    assert changed == {
        f"blocks.2.{name}.{kind}" for name in ("norm2", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")
    }


# -------------------------------------------------------------------------------- recipes


def parsed(start: Path | None, more: str = ""):
    given = ["--path_to_data", "nowhere"] + (["--path_to_pretrained_mae_weights", str(start)] if start else [])
    return parse_args([*given, *shlex.split(more)])


@pytest.fixture(scope="module")
def original_files(tmp_path_factory) -> Callable[[int], Path]:
    """Give encoder-only files in the layout of the original release, as wide as asked."""
    folder = tmp_path_factory.mktemp("original")

    def original_file(width: int) -> Path:
        file = folder / f"mae_pretrain_{width}.pth"
        with torch.device("meta"):
            config = MAEConfig(img_size=32, encoder_embed_dim=width, encoder_depth=1, encoder_num_heads=width // 64)
            state = ViTMAEForImageClassification(config, 1).state_dict()
        kept = {k: torch.zeros(value.shape) for k, value in state.items() if not k.startswith(("head", "fc_norm"))}
        if not file.exists():
            torch.save({"model": kept}, file)
        return file

    return original_file


def test_tutorial_recipe_is_the_given_command():
    args = parsed(None)
    assert (args.per_gpu_batch_size, args.save_checkpoint_interval, args.num_workers) == (256, 10, 32)
    assert (args.encoder_embed_dim, args.encoder_depth, args.img_size) == (768, 12, 224)


RECIPES = {
    #                               finetuned, by width          from scratch     probed  the tutorial's
    #                               768         1024   1280      768      1024
    "epochs":                      (100,        50,    50,       300,     200,    90,     100),
    "warmup_epochs":               (5,          5,     5,        20,      20,     10,     5),
    "per_gpu_batch_size":          (128,        128,   128,      512,     512,    None,   256),
    "gradient_accumulation_steps": (1,          1,     1,        1,       1,      4,      1),
    "learning_rate":               (None,       None,  None,     None,    None,   None,   0.002),
    "base_learning_rate":          (5e-4,       1e-3,  1e-3,     1e-4,    1e-4,   0.1,    None),
    "min_learning_rate":           (1e-6,       1e-6,  1e-6,     0,       0,      0,      0),
    "weight_decay":                (0.05,       0.05,  0.05,     0.3,     0.3,    0,      0.1),
    "max_grad_norm":               (0,          0,     0,        0,       0,      0,      1),
    "layer_decay":                 (0.65,       0.75,  0.75,     1,       1,      1,      1),
    "drop_path":                   (0.1,        0.2,   0.3,      0.1,     0.2,    0,      0),
    "random_aug_magnitude":        (9,          9,     9,        9,       9,      0,      9),
    "random_erasing":              (0.25,       0.25,  0.25,     0,       0,      0,      0),
    "mixup_alpha":                 (0.8,        0.8,   0.8,      0.8,     0.8,    0,      0.2),
    "cutmix_alpha":                (1,          1,     1,        1,       1,      0,      1),
    "label_smoothing":             (0.1,        0.1,   0.1,      0.1,     0.1,    0,      0.1),
    "ema_decay":                   (0,          0,     0,        0.9999,  0.9999, 0,      0),
    "global_pool":                 ("avg",      "avg", "avg",    "avg",   "avg",  "cls",  "avg"),
}  # fmt: skip
PAPER = "--recipe paper"
RUNS = [  # width of the weights (None: from scratch), flags, and the column of the table
    *((width, PAPER, 0) for width in (192, 384, 768)), (1024, PAPER, 1), (1280, PAPER, 2),
    (None, PAPER, 3), (None, f"{PAPER} --encoder_embed_dim 192 --encoder_num_heads 3", 3),
    (None, f"{PAPER} --model mae_vit_base_patch16", 3), (None, f"{PAPER} --model mae_vit_large_patch16", 4),
    (None, f"{PAPER} --model mae_vit_huge_patch14", 4),
    *((width, f"{more} --linear_probe", 5) for width in (192, 768, 1024, 1280) for more in ("", PAPER)),
    *((width, "", 6) for width in (None, 192, 768, 1024, 1280)), (None, "--model mae_vit_large_patch16", 6),
]  # fmt: skip


@pytest.mark.parametrize(("width", "more", "column"), RUNS)
def test_recipe_of_a_run(original_files, width, more, column):
    args = parsed(width and original_files(width), more)
    assert {name: getattr(args, name) for name in RECIPES} == {name: row[column] for name, row in RECIPES.items()}
    assert args.adam_betas == ([0.9, 0.95] if column in (3, 4) else [0.9, 0.999])
    if width:  # the weights' own, as long as no flag says otherwise
        assert (args.encoder_embed_dim, args.encoder_depth, args.img_size) == (width, 1, 32)


def test_given_command_is_understood_as_it_stands():
    command = """--experiment_name "MAE_Imagenet_Finetuning" --wandb_run_name "finetune_mae" --path_to_data "data"
        --working_directory "work_dir" --num_classes 1000 --epochs 100 --warmup_epochs 5 --save_checkpoint_interval 10
        --per_gpu_batch_size 256 --gradient_accumulation_steps 1 --learning_rate 0.002 --weight_decay 0.1
        --random_aug_magnitude 9 --mixup_alpha 0.2 --cutmix_alpha 1.0 --label_smoothing 0.1 --max_grad_norm 1.0
        --img_size 224 --num_workers 32"""
    given, default = vars(parse_args(shlex.split(command))), vars(parsed(None))
    assert given.pop("changed_flags") == ["num_classes", "path_to_data", "wandb_run_name"]
    differs = {name for name in given if given[name] != default[name]}
    assert differs == {"path_to_data", "num_classes", "wandb_run_name"}


@pytest.mark.parametrize(
    ("more", "rate", "decay"),
    [("", "0.002", "0.1"), ("--recipe paper", "0.0005", "0.05"), ("--linear_probe", "0.1", "0.0")],
)
def test_help_shows_the_defaults_of_the_recipe(pretrained, capsys, more, rate, decay):
    with pytest.raises(SystemExit) as stop:
        parsed(pretrained, f"{more} --help")
    printed = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    peak = "the peak for 256 images per step" if more else "the peak, whatever the batch"
    assert f"{peak} (default: {rate})" in printed
    assert f"AdamW's, not on biases and norms (default: {decay})" in printed


def test_grey_weights_are_judged_without_a_word_on_augmentation(tmp_path):
    config = dataclasses.replace(TINY, input_channels=1)
    save_file(ViTMAEForImageClassification(config, 2).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"config": dataclasses.asdict(config)}))
    for mode in ("--eval_only", "--knn", "--linear_probe"):
        assert parsed(tmp_path, mode).mean == (0.5,)


def test_flags_win_over_recipes(pretrained):
    args = parsed(pretrained, "--recipe paper --epochs 7 --drop_path 0 --learning_rate 0.5 --img_size 32")
    assert (args.epochs, args.drop_path, args.learning_rate, args.base_learning_rate) == (7, 0, 0.5, None)
    assert args.img_size == 32 and args.patch_size == 4
    args = parsed(pretrained, "--base_learning_rate 0.1")
    assert (args.learning_rate, args.base_learning_rate) == (None, 0.1)


def test_larger_images_than_pretraining_resample_the_positions(drawn_images, pretrained, tmp_path, capsys):
    train(drawn_images, tmp_path, pretrained, "--img_size 24 --epochs 2")
    assert "1 resampled (pos_embed)" in capsys.readouterr().out
    assert weights(tmp_path / "run" / "last_checkpoint")["pos_embed"].shape == (1, 1 + 36, 32)


def test_custom_weight_init_flag_reaches_the_model():
    size = "--img_size 16 --patch_size 4 --encoder_embed_dim 32 --encoder_depth 3 --encoder_num_heads 4"
    found = {}
    for more in ("", "--custom_weight_init", "--no-custom_weight_init"):
        torch.manual_seed(0)
        found[more] = build_model(2, parsed(None, f"{size} {more}"))[0].state_dict()
    for more, state in found.items():
        torch.manual_seed(0)
        expected = ViTMAEForImageClassification(TINY, 2, custom_weight_init="no" not in more).state_dict()
        assert_close(state, expected, atol=0)
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(found[""][name], found["--custom_weight_init"][name])
    assert not torch.equal(found[""][name], found["--no-custom_weight_init"][name])


def test_from_scratch_run_says_so(drawn_images, tmp_path, capsys):
    size = "--img_size 16 --patch_size 4 --encoder_embed_dim 32 --encoder_depth 2 --encoder_num_heads 4"
    train(drawn_images, tmp_path, None, f"{size} --epochs 2")
    assert "start           from scratch" in capsys.readouterr().out


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--learning_rate 1 --base_learning_rate 1", "give one of them"),
        ("--label_smoothing 1", "--label_smoothing must be between 0 and 0.99, not 1"),
        ("--mixup_alpha -1", "--mixup_alpha must be at least 0, not -1"),
        ("--random_aug_magnitude 11", "--random_aug_magnitude must be between 0 and 10, not 11"),
        ("--model mae_vit_base_patch16", "--model is for training from scratch; the sizes come with"),
        ("--encoder_depth 5", "--encoder_depth 5, but"),
        ("--img_size 30", "img_size 30 is not a multiple of patch_size 4; use 28 or 32"),
        ("--knn --eval_only", "--eval_only and --knn exclude each other; give one of them"),
        ("--eval_interval 0", "--eval_interval must be at least 1, not 0"),
        ("--linear_probe --per_gpu_batch_size 1", "--linear_probe normalises over a forward pass, here of 1 image"),
        ("--finetune_blocks 4", "4 blocks cannot be trained of 3; choose 0, 0.5, or 1 to 3"),
        ("--class_weights balance", "--class_weights balance: give none, balanced, a number for each class, or a file"),
        ("--balanced_sampling --class_weights balanced", "make up for the same; give one of them"),
        ("--eval_only --test_folder .", "--test_folder is scored after a training"),
        ("--demo --knn", "--demo compares finetuning with training from scratch"),
    ],
)
def test_impossible_flags_are_refused_before_any_work(pretrained, more, message, capsys):
    with pytest.raises(SystemExit):
        parsed(pretrained, more)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["--eval_only", "--linear_probe", "--knn", "--finetune_blocks 1"])
def test_judging_weights_needs_weights(mode, capsys):
    with pytest.raises(SystemExit):
        parsed(None, mode)
    assert f"{mode.split()[0]} judges weights: give --path_to_pretrained_mae_weights" in capsys.readouterr().err


def test_demo_without_its_pretraining_says_what_to_run_first(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--demo", "--working_directory", str(tmp_path)])
    assert "first run accelerate launch pretrain_mae.py --demo" in capsys.readouterr().err


def test_demo_compares_the_pretrained_run_with_one_from_scratch(tmp_path, monkeypatch, capsys):
    """The demo in small: few scenes, and few epochs of everything."""
    few = functools.partial(write_demo_data, num_train=64, num_val=20)
    monkeypatch.setattr(training.data, "write_demo_data", few)
    short = ["--demo", "--epochs", "2", "--num_workers", "0", "--working_directory", str(tmp_path)]
    pretrain_mae.main(pretrain_mae.parse_args(short))
    compare_with_scratch(parse_args(short))
    printed = capsys.readouterr().out
    assert "start           from scratch" in printed and "tensors loaded" in printed
    compared, _, commands = printed.rpartition("Next:\n")
    scores = {line[2:34].strip(): float(line[34:].rstrip(" %")) for line in compared.splitlines()[-2:]}
    assert len(commands.splitlines()) == 3 and "IMAGE" not in commands and compared.count("Next:") == 1  # pretraining's
    experiments = {"from scratch": "demo_finetuned_from_scratch", "from the demo's pretraining": "demo_finetuned"}
    for name, experiment in experiments.items():
        assert scores[name] == pytest.approx(rows(tmp_path / experiment)[-1]["testing_top1_acc"], abs=0.01)


def test_weights_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint folder or weight file at"):
        parsed(tmp_path / "checkpoint_9")


def test_validation_classes_that_differ_are_refused(image_folder, pretrained, tmp_path):
    (image_folder / "val" / "dogs").rename(image_folder / "val" / "doges")
    with pytest.raises(ValueError, match="it lacks dogs; it adds doges"):
        train(image_folder, tmp_path, pretrained)
    assert not (tmp_path / "run").exists()


def test_undecodable_validation_image_stops_the_run_in_its_first_epoch(image_folder, pretrained, tmp_path):
    (image_folder / "val" / "dogs" / "broken.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"cannot decode .*broken\.jpg"):
        train(image_folder, tmp_path, pretrained, "--eval_interval 4 --log_interval 1")
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]  # 9 images are two batches, one after each step


def test_number_of_classes_that_is_not_there_is_refused(drawn_images, pretrained, tmp_path):
    with pytest.raises(ValueError, match=r"--num_classes 1000, but .* has 2 class folders"):
        train(drawn_images, tmp_path, pretrained, "--num_classes 1000")


def test_data_without_validation_is_refused(image_folder, pretrained, tmp_path):
    shutil.rmtree(image_folder / "val")
    with pytest.raises(FileNotFoundError, match="without held-out images no classifier can be judged"):
        train(image_folder, tmp_path, pretrained)


def test_evaluated_classes_have_to_be_the_classifiers(finished, image_folder, tmp_path):
    checkpoint = shutil.copytree(finished / "last_checkpoint", tmp_path / "copy")
    (image_folder / "val" / "cats").rename(image_folder / "val" / "birds")
    with pytest.raises(ValueError, match=r"the classifier in .* it lacks cats; it adds birds"):
        main(parse_args(flags(image_folder, tmp_path, checkpoint, "--eval_only")))


def test_pretrained_weights_are_no_classifier(pretrained, drawn_images, tmp_path):
    with pytest.raises(ValueError, match="holds no classifier"):
        main(parse_args(flags(drawn_images, tmp_path, pretrained, "--eval_only")))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--ema_decay 0.8", "ema_decay: 0.9 in the checkpoint, 0.8 now"),
        ("--finetune_blocks 1", "finetune_blocks: None in the checkpoint, 1.0 now"),
        ("--global_pool cls", "global_pool: 'avg' in the checkpoint, 'cls' now"),
    ],
)
def test_resume_as_another_run_is_refused(finished, drawn_images, pretrained, tmp_path, more, message):
    shutil.copytree(finished / "checkpoint_2", tmp_path / "run" / "checkpoint_2")
    with pytest.raises(ValueError, match=message):
        train(drawn_images, tmp_path, pretrained, f"{STRONG} --resume_from_checkpoint latest {more}")


def test_finished_experiment_is_not_trained_over(finished, drawn_images, pretrained):
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint latest"):
        train(drawn_images, finished.parent, pretrained, STRONG)


# -------------------------------------------------------------------------------- tools


def test_classify_names_the_likeliest_classes(finished, drawn_images, capsys):
    tool = load_tool("classify")
    path = next((drawn_images / "val" / "cats").iterdir())
    tool.main(tool.parse_args(["--checkpoint", str(finished / "last_checkpoint"), str(path)]))
    weights_line, *printed = capsys.readouterr().out.splitlines()
    assert weights_line == f"weights         {finished / 'last_checkpoint' / 'model.safetensors'}"
    assert printed[0] == str(path) and {line.split()[1] for line in printed[1:]} == {"cats", "dogs"}
    model, _ = load_classifier(finished / "last_checkpoint")
    image = normalize(ResizeCenterCrop((16, 16), 0.875)(read_image(path))[None], IMAGENET_MEAN, IMAGENET_STD)
    best = model.eval()(image).softmax(dim=1).max().item()
    assert printed[1].split()[0] == f"{best:.2%}"


def test_classify_knows_imagenets_names_and_passes_over_what_is_no_image(tmp_path, capsys):
    tool = load_tool("classify")
    names = tool.class_names_of({"class_names": ["n01440764", "cats"]}, 2)  # as they are, for a table
    assert names == ["n01440764", "cats"] and [utils.describe_class(name) for name in names] == ["tench", "cats"]
    assert tool.class_names_of({}, 1000)[0] == "tench" and tool.class_names_of({}, 3) == [
        "class 0",
        "class 1",
        "class 2",
    ]
    model = ViTMAEForImageClassification(TINY, 2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"config": dataclasses.asdict(TINY)}))
    (tmp_path / "text.jpg").write_text("no picture")
    assert tool.main(tool.parse_args(["--checkpoint", str(tmp_path), str(tmp_path / "text.jpg")])) == 1
    said = capsys.readouterr().err
    assert f"cannot decode {tmp_path / 'text.jpg'}" in said and "1 of 1 files could not be read" in said
