"""Draw the curves of one or several runs from their log.jsonl: one panel for each figure asked for.

python tools/plot_log.py work_dir/MAEPretraining/log.jsonl --output curve.png
"""

import argparse
import itertools
import json
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#1f6fb4", "#d1495b", "#3a8f4d", "#8e5ea2", "#c98a1b", "#444444")
PANEL_SIZE = (560, 320)
MARGIN = {"left": 70, "right": 16, "top": 34, "bottom": 40}
NUM_TICKS = 5
MAX_DOTS = 30  # fewer points than this are marked


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="log.jsonl files; each is one colour")
    parser.add_argument("--output", type=Path, required=True, help="picture to write")
    parser.add_argument("--overwrite", action="store_true", help="allow --output to exist")
    parser.add_argument("--x", default="epoch", help="horizontal axis (default: epoch)")
    parser.add_argument(
        "--y",
        nargs="+",
        default=["training_loss", "testing_loss"],
        help="figures, a panel each; several joined by + share one (default: training_loss testing_loss)",
    )
    return parser.parse_args(argv)


def read_points(log: Path, x: str, y: str) -> list[tuple[float, float | None]]:
    """Read a curve; a figure that is null, of a window whose steps were all left out, is None: a gap in the curve."""
    rows = []
    lines = log.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"line {number} of {log} is no JSON: {error}") from error
            print(f"{log}: the last line was cut off and is passed over")
    return [(row[x], row[y]) for row in rows if row.get(x) is not None and y in row]


def draw_panel(series: dict[str, list[tuple[float, float]]], title: str, x_name: str) -> Image.Image:
    """Draw named series of points as lines over common axes."""
    width, height = PANEL_SIZE
    picture = Image.new("RGB", PANEL_SIZE, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    known = [point for points in series.values() for point in points if point[1] is not None]
    xs, ys = zip(*known, strict=True)
    (x_low, x_high), (y_low, y_high) = ((min(v), max(v) if max(v) > min(v) else min(v) + 1) for v in (xs, ys))
    plot_width = width - MARGIN["left"] - MARGIN["right"]
    plot_height = height - MARGIN["top"] - MARGIN["bottom"]

    def place(x: float, y: float) -> tuple[float, float]:
        right, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return MARGIN["left"] + right * plot_width, height - MARGIN["bottom"] - up * plot_height

    for tick in range(NUM_TICKS + 1):
        share = tick / NUM_TICKS
        x, y = x_low + share * (x_high - x_low), y_low + share * (y_high - y_low)
        draw.line([place(x_low, y), place(x_high, y)], fill="#e0e0e0")
        draw.text((MARGIN["left"] - 6, place(x, y)[1]), f"{y:.4g}", fill="black", font=font, anchor="rm")
        draw.text((place(x, y)[0], height - MARGIN["bottom"] + 6), f"{x:.4g}", fill="black", font=font, anchor="mt")
    caption = f"{title} over {x_name}" if title else x_name
    draw.text((width / 2, height - 12), caption, fill="black", font=font, anchor="mm")
    legend_x = width - MARGIN["right"]
    for colour, (name, points) in reversed(list(zip(COLOURS, series.items(), strict=False))):
        for has_values, piece in itertools.groupby(points, lambda point: point[1] is not None):
            if has_values:
                places = [place(*point) for point in piece]
                draw.line(places, fill=colour, width=2)
                if len(points) <= MAX_DOTS or len(places) == 1:  # a line of one point would not be seen
                    for x, y in places:
                        draw.circle((x, y), 3, fill=colour)
        draw.text((legend_x, 10), name, fill=colour, font=font, anchor="rm")
        legend_x -= draw.textlength(name, font=font) + 14
    return picture


def main(args: argparse.Namespace) -> None:
    if args.output.exists() and not args.overwrite:
        raise FileExistsError(f"{args.output} exists; choose another --output or add --overwrite")
    panels = []
    words = [log.parent.name.split("_") for log in args.logs]
    shared = 0  # words that all names of runs begin with
    while all(len(name) > shared + 1 and name[shared] == words[0][shared] for name in words):
        shared += 1
    for names in args.y:
        series = {}
        figures = names.split("+")
        for log, run_words in zip(args.logs, words, strict=True):
            for name in figures:
                run = "_".join(run_words[shared:])
                label = " ".join([run] * (len(args.logs) > 1) + [name] * (len(figures) > 1)) or name
                points = read_points(log, args.x, name)
                if any(value is not None for _, value in points):
                    series[label] = points
        if not series:
            raise ValueError(f"no row of {', '.join(map(str, args.logs))} has both {args.x!r} and {names!r}")
        if len(series) > len(COLOURS):
            raise ValueError(f"{len(series)} curves are more than the {len(COLOURS)} colours of one panel")
        panels.append(draw_panel(series, names.replace("+", ", ") if len(args.logs) > 1 else "", args.x))
    columns = min(2, len(panels))
    sheet = Image.new("RGB", (columns * PANEL_SIZE[0], math.ceil(len(panels) / columns) * PANEL_SIZE[1]), "white")
    for index, panel in enumerate(panels):
        sheet.paste(panel, (index % columns * PANEL_SIZE[0], index // columns * PANEL_SIZE[1]))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output)
    print(f"{args.output}: {len(panels)} panels")


if __name__ == "__main__":
    main(parse_args())
