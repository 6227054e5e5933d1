"""Trackers that a run logs to beside log.jsonl: Accelerate's own, each in a thread of its own.

A tracker may fail, hang or lack its package. That costs a message; it never stops, delays or changes a run.
"""

import argparse
import collections
import importlib.util
import netrc
import os
import re
import shlex
import sys
import time
import urllib.parse
from collections.abc import Callable, Mapping
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image

from storage.files import optional_write, read_optional, read_text, written_whole
from training.progress import say

WANDB_TIMEOUT_S = 20  # in which W&B goes online
START_S, FINISH_S = 60, 120  # that a run waits for a tracker, at its start and at its end
MOST_WAITING = 500  # rows and pictures that a tracker has not taken yet
WATCH = {
    "tensorboard": "tensorboard --logdir {experiment}",
    "trackio": "trackio show --project {project}",
    "mlflow": "mlflow ui",
}


def asked_trackers(args: argparse.Namespace) -> list[str]:
    """Give the trackers that --log_wandb and --log_with ask for, each once."""
    return list(dict.fromkeys(["wandb"] * args.log_wandb + (args.log_with or [])))


def flag_of(name: str, args: argparse.Namespace) -> str:
    return "--log_wandb" if name == "wandb" and args.log_wandb else f"--log_with {name}"


def note_missing(args: argparse.Namespace) -> None:
    """Say which of the trackers lack their package, and how to install it."""
    for name in asked_trackers(args):
        if importlib.util.find_spec(name) is None:
            advice = f"the run goes on without it, or give it with: pip install {name}"
            say(f"{flag_of(name, args)}: the package {name} is not installed; {advice}")


def start_trackers(experiment: Path, args: argparse.Namespace, resumed_step: int | None) -> list["Tracker"]:
    """Start the trackers whose packages are there; a resumed run goes on as the same run where a tracker can."""
    found = [name for name in asked_trackers(args) if importlib.util.find_spec(name)]
    trackers = [Tracker(name, experiment, args, resumed_step) for name in found]
    return [tracker for tracker in trackers if tracker.pool is not None]


class Tracker:
    """One of Accelerate's trackers; after its first failure nothing more is asked of it."""

    def __init__(self, name: str, experiment: Path, args: argparse.Namespace, resumed_step: int | None):
        self.name, self.experiment, self.args, self.resumed_step = name, experiment, args, resumed_step
        self.flag, self.title = flag_of(name, args), "W&B" if name == "wandb" else name
        self.tracker, self.shows_pictures = None, True
        self.pool: ThreadPool | None = None
        self.calls: collections.deque[AsyncResult] = collections.deque()  # that are not known to have ended
        self.failures: list[BaseException] = []
        for options in self.attempts():
            if self.pool is None:
                self.open_thread()
                self.wait(self.do(self.start, options), START_S)
        if self.pool is not None and name in WATCH:
            watch = WATCH[name].format(experiment=shlex.quote(str(experiment)), project=shlex.quote(self.project))
            say(f"{'tracker':<16}{name}; to look at it: {watch}")

    # ---------------------------------------------------------------- what differs between trackers

    @property
    def project(self) -> str:
        return re.sub(r"[/\\#?%:]", "_", self.args.experiment_name)  # W&B refuses these

    @property
    def id_file(self) -> Path:
        return self.experiment / f"{self.name}_id.txt"

    def attempts(self) -> list[dict]:
        """Give the options with which to start the tracker, and others to try where it fails with these."""
        run_name = self.args.wandb_run_name
        if self.name == "wandb":
            modes = [os.environ.get("WANDB_MODE") or ("online" if wandb_key_exists() else "offline")]
            if "WANDB_MODE" not in os.environ and modes == ["offline"]:
                say(f"{self.flag}: no API key found, so W&B runs offline; `wandb sync` uploads it later")
            options = dict(name=run_name, dir=self.experiment, id=read_optional(self.id_file, read_run_id))
            options |= dict(resume="allow", config=vars(self.args))
            return [options | dict(mode=mode) for mode in dict.fromkeys([*modes, "offline"])]
        if self.name == "tensorboard":  # in its own folder it shows no rows of earlier starts beyond this step
            return [dict(purge_step=0 if self.resumed_step is None else self.resumed_step + 1)]
        if self.name == "trackio":
            return [dict(name=run_name or self.args.experiment_name, resume="allow", config=self.plain_flags())]
        if self.name == "mlflow":
            known = None if self.resumed_step is None else read_optional(self.id_file, read_run_id)
            return [dict(run_id=known, run_name=run_name)]
        return [{}]

    def start(self, options: Mapping) -> None:
        tracker_class, names = LOGGER_TYPE_TO_CLASS[self.name], [self.project]
        if self.name == "tensorboard":
            names = [self.name, self.experiment]  # its folder, and where that is
        elif tracker_class.requires_logging_directory:
            names.append(self.experiment)
        if self.name == "wandb":
            import wandb

            options = {**options, "settings": wandb.Settings(init_timeout=WANDB_TIMEOUT_S)}
        tracker = tracker_class(*names, **options)
        tracker.start()
        if self.name == "wandb":
            tracker.tracker.define_metric("*", step_metric="step")
            self.keep_id(tracker.tracker.id, options["id"])
        if self.name == "mlflow":
            self.keep_id(tracker.tracker.info.run_id, options["run_id"])
        if "config" not in options and self.resumed_step is None:
            tracker.store_init_configuration(self.plain_flags())
        self.tracker = tracker

    def plain_flags(self) -> dict[str, bool | int | float | str | None]:
        kinds = bool | int | float | str | None
        return {name: value if isinstance(value, kinds) else str(value) for name, value in vars(self.args).items()}

    def keep_id(self, run_id: str, known: str | None) -> None:
        """Write the id under which a later start goes on as the same run."""
        if run_id != known:
            file = self.id_file
            with optional_write(file), written_whole(file) as temporary, temporary.open("x") as opened:
                opened.write(run_id + "\n")

    def log(self, row: Mapping[str, float | None]) -> None:
        """Hand over a row; it carries "step"."""
        if self.name == "wandb":  # whose own step may not fall; see define_metric
            self.do(self.log_now, dict(row))
        else:
            values = {name: value for name, value in row.items() if name != "step" and value is not None}
            self.do(self.log_now, values, row["step"])

    def log_now(self, values: Mapping, step: int | None = None) -> None:
        self.tracker.log(values, step=step)

    def log_picture(self, key: str, path: Path, picture: Image.Image, step: int) -> None:
        """Hand over a picture that was saved at a path; a tracker that shows none says so once."""
        if self.name == "wandb":
            self.do(lambda: self.tracker.log({key: sys.modules["wandb"].Image(str(path)), "step": step}))
        elif self.name == "trackio":
            self.do(lambda: self.tracker.log({key: sys.modules["trackio"].Image(str(path))}, step=step))
        elif self.name == "tensorboard":
            pixels = np.asarray(picture.convert("RGB"))[None]  # (1, H, W, 3)
            self.do(lambda: self.tracker.log_images({key: pixels}, step=step, dataformats="NHWC"))
        elif self.shows_pictures:
            self.shows_pictures = False
            say(f"{self.flag}: pictures are in {path.parent} alone")

    # ---------------------------------------------------------------- its thread

    def open_thread(self) -> None:
        try:
            self.pool = ThreadPool(1)  # its thread ends with the process, whatever it waits for
        except (OSError, RuntimeError) as error:  # no shared memory, or no thread, is left
            self.failures.append(error)

    def do(self, act: Callable, *values: object) -> AsyncResult | None:
        """Let the tracker's thread do something when it comes to it; a failure so far ends the tracker."""
        while self.calls and self.calls[0].ready():
            self.calls.popleft()
        self.check(answers=len(self.calls) < MOST_WAITING)
        if self.pool is None:
            return None
        self.calls.append(self.pool.apply_async(act, values, error_callback=self.failures.append))
        return self.calls[-1]

    def wait(self, call: AsyncResult | None, seconds: float) -> None:
        """Wait for a call, and end a tracker that fails or hangs."""
        if call is not None:
            call.wait(seconds)
            self.check(answers=call.ready())

    def check(self, *, answers: bool) -> None:
        """End a tracker that failed, or that does not answer, and say so."""
        failed = "".join(f"failed ({type(error).__name__}: {error})" for error in self.failures[:1])
        if failed or not answers:
            say(f"{self.flag}: {self.title} {failed or 'does not answer'}; the run goes on without it")
            self.stop()

    def stop(self) -> None:
        if self.pool is not None:
            self.pool.terminate()
        self.pool, self.calls, self.failures = None, collections.deque(), []


def finish_trackers(trackers: list[Tracker]) -> None:
    """Let trackers send what they have left, for two minutes at most."""
    until = time.monotonic() + FINISH_S
    for tracker, call in [(tracker, tracker.do(lambda t=tracker: t.tracker.finish())) for tracker in trackers]:
        tracker.wait(call, max(0, until - time.monotonic()))
        tracker.stop()


def read_run_id(file: Path) -> str:
    """Read the id of the run at a tracker that an earlier start began; ValueError for what none would have."""
    if not re.fullmatch(r"[^/\\#?%:\s]{1,128}", name := read_text(file).strip()):
        raise ValueError("it holds no id of a run")
    return name


def wandb_key_exists() -> bool:
    """Look where `wandb login` leaves a key; wandb itself would stop the run to ask for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, ValueError, netrc.NetrcParseError):  # no such file, no address or no UTF-8, no such entries
        return False
