"""The launch files name only what Accelerate knows."""

import subprocess

import pytest
from accelerate.commands.config import load_config_from_file
from conftest import ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_launch_file_is_understood_by_accelerate(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == {"cpu": 1, "one_gpu": 1, "several_nodes": 32}.get(path.stem, 8)
    assert config.mixed_precision == ("no" if path.stem in ("cpu", "fsdp") else "bf16")


def test_slurm_script_is_valid_bash():
    done = subprocess.run(["bash", "-n", str(ROOT / "configs" / "several_nodes.slurm")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
