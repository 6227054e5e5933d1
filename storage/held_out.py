"""Which images of a data set without a validation folder are held out of its training."""

import numpy as np

from storage.files import random_key


def choose_held_out(paths: np.ndarray, labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose a share of the paths of each label, bool (M,): those whose hashes with the seed are the lowest.

    Hangs on paths relative to their root and the seed alone, so a path that is added or removed moves at most one other
    of its label. A label keeps one path at least to train on, and of two or more one is held out.
    """
    keys = np.array([random_key(seed, "held out", path) for path in paths.tolist()], dtype=np.uint64)
    held_out = np.zeros(len(paths), dtype=bool)
    order = np.lexsort((keys, labels))  # label by label, the lowest hashes first
    for group in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        held_out[group[: min(len(group) - 1, max(1, round(fraction * len(group))))]] = True
    return held_out
