"""The Slurm script asks for what a cluster has, comes back when its time is up, and else ends as its run did.

Slurm's commands, and mostly `accelerate launch`, are stand-ins here: small programs that come first on the PATH.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, rows

import pretrain_mae

SCRIPT = ROOT / "configs" / "several_nodes.slurm"
WAIT_S = 20
KILLED = 128 + signal.SIGKILL  # srun's code where the first launcher to fail made it kill the other
STOPPED = (1, KILLED)  # launchers that are signalled end with 1, when their run has saved

# Each begins with `place`, the folder where they leave what they were told.
STAND_INS = {
    # Runs a command once for each machine; gives the highest exit code, as srun does.
    "srun": """
words, options = sys.argv[1:], {}
while words[0].startswith("--"):
    name, _, options[name] = words.pop(0).partition("=")
environment = dict(os.environ)
if environment.get("SLURM_EXPORT_ENV") == "NONE" and options.get("--export") != "ALL":
    environment = {k: v for k, v in environment.items() if k.startswith("SLURM") or k in ("PATH", "HOME")}
environment["CPUS_OF_TASK"] = options.get("--cpus-per-task", environment.get("SRUN_CPUS_PER_TASK", "1"))
nodes = range(int(os.environ["SLURM_NNODES"]))
tasks = [subprocess.Popen(words, env=environment | {"SLURM_NODEID": str(node)}) for node in nodes]
(place / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
codes = {}
while len(codes) < len(tasks):
    pid, status = os.wait()
    codes[pid] = os.waitstatus_to_exitcode(status)
    if codes[pid] and options.get("--kill-on-bad-exit") == "1":
        for task in tasks:
            if task.pid not in codes:
                os.kill(task.pid, signal.SIGKILL)
code = max(128 - code if code < 0 else code for code in codes.values())
(place / "code").write_text(str(code))
sys.exit(code)
""",
    "scontrol": """
if sys.argv[1] == "show":
    for node in range(20_000 if "many" in sys.argv[3] else 2):
        print("localhost" if "here" in sys.argv[3] else f"node{node}")
else:
    with open(place / "requeued", "a") as file:
        file.write(sys.argv[2] + "\\n")
""",
    "scancel": """
(place / "signalled").write_text(sys.argv[2])
assert sys.argv[1] == "--signal=TERM"
for pid in (place / "tasks").read_text().split():
    os.kill(int(pid), signal.SIGTERM)
""",
    # A launcher with its run: one that is signalled ends with 1. It leaves a checkpoint as ours do.
    "accelerate": """
import argparse, json, time
own = sys.argv.index("pretrain_mae.py")
flags = dict(zip(sys.argv[2:own:2], sys.argv[3:own:2]))
parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("--working_directory", default="work_dir")
parser.add_argument("--experiment_name", default="MAEPretraining")
args, _ = parser.parse_known_args(sys.argv[own + 1:])
experiment = pathlib.Path(os.path.expanduser(args.working_directory), args.experiment_name)
behaviour, node, stop = (place / "behaviour").read_text(), int(flags["--machine_rank"]), []

def save():
    # All processes leave together, when the first one has saved.
    while node > 0 and not (place / "saved").exists():
        time.sleep(0.01)
    if node == 0:
        name = f"checkpoint_0_step_{time.time_ns()}"
        (experiment / name).mkdir(parents=True)
        if behaviour == "late clock":
            os.utime(experiment / name, (1e9, 1e9))
        (experiment / "last_checkpoint").unlink(missing_ok=True)
        (experiment / "last_checkpoint").symlink_to(name)
        if "finish" in behaviour:
            (experiment / "DONE").touch()
        (place / "saved").touch()

signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
record = dict(flags=flags, words=sys.argv[own + 1:], experiment=str(experiment), environment=dict(os.environ))
(place / f"launch_{node}.tmp").write_text(json.dumps(record))
os.rename(place / f"launch_{node}.tmp", place / f"launch_{node}.json")
print(f"started as job {os.environ.get('SLURM_JOB_ID')}", flush=True)
if behaviour == "mistake in a flag":
    sys.exit(2)
if behaviour == "crash":
    save()
    sys.exit(3)
if behaviour == "finish" and node == 0:
    save()
if behaviour == "finish":
    sys.exit(0)
if behaviour == "crash of one machine" and node == 1:
    sys.exit(3)
while not stop:
    time.sleep(0.01)
if behaviour != "no step":
    save()
sys.exit(1)
""",
}


class Cluster:
    """A folder to submit from, the stand-ins, and what sbatch makes of the script's options."""

    def __init__(self, tmp_path: Path, behaviour: str):
        self.place, self.repository = tmp_path / "slurm", tmp_path / "repo"
        self.log, self.temporary, self.job = self.place / "log", tmp_path / "temporary", None
        for folder in (self.place / "bin", self.repository, self.temporary):
            folder.mkdir(parents=True)
        for name in ("configs", "pretrain_mae.py"):
            (self.repository / name).symlink_to(ROOT / name)
        head = f"#!{sys.executable} -IS\nimport os, pathlib, signal, subprocess, sys\n"
        for name, text in STAND_INS.items():
            file = self.place / "bin" / name
            file.write_text(f"{head}place = pathlib.Path({str(self.place)!r})\n{text}")
            file.chmod(0o755)
        self.behave(behaviour)
        self.options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", SCRIPT.read_text(), re.MULTILINE))

    def behave(self, behaviour: str) -> None:
        (self.place / "behaviour").write_text(behaviour)

    def submit(self, *arguments: str, number: int = 77, **environment: str | None) -> None:
        """Start the script as a job of two machines; a variable that is None is one that Slurm does not set."""
        variables = {
            "PATH": f"{self.place / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.repository),
            "TMPDIR": str(self.temporary),
            "SLURM_JOB_ID": str(number),
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "128",
            **environment,
        }
        variables = {name: value for name, value in variables.items() if value is not None}
        for file in (file for name in ("launch_*", "saved", "code") for file in self.place.glob(name)):
            file.unlink()
        mode = "a" if self.options.get("open-mode") == "append" else "w"
        with self.log.open(mode) as log:
            command, options = ["bash", str(SCRIPT), *arguments], dict(stdout=log, stderr=log, env=variables)
            self.job = subprocess.Popen(command, cwd=self.repository, start_new_session=True, **options)

    def launches(self) -> list[dict]:
        """Wait until both launchers are started, and give what they were told."""
        files = [self.place / f"launch_{node}.json" for node in (0, 1)]
        self.until(lambda: all(file.exists() for file in files))
        return [json.loads(file.read_text()) for file in files]

    def until(self, condition: Callable[[], bool], timeout: float = WAIT_S) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.job.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)

    def time_is_nearly_up(self) -> None:
        """Send what --signal asks for: to the script with B:, else to the tasks."""
        whom, name = re.fullmatch(r"(B:)?(\w+)@\d+", self.options["signal"]).groups()
        if whom:
            os.kill(self.job.pid, getattr(signal, f"SIG{name}"))
        else:
            self.cancel(getattr(signal, f"SIG{name}"))

    def cancel(self, number: int = signal.SIGTERM) -> None:
        for pid in (self.place / "tasks").read_text().split():
            os.kill(int(pid), number)

    def end(self) -> tuple[int, list[str]]:
        """Wait for the end; give the exit code, which is srun's, and the jobs that were put back into the queue."""
        code, file = self.job.wait(WAIT_S), self.place / "requeued"
        if (self.place / "code").exists():
            assert code == int((self.place / "code").read_text()), self.log.read_text()
        return code, file.read_text().split() if file.exists() else []

    def close(self) -> None:
        if self.job is not None:
            with contextlib.suppress(ProcessLookupError):  # all have ended
                os.killpg(self.job.pid, signal.SIGKILL)
            self.job.wait()


@pytest.fixture
def cluster(tmp_path) -> Iterator[Callable[[str], Cluster]]:
    made = []

    def make(behaviour: str) -> Cluster:
        made.append(Cluster(tmp_path, behaviour))
        return made[0]

    yield make
    for one in made:
        one.close()


# ------------------------------------------------------------------------------------------------ jobs


def test_slurm_script_passes_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


FORMS = {
    "none": ([], "work_dir/MAEPretraining"),
    "words": (["--experiment_name", "b", "--working_directory", "other"], "other/b"),
    "equals signs": (["--experiment_name=b=c", "--working_directory=other"], "other/b=c"),
    "spaces and quotes": (
        ["--working_directory", 'my "runs"', "--experiment_name=it's $HOME *"],
        'my "runs"/it\'s $HOME *',
    ),
    "last one": (
        ["--experiment_name=a", "--working_directory", "x", "--working_directory=y", "--experiment_name", "b"],
        "y/b",
    ),
    "home": (["--working_directory=~/runs"], "~/runs/MAEPretraining"),
    "demo": (["--demo"], "work_dir/MAEPretraining"),
    "in a value": (["--wandb_run_name=--experiment_name", "--seed", "1"], "work_dir/MAEPretraining"),
}


@pytest.mark.parametrize("form", FORMS)
def test_slurm_job_whose_time_is_up_comes_back_whatever_its_folder(form, cluster, monkeypatch):
    flags, expected = FORMS[form]
    one = cluster("train")
    one.submit(*flags)
    told = one.launches()[0]
    one.time_is_nearly_up()
    code, requeued = one.end()
    assert code in STOPPED and requeued == ["77"]
    # The stand-in and the real script agree about the folder.
    monkeypatch.chdir(one.repository)
    monkeypatch.setenv("HOME", str(one.repository))
    args = pretrain_mae.parse_args([*told["words"], "--path_to_data", "."])
    experiment = Path(args.working_directory, args.experiment_name)
    assert experiment == Path(told["experiment"]) == Path(os.path.expanduser(expected))
    assert args.resume_from_checkpoint == "latest"


@pytest.mark.parametrize(("behaviour", "code"), [("finish", 0), ("crash", 3), ("mistake in a flag", 2)], ids=str)
def test_slurm_job_that_ends_by_itself_ends_with_its_code_and_stays_away(behaviour, code, cluster):
    one = cluster(behaviour)
    one.submit()
    found, requeued = one.end()
    assert found in ((code, KILLED) if code else (0,)) and requeued == []


@pytest.mark.parametrize("behaviour", ["no step", "finish in the last moment"])
def test_slurm_job_that_has_nothing_to_come_back_for_stays_away(behaviour, cluster):
    one = cluster(behaviour)
    one.submit()
    one.launches()
    one.time_is_nearly_up()
    code, requeued = one.end()
    assert code in STOPPED and requeued == []
    assert ("no new checkpoint in work_dir/MAEPretraining" in one.log.read_text()) == (behaviour == "no step")


def test_slurm_job_that_did_not_get_on_since_it_came_back_stays_away(cluster):
    one = cluster("train")
    for behaviour, expected in (("train", ["77"]), ("no step", ["77"]), ("train", ["77", "77"])):
        one.behave(behaviour)
        one.submit()
        one.launches()
        one.time_is_nearly_up()
        code, requeued = one.end()
        assert code in STOPPED and requeued == expected


def test_slurm_job_that_is_cancelled_saves_and_stays_away(cluster):
    one = cluster("train")
    one.submit()
    told = one.launches()[0]
    one.cancel()
    code, requeued = one.end()
    assert code in STOPPED and requeued == []
    assert Path(one.repository, told["experiment"], "last_checkpoint").is_dir()


def test_slurm_job_comes_back_where_the_clock_of_the_file_server_is_late(cluster):
    one = cluster("late clock")
    one.submit()
    one.launches()
    one.time_is_nearly_up()
    code, requeued = one.end()
    assert code in STOPPED and requeued == ["77"]


def test_slurm_job_of_an_array_puts_back_itself_alone(cluster):
    one = cluster("train")  # the job whose own number is that of the array
    one.submit(SLURM_ARRAY_JOB_ID="77", SLURM_ARRAY_TASK_ID="3")
    one.launches()
    one.time_is_nearly_up()
    code, requeued = one.end()
    assert code in STOPPED and requeued == ["77_3"]


def test_slurm_job_ends_on_all_machines_when_one_crashes(cluster):
    one = cluster("crash of one machine")
    one.submit()
    code, requeued = one.end()
    assert code == KILLED and requeued == []


@pytest.mark.parametrize(
    ("given", "gpus", "cpus", "workers"),
    [
        ({}, 8, 128, 16),
        ({"SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "12"}, 1, 12, 12),
        ({"SLURM_GPUS_ON_NODE": None, "SLURM_GPUS_PER_NODE": "a100:4"}, 4, 128, 32),
        ({"SLURM_CPUS_PER_TASK": None, "SLURM_CPUS_ON_NODE": "64"}, 8, 64, 8),
        ({"SLURM_CPUS_PER_TASK": "4"}, 8, 4, 1),
        ({"SLURM_EXPORT_ENV": "NONE"}, 8, 128, 16),
    ],
    ids=["8 GPUs", "1 GPU", "4 GPUs of a kind", "no CPUs per task", "few CPUs", "no environment"],
)
def test_slurm_job_uses_what_slurm_gives(given, gpus, cpus, workers, cluster):
    one = cluster("finish")
    one.submit(**given)
    for node, told in enumerate(one.launches()):
        flags, environment = told["flags"], told["environment"]
        assert (flags["--num_machines"], flags["--num_processes"]) == ("2", str(2 * gpus))
        assert (flags["--machine_rank"], flags["--main_process_ip"]) == (str(node), "node0")
        assert environment["CPUS_OF_TASK"] == str(cpus)
        assert environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "110"
        assert pretrain_mae.parse_args([*told["words"], "--path_to_data", "."]).num_workers == workers
    assert one.end() == (0, [])


def test_slurm_job_without_gpus_is_refused(cluster):
    one = cluster("finish")
    one.submit(SLURM_GPUS_ON_NODE=None)
    assert one.end() == (2, [])
    assert "give sbatch --gpus-per-node" in one.log.read_text()


def test_slurm_jobs_on_one_machine_have_ports_of_their_own(cluster):
    one, ports = cluster("finish"), set()
    for number in (77, 78, 9_999_999):
        one.submit(number=number)
        ports.add(int(one.launches()[0]["flags"]["--main_process_port"]))
        one.end()
    assert len(ports) == 3 and all(1024 < port < 32_768 for port in ports)


def test_slurm_job_starts_on_many_machines(cluster):
    """More names than a pipe holds, of which the first is read."""
    one = cluster("finish")
    one.submit(SLURM_JOB_NODELIST="many[0-19999]")
    assert one.end() == (0, []), one.log.read_text()


def test_slurm_job_leaves_its_log_and_no_files_when_it_comes_back(cluster):
    one = cluster("finish")
    for number in (77, 78):
        one.submit(number=number)
        assert one.end() == (0, [])
    assert "started as job 77" in one.log.read_text()
    assert list(one.temporary.iterdir()) == []


def test_slurm_job_trains_saves_comes_back_and_is_done_with_the_real_launcher(cluster, request, drawn_images):
    """Two machines, which are this one, with a process each."""
    if not request.config.getoption("--full"):
        pytest.skip("with --full")
    one = cluster("real")
    (one.place / "bin" / "accelerate").unlink()
    flags = f"--demo --path_to_data {drawn_images} --epochs 40 --per_gpu_batch_size 4 --num_workers 0 --log_interval 1"
    experiment = one.repository / "work_dir" / "MAEPretraining"
    where = dict(SLURM_GPUS_ON_NODE="1", SLURM_JOB_NODELIST="here", ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    where["PATH"] = f"{one.place / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    one.submit(*shlex.split(flags), **where)
    one.until(lambda: (experiment / "log.jsonl").exists() and len(rows(experiment)) > 3, timeout=200)
    one.time_is_nearly_up()
    assert one.job.wait(200) in STOPPED
    assert one.end()[1] == ["77"] and (experiment / "last_checkpoint" / "state.json").exists()
    one.submit(*shlex.split(flags), **where)
    assert one.job.wait(400) == 0, one.log.read_text()
    assert (experiment / "DONE").exists() and one.end()[1] == ["77"]
