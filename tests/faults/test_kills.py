"""Row 1 and 20: runs that are killed at random moments and started again with the same command end exact."""

import random
import time
from pathlib import Path

import pytest

from faults.conftest import NUM_STEPS, SAVE_OFTEN
from faults.harness import Job, check_exact

SLOWER = ("slow", {"seconds": 0.01})
PLANS = {  # (script, processes): runs and kills of each, quick (None: not at all) and full
    ("pretrain_mae", 1): ((3, 2), (50, 3)),
    ("pretrain_mae", 2): ((1, 2), (20, 2)),
    ("finetune_classifier", 1): ((1, 2), (20, 2)),
    ("finetune_classifier", 2): (None, (20, 2)),
    ("finetune_segmentation", 1): ((1, 2), (20, 2)),
    ("finetune_segmentation", 2): (None, (20, 2)),
}


def kill_once(job: Job, step: int, start_s: float, delay_s: float) -> bool:
    """Start and kill with all workers after a step, a time, and a moment more; False when it was through already."""
    run = job.start(SLOWER)
    run.until(lambda: job.last_step() >= step and time.monotonic() - run.started > start_s)
    time.sleep(delay_s)
    return run.kill()


def kill_and_finish(job: Job, rng: random.Random, kills: int) -> int:
    """Kill a run so many times, each time in a later stretch of it, then let it finish; give how often it died."""
    died = 0
    for number in range(kills):
        stretch = NUM_STEPS // kills
        step = min(number * stretch + rng.randrange(stretch), NUM_STEPS - 2)
        died += kill_once(job, step, start_s=rng.uniform(0, 0.6), delay_s=rng.uniform(0, 0.03))
    job.finish()
    return died


@pytest.mark.parametrize(("script", "num_processes"), PLANS)
def test_killed_run_ends_exactly_as_the_undisturbed_one(
    script, num_processes, job, undisturbed, faults, full, tmp_path: Path
):
    if PLANS[script, num_processes][full] is None:
        pytest.skip("with --full")
    runs, kills = PLANS[script, num_processes][full]
    whole = undisturbed(script, num_processes)
    with faults(1, f"kill -9 of the whole tree, {script}, {num_processes} process(es), {runs} runs") as count:
        for seed in range(runs):
            killed = job(script, tmp_path / str(seed), num_processes).with_flags(SAVE_OFTEN)
            died = kill_and_finish(killed, random.Random(seed), kills)
            print(f"seed {seed}: killed {died} times")
            count.injected += died
            check_exact(killed.experiment, whole)
            count.survived += died
        assert count.injected >= runs * kills * 0.9
