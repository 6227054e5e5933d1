"""Trackers beside the log: which there are, what is asked of them, and what their absence costs."""

import argparse
import json
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from conftest import ROOT
from PIL import Image

from pretrain_mae import parse_args
from training import trackers
from training.flags import TRACKERS
from training.records import RunLog
from training.trackers import asked_trackers, note_missing


def asked(*names: str, **changes: object) -> argparse.Namespace:
    flags = dict(experiment_name="a/run", wandb_run_name=None, log_wandb=False, log_with=list(names))
    return argparse.Namespace(**flags | changes)


def test_trackers_are_those_of_accelerate():
    assert set(TRACKERS) == LOGGER_TYPE_TO_CLASS.keys()


def test_log_wandb_is_a_way_to_say_log_with_wandb():
    command = ["--path_to_data", "data"]
    assert asked_trackers(parse_args(command)) == []
    assert asked_trackers(parse_args([*command, "--log_wandb"])) == ["wandb"]
    assert asked_trackers(parse_args([*command, "--log_with", "wandb"])) == ["wandb"]
    assert asked_trackers(parse_args([*command, "--log_with", "mlflow", "wandb", "--log_wandb"])) == ["wandb", "mlflow"]


def test_no_tracker_is_imported_unless_it_is_asked_for():
    """Only timm imports W&B by itself, where it is installed."""
    code = f"import sys, training.trackers; print('accelerate' in sys.modules, {set(TRACKERS)} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True set()\n"


def test_missing_package_is_one_sentence_before_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    flags, log = asked("swanlab", log_wandb=True), RunLog(tmp_path, enabled=True)
    note_missing(flags)
    assert capsys.readouterr().out.splitlines() == [
        f"{flag}: the package {name} is not installed; the run goes on without it, or give it with: pip install {name}"
        for flag, name in (("--log_wandb", "wandb"), ("--log_with swanlab", "swanlab"))
    ]
    log.start_trackers(flags)
    log.write({"step": 1})
    log.close()
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n' and capsys.readouterr().out == ""


# -------------------------------------------------------------------------------- read back

LOGGED = [{"step": 2, "training_loss": 0.5}, {"step": 4, "training_loss": 0.25}, {"step": 6, "training_loss": 0.125}]


def log_and_resume(folder: Path, name: str) -> None:
    """Log two rows, and a third one and a picture as a run that was started again."""
    Accelerator(cpu=True)
    log = start(folder, asked(name, experiment_name="run", seed=7))
    for row in LOGGED[:2]:
        log.write(row)
    log.close()
    log = start(folder, asked(name, experiment_name="run", seed=7), step=4)
    log.write(LOGGED[2] | {"testing_loss": None})
    log.picture("shown", 1, Image.new("RGB", (4, 4), "red"), 6)
    log.close()


def test_tensorboard_hides_the_rows_that_a_resume_makes_again(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log_and_resume(tmp_path, "tensorboard")
    log = start(tmp_path, asked("tensorboard"), step=2)
    log.write({"step": 6, "training_loss": 0.375})
    log.close()
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("training_loss")
    assert [(event.step, event.value) for event in found] == [(2, 0.5), (6, 0.375)]


def test_trackio_log_of_a_resumed_run_reads_back(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read as it is imported
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    log_and_resume(tmp_path, "trackio")
    rows = storage.get_logs("run", "run")
    assert [{name: row[name] for name in LOGGED[0]} for row in rows if "training_loss" in row] == LOGGED
    (shown,) = [row["shown"]["file_path"] for row in rows if "shown" in row]
    assert Image.open(tmp_path / "trackio" / "media" / shown).getpixel((0, 0)) == (255, 0, 0)
    assert storage.get_run_config("run", "run")["seed"] == 7


def test_mlflow_log_of_a_resumed_run_reads_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = pytest.importorskip("mlflow").MlflowClient()
    log_and_resume(tmp_path, "mlflow")
    (run,) = client.search_runs([client.get_experiment_by_name("run").experiment_id])
    history = client.get_metric_history(run.info.run_id, "training_loss")
    assert [{"step": point.step, "training_loss": point.value} for point in history] == LOGGED
    assert run.data.params["seed"] == "7" and run.info.status == "FINISHED"
    assert f"--log_with mlflow: pictures are in {tmp_path / 'shown'} alone" in capsys.readouterr().out


# -------------------------------------------------------------------------------- W&B


class FakeWandb:
    """Take what a run hands over, and give ids; no service."""

    def __init__(self):
        self.started, self.logged = [], []

    def Settings(self, **settings):  # noqa: N802 - W&B's name
        return settings

    def Image(self, path):  # noqa: N802
        return Path(path).name

    def init(self, **options):
        self.started.append(options)
        nothing = dict(define_metric=lambda *_, **__: None, finish=lambda: None)
        log = dict(log=lambda values, step=None: self.logged.append((values, step)))
        return argparse.Namespace(id=options["id"] or "new", **nothing, **log)


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    Accelerator(cpu=True)
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("WANDB_MODE", "online")
    return sys.modules["wandb"]


def start(folder: Path, flags: argparse.Namespace, step: int | None = None) -> RunLog:
    log = RunLog(folder, enabled=True, resumed_step=step)
    log.start_trackers(flags)
    return log


def test_wandb_is_handed_rows_with_their_step_and_pictures(tmp_path, wandb):
    log = start(tmp_path, asked(log_wandb=True))
    log.write({"step": 7, "training_loss": None})
    log.picture("shown", 1, Image.new("RGB", (4, 4)), 7)
    log.close()
    log.write({"step": 8})
    assert wandb.logged == [({"step": 7, "training_loss": None}, None), ({"shown": "epoch_1.png", "step": 7}, None)]
    (options,) = wandb.started
    assert options["project"] == "a_run" and options["config"]["log_wandb"] and options["mode"] == "online"
    assert options["settings"] == {"init_timeout": trackers.WANDB_TIMEOUT_S} and options["dir"] == tmp_path


@pytest.mark.parametrize("content", [b"", b"\xff", b"a/b", b"two words", b"x" * 5000, None])
def test_wandb_id_that_is_none_is_renamed_and_a_new_run_begun(tmp_path, wandb, content, capsys):
    file = tmp_path / "wandb_id.txt"
    file.mkdir() if content is None else file.write_bytes(content)
    for _ in range(2):
        start(tmp_path, asked(log_wandb=True)).close()
    assert [options["id"] for options in wandb.started] == [None, "new"] and file.read_text() == "new\n"
    said = capsys.readouterr().out
    assert said.count("wandb_id.txt, which is damaged (") == 1 and "W&B failed" not in said
    assert content is None or (tmp_path / "wandb_id.txt_1.damaged").read_bytes() == content


@pytest.fixture
def full_disk(wandb, monkeypatch) -> Iterator[None]:
    """Let no file take a byte once W&B has started."""
    take, before = wandb.init, resource.getrlimit(resource.RLIMIT_FSIZE)

    def init(**options):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        return take(**options)

    monkeypatch.setattr(wandb, "init", init)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_wandb_id_that_cannot_be_written_costs_a_line(tmp_path, full_disk, capsys):
    log = start(tmp_path, asked(log_wandb=True))
    assert len(log.trackers) == 1 and not list(tmp_path.iterdir())
    log.close()
    assert "wandb_id.txt could not be written ([Errno 27]" in capsys.readouterr().out


def test_wandb_that_cannot_go_online_is_tried_offline(tmp_path, wandb, monkeypatch, capsys):
    take = wandb.init

    def init(**options):
        if options["mode"] == "online":
            raise ConnectionError("no network")
        return take(**options)

    monkeypatch.setattr(wandb, "init", init)
    start(tmp_path, asked(log_wandb=True)).close()
    assert [options["mode"] for options in wandb.started] == ["offline"]
    assert "--log_wandb: W&B failed (ConnectionError: no network)" in capsys.readouterr().out


def test_tracker_that_breaks_in_mid_run_is_left_alone(tmp_path, wandb, monkeypatch, capsys):
    log = start(tmp_path, asked(log_wandb=True))
    monkeypatch.setattr(log.trackers[0].tracker.tracker, "log", lambda *_, **__: 1 / 0)
    for step in (1, 2, 3):
        log.write({"step": step})
    log.close()
    said = capsys.readouterr().out
    assert said == "--log_wandb: W&B failed (ZeroDivisionError: division by zero); the run goes on without it\n"
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_tracker_that_takes_no_rows_is_left_alone_before_they_fill_the_memory(tmp_path, wandb, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "MOST_WAITING", 3)
    log, goes_on = start(tmp_path, asked(log_wandb=True)), threading.Event()
    monkeypatch.setattr(log.trackers[0].tracker.tracker, "log", lambda *_, **__: goes_on.wait(60))
    for step in range(5):
        assert (log.trackers[0].pool is None) == (step > 3)
        log.write({"step": step})
    log.close()
    goes_on.set()
    assert capsys.readouterr().out == "--log_wandb: W&B does not answer; the run goes on without it\n"


def test_tracker_for_which_there_is_no_thread_costs_a_message(tmp_path, wandb, monkeypatch, capsys):
    """Python's pool needs a semaphore, and so a byte of shared memory."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        log = start(tmp_path, asked("tensorboard"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not log.trackers and "tensorboard failed (OSError: [Errno 27]" in capsys.readouterr().out


@pytest.mark.parametrize("name, value", [("NETRC", "netrc"), ("WANDB_BASE_URL", "http://[none")])
def test_what_hides_the_key_of_wandb_does_not_end_a_run(tmp_path, monkeypatch, name, value):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / "netrc").write_bytes(b"machine api.wandb.ai login user password \xff\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv(name, str(tmp_path / value) if name == "NETRC" else value)
    assert not trackers.wandb_key_exists()
