"""How images, label maps and weights lie on a disk. Imports nothing above it."""

from storage.console import protect_output
from storage.decoding import describe_decoder
from storage.demo import DEMO_LABEL_NAMES
from storage.files import read_text, rename_aside, write_json, write_rows
from storage.labels import (
    ADE20K_CLASS_NAMES,
    ADE20K_NUM_CLASSES,
    IGNORE_INDEX,
    LABEL_COLOURS,
    class_names_of,
    label_table,
    parse_label_values,
)
from storage.lists import (
    FileList,
    as_text,
    check_same_classes,
    find_splits,
    find_validation,
    list_images,
    refuse_inside,
)
from storage.pair_folders import PairLayout
from storage.pairs import PairList, check_pairs, list_pairs
from storage.weights import find_weights, read_state_dict

__all__ = [
    "ADE20K_CLASS_NAMES",
    "ADE20K_NUM_CLASSES",
    "DEMO_LABEL_NAMES",
    "IGNORE_INDEX",
    "LABEL_COLOURS",
    "FileList",
    "PairLayout",
    "PairList",
    "as_text",
    "check_pairs",
    "check_same_classes",
    "class_names_of",
    "describe_decoder",
    "find_splits",
    "find_validation",
    "find_weights",
    "label_table",
    "list_images",
    "list_pairs",
    "parse_label_values",
    "protect_output",
    "read_state_dict",
    "read_text",
    "refuse_inside",
    "rename_aside",
    "write_json",
    "write_rows",
]
