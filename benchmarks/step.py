r"""What does an optimizer step cost, in time and memory, beside transformers'?

    OMP_NUM_THREADS=1 python benchmarks/step.py
    OMP_NUM_THREADS=1 python benchmarks/step.py --model mae_vit_large_patch16 --tables mask_ratio
    OMP_NUM_THREADS=1 python benchmarks/step.py --tables segmentation --batch_size 2 \
      --modes "float32 eager" "bfloat16 eager"

Networks of the same sizes, with the same AdamW and clipping, take turns on random images, on the GPU where there is
one and else on the CPU. Beside the peer (`pip install transformers`) each step is taken in a process of its own,
because on a CPU this project keeps the memory that it frees, as it does when it trains.
"""

import argparse
import dataclasses
import functools
import gc
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from measure import alternate, build_parser, describe_machine, print_table, ratio, take_turns, time_run
from networks import (
    Segmenter,
    TransformersSegmenter,
    build_full_encoder,
    build_ours,
    build_transformers,
    training_flops,
)
from torch import Tensor, nn

from model import MODEL_CONFIGS, MAEConfig
from training.process import keep_freed_memory

MODES = {
    "float32 eager": (torch.float32, False),
    "bfloat16 eager": (torch.bfloat16, False),
    "bfloat16 compiled": (torch.bfloat16, True),
}
MASK_RATIO, MASK_RATIOS = 0.75, (0.5, 0.75, 0.9)
CROP_SIZE, NUM_CLASSES = 512, 150  # of segmentation
GPU_MATRIX, CPU_MATRIX = 8192, 2048  # side of the matrices whose product gives the rate
OURS, THEIRS = "this project", "transformers"
PRETRAINING = {OURS: build_ours, THEIRS: build_transformers}
SEGMENTATION = {OURS: Segmenter, THEIRS: TransformersSegmenter}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser, batch = build_parser(__doc__), 128 if DEVICE.type == "cuda" else 8
    parser.add_argument("--batch_size", type=int, default=batch, help=f"images of a step (default here: {batch})")
    parser.add_argument("--model", choices=MODEL_CONFIGS, default="mae_vit_base_patch16")
    tables = "peers (default) and segmentation: beside transformers'; mask_ratio (default): what masking saves"
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=["peers", "mask_ratio"], help=tables)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="beside transformers'")
    parser.add_argument("--step_of", nargs=3, metavar=("TABLE", "NETWORK", "MODE"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------ steps


def draw_images(batch_size: int, config: MAEConfig) -> Tensor:
    return torch.randn(batch_size, config.input_channels, *config.image_hw, device=DEVICE)


def build_optimizer(network: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)


def build_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, inputs: Sequence[Tensor], mode: str, compiler="inductor"
) -> Callable[[], None]:
    """Give one optimizer step: loss, gradients, clipping to a norm of one, AdamW."""
    dtype, compiled = MODES[mode]
    parameters = [p for p in network.parameters() if p.requires_grad]
    if compiled:
        network.compile(backend=compiler)  # in place, as the scripts do

    def step() -> None:
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = network(*inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def memory_gb() -> float:
    """Peak memory up to now in GB (1e9 bytes): of the GPU's allocator, or of this process on the CPU."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would give that of the process which started this one, where it is higher
        lines = status.read_text(encoding="utf-8").splitlines()
        (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
        return int(peak) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class Measured(NamedTuple):
    """Seconds of a call, those of the first one, and peak memory."""

    seconds: float
    first_s: float
    gb: float


def time_calls(run: Callable[[], object], timed_s: float) -> Measured:
    """Time a function: the median of three rounds of many calls, each of `timed_s`, whose ends alone are waited for."""
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    first_s, _, once = (time_run(run, DEVICE, time.perf_counter) for _ in range(3))
    calls = max(1, min(50, int(timed_s / once)))
    rounds = [time_run(lambda: [run() for _ in range(calls)], DEVICE, time.perf_counter) for _ in range(3)]
    return Measured(statistics.median(rounds) / calls, first_s, memory_gb())


def build_on_device(build: Callable[..., nn.Module], *args: object, **options: object) -> nn.Module:
    """Build a network where it trains: a GPU draws the random numbers of a billion weights in no time."""
    torch.compiler.reset()
    gc.collect()  # a compiled network that nobody needs any more refers to itself
    with DEVICE:
        network = build(*args, **options)
    return network.to(DEVICE).train()


def measure_step(args: argparse.Namespace, config: MAEConfig) -> None:
    """Print peak memory of a few steps above what the libraries take, and seconds; this process does nothing else."""
    table, name, mode = args.step_of
    if name == OURS and DEVICE.type == "cpu":
        keep_freed_memory()
    segments = table == "segmentation"
    if segments:
        config = dataclasses.replace(config, img_size=CROP_SIZE)
    inputs = [draw_images(args.batch_size, config)]
    if segments:
        inputs.append(torch.randint(NUM_CLASSES, (args.batch_size, *config.image_hw), device=DEVICE))
    before = memory_gb()
    network = SEGMENTATION[name](config, NUM_CLASSES) if segments else PRETRAINING[name](config, MASK_RATIO)
    if hasattr(network, "unfuse_attention") and DEVICE.type == "cpu" and MODES[mode][0] == torch.bfloat16:
        network.unfuse_attention()  # as pretrain_mae.py does
    step = build_step(network, build_optimizer(network.to(DEVICE).train()), inputs, mode)
    for _ in range(2):
        step()
    seconds = statistics.median(time_run(step, DEVICE) for _ in range(3))
    print(json.dumps({"gb": memory_gb() - before, "seconds": seconds}))


def measure_apart(flags: list[str], script: str = __file__) -> dict[str, float]:
    """Give what a new process measures: where its memory happens to lie changes the time, too."""
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(flags)} failed ({done.returncode}):\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def matrix_rate(dtype: torch.dtype, side: int = GPU_MATRIX if DEVICE.type == "cuda" else CPU_MATRIX) -> float:
    """Measure the FLOP/s of a large matrix product, the best of some."""
    a, b = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
    times = alternate({f"matrix product in {dtype}": lambda: a @ b}, 10, DEVICE, warmup=3)
    return 2 * side**3 / min(next(iter(times.values())))


# ------------------------------------------------------------------------------------------------ tables


def compare_peers(args: argparse.Namespace, config: MAEConfig, table: str = "peers") -> None:
    installed = importlib.util.find_spec("transformers") is not None
    if not installed:
        print("transformers is not installed, so it is not compared: pip install transformers", flush=True)
    keys = [(name, mode) for name in ([OURS, THEIRS] if installed else [OURS]) for mode in args.modes]
    flags = ["--model", args.model, "--batch_size", str(args.batch_size), "--step_of", table]
    found = take_turns(keys, args.rounds, lambda key: measure_apart([*flags, *key]))
    seconds, rows = {key: [step["seconds"] for step in steps] for key, steps in found.items()}, []
    for (name, mode), times in seconds.items():
        typical, gb = statistics.median(times), statistics.median(step["gb"] for step in found[name, mode])
        peers = [(THEIRS, mode), (THEIRS, args.modes[0])] if installed and name == OURS else []
        ratios = [ratio(seconds[peer], times) for peer in peers] or ["", ""]
        rows.append([name, mode, f"{typical:.3f}", f"{args.batch_size / typical:.2f}", f"{gb:.2f}", *ratios])
    header = ["network", "mode", "s/step", "images/s", "GB", "times as fast", f"as {THEIRS} in {args.modes[0]}"]
    title = f"{args.model}, {table}, batch {args.batch_size}"
    if table == "peers":  # consists of little but matrix products, whose rate is the most that can be had
        flops = training_flops(config, MASK_RATIO) * args.batch_size
        rates = {dtype: matrix_rate(dtype) for dtype in {MODES[mode][0] for mode in args.modes}}
        for row, ((_, mode), times) in zip(rows, seconds.items(), strict=True):
            row.append(f"{flops / statistics.median(times) / rates[MODES[mode][0]]:.0%}")
        header.append("of the matrix rate")
        title += f", {flops / args.batch_size / 1e9:.1f} GFLOP an image; matrix rate "
        title += ", ".join(f"{rate / 1e12:.2f} TFLOP/s in {str(dtype)[6:]}" for dtype, rate in rates.items())
    print_table(title, header, rows)


def compare_mask_ratios(args: argparse.Namespace, config: MAEConfig) -> None:
    inputs, mode = [draw_images(args.batch_size, config)], f"{'bfloat16' if DEVICE.type == 'cuda' else 'float32'} eager"
    networks = {  # all predict every patch, so that only what is encoded differs
        f"{mask_ratio:g} removed": build_on_device(build_ours, config, mask_ratio, predict_visible=True)
        for mask_ratio in MASK_RATIOS
    }
    usual, everything = f"{MASK_RATIO:g} removed", f"{MASK_RATIO:g} removed, all encoded with mask tokens"
    networks[everything] = build_on_device(build_full_encoder, config, MASK_RATIO)
    for network in networks.values():  # one set of weights, as there may be no room for four
        for name, parameter in networks[usual].named_parameters():
            owner, _, leaf = name.rpartition(".")
            if leaf != "mask_token":  # which may be the encoder's, of another width
                setattr(network.get_submodule(owner), leaf, parameter)
    optimizer = build_optimizer(networks[everything])
    steps = {name: build_step(network, optimizer, inputs, mode) for name, network in networks.items()}
    times = alternate(steps, args.rounds, DEVICE)
    rows = [[name, f"{statistics.median(found):.3f}", ratio(found, times[usual])] for name, found in times.items()]
    title = f"{args.model}, {mode}, batch {args.batch_size}: cost against the mask ratio"
    print_table(title, ["patches", "s/step", f"cost / that at {MASK_RATIO:g}"], rows)


TABLES = {
    "peers": compare_peers,
    "segmentation": functools.partial(compare_peers, table="segmentation"),
    "mask_ratio": compare_mask_ratios,
}


def main(args: argparse.Namespace) -> None:
    config = MODEL_CONFIGS[args.model]
    torch.manual_seed(0)
    if args.step_of:
        measure_step(args, config)
        return
    print(describe_machine(DEVICE), flush=True)
    for name in args.tables:
        TABLES[name](args, config)


if __name__ == "__main__":
    main(parse_args())
