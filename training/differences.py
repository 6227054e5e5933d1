"""What differs between a run and the state that it would go on from, and how that is told."""

from collections.abc import Iterator, Mapping
from pathlib import Path


def find_differences(old: Mapping, new: Mapping, prefix: str = "") -> Iterator[tuple]:
    """Give (name, old, new) of every entry that differs, of tables within tables too."""
    for key in old.keys() | new.keys():
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from find_differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b


def refuse_differences(folder: Path, saved: Mapping, current: Mapping, start_flag: str | None) -> None:
    """Raise ValueError where a run is not the one that left a checkpoint; names every difference.

    `start_flag` is the script's flag that starts a new run from weights: the way out, where their sizes are the same.
    """
    differences = {name: values for name, *values in sorted(find_differences(saved, current), key=lambda d: d[0])}
    if not differences:
        return
    lines = [f"{name}: {old!r} in the checkpoint, {new!r} now" for name, (old, new) in differences.items()]
    counts = differences.get("num_images", (0, 0))
    if same_but_images(*differences.get("data", ("", ""))) and all(type(count) is int for count in counts):
        lines = [line for line in lines if not line.startswith(("data:", "num_images:"))]
        lines.append(f"data: {compare_counts(*counts)}")
    if start_flag and not any(name.startswith("config.") for name in differences):
        lines.append(
            f"to start a new run from these weights instead: {start_flag} {folder} in the place of "
            "--resume_from_checkpoint, and another --experiment_name"
        )
    raise ValueError("\n  ".join([f"cannot resume from {folder}, because this run differs:", *lines]))


def same_but_images(old: object, new: object) -> bool:
    """Tell whether two descriptions of data differ in the images' fingerprint, which stands first, and only there."""
    parts = [str(text).partition(",") for text in (old, new)]
    return parts[0][0] != parts[1][0] and parts[0][2] == parts[1][2]


def compare_counts(old: int, new: int) -> str:
    """Say in words how the images of a run differ from those of before."""
    if old == new:
        return "as many images as before, but not the same ones, or under other names"
    more = "more" if new > old else "fewer"
    return f"{abs(new - old):,} images {more} than before ({new:,} now, {old:,} in the checkpoint)"
