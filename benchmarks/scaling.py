"""How much faster than one process are two, with gradients averaged after every forward pass or after several?

    python benchmarks/scaling.py --batch_size 8

Two processes start, as `accelerate launch` starts them, on two GPUs where there are two and else on the CPU with one
thread each. In turns, the first one trains alone while the other sleeps, and both train together.
"""

import argparse
import os
import sys
import time

import torch
import torch.distributed as dist
from measure import CPU, alternate, build_parser, describe_machine, launch_two, print_table, ratio
from torch import nn
from torch.profiler import ProfilerActivity, profile

from model import MODEL_CONFIGS, ViTMAEForPreTraining
from training.process import build_accelerator


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    parser.add_argument("--model", choices=MODEL_CONFIGS, default="mae_vit_base_patch16")
    parser.add_argument("--batch_size", type=int, default=8, help="images of a forward pass of a process (default: 8)")
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 4], help="forward passes of a step")
    return parser.parse_args(argv)


def work(args: argparse.Namespace) -> None:
    """Measure, on each of the processes; the first one prints."""
    accelerator = build_accelerator(1)
    device = accelerator.device
    torch.manual_seed(accelerator.process_index)
    bare_model = ViTMAEForPreTraining(MODEL_CONFIGS[args.model])
    optimizer = torch.optim.AdamW(bare_model.parameters(), lr=1e-4, fused=True)
    model, optimizer = accelerator.prepare(bare_model, optimizer)
    images = torch.randn(args.batch_size, 3, *MODEL_CONFIGS[args.model].image_hw, device=device)
    meeting = dist.new_group(backend="gloo")  # waiting there takes neither a core nor a GPU

    def step(network: nn.Module, passes: int) -> None:
        """Make one optimizer step as the training scripts do."""
        accelerator.gradient_accumulation_steps, accelerator.step = passes, 0
        for _ in range(passes):
            with accelerator.accumulate(network):
                accelerator.backward(network(images, predict_visible=False).loss)
                if accelerator.sync_gradients:
                    nn.utils.clip_grad_norm_(bare_model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def run(alone: bool, passes: int) -> None:
        """Make a step on the first process or on both, and wait for the other."""
        if not alone or accelerator.is_main_process:
            step(bare_model if alone else model, passes)
        dist.barrier(meeting)

    rows = []
    for passes in args.accumulation:
        runs = {"alone": lambda passes=passes: run(True, passes), "both": lambda passes=passes: run(False, passes)}
        times = alternate(runs, args.rounds, device, clock=time.perf_counter)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step(model, passes)
        syncs = sum(event.count for event in profiler.key_averages() if "all_reduce" in event.key.lower())
        alone, both = (args.batch_size * passes / min(found) for found in times.values())
        faster = ratio([2 * seconds for seconds in times["alone"]], times["both"])
        rows.append([str(passes), f"{alone:.2f}", f"{2 * both:.2f}", faster, str(syncs)])
    if accelerator.is_main_process:
        header = ["forward passes a step", "images/s of one", "of two, best", "times as fast", "gradient sums a step"]
        print(describe_machine(device))
        print_table(f"{args.model}, {args.batch_size} images a pass: two processes against one", header, rows)
    accelerator.end_training()


if __name__ == "__main__":
    arguments = parse_args()
    if "WORLD_SIZE" in os.environ:
        work(arguments)
    else:
        launch_two(__file__, sys.argv[1:], torch.device("cuda") if torch.cuda.device_count() >= 2 else CPU)
