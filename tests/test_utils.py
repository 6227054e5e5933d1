"""The shared verbs: golden values, oracles, hand-made folders, and the texts of errors."""

import argparse
import copy
import errno
import functools
import json
import math
import os
import platform
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchmetrics
from accelerate import Accelerator
from conftest import ROOT, TINY
from safetensors.torch import load_file
from timm.scheduler import CosineLRScheduler

import utils
from model import ViTMAEForPreTraining
from storage.files import checksum_of
from training import process, records, signals
from training.checkpoints import (
    Checkpoints,
    check_weights,
    find_checkpoint,
    find_checkpoints,
    find_damage,
    lock_experiment,
    resume,
    tidy,
    write_args,
)
from training.process import cap_workers
from training.records import BadFiles, RunLog, SkippedSteps, StepClock, build_bar
from training.run import open_experiment, start_records
from training.signals import GO_ON, SAVE, STOP, Interruptions
from utils import (
    ConfusionMatrix,
    accuracy,
    cosine_lr,
    describe_class,
    draw_rows,
    knn_classify,
    nan_guard,
    poly_lr,
    reconstruction_titles,
    scaled_lr,
    set_learning_rate,
    skip_nonfinite,
)

# -------------------------------------------------------------------------------- optimisation


@pytest.mark.parametrize(("step", "expected"), [(0, 0.0), (20, 1.2e-3), (40, 2.4e-3), (420, 1.2e-3), (800, 0.0)])
def test_cosine_lr_golden_values(step, expected):
    assert cosine_lr(step, peak=2.4e-3, warmup_steps=40, total_steps=800) == pytest.approx(expected, abs=1e-12)


def test_cosine_lr_equals_timm():
    peak, warmup, total, minimum = 2.4e-3, 7, 50, 1e-6
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    oracle = CosineLRScheduler(
        optimizer, t_initial=total - warmup, lr_min=minimum, warmup_t=warmup, warmup_prefix=True, t_in_epochs=False
    )
    for step in range(total + 5):
        oracle.step_update(step)
        ours = cosine_lr(step, peak=peak, warmup_steps=warmup, total_steps=total, minimum=minimum)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-15)


def test_cosine_lr_without_warmup_starts_at_the_peak():
    assert cosine_lr(0, peak=1.0, warmup_steps=0, total_steps=10) == 1.0


def test_poly_lr_of_the_published_schedule():
    rate = functools.partial(poly_lr, peak=1e-4, warmup_steps=1500, total_steps=160_000)
    assert rate(0) == pytest.approx(1e-10) and rate(750) == pytest.approx(0.5e-4, rel=1e-5) and rate(1500) == 1e-4
    assert rate(80_750) == pytest.approx(0.5e-4) and rate(160_000) == 0.0 == rate(170_000)


@pytest.mark.parametrize(("batch", "expected"), [(2048, 1.2e-3), (4096, 2.4e-3)])
def test_scaled_lr_of_the_given_commands(batch, expected):
    assert scaled_lr(1.5e-4, batch) == pytest.approx(expected)


def test_set_learning_rate_multiplies_the_scale_of_a_group():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1], "lr_scale": 0.5}, {"params": parameters[1:]}], lr=1.0)
    set_learning_rate(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


# -------------------------------------------------------------------------------- run set-up


def test_cap_workers_shares_the_cores(monkeypatch):
    monkeypatch.setattr(process.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert cap_workers(32) == 8 and cap_workers(3) == 3 and cap_workers(0) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cap_workers(32) == 2


def run_flags(folder, **changes):
    flags = {"working_directory": str(folder), "experiment_name": "run", "epochs": 10, "resume_from_checkpoint": None}
    return argparse.Namespace(**{**flags, **changes})


def add_checkpoint(folder, epoch, step=None, **state):
    """Write a checkpoint of nothing but its records, whole."""
    checkpoint = folder / "run" / (f"checkpoint_{epoch}" + (f"_step_{step}" if step else ""))
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "state.json").write_text(json.dumps({"epoch": epoch, "step": step or 10 * epoch, **state}))
    files = {f.name: {"bytes": f.stat().st_size, "crc32": checksum_of(f)} for f in checkpoint.iterdir()}
    (checkpoint / "manifest.json").write_text(json.dumps({"files": files}))
    return checkpoint


def test_open_experiment_refuses_to_train_over_checkpoints(tmp_path):
    accelerator, latest = Accelerator(cpu=True), run_flags(tmp_path, resume_from_checkpoint="latest")
    fresh = (tmp_path / "run", None, [])
    assert open_experiment(accelerator, run_flags(tmp_path)) == open_experiment(accelerator, latest) == fresh
    third = add_checkpoint(tmp_path, 3)
    with pytest.raises(FileExistsError, match=r"--resume_from_checkpoint latest.*another --experiment_name"):
        open_experiment(accelerator, run_flags(tmp_path))
    assert open_experiment(accelerator, latest) == (tmp_path / "run", third, [])
    within = add_checkpoint(tmp_path, 3, step=35)
    with pytest.raises(FileExistsError, match=r"would train over .*checkpoint_3_step_35.*another --experiment_name"):
        open_experiment(accelerator, run_flags(tmp_path, resume_from_checkpoint="checkpoint_3"))
    assert open_experiment(accelerator, latest).resume_from == within
    elsewhere = run_flags(tmp_path, resume_from_checkpoint=str(third), experiment_name="branch")
    assert open_experiment(accelerator, elsewhere) == (tmp_path / "branch", third, [])


def test_open_experiment_refuses_a_checkpoint_beyond_the_last_epoch(tmp_path):
    add_checkpoint(tmp_path, 12)
    with pytest.raises(ValueError, match="has 12 epochs behind it, more than --epochs 10"):
        open_experiment(Accelerator(cpu=True), run_flags(tmp_path, resume_from_checkpoint="latest"))


def test_last_checkpoint_is_the_newest_again_after_a_kill_in_between(tmp_path):
    accelerator, latest = Accelerator(cpu=True), run_flags(tmp_path, resume_from_checkpoint="latest")
    third, fourth = add_checkpoint(tmp_path, 3), add_checkpoint(tmp_path, 4)
    (tmp_path / "run" / "last_checkpoint").symlink_to(third.name)
    latest.log_wandb = False
    start_records(accelerator, open_experiment(accelerator, latest), latest, 40).close()
    assert (tmp_path / "run" / "last_checkpoint").resolve() == fourth


def test_damaged_checkpoints_are_passed_over_and_never_all_of_them(tmp_path):
    accelerator, latest = Accelerator(cpu=True), run_flags(tmp_path, resume_from_checkpoint="latest")
    third, within, fourth = add_checkpoint(tmp_path, 3), add_checkpoint(tmp_path, 3, 35), add_checkpoint(tmp_path, 4)
    (fourth / "config.json").write_text("[]")  # as long as before
    (within / "state.json").unlink()
    assert open_experiment(accelerator, latest) == (tmp_path / "run", third, [fourth, within])
    with pytest.raises(ValueError, match=r"checkpoint_4 is damaged: config.json has another content.*'latest'"):
        open_experiment(accelerator, run_flags(tmp_path, resume_from_checkpoint="checkpoint_4"))
    (third / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"(?s)every checkpoint in .* is damaged.*checkpoint_3: manifest.json cannot"):
        open_experiment(accelerator, latest)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"files": {"../outside": {"bytes": 2, "crc32": "00000000"}}}, "names '../outside', which is not inside"),
        ({"files": {"/etc/passwd": {"bytes": 2, "crc32": "00000000"}}}, "names '/etc/passwd', which is not inside"),
        ({"files": {}}, "does not name config.json, state.json"),
        ({"files": {"config.json": 3}}, "cannot be read"),
        ({"files": ["config.json"]}, "cannot be read"),
        ([], "cannot be read"),
    ],
)
def test_manifest_that_is_wrong_is_damage(tmp_path, manifest, message):
    checkpoint = add_checkpoint(tmp_path, 3)
    assert find_damage(checkpoint) is None
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert message in find_damage(checkpoint)


def test_checkpoints_are_ordered_by_epoch_and_step(tmp_path):
    steps = [(12, None), (3, None), (3, 35), (2, 29), (0, 4)]
    for epoch, step in steps:
        add_checkpoint(tmp_path, epoch, step)
    for name in ("checkpoint_99.tmp", "checkpoint_99_1.damaged", "best_checkpoint"):  # none of them
        (tmp_path / "run" / name).mkdir()
    (tmp_path / "run" / "last_checkpoint").symlink_to("checkpoint_12")
    assert [folder.name for folder in find_checkpoints(tmp_path / "run")] == [
        "checkpoint_0_step_4", "checkpoint_2_step_29", "checkpoint_3", "checkpoint_3_step_35", "checkpoint_12",
    ]  # fmt: skip


def test_find_checkpoint_takes_a_name_a_folder_and_the_link(tmp_path):
    third, twelfth = add_checkpoint(tmp_path, 3), add_checkpoint(tmp_path, 12)
    (tmp_path / "run" / "last_checkpoint").symlink_to("checkpoint_12")
    assert find_checkpoint(tmp_path / "run", "checkpoint_3") == third
    assert find_checkpoint(tmp_path / "run", "last_checkpoint") == twelfth
    assert find_checkpoint(tmp_path / "elsewhere", str(third)) == third
    with pytest.raises(FileNotFoundError, match=r"checkpoint_4: no checkpoint.*checkpoint_3, checkpoint_12"):
        find_checkpoint(tmp_path / "run", "checkpoint_4")


def try_lock(experiment) -> str:
    """Try to hold an experiment's folder from another process."""
    code = (
        "from pathlib import Path; from training import checkpoints; "
        f"checkpoints.lock_experiment(Path({str(experiment)!r})); print('held')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_lock_lets_one_run_into_an_experiment_and_goes_with_its_process(tmp_path):
    lock = lock_experiment(tmp_path / "run")
    assert "BlockingIOError: another run is training in" in try_lock(tmp_path / "run")
    lock.close()
    # A data worker that outlives its killed run has what it inherited still open, and must not keep the next one out.
    code = f"""
import os, signal, time
from pathlib import Path
from training import checkpoints
lock = checkpoints.lock_experiment(Path({str(tmp_path / "run")!r}))
worker = os.fork()
if worker == 0:
    time.sleep(60)
print(worker, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as killed:
        worker = int(killed.stdout.readline())
        killed.wait()
        try:
            os.kill(worker, 0)  # it lives
            assert "held" in try_lock(tmp_path / "run")
        finally:
            os.kill(worker, signal.SIGKILL)


def test_write_args_keeps_the_first_file_and_names_what_changed(tmp_path):
    checkpoint = tmp_path / "checkpoint_3"
    assert write_args(tmp_path, run_flags(tmp_path, seed=1), None) == []
    assert write_args(tmp_path, run_flags(tmp_path, seed=2), checkpoint) == ["--seed 2 (was 1)"]
    assert json.loads((tmp_path / "args.json").read_text())["seed"] == 1
    assert json.loads((tmp_path / "args_from_checkpoint_3.json").read_text())["seed"] == 2
    write_args(tmp_path, run_flags(tmp_path, seed=4), checkpoint)  # a second resume from there
    assert json.loads((tmp_path / "args_from_checkpoint_3_1.json").read_text())["seed"] == 2
    write_args(tmp_path, run_flags(tmp_path, seed=3), None)
    assert json.loads((tmp_path / "args_1.json").read_text())["seed"] == 1


def test_accumulation_set_by_the_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(RuntimeError, match="sets 2 gradient accumulation steps, this script 1"):
        process.build_accelerator(1)


def test_world_of_separate_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = argparse.Namespace(num_processes=1, gradient_accumulation_steps=1)
    monkeypatch.setattr(process, "Accelerator", lambda **_: alone)
    with pytest.raises(RuntimeError, match="ACCELERATE_USE_CPU=true"):
        process.build_accelerator(1)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc is left as it is")
@pytest.mark.parametrize(("environment", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_freed_memory_is_kept_on_the_cpu_unless_the_environment_chooses(environment, kept):
    """A tensor of 64 MB, freed and made again and again: in the end without a page fault where memory is kept."""
    script = (
        "import resource, torch\n"
        "from training import process\n"
        "process.build_accelerator(1)\n"
        "for _ in range(30):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.zeros(1 << 24)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    ours = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_")
    outer = {name: value for name, value in os.environ.items() if name not in ours} | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=outer | environment, capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) < 16) == kept


# -------------------------------------------------------------------------------- checkpoints


def test_checkpoint_with_weights_that_are_not_finite_is_not_written(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(ViTMAEForPreTraining(TINY))
    checkpoints = Checkpoints(accelerator, tmp_path, 2)
    assert checkpoints.save(model, {"a": 1}, {"epoch": 1, "step": 5}, epoch_ends=True)
    assert json.loads((tmp_path / "checkpoint_1" / "config.json").read_text()) == {"a": 1}
    assert find_damage(tmp_path / "checkpoint_1") is None
    assert len({file.stat().st_mode for file in (tmp_path / "checkpoint_1").iterdir()}) == 1  # alike for all readers
    with torch.no_grad():
        model.decoder_pred.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"not finite at step 9, and not saved\. Go on from .*checkpoint_1"):
        checkpoints.save(model, {"a": 1}, {"epoch": 2, "step": 9}, epoch_ends=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint_1", "last_checkpoint"]


def test_running_statistics_that_are_not_finite_are_not_saved(tmp_path):
    accelerator, model = Accelerator(cpu=True), torch.nn.BatchNorm1d(2)
    check_weights(accelerator, model, tmp_path, 1)
    model.running_var[1] = math.inf
    with pytest.raises(FloatingPointError, match="no checkpoint: start again"):
        check_weights(accelerator, model, tmp_path, 1)


def test_newest_checkpoints_and_those_for_good_are_kept(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    checkpoints = Checkpoints(accelerator, tmp_path, 2)
    for epoch in range(1, 7):
        state = {"epoch": epoch, "step": 10 * epoch}
        checkpoints.save(model, {}, state, epoch_ends=epoch != 5, for_good=epoch == 2)
        assert (tmp_path / "last_checkpoint").resolve() == find_checkpoints(tmp_path)[-1]
    names = [folder.name for folder in find_checkpoints(tmp_path)]
    assert names == ["checkpoint_2", "checkpoint_5_step_50", "checkpoint_6"]
    assert len(list(tmp_path.iterdir())) == 4  # and the link, no litter


def test_save_that_fails_costs_nothing_but_itself_until_three_did(tmp_path, monkeypatch, capsys):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    checkpoints = Checkpoints(accelerator, tmp_path, 2)
    assert checkpoints.save(model, {}, {"epoch": 1, "step": 1}, epoch_ends=True)

    def full(*_):
        raise RuntimeError("unexpected pos 64 vs 0")  # torch's words for a full disk

    with monkeypatch.context() as patched:
        patched.setattr(accelerator, "save_state", full)
        for epoch in (2, 3):
            assert not checkpoints.save(model, {}, {"epoch": epoch, "step": epoch}, epoch_ends=True)
    assert "checkpoint_3 could not be written (RuntimeError: unexpected pos" in capsys.readouterr().out
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint_1", "last_checkpoint"]
    assert checkpoints.save(model, {}, {"epoch": 4, "step": 4}, epoch_ends=True)  # the space is back
    monkeypatch.setattr(accelerator, "save_state", full)
    for epoch in (5, 6):
        assert not checkpoints.save(model, {}, {"epoch": epoch, "step": epoch}, epoch_ends=True)
    with pytest.raises(OSError, match="3 saves in a row failed"):
        checkpoints.save(model, {}, {"epoch": 7, "step": 7}, epoch_ends=True)
    assert [folder.name for folder in find_checkpoints(tmp_path)] == ["checkpoint_1", "checkpoint_4"]


def test_save_wants_more_free_space_than_the_one_before_took(tmp_path, monkeypatch, capsys):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    checkpoints = Checkpoints(accelerator, tmp_path, 2)
    assert checkpoints.save(model, {}, {"epoch": 1, "step": 1}, epoch_ends=True)
    usage = argparse.Namespace(free=checkpoints.size)
    monkeypatch.setattr("training.checkpoints.shutil.disk_usage", lambda _: usage)
    assert not checkpoints.save(model, {}, {"epoch": 2, "step": 2}, epoch_ends=True)
    assert "GB are free" in capsys.readouterr().out


def test_state_of_the_same_step_is_not_written_twice(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    checkpoints = Checkpoints(accelerator, tmp_path, 2)
    state = {"epoch": 1, "step": 1}
    checkpoints.save(model, {}, state, epoch_ends=True)
    inode = (tmp_path / "checkpoint_1").stat().st_ino
    checkpoints.save(model, {}, state, epoch_ends=True)
    assert (tmp_path / "checkpoint_1").stat().st_ino == inode
    (tmp_path / "checkpoint_1" / "state.json").write_text("{}")
    checkpoints.save(model, {}, state, epoch_ends=True)
    assert find_damage(tmp_path / "checkpoint_1") is None
    assert (tmp_path / "checkpoint_1_1.damaged" / "state.json").read_text() == "{}"  # nothing is lost


def test_best_weights_take_the_place_of_older_ones_whenever_the_run_dies(tmp_path):
    accelerator = Accelerator(cpu=True)
    checkpoints, model = Checkpoints(accelerator, tmp_path, 2), torch.nn.Linear(2, 2)
    for value in (1.0, 2.0):
        torch.nn.init.constant_(model.weight, value)
        assert checkpoints.save_weights(model, "best_checkpoint", {})
        assert [entry.name for entry in tmp_path.iterdir()] == ["best_checkpoint"]
        assert load_file(tmp_path / "best_checkpoint" / "model.safetensors")["weight"].unique().item() == value
    (tmp_path / "best_checkpoint").rename(tmp_path / "best_checkpoint.old")  # as a kill between two renames leaves it
    (tmp_path / "best_checkpoint.tmp").mkdir()
    tidy(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["best_checkpoint"]


def test_best_weights_that_a_disk_refuses_leave_the_older_ones_and_are_reported(tmp_path, monkeypatch, capsys):
    checkpoints, model = Checkpoints(Accelerator(cpu=True), tmp_path, 2), torch.nn.Linear(2, 2)
    checkpoints.save_weights(model, "best_checkpoint", {"epoch": 1})
    written = (tmp_path / "best_checkpoint" / "model.safetensors").read_bytes()

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    torch.nn.init.zeros_(model.weight)
    with monkeypatch.context() as patch:
        patch.setattr("training.checkpoints.save_file", refuse)
        assert not checkpoints.save_weights(model, "best_checkpoint", {"epoch": 2})
    assert "best_checkpoint could not be written" in capsys.readouterr().out
    assert (tmp_path / "best_checkpoint" / "model.safetensors").read_bytes() == written
    assert checkpoints.save_weights(model, "best_checkpoint", {"epoch": 3})  # what was left half-written is no obstacle
    assert load_file(tmp_path / "best_checkpoint" / "model.safetensors")["weight"].count_nonzero() == 0


def test_resume_restores_what_was_saved_and_names_every_difference(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(ViTMAEForPreTraining(TINY))
    config, identity = {"config": {"depth": 3, "width": 8}, "image_mean": (0.5,)}, {"seed": 0}
    state = {**identity, "epoch": 2, "step": 7, "row": {}}
    Checkpoints(accelerator, tmp_path, 2).save(model, config, state, epoch_ends=True)
    saved = model.decoder_pred.bias.detach().clone()
    with torch.no_grad():
        model.decoder_pred.bias += 1
    assert resume(accelerator, tmp_path / "checkpoint_2", config, identity)["epoch"] == 2
    assert torch.equal(model.decoder_pred.bias, saved)
    config["config"]["depth"] = 4
    message = r"(?s)config\.depth: 3 in the checkpoint, 4 now.*seed: 0 in the checkpoint, 1 now"
    with pytest.raises(ValueError, match=message):
        resume(accelerator, tmp_path / "checkpoint_2", config, {"seed": 1})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", r"config\.json is no JSON"),
        ("config.json", b"[" * 100_000, r"config\.json is no JSON"),
        ("config.json", b"[]", r"config\.json holds a list"),
        ("state.json", b"\xff", r"state\.json is no JSON"),
        ("state.json", b'{"epoch": 1, "step": true}', r"state\.json does not hold an epoch and a step"),
        ("state.json", b'{"epoch": 1, "step": 1, "best": 5.0}', r"state\.json does not hold the row that waits"),
        ("state.json", b'{"epoch": 1, "step": 1, "row": {}}', r"state\.json does not hold .* the best figure"),
    ],
)
def test_resume_names_a_record_that_is_none(name, content, message, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "state.json").write_text('{"epoch": 1, "step": 1, "row": {}, "best": 5.0}')
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        resume(Accelerator(cpu=True), tmp_path, {}, {}, keeps_best=True)


# -------------------------------------------------------------------------------- interruptions


def test_signals_and_the_clock_ask_to_stop_and_to_save(tmp_path):
    accelerator = Accelerator(cpu=True)
    checkpoints = Checkpoints(accelerator, tmp_path, 2)
    handlers = [signal.getsignal(number) for number in signals.STOP_SIGNALS]
    interruptions = Interruptions(accelerator, checkpoints, save_minutes=1)
    assert interruptions.agree() == GO_ON
    checkpoints.saved_at -= 61
    assert interruptions.agree() == SAVE
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)  # passed on a second time: still one request
    assert interruptions.agree() == STOP and interruptions.name == "SIGUSR1"
    interruptions.close()
    assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] == handlers


def test_second_signal_ends_the_process_at_once(tmp_path):
    code = f"""
import os, signal, time
from pathlib import Path
from accelerate import Accelerator
from training import checkpoints, signals
accelerator = Accelerator(cpu=True)
interruptions = signals.Interruptions(accelerator, checkpoints.Checkpoints(accelerator, Path({str(tmp_path)!r}), 2), 0)
os.kill(os.getpid(), signal.SIGTERM)
interruptions.asked_at -= 2 * signals.ONE_REQUEST_S
print("asked", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(10)
print("still here")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("asked\n", -signal.SIGTERM)


# -------------------------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize("build", [functools.partial(torch.optim.AdamW, fused=True), torch.optim.SGD])
def test_step_with_a_gradient_that_is_not_finite_changes_nothing(build):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = build(model.parameters(), lr=0.1, weight_decay=0.1)
    twin = copy.deepcopy(model)
    twin_optimizer = build(twin.parameters(), lr=0.1, weight_decay=0.1)
    for step, poison in enumerate((1.0, math.nan, math.inf, 1.0)):
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        loss = model(inputs).square().mean() + (poison - 1)  # a constant, so that the gradient itself stays finite
        nan_guard(loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        assert skip_nonfinite(optimizer, norm).item() == (not math.isfinite(poison))
        optimizer.step()
        optimizer.zero_grad()
        if math.isfinite(poison):
            twin(inputs).square().mean().backward()
            twin_optimizer.step()
            twin_optimizer.zero_grad()
    for ours, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, expected)


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


# -------------------------------------------------------------------------------- logging


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


def test_missing_wandb_costs_a_message_and_nothing_else(tmp_path, monkeypatch, capsys):
    def refuse(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(records.importlib, "import_module", refuse)
    log = RunLog(tmp_path, enabled=True)
    log.start_wandb(argparse.Namespace(experiment_name="run", wandb_run_name=None))
    log.write({"step": 1})
    log.close()
    assert "wandb cannot be imported" in capsys.readouterr().out
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'


def test_wandb_that_breaks_in_mid_run_is_left_alone(tmp_path, capsys):
    class BrokenRun:
        def log(self, values):
            raise ConnectionError("the service went away")

    log = RunLog(tmp_path, enabled=True)
    log.wandb, log.wandb_run = argparse.Namespace(Error=RuntimeError), BrokenRun()
    log.write({"step": 1})
    log.write({"step": 2})
    assert capsys.readouterr().out.count("the service went away") == 1
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_bad_files_are_named_once_and_stop_above_the_limit(tmp_path):
    accelerator, said = Accelerator(cpu=True), []
    bad_files = BadFiles(tmp_path, num_images=200, max_fraction=0.01)
    bad_files.note([("a.jpg", "OSError: cut\noff"), ("a.jpg", "OSError: cut\noff")])
    assert bad_files.share(accelerator, said.append) == 1
    bad_files.note([("a.jpg", "OSError: cut\noff"), ("b\udcff.jpg", "ValueError")])
    assert bad_files.share(accelerator, said.append) == 2
    assert (tmp_path / "bad_files.txt").read_bytes() == b"a.jpg\tOSError: cut off\nb\xff.jpg\tValueError\n"
    assert len(said) == 2 and said[1].endswith("b?.jpg\tValueError")
    bad_files.note([("c.jpg", "ValueError")])
    with pytest.raises(ValueError, match=r"3 of 200 images cannot be decoded, more than --max_bad_fraction 0\.01"):
        bad_files.share(accelerator, said.append)


def test_bad_files_that_were_repaired_count_no_more(tmp_path):
    accelerator, said = Accelerator(cpu=True), []
    (tmp_path / "bad_files.txt").write_text("a.jpg\tOSError\nb.jpg\tOSError\nc.jpg\tOSError\n")
    bad_files = BadFiles(tmp_path, num_images=200, max_fraction=0.01)
    bad_files.note([("c.jpg", "OSError")])
    assert bad_files.share(accelerator, said.append) == 1 and not said


def test_step_clock_counts_images_and_waiting(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(records.time, "perf_counter", lambda: now[0])

    def loader():
        for _ in range(3):
            now[0] += 1.0  # a second to get a batch
            yield argparse.Namespace(images=torch.zeros(4, 1))

    clock = StepClock()
    for _ in clock.watch(loader()):
        now[0] += 3.0  # three to train on it
    figures = clock.read(num_processes=2)
    assert figures == {"images_per_second": pytest.approx(2.0), "data_wait_fraction": pytest.approx(0.25)}
    now[0] += 1.0
    assert clock.read(num_processes=2)["images_per_second"] == 0


def test_clock_says_once_what_to_do_when_the_loop_waits_for_data():
    said = []
    clock = StepClock(said.append)

    def read(waited_s, elapsed_s=10.0):
        clock.started -= elapsed_s
        clock.waited_s = waited_s
        clock.read(1)
        return len(said)

    assert read(9) == 0  # the workers start
    assert read(9) == 0 and read(1) == 0 and read(9) == 0  # not twice in a row
    assert read(5) == 1 and said[0].startswith("waiting for data takes 50% of the time: give more --num_workers")
    assert read(9) == 1 and read(9) == 1


# -------------------------------------------------------------------------------- pictures


def test_progress_bar_in_a_file_is_a_few_lines(capsys):
    bar = build_bar(Accelerator(cpu=True), 2000, 0)
    for step in range(2000):
        bar.update()
        bar.set_postfix_str(f"loss {step}", refresh=False)
    bar.close()
    lines = capsys.readouterr().err.split("\r")
    assert len(lines) < 5
    assert "2000/2000" in lines[-1] and "loss 1999" in lines[-1]


def test_draw_rows_shows_the_whole_title_over_a_single_image():
    title = "reconstruction (true mean and contrast of each patch put back: norm-pix)"
    picture = draw_rows({title: torch.zeros(1, 3, 16, 16)})
    title_strip = np.asarray(picture.convert("L"))[:20]
    inked = (title_strip < 128).any(axis=0).nonzero()[0]
    assert 400 < inked.max() < picture.width - 4


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_draw_rows_paints_the_images_it_is_given(channels):
    images = torch.full((3, channels, 32, 64), 0.5)
    images[1] = 2.0  # clipped to white
    picture = draw_rows({"one": images, "two": images}, min_side=32, margin=4)
    assert picture.size == (3 * 68 + 4, 2 * (20 + 32 + 4) + 4)
    assert picture.getpixel((4 + 30, 4 + 20 + 16)) == (128,) * 3
    assert picture.getpixel((72 + 30, 4 + 20 + 16)) == (255,) * 3


def test_draw_rows_enlarges_small_images_by_whole_numbers():
    assert draw_rows({"one": torch.zeros(1, 3, 10, 20)}, min_side=25, margin=0).size == (60, 20 + 30)


def test_norm_pix_pictures_are_labelled_so():
    assert "true mean and contrast" in reconstruction_titles(0.75, True)[2]
    assert reconstruction_titles(0.75, False)[1:3] == ["masked (75% removed)", "reconstruction"]


# -------------------------------------------------------------------------------- metrics


def test_accuracy_of_a_hand_made_case():
    predictions = torch.tensor([[0, 1, 2], [1, 0, 2], [2, 0, 1], [2, 1, 0]])
    labels = torch.tensor([0, 0, 0, 0])
    assert [accuracy(predictions, labels, k) for k in (1, 2, 3)] == [25.0, 75.0, 100.0]


def test_confusion_matrix_counts_and_finds_the_worst_pairs():
    confusion = ConfusionMatrix(3)
    confusion.update(torch.tensor([0, 0, 1]), torch.tensor([0, 2, 2]))
    confusion.update(torch.tensor([[1, 2]]), torch.tensor([[2, 0]]))
    assert confusion.counts.tolist() == [[1, 0, 1], [0, 0, 2], [1, 0, 0]]
    assert confusion.worst_pairs(2) == [(1, 2, 2), (0, 2, 1)] and len(confusion.worst_pairs(9)) == 3


def test_confusion_matrix_refuses_what_it_would_miscount():
    confusion = ConfusionMatrix(3, ignore_index=255)
    with pytest.raises(ValueError, match=r"labels of shape \(2, 3\), predictions of shape \(3, 2\)"):
        confusion.update(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="label 0 or prediction 3 of 3 classes"):
        confusion.update(torch.tensor([0, 255]), torch.tensor([3, 0]))
    assert confusion.counts.sum() == 0


def test_segmentation_scores_of_a_hand_made_case():
    """Of class 0 3 pixels, 2 hit, 1 taken for 1; of class 1 2 pixels, 1 hit, 1 taken for 3; none of classes 2 and 3."""
    confusion = ConfusionMatrix(4, ignore_index=255)
    confusion.update(torch.tensor([[0, 0, 0], [1, 1, 255]]), torch.tensor([[0, 0, 1], [1, 3, 2]]))
    scores = confusion.per_class()
    assert scores["iou"][:2].tolist() == pytest.approx([200 / 3, 100 / 3])
    assert scores["acc"][:2].tolist() == pytest.approx([200 / 3, 50])
    assert scores["dice"][:2].tolist() == pytest.approx([80, 50])
    assert all(score[2:].isnan().all() for score in scores.values())  # 3 was predicted, but no label has it
    assert confusion.figures() == pytest.approx(
        {"testing_miou": 50, "testing_macc": 175 / 3, "testing_mdice": 65, "testing_aacc": 60}
    )


def test_segmentation_scores_equal_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (6, 20, 30), generator=generator)  # of 12 classes, so that three are absent
    answers = torch.where(torch.rand(labels.shape, generator=generator) < 0.6, labels, labels.flip(2))
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    confusion = ConfusionMatrix(12, ignore_index=255)
    for label, answer in zip(labels, answers, strict=True):
        confusion.update(label, answer)
    options = dict(num_classes=12, ignore_index=255)
    iou = torchmetrics.classification.MulticlassJaccardIndex(**options)(answers, labels)
    micro = torchmetrics.classification.MulticlassAccuracy(average="micro", **options)(answers, labels)
    figures = confusion.figures()
    assert figures["testing_miou"] == pytest.approx(100 * iou.item(), abs=1e-4)
    assert figures["testing_aacc"] == pytest.approx(100 * micro.item(), abs=1e-4)


def test_knn_vote_equals_brute_force(monkeypatch):
    monkeypatch.setattr(utils, "KNN_CHUNK", 4)
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.nn.functional.normalize(torch.randn(n, 5, generator=generator)) for n in (40, 11))
    labels = torch.randint(0, 3, (40,), generator=generator)
    ranked = knn_classify(bank, labels, queries, 3, num_neighbours=7)
    for query, order in zip(queries, ranked, strict=True):
        similarity = [(float(query @ vector), int(label)) for vector, label in zip(bank, labels, strict=True)]
        votes = [0.0] * 3
        for value, label in sorted(similarity, reverse=True)[:7]:
            votes[label] += math.exp(value / 0.07)
        assert order.tolist() == sorted(range(3), key=lambda k: -votes[k])


def test_class_names_are_put_into_words_where_imagenet_has_them():
    assert describe_class("n01440764") == "tench" and describe_class("n03888257") == "parachute"
    assert describe_class("cats") == "cats" and describe_class("n99999999") == "n99999999"


# -------------------------------------------------------------------------------- pictures


def test_captions_are_drawn_below_their_images_and_cut_to_their_width():
    images = torch.ones(2, 3, 128, 128)
    plain = draw_rows({"row": images})
    captioned = draw_rows({"row": images}, {"row": ["a", "a very long caption that does not fit below an image"]})
    assert captioned.height == plain.height + 20 and captioned.width == plain.width
    below = np.asarray(captioned)[20 + 128 + 4 :].min(axis=(0, 2))  # darkest in each column
    assert below[4:16].min() < 128 and below[200:264].min() < 128  # something is written below both
    assert below[-4:].min() == 255
