"""Rows 11, 16 and 17: bad images, files that would run code, and weights of something else."""

import json
import os
import pickle
import shlex
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from faults.conftest import draw_data
from faults.harness import Job, check_exact, result_of
from storage.files import checksum_of

# ------------------------------------------------------------------------------------------------ bad images


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 3)


def no_bytes(file: Path) -> None:
    file.write_bytes(b"")


def web_page(file: Path) -> None:
    file.write_text("<!doctype html><title>404</title>")


def huge(file: Path) -> None:
    """Declare 40,000 x 40,000 pixels in a few bytes of PNG."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    file.write_bytes(content)


def print_colours(file: Path) -> None:
    Image.open(file).convert("CMYK").save(file)


def deep_grey(file: Path) -> None:
    grey = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(grey).save(file, format="PNG")


BAD, UNUSUAL = (truncated, no_bytes, web_page, huge), (print_colours, deep_grey)


@pytest.fixture
def own_data(tmp_path) -> Callable[[str], Path]:
    return lambda script: draw_data(script, tmp_path / "data")


def with_data(job: Job, data: Path) -> Job:
    return job.with_flags(f"--path_to_data {data} --save_minutes 0")


def test_bad_images_are_named_and_replaced_and_the_run_is_exact(job, own_data, faults, tmp_path):
    data = own_data("pretrain_mae")
    images = sorted((data / "train" / "cats").iterdir())
    for hurt, file in zip((*BAD, *UNUSUAL), images, strict=False):
        hurt(file)
    lost = images[len(BAD) + len(UNUSUAL)]
    content = lost.read_bytes()
    bad = {str(file) for file in images[: len(BAD)]} | {str(lost)}
    with faults(11, "bad, unusual and missing training images, pretrain_mae") as count:
        count.injected += len(BAD) + len(UNUSUAL) + 1
        tolerant = with_data(job("pretrain_mae", tmp_path / "whole"), data).with_flags("--max_bad_fraction 0.2")
        printed = tolerant.finish(("lose_file", {"file": str(lost)}))
        named = (tolerant.experiment / "bad_files.txt").read_text().splitlines()
        assert {line.split("\t")[0] for line in named} == bad and len(named) == len(bad)
        assert all(f"cannot be used, replaced by another: {file}" in printed for file in bad)

        lost.write_bytes(content)
        again = tolerant.inside(tmp_path / "again")
        steps = ("save_at", {"steps": [7, 14]})
        lose = ("lose_file", {"file": str(lost)})
        assert again.start(lose, steps, ("die", {"rank": 0, "step": 16})).wait() == -9
        lost.write_bytes(content)
        again.finish(lose)
        check_exact(again.experiment, tolerant.experiment)
        count.survived += len(BAD) + len(UNUSUAL) + 1

        lost.write_bytes(content)
        strict = with_data(job("pretrain_mae", tmp_path / "strict"), data).with_flags("--max_bad_fraction 0.05")
        count.injected += 1
        assert "of 40 images cannot be used, more than --max_bad_fraction 0.05" in strict.fail()
        count.survived += 1


def test_data_without_one_good_image_stops_the_run(job, own_data, faults, tmp_path):
    data = own_data("finetune_classifier")
    for file in data.glob("train/*/*"):
        web_page(file)
    with faults(11, "no training image can be decoded, finetune_classifier") as count:
        count.injected += 1
        printed = with_data(job("finetune_classifier", tmp_path / "work"), data).fail()
        assert "100 files in a row cannot be decoded; the last is" in printed
        count.survived += 1


@pytest.mark.parametrize("script", ["finetune_classifier", "finetune_segmentation"])
def test_bad_validation_image_is_an_error_that_names_it(script, job, own_data, faults, full, tmp_path):
    if script != "finetune_classifier" and not full:
        pytest.skip("with --full")
    data = own_data(script)
    bad = sorted(path for path in data.rglob("*.jpg") if "val" in str(path.relative_to(data)))[0]
    truncated(bad)
    with faults(11, f"a validation image is truncated, {script}") as count:
        count.injected += 1
        printed = with_data(job(script, tmp_path / "work"), data).fail()
        assert str(bad) in printed and "Error" in printed
        assert not list(tmp_path.rglob("checkpoint_*"))
        count.survived += 1


# ------------------------------------------------------------------------------------------------ files that run code


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = str(trace)

    def __reduce__(self):
        return open, (self.trace, "w")


def hostile_bytes(form: str, trace: Path, folder: Path) -> bytes:
    if form == "pickle":
        return pickle.dumps({"model": Payload(trace)})
    file = folder / "hostile"
    torch.save({"model": Payload(trace)}, file)
    content = file.read_bytes()
    file.unlink()
    return content


def write_manifest(folder: Path) -> None:
    """Make the manifest agree with the files, as whoever changes them can."""
    files = {
        file.name: {"bytes": file.stat().st_size, "crc32": checksum_of(file)}
        for file in folder.iterdir()
        if file.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


@pytest.fixture(scope="module")
def unfinished(job, tmp_path_factory) -> Job:
    died = job("finetune_classifier", tmp_path_factory.mktemp("unfinished"))
    assert died.start(("save_at", {"steps": [14]}), ("die", {"rank": 0, "step": 15})).wait() == -9
    return died


REPLACED = ("model.safetensors", "ema.safetensors", "optimizer.bin", "random_states_0.pkl", "config.json", "state.json")
# What load_state of one or another version looks for beside them, or instead of them.
ADDED = ("custom_checkpoint_0.pkl", "scheduler.bin", "sampler.bin", "scaler.pt", "dl_state_dict.bin")
# Accelerate passes over random states that it cannot read, and no number of a run hangs on them. What was registered
# to be loaded it counts, and refuses any more.
NEVER_NEEDED = (*ADDED[1:], "random_states_0.pkl")
INSTEAD = {"pytorch_model.bin": "model.safetensors"}


def test_payload_of_these_tests_runs_when_it_is_unpickled(tmp_path):
    for form in ("pickle", "torch"):
        content = hostile_bytes(form, tmp_path / form, tmp_path)
        if form == "torch":
            (tmp_path / "file").write_bytes(content)
            content = zipfile.ZipFile(tmp_path / "file").read("hostile/data.pkl")
        pickle.loads(content)
        assert (tmp_path / form).exists()


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_no_file_of_a_checkpoint_is_executed(form, unfinished, undisturbed, faults, full, tmp_path):
    with faults(16, f"{form} that runs code as a checkpoint's file, finetune_classifier") as count:
        for name in (*REPLACED, *ADDED, *INSTEAD) if full or form == "torch" else REPLACED[2:4]:
            trace = tmp_path / f"{name}.executed"
            work = tmp_path / name
            shutil.copytree(unfinished.experiment, work / "run", symlinks=True)
            newest = work / "run" / "checkpoint_1_step_14"
            (newest / name).write_bytes(hostile_bytes(form, trace, tmp_path))
            if name in INSTEAD:
                (newest / INSTEAD[name]).unlink()
            write_manifest(newest)
            count.injected += 1
            run = unfinished.inside(work).start()
            code = run.wait()
            assert not trace.exists(), (name, run.printed())
            assert code == (0 if name in NEVER_NEEDED else 1), (name, run.printed())
            if code == 0:
                check_exact(work / "run", undisturbed("finetune_classifier"))
            count.survived += 1


WEIGHT_FLAGS = {
    "finetune_classifier": "--path_to_pretrained_mae_weights",
    "finetune_segmentation": "--path_to_backbone_checkpoint",
}


@pytest.mark.parametrize("script", WEIGHT_FLAGS)
@pytest.mark.parametrize("name", ["weights.pth", "folder/model.safetensors"])
def test_weights_to_start_from_are_not_executed(script, name, job, faults, full, tmp_path):
    if (script == "finetune_classifier") != name.endswith(".pth") and not full:
        pytest.skip("with --full")
    with faults(16, f"{name} that runs code, {script}") as count:
        for form in ("pickle", "torch"):
            trace, file = tmp_path / f"{form}.executed", tmp_path / form / name
            file.parent.mkdir(parents=True)
            file.write_bytes(hostile_bytes(form, trace, tmp_path))
            given = file if file.suffix == ".pth" else file.parent
            start = job(script, tmp_path / form / "work")
            flags = tuple(flag for flag in start.flags if flag != "--from_scratch")
            count.injected += 1
            run = Job(start.zygote, script, (*flags, WEIGHT_FLAGS[script], str(given)), start.work).start()
            assert run.wait() != 0 and not trace.exists(), run.printed()
            assert str(given) in run.printed()
            count.survived += 1


# ------------------------------------------------------------------------------------------------ weights of another


def start_from(job: Job, weights: Path, more: str = "") -> Job:
    flags = tuple(flag for flag in job.flags if flag != "--from_scratch")
    given = (WEIGHT_FLAGS[job.script], str(weights), "--save_minutes", "0", *shlex.split(more))
    return Job(job.zygote, job.script, (*flags, *given), job.work)


def copied(experiment: Path, work: Path) -> None:
    shutil.copytree(experiment, work / "run", symlinks=True)


def test_checkpoint_of_another_run_is_refused_with_the_difference(job, undisturbed, faults, full, tmp_path):
    cases = [  # the script that wrote it, the one that resumes, flags, and what is said
        ("pretrain_mae", "pretrain_mae", "--decoder_depth 2", "config.decoder_depth: 1 in the checkpoint, 2 now"),
        ("pretrain_mae", "pretrain_mae", "--patch_size 4", "config.patch_size: 8 in the checkpoint, 4 now"),
        ("finetune_segmentation", "finetune_classifier", "", "architecture: 'ViTMAEForSegmentation' in the checkpoint"),
        ("pretrain_mae", "finetune_classifier", "", "architecture: 'ViTMAEForPreTraining' in the checkpoint"),
    ]
    with faults(17, "checkpoint of another model or task resumed") as count:
        for number, (wrote, resumes, more, message) in enumerate(cases):
            copied(undisturbed(wrote), tmp_path / str(number))
            before = result_of(tmp_path / str(number) / "run")
            count.injected += 1
            printed = job(resumes, tmp_path / str(number)).with_flags(more).fail()
            assert message in printed, printed
            assert result_of(tmp_path / str(number) / "run") == before
            count.survived += 1


def test_weights_of_another_size_are_refused_and_what_is_left_out_is_said(job, undisturbed, faults, tmp_path):
    pretrained = undisturbed("pretrain_mae") / "checkpoint_3"
    with faults(17, "weights of another size, patch or task to start from") as count:
        fitting = start_from(job("finetune_classifier", tmp_path / "fitting"), pretrained, "--encoder_depth 1")
        count.injected += 1
        printed = fitting.finish()
        assert "decoder" in printed.split("start  ")[1].splitlines()[0], printed
        count.survived += 1
        for number, (more, message) in enumerate([
            ("--encoder_depth 2", "encoder_depth"),
            ("--encoder_depth 1 --patch_size 4", "patch_size"),
        ]):  # fmt: skip
            count.injected += 1
            printed = start_from(job("finetune_classifier", tmp_path / str(number)), pretrained, more).fail()
            assert message in printed.splitlines()[-1], printed
            count.survived += 1
