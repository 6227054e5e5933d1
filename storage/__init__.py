"""How images, label maps and weights lie on a disk. Imports nothing above it."""

from storage.console import explained_errors
from storage.decoding import describe_decoder
from storage.demo import DEMO_LABEL_NAMES
from storage.files import read_text, rename_aside, write_json, write_rows
from storage.lists import (
    FileList,
    as_text,
    check_same_classes,
    find_splits,
    find_validation,
    list_images,
    refuse_inside,
)
from storage.pairs import (
    ADE20K_CLASS_NAMES,
    ADE20K_NUM_CLASSES,
    IGNORE_INDEX,
    LABEL_COLOURS,
    PairList,
    check_pairs,
    label_table,
    list_pairs,
)
from storage.weights import find_weights, read_state_dict

__all__ = [
    "ADE20K_CLASS_NAMES",
    "ADE20K_NUM_CLASSES",
    "DEMO_LABEL_NAMES",
    "IGNORE_INDEX",
    "LABEL_COLOURS",
    "FileList",
    "PairList",
    "as_text",
    "check_pairs",
    "check_same_classes",
    "describe_decoder",
    "explained_errors",
    "find_splits",
    "find_validation",
    "find_weights",
    "label_table",
    "list_images",
    "list_pairs",
    "read_state_dict",
    "read_text",
    "refuse_inside",
    "rename_aside",
    "write_json",
    "write_rows",
]
