"""Start runs, hurt them, start them again, and compare what they leave with the run that nobody disturbed."""

import dataclasses
import hashlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

TIMEOUT_S = 300
POLL_S = 0.005
FAULTS = Path(__file__).resolve().parent
# Time that what a run started may need to end after it, on a machine that is busy with something else.
LAST_BREATH_S = 60
FIGURES = ("loss", "acc", "miou", "dice", "learning_rate", "nonfinite_steps")


class Zygote:
    """The process that forks the runs; see zygote.py."""

    def __init__(self):
        for_others = ("WANDB", "ACCELERATE", "MASTER", "SLURM")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(for_others)}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "ACCELERATE_USE_CPU": "true"}
        self.process = subprocess.Popen(
            [sys.executable, str(FAULTS / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert json.loads(self.process.stdout.readline()) == "ready"

    def ask(self, request: dict) -> int | None:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        script: str,
        arguments: list[str],
        output: Path,
        *faults: tuple[str, dict],
        num_processes: int = 1,
        **environment: str,
    ) -> "Run":
        """Start a script with faults inside; what it prints is appended to a file."""
        request = {
            "script": script,
            "arguments": arguments,
            "num_processes": num_processes,
            "port": free_port(),
            "environment": environment,
            "faults": faults,
            "output": str(output),
        }
        said = output.stat().st_size if output.exists() else 0
        return Run(self, self.ask(request), output, said)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(TIMEOUT_S)


@dataclasses.dataclass(frozen=True)
class Job:
    """A command: a script, its flags, and how many processes it runs on."""

    zygote: Zygote
    script: str
    flags: tuple[str, ...]
    work: Path
    num_processes: int = 1

    @property
    def experiment(self) -> Path:
        return self.work / "run"

    def inside(self, work: Path) -> "Job":
        return dataclasses.replace(self, work=work)

    def with_flags(self, more: str) -> "Job":
        return dataclasses.replace(self, flags=(*self.flags, *shlex.split(more)))

    def arguments(self, more: str = "--resume_from_checkpoint latest") -> list[str]:
        return [*self.flags, "--working_directory", str(self.work), "--experiment_name", "run", *shlex.split(more)]

    def start(self, *faults: tuple[str, dict], more: str | None = None, **environment: str) -> "Run":
        """Start the command, the same whether there is something to go on from or not, with faults inside."""
        self.work.mkdir(parents=True, exist_ok=True)
        arguments, output = self.arguments() if more is None else self.arguments(more), self.work / "output.txt"
        options = dict(num_processes=self.num_processes, **environment)
        return self.zygote.start(self.script, arguments, output, *faults, **options)

    def finish(self, *faults: tuple[str, dict], more: str | None = None, **environment: str) -> str:
        """Run to the end, which has to be a good one, and give what was printed."""
        run = self.start(*faults, more=more, **environment)
        assert run.wait() == 0, run.printed()
        return run.printed()

    def fail(self, *faults: tuple[str, dict], more: str | None = None, **environment: str) -> str:
        """Run to an end that has to be an error, not a signal, and give what was printed."""
        run = self.start(*faults, more=more, **environment)
        assert run.wait() in (1, 2), run.printed()  # 2 for flags that are refused
        return run.printed()

    def last_step(self) -> int:
        """Give the last step of the log, 0 before the first."""
        file = self.experiment / "log.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


class Run:
    """A run on its way: the process that was forked, which leads a group with all that it starts."""

    def __init__(self, zygote: Zygote, pid: int, output: Path, said: int):
        self.zygote, self.pid, self.output, self.said = zygote, pid, output, said
        self.started, self.code = time.monotonic(), None

    def printed(self) -> str:
        return self.output.read_text(errors="replace")[self.said :] if self.output.exists() else ""

    def ended(self) -> bool:
        if self.code is None:
            self.code = self.zygote.ask({"poll": self.pid})
        return self.code is not None

    def wait(self, timeout: float = TIMEOUT_S) -> int:
        """Wait for the end, and for that of everything that the run started; give the exit code."""
        while not self.ended():
            if time.monotonic() - self.started > timeout:
                self.kill()
                raise TimeoutError(f"still running after {timeout} s:\n{self.printed()}")
            time.sleep(POLL_S)
        self.wait_for_others()
        return self.code

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait for a condition; False when the run has ended without it."""
        while not condition():
            if self.ended():
                return False
            assert time.monotonic() - self.started < TIMEOUT_S, self.printed()
            time.sleep(POLL_S)
        return True

    def others(self) -> list[int]:
        """Give the processes of the run beside the first one that still live."""
        return [pid for pid, _, group in living_processes() if group == self.pid and pid != self.pid]

    def ranks(self) -> list[int]:
        """Give the processes that a run of several trains in."""
        return [pid for pid, parent, group in living_processes() if group == self.pid and parent == self.pid]

    def wait_for_others(self) -> None:
        deadline = time.monotonic() + LAST_BREATH_S
        while left := self.others():
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"left behind {left}:\n{self.printed()}")
            time.sleep(POLL_S)

    def signal(self, number: int) -> None:
        """Send a signal to every process of the run."""
        os.killpg(self.pid, number)

    def kill(self) -> bool:
        """Kill the whole group at once; False when the run had ended by itself."""
        if self.ended():
            self.wait_for_others()
            return False
        self.signal(signal.SIGKILL)
        while not self.ended():
            time.sleep(POLL_S)
        self.wait_for_others()
        return self.code == -signal.SIGKILL


def living_processes() -> Iterator[tuple[int, int, int]]:
    """Give (process, parent, group) of all processes that are not dead."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path("/proc", entry, "stat").read_text()
            except OSError:  # it has just ended
                continue
            state, parent, group = stat.rsplit(")", 1)[1].split()[:3]
            if state not in "ZX":
                yield int(entry), int(parent), int(group)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finish_all(jobs: list[Job], width: int = 2) -> None:
    """Run all to their good ends, some at a time."""
    waiting, running = list(jobs), []
    while waiting or running:
        while waiting and len(running) < width:
            running.append(waiting.pop(0).start())
        for run in [run for run in running if run.ended()]:
            assert run.wait() == 0, run.printed()
            running.remove(run)
        time.sleep(POLL_S)


# ------------------------------------------------------------------------------------------------ comparison


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def result_of(experiment: Path) -> dict[str, str]:
    """Give the checksums of what a finished run leaves: the last state, weights and optimizer, and the best weights."""
    last, best = experiment / "last_checkpoint", experiment / "best_checkpoint"
    files = [file for file in last.iterdir() if file.suffix in (".safetensors", ".bin") or file.name == "config.json"]
    files += [best / name for name in ("model.safetensors", "config.json") if best.exists()]
    return {str(file.relative_to(experiment)): sha256(file) for file in files}


def figures_of(row: dict) -> dict:
    return {name: value for name, value in row.items() if any(part in name for part in FIGURES)}


def figures_by_span(log: list[dict]) -> dict[tuple[int, int], dict]:
    """Give what each row says by the steps it is over: after the row before, up to its own."""
    starts = [0, *(row["step"] for row in log[:-1])]
    return {(start, row["step"]): figures_of(row) for start, row in zip(starts, log, strict=True)}


def log_of(experiment: Path) -> list[dict]:
    return [json.loads(line) for line in (experiment / "log.jsonl").read_text().splitlines()]


def check_log(experiment: Path, undisturbed: Path) -> None:
    """Steps rise strictly, none is missing, and what rows over the same steps say is the same."""
    rows, expected = log_of(experiment), log_of(undisturbed)
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)), steps
    missing = {row["step"] for row in expected} - set(steps)
    assert not missing, missing
    spans = [figures_by_span(log) for log in (rows, expected)]
    common = spans[0].keys() & spans[1].keys()
    assert [spans[0][span] for span in common] == [spans[1][span] for span in common]


def check_exact(experiment: Path, undisturbed: Path) -> None:
    """Compare a finished run with the one that nobody disturbed: weights bit for bit, and the log."""
    assert json.loads((experiment / "DONE").read_text()) == json.loads((undisturbed / "DONE").read_text())
    assert result_of(experiment) == result_of(undisturbed)
    check_log(experiment, undisturbed)
    half = [path.name for path in experiment.iterdir() if path.suffix in (".tmp", ".old")]
    assert not half, half
