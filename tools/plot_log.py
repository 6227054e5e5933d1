"""Draw the curves of one or several runs: one panel for each figure asked for, a colour for each run.

python tools/plot_log.py work_dir/MAEPretraining --output curve.png
"""

import argparse
import itertools
import math
import sys
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from storage.console import explained_errors
from storage.files import user_path
from training.logs import Points, name_runs, read_points, read_rows

COLOURS = ("#1f6fb4", "#d1495b", "#3a8f4d", "#8e5ea2", "#c98a1b", "#444444", "#17a2a2", "#a0522d")
PANEL_SIZE = (560, 340)
MARGIN = {"left": 82, "right": 18, "top": 12, "bottom": 46}
LEGEND_LINE = 18  # pixels of height
SCALE = 2  # drawn this many times larger, then averaged: smooth lines
NUM_TICKS = 6  # about so many on an axis


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN", help="experiment folders or log.jsonl files")
    parser.add_argument("--output", type=user_path, required=True, help="picture to write, such as curve.png")
    parser.add_argument("--overwrite", action="store_true", help="allow --output to exist")
    parser.add_argument("--x", default="epoch", help="horizontal axis, such as step (default: epoch)")
    figures = "figures, a panel each; several joined by + share one (default: training_loss testing_loss)"
    parser.add_argument("--y", nargs="+", default=["training_loss", "testing_loss"], help=figures)
    smooth = "draw an exponential moving average that keeps this share at each row, 0 to 1, before the raw curve"
    parser.add_argument("--smooth", type=float, default=0.0, metavar="SHARE", help=f"{smooth} (default: 0, none)")
    parser.add_argument("--log_y", action="store_true", help="logarithmic vertical axes")
    args = parser.parse_args(argv)
    if not 0 <= args.smooth < 1:
        parser.error(f"--smooth {args.smooth:g} is no share from 0 to below 1; 0.9 is usual")
    if args.output.suffix.lower() not in Image.registered_extensions():
        parser.error(f"--output {args.output} has no ending of a picture; .png is usual")
    return args


# ------------------------------------------------------------------------------------------------ drawing


class Axis(NamedTuple):
    """The range of an axis, of logarithms where it is logarithmic, and its ticks with their texts."""

    low: float
    high: float
    ticks: dict[float, str]

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


def round_step(width: float) -> float:
    """Give the smallest of 1, 2, 5 x 10^k that divides a width into at most NUM_TICKS parts."""
    smallest = width / NUM_TICKS
    unit = 10.0 ** math.floor(math.log10(smallest))
    return next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= smallest * (1 - 1e-9))


def multiples(step: float, low: float, high: float) -> list[float]:
    """Give the multiples of a step in a range."""
    return [i * step for i in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]


def build_axis(values: list[float], *, log: bool = False, to_ticks: bool = False) -> Axis:
    """Choose the range of an axis by its values, wider where they are all alike, and round ticks.

    With `to_ticks` a linear axis begins and ends at one.
    """
    low, high = min(values), max(values)
    if log:
        low, high = (low, high) if high > low else (low / 2, high * 2)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = math.ceil(len(powers) / NUM_TICKS)
        ticks = [f * 10.0**k for k in powers[::every] for f in ((1, 2, 5) if every == 1 else (1,))]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        ticks = ticks if len(ticks) > 2 else multiples(round_step(high - low), low, high)
        return Axis(math.log10(low), math.log10(high), {math.log10(tick): f"{tick:.6g}" for tick in ticks})
    if not high - low > 1e-9 * abs(high):
        low, high = low - max(1, abs(low)) / 2, high + max(1, abs(high)) / 2
    step = round_step(high - low)
    if to_ticks:
        low = min(low, step * math.floor(low / step + 1e-6))
        high = max(high, step * math.ceil(high / step - 1e-6))
    return Axis(low, high, {tick: f"{tick:.10g}" for tick in multiples(step, low, high)})


def smooth(points: Points, share: float) -> Points:
    """Average exponentially, each row with the weight (1 - share) share^age over the sum of them; gaps stay gaps."""
    smoothed, total, weight = [], 0.0, 0.0
    for x, y in points:
        if y is not None:
            total, weight = share * total + (1 - share) * y, share * weight + (1 - share)
        smoothed.append((x, None if y is None else total / weight))
    return smoothed


def lighten(colour: str) -> str:
    return "#" + "".join(f"{(255 * 2 + int(colour[i : i + 2], 16)) // 3:02x}" for i in (1, 3, 5))


def draw_panel(
    series: dict[str, Points],
    x_axis: Axis,
    x_title: str,
    y_title: str,
    *,
    smoothing: float = 0.0,
    log_y: bool = False,
) -> Image.Image:
    """Draw named series of points as lines over common axes, with a legend above them."""
    font = ImageFont.load_default(size=12 * SCALE)
    width, height = (side * SCALE for side in PANEL_SIZE)
    # The legend, in as many lines as its names need, and under it the frame
    places, across, line = [], 0, 0
    for name in series:
        needed = font.getlength(name) + 34 * SCALE
        if across and MARGIN["left"] * SCALE + across + needed > width:
            across, line = 0, line + 1
        places.append((MARGIN["left"] * SCALE + across, (MARGIN["top"] + line * LEGEND_LINE) * SCALE))
        across += needed
    legend_height = (line + 1) * LEGEND_LINE
    picture = Image.new("RGB", (width, height + legend_height * SCALE), "white")
    draw = ImageDraw.Draw(picture)
    left, right = MARGIN["left"] * SCALE, width - MARGIN["right"] * SCALE
    top, bottom = (MARGIN["top"] + legend_height) * SCALE, picture.height - MARGIN["bottom"] * SCALE

    values = [y for curve in series.values() for _, y in curve if y is not None]
    y_axis = build_axis(values, log=log_y, to_ticks=True)

    def place(x: float, y: float) -> tuple[float, float]:
        up = y_axis.share(math.log10(y) if log_y else y)
        return left + x_axis.share(x) * (right - left), bottom - up * (bottom - top)

    # Grid, ticks and titles
    for value, text in y_axis.ticks.items():
        y = bottom - y_axis.share(value) * (bottom - top)
        draw.line([(left, y), (right, y)], fill="#e0e0e0", width=SCALE)
        draw.text((left - 6 * SCALE, y), text, fill="black", font=font, anchor="rm")
    for value, text in x_axis.ticks.items():
        x = left + x_axis.share(value) * (right - left)
        draw.line([(x, bottom), (x, bottom + 4 * SCALE)], fill="#808080", width=SCALE)
        draw.text((x, bottom + 7 * SCALE), text, fill="black", font=font, anchor="mt")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill="#808080", width=SCALE)
    draw.text(((left + right) / 2, picture.height - 14 * SCALE), x_title, fill="black", font=font, anchor="mm")
    upright = Image.new("RGB", (bottom - top, 18 * SCALE), "white")
    middle = (upright.width / 2, upright.height / 2)
    ImageDraw.Draw(upright).text(middle, y_title, fill="black", font=font, anchor="mm")
    picture.paste(upright.rotate(90, expand=True), (2 * SCALE, top))

    # Curves: all raw ones first, so that none hides what is smoothed
    curves = [(colour, curve) for colour, curve in zip(COLOURS, series.values(), strict=False)]
    if smoothing:
        light = [(lighten(colour), curve) for colour, curve in curves]
        curves = light + [(colour, smooth(curve, smoothing)) for colour, curve in curves]
    for colour, curve in curves:
        for is_gap, group in itertools.groupby(curve, key=lambda point: point[1] is None):
            spots = [] if is_gap else [place(*point) for point in group]
            draw.line(spots, fill=colour, width=2 * SCALE, joint="curve")
            for spot in spots if len(spots) == 1 else ():  # a point between two gaps has no line
                draw.circle(spot, 3 * SCALE, fill=colour)
    for colour, name, (x, y) in zip(COLOURS, series, places, strict=False):
        draw.line([(x, y), (x + 16 * SCALE, y)], fill=colour, width=3 * SCALE)
        draw.text((x + 21 * SCALE, y), name, fill="black", font=font, anchor="lm")
    return picture.reduce(SCALE)


# ------------------------------------------------------------------------------------------------ the command


def collect_series(logs: dict[Path, list[dict]], args: argparse.Namespace, figures: str) -> dict[str, Points]:
    """Give the curves of a panel by their names in the legend; ValueError where no run has the figures."""
    series, names, runs = {}, figures.split("+"), name_runs(list(logs))
    for (log, rows), name in itertools.product(logs.items(), names):
        points = read_points(log, rows, args.x, name)
        hidden = sum(args.log_y and y is not None and y <= 0 for _, y in points)
        if hidden:
            print(f"{log}: {hidden} values of {name} are 0 or less, which --log_y cannot show, and are gaps")
            points = [(x, None if y is None or y <= 0 else y) for x, y in points]
        if any(y is not None for _, y in points):
            label = [runs[log]] * (len(logs) > 1 or len(names) == 1) + [name] * (len(names) > 1)
            series[" ".join(label)] = points
    if not series:
        known = sorted({key for rows in logs.values() for row in rows for key in row})
        there = f"there are {', '.join(known)}" if known else "there is no complete row yet"
        raise ValueError(f"no row of {', '.join(map(str, logs))} has both {args.x!r} and {figures!r}; {there}")
    if len(series) > len(COLOURS):
        raise ValueError(f"{len(series)} curves are more than the {len(COLOURS)} colours of one panel")
    return series


def main(args: argparse.Namespace) -> None:
    if args.output.exists() and not args.overwrite:
        raise FileExistsError(f"{args.output} exists; choose another --output or add --overwrite")
    logs = {log: read_rows(log) for log in (run / "log.jsonl" if run.is_dir() else run for run in args.runs)}
    collected = [collect_series(logs, args, figures) for figures in args.y]
    x_axis = build_axis([x for series in collected for curve in series.values() for x, _ in curve])  # of all panels
    panels = [
        draw_panel(
            series,
            x_axis,
            args.x,
            figures.replace("+", ", ") + (" (logarithmic)" if args.log_y else ""),
            smoothing=args.smooth,
            log_y=args.log_y,
        )
        for series, figures in zip(collected, args.y, strict=True)
    ]
    columns, height = min(2, len(panels)), max(panel.height for panel in panels)
    sheet = Image.new("RGB", (columns * PANEL_SIZE[0], math.ceil(len(panels) / columns) * height), "white")
    for index, panel in enumerate(panels):
        sheet.paste(panel, (index % columns * PANEL_SIZE[0], index // columns * height))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output)
    print(f"{args.output}: {len(panels)} panels")


if __name__ == "__main__":
    with explained_errors():
        main(parse_args())
