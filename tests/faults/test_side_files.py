"""Rows 18 to 21: damaged or planted files beside the states of a run, disks that are full at a start, moved states."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.conftest import SCRIPTS
from faults.harness import Job, check_exact, log_of, result_of
from faults.test_saves import SAVE, copy_of, small_disk, tree_of  # noqa: F401 - a fixture
from storage.lists import ListCache, list_images

NEWEST = "checkpoint_2_step_26"
KEPT_STEP = 26


@pytest.fixture(scope="module")
def died(job, tmp_path_factory) -> Callable[[str, int], Job]:
    """Give a job that died at step 27 and left its checkpoints, not to be changed."""
    left: dict[tuple[str, int], Job] = {}

    def died(script: str, num_processes: int = 1) -> Job:
        if (script, num_processes) not in left:
            dying = job(script, tmp_path_factory.mktemp("died"), num_processes)
            assert dying.start(SAVE, ("die", {"rank": 0, "step": 27})).wait() in (-9, 1)  # 1 from a launcher
            assert (dying.experiment / "last_checkpoint").resolve().name == NEWEST
            left[script, num_processes] = dying
        return left[script, num_processes]

    return died


# ------------------------------------------------------------------------------------------------ damage


def write(content: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(content)


def halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def blank_line(file: Path) -> None:
    """Write zeros over a part in the middle, as a broken disk may."""
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes(30) + content[middle + 30 :])


def sparse(file: Path) -> None:
    """Make a file of more than 256 MiB, the most that is read of one; it takes no room."""
    os.truncate(file, (1 << 28) + 1)


def become_folder(file: Path) -> None:
    file.unlink()
    (file / "inside").mkdir(parents=True)


def become_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def dangle(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.with_name("nowhere"))


FORMS = {
    "empty": write(b""),
    "half": halve,
    "zeros in the middle": blank_line,
    "not UTF-8": write(b"\xff\xfe{\n"),
    "a list": write(b"[1, 2]\n"),
    "a number": write(b"3\n"),
    "null": write(b"null\n"),
    "nested": write(b"[" * 100_000 + b"\n"),
    "a name that cannot be printed": write(b'{"seed": "\\ud800\\u001b[31m"}\n'),
    "huge": sparse,
    "a folder": become_folder,
    "a pipe": become_pipe,
    "a link to nothing": dangle,
}
NO_DAMAGE = {  # where a crash leaves the like, or the file still says what it has to
    "args.json": {"a name that cannot be printed"},
    "log.jsonl": {"empty", "half"},
}
WRITTEN = ("args.json", "log.jsonl")
SIDE_FILES = (*WRITTEN, f"args_from_{NEWEST}.json", "bad_files.txt", "nonfinite_steps.jsonl", "DONE")


def remains(folder: Path) -> list:
    """Describe what lies in a folder, whatever its name, so that one can tell whether anything was lost."""
    found = []
    for path in folder.iterdir():
        kind = path.lstat().st_mode & 0o170000
        size = path.lstat().st_size if path.is_file() else 0
        found.append((kind, size if size > 1 << 20 else path.read_bytes() if path.is_file() else os.path.islink(path)))
    return found


def put_back_lost_rows(experiment: Path, before: list[dict]) -> list[int]:
    """Put the rows of an earlier start that the damage itself destroyed into a log; give their steps."""
    rows = log_of(experiment)
    lost = [row for row in before if row["step"] <= KEPT_STEP and row["step"] not in {row["step"] for row in rows}]
    lines = [json.dumps(row) + "\n" for row in sorted(rows + lost, key=lambda row: row["step"])]
    (experiment / "log.jsonl").write_text("".join(lines))
    return [row["step"] for row in lost]


QUICK = [("pretrain_mae", 1, form) for form in FORMS] + [("finetune_classifier", 2, "zeros in the middle")]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("script", SCRIPTS)
def test_damaged_side_files_are_renamed_and_the_run_goes_on(
    script, num_processes, form, died, undisturbed, faults, full, tmp_path
):
    if (script, num_processes, form) not in QUICK and not full:
        pytest.skip("with --full")
    damaged = copy_of(died(script, num_processes), tmp_path)
    rows, args = log_of(damaged.experiment), (damaged.experiment / "args.json").read_bytes()
    for name in SIDE_FILES:
        file = damaged.experiment / name
        if name not in WRITTEN:
            file.write_bytes(args)
        FORMS[form](file)
    there = remains(damaged.experiment)
    with faults(18, f"side files damaged, {script}, {num_processes} process(es)") as count:
        count.injected += len(SIDE_FILES)
        printed = damaged.finish()
        for name, spared in NO_DAMAGE.items():
            named = f"set aside       {name}, which is damaged (" in printed
            assert named == (form not in spared), (name, printed)
        lost = put_back_lost_rows(damaged.experiment, rows)
        if form == "zeros in the middle":  # in one row, or over the end of one
            assert 1 <= len(lost) <= 2
        check_exact(damaged.experiment, undisturbed(script, num_processes))
        now = remains(damaged.experiment)
        for one in there if form not in NO_DAMAGE["log.jsonl"] else ():  # DONE is the one that goes
            assert now.count(one) >= there.count(one) - (form not in ("a folder", "a pipe", "a link to nothing")), one
        count.survived += len(SIDE_FILES)


# ------------------------------------------------------------------------------------------------ full disks


def fill(disk: Path) -> Path:
    """Fill a disk with one file, and give this."""
    filler, size = disk / "filler", os.statvfs(disk)
    filler.write_bytes(bytes(size.f_bavail * size.f_frsize))
    assert os.statvfs(disk).f_bavail == 0
    return filler


def on_full_disk(job: Job, disk: Path, output: Path) -> tuple[Job, tuple]:
    """Fill the disk of a job, whose output goes elsewhere; give it with the fault that makes room after one save."""
    (job.work / "output.txt").symlink_to(output)
    return job, ("fill_disk", {"file": str(fill(disk)), "first": 99, "last": 1})


def check_nothing_empty(work: Path) -> None:
    empty = [path for path in work.rglob("*") if path.is_file() and path.stat().st_size == 0 and path.name != ".lock"]
    assert not empty, empty


def test_resume_on_a_full_disk_goes_on(small_disk, died, undisturbed, faults, tmp_path):  # noqa: F811
    output = tmp_path / "output.txt"
    with faults(19, "disk full at a resume, pretrain_mae") as count:
        count.injected += 1
        crowded = copy_of(died("pretrain_mae"), small_disk / "work")
        rows = log_of(crowded.experiment)
        rows += [{"step": rows[-1]["step"] + more} for more in (1, 2)]  # beyond the state
        (crowded.experiment / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        crowded, room = on_full_disk(crowded, small_disk, output)
        printed = crowded.finish(("save_at", {"steps": [2]}), room)
        assert f"args_from_{NEWEST}.json could not be written ([Errno 28]" in printed, printed
        assert "checkpoint_2_step_28 could not be written" in printed, printed
        check_nothing_empty(crowded.work)
        check_exact(crowded.experiment, undisturbed("pretrain_mae"))
        count.survived += 1


def test_cache_of_lists_on_a_full_disk_costs_a_line(small_disk, data, capsys):  # noqa: F811
    root, cache = data["pretrain_mae"] / "train", ListCache(small_disk / "lists")
    fill(small_disk)
    assert len(list_images(root, cache)) == 40
    cache.remember({"answer": 1}, "question")
    said = capsys.readouterr().out
    assert said.count("could not be written ([Errno 28] No space left on device); the run goes on") == 2
    assert not [path for path in cache.folder.rglob("*")]
    (small_disk / "filler").unlink()
    cache.remember({"answer": 1}, "question")
    assert cache.recall("question") == {"answer": 1}


@pytest.mark.parametrize("script", SCRIPTS[:2])  # states of the third do not fit this disk
def test_fresh_start_on_a_full_disk_goes_on(small_disk, script, job, undisturbed, faults, full, tmp_path):  # noqa: F811
    if script != "pretrain_mae" and not full:
        pytest.skip("with --full")
    with faults(19, f"disk full at a fresh start, {script}") as count:
        count.injected += 1
        (small_disk / "work").mkdir()
        crowded, room = on_full_disk(job(script, small_disk / "work"), small_disk, tmp_path / "output.txt")
        printed = crowded.finish(("save_at", {"steps": [4]}), room)
        for name in ("args.json", "log.jsonl", ".npz"):
            assert any(name in line for line in printed.splitlines() if "could not be written" in line), (name, printed)
        check_nothing_empty(crowded.work)
        check_exact(crowded.experiment, undisturbed(script))
        count.survived += 1


# ------------------------------------------------------------------------------------------------ states moved


def behind_a_link(experiment: Path, elsewhere: Path) -> None:
    (experiment / NEWEST).rename(elsewhere)
    (experiment / NEWEST).symlink_to(elsewhere)


def behind_an_older_name(experiment: Path, elsewhere: Path) -> None:
    (experiment / NEWEST).rename(elsewhere)
    (experiment / "checkpoint_1").symlink_to(elsewhere)


def behind_last_checkpoint(experiment: Path, elsewhere: Path) -> None:
    (experiment / NEWEST).rename(elsewhere)
    (experiment / "last_checkpoint").unlink()
    (experiment / "last_checkpoint").symlink_to(elsewhere)


MOVES = {behind_a_link: NEWEST, behind_an_older_name: "checkpoint_1", behind_last_checkpoint: "last_checkpoint"}


@pytest.mark.parametrize("move", MOVES)
def test_newest_state_behind_a_link_is_gone_on_from_and_never_deleted(move, died, undisturbed, faults, tmp_path):
    moved, elsewhere = copy_of(died("pretrain_mae"), tmp_path), tmp_path / "abc"
    move(moved.experiment, elsewhere)
    kept = tree_of(elsewhere)
    with faults(20, "newest state behind a link, pretrain_mae") as count:
        count.injected += 1
        printed = moved.finish(("save_at", {"steps": [1, 2, 3]}))  # more than are kept
        assert f"from {MOVES[move]} on" in printed, printed
        assert log_of(moved.experiment)[KEPT_STEP]["step"] == KEPT_STEP + 1
        assert tree_of(elsewhere) == kept
        assert not (moved.experiment / "checkpoint_2_step_27").exists()  # older ones were removed
        check_exact(moved.experiment, undisturbed("pretrain_mae"))
        count.survived += 1


# ------------------------------------------------------------------------------------------------ planted links

FILES = [
    ".lock", "args.json", "log.jsonl", "nonfinite_steps.jsonl", "DONE", "log.jsonl.unfinished.tmp",
    "args.json.unfinished.tmp", "last_checkpoint.tmp",
]  # fmt: skip
FOLDERS = ["checkpoint_0_step_4.tmp", "checkpoint_3.tmp", "best_checkpoint.unfinished.tmp", "reconstructions"]


@pytest.mark.parametrize("dangling", [False, True])
def test_planted_links_are_never_written_through(dangling, job, faults, tmp_path):
    poison = ("poison", {"rank": 0, "passes": [5]})  # so that there is a skipped step to write down
    whole = job("pretrain_mae", tmp_path / "whole").with_flags("--save_minutes 0")
    whole.finish(poison)
    shared, victims = whole.inside(tmp_path / "shared"), tmp_path / "victims"
    victims.mkdir()
    shared.experiment.mkdir(parents=True)
    for name in FILES + FOLDERS:
        (shared.experiment / name).symlink_to(victims / name)
        if not dangling:
            (victims / name).mkdir() if name in FOLDERS else (victims / name).write_text("of somebody else\n")
    kept = tree_of(victims)
    with faults(21, "links planted under the names that a run writes, pretrain_mae") as count:
        count.injected += len(FILES + FOLDERS)
        printed = shared.finish(("save_at", {"steps": [4]}), poison)
        assert tree_of(victims) == kept
        for name in (".lock", "nonfinite_steps.jsonl", "DONE", "reconstructions"):
            assert f"set aside       {name}, which is damaged (it is a link): now {name}_1.damaged" in printed, printed
        assert json.loads((shared.experiment / "nonfinite_steps.jsonl").read_text())["step"] == 5
        assert result_of(shared.experiment) == result_of(whole.experiment)
        check_exact(shared.experiment, whole.experiment)
        count.survived += len(FILES + FOLDERS)
