"""What a run writes down: the lock of its folder, arguments, log, bar, bad files and skipped steps."""

import argparse
import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from dataset import StepSampler
from training.checkpoints import Checkpoints, Start, open_experiment
from training.records import (
    BadFiles,
    RunLog,
    SkippedSteps,
    describe_run,
    lock_experiment,
    open_records,
    write_args,
)
from training.states import find_checkpoints


def run_flags(folder, **changes):
    flags = {"working_directory": str(folder), "experiment_name": "run", "epochs": 10, "resume_from_checkpoint": None}
    return argparse.Namespace(**{**flags, "log_wandb": False, "log_with": None, **changes})


@pytest.fixture
def two_checkpoints(tmp_path) -> list[Path]:
    """Checkpoints of two epochs of an experiment `run`, oldest first."""
    accelerator = Accelerator(cpu=True)
    checkpoints = Checkpoints(accelerator, tmp_path / "run", 2)
    (tmp_path / "run").mkdir()
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    for epoch in (3, 4):
        checkpoints.save(model, {}, {"epoch": epoch, "step": 10 * epoch}, epoch_ends=True)
    return find_checkpoints(tmp_path / "run")


# -------------------------------------------------------------------------------- the folder


def test_last_checkpoint_is_the_newest_again_after_a_kill_in_between(tmp_path, two_checkpoints, capsys):
    accelerator, latest = Accelerator(cpu=True), run_flags(tmp_path, resume_from_checkpoint="latest")
    third, fourth = two_checkpoints
    (tmp_path / "run" / "last_checkpoint").unlink()
    (tmp_path / "run" / "last_checkpoint").symlink_to(third.name)
    (tmp_path / "run" / "checkpoint_5.tmp").mkdir()  # of a save that was killed
    (tmp_path / "run" / "DONE").touch()
    open_records(accelerator, open_experiment(accelerator, latest), latest, 40).close()
    assert (tmp_path / "run" / "last_checkpoint").resolve() == fourth
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == {
        "checkpoint_3", "checkpoint_4", "last_checkpoint", "args.json", ".lock",
    }  # fmt: skip
    assert "run, from checkpoint_4 on" in capsys.readouterr().out


def test_damaged_checkpoint_that_was_passed_over_is_renamed_and_named(tmp_path, two_checkpoints, capsys):
    accelerator, latest = Accelerator(cpu=True), run_flags(tmp_path, resume_from_checkpoint="latest")
    (two_checkpoints[1] / "state.json").unlink()
    open_records(accelerator, open_experiment(accelerator, latest), latest, 30).close()
    said = capsys.readouterr().out
    assert "checkpoint_4, which is damaged (state.json is missing): now checkpoint_4_1.damaged" in said
    assert [folder.name for folder in find_checkpoints(tmp_path / "run")] == ["checkpoint_3"]
    assert (tmp_path / "run" / "checkpoint_4_1.damaged" / "model.safetensors").exists()


@pytest.mark.parametrize("resumed", [False, True])
def test_run_that_another_one_overtook_is_refused_and_writes_nothing(tmp_path, two_checkpoints, resumed):
    """Another run saved and ended between this one's look at the folder and its hold on it."""
    accelerator = Accelerator(cpu=True)
    flags = run_flags(tmp_path)
    start = Start(tmp_path / "run", two_checkpoints[0] if resumed else None, [])
    with pytest.raises(BlockingIOError, match=r"another run has just written .*checkpoint_4; start this one again"):
        open_records(accelerator, start, flags, 30)
    assert not (tmp_path / "run" / "args.json").exists() and not (tmp_path / "run" / "log.jsonl").exists()


FORK = multiprocessing.get_context("fork")  # a process in milliseconds; a new one imports torch for seconds


def hold(experiment, say) -> None:
    try:
        lock_experiment(experiment)
        say.send("held")
    except BlockingIOError as error:
        say.send(str(error))


def hold_and_be_killed(experiment, say) -> None:
    """Hold an experiment's folder, fork a data worker, and be killed; the worker lives on."""
    lock = lock_experiment(experiment)
    worker = os.fork()
    if worker == 0:
        time.sleep(60)
        os._exit(0)
    say.send((worker, lock.fileno()))
    os.kill(os.getpid(), signal.SIGKILL)


def ask_another_process(act, experiment):
    """Do something in another process, and give what it sent; EOFError where it ended without a word."""
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=act, args=(experiment, theirs))
    process.start()
    theirs.close()
    assert ours.poll(60)
    said = ours.recv()
    process.join()
    return said


def test_lock_lets_one_run_into_an_experiment_and_goes_with_its_process(tmp_path):
    lock = lock_experiment(tmp_path / "run")
    assert ask_another_process(hold, tmp_path / "run").startswith("another run is training in")
    lock.close()
    # A data worker that outlives its killed run has what it inherited still open, and must not keep the next one out.
    worker, inherited = ask_another_process(hold_and_be_killed, tmp_path / "run")
    try:
        assert os.readlink(f"/proc/{worker}/fd/{inherited}") == str(tmp_path / "run" / ".lock")  # it lives
        assert ask_another_process(hold, tmp_path / "run") == "held"
    finally:
        os.kill(worker, signal.SIGKILL)


def test_write_args_keeps_the_first_file_and_names_what_changed(tmp_path):
    checkpoint = tmp_path / "checkpoint_3"
    assert write_args(tmp_path, run_flags(tmp_path, seed=1), None, {"torch": "2.0"}) == []
    assert write_args(tmp_path, run_flags(tmp_path, seed=2), checkpoint, {"torch": "2.1"}) == ["--seed 2 (was 1)"]
    assert json.loads((tmp_path / "args.json").read_text())["seed"] == 1
    resumed = json.loads((tmp_path / "args_from_checkpoint_3.json").read_text())
    assert resumed["seed"] == 2 and resumed["environment"] == {"torch": "2.1"}
    write_args(tmp_path, run_flags(tmp_path, seed=4), checkpoint)  # a second resume from there
    assert json.loads((tmp_path / "args_from_checkpoint_3_1.json").read_text())["seed"] == 2
    write_args(tmp_path, run_flags(tmp_path, seed=3), None)
    assert json.loads((tmp_path / "args_1.json").read_text())["seed"] == 1


@pytest.mark.parametrize("plant", [Path.mkdir, os.mkfifo, lambda file: file.symlink_to("nowhere")])
def test_lock_is_a_file_of_its_own_whatever_has_its_name(tmp_path, plant, capsys):
    plant(tmp_path / ".lock")
    lock = lock_experiment(tmp_path)
    assert ".lock_1.damaged" in capsys.readouterr().out and (tmp_path / ".lock").stat().st_ino
    assert ask_another_process(hold, tmp_path).startswith("another run is training in")
    lock.close()


# -------------------------------------------------------------------------------- log


def test_log_cuts_the_rows_beyond_the_resumed_step(tmp_path):
    log = RunLog(tmp_path, enabled=True)
    for step in (1, 20, 40):
        log.write({"step": step})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 60, "training_l')  # cut short by a crash
    RunLog(tmp_path, enabled=True, resumed_step=20).write({"step": 30})
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 20, 30]


def test_log_of_an_earlier_start_is_set_aside(tmp_path):
    for step in (1, 2, 3):
        RunLog(tmp_path, enabled=True).write({"step": step})
    found = {path.name: json.loads(path.read_text())["step"] for path in tmp_path.iterdir()}
    assert found == {"log_1.jsonl": 1, "log_2.jsonl": 2, "log.jsonl": 3}


def test_log_of_other_processes_writes_nothing(tmp_path):
    RunLog(tmp_path, enabled=False).write({"step": 1})
    assert not list(tmp_path.iterdir())


def test_pictures_follow_no_links_and_leave_no_half_of_one(tmp_path, capsys):
    picture, victims = Image.new("RGB", (64, 64)), tmp_path / "victims"
    victims.mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "shown").symlink_to(victims)
    log = RunLog(tmp_path / "run", enabled=True)
    log.picture("shown", 1, picture, 10)
    (tmp_path / "run" / "shown" / "epoch_2.png").symlink_to(victims / "planted")
    log.picture("shown", 2, picture, 20)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
    try:
        log.picture("shown", 3, picture, 30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    names = {path.name for path in (tmp_path / "run" / "shown").iterdir()}
    assert names == {"epoch_1.png", "epoch_2.png", "epoch_2.png_1.damaged"} and not list(victims.iterdir())
    assert Image.open(tmp_path / "run" / "shown" / "epoch_2.png").size == (64, 64)
    assert "epoch_3.png could not be written" in capsys.readouterr().out


# -------------------------------------------------------------------------------- progress


class Files(list):
    def describe(self) -> str:
        return f"{len(self)} images"


def test_run_says_what_decides_its_result_and_whether_an_epoch_repeats_images(capsys):
    accelerator = Accelerator(cpu=True)
    flags = argparse.Namespace(gradient_accumulation_steps=4, num_workers=0, epochs=3, warmup_epochs=1)
    sampler = StepSampler(20, 2, accumulation_steps=4)
    describe_run(accelerator, flags, sampler, Files(range(20)), Files(range(5)), {"model": "small"})
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said.pop("runs").startswith("on         1 x cpu, precision no, ")
    assert said == {
        "training": "20 images",
        "held": "out        5 images",
        "effective": "batch 8 = 1 processes x 4 forward passes x 2 images",
        "schedule": "3 epochs of 2 steps, warmup 1 epochs",
        "model": "small",
    }
    describe_run(accelerator, flags, sampler, Files(range(7)), None, {"schedule": "another"})
    said = capsys.readouterr().out
    assert "note            7 images do not fill one step of 8" in said and "schedule        another" in said
    assert "held out        none: no train/" in said


# -------------------------------------------------------------------------------- what went wrong


def test_bad_files_are_named_once_and_stop_above_the_limit(tmp_path):
    accelerator, said = Accelerator(cpu=True), []
    bad_files = BadFiles(tmp_path, num_images=200, max_fraction=0.01)
    bad_files.note([("a.jpg", "OSError: cut\noff"), ("a.jpg", "OSError: cut\noff")])
    assert bad_files.share(accelerator, said.append) == 1
    bad_files.note([("a.jpg", "OSError: cut\noff"), ("b\udcff.jpg", "ValueError")])
    assert bad_files.share(accelerator, said.append) == 2
    assert (tmp_path / "bad_files.txt").read_bytes() == b"a.jpg\tOSError: cut off\nb\xff.jpg\tValueError\n"
    assert len(said) == 2 and said[1].endswith(r"b\udcff.jpg  ValueError")
    strange = "new\nline\ttab\x1b[31m\u2028.jpg"
    for _ in range(2):  # the second as a run that goes on
        bad_files = BadFiles(tmp_path, num_images=200, max_fraction=0.01)
        bad_files.note([(strange, "gone"), ("b\udcff.jpg", "ValueError")])
        bad_files.share(accelerator, said.append)
    assert (tmp_path / "bad_files.txt").read_bytes().count(b"\n") == 3 and len(said) == 3
    assert said[2].endswith(r"new\nline\ttab\x1b[31m\u2028.jpg  gone")
    bad_files.note([("c.jpg", "ValueError")])
    with pytest.raises(ValueError, match=r"3 of 200 images cannot be used, more than --max_bad_fraction 0\.01"):
        bad_files.share(accelerator, said.append)


@pytest.mark.parametrize("plant", [Path.mkdir, os.mkfifo, lambda file: file.symlink_to("nowhere")])
def test_notes_of_what_went_wrong_are_written_whatever_has_their_names(tmp_path, plant, capsys):
    accelerator = Accelerator(cpu=True)
    for name in ("bad_files.txt", "nonfinite_steps.jsonl"):
        plant(tmp_path / name)
    bad_files = BadFiles(tmp_path, num_images=200, max_fraction=0.01)
    bad_files.note([("a.jpg", "gone")])
    assert bad_files.share(accelerator, print) == 1
    SkippedSteps(tmp_path, lambda step: ["b.jpg"], max_in_a_row=3).note(accelerator, [True], 1, print)
    said = capsys.readouterr().out
    assert (tmp_path / "bad_files.txt").read_text() == "a.jpg\tgone\n" and "bad_files.txt_1.damaged" in said
    assert (tmp_path / "nonfinite_steps.jsonl").read_text() == '{"step": 1, "images": ["b.jpg"]}\n'
    assert "nonfinite_steps.jsonl_1.damaged" in said and not (tmp_path / "nowhere").exists()


def test_bad_files_that_were_repaired_count_no_more(tmp_path):
    accelerator, said = Accelerator(cpu=True), []
    (tmp_path / "bad_files.txt").write_text("a.jpg\tOSError\nb.jpg\tOSError\nc.jpg\tOSError\n")
    bad_files = BadFiles(tmp_path, num_images=200, max_fraction=0.01)
    bad_files.note([("c.jpg", "OSError")])
    assert bad_files.share(accelerator, said.append) == 1 and not said


def test_skipped_steps_are_counted_named_and_limited(tmp_path):
    said = []
    steps = SkippedSteps(tmp_path, lambda step: [f"{step}.jpg"], max_in_a_row=3)
    accelerator = Accelerator(cpu=True)
    steps.note(accelerator, [False, True, True], 3, said.append)
    steps.note(accelerator, [False, True, True], 6, said.append)
    assert steps.count == 4 and len(said) == 4
    noted = [json.loads(line) for line in (tmp_path / "nonfinite_steps.jsonl").read_text().splitlines()]
    assert noted[-1] == {"step": 6, "images": ["6.jpg"]}
    with pytest.raises(FloatingPointError, match=r"3 optimizer steps in a row, up to step 7 .*lower learning rate"):
        steps.note(accelerator, [True], 7, said.append)
