"""Scores on other images than a classifier was trained for: some of its classes alone, and ImageNet-C's corruptions."""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import Accelerator
from timm.data import ImageNetInfo

from storage.files import rename_aside, write_rows
from storage.lists import FileList, check_same_classes
from training.data import list_folder
from training.metrics import ImageEvaluation
from training.records import print_figures

# Top-1 errors of AlexNet over the five severities, by which those of others are divided (Hendrycks & Dietterich 2019,
# arXiv 1903.12261, and the list in its release)
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
CATEGORIES = ("noise", "blur", "weather", "digital")  # folders in which the release has them
SEVERITIES = ("1", "2", "3", "4", "5")
CORRUPTIONS_FILE = "corruptions.tsv"
IMAGENET_CLASSES = 1000


def choose_classes(
    files: FileList, class_names: Sequence[str] | None, num_classes: int, weights: Path, args: argparse.Namespace
) -> list[int]:
    """Give the classifier's number of each class of a folder, which has all of them, or with --class_subset some.

    Of some the scores of the others are masked, as the authors of ImageNet-A and -R do; these are sets of the paper's
    table 13, which does not say how. Weights of the original release name no classes: of 1000 they are ImageNet's.
    ValueError names what is no class, or is missing.
    """
    if not args.class_subset:
        names = tuple(class_names or files.classes)
        check_same_classes(files.classes, names or ("",), files.root, f"the classifier in {weights}")
        for what, number in ((str(files.root), len(names)), ("--num_classes", args.num_classes)):
            if number not in (None, num_classes):
                raise ValueError(f"{weights} tells {num_classes} classes apart, but {what} has {number}")
        return list(range(num_classes))
    if class_names is None and num_classes == IMAGENET_CLASSES:
        class_names = ImageNetInfo("imagenet-1k").label_names()
    if class_names is None:
        raise ValueError(f"--class_subset needs the names of the classes, which {weights} does not tell")
    known = {name: number for number, name in enumerate(class_names)}
    foreign = tuple(name for name in files.classes if name not in known)
    if foreign or not files.classes:
        check_same_classes(foreign, (), files.root, f"the classifier in {weights}")
    return [known[name] for name in files.classes]


def find_corruptions(root: str | Path) -> dict[str, dict[str, Path]]:
    """Find the folders of ImageNet-C, [category/]corruption/severity/class, by corruption and severity."""
    found = {}
    for name, category in itertools.product(ALEXNET_ERRORS, ("", *CATEGORIES)):
        folder = Path(root) / category / name
        severities = {severity: folder / severity for severity in SEVERITIES if (folder / severity).is_dir()}
        if severities:
            found[name] = severities
    return found


def summarize_corruptions(errors: dict[str, dict[str, float]]) -> dict[str, float]:
    """Give the mean error, and the mean corruption error over those corruptions that have all severities, in percent.

    Of each corruption the errors of its severities are summed and divided by AlexNet's (mCE); whether all 15 are in it
    is in `corruptions`.
    """
    figures = {"mean_error": statistics.mean(statistics.mean(found.values()) for found in errors.values())}
    whole = {name: found for name, found in errors.items() if len(found) == len(SEVERITIES)}
    if whole:
        ratios = [statistics.mean(found.values()) / ALEXNET_ERRORS[name] for name, found in whole.items()]
        figures |= {"mCE": statistics.mean(ratios), "corruptions": len(whole)}
    return figures


def evaluate_corruptions(
    accelerator: Accelerator,
    weights: Path,
    corruptions: dict[str, dict[str, Path]],
    evaluate: Callable[[FileList], ImageEvaluation],
    args: argparse.Namespace,
) -> dict[str, float]:
    """Score a classifier on each corruption and severity, print and write the errors, and give the summary."""
    errors: dict[str, dict[str, float]] = {}
    for name, folders in corruptions.items():
        errors[name] = {}
        for severity, folder in folders.items():
            evaluation = evaluate(list_folder(accelerator, folder, args))
            errors[name][severity] = 100 - evaluation.figures()["testing_top1_acc"]
        told = ", ".join(f"{severity}: {error:.2f} %" for severity, error in errors[name].items())
        accelerator.print(f"{name:<20}error by severity {told}")
    figures = summarize_corruptions(errors)
    if accelerator.is_main_process:
        rows = [["corruption", *SEVERITIES]]
        for name, found in errors.items():
            rows.append([name, *(f"{found.get(severity, math.nan):.2f}" for severity in SEVERITIES)])
        rename_aside(weights.parent / CORRUPTIONS_FILE)
        write_rows(weights.parent / CORRUPTIONS_FILE, rows)
        print(f"{'written':<16}{CORRUPTIONS_FILE} in {weights.parent}")
    print_figures(accelerator, figures)
    return figures
