"""Rows 2 to 4, 7 and 8: runs that die within a save, checkpoints that are damaged, disks that are full."""

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults.conftest import SCRIPTS
from faults.harness import Job, check_exact, finish_all, sha256

QUICK = ("pretrain_mae",)
# States at these steps; the last of them is the first that removes older ones, and little of the run is left then.
SAVES = (22, 24, 26, 28)
SAVE = ("save_at", {"steps": SAVES})


# ------------------------------------------------------------------------------------------------ death within a save


def tree_of(folder: Path) -> tuple:
    """Describe all that is in a folder, to tell whether two are the same."""
    return tuple(
        (str(path.relative_to(folder)), str(path.readlink()) if path.is_symlink() else sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    ) + tuple(str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_dir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_run_that_dies_anywhere_in_its_last_saves_is_never_lost(script, job, undisturbed, faults, full, tmp_path):
    if script not in QUICK and not full:
        pytest.skip("with --full")
    whole = undisturbed(script)
    photographed = job(script, tmp_path / "photographed")
    where = {"experiment": str(photographed.experiment), "step": 28}
    photographed.finish(SAVE, ("photograph_points", where | {"into": str(tmp_path / "points")}))
    check_exact(photographed.experiment, whole)
    points = sorted((tmp_path / "points").iterdir())
    distinct = {tree_of(point): job(script, point) for point in points}
    assert any("step_28.tmp_manifest.json" in point.name for point in points)
    assert any("os.rename_checkpoint_2_step_24" in point.name for point in points)  # older ones are removed
    tried = list(distinct.values())[:: 1 if full else 4]
    with faults(2, f"death before a file operation of the last saves, {script}") as count:
        count.injected = len(tried)
        count.note = f"{len(points)} operations, {len(distinct)} different remains"
        finish_all(tried)
        for left in tried:
            check_exact(left.experiment, whole)
            count.survived += 1

    if full:
        with faults(2, f"the same by kill -9 of the whole tree, 5 times, {script}") as count:
            for point in [point for point in range(1, len(points) + 1) for _ in range(5)]:
                killed = job(script, tmp_path / "killed")
                where["experiment"] = str(killed.experiment)
                assert killed.start(SAVE, ("die_at_point", where | {"point": point})).wait() == -9
                count.injected += 1
                killed.finish()
                check_exact(killed.experiment, whole)
                count.survived += 1
                shutil.rmtree(tmp_path / "killed")


def test_file_that_is_written_in_part_is_never_loaded(job, undisturbed, faults, full, tmp_path):
    script = "finetune_classifier"
    files = ["model.safetensors", "optimizer.bin", "random_states_0.pkl"]
    shares = (0, 0.1, 0.5, 0.9, 0.999) if full else (0.5,)
    with faults(2, f"kill -9 in the middle of writing a file, {script}") as count:
        for file, share in [(file, share) for file in files for share in shares]:
            killed = job(script, tmp_path / f"{file}_{share}")
            assert killed.start(SAVE, ("torn", {"file": file, "share": share, "save": 3})).wait() == -9
            count.injected += 1
            killed.finish()
            check_exact(killed.experiment, undisturbed(script))
            count.survived += 1


# ------------------------------------------------------------------------------------------------ damage


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 8
    file.write_bytes(content)


def zero_page(file: Path) -> None:
    """Leave a page of zeros, as after a power cut; a smaller file becomes zeros as a whole."""
    content = file.read_bytes()
    start = max(0, len(content) - 4096) // 2
    file.write_bytes(content[:start] + bytes(min(4096, len(content))) + content[start + 4096 :])


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGES = (flip_bit, zero_page, truncate, empty, Path.unlink)


@pytest.fixture(scope="module")
def unfinished(job, tmp_path_factory) -> Callable[[str], Job]:
    """Give a job that died at step 27 and left two checkpoints, not to be changed."""
    left: dict[str, Job] = {}

    def unfinished(script: str) -> Job:
        if script not in left:
            died = job(script, tmp_path_factory.mktemp("unfinished"))
            assert died.start(SAVE, ("die", {"rank": 0, "step": 27})).wait() == -9
            left[script] = died
        return left[script]

    return unfinished


def copy_of(job: Job, work: Path) -> Job:
    shutil.copytree(job.experiment, work / "run", symlinks=True)
    return job.inside(work)


@pytest.mark.parametrize("script", SCRIPTS)
def test_damaged_newest_checkpoint_is_passed_over_and_named(script, unfinished, undisturbed, faults, full, tmp_path):
    if script != "finetune_classifier" and not full:  # which has the most files
        pytest.skip("with --full")
    newest = "checkpoint_2_step_26"
    files = sorted(file.name for file in (unfinished(script).experiment / newest).iterdir())
    cases = [(file, damage) for file in files for damage in DAMAGES]
    if not full:  # every file, and every kind of damage
        cases = [(file, DAMAGES[index % len(DAMAGES)]) for index, file in enumerate(files)]
    with faults(3, f"damage to a file of the newest checkpoint, {script}") as count:
        for number, (file, damage) in enumerate(cases):
            damaged = copy_of(unfinished(script), tmp_path / str(number))
            damage(damaged.experiment / newest / file)
            count.injected += 1
            printed = damaged.finish()
            assert f"passed over     {newest}, which is damaged ({file} " in printed, (file, damage, printed)
            assert "checkpoint_2_step_24 on" in printed
            assert (damaged.experiment / f"{newest}_1.damaged").is_dir()
            check_exact(damaged.experiment, undisturbed(script))
            count.survived += 1


def test_run_whose_checkpoints_are_all_damaged_is_not_started_anew(unfinished, faults, tmp_path):
    damaged = copy_of(unfinished("pretrain_mae"), tmp_path)
    names = {file.parent.name for file in damaged.experiment.glob("checkpoint_*/model.safetensors")}
    assert names == {"checkpoint_2", "checkpoint_2_step_24", "checkpoint_2_step_26"}
    for name in names:
        flip_bit(damaged.experiment / name / "model.safetensors")
    kept = tree_of(damaged.experiment)
    with faults(4, "all checkpoints damaged, pretrain_mae") as count:
        count.injected += 1
        printed = damaged.fail()
        assert "is damaged, and starting again without being asked would lose the run" in printed
        assert all(f"{name}: model.safetensors has another content" in printed for name in names)
        assert tree_of(damaged.experiment) == kept
        count.survived += 1


# ------------------------------------------------------------------------------------------------ full disks


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own of 8 MB, where this process may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_run_goes_on_while_the_disk_is_full(small_disk, job, undisturbed, faults, full):
    """Where the second save follows at once on the first that failed, no row of the log comes in between."""
    refused = 0
    with faults(7, "disk full for two saves, then not, pretrain_mae") as count:
        for number in range(5 if full else 1):
            crowded = job("pretrain_mae", small_disk / str(number))
            steps = ("save_at", {"steps": [4, 6 + number]})  # the third is at the end of the second epoch
            filler = {"file": str(small_disk / "filler"), "first": 2, "last": 3}
            count.injected += 2
            printed = crowded.finish(steps, ("fill_disk", filler))
            assert printed.count("earlier ones are kept, and the run goes on") == 2, printed
            refused += "log.jsonl could not be written ([Errno 28] No space left on device)" in printed
            check_exact(crowded.experiment, undisturbed("pretrain_mae"))
            count.survived += 2
            shutil.rmtree(crowded.work)
        assert refused == (4 if full else 1)


def test_run_stops_when_the_disk_stays_full_and_goes_on_with_room(small_disk, job, undisturbed, faults):
    crowded = job("pretrain_mae", small_disk / "work")
    steps = ("save_at", {"steps": [4, 6, 8, 12]})
    with faults(7, "disk full for good, then room again, pretrain_mae") as count:
        count.injected += 1
        printed = crowded.fail(steps, ("fill_disk", {"file": str(small_disk / "filler"), "first": 2, "last": 9}))
        assert "OSError: 3 saves in a row failed" in printed
        assert (crowded.experiment / "last_checkpoint").resolve().name == "checkpoint_0_step_4"
        (small_disk / "filler").unlink()
        assert "from checkpoint_0_step_4 on" in crowded.finish()
        check_exact(crowded.experiment, undisturbed("pretrain_mae"))
        count.survived += 1


@pytest.mark.parametrize(("num_processes", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_quota_at_one_process_costs_that_save_alone(num_processes, rank, job, undisturbed, faults, full, tmp_path):
    row, name = (7, "files limited to 12 kB") if num_processes == 1 else (8, f"quota at process {rank} of 2")
    with faults(row, f"{name} in two saves, pretrain_mae") as count:
        for number in range(3 if full else 1):
            limited = job("pretrain_mae", tmp_path / str(number), num_processes)
            steps = ("save_at", {"steps": [4, 6 + number, 12, 18]})
            limit = ("limit_saves", {"rank": rank, "saves": [2, 3], "max_bytes": 12000})
            count.injected += 2
            printed = limited.finish(steps, limit)
            assert printed.count("earlier ones are kept, and the run goes on") == 2, printed
            check_exact(limited.experiment, undisturbed("pretrain_mae", num_processes))
            count.survived += 2
