"""Row 29: packing that is killed at random moments and started again with the same command ends as if undisturbed."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT, draw_images

from faults.harness import LAST_BREATH_S

FLAGS = ["--num_workers", "2", "--images_per_shard", "3", "--short_side", "12"]


def pack_and_kill(source: Path, output: Path, delay_s: float | None) -> bool:
    """Start packing, kill it a while after its workers came up, and wait for these; True where it died of that."""
    command = [sys.executable, str(ROOT / "tools" / "pack_dataset.py"), str(source), "--output", str(output), *FLAGS]
    packer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if delay_s is None:
        assert packer.wait() == 0
        return False
    below = Path(f"/proc/{packer.pid}/task/{packer.pid}/children")
    while packer.poll() is None and not below.read_text():
        time.sleep(0.001)
    time.sleep(delay_s)
    workers = below.read_text().split() if packer.poll() is None else []
    packer.kill()
    died = packer.wait() == -signal.SIGKILL
    end = time.monotonic() + LAST_BREATH_S
    while any(Path("/proc", pid).exists() for pid in workers):
        assert time.monotonic() < end, "a worker outlived its packer"
        time.sleep(0.01)
    return died


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_packing_leaves_no_process_and_ends_as_an_undisturbed_one(faults, full, tmp_path):
    draw_images(tmp_path / "images" / "cats", 12)
    draw_images(tmp_path / "images" / "dogs", 12, seed=1)
    pack_and_kill(tmp_path / "images", tmp_path / "whole", None)
    generator, expected = random.Random(0), contents(tmp_path / "whole")
    with faults(29, "kill -9 of packing") as count:
        for number in range(20 if full else 1):
            output, died = tmp_path / str(number), 0
            for _ in range(4):
                died += pack_and_kill(tmp_path / "images", output, generator.uniform(0, 0.1))
            pack_and_kill(tmp_path / "images", output, None)
            count.injected += died
            assert contents(output) == expected
            count.survived += died
        assert count.injected > 0
