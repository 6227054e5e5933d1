"""Flags: which the scripts have, who decides a value, what is refused and in which words, and what --help shows."""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, TINY
from safetensors.torch import save_file

import pretrain_mae
from model import MAEConfig
from training.flags import Flags, micro_batch_size, size_flags

# -------------------------------------------------------------------------------- what the scripts have

SHARED = """experiment_name working_directory resume_from_checkpoint save_checkpoint_interval save_minutes
 keep_checkpoints max_nonfinite_steps deterministic timeout_minutes activation_checkpointing log_interval
 log_wandb log_with wandb_run_name config seed demo check path_to_data img_size input_channels value_range
 mean std show_channels num_workers val_fraction image_column shard_cache_gb
 max_image_pixels max_bad_fraction rescan_data epochs warmup_epochs per_gpu_batch_size gradient_accumulation_steps
 weight_decay max_grad_norm pin_memory bias_weight_decay norm_weight_decay help model patch_size
 encoder_embed_dim encoder_depth encoder_num_heads encoder_mlp_ratio"""
OWN = {
    "pretrain_mae": """decoder_embed_dim decoder_depth decoder_num_heads decoder_mlp_ratio mask_ratio norm_pix_loss
 custom_weight_init base_learning_rate min_learning_rate min_crop_scale repeated_sampling probe_every
 path_to_probe_data probe_images probe_pool init_from recipe schedule_epochs label_column masking target
 encode_mask_tokens augmentation""",
    "finetune_classifier": """path_to_pretrained_mae_weights num_classes global_pool custom_weight_init eval_only
 linear_probe knn finetune_blocks recipe learning_rate base_learning_rate min_learning_rate layer_decay adam_betas
 drop_path random_aug_magnitude random_erasing mixup_alpha cutmix_alpha label_smoothing ema_decay eval_interval
 balanced_sampling class_weights test_folder schedule_epochs label_column
 class_subset""",
    "finetune_segmentation": """path_to_backbone_checkpoint from_scratch taps channels norm rel_pos_bias num_classes
 ignore_zero class_names resize_to iterations warmup_iterations learning_rate layer_decay drop_path auxiliary_weight
eval_interval recipe eval_only slide multi_scale window_batch_size flip loss class_weights test_split
 label_values image_folder label_folder image_suffix label_suffix annotation_column layer_scale""",
}
SWITCHES = """check deterministic activation_checkpointing log_wandb demo rescan_data pin_memory bias_weight_decay
 norm_weight_decay norm_pix_loss custom_weight_init eval_only linear_probe knn from_scratch rel_pos_bias ignore_zero
 slide multi_scale flip balanced_sampling encode_mask_tokens layer_scale class_subset"""
NOBODY = 65534
MINIMAL = {"per_gpu_batch_size": 4}
# Lowest and highest value, both allowed; None where there is no end.
SHARED_RANGES = {
    "seed": (0, None),
    "save_checkpoint_interval": (1, None),
    "input_channels": (1, None),
    "std": (1e-9, None),
    "show_channels": (0, None),
    "num_workers": (0, None),
    "epochs": (1, None),
    "warmup_epochs": (0, None),
    "per_gpu_batch_size": (1, None),
    "gradient_accumulation_steps": (1, None),
    "weight_decay": (0, None),
    "max_grad_norm": (0, None),
    "log_interval": (1, None),
    "save_minutes": (0, None),
    "keep_checkpoints": (2, None),
    "max_nonfinite_steps": (1, None),
    "max_image_pixels": (1, None),
    "max_bad_fraction": (0, 1),
    "val_fraction": (0.001, 0.5),
    "timeout_minutes": (0.01, None),
    "shard_cache_gb": (0, None),
}
RANGES = {
    "pretrain_mae": {
        "mask_ratio": (1e-9, 1),
        "min_crop_scale": (1e-9, 1),
        "repeated_sampling": (1, None),
        "schedule_epochs": (1, None),
        "probe_every": (0, None),
        "probe_images": (1, None),
    },
    "finetune_classifier": {
        "layer_decay": (0, 1),
        "drop_path": (0, 0.99),
        "random_aug_magnitude": (0, 10),
        "random_erasing": (0, 1),
        "mixup_alpha": (0, None),
        "cutmix_alpha": (0, None),
        "label_smoothing": (0, 0.99),
        "ema_decay": (0, 0.999999),
        "schedule_epochs": (1, None),
        "eval_interval": (1, None),
    },
    "finetune_segmentation": {
        "channels": (1, None),
        "num_classes": (2, 255),
        "iterations": (1, None),
        "warmup_iterations": (0, None),
        "learning_rate": (0, 1),
        "layer_decay": (0, 1),
        "drop_path": (0, 0.99),
        "auxiliary_weight": (0, 10),
        "eval_interval": (1, None),
        "window_batch_size": (1, None),
    },
}
WEIGHTS_FLAG = {
    "finetune_classifier": "path_to_pretrained_mae_weights",
    "finetune_segmentation": "path_to_backbone_checkpoint",
}
ENOUGH = {name: ["--path_to_data", "data"] + ["--from_scratch"] * ("segmentation" in name) for name in OWN}


@pytest.fixture(params=OWN)
def script(request) -> ModuleType:
    return importlib.import_module(request.param)


@pytest.fixture(params=WEIGHTS_FLAG)
def finetuning(request) -> ModuleType:
    return importlib.import_module(request.param)


def write_sizes(folder: Path, config: MAEConfig, **more: list[float]) -> str:
    """Write a pretraining checkpoint of which only the sizes are read."""
    folder.mkdir()
    save_file({}, folder / "model.safetensors")
    record = {"architecture": "ViTMAEForPreTraining", "config": dataclasses.asdict(config), **more}
    (folder / "config.json").write_text(json.dumps(record))
    return str(folder)


@pytest.fixture
def grey_weights(tmp_path) -> str:
    """A tiny MAE for grey images that were normalised by 0.4 and 0.2."""
    config = dataclasses.replace(TINY, input_channels=1)
    return write_sizes(tmp_path / "grey", config, image_mean=[0.4], image_std=[0.2])


@pytest.fixture
def base_weights(tmp_path) -> str:
    return write_sizes(tmp_path / "base", MAEConfig())


def refusal(capsys, act, *arguments) -> str:
    """Give the words with which a command is refused, without argparse's usage."""
    with pytest.raises(SystemExit) as stop:
        act(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.split("error: ")[1].strip()


def shown_help(capsys, act, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        act(*arguments)
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_script_has_all_flags_that_people_have_in_their_notes_and_no_others(script):
    names = {action.dest for action in Flags("", script.FLAGS).parser._actions}
    assert names == set(SHARED.split()) | set(OWN[script.__name__].split())


def test_switches_can_be_turned_on_and_off(script):
    flags = Flags("", script.FLAGS)
    switches = {action.dest for action in flags.parser._actions} & set(SWITCHES.split())
    assert len(switches) >= 10
    for name in switches:
        assert flags.parse([f"--{name}"]) == {name: True} and flags.parse([f"--no-{name}"]) == {name: False}
    others = {action.dest for action in flags.parser._actions} - switches - {"help"}
    assert all(f"--no-{name}" not in flags.parser._option_string_actions for name in others)


def test_given_pretraining_command_is_understood_as_it_stands():
    command = """--experiment_name "MAEPretraining" --wandb_run_name "pretrain_mae" --path_to_data "<IMAGENET>"
 --working_directory "work_dir" --img_size 224 --input_channels 3 --epochs 800 --warmup_epochs 40
 --save_checkpoint_interval 10 --per_gpu_batch_size 2048 --gradient_accumulation_steps 4 --base_learning_rate 1.5e-4
 --weight_decay 0.05 --max_grad_norm 1.0 --img_size 224 --encoder_embed_dim 768 --encoder_depth 12
 --encoder_num_heads 12 --encoder_mlp_ratio 4 --decoder_embed_dim 512 --decoder_depth 8 --decoder_num_heads 16
 --decoder_mlp_ratio 4 --num_workers 32 --custom_weight_init --log_wandb"""
    args = importlib.import_module("pretrain_mae").parse_args(shlex.split(command))
    assert (args.img_size, args.epochs, args.base_learning_rate, micro_batch_size(args)) == (224, 800, 1.5e-4, 512)
    assert (args.encoder_mlp_ratio, args.decoder_num_heads, args.custom_weight_init, args.log_wandb) == (4, 16, 1, 1)


def test_given_classification_command_is_understood_as_it_stands(base_weights):
    command = f"""--experiment_name "MAE_Imagenet_Finetuning" --wandb_run_name "finetune_mae"
 --path_to_data "<IMAGENET>" --path_to_pretrained_mae_weights {base_weights} --working_directory "work_dir"
 --num_classes 1000 --epochs 100 --warmup_epochs 5 --save_checkpoint_interval 10 --per_gpu_batch_size 256
 --gradient_accumulation_steps 1 --learning_rate 0.002 --weight_decay 0.1 --random_aug_magnitude 9 --mixup_alpha 0.2
 --cutmix_alpha 1.0 --label_smoothing 0.1 --max_grad_norm 1.0 --img_size 224 --num_workers 32"""
    args = importlib.import_module("finetune_classifier").parse_args(shlex.split(command))
    assert (args.num_classes, args.learning_rate, args.mixup_alpha, args.img_size) == (1000, 0.002, 0.2, 224)
    assert args.path_to_pretrained_mae_weights == base_weights


def test_given_segmentation_command_is_understood_as_it_stands(base_weights):
    script = importlib.import_module("finetune_segmentation")
    args = script.parse_args(["--path_to_data", "<ADE20K>", "--path_to_backbone_checkpoint", base_weights])
    assert (args.img_size, args.per_gpu_batch_size, args.iterations) == (512, 16, 160_000)
    assert (args.num_classes, args.taps, args.experiment_name) == (150, [3, 5, 7, 11], "ADE20K_UperNet")


# -------------------------------------------------------------------------------- ranges


def test_ranges_are_those_of_the_tables_above(script):
    found = {name: limits[:2] for name, limits in Flags("", script.FLAGS).ranges.items()}
    assert found == SHARED_RANGES | RANGES[script.__name__]


def values_outside(name: str, low: float, high: float | None, is_whole: bool) -> list[float]:
    step = 1 if is_whole else 0.001
    return [low - step, *([] if high is None else [high + step]), *([] if is_whole else [float("nan")])]


def test_values_outside_their_range_are_refused_with_value_range_and_flag(script, capsys):
    flags = Flags("", script.FLAGS)
    is_whole = {action.dest: action.type is int for action in flags.parser._actions}
    for name, (low, high) in (SHARED_RANGES | RANGES[script.__name__]).items():
        allowed = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
        if low == 1e-9:  # what a user would call it
            allowed = "above 0" if high is None else f"above 0 and at most {high:g}"
        for value in values_outside(name, low, high, is_whole[name]):
            said = refusal(capsys, script.parse_args, [*ENOUGH[script.__name__], f"--{name}={value}"])
            assert said.startswith(f"--{name} must be {allowed}, not {value:g}")


def test_ends_of_ranges_are_allowed(script):
    flags = Flags("", script.FLAGS)
    nothing = dict.fromkeys(flags.ranges)
    for name, ends in (SHARED_RANGES | RANGES[script.__name__]).items():
        for end in ends:
            flags.check_ranges(nothing | {name: end})


# -------------------------------------------------------------------------------- a small table

TABLE = {
    "recipe": [
        ("rate", 0.5, "the peak", (0, 1, "as a share")),
        ("sides", [1, 2], "of a box", (1, None), {"nargs": 2}),
        ("kind", "a", "of two", {"choices": ("a", "b")}),
        ("count", int, "how many (default: all)"),
        ("on", True, "do it"),
    ],
    "data": [("own_folder", str, "beside the shared ones")],
}
RECIPE = dict(epochs=10, warmup_epochs=1.0, per_gpu_batch_size=8, weight_decay=0.1)


def complete(argv: str, *defaults: dict) -> argparse.Namespace:
    flags = Flags("A script.", TABLE)
    return flags.complete(flags.parse(shlex.split(argv)), RECIPE, *defaults)


def test_command_is_parsed_once(monkeypatch):
    flags, argv = Flags("", TABLE), ["--rate", "0.25"]
    parsed, parse = [], flags.parser.parse_known_args
    monkeypatch.setattr(
        flags.parser, "parse_known_args", lambda given, *more: parsed.append(given) or parse(given, *more)
    )
    assert flags.complete(flags.parse(argv), RECIPE).rate == 0.25
    assert parsed.count(argv) == 1 and all(given in ([], argv) for given in parsed)


def test_parse_gives_what_was_said_and_nothing_else():
    flags = Flags("", TABLE)
    assert flags.parse([]) == {}
    assert flags.parse(shlex.split("--rate 0.5 --no-on --sides 3 4 --count 0")) == {
        "rate": 0.5, "on": False, "sides": [3, 4], "count": 0,
    }  # fmt: skip


def test_given_wins_over_later_defaults_over_earlier_ones_over_the_table():
    args = complete("")
    assert (args.rate, args.sides, args.kind, args.count, args.on) == (0.5, [1, 2], "a", None, True)
    assert (args.epochs, args.seed, args.own_folder) == (10, 0, None) and not hasattr(args, "help")
    args = complete("", {"rate": 0.1, "count": 3}, {"rate": 0.2})
    assert (args.rate, args.count) == (0.2, 3)
    args = complete("--rate 0.5 --count 4 --on --kind a", {"rate": 0.1, "count": 3, "on": False, "kind": "b"})
    assert (args.rate, args.count, args.on, args.kind) == (0.5, 4, True, "a")  # also where it is the table's own


def test_help_shows_the_defaults_that_would_be_taken_and_checks_nothing(capsys):
    shown = shown_help(capsys, complete, "--help --rate 7", {"rate": 0.125, "sides": [8, 9], "img_size": [96]})
    assert "A script." in shown and "--rate X the peak (default: 0.125)" in shown
    assert "of a box (default: [8, 9])" in shown and "PIXELS" in shown and "(default: [96])" in shown
    assert "--[no-]on do it (default: True)" in shown and "--[no-]demo" in shown
    assert "how many (default: all)" in shown and "None" not in shown and "default: False" not in shown
    data, rare = shown.index("beside the shared ones"), shown.index("rarely changed:")
    assert shown.index("data:") < data < shown.index("optimisation:") < shown.index("recipe:") < rare


@pytest.mark.parametrize(("more", "epochs"), [((), "800"), (("--demo",), "24")])
def test_help_of_pretraining_shows_its_recipe(capsys, more, epochs):
    shown = shown_help(capsys, importlib.import_module("pretrain_mae").parse_args, ["--help", *more])
    assert f"passes over the training images (default: {epochs})" in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--rate 1.5", "--rate must be between 0 and 1, not 1.5, as a share"),
        ("--sides 3 0", "--sides must be at least 1, not 3 0"),
        ("--kind c", "--kind takes a, b, not 'c'"),
        ("--epoch 3", "unknown: --epoch 3; did you mean --epochs?"),  # no abbreviations
        ("--warmup_epochs 10", "--warmup_epochs 10 leaves nothing of --epochs 10; give both"),
        (
            "--gradient_accumulation_steps 3",
            "--per_gpu_batch_size 8 cannot be cut into --gradient_accumulation_steps 3",
        ),
        ("--img_size 1 2 3", "--img_size takes one number, or height and width, not 3 numbers"),
        ("--mean 0.1 0.2", "--mean has 2 values, --input_channels is 3; give as many, or one"),
        ("--std 0.1 0 0.2", "--std must be above 0, not 0.1 0 0.2"),
        ("--experiment_name a/b", "--experiment_name 'a/b' is a folder name; the path goes into --working_directory"),
        ("--experiment_name ..", "--experiment_name '..' is a folder name"),
        ("--experiment_name ''", "--experiment_name '' is a folder name"),
        ("--experiment_name .", "--experiment_name '.' is a folder name"),
        (
            f"--experiment_name {'é' * 128}",
            f"--experiment_name '{30 * 'é'}...{20 * 'é'}' has 256 bytes, a folder's name",
        ),
        ("--experiment_name ' a'", "--experiment_name ' a' has spaces at an end, or characters that cannot"),
        (
            "--experiment_name 'a\nb'",
            "--experiment_name 'a\\nb' has spaces at an end, or characters that cannot be seen",
        ),
        ("--experiment_name 'a\0b'", "--experiment_name 'a\\x00b' has spaces at an end, or characters that cannot"),
        ("--experiment_name 'a\x1b[31mb'", "--experiment_name 'a\\x1b[31mb' has spaces at an end, or characters that"),
        ("--path_to_data 'a\0b'", "--path_to_data 'a\\x00b' is no path that can be read (embedded null byte)"),
    ],
)
def test_impossible_values_are_refused_with_what_is_allowed(capsys, argv, message):
    assert refusal(capsys, complete, argv).startswith(message)


@pytest.mark.parametrize(
    ("argv", "mean", "std"),
    [
        ("", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("--input_channels 1", (0.5,), (0.5,)),
        ("--input_channels 4", (0.5,) * 4, (0.5,) * 4),
        ("--mean 0.1 --std 0.2 0.3 0.4", (0.1,) * 3, (0.2, 0.3, 0.4)),
    ],
)
def test_means_and_deviations_are_as_many_as_channels(argv, mean, std):
    args = complete(argv)
    assert (args.mean, args.std) == (mean, std)


def test_image_size_is_a_number_or_a_pair():
    assert complete("").img_size == 224 and complete("--img_size 32").img_size == 32
    assert complete("--img_size 32 64").img_size == (32, 64)
    assert micro_batch_size(complete("--gradient_accumulation_steps 4")) == 2


def test_sizes_of_a_network_become_flags_of_their_types():
    rows = {name: kind for name, kind, _ in size_flags(MAEConfig, ("encoder",), "the model's")}
    assert rows == {
        "encoder_embed_dim": int, "encoder_depth": int, "encoder_num_heads": int, "encoder_mlp_ratio": float,
    }  # fmt: skip


# -------------------------------------------------------------------------------- sizes of weights


def parse_with(finetuning: ModuleType, weights: str, *more: str) -> argparse.Namespace:
    taps = ["--taps", "0", "0", "1", "2"] if "segmentation" in finetuning.__name__ else []
    weights_flag = f"--{WEIGHTS_FLAG[finetuning.__name__]}"
    return finetuning.parse_args(["--path_to_data", "data", weights_flag, weights, *taps, *more])


def test_sizes_come_with_the_weights(finetuning, grey_weights):
    grey = ("--random_aug_magnitude", "0") if "classifier" in finetuning.__name__ else ()
    args = parse_with(finetuning, grey_weights, *grey)
    sizes = (args.encoder_embed_dim, args.encoder_depth, args.encoder_num_heads, args.encoder_mlp_ratio)
    assert sizes == (32, 3, 4, 4.0) and (args.patch_size, args.input_channels) == (4, 1)
    assert (args.mean, args.std) == ((0.4,), (0.2,))
    assert args.img_size == (16 if "classifier" in finetuning.__name__ else 512)  # segmentation's is its recipe's
    args = parse_with(finetuning, grey_weights, *grey, "--img_size", "32", "--mean", "0.3", "--encoder_depth", "3")
    assert (args.img_size, args.mean, args.std, args.encoder_depth) == (32, (0.3,), (0.2,), 3)


@pytest.mark.parametrize(
    ("flag", "value", "saved"), [("encoder_depth", "5", 3), ("encoder_mlp_ratio", "2.5", 4.0), ("patch_size", "8", 4)]
)
def test_given_sizes_that_contradict_the_weights_are_refused(finetuning, grey_weights, capsys, flag, value, saved):
    said = refusal(capsys, parse_with, finetuning, grey_weights, f"--{flag}", value)
    assert said == f"--{flag} {value}, but {grey_weights} has {saved}; leave the flag out"
    said = refusal(capsys, parse_with, finetuning, grey_weights, "--model", "mae_vit_tiny_patch16")
    assert said.startswith("--model is for ") and said.endswith(f"the sizes come with {grey_weights}")


def test_given_sizes_win_over_the_named_model(script):
    named = [*ENOUGH[script.__name__], "--model", "mae_vit_tiny_patch16"]
    sizes = [script.build_config(script.parse_args([*named, *more])) for more in ([], ["--encoder_depth", "6"])]
    assert [(config.encoder_embed_dim, config.encoder_depth) for config in sizes] == [(192, 12), (192, 6)]


def test_demo_of_finetuning_starts_from_the_newest_demo_pretraining(tmp_path, capsys):
    flags, given = Flags("", TABLE), {"working_directory": str(tmp_path)}
    said = refusal(capsys, flags.find_demo_weights, given)
    assert said == "--demo starts from the demo pretraining: first run accelerate launch pretrain_mae.py --demo"
    assert flags.find_demo_weights({**given, "help": True}) is None
    for epoch in (6, 18, 12):
        (tmp_path / "demo" / f"checkpoint_{epoch}").mkdir(parents=True)
    assert flags.find_demo_weights(given) == str(tmp_path / "demo" / "checkpoint_18")


@pytest.mark.parametrize("flag", ["path_to_data", "working_directory", "resume_from_checkpoint"])
def test_path_that_no_disk_can_have_is_refused(script, capsys, tmp_path, flag):
    (tmp_path / "loop").symlink_to("loop")
    for path, reason in (("x" * 300, "File name too long"), (tmp_path / "loop", "Too many levels of symbolic links")):
        said = refusal(capsys, Flags("", script.FLAGS).parse, [f"--{flag}", str(path)])
        assert said.startswith(f"--{flag} '") and said.endswith(f"is no path that can be read ({reason})")


@pytest.mark.parametrize("flag", ["path_to_data", "working_directory"])
def test_file_where_a_folder_is_needed_is_refused(script, capsys, tmp_path, flag):
    (tmp_path / "file").touch()
    said = refusal(capsys, Flags("", script.FLAGS).parse, [f"--{flag}", str(tmp_path / "file")])
    assert said == f"--{flag} {tmp_path / 'file'} is a file; a folder is needed"


def test_file_of_class_names_that_is_none_is_refused(capsys, tmp_path):
    parse = Flags("", importlib.import_module("finetune_segmentation").FLAGS).parse
    said = refusal(capsys, parse, ["--class_names", str(tmp_path)])
    assert said == f"--class_names {tmp_path} is a folder; a file with a name on every line is needed"
    said = refusal(capsys, parse, ["--class_names", str(tmp_path / "names")])
    assert said == (
        f"--class_names {tmp_path / 'names'} cannot be read (No such file or directory); give a file with a name on "
        "every line"
    )


@pytest.mark.parametrize("in_the_way", ["runs", "runs/experiment"])
def test_place_of_a_run_with_a_file_in_the_way_is_refused(script, capsys, tmp_path, in_the_way):
    (tmp_path / in_the_way).parent.mkdir(exist_ok=True)
    (tmp_path / in_the_way).touch()
    place = ["--working_directory", str(tmp_path / "runs" / "deep" if in_the_way == "runs" else tmp_path / "runs")]
    said = refusal(capsys, script.parse_args, [*ENOUGH[script.__name__], *place, "--experiment_name", "experiment"])
    assert f"but {tmp_path / in_the_way} is no folder; choose another place or name" in said
    assert said.startswith("the run is kept in ")


@contextlib.contextmanager
def without_rights() -> Iterator[None]:
    """Be nobody for a while, as root may write everywhere; others stay who they are."""
    if os.getuid() == 0:
        os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        if os.getresuid()[2] == 0:
            os.setresuid(0, 0, 0)


def test_place_where_nothing_can_be_written_is_refused_but_for_evaluations(capsys, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    flags = Flags("", TABLE | {"recipe": [*TABLE["recipe"], ("eval_only", False, "only evaluate")]})
    given = {"working_directory": str(tmp_path / "closed"), "experiment_name": "run"}
    with without_rights():
        said = refusal(capsys, flags.complete, given, RECIPE)
        assert flags.complete(given | {"eval_only": True}, RECIPE).experiment_name == "run"
    assert said.startswith(f"the run is kept in {tmp_path / 'closed' / 'run'}, but ")
    assert said.endswith(" cannot be written to; choose another place")


def test_tilde_is_the_home_folder_in_every_path(script, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    argv = ["--path_to_data", "~/data", "--working_directory=~/runs", "--resume_from_checkpoint", "~/runs/a"]
    given = Flags("", script.FLAGS).parse([*argv, "--experiment_name", "~x"])
    assert given == {
        "path_to_data": "/home/somebody/data",
        "working_directory": "/home/somebody/runs",
        "resume_from_checkpoint": "/home/somebody/runs/a",
        "experiment_name": "~x",
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("auto", "auto"),
        ("own", "own"),
        ("-5 1e3", (-5.0, 1000.0)),
        ("-1e-05 -.5E-6", (-1e-5, -5e-7)),
        ("0 65535", (0.0, 65535.0)),
    ],
)
def test_value_range_is_two_numbers_or_a_word(given, expected):
    flags = Flags("", {})
    args = flags.complete(flags.parse(["--value_range", *given.split()]), MINIMAL)
    assert args.value_range == expected


@pytest.mark.parametrize("given", ["5", "5 5", "9 1", "0 inf", "nan 1", "all", "auto 1", "0 1 2"])
def test_value_range_that_is_none_is_refused(given, capsys):
    flags = Flags("", {})
    with pytest.raises(SystemExit):
        flags.complete(flags.parse(["--value_range", *given.split()]), MINIMAL)
    assert "--value_range takes LOW HIGH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("channels", "given", "shown"), [(1, None, [0, 0, 0]), (13, "3 2 12", [3, 2, 12]), (3, None, [0, 1, 2])]
)
def test_shown_channels_are_some_of_those_there_are(channels, given, shown, capsys):
    flags = Flags("", {})
    argv = ["--input_channels", str(channels), *(["--show_channels", *given.split()] if given else [])]
    assert flags.complete(flags.parse(argv), MINIMAL).show_channels == shown
    with pytest.raises(SystemExit):
        flags.complete(flags.parse([*argv, "--show_channels", "0", "1", str(channels)]), MINIMAL)
    assert f"--show_channels takes three bands of 0 to {channels - 1}" in capsys.readouterr().err


# -------------------------------------------------------------------------------- unknown flags, flags from files


@pytest.mark.parametrize(
    ("given", "advice"),
    [("--epoch 3", "; did you mean --epochs?"), ("--Batch_Size=3", "; did you mean --patch_size?"), ("--zzz", ".")],
)
def test_unknown_flag_is_one_line_with_what_may_have_been_meant(given, advice, capsys):
    with pytest.raises(SystemExit) as ended:
        pretrain_mae.parse_args(["--path_to_data", "x", *given.split()])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: unknown: {given}{advice} --help shows all flags\n"


def test_unknown_choice_is_one_line_with_what_may_have_been_meant(capsys):
    with pytest.raises(SystemExit) as ended:
        pretrain_mae.parse_args(["--path_to_data", "x", "--model", "vit_large"])
    message = capsys.readouterr().err
    assert (
        ended.value.code == 2 and message.count("\n") == 1 and message.startswith("error: --model takes mae_vit_tiny_")
    )
    assert message.endswith("not 'vit_large'; did you mean mae_vit_large_patch16?\n")


def test_args_of_a_run_are_flags_again_and_a_given_flag_wins(tmp_path):
    given = "--path_to_data x --mean 0.1 0.2 0.3 --std 0.5 --no-pin_memory --img_size 64 32 --base_learning_rate 1e-5"
    first = pretrain_mae.parse_args(given.split())
    (tmp_path / "args.json").write_text(json.dumps(vars(first) | {"decoder": "Pillow", "environment": {"torch": "2"}}))
    again = pretrain_mae.parse_args(["--config", str(tmp_path / "args.json"), "--epochs", "70"])
    assert again.epochs == 70 and first.epochs == 800
    assert first.changed_flags == ["base_learning_rate", "img_size", "mean", "path_to_data", "pin_memory", "std"]
    differing = {"epochs", "config", "statistics_given", "changed_flags"}
    assert {name: value for name, value in vars(again).items() if name not in differing} == {
        name: value for name, value in vars(first).items() if name not in differing
    }
    (tmp_path / "more.yaml").write_text("epochs: 90\nmean: [0.5, 0.5, 0.5]\ncustom_weight_init: no\n")
    files = [str(tmp_path / "args.json"), str(tmp_path / "more.yaml")]
    both = pretrain_mae.parse_args(["--config", *files])
    assert (both.epochs, both.mean, both.custom_weight_init, both.img_size) == (90, (0.5,) * 3, False, (64, 32))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read (while parsing"),
        ("[1]", "holds a list, not flags and values"),
        ('{"epoch": 3}', "has 'epoch'; did you mean --epochs? --help"),
        ('{"epochs": 2.5}', "--epochs: invalid int value: '2.5'"),
        (None, "cannot be read ([Errno 2] No such file"),
    ],
)
def test_file_of_flags_that_is_none_is_refused_by_name(tmp_path, content, words, capsys):
    file = tmp_path / "flags.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit):
        pretrain_mae.parse_args(["--path_to_data", "x", "--config", str(file)])
    said = capsys.readouterr().err
    assert words in said and said.startswith("error: ") and said.count("Traceback") == 0


# -------------------------------------------------------------------------------- what nobody gave


@pytest.mark.parametrize(
    ("argv", "epochs", "warmup"),
    [
        ("", 10, 1.0),  # the recipe's own
        ("--epochs 40", 40, 2.0),
        ("--epochs 1", 1, 0.05),
        ("--epochs 40 --warmup_epochs 3", 40, 3.0),
        ("--epochs 10", 10, 1.0),
    ],
)
def test_warmup_that_nobody_gave_is_a_twentieth_of_other_epochs(argv, epochs, warmup):
    args = complete(argv)
    assert (args.epochs, args.warmup_epochs) == (epochs, pytest.approx(warmup))


def test_small_model_for_few_epochs_needs_no_warmup_flag():
    parse_args = importlib.import_module("pretrain_mae").parse_args
    args = parse_args(shlex.split("--path_to_data x --model mae_vit_tiny_patch16 --epochs 10"))
    assert args.warmup_epochs == 0.5


@pytest.mark.parametrize(("batch", "passes"), [(8, 4), (30, 3), (7, 1), (4, 2), (1, 1)])
def test_batch_is_cut_into_forward_passes_of_two_images_or_more_where_nobody_says_how(batch, passes):
    recipe = {"gradient_accumulation_steps": 4}
    assert complete(f"--per_gpu_batch_size {batch}", recipe).gradient_accumulation_steps == passes
    assert (
        complete(f"--per_gpu_batch_size {batch} --gradient_accumulation_steps 1", recipe).gradient_accumulation_steps
        == 1
    )


def test_statistics_of_weights_do_not_come_with_other_channels(finetuning, tmp_path):
    colour = write_sizes(tmp_path / "colour", TINY, image_mean=[0.4] * 3, image_std=[0.2] * 3, value_range=[0, 9])
    command = [*ENOUGH[finetuning.__name__], f"--{WEIGHTS_FLAG[finetuning.__name__]}", colour]
    command = [word for word in command if word != "--from_scratch"] + ["--taps", "0", "0", "1", "2"] * (
        "segmentation" in finetuning.__name__
    )
    more = ["--random_aug_magnitude", "0"] * ("classifier" in finetuning.__name__)
    args = finetuning.parse_args([*command, *more])
    assert (args.mean, args.std, args.value_range) == ((0.4,) * 3, (0.2,) * 3, (0.0, 9.0))
    args = finetuning.parse_args([*command, *more, "--input_channels", "5"])
    assert (args.mean, args.std, args.value_range) == ((0.5,) * 5, (0.5,) * 5, None)


@pytest.mark.parametrize("words", ["--help", "--epoch 3", "--epochs 0"])
@pytest.mark.parametrize("name", ["pretrain_mae", "finetune_classifier", "finetune_segmentation"])
def test_help_and_wrong_flags_are_answered_before_torch_is_imported(name, words):
    code = f"""
import atexit, runpy, sys
sys.argv = ["{name}.py", *{words.split()}]
atexit.register(lambda: print("torch" in sys.modules))
runpy.run_path("{name}.py", run_name="__main__")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ended.stdout.endswith("False\n") and "Traceback" not in ended.stderr
    assert ended.returncode == (0 if words == "--help" else 2)
    if words == "--help":
        assert "optimisation" in ended.stdout and "working_directory" in ended.stdout
    else:
        assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
