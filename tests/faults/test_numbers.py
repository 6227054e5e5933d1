"""Rows 9, 10 and 13: losses that are not finite, and runs that go on with another number of processes.

Row 14, accumulated and spread runs beside the plain one, and row 19, metrics by brute force, are in the scripts' own
tests.
"""

import json
import math

import pytest
from conftest import assert_close, weights

from faults.conftest import SCRIPTS
from faults.harness import Job, log_of


def check_finite(job: Job) -> None:
    for file in job.experiment.glob("checkpoint_*"):
        assert all(value.isfinite().all() for value in weights(file).values()), file


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_loss_that_is_not_finite_at_one_process_is_left_out_at_all(script, value, job, faults, full, tmp_path):
    if (script, value) not in (("pretrain_mae", "nan"), ("finetune_classifier", "inf")) and not full:
        pytest.skip("with --full")
    with faults(9, f"loss {value} in two passes of the second of two processes, {script}") as count:
        for number in range(3 if full else 1):
            poisoned = job(script, tmp_path / str(number), 2).with_flags("--save_minutes 0 --max_grad_norm 0")
            bad_steps = [5 + number, 13]
            count.injected += len(bad_steps)
            printed = poisoned.finish(("poison", {"rank": 1, "passes": bad_steps, "value": value}))
            # Processes whose weights drifted apart would differ in what they log, and the run in what it repeats.
            check_finite(poisoned)
            rows = log_of(poisoned.experiment)
            assert [row["step"] for row in rows if row["training_loss"] is None] == bad_steps
            assert rows[-1]["nonfinite_steps"] == 2 and math.isfinite(rows[-1]["training_loss"])
            noted = (poisoned.experiment / "nonfinite_steps.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in noted] == bad_steps
            assert all(len(json.loads(line)["images"]) == 4 for line in noted)
            assert f"step {bad_steps[0]}: loss or gradient not finite, left out" in printed
            count.survived += len(bad_steps)


def test_two_processes_with_one_poisoned_equal_one_with_it(job, faults, tmp_path):
    """The step is left out by both alike: otherwise the two would no longer be the single process."""
    with faults(9, "the same, beside one process that meets it, pretrain_mae") as count:
        one, two = (job("pretrain_mae", tmp_path / str(n), n).with_flags("--save_minutes 0") for n in (1, 2))
        one.finish(("poison", {"rank": 0, "passes": [7]}))
        two.finish(("poison", {"rank": 1, "passes": [7]}))
        count.injected += 2
        folders = [run.experiment / "checkpoint_3" for run in (one, two)]
        assert_close(*(weights(folder) for folder in folders), atol=1e-6)
        count.survived += 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_loss_that_stays_not_finite_stops_the_run_with_advice(script, job, faults, full, tmp_path):
    if script != "finetune_classifier" and not full:
        pytest.skip("with --full")
    with faults(10, f"every loss is nan from some step on, {script}") as count:
        lost = job(script, tmp_path).with_flags("--max_nonfinite_steps 5")
        passes = ("poison", {"rank": 0, "passes": list(range(15, 99))})
        count.injected += 1
        printed = lost.fail(("save_at", {"steps": [12, 16]}), passes)
        assert "loss or gradient was not finite in 5 optimizer steps in a row, up to step 19" in printed
        assert "with a lower learning rate, --max_grad_norm 1, or bf16 instead of fp16" in printed
        check_finite(lost)
        assert (lost.experiment / "last_checkpoint").resolve().name == "checkpoint_1_step_16"
        count.survived += 1


CHANGES = {  # processes and flags before, and after
    "2 to 1": ((2, ""), (1, "")),
    "1 to 2": ((1, ""), (2, "")),
    "2 to 1, accumulated": ((2, ""), (1, "--gradient_accumulation_steps 2")),
}


# For both runs of a comparison. The classifier mixes the images of a forward pass, which is another one then.
COMPARABLE = {
    "pretrain_mae": ("", []),
    "finetune_classifier": ("--mixup_alpha 0 --cutmix_alpha 0", []),
    "finetune_segmentation": ("--learning_rate 1e-4", [("in_double", {})]),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("change", CHANGES)
def test_run_goes_on_with_another_number_of_processes(change, script, job, faults, full, tmp_path):
    """With group norm in the segmenter: on the CPU torch has no batch norm over processes."""
    if (script, change) not in (("pretrain_mae", "1 to 2"), ("finetune_segmentation", "2 to 1")) and not full:
        pytest.skip("with --full")
    (before, more_before), (after, more_after) = CHANGES[change]
    more, always = COMPARABLE[script]
    more += " --save_minutes 0 "
    with faults(13, f"processes from {change}, {script}") as count:
        first = job(script, tmp_path / "run", before).with_flags(more + more_before)
        first.start(*always, ("save_at", {"steps": [14]}), ("die", {"rank": 0, "step": 15})).wait()
        count.injected += 1
        second = job(script, tmp_path / "run", after).with_flags(more + more_after)
        assert "from checkpoint_1_step_14 on" in second.finish(*always)
        plain = job(script, tmp_path / "plain").with_flags(more)
        plain.finish(*always)
        found = [weights(run.experiment / "checkpoint_3") for run in (second, plain)]
        assert_close(*found, atol=1e-6)
        rates = [{row["step"]: row["learning_rate"] for row in log_of(run.experiment)} for run in (second, plain)]
        assert rates[0] == rates[1]
        count.survived += 1


def test_another_global_batch_is_refused_with_the_difference(job, faults, tmp_path):
    with faults(13, "global batch changed, pretrain_mae") as count:
        first = job("pretrain_mae", tmp_path)
        first.start(("save_at", {"steps": [4]}), ("die", {"rank": 0, "step": 5})).wait()
        count.injected += 1
        printed = first.with_flags("--per_gpu_batch_size 8").fail()
        assert "effective_batch_size: 4 in the checkpoint, 8 now" in printed
        count.survived += 1
