"""Tiny jobs of the three scripts, what they leave undisturbed, and the table of faults at the end of the session."""

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_images
from PIL import Image

from faults.harness import Job

SCRIPTS = ("pretrain_mae", "finetune_classifier", "finetune_segmentation")
# 40 images in steps of 4, three epochs: 30 optimizer steps.
COMMON_FLAGS = """--epochs 3 --gradient_accumulation_steps 1 --num_workers 1 --log_interval 1 --img_size 16
 --save_checkpoint_interval 2 --patch_size 8 --encoder_num_heads 2 --encoder_mlp_ratio 1"""
FLAGS = {
    "pretrain_mae": """--encoder_embed_dim 16 --encoder_depth 1 --decoder_embed_dim 16 --decoder_depth 1
 --decoder_num_heads 2 --decoder_mlp_ratio 1 --base_learning_rate 0.1 --warmup_epochs 1""",
    # Everything random at once: RandAugment, erasing, mixup, CutMix, drop path; and an average with a state of its own.
    "finetune_classifier": """--encoder_embed_dim 16 --encoder_depth 2 --learning_rate 0.01 --warmup_epochs 1
 --drop_path 0.5 --random_erasing 0.5 --layer_decay 0.75 --ema_decay 0.9""",
    "finetune_segmentation": """--encoder_embed_dim 64 --encoder_depth 4 --from_scratch --num_classes 3 --channels 64
 --norm group --learning_rate 0.001 --warmup_iterations 3 --drop_path 0.3 --eval_interval 1""",
}
NUM_STEPS = 30
SAVE_OFTEN = "--save_minutes 0.002"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not sys.platform.startswith("linux"):
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.skip(reason="these faults are injected with Linux' own means"))


# ------------------------------------------------------------------------------------------------ the table


class Faults:
    """How many faults a test injected, and how many of them the run survived."""

    def __init__(self, row: int, name: str):
        self.row, self.name, self.injected, self.survived, self.note = row, name, 0, 0, ""


TABLE: list[Faults] = []


@pytest.fixture
def faults() -> Callable:
    """Open a line of the table at the session's end: `with faults(1, "kill -9") as count`."""

    @contextlib.contextmanager
    def open_line(row: int, name: str) -> Iterator[Faults]:
        line = Faults(row, name)
        TABLE.append(line)
        yield line

    return open_line


def pytest_terminal_summary(terminalreporter) -> None:
    if TABLE:
        terminalreporter.section("faults injected and survived")
        for line in sorted(TABLE, key=lambda line: line.row):
            counts = f"{line.survived:4d} of {line.injected:4d}"
            terminalreporter.write_line(f"{line.row:3d}  {line.name:<72}{counts}  {line.note}")


@pytest.fixture(scope="session")
def full(request) -> bool:
    return request.config.getoption("--full")


# ------------------------------------------------------------------------------------------------ data and jobs


def draw_pairs(root: Path) -> None:
    """Write scenes of coloured blocks, whose colour is their class; every fifth row of pixels is not labelled."""
    generator = np.random.default_rng(0)
    colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]], dtype=np.uint8)
    for split, count in (("training", 40), ("validation", 4)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            classes = generator.integers(0, 3, (3, 4)).repeat(6, axis=0).repeat(6, axis=1)
            Image.fromarray(colours[classes]).save(root / "images" / split / f"{index:02d}.jpg", quality=95)
            labels = (classes + 1).astype(np.uint8)
            labels[::5] = 0
            Image.fromarray(labels).save(root / "annotations" / split / f"{index:02d}.png")


def draw_data(script: str, root: Path) -> Path:
    if script == "finetune_segmentation":
        draw_pairs(root)
    else:
        for index, name in enumerate(("cats", "dogs")):
            draw_images(root / "train" / name, 20, seed=index)
            draw_images(root / "val" / name, 4, seed=10 + index)
    return root


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> dict[str, Path]:
    return {script: draw_data(script, tmp_path_factory.mktemp(script) / "data") for script in SCRIPTS}


@pytest.fixture(scope="session")
def job(zygote, data) -> Callable[[str, Path, int], Job]:
    """Build the command of a script, on one or two processes with the same images in a step."""

    def job(script: str, work: Path, num_processes: int = 1) -> Job:
        flags = [*shlex.split(f"{COMMON_FLAGS} {FLAGS[script]}"), "--path_to_data", str(data[script])]
        flags += ["--per_gpu_batch_size", str(4 // num_processes)]
        return Job(zygote, script, tuple(flags), work, num_processes)

    return job


@pytest.fixture(scope="session")
def undisturbed(job, tmp_path_factory) -> Callable[[str, int], Path]:
    """Give what a job leaves that nobody disturbed; it runs when it is first asked for."""
    finished: dict[tuple[str, int], Path] = {}

    def undisturbed(script: str, num_processes: int = 1) -> Path:
        if (script, num_processes) not in finished:
            whole = job(script, tmp_path_factory.mktemp("undisturbed"), num_processes)
            whole.finish(more="--save_minutes 0")
            finished[script, num_processes] = whole.experiment
        return finished[script, num_processes]

    return undisturbed
