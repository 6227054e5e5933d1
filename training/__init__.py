"""What a run is told, and what keeps it going. Knows no network, no loss and no data set."""

from storage.lazily import import_lazily

# What scripts use of it, by module
NAMES = {
    "training.check": "Check",
    "training.data": """choose_value_range draw_demo_data list_checked_pairs list_labelled_splits list_probe_files
        list_splits list_test list_validation""",
    "training.flags": "Flags check_command micro_batch_size size_flags",
    "training.memory": "note_memory",
    "training.metrics": """TOP ImageEvaluation ImageSource PixelEvaluation choose_class_weights
        describe_class_weights find_writable_weights gather_evaluation mark_images
        note_selection read_class_weights report_best report_evaluation report_test""",
    "training.next_steps": "end_script",
    "training.pictures": """colour_classes describe_channels draw_legend draw_reconstructions draw_rows
        show_values""",
    "training.process": "SHARDING broadcast_buffers collect_features prepare process_slice",
    "training.records": "describe_run print_figures",
    "training.robustness": "choose_classes evaluate_corruptions find_corruptions",
    "training.run": "Plan Run open_evaluation open_run",
    "training.schedule": "Span settle",
    "training.states": "BEST_CHECKPOINT LAST_CHECKPOINT",
}
__getattr__ = import_lazily(__name__, NAMES)
