"""Fixtures: tiny models, folders of drawn images, and the photographs that only developers and CI have."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from faults.harness import Zygote
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.v2.functional import to_pil_image

from model import MAEConfig

ROOT = Path(__file__).resolve().parent.parent
PHOTOGRAPHS = ROOT.parent / "shared" / "data"

# Tiny models gain nothing from threads, and on a busy machine lose minutes to threads that wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


TINY = MAEConfig(
    img_size=16,
    patch_size=4,
    encoder_embed_dim=32,
    encoder_depth=3,
    encoder_num_heads=4,
    decoder_embed_dim=16,
    decoder_depth=2,
    decoder_num_heads=2,
)

COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [200, 200, 60]], dtype=np.uint8)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also the long forms of tests: hours instead of minutes")


def as_picture(files, index: int, channels: int) -> Image.Image:
    """Give an image of a list as it is trained on, whole and as a picture."""
    return to_pil_image(files.open_picture(index, channels).whole())


@pytest.fixture
def photographs() -> Path:
    if not PHOTOGRAPHS.is_dir():
        pytest.skip("the development photographs are not on this machine")
    return PHOTOGRAPHS


@pytest.fixture
def cases() -> Path:
    """Small files that went wrong in practice."""
    folder = PHOTOGRAPHS.parent / "cases"
    if not folder.is_dir():
        pytest.skip("the cases from practice are not on this machine")
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Let every test start its own Accelerator; the library keeps one state per process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def draw_images(folder: Path, count: int, seed: int = 0) -> None:
    """Write `count` JPEG files of smooth random colours, 20 to 40 pixels a side."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for index in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        size = tuple(int(side) for side in generator.integers(20, 40, 2))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{index:03d}.jpg")


@pytest.fixture(scope="session")
def drawn_images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("drawn")
    for class_index, name in enumerate(("cats", "dogs")):
        draw_images(root / "train" / name, 12, seed=class_index)
        draw_images(root / "val" / name, 4, seed=10 + class_index)
    return root


@pytest.fixture
def image_folder(drawn_images, tmp_path) -> Path:
    """An ImageNet-style folder of 24 training and 8 validation images, free to be changed by the test."""
    return shutil.copytree(drawn_images, tmp_path / "images")


@pytest.fixture(scope="session")
def drawn_pairs(tmp_path_factory) -> Path:
    """Scenes of coloured blocks, whose colour is their class; every fifth row of pixels is not labelled."""
    root, generator = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for split, count in (("training", 10), ("validation", 5)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            height, width = generator.integers(3, 7, 2)
            classes = generator.integers(0, 4, (height, width)).repeat(9, axis=0).repeat(9, axis=1)
            Image.fromarray(COLOURS[classes]).save(root / "images" / split / f"{index}.jpg", quality=95)
            labels = (classes + 1).astype(np.uint8)
            labels[::5] = 0
            Image.fromarray(labels).save(root / "annotations" / split / f"{index}.png")
    return root


def load_tool(name: str) -> ModuleType:
    """Import a file of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def load_benchmark(name: str, monkeypatch) -> ModuleType:
    """Import a file of benchmarks/, which is no package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark


def launch(
    script: str, arguments: list[str], *, num_processes: int = 1, dynamo_backend: str = "no", **environment: str
) -> str:
    """Run a script as users do, on the CPU with one or several processes, and give all that it printed."""
    flags = ["--multi_gpu", "--num_processes", str(num_processes)] if num_processes > 1 else ["--num_processes", "1"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", dynamo_backend, "--main_process_port", "0"]
    command += [str(ROOT / script), *arguments]
    defaults = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env={**os.environ, **defaults, **environment}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture
def fork(zygote, tmp_path) -> Callable[..., str]:
    """Give a function that does what `launch` does in a second: processes are forked from one that imported all."""

    def fork(script: str, arguments: list[str], *faults: tuple[str, dict], num_processes: int = 1, **environment: str):
        options = dict(num_processes=num_processes, **environment)
        run = zygote.start(script.removesuffix(".py"), arguments, tmp_path / "output.txt", *faults, **options)
        assert run.wait() == 0, run.printed()
        return run.printed()

    return fork


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rows(experiment: Path) -> list[dict]:
    return [json.loads(line) for line in (experiment / "log.jsonl").read_text().splitlines()]


def without_key_bias(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop the keys' third of the qkv biases, in which two equal runs may differ.

    It shifts all attention scores of a query alike, so its true gradient is zero; what is computed is rounding noise,
    which Adam scales up to full steps of random sign.
    """
    return {
        name: torch.cat([value.chunk(3)[0], value.chunk(3)[2]]) if name.endswith("qkv.bias") else value
        for name, value in weights.items()
    }


def assert_close(a: dict, b: dict, atol: float) -> None:
    assert a.keys() == b.keys()
    if atol > 0:
        a, b = without_key_bias(a), without_key_bias(b)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=atol, msg=lambda text, key=key: f"{key}: {text}")
