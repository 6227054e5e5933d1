"""Verbs that no task owns: flags, run set-up, optimisation, checkpoints, logging, pictures.

Entry rule: two scripts use it, or it is a pure metric. Nothing here knows a network or a data set, and the training
loops are not here: each script shows its own.
"""

import argparse
import importlib
import json
import math
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, DynamoBackend, gather_object
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------ flags


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the module docstring's lines and show every default."""


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every script has; a script sets its own defaults with `parser.set_defaults`."""
    run = parser.add_argument_group("run")
    run.add_argument("--experiment_name", default="experiment", help="folder below --working_directory; W&B project")
    run.add_argument("--working_directory", default="work_dir", help="where experiments and cached file lists are kept")
    run.add_argument(
        "--resume_from_checkpoint",
        metavar="CHECKPOINT",
        help="a checkpoint folder, the name of one inside the experiment, or 'latest'",
    )
    run.add_argument(
        "--save_checkpoint_interval",
        type=int,
        default=10,
        help="epochs between checkpoints; the last epoch is always saved",
    )
    run.add_argument("--log_interval", type=int, default=20, help="optimizer steps between log rows")
    run.add_argument(
        "--log_wandb",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also log to Weights & Biases (needs the package; offline without a key)",
    )
    run.add_argument("--wandb_run_name", help="name of the W&B run (default: W&B's choice)")
    run.add_argument("--seed", type=int, default=0, help="decides weights, order, crops and masks")
    run.add_argument(
        "--demo",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="draw a small data set and train a small model on it; other flags still win",
    )

    data = parser.add_argument_group("data")
    data.add_argument("--path_to_data", help="root of the data set")
    data.add_argument(
        "--img_size", type=int, nargs="+", default=[224], metavar="PIXELS", help="one number, or height and width"
    )
    data.add_argument("--input_channels", type=int, default=3, help="1 grey, 3 RGB, 4 RGBA")
    data.add_argument(
        "--mean",
        type=float,
        nargs="+",
        default=[0.485, 0.456, 0.406],
        help="channel means, 0..1 (default: ImageNet's; 0.5 each when the channels are not three)",
    )
    data.add_argument(
        "--std",
        type=float,
        nargs="+",
        default=[0.229, 0.224, 0.225],
        help="channel standard deviations, 0..1 (likewise)",
    )
    data.add_argument(
        "--num_workers",
        type=int,
        default=8,
        help="processes that decode, for each training process; at most the machine's cores",
    )
    data.add_argument(
        "--max_bad_fraction",
        type=float,
        default=0.01,
        help="stop when more than this share of the images cannot be decoded",
    )
    data.add_argument(
        "--rescan_data",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="list the files anew instead of reading the cached list",
    )

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--epochs", type=int, help="passes over the training images")
    optim.add_argument("--warmup_epochs", type=float, help="epochs of linear warmup from 0")
    optim.add_argument(
        "--per_gpu_batch_size",
        type=int,
        help="images of one optimizer step on one process, cut into --gradient_accumulation_steps forward passes",
    )
    optim.add_argument("--gradient_accumulation_steps", type=int, default=1, help="forward passes per optimizer step")
    optim.add_argument("--weight_decay", type=float, help="AdamW's, not on biases and norms")
    optim.add_argument(
        "--max_grad_norm", type=float, default=1.0, help="clip the gradient norm to this; 0 never clips, as the paper"
    )


def check_run_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse impossible values of the shared flags, and turn the lists into what the code uses."""
    positive = (
        "epochs",
        "per_gpu_batch_size",
        "gradient_accumulation_steps",
        "save_checkpoint_interval",
        "log_interval",
    )
    for name in positive:
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    for name in ("warmup_epochs", "num_workers", "weight_decay", "max_grad_norm"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} cannot be negative, and is {getattr(args, name)}")
    if args.warmup_epochs >= args.epochs:
        parser.error(f"--warmup_epochs {args.warmup_epochs} leaves nothing of --epochs {args.epochs}")
    if args.per_gpu_batch_size % args.gradient_accumulation_steps:
        parser.error(
            f"--per_gpu_batch_size {args.per_gpu_batch_size} cannot be cut into --gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps} equal forward passes; choose a multiple of it"
        )
    if len(args.img_size) > 2:
        parser.error(f"--img_size takes one number, or height and width, not {len(args.img_size)} numbers")
    args.img_size = args.img_size[0] if len(args.img_size) == 1 else tuple(args.img_size)
    for name in ("mean", "std"):
        values = getattr(args, name)
        if values == parser.get_default(name) and args.input_channels != len(values):
            values = [0.5]
        if len(values) == 1:
            values = values * args.input_channels
        if len(values) != args.input_channels:
            parser.error(
                f"--{name} has {len(values)} values, --input_channels is {args.input_channels}; give as many, or one"
            )
        setattr(args, name, tuple(values))
    if min(args.std) <= 0:
        parser.error(f"--std must be positive, and is {args.std}")
    if not 0 <= args.max_bad_fraction <= 1:
        parser.error(f"--max_bad_fraction is a share between 0 and 1, not {args.max_bad_fraction}")
    if Path(args.experiment_name).name != args.experiment_name:
        parser.error(
            f"--experiment_name {args.experiment_name!r} is a folder name; the path goes into --working_directory"
        )


# ------------------------------------------------------------------------------------------------ run set-up


def build_accelerator(gradient_accumulation_steps: int) -> Accelerator:
    """Join the processes that the launcher started; RuntimeError when each of them would train alone."""
    accelerator = Accelerator(
        gradient_accumulation_steps=gradient_accumulation_steps,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise RuntimeError(
            f"the launcher started {launched} processes, but this one sees {accelerator.num_processes}: they would all "
            "train alone in one folder. Without a GPU, set ACCELERATE_USE_CPU=true; with one, check its driver"
        )
    return accelerator


def compile_in_place(accelerator: Accelerator, model: nn.Module) -> None:
    """Do what `accelerate launch --dynamo_backend` asks for without wrapping the model.

    Accelerate's own way puts `_orig_mod.` before every key of model.safetensors, which then loads nowhere else.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend != DynamoBackend.NO:
        model.compile(**plugin.to_kwargs())
        plugin.backend = DynamoBackend.NO


def cap_workers(num_workers: int) -> int:
    """Give each training process at most its share of this machine's cores as data workers."""
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(num_workers, max(1, cores // local_processes))


def open_experiment(args: argparse.Namespace, is_checkpoint: Callable[[str], bool]) -> tuple[Path, Path | None]:
    """Give the experiment's folder and the checkpoint to resume from, if any; 'latest' of none is a fresh start.

    An experiment that already holds checkpoints is never trained over: FileExistsError names both ways out.
    """
    experiment = Path(args.working_directory) / args.experiment_name
    existing = sorted(entry.name for entry in experiment.glob("*") if entry.is_dir() and is_checkpoint(entry.name))
    if args.resume_from_checkpoint is None and existing:
        raise FileExistsError(
            f"{experiment} already holds {len(existing)} checkpoints. Add --resume_from_checkpoint latest to go on "
            "with that run, or choose another --experiment_name to start a new one"
        )
    if args.resume_from_checkpoint is None or (args.resume_from_checkpoint == "latest" and not existing):
        return experiment, None
    return experiment, find_checkpoint(experiment, args.resume_from_checkpoint)


def write_args(experiment: Path, args: argparse.Namespace, resumed_from: Path | None) -> None:
    """Write args.json; a resumed run keeps the first file and adds its own, named after the checkpoint."""
    name = "args.json" if resumed_from is None else f"args_from_{resumed_from.name}.json"
    (experiment / name).write_text(json.dumps(vars(args), indent=2) + "\n")


# ------------------------------------------------------------------------------------------------ optimisation


def scaled_lr(base_learning_rate: float, effective_batch_size: int) -> float:
    """Linear scaling rule: learning rate = base x images per optimizer step over all processes / 256 (appendix A.1)."""
    return base_learning_rate * effective_batch_size / 256


def cosine_lr(step: int, *, peak: float, warmup_steps: float, total_steps: int, minimum: float = 0.0) -> float:
    """Give the learning rate of an optimizer step: linear from exactly 0, then half a cosine down to `minimum`.

    A pure function of the step, so nothing has to be saved, and no number of processes can make it run faster. Past
    `total_steps` it stays at the minimum.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1e-12, total_steps - warmup_steps))
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Write a learning rate into every group, times the group's `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


# ------------------------------------------------------------------------------------------------ checkpoints

CHECKPOINT_NAME = re.compile(r"checkpoint_(\d+)")
STATE_FILE = "state.json"
SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def is_epoch_checkpoint(name: str) -> bool:
    return CHECKPOINT_NAME.fullmatch(name) is not None


def find_checkpoint(experiment: Path, name: str) -> Path:
    """Find a checkpoint: 'latest', the name of one inside the experiment, or a folder. FileNotFoundError lists them."""
    inside = {
        int(CHECKPOINT_NAME.fullmatch(entry.name)[1]): entry
        for entry in experiment.glob("checkpoint_*")
        if is_epoch_checkpoint(entry.name)
    }
    if name == "latest" and inside:
        return inside[max(inside)]
    for folder in (experiment / name, Path(name)):
        if (folder / STATE_FILE).is_file():
            return folder
    there = ", ".join(inside[epoch].name for epoch in sorted(inside)) or "none"
    raise FileNotFoundError(
        f"--resume_from_checkpoint {name}: no checkpoint with a {STATE_FILE} there. In {experiment}: {there}"
    )


def save_checkpoint(accelerator: Accelerator, model: nn.Module, folder: Path, config: Mapping, state: Mapping) -> None:
    """Write weights with their sizes (model.safetensors, config.json) and all that an exact resume needs.

    Everything goes into a temporary folder that is renamed at the end, so a checkpoint is whole or not there at all.
    Every process calls this; the folder has to be on a disk that all of them see. Weights that are not finite raise
    FloatingPointError and are not written.
    """
    finite = torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all()
    if not accelerator.reduce(finite.int(), "sum").item() == accelerator.num_processes:
        raise FloatingPointError(f"the weights are no longer finite, so {folder} is not written")
    temporary = folder.with_name(folder.name + ".tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(temporary)
    weights = temporary / "model.safetensors"
    if accelerator.distributed_type in SHARDING:  # these save in pieces; weights are handed on whole
        state_dict = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            save_file(state_dict, weights)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
        os.rename(temporary, folder)
    accelerator.wait_for_everyone()


def check_resumable(folder: Path, config: Mapping, state: Mapping) -> dict:
    """Read a checkpoint's state; ValueError names every difference that would make the run go on as another one."""
    saved_state = json.loads((folder / STATE_FILE).read_text())
    saved_config = json.loads((folder / "config.json").read_text())
    saved = saved_config | {key: saved_state.get(key) for key in state}
    current = json.loads(json.dumps(dict(config) | dict(state)))
    differences = [
        f"  {key}: {old!r} in the checkpoint, {new!r} now" for key, old, new in sorted(flat_differences(saved, current))
    ]
    if differences:
        raise ValueError(f"cannot resume from {folder}, because this run differs:\n" + "\n".join(differences))
    return saved_state


def flat_differences(old: Mapping, new: Mapping, prefix: str = "") -> Iterator[tuple]:
    for key in old.keys() | new.keys():
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from flat_differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b


# ------------------------------------------------------------------------------------------------ logging


class StepClock:
    """Measure images per second and the share of the time that the loop waits for data, between log rows."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self.started, self.waited_s, self.images = time.perf_counter(), 0.0, 0

    def watch(self, loader: Iterable) -> Iterator:
        """Iterate over a loader, adding up the time spent in it and the images it gives."""
        iterator = iter(loader)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            self.waited_s += time.perf_counter() - asked
            if batch is None:
                return
            self.images += len(batch.images)
            yield batch

    def read(self, num_processes: int) -> dict[str, float]:
        """Give the figures since the last reading, images counted over all processes, and start over."""
        elapsed_s = max(time.perf_counter() - self.started, 1e-9)
        figures = {
            "images_per_second": self.images * num_processes / elapsed_s,
            "data_wait_fraction": self.waited_s / elapsed_s,
        }
        self.restart()
        return figures


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB (1e9 bytes): of the GPU's allocator, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class RunLog:
    """Write `<experiment>/log.jsonl`, one row a line, and W&B when asked; only the main process writes.

    After a resume the rows beyond the resumed step are cut, so steps rise strictly. W&B that is not installed, not
    reachable or breaks costs one message, never the run.
    """

    def __init__(self, experiment: Path, *, enabled: bool, resumed_step: int | None = None):
        self.file, self.enabled, self.wandb_run = experiment / "log.jsonl", enabled, None
        if enabled and self.file.exists() and resumed_step is not None:
            rows = [line for line in self.file.read_text().splitlines() if json.loads(line)["step"] <= resumed_step]
            temporary = self.file.with_suffix(".tmp")
            temporary.write_text("".join(row + "\n" for row in rows))
            os.replace(temporary, self.file)

    def start_wandb(self, args: argparse.Namespace) -> None:
        if not self.enabled:
            return
        try:
            self.wandb = importlib.import_module("wandb")
        except ImportError as error:
            print(f"--log_wandb: wandb cannot be imported ({error}); logging to {self.file} alone", flush=True)
            return
        id_file = self.file.with_name("wandb_id.txt")
        run_id = id_file.read_text().strip() if id_file.exists() else None
        mode = os.environ.get("WANDB_MODE")
        if mode is None and not (os.environ.get("WANDB_API_KEY") or self.wandb.api.api_key):
            mode = "offline"
            print("--log_wandb: no API key, so W&B runs offline; `wandb sync` uploads it later", flush=True)
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                self.wandb_run = self.wandb.init(
                    project=args.experiment_name,
                    name=args.wandb_run_name,
                    dir=self.file.parent,
                    id=run_id,
                    resume="allow",
                    config=vars(args),
                    mode=attempt,
                    settings=self.wandb.Settings(init_timeout=20),
                )
                break
            except (self.wandb.Error, OSError) as error:
                print(f"--log_wandb: W&B did not start ({error})", flush=True)
        if self.wandb_run is not None:
            id_file.write_text(self.wandb_run.id + "\n")
            self.wandb_run.define_metric("*", step_metric="step")

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row; it carries "step"."""
        if not self.enabled:
            return
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.to_wandb(dict(row))

    def picture(self, key: str, path: Path, step: int) -> None:
        """Send a picture file to W&B."""
        if self.wandb_run is not None:
            self.to_wandb({key: self.wandb.Image(str(path)), "step": step})

    def to_wandb(self, values: dict) -> None:
        if self.wandb_run is None:
            return
        try:
            self.wandb_run.log(values)
        except (self.wandb.Error, OSError) as error:
            print(f"--log_wandb: W&B failed and is left alone from here on ({error})", flush=True)
            self.wandb_run = None

    def close(self) -> None:
        if self.wandb_run is not None:
            self.wandb_run.finish()


class BadFiles:
    """Keep count of the files that cannot be decoded, over all processes, and name each once in bad_files.txt."""

    def __init__(self, experiment: Path, num_images: int, max_fraction: float):
        self.file, self.num_images, self.max_fraction = experiment / "bad_files.txt", num_images, max_fraction
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.known = {line.split("\t")[0] for line in lines}
        self.new = {}

    def note(self, bad_files: Iterable[tuple[str, str]]) -> None:
        """Remember what one batch of this process met; nothing is written before `share`."""
        self.new |= {path: reason for path, reason in bad_files if path not in self.known}

    def share(self, accelerator: Accelerator, say: Callable[[str], None]) -> int:
        """Bring the processes' findings together, name the new ones and give the count; every process calls it.

        ValueError when the share of bad files is above the limit.
        """
        found = dict(
            sorted({path: reason for new in gather_object([self.new]) for path, reason in new.items()}.items())
        )
        found = {path: reason for path, reason in found.items() if path not in self.known}
        self.known |= found.keys()
        self.new = {}
        if found and accelerator.is_main_process:
            with self.file.open("a") as file:
                for path, reason in found.items():
                    one_line = " ".join(reason.split())
                    file.write(f"{path}\t{one_line}\n")
                    say(f"skipped and replaced, cannot be decoded: {path} ({one_line})")
        if len(self.known) > self.max_fraction * self.num_images:
            raise ValueError(
                f"{len(self.known)} of {self.num_images:,} images cannot be decoded, more than --max_bad_fraction "
                f"{self.max_fraction} allows; they are named in {self.file}"
            )
        return len(self.known)


# ------------------------------------------------------------------------------------------------ pictures


def draw_rows(rows: Mapping[str, Tensor], *, min_side: int = 128, margin: int = 4) -> Image.Image:
    """Draw titled rows of images, each (N, C, H, W) with 0 black and 1 white; small images are enlarged.

    One channel is drawn grey, more than three show their first three.
    """
    height, width = next(iter(rows.values())).shape[-2:]
    zoom = max(1, math.ceil(min_side / min(height, width)))
    height, width = height * zoom, width * zoom
    font = ImageFont.load_default(size=14)
    title_height, columns = 20, max(len(images) for images in rows.values())
    canvas = Image.new(
        "RGB", (columns * (width + margin) + margin, len(rows) * (title_height + height + margin) + margin), "white"
    )
    draw = ImageDraw.Draw(canvas)
    for row, (title, images) in enumerate(rows.items()):
        top = margin + row * (title_height + height + margin)
        draw.text((margin, top), title, fill="black", font=font)
        for column, image in enumerate(to_uint8(images)):
            picture = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(picture, (margin + column * (width + margin), top + title_height))
    return canvas


def reconstruction_titles(mask_ratio: float, norm_pix_loss: bool) -> list[str]:
    """Name the four rows of a reconstruction picture."""
    answer = "reconstruction"
    if norm_pix_loss:
        answer += " (true mean and contrast of each patch put back: norm-pix)"
    return [
        "original",
        f"masked ({mask_ratio:.0%} removed)",
        answer,
        "reconstruction with the visible patches pasted in",
    ]


def to_uint8(images: Tensor) -> np.ndarray:
    """Clip (N, C, H, W) in 0..1 to uint8 (N, H, W, 3), grey repeated, channels after the third left out."""
    images = images.detach().float().cpu().clamp(0, 1)
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
