"""Rows 25 and 26: data workers that are stopped, and readers of the output that leave."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from faults.conftest import SCRIPTS
from faults.harness import POLL_S, Job, Run, check_exact, living_processes
from faults.test_preemption import NEVER_BY_CLOCK, SLOWER, check_stopped, newest_step

QUICK = {("pretrain_mae", 1), ("finetune_classifier", 2)}
SETTLED_S = 1.0  # after a worker is stopped, until the batches are used up that it has made


def stop_worker(run: Run, num_processes: int) -> int:
    """Stop a data worker of the last process that trains, and give its process."""
    trainer = max(run.ranks()) if num_processes > 1 else run.pid
    workers = []
    while not workers:  # between an evaluation and the next epoch there may be none
        workers = [pid for pid, parent, group in living_processes() if group == run.pid and parent == trainer]
    os.kill(workers[0], signal.SIGSTOP)
    return workers[0]


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("script", SCRIPTS)
def test_stopped_worker_is_an_error_that_names_it_and_the_state_is_saved(
    script, num_processes, job, undisturbed, faults, full, tmp_path
):
    if (script, num_processes) not in QUICK and not full:
        pytest.skip("with --full")
    with faults(25, f"a data worker is stopped, {script}, {num_processes} process(es)") as count:
        for number in range(5 if full else 1):
            hurt = job(script, tmp_path / str(number), num_processes).with_flags(NEVER_BY_CLOCK)
            run = hurt.with_flags("--timeout_minutes 0.05").start(SLOWER)
            assert run.until(lambda hurt=hurt, step=3 + 5 * number: hurt.last_step() >= step), run.printed()
            worker = stop_worker(run, num_processes)
            count.injected += 1
            assert run.wait() == 1, run.printed()
            words = f"DataTimeoutError: process {num_processes - 1}: no batch came for 0.05 minutes: data worker 0"
            assert f"{words} (process {worker}, stopped) " in run.printed(), run.printed()
            step = newest_step(hurt)
            assert f"(--timeout_minutes). The run is at step {step}; --resume_from" in run.printed(), run.printed()
            assert hurt.last_step() in (step, step - 1)
            hurt.finish()
            check_exact(hurt.experiment, undisturbed(script, num_processes))
            count.survived += 1


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("script", SCRIPTS)
def test_signal_ends_the_wait_for_a_stopped_worker(script, num_processes, job, undisturbed, faults, full, tmp_path):
    if (script, num_processes) not in QUICK and not full:
        pytest.skip("with --full")
    with faults(25, f"SIGTERM while data does not come, {script}, {num_processes} process(es)") as count:
        for number in range(5 if full else 1):
            hurt = job(script, tmp_path / str(number), num_processes).with_flags(NEVER_BY_CLOCK)
            run = hurt.start(SLOWER)
            step = 3 + 5 * number
            assert run.until(lambda hurt=hurt, step=step: hurt.last_step() >= step), run.printed()
            stop_worker(run, num_processes)
            time.sleep(SETTLED_S)
            run.signal(signal.SIGTERM)
            count.injected += 1
            assert run.wait(60) == 0, run.printed()
            check_stopped(hurt, "SIGTERM", run.printed(), asked_at=step)
            hurt.finish()
            check_exact(hurt.experiment, undisturbed(script, num_processes))
            count.survived += 1


# ------------------------------------------------------------------------------------------------ nobody reads


def start_with_reader(job: Job, pipe: Path, *faults: tuple[str, dict], **options: str) -> tuple[Run, int]:
    """Start a run whose output goes into a pipe, and give it with the pipe's other end."""
    job.work.mkdir(parents=True, exist_ok=True)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    more = dict(num_processes=job.num_processes, **options)
    run = job.zygote.start(job.script, job.arguments(), pipe, *faults, **more)
    run.output = Path(os.devnull)  # a pipe is read once
    return run, reader


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("script", SCRIPTS)
def test_run_goes_on_when_the_reader_of_its_output_leaves(
    script, num_processes, job, undisturbed, faults, full, tmp_path
):
    if (script, num_processes) not in QUICK and not full:
        pytest.skip("with --full")
    with faults(26, f"the reader of the output leaves, {script}, {num_processes} process(es)") as count:
        for number in range(3 if full else 1):
            left = job(script, tmp_path / str(number), num_processes)
            run, reader = start_with_reader(left, tmp_path / f"pipe_{number}")
            said = b""
            while b"\n" not in said:
                with contextlib.suppress(BlockingIOError):
                    said += os.read(reader, 1000)
                assert not run.ended(), said
                time.sleep(POLL_S)
            os.close(reader)
            count.injected += 1
            assert run.wait() == 0
            check_exact(left.experiment, undisturbed(script, num_processes))
            count.survived += 1


def test_run_goes_on_when_its_output_is_on_a_full_disk(job, undisturbed, faults, tmp_path):
    with faults(26, "the output goes to a full disk, pretrain_mae") as count:
        full_disk = job("pretrain_mae", tmp_path)
        full_disk.work.mkdir(exist_ok=True)
        run = full_disk.zygote.start("pretrain_mae", full_disk.arguments(), Path("/dev/full"))
        count.injected += 1
        run.output = Path(os.devnull)
        assert run.wait() == 0
        check_exact(full_disk.experiment, undisturbed("pretrain_mae"))
        count.survived += 1


@pytest.mark.parametrize(("script", "num_processes"), [("pretrain_mae", 2), ("finetune_segmentation", 1)])
def test_terminal_that_closes_saves_and_stops_the_run(script, num_processes, job, undisturbed, faults, tmp_path):
    """The shell sends SIGHUP, and nothing can be printed any more."""
    with faults(26, f"the terminal closes, {script}, {num_processes} process(es)") as count:
        left = job(script, tmp_path / "work", num_processes).with_flags(NEVER_BY_CLOCK)
        run, reader = start_with_reader(left, tmp_path / "pipe", SLOWER)
        assert run.until(lambda: left.last_step() >= 5)
        os.close(reader)
        run.signal(signal.SIGHUP)
        count.injected += 1
        assert run.wait() == 0
        assert newest_step(left) >= 5 and not (left.experiment / "DONE").exists()
        left.finish()
        check_exact(left.experiment, undisturbed(script, num_processes))
        count.survived += 1
