"""Rows 5, 6, 12 and 24: signals to any process, launchers that are killed, one process of two that dies or hangs."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from faults.conftest import SCRIPTS
from faults.harness import FAULTS, LAST_BREATH_S, POLL_S, TIMEOUT_S, Job, check_exact, living_processes

SLOWER = ("slow", {"seconds": 0.02})
LATEST_SIGNAL = 20  # step; ten more are left to notice it
NEVER_BY_CLOCK = "--save_minutes 0"


def newest_step(job: Job) -> int:
    return json.loads((job.experiment / "last_checkpoint" / "state.json").read_text())["step"]


def check_stopped(job: Job, reason: str, printed: str, asked_at: int) -> None:
    """A stopped run says so, and has saved the very last step it made."""
    step = newest_step(job)
    assert f"stopped         by {reason} at step {step}; the same command" in printed, printed
    # The row of an epoch's last step waits for the evaluation that the signal cut short.
    assert asked_at <= step and job.last_step() in (step, step - 1), (asked_at, step, job.last_step())


def cases() -> list:
    signals = ("SIGTERM", "SIGINT", "SIGUSR1")
    alone = [("pretrain_mae", 1, "all", name) for name in signals]
    pairs = [("pretrain_mae", 2, "all", name) for name in signals] + [("pretrain_mae", 2, "second", "SIGTERM")]
    others = [(script, 1, "all", "SIGTERM") for script in SCRIPTS[1:]]
    return alone + pairs + others + [(script, 2, "second", "SIGTERM") for script in SCRIPTS[1:]]


QUICK = {
    ("pretrain_mae", 1, "all", "SIGINT"),
    ("pretrain_mae", 2, "second", "SIGTERM"),
    ("finetune_classifier", 1, "all", "SIGTERM"),
}


@pytest.mark.parametrize(("script", "num_processes", "whom", "name"), cases())
def test_signal_saves_at_once_and_the_run_goes_on_exactly(
    script, num_processes, whom, name, job, undisturbed, faults, full, tmp_path
):
    if (script, num_processes, whom, name) not in QUICK and not full:
        pytest.skip("with --full")
    who = "every process, workers too" if whom == "all" else "the second process"
    with faults(5, f"{name} to {who}, {script}, {num_processes} process(es)") as count:
        for seed in range(20 if full else 2):
            rng = random.Random(seed)
            asked = job(script, tmp_path / str(seed), num_processes).with_flags(NEVER_BY_CLOCK)
            run = asked.start(SLOWER)
            step = rng.randint(1, LATEST_SIGNAL)
            assert run.until(lambda asked=asked, step=step: asked.last_step() >= step), run.printed()
            time.sleep(rng.uniform(0, 0.02))
            number = signal.Signals[name]
            run.signal(number) if whom == "all" else os.kill(max(run.ranks()), number)
            count.injected += 1
            assert run.wait() == 0, (seed, run.printed())
            reason = "a signal at another process" if whom == "second" else name
            check_stopped(asked, reason, run.printed(), asked_at=step)
            asked.finish()
            check_exact(asked.experiment, undisturbed(script, num_processes))
            count.survived += 1


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("call", [1, 2])  # the second comes after an evaluation
def test_signal_within_the_online_view_saves_at_once(call, num_processes, job, faults, tmp_path):
    whole = job("pretrain_mae", tmp_path / "whole", num_processes).with_flags(f"--probe_every 1 {NEVER_BY_CLOCK}")
    whole.finish()
    with faults(5, f"SIGTERM within the nearest neighbours' vote, pretrain_mae, {num_processes} process(es)") as count:
        asked, count.injected = whole.inside(tmp_path / "asked"), 1
        run = asked.start(("stop_within", {"script": "pretrain_mae", "function": "probe", "call": call}))
        assert run.wait() == 0, run.printed()
        check_stopped(asked, "SIGTERM", run.printed(), asked_at=10 * call)
        assert (newest_step(asked), asked.last_step()) == (10 * call, 10 * call - 1)
        asked.finish()
        check_exact(asked.experiment, whole.experiment)
        count.survived = 1


# ------------------------------------------------------------------------------------------------ the real launcher


class Launched:
    """A job under `accelerate launch`, in a session of its own."""

    def __init__(self, job: Job, *faults: tuple[str, dict]):
        job.work.mkdir(parents=True, exist_ok=True)
        self.job, self.request = job, job.work / "request.json"
        self.request.write_text(json.dumps({"script": job.script, "arguments": job.arguments(), "faults": faults}))
        several = ["--multi_gpu"] if job.num_processes > 1 else []
        command = [sys.executable, "-m", "accelerate.commands.launch", *several]
        command += ["--num_processes", str(job.num_processes), "--num_machines", "1", "--mixed_precision", "no"]
        command += ["--dynamo_backend", "no", "--main_process_port", "0", str(FAULTS / "zygote.py"), str(self.request)]
        self.output = (job.work / "output.txt").open("w")
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, stdout=self.output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )

    def printed(self) -> str:
        return Path(self.output.name).read_text(errors="replace")

    def until_step(self, step: int) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while self.job.last_step() < step:
            assert self.process.poll() is None and time.monotonic() < deadline, self.printed()
            time.sleep(POLL_S)

    def processes(self, *, launched: bool = False) -> list[int]:
        """Give all that live of it, whoever their parent is: the launcher starts each in its group or session.

        Or only those that it has `launched`, not itself and what it has just forked.
        """
        found = []
        for pid, _, _ in living_processes():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_text()
                if str(self.request) in command and not (launched and "accelerate.commands.launch" in command):
                    found.append(pid)
            except OSError:  # it has just ended
                continue
        return found

    def wait_until_all_ended(self) -> None:
        deadline = time.monotonic() + LAST_BREATH_S
        try:
            while left := self.processes():
                assert time.monotonic() < deadline, f"{left} live on:\n{self.printed()}"
                time.sleep(POLL_S)
        finally:
            for pid in self.processes():
                os.kill(pid, signal.SIGKILL)
            self.process.wait(TIMEOUT_S)
            self.output.close()


@pytest.mark.parametrize(
    ("row", "name", "num_processes"),
    [(5, "SIGTERM", 1), (5, "SIGTERM", 2), (5, "SIGUSR1", 2), (6, "SIGKILL", 1), (6, "SIGKILL", 2)],
)
def test_run_outlives_its_launcher_only_to_save(row, name, num_processes, job, undisturbed, faults, full, tmp_path):
    if (name, num_processes) not in (("SIGTERM", 2), ("SIGKILL", 1)) and not full:
        pytest.skip("with --full")
    trials = {5: 20, 6: 5}[row] if full else 1
    with faults(row, f"{name} to accelerate launch, pretrain_mae, {num_processes} process(es)") as count:
        for seed in range(trials):
            asked = job("pretrain_mae", tmp_path / str(seed), num_processes).with_flags(NEVER_BY_CLOCK)
            launched = Launched(asked, SLOWER)
            step = random.Random(seed).randint(1, LATEST_SIGNAL - 5)
            launched.until_step(step)
            os.kill(launched.process.pid, signal.Signals[name])
            count.injected += 1
            launched.wait_until_all_ended()
            check_stopped(asked, "SIGTERM", launched.printed(), asked_at=step)
            asked.finish()
            check_exact(asked.experiment, undisturbed("pretrain_mae", num_processes))
            count.survived += 1


# ------------------------------------------------------------------------------------------------ one of two


@pytest.mark.parametrize("fault", ["die", "hang"])
def test_process_that_dies_or_hangs_ends_the_job(fault, job, undisturbed, faults, full, tmp_path):
    """Under a watch like the launcher's, which ends the others of one that failed."""
    with faults(12, f"the second of two processes {fault}s, pretrain_mae") as count:
        for number in range(5 if full else 1):
            hurt = job("pretrain_mae", tmp_path / str(number), 2).with_flags("--timeout_minutes 0.1 --save_minutes 0")
            hurt.fail(("save_at", {"steps": [4]}), (fault, {"rank": 1, "step": 7 + number}))
            count.injected += 1
            assert newest_step(hurt) == 4
            hurt.with_flags("--timeout_minutes 30").finish()
            check_exact(hurt.experiment, undisturbed("pretrain_mae", 2))
            count.survived += 1


def test_launcher_ends_when_one_of_its_processes_dies(job, undisturbed, faults, full, tmp_path):
    if not full:
        pytest.skip("with --full")
    with faults(12, "the second process dies under accelerate launch, pretrain_mae") as count:
        for number in range(5):
            hurt = job("pretrain_mae", tmp_path / str(number), 2).with_flags(NEVER_BY_CLOCK)
            launched = Launched(hurt, ("save_at", {"steps": [4]}), ("die", {"rank": 1, "step": 7 + number}))
            count.injected += 1
            assert launched.process.wait(TIMEOUT_S) != 0
            launched.wait_until_all_ended()
            hurt.finish()
            check_exact(hurt.experiment, undisturbed("pretrain_mae", 2))
            count.survived += 1


@pytest.mark.parametrize(("script", "num_processes"), [("pretrain_mae", 2), ("finetune_segmentation", 1)])
def test_data_worker_that_hangs_as_it_is_forked_is_replaced(script, num_processes, job, undisturbed, faults, tmp_path):
    rank = num_processes - 1
    with faults(12, f"data workers hang at their fork, {script}, {num_processes} process(es)") as count:
        hurt = job(script, tmp_path / "some", num_processes).with_flags("--save_minutes 0")
        count.injected += 3  # of the training loader and of an evaluation's
        printed = hurt.finish(("hang_forks", {"rank": rank, "forks": [1, 2, 4], "patience_s": 1}))
        assert printed.count("a data worker that did not start in 1 s is replaced") == 3, printed
        check_exact(hurt.experiment, undisturbed(script, num_processes))
        count.survived += 3


def test_run_whose_data_workers_never_start_says_so(job, faults, tmp_path):
    with faults(12, "every data worker hangs at its fork, finetune_classifier") as count:
        count.injected += 1
        hurt = job("finetune_classifier", tmp_path)
        printed = hurt.fail(("hang_forks", {"rank": 0, "forks": [1, 2, 3, 4, 5], "patience_s": 0.2}))
        assert "RuntimeError: a data worker did not start in 0.2 s, 5 times in a row; try --num_workers 0" in printed
        count.survived += 1


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("script", SCRIPTS)
def test_run_whose_launcher_dies_while_it_imports_never_begins(script, num_processes, job, faults, full, tmp_path):
    if script != "pretrain_mae" and not full:
        pytest.skip("with --full")
    with faults(24, f"accelerate launch is killed during imports, {script}, {num_processes} process(es)") as count:
        for number in range(5 if full else 1):
            asked = job(script, tmp_path / str(number), num_processes)
            launched = Launched(asked)
            deadline = time.monotonic() + TIMEOUT_S
            while len(launched.processes(launched=True)) < num_processes:
                assert launched.process.poll() is None and time.monotonic() < deadline, launched.printed()
                time.sleep(POLL_S)
            os.kill(launched.process.pid, signal.SIGKILL)
            count.injected += 1
            launched.wait_until_all_ended()
            said = launched.printed().count("RuntimeError: the launcher has ended while this process started")
            assert said == num_processes and not asked.experiment.exists(), launched.printed()
            count.survived += 1
