"""Measure the seconds from a command to its first optimizer step, beside those of another checkout.

    OMP_NUM_THREADS=1 python benchmarks/start.py --path_to_data IMAGES --path_to_pairs PAIRS --before CHECKOUT

A step is made once log.jsonl has its first row. Processor time is of all processes of the command; the clock hangs on
what else the machine does. `import torch` is what no command can go below. Lists of files are there already (`cached`)
or made anew; the first round, which also draws the demo's scenes, does not count.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from measure import CPU, ROOT, build_parser, describe_machine, print_table, ratio, spread, take_turns

TINY = "--img_size 32 --patch_size 8 --encoder_embed_dim 48 --encoder_depth 4 --encoder_num_heads 3 --num_workers 1"
TINY += " --per_gpu_batch_size 8 --gradient_accumulation_steps 1"
POLL_S, LIMIT_S = 0.005, 600


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    parser.add_argument("--before", type=Path, required=True, help="a checkout to compare with")
    parser.add_argument("--path_to_data", type=Path, help="train/ and val/ with class folders")
    parser.add_argument("--path_to_pairs", type=Path, help="images with label maps")
    parser.add_argument("--only", default="", help="of the commands, those whose name begins so")
    return parser.parse_args(argv)


def build_commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """Give the commands by name, without the working directory."""
    commands = {"demo, by accelerate launch": ["launch", "pretrain_mae.py", "--demo"]}
    commands["demo, by python"] = ["pretrain_mae.py", "--demo"]
    if args.path_to_data:
        folder = f"--path_to_data {args.path_to_data} {TINY}".split()
        small = f"{TINY} --decoder_embed_dim 48 --decoder_depth 1 --decoder_num_heads 3".split()
        pretrain = ["pretrain_mae.py", "--path_to_data", str(args.path_to_data), *small]
        commands |= {"pretraining, list cached": pretrain, "pretraining, list made anew": [*pretrain, "--rescan_data"]}
        commands["classifier"] = ["finetune_classifier.py", *folder]
    if args.path_to_pairs:
        segmenter = f"--path_to_data {args.path_to_pairs} --from_scratch --channels 32 {TINY}"
        commands["segmenter, pairs checked before"] = ["finetune_segmentation.py", *segmenter.split()]
        commands["segmenter, pairs checked anew"] = [*commands["segmenter, pairs checked before"], "--rescan_data"]
    return {name: words for name, words in commands.items() if name.startswith(args.only)}


def time_start(checkout: Path, words: list[str], working_directory: Path) -> tuple[float, float]:
    """Give processor time and clock, in seconds, until the first row of the log; RuntimeError without one."""
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "1"] if words[0] == "launch" else []
    script, *flags = words[1:] if launcher else words
    log = working_directory / f"run_{time.monotonic_ns()}" / "log.jsonl"
    where = ["--working_directory", str(working_directory), "--experiment_name", log.parent.name]
    began = time.perf_counter()
    process = psutil.Popen(
        [sys.executable, *launcher, str(checkout / script), *flags, *where],
        cwd=working_directory,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (log.exists() and log.stat().st_size):
        time.sleep(POLL_S)
        if process.poll() is not None or time.perf_counter() - began > LIMIT_S:
            raise RuntimeError(f"{checkout / script} {' '.join(flags)}: no step was made")
    seconds, tree = time.perf_counter() - began, [process, *process.children(recursive=True)]
    computed = sum(sum(one.cpu_times()[:4]) for one in tree)  # with what their ended processes computed
    for one in tree:
        one.kill()
    process.wait()
    return computed, seconds


def time_import() -> tuple[float, float]:
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    after = os.times()
    computed = after.children_user + after.children_system - before.children_user - before.children_system
    return computed, time.perf_counter() - began


def main(args: argparse.Namespace) -> None:
    print(describe_machine(CPU), flush=True)
    commands = build_commands(args)
    with tempfile.TemporaryDirectory() as folder:
        places = {"before": args.before.resolve(), "now": ROOT}
        runs = {(name, place): words for name, words in commands.items() for place in places}
        for place in places:
            (Path(folder) / place).mkdir()

        def measure(key: tuple[str, str]) -> tuple[float, float]:
            found = time_import() if key not in runs else time_start(places[key[1]], runs[key], Path(folder, key[1]))
            print(*key, *(f"{seconds:.2f}" for seconds in found), file=sys.stderr, flush=True)
            return found

        found = take_turns([*runs, ("import torch", "")], args.rounds + 1, measure)
    rows = []
    for unit, kind in enumerate(("processor", "clock")):
        times = {key: [seconds[unit] for seconds in values[1:]] for key, values in found.items()}
        for name in commands:
            before, now = times[name, "before"], times[name, "now"]
            rows.append([name, kind, spread(before, ".2f"), spread(now, ".2f"), ratio(now, before)])
        alone = spread(times["import torch", ""], ".2f")
        rows.append(["import torch", kind, alone, alone, ""])
    print_table("Seconds to the first step", ["command", "time", "before", "now", "now / before"], rows)


if __name__ == "__main__":
    main(parse_args())
