"""Does pretraining help to label pixels? A MAE's encoder under UperNet, and the same model from scratch.

    python benchmarks/segmentation_helps.py --path_to_data CAMVID --path_to_pretraining_data IMAGENETTE \
      --working_directory work_dir/pretraining_helps

The encoders are those of pretraining_helps.py, and are made here where the working directory lacks them. Both starts
get the same budget, each at the best of the learning rates at the first seed. Started again, it goes on where it was.
"""

import argparse
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pretraining_helps import SIZE, pretrain, run

# Cut from images of 128 x 96 pixels times 0.5 to 2, as at full size from 2048 x 512.
RECIPE = ["--img_size", "96", "--channels", "32", "--per_gpu_batch_size", "8", "--warmup_iterations", "36"]
RECIPE += ["--eval_interval", "3", "--save_checkpoint_interval", "1000", "--num_workers", "1", "--max_grad_norm", "1"]
LEARNING_RATES = ("1e-3", "2e-3", "4e-3")
LAYER_DECAY = {"mae": "0.75", "scratch": "1"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path_to_data", required=True, help="images/ and annotations/, ADE20K's layout")
    parser.add_argument("--path_to_pretraining_data", required=True, help="train/ and val/ with class folders")
    parser.add_argument("--working_directory", type=Path, required=True, help="where all runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=12, help="of finetuning (default: 12)")
    parser.add_argument("--at_once", type=int, default=2, help="runs side by side, one thread each (default: 2)")
    return parser.parse_args(argv)


def segment(args: argparse.Namespace, start: str, learning_rate: str, seed: int) -> dict:
    """Give the row of the last evaluation of a run."""
    flags = [*RECIPE, "--path_to_data", args.path_to_data, "--seed", str(seed)]
    flags += ["--learning_rate", learning_rate, "--layer_decay", LAYER_DECAY[start]]
    if start == "mae":
        weights = pretrain(args.working_directory, args.path_to_pretraining_data, seed)
        flags += ["--path_to_backbone_checkpoint", str(weights)]
    else:
        size = SIZE[2:]  # all but the image size
        flags += ["--from_scratch", *size]
    name = f"segment_{start}_{learning_rate}_seed{seed}"
    return run(args.working_directory, "finetune_segmentation.py", name, args.epochs, flags)


def main(args: argparse.Namespace) -> None:
    first_seed, *more_seeds = args.seeds
    with ThreadPoolExecutor(args.at_once) as pool:

        def run_all(runs: list[tuple[str, str, int]]) -> dict[tuple[str, str, int], dict]:
            return dict(zip(runs, pool.map(lambda a_run: segment(args, *a_run), runs), strict=True))

        # Before the runs that share them, so that none is started twice
        for seed in args.seeds:
            pretrain(args.working_directory, args.path_to_pretraining_data, seed)
        found = run_all([(start, rate, first_seed) for start in LAYER_DECAY for rate in LEARNING_RATES])
        best = {
            start: max(LEARNING_RATES, key=lambda rate: found[start, rate, first_seed]["testing_miou"])
            for start in LAYER_DECAY
        }
        found |= run_all([(start, best[start], seed) for start in LAYER_DECAY for seed in more_seeds])

    print(f"\n| mIoU after {args.epochs} epochs, seed {first_seed}, at | " + " | ".join(LEARNING_RATES) + " |")
    print("|---|" + "---|" * len(LEARNING_RATES))
    for start in LAYER_DECAY:
        cells = [f"{found[start, rate, first_seed]['testing_miou']:.2f}" for rate in LEARNING_RATES]
        print(f"| {start} | " + " | ".join(cells) + " |")
    print(
        "\n| | learning rate | " + " | ".join(f"mIoU, seed {seed}" for seed in args.seeds) + " | mIoU | mAcc | aAcc |"
    )
    print("|---|---|" + "---|" * (len(args.seeds) + 3))
    for start, rate in best.items():
        rows = [found[start, rate, seed] for seed in args.seeds]
        cells = [f"{row['testing_miou']:.2f}" for row in rows]
        cells += [f"{statistics.mean(row[f'testing_{name}'] for row in rows):.2f}" for name in ("miou", "macc", "aacc")]
        print(f"| {start} | {rate} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(parse_args())
