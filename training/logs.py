"""What a run has left, read again or cut at a step: its log, flags, resumes, what went wrong, tables, pictures; names.

Nothing here imports torch.
"""

import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from storage.files import (
    escape,
    is_number,
    is_whole,
    no_links,
    open_regular,
    read_bytes,
    read_json,
    read_text,
    rename_damaged,
    rename_irregular,
    written_whole,
)
from training.flags import RECORDED

MAX_NAME = 60  # letters of a run's name
MAX_POINTS = 2000  # of a curve; of longer ones the lowest and the highest of each stretch are kept
MAX_MARKS = 200  # of a kind in a run
MAX_CONFUSIONS = 100
MAX_SHOWN = 500  # characters of a value
MAX_ROW_BYTES = 1 << 20
WORDS = {"None": "none", "True": "yes", "False": "no"}
RESUMED = re.compile(r"args_from_checkpoint_(\d+)(?:_step_(\d+))?(?:_\d+)?\.json")
Points = list[tuple[float, float | None]]  # None is a gap in the line


def read_rows(log: Path) -> list[dict]:
    """Read the rows of a log; a last line that was cut off is passed over. ValueError names other lines that are none.

    Lines end at \\n alone, and a crash may leave zeros behind the last one.
    """
    if not log.is_file():
        raise FileNotFoundError(f"no log at {log}; give an experiment's folder, which holds log.jsonl, or such a file")
    rows, lines = [], read_text(log).split("\n")
    lines = lines[:-1] if not lines[-1] else lines
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"line {number} of {log} is no JSON: {error}") from error
            print(f"{log}: the last line was cut off and is passed over")
            continue
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {log} holds a {type(row).__name__}, not figures by name")
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------ cutting a log


class KeptRows(NamedTuple):
    """The rows of a log up to a step, where the last of them ends, and the first line that is wrong, counted from 1."""

    lines: list[bytes]
    end: int
    wrong: int | None


def cut_rows(file: Path, last_step: int) -> None:
    """Cut the rows of a log, one JSON table a line, beyond a step; this needs no room on the disk.

    A log that is damaged is renamed, and its good rows go into a new one. A last row that a crash cut short is normal.
    """
    renamed = rename_irregular(file)
    if renamed is None and file.exists():
        try:
            with open(file, "r+b", opener=no_links) as log:
                rows = read_kept_rows(log, last_step)
                if rows.wrong is None:
                    log.truncate(rows.end)
                    return
            renamed = rename_damaged(file, f"line {rows.wrong} is no row with a step above those before")
        except OSError as error:
            renamed = rename_damaged(file, error)
    if renamed is not None and renamed.is_file():
        with open_regular(renamed) as old, written_whole(file) as temporary, temporary.open("xb") as new:
            new.writelines(read_kept_rows(old, last_step).lines)


def read_kept_rows(log: BinaryIO, last_step: int) -> KeptRows:
    """Read the rows of a log up to a step; rows beyond it may follow, and a part of one."""
    lines, end, place, kept_step, newest_step, wrong = [], 0, 0, -1, -1, None
    for number, line in enumerate(iter(lambda: log.readline(MAX_ROW_BYTES), b""), start=1):
        place, step = place + len(line), step_of(line)
        cut_short = len(line) < MAX_ROW_BYTES and line[-1:] != b"\n" and line[:1] in (b"{", b"\0")  # \0: a power cut
        if (step is None and not cut_short) or (step is not None and step <= newest_step):
            wrong = wrong or number
        if step is not None:
            newest_step = max(step, newest_step)
            if kept_step < step <= last_step:
                kept_step, end = step, place
                lines.append(line if line.endswith(b"\n") else line + b"\n")
    return KeptRows(lines, end, wrong)


def step_of(line: bytes) -> int | None:
    """Read the step of a row of a log; None for what is no row."""
    try:
        step = json.loads(line)["step"] if line[:1] == b"{" else None  # a gigabyte of zeros takes its time to parse
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return step if type(step) is int else None


# ------------------------------------------------------------------------------------------------ curves


def read_points(log: Path, rows: Iterable[dict], x: str, y: str) -> Points:
    """Give the points of a curve. What is null or not finite is a gap; rows without the figure are between its points.

    An evaluation's figures are in the last row of its epoch alone.
    """
    points = [(row[x], row[y]) for row in rows if row.get(x) is not None and y in row]
    for value in itertools.chain.from_iterable(points):
        if value is not None and type(value) not in (int, float):
            raise ValueError(f"{x!r} or {y!r} in {log} is {value!r}, which is no number")
    return [(a, b if b is not None and math.isfinite(b) else None) for a, b in points if math.isfinite(a)]


def subsample(points: Points) -> Points:
    """Keep the lowest and the highest point of each stretch of a long curve, and gaps, so that no spike is lost."""
    if len(points) <= MAX_POINTS:
        return points
    length, kept = 2 * len(points) // MAX_POINTS + 1, []
    for start in range(0, len(points), length):
        stretch = range(start, min(start + length, len(points)))
        drawn = [index for index in stretch if points[index][1] is not None]
        ends = {min(drawn, key=lambda i: points[i][1]), max(drawn, key=lambda i: points[i][1])} if drawn else {start}
        kept += [points[index] for index in sorted(ends)]
    return kept


def name_runs(logs: list[Path]) -> dict[Path, str]:
    """Name each run by its folder, or by as many folders above it as tell all runs apart."""
    folders = {log: log.resolve().parent.parts for log in dict.fromkeys(logs)}
    for depth in itertools.count(1):
        names = {log: "/".join(parts[-depth:]) for log, parts in folders.items()}
        if len(set(names.values())) == len(names) or depth >= max(map(len, folders.values())):
            break
    return {log: shorten(escape(name, also_bytes=True)) for log, name in names.items()}


def shorten(name: str) -> str:
    """Cut a long name in the middle."""
    half = MAX_NAME // 2
    return name if len(name) <= MAX_NAME else f"{name[:half]}…{name[-half + 1 :]}"


# ------------------------------------------------------------------------------------------------ a whole run


class Record(NamedTuple):
    """What a run's folder records: rows of the log, args.json, and the flags of each resume by its file's name."""

    folder: Path
    name: str
    rows: list[dict]
    args: dict
    resumes: dict[str, dict]

    @property
    def steps_per_epoch(self) -> float:
        return next((row["step"] / row["epoch"] for row in reversed(self.rows) if row.get("epoch")), 1.0)


class Mark(NamedTuple):
    """Something that happened to a run, on the axis of its steps."""

    kind: str
    step: float
    text: str


def read_run(folder: Path, name: str) -> Record:
    """Read a run; FileNotFoundError where the folder has no log, ValueError names a file that is damaged."""
    rows = read_rows(folder / "log.jsonl")
    if not all(is_whole(row.get("step"), 0) and is_number(row.get("epoch")) for row in rows):
        raise ValueError(f"{folder / 'log.jsonl'} has a row without step or epoch; give the folder of a training run")
    args = read_json(folder / "args.json") if (folder / "args.json").is_file() else {}
    resumes = {file.name: read_json(file) for file in folder.glob("args_from_*.json") if RESUMED.fullmatch(file.name)}
    return Record(folder, name, rows, args, resumes)


def find_marks(run: Record) -> list[Mark]:
    """Find resumes, steps that were left out, and rows at which more files could not be used, in the order of steps."""
    resumed, skipped, bad, before = [], [], [], 0
    for name, args in run.resumes.items():
        epoch, step = RESUMED.fullmatch(name).groups()
        step = int(step) if step else int(epoch) * run.steps_per_epoch
        changed = [f"--{key} {show(args[key])} (was {show(run.args[key])})" for key in find_changes([run.args, args])]
        resumed.append(Mark("resumed", step, "resumed" + "".join(f", {text}" for text in changed)))
    if (file := run.folder / "nonfinite_steps.jsonl").is_file():
        found = [row for row in read_rows(file) if is_whole(row.get("step"))]
        skipped = [Mark("skipped", row["step"], f"step {row['step']} left out: not finite") for row in found]
    for row in run.rows:
        count = row["bad_files"] if is_whole(row.get("bad_files")) else 0
        if count > before:
            bad.append(Mark("bad", row["step"], f"{count} files cannot be used, up to here"))
        before = count
    return sorted((mark for kind in (resumed, skipped, bad) for mark in kind[:MAX_MARKS]), key=lambda mark: mark.step)


def find_changes(flags: Sequence[dict]) -> list[str]:
    """Name the flags that differ between starts, or between runs that both have them."""
    shared = set.intersection(*(set(table) for table in flags)) - {*RECORDED} - {"resume_from_checkpoint"}
    return sorted(name for name in shared if any(table[name] != flags[0][name] for table in flags))


def show(value: object) -> str:
    """Give a value as a flag has it, shortened; control characters and what is no UTF-8 as their codes."""
    items = value if isinstance(value, list) else [value]
    words = (item if isinstance(item, str) else WORDS.get(str(item), str(item)) for item in items)
    return escape(" ".join(words), also_bytes=True)[:MAX_SHOWN]


def read_cells(file: Path) -> list[list[str]]:
    """Read lines whose cells stand between tabs, names in any bytes."""
    lines = read_bytes(file).decode("utf-8", "backslashreplace").split("\n")
    return [line.split("\t") for line in lines if line]


def read_table(file: Path) -> list[list[str]]:
    """Read a table as `read_cells` does; ValueError where rows are uneven, or none."""
    table = read_cells(file)
    if len({len(row) for row in table}) != 1:
        raise ValueError(f"{file} is no table of equally long rows; move it elsewhere")
    return table


def find_confusions(file: Path) -> list[tuple]:
    """Give the largest errors of a confusion matrix: true class, answer, times, and percent of the true class."""
    (_, *answers), *rows = read_table(file)
    if not all(cell.isdecimal() for _, *cells in rows for cell in cells):
        raise ValueError(f"{file} is no table of counts; move it elsewhere")
    found = []
    for place, (true, *cells) in enumerate(rows):
        counts = [int(cell) for cell in cells]
        errors = [
            (answer, n) for column, (answer, n) in enumerate(zip(answers, counts, strict=True)) if column != place
        ]
        found += [(true, answer, n, f"{100 * n / sum(counts):.1f}") for answer, n in errors if n]
    return sorted(found, key=lambda error: -error[2])[:MAX_CONFUSIONS]


def find_pictures(run: Record) -> dict[str, list[tuple[int, Path]]]:
    """Give the pictures of a run by their folder, each with its epoch, in that order."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for file in run.folder.glob("*/epoch_*.png"):
        if epoch := re.fullmatch(r"epoch_(\d+)", file.stem):
            found.setdefault(file.parent.name, []).append((int(epoch[1]), file))
    return {kind: sorted(found[kind]) for kind in sorted(found)}


def choose_evenly(files: list[tuple[int, Path]], max_bytes: float) -> list[tuple[int, Path]]:
    """Take so many pictures that they are not above a size together, evenly over the epochs, with the last."""
    last, sizes = len(files) - 1, [file.stat().st_size for _, file in files]
    for count in range(len(files), 0, -1):
        chosen = [last - last * i // max(count - 1, 1) for i in reversed(range(count))]
        if sum(sizes[index] for index in chosen) <= max_bytes:
            return [files[index] for index in chosen]
    return []
