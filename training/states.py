"""States of a run on the disk: found, ordered, and checked for damage.

A state is a folder with weights, optimizer and random numbers (Accelerate's), sizes (config.json), where the run is
(state.json), and a manifest of all these files, which is written last. Nothing here imports torch.
"""

import contextlib
import os
import re
from pathlib import Path

from storage.files import checksum_of, read_json
from storage.sizes import BEST_CHECKPOINT, LAST_CHECKPOINT  # noqa: F401 - also the names that runs use

CHECKPOINT_NAME = re.compile(r"checkpoint_(\d+)(?:_step_(\d+))?")  # epochs behind it, and the step within the next
STATE_FILE, MANIFEST_FILE = "state.json", "manifest.json"


def checkpoint_order(folder: Path) -> tuple[int, int]:
    """Sort checkpoints by how far they are: what their state says, or their names where that is damaged."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        if read_json(folder / MANIFEST_FILE)["files"][STATE_FILE]["crc32"] == checksum_of(folder / STATE_FILE):
            state = read_state(folder)
            return state["epoch"], state["step"]
    match = CHECKPOINT_NAME.fullmatch(folder.name) or CHECKPOINT_NAME.fullmatch(folder.resolve().name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def find_checkpoints(experiment: Path) -> list[Path]:
    """Give the checkpoints of an experiment, whole or damaged, oldest first, each once whatever links lead to it."""
    named = [entry for entry in experiment.glob("checkpoint_*") if CHECKPOINT_NAME.fullmatch(entry.name)]
    # last_checkpoint counts where it is none of the others: a folder, or a link that leads elsewhere
    entries = [experiment / LAST_CHECKPOINT, *sorted(named, key=Path.is_symlink, reverse=True)]
    folders = {os.path.realpath(folder): folder for folder in entries if folder.is_dir()}
    return sorted(folders.values(), key=checkpoint_order)


def find_checkpoint(experiment: Path, name: str) -> Path:
    """Find a checkpoint by its name inside the experiment, or by its folder; FileNotFoundError lists those found."""
    for folder in (experiment / name, Path(name)):
        if (folder / STATE_FILE).is_file():
            return folder.resolve()  # of last_checkpoint, which moves on, the one it is now
    found = ", ".join(folder.name for folder in find_checkpoints(experiment)) or "none"
    raise FileNotFoundError(
        f"--resume_from_checkpoint {name}: no checkpoint with a {STATE_FILE} there. In {experiment}: {found}"
    )


def newest_whole_checkpoint(checkpoints: list[Path]) -> tuple[Path, list[Path]]:
    """Give the newest checkpoint whose files are as its manifest says, and the newer ones that are damaged."""
    damaged: dict[Path, str] = {}
    for folder in reversed(checkpoints):
        if (damage := find_damage(folder)) is None:
            return folder, list(damaged)
        damaged[folder] = f"  {folder.name}: {damage}\n"
    raise ValueError(
        f"every checkpoint in {checkpoints[0].parent} is damaged, and starting again without being asked would lose "
        f"the run:\n{''.join(damaged.values())}Put a whole copy back, or choose another --experiment_name"
    )


def find_damage(folder: Path) -> str | None:
    """Compare a checkpoint's files with its manifest; None when all are there, whole, and readable."""
    if not (folder / MANIFEST_FILE).is_file():
        return f"{MANIFEST_FILE} is missing, which is written last"
    try:
        manifest = read_json(folder / MANIFEST_FILE)
        for name, expected in manifest["files"].items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"{MANIFEST_FILE} names {name!r}, which is not inside the folder"
            if (size := (folder / name).stat().st_size) != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if checksum_of(folder / name) != expected["crc32"]:
                return f"{name} has another content than when it was written"
        missing = [name for name in ("config.json", STATE_FILE) if name not in manifest["files"]]
        return f"{MANIFEST_FILE} does not name {', '.join(missing)}" if missing else None
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILE} cannot be read ({type(error).__name__}: {error})"


def read_state(folder: Path) -> dict:
    """Read how far a checkpoint is; ValueError names the file when it is no such record."""
    state = read_json(folder / STATE_FILE)
    if not all(type(state.get(name)) is int for name in ("epoch", "step")):
        raise ValueError(f"{folder / STATE_FILE} does not hold an epoch and a step")
    return state
