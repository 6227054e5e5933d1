"""What a run is told, and what keeps it going. Knows no network, no loss and no data set."""

# ruff: noqa: F401 - the names that scripts use

from training.checkpoints import BEST_CHECKPOINT, LAST_CHECKPOINT, optional_write
from training.flags import Flags, micro_batch_size, size_flags
from training.memory import note_memory
from training.process import (
    SHARDING,
    broadcast_buffers,
    choose_value_range,
    collect_features,
    draw_demo_data,
    gather_slices,
    list_checked_pairs,
    list_folder,
    list_probe_files,
    list_splits,
    prepare,
    process_slice,
)
from training.records import describe_run, print_figures
from training.run import Plan, Run, open_evaluation, open_run
from training.schedule import Span, settle
