"""What a run shows while it goes on: the clock, the line of an epoch, and lines instead of a bar in a file."""

import argparse
import sys

import pytest
import torch
from accelerate import Accelerator

from training import progress
from training.progress import Progress, StepClock, duration

ROW = {"training_loss": 0.51234, "learning_rate": 1.5e-4, "images_per_second": 812.04, "data_wait_fraction": 0.031}
SHOWN = "loss 0.5123, learning rate 1.5e-04, 812.0 images/s, 3% waiting for data"


def test_step_clock_counts_images_and_waiting(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])

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


@pytest.fixture
def watch(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_epoch_is_one_line_with_its_figures_and_the_time_left(watch, capsys):
    shown = Progress(Accelerator(cpu=True), 3, 30, 10)
    shown.end_epoch(0, ROW, {}, None, None)  # of a run that only had its evaluation left
    for _ in range(5):
        shown.update()
    watch[0] = 600.0
    figures = {"testing_loss": 0.61, "testing_top1_acc": 71.25, "testing_classes": 10}
    shown.end_epoch(1, ROW, figures, 72.5, "checkpoint_2")
    shown.end_epoch(2, ROW | {"training_loss": None}, {}, None, None)
    shown.close()
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/3       loss 0.5123, 812.0 images/s",
        "epoch 2/3       loss 0.5123, testing_loss 0.61, testing_top1_acc 71.25, best 72.5, 812.0 images/s, "
        "saved as checkpoint_2, 30 min left",
        "epoch 3/3       loss -, 812.0 images/s, 30 min left",
    ]


def test_progress_in_a_file_is_a_line_now_and_then(watch, capsys):
    shown = Progress(Accelerator(cpu=True), 1, 2000, 0)
    for step in range(2000):
        shown.update()
        watch[0] = 0.05 * step
        shown.show(0, ROW)
    shown.close()
    said = capsys.readouterr()
    assert said.err == "" and "\r" not in said.out
    assert said.out.splitlines() == [
        f"step            601 of 2,000: {SHOWN}, 1 min left",
        f"step            1,201 of 2,000: {SHOWN}, 40 s left",
        f"step            1,801 of 2,000: {SHOWN}, 10 s left",
    ]


def test_line_in_a_file_is_there_at_once(tmp_path, monkeypatch):
    with (tmp_path / "output.txt").open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        Progress(Accelerator(cpu=True), 1, 1, 0).say("epoch 1")
        assert (tmp_path / "output.txt").read_text() == "epoch 1\n"


def test_progress_on_a_terminal_is_a_bar_with_epoch_and_loss(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown = Progress(Accelerator(cpu=True), 4, 20, 0)
    shown.update()
    shown.show(0, ROW)
    shown.bar.refresh()
    shown.say("a line")
    shown.close()
    said = capsys.readouterr()
    assert said.out == "a line\n" and "epoch 1/4:   5%" in said.err and "1/20" in said.err and SHOWN in said.err


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59, "59 s"), (90, "2 min"), (3599, "1 h 0 min"), (12_000, "3 h 20 min"), (190_000, "2 d 4 h")],
)
def test_duration_has_two_units(seconds, said):
    assert duration(seconds) == said
