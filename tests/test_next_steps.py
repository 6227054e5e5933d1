"""The last words of a script: commands that a shell, and the scripts and tools they name, take as they stand."""

import argparse
import dataclasses
import importlib
import json
import shlex
from pathlib import Path

import pytest
from accelerate import Accelerator
from conftest import ROOT, TINY, load_tool
from safetensors.torch import save_file

import finetune_segmentation
from storage.lists import list_images
from storage.pairs import list_pairs
from training.next_steps import end_script, next_commands


def parse(command: str) -> tuple[str, argparse.Namespace]:
    """Do with a command what a shell and the script do; give the script's name and its flags."""
    words = shlex.split(command)
    launched = words[:2] == ["accelerate", "launch"]
    assert launched or words[0] == "python"
    path, *argv = words[2:] if launched else words[1:]
    assert (ROOT / path).is_file()  # as given from here, or from anywhere
    script = importlib.import_module(Path(path).stem) if launched else load_tool(Path(path).stem)
    return Path(path).stem, script.parse_args(argv)


def flags_of(script: str, data: Path, *more: str) -> argparse.Namespace:
    return importlib.import_module(script).parse_args(["--path_to_data", str(data), *more])


@pytest.fixture
def experiment(tmp_path) -> Path:
    """The folder of an experiment, with letters that a shell would take for its own, and weights without content."""
    folder = tmp_path / "it's mine; $HOME" / "run"
    folder.mkdir(parents=True)
    save_file({}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"config": dataclasses.asdict(TINY)}))
    return folder


def test_after_pretraining_come_finetuning_a_picture_and_the_curves(experiment, drawn_images, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    train, val = (list_images(drawn_images / split) for split in ("train", "val"))
    flags = flags_of("pretrain_mae", drawn_images, "--recipe", "small", "--value_range", "own")
    commands = next_commands("pretrain_mae.py", flags, experiment, train, val)
    (_, finetuning), (_, picture), (_, curves) = map(parse, commands)
    assert [command.split(" --")[0].split(" '")[0] for command in commands] == [
        "accelerate launch finetune_classifier.py", "python tools/reconstruct.py", "python tools/plot_log.py",
    ]  # fmt: skip
    assert finetuning.path_to_pretrained_mae_weights == str(experiment) and finetuning.recipe == "small"
    assert finetuning.path_to_data == str(drawn_images) and finetuning.random_aug_magnitude == 0
    assert picture.checkpoint == experiment and picture.images == [Path(val.path(0))]
    assert curves.runs == [experiment] and curves.y == ["training_loss", "testing_loss"]


def test_after_pretraining_on_images_without_labels_or_val_these_are_asked_for(experiment, drawn_images, tmp_path):
    flags = flags_of("pretrain_mae", drawn_images / "train" / "cats")
    unlabelled, labelled = list_images(drawn_images / "train" / "cats"), list_images(drawn_images / "train")
    finetuning, _, curves = next_commands("pretrain_mae.py", flags, experiment, unlabelled, None)
    assert "--path_to_data LABELLED_FOLDER" in finetuning and parse(curves)[1].y == ["training_loss"]
    finetuning, *_ = next_commands("pretrain_mae.py", flags, experiment, labelled, None)
    assert parse(finetuning)[1].val_fraction == 0.1


def test_after_a_classifier_come_its_answers_and_its_evaluation(experiment, drawn_images):
    flags = flags_of("finetune_classifier", drawn_images, "--val_fraction", "0.2", "--seed", "3")
    train, val = (list_images(drawn_images / split) for split in ("train", "val"))
    evaluation, answers, curves = map(parse, next_commands("finetune_classifier.py", flags, experiment, train, val))
    assert evaluation[1].eval_only and evaluation[1].path_to_pretrained_mae_weights == str(experiment)
    assert (evaluation[1].val_fraction, evaluation[1].seed) == (0.2, 3)
    assert answers[0] == "classify" and answers[1].checkpoint == experiment
    assert curves[1].y == ["training_loss", "testing_top1_acc"]
    other = experiment / "epoch_3.safetensors"
    save_file({}, other)
    for weights, named in ((experiment / "model.safetensors", experiment), (other, other)):
        (shown,) = next_commands("finetune_classifier.py", evaluation[1], weights)
        assert parse(shown)[1].checkpoint == named
    (answers,) = next_commands("finetune_classifier.py", evaluation[1], experiment)
    assert parse(answers)[1].images == [next((drawn_images / "val").glob("*/*"))]


def test_after_a_segmenter_come_its_pictures_and_its_evaluation(experiment, drawn_pairs):
    flags = flags_of("finetune_segmentation", drawn_pairs, "--from_scratch", "--num_classes", "4", "--ignore_zero")
    (experiment / "config.json").write_text(json.dumps(finetune_segmentation.build_record(flags)))
    train, val = (list_pairs(drawn_pairs, split) for split in ("training", "validation"))
    evaluation, pictures, curves = map(parse, next_commands("finetune_segmentation.py", flags, experiment, train, val))
    assert evaluation[1].eval_only and evaluation[1].path_to_backbone_checkpoint == str(experiment)
    assert evaluation[1].num_classes == 4 and pictures[1].images == [Path(val.path(0))]
    assert pictures[0] == "segment" and curves[1].y == ["training_loss", "testing_miou"]


def test_demo_of_pretraining_goes_on_with_that_of_the_classifier(tmp_path, drawn_images, monkeypatch, capsys):
    work = tmp_path / "a folder"
    weights = work / "demo" / "checkpoint_18"
    weights.mkdir(parents=True)
    save_file({}, weights / "model.safetensors")
    (weights / "config.json").write_text(json.dumps({"config": dataclasses.asdict(TINY)}))
    flags = flags_of("pretrain_mae", drawn_images, "--demo", "--working_directory", str(work))
    files = list_images(drawn_images / "val")
    end_script("somewhere/pretrain_mae.py", Accelerator(cpu=True), flags, work / "demo", files, files)
    title, finetuning, *others = capsys.readouterr().out.splitlines()
    assert title == "Next:" and len(others) == 2
    monkeypatch.setattr("training.flags.find_checkpoints", lambda folder: [weights] * (folder == work / "demo"))
    assert parse(finetuning)[1].path_to_pretrained_mae_weights == str(weights)
