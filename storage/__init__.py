"""How images, label maps and weights lie on a disk. Imports nothing above it."""

from storage.lazily import import_lazily

# What scripts use of it, by module
NAMES = {
    "storage.console": "explained_errors",
    "storage.decoding": "describe_decoder",
    "storage.demo": "DEMO_LABEL_NAMES",
    "storage.files": "escape",
    "storage.lists": "FileList as_text check_same_classes",
    "storage.labels": """IGNORE_INDEX LABEL_COLOURS label_table name_classes read_label_flags read_label_map""",
    "storage.sizes": "ADE20K_NUM_CLASSES",
    "storage.pairs": "PairList",
    "storage.weights": "find_weights read_state_dict",
}
__getattr__ = import_lazily(__name__, NAMES)
