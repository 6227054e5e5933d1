"""What a run is told, and what keeps it going. Knows no network, no loss and no data set."""

import importlib

# What scripts use of it, by module; imported when first asked for, as most of it brings torch, which takes seconds
NAMES = {
    "storage.files": "optional_write",
    "training.flags": "Flags check_command micro_batch_size size_flags",
    "training.memory": "note_memory",
    "training.metrics": """EVALUATION_FILE TOP Evaluation choose_class_weights confusion_rows describe_class_weights
        describe_evaluation describe_test find_test_figures gather_evaluation mark_images note_selection
        read_class_weights write_classification write_report""",
    "training.process": """SHARDING broadcast_buffers choose_value_range collect_features draw_demo_data gather_slices
        list_checked_pairs list_folder list_probe_files list_splits prepare process_slice""",
    "training.records": "describe_run print_figures",
    "training.run": "Plan Run open_evaluation open_run",
    "training.schedule": "Span settle",
    "training.states": "BEST_CHECKPOINT LAST_CHECKPOINT",
}
HOMES = {name: module for module, names in NAMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)
