"""Does pretraining help to classify? Finetune from a MAE, and train the same model from scratch, also thrice as long.

    python benchmarks/pretraining_helps.py --path_to_data IMAGENETTE --working_directory work_dir/pretraining_helps

A small ViT at 64 pixels: pretrained without labels on the training images, then every run three times with other
seeds. Hours on two cores; started again, it goes on where it was. Ends with the table of benchmarks/RESULTS.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path_to_data", required=True, help="train/ and val/ with class folders")
    parser.add_argument("--working_directory", type=Path, required=True, help="where all runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5, help="of finetuning (default: 5)")
    parser.add_argument("--at_once", type=int, default=2, help="runs side by side, one thread each (default: 2)")
    return parser.parse_args(argv)


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
            done = subprocess.run(command, stdout=output, stderr=output, env=os.environ, check=False)
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


def classify(args: argparse.Namespace, start: str, learning_rate: str, times: int, seed: int) -> float:
    """Give the top-1 at the end, in percent, of a run of `times` the budget; "mae" needs its pretraining done."""
    epochs = times * args.epochs
    flags = [*COMMON, *FINETUNING, "--path_to_data", args.path_to_data, "--seed", str(seed)]
    flags += ["--learning_rate", learning_rate, "--layer_decay", LAYER_DECAY[start]]
    if start == "mae":
        weights = pretrain(args.working_directory, args.path_to_data, seed)
        flags += ["--path_to_pretrained_mae_weights", str(weights)]
    else:
        flags += SIZE
    name = f"{start}_{learning_rate}_{epochs}epochs_seed{seed}"
    return run(args.working_directory, "finetune_classifier.py", name, epochs, flags)["testing_top1_acc"]


def main(args: argparse.Namespace) -> None:
    first_seed, *more_seeds = args.seeds
    starts = tuple(LAYER_DECAY)
    scores: dict[tuple[str, str, int, int], float] = {}

    def best_rate(start: str) -> str:
        return max(LEARNING_RATES, key=lambda rate: scores[start, rate, 1, first_seed])

    with ThreadPoolExecutor(args.at_once) as pool:

        def start_runs(runs: list[tuple[str, str, int, int]]) -> dict[tuple, Future]:
            return {a_run: pool.submit(classify, args, *a_run) for a_run in runs}

        def wait_for(futures: dict[tuple, Future]) -> None:
            scores.update({a_run: future.result() for a_run, future in futures.items()})

        pretraining = pool.submit(pretrain, args.working_directory, args.path_to_data, first_seed)
        wait_for(start_runs([("scratch", rate, 1, first_seed) for rate in LEARNING_RATES]))
        pretraining.result()
        trials = start_runs([("mae", rate, 1, first_seed) for rate in LEARNING_RATES])
        pretrainings = [pool.submit(pretrain, args.working_directory, args.path_to_data, seed) for seed in more_seeds]
        scratch_rate = best_rate("scratch")
        from_scratch = start_runs([("scratch", scratch_rate, times, seed) for times in (3, 1) for seed in args.seeds])
        wait_for(trials | from_scratch)
        for pretraining in pretrainings:
            pretraining.result()
        wait_for(start_runs([("mae", best_rate("mae"), 1, seed) for seed in args.seeds]))
    rows = {
        f"MAE, then {args.epochs} epochs": ("mae", best_rate("mae"), 1),
        f"from scratch, {args.epochs} epochs": ("scratch", best_rate("scratch"), 1),
        f"from scratch, {3 * args.epochs} epochs": ("scratch", best_rate("scratch"), 3),
    }

    print(f"\n| top-1 after {args.epochs} epochs, seed {first_seed}, at | " + " | ".join(LEARNING_RATES) + " |")
    print("|---|" + "---|" * len(LEARNING_RATES))
    for start in starts:
        cells = [f"{scores[start, rate, 1, first_seed]:.2f}" for rate in LEARNING_RATES]
        print(f"| {start} | " + " | ".join(cells) + " |")
    print("\n| top-1 | learning rate | " + " | ".join(f"seed {seed}" for seed in args.seeds) + " | mean |")
    print("|---|---|" + "---|" * (len(args.seeds) + 1))
    for name, row in rows.items():
        found = [scores[(*row, seed)] for seed in args.seeds]
        cells = [f"{score:.2f}" for score in (*found, statistics.mean(found))]
        print(f"| {name} | {row[1]} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(parse_args())
