"""How images, label maps and weights lie on a disk. Imports nothing above it."""

import importlib

# What scripts use of it, by module; imported when first asked for, as most of it brings torch, which takes seconds
NAMES = {
    "storage.console": "explained_errors",
    "storage.decoding": "describe_decoder",
    "storage.demo": "DEMO_LABEL_NAMES",
    "storage.files": "escape read_text rename_aside write_json write_rows",
    "storage.lists": "FileList as_text check_same_classes find_splits find_validation list_images refuse_inside",
    "storage.labels": """ADE20K_CLASS_NAMES IGNORE_INDEX LABEL_COLOURS class_names_of label_table
        parse_label_values read_label_map""",
    "storage.sizes": "ADE20K_NUM_CLASSES",
    "storage.pair_folders": "PairLayout",
    "storage.pairs": "PairList check_pairs list_pairs",
    "storage.weights": "find_weights read_state_dict",
}
HOMES = {name: module for module, names in NAMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)
