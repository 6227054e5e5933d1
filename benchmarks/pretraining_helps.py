"""Does pretraining help to classify? Finetune from a MAE, and train the same model from scratch, also thrice as long.

    python benchmarks/pretraining_helps.py --path_to_data IMAGENETTE --working_directory work_dir/pretraining_helps

A small ViT at 64 pixels: pretrained without labels on the training images, then every run three times with other
seeds. Hours on two cores; started again, it goes on where it was. Ends with the table of benchmarks/RESULTS.md.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from measure import ROOT, print_table

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--main_process_port", "0"]

SIZE = ["--img_size", "64", "--patch_size", "8", "--encoder_embed_dim", "128", "--encoder_depth", "6"]
SIZE += ["--encoder_num_heads", "4"]
COMMON = ["--per_gpu_batch_size", "64", "--save_checkpoint_interval", "1000", "--num_workers", "1"]
PRETRAINING_EPOCHS = 80
PRETRAINING = ["--model", "mae_vit_tiny_patch16", *SIZE, "--decoder_embed_dim", "96", "--decoder_depth", "1"]
PRETRAINING += ["--warmup_epochs", "4", "--base_learning_rate", "4e-3", "--gradient_accumulation_steps", "1"]
# Both starts are finetuned alike, each at the best of the learning rates at the first seed.
FINETUNING = ["--warmup_epochs", "1", "--random_aug_magnitude", "0", "--mixup_alpha", "0", "--cutmix_alpha", "0"]
LEARNING_RATES = ("1e-3", "2e-3", "4e-3")
LAYER_DECAY = {"mae": "0.75", "scratch": "1"}


def build_helps_parser(description: str, *, num_seeds: int, epochs: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--working_directory", type=Path, required=True, help="where all runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(num_seeds)))
    parser.add_argument("--epochs", type=int, default=epochs, help=f"of finetuning (default: {epochs})")
    parser.add_argument("--at_once", type=int, default=2, help="runs side by side, one thread each (default: 2)")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_helps_parser(__doc__, num_seeds=3, epochs=5)
    parser.add_argument("--path_to_data", required=True, help="train/ and val/ with class folders")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------ runs


def last_row(experiment: Path) -> dict | None:
    """Give the last row of an experiment's log that holds an evaluation."""
    log = experiment / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return next((row for row in reversed(rows) if any(key.startswith("testing") for key in row)), None)


def run(working_directory: Path, script: str, name: str, epochs: int, flags: list[str]) -> dict:
    """Run an experiment, or the rest of it, and give the row of its last evaluation."""
    experiment = working_directory / name
    row = last_row(experiment)
    if row is None or row["epoch"] < epochs:
        print(f"{name}: running", flush=True)
        command = [*LAUNCH, str(ROOT / script), "--experiment_name", name, "--epochs", str(epochs)]
        command += ["--working_directory", str(working_directory), "--resume_from_checkpoint", "latest", *flags]
        experiment.mkdir(parents=True, exist_ok=True)
        with (experiment / "output.txt").open("a") as output:
            done = subprocess.run(command, stdout=output, stderr=output, check=False)
        if done.returncode:
            raise RuntimeError(f"{name} failed; see {experiment / 'output.txt'}")
        row = last_row(experiment)
    print(f"{name}: done", flush=True)
    return row


def pretrain(working_directory: Path, path_to_data: str, seed: int) -> Path:
    """Pretrain the small masked autoencoder, unless it is there already, and give its checkpoint."""
    name = f"pretrained_seed{seed}"
    flags = [*COMMON, *PRETRAINING, "--path_to_data", path_to_data, "--seed", str(seed)]
    run(working_directory, "pretrain_mae.py", name, PRETRAINING_EPOCHS, flags)
    return working_directory / name / f"checkpoint_{PRETRAINING_EPOCHS}"


def run_all(args: argparse.Namespace, act: Callable, runs: list[tuple]) -> dict[tuple, object]:
    """Give what `act` says of each run, of which some run side by side."""
    with ThreadPoolExecutor(args.at_once) as pool:
        return dict(zip(runs, pool.map(lambda a_run: act(*a_run), runs), strict=True))


def choose_rates(args: argparse.Namespace, figure: str, act: Callable[[str, str, int], dict]) -> dict[str, str]:
    """Try all learning rates of each start at the first seed, print what they give, and give the best by start."""
    seed, best, rows = args.seeds[0], {}, []
    found = run_all(args, act, [(start, rate, seed) for start in LAYER_DECAY for rate in LEARNING_RATES])
    for start in LAYER_DECAY:
        scores = {rate: found[start, rate, seed][figure] for rate in LEARNING_RATES}
        best[start] = max(scores, key=scores.get)
        rows.append([start, *(f"{score:.2f}" for score in scores.values())])
    print_table(f"{figure} after {args.epochs} epochs, seed {seed}", ["learning rate", *LEARNING_RATES], rows)
    return best


# ------------------------------------------------------------------------------------------------ classification


def classify(args: argparse.Namespace, start: str, learning_rate: str, seed: int, times: int = 1) -> dict:
    """Give the row of the last evaluation of a run of `times` the budget; "mae" needs its pretraining done."""
    epochs = times * args.epochs
    flags = [*COMMON, *FINETUNING, "--path_to_data", args.path_to_data, "--seed", str(seed)]
    flags += ["--learning_rate", learning_rate, "--layer_decay", LAYER_DECAY[start]]
    if start == "mae":
        weights = pretrain(args.working_directory, args.path_to_data, seed)
        flags += ["--path_to_pretrained_mae_weights", str(weights)]
    else:
        flags += SIZE
    name = f"{start}_{learning_rate}_{epochs}epochs_seed{seed}"
    return run(args.working_directory, "finetune_classifier.py", name, epochs, flags)


def main(args: argparse.Namespace) -> None:
    act, figure = functools.partial(classify, args), "testing_top1_acc"
    # Before the runs that share them, so that none is started twice
    run_all(args, pretrain, [(args.working_directory, args.path_to_data, seed) for seed in args.seeds])
    best = choose_rates(args, figure, act)
    kinds = {"MAE": ("mae", 1), "from scratch": ("scratch", 1), "from scratch, three times as long": ("scratch", 3)}
    runs = [(start, best[start], seed, times) for start, times in kinds.values() for seed in args.seeds]
    found, rows = run_all(args, act, runs), []
    for name, (start, times) in kinds.items():
        scores = [found[start, best[start], seed, times][figure] for seed in args.seeds]
        cells = [f"{score:.2f}" for score in (*scores, statistics.mean(scores))]
        rows.append([f"{name}, {times * args.epochs} epochs", best[start], *cells])
    header = ["top-1", "learning rate", *(f"seed {seed}" for seed in args.seeds), "mean"]
    print_table("Top-1 on the held-out images at the end, in percent", header, rows)


if __name__ == "__main__":
    main(parse_args())
