"""The launch files mean what they say, and a sharded run is a plain one."""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from conftest import ROOT, TINY, rows, weights
from test_equality import COMMON, SCRIPTS
from torch.distributed.fsdp import StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from model import ViTMAEForPreTraining

CONFIGS = ROOT / "configs"

PROCESSES = {
    "cpu": (1, 1, "no"),
    "one_gpu": (1, 1, "bf16"),
    "one_node_8_gpus": (1, 8, "bf16"),
    "several_nodes": (4, 32, "bf16"),
    "fsdp": (1, 8, "no"),
}


def launch_arguments(path: Path, *flags: str):
    """Give what `accelerate launch --config_file` makes of a file; ValueError for a key that it does not know."""
    command = ["--config_file", str(path), *flags, "script.py"]
    return _validate_launch_command(launch_command_parser().parse_args(command))[0]


def launch_environment(path: Path) -> dict[str, str]:
    """Give what `accelerate launch --config_file` puts into the environment of the processes."""
    args = launch_arguments(path, "--main_process_port", "0")
    several = args.multi_gpu or args.use_fsdp
    environment = prepare_multi_gpu_env(args) if several else prepare_simple_launcher_cmd_env(args)[1]
    return {name: value for name, value in environment.items() if os.environ.get(name) != value}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_file_starts_what_it_says(path):
    args, (machines, processes, precision) = launch_arguments(path), PROCESSES[path.stem]
    assert (args.num_machines, args.num_processes) == (machines, processes)
    assert (args.multi_gpu, args.use_fsdp, args.use_cpu) == (
        path.stem in ("one_node_8_gpus", "several_nodes"),
        path.stem == "fsdp",
        path.stem == "cpu",
    )
    found = launch_environment(path)
    assert found["ACCELERATE_MIXED_PRECISION"] == precision
    assert found["ACCELERATE_DYNAMO_BACKEND"] == "NO"


def test_launch_file_of_several_machines_meets_at_the_address_and_port_that_are_given():
    place = ("--machine_rank", "1", "--main_process_ip", "node7", "--main_process_port", "17000")
    args = launch_arguments(CONFIGS / "several_nodes.yaml", *place)
    prepare_multi_gpu_env(args)
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("static", "node7:17000")
    assert (args.nnodes, args.node_rank, args.nproc_per_node) == ("4", 1, "8")


def test_launch_file_names_no_setting_that_a_default_of_accelerate_wins_over():
    """A key that its parser has a default for is read from the command line alone."""
    parsed = vars(launch_command_parser().parse_args(["script.py"]))
    for path in CONFIGS.glob("*.yaml"):
        keys = re.findall(r"^(\w+):", path.read_text(), re.MULTILINE)
        assert not [key for key in keys if parsed.get(key) is not None], path.name


def test_sharded_launch_file_wraps_the_blocks_of_the_model(monkeypatch):
    for name, value in launch_environment(CONFIGS / "fsdp.yaml").items():
        monkeypatch.setenv(name, value)
    plugin, model = FullyShardedDataParallelPlugin(), ViTMAEForPreTraining(TINY)
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.state_dict_type is StateDictType.SHARDED_STATE_DICT
    assert plugin.mixed_precision_policy is None  # float32
    assert not plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
    names = [type(module).__name__ for module in model.modules()]
    found = [name for name in names if name in plugin.transformer_cls_names_to_wrap]
    assert len(found) == TINY.encoder_depth + TINY.decoder_depth


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Give weights, moments and step counts, in whole, from the files that all runs write."""
    entries = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    moments = {f"{index}.{name}": value for index, entry in entries.items() for name, value in entry.items()}
    assert len(moments) == 3 * len(entries)  # two moments and the step
    return weights(checkpoint) | moments


@pytest.mark.parametrize("script", SCRIPTS)
def test_sharded_run_is_the_plain_run(script, fork, drawn_images, drawn_pairs, tmp_path, request):
    """On two processes of the CPU, in double precision; Accelerate takes them for two GPUs (shard_on_cpu).

    The second step is not finite on one of them. From the first third of the sharded run, one plain process goes on,
    and from its second third two sharded ones.
    """
    if script != "pretrain_mae" and not request.config.getoption("--full"):
        pytest.skip("with --full")
    data, third = (drawn_pairs, 2) if "segmentation" in script else (drawn_images, 1)  # epochs
    own = SCRIPTS[script].replace("--ema_decay 0.9", "")  # refused with sharded weights
    flags = f"{COMMON} {own} --epochs {3 * third} --save_checkpoint_interval {third} --path_to_data {data}"
    sharding = launch_environment(CONFIGS / "fsdp.yaml") | {"ACCELERATE_USE_CPU": "false"}

    def run(name: str, start: Path | None, *faults: tuple[str, dict], num_processes: int = 2, **environment) -> Path:
        if start is not None:
            shutil.copytree(start, tmp_path / name / "run" / start.name)
        command = f"{flags} --per_gpu_batch_size {4 // num_processes} --working_directory {tmp_path / name}"
        arguments = shlex.split(f"{command} --resume_from_checkpoint latest --keep_checkpoints 9")
        fork(script, arguments, ("in_float64", {}), *faults, num_processes=num_processes, **environment)
        return tmp_path / name / "run"

    poisoned, on_cpu = ("poison", {"rank": 1, "passes": [2]}), ("shard_on_cpu", {})
    plain, sharded = run("plain", None, poisoned), run("sharded", None, poisoned, on_cpu, **sharding)
    alone = run("alone", sharded / f"checkpoint_{third}", num_processes=1)
    again = run("again", alone / f"checkpoint_{2 * third}", on_cpu, **sharding)
    expected = tensors(plain / "last_checkpoint")
    for other in (sharded, alone, again):
        found = tensors(other / "last_checkpoint")
        assert found.keys() == expected.keys()
        differences = {name: (found[name] - value).abs().max().item() for name, value in expected.items()}
        print(f"{script}, {other.parent.name}: largest difference {max(differences.values()):.1e}")
        assert max(differences.values()) < 1e-9  # rounding: sums are taken over two processes, or over one
    losses = [[row["training_loss"] or 0 for row in rows(folder)] for folder in (plain, sharded)]  # none where skipped
    assert [row["nonfinite_steps"] for row in rows(plain)[-1:] + rows(sharded)[-1:]] == [1, 1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
