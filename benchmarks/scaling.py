"""How much faster than one process are two, with gradients averaged after every forward pass or after several?

    python benchmarks/scaling.py --batch_size 8

Two processes start, as `accelerate launch` starts them, on two GPUs where there are two and else on the CPU with one
thread each. In turns, the first one trains alone while the other sleeps, and both train together.
"""

import argparse
import os
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from measure import describe_machine, print_table, ratio
from torch import nn
from torch.profiler import ProfilerActivity, profile

from model import MODEL_CONFIGS, ViTMAEForPreTraining
from training.process import build_accelerator

PROCESSES = 2


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODEL_CONFIGS, default="mae_vit_base_patch16")
    parser.add_argument("--batch_size", type=int, default=8, help="images of a forward pass of a process (default: 8)")
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 4], help="forward passes of a step")
    parser.add_argument("--rounds", type=int, default=5, help="alternations (default: 5)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def launch(argv: list[str]) -> None:
    """Start this script again as two processes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(PROCESSES)]
    command += ["--num_machines", "1", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = dict(os.environ)
    if torch.cuda.device_count() >= PROCESSES:
        command += ["--mixed_precision", "bf16"]
    else:
        command += ["--mixed_precision", "no"]
        environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, __file__, "--worker", *argv], env=environment, check=True)


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

    def step(network: nn.Module, passes: int) -> float:
        """Make one optimizer step as the training scripts do, and give its seconds."""
        started = time.perf_counter()
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
        return time.perf_counter() - started

    def measure(alone: bool, passes: int) -> float:
        dist.barrier(meeting)
        seconds = 0.0
        if not alone or accelerator.is_main_process:
            seconds = step(bare_model if alone else model, passes)
        dist.barrier(meeting)
        return seconds

    rows = []
    for passes in args.accumulation:
        times: dict[bool, list[float]] = {True: [], False: []}
        for index in range(args.rounds + 1):
            for alone in times:
                seconds = measure(alone, passes)
                if index:  # the first is for warming up
                    times[alone].append(seconds)
        dist.barrier(meeting)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step(model, passes)
        syncs = sum(event.count for event in profiler.key_averages() if "all_reduce" in event.key.lower())
        if not accelerator.is_main_process:
            continue
        images_per_step = args.batch_size * passes
        alone, together = (min(times[key]) for key in (True, False))
        rows.append(
            [
                str(passes),
                f"{images_per_step / alone:.2f}",
                f"{PROCESSES * images_per_step / together:.2f}",
                ratio([PROCESSES * seconds for seconds in times[True]], times[False]),
                str(syncs),
            ]
        )
    if accelerator.is_main_process:
        header = ["forward passes a step", "images/s of one", "of two, best", "times as fast", "gradient sums a step"]
        print(describe_machine(device))
        print_table(f"{args.model}, {args.batch_size} images a pass: {PROCESSES} processes against one", header, rows)
    accelerator.end_training()


if __name__ == "__main__":
    arguments = parse_args()
    if arguments.worker:
        work(arguments)
    else:
        launch(sys.argv[1:])
