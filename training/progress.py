"""What a run shows while it goes on: a bar, a line for each epoch, how fast it is and how long it will take."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from accelerate import Accelerator
from tqdm import tqdm

LINE_INTERVAL_S = 30  # between lines of a run whose output goes into a file
LONG_WAIT = 0.2  # share of the time that is worth a hint
DATA_HINT = (
    "waiting for data takes {:.0%} of the time: give more --num_workers where there are cores, pack the data "
    "(tools/pack_dataset.py), or pretrain with --repeated_sampling 4"
)


class Progress:
    """How far a run is, from the main process: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, accelerator: Accelerator, num_epochs: int, total_steps: int, step: int):
        self.is_main, on_terminal = accelerator.is_main_process, sys.stderr.isatty()
        show_bar = self.is_main and on_terminal
        self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True, disable=not show_bar)
        self.has_lines, self.said_at = self.is_main and not on_terminal, time.monotonic()
        self.num_epochs, self.total_steps = num_epochs, total_steps
        self.first_step, self.step, self.began = step, step, time.monotonic()

    def update(self) -> None:
        """Count a step."""
        self.step += 1
        self.bar.update()

    def close(self) -> None:
        self.bar.close()

    def say(self, text: str) -> None:
        """Print a line, from the main process."""
        if self.is_main:
            say(text)

    def show(self, epoch: int, row: Mapping) -> None:
        """Show the figures of a log row."""
        text = (
            f"loss {number(row['training_loss'])}, learning rate {row['learning_rate']:.1e}, "
            f"{row['images_per_second']:.1f} images/s, {row['data_wait_fraction']:.0%} waiting for data"
        )
        self.bar.set_description(f"epoch {epoch + 1}/{self.num_epochs}")
        self.bar.set_postfix_str(text, refresh=False)
        if self.has_lines and time.monotonic() - self.said_at >= LINE_INTERVAL_S:
            self.said_at = time.monotonic()
            self.say(f"{'step':<16}{self.step:,} of {self.total_steps:,}: {text}{self.time_left()}")

    def end_epoch(self, epoch: int, row: Mapping, figures: Mapping, best: float | None, saved_as: str | None) -> None:
        """Print what people watch, once an epoch is evaluated and saved."""
        parts = [f"{name} {number(value)}" for name, value in figures.items() if isinstance(value, float)]
        parts += [f"best {number(best)}"] * (best is not None)
        parts.append(f"{row['images_per_second']:.1f} images/s")
        parts += [f"saved as {saved_as}"] * (saved_as is not None)
        text = ", ".join([f"loss {number(row['training_loss'])}", *parts])
        self.say(f"{f'epoch {epoch + 1}/{self.num_epochs}':<16}{text}{self.time_left()}")

    def time_left(self) -> str:
        """Give the time that the rest will take, evaluations and saves included, as the end of a line."""
        made, left = self.step - self.first_step, self.total_steps - self.step
        if not made or not left:
            return ""
        return f", {duration((time.monotonic() - self.began) / made * left)} left"


def say(text: str) -> None:
    """Print a line at once: above a bar on a terminal, and in a file before its buffer is full."""
    tqdm.write(text)
    sys.stdout.flush()


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Say a time in its two largest units: 45 s, 12 min, 3 h 20 min, 2 d 5 h."""
    hours, minutes = divmod(round(seconds / 60), 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if hours == 0:
        return f"{minutes} min"
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


class StepClock:
    """Measure images per second and the share of the time that the loop waits for data, between log rows.

    Where that share is high in two readings in a row, `say` is told once what to do; not after the first reading, in
    which the workers start.
    """

    def __init__(self, say: Callable[[str], None] | None = None):
        self.say, self.readings, self.slow_readings = say, 0, 0
        self.restart()

    def restart(self) -> None:
        self.started, self.waited_s, self.images = time.perf_counter(), 0.0, 0

    def watch(self, loader: Iterable) -> Iterator:
        """Iterate over a loader, adding up the time spent in it and the images it gives."""
        batches, asked = iter(loader), time.perf_counter()
        for batch in batches:
            self.waited_s += time.perf_counter() - asked
            self.images += len(batch.images)
            yield batch
            asked = time.perf_counter()

    def read(self, num_processes: int) -> dict[str, float]:
        """Give the figures since the last reading, images counted over all processes, and start over."""
        elapsed_s = max(time.perf_counter() - self.started, 1e-9)
        images_per_second, waited = self.images * num_processes / elapsed_s, self.waited_s / elapsed_s
        self.readings += 1
        self.slow_readings = self.slow_readings + 1 if waited > LONG_WAIT and self.readings > 1 else 0
        if self.slow_readings == 2 and self.say is not None:
            self.say(DATA_HINT.format(waited))
            self.say = None
        self.restart()
        return {"images_per_second": images_per_second, "data_wait_fraction": waited}
