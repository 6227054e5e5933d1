"""Names and sizes of what lies in an experiment's folder. Nothing here imports torch."""

BEST_CHECKPOINT, LAST_CHECKPOINT = "best_checkpoint", "last_checkpoint"  # weights alone, and a link to the newest state
