"""Processes, kernels and lists: what a launcher gets wrong, and what processes put together."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from conftest import ROOT

from training import process
from training.process import cap_workers, collect_features, gather_slices, process_slice

# -------------------------------------------------------------------------------- set-up


def test_cap_workers_shares_the_cores(monkeypatch):
    monkeypatch.setattr(process.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert cap_workers(32) == 8 and cap_workers(3) == 3 and cap_workers(0) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cap_workers(32) == 2


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
def test_freed_memory_is_kept_on_the_cpu_unless_the_environment_chooses():
    """A tensor of 64 MB, freed and made again and again: in the end without a page fault where memory is kept."""
    script = """
import os, resource, torch
from training import process
def faults():
    process.build_accelerator(1)
    for _ in range(30):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults())
del os.environ["MALLOC_TRIM_THRESHOLD_"]
print(faults())
"""
    ours = {"MALLOC_TRIM_THRESHOLD_": "131072", "ACCELERATE_USE_CPU": "true"}
    outer = {name: value for name, value in os.environ.items() if name != "MALLOC_MMAP_MAX_"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=outer | ours, capture_output=True, text=True, check=True
    )
    left_alone, kept = map(int, done.stdout.split())
    assert left_alone >= 16 > kept


# -------------------------------------------------------------------------------- between processes


def one_of_two(rank, gather=None, distributed_type=DistributedType.MULTI_CPU):
    """Stand for the Accelerator of one of two processes."""
    return argparse.Namespace(
        process_index=rank, num_processes=2, distributed_type=distributed_type, gather=gather, device="cpu"
    )


def test_slice_of_an_evaluation_is_every_second_image_but_all_of_a_sharded_model():
    assert [process_slice(one_of_two(rank)) for rank in (0, 1)] == [(0, 2), (1, 2)]
    assert process_slice(one_of_two(1, distributed_type=DistributedType.FSDP)) == (0, 1)


def test_gathered_slices_are_in_the_order_of_the_items():
    """Five items, of which one process found 0, 2, 4 and the other 1, 3."""
    items = torch.arange(10).view(5, 2)
    padded = torch.cat([items[1::2], torch.zeros(1, 2, dtype=torch.int64)])  # what the other process sends
    accelerator = one_of_two(0, gather=lambda ours: torch.cat([ours, padded]))
    assert torch.equal(gather_slices(accelerator, items[::2], 5), items)
    assert gather_slices(Accelerator(cpu=True), items, 5) is items


def test_collected_features_have_unit_length_and_enough_images_for_all_processes():
    batches = [argparse.Namespace(images=torch.tensor([[3.0, 4.0]]), labels=torch.tensor([label])) for label in (1, 0)]
    features, labels = collect_features(Accelerator(cpu=True), batches, 2, lambda images: images.double() * 2)
    torch.testing.assert_close(features, torch.tensor([[0.6, 0.8], [0.6, 0.8]]))
    assert labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match="1 images are fewer than 2 processes; start fewer"):
        collect_features(one_of_two(0), [], 1, lambda images: images)


def test_half_precision_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match=r"fp16 is for GPUs.*give bf16 or no"):
        process.build_accelerator()


# -------------------------------------------------------------------------------- what it runs on


def test_environment_names_commit_hardware_and_versions(monkeypatch):
    found = process.describe_environment(Accelerator(cpu=True))
    assert json.loads(json.dumps(found)) == found and all(isinstance(value, str) for value in found.values())
    assert (found["torch"], found["python"]) == (torch.__version__, platform.python_version())
    assert found["hardware"].startswith("1 x ") and found["hardware"].endswith(f" {torch.get_num_threads()} threads")
    git = subprocess.run(["git", "-C", ROOT, "log", "-1", "--format=%h"], capture_output=True, text=True, check=False)
    assert found["commit"].removesuffix(" with changes") == (git.stdout.strip() or "unknown")


@pytest.mark.parametrize(
    "git, found",
    [
        (None, "unknown"),
        ("exec sleep 30", "unknown"),  # a disk at the other end of a network
        ("printf '\\377\\n'", "\ufffd with changes"),  # a name that is no UTF-8, where core.quotePath is off
    ],
)
def test_git_that_is_absent_slow_or_odd_does_not_hold_up_a_run(tmp_path, monkeypatch, git, found):
    if git is not None:
        (tmp_path / "git").write_text(f"#!/bin/sh\n{git}\n")
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=None if git is None else os.pathsep)
    monkeypatch.setattr(process, "GIT_TIMEOUT_S", 0.2)
    start = time.monotonic()
    assert process.find_commit() == found and time.monotonic() - start < 10
