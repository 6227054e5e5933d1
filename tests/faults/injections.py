"""Faults that are injected from inside a run: each function changes something in its process, before it starts.

Where there is a `rank`, only that process is changed.
"""

import functools
import importlib.machinery
import itertools
import math
import os
import resource
import shutil
import signal
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import DistributedType, tracking
from accelerate.state import PartialState
from torch.distributed.tensor import DTensor

import training
import utils
from storage import workers
from training import check, checkpoints, data, signals, trackers


def is_rank(rank: int) -> bool:
    return int(os.environ.get("RANK", 0)) == rank


def count_steps() -> Callable[[], int]:
    """Give a function that tells how many optimizer steps this start has made."""
    original, made = utils.skip_nonfinite, 0

    def skip_nonfinite(*args):
        nonlocal made
        made += 1
        return original(*args)

    utils.skip_nonfinite = skip_nonfinite
    return lambda: made


def before_agreeing(act: Callable[[int], None]) -> None:
    """Do something with the number of steps made, after each of them (and before each batch of an evaluation)."""
    original, steps = signals.Interruptions.agree, count_steps()

    def agree(self) -> int:
        act(steps())
        return original(self)

    signals.Interruptions.agree = agree


def slow(seconds: float) -> None:
    """Make every step longer, so that what comes from outside falls between two of them."""
    before_agreeing(lambda step: time.sleep(seconds))


def check_in_no_time() -> None:
    """Let --check measure as shortly as it can."""
    check.LIMIT_S.update(dict.fromkeys(check.LIMIT_S, 0.2))
    check.ENOUGH_S = 0.02


def in_float64() -> None:
    """Compute everything in float64, where rounding is too small to see: what differs then, differs in truth."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double


def shard_on_cpu() -> None:
    """Make Accelerate shard on the CPU; by itself it shards on GPUs alone, and elsewhere trains without a word.

    The run fails where its weights are whole.
    """
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    original = checkpoints.Checkpoints.save

    def save(self, model, *args, **options) -> bool:
        assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
        return original(self, model, *args, **options)

    checkpoints.Checkpoints.save = save


def in_double() -> None:
    """Train in float64, where rounding stays too small to be blown up by the norms of a tiny network."""
    original = training.process.compile_in_place

    def compile_in_place(accelerator, model) -> None:
        model.double()
        model.register_forward_pre_hook(lambda module, inputs: tuple(value.double() for value in inputs))
        original(accelerator, model)

    training.process.compile_in_place = compile_in_place


def save_at(steps: list[int]) -> None:
    """Ask for a state after these optimizer steps of this start, as the clock would."""
    original, made = signals.Interruptions.agree, count_steps()

    def agree(self) -> int:
        return max(original(self), signals.SAVE if made() in steps else signals.GO_ON)

    signals.Interruptions.agree = agree


def stop_within(script: str, function: str, call: int) -> None:
    """Ask this process to stop right before a call, counted from 1, of one of the script's functions."""
    module, calls = importlib.import_module(script), itertools.count(1)
    original = getattr(module, function)

    def stopped(*args, **options):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **options)

    setattr(module, function, stopped)


def die(rank: int, step: int) -> None:
    if is_rank(rank):
        before_agreeing(lambda now: os.kill(os.getpid(), signal.SIGKILL) if now == step else None)


def hang(rank: int, step: int) -> None:
    if is_rank(rank):
        before_agreeing(lambda now: time.sleep(3600) if now == step else None)


def hang_forks(rank: int, forks: list[int], patience_s: float) -> None:
    """Let some of the processes that this one forks, counted from 1, hang before they run any code of theirs."""
    if not is_rank(rank):
        return
    workers.WORKER_START_S, made = patience_s, 0

    def count() -> None:
        nonlocal made
        made += 1

    os.register_at_fork(before=count, after_in_child=lambda: time.sleep(3600) if made in forks else None)


def poison(rank: int, passes: list[int], value: str = "nan") -> None:
    """Make the loss of some forward passes of one process, counted from 1, not a number; an empty list means all."""
    if not is_rank(rank):
        return
    original, calls = utils.nan_guard, itertools.count(1)

    def poisoned(loss):
        now = next(calls)
        return original(loss * float(value) if now in passes or not passes else loss)

    utils.nan_guard = poisoned


def limit_saves(rank: int, saves: list[int], max_bytes: int) -> None:
    """Let no file of some saves, counted from 1, become larger than so many bytes, as a quota would."""
    if not is_rank(rank):
        return
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    original, calls = checkpoints.Checkpoints.save, itertools.count(1)

    @functools.wraps(original)
    def save(self, *args, **options) -> bool:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if next(calls) in saves:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, before[1]))
        try:
            return original(self, *args, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    checkpoints.Checkpoints.save = save


def fill_disk(file: str, first: int, last: int) -> None:
    """Fill the disk of `file` right before save `first`, counted from 1, and make room right after save `last`."""
    original, calls = checkpoints.Checkpoints.save, itertools.count(1)

    @functools.wraps(original)
    def save(self, *args, **options) -> bool:
        now, filler = next(calls), Path(file)
        if now == first:
            disk = os.statvfs(filler.parent)
            filler.write_bytes(bytes(disk.f_bavail * disk.f_frsize))
        try:
            return original(self, *args, **options)
        finally:
            if now == last:
                filler.unlink()

    checkpoints.Checkpoints.save = save


def set_wandb_timeout(seconds: int) -> None:
    trackers.WANDB_TIMEOUT_S = seconds


def break_tracker(name: str, calls: list[str], hangs: bool) -> None:
    """Put a tracker in Accelerate's place that raises at some calls, or never comes back, and ask less patience."""

    class TroubleError(Exception):  # of none of the kinds that one would think of
        pass

    def fail(*_, **__) -> None:
        if hangs:
            time.sleep(1000)
        raise TroubleError(f"{name} is broken")

    def work(*_, **__) -> None:
        pass

    every = ("start", "store_init_configuration", "log", "log_images", "finish")
    made = {call: fail if call in calls else work for call in every}
    made |= {"__init__": work, "requires_logging_directory": False}
    tracking.LOGGER_TYPE_TO_CLASS[name] = type(name, (), made)
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    trackers.START_S, trackers.FINISH_S = 0.5, 0.5


def end_wandb(step: int) -> None:
    """Kill W&B's own process in the middle of the run."""

    def act(now: int) -> None:
        if now == step:
            for stat in Path("/proc").glob("[0-9]*/stat"):
                name, rest = stat.read_text().rsplit(")", 1)
                if rest.split()[1] == str(os.getpid()) and "(wandb" in name:
                    os.kill(int(stat.parent.name), signal.SIGKILL)
                    print("W&B's process is killed", flush=True)

    before_agreeing(act)


def lose_file(file: str) -> None:
    """Delete an image once it is listed."""
    original = data.list_images

    def list_images(*args, **options):
        files = original(*args, **options)
        Path(file).unlink(missing_ok=True)
        return files

    data.list_images = list_images


# ------------------------------------------------------------------------------------------------ points of a save


def watch_writes(folder: Path, act: Callable[[str], None]) -> None:
    """Call `act` before everything that this process does to the names below a folder, and before its syncs.

    Python reports these to audit hooks. What torch and safetensors write from C++ and Rust it does not: `torn` cuts
    those files short.
    """
    busy = False

    def hook(event: str, arguments: tuple) -> None:
        nonlocal busy
        if busy or event not in EVENTS:
            return
        busy = True
        try:
            path = path_of(event, arguments)
            if path is not None and path.is_relative_to(folder) and path.suffix != ".png":
                act(f"{event} {path.relative_to(folder)}")
        finally:
            busy = False

    sys.addaudithook(hook)


EVENTS = {"open", "os.rename", "os.mkdir", "os.symlink", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
FOLDER_ARGUMENT = {"os.remove": 1, "os.rmdir": 1}  # where the folder that a name is in may stand, as a descriptor


def path_of(event: str, arguments: tuple) -> Path | None:
    """Give what an audited event is about to change or to read from the disk; None where that is nothing."""
    path = arguments[1] if event == "os.symlink" else arguments[0]
    if not isinstance(path, (str, os.PathLike)):
        return None
    if event == "open" and arguments[1] is not None and not set(arguments[1]) & set("wax+"):
        return None
    folder = arguments[FOLDER_ARGUMENT[event]] if event in FOLDER_ARGUMENT else -1
    return Path(os.readlink(f"/proc/self/fd/{folder}") if folder != -1 else os.getcwd(), path)


def from_save(step: int, act: Callable[[str], None], folder: Path) -> None:
    """Watch a folder from the save at a step on, to the end of the run."""
    original, begun = checkpoints.Checkpoints.save, False

    @functools.wraps(original)
    def save(self, model, config, state, **options) -> bool:
        nonlocal begun
        begun = begun or state["step"] == step
        return original(self, model, config, state, **options)

    checkpoints.Checkpoints.save = save
    watch_writes(folder, lambda operation: act(operation) if begun else None)


def photograph_points(experiment: str, into: str, step: int) -> None:
    """Copy the experiment before every operation on its files from the save at a step on.

    A copy is what a run that dies there leaves: what a process has handed to the system survives the process.
    """
    points = itertools.count(1)

    def act(operation: str) -> None:
        name = operation.replace("/", "_").replace(" ", "_")
        shutil.copytree(experiment, Path(into) / f"{next(points):03d}_{name}" / "run", symlinks=True)

    if is_rank(0):
        from_save(step, act, Path(experiment))


def die_at_point(experiment: str, step: int, point: int) -> None:
    """Kill the run, with its workers and the processes beside it, at one of these operations, counted from 1."""
    points = itertools.count(1)

    def act(operation: str) -> None:
        if next(points) == point:
            print(f"dies before {operation}", flush=True)
            os.killpg(0, signal.SIGKILL)

    if is_rank(0):
        from_save(step, act, Path(experiment))


def torn(file: str, share: float, save: int) -> None:
    """Die in the middle of writing a file of a save, counted from 1: only this share of it is on the disk."""
    saves, original = itertools.count(1), checkpoints.Accelerator.save_state

    @functools.wraps(original)
    def save_state(self, folder, *args, **options):
        written = original(self, folder, *args, **options)
        if next(saves) == save:
            path = Path(folder) / file
            os.truncate(path, math.floor(share * path.stat().st_size))
            os.killpg(0, signal.SIGKILL)
        return written

    checkpoints.Accelerator.save_state = save_state
