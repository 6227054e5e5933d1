"""Scores on other images than a classifier was trained for: some of its classes alone, and ImageNet-C's corruptions."""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import Accelerator
from timm.data import ImageNetInfo

from storage.files import rename_aside, write_rows
from storage.hub import is_table
from storage.lists import FileList, check_same_classes, find_validation, name_some
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
    table 13, which does not say how. Weights of the original release name no classes: of 1000 they are ImageNet's, and
    images are sorted by WordNet identifiers, or all of them by numbers as in ImageNet-V2. Of another number, and in
    tables of the Hub whose classes are words in an order of their own, that order counts. ValueError names what is no
    class, or is missing.
    """
    imagenet, origin = ImageNetInfo("imagenet-1k").label_names(), f"the classifier in {weights}"
    ordered = is_table(args.path_to_data) and list(files.classes) != sorted(files.classes)
    if class_names is None and num_classes == IMAGENET_CLASSES and (args.class_subset or not ordered):
        class_names = imagenet
        origin += ", which names none, so they are ImageNet's (others: class_names in a config.json beside it)"
    if class_names == imagenet and all(map(str.isdecimal, files.classes)) and not args.class_subset:
        numbers = list(map(int, files.classes))  # of some they may be counted in another way
        if sorted(numbers) == list(range(IMAGENET_CLASSES)):
            return numbers
    if class_names is None and args.class_subset:
        raise ValueError(f"--class_subset needs the names of the classes, which {weights} does not tell")
    names = tuple(class_names or files.classes)
    if args.class_subset and files.classes:
        foreign = [name for name in files.classes if names.count(name) != 1]  # in words crane is there twice
        if foreign:
            raise ValueError(f"{files.root} has classes that are none of {origin}: {name_some(foreign)}; rename them")
        return [names.index(name) for name in files.classes]
    if not names or sorted(files.classes) != sorted(names) or len(set(names)) < len(names):
        check_same_classes(files.classes, names or ("",), files.root, origin)
    for what, number in ((str(files.root), len(names)), ("--num_classes", args.num_classes)):
        if number not in (None, num_classes):
            raise ValueError(f"{weights} tells {num_classes} classes apart, but {what} has {number}")
    return list(range(num_classes)) if files.classes == names else [names.index(name) for name in files.classes]


def find_corruptions(root: str | Path) -> dict[str, dict[str, Path]]:
    """Find the folders of ImageNet-C, [category/]corruption/severity/class, by corruption and severity.

    The root may also be a corruption's folder, or one severity's: with folders of classes, and without validation
    images. ValueError where a corruption is there twice.
    """
    root, found = Path(root).absolute(), {}
    if {root.name, root.parent.name} & ALEXNET_ERRORS.keys():
        below = [root / severity for severity in SEVERITIES] if root.name in ALEXNET_ERRORS else [root]
        folders = [path for folder in below if folder.is_dir() for path in folder.iterdir() if path.is_dir()]
        if not folders or find_validation(root) is not None:
            return {}
    if root.name in SEVERITIES and root.parent.name in ALEXNET_ERRORS:
        return {root.parent.name: {root.name: root}}
    for name in ALEXNET_ERRORS:
        places = [root] if root.name == name else [root / category / name for category in ("", *CATEGORIES)]
        filled = [place for place in places if any((place / severity).is_dir() for severity in SEVERITIES)]
        if len(filled) > 1:
            raise ValueError(f"{name} is in {' and in '.join(map(str, filled))}; leave one of them there")
        for place in filled:
            found[name] = {severity: place / severity for severity in SEVERITIES if (place / severity).is_dir()}
    return found


def summarize_corruptions(errors: dict[str, dict[str, float]], of_imagenet: bool) -> dict[str, float]:
    """Give the mean error, and of ImageNet's classes the mCE over corruptions that have all severities, in percent.

    Of each corruption the errors of its severities are summed and divided by AlexNet's (mCE); whether all 15 are in it
    is in `corruptions`.
    """
    figures = {"mean_error": statistics.mean(statistics.mean(found.values()) for found in errors.values())}
    whole = {name: found for name, found in errors.items() if len(found) == len(SEVERITIES)}
    if whole and of_imagenet:
        ratios = [statistics.mean(found.values()) / ALEXNET_ERRORS[name] for name, found in whole.items()]
        figures |= {"mCE": statistics.mean(ratios), "corruptions": len(whole)}
    return figures


def evaluate_corruptions(
    accelerator: Accelerator,
    weights: Path,
    corruptions: dict[str, dict[str, Path]],
    choose: Callable[[FileList], list[int]],
    evaluate: Callable[[FileList, list[int]], ImageEvaluation],
    args: argparse.Namespace,
) -> dict[str, float]:
    """Score a classifier on each corruption and severity, print and write the errors as they come, give the summary.

    `choose` gives a folder's classes, of all folders before the first is scored. ValueError as it raises.
    """
    listed = {}
    for name, folders in corruptions.items():
        files = {severity: list_folder(accelerator, folder, args) for severity, folder in folders.items()}
        listed[name] = {severity: (found, choose(found)) for severity, found in files.items()}
    rows, errors, file = [["corruption", *SEVERITIES]], {}, weights.parent / CORRUPTIONS_FILE
    if accelerator.is_main_process:
        rename_aside(file)
    for name, severities in listed.items():
        errors[name] = {s: 100 - evaluate(*found).figures()["testing_top1_acc"] for s, found in severities.items()}
        rows.append([name, *(f"{errors[name].get(severity, math.nan):.2f}" for severity in SEVERITIES)])
        if accelerator.is_main_process:
            write_rows(file, rows)
        told = ", ".join(f"{severity}: {error:.2f} %" for severity, error in errors[name].items())
        accelerator.print(f"{name:<20}error by severity {told}")
    chosen = [classes for severities in listed.values() for _, classes in severities.values()]
    of_imagenet = all(len(classes) == IMAGENET_CLASSES for classes in chosen)
    figures = summarize_corruptions(errors, of_imagenet)
    accelerator.print(f"{'written':<16}{CORRUPTIONS_FILE} in {weights.parent}")
    whole, all_of_them = figures.get("corruptions", 0), len(ALEXNET_ERRORS)
    note = f"{whole} of {all_of_them} corruptions have all severities, and so are in the mCE"
    if not of_imagenet:
        note = f"no mCE: AlexNet's errors, by which it is divided, are of all {IMAGENET_CLASSES} classes of ImageNet"
    accelerator.print(f"{'note':<16}{note}")
    print_figures(accelerator, figures)
    return figures
