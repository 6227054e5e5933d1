"""What a run is told, and what keeps it going. Knows no network, no loss and no data set."""

from training.checkpoints import BEST_CHECKPOINT, LAST_CHECKPOINT, find_checkpoints
from training.flags import Flags, micro_batch_size, size_flags
from training.process import (
    SHARDING,
    broadcast_buffers,
    collect_features,
    draw_demo_data,
    gather_slices,
    list_checked_pairs,
    list_folder,
    list_splits,
    prepare,
    print_figures,
    process_slice,
)
from training.records import describe_run, optional_write
from training.run import Plan, Run, open_evaluation, open_run

__all__ = [
    "BEST_CHECKPOINT",
    "LAST_CHECKPOINT",
    "SHARDING",
    "Flags",
    "Plan",
    "Run",
    "broadcast_buffers",
    "collect_features",
    "describe_run",
    "draw_demo_data",
    "find_checkpoints",
    "gather_slices",
    "list_checked_pairs",
    "list_folder",
    "list_splits",
    "micro_batch_size",
    "open_evaluation",
    "open_run",
    "optional_write",
    "prepare",
    "print_figures",
    "process_slice",
    "size_flags",
]
