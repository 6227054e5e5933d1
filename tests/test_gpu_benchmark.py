"""The benchmark for a GPU: at toy sizes on the CPU all of it works; what fails is named, and what hangs is ended."""

import argparse
import math
import subprocess
import sys
import time
import warnings
from types import ModuleType

import pytest
import torch
from conftest import ROOT, TINY, load_benchmark

from model import ViTMAEForPreTraining

# Two files of a checkout of facebookresearch/mae: what they ask of timm and numpy, in their words
MODELS_MAE = """
import torch
from timm.models.vision_transformer import Block, PatchEmbed
from util.pos_embed import scale

class MaskedAutoencoderViT(torch.nn.Module):
    def __init__(self, img_size, patch_size, in_chans, embed_dim, depth, num_heads, decoder_embed_dim, decoder_depth,
                 decoder_num_heads, mlp_ratio, norm_pix_loss):
        super().__init__()
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.block = Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, qk_scale=None)
        self.scale = scale()

    def forward(self, imgs, mask_ratio):
        pred = self.block(self.patch_embed(imgs))
        return self.scale * mask_ratio * pred.square().mean(), pred, None
"""
POS_EMBED = """
import numpy as np

def scale():
    return np.ones(1, dtype=np.float).item()
"""


@pytest.fixture
def gpu(monkeypatch) -> ModuleType:
    return load_benchmark("gpu", monkeypatch)


def write_original(folder) -> None:
    (folder / "util").mkdir()
    (folder / "models_mae.py").write_text(MODELS_MAE)
    (folder / "util" / "pos_embed.py").write_text(POS_EMBED)


def tables(printed: str) -> dict[str, list[list[str]]]:
    """Give the rows under each title, the header first."""
    found, title = {}, ""
    for line in printed.splitlines():
        if line.startswith("|"):
            found.setdefault(title, []).append([cell.strip() for cell in line.strip("|").split("|")])
        elif line:
            title = line
    return {title: [rows[0], *rows[2:]] for title, rows in found.items()}


def test_every_section_prints_its_rows_at_toy_sizes(gpu, tmp_path):
    write_original(tmp_path)
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry_run", "--original", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    printed = tables(done.stdout)
    assert sum("cost against the mask ratio" in title for title in printed) == 2
    rows = {title.partition(":")[0]: rows for title, rows in printed.items()}
    columns = {name: section.columns.split(" | ") for name, section in gpu.SECTIONS.items() if section.columns}
    assert {name: rows[name].pop(0) for name in columns} == columns
    assert rows["machine"][-1][0] == "bfloat16 matrix rate, TFLOP/s"
    ours = [row for row in rows["pretraining"] if row[1] == gpu.OURS]
    assert [row[0] for row in ours if row[2] == gpu.COMPILED] == ["ViT-B", "ViT-L", "ViT-H"]
    assert {row[3] for row in ours} == {"2", "4"} and all(float(row[4]) > 0 for row in ours)
    measured = {row[1] for row in rows["pretraining"] if len(row) == len(columns["pretraining"])}
    assert {gpu.OURS, gpu.THEIRS, gpu.ORIGINAL} <= measured
    assert [row[1] for row in rows["checkpointing"]] == ["no", "yes"] * 3
    assert [row[0] for row in rows["classifier"]] == [gpu.EAGER, gpu.EAGER, gpu.COMPILED]
    segmented = [(kind, row) for kind in ("default", "as published") for row in ("training step", "windows", "whole")]
    assert [(row[1], row[0].removeprefix("labelling, ")) for row in rows["segmenter"]] == segmented
    assert [row[0] for row in rows["waiting"]] == ["1", "4"]
    (resumed,) = rows["resume"]
    assert resumed[2:] == ["checkpoint_3", "yes", "0.0e+00"] and 13 <= int(resumed[1]) < 24
    assert rows["steady"][0] == ["steps", "64"]


def test_batch_grows_until_memory_or_gain_or_time_ends(gpu, monkeypatch):
    def measure(step, timed_s) -> argparse.Namespace:
        if step == 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return argparse.Namespace(seconds=seconds[step])

    monkeypatch.setattr(gpu, "build_step", lambda network, optimizer, inputs, mode, compiler: inputs)
    monkeypatch.setattr(gpu, "time_calls", measure)

    def batches(until: float) -> list[tuple[int, bool]]:
        job = argparse.Namespace(compiler="eager", timed_s=0.0, is_over=lambda: time.time() > until)
        found = gpu.grow_batch(None, None, lambda batch: batch, gpu.EAGER, (1, 2, 4, 8, 16), job)
        return [(batch, measured is not None) for batch, measured in found]

    seconds = {1: 1, 2: 1, 4: 1}
    assert batches(math.inf) == [(1, True), (2, True), (4, True), (8, False)]
    assert batches(0) == [(1, True)]
    seconds = {1: 1, 2: 1, 4: 2}
    assert batches(math.inf) == [(1, True), (2, True), (4, True)]


def test_failure_is_a_row_and_the_next_section_goes_on(gpu, monkeypatch, capsys):
    def fail(job):
        yield ["one", "1"]
        raise torch.OutOfMemoryError("CUDA out of | memory\nand more")

    def note(job):
        job.failed = True
        yield ["two", "2"]

    rows = {"first": fail, "second": note, "third": lambda job: iter([["three", "3"]])}
    monkeypatch.setattr(gpu, "SECTIONS", {name: gpu.Section(1, "title", "a | b", of) for name, of in rows.items()})
    assert gpu.main(gpu.parse_args(["--dry_run"])) == 1
    printed = capsys.readouterr().out
    assert tables(printed) == {
        "first: title": [["a", "b"], ["one", "1"], ["first failed", "OutOfMemoryError: CUDA out of / memory and more"]],
        "second: title": [["a", "b"], ["two", "2"]],
        "third: title": [["a", "b"], ["three", "3"]],
    }
    assert printed.endswith("\nfailed: first, second\n")
    assert gpu.main(gpu.parse_args(["--dry_run", "--until", "1", "--sections", "first"])) == gpu.FAILED


def test_section_that_hangs_is_killed_with_its_children_and_one_that_dies_is_named(gpu, tmp_path, monkeypatch, capfd):
    script, note = tmp_path / "section.py", tmp_path / "note"
    child = f"import time; time.sleep(5); open({str(note)!r}, 'w')"
    script.write_text(
        f"import subprocess, sys\nprint('| a row |', flush=True)\nsubprocess.run([sys.executable, '-c', {child!r}])"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    args = gpu.parse_args([])
    assert not gpu.run_apart("machine", args, 3)
    assert capfd.readouterr().out == "| a row |\n| machine was stopped | its 3 s are up |\n"
    time.sleep(3)
    assert not note.exists()
    for code, line in ((gpu.FAILED, ""), (5, "| machine died | exit code 5 |\n")):
        script.write_text(f"raise SystemExit({code})")
        assert not gpu.run_apart("machine", args, 60) and capfd.readouterr().out == line
    script.write_text("")
    assert gpu.run_apart("machine", args, 60)


def test_without_a_gpu_the_real_sizes_are_refused(gpu):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="no CUDA GPU here; --dry_run"):
        gpu.main(gpu.parse_args([]))


def test_lightlys_network_trains(monkeypatch):
    pytest.importorskip("lightly", reason="lightly is not installed")
    step = load_benchmark("step", monkeypatch)
    network = load_benchmark("networks", monkeypatch).build_lightly(TINY, 0.75)
    images = torch.randn(2, 3, 16, 16)
    run = step.build_step(network, step.build_optimizer(network), [images], "float32 eager")
    before = network.predict.weight.clone()
    run()
    assert not torch.equal(network.predict.weight, before)


def test_what_waits_for_the_gpu_in_a_step_is_counted_and_placed(gpu, monkeypatch):
    """Torch's warnings are made by hand, two in each forward pass."""
    forward, runs = ViTMAEForPreTraining.forward, gpu.gpu_runs

    def waiting(self, *args, **options):
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return forward(self, *args, **options)

    monkeypatch.setattr(ViTMAEForPreTraining, "forward", waiting)
    monkeypatch.setattr(runs, "ON_GPU", True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5e6)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    found = dict(runs.watch_steps(runs.Job(math.inf, None, **gpu.TOY)))
    assert found["steps"] == "64" and found["MB allocated after the last"] == "5.0"
    assert found["times that a usual step waits for the GPU"] == "2"
    assert found["times in all, with log rows and ends of epochs"] == str(2 * 63)
    assert [name for name, count in found.items() if count == str(2 * 63)][1].startswith("of these at test_gpu_bench")
