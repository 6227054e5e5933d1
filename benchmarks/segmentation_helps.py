"""Does pretraining help to label pixels? A MAE's encoder under UperNet, and the same model from scratch.

    python benchmarks/segmentation_helps.py --path_to_data CAMVID --path_to_pretraining_data IMAGENETTE \
      --working_directory work_dir/pretraining_helps

The encoders are those of pretraining_helps.py, and are made here where the working directory lacks them. Both starts
get the same budget, each at the best of the learning rates at the first seed. Started again, it goes on where it was.
"""

import argparse
import functools
import statistics

from measure import print_table
from pretraining_helps import LAYER_DECAY, SIZE, build_helps_parser, choose_rates, pretrain, run, run_all

# Cut from images of 128 x 96 pixels times 0.5 to 2, as at full size from 2048 x 512.
RECIPE = ["--img_size", "96", "--channels", "32", "--per_gpu_batch_size", "8", "--warmup_iterations", "36"]
RECIPE += ["--eval_interval", "3", "--save_checkpoint_interval", "1000", "--num_workers", "1", "--max_grad_norm", "1"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_helps_parser(__doc__, num_seeds=2, epochs=12)
    parser.add_argument("--path_to_data", required=True, help="images/ and annotations/, ADE20K's layout")
    parser.add_argument("--path_to_pretraining_data", required=True, help="train/ and val/ with class folders")
    return parser.parse_args(argv)


def segment(args: argparse.Namespace, start: str, learning_rate: str, seed: int) -> dict:
    """Give the row of the last evaluation of a run."""
    flags = [*RECIPE, "--path_to_data", args.path_to_data, "--seed", str(seed)]
    flags += ["--learning_rate", learning_rate, "--layer_decay", LAYER_DECAY[start]]
    if start == "mae":
        weights = pretrain(args.working_directory, args.path_to_pretraining_data, seed)
        flags += ["--path_to_backbone_checkpoint", str(weights)]
    else:
        flags += ["--from_scratch", *SIZE[2:]]  # all but the image size
    name = f"segment_{start}_{learning_rate}_seed{seed}"
    return run(args.working_directory, "finetune_segmentation.py", name, args.epochs, flags)


def main(args: argparse.Namespace) -> None:
    act = functools.partial(segment, args)
    # Before the runs that share them, so that none is started twice
    run_all(args, pretrain, [(args.working_directory, args.path_to_pretraining_data, seed) for seed in args.seeds])
    best = choose_rates(args, "testing_miou", act)
    found = run_all(args, act, [(start, rate, seed) for start, rate in best.items() for seed in args.seeds])
    rows = []
    for start, rate in best.items():
        figures = [found[start, rate, seed] for seed in args.seeds]
        cells = [row["testing_miou"] for row in figures]
        cells += [statistics.mean(row[f"testing_{name}"] for row in figures) for name in ("miou", "macc", "aacc")]
        rows.append([start, rate, *(f"{cell:.2f}" for cell in cells)])
    header = ["start", "learning rate", *(f"mIoU, seed {seed}" for seed in args.seeds), "mIoU", "mAcc", "aAcc"]
    print_table("Scores of the held-out images at the end, in percent", header, rows)


if __name__ == "__main__":
    main(parse_args())
