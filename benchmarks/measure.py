"""What the benchmarks share: flags, the machine, clock, turns, tables.

A benchmark that imports this finds the project's modules, whatever folder it is started in.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.process import find_commit, name_device

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def build_parser(description: str, *, rounds: int = 5) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"times that each is measured (default: {rounds})")
    return parser


def describe_machine(device: torch.device) -> str:
    """Say in one line on what, when and at which commit this was measured."""
    today = time.strftime("%Y-%m-%d")
    return f"{name_device(device)}, torch {torch.__version__}, commit {find_commit()}, {today}"


# ------------------------------------------------------------------------------------------------ time


def read_clock() -> float:
    """Give seconds: on one CPU thread those that this process computed, so that neighbours on a shared machine do not
    count; else those of the wall.
    """
    alone = not torch.cuda.is_available() and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def time_run(run: Callable[[], object], device: torch.device, clock: Callable[[], float] = read_clock) -> float:
    """Give the seconds that a run takes."""
    started = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def alternate(
    runs: Mapping[Hashable, Callable[[], object]],
    rounds: int,
    device: torch.device = CPU,
    *,
    warmup: int = 1,
    clock: Callable[[], float] = read_clock,
) -> dict[Hashable, list[float]]:
    """Time every run once a round, in turns, so that what disturbs the machine disturbs all: seconds by name."""
    for name, run in runs.items():
        print(f"warming up: {name}", file=sys.stderr, flush=True)
        for _ in range(warmup):
            time_run(run, device)
    return take_turns(list(runs), rounds, lambda name: time_run(runs[name], device, clock))


def take_turns(names: list, rounds: int, measure: Callable[[Hashable], float]) -> dict[Hashable, list[float]]:
    """Measure each once a round; nobody always follows the same one."""
    found = {name: [] for name in names}
    for index in range(rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            found[name].append(measure(name))
        print(f"round {index + 1} of {rounds}", file=sys.stderr, flush=True)
    return found


# ------------------------------------------------------------------------------------------------ tables


def spread(values: Sequence[float], form: str = ".3g") -> str:
    """Give the median of what was measured, with smallest and largest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def ratio(slower: Sequence[float], faster: Sequence[float]) -> str:
    """Give how many times as fast the second is, round by round: median, smallest and largest."""
    return spread([a / b for a, b in zip(slower, faster, strict=True)], ".2f")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table under its title."""
    print(f"\n{title}\n")
    for cells in (header, ["---"] * len(header), *rows):
        print_row(cells)


def print_row(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)
