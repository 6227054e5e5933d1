"""The sections of gpu.py that run pretrain_mae.py itself, on generated photographs, and what a section is told."""

import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from measure import ROOT
from PIL import Image
from pretraining_helps import LAUNCH
from safetensors.torch import load_file
from step import DEVICE

import pretrain_mae
import training
from model import MAEConfig

ON_GPU = DEVICE.type == "cuda"
# What the launcher tells a script, which is here started without it
LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "bf16"} | ({} if ON_GPU else {"ACCELERATE_USE_CPU": "true"})
PHOTOGRAPH = 500, 375  # width and height
LINKS = 8  # names of each photograph, so that an epoch is long
STEPS_PER_EPOCH, EPOCHS = 4, 6  # of a run that is killed
# What may go wrong in a section without ending the others; torch's lack of memory is a RuntimeError
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError, OSError, ArithmeticError)
FAILURES += (subprocess.SubprocessError,)

Rows = Iterator[list[str]]


@dataclasses.dataclass
class Job:
    """What a section is told: sizes, and when nothing new should begin; it notes whether something failed."""

    until: float
    original: Path | None
    matrix: int
    models: dict[str, MAEConfig]
    batches: tuple[int, ...]  # tried one after the other
    timed_s: float  # that each of three rounds lasts
    compiler: str
    crop_size: int  # of segmentation
    crop_batches: tuple[int, ...]
    photographs: int
    batch: int  # of the run that waits for data
    small: MAEConfig  # of runs that are about something else
    small_batch: int
    small_epochs: int
    failed: bool = False

    def left_s(self) -> float:
        return max(1.0, self.until - time.time())

    def is_over(self) -> bool:
        return time.time() > self.until


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".replace("|", "/")


# ------------------------------------------------------------------------------------------------ runs


def draw_photographs(folder: Path, count: int, links: int = 1) -> float:
    """Write JPEG files of random colours, from coarse to grain, and more names for each; give the kB of one."""

    def draw(index: int) -> None:
        random, width, height = np.random.default_rng(index), *PHOTOGRAPH
        layers = [
            np.asarray(Image.fromarray(random.integers(0, 256, (*shape, 3), np.uint8)).resize(PHOTOGRAPH), np.float32)
            for shape in ((6, 8), (30, 40), (height, width))
        ]
        pixels = 0.6 * layers[0] + 0.3 * layers[1] + 0.1 * layers[2]
        file = folder / f"{index}.jpg"
        Image.fromarray(pixels.astype(np.uint8)).save(file, quality=90)
        for link in range(1, links):
            file.with_stem(f"{index}_{link}").hardlink_to(file)

    folder.mkdir(parents=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(draw, range(count)))
    return (folder / "0.jpg").stat().st_size / 1000


def size_flags(config: MAEConfig, *, decoder: bool) -> list[str]:
    left_out = ("input_channels", "norm_pix_loss")
    sizes = {name: value for name, value in config.as_record(decoder=decoder).items() if name not in left_out}
    return [word for name, value in sizes.items() for word in (f"--{name}", str(value))]


def run_flags(folder: Path, name: str, config: MAEConfig, batch: int, epochs: int) -> list[str]:
    """Give the flags of a run on the photographs of a folder, in which it is kept, too."""
    flags = ["--path_to_data", str(folder / "photographs"), "--working_directory", str(folder)]
    flags += ["--experiment_name", name, "--epochs", str(epochs), "--per_gpu_batch_size", str(batch)]
    return [*flags, "--gradient_accumulation_steps", "1", *size_flags(config, decoder=True)]


def read_log(experiment: Path) -> list[dict]:
    log = experiment / "log.jsonl"
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # the last may be half there


@contextlib.contextmanager
def started(command: list[str], printed: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """Start a command, whose output goes into a file; it does not outlive this."""
    with printed.open("ab") as output:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=output)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def finish(process: subprocess.Popen, printed: Path, job: Job) -> None:
    """Wait for the end; RuntimeError, with the last line that it printed, where that is not a good one."""
    if code := process.wait(job.left_s()):
        last = printed.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"pretrain_mae.py ended with {code}: {last}")


# ------------------------------------------------------------------------------------------------ sections


def wait_for_data(job: Job) -> Rows:
    """Give what the log says of the data, once all workers are at work."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        kb = draw_photographs(folder / "photographs", job.photographs, LINKS)
        command = [*LAUNCH, "--num_machines", "1", "--mixed_precision", "bf16", "--dynamo_backend", "no"]
        command += ["--num_cpu_threads_per_process", "1"] + ([] if ON_GPU else ["--cpu"])
        for crops in (1, 4):
            name, printed = f"crops{crops}", folder / f"crops{crops}.txt"
            flags = run_flags(folder, name, job.models["ViT-B"], job.batch, 2)
            flags += ["--log_interval", "5", "--repeated_sampling", str(crops)]
            with started([*command, str(ROOT / "pretrain_mae.py"), *flags], printed) as process:
                finish(process, printed, job)
            log = read_log(folder / name)
            log = log[len(log) // 4 :]
            rates, waits = ([row[figure] for row in log] for figure in ("images_per_second", "data_wait_fraction"))
            cells = [f"{statistics.median(rates):.1f}", f"{statistics.median(waits):.1%}", f"{max(waits):.1%}"]
            decoder = json.loads((folder / name / "args.json").read_text(encoding="utf-8"))["decoder"]
            yield [str(crops), f"{kb:.0f}", decoder, str(os.cpu_count()), str(job.batch), *cells]


def kill_and_resume(folder: Path, deterministic: bool, job: Job) -> list[str]:
    """Run undisturbed, and killed and resumed, both at once; compare the weights at the end."""
    flag = "--deterministic" if deterministic else "--no-deterministic"
    more = [flag, "--log_interval", "1", "--save_checkpoint_interval", "1", "--num_workers", "2"]
    more += ["--base_learning_rate", "1e-2", "--resume_from_checkpoint", "latest"]
    script, kill_at = str(ROOT / "pretrain_mae.py"), STEPS_PER_EPOCH * EPOCHS // 2 + 1
    commands = {
        name: [sys.executable, script, *run_flags(folder, name, job.small, job.small_batch, EPOCHS), *more]
        for name in ("whole", "killed")
    }
    printed = {name: folder / f"{name}.txt" for name in commands}
    with started(commands["whole"], printed["whole"], **LAUNCHED) as undisturbed:
        # No launcher, which a kill would leave behind
        with started(commands["killed"], printed["killed"], **LAUNCHED) as process:
            while not (log := read_log(folder / "killed")) or log[-1]["step"] < kill_at:
                if process.poll() is not None or job.is_over():
                    process.kill()
                    finish(process, printed["killed"], job)
                    raise RuntimeError("the run ended before it could be killed")
                time.sleep(0.005)
        with started(commands["killed"], printed["killed"], **LAUNCHED) as process:
            finish(process, printed["killed"], job)
        finish(undisturbed, printed["whole"], job)
    (origin,) = (folder / "killed").glob("args_from_*.json")
    weights = [load_file(folder / name / training.LAST_CHECKPOINT / "model.safetensors") for name in commands]
    pairs = [(weights[0][key].double(), weights[1][key].double()) for key in weights[0] | weights[1]]
    exact = "yes" if all(torch.equal(a, b) for a, b in pairs) else "no"
    largest = max((a - b).abs().max().item() for a, b in pairs)
    return [flag, str(log[-1]["step"]), origin.stem.removeprefix("args_from_"), exact, f"{largest:.1e}"]


def compare_resumes(job: Job) -> Rows:
    kinds = (True, False) if ON_GPU else (True,)  # on a CPU the flag changes nothing
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(len(kinds)) as pool:
        folders = [Path(work, f"deterministic_{kind}") for kind in kinds]
        for folder in folders:
            draw_photographs(folder / "photographs", STEPS_PER_EPOCH * job.small_batch)
        runs = [pool.submit(kill_and_resume, *about, job) for about in zip(folders, kinds, strict=True)]
        for run, deterministic in zip(runs, kinds, strict=True):
            try:
                yield run.result()
            except FAILURES as error:
                job.failed = True
                yield [f"deterministic: {deterministic}", reason(error)]


def allocated_mb() -> float:
    """Give the megabytes that tensors take on the GPU, or this process on the CPU (Linux)."""
    if ON_GPU:
        return torch.cuda.memory_allocated() / 1e6
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def watch_steps(job: Job) -> Rows:
    """Run the script's loop in this process: does memory grow, and what waits for the GPU in a step?"""
    seen = []
    with (
        tempfile.TemporaryDirectory() as work,
        warnings.catch_warnings(record=True) as caught,
        contextlib.redirect_stdout(sys.stderr),
        mock.patch.dict(os.environ, LAUNCHED),
    ):
        warnings.simplefilter("always")

        class Watched(training.Run):
            def finish_step(self, *args) -> None:
                super().finish_step(*args)
                seen.append((len(caught), allocated_mb()))

        draw_photographs(Path(work, "photographs"), STEPS_PER_EPOCH * job.small_batch, LINKS)
        flags = run_flags(Path(work), "run", job.small, job.small_batch, job.small_epochs)
        flags += ["--save_checkpoint_interval", str(job.small_epochs), "--num_workers", "2"]
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("warn")
        with mock.patch.object(training, "Run", Watched):
            pretrain_mae.main(pretrain_mae.parse_args(flags))
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")
    for other in (w for w in caught if "synchronizing" not in str(w.message)):
        warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    ends, memory = zip(*seen, strict=True)
    waits = [[w for w in caught[a:b] if "synchronizing" in str(w.message)] for a, b in itertools.pairwise(ends)]
    usual, all_waits = sorted(map(len, waits))[len(waits) // 2], list(itertools.chain(*waits))
    early = len(seen) // 10
    yield ["steps", str(len(seen))]
    yield [f"MB allocated after step {early + 1}", f"{memory[early]:.1f}"]
    yield ["MB allocated after the last", f"{memory[-1]:.1f}"]
    yield ["times that a usual step waits for the GPU", str(usual) if ON_GPU else "no GPU"]
    yield ["times in all, with log rows and ends of epochs", str(len(all_waits)) if ON_GPU else "no GPU"]
    for place, count in Counter(f"{Path(w.filename).name}:{w.lineno}" for w in all_waits).most_common(5):
        yield [f"of these at {place}", str(count)]
