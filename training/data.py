"""Which images, label maps and held-out parts a run works on, and how their values become pixels, said as it is found.

The first process of a machine looks, the others read what it found.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator

from storage.bands import describe_depth, describe_pages, value_percentiles
from storage.console import DataError
from storage.decoding import CHANNEL_MODES
from storage.demo import write_demo_data
from storage.hub import (
    HELD_OUT,
    TRAINING,
    Columns,
    Tables,
    is_table,
    list_table,
    list_table_pairs,
    load_tables,
)
from storage.labels import describe_labels, has_colours, label_table, refuse_one_class
from storage.lists import (
    FileList,
    ListCache,
    check_same_classes,
    find_splits,
    find_validation,
    list_images,
    refuse_inside,
)
from storage.packs import is_packed
from storage.pair_folders import SPLIT_NAMES, PairLayout, find_pair_folders
from storage.pairs import PairList, PairSurvey, check_values, choose_ignore_zero, list_pairs, survey_pairs
from storage.remote import is_url, mirror
from training.process import cap_workers


def draw_demo_data(accelerator: Accelerator, working_directory: str) -> Path:
    """Give the folder of the drawn scenes, for which the main process draws them where they are not there yet."""
    folder = Path(working_directory) / "demo_data"
    accelerator.print(f"{'demo':<16}scenes are drawn into {folder}, unless they are there already")
    with accelerator.main_process_first():
        write_demo_data(folder)
    return folder


def list_cache(accelerator: Accelerator, args: argparse.Namespace) -> ListCache:
    """Give the cache of file lists; with --rescan_data the first process of a machine looks anew, for all of them."""
    rescan = args.rescan_data and accelerator.is_local_main_process
    return ListCache(Path(args.working_directory) / "file_lists", rescan)


def list_folder(accelerator: Accelerator, folder: Path, args: argparse.Namespace) -> FileList:
    """List the images of a folder; the first process of a machine looks, the others read what it found."""
    with accelerator.local_main_process_first():
        files = list_images(folder, list_cache(accelerator, args))
    for note in files.notes:
        accelerator.print(f"{'in ' + folder.name + '/':<16}{note}")
    return files


def load_splits(accelerator: Accelerator, root: str, args: argparse.Namespace) -> Tables:
    """Load a data set of the Hub; the first process of a machine does, the others read what it left in the cache."""
    with accelerator.local_main_process_first():
        tables = load_tables(root)
    if root == args.path_to_data:
        args.path_to_data = tables.name  # which args.json keeps, with its revision
    return tables


def list_table_splits(
    accelerator: Accelerator, root: str, args: argparse.Namespace
) -> tuple[FileList, FileList | None]:
    """List training and held-out images of a data set of the Hub, as `list_splits` does of a folder."""
    of_run = root == args.path_to_data
    tables = load_splits(accelerator, root, args)
    train, held_out = tables.find_split(TRAINING), tables.find_split(HELD_OUT)
    if train is None:
        raise DataError(f"{tables.name} has no split {' or '.join(TRAINING)}, but {', '.join(tables.splits)}")
    columns = Columns(args.image_column, getattr(args, "label_column", None))
    train_files = list_table(tables, train, columns)
    if held_out is None:
        return hold_out(accelerator, train_files, args) if args.val_fraction else (train_files, None)
    if of_run:
        refuse_second_split(Path(tables.name, held_out), args)
    return train_files, list_table(tables, held_out, columns)


def find_root(accelerator: Accelerator, root: str, args: argparse.Namespace) -> str | Path:
    """Give the folder of a data set; of packs at an address the one here that stands for them."""
    if not is_url(root):
        return root
    with accelerator.local_main_process_first():
        return mirror(root, Path(args.working_directory) / "shards", args.shard_cache_gb)


def list_splits(accelerator: Accelerator, root: str, args: argparse.Namespace) -> tuple[FileList, FileList | None]:
    """List the training and the held-out images (None without) of a data set; ValueError for a run that lies inside.

    Without a validation folder --val_fraction draws them from the training images.
    """
    if is_table(root):
        return list_table_splits(accelerator, root, args)
    train_folder, val_folder, notes = find_splits(find_root(accelerator, root, args))
    for note in notes:
        accelerator.print(f"{'data':<16}{note}")
    refuse_inside(args.working_directory, train_folder)
    if val_folder is not None and root == args.path_to_data:
        refuse_second_split(val_folder, args)
    train_files = list_folder(accelerator, train_folder, args)
    if val_folder is not None:
        return train_files, list_folder(accelerator, val_folder, args)
    return hold_out(accelerator, train_files, args) if args.val_fraction else (train_files, None)


def refuse_second_split(val_folder: Path, args: argparse.Namespace) -> None:
    if args.val_fraction:
        raise ValueError(
            f"--val_fraction {args.val_fraction:g} draws held-out images from the training images, but {val_folder} "
            "holds some; leave the flag out, or move that folder away"
        )


def hold_out(accelerator: Accelerator, files: FileList | PairList, args: argparse.Namespace) -> tuple:
    """Split a list by --val_fraction and --seed, the same in every process, and say so; ValueError for a single one."""
    if len(files) < 2:
        raise ValueError(f"--val_fraction needs two images at least, and there is one in {files.root}")
    parts = files.split(args.val_fraction, args.seed)
    counts, share = [len(part) for part in parts], f"--val_fraction {args.val_fraction:g}, --seed {args.seed}"
    accelerator.print(f"{'split':<16}{counts[0]:,} for training, {counts[1]:,} held out, by their paths ({share})")
    return parts


def list_labelled_splits(accelerator: Accelerator, args: argparse.Namespace) -> tuple[FileList, FileList]:
    """List training and validation images; both must have the same classes, and as many as --num_classes says."""
    train_files, val_files = list_splits(accelerator, args.path_to_data, args)
    if val_files is None:
        raise FileNotFoundError(
            f"--path_to_data {args.path_to_data} needs train/ and val/ (or validation/), each with a folder for every "
            "class: without held-out images no classifier can be judged. --val_fraction 0.1 holds a tenth out"
        )
    check_same_classes(train_files.classes, train_files.classes or ("",), train_files.root, "this data set")
    check_same_classes(val_files.classes, train_files.classes, val_files.root, str(train_files.root))
    if args.num_classes not in (None, len(train_files.classes)):
        raise ValueError(
            f"--num_classes {args.num_classes}, but {train_files.root} has {len(train_files.classes)} class folders; "
            "give that number or leave the flag out"
        )
    choose_value_range(accelerator, args, train_files)
    return train_files, val_files


def list_validation(accelerator: Accelerator, args: argparse.Namespace) -> FileList:
    """List the images that are to be evaluated: validation images, those held out, or of a folder all."""
    if args.val_fraction:
        _, files = list_splits(accelerator, args.path_to_data, args)
    elif is_table(args.path_to_data):
        tables = load_splits(accelerator, args.path_to_data, args)
        split = tables.find_split(HELD_OUT) or next(iter(tables.splits))
        files = list_table(tables, split, Columns(args.image_column, args.label_column))
    else:
        root = Path(find_root(accelerator, args.path_to_data, args))
        files = list_folder(accelerator, find_validation(root) or root, args)
    choose_value_range(accelerator, args, files)
    return files


def list_test(accelerator: Accelerator, others: tuple[FileList, FileList], args: argparse.Namespace) -> FileList | None:
    """List the images of --test_folder, None without; it is none of the other splits, and has their classes."""
    if args.test_folder is None:
        return None
    files = list_folder(accelerator, Path(args.test_folder), args)
    check_same_classes(files.classes, others[0].classes, files.root, str(others[0].root))
    if files.root in [other.root for other in others]:
        raise ValueError(f"--test_folder {files.root} is in use by the training; give another split")
    return files


def list_probe_files(
    accelerator: Accelerator, train_files: FileList, val_files: FileList | None, args: argparse.Namespace
) -> list[FileList]:
    """Give the labelled images of the k-NN probe: those that lend their labels, and those that are classified.

    They are some of the run's own, unless --path_to_probe_data names others.
    """
    root = args.path_to_probe_data or args.path_to_data
    if args.path_to_probe_data:
        train_files, val_files = list_splits(accelerator, root, args)
    if val_files is None:
        raise FileNotFoundError(f"--probe_every needs {root} to hold train/ and val/, or give --path_to_probe_data")
    check_same_classes(val_files.classes, train_files.classes, val_files.root, str(train_files.root))
    if not train_files.classes:
        raise ValueError(f"--probe_every needs labels, but {train_files.root} has images outside class folders")
    return [files.subsample(args.probe_images) for files in (train_files, val_files)]


def list_pairs_of(accelerator: Accelerator, split: str, args: argparse.Namespace) -> PairList:
    """Pair images and label maps of a split; without a validation folder --val_fraction draws it from training's."""
    if is_table(args.path_to_data):
        return list_table_pairs_of(accelerator, split, args)
    root = Path(find_root(accelerator, args.path_to_data, args)).resolve()
    layout = PairLayout(args.image_folder, args.label_folder, args.image_suffix, args.label_suffix)
    held_out = root / "validation" if is_packed(root / "validation") else None
    if held_out is None and (folders := find_pair_folders(root, "validation", layout)) is not None:
        held_out = folders.root / folders.images
    if held_out is not None:
        refuse_second_split(held_out, args)
    elif args.val_fraction and split in SPLIT_NAMES:
        return hold_out(accelerator, list_pairs(root, "training", layout), args)[split == "validation"]
    elif split == "validation" and find_pair_folders(root, "training", layout) is not None:
        raise FileNotFoundError(f"{root} has no validation pairs: add them, or draw some by --val_fraction 0.1")
    return list_pairs(root, split, layout)


def list_table_pairs_of(accelerator: Accelerator, split: str, args: argparse.Namespace) -> PairList:
    """Pair images and label maps of a split of a data set of the Hub, as `list_pairs_of` does of a folder."""
    if args.image_folder or args.label_folder or args.image_suffix or args.label_suffix:
        raise DataError(f"{args.path_to_data} has columns: give --image_column and --annotation_column instead")
    tables = load_splits(accelerator, args.path_to_data, args)
    train, held_out = tables.find_split(TRAINING), tables.find_split(HELD_OUT)
    columns = Columns(args.image_column, annotation=args.annotation_column)
    if held_out is not None:
        refuse_second_split(Path(tables.name, held_out), args)
    elif args.val_fraction and train and split in SPLIT_NAMES:
        return hold_out(accelerator, list_table_pairs(tables, train, columns), args)[split == "validation"]
    found = {"training": train, "validation": held_out}.get(split, tables.find_split((split,)))
    if found is None or (split not in SPLIT_NAMES and found == held_out):
        advice = ", or draw some by --val_fraction 0.1" * (split == "validation")
        raise DataError(f"{tables.name} has no split of its own for {split}, but {', '.join(tables.splits)}{advice}")
    return list_table_pairs(tables, found, columns)


def list_checked_pairs(
    accelerator: Accelerator, split: str, args: argparse.Namespace, *, rotate: bool = True
) -> PairSurvey:
    """Pair the images and label maps of a split, "training" or another, check that all can be used, and say so.

    `rotate` tells whether label maps lie on images as turned by their rotation flags, where no pair of the split does.
    Where nobody says whether 0 is ignored, the values of the training label maps decide (args.ignore_zero).
    """
    pairs = list_pairs_of(accelerator, split, args)
    if split == "training":
        choose_value_range(accelerator, args, pairs)
    accelerator.print(f"{'checking':<16}{pairs.describe()}")
    for note in pairs.notes:
        accelerator.print(f"{'left out':<16}{note}")
    held_out = split != "training"  # where an image that cannot be decoded is not replaced by another
    how = dict(held_out=held_out, rotate=rotate, channels=args.input_channels, own_units=args.value_range is not None)
    table = label_table(args.num_classes, bool(args.ignore_zero), args.label_values)
    how |= dict(colours=has_colours(table))
    with accelerator.local_main_process_first():
        threads = 1 if pairs.shards is not None else cap_workers(args.num_workers)  # shards come one after another
        survey = survey_pairs(pairs, threads, list_cache(accelerator, args), **how)
    lines = {}
    if args.ignore_zero is None:
        args.ignore_zero, lines["label value 0"] = choose_ignore_zero(survey, args.num_classes)
        table = label_table(args.num_classes, args.ignore_zero)
    check_values(survey, table)
    if split == "training":
        refuse_one_class(survey.pixels, table, args.num_classes, pairs.folder_of(pairs.label_maps))
    lines["labels"] = describe_labels(survey.pixels, table, args.class_names)
    print_lines(accelerator, lines | ({"rotation": survey.note} if survey.note else {}))
    return survey


def choose_value_range(accelerator: Accelerator, args: argparse.Namespace, files: FileList | PairList) -> None:
    """Settle how values become pixels (args.value_range) and pictures (args.show_channels), by a sample, and say so.

    None: 8-bit pictures. "own": the files' units. Two numbers: these become 0 and 1. ValueError where mean and
    standard deviation cannot belong to that.
    """
    values, lines = args.value_range, {}
    if values is None and (args.input_channels not in CHANNEL_MODES or files.path(0).lower().endswith(".npy")):
        values = "own"
    if values == "auto":
        values = value_percentiles(files, args.input_channels)  # the same in every process
    statistics = f"--mean {' '.join(f'{value:g}' for value in args.mean)} and --std"
    if values == "own":
        numbers = (" ".join(f"{value:g}" for value in values) for values in (args.mean, args.std))
        lines["values"] = f"in the files' own units, mean {next(numbers)}, standard deviation {next(numbers)}"
        if not args.statistics_given:
            raise ValueError(
                "values stay in the files' own units, so --mean and --std have to be given in them: python "
                f"tools/measure_values.py {files.root} --input_channels {args.input_channels} prints them. Or give "
                "--value_range LOW HIGH or auto"
            )
    elif max(map(abs, args.mean)) > 1 or max(args.std) > 1:
        scaled = " ".join(f"{value / 255:.4g}" for value in args.mean), " ".join(f"{v / 255:.4g}" for v in args.std)
        raise ValueError(
            f"{statistics} are of pixels 0 to 1; if yours are of pixels 0 to 255, give --mean {scaled[0]} "
            f"--std {scaled[1]}"
        )
    elif values is None:
        if accelerator.is_main_process:
            found = {"values": describe_depth(files, args.input_channels), "pages": describe_pages(files)}
            lines = {name: text for name, text in found.items() if text}
    else:
        lines["values"] = f"{values[0]:g} becomes 0 and {values[1]:g} becomes 1, in float32"
    args.value_range = values
    args.show_channels = None if values is None else args.show_channels  # 8-bit pictures are shown as they are
    print_lines(accelerator, lines)


def print_lines(accelerator: Accelerator, lines: Mapping[str, str]) -> None:
    """Print texts behind their names, one a line, from the main process."""
    for name, text in lines.items():
        accelerator.print(f"{name:<16}{text}")
