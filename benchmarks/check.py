r"""How near to the truth is --check? Compare what it predicts with what a short run of the same flags then does.

    OMP_NUM_THREADS=1 python benchmarks/check.py --path_to_data IMAGENETTE --path_to_segmentation_data CAMVID \
      --working_directory work_dir/check

The three scripts with small models on one thread and one data worker, the prediction and the run in turns. A step's
seconds are those of the log but for its first row, a run's those from args.json to DONE.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

from measure import ROOT, print_table, ratio, spread, take_turns
from pretraining_helps import CLASSIFICATION, COMMON, PRETRAINING, SEGMENTATION, SIZE

SCRATCH = ["--img_size", "64", *SIZE]
RUNS = {
    "pretrain_mae": [*PRETRAINING, "--epochs", "3", "--warmup_epochs", "1"],
    "finetune_classifier": [*CLASSIFICATION, *SCRATCH, "--epochs", "2"],
    "finetune_segmentation": ["--from_scratch", *SIZE, *SEGMENTATION, "--epochs", "3"],
}
PARTS = r"([\d,]+) steps x (\S+) s, ([\d,]+) evaluations x (\S+) s, ([\d,]+) saves x (\S+) s"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path_to_data", required=True, help="train/ and val/ with class folders")
    parser.add_argument("--path_to_segmentation_data", required=True, help="in ADE20K's layout")
    parser.add_argument("--working_directory", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    return parser.parse_args(argv)


def start(script: str, args: argparse.Namespace, *flags: str) -> str:
    """Run a script, and give what it printed."""
    data = args.path_to_segmentation_data if "segmentation" in script else args.path_to_data
    command = [sys.executable, str(ROOT / f"{script}.py"), *COMMON, *RUNS[script], "--path_to_data", data]
    command += ["--working_directory", str(args.working_directory), *flags]
    return subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True).stdout


def predict(script: str, args: argparse.Namespace) -> tuple[float, float]:
    """Give the seconds of a step and of the run, as --check predicts them."""
    printed = start(script, args, "--check")
    print(printed.partition("check  ")[2], file=sys.stderr)
    steps, step_s, *rest = (float(number.replace(",", "")) for number in re.search(PARTS, printed).groups())
    return step_s, steps * step_s + rest[0] * rest[1] + rest[2] * rest[3]


def train(script: str, args: argparse.Namespace) -> tuple[float, float]:
    """Give the seconds of a step and of the run, as a new run has them."""
    names = (f"{script}_{number}" for number in range(1_000_000))
    name = next(name for name in names if not (args.working_directory / name).exists())
    start(script, args, "--experiment_name", name)
    folder, times = args.working_directory / name, []
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    flags = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    for before, row in itertools.pairwise(rows):
        steps = row["step"] - before["step"]
        times.append((steps, steps * flags["per_gpu_batch_size"] / row["images_per_second"]))
    run_s = (folder / "DONE").stat().st_mtime - (folder / "args.json").stat().st_mtime
    return sum(seconds for _, seconds in times) / sum(steps for steps, _ in times), run_s


def main(args: argparse.Namespace) -> None:
    keys = [(script, act) for script in RUNS for act in (predict, train)]
    found, rows = take_turns(keys, args.rounds, lambda key: key[1](key[0], args)), []
    for script in RUNS:
        (predicted, whole), (steps, runs) = (zip(*found[script, act], strict=True) for act in (predict, train))
        rows.append([script, spread(predicted), spread(steps), ratio(predicted, steps), spread(whole), spread(runs)])
        rows[-1].append(ratio(whole, runs))
    header = ["script", "s/step predicted", "s/step of the log", "ratio", "run predicted, s", "run, s", "ratio"]
    print_table("--check and the run itself: median (smallest to largest), ratios round by round", header, rows)


if __name__ == "__main__":
    main(parse_args())
