"""--check: what it prints for each script, that it leaves nothing, and its advice worked out by hand."""

import importlib
import os
import re
import shlex
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from conftest import rows
from test_hub import as_table
from test_pack_dataset import pack

from storage import inspection
from storage.inspection import DiskReads, read_cold
from storage.lists import list_images
from training import check
from training.advice import (
    Findings,
    Pass,
    advise,
    candidates,
    choose_pass,
    choose_workers,
    count_due,
    describe_data,
    extend,
    step_seconds,
)

COMMON = """--check --experiment_name run --img_size 32 --patch_size 4 --encoder_embed_dim 64 --encoder_depth 4
 --encoder_num_heads 4 --epochs 3 --save_checkpoint_interval 2 --log_interval 1"""
SCRIPTS = {
    "pretrain_mae": """--decoder_embed_dim 16 --decoder_depth 1 --decoder_num_heads 2 --warmup_epochs 1
        --per_gpu_batch_size 8 --gradient_accumulation_steps 2 --num_workers 1""",
    "finetune_classifier": "--warmup_epochs 1 --per_gpu_batch_size 8 --num_workers 0 --ema_decay 0.9 --eval_interval 1",
    "finetune_segmentation": """--from_scratch --num_classes 4 --channels 64 --warmup_iterations 1
        --per_gpu_batch_size 4 --num_workers 0 --eval_interval 3""",
}
STEPS = {"pretrain_mae": 9, "finetune_classifier": 9, "finetune_segmentation": 6}  # of 24, 24 and 10 images
DUES = {"pretrain_mae": (2, 2), "finetune_classifier": (3, 3), "finetune_segmentation": (1, 2)}  # evaluations, saves


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch):
    for name in check.LIMIT_S:
        monkeypatch.setitem(check.LIMIT_S, name, 0.2)
    monkeypatch.setattr(check, "ENOUGH_S", 0.02)


def measure(script: str, data: Path, work: Path, more: str = "") -> None:
    module = importlib.import_module(script)
    flags = [*shlex.split(f"{COMMON} {SCRIPTS[script]} {more}"), "--path_to_data", str(data)]
    module.main(module.parse_args([*flags, "--working_directory", str(work)]))


@pytest.mark.parametrize("script", SCRIPTS)
def test_check_says_what_to_expect_and_leaves_nothing(script, drawn_images, drawn_pairs, tmp_path, capsys):
    measure(script, drawn_pairs if "segmentation" in script else drawn_images, tmp_path)
    printed = capsys.readouterr().out
    batch = 4 if "segmentation" in script else 8
    assert re.search(
        rf"limit +(computing|data|cores, which .*): a step of {batch} images takes [\d.e-]+ s to compute", printed
    )
    assert re.search(rf"take +--per_gpu_batch_size {batch} --gradient_accumulation_steps \d+ \(", printed)
    assert re.search(r" --num_workers \d+ \(", printed) and re.search(r"memory +peak in GB: [\d.]+ by 2[,\n]", printed)
    evaluations, saves = DUES[script]
    assert re.search(
        rf"duration +\d+ (s|min|h) .*: {STEPS[script]} steps x [\d.e-]+ s, {evaluations} evaluations x [\d.e-]+ s, "
        rf"{saves} saves x [\d.e-]+ s\n",
        printed,
    )
    total = 10 if "segmentation" in script else 24
    assert re.search(rf"files +{total} heads of {total} read, \d+ samples decoded: all can be used\n", printed)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file_lists"]


def test_run_that_follows_a_check_is_the_run_without_one(drawn_images, tmp_path):
    measure("pretrain_mae", drawn_images, tmp_path / "one")
    for name in ("one", "two"):
        measure("pretrain_mae", drawn_images, tmp_path / name, "--no-check --epochs 1 --warmup_epochs 0")
    losses = [[row["training_loss"] for row in rows(tmp_path / name / "run")] for name in ("one", "two")]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS["pretrain_mae"] // 3


def test_resumed_run_is_told_what_is_left_of_it(drawn_images, tmp_path, capsys):
    measure("pretrain_mae", drawn_images, tmp_path, "--no-check")
    shutil.rmtree(tmp_path / "run" / "checkpoint_3")
    before = sorted((path, os.lstat(path).st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
    measure("pretrain_mae", drawn_images, tmp_path, "--resume_from_checkpoint checkpoint_2 --epochs 5")
    assert ": 9 steps x " in capsys.readouterr().out  # of 15
    assert before == sorted((path, os.lstat(path).st_mtime_ns) for path in (tmp_path / "run").rglob("*"))


def test_damaged_files_are_named(image_folder, tmp_path, capsys):
    first, second = sorted((image_folder / "train" / "cats").iterdir())[:2]
    first.write_bytes(b"no image")
    second.write_bytes(second.read_bytes()[:-200])  # whose head is sound
    measure("pretrain_mae", image_folder, tmp_path)
    printed = capsys.readouterr().out
    assert "samples decoded: 2 cannot be used:\n" in printed and "more than --max_bad_fraction 0.01 allows" in printed
    assert f"  {first}  UnidentifiedImageError" in printed and f"  {second}  OSError" in printed
    assert not (tmp_path / "run").exists()


def test_packs_and_tables_are_checked_as_folders_are(drawn_images, tmp_path, capsys):
    datasets.DatasetDict({split: as_table(drawn_images, split) for split in ("train", "val")}).save_to_disk(
        tmp_path / "table"
    )
    for data in (pack(drawn_images, tmp_path / "pack", "--images_per_shard", "5"), tmp_path / "table"):
        measure("finetune_classifier", data, tmp_path / "work")
        printed = capsys.readouterr().out
        assert "24 heads of 24 read" in printed and ": 9 steps x " in printed
    assert "disk            not measured: nothing tells here" in printed  # of the table
    assert not (tmp_path / "work" / "run").exists()


def test_batch_norm_is_not_tried_on_one_image(drawn_pairs, tmp_path, capsys):
    measure("finetune_segmentation", drawn_pairs, tmp_path, "--per_gpu_batch_size 3")
    assert re.search(r"memory +peak in GB: [\d.]+ by 3\n", capsys.readouterr().out)


def test_two_processes_agree(fork, drawn_images, tmp_path):
    more = "--num_workers 0 --per_gpu_batch_size 4"
    flags = [*shlex.split(f"{COMMON} {SCRIPTS['pretrain_mae']} {more}"), "--path_to_data", str(drawn_images)]
    flags += ["--working_directory", str(tmp_path)]
    printed = fork("pretrain_mae.py", flags, ("check_in_no_time", {}), num_processes=2)
    assert (
        printed.count("duration  ") == 1 and ": 9 steps x " in printed and "files           24 heads of 24" in printed
    )


@pytest.mark.parametrize("mode", ["eval_only", "knn"])
def test_check_of_what_trains_nothing_is_refused(mode, tmp_path, capsys):
    module, weights = importlib.import_module("finetune_classifier"), tmp_path / "weights.safetensors"
    torch.save({}, weights)
    with pytest.raises(SystemExit):
        module.parse_args(["--path_to_data", "x", "--check", f"--{mode}"])
    said = capsys.readouterr().err
    assert said == f"error: --check measures a training, and --{mode} trains nothing; leave one of them out\n"


# -------------------------------------------------------------------------------- data


def test_images_that_are_not_in_memory_are_read_from_the_disk(drawn_images, tmp_path, monkeypatch):
    files = [list_images(pack(drawn_images, tmp_path / "pack") / "train"), list_images(drawn_images / "train")]
    sizes = [os.path.getsize(files[1].path(index)) for index in range(24)]
    monkeypatch.setattr(inspection, "is_cached", lambda descriptor, place: False)
    for listed in files:
        found = read_cold(listed, range(24), 60)
        assert found[:4] == (24, sum(sizes), 24, sum(sizes)) and found.seconds > 0
    monkeypatch.setattr(inspection, "is_cached", lambda descriptor, place: True)
    assert read_cold(files[1], range(24), 60) == (24, sum(sizes), 0, 0, 0.0)


def test_disk_that_tells_nothing_is_not_measured(drawn_images, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "preadv", refuse)
    assert read_cold(list_images(drawn_images / "train"), range(4), 60) is None
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    assert read_cold(list_images(drawn_images / "train"), range(4), 60) is None


def test_data_is_described():
    disk = DiskReads(looked=40, looked_bytes=4000, cold=20, cold_bytes=5_000_000, seconds=0.5)
    lines = describe_data(100, 60, 40, {"a\x1b.jpg": "OSError: cut\noff"}, 0.005, disk, free=5000.0)
    assert lines["files"] == (
        "60 heads of 100 read, 40 samples decoded: 1 cannot be used:\n  a\\x1b.jpg  OSError: cut off\n  so the run "
        "would stop: that is more than --max_bad_fraction 0.005 allows"
    )
    assert lines["disk"].startswith("10 MB/s, 40 images/s, to one reader (of 20 of 40 images, ")
    assert lines["disk"].endswith("all images have 1e-05 GB, and they do not fit into memory")
    none_cold = describe_data(100, 60, 40, {}, 0.01, disk._replace(cold=19), free=1.0)
    assert "of 40 images of a sample 21 are in memory" in none_cold["disk"] and none_cold["files"].endswith(
        "can be used"
    )


# -------------------------------------------------------------------------------- advice


def test_sizes_of_a_pass_divide_the_batch_and_double():
    assert candidates(2048, 512, 2) == [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
    assert candidates(24, 12, 2) == [2, 4, 8, 12, 24]
    assert candidates(24, 12, 4) == [4, 8, 12, 24]  # four crops of an image
    assert candidates(7, 7, 1) == [1, 7]
    assert candidates(64, 4, 2) == [2, 4, 8, 16]


def test_pass_that_was_not_measured_lies_on_a_line():
    two = [Pass(2, 1.0, 1.5, 1.0), Pass(4, 1.6, 2.1, 1.4)]
    assert extend(two, 4) == two[1]
    assert extend(two, 8) == pytest.approx(Pass(8, 2.8, 3.3, 2.2))
    assert extend(two[:1], 8) == pytest.approx(Pass(8, 4.0, 6.0, 1.0))


def test_step_waits_for_the_slowest_of_computing_data_and_cores():
    assert step_seconds(2.0, 3.0, workers=0, threads=1, cores=4) == 5.0  # one after the other
    assert step_seconds(2.0, 3.0, workers=1, threads=1, cores=4) == 3.0  # data
    assert step_seconds(2.0, 3.0, workers=2, threads=1, cores=4) == 2.0  # computing
    assert step_seconds(2.0, 4.0, workers=4, threads=4, cores=4) == 3.0  # (4 x 2 + 4) / 4
    assert choose_workers(2.0, 3.0, threads=1, cores=4) == 2
    assert choose_workers(2.0, 0.1, threads=1, cores=4) == 1
    assert choose_workers(1.0, 30.0, threads=1, cores=4) == 4


def test_pass_is_the_given_one_unless_another_is_faster_or_it_does_not_fit():
    small, middle, large = Pass(8, 1.0, 1.2, 1.0), Pass(16, 1.5, 1.7, 2.0), Pass(32, 2.9, 3.1, 3.0)
    found = Findings(32, 32, threads=1, cores=2, steps=10, passes=[small, middle, large], given=large)
    assert [one.step_s(32) for one in found.passes] == pytest.approx([4.2, 3.2, 3.1])
    assert choose_pass(found) == large
    found.given = None
    assert choose_pass(found) == middle  # as good as the fastest, and smaller
    found.given = found.passes[2] = large._replace(update_s=4.0)
    assert choose_pass(found) == middle
    found.keeps_pass = True
    assert choose_pass(found) == found.given


def test_what_is_due_is_counted_as_a_run_does_it():
    assert count_due(0, 10, [3]) == 4  # 3, 6, 9, 10
    assert count_due(6, 10, [3]) == 2
    assert count_due(0, 10, [3, 5]) == 5


def test_advice_worked_out_by_hand():
    one = Pass(16, 0.5, 0.6, 2.0)
    found = Findings(32, 16, threads=1, cores=8, steps=3600, workers=2, image_s=0.1, passes=[one], given=one)
    found.evaluations, found.evaluation_s, found.saves, found.save_s = 4, 90.0, 2, 30.0
    lines = advise(found)
    assert lines["images/s"] == "computing alone, by images of a forward pass: 29.1 by 16"  # 32 / (0.5 + 0.6)
    assert lines["limit"] == (
        "data: a step of 32 images takes 1.1 s to compute, 1.6 s to decode; too slow to be measured together"
    )
    assert lines["take"] == (
        "--per_gpu_batch_size 32 --gradient_accumulation_steps 2 (as given) --num_workers 4 (not 2)"  # 1.25 x 3.2 / 4
    )
    assert lines["duration"] == (
        "1 h 43 min with the flags as given: 3,600 steps x 1.6 s, 4 evaluations x 90 s, 2 saves x 30 s"
    )
    found.live_s = 2.5
    lines = advise(found)
    assert lines["limit"].endswith("; together 2.5 s. Something else takes cores or memory from it")
    assert lines["duration"].startswith("2 h 37 min ")
    found.workers, found.live_s = 0, None
    assert advise(found)["limit"].startswith("data: ") and ": 3,600 steps x 4.3 s" in advise(found)["duration"]
    found.workers, found.threads, found.cores = 2, 2, 2
    assert advise(found)["limit"].startswith("cores, which computing and data workers share: ")
    found.threads = 1
    assert "More cores would help; else pack the data" in advise(found)["limit"]
