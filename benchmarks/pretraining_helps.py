"""Does pretraining help? Finetune from a MAE, and train the same model from scratch, also three times as long.

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SIZE = ["--img_size", "64", "--patch_size", "8", "--encoder_embed_dim", "128", "--encoder_depth", "4"]
SIZE += ["--encoder_num_heads", "4"]
COMMON = ["--per_gpu_batch_size", "64", "--save_checkpoint_interval", "1000", "--num_workers", "1"]
PRETRAINING_EPOCHS = 60
PRETRAINING = ["--model", "mae_vit_tiny_patch16", *SIZE, "--decoder_depth", "2", "--epochs", str(PRETRAINING_EPOCHS)]
PRETRAINING += ["--warmup_epochs", "4", "--base_learning_rate", "4e-3", "--gradient_accumulation_steps", "1"]
# Both ways of training are the same but for the start and for what was best for it among the rates tried (RESULTS.md).
FINETUNING = ["--warmup_epochs", "2", "--random_aug_magnitude", "0", "--mixup_alpha", "0", "--cutmix_alpha", "0"]
FROM_MAE = ["--learning_rate", "1e-3", "--layer_decay", "0.75"]
FROM_SCRATCH = ["--learning_rate", "1e-3"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path_to_data", required=True, help="train/ and val/ with class folders")
    parser.add_argument("--working_directory", type=Path, required=True, help="where all runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10, help="of finetuning (default: 10)")
    parser.add_argument("--at_once", type=int, default=2, help="runs side by side, one thread each (default: 2)")
    return parser.parse_args(argv)


def last_row(experiment: Path, key: str) -> dict | None:
    """Give the last row of an experiment's log that holds `key`."""
    log = experiment / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return next((row for row in reversed(rows) if key in row), None)


def run(args: argparse.Namespace, script: str, name: str, epochs: int, flags: list[str]) -> dict:
    """Run an experiment, or the rest of it, and give the row of its last evaluation."""
    experiment = args.working_directory / name
    row = last_row(experiment, "testing_loss")
    if row is None or row["epoch"] < epochs:
        print(f"{name}: running", flush=True)
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--num_processes",
            "1",
            "--main_process_port",
            "0",
        ]
        command += [str(ROOT / script), "--experiment_name", name, "--working_directory", str(args.working_directory)]
        command += ["--path_to_data", args.path_to_data, "--resume_from_checkpoint", "latest", *COMMON, *flags]
        experiment.mkdir(parents=True, exist_ok=True)
        with (experiment / "output.txt").open("a") as output:
            done = subprocess.run(command, stdout=output, stderr=output, env=os.environ, check=False)
        if done.returncode:
            raise RuntimeError(f"{name} failed; see {experiment / 'output.txt'}")
        row = last_row(experiment, "testing_loss")
    print(f"{name}: done", flush=True)
    return row


def main(args: argparse.Namespace) -> None:
    triple = 3 * args.epochs
    pretraining = {f"pretrained_seed{seed}": seed for seed in args.seeds}

    def pretrain(name: str, seed: int) -> None:
        run(args, "pretrain_mae.py", name, PRETRAINING_EPOCHS, [*PRETRAINING, "--seed", str(seed)])

    def classify(kind: str, seed: int) -> float:
        epochs = triple if kind == "scratch_3x" else args.epochs
        flags = [*FINETUNING, "--epochs", str(epochs), "--seed", str(seed)]
        if kind == "mae":
            weights = args.working_directory / f"pretrained_seed{seed}" / f"checkpoint_{PRETRAINING_EPOCHS}"
            flags += [*FROM_MAE, "--path_to_pretrained_mae_weights", str(weights)]
        else:
            flags += [*FROM_SCRATCH, *SIZE]
        return run(args, "finetune_classifier.py", f"{kind}_seed{seed}", epochs, flags)["testing_top1_acc"]

    jobs = [(kind, seed) for seed in args.seeds for kind in ("mae", "scratch", "scratch_3x")]
    with ThreadPoolExecutor(args.at_once) as pool:
        list(pool.map(lambda item: pretrain(*item), pretraining.items()))
        results = dict(zip(jobs, pool.map(lambda job: classify(*job), jobs), strict=True))

    names = {
        "mae": f"MAE, then {args.epochs} epochs",
        "scratch": f"from scratch, {args.epochs} epochs",
        "scratch_3x": f"from scratch, {triple} epochs",
    }
    print("\n| start | " + " | ".join(f"seed {seed}" for seed in args.seeds) + " | mean |")
    print("|---|" + "---|" * (len(args.seeds) + 1))
    for kind, name in names.items():
        scores = [results[kind, seed] for seed in args.seeds]
        cells = [f"{score:.2f}" for score in (*scores, statistics.mean(scores))]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(parse_args())
