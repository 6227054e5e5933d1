r"""Does pretraining help to classify, or to label pixels? Finetune a MAE, and train the same model from scratch.

    python benchmarks/pretraining_helps.py --path_to_data IMAGENETTE --working_directory work_dir/pretraining_helps
    python benchmarks/pretraining_helps.py --path_to_data IMAGENETTE --path_to_segmentation_data CAMVID \
      --working_directory work_dir/pretraining_helps

A small ViT: pretrained at 64 pixels without labels on the training images of --path_to_data, then finetuned on their
classes, or under UperNet on the label maps. Each start has the best of the learning rates at the first seed. Hours on
two cores; started again, it goes on where it was. Ends with the tables of benchmarks/RESULTS.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from measure import ROOT, print_table

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--main_process_port", "0"]

COMMON = ["--save_checkpoint_interval", "1000", "--num_workers", "1"]
SIZE = ["--patch_size", "8", "--encoder_embed_dim", "128", "--encoder_depth", "6", "--encoder_num_heads", "4"]
PRETRAINING_EPOCHS = 80
PRETRAINING = ["--model", "mae_vit_tiny_patch16", *SIZE, "--decoder_embed_dim", "96", "--decoder_depth", "1"]
PRETRAINING += ["--img_size", "64", "--per_gpu_batch_size", "64", "--warmup_epochs", "4"]
PRETRAINING += ["--base_learning_rate", "4e-3", "--gradient_accumulation_steps", "1"]
CLASSIFICATION = ["--per_gpu_batch_size", "64", "--warmup_epochs", "1"]
CLASSIFICATION += ["--random_aug_magnitude", "0", "--mixup_alpha", "0", "--cutmix_alpha", "0"]
# Cut from images of 128 x 96 pixels times 0.5 to 2, as at full size from 2048 x 512.
SEGMENTATION = ["--img_size", "96", "--channels", "32", "--per_gpu_batch_size", "8", "--warmup_iterations", "36"]
SEGMENTATION += ["--eval_interval", "3", "--max_grad_norm", "1"]
LEARNING_RATES = ("1e-3", "2e-3", "4e-3")
LAYER_DECAY = {"mae": "0.75", "scratch": "1"}


class Task(NamedTuple):
    """How both starts are trained. The first of `figures`, names in the log, chooses the learning rate."""

    script: str
    recipe: list[str]
    mae_flag: str  # which takes the weights
    scratch_flags: list[str]
    scratch_times: list[int]  # as many epochs as from the MAE, and times as many
    epochs: int
    figures: list[str]


TASKS = {
    "classify": Task(
        "finetune_classifier.py",
        CLASSIFICATION,
        mae_flag="--path_to_pretrained_mae_weights",
        scratch_flags=["--img_size", "64", *SIZE],
        scratch_times=[1, 3],
        epochs=5,
        figures=["testing_top1_acc"],
    ),
    "segment": Task(
        "finetune_segmentation.py",
        SEGMENTATION,
        mae_flag="--path_to_backbone_checkpoint",
        scratch_flags=["--from_scratch", *SIZE],
        scratch_times=[1],
        epochs=12,
        figures=["testing_miou", "testing_macc", "testing_aacc"],
    ),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path_to_data", required=True, help="train/ and val/ with class folders")
    segmentation = "images/ and annotations/ in ADE20K's layout: label pixels instead of classifying"
    parser.add_argument("--path_to_segmentation_data", help=segmentation)
    parser.add_argument("--working_directory", type=Path, required=True, help="where all runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--at_once", type=int, default=2, help="runs side by side, one thread each (default: 2)")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------ runs


def last_row(experiment: Path) -> dict | None:
    """Give the last row of an experiment's log that holds an evaluation."""
    log = experiment / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    return next((row for row in reversed(rows) if any(key.startswith("testing") for key in row)), None)


def run(
    working_directory: Path, script: str, name: str, epochs: int, flags: list[str], launch: Sequence[str] = ()
) -> dict:
    """Run an experiment, or the rest of it, under flags of Accelerate, and give the row of its last evaluation."""
    experiment = working_directory / name
    row = last_row(experiment)
    if row is None or row["epoch"] < epochs:
        print(f"{name}: running", flush=True)
        command = [*LAUNCH, *launch, str(ROOT / script), "--experiment_name", name, "--epochs", str(epochs)]
        command += ["--working_directory", str(working_directory), "--resume_from_checkpoint", "latest"]
        experiment.mkdir(parents=True, exist_ok=True)
        with (experiment / "output.txt").open("ab") as output:
            done = subprocess.run([*command, *COMMON, *flags], stdout=output, stderr=output, check=False)
        if done.returncode:
            raise RuntimeError(f"{name} failed; see {experiment / 'output.txt'}")
        row = last_row(experiment)
    print(f"{name}: done", flush=True)
    return row


def pretrain(args: argparse.Namespace, seed: int) -> dict:
    """Pretrain the small masked autoencoder, unless it is there already."""
    flags = [*PRETRAINING, "--path_to_data", args.path_to_data, "--seed", str(seed)]
    return run(args.working_directory, "pretrain_mae.py", f"pretrained_seed{seed}", PRETRAINING_EPOCHS, flags)


def finetune(args: argparse.Namespace, name: str, start: str, learning_rate: str, seed: int, times: int = 1) -> dict:
    """Give the row of the last evaluation of a run of `times` the epochs; "mae" needs its pretraining done."""
    task = TASKS[name]
    weights = args.working_directory / f"pretrained_seed{seed}" / f"checkpoint_{PRETRAINING_EPOCHS}"
    flags = [*task.recipe, *([task.mae_flag, str(weights)] if start == "mae" else task.scratch_flags)]
    flags += ["--path_to_data", args.path_to_segmentation_data if name == "segment" else args.path_to_data]
    flags += ["--learning_rate", learning_rate, "--layer_decay", LAYER_DECAY[start], "--seed", str(seed)]
    experiment = f"{name}_{start}_{learning_rate}_{times * task.epochs}epochs_seed{seed}"
    return run(args.working_directory, task.script, experiment, times * task.epochs, flags)


def run_all(args: argparse.Namespace, act: Callable[..., dict], runs: list[tuple]) -> dict[tuple, dict]:
    """Give the row of each run, of which some run side by side."""
    with ThreadPoolExecutor(args.at_once) as pool:
        return dict(zip(runs, pool.map(lambda a_run: act(args, *a_run), runs), strict=True))


def main(args: argparse.Namespace) -> None:
    name = "segment" if args.path_to_segmentation_data else "classify"
    task, seeds = TASKS[name], args.seeds
    figures, starts = task.figures, [("mae", 1), *(("scratch", times) for times in task.scratch_times)]
    run_all(args, pretrain, [(seed,) for seed in seeds])  # before the runs that share them: none is started twice

    tried = [(name, start, rate, seeds[0]) for start in LAYER_DECAY for rate in LEARNING_RATES]
    found, best, rows = run_all(args, finetune, tried), {}, []
    for start in LAYER_DECAY:
        scores = {rate: found[name, start, rate, seeds[0]][figures[0]] for rate in LEARNING_RATES}
        best[start] = max(scores, key=scores.get)
        rows.append([start, *(f"{score:.2f}" for score in scores.values())])
    print_table(f"{figures[0]} in percent, seed {seeds[0]}", ["learning rate", *LEARNING_RATES], rows)

    chosen, rows = [(name, start, best[start], seed, times) for start, times in starts for seed in seeds], []
    found = run_all(args, finetune, chosen)
    for start, times in starts:
        logged = [found[name, start, best[start], seed, times] for seed in seeds]
        scores = [row[figures[0]] for row in logged]
        scores += [statistics.mean(row[figure] for row in logged) for figure in figures]
        rows.append([start, str(times * task.epochs), best[start], *(f"{score:.2f}" for score in scores)])
    header = ["start", "epochs", "learning rate", *(f"seed {seed}" for seed in seeds)]
    header += [f"mean {figure}" for figure in figures]
    print_table(f"{figures[0]} on the held-out images at the end, in percent", header, rows)


if __name__ == "__main__":
    main(parse_args())
