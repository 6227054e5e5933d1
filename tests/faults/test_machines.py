"""Row 28: two machines, each with a copy of its own of the code, of which one dies; on 127.0.0.1, by real launchers."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

from faults.conftest import SAVE_OFTEN
from faults.harness import LAST_BREATH_S, TIMEOUT_S, Job, check_exact, free_port

ACCELERATE = """-m accelerate.commands.launch --multi_gpu --num_machines 2 --num_processes 2 --machine_rank {rank}
 --main_process_ip 127.0.0.1 --main_process_port {port}"""
TORCHRUN = """-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --node_rank {rank} --master_addr 127.0.0.1
 --master_port {port}"""


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> list[Path]:
    """The working copies of two machines."""
    places = [tmp_path_factory.mktemp("machine") / "code" for _ in range(2)]
    for place in places:
        shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".*", "tests", "work_dir", "__pycache__"))
    return places


def start_both(launcher: str, job: Job, copies: list[Path]) -> list[subprocess.Popen]:
    """Start the same command on both machines, with the working directory that they share."""
    job.work.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    port, started = free_port(), []
    for rank, place in enumerate(copies):
        words = launcher.format(rank=rank, port=port).split()
        command = [sys.executable, *words, f"{job.script}.py", *job.arguments()]
        with (job.work / f"output_{rank}.txt").open("ab") as output:
            started.append(subprocess.Popen(command, cwd=place, env=environment, stdout=output, stderr=output))
    return started


def tree(machine: subprocess.Popen) -> list[psutil.Process]:
    try:
        process = psutil.Process(machine.pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def lose(machine: subprocess.Popen) -> None:
    """Let a machine die: all of its processes at once."""
    for process in tree(machine):
        process.kill()
    machine.wait()


def wait_for_step(job: Job, step: int, machines: list[subprocess.Popen]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while job.last_step() < step:
        assert time.monotonic() < end and all(machine.poll() is None for machine in machines), printed(job)
        time.sleep(0.01)


def printed(job: Job) -> str:
    return "\n".join(file.read_text(errors="replace")[-4000:] for file in sorted(job.work.glob("output_*.txt")))


@pytest.mark.parametrize(("launcher", "name"), [(ACCELERATE, "accelerate launch"), (TORCHRUN, "torchrun")])
def test_run_of_two_machines_of_which_one_dies_ends_exactly(
    launcher, name, copies, job, undisturbed, faults, full, tmp_path
):
    """The other machine's processes end by themselves; the same command on both goes on from the newest state."""
    if launcher is TORCHRUN and not full:
        pytest.skip("with --full")
    generator, whole = random.Random(0), undisturbed("pretrain_mae", 2)
    with faults(28, f"one of two machines dies, {name}, pretrain_mae") as count:
        for number in range(6 if full else 1):
            hurt = job("pretrain_mae", tmp_path / str(number), 2).with_flags(SAVE_OFTEN)
            machines = start_both(launcher, hurt, copies)
            wait_for_step(hurt, generator.randrange(2, 20), machines)
            other, processes = machines[number % 2], tree(machines[number % 2])
            lose(machines[1 - number % 2])
            count.injected += 1
            assert other.wait(LAST_BREATH_S) != 0, printed(hurt)
            _, left = psutil.wait_procs(processes, LAST_BREATH_S)
            assert not left, left
            assert [machine.wait(TIMEOUT_S) for machine in start_both(launcher, hurt, copies)] == [0, 0], printed(hurt)
            check_exact(hurt.experiment, whole)
            count.survived += 1
