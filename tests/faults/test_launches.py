"""Rows 15 and 18: Weights & Biases that is not there or dies, two runs in one folder, processes that see no others."""

import time

import pytest

from faults.harness import check_exact, free_port

KEY = "0" * 40  # as long as W&B's keys are


@pytest.mark.parametrize("trouble", ["unreachable", "no key", "dies in mid-run"])
def test_run_needs_nothing_of_wandb(trouble, job, undisturbed, faults, full, tmp_path):
    pytest.importorskip("wandb")
    run = job("pretrain_mae", tmp_path).with_flags("--log_wandb --save_minutes 0")
    environment = {"WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}", "HOME": str(tmp_path)}
    injected = [] if full else [("set_wandb_timeout", {"seconds": 3})]
    if trouble == "unreachable":
        environment["WANDB_API_KEY"] = KEY
    if trouble == "dies in mid-run":
        environment["WANDB_MODE"] = "offline"
        injected += [("end_wandb", {"step": 12}), ("slow", {"seconds": 0.02})]
    with faults(15, f"W&B: {trouble}, pretrain_mae") as count:
        count.injected += 1
        started = time.monotonic()
        printed = run.finish(*injected, **environment)
        count.note = f"{time.monotonic() - started:.0f} s in all"
        check_exact(run.experiment, undisturbed("pretrain_mae"))
        expected = {
            "unreachable": "W&B failed (CommError",
            "no key": "no API key found, so W&B runs offline",
            "dies in mid-run": "W&B's process is killed",
        }
        assert expected[trouble] in printed, printed
        assert list((run.experiment / "wandb").glob("offline-run-*/run-*.wandb"))
        count.survived += 1


def test_second_run_in_a_folder_is_refused_and_the_first_not_disturbed(job, undisturbed, faults, tmp_path):
    first = job("pretrain_mae", tmp_path / "work").with_flags("--save_minutes 0")
    with faults(18, "two runs in one folder, pretrain_mae") as count:
        running = first.start(("slow", {"seconds": 0.2}))
        assert running.until(lambda: first.last_step() >= 1)
        count.injected += 1
        # Another starts the same command, and writes what it prints elsewhere.
        second = job("pretrain_mae", tmp_path / "other").with_flags("--save_minutes 0")
        printed = second.fail(more=f"--resume_from_checkpoint latest --working_directory {first.work}")
        assert "another run is training in" in printed
        assert running.wait() == 0, running.printed()
        check_exact(first.experiment, undisturbed("pretrain_mae"))
        count.survived += 1


def test_processes_that_would_train_alone_do_not_start(job, faults, tmp_path):
    """As on a machine whose GPUs the driver has lost: every process believes that it is the only one."""
    with faults(18, "a world of two in which each sees itself alone, pretrain_mae") as count:
        count.injected += 1
        blind = job("pretrain_mae", tmp_path, 2)
        printed = blind.fail(ACCELERATE_USE_CPU="false", CUDA_VISIBLE_DEVICES="")
        assert "the launcher started 2 processes, but this one sees 1" in printed
        assert not list(tmp_path.rglob("checkpoint_*"))
        count.survived += 1
