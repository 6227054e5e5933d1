"""Run on a model of one weight: rows worked out by hand, resumes, stops, errors, the best weights and the end.

A run here is two epochs of four steps of two images, with a row at every third step. The loss of step s is s.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch
from accelerate import Accelerator
from conftest import rows
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from dataset import StepSampler
from storage.workers import DataTimeoutError
from training import open_evaluation, open_run, signals
from training.checkpoints import open_experiment
from training.run import Plan, Run, Stopped
from training.states import find_checkpoints

NUM_EPOCHS, TOTAL_STEPS = 2, 8
EVALUATED = {"testing_loss": 0.5}


def run_flags(folder, **changes) -> argparse.Namespace:
    flags = dict(
        working_directory=str(folder), experiment_name="run", resume_from_checkpoint=None, epochs=NUM_EPOCHS,
        gradient_accumulation_steps=1, per_gpu_batch_size=2, num_workers=0, seed=0, log_interval=3, log_wandb=False,
        log_with=None, save_minutes=0.0, keep_checkpoints=2, max_nonfinite_steps=3, max_bad_fraction=0.5,
        timeout_minutes=1.0, deterministic=False, pin_memory=True, max_image_pixels=89_478_485, val_fraction=None,
    )  # fmt: skip
    assert flags.keys() >= changes.keys()
    return argparse.Namespace(**{**flags, **changes})


def collate_numbers(numbers: list) -> argparse.Namespace:
    return argparse.Namespace(images=torch.tensor(numbers), bad_files=[])


class Files:
    """Eight images that are named by their number."""

    def __len__(self) -> int:
        return 8

    def path(self, index: int) -> str:
        return f"{index}.jpg"

    def fingerprint(self) -> str:
        return "eight"


class Training:
    """A run as a script has it; each step takes 1 from the one weight."""

    def __init__(self, folder, *, total_steps: int = TOTAL_STEPS, identity=(), **changes):
        self.args = run_flags(folder, **changes)
        accumulation = self.args.gradient_accumulation_steps
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        self.sampler = StepSampler(8, 2 // accumulation, accumulation_steps=accumulation)
        self.plan = Plan(self.sampler, Files(), NUM_EPOCHS, total_steps, {"size": 1}, dict(identity))
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
        self.seen: list[int] = []

    def open(self) -> Run:
        start = open_experiment(self.accelerator, self.args)
        return Run(self.accelerator, start, self.args, self.plan, model=self.model, keeps_best=True)

    def batches(self) -> Iterator[argparse.Namespace]:
        for keys in self.sampler:
            yield collate_numbers([key.index for key in keys])

    def steps(self, run: Run, at: Mapping[int, Callable] | None = None, skipped: Sequence[int] = ()) -> None:
        """Make the steps of one epoch; `at` says what happens in the middle of which step."""
        for batch in run.batches(self.batches()):
            self.seen += batch.images.tolist()
            step = run.step + 1
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(torch.ones(1, 1)).sum())
                self.optimizer.step()
                self.optimizer.zero_grad()
            run.add(training_loss=torch.tensor(float("nan") if step in skipped else float(step)))
            if self.accelerator.sync_gradients:
                (at or {}).get(step, lambda: None)()
                run.finish_step(0.1 * step, torch.tensor(float(step in skipped)))

    def go(self, at=None, skipped=(), save: bool = True) -> Run:
        with self.open() as run:
            for _ in run.epochs():
                self.steps(run, at, skipped)
                run.finish_epoch(EVALUATED, save=save, for_good=save)
            run.finish()
        return run


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def names(folder) -> list[str]:
    return [checkpoint.name for checkpoint in find_checkpoints(folder / "run")]


def figures(folder) -> list[tuple]:
    """Give what of the log does not depend on the clock."""
    return [
        (row["step"], row["epoch"], row["training_loss"], round(row["learning_rate"], 6), row.get("testing_loss"))
        for row in rows(folder / "run")
    ]


# Of steps 1; 2 and 3; 4, the end of the epoch; 5 and 6; 7 and 8.
WHOLE = [
    (1, 0.25, 1.0, 0.1, None),
    (3, 0.75, 2.5, 0.3, None),
    (4, 1.0, 4.0, 0.4, 0.5),
    (6, 1.5, 5.5, 0.6, None),
    (8, 2.0, 7.5, 0.8, 0.5),
]

# -------------------------------------------------------------------------------- rows


def test_rows_are_the_means_since_the_last_and_come_in_order(tmp_path):
    run = Training(tmp_path).go()
    assert figures(tmp_path) == WHOLE
    row = rows(tmp_path / "run")[-1]
    assert row.keys() == {
        "step", "epoch", "training_loss", "learning_rate", "images_per_second", "data_wait_fraction", "memory_gb",
        "bad_files", "nonfinite_steps", "testing_loss",
    }  # fmt: skip
    assert (row["bad_files"], row["nonfinite_steps"]) == (0, 0) and row["memory_gb"] > 0
    assert names(tmp_path) == ["checkpoint_1", "checkpoint_2"]
    assert json.loads((tmp_path / "run" / "DONE").read_text()) == {"step": 8} and run.log.lock.closed


def test_figures_of_accumulated_passes_are_their_mean(tmp_path):
    """Both passes of a step count half; every image is one pass."""
    training = Training(tmp_path, gradient_accumulation_steps=2)
    training.go()
    assert figures(tmp_path) == WHOLE and len(training.seen) == 16
    assert training.model.weight.item() == -8  # the gradient of a step is the mean of two ones


def test_every_figure_of_a_step_has_its_own_mean(tmp_path):
    training = Training(tmp_path)
    with training.open() as run:
        next(run.epochs())
        for step in (1, 2, 3):
            run.add(training_loss=torch.tensor(1.0 * step), accuracy=torch.tensor(10.0 * step))
            run.finish_step(0.1, torch.tensor(0.0))
    found = [(row["step"], row["training_loss"], row["accuracy"]) for row in rows(tmp_path / "run")]
    assert found == [(1, 1.0, 10.0), (3, 2.5, 25.0)]


def test_skipped_steps_are_left_out_of_the_means_counted_and_named(tmp_path):
    training = Training(tmp_path)
    training.go(skipped=(1, 2, 7))
    losses = [(row["step"], row["training_loss"], row["nonfinite_steps"]) for row in rows(tmp_path / "run")]
    assert losses == [(1, None, 1), (3, 3.0, 2), (4, 4.0, 2), (6, 5.5, 2), (8, 8.0, 3)]
    named = [json.loads(line) for line in (tmp_path / "run" / "nonfinite_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in named] == [1, 2, 7]
    for line in named:
        met = training.seen[2 * line["step"] - 2 : 2 * line["step"]]
        assert sorted(line["images"]) == sorted(f"{index}.jpg" for index in met)


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="3 optimizer steps in a row, up to step 7"):
        Training(tmp_path).go(skipped=(5, 6, 7))
    assert names(tmp_path) == ["checkpoint_1"] and not (tmp_path / "run" / "DONE").exists()


def test_bad_files_of_training_and_evaluation_are_counted(tmp_path):
    training = Training(tmp_path)
    with training.open() as run:
        for epoch in run.epochs():
            training.steps(run)
            loader = DataLoader(
                range(2),
                collate_fn=lambda _, epoch=epoch: argparse.Namespace(bad_files=[(f"{epoch}.jpg", "OSError")]),
            )
            assert len(list(run.watch(loader))) == 2
            run.finish_epoch({}, save=False, for_good=False)
        run.finish()
    assert [row["bad_files"] for row in rows(tmp_path / "run")] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(("interval", "due"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (5, [4]), (9, [4])])
def test_what_is_due_comes_every_interval_and_after_the_last_epoch(tmp_path, interval, due):
    training = Training(tmp_path)
    training.plan = Plan(training.sampler, Files(), 5, 20, {}, {})
    with training.open() as run:
        assert [epoch for epoch in run.epochs() if run.is_due(interval)] == due


# -------------------------------------------------------------------------------- resumes


def test_run_stopped_within_an_epoch_goes_on_as_if_it_had_not_been(tmp_path, capsys):
    whole = Training(tmp_path / "whole")
    whole.go()
    first = Training(tmp_path)
    first.go(at={6: ask_to_stop})  # Stopped is caught
    assert "by SIGUSR1 at step 6; the same command, with --resume_from_checkpoint latest" in capsys.readouterr().out
    assert names(tmp_path) == ["checkpoint_1", "checkpoint_1_step_6"] and figures(tmp_path) == WHOLE[:4]
    assert not (tmp_path / "run" / "DONE").exists()
    second = Training(tmp_path, resume_from_checkpoint="latest")
    second.go()
    assert figures(tmp_path) == WHOLE
    assert names(tmp_path) == ["checkpoint_1", "checkpoint_1_step_6", "checkpoint_2"]
    assert first.seen + second.seen == whole.seen and len(whole.seen) == 16
    assert second.model.weight.item() == whole.model.weight.item() == -8


def test_run_stopped_between_rows_writes_one_of_the_steps_so_far(tmp_path):
    Training(tmp_path).go(at={5: ask_to_stop})
    Training(tmp_path, resume_from_checkpoint="latest").go()
    between = [(5, 1.25, 5.0, 0.5, None), (6, 1.5, 6.0, 0.6, None)]
    assert figures(tmp_path) == [*WHOLE[:3], *between, WHOLE[4]]


@pytest.mark.parametrize("when", ["at the last step of an epoch", "in the evaluation"])
def test_row_that_waits_for_its_evaluation_outlives_a_stop(tmp_path, when):
    """Stopped before the evaluation is complete, the run makes no step again, but all of the evaluation."""
    training = Training(tmp_path)
    with training.open() as run:
        for _ in run.epochs():
            training.steps(run, at={4: ask_to_stop} if "step" in when else {})
            loader = DataLoader(range(4), batch_size=2, collate_fn=collate_numbers)
            for _ in run.watch(loader):
                ask_to_stop()
            raise AssertionError("the evaluation was not left")
    assert names(tmp_path) == ["checkpoint_0_step_4"] and figures(tmp_path) == WHOLE[:2]
    second = Training(tmp_path, resume_from_checkpoint="latest")
    second.go()
    assert figures(tmp_path) == WHOLE and len(second.seen) == 8


def test_what_goes_beside_the_first_epoch_is_taken_after_its_steps_and_the_rest_at_its_end(tmp_path):
    training, taken = Training(tmp_path), []
    with training.open() as run:
        for epoch in run.epochs():
            beside = ((epoch, number, run.step) for number in range(6))
            for _ in run.batches(training.batches(), (taken.append(now) or 1 for now in beside)):
                run.add(training_loss=torch.tensor(0.0))
                run.finish_step(0.1, torch.tensor(0.0))
            run.finish_epoch({}, save=False, for_good=False)
        run.finish()
    assert taken == [(0, 0, 1), (0, 1, 2), (0, 2, 3), (0, 3, 4), (0, 4, 4), (0, 5, 4)]


@pytest.mark.parametrize(("at", "saved"), [(2, "checkpoint_0_step_2"), (7, "checkpoint_1")])
def test_signal_and_data_that_does_not_come_are_minded_beside_the_first_epoch(at, saved, tmp_path):
    """The steps made so far are saved, and what is left beside them is not waited for."""
    training, taken = Training(tmp_path), []

    def beside() -> Iterator[int]:
        for number in range(1, 20):
            taken.append(number)
            if number == at == 2:
                raise DataTimeoutError("no batch came")
            if number == at == 7:
                ask_to_stop()
            yield 1

    with pytest.raises(DataTimeoutError) if at == 2 else contextlib.nullcontext(), training.open() as run:
        for _ in run.epochs():
            for _ in run.batches(training.batches(), beside()):
                run.add(training_loss=torch.tensor(0.0))
                run.finish_step(0.1, torch.tensor(0.0))
            run.finish_epoch({}, save=False, for_good=False)
    assert len(taken) == at and names(tmp_path) == [saved]


def test_evaluation_is_left_when_the_run_should_stop(tmp_path):
    met = []
    with Training(tmp_path).open() as run:
        next(run.epochs())
        loader = DataLoader(range(5), batch_size=2, collate_fn=collate_numbers)
        assert [len(batch.images) for batch in run.watch(loader)] == [2, 2, 1]
        for batch in run.watch(loader):
            met.append(batch.images.tolist())
            run.interruptions.name = "SIGTERM"
        raise AssertionError("the evaluation was not left")
    assert met == [[0, 1]]


@pytest.mark.parametrize(("rank", "count"), [(0, 3), (1, 2)])
def test_processes_of_an_evaluation_ask_each_other_equally_often(tmp_path, monkeypatch, rank, count):
    """Of 5 images one process has 3 and the other 2; an answer that one does not wait for would hang the other."""
    asked = []
    with Training(tmp_path).open() as run:
        monkeypatch.setattr(run.interruptions, "agree", lambda: asked.append(True) or signals.GO_ON)
        monkeypatch.setattr("training.run.process_slice", lambda _: (rank, 2))
        loader = DataLoader(range(5), sampler=list(range(rank, 5, 2)), batch_size=1, collate_fn=collate_numbers)
        assert len(list(run.watch(loader))) == count
    assert len(asked) == 3


@pytest.mark.parametrize("accumulation", [1, 2])
def test_run_stopped_while_it_waits_for_data_is_saved_after_its_last_whole_step(tmp_path, capsys, accumulation):
    """The signal comes within the wait for the second forward pass of step 6, where a step has two."""
    whole = Training(tmp_path / "whole", gradient_accumulation_steps=accumulation)
    whole.go()
    first = Training(tmp_path, gradient_accumulation_steps=accumulation)
    given, batches = itertools.count(1), first.batches

    def batches_that_stop() -> Iterator[argparse.Namespace]:
        for batch in batches():
            if next(given) == 6 * accumulation:
                first.model.scale.fill_(100)  # what a forward pass did to a running statistic
                ask_to_stop()
                time.sleep(60)
            yield batch

    first.batches, started = batches_that_stop, time.monotonic()
    first.model.register_buffer("scale", torch.ones(()))
    first.go()
    assert time.monotonic() - started < 30
    assert "by SIGUSR1 at step 5; the same command" in capsys.readouterr().out
    assert names(tmp_path) == ["checkpoint_1", "checkpoint_1_step_5"]
    saved = load_file(tmp_path / "run" / "checkpoint_1_step_5" / "model.safetensors")
    assert saved["weight"].item() == -5 and saved["scale"].item() == (100 if accumulation == 1 else 1)
    second = Training(tmp_path, gradient_accumulation_steps=accumulation, resume_from_checkpoint="latest")
    second.model.register_buffer("scale", torch.ones(()))
    second.go()
    assert first.seen[:10] + second.seen == whole.seen
    assert second.model.weight.item() == whole.model.weight.item() == -8


def test_run_stopped_after_an_epoch_is_saved_as_complete(tmp_path):
    training = Training(tmp_path)
    with training.open() as run:
        for _ in run.epochs():
            training.steps(run)
            ask_to_stop()
            run.finish_epoch(EVALUATED, save=False, for_good=False)
    assert names(tmp_path) == ["checkpoint_1"] and figures(tmp_path) == WHOLE[:3]
    second = Training(tmp_path, resume_from_checkpoint="latest")
    second.go()
    assert figures(tmp_path) == WHOLE and len(second.seen) == 8


def test_run_asked_to_stop_after_its_last_step_finishes(tmp_path):
    Training(tmp_path).go(at={8: ask_to_stop}, save=False)
    assert (tmp_path / "run" / "DONE").exists() and names(tmp_path) == ["checkpoint_2"]


def test_clock_saves_within_an_epoch_and_the_run_goes_on(tmp_path):
    training = Training(tmp_path, save_minutes=1.0)
    with training.open() as run:
        for _ in run.epochs():

            def wait(run=run) -> None:
                run.checkpoints.saved_at -= 60

            training.steps(run, at={2: wait})
            run.finish_epoch(EVALUATED, save=run.is_due(2), for_good=True)
        run.finish()
    assert [row[0] for row in figures(tmp_path)] == [1, 2, 3, 4, 6, 8]
    assert names(tmp_path) == ["checkpoint_0_step_2", "checkpoint_2"]


def test_finished_run_that_is_started_again_does_nothing(tmp_path):
    Training(tmp_path).go()
    again = Training(tmp_path, resume_from_checkpoint="latest")
    again.go()
    assert again.seen == [] and figures(tmp_path) == WHOLE and (tmp_path / "run" / "DONE").exists()


def test_run_of_a_number_of_steps_may_end_within_an_epoch(tmp_path):
    Training(tmp_path, total_steps=6).go()
    assert figures(tmp_path) == [*WHOLE[:3], (6, 1.5, 5.5, 0.6, 0.5)]


def test_run_that_ends_within_an_epoch_makes_no_step_after_its_last(tmp_path):
    """Stopped in its last evaluation, it has two steps of its epoch left that are none of its own."""
    training = Training(tmp_path, total_steps=6)
    with training.open() as run:
        for epoch in run.epochs():
            training.steps(run)
            for _ in run.watch(DataLoader(range(4), batch_size=2, collate_fn=collate_numbers)) if epoch else ():
                ask_to_stop()
            run.finish_epoch(EVALUATED, save=True, for_good=True)
    assert names(tmp_path) == ["checkpoint_1", "checkpoint_1_step_6"]
    second = Training(tmp_path, total_steps=6, resume_from_checkpoint="latest")
    second.go()
    assert second.seen == [] and figures(tmp_path)[-1] == (6, 1.5, 5.5, 0.6, 0.5)


def test_run_with_another_identity_is_refused_before_it_writes(tmp_path):
    Training(tmp_path, identity={"seed": 0}).go()
    before = sorted(entry.name for entry in (tmp_path / "run").iterdir())
    with pytest.raises(ValueError, match="seed: 0 in the checkpoint, 1 now"):
        Training(tmp_path, identity={"seed": 1}, resume_from_checkpoint="latest").open()
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == before


# -------------------------------------------------------------------------------- ends


def test_signals_that_come_late_do_not_end_a_stopped_run_before_it_has_said_so(tmp_path, monkeypatch):
    training, said, others = Training(tmp_path), [], []
    before = signal.signal(signal.SIGTERM, lambda *_: others.append("handled by another"))
    try:
        with training.open() as run:
            late = lambda text: (os.kill(os.getpid(), signal.SIGTERM), said.append(text))  # noqa: E731
            monkeypatch.setattr(run.accelerator, "print", late)
            raise Stopped
        assert "stopped " in said[0] and others == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert others == ["handled by another"]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stopped])
def test_run_closes_what_it_opened_however_it_is_left(tmp_path, error):
    handlers = [signal.getsignal(number) for number in signals.STOP_SIGNALS]
    training = Training(tmp_path)
    with contextlib.nullcontext() if error is Stopped else pytest.raises(error), training.open() as run:
        assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] != handlers
        next(run.epochs())
        training.steps(run, at={2: ask_to_stop} if error is Stopped else {})
        raise error
    assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] == handlers
    assert run.progress.bar.disable and run.log.lock.closed
    Training(tmp_path, resume_from_checkpoint="latest").go()  # the folder is free again
    assert figures(tmp_path)[-1] == WHOLE[-1]


@pytest.mark.parametrize(("name", "reason"), [("SIGUSR1", "SIGUSR1"), (None, "a signal at another process")])
def test_stopped_run_says_how_to_go_on_or_that_its_state_is_lost(tmp_path, capsys, name, reason):
    with Training(tmp_path).open() as run:
        run.step, run.interruptions.name = 7, name
        raise Stopped
    said = capsys.readouterr().out
    assert f"by {reason} at step 7; the same command, with --resume_from_checkpoint latest" in said
    message = f"stopped by {reason} at step 7, but the state could not be saved"
    with pytest.raises(OSError, match=message), Training(tmp_path).open() as run:
        run.step, run.interruptions.name, run.saved = 7, name, False
        raise Stopped


def test_finish_refuses_a_run_that_is_not_complete(tmp_path):
    training = Training(tmp_path)
    with pytest.raises(AssertionError, match="4 optimizer steps were made instead of 8"), training.open() as run:
        next(run.epochs())
        training.steps(run)
        run.finish()
    assert not (tmp_path / "run" / "DONE").exists()


@pytest.mark.parametrize("stops", [False, True])
def test_run_whose_last_save_failed_is_neither_finished_nor_said_to_be_saved(tmp_path, monkeypatch, stops):
    training = Training(tmp_path)

    def full(*_):
        raise OSError("No space left on device")

    at = {6: lambda: (monkeypatch.setattr(training.accelerator, "save_state", full), stops and ask_to_stop())}
    message = "stopped by SIGUSR1 at step 6, but" if stops else "the last checkpoint could not be written"
    with pytest.raises(OSError, match=message):
        training.go(at)
    assert names(tmp_path) == ["checkpoint_1"] and not (tmp_path / "run" / "DONE").exists()


def test_weights_that_are_not_finite_are_found_before_an_evaluation(tmp_path):
    training = Training(tmp_path)
    with training.open() as run:
        next(run.epochs())
        run.check_weights()
        torch.nn.init.constant_(training.model.weight, float("inf"))
        with pytest.raises(FloatingPointError, match="not finite at step 0"):
            run.check_weights()


# -------------------------------------------------------------------------------- best weights and pictures


def test_best_weights_are_those_of_the_highest_figure(tmp_path):
    training = Training(tmp_path)
    best = tmp_path / "run" / "best_checkpoint" / "config.json"
    with training.open() as run:
        for epoch in run.epochs():
            kept = [run.keep_best(training.model, figure, {"score": figure}) for figure in (1.0 + epoch, 1.0, 3.0, 2.0)]
            assert kept == ([True, False, True, False] if epoch == 0 else [False] * 4)
            assert json.loads(best.read_text()) == {"size": 1, "score": 3.0}
            training.steps(run)
            run.finish_epoch({}, save=True, for_good=True)
    with Training(tmp_path, resume_from_checkpoint="latest").open() as run:
        assert run.best == 3.0
    # Under another name it has no best weights yet, whatever the figure was.
    elsewhere = dict(experiment_name="other", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint_1"))
    with Training(tmp_path, **elsewhere).open() as run:
        assert run.best == -1.0


def test_best_weights_that_could_not_be_written_are_not_the_best(tmp_path, monkeypatch):
    training = Training(tmp_path)
    with training.open() as run:
        monkeypatch.setattr(run.checkpoints, "save_weights", lambda *_: False)
        assert not run.keep_best(training.model, 5.0, {})
        monkeypatch.undo()
        assert run.best == -1.0 and run.keep_best(training.model, 4.0, {})


def test_pictures_are_named_by_the_epochs_behind_them(tmp_path):
    with Training(tmp_path).open() as run:
        for _ in run.epochs():
            run.keep_picture("panels", Image.new("RGB", (2, 2)))
            run.keep_picture("nothing", None)
    assert sorted(path.name for path in (tmp_path / "run" / "panels").iterdir()) == ["epoch_1.png", "epoch_2.png"]
    assert not (tmp_path / "run" / "nothing").exists()


# -------------------------------------------------------------------------------- where it starts


def test_opened_run_says_what_part_of_each_step_is_this_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    args = run_flags(tmp_path, gradient_accumulation_steps=4, per_gpu_batch_size=12, seed=7)
    opened = open_run(args)
    assert opened.stepping == dict(micro_batch_size=3, accumulation_steps=4, rank=0, world_size=1, seed=7)
    assert opened.workers == dict(num_workers=0, timeout_s=60, pin_memory=False)
    assert opened.loading == dict(batch_size=3, num_workers=0, timeout_s=60, rank=0, world_size=1)
    assert opened.start == (tmp_path / "run", None, []) and not (tmp_path / "run").exists()
    assert opened.accelerator.gradient_accumulation_steps == 4 and torch.initial_seed() == 7


def test_opened_evaluation_has_a_loader_and_no_run(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerator, loading = open_evaluation(run_flags(tmp_path))
    assert loading == dict(batch_size=2, num_workers=0, timeout_s=60, rank=0, world_size=1)
    assert accelerator.num_processes == 1 and not list(tmp_path.iterdir())
