"""What one wants to do once a script has ended: its last words, commands that are ready to paste."""

import argparse
import os
import shlex
from pathlib import Path

from accelerate import Accelerator

from storage.console import ROOT
from storage.lists import as_text
from training.checkpoints import WEIGHTS_FILE

CLASSIFIER, SEGMENTER = "finetune_classifier.py", "finetune_segmentation.py"
# Which images a run reads, and which of them it holds out
DATA_FLAGS = ("path_to_data", "val_fraction", "image_column", "label_column", "annotation_column")
DATA_FLAGS += ("image_folder", "label_folder", "image_suffix", "label_suffix")


def end_script(
    script: str, accelerator: Accelerator, args: argparse.Namespace, weights: Path, files=None, held_out=None
) -> None:
    """Print what comes next after a script that left weights, from the first process, and end the others.

    `weights` is their folder, of an evaluation also their file; `files` are the images of a training, `held_out` those
    that judge it, where there are any.
    """
    accelerator.print("Next:", *next_commands(Path(script).name, args, weights, files, held_out), sep="\n  ")
    accelerator.end_training()


def next_commands(script: str, args: argparse.Namespace, weights: Path, files=None, held_out=None) -> list[str]:
    """Give commands for a shell: of the script that follows, of the tool that shows the result, and of the curves."""
    tool = {CLASSIFIER: "classify", SEGMENTER: "segment"}.get(script, "reconstruct")
    folder = weights.parent if weights.is_file() else weights
    checkpoint = folder if weights.name == WEIGHTS_FILE else weights
    shown = ["python", show(ROOT / "tools" / f"{tool}.py"), "--checkpoint", checkpoint]
    shown += [find_image(args, held_out or files)]
    if script != CLASSIFIER:
        shown += ["--output", folder / ("segmented" if script == SEGMENTER else "reconstruction.png")]
    if getattr(args, "eval_only", False):
        return [join(shown)]
    if script == CLASSIFIER:
        follows, figures = evaluation(script, args, folder, "path_to_pretrained_mae_weights"), ["testing_top1_acc"]
    elif script == SEGMENTER:
        follows, figures = evaluation(script, args, folder, "path_to_backbone_checkpoint"), ["testing_miou"]
    else:
        follows, figures = finetuning(args, folder, files, held_out), ["testing_loss"] if held_out else []
    curves = ["python", show(ROOT / "tools" / "plot_log.py"), folder, "--y", "training_loss", *figures]
    return [join(words) for words in (follows, shown, [*curves, "--output", folder / "curves.png"])]


def find_image(args: argparse.Namespace, files) -> str:
    """Give an image of the run, or where it has no such file, as in a pack or from the Hub, a word for one."""
    path = as_text(files.path(0)) if files else next(Path(args.path_to_data).glob("val*/*/*"), "")
    return str(show(Path(path))) if os.path.isfile(path) else "IMAGE"


def launch(script: str) -> list[object]:
    return ["accelerate", "launch", show(ROOT / script)]


def evaluation(script: str, args: argparse.Namespace, folder: Path, weights_flag: str) -> list[object]:
    return [*launch(script), "--eval_only", *data_flags(args), f"--{weights_flag}", folder]


def finetuning(args: argparse.Namespace, folder: Path, files, held_out) -> list[object]:
    if args.demo:
        return [*launch(CLASSIFIER), "--demo", "--working_directory", args.working_directory]
    data = data_flags(args) if files.classes else ["--path_to_data", "LABELLED_FOLDER"]
    words = [*launch(CLASSIFIER), *data, "--path_to_pretrained_mae_weights", folder]
    words += ["--val_fraction", "0.1"] if files.classes and not held_out else []
    words += ["--recipe", "small"] if args.recipe == "small" else []
    return words + (["--random_aug_magnitude", "0"] if args.input_channels != 3 or args.value_range else [])


def data_flags(args: argparse.Namespace) -> list[object]:
    given = {name: getattr(args, name, None) for name in DATA_FLAGS}
    words = [word for name, value in given.items() if value not in (None, "") for word in (f"--{name}", value)]
    return words + (["--seed", args.seed] if args.val_fraction and args.seed else [])


def show(path: Path) -> Path:
    """Give a path as it is called from here, where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def join(words: list[object]) -> str:
    return shlex.join(map(str, words))
